"""Order of callbacks: a class names in ``after`` those that must be listed before it, and in ``front`` that it leads.

after: tuple[str, ...]   class names; a callback listed before one of these is refused at setup
front: bool              moved to the start of the list when a fit starts, behind those of its ``after``
"""

from __future__ import annotations

from collections.abc import Sequence

import lightning as L


def require_order(callbacks: Sequence[L.Callback]) -> None:
    """Refuse callbacks that are listed before one that their class names in ``after``.

    Raises:
        ValueError: naming both.
    """
    for n, callback in enumerate(callbacks):
        for later in callbacks[n + 1 :] if not getattr(callback, "front", False) else ():
            for name in getattr(callback, "after", ()):
                if is_a(later, name):
                    cls, other = type(callback).__name__, type(later).__name__
                    raise ValueError(f"trainer.callbacks: {cls} must come after {other}: list {other} first")


def move_to_front(trainer: L.Trainer, callback: L.Callback) -> None:
    """Put a callback with ``front`` at the start of the trainer's callbacks, behind those of its ``after``."""
    rest: list[L.Callback] = [c for c in trainer.callbacks if c is not callback]  # type: ignore[attr-defined]
    leads = [c for c in rest if any(is_a(c, name) for name in getattr(callback, "after", ()))]
    trainer.callbacks = [*leads, callback, *(c for c in rest if c not in leads)]  # type: ignore[attr-defined]


def is_a(callback: L.Callback, name: str) -> bool:
    """Whether a callback is of a class of this name, or of one derived from it."""
    return any(cls.__name__ == name for cls in type(callback).__mro__)
