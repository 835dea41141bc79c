"""Contrast of two views of one modality, as an objective. Letters: B samples, D width."""

from __future__ import annotations

from typing import Literal, Self

from torch import Tensor
from torch.nn import functional as F

from descant.modules.core.batch import Batch
from descant.modules.core.dtype import promote
from descant.modules.core.objective import Term
from descant.modules.core.sham import Sham
from descant.modules.losses.contrastive import ntxent
from descant.modules.objectives.base import Facts, TaskObjective
from descant.modules.objectives.embeddings import Embeddings
from descant.modules.towers.heads import Projection


class Intra(TaskObjective):
    """NT-Xent between two views of one modality (SimCLR; the intra-modal term of SLIP, Mu 2021, arXiv 2112.12750).

    ``value_b`` is the mean over both views of ``-log(exp(s u.v_b) / (exp(s u.v_b) + sum over other rows of both
    views))``, computed on a separate projection head. The sham pairs each sample with another sample's second view.

    Args:
        modality: the modality with two views (``inputs[modality]`` and ``inputs[modality + "@2"]``).
        width: width of the modality's tower features. out: width of the projection. hidden: width of its hidden layer.
        temperature: 1/s, fixed.
        sham: ``permute`` for the control.
    """

    def __init__(
        self,
        width: int,
        modality: str = "image",
        out: int = 128,
        hidden: int = 512,
        temperature: float = 0.1,
        sham: Literal["permute"] | None = None,
    ) -> None:
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"temperature {temperature:g}: must be above 0")
        self.modality, self.scale, self.sham = modality, 1 / temperature, Sham(sham)
        self.projection = Projection(width, out, layers=2, hidden=hidden)

    def build(self, facts: Facts) -> Self:
        self.reads = self.pools = (self.modality,)
        self.inputs = (f"{self.modality}@2",)
        facts.require(self.reads)
        return self

    def forward(self, streams: Embeddings, batch: Batch) -> dict[str, Term]:
        m, valid_B = self.modality, batch.present[self.modality]
        h_1_BD, h_2_BD = streams.features(m), streams.features(m, "@2")
        value_B = self.values(h_1_BD, h_2_BD, batch.content_id, batch.rng_seed, valid_B)
        return {"": Term(value_B, valid=valid_B, given=(m,))}

    def values(self, h_1_BD: Tensor, h_2_BD: Tensor, key_B: Tensor, draw_B: Tensor, valid_B: Tensor) -> Tensor:
        """Compute ``value_B`` of the features of both views; ``key_B`` and ``draw_B`` are int64."""
        h_2_BD = self.sham(h_2_BD, draw_B, valid_B)
        u_BD, v_BD = (F.normalize(promote(self.projection(h_BD)), dim=-1) for h_BD in (h_1_BD, h_2_BD))
        return ntxent(u_BD, v_BD, key_B, valid_B, self.scale)
