"""Weights of the parts of a mixture by their distance from a reference part. Letters: N rows of a table, D width."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from torch.nn import functional as F

from descant.datamodules.combined.mixture_set import BITS
from descant.datamodules.selection.selected import COLUMN
from descant.datamodules.selection.table_selection import newest_table
from descant.modules.core.errors import no_such, require_value
from descant.modules.core.rng import global_seed, mix
from descant.modules.selection.transport import SourceWeights, source_weights

#: Decimals of a weight, so that shares of a mixture are fractions of small denominators.
DECIMALS = 4


class TransportBalance:
    """Adaptive balancing of sources (SAIL-Embedding): sources whose embeddings are close to the task get more weight.

        w = softmax(g / temperature),    g_s = -transport cost between centroids of source s and of the reference

    A sample's embedding is the normalized sum of the normalized embeddings of its features. The reference part stands
    for the task, as a validation set does, and is not trained on. The weights are computed when the data are first
    read. Source: SAIL-Embedding (arXiv 2510.12709), no code released; the sum and the temperature are our reading
    (:func:`~descant.modules.selection.transport.source_weights`).

    Args:
        table: a parquet file, or a run's folder, whose newest table of `descant predict --sets train` is read. It must
            be from a mixture of the same parts in the same order.
        reference: the part that stands for the task.
        temperature: temperature of the softmax, in units of the cost.
        features: embeddings, by default ``[image, text]``, or ``image*text`` for the elementwise product of two.
        k: centroids of each part.
        sham: ``permute`` for the control: before the distances are measured, the rows of all sources are permuted among
            these sources, by the run's seed, so that all sources are alike.
    """

    def __init__(
        self,
        table: str,
        reference: str,
        temperature: float = 0.05,
        features: list[str] | None = None,
        k: int = 16,
        sham: Literal["permute"] | None = None,
    ) -> None:
        require_value(temperature > 0, f"temperature {temperature:g}: must be above 0")
        self.table, self.reference, self.temperature, self.k, self.sham = Path(table), reference, temperature, k, sham
        self.features = ["image", "text"] if features is None else features

    def weights(self, parts: Sequence[str]) -> dict[str, float]:
        """Return part name -> its weight, rounded; 0 for the reference."""
        if self.reference not in parts or len(parts) < 2:
            raise ValueError(
                f"balance.reference {self.reference}: one of several parts; {no_such(self.reference, parts)}"
            )
        sources = [name for name in parts if name != self.reference]
        rounded = (round(weight, DECIMALS) for weight in self.measure_weights(parts).weight_S.tolist())
        return {self.reference: 0.0, **dict(zip(sources, rounded, strict=True))}

    def measure_weights(self, parts: Sequence[str]) -> SourceWeights:
        """Weights of all parts but the reference, in their order."""
        from descant.datamodules.selection import score_table as tables  # late: parquet takes long to import

        file = newest_table(self.table)
        rows = tables.with_features(tables.read(file, [COLUMN, *tables.embeddings(self.features)]), self.features)
        part_N = torch.from_numpy(rows[COLUMN].to_numpy() >> BITS)
        if self.sham is not None:
            generator = torch.Generator().manual_seed(mix(global_seed(), "balance/sham") % 2**63)
            source_M = (part_N != list(parts).index(self.reference)).nonzero()[:, 0]
            part_N[source_M] = part_N[source_M[torch.randperm(len(source_M), generator=generator)]]
        z_ND = torch.stack([F.normalize(tables.features_ND(rows, [name]), dim=1) for name in self.features]).sum(dim=0)
        of = {name: z_ND[part_N == number] for number, name in enumerate(parts)}
        for name, z in of.items():
            if not len(z):
                raise ValueError(f"balance: {file}: no row of the part {name!r}; predict with all parts in the mixture")
        reference_ND = of.pop(self.reference)
        return source_weights(reference_ND, list(of.values()), self.temperature, self.k)
