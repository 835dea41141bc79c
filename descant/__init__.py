"""Descant: composable multimodal pre-training and adaptation on PyTorch Lightning.

Importing the package imports nothing heavy: sub-packages load when they are first named.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from descant import callbacks, datamodules, modules, recipes
    from descant.export.loading import Embedder, load

__version__ = "0.1.0"
__all__ = ["Embedder", "__version__", "callbacks", "datamodules", "load", "modules", "recipes"]

_PARTS = ("recipes", "modules", "datamodules", "callbacks")
_LOADING = ("load", "Embedder")

if not (Path(__file__).parent / "recipes").is_dir():
    raise ImportError(
        "descant/recipes is not a folder: this checkout lost its links; clone again with"
        " `git config core.symlinks true`"
    )


def __getattr__(name: str) -> Any:
    if name in _PARTS:
        return importlib.import_module(f"descant.{name}")
    if name in _LOADING:
        return getattr(importlib.import_module("descant.export.loading"), name)
    raise AttributeError(f"module 'descant' has no attribute {name!r}")
