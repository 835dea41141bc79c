"""The contrastive recipe: its mechanism in numbers, and that it learns."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from descant.datamodules.base import BatchDataset, DataModule, Rows
from descant.modules.core.batch import Batch
from descant.modules.core.protocols import Embeds, ForksFeatures, HasObjective, HasTowers
from descant.modules.evaluation.metrics import retrieval_ranks
from descant.modules.losses import InfoNCE, SigLIP
from descant.modules.objectives.hard_negatives import Negatives
from descant.modules.objectives.intra import Intra
from descant.modules.towers import Tokens, Tower, Towers
from descant.recipes import Contrastive
from tests.step_toy import QUIET
from tests.tolerance import F32, rounding, ulps


class Line(Tower):
    """A linear tower that counts the rows it sees."""

    def __init__(self, width_in: int, width: int = 16) -> None:
        super().__init__()
        self.width, self.seen = width, 0
        self.linear = nn.Linear(width_in, width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tokens:
        self.seen += len(x)
        return Tokens(self.linear(x)[:, None], torch.ones(len(x), 1, dtype=torch.bool))


def recipe(**options: object) -> Contrastive:
    torch.manual_seed(0)
    towers = Towers(image=Line(8), text=Line(6), audio=Line(4))
    return Contrastive(towers, width=8, **options)  # type: ignore[arg-type]


def batch(rows: int = 6, seed: int = 0) -> Batch:
    g = torch.Generator().manual_seed(seed)
    inputs = {m: torch.randn(rows, w, generator=g) for m, w in (("image", 8), ("text", 6), ("audio", 4))}
    return Batch(inputs, {m: torch.ones(rows, dtype=torch.bool) for m in inputs})


def total(model: Contrastive, b: Batch) -> Tensor:
    return model.step(model.terms(b), b).total


def gradients(model: Contrastive, b: Batch) -> dict[str, Tensor]:
    model.zero_grad()
    total(model, b).backward()
    return {n: p.grad.clone() if p.grad is not None else torch.zeros_like(p) for n, p in model.named_parameters()}


def test_all_pairs_or_the_chosen_ones() -> None:
    assert list(recipe().terms(batch())) == ["image-text", "image-audio", "text-audio"]
    assert list(recipe(pairs=[["text", "audio"]]).terms(batch())) == ["text-audio"]
    with pytest.raises(ValueError, match=r"no tower 'sound'; the towers are image, text, audio"):
        recipe(pairs=[["image", "sound"]])
    with pytest.raises(ValueError, match="not two modalities"):
        recipe(pairs=[["image", "text", "image"]])
    with pytest.raises(ValueError, match="negatives: no tower 'sketch'; the towers are image, text"):
        recipe(negatives=Negatives(("image", "sketch")))
    with pytest.raises(ValueError, match="intra: no tower 'video'"):
        recipe(intra=Intra(16, modality="video"))
    with pytest.raises(ValueError, match="two modalities"):
        Contrastive(Towers(image=Line(8)))


def test_a_pair_is_its_loss_of_the_embeddings() -> None:
    model, b = recipe(pairs=[["image", "text"]]), batch()
    z = model.embed(b)
    wanted = InfoNCE()(z["image"], z["text"], b.content_id, torch.ones(6, dtype=torch.bool)).mean()
    torch.testing.assert_close(total(model, b), wanted, **rounding(64, F32))
    torch.testing.assert_close(z["image"].norm(dim=1), torch.ones(6), **rounding(16, F32))


def test_the_order_of_the_parts_is_free() -> None:
    for loss in (InfoNCE(), SigLIP()):
        model, b = recipe(loss=loss), batch()
        order = torch.tensor([5, 2, 0, 1, 4, 3])
        torch.testing.assert_close(total(model, b), total(model, b.select(order)), **rounding(64, F32))


def test_absent_samples_change_nothing_and_cost_nothing() -> None:
    """A batch with absent rows has the gradients of the batch without them, and its towers see fewer rows."""
    model, b = recipe(pairs=[["image", "text"]]), batch()
    here = torch.tensor([True, True, False, True, False, True])
    b.present["text"] = here
    b.step = dict(b.present)
    b.inputs["text"][~here] = torch.nan
    with_absent = gradients(model, b)
    text = model.towers["text"]
    assert isinstance(text, Line)
    text.seen = 0
    total(model, b)
    assert text.seen == 4
    small = gradients(model, batch().select(here.nonzero().squeeze(1)))
    small_batch = batch().select(here.nonzero().squeeze(1))
    small_batch.step = dict(small_batch.present)
    small = gradients(model, small_batch)
    for name, grad in with_absent.items():
        # gradients of up to 3, as sums over six rows and eight columns
        torch.testing.assert_close(grad, small[name], rtol=0, atol=3 * ulps(16, F32))


def test_a_modality_absent_everywhere_gives_zero_and_reaches_every_parameter() -> None:
    model, b = recipe(), batch()
    b.present["audio"] = torch.zeros(6, dtype=torch.bool)
    b.step = dict(b.present)
    model.zero_grad()
    objective = model.step(model.terms(b), b)
    objective.total.backward()
    assert float(objective.terms["image-audio"]) == float(objective.terms["text-audio"]) == 0.0
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        if name.startswith(("towers.audio", "heads.audio")):
            assert not parameter.grad.any(), name
        elif name.startswith("towers"):
            assert parameter.grad.any(), name


def test_one_weight_on_a_term_scales_that_term_alone() -> None:
    plain, weighted = recipe(), recipe(mix={"image-text": 3.0})
    a, b = gradients(plain, batch()), gradients(weighted, batch())
    only = gradients(recipe(pairs=[["image", "text"]]), batch())
    for name in only:
        if name.startswith("towers"):
            # what is subtracted has gradients of up to 40
            torch.testing.assert_close(b[name] - a[name], 2 * only[name], rtol=0, atol=40 * ulps(8, F32))


def test_a_rule_at_the_fork_meets_both_pairs_of_a_modality() -> None:
    model, met = recipe(), []

    def rule(g_KBD: Tensor, names: tuple[str, ...]) -> Tensor:
        met.append((names, tuple(g_KBD.shape)))
        return g_KBD.sum(0)

    plain = gradients(model, batch())
    model.hooks.rule = rule
    ruled = gradients(model, batch())
    assert {names for names, _ in met} == set(model.forks.values())
    assert {shape for _, shape in met} == {(2, 6, 8)}
    for name, grad in plain.items():
        torch.testing.assert_close(ruled[name], grad, rtol=0, atol=5 * ulps(16, F32))  # of up to 5


def test_the_intra_modal_term_needs_a_second_view() -> None:
    model, b = recipe(pairs=[["image", "text"]], intra=Intra(width=16, out=4, hidden=8)), batch()
    with pytest.raises(ValueError, match=r"^the data has no 'image@2': data\.views \{image: 2\}"):
        model.terms(b)
    b.inputs["image@2"] = b.inputs["image"] + 0.1
    terms = model.terms(b)
    assert list(terms) == ["image-text", "image-image"]
    assert terms["image-image"].value.shape == (6,)


def test_protocols() -> None:
    model = recipe()
    assert isinstance(model, HasObjective)
    assert isinstance(model, HasTowers)
    assert isinstance(model, Embeds)
    assert isinstance(model, ForksFeatures)


class Pairs(BatchDataset):
    """Two linear views of one hidden code: what a contrastive recipe must be able to match."""

    def __init__(self, rows: int = 128, seed: int = 0) -> None:
        super().__init__(seed=0)
        g = torch.Generator().manual_seed(seed)
        code, mixes = torch.randn(rows, 4, generator=g), torch.Generator().manual_seed(9)
        self.x = {m: code @ torch.randn(4, w, generator=mixes) for m, w in (("image", 8), ("text", 6), ("audio", 4))}

    def __len__(self) -> int:
        return len(self.x["image"])

    def present(self, index_N: Any) -> dict[str, Tensor]:
        return {m: torch.ones(len(index_N), dtype=torch.bool) for m in self.x}

    def rows(self, index_B: Any, draw_B: Any) -> Rows:
        return Rows({m: x[index_B] for m, x in self.x.items()}, {}, torch.as_tensor(index_B))


class PairData(DataModule):
    @property
    def modalities(self) -> tuple[str, ...]:
        return ("image", "text", "audio")

    def training_set(self) -> Pairs:
        return Pairs()

    def evaluation_sets(self, stage: str) -> dict[str, BatchDataset]:
        return {"val": Pairs(64, seed=1)}


def fit(model: Contrastive, data: DataModule, steps: int, accumulate: int = 1) -> None:
    L.Trainer(max_steps=steps, accumulate_grad_batches=accumulate, **QUIET).fit(model, datamodule=data)


def held_out_recall(model: Contrastive) -> float:
    data = Pairs(64, seed=1)
    z = model.embed(Batch(data.x, data.present(range(64))))
    rank_Q = retrieval_ranks(z["image"], torch.arange(64), z["audio"], torch.arange(64))
    return float((rank_Q < 1).float().mean())


def test_it_learns_what_was_held_out() -> None:
    model = recipe(optimizer=lambda params: torch.optim.AdamW(params, lr=1e-2))
    before = held_out_recall(model)
    fit(model, PairData(batch_size=64), steps=80)
    assert before < 0.15
    assert held_out_recall(model) > 0.8


def test_accumulating_small_batches_is_refused() -> None:
    with pytest.raises(ValueError, match=r"accumulate_grad_batches 2: Contrastive contrasts .* use model\.chunks 2"):
        fit(recipe(), PairData(batch_size=64), steps=1, accumulate=2)
