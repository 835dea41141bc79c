"""Short class names -> import paths, by a scan of the package's source files: resolving one needs no import."""

from __future__ import annotations

import importlib
import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

PACKAGE = Path(__file__).absolute().parents[2].resolve()
PARTS = ("recipes", "modules", "datamodules", "callbacks")
#: Matches a class at the left margin, its bases and the start of its docstring, thirty times as fast as a parser.
_CLASS = re.compile(r'^class (\w+)(?:\(([^:]*)\))?:[^\n]*\n(?:    """(.*?)(?:"""|\n\s*\n))?', re.MULTILINE | re.DOTALL)


class _Source(NamedTuple):
    """Import path of a class, the short names of its bases, and the first paragraph of its docstring."""

    path: str
    bases: tuple[str, ...]
    about: str


@cache
def classes() -> dict[str, tuple[_Source, ...]]:
    """Map each class name to the classes that have it (nearly always one), private ones too."""
    by_name: dict[str, list[_Source]] = {}
    files = [file for part in PARTS for file in sorted((PACKAGE / part).rglob("*.py"))]
    for file in files:
        module = ".".join(("descant", *file.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")
        for name, bases, about in _CLASS.findall(file.read_text(encoding="utf-8")):
            plain = tuple(base.strip().rpartition(".")[2] for base in bases.split(","))
            by_name.setdefault(name, []).append(_Source(f"{module}.{name}", plain, " ".join(about.split())))
    return {name: tuple(some) for name, some in by_name.items()}


@cache
def table() -> dict[str, tuple[str, ...]]:
    """Map each class name to the import paths of the public classes that have it (nearly always one)."""
    return {name: tuple(one.path for one in some) for name, some in classes().items() if not name.startswith("_")}


def of_kind(root: str, part: str) -> dict[str, str]:
    """Map the public classes in one of PARTS that derive from the class ``root`` to their docstring lines, by name."""
    known = classes()

    def below(name: str, seen: frozenset[str] = frozenset()) -> bool:
        bases = {base for one in known.get(name, ()) for base in one.bases}
        return root in bases or any(below(base, seen | {name}) for base in bases - seen - {name})

    return {
        name: one.about
        for name, some in sorted(known.items())
        for one in some
        if not name.startswith("_") and one.path.startswith(f"descant.{part}.") and below(name)
    }


def full(name: str) -> str | None:
    """Return the import path of one of our classes by its short name; None if there is none, or several."""
    paths = table().get(name, ())
    return paths[0] if len(paths) == 1 else None


def import_path(path: str) -> None:
    """Import the module of one of our classes, so that the parser finds the class by its short name."""
    importlib.import_module(path.rpartition(".")[0])
