"""Order of callbacks: each class declares which ones come before it or exclude it, and one function sorts the list."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, TypeVar

import lightning as L

Kind = TypeVar("Kind", bound=L.Callback)


class Ordered(L.Callback):
    """Base of the callbacks that depend on the order of ``trainer.callbacks``; classes are named by their short names.

    ``setup`` sorts the list, whatever order the user has given: see :func:`sort_callbacks`. A subclass that overrides
    ``setup`` calls this one.
    """

    #: Classes whose callbacks come before this one.
    after: ClassVar[tuple[str, ...]] = ()
    #: Whether this one comes before all callbacks without ``front``, except those in its ``after``.
    front: ClassVar[bool] = False
    #: Classes that cannot be used together with this one.
    excludes: ClassVar[tuple[str, ...]] = ()
    #: Whether ``on_train_end`` writes what the last resume point lacks; Resume calls it again after a kill in between.
    writes_at_end: ClassVar[bool] = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        trainer.callbacks = sort_callbacks(trainer.callbacks)  # type: ignore[attr-defined]


def sort_callbacks(callbacks: Sequence[L.Callback]) -> list[L.Callback]:
    """Sort the callbacks by ``front`` and ``after``. Others keep their order."""
    placed: list[L.Callback] = []

    def place(callback: L.Callback, before: tuple[L.Callback, ...] = ()) -> None:
        if callback in placed:
            return
        if callback in before:
            names = " and ".join(type(c).__name__ for c in (callback, before[-1]))
            raise ValueError(f"trainer.callbacks: {names}: each is declared to come after the other")
        for other in callbacks:
            if other is not callback and is_a(other, getattr(callback, "after", ())):
                place(other, (*before, callback))
        placed.append(callback)

    for callback in callbacks:
        for other in callbacks:
            if other is not callback and is_a(other, getattr(callback, "excludes", ())):
                name, second = type(callback).__name__, type(other).__name__
                raise ValueError(f"trainer.callbacks: {name} cannot be combined with {second}; use one of the two")
    for callback in sorted(callbacks, key=lambda c: not getattr(c, "front", False)):
        place(callback)
    return placed


def is_a(callback: L.Callback, names: Sequence[str]) -> bool:
    """Whether the class of a callback, or one of its base classes, has one of these names."""
    return any(cls.__name__ in names for cls in type(callback).__mro__)


def callbacks_of(trainer: L.Trainer, kind: type[Kind]) -> list[Kind]:
    """Return the callbacks of a run that are instances of ``kind``, in order."""
    return [callback for callback in trainer.callbacks if isinstance(callback, kind)]  # type: ignore[attr-defined]
