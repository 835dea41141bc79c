"""The masked recipe: its mechanism in numbers, however a step is cut, and that it learns across modalities."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from descant.callbacks import EMA, Resume
from descant.datamodules.base import BatchDataset, DataModule, Rows
from descant.modules.core.batch import Batch
from descant.modules.core.protocols import Embeds, HasObjective, HasTowers, Reconstructs, Scores
from descant.modules.masking.adapters import Adapter, Adapters, PatchAdapter
from descant.modules.masking.budget import TokenBudget
from descant.modules.masking.corruptions import Corruption, Grid, Masks, UniformMask
from descant.modules.masking.decoders import CrossDecoder, Decoder, JointDecoder
from descant.modules.masking.discrete_adapters import CategoryAdapter, TableAdapter, TokenAdapter
from descant.modules.missing_modalities.imputation import MeanImputer, ZeroImputer
from descant.modules.towers.vit import Trunk
from descant.modules.training_setup.compile_and_shard import Shard
from descant.recipes import Masked
from descant.run.sharded import Sharded
from tests.callbacks.checkpoints.test_resume import Act, equal, fit, point, state
from tests.ranks import run_ranks
from tests.rotation import quick
from tests.step_toy import QUIET, KeepGradients, largest_gap
from tests.tolerance import F32, F64, rounding, ulps

DECODERS = {"joint": JointDecoder, "cross": CrossDecoder}
decoders = pytest.mark.parametrize("kind", DECODERS)


def recipe(kind: str = "joint", corruption: Corruption | None = None, **options: Any) -> Any:
    torch.manual_seed(0)
    adapters = Adapters(
        image=PatchAdapter([8, 8], 2),
        palette=CategoryAdapter(3, [8, 8], 4, embedding=4),
        text=TokenAdapter(9, 6),
        table=TableAdapter([0, 3, 0]),
    )
    decoder: Decoder = DECODERS[kind](width=12, depth=1, heads=2)
    return Masked(adapters, Trunk(24, 2, 3), decoder, corruption or UniformMask(0.5), **options)


def batch(rows: int = 6, seed: int = 0) -> Batch:
    """Some rows lack a modality, the last one all; what absent rows hold is no number, or out of range."""
    g = torch.Generator().manual_seed(seed)
    inputs = {
        "image": torch.randn(rows, 3, 8, 8, generator=g),
        "palette": torch.randint(0, 3, (rows, 8, 8), generator=g),
        "text": torch.randint(1, 9, (rows, 6), generator=g),
        "table": torch.stack([torch.randn(rows, generator=g), torch.arange(rows) % 3, torch.ones(rows)], dim=1),
    }
    inputs["text"][0, 4:] = 0
    present = {m: torch.arange(rows) < rows - 1 for m in inputs}
    present["image"][1], present["text"][2], present["palette"][1] = False, False, False
    inputs["image"][~present["image"]] = torch.nan
    inputs["palette"][~present["palette"]] = 99
    return Batch(inputs, present, index=torch.arange(rows), rng_seed=torch.arange(rows) * 7919 + 13)


def total(model: Any, b: Batch) -> Tensor:
    return model.step(model.terms(b), b).total


def gradients(model: Masked, b: Batch) -> dict[str, Tensor]:
    model.zero_grad()
    total(model, b).backward()
    assert all(p.grad is not None for p in model.parameters())
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@decoders
def test_a_term_a_modality_and_no_row_that_lacks_it(kind: str) -> None:
    model, b = recipe(kind), batch()
    terms = model.terms(b)
    assert list(terms) == ["mask/image", "mask/palette", "mask/text", "mask/table"]
    for name, term in terms.items():
        assert torch.equal(term.valid, b.present[name.removeprefix("mask/")]) and torch.isfinite(term.value).all()
    gradients(model, b)
    for m in ("image", "palette"):
        assert b.count(m) == 4  # of the rows that have it, whatever is masked


@decoders
def test_absent_rows_change_nothing(kind: str) -> None:
    """The gradients of a batch with absent rows are those of the rows that are there, whatever the others hold."""
    model, b = recipe(kind), batch()
    with_absent = gradients(model, b)
    for name, there in b.present.items():
        b.inputs[name][~there] = 1
    again = gradients(model, b)
    real = b.select(torch.arange(5))
    real.step = dict(real.present)
    without = gradients(model, real)
    for name, grad in with_absent.items():
        assert torch.equal(grad, again[name])
        # gradients of up to 3, as sums over five rows and 16 tokens
        torch.testing.assert_close(grad, without[name], rtol=0, atol=3 * ulps(16, F32))


@decoders
def test_only_what_is_masked_is_predicted_and_only_what_is_visible_is_seen(kind: str) -> None:
    model, b = recipe(kind), batch()
    _, real = model.raw(b)
    visible = model.corruption(real, model.grids, b.rng_seed).visible["image"]
    image = b.inputs["image"][:1]
    hidden_t, seen_t = int((~visible[0]).nonzero()[0]), int(visible[0].nonzero()[0])

    def value(t: int | None) -> Tensor:
        raw_BTP, _ = model.adapters["image"].raw(image)
        if t is not None:
            raw_BTP[0, t] += 3.0
        changed = batch()
        changed.inputs["image"][0] = model.adapters["image"].to_input_shape(raw_BTP)[0]
        with torch.no_grad():
            return torch.stack([term.value[0] for term in model.terms(changed).values()])

    plain, hidden, seen = value(None), value(hidden_t), value(seen_t)
    # a hidden patch is a target of its own modality and seen by nobody; a visible one is seen by all, a target of none
    assert hidden[0] != plain[0] and torch.equal(hidden[1:], plain[1:])
    assert (seen != plain).all()


class Nothing(Corruption):
    """Sample 0 shows all that it has."""

    def __call__(self, real: Any, grids: Any, draw_B: Tensor) -> Masks:
        masks = UniformMask(0.5)(real, grids, draw_B)
        for m, real_BT in real.items():
            masks.visible[m][0], masks.target[m][0], masks.loss[m][0] = real_BT[0], False, False
        return masks

    def check(self, grids: Any) -> None:
        pass


@decoders
def test_a_sample_of_which_nothing_is_masked_has_a_gradient_of_zero_and_not_of_nan(kind: str) -> None:
    model, b = recipe(kind, Nothing()), batch()
    image = b.inputs["image"].nan_to_num().requires_grad_()
    b.inputs["image"] = image
    total(model, b).backward()
    assert image.grad is not None and torch.isfinite(image.grad).all()
    assert not image.grad[0].any() and image.grad[2].any()


def test_a_samples_number_is_the_mean_over_its_masked_tokens() -> None:
    model, b = recipe("joint", TokenBudget(10, targets=7)), batch()
    raw, real = model.raw(b)
    masks = model.corruption(real, model.grids, b.rng_seed)
    rebuilt = model.reconstruct(b)["image"]
    error_BT = (model.adapters["image"].raw(rebuilt.prediction)[0] - raw["image"]).square().mean(dim=2)
    value_B = model.terms(b)["mask/image"].value
    for k in range(5):
        mask_T = masks.loss["image"][k]
        expected = error_BT[k][mask_T].mean() if mask_T.any() else torch.tensor(0.0)
        torch.testing.assert_close(value_B[k], expected, **rounding(64, F32))


@decoders
def test_what_is_rebuilt_keeps_what_is_seen(kind: str) -> None:
    model, b = recipe(kind), batch()
    for m, (truth, visible, prediction) in model.reconstruct(b).items():
        assert truth.shape == visible.shape == prediction.shape and visible.dtype == torch.bool, m
        assert torch.equal(prediction[visible], truth[visible]) and not prediction[~b.present[m]].any()
        assert (prediction[:5][~visible[:5]] != truth[:5][~visible[:5]]).any()


def test_patches_less_their_own_mean_and_spread_are_not_given_as_a_picture() -> None:
    model, b = recipe(), batch()
    model.adapters["image"].terms[0].norm = True
    assert model.adapters["image"].relative and model.terms(b)["mask/image"].value[:5].isfinite().all()
    with pytest.raises(ValueError, match="image: nothing can be rebuilt of patches less their own mean and spread"):
        model.reconstruct(b)


def test_embeddings_alone_and_together() -> None:
    model, b = recipe(embeds=[["image"], ["image", "text"]]), batch()
    z = model.embed(b)
    assert list(z) == ["image", "image+text"]
    for name, z_BD in z.items():
        there_B = b.both(*name.split("+"))
        assert not z_BD[~there_B].any()
        torch.testing.assert_close(z_BD[there_B].norm(dim=1), torch.ones(int(there_B.sum())), **rounding(16, F32))
    assert (z["image"][0] - z["image+text"][0]).abs().max() > 1e-3
    torch.testing.assert_close(model.embed(b.only("image"))["image"], z["image"], **rounding(64, F32))
    assert not model.embed(b.only("image"))["image+text"].any()
    predicted = model.predict_step(b, 0)
    assert torch.equal(predicted["present"]["image+text"], b.both("image", "text"))
    assert list(recipe().embed(b)) == ["image", "palette", "text", "table", "image+palette+text+table"]
    pooled = recipe(pool_global=True).embed(b)["image"]
    assert (pooled[0] - z["image"][0]).abs().max() > 1e-3
    with pytest.raises(ValueError, match=r"embeds: \['imgae'\]: no adapter of 'imgae'; the adapters are image, "):
        recipe(embeds=[["imgae"]])


def test_zeros_in_place_of_what_is_absent_are_seen_and_not_asked_for() -> None:
    model, b = recipe(fill=ZeroImputer()), batch()
    raw, real = model.raw(b)
    assert all(mask.all() for mask in real.values()) and not raw["image"][~b.present["image"]].any()
    terms = model.terms(b)
    assert all(torch.equal(t.valid, b.present[name.removeprefix("mask/")]) for name, t in terms.items())
    without = recipe().terms(b)["mask/text"].value
    assert terms["mask/text"].value[1] != without[1]  # the sample without a picture
    torch.testing.assert_close(terms["mask/text"].value[3], without[3], **rounding(64, F32))  # one that has all


@pytest.mark.parametrize(("found", "line"), [(9, "vocab 10 at least"), (-1, "ids begin at 0")])
def test_an_id_outside_the_vocabulary_is_one_line_and_in_an_absent_row_none(found: int, line: str) -> None:
    model, b = recipe(), batch()
    b.inputs["text"][2] = found  # a sample without text
    wanted = model.terms(b)["mask/text"].value
    b.inputs["text"][1, 3] = found
    with pytest.raises(ValueError, match=f"text: id {found} in row 1 of the batch; its adapter has 9 ids: {line}"):
        model.terms(b)
    assert wanted.isfinite().all()


def test_the_mean_input_in_place_of_what_is_absent() -> None:
    def images(**options: Any) -> Masked:
        return Masked(Adapters(image=PatchAdapter([8, 8], 2)), Trunk(16, depth=1, heads=2), **options)

    model, b = images(fill=MeanImputer()), batch()
    there_B, x = b.present["image"], b.inputs["image"]
    for _ in range(2):  # the mean is over both, of the same samples
        raw, real = model.raw(b)
    own_BTP = images().raw(b)[0]["image"]
    assert real["image"].all() and torch.equal(raw["image"][there_B], own_BTP[there_B])
    torch.testing.assert_close(raw["image"][1], own_BTP[there_B].mean(dim=0), **rounding(16, F32))
    saved, other = model.state_dict(), images(fill=MeanImputer())
    other.load_state_dict(saved)
    assert torch.equal(other.eval().raw(b)[0]["image"], raw["image"]) and x[1].isnan().all()
    with pytest.raises(ValueError, match=r"MeanImputer: palette has ids \(torch.int64\), which have no mean"):
        recipe(fill=MeanImputer()).raw(b)


def test_the_control_tears_the_first_modality_from_the_others_in_training_alone() -> None:
    method, control, b = recipe(), recipe(sham="permute"), batch()
    turned = control.sham.permute_modalities(b, control.modalities[1:])
    control.sham.calls = 0
    assert torch.equal(turned.inputs["image"].nan_to_num(), b.inputs["image"].nan_to_num())
    order = [(turned.inputs["text"] == row).all(dim=1).nonzero()[0].item() for row in b.inputs["text"]]
    assert sorted(order) == list(range(6)) and all(k != i for i, k in enumerate(order))
    back = torch.tensor(order)
    for m in ("text", "palette", "table"):  # the others stay together
        assert torch.equal(turned.inputs[m][back], b.inputs[m]) and torch.equal(turned.present[m][back], b.present[m])
    assert total(method, b) != total(control, b)
    assert method.sham.calls == control.sham.calls > 0
    assert torch.equal(total(method.eval(), b), total(control.eval(), b))


def test_scores_and_protocols() -> None:
    model, b = recipe(), batch()
    scores = model.scores(b)
    assert list(scores) == ["loss", "loss_image", "loss_palette", "loss_text", "loss_table"]
    torch.testing.assert_close(
        scores["loss"].value, sum(t.value for t in list(scores.values())[1:]), **rounding(4, F32)
    )
    assert scores["loss"].valid is not None and scores["loss"].valid.tolist() == [True] * 5 + [False]
    for protocol in (HasObjective, HasTowers, Embeds, Scores, Reconstructs):
        assert isinstance(model, protocol)


def test_compute_falls_with_what_is_absent() -> None:
    grid: dict[str, Adapter] = {m: PatchAdapter([16, 16], 4) for m in ("image", "depth")}
    torch.manual_seed(0)
    model = Masked(Adapters(others=grid), Trunk(64, 3, 4), JointDecoder(32, 1, 2), UniformMask(0.5))
    inputs = {m: torch.randn(8, 3, 16, 16) for m in grid}
    half_B, flops = torch.arange(8) % 2 == 0, []
    for present in ({m: torch.ones(8, dtype=torch.bool) for m in grid}, {"image": half_B, "depth": ~half_B}):
        b = Batch(inputs, present)
        with FlopCounterMode(display=False) as counter:
            total(model, b).backward()
        flops.append(counter.get_total_flops())
    assert flops[1] < 0.55 * flops[0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: recipe(corruption=UniformMask(0.9)), "ratio 0.9 of 4 tokens of palette leaves no token visible"),
        (lambda: recipe(corruption=TokenBudget(29)), "visible 29 of 29 tokens"),
        (
            lambda: recipe().terms(Batch({}, {"image": torch.ones(1, dtype=torch.bool)})),
            "the data has no modality 'image'",
        ),
    ],
)
def test_what_cannot_be_is_one_line(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# beside lightly ------------------------------------------------------------------------------------------------------


def test_one_modality_is_the_mae_of_lightly_in_loss_and_gradient() -> None:
    pytest.importorskip("lightly")
    from benchmarks.masked import Lightly, Size, alike, batches, disagreement
    from benchmarks.masked import recipe as recipe_of

    size = Size(image=16, patch=4, width=24, depth=2, heads=3, out=12, out_depth=2, batch=4)
    torch.manual_seed(0)
    ours, owner = recipe_of(size), Lightly(size)
    unlike = disagreement(ours, owner, batches(size, 1)[0])
    alike(ours, owner)
    loss, gradient = disagreement(ours, owner, batches(size, 1)[0])
    # of a loss of 1, 8 ulps of float32; of gradients, 84: sums over rows and tokens through blocks
    assert loss < 1e-6 and gradient < 1e-5 < unlike[1]


# however a step is cut -----------------------------------------------------------------------------------------------


class Views(BatchDataset):
    """Two pictures that one hidden code makes: the second says what the first shows."""

    def __init__(self, rows: int = 12, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(seed=0)
        g, mixing = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(9)
        code = torch.randn(rows, 3, generator=g)
        views = {m: code @ torch.randn(3, 3 * 64, generator=mixing) for m in ("image", "depth")}
        self.x = {m: x.view(rows, 3, 8, 8).to(dtype) for m, x in views.items()}
        self.has = {m: torch.arange(rows) % 4 != k for k, m in enumerate(("image", "depth"))}

    def __len__(self) -> int:
        return len(self.x["image"])

    def present(self, index_N: Any) -> dict[str, Tensor]:
        return {m: has[index_N] for m, has in self.has.items()}

    def rows(self, index_B: Any, draw_B: Any) -> Rows:
        return Rows({m: x[index_B] for m, x in self.x.items()}, {}, torch.as_tensor(index_B))


class ViewData(DataModule):
    def __init__(self, batch_size: int = 12, rows: int = 12, dtype: torch.dtype = torch.float64) -> None:
        super().__init__(batch_size=batch_size)
        self.rows, self.dtype = rows, dtype

    @property
    def modalities(self) -> tuple[str, ...]:
        return ("image", "depth")

    def training_set(self) -> Views:
        return Views(self.rows, dtype=self.dtype)

    def evaluation_sets(self, stage: str) -> dict[str, BatchDataset]:
        return {"val": Views(32, seed=1)}


def two(kind: str = "joint", corruption: Corruption | None = None, **options: Any) -> Masked:
    torch.manual_seed(0)
    adapters = Adapters(image=PatchAdapter([8, 8], 4), depth=PatchAdapter([8, 8], 4))
    decoder: Decoder = DECODERS[kind](width=16, depth=1, heads=2)
    return Masked(adapters, Trunk(32, 2, 4), decoder, corruption or TokenBudget(4), **options)


def trainer(**options: Any) -> L.Trainer:
    return L.Trainer(max_epochs=-1, **QUIET, **options)


def one_step(kind: str, devices: int = 1, accumulate: int = 1, sharded: bool = False) -> dict[str, Tensor]:
    """The gradients of one whole step of twelve samples."""
    keep = KeepGradients()
    options: dict[str, Any] = {"devices": devices, "accumulate_grad_batches": accumulate, "callbacks": [keep]}
    if sharded:  # in single precision: Lightning has no other for this strategy
        model, dtype, options["strategy"] = two(kind, shard=Shard()), torch.float32, Sharded("gloo")
    else:
        model, dtype, options["precision"] = two(kind).double(), torch.float64, "64-true"
    trainer(max_steps=1, **options).fit(model, datamodule=ViewData(dtype=dtype))
    return {name: gradient.double() for name, gradient in keep.gradients.items()}


@decoders
def test_accumulated_micro_batches_are_the_whole_step(kind: str) -> None:
    assert largest_gap(one_step(kind, accumulate=3), one_step(kind)) < ulps(4096, F64)


WAYS: dict[str, dict[str, Any]] = {
    "joint, two micro-batches": {"kind": "joint", "accumulate": 2},
    "cross": {"kind": "cross"},
    "cross, sharded": {"kind": "cross", "sharded": True},
    "joint, sharded": {"kind": "joint", "sharded": True},
}


def _ranks(rank: int) -> dict[str, dict[str, Tensor]]:
    found = {name: one_step(devices=2, **way) for name, way in WAYS.items()}
    dist.destroy_process_group()
    return found


@pytest.mark.ddp
def test_two_ranks_are_one_and_so_are_two_that_share_the_weights() -> None:
    alone = {kind: one_step(kind) for kind in DECODERS}
    for found in run_ranks(2, _ranks):
        for name, gradients in found.items():
            # 84 ulps of float32, in which what is sharded is added; else float64 with room for steps of Adam
            assert largest_gap(gradients, alone[WAYS[name]["kind"]]) < (1e-5 if "sharded" in name else 1e-9), name


def test_a_resumed_run_ends_in_the_same_bits(tmp_path: Path) -> None:
    def net() -> Masked:
        return two("cross", optimizer=lambda params: torch.optim.AdamW(params, lr=1e-3))

    data, whole, rest = partial(ViewData, 4, dtype=torch.float32), Act(), Act()
    _, model = fit(tmp_path / "a", Resume(every=1, keep=99), EMA(0.8), whole, data=data(), net=net(), max_epochs=2)
    path = point(tmp_path / "a", 4)
    _, again = fit(tmp_path / "b", Resume(every=1), EMA(0.8), rest, path=path, data=data(), net=net(), max_epochs=2)
    assert equal(state(model), state(again)) and rest.losses == whole.losses[4:] and len(set(whole.losses)) == 6


# that it learns ------------------------------------------------------------------------------------------------------


class Only(Corruption):
    """One modality is seen, the other is asked for."""

    def visible(self, real: Any, grids: dict[str, Grid], draw_B: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        return {m: mask if m == "depth" else torch.zeros_like(mask) for m, mask in real.items()}


def explained(model: Masked, shift: int = 0) -> float:
    """R^2 of held-out pictures from the other view alone, or from that of another sample."""
    data = Views(32, seed=1)
    b = Batch(
        {**data.x, "depth": data.x["depth"].roll(shift, 0)}, {m: torch.ones(32, dtype=torch.bool) for m in data.x}
    )
    with torch.no_grad():
        truth, _, said = model.eval().reconstruct(b, Only())["image"]
    return 1 - float((truth - said).square().sum() / (truth - truth.mean(0)).square().sum())


@pytest.mark.slow
@pytest.mark.parametrize("kind", quick(DECODERS, 2))
def test_it_learns_to_see_one_modality_in_the_other(kind: str) -> None:
    model = two(kind, TokenBudget(4, subset_first=True), optimizer=lambda params: torch.optim.AdamW(params, lr=3e-3))
    before = explained(model)
    trainer(max_steps=300).fit(model, datamodule=ViewData(64, rows=256, dtype=torch.float32))
    assert before < 0.1 and explained(model) > 0.7
    assert explained(model, shift=1) < 0  # what another sample shows says nothing of this one
