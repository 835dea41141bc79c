"""Towers: one modality in, tokens out. Pooling and projection are parts of their own (``descant.modules.heads``)."""

from descant.modules.towers.base import Tokens, Tower, Towers

__all__ = ["Tokens", "Tower", "Towers"]
