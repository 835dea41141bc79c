"""Shared space whose evaluation reads streams: embeddings of each modality, and of pairs of them together.

Letters: B samples, D width.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from descant.modules.core.batch import Batch
from descant.modules.core.errors import no_such
from descant.modules.objectives.streams import Streams
from descant.modules.towers import Towers
from descant.modules.towers.heads import Pool, Pools
from descant.recipes.base.shared_space import SharedSpace


class StreamSpace(SharedSpace):
    """Base of recipes whose objectives read :class:`Streams`; one on top sets ``objectives``.

    Args:
        towers: one tower a modality.
        width: of the shared embedding space.
        pool: tokens to one vector, a copy for each modality; or one a modality.
        embeds: pairs that are evaluated together too, such as [[image, table]]: ``image+table``, both embeddings side
            by side and, where an objective fuses them, the first fused token.

    Raises:
        ValueError: for a pair of which a modality has no tower.
    """

    objectives: nn.ModuleDict

    def __init__(
        self,
        towers: Towers,
        width: int = 128,
        pool: Pool | Pools | None = None,
        embeds: list[list[str]] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(towers, width, pool, **kwargs)
        self.embeds = [(a, b) for a, b in embeds or []]
        for m in (m for pair in self.embeds for m in pair if m not in towers):
            raise ValueError(f"embeds: {m!r}: {no_such(m, towers)}")

    def embed(self, batch: Batch) -> dict[str, Tensor]:
        return self.embeddings(Streams(self, batch))  # type: ignore[arg-type]

    def embeddings(self, streams: Streams) -> dict[str, Tensor]:
        """``z_BD`` of each modality of a batch, and of pairs of them."""
        z = {m: streams.latent(m) for m in self.towers if m in streams.batch.inputs}
        tasks: Any = self.objectives.values()
        fused = {frozenset(pair) for objective in tasks for pair in objective.fuses}
        pairs = [pair for pair in self.embeds if {*pair} <= z.keys()]
        return z | {f"{a}+{b}": streams.together(a, b, {a, b} in fused) for a, b in pairs}
