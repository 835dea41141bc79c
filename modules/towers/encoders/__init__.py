"""Encoders of other packages from their folders, which :class:`PretrainedTower` holds: a file an owner.

Each computes with its owner's own modules, and holds no parameter that its output does not use.
"""

from __future__ import annotations

from descant.modules.io.owners import Owner, content
from descant.modules.io.pretrained import Place
from descant.modules.towers.encoders.base import Encoder, Output, Part
from descant.modules.towers.encoders.open_clip import OpenClipEncoder
from descant.modules.towers.encoders.patches import QWEN, NaFlexEncoder, QwenEncoder
from descant.modules.towers.encoders.sentence_transformers import SentenceEncoder
from descant.modules.towers.encoders.timm import TimmEncoder
from descant.modules.towers.encoders.transformers import TransformersEncoder


def encoder_of(place: Place, owner: Owner, part: Part | None, output: Output, weights: bool) -> Encoder:
    """The encoder of a folder; arguments as of :class:`PretrainedTower`.

    Raises:
        ValueError: for a part or output that the model has not, an unknown architecture, or files that do not fit it.
    """
    if owner == "transformers":
        kind = str(content(place, "config.json").get("model_type"))
        if kind in QWEN:
            return QwenEncoder(place, kind, output, weights)
        made = NaFlexEncoder if kind.startswith("siglip2") else TransformersEncoder
        return made(place, part, output, weights)
    if owner == "open_clip":
        return OpenClipEncoder(place, part, output, weights)
    return TimmEncoder(place, output, weights) if owner == "timm" else SentenceEncoder(place, output, weights)
