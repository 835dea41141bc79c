"""Classes of a kind, found in the sources: a new rule, loss or paper is tried without a line in any list."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import descant
from descant.modules.io.names import of_kind

TOP = Path(__file__).parents[2]


def concrete(root: str) -> dict[str, Any]:
    """Name -> class, of the public classes in modules that derive from ``root`` and can be used as they are."""
    kinds = {name: getattr(descant, name) for name in of_kind(root, "modules")}
    return {name: kind for name, kind in kinds.items() if not abstract(kind)}


def abstract(kind: type) -> bool:
    """Whether a method of its own says that a subclass has to write it."""
    return "raise NotImplementedError" in inspect.getsource(kind)


def picked(suite: type) -> dict[str, Any]:
    """Name -> test class, of those in all tests that pick a suite by its name."""
    found: dict[str, Any] = {}
    for file in sorted((TOP / "tests").rglob("test_*.py")):
        names = re.findall(rf"^class (Test\w+)\(.*\b{suite.__name__}\b", file.read_text(), re.MULTILINE)
        if names:
            module = importlib.import_module(".".join(file.relative_to(TOP).with_suffix("").parts))
            found |= {name: getattr(module, name) for name in names}
    return found
