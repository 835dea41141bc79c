"""Masked regions of an image as one of several objectives. Letters: B samples, T regions, C classes."""

from __future__ import annotations

from torch import Tensor

from descant.modules.core.batch import Batch
from descant.modules.core.host import derive
from descant.modules.masking.corruptions import Masks
from descant.modules.masking.discrete_adapters import DistributionAdapter
from descant.modules.masking.regions import RegionMask
from descant.modules.objectives.masked import MaskedTokens


class MaskedRegions(MaskedTokens):
    """Prediction of the classes of hidden regions, as in InterBERT's masked region modelling.

        value_b = mean over hidden t of KL(p_bt || softmax(W h_bt))       h: fused with the other modality, or alone

    Regions are hidden together with all that overlap them. Only own pairs have hidden regions: the mismatched pairs of
    :class:`Match` have only visible tokens and add nothing here. In the release, half of the samples are mismatched
    pairs, whose masked loss is set to zero. Source: Lin 2020 (arXiv 2003.13198) and its release, in which a detector
    gives p.

    Args:
        classes: C of the target.
        regions: T.
        modality: modality of the regions. boxes: the input with their boxes ``[B, T, 4]``; boxes without area are
            padding.
        given: the modality to fuse with; without it, regions are predicted from regions.
        mask: chooses the hidden regions; RegionMask by default.
        target: the input with the probabilities ``[B, T, C]``.

    >>> MaskedRegions(classes=64, regions=24).adapter.grid
    (24,)
    """

    def __init__(
        self,
        classes: int,
        regions: int,
        modality: str = "regions",
        given: str | None = None,
        mask: RegionMask | None = None,
        target: str = "words",
        boxes: str = "boxes",
    ) -> None:
        mask = mask or RegionMask()
        super().__init__(modality, DistributionAdapter(classes, regions), given, mask, target)
        self.mask, self.boxes = mask, boxes

    def raw(self, batch: Batch) -> tuple[Tensor, Tensor]:
        raw_BTP, _ = super().raw(batch)
        return raw_BTP, derive(_real, self.box(batch), batch.present[self.modality])

    def box(self, batch: Batch) -> Tensor:
        if self.boxes not in batch.inputs:
            raise ValueError(f"boxes: the data has no {self.boxes!r}, only {', '.join(batch.inputs)}")
        return batch.inputs[self.boxes]

    def hides(self, batch: Batch) -> Masks:
        return self.mask.masks(self.modality, self.raw(batch)[1], self.box(batch), batch.rng_seed)


def _real(box_BT4: Tensor, present_B: Tensor) -> Tensor:
    return (box_BT4[..., 2:] > box_BT4[..., :2]).all(dim=2) & present_B[:, None]
