"""Masked regions of an image as one of several objectives. Letters: B samples, T regions, C classes."""

from __future__ import annotations

from torch import Tensor

from descant.modules.core.batch import Batch
from descant.modules.core.host import derived
from descant.modules.masking.corruptions import Masks
from descant.modules.masking.discrete_adapters import DistributionAdapter
from descant.modules.masking.regions import RegionMask
from descant.modules.objectives.masked import MaskedTokens


class MaskedRegions(MaskedTokens):
    """Classes of hidden regions, hidden with all that overlap them (masked region modelling of InterBERT).

        value_b = mean over hidden t of KL(p_bt || softmax(W h_bt))       h: fused with the other modality, or alone

    Own pairs alone have hidden regions: the mismatched pairs of :class:`Match` are of tokens that are all visible, and
    add nothing here. In the release a sample is a mismatched pair half of the time, whose masked loss is zeroed.
    Source: Lin 2020 (arXiv 2003.13198) and its release, where p is a detector's.

    Args:
        classes: C of the target.
        regions: T.
        modality: of the regions. boxes: the input with their boxes ``[B, T, 4]``; one without area is padding.
        given: the modality that it is fused with; none predicts regions from regions.
        mask: what is hidden.
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
        return raw_BTP, derived(_real, self.box(batch), batch.present[self.modality])

    def box(self, batch: Batch) -> Tensor:
        if self.boxes not in batch.inputs:
            raise ValueError(f"boxes: the data has no {self.boxes!r}, only {', '.join(batch.inputs)}")
        return batch.inputs[self.boxes]

    def hides(self, batch: Batch) -> Masks:
        return self.mask.masks(self.modality, self.raw(batch)[1], self.box(batch), batch.rng_seed)


def _real(box_BT4: Tensor, present_B: Tensor) -> Tensor:
    return (box_BT4[..., 2:] > box_BT4[..., :2]).all(dim=2) & present_B[:, None]
