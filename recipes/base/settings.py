"""Fields of a recipe that a stage may set, by dotted names."""

from __future__ import annotations

from typing import Any

from torch import nn

from descant.modules.core.errors import no_such


def read_setting(recipe: nn.Module, name: str) -> Any:
    """Look up the value of a field, such as ``zeros`` or ``objectives.image-text.losses.0.max_log_scale``."""
    owner, last = _owner(recipe, name)
    fields = {key: value for key, value in vars(owner).items() if isinstance(value, float | int | str | None)}
    known = [key for key in fields if not key.startswith("_") and key != "training"]
    if last not in known:
        raise ValueError(f"set {name!r}: {type(owner).__name__}: {no_such(last, known)}")
    return fields[last]


def write_setting(recipe: nn.Module, name: str, value: Any) -> None:
    """Set a field that :func:`read_setting` reads."""
    owner, last = _owner(recipe, name)
    setattr(owner, last, value)


def _owner(recipe: nn.Module, name: str) -> tuple[Any, str]:
    owner: Any = recipe
    *path, last = name.split(".")
    for step in path:
        parts = dict(owner.named_children()) if isinstance(owner, nn.Module) else {}
        if step not in parts:
            raise ValueError(f"set {name!r}: {type(owner).__name__}: {no_such(step, parts)}")
        owner = parts[step]
    return owner, last
