"""Short class names: a table of the package's public classes, read from source: no name costs an import."""

from __future__ import annotations

import importlib
import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

PACKAGE = Path(__file__).resolve().parents[1]
PARTS = ("recipes", "modules", "datamodules", "callbacks")
#: A class at the left margin, its bases, and what it says of itself: thirty times as fast as to parse all of them.
_CLASS = re.compile(r'^class (\w+)(?:\(([^:]*)\))?:[^\n]*\n(?:    """(.*?)(?:"""|\n\s*\n))?', re.MULTILINE | re.DOTALL)


class Found(NamedTuple):
    """A class as its file has it: its path, the short names of its bases, and the first sentences of its docstring."""

    path: str
    bases: tuple[str, ...]
    about: str


@cache
def classes() -> dict[str, tuple[Found, ...]]:
    """Class name -> the classes that carry it (nearly always one), private ones too."""
    found: dict[str, list[Found]] = {}
    files = [file for part in PARTS for file in sorted((PACKAGE / part).rglob("*.py"))]
    for file in files:
        module = ".".join(("descant", *file.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")
        for name, bases, about in _CLASS.findall(file.read_text(encoding="utf-8")):
            plain = tuple(base.strip().rpartition(".")[2] for base in bases.split(","))
            found.setdefault(name, []).append(Found(f"{module}.{name}", plain, " ".join(about.split())))
    return {name: tuple(some) for name, some in found.items()}


@cache
def table() -> dict[str, tuple[str, ...]]:
    """Class name -> full class paths of the public classes that carry it (nearly always one)."""
    return {name: tuple(one.path for one in some) for name, some in classes().items() if not name.startswith("_")}


def of_kind(root: str, part: str) -> dict[str, str]:
    """Name -> what it says of itself, of the public classes in one of PARTS that have ``root`` among their bases."""
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
    """The full path of one of our classes by its short name; None where it is not ours, or not unique."""
    paths = table().get(name, ())
    return paths[0] if len(paths) == 1 else None


def import_path(path: str) -> None:
    """Import the module of one of our classes, so that the parser can find the class by its short name."""
    importlib.import_module(path.rpartition(".")[0])
