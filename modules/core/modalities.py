"""Modules by modality name: names that a constructor lists, for completion and documentation, and any others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from torch import nn

T = TypeVar("T")


def given_modules(arguments: dict[str, object]) -> dict[str, nn.Module]:
    """Return the modules among a constructor's ``locals()``, without ``self``, in their order: modality -> module."""
    return {name: part for name, part in arguments.items() if isinstance(part, nn.Module) and name != "self"}


def with_others(listed: Mapping[str, T | None], others: Mapping[str, T] | None) -> dict[str, T]:
    """Merge the given modules, modality -> module, listed ones first. Raise ValueError for a name that is given twice.

    >>> with_others({"image": 1, "text": None}, {"lidar": 2})
    {'image': 1, 'lidar': 2}
    """
    given = {name: module for name, module in listed.items() if module is not None}
    for name in others or {}:
        if name in given:
            raise ValueError(f"others: {name} is given twice: under its own name too")
    return given | dict(others or {})
