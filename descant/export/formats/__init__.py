"""Formats of other packages that ``descant export --to`` writes, by name."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

from torch import nn

from descant.cli.errors import fail, hint
from descant.export.formats.base import ModelFormat
from descant.recipes.base.recipe import Recipe


def _timm(recipe: Recipe) -> ModelFormat:
    from descant.export.formats.timm_vit import TimmFormat

    return TimmFormat()


def _transformers(recipe: Recipe) -> ModelFormat:
    from transformers.utils.logging import disable_progress_bar

    from descant.export.formats.clip import ClipFormat
    from descant.export.formats.llama import LlamaFormat
    from descant.export.formats.llava import LlavaFormat
    from descant.export.formats.siglip import SiglipFormat
    from descant.modules.losses import SigLIP

    disable_progress_bar()
    if not isinstance(getattr(recipe, "lm", None), nn.Module):
        by_sigmoid = any(isinstance(loss, SigLIP) for loss in getattr(recipe, "losses", {}).values())
        return SiglipFormat() if by_sigmoid else ClipFormat()
    return LlavaFormat() if len(recipe.towers) else LlamaFormat()


def _onnx(recipe: Recipe) -> ModelFormat:
    from descant.export.formats.onnx_graphs import OnnxFormat

    packages = ("onnx", "onnxscript", "onnxruntime")
    if missing := [name for name in packages if importlib.util.find_spec(name) is None]:
        fail(f"--to onnx: {', '.join(missing)}, which writes or reads the graphs: pip install 'descant[onnx]'")
    return OnnxFormat()


def _open_clip(recipe: Recipe) -> ModelFormat:
    from descant.export.formats.clip import OpenClipFormat

    if importlib.util.find_spec("open_clip") is None:
        fail("--to open_clip: its package, which reads the folder back: pip install 'descant[exchange]'")
    return OpenClipFormat()


#: Name -> function that makes the format; it imports the format's package only when it is called.
FORMATS: dict[str, Callable[[Recipe], ModelFormat]] = {
    "onnx": _onnx,
    "open_clip": _open_clip,
    "timm": _timm,
    "transformers": _transformers,
}


def require(name: str) -> None:
    """Raise Refusal if no format has this name."""
    if name not in FORMATS:
        fail(f"--to {name}: no such format{hint(name, FORMATS, most=4)}")


def of(name: str, recipe: Recipe) -> ModelFormat:
    """Return the format of this name that fits a recipe's family."""
    return FORMATS[name](recipe)
