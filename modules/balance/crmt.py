"""CRMT, certifiable robustness: wide margins of each modality alone (arXiv 2402.06244).

Letters: B samples, C classes.
"""

from __future__ import annotations

import torch

from descant.modules.balance.regularizer import FusionContext, Regularizer
from descant.modules.core.objective import Term
from descant.modules.fusion.classifiers import OrthogonalFusion


class UnimodalMargin(Regularizer):
    """Margin loss of each modality's own class scores (CRMT): one term, "margin".

        value_b = log( sum_m sum_{k != y_b} exp(s_bmk - s_bmy) + 1e-5 )

    over the modalities that the sample has, with s of an :class:`descant.modules.fusion.classifiers.OrthogonalFusion`.
    Source: Yang 2024, arXiv 2402.06244.

    Args:
        weight: weight of the term.
    """

    def __init__(self, weight: float = 2.0) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, context: FusionContext) -> dict[str, Term]:
        if not isinstance(context.fusion, OrthogonalFusion):
            raise ValueError(
                f"UnimodalMargin: model.fusion OrthogonalFusion has margins; {type(context.fusion).__name__} not"
            )
        z, present, label_B = context.inputs
        at_B1 = label_B.clamp(min=0)[:, None]
        over = []
        for m, s_BC in context.fusion.alone(z, present).items():
            off_BC = (s_BC - s_BC.gather(1, at_B1)).scatter(1, at_B1, -torch.inf)
            over.append(off_BC.masked_fill(~present[m][:, None], -torch.inf))
        floor_B1 = torch.full_like(over[0][:, :1], 1e-5).log()
        value_B = torch.cat([*over, floor_B1], dim=1).logsumexp(dim=1)
        some_B = torch.stack([present[m] for m in z]).any(dim=0)
        return {"margin": Term(self.weight * value_B, valid=some_B & (label_B >= 0), norm=context.rows)}
