"""Classes of a kind, found in the sources: a new rule or loss is tried without a line in any list."""

from __future__ import annotations

import inspect
from typing import Any

import descant
from descant.modules.io.names import of_kind


def concrete(root: str) -> dict[str, Any]:
    """Name -> class, of the public classes in modules that derive from ``root`` and can be used as they are."""
    kinds = {name: getattr(descant, name) for name in of_kind(root, "modules")}
    return {name: kind for name, kind in kinds.items() if not abstract(kind)}


def abstract(kind: type) -> bool:
    """Whether a method of its own says that a subclass has to write it."""
    return "raise NotImplementedError" in inspect.getsource(kind)
