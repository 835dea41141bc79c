"""Embeddings of a batch, each computed once for all objectives that read it.

    features(m, view)   h = pool_m(tower_m(x_m))                  of the batch's first view, or of m@2, m@3, ...
    latent(m)           z = normalise(head_m(features(m)))
    z(m, part)          latent(m), from the fork where the gradients of several terms meet
    negative(m)         latent of the data's hard negatives of m

Letters: B samples, D width.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Mapping
from typing import Any, Protocol, Self, TypeVar, cast

from torch import Tensor

from descant.modules.core.batch import NEGATIVE, Batch
from descant.modules.core.errors import no_such
from descant.modules.core.hooks import GradientHooks

T = TypeVar("T")


class EmbeddingModel(Protocol):
    """Model interface that embeddings need: features and latents of a modality, and forks of its latents."""

    hooks: GradientHooks

    @property
    def forks(self) -> Mapping[str, tuple[str, ...]]: ...

    def present_features(self, batch: Batch, modality: str, view: str = "") -> Tensor: ...

    def latent(self, h_BD: Tensor, modality: str, batch: Batch) -> Tensor: ...

    def embed(self, batch: Batch) -> dict[str, Tensor]: ...


class Embeddings:
    """Embeddings of a batch, which objectives read. ``of(name)``: the embeddings as one objective sees them.

    Args:
        model: recipe, or its teacher, that computes the embeddings.
        batch: batch of all rows and views.
        taught: embeddings of the same batch by the recipe's teacher, if objectives need them.
    """

    name: Callable[[str], str]

    def __init__(self, model: EmbeddingModel, batch: Batch, taught: Self | None = None) -> None:
        self.model, self.batch, self.taught, self.made = model, batch, taught, dict[Hashable, Any]()

    def of(self, name: Callable[[str], str]) -> Self:
        """Return the same embeddings for one objective: with the names of its terms, ``name(part)``."""
        seen = copy.copy(self)
        seen.name = name
        return seen

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        if key not in self.made:
            self.made[key] = make()
        return cast(T, self.made[key])

    def features(self, modality: str, view: str = "") -> Tensor:
        """Return ``h_BD``, the pooled tokens of a view; absent rows hold any finite values."""
        require_inputs(self.batch, modality + view)
        return self.once(("h", modality, view), lambda: self.model.present_features(self.batch, modality, view))

    def latent(self, modality: str) -> Tensor:
        """Return unit-length ``z_BD``; absent rows are zero."""
        return self.once(("z", modality), lambda: self._latent(modality))

    def _latent(self, modality: str) -> Tensor:
        return self.model.latent(self.features(modality), modality, self.batch)

    def z(self, modality: str, part: str = "") -> Tensor:
        """Return :meth:`latent` for this part's term, from the fork where gradients of several terms meet."""
        fork = self.model.hooks.fork
        copies = self.once(("fork", modality), lambda: fork(self.latent(modality), self.model.forks[modality]))
        return copies[self.name(part)]

    def negative(self, modality: str) -> Tensor:
        """Return ``z_BD`` of each sample's hard negative, by the same towers; rows without one are zero."""
        require_inputs(self.batch, modality + NEGATIVE)
        return self.once("negatives", lambda: self.model.embed(self.batch.negatives()))[modality]


def require_inputs(batch: Batch, *names: str) -> None:
    """Raise ValueError for the first name that is no input of the batch, such as ``text`` or the view ``image@2``."""
    for name in (name for name in names if name not in batch.inputs):
        modality, _, view = name.partition("@")
        if view:
            raise ValueError(f"the data has no {name!r}: data.views {{{modality}: {view}}}")
        raise ValueError(f"the data has no modality {name!r}: {no_such(name, batch.inputs)}")
