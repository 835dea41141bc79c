"""SimCLR: NT-Xent between two views of a modality. Letters: B samples, D width, P width of projections."""

from __future__ import annotations

from torch import Tensor

from descant.modules.losses.contrastive import ntxent
from descant.modules.losses.views.base import ViewObjective, Views, require_positive


class SimCLR(ViewObjective):
    """SimCLR: InfoNCE of two views, with all other rows of both views as negatives (:func:`ntxent`).

    Source: Chen 2020, arXiv 2002.05709. The release puts both views into one batch, so that its batch norms see both;
    here, as in lightly, batch norms see each view separately.

    Args:
        hidden, out: widths of the two-layer projector.
        temperature: temperature of the cosines.

    >>> import torch
    >>> objective = SimCLR(hidden=8, out=4).build(6)
    >>> h_BD, everyone = torch.randn(5, 6), torch.ones(5, dtype=torch.bool)
    >>> objective(Views([h_BD, h_BD], torch.arange(5), everyone)).shape
    torch.Size([5])
    """

    unit_length = True

    def __init__(self, hidden: int = 2048, out: int = 128, temperature: float = 0.1) -> None:
        super().__init__()
        require_positive(self, temperature=temperature)
        self.hidden, self.out, self.temperature = hidden, out, temperature

    def forward(self, views: Views) -> Tensor:
        u_BP, v_BP = (self.project(h_BD, views.valid_B) for h_BD in views.h)
        return ntxent(u_BP, v_BP, views.key_B, views.valid_B, 1 / self.temperature)
