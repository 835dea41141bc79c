"""Progressive resizing: smaller images early in a run. Letters: B samples, C channels, H, W and S pixels."""

from __future__ import annotations

from bisect import bisect_right
from typing import Any

import lightning as L
from torch import Tensor
from torch.nn import functional as F

from descant.modules.core.batch import Batch
from descant.modules.training_setup.trainer import share_of_run


class ProgressiveResizing(L.Callback):
    """Progressive resizing: images of ``sizes[k]`` pixels up to the share ``until[k]`` of the run, then of full size.

        x_BCSS = resize(x_BCHW, S_t),    S_t = sizes[k] while t / T < until[k], the data's own size after the last

    Images are downsampled on the device (bilinear with antialias) after augmentation. Only training batches are
    resized; validation and test use the data's own size. The cost of a step falls with S_t^2. The size follows from the
    step, so resuming is exact. Source: fast.ai's DAWNBench entry (Howard 2018); EfficientNetV2 (Tan and Le 2021, arXiv
    2104.00298), which also increases its augmentation, unlike this callback.

    Args:
        sizes: side of the images in pixels, increasing.
        until: share of the run's steps at which each size ends, increasing, above 0 and at most 1.
        modalities: the inputs to resize, with their second views.

    >>> grow = ProgressiveResizing(sizes=[16, 24], until=[0.5, 0.8])
    >>> grow.size_at(0.0), grow.size_at(0.5), grow.size_at(0.8)
    (16, 24, None)
    """

    once = True

    def __init__(self, sizes: list[int], until: list[float], modalities: list[str] | None = None) -> None:
        if len(sizes) != len(until):
            raise ValueError(f"ProgressiveResizing: {len(sizes)} sizes and {len(until)} shares: one share a size")
        if not all(a < b for a, b in zip([0, *sizes], sizes, strict=False)):
            raise ValueError(f"ProgressiveResizing: sizes {sizes}: pixels, each more than the one before")
        if not all(a < b for a, b in zip([0.0, *until], [*until, 1.0 + 1e-9], strict=True)):
            raise ValueError(f"ProgressiveResizing: until {until}: shares of the run above 0 and at most 1, rising")
        self.sizes, self.until, self.modalities = sizes, until, modalities or ["image"]

    def size_at(self, share: float) -> int | None:
        """Return the pixels at a share of the run; None: the data's own size."""
        return [*self.sizes, None][bisect_right(self.until, share)]

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, *_: Any) -> None:
        size = self.size_at(share_of_run(trainer))
        if size is None:
            return
        for modality in self.modalities:
            if modality not in batch.inputs:
                raise ValueError(
                    f"ProgressiveResizing: modalities: the data has no {modality!r}, only {', '.join(batch.inputs)}"
                )
            for name in (modality, f"{modality}@2"):
                if name in batch.inputs:
                    batch.inputs[name] = downsample_images(batch.inputs[name], size, name)


def downsample_images(x_BCHW: Tensor, size: int, name: str = "image") -> Tensor:
    """Downsample images to ``size`` pixels a side, float ``[B, C, size, size]``.

    >>> import torch
    >>> x_BCHW = torch.tensor([0.0, 1.0, 2.0, 3.0]).expand(1, 1, 4, 4)
    >>> [round(x, 2) for x in downsample_images(x_BCHW, 2)[0, 0, 0].tolist()]  # 5 / 7 and 16 / 7
    [0.71, 2.29]
    """
    if x_BCHW.dim() != 4 or not x_BCHW.is_floating_point():
        raise ValueError(f"ProgressiveResizing: {name} {tuple(x_BCHW.shape)} {x_BCHW.dtype}: no image [B, C, H, W]")
    if min(x_BCHW.shape[2:]) < size:
        raise ValueError(f"ProgressiveResizing: sizes: {size} pixels, and the data's {name} has {x_BCHW.shape[-1]}")
    return F.interpolate(x_BCHW, size=(size, size), mode="bilinear", antialias=True)
