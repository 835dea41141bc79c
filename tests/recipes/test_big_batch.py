"""Ranks and chunks against one process with the big batch: the loss, and every parameter's gradient.

Every contrastive term, for two and three modalities, with missing modalities, equal keys and padding rows.
Letters: G samples of the big batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from descant.modules.core.batch import Batch
from descant.modules.losses import Chunks, ContrastiveLoss, InfoNCE, Ring, RingSigLIP, SigLIP
from descant.modules.objectives.intra import Intra
from descant.modules.towers import Tokens, Tower, Towers
from descant.recipes import Contrastive
from tests.ranks import run_ranks
from tests.tolerance import F32, F64, ulps

#: Of the largest gradient: sums over rows, widths and negatives.
EXACT = {F32: ulps(32, F32), F64: ulps(4096, F64)}
LOSSES: dict[str, Callable[[], ContrastiveLoss]] = {
    "InfoNCE": InfoNCE,
    "SigLIP": SigLIP,
    "RingSigLIP": lambda: RingSigLIP(rows=3),
    "RingSigLIP whole": lambda: RingSigLIP(rows=None),
    "InfoNCE, ring": lambda: InfoNCE(exchange=Ring(3)),
    "InfoNCE, chunks": lambda: InfoNCE(exchange=Chunks(3)),
    "SigLIP, chunks": lambda: SigLIP(exchange=Chunks(3)),
}
WIDTHS = {"image": 8, "text": 6, "audio": 4}
MODALITIES = (("image", "text"), ("image", "text", "audio"))
CHUNKS = (1, 2, 4)
G = 16

#: loss, modalities, dtype, chunks
Case = tuple[str, tuple[str, ...], torch.dtype, int]
#: Chunks of towers are tried with the losses that are older than exchanges.
CASES: list[Case] = [case for case in product(LOSSES, MODALITIES, EXACT, CHUNKS) if case[-1] == 1 or "," not in case[0]]


class Curve(Tower):
    """Two layers whose rows do not meet."""

    def __init__(self, width_in: int, width: int = 8) -> None:
        super().__init__()
        self.width = width
        self.layers = nn.Sequential(nn.Linear(width_in, width), nn.Tanh(), nn.Linear(width, width))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tokens:
        return Tokens(self.layers(x)[:, None], torch.ones(len(x), 1, dtype=torch.bool))


def recipe_of(case: Case) -> Contrastive:
    loss, modalities, dtype, chunks = case
    torch.manual_seed(0)
    towers = Towers(others={m: Curve(WIDTHS[m]) for m in modalities})
    intra = Intra(width=8, out=4, hidden=8)
    return Contrastive(towers, width=8, loss=LOSSES[loss](), intra=intra, chunks=chunks).to(dtype).train()


def big_batch(case: Case) -> Batch:
    """16 rows: some alike, some without a modality, two of padding; every fourth row from the third lacks audio."""
    _, modalities, dtype, _ = case
    generator = torch.Generator().manual_seed(1)
    content = {m: torch.randn(G, WIDTHS[m], generator=generator, dtype=torch.float64) for m in WIDTHS}
    content["image@2"] = content["image"] + 0.3 * torch.randn(G, 8, generator=generator, dtype=torch.float64)
    real = torch.arange(G) < G - 2
    present = {"image": real.clone(), "text": real.clone(), "audio": real.clone()}
    present["image"][[1, 6]] = False
    present["text"][[2, 6, 9]] = False
    present["audio"][3::4] = False  # on four ranks the last one has none
    for name, x in content.items():  # what an absent row holds is nobody's business
        x[~present[name.partition("@")[0]]] = torch.nan
    key = torch.arange(G)
    key[[5, 11]] = 0
    key[13] = 4
    inputs = {name: x.to(dtype) for name, x in content.items() if name.partition("@")[0] in modalities}
    return Batch(inputs, {m: present[m] for m in modalities}, content_id=key)


def found(case: Case, rank: int = 0, world: int = 1) -> dict[str, Tensor]:
    """Loss and gradients of the step, averaged over ranks as a strategy does it."""
    recipe = recipe_of(case)
    batch = big_batch(case).select(slice(rank, None, world))
    recipe.step.world = world
    recipe.step.require_chunks(len(batch))
    objective = recipe.step(recipe.terms(batch), batch)
    torch.autograd.backward(objective.total)
    values = {"loss": objective.total.detach()}
    values |= {f"loss/{name}": value.detach() for name, value in objective.terms.items()}
    for name, parameter in recipe.named_parameters():
        assert parameter.grad is not None, name
        values[name] = parameter.grad
    if world > 1:
        whole = torch.cat([value.reshape(-1) for value in values.values()])
        dist.all_reduce(whole)
        parts = whole.div_(world).split([value.numel() for value in values.values()])
        values = {name: part.view(values[name].shape) for name, part in zip(values, parts, strict=True)}
    return values


def gap(values: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """Largest difference relative to the largest entry, of losses and of gradients."""
    assert values.keys() == wanted.keys()
    worst = 0.0
    for names in ([n for n in wanted if n.startswith("loss/")], [n for n in wanted if not n.startswith("loss")]):
        size = max(float(wanted[n].abs().max()) for n in names)
        worst = max([worst, *(float((values[n] - wanted[n]).abs().max()) / size for n in names)])
    return worst


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("modalities", MODALITIES, ids=len)
def test_chunks_equal_the_big_batch(loss: str, modalities: tuple[str, ...]) -> None:
    for dtype, exact in EXACT.items():
        wanted = found((loss, modalities, dtype, 1))
        assert any(value.any() for name, value in wanted.items() if name.startswith("towers"))
        for chunks in CHUNKS[1:]:
            assert gap(found((loss, modalities, dtype, chunks)), wanted) < exact


@pytest.mark.parametrize("modalities", MODALITIES, ids=len)
def test_the_ring_equals_the_gathered_matrix(modalities: tuple[str, ...]) -> None:
    for dtype, exact in EXACT.items():
        for name in LOSSES:
            plain = "InfoNCE" if "InfoNCE" in name else "SigLIP"
            assert gap(found((name, modalities, dtype, 1)), found((plain, modalities, dtype, 1))) < exact


def test_single_precision_is_near_double() -> None:
    for loss, modalities in product(LOSSES, MODALITIES):
        single, double = (found((loss, modalities, dtype, 1)) for dtype in EXACT)
        assert gap({name: x.double() for name, x in single.items()}, double) < ulps(84, F32)


def on_a_rank(rank: int, world: int) -> dict[Case, dict[str, Tensor]]:
    dist.init_process_group("gloo")
    values = {case: found(case, rank, world) for case in fitting(world)}
    dist.destroy_process_group()
    return values


def fitting(world: int) -> Iterator[Case]:
    return (case for case in CASES if G // world % case[-1] == 0)


@pytest.mark.ddp
@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_equal_the_big_batch(world: int) -> None:
    cases = list(fitting(world))
    wanted = {case: found((*case[:-1], 1)) for case in cases}
    for values in run_ranks(world, on_a_rank, world):
        assert list(values) == cases
        gaps = {case: gap(values[case], wanted[case]) / EXACT[case[2]] for case in cases}
        assert {case: x for case, x in gaps.items() if x >= 1} == {}
