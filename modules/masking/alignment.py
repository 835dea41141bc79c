"""Contrast inside masked modelling: the visible tokens of one modality alone against another modality.

Letters: B samples, N tokens of all samples, D width of the encoder, E of the shared space.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from descant.modules.core.batch import Batch
from descant.modules.core.dtype import promote
from descant.modules.core.errors import no_such, require_value
from descant.modules.core.host import to_device
from descant.modules.core.objective import Term
from descant.modules.losses.contrastive import ContrastiveLoss, InfoNCE
from descant.modules.masking.decoders import Encoded
from descant.modules.towers.base import Tower
from descant.modules.towers.heads import MeanPool, Projection


class Alignment(nn.Module):
    """Contrastive term between a modality that the encoder sees alone and another, which a separate tower reads.

        z_a = unit(W_a norm(sum over visible t of h_at)),   z_b = unit(W_b norm(pool(tower(x_b)))),   loss(z_a, z_b)

    A sample counts if it has ``other`` and its visible tokens are all of ``modality``, so that z_a contains nothing of
    ``other``. Such samples are each other's negatives. The hidden tokens are predicted as well.
    Source: CAV-MAE combines both terms (Gong 2022, arXiv 2210.07839), and its encoder computes both sides. A separate
    tower for the other side, such as a BagTower of names, costs a fraction of that (our reading).

    Args:
        modality: modality that the encoder sees. other: modality that the tower reads.
        tower: tower for the other modality's input.
        width: E.
        loss: loss of pairs of unit vectors; InfoNCE by default.

    >>> from descant.modules.towers.text import BagTower
    >>> align = Alignment("rgb", "text", BagTower(vocab=9, width=4)).build(("rgb", "text"), 8)
    >>> align.name
    'align/rgb-text'
    """

    def __init__(
        self, modality: str, other: str, tower: Tower, width: int = 128, loss: ContrastiveLoss | None = None
    ) -> None:
        super().__init__()
        require_value(modality != other, f"align: {modality} with itself: two modalities are paired")
        self.modality, self.other, self.tower, self.width = modality, other, tower, width
        self.loss, self.pool = loss or InfoNCE(), MeanPool()

    @property
    def name(self) -> str:
        """Name of the term."""
        return f"align/{self.modality}-{self.other}"

    def build(self, modalities: Sequence[str], width: int) -> Alignment:
        for m in (self.modality, self.other):
            if m not in modalities:
                raise ValueError(f"align: {m!r}: {no_such(m, modalities)}")
        self.head_seen, self.head_other = Projection(width, self.width), Projection(self.tower.width, self.width)
        return self

    def forward(self, encoded: Encoded, batch: Batch) -> dict[str, Term]:
        h_ND, at = encoded.h[self.modality], encoded.at[self.modality]
        alone_B = to_device(alone({m: other.count_B for m, other in encoded.at.items()}, self.modality), h_ND.device)
        valid_B = alone_B & batch.both(self.modality, self.other)
        h_BD = h_ND.new_zeros(len(batch), h_ND.shape[1]).index_add(0, at.row_N, h_ND)  # heads normalise: a sum suffices
        z_a_BE, z_b_BE = self.head_seen(h_BD), self.head_other(self.pool(self.tower(batch.inputs[self.other])))
        z_a_BE, z_b_BE = (F.normalize(promote(z_BE), dim=-1) for z_BE in (z_a_BE, z_b_BE))
        return {self.name: Term(self.loss(z_a_BE, z_b_BE, batch.content_id, valid_B), valid=valid_B)}


def alone(count: Mapping[str, Tensor], modality: str) -> Tensor:
    """Return bool ``[B]``: samples whose visible tokens are all of one modality, from counts ``[B]`` by modality.

    >>> alone({"rgb": torch.tensor([4, 4, 0]), "text": torch.tensor([0, 2, 0])}, "rgb").tolist()
    [True, False, False]
    """
    return (count[modality] > 0) & (torch.stack(list(count.values())).sum(dim=0) == count[modality])
