"""Masks of image regions that hide overlapping regions together, so that visible ones do not reveal hidden ones.

Letters: B samples, T regions.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torchvision.ops import box_iou

from descant.modules.core.host import host_copy, to_device
from descant.modules.masking.corruptions import Corruption, Grid, Masks, noise


def pairwise_iou(box_BT4: Tensor, pixel: float = 0.0) -> Tensor:
    """Compute the intersection over union of all pairs of a sample's boxes, ``[B, T, T]``; 0 for boxes without area.

    Args:
        box_BT4: left, top, right and bottom.
        pixel: size to add to every width and height, if right and bottom are the last pixel inside the box.

    >>> box_BT4 = torch.tensor([[[0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 0.5]]])
    >>> pairwise_iou(box_BT4)[0, 0].tolist(), pairwise_iou(box_BT4, pixel=1.0)[0, 0].tolist()
    ([1.0, 0.5], [1.0, 0.75])
    """
    box_BT4 = torch.cat([box_BT4[..., :2], box_BT4[..., 2:] + pixel], dim=2)
    return torch.stack([box_iou(box_T4, box_T4) for box_T4 in box_BT4]).nan_to_num(0.0)


def region_mask(iou_BTT: Tensor, u_BT: Tensor, rate: float, threshold: float) -> Tensor:
    """Mark seed regions and all regions that overlap one, bool ``[B, T]``.

        hidden_t = any over s of  u_s < rate  and  IoU_st >= threshold

    >>> iou_BTT = torch.tensor([[[1.0, 0.5, 0.1], [0.5, 1.0, 0.0], [0.1, 0.0, 1.0]]])
    >>> region_mask(iou_BTT, torch.tensor([[0.0, 0.9, 0.9]]), rate=0.1, threshold=0.4).tolist()
    [[True, True, False]]
    """
    return ((u_BT < rate)[:, :, None] & (iou_BTT >= threshold)).any(dim=1)


class RegionMask(Corruption):
    """Masked regions of InterBERT: each region is a seed with probability ``rate``, and hides regions that overlap it.

    See :func:`region_mask`. A sample of T regions has no seed, and so no hidden region, with probability
    ``(1 - rate)^T``. Source: Lin 2020 (InterBERT, arXiv 2003.13198) and its release. The release's IoU adds one pixel
    to each side (``pixel: 1 / width``), and it treats an all-zero feature in the data as hidden.

    Args:
        rate: probability of each region to be a seed.
        iou: smallest IoU with a seed at which a region is hidden; above 1 only the seeds are hidden.
        pixel: as in :func:`pairwise_iou`, in the unit of the boxes.

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
        """Compute the masks of a batch, on the CPU as for other corruptions."""
        real_host_BT, u_BT = host_copy(real_BT), noise(draw_B, f"mask/{modality}", real_BT.shape[1])
        iou_BTT = pairwise_iou(host_copy(box_BT4).float(), self.pixel)
        target_BT = region_mask(iou_BTT, u_BT, self.rate, self.iou) & real_host_BT
        visible_BT, target_BT = (to_device(x_BT, draw_B.device) for x_BT in (real_host_BT & ~target_BT, target_BT))
        return Masks({modality: visible_BT}, {modality: target_BT}, {modality: target_BT})

    def visible(self, real: Mapping[str, Tensor], grids: Mapping[str, Grid], draw_B: Tensor) -> dict[str, Tensor]:
        raise ValueError("RegionMask: there are no boxes to overlap; the objective MaskedRegions has them")
