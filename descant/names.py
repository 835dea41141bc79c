"""Short class names: a table of the package's public classes, read from source: no name costs an import."""

from __future__ import annotations

import importlib
import re
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
#: A public class at the left margin: thirty times as fast as to parse all of them.
_CLASS = re.compile(r"^class ([A-Za-z]\w*)", re.MULTILINE)
PARTS = ("recipes", "modules", "datamodules", "callbacks")


@cache
def table() -> dict[str, tuple[str, ...]]:
    """Class name -> full class paths of the public classes that carry it (nearly always one)."""
    found: dict[str, list[str]] = {}
    files = [file for part in PARTS for file in sorted((PACKAGE / part).rglob("*.py"))]
    for file in [*files, PACKAGE / "loggers.py"]:
        module = ".".join(("descant", *file.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")
        for name in _CLASS.findall(file.read_text(encoding="utf-8")):
            found.setdefault(name, []).append(f"{module}.{name}")
    return {name: tuple(paths) for name, paths in found.items()}


def full(name: str) -> str | None:
    """The full path of one of our classes by its short name; None where it is not ours, or not unique."""
    paths = table().get(name, ())
    return paths[0] if len(paths) == 1 else None


def import_path(path: str) -> None:
    """Import the module of one of our classes, so that the parser can find the class by its short name."""
    importlib.import_module(path.rpartition(".")[0])
