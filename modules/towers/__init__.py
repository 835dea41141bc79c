"""Towers: encoders of one modality each, input to tokens. Pooling and projection are separate
(``modules.towers.heads``).

timm and transformers are imported when ``TimmTower`` or ``TransformersTower`` is built, not here.
"""

from descant.modules.towers.audio import LogMelTower
from descant.modules.towers.base import Frozen, Tokens, Tower, Towers
from descant.modules.towers.image import ConvTower, PatchTower
from descant.modules.towers.text import BagTower, TextTower
from descant.modules.towers.timm import TimmTower
from descant.modules.towers.transformers import TransformersTower

__all__ = [
    "BagTower",
    "ConvTower",
    "Frozen",
    "LogMelTower",
    "PatchTower",
    "TextTower",
    "TimmTower",
    "Tokens",
    "Tower",
    "Towers",
    "TransformersTower",
]
