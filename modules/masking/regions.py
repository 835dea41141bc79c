"""Masks of regions of an image: none that is hidden can be read off another one. Letters: B samples, T regions."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torchvision.ops import box_iou

from descant.modules.core.host import host_copy, to_device
from descant.modules.masking.corruptions import Corruption, Grid, Masks, noise


def pairwise_iou(box_BT4: Tensor, pixel: float = 0.0) -> Tensor:
    """Intersection over union of all pairs of a sample's boxes, ``[B, T, T]``; 0 with a box without area.

    Args:
        box_BT4: left, top, right and bottom.
        pixel: added to every width and height, where right and bottom are the last pixel inside.

    >>> box_BT4 = torch.tensor([[[0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 0.5]]])
    >>> pairwise_iou(box_BT4)[0, 0].tolist(), pairwise_iou(box_BT4, pixel=1.0)[0, 0].tolist()
    ([1.0, 0.5], [1.0, 0.75])
    """
    box_BT4 = torch.cat([box_BT4[..., :2], box_BT4[..., 2:] + pixel], dim=2)
    return torch.stack([box_iou(box_T4, box_T4) for box_T4 in box_BT4]).nan_to_num(0.0)


def region_mask(iou_BTT: Tensor, u_BT: Tensor, rate: float, threshold: float) -> Tensor:
    """Bool ``[B, T]``: seed regions, and all that overlap one.

        hidden_t = any over s of  u_s < rate  and  IoU_st >= threshold

    >>> iou_BTT = torch.tensor([[[1.0, 0.5, 0.1], [0.5, 1.0, 0.0], [0.1, 0.0, 1.0]]])
    >>> region_mask(iou_BTT, torch.tensor([[0.0, 0.9, 0.9]]), rate=0.1, threshold=0.4).tolist()
    [[True, True, False]]
    """
    return ((u_BT < rate)[:, :, None] & (iou_BTT >= threshold)).any(dim=1)


class RegionMask(Corruption):
    """Masked regions of InterBERT: each region is a seed with chance ``rate``; what overlaps a seed is hidden with it.

    See :func:`region_mask`. A sample without a seed, of T regions a share ``(1 - rate)^T``, has nothing hidden.
    Source: Lin 2020 (InterBERT, arXiv 2003.13198) and its release, whose IoU counts a pixel more of each side
    (``pixel: 1 / width``) and which takes a feature of zeros in the data for a hidden one.

    Args:
        rate: chance of each region to be a seed.
        iou: from which on a region is hidden with a seed; above 1 the seeds alone.
        pixel: of :func:`pairwise_iou`, in the unit of the boxes.

    >>> box_BT4 = torch.tensor([[[0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 0.5]]])
    >>> RegionMask(0.9).masks("regions", torch.ones(1, 2) > 0, box_BT4, torch.tensor([3])).target["regions"].tolist()
    [[True, True]]
    """

    def __init__(self, rate: float = 0.1, iou: float = 0.4, pixel: float = 0.0) -> None:
        if not 0 < rate < 1 or not iou > 0:
            raise ValueError(
                f"rate {rate:g}, iou {iou:g}: a chance above 0 and below 1, and an IoU above 0; such as 0.1, 0.4"
            )
        self.rate, self.iou, self.pixel = rate, iou, pixel

    def masks(self, modality: str, real_BT: Tensor, box_BT4: Tensor, draw_B: Tensor) -> Masks:
        """Masks of a batch, computed on the CPU, as those of other corruptions."""
        real_host_BT, u_BT = host_copy(real_BT), noise(draw_B, f"mask/{modality}", real_BT.shape[1])
        iou_BTT = pairwise_iou(host_copy(box_BT4).float(), self.pixel)
        target_BT = region_mask(iou_BTT, u_BT, self.rate, self.iou) & real_host_BT
        visible_BT, target_BT = (to_device(x_BT, draw_B.device) for x_BT in (real_host_BT & ~target_BT, target_BT))
        return Masks({modality: visible_BT}, {modality: target_BT}, {modality: target_BT})

    def visible(self, real: Mapping[str, Tensor], grids: Mapping[str, Grid], draw_B: Tensor) -> dict[str, Tensor]:
        raise ValueError("RegionMask: there are no boxes to overlap; the objective MaskedRegions has them")
