"""Formats of other packages that ``descant export --to`` writes, by name."""

from __future__ import annotations

from collections.abc import Callable

from descant.cli.errors import fail, hint
from descant.export.formats.base import ModelFormat


def _timm() -> ModelFormat:
    from descant.export.formats.timm_vit import TimmFormat

    return TimmFormat()


def _transformers() -> ModelFormat:
    from descant.export.formats.llama import TransformersFormat

    return TransformersFormat()


#: Name -> its maker: a format imports its package only where it is asked for.
FORMATS: dict[str, Callable[[], ModelFormat]] = {"timm": _timm, "transformers": _transformers}


def of(name: str) -> ModelFormat:
    """The format of this name; Refusal for another."""
    if name not in FORMATS:
        fail(f"--to {name}: no such format{hint(name, FORMATS, most=4)}")
    return FORMATS[name]()
