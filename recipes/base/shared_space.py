"""Several modalities in one shared space: the common base of embedding recipes.

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
    """Base of recipes with one shared space: towers, pools and heads. A subclass adds the terms.

    A tower that outputs embeddings (``projected``, such as :class:`PretrainedTower`) has neither pool nor head here:
    its embeddings are already in the shared space.

    Args:
        towers: one tower per modality.
        width: width of the shared embedding space.
        pool: pools tokens to one vector, copied for each modality; or one pool per modality.
        norm: use a LayerNorm before the projection, for all modalities or for each one. Without it, linear towers give
            linear latents. CLIP has one for images only.
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
                else copy.deepcopy(pool if pool is not None and not outputs_embeddings(tower) else MeanPool())
                for m, tower in towers.items()
            }
        )
        #: Imputes features of missing modalities; set only during a forward pass.
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
        """Return the layers that modalities share between towers and pools, if any."""
        return None

    @property
    def embeds_by_head(self) -> bool:
        """Whether an embedding is ``normalise(head(pool(tower(x))))`` of one modality, and nothing else."""
        return self.before_pools is None

    def of_modality(self, modality: str) -> Iterator[nn.Parameter]:
        """Return the parameters that belong to this modality only."""
        return (p for part in (self.towers, self.pools, self.heads) for p in part[modality].parameters())

    def features(self, x: Tensor, modality: str) -> Tensor:
        """Apply tower and pool: ``[B, ...] -> h_BD``."""
        return self.pool_tokens(self.towers[modality](x), modality)

    def pool_tokens(self, tokens: Tokens, modality: str) -> Tensor:
        return self.pools[modality](tokens)

    def present_features(self, batch: Batch, modality: str, view: str = "") -> Tensor:
        """Compute ``h_BD`` of one modality; the tower sees present rows only, and absent rows are zero."""
        present_B = batch.present[modality]
        x, imputation = batch.inputs[modality + view], self.imputation
        if imputation is None:
            return self._seen_features(x, present_B, modality)
        h_BD = self._seen_features(x, imputation.rows_to_encode(modality, present_B), modality)
        return imputation.impute(h_BD, modality, present_B)

    def _seen_features(self, x: Tensor, present_B: Tensor, modality: str) -> Tensor:
        features, tower = partial(self.features, modality=modality), self.towers[modality]
        if host_copy(present_B).all():  # the loader's copy, so that no step waits for the device to know its shapes
            return self.step.compute_in_chunks(features, x, tower)
        rows = RunningRows(present_B, x.device, least=self.step.chunks)  # one row per chunk
        with rows.running(tower, self.row_tracker):
            return rows.put(self.step.compute_in_chunks(features, rows.take(x), tower))

    def encode_embeddings(self, h_BTD: Tensor, mask_BT: Tensor, modality: str) -> Tensor:
        """Compute ``z_BD`` from token embeddings: all that follows the ``embed`` of a tower."""
        tower = self.towers[modality]
        assert has(tower, Encodes)
        tokens = Tokens(tower.encode(h_BTD, mask_BT), mask_BT)
        return self.project(self.pool_tokens(tokens, modality), modality, mask_BT.any(dim=1))

    def project(self, h_BD: Tensor, modality: str, present_B: Tensor) -> Tensor:
        z_BD = F.normalize(promote(self.heads[modality](h_BD)), dim=-1)
        return torch.where(present_B[:, None], z_BD, torch.zeros_like(z_BD))

    def latent(self, h_BD: Tensor, modality: str, batch: Batch) -> Tensor:
        """Project a modality's features ``h_BD`` into the shared space, ``z_BD``."""
        return self.project(h_BD, modality, batch.present[modality])

    def embed(self, batch: Batch) -> dict[str, Tensor]:
        given = [m for m in self.towers if m in batch.inputs]
        return {m: self.latent(self.present_features(batch, m), m, batch) for m in given}


def outputs_embeddings(tower: nn.Module) -> bool:
    """Whether a tower outputs embeddings, which need no head."""
    return cast(Tower, tower).projected


def head_of(m: str, tower: nn.Module, width: int, norm: bool) -> nn.Module:
    """Build the projection of a tower's features into the space; an identity for a tower of embeddings."""
    if not outputs_embeddings(tower):
        return Projection(cast(Tower, tower).width, width, norm=norm)
    return _no_head(m, tower, width)


def _no_head(m: str, tower: nn.Module, width: int) -> nn.Module:
    own = cast(Tower, tower).width
    if own != width and outputs_embeddings(tower):
        raise ValueError(f"width {width}: towers.{m} gives embeddings of {own}: width {own}, or output tokens of it")
    if own != width:
        raise ValueError(f"width {width}: towers.{m} has {own} and no projection: width {own}, or project it")
    return nn.Identity()


def _of_each(name: str, value: bool | dict[str, bool], towers: Towers) -> dict[str, bool]:
    """Return the setting of each modality; True for those that are not named."""
    given = value if isinstance(value, dict) else dict.fromkeys(towers, value)
    for m in given:
        if m not in towers:
            raise ValueError(f"{name}: {m!r}: {no_such(m, tuple(towers))}")
    return {m: given.get(m, True) for m in towers}
