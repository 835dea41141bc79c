"""The fusion classifier: its terms in numbers, however a step is cut, and that it learns what needs both modalities."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import lightning as L
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from descant.datamodules.base import BatchDataset, DataModule, Rows
from descant.modules.balance.mcr import CollaborativeGame, IndependentGame
from descant.modules.core.batch import Batch
from descant.modules.core.protocols import (
    Embeds,
    ForksFeatures,
    Fuses,
    HasObjective,
    HasTowers,
    MultimodalClassifier,
    Scores,
    Unimodal,
)
from descant.modules.fusion.classifiers import AttentionFusion, FusionHead, LateFusion, MidFusion, cross_entropy
from descant.modules.towers import Tokens, Tower, Towers
from descant.recipes import Fusion
from tests.ranks import run_ranks
from tests.step_toy import QUIET, KeepGradients, largest_gap
from tests.tolerance import F32, F64, rounding, ulps

CLOSE = rounding(64, F32)  # a tower and a fusion: some sums over 8 to 16 numbers
WIDTHS = {"image": 8, "text": 6}
FUSIONS = {
    "late": LateFusion,
    "mid": lambda: MidFusion(hidden=8),
    "attention": lambda: AttentionFusion(width=8, depth=1, heads=2),
}
every = pytest.mark.parametrize("kind", FUSIONS)


class Line(Tower):
    """A small tower that counts the rows it sees."""

    def __init__(self, width_in: int, width: int = 16) -> None:
        super().__init__()
        self.width, self.seen = width, 0
        self.linear = nn.Linear(width_in, width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tokens:
        self.seen += len(x)
        return Tokens(self.linear(x).tanh()[:, None], torch.ones(len(x), 1, dtype=torch.bool))


def recipe(kind: str = "late", unimodal: bool = True, classes: int = 4, **options: Any) -> Fusion:
    torch.manual_seed(0)
    towers = Towers(others={m: Line(width) for m, width in WIDTHS.items()})
    fusion: FusionHead = FUSIONS[kind]()
    return Fusion(towers, "kind", classes, width=8, fusion=fusion, unimodal=unimodal, **options)


def batch(rows: int = 8, seed: int = 0) -> Batch:
    """Some rows lack a modality, the last one both, row 4 has no label; what absent rows hold is nan."""
    generator = torch.Generator().manual_seed(seed)
    inputs = {m: torch.randn(rows, width, generator=generator) for m, width in WIDTHS.items()}
    present = {m: torch.arange(rows) < rows - 1 for m in WIDTHS}
    present["image"][1], present["text"][2] = False, False
    for m, x in inputs.items():
        x[~present[m]] = torch.nan
    label = torch.randint(4, (rows,), generator=generator)
    label[4] = -1
    return Batch(inputs, present, {"kind": label})


def gradients(model: Fusion, b: Batch) -> dict[str, Tensor]:
    model.zero_grad()
    torch.autograd.backward(model.step(model.terms(b), b).total)
    found = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        found[name] = parameter.grad.clone()
    return found


@every
def test_terms_are_cross_entropies_by_hand(kind: str) -> None:
    model, b = recipe(kind, smoothing=0.1), batch()
    terms, label, z = model.terms(b), b.targets["kind"], model.latents(b)
    assert list(terms) == ["fused", "image", "text"]
    logits = {"fused": model.fusion(z, b.present), **{m: model.own[m](z[m]) for m in WIDTHS}}
    valid = {"fused": b.present["image"] | b.present["text"], **b.present}
    for name, term in terms.items():
        wanted_B = valid[name] & (label >= 0)
        assert term.valid is not None and torch.equal(term.valid, wanted_B)
        log_BC = logits[name].log_softmax(dim=1)
        for n in wanted_B.nonzero().flatten().tolist():
            by_hand = -0.9 * log_BC[n, label[n]] - 0.1 * log_BC[n].mean()
            torch.testing.assert_close(term.value[n], by_hand, **CLOSE)
        total = model.step(terms, b).terms[name]
        torch.testing.assert_close(
            total, term.value[wanted_B].sum() / valid[name].sum(), **CLOSE
        )  # with rows without a label
    assert list(recipe(kind, unimodal=False).terms(b)) == ["fused"]


@every
def test_absent_rows_cost_nothing_and_change_nothing(kind: str) -> None:
    model, b = recipe(kind), batch()
    image = model.towers["image"]
    assert isinstance(image, Line)
    found = gradients(model, b)
    assert image.seen == 6
    here = torch.tensor([0, 1, 2, 3, 4, 5, 6])
    small = b.select(here)
    small.step = dict(small.present)
    for name, grad in gradients(model, small).items():
        # gradients of up to 10, as sums over eight rows
        torch.testing.assert_close(grad, found[name], rtol=0, atol=10 * ulps(16, F32))


@every
def test_a_modality_that_is_nowhere_takes_no_gradient_and_all_parameters_are_reached(kind: str) -> None:
    model, b = recipe(kind), batch()
    found = gradients(model, b.only("text"))
    for name, grad in found.items():
        assert bool(grad.any()) != ("image" in name or name == "fusion.maps.image.weight"), name


@every
def test_one_weight_changes_one_sample_and_one_mix_one_term(kind: str) -> None:
    model, b = recipe(kind), batch()
    terms, z_grads = model.terms(b), []
    for weight in (torch.ones(8), torch.tensor([1.0, 1, 1, 5, 1, 1, 1, 1])):
        z = {m: z_BD.detach().requires_grad_() for m, z_BD in model.latents(b).items()}
        value_B = cross_entropy(model.fuse(z, b.present), b.targets["kind"])
        term = replace(terms["fused"], value=value_B, weight=weight)
        z_grads.append(torch.autograd.grad(term.sum(), list(z.values())))
    for one_BD, five_BD in zip(*z_grads, strict=True):
        torch.testing.assert_close(five_BD[3], 5 * one_BD[3], **CLOSE)
        others = torch.arange(8) != 3
        assert torch.equal(five_BD[others], one_BD[others]) and one_BD[3].any()
    plain, mixed = gradients(model, b), gradients(recipe(kind, mix={"image": 0.0}), b)
    assert not mixed["own.image.weight"].any() and plain["own.image.weight"].any()
    torch.testing.assert_close(mixed["own.text.weight"], plain["own.text.weight"], **CLOSE)


def test_the_fork_meets_the_joint_term_and_the_modality_own() -> None:
    model, b, met = recipe(), batch(), []

    def rule(g_KBD: Tensor, names: tuple[str, ...]) -> Tensor:
        met.append((names, tuple(g_KBD.shape)))
        assert g_KBD[0].any() and g_KBD[1].any() and not torch.equal(g_KBD[0], g_KBD[1])
        return g_KBD.sum(0)

    plain = gradients(model, b)
    model.hooks.rule = rule
    ruled = gradients(model, b)
    assert set(met) == {(("fused", m), (2, 8, 8)) for m in WIDTHS}
    for name, grad in plain.items():
        torch.testing.assert_close(ruled[name], grad, **CLOSE)
    shared = {id(p) for p in model.shared_parameters()}
    outside = {name.split(".")[0] for name, p in model.named_parameters() if id(p) not in shared}
    assert outside == {"fusion", "own"}


@every
def test_fuse_takes_permuted_latents_with_their_presence(kind: str) -> None:
    model, b, order = recipe(kind), batch(), torch.tensor([3, 0, 6, 1, 5, 7, 2, 4])
    z = model.latents(b)
    moved = {"image": z["image"], "text": z["text"][order]}
    present = {"image": b.present["image"], "text": b.present["text"][order]}
    logits_BC = model.fuse(moved, present)
    for n in range(8):
        row = {m: z_BD[n : n + 1] for m, z_BD in moved.items()}
        alone = model.fuse(row, {m: mask_B[n : n + 1] for m, mask_B in present.items()})
        torch.testing.assert_close(logits_BC[n], alone[0], **CLOSE)
    zeros = z | {"text": torch.zeros_like(z["text"])}
    everyone = {m: torch.ones(8, dtype=torch.bool) for m in WIDTHS}
    assert torch.equal(model.fuse(zeros), model.fuse(zeros, everyone))  # no guess from zeros
    if kind == "attention":
        absent = everyone | {"text": ~everyone["text"]}
        assert (model.fuse(zeros) - model.fuse(zeros, absent)).abs().max() > 1e-4


@every
def test_unimodal_is_the_own_head_or_the_fusion_of_one(kind: str) -> None:
    b = batch()
    with_heads, without = recipe(kind), recipe(kind, unimodal=False)
    z = with_heads.latents(b)
    torch.testing.assert_close(with_heads.unimodal(z, b.present)["text"], with_heads.own["text"](z["text"]), **CLOSE)
    z = without.latents(b)
    alone = b.only("text")
    torch.testing.assert_close(
        without.unimodal(z, b.present)["text"], without.fuse(without.latents(alone), alone.present), **CLOSE
    )


@every
def test_shares_add_up_to_what_is_decided_by(kind: str) -> None:
    model, b = recipe(kind), batch()
    z = model.latents(b)
    shares, f = model.shares(z, b.present), model.fuse(z, b.present)
    torch.testing.assert_close(sum(shares.values()), f, **CLOSE)
    if isinstance(model.fusion, LateFusion):
        for m, share_BC in shares.items():
            own_BC = torch.where(b.present[m][:, None], model.fusion.maps[m](z[m]), 0.0)
            torch.testing.assert_close(share_BC, own_BC + model.fusion.bias_C / 2, **CLOSE)
    terms = model.terms(b)
    decided = model(b).fusion
    assert decided is not None and terms and torch.equal(decided.label_B, b.targets["kind"])
    assert all(torch.equal(decided.z[m], z[m]) for m in WIDTHS) and decided.present is b.present


def test_scores_and_embeddings() -> None:
    model, b = recipe("mid").eval(), batch()
    logits_BC, label = model.fuse(model.latents(b), b.present), b.targets["kind"]
    scores = model.scores(b)
    assert list(scores) == ["accuracy", "loss"]
    right = [float(logits_BC[n].argmax() == label[n]) for n in range(8)]
    assert scores["accuracy"].value.tolist() == right
    rows = [0, 1, 2, 3, 5, 6]
    for term in scores.values():
        assert term.valid is not None and term.valid.nonzero().flatten().tolist() == rows
    wanted_B = F.cross_entropy(logits_BC[rows], label[rows], reduction="none")
    torch.testing.assert_close(scores["loss"].value[rows], wanted_B, **CLOSE)
    image = model.scores(b.only("image"))["loss"]
    assert image.valid is not None and image.valid.nonzero().flatten().tolist() == [0, 2, 3, 5, 6]
    assert (image.value - scores["loss"].value)[0].abs() > 1e-5
    outputs = model.validation_step(b, 0)
    for m, z_BD in model.embed(b).items():
        torch.testing.assert_close(outputs["z"][m], z_BD, **CLOSE)
        torch.testing.assert_close(z_BD.norm(dim=1), b.present[m].float(), **CLOSE)
    assert torch.equal(outputs["scores"]["loss"].value, scores["loss"].value)


def test_protocols() -> None:
    for protocol in (HasObjective, HasTowers, Embeds, ForksFeatures, Fuses, Unimodal, Scores, MultimodalClassifier):
        assert isinstance(recipe(), protocol)


# data --------------------------------------------------------------------------------------------------------------


class Signs(BatchDataset):
    """Label: whether two hidden signs agree; each modality shows one of them, so that neither alone says anything."""

    def __init__(self, rows: int = 256, seed: int = 0, whole: bool = True) -> None:
        super().__init__(seed=0)
        g, mixes = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(9)
        code = {m: torch.randn(rows, 2, generator=g) for m in WIDTHS}
        self.x = {m: code[m] @ torch.randn(2, width, generator=mixes) for m, width in WIDTHS.items()}
        self.label = ((code["image"][:, 0] > 0) == (code["text"][:, 0] > 0)).long()
        self.has = {m: torch.ones(rows, dtype=torch.bool) for m in WIDTHS}
        if not whole:  # every second of four has no picture, another no label: on two ranks, one has neither
            self.has["image"][1::2], self.has["text"][2::8], self.label[5::8] = False, False, -1

    def __len__(self) -> int:
        return len(self.label)

    def present(self, index_N: Any) -> dict[str, Tensor]:
        return {m: has_N[index_N] for m, has_N in self.has.items()}

    def rows(self, index_B: Any, draw_B: Any) -> Rows:
        inputs = {m: x[index_B] for m, x in self.x.items()}
        return Rows(inputs, {"kind": self.label[index_B]}, torch.as_tensor(index_B))


class SignData(DataModule):
    def __init__(self, batch_size: int = 64, whole: bool = True, **options: Any) -> None:
        super().__init__(batch_size=batch_size, **options)
        self.whole = whole

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        return batch if self.whole else double(batch)

    @property
    def modalities(self) -> tuple[str, ...]:
        return tuple(WIDTHS)

    @property
    def classes(self) -> dict[str, list[str]]:
        return {"kind": ["differ", "agree"]}

    def training_set(self) -> Signs:
        return Signs(rows=256 if self.whole else 20, whole=self.whole)

    def evaluation_sets(self, stage: str) -> dict[str, BatchDataset]:
        return {"val": Signs(128, seed=1)}


def fit(model: Fusion, data: DataModule, steps: int, *callbacks: L.Callback, **options: Any) -> None:
    L.Trainer(max_steps=steps, callbacks=list(callbacks), **QUIET, **options).fit(model, datamodule=data)


def held_out(model: Fusion) -> float:
    data = Signs(512, seed=1)
    with torch.no_grad():
        scores = model.eval().scores(Batch(data.x, data.has, {"kind": data.label}))
    return float(scores["accuracy"].sum() / scores["accuracy"].count())


def test_it_learns_what_no_modality_tells_alone() -> None:
    found = {}
    for kind in ("mid", "late"):
        model = recipe(kind, unimodal=False, classes=2, optimizer=lambda params: torch.optim.AdamW(params, lr=1e-2))
        fit(model, SignData(), 200)
        found[kind] = held_out(model)
    assert found["mid"] > 0.9
    assert found["late"] < 0.65


def lightning_gradients(rank: int, kind: str, accumulate: int = 1, world: int = 1, rows: int = 24) -> dict[str, Tensor]:
    """Gradients of one step over 20 samples, of which some lack modalities or a label, and padding."""
    keep = KeepGradients()
    model = recipe(kind, classes=2, optimizer=torch.optim.SGD).double()
    data = SignData(batch_size=rows, whole=False)
    strategy = "ddp" if world > 1 else "auto"
    fit(model, data, 1, keep, devices=world, strategy=strategy, accumulate_grad_batches=accumulate)
    return keep.gradients


def double(b: Batch) -> Batch:
    b.inputs = {m: x.double() for m, x in b.inputs.items()}
    return b


@every
def test_accumulation_equals_the_whole_step(kind: str) -> None:
    wanted = lightning_gradients(0, kind)
    assert wanted["towers.image.linear.weight"].any()
    for accumulate in (2, 8):
        assert largest_gap(lightning_gradients(0, kind, accumulate), wanted) < ulps(4096, F64)


def on_a_rank(rank: int) -> list[dict[str, Tensor]]:
    return [lightning_gradients(rank, kind, n, world=2) for kind in FUSIONS for n in (1, 6)]


@pytest.mark.ddp
def test_two_ranks_equal_one() -> None:
    """In micro-batches of two rows: some ranks have none with a picture, or none with a label, and wait for nobody."""
    wanted = [lightning_gradients(0, kind) for kind in FUSIONS for _ in range(2)]
    for found in run_ranks(2, on_a_rank):
        assert [largest_gap(f, w) < ulps(4096, F64) for f, w in zip(found, wanted, strict=True)] == [True] * 6


def modality_of_a_rank(rank: int) -> dict[str, Tensor]:
    """Rank 0 has pictures and texts, rank 1 texts only; gradients averaged over the ranks."""
    dist.init_process_group("gloo")
    model, b = recipe("attention").double(), double(batch())
    whole = b.only("text").present
    present = {m: torch.cat([b.present[m], whole[m]]) for m in WIDTHS}
    mine = b if rank == 0 else b.only("text")
    mine.step = present
    model.step.world = 2
    found = gradients(model, mine)
    for grad in found.values():
        dist.all_reduce(grad)
        grad /= 2
    dist.destroy_process_group()
    return found


@pytest.mark.slow
@pytest.mark.ddp
def test_a_rank_without_a_modality() -> None:
    model, b = recipe("attention").double(), double(batch())
    other = b.only("text")
    both = {m: torch.cat([b.present[m], other.present[m]]) for m in WIDTHS}
    inputs = {m: torch.cat([x, x]) for m, x in b.inputs.items()}
    wanted = gradients(model, Batch(inputs, both, {"kind": b.targets["kind"].repeat(2)}))
    assert wanted["towers.image.linear.weight"].any()
    for found in run_ranks(2, modality_of_a_rank):
        assert largest_gap(found, wanted) < ulps(4096, F64)


# bad input ---------------------------------------------------------------------------------------------------------


def test_a_wrong_number_of_classes_or_target_is_named_before_training() -> None:
    for wrong in (3, 5):
        with pytest.raises(ValueError, match=rf"^classes {wrong}: the data has 2 of 'kind'$"):
            fit(recipe(classes=wrong), SignData(), 1)
    fit(recipe(classes=5), SignData(tiny=True), 1)  # a stand-in need not have every class
    model = recipe(classes=2)
    model.target = "sort"
    with pytest.raises(ValueError, match=r"^target: no classes of 'sort' in the data, only of kind$"):
        fit(model, SignData(), 1)


def test_bad_input_is_one_line() -> None:
    with pytest.raises(ValueError, match=r"^smoothing 1\.0: at least 0 and below 1"):
        recipe(smoothing=1.0)
    model, b = recipe(), batch()
    b.targets["kind"][0] = 4
    with pytest.raises(ValueError, match=r"^classes 4: a label of 'kind' is 4$"):
        model.terms(b)
    b.targets["kind"] = torch.rand(8)
    with pytest.raises(ValueError, match=r"^target: 'kind' is not one int64 class a sample"):
        model.terms(b)
    del b.targets["kind"]
    with pytest.raises(ValueError, match=r"^target: the data has no 'kind', only none$"):
        model.scores(b)
    b = batch()
    del b.inputs["text"]
    with pytest.raises(ValueError, match=r"^the data has no modality 'text', only image$"):
        model.terms(b)


def test_two_parts_whose_terms_have_one_name_are_refused() -> None:
    games = [CollaborativeGame(), IndependentGame()]
    with pytest.raises(ValueError, match="two parts have a term 'game': IndependentGame and one before it"):
        recipe(regularizers=games).terms(batch())


def test_a_batch_without_a_modality_leaves_a_towers_statistics_alone() -> None:
    class Normed(Line):
        def __init__(self, width_in: int) -> None:
            super().__init__(width_in)
            self.norm = nn.BatchNorm1d(1)

        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tokens:
            return super().forward(self.norm(x[:, None])[:, 0], mask)

    towers = Towers(others={m: Normed(width) for m, width in WIDTHS.items()})
    model, b = Fusion(towers, "kind", 4, width=8, unimodal=True), batch()
    model.terms(b)
    norm = cast(Any, towers["image"]).norm
    before = [norm.running_mean.clone(), norm.running_var.clone(), norm.num_batches_tracked.clone()]
    b.present["image"] = torch.zeros(8, dtype=torch.bool)
    b.inputs["image"][:] = torch.nan
    torch.autograd.backward(model.step(model.terms(b), b).total)
    assert all(map(torch.equal, before, [norm.running_mean, norm.running_var, norm.num_batches_tracked]))
    assert norm.weight.grad is not None and norm.weight.grad.isfinite().all(), "and is reached"
