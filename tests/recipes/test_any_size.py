"""Images of any size through the recipes: each sample is what it is alone, and a budget of tokens trains all three.

Letters: B samples, T tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist

from descant.callbacks import Resume
from descant.datamodules.base import BatchDataset, DataModule, Rows
from descant.datamodules.fields.any_size import AnySizeField
from descant.datamodules.fields.fields import Fields, TextField
from descant.datamodules.user.user_data import UserData
from descant.modules.core.batch import Batch
from descant.modules.language import CausalLM
from descant.modules.language.positions import VisualAxes
from descant.modules.language.projectors import EachToken, ImageProjector, PooledGrid, Resampler
from descant.modules.masking.adapters import Adapters, PatchAdapter
from descant.modules.masking.corruptions import UniformMask
from descant.modules.masking.decoders import JointDecoder
from descant.modules.tokenizers.text import NgramTokenizer
from descant.modules.towers import AnySizeTower, BagTower, Towers
from descant.modules.towers.vit import Trunk
from descant.recipes import Contrastive, Masked, VisionLanguage
from tests.callbacks.checkpoints.test_resume import Act, equal, fit, point, state
from tests.datamodules.fields.test_any_size import SHAPES, photographs
from tests.modules.towers.test_any_size import GRIDS
from tests.modules.towers.test_any_size import batch as images
from tests.ranks import run_ranks
from tests.recipes.test_vision_language import ANSWER, IMAGE, TURNED, alone
from tests.recipes.test_vision_language import batch as dialogues
from tests.step_toy import QUIET
from tests.tolerance import F32, rounding, ulps


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DESCANT_CACHE", str(tmp_path / "cache"))


def masked() -> Masked:
    torch.manual_seed(0)
    adapters = Adapters(image=PatchAdapter([20, 24], 4, padded=True))
    return Masked(adapters, Trunk(12, 1, 2), JointDecoder(8, 1, 2), UniformMask(0.5)).double()


def one(x_BCHW: Tensor, row: int, key: int) -> Batch:
    """One image without padding."""
    r, s = GRIDS[row]
    present = {"image": torch.tensor([True])}
    return Batch({"image": x_BCHW[row : row + 1, :, : 4 * r, : 4 * s]}, present, rng_seed=torch.tensor([key]))


# masked ----------------------------------------------------------------------------------------------------------


def test_a_masked_image_is_what_it_is_alone() -> None:
    made, x_BCHW = masked(), images()
    keys = torch.arange(len(GRIDS)) * 7919 + 13
    b = Batch({"image": x_BCHW}, {"image": torch.ones(len(GRIDS), dtype=torch.bool)}, rng_seed=keys)
    (term,) = made.terms(b).values()
    for row in range(len(GRIDS)):
        (own,) = made.terms(one(x_BCHW, row, int(keys[row]))).values()
        torch.testing.assert_close(term.value[row], own.value[0], **rounding(64, F32))  # losses are float32


def test_its_loss_is_of_its_own_hidden_patches() -> None:
    made, x_BCHW = masked(), images()
    b = Batch({"image": x_BCHW}, {"image": torch.ones(len(GRIDS), dtype=torch.bool)}, rng_seed=torch.arange(5))
    real = made.raw(b)[1]
    masks = made.corruption(real, made.grids, b.rng_seed)
    count_B = torch.tensor([r * s for r, s in GRIDS])
    assert torch.equal(real["image"].sum(dim=1), count_B)
    assert masks.visible["image"].sum(dim=1).tolist() == [round(n / 2) for n in count_B.tolist()]
    assert torch.equal(masks.visible["image"] | masks.target["image"], real["image"])
    rebuilt, (term,) = made.reconstruct(b)["image"], made.terms(b).values()
    assert rebuilt.prediction.shape == x_BCHW.shape
    for row, (r, s) in enumerate(GRIDS):
        inside = (row, slice(None), slice(4 * r), slice(4 * s))
        hidden = ~rebuilt.visible[inside]
        squares = (rebuilt.prediction[inside] - x_BCHW[inside]).square()
        assert torch.equal(rebuilt.prediction[inside][~hidden], x_BCHW[inside][~hidden])
        torch.testing.assert_close(term.value[row], squares[hidden].mean().float(), **rounding(64, F32))


def test_an_image_larger_than_the_adapter_is_refused() -> None:
    present = {"image": torch.tensor([True])}
    with pytest.raises(ValueError, match=r"input \(3, 24, 4\): this adapter takes \(3, 20, 24\)"):
        masked().terms(Batch({"image": torch.zeros(1, 3, 24, 4)}, present))


# vision-language -------------------------------------------------------------------------------------------------


def seeing(projector: ImageProjector | None = None, **more: Any) -> VisionLanguage:
    torch.manual_seed(0)
    towers = Towers(image=AnySizeTower(16, 4, 8, 1, 2))
    lm = CausalLM(20, 12, 2, 2, length=64)
    made = VisionLanguage(
        towers=towers, lm=lm, image_token=IMAGE, answer_token=ANSWER, projector=projector or EachToken(), **more
    )
    with torch.no_grad():
        for p in made.parameters():
            p.mul_(3 if p.ndim > 1 else 1)
    return made.double()


def asked() -> Batch:
    b = dialogues()
    b.inputs["image"] = images((*GRIDS, (3, 3), (1, 1)))
    return b


@pytest.mark.parametrize("projector", [EachToken(), Resampler(3, heads=2)])
def test_a_dialogue_has_as_many_tokens_as_its_image_and_is_what_it_is_alone(projector: ImageProjector) -> None:
    made, b = seeing(copy.deepcopy(projector)), asked()
    _, row = made.sequence(b)
    each = [r * s if isinstance(projector, EachToken) else 3 for r, s in (*GRIDS, (3, 3), (1, 1))]
    shown = [0, 5, 6, 2]  # rows 1 and 3 have no image, and row 4 names none
    assert (row.ids_BS == IMAGE).sum(dim=1)[shown].tolist() == [each[n] for n in shown]
    assert (row.ids_BS == IMAGE).sum(dim=1)[[1, 3, 4]].tolist() == [0, 0, 0]
    (term,) = made.terms(b).values()
    assert term.valid is not None
    for n in term.valid.nonzero().flatten().tolist():
        torch.testing.assert_close(term.value[n], alone(made, b, n)[0], **TURNED)


def test_what_needs_images_of_one_size_says_so() -> None:
    with pytest.raises(ValueError, match="PooledGrid: images of any size are no squares; EachToken and Resampler"):
        seeing(PooledGrid(1)).terms(asked())
    with pytest.raises(ValueError, match="VisualAxes: images of different numbers of tokens have no common grid"):
        seeing(visual=VisualAxes(columns=1)).sequence(asked())


# a few steps of each ---------------------------------------------------------------------------------------------


class Keep(L.Callback):
    """Images of each step, and its loss."""

    def __init__(self) -> None:
        self.index: list[list[int]] = []
        self.loss: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int) -> None:
        self.index.append(batch.index[batch.present["image"]].tolist())
        self.loss.append(float(outputs["loss"]))


def fitted(recipe: L.LightningModule, data: DataModule, folder: Path, steps: int = 4) -> Keep:
    keep = Keep()
    L.Trainer(max_steps=steps, callbacks=[keep], default_root_dir=folder, **QUIET).fit(recipe, datamodule=data)
    assert len(keep.loss) == steps and np.isfinite(keep.loss).all()
    return keep


def own(path: Path, text: bool = True) -> UserData:
    image = AnySizeField(patch=8, tokens=16)
    fields = Fields(image=image, text=TextField(tokenizer=NgramTokenizer(buckets=64, length=12)) if text else None)
    return UserData(0, path=str(path), fields=fields, holdout=0.0, batch_tokens=80)


def contrast() -> Contrastive:
    torch.manual_seed(0)
    return Contrastive(Towers(image=AnySizeTower(32, 8, 8, 1, 2), text=BagTower(64, 8)), width=8)


def test_contrast_trains_on_a_budget_of_tokens(tmp_path: Path) -> None:
    keep = fitted(contrast(), own(photographs(tmp_path / "d", SHAPES)), tmp_path)
    assert len({len(index) for index in keep.index}) > 1, "steps of different numbers of samples"


def test_resumed_in_the_middle_of_an_epoch_it_ends_bit_identical(tmp_path: Path) -> None:
    path = photographs(tmp_path / "d", SHAPES)
    whole, resumed = Act(), Act()
    options: dict[str, Any] = {"max_epochs": 2, "limit_val_batches": 0}
    _, net = fit(tmp_path / "a", Resume(every=1, keep=100), whole, net=contrast(), data=own(path), **options)
    steps = len(whole.losses) // 2
    at = steps + 2
    _, again = fit(
        tmp_path / "b",
        *(Resume(every=1), resumed),
        **(options | {"net": contrast(), "data": own(path), "path": point(tmp_path / "a", at)}),
    )
    assert steps > 3 and equal(state(net), state(again))
    assert resumed.seen == whole.seen[at:] and resumed.losses == whole.losses[at:]
    for epoch in range(2):
        assert sorted(i for e, ids in whole.seen for i in ids if e == epoch) == list(range(len(SHAPES)))


def _rank(rank: int, path: Path, world: int = 2) -> dict[str, Tensor]:
    net = contrast()
    net.optimization.optimizer = lambda parameters: torch.optim.SGD(parameters, lr=1.0)
    strategy = "ddp" if world > 1 else "auto"
    options: dict[str, Any] = {"devices": world, "strategy": strategy, "default_root_dir": path.parent}
    L.Trainer(max_steps=3, **options, **QUIET).fit(net, datamodule=own(path))
    if world > 1:
        dist.destroy_process_group()
    return state(net)


@pytest.mark.ddp
def test_two_ranks_are_one(tmp_path: Path) -> None:
    path = photographs(tmp_path / "d", SHAPES)
    before, alone = state(contrast()), _rank(0, path, world=1)
    moved = max(float((alone[name] - x).abs().max()) for name, x in before.items())
    for found in run_ranks(2, _rank, path):
        gap = max(float((alone[name] - x).abs().max()) for name, x in found.items())
        assert gap < ulps(512, F32) < moved / 100, (gap, moved)  # sums of 24 samples of 16 tokens, three times


def test_a_masked_model_trains_on_a_budget_of_tokens(tmp_path: Path) -> None:
    adapters = Adapters(image=PatchAdapter([64, 64], 8, padded=True))
    made = Masked(adapters, Trunk(12, 1, 2), JointDecoder(8, 1, 2))
    fitted(made, own(photographs(tmp_path / "d", SHAPES), text=False), tmp_path)


class Asked(BatchDataset):
    """Questions on images of several sizes."""

    modalities = ("image", "text")

    def __len__(self) -> int:
        return 7

    def rows(self, index_B: np.ndarray, draw_B: np.ndarray) -> Rows:
        b = asked().select(torch.from_numpy(index_B))
        return Rows({m: x.float() if x.is_floating_point() else x for m, x in b.inputs.items()}, {}, b.content_id)

    def present(self, index_N: np.ndarray) -> dict[str, Tensor]:
        return {m: mask_B[index_N] for m, mask_B in asked().present.items()}


class AspectQuestions(DataModule):
    modalities: Sequence[str] = ("image", "text")  # type: ignore[assignment]  # a property of the base

    def training_set(self) -> BatchDataset:
        return Asked(0)


def test_a_language_model_trains_on_images_of_any_size(tmp_path: Path) -> None:
    made = seeing().float()
    before = [p.detach().clone() for p in made.towers["image"].parameters()]
    fitted(made, AspectQuestions(batch_size=4), tmp_path)
    assert isinstance(made.towers["image"], nn.Module)
    assert all(not torch.equal(p, q) for p, q in zip(made.towers["image"].parameters(), before, strict=True))
