"""Encoders loaded from folders of other packages, for :class:`PretrainedTower`: one file per package (owner).

Each encoder computes with its owner's modules and holds no parameter that its output does not use. The classes are
private: configurations name a :class:`PretrainedTower` instead.
"""

from __future__ import annotations

from descant.modules.io.owners import Owner, content
from descant.modules.io.pretrained import Place
from descant.modules.towers.encoders.base import Encoder as Encoder
from descant.modules.towers.encoders.base import Output as Output
from descant.modules.towers.encoders.base import Part as Part
from descant.modules.towers.encoders.open_clip import _OpenClipEncoder
from descant.modules.towers.encoders.patches import QWEN, _NaFlexEncoder, _QwenEncoder
from descant.modules.towers.encoders.sentence_transformers import _SentenceEncoder
from descant.modules.towers.encoders.timm import _TimmEncoder
from descant.modules.towers.encoders.transformers import _TransformersEncoder


def encoder_of(place: Place, owner: Owner, part: Part | None, output: Output, weights: bool) -> Encoder:
    """Load the encoder in a folder. The arguments are those of :class:`PretrainedTower`."""
    if owner == "transformers":
        kind = str(content(place, "config.json").get("model_type"))
        if kind in QWEN:
            return _QwenEncoder(place, kind, output, weights)
        made = _NaFlexEncoder if kind.startswith("siglip2") else _TransformersEncoder
        return made(place, part, output, weights)
    if owner == "open_clip":
        return _OpenClipEncoder(place, part, output, weights)
    return _TimmEncoder(place, output, weights) if owner == "timm" else _SentenceEncoder(place, output, weights)
