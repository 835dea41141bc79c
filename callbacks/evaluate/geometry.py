"""Geometry of the embedding space. Letters: N rows of an evaluation set, D width."""

from __future__ import annotations

import lightning as L
from torch import Tensor

from descant.callbacks.evaluate.embeddings import PairEvaluator, Rows
from descant.modules.evaluation.metrics import (
    alignment,
    effective_rank,
    feature_std,
    matched_rows,
    modality_gap,
    uniformity,
)


class Geometry(PairEvaluator):
    """Modality gap, effective rank, standard deviation, alignment and uniformity of embeddings.

        gap_{a}_{b}   = || mean z_a - mean z_b ||        over positive pairs
        align_{a}_{b} = mean || z_a - z_b ||^2           over positive pairs
        rank_{m}      = exp(entropy of the normalised singular values of z_m)
        std_{m}       = mean over features of their standard deviation over rows of z_m
        uniform_{m}   = log mean over pairs of exp(-2 || z_m - z_m' ||^2)

    A positive pair is a row that has both modalities, or else two rows of equal key.

    Args:
        limit: rows for uniformity, evenly spaced over the set; its cost is quadratic in them.

    >>> Geometry(limit=1)
    Traceback (most recent call last):
    ValueError: Geometry: limit 1 makes no pair; 2 is the least
    """

    once = True

    def __init__(self, pairs: list[list[str]] | None = None, limit: int = 4096) -> None:
        super().__init__(pairs)
        self.limit = limit
        if limit < 2:
            raise ValueError(f"Geometry: limit {limit} makes no pair; 2 is the least")

    def evaluate(self, trainer: L.Trainer, pl_module: L.LightningModule, sets: dict[str, Rows]) -> dict[str, Tensor]:
        values: dict[str, Tensor] = {}
        for name, rows in sets.items():
            for a, b in self._pairs(rows):
                rows_a, rows_b = matched_rows(rows.present[a], rows.present[b], rows.key)
                if len(rows_a):
                    z_a_ND, z_b_ND = rows.z[a][rows_a], rows.z[b][rows_b]
                    values[f"{name}/gap_{a}_{b}"] = modality_gap(z_a_ND, z_b_ND)
                    values[f"{name}/align_{a}_{b}"] = alignment(z_a_ND, z_b_ND)
            for m in rows.z:
                z_ND = rows.z[m][rows.where(m)]
                if len(z_ND) > 1:
                    values[f"{name}/rank_{m}"] = effective_rank(z_ND)
                    values[f"{name}/std_{m}"] = feature_std(z_ND)
                    values[f"{name}/uniform_{m}"] = uniformity(z_ND[:: -(-len(z_ND) // self.limit)])
        return values
