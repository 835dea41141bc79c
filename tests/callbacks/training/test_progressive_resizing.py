"""Progressive resizing: the size follows the step, averages what it shrinks, and leaves evaluation as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from descant.callbacks import ProgressiveResizing, TrainFlops
from descant.callbacks.training.progressive_resizing import downsample_images
from descant.modules.core.batch import Batch

B, SIZE, STEPS = 4, 16, 10


class Rows(Dataset[int]):
    def __len__(self) -> int:
        return B

    def __getitem__(self, index: int) -> int:
        return index


def collate(rows: list[int]) -> Batch:
    generator = torch.Generator().manual_seed(7)
    image = torch.rand(B, 3, SIZE, SIZE, generator=generator)
    present = {m: torch.ones(B, dtype=torch.bool) for m in ("image", "text")}
    return Batch({"image": image, "image@2": image, "text": torch.arange(B * 5).view(B, 5)}, present)


class Watcher(L.LightningModule):
    """One convolution; keeps the shapes of what it sees."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Conv2d(3, 2, 3, padding=1)
        self.seen: list[tuple[int, ...]] = []
        self.validated: list[int] = []

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self.seen.append((self.global_step, batch.inputs["image"].shape[-1], batch.inputs["image@2"].shape[-1]))
        assert batch.inputs["text"].shape == (B, 5)
        return self.net(batch.inputs["image"]).square().mean()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.validated.append(batch.inputs["image"].shape[-1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(path: Path, *callbacks: L.Callback, steps: int = STEPS, ckpt: Path | None = None) -> Watcher:
    model = Watcher()
    stop = [] if steps == STEPS else [Stop(steps)]
    options: dict[str, Any] = {"logger": False, "accelerator": "cpu", "enable_progress_bar": False, "max_epochs": -1}
    training, validation = (DataLoader(Rows(), batch_size=B, collate_fn=collate) for _ in range(2))
    trainer = L.Trainer(
        default_root_dir=path,
        callbacks=[*callbacks, *stop],
        max_steps=STEPS,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        check_val_every_n_epoch=STEPS,
        **options,
    )
    trainer.fit(model, training, validation, ckpt_path=ckpt, weights_only=False)
    if ckpt is None and stop:
        trainer.save_checkpoint(path / "last.ckpt")
    return model


class Stop(L.Callback):
    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
        trainer.should_stop = trainer.global_step >= self.steps


def test_the_size_follows_the_step_and_evaluation_sees_all_pixels(tmp_path: Path) -> None:
    model = fit(tmp_path, ProgressiveResizing(sizes=[4, 8], until=[0.5, 0.8]))
    sizes = [4] * 5 + [8] * 3 + [16] * 2
    assert model.seen == [(step, size, size) for step, size in enumerate(sizes)], "and so does the second view"
    assert model.validated == [SIZE]


def test_a_resumed_run_has_the_size_of_its_step_and_is_bit_identical(tmp_path: Path) -> None:
    def grow() -> ProgressiveResizing:
        return ProgressiveResizing(sizes=[4, 8], until=[0.5, 0.8])

    whole = fit(tmp_path, grow())
    fit(tmp_path, grow(), steps=6)
    resumed = fit(tmp_path, grow(), ckpt=tmp_path / "last.ckpt")
    assert resumed.seen == whole.seen[6:]
    assert torch.equal(resumed.net.weight, whole.net.weight)


def test_pixels_are_averaged_down() -> None:
    x_BCHW = torch.zeros(1, 1, 8, 8, dtype=torch.float64)
    x_BCHW[..., ::2] = 1.0  # stripes of one pixel: without antialias they would alias to all ones
    out = downsample_images(x_BCHW, 4)
    assert out.shape == (1, 1, 4, 4) and out[..., 1:-1].sub(0.5).abs().max() < 1e-12  # a filter of even weights
    # away from the border a linear ramp stays a linear ramp
    ramp = torch.arange(32, dtype=torch.float64).expand(1, 1, 32, 32)
    assert (
        downsample_images(ramp, 16)[0, 0, 0, 2:-2].diff().sub(2).abs().max() < 1e-12
    )  # 4 weights of numbers up to 31: 140 ulps


def test_operations_are_counted_by_size(tmp_path: Path) -> None:
    flops = TrainFlops()
    fit(tmp_path, ProgressiveResizing(sizes=[4, 8], until=[0.5, 0.8]), flops)
    kinds = flops.state_dict()["total"]
    counts = {name.rpartition("x")[2]: next(iter(of["counted"].values())) for name, of in kinds.items()}
    assert list(counts) == ["4", "8", "16"]
    small = counts["4"][0]  # same-padded convolution: by the area
    assert set(counts["8"]) == {4 * small} and set(counts["16"]) == {16 * small}


@pytest.mark.parametrize(
    ("sizes", "until", "says"),
    [
        ([16], [0.5, 0.8], "1 sizes and 2 shares: one share a size"),
        ([24, 16], [0.5, 0.8], r"sizes \[24, 16\]: pixels, each more than the one before"),
        ([0, 16], [0.5, 0.8], "each more than the one before"),
        ([16, 24], [0.8, 0.5], r"until \[0.8, 0.5\]: shares of the run above 0 and at most 1, rising"),
        ([16], [1.2], "at most 1"),
        ([16], [0.0], "above 0"),
    ],
)
def test_wrong_lists_are_one_line(sizes: list[int], until: list[float], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        ProgressiveResizing(sizes, until)


@pytest.mark.parametrize(
    ("sizes", "modality", "says"),
    [
        ([32], "image", "sizes: 32 pixels, and the data's image has 16"),
        ([4], "imge", "modalities: the data has no 'imge', only image, image@2, text"),
        ([4], "text", r"text \(4, 5\) torch.int64: no image \[B, C, H, W\]"),
    ],
)
def test_what_the_data_does_not_have_is_one_line_at_the_first_batch(
    sizes: list[int], modality: str, says: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=says):
        fit(tmp_path, ProgressiveResizing(sizes, [0.5], [modality]))
