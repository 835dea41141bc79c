"""Recipes that wrap another recipe and have all of its capabilities."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import cache
from types import FunctionType, MethodType
from typing import Any

from torch import Tensor

from descant.modules.core.batch import Batch
from descant.modules.core.output import Output
from descant.modules.core.rows import share_rows
from descant.recipes.base.recipe import Recipe


class Wrapper(Recipe):
    """Recipe around ``inner`` that shares its step and hooks, and forwards public attributes that it lacks itself.

    Methods of ``inner`` whose first argument is ``batch`` are called through ``of_batch``. Those whose first argument
    is ``z`` (latents by modality) are called through ``of_latents``. A subclass overrides these two.

    Args:
        inner: the wrapped recipe.
    """

    inner: Recipe

    def __init__(self, inner: Recipe, **kwargs: Any) -> None:
        self.in_batch_negatives = inner.in_batch_negatives
        super().__init__(**kwargs)
        self.inner, inner._outer = inner, [self]
        inner.step, inner.hooks, self.row_tracker = self.step, self.hooks, share_rows(inner)

    def of_batch(self, name: str, batch: Batch, *args: Any, **kwargs: Any) -> Any:
        """Call ``inner.name(batch, ...)``."""
        return getattr(self.inner, name)(batch, *args, **kwargs)

    def of_latents(self, name: str, z: dict[str, Tensor], present: Mapping[str, Tensor] | None = None) -> Any:
        """Call ``inner.name(z, present)``."""
        return getattr(self.inner, name)(z, present)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or "inner" not in self.__dict__.get("_modules", ()):
                raise
        member = getattr(self.inner, name)
        route = _ROUTES.get(_argument(member.__func__)) if inspect.ismethod(member) else None
        if route is None:
            return member

        def call(self: Wrapper, *args: Any, **kwargs: Any) -> Any:
            return getattr(self, route)(name, *args, **kwargs)

        return MethodType(call, self)  # a method, like that of inner, because sharding needs one

    def forward(self, batch: Batch) -> Output:
        return self.inner.forward(batch)

    def setup(self, stage: str) -> None:
        super().setup(stage)
        self.inner.setup(stage)

    def fit_to_data(self) -> None:
        self.inner.fit_to_data()

    @property
    def modalities(self) -> tuple[str, ...]:
        return tuple(getattr(self.inner, "modalities", self.towers))

    @property
    def modality_mask(self) -> Callable[[Batch], Mapping[str, Tensor]] | None:
        inner: Any = self.inner
        mask: Callable[[Batch], Mapping[str, Tensor]] | None = inner.modality_mask
        return mask

    @modality_mask.setter
    def modality_mask(self, mask: Callable[[Batch], Mapping[str, Tensor]] | None) -> None:
        inner: Any = self.inner
        inner.modality_mask = mask


#: First argument of a method of ``inner`` -> the wrapper's method that calls it.
_ROUTES = {"batch": "of_batch", "z": "of_latents"}


@cache
def _argument(function: FunctionType) -> str:
    """Return the name of a method's first argument after ``self``, or "" if it has none."""
    return next(iter(list(inspect.signature(function).parameters)[1:]), "")
