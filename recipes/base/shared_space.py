"""Several modalities in one shared space: what recipes of embeddings have in common.

    h_m = pool(tower_m(x_m))        z_m = normalise(head_m(h_m))        for every modality m that is present

Letters: B samples, R of them seen by a tower, T tokens, D width.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from descant.modules.core.batch import Batch
from descant.modules.core.capabilities import has
from descant.modules.core.dtype import promote
from descant.modules.core.errors import no_such
from descant.modules.core.host import host_copy
from descant.modules.core.protocols import Encodes
from descant.modules.core.rows import RunningRows
from descant.modules.fusion.universal import UniversalLayers
from descant.modules.missing_modalities.imputation import Imputation
from descant.modules.towers import Tokens, Tower, Towers
from descant.modules.towers.heads import MeanPool, Pool, Pools, Projection
from descant.recipes.base.recipe import Recipe


class SharedSpace(Recipe):
    """Base of recipes of one space: towers, pools and heads. A recipe on top brings the terms.

    A tower that gives embeddings (``projected``, such as :class:`PretrainedTower`) has neither pool nor head here: its
    embeddings are those of the space.

    Args:
        towers: one tower a modality.
        width: of the shared embedding space.
        pool: tokens to one vector, a copy for each modality; or one a modality.
        norm: a LayerNorm before each modality's projection, or before those of some; without one, linear towers make
            linear latents. CLIP has one for images alone.
    """

    def __init__(
        self,
        towers: Towers,
        width: int = 128,
        pool: Pool | Pools | None = None,
        norm: bool | dict[str, bool] = True,
        project: bool | dict[str, bool] = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.towers, self.modalities, self.width = towers, tuple(towers), width
        self.pools = nn.ModuleDict(
            {
                m: pool.of(m)
                if isinstance(pool, Pools)
                else copy.deepcopy(pool if pool is not None and not projected(tower) else MeanPool())
                for m, tower in towers.items()
            }
        )
        #: Set around a forward pass: features in place of missing modalities.
        self.imputation: Imputation | None = None
        norms, projects = _of_each("norm", norm, towers), _of_each("project", project, towers)
        self.heads = nn.ModuleDict(
            {
                m: head_of(m, tower, width, norms[m]) if projects[m] else _no_head(m, tower, width)
                for m, tower in towers.items()
            }
        )

    @property
    def before_pools(self) -> UniversalLayers | None:
        """Layers of several modalities between towers and pools."""
        return None

    def of_modality(self, modality: str) -> Iterator[nn.Parameter]:
        """The parameters that are of this modality alone."""
        return (p for part in (self.towers, self.pools, self.heads) for p in part[modality].parameters())

    def features(self, x: Tensor, modality: str) -> Tensor:
        """``[B, ...] -> h_BD``: tower and pool."""
        return self.pooled(self.towers[modality](x), modality)

    def pooled(self, tokens: Tokens, modality: str) -> Tensor:
        return self.pools[modality](tokens)

    def present_features(self, batch: Batch, modality: str, view: str = "") -> Tensor:
        """``h_BD`` of one modality; the tower sees present rows only, and absent rows are zero."""
        present_B = batch.present[modality]
        x, imputation = batch.inputs[modality + view], self.imputation
        if imputation is None:
            return self._seen_features(x, present_B, modality)
        h_BD = self._seen_features(x, imputation.seen(modality, present_B), modality)
        return imputation.filled(h_BD, modality, present_B)

    def _seen_features(self, x: Tensor, present_B: Tensor, modality: str) -> Tensor:
        features, tower = partial(self.features, modality=modality), self.towers[modality]
        if host_copy(present_B).all():  # of the loader, so that no step waits for a device to know its shapes
            return self.step.chunked(features, x, tower)
        rows = RunningRows(present_B, x.device, least=self.step.chunks)  # one row a chunk
        with rows.running(tower, self.row_tracker):
            return rows.put(self.step.chunked(features, rows.take(x), tower))

    def encoded(self, h_BTD: Tensor, mask_BT: Tensor, modality: str) -> Tensor:
        """``z_BD`` of token embeddings: what comes after the ``embed`` of a tower."""
        tower = self.towers[modality]
        assert has(tower, Encodes)
        tokens = Tokens(tower.encode(h_BTD, mask_BT), mask_BT)
        return self.project(self.pooled(tokens, modality), modality, mask_BT.any(dim=1))

    def project(self, h_BD: Tensor, modality: str, present_B: Tensor) -> Tensor:
        z_BD = F.normalize(promote(self.heads[modality](h_BD)), dim=-1)
        return torch.where(present_B[:, None], z_BD, torch.zeros_like(z_BD))

    def embed(self, batch: Batch) -> dict[str, Tensor]:
        return self.together({m: self.present_features(batch, m) for m in self.towers if m in batch.inputs}, batch)

    def together(self, h: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        """Modality -> ``z_BD`` in the shared space, of its features ``h_BD``."""
        return {m: self.project(h_BD, m, batch.present[m]) for m, h_BD in h.items()}


def projected(tower: nn.Module) -> bool:
    """Whether a tower gives embeddings, which no head projects."""
    return cast(Tower, tower).projected


def head_of(m: str, tower: nn.Module, width: int, norm: bool) -> nn.Module:
    """The projection of a tower's features into the space; none of a tower of embeddings."""
    if not projected(tower):
        return Projection(cast(Tower, tower).width, width, norm=norm)
    return _no_head(m, tower, width)


def _no_head(m: str, tower: nn.Module, width: int) -> nn.Module:
    own = cast(Tower, tower).width
    if own != width and projected(tower):
        raise ValueError(f"width {width}: towers.{m} gives embeddings of {own}: width {own}, or output tokens of it")
    if own != width:
        raise ValueError(f"width {width}: towers.{m} has {own} and no projection: width {own}, or project it")
    return nn.Identity()


def _of_each(name: str, value: bool | dict[str, bool], towers: Towers) -> dict[str, bool]:
    """The setting of each modality; true of those that are not named."""
    given = value if isinstance(value, dict) else dict.fromkeys(towers, value)
    for m in given:
        if m not in towers:
            raise ValueError(f"{name}: {m!r}: {no_such(m, tuple(towers))}")
    return {m: given.get(m, True) for m in towers}
