"""Towers: one modality in, tokens out. Pooling and projection are parts of their own (``modules.heads``).

The libraries behind ``TimmTower`` and ``TransformersTower`` are imported when one is built, not here.
"""

from descant.modules.towers.audio import LogMelTower
from descant.modules.towers.base import Frozen, Tokens, Tower, Towers
from descant.modules.towers.image import ConvTower, PatchTower
from descant.modules.towers.saved import SavedTower
from descant.modules.towers.text import BagTower, TextTower
from descant.modules.towers.timm import TimmTower
from descant.modules.towers.transformers import TransformersTower

__all__ = [
    "BagTower",
    "ConvTower",
    "Frozen",
    "LogMelTower",
    "PatchTower",
    "SavedTower",
    "TextTower",
    "TimmTower",
    "Tokens",
    "Tower",
    "Towers",
    "TransformersTower",
]
