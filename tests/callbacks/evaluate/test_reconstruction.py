"""Reconstruction by recipes whose error is known in closed form, and what is drawn of it.

Letters: B rows of a batch, N of a set, C channels, H, W pixels, L patches, P, Q numbers of a patch.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from descant.callbacks import Reconstruction, ReconstructionPictures
from descant.callbacks.plots.reconstruction import HIDDEN, PALETTE, TILE, _tiles, gallery
from descant.callbacks.plots.style import pixels
from descant.modules.core.batch import Batch
from descant.modules.core.protocols import ReconstructionOutput, Reconstructs
from descant.modules.evaluation.inversion import rows_of_other_keys
from descant.modules.masking.corruptions import Corruption, Hide, Masks
from tests.callbacks.evaluate.test_embeddings import Data, evaluate, trainer
from tests.ranks import run_ranks
from tests.tolerance import F32, ulps

COLOUR_C = torch.tensor([0.5, -0.25, 0.125])
GRID = (2,)  # tokens of every modality: the upper and the lower half


class Linear(L.LightningModule):
    """Of an image: ``colour * edges`` at the same pixel; of all else: ``fill``. From visible halves alone.

    Args:
        leak: the image as it is, whatever is hidden. constant: an image whatever is given.
    """

    def __init__(self, leak: bool = False, constant: Tensor | None = None, fill: float = 0.0) -> None:
        super().__init__()
        self.turn = nn.Parameter(torch.zeros(()))
        self.leak, self.constant, self.fill = leak, constant, fill
        self.rows: list[int] = []

    def reconstruct(self, batch: Batch, corruption: Corruption | None = None) -> dict[str, ReconstructionOutput]:
        assert not self.training and not torch.is_grad_enabled()
        self.rows.append(len(batch))
        real = {m: mask_B[:, None].expand(-1, 2) for m, mask_B in batch.present.items()}
        masks = (corruption or Hide(["image"]))(real, dict.fromkeys(real, GRID), batch.rng_seed)
        found = {}
        for m, x in batch.inputs.items():
            seen = self._halves(masks.visible[m], x)
            made = torch.where(seen, x, torch.full_like(x, self.fill))
            if m == "image" and "edges" in batch.inputs:
                e = batch.inputs["edges"]
                e = torch.where(self._halves(masks.visible["edges"], e), e, torch.zeros_like(e))
                made = torch.where(seen, x, e * COLOUR_C[:, None, None])
            if m == "image" and self.constant is not None:
                made = self.constant.expand_as(x)
            found[m] = ReconstructionOutput(x, seen, x if self.leak else made)
        return found

    @staticmethod
    def _halves(mask_B2: Tensor, x: Tensor) -> Tensor:
        rows_H = mask_B2.repeat_interleave(-(-x.shape[-2] // 2), dim=1)[:, : x.shape[-2]]
        return rows_H.reshape(len(x), *[1] * (x.ndim - 3), -1, 1).expand_as(x)

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        return None

    test_step = validation_step

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return 0 * self.turn

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class ResumableLog(Data):
    """As the other toy data, less what it takes off on the device; some rows of padding in each batch."""

    def loader(self, whole: Batch) -> DataLoader[Any]:
        rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        batches: Any = []
        for part in torch.split(torch.arange(rank, len(whole), world), self.size):
            batch = whole.select(torch.cat([part, part[:2]]))
            for present in batch.present.values():
                present[len(part) :] = False
            batches.append(batch)
        return DataLoader(batches, batch_size=None)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch

    def describe(self, index: int) -> str:
        return f"sample {index}"


def make(n: int = 41, seed: int = 0, noise: float = 0.2, absent: float = 0.2, size: int = 8) -> Batch:
    """Images that are ``colour * edges + noise``; the edges of each row have a level of their own."""
    g = torch.Generator().manual_seed(seed)
    level_N = torch.rand(n, 1, 1, 1, generator=g)
    edges = (torch.rand(n, 1, size, size, generator=g) < level_N).float()
    image = edges * COLOUR_C[:, None, None] + noise * torch.randn(n, 3, size, size, generator=g)
    inputs = {"image": image, "edges": edges, "palette": (edges[:, 0] > 0).long()}
    present = {m: torch.rand(n, generator=g) >= absent for m in inputs}
    key = torch.randint(n // 2, (n,), generator=g)
    return Batch(inputs, present, {}, index=torch.randperm(1000, generator=g)[:n], content_id=key)


def by_hand(whole: Batch, bank: Batch, patch: int, l2: float) -> dict[str, float]:
    """All keys of image from edges, without a batch: the toy recipe's answer is known."""
    at = [i for i in whole.index.argsort().tolist() if whole.present["image"][i] and whole.present["edges"][i]]
    own = [i for i in range(len(bank)) if bank.present["image"][i] and bank.present["edges"][i]]
    x, e = whole.inputs["image"][at].double(), whole.inputs["edges"][at].double()
    x_bank, e_bank = bank.inputs["image"][own].double(), bank.inputs["edges"][own].double()
    mean = x_bank.mean(0)

    def r2(made: Tensor) -> float:
        return float(1 - (x - made).square().sum() / (x - mean).square().sum())

    model, shuffled = e * COLOUR_C[:, None, None], e[rows_of_other_keys(whole.content_id[at])] * COLOUR_C[:, None, None]
    edge_K = e_bank.flatten(1).mean(1).quantile(torch.linspace(0.1, 0.9, 9, dtype=torch.float64))
    bin_bank, bin_N = (torch.bucketize(t.flatten(1).mean(1), edge_K) for t in (e_bank, e))
    nulls = [x_bank[bin_bank == k].mean(0) if bool((bin_bank == k).any()) else mean for k in range(10)]
    null = max(r2(torch.stack([nulls[int(k)] for k in bin_N])), 0.0)

    def cut(t: Tensor) -> Tensor:  # [N, C, H, W] -> [N patches, C patch patch], in the order of unfold
        return F.unfold(t, patch, stride=patch).transpose(1, 2).flatten(0, 1)

    a, y = cut(e_bank), cut(x_bank)
    a_mean, y_mean = a.mean(0), y.mean(0)
    cov = (a - a_mean).T @ (a - a_mean) / len(a)
    strength = l2 * cov.diag().mean() * torch.eye(len(cov), dtype=torch.float64)
    w = torch.linalg.solve(cov + strength, (a - a_mean).T @ (y - y_mean) / len(a))
    made = (cut(e) - a_mean) @ w + y_mean
    made = F.fold(made.unflatten(0, (len(x), -1)).transpose(1, 2), x.shape[-2:], patch, stride=patch)
    span = float(x_bank.max() - x_bank.min())
    db = {k: 10 * float(torch.log10(span**2 / (x - m).square().mean())) for k, m in (("", model), ("_ridge", made))}
    return {
        "r2_{}": r2(model),
        "r2_{}_shuffled": r2(shuffled),
        "r2_{}_null": null,
        "r2_{}_ridge": r2(made),
        "r2_{}_gain": r2(model) - max(null, r2(shuffled)),
        **{f"psnr_{{}}{k}": v for k, v in db.items()},
    }


def evaluated(data: L.LightningDataModule, evaluator: Reconstruction, recipe: L.LightningModule, **options: Any) -> Any:
    return evaluate(data, evaluator, recipe=recipe, **options)


@pytest.mark.parametrize("stage", ["validate", "test"])
@pytest.mark.parametrize("size,batch", [(5, 64), (40, 7)])
def test_every_number_equals_its_formula_whatever_the_batches(size: int, batch: int, stage: str) -> None:
    data = ResumableLog({"one": make(), "two": make(60, seed=1)}, bank=make(90, seed=2), size=size)
    evaluator = Reconstruction(["image"], ["edges"], patch=4, l2=0.01, batch=batch)
    values = evaluated(data, evaluator, Linear(), stage=stage)
    assert len(values) == 2 * 7
    for name, whole in data.sets.items():
        wanted = by_hand(whole, data.bank, 4, 0.01)
        for key, number in wanted.items():
            # decibels of up to 20 are kept as float32; errors are added in it
            assert values[f"{name}/{key.format('image_from_edges')}"] == pytest.approx(number, abs=2e-5), key
        assert len({round(v, 4) for v in wanted.values()}) == 7  # the numbers can tell them apart
        assert wanted["r2_{}"] > wanted["r2_{}_null"] > wanted["r2_{}_shuffled"]


def test_a_constant_prediction_and_a_leak_have_no_gain() -> None:
    data = ResumableLog({"one": make(80)}, bank=make(90, seed=2))
    key = "one/r2_image_from_edges"
    rows = data.bank.both("image", "edges")
    constant = evaluated(
        data, Reconstruction(["image"], ["edges"]), Linear(constant=data.bank.inputs["image"][rows].mean(0))
    )
    assert abs(constant[key]) < ulps(8, F32) and constant[f"{key}_shuffled"] == pytest.approx(
        constant[key], abs=ulps(8, F32)
    )
    assert constant[f"{key}_gain"] < 0
    leaky = evaluated(data, Reconstruction(["image"], ["edges"]), Linear(leak=True))
    assert leaky[key] == leaky[f"{key}_shuffled"] == 1 and leaky[f"{key}_gain"] == 0  # it does not need what is given


def test_the_sham_takes_given_inputs_from_other_content() -> None:
    whole = make(30, absent=0.0)
    for m in ("image", "edges"):  # each input says whose it is
        whole.inputs[m][:, 0, 0, 0] = whole.index / 1000
    seen: list[tuple[int, int, int]] = []

    class Spy(Linear):
        def reconstruct(self, batch: Batch, corruption: Corruption | None = None) -> dict[str, ReconstructionOutput]:
            assert isinstance(corruption, Hide) and corruption.modalities == ["image"]
            assert not bool(batch.present["palette"].any()) and not bool(batch.inputs["palette"].any())
            owner = {m: (1000 * batch.inputs[m][:, 0, 0, 0]).round().long().tolist() for m in ("image", "edges")}
            seen.extend(zip(batch.index.tolist(), owner["image"], owner["edges"], strict=True))
            return super().reconstruct(batch, corruption)

    evaluated(ResumableLog({"one": whole}, bank=make(40, seed=1)), Reconstruction(["image"], ["edges"]), Spy())
    key = dict(zip(whole.index.tolist(), whole.content_id.tolist(), strict=True))
    assert len(set(key.values())) < 30 and len(seen) == 60
    assert all(index == image for index, image, _ in seen)
    assert all(index == edges for index, _, edges in seen[:30])
    assert all(key[index] != key[edges] for index, _, edges in seen[30:])


def test_ridge_is_exact_where_the_truth_is_linear_in_two_and_three_dimensions() -> None:
    for extent, patch in (((8, 8), 4), ((4, 8, 4), 2)):
        g = torch.Generator().manual_seed(0)
        turn = torch.randn(2 * patch ** len(extent), patch ** len(extent), generator=g) / 8

        def volumes(
            n: int, seed: int, extent: tuple[int, ...] = extent, patch: int = patch, turn: Tensor = turn
        ) -> Batch:
            g = torch.Generator().manual_seed(seed)
            given = torch.randn(n, 1, *extent, generator=g)
            label = torch.randint(0, 2, (n, *extent), generator=g)
            target = torch.zeros(n, 1, *extent)
            for corner in np.ndindex(*(side // patch for side in extent)):
                at = tuple(slice(c * patch, (c + 1) * patch) for c in corner)
                both = torch.cat([given[:, 0][:, *at].flatten(1), label[:, *at].flatten(1).float()], dim=1)
                target[:, 0][:, *at] = (both @ turn + 1).unflatten(1, [patch] * len(extent))
            inputs = {"image": target, "given": given, "label": label}
            return Batch(inputs, dict.fromkeys(inputs, torch.ones(n, dtype=torch.bool)))

        data = ResumableLog({"one": volumes(20, 1)}, bank=volumes(90, 2))
        values = evaluated(data, Reconstruction(["image"], ["given", "label"], patch=patch, l2=0.0), Linear())
        assert values["one/r2_image_from_given+label_ridge"] == pytest.approx(1, abs=ulps(8, F32))
        x = data.sets["one"].inputs["image"].double()
        if len(extent) == 3:
            null = (
                x - x.flatten(1).mean(1)[:, None, None, None, None]
            ).square().mean() / x.square().mean()  # it says 0
            # decibels: some ulps of float32 in errors of 0.1% and more of what they are of
            assert values["one/psnr_image_from_given+label_over_mean"] == pytest.approx(
                10 * float(null.log10()), abs=1e-4
            )  # as of the decibels above
        else:
            assert not any(key.endswith("over_mean") for key in values)
        alone = evaluated(data, Reconstruction(["image"], ["given"], patch=patch, l2=0.0), Linear())
        assert alone["one/r2_image_from_given_ridge"] < 0.95  # the categories had their part


def test_padding_of_a_spectrogram_does_not_count() -> None:
    def sounds(n: int, seed: int) -> Batch:
        g = torch.Generator().manual_seed(seed)
        sound, video = torch.randn(n, 8, 12, generator=g), torch.randn(n, 8, 12, generator=g)
        for i in range(n):
            sound[i, :, 12 - i % 5 :] = -torch.inf
        inputs = {"sound": sound, "video": video}
        return Batch(inputs, dict.fromkeys(inputs, torch.ones(n, dtype=torch.bool)))

    data = ResumableLog({"one": sounds(20, 0)}, bank=sounds(30, 1))
    values = evaluated(data, Reconstruction(["sound"], ["video"], patch=2), Linear(fill=0.5))
    x, x_bank = (b.inputs["sound"].double() for b in (data.sets["one"], data.bank))
    real, real_bank = x.isfinite(), x_bank.isfinite()
    mean = x_bank.where(real_bank, 0.0).sum(0) / real_bank.sum(0)
    wanted = 1 - (x - 0.5).square()[real].sum() / (x - mean).square()[real].sum()
    assert values["one/r2_sound_from_video"] == pytest.approx(float(wanted), abs=ulps(84, F32))
    assert all(value == value and abs(value) < 100 for value in values.values())


def on_a_rank(rank: int | None) -> dict[str, float]:
    data = ResumableLog({"one": make(37), "two": make(60, seed=1)}, bank=make(90, seed=2), size=6)
    options: dict[str, Any] = {"devices": 2, "strategy": "ddp", "use_distributed_sampler": False}
    evaluator = Reconstruction(["image"], ["edges"], patch=4, batch=9, limit=45)
    return evaluated(data, evaluator, Linear(), **({} if rank is None else options))


@pytest.mark.slow
@pytest.mark.ddp
def test_two_ranks_equal_one() -> None:
    alone = on_a_rank(None)
    assert len(alone) == 14
    for values in run_ranks(2, on_a_rank):
        assert values == pytest.approx(alone, rel=ulps(8, F32), abs=ulps(8, F32))


def test_the_bank_is_read_once_and_not_in_the_sanity_check() -> None:
    class Counted(ResumableLog):
        def bank_dataloader(self) -> DataLoader[Any]:
            return Count(super().bank_dataloader())  # type: ignore[return-value]

    class Count:
        passes = 0

        def __init__(self, loader: Any) -> None:
            self.loader = loader

        def __iter__(self) -> Any:
            Count.passes += 1
            return iter(self.loader)

    data = Counted({"one": make()}, bank=make(90, seed=2))
    evaluator = Reconstruction(["image"], ["edges"], patch=4)
    run = trainer(evaluator, max_epochs=3, num_sanity_val_steps=1)
    run.fit(Linear(), datamodule=data)
    assert Count.passes == 4 and evaluator.evaluations == 3  # two in the check, of a part; two for all evaluations
    wanted = by_hand(data.sets["one"], data.bank, 4, 1e-3)
    assert float(run.callback_metrics["one/r2_image_from_edges_ridge"]) == pytest.approx(
        wanted["r2_{}_ridge"], abs=ulps(84, F32)
    )


def test_refusals_in_one_line() -> None:
    class Mute(L.LightningModule):
        def test_step(self, batch: Batch, batch_idx: int) -> None:
            return None

    class Peeks(Linear):
        def reconstruct(self, batch: Batch, corruption: Corruption | None = None) -> dict[str, ReconstructionOutput]:
            return super().reconstruct(batch, Hide(["edges"]))

    class Units(Linear):
        def reconstruct(self, batch: Batch, corruption: Corruption | None = None) -> dict[str, ReconstructionOutput]:
            found = super().reconstruct(batch, corruption)
            return found | {"image": found["image"]._replace(truth=2 * batch.inputs["image"])}

    class Small(Linear):
        def reconstruct(self, batch: Batch, corruption: Corruption | None = None) -> dict[str, ReconstructionOutput]:
            found = super().reconstruct(batch, corruption)
            return found | {"image": ReconstructionOutput(*(t[:, :1] for t in found["image"]))}

    data = ResumableLog({"one": make()}, bank=make(seed=1))
    good = (["image"], ["edges"])
    faults: list[tuple[L.LightningModule, Reconstruction, str]] = [
        (
            Mute(),
            Reconstruction(*good),
            r"the protocol Reconstructs .*; Mute lacks it, Masked and MultiTask have it$",
        ),
        (Linear(), Reconstruction(["imgae"], ["edges"]), r"modality 'imgae': no such name; did you mean image\?"),
        (Linear(), Reconstruction(["palette"], ["edges"]), "'palette' holds categories"),
        (Linear(), Reconstruction(*good, patch=5), "patch 5 does not divide 8; 4 does$"),
        (Peeks(), Reconstruction(*good), "Peeks leaves some of 'image' visible; all of it has to be hidden$"),
        (Units(), Reconstruction(*good), "Units returns a truth of 'image' other than its input"),
        (Small(), Reconstruction(*good), r"Small predicts \(1, 8, 8\) for 'image'; .* input's shape \(3, 8, 8\)$"),
        (Linear(), Reconstruction(*good, sets=["tow"]), r"sets 'tow': no such name \(known: one\)$"),
    ]
    for recipe, evaluator, line in faults:
        with pytest.raises(ValueError, match=line) as error:
            evaluated(data, evaluator, recipe, stage="test")
        assert "\n" not in str(error.value)
    for options, line in (
        ({"targets": [], "given": ["a"]}, "targets: none given"),
        ({"targets": ["a"], "given": ["b"], "patch": 0}, "patch 0; 1 is the least"),
        ({"targets": ["a"], "given": ["b"], "l2": -1.0}, "l2 -1.0 is negative"),
    ):
        with pytest.raises(ValueError, match=line):
            Reconstruction(**options)
    assert isinstance(Linear(), Reconstructs)


# Hide -------------------------------------------------------------------------------------------------------------


class Every(Corruption):
    """Each second token is visible, of whatever it is given; it says what that was."""

    def __init__(self) -> None:
        self.given: list[tuple[str, ...]] = []

    def visible(self, real: Mapping[str, Tensor], grids: Mapping[str, Any], draw_B: Tensor) -> dict[str, Tensor]:
        self.given.append(tuple(real))
        assert real.keys() == grids.keys()
        return {m: torch.arange(mask_BT.shape[1]).expand_as(mask_BT) % 2 == 0 for m, mask_BT in real.items()}


def test_hide_masks_all_of_one_and_nothing_of_the_others() -> None:
    real = {"image": torch.tensor([[1, 1, 1], [0, 0, 0]]).bool(), "edges": torch.tensor([[1, 1], [1, 0]]).bool()}
    grids = {"image": (3,), "edges": (2,)}

    def said(masks: Masks) -> dict[str, list[list[int]]]:
        kinds = {"visible": masks.visible, "target": masks.target, "loss": masks.loss}
        return {f"{kind} {m}": x.int().tolist() for kind, by in kinds.items() for m, x in by.items()}

    assert said(Hide(["image"])(real, grids, torch.arange(2))) == {
        "visible image": [[0, 0, 0], [0, 0, 0]],
        "visible edges": [[1, 1], [1, 0]],
        "target image": [[1, 1, 1], [0, 0, 0]],
        "target edges": [[0, 0], [0, 0]],
        "loss image": [[1, 1, 1], [0, 0, 0]],
        "loss edges": [[0, 0], [0, 0]],
    }
    base = Every()
    found = said(Hide(["image"], base)(real, grids, torch.arange(2)))
    assert base.given == [("edges",)]
    assert found["visible edges"] == [[1, 0], [1, 0]] and found["target edges"] == [[0, 1], [0, 0]]
    assert found["loss edges"] == [[0, 0], [0, 0]] and found["loss image"] == [[1, 1, 1], [0, 0, 0]]
    with pytest.raises(ValueError, match=r"^Hide: no modality 'imgae'; did you mean image\? there are image, edges$"):
        Hide(["imgae"]).check(grids)
    with pytest.raises(ValueError, match=r"^Hide: image, edges hidden, so no token is visible"):
        Hide(["edges", "image"])(real, grids, torch.arange(2))
    with pytest.raises(ValueError, match=r"^Hide: modalities: none given"):
        Hide([])


# pictures ---------------------------------------------------------------------------------------------------------

TOP = 2 * 12 + 18 + 14 + 12 + 12  # of the first row of tiles


def tile(image_HW3: np.ndarray, row: int, column: int, group: int = 0) -> np.ndarray:
    step = TILE + 4
    x, y = 12 + 96 + group * (3 * step + 12) + column * step, TOP + row * step
    return image_HW3[y : y + TILE, x : x + TILE]


def test_hidden_parts_are_grey_and_visible_ones_are_pasted_into_predictions() -> None:
    truth = torch.ones(1, 3, 8, 8)
    visible = torch.zeros(1, 3, 8, 8, dtype=torch.bool)
    visible[..., :4, :] = True
    figure = gallery(
        {"image": ReconstructionOutput(truth, visible, -truth)}, {"image": torch.tensor([True])}, ["a"], "title"
    )
    assert figure is not None
    image = pixels(figure)
    half = TILE // 2
    seen, predicted, whole = (tile(image, 0, k) for k in range(3))
    assert (seen[:half] == 255).all() and (seen[half:] == np.array(HIDDEN)).all()
    assert (predicted[:half] == 255).all() and (predicted[half:] == 0).all() and (whole == 255).all()


def test_volumes_spectrograms_and_categories_are_drawn() -> None:
    kinds = {
        "volume": torch.zeros(1, 1, 5, 8, 8),
        "sound": torch.zeros(1, 8, 8),
        "label": torch.arange(8).expand(1, 8, 8),
        "text": torch.zeros(1, 9, dtype=torch.long),
    }
    kinds["volume"][:, :, 2] = torch.arange(8.0)  # the middle slice
    kinds["sound"][:, 0] = 9.0  # the lowest bin
    rebuilt = {m: ReconstructionOutput(x, torch.ones_like(x, dtype=torch.bool), x) for m, x in kinds.items()}
    figure = gallery(rebuilt, dict.fromkeys(kinds, torch.tensor([True])), ["a"], "title")
    assert figure is not None
    image = pixels(figure)
    volume, sound, label = (tile(image, 0, 2, group) for group in range(3))
    step = TILE // 8
    assert volume[0, ::step, 0].tolist() == [round(255 * k / 7) for k in range(8)]
    assert (sound[-step:] == 255).all() and (sound[:-step] == 0).all()
    assert [tuple(p) for p in label[0, ::step].tolist()] == list(PALETTE[:8])
    assert image.shape[1] == 12 + 96 + 3 * (3 * (TILE + 4) + 12) + 6  # and none of the text
    assert gallery({"text": rebuilt["text"]}, {"text": torch.tensor([True])}, ["a"], "title") is None


def test_the_same_samples_are_drawn_in_each_evaluation_whatever_the_batches(tmp_path: Path) -> None:
    data = ResumableLog({"one": make(40), "two": make(30, seed=3)}, bank=make(seed=1), size=7)
    logger = TensorBoardLogger(tmp_path, name="", version="")
    pictures = ReconstructionPictures(every=2, count=3)
    run = trainer(pictures, logger=logger, max_epochs=4, num_sanity_val_steps=1, log_every_n_steps=1)
    recipe = Linear()
    run.fit(recipe, datamodule=data)
    files = sorted((tmp_path / "pictures").iterdir())
    assert [f.name for f in files] == [f"{s}-reconstruction-{step}.png" for s in ("one", "two") for step in (2, 6, 8)]
    assert set(recipe.rows) == {3}
    first, last = (np.asarray(Image.open(tmp_path / "pictures" / f"one-reconstruction-{step}.png")) for step in (2, 8))
    assert np.array_equal(first[TOP - 4 :], last[TOP - 4 :]) and first[TOP:].std() > 10
    events = EventAccumulator(str(tmp_path), size_guidance={"images": 0})
    events.Reload()
    assert sorted(events.Tags()["images"]) == ["pictures/one-reconstruction", "pictures/two-reconstruction"]
    assert [e.step for e in events.Images("pictures/one-reconstruction")] == [
        1,
        5,
        7,
    ]  # as its numbers are, which a resume from there keeps
    other = ResumableLog(data.sets, bank=data.bank, size=40)
    evaluate(other, ReconstructionPictures(count=3), recipe=Linear(), default_root_dir=tmp_path / "other")
    again = np.asarray(Image.open(tmp_path / "other/pictures/one-reconstruction-0.png"))
    assert np.array_equal(again[TOP - 4 :], first[TOP - 4 :])


def drawn_on_a_rank(rank: int | None, folder: Path) -> None:
    data = ResumableLog({"one": make(40)}, bank=make(seed=1), size=7)
    options: dict[str, Any] = {"devices": 2, "strategy": "ddp", "use_distributed_sampler": False}
    pictures = ReconstructionPictures(count=5, modalities=["image", "palette"])
    evaluate(data, pictures, recipe=Linear(), default_root_dir=folder, **({} if rank is None else options))


@pytest.mark.slow
@pytest.mark.ddp
def test_two_ranks_draw_the_same(tmp_path: Path) -> None:
    drawn_on_a_rank(None, tmp_path / "one")
    run_ranks(2, drawn_on_a_rank, tmp_path / "two")
    one, two = (Image.open(tmp_path / f"{k}/pictures/one-reconstruction-0.png") for k in ("one", "two"))
    assert np.array_equal(np.asarray(one), np.asarray(two))


def test_wrong_arguments_of_pictures_are_one_line() -> None:
    data = ResumableLog({"one": make()}, bank=make(seed=1))
    with pytest.raises(ValueError, match=r"modality 'imgae': no such name; did you mean image\?"):
        evaluate(data, ReconstructionPictures(modalities=["imgae"]), recipe=Linear())
    with pytest.raises(ValueError, match="count 0; 1 is the least"):
        ReconstructionPictures(count=0)


def test_of_what_was_seen_whole_the_picture_shows_the_prediction() -> None:
    truth, prediction = torch.zeros(3, 8, 8), torch.ones(3, 8, 8)
    hidden = torch.ones(3, 8, 8, dtype=torch.bool)
    hidden[:, :4] = False
    for visible, black in ((torch.ones_like(hidden), False), (hidden, True)):
        _, predicted, whole = _tiles(ReconstructionOutput(truth, visible, prediction))
        assert np.array_equal(predicted[-1], whole[-1]) is black
