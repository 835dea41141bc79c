"""Descant: composable multimodal pre-training and adaptation on PyTorch Lightning.

``from descant import Contrastive, Emoji, fit``: every public class by its name, imported when it is first named;
importing the package imports nothing heavy.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from descant import callbacks, datamodules, modules, recipes
    from descant.cli.python import fit
    from descant.export.loading import Embedder, load
    from descant.modules.multitask.harmonize import harmonize

__version__ = "0.1.0"
__all__ = ["Embedder", "__version__", "callbacks", "datamodules", "fit", "harmonize", "load", "modules", "recipes"]

_PARTS = ("recipes", "modules", "datamodules", "callbacks")
_FUNCTIONS = {
    "load": "descant.export.loading",
    "Embedder": "descant.export.loading",
    "fit": "descant.cli.python",
    "harmonize": "descant.modules.multitask.harmonize",
}

if not (Path(__file__).parent / "recipes").is_dir():
    raise ImportError(
        "descant/recipes is not a folder: this checkout lost its links; clone again with"
        " `git config core.symlinks true`"
    )


def __getattr__(name: str) -> Any:
    if name in _PARTS:
        return importlib.import_module(f"descant.{name}")
    if name in _FUNCTIONS:
        return getattr(importlib.import_module(_FUNCTIONS[name]), name)
    # jsonargparse looks here for the shortest path of a class, which is written to config.yaml: it stays the full one
    if name[:1].isupper() and sys._getframe(1).f_code.co_name != "get_import_path":
        from descant.modules.io import names

        if (path := names.full(name)) is not None:
            return getattr(importlib.import_module(path.rpartition(".")[0]), name)
    raise AttributeError(f"module 'descant' has no attribute {name!r}")


def __dir__() -> list[str]:
    from descant.modules.io import names

    return sorted({*globals(), *__all__, *(name for name, paths in names.table().items() if len(paths) == 1)})
