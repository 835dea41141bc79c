"""Regions of images: a grid of cells and random crops that overlap them, as features, boxes and visual words.

Letters: B samples, T regions, P numbers of a region, N regions of all samples, K words.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import roi_align

from descant.modules.balance.purity import kmeans
from descant.modules.core.rng import uniform_NK


class Regions:
    """Regions of an image without a detector: ``grid^2`` cells and ``crops`` random squares over them.

        box_t = (left, top, right, bottom) in [0, 1],     feature_t = RoIAlign(image, box_t), side x side pixels
        word_t = one-hot(argmin_k |feature_t - w_k|^2),   or softmax_k(-|feature_t - w_k|^2 / temperature)

    The words are centres of k-means, fitted on regions of training images. Crops come from each sample's random key.
    Source: RoIAlign (He 2017, arXiv 1703.06870). InterBERT (2003.13198) has up to 36 boxes of a Faster R-CNN, with
    2,048 features and probabilities of 1,601 classes each.

    Args:
        grid: cells along a side.
        crops: number of random squares.
        scale: least and largest side of a crop, as a share of the image's.
        side: pixels along a side of a region's features.
        words: K.
        temperature: temperature of the words; without one, only the nearest word.

    >>> regions = Regions(grid=2, crops=1, scale=(0.5, 0.5), side=1, words=2)
    >>> box_BT4 = regions.boxes(torch.tensor([3]))
    >>> box_BT4[0, 1].tolist(), regions.features(torch.ones(1, 3, 8, 8), box_BT4).shape
    ([0.5, 0.0, 1.0, 0.5], torch.Size([1, 5, 3]))
    """

    def __init__(
        self,
        grid: int = 4,
        crops: int = 8,
        scale: tuple[float, float] = (0.2, 0.5),
        side: int = 4,
        words: int = 64,
        temperature: float | None = None,
    ) -> None:
        if min(grid, side) < 1 or crops < 0 or words < 2:
            raise ValueError(f"Regions: grid {grid}, side {side}, crops {crops}, words {words}: at least 1, 1, 0 and 2")
        if not 0 < scale[0] <= scale[1] <= 1 or not (temperature is None or temperature > 0):
            raise ValueError(
                f"Regions: scale {list(scale)}, temperature {temperature}: shares such as [0.2, 0.5]; above 0"
            )
        self.grid, self.crops, self.scale, self.side = grid, crops, scale, side
        self.words, self.temperature = words, temperature

    def boxes(self, draw_B: Tensor) -> Tensor:
        """Compute boxes ``[B, T, 4]`` on the CPU, cells first, row by row."""
        at = torch.arange(self.grid) / self.grid
        top_T, left_T = torch.meshgrid(at, at, indexing="ij")
        corner_T2 = torch.stack([left_T.flatten(), top_T.flatten()], dim=1)
        cell_T4 = torch.cat([corner_T2, corner_T2 + 1 / self.grid], dim=1)
        purposes = [f"regions/{k}/{what}" for k in range(self.crops) for what in ("side", "x", "y")]
        u_BK3 = uniform_NK(draw_B, purposes).view(-1, self.crops, 3)
        side_BK1 = self.scale[0] + (self.scale[1] - self.scale[0]) * u_BK3[..., :1]
        corner_BK2 = u_BK3[..., 1:] * (1 - side_BK1)
        crop_BK4 = torch.cat([corner_BK2, corner_BK2 + side_BK1], dim=2)
        return torch.cat([cell_T4.expand(len(crop_BK4), -1, -1), crop_BK4], dim=1)

    def features(self, x_BCHW: Tensor, box_BT4: Tensor) -> Tensor:
        """Reduce the pixels of each box to ``side`` x ``side``: ``[B, T, P]``."""
        shape, size = [self.side, self.side], [x_BCHW.shape[3], x_BCHW.shape[2]] * 2
        pixel_BT4 = torch.stack([x_BT * n for x_BT, n in zip(box_BT4.float().unbind(2), size, strict=True)], dim=2)
        # in float32 whatever the run's precision, since words are compared
        cut_NCSS = roi_align(x_BCHW.float(), list(pixel_BT4), shape, sampling_ratio=2, aligned=True)
        return cut_NCSS.flatten(1).view(len(x_BCHW), box_BT4.shape[1], -1)

    def fit(self, feature_NP: Tensor) -> Tensor:
        """Compute ``w_KP``: the k-means centres of regions of training images."""
        word_N = kmeans(feature_NP, self.words, seed=0, restarts=1, rounds=50)
        one_hot_NK = F.one_hot(word_N, self.words).to(feature_NP)
        return one_hot_NK.T @ feature_NP / one_hot_NK.sum(dim=0).clamp(min=1)[:, None]

    def probabilities(self, feature_BTP: Tensor, w_KP: Tensor) -> Tensor:
        """Compute the words of regions, ``[B, T, K]``."""
        far_BTK = torch.cdist(feature_BTP, w_KP).square()
        if self.temperature is not None:
            return (-far_BTK / self.temperature).softmax(dim=2)
        return F.one_hot(far_BTK.argmin(dim=2), len(w_KP)).to(feature_BTP)
