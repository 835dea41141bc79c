"""A chat that sees, so small that a test trains it in a second: of the emoji's words and pictures of any size."""

from __future__ import annotations

from typing import Any

from descant.modules.language import CausalLM
from descant.modules.language.projectors import PooledGrid
from descant.modules.towers import ConvTower, Towers


def small_chat() -> dict[str, Any]:
    """Arguments of Chat and of what stands on it; made anew, of the random numbers as they are."""
    return {
        "towers": Towers(image=ConvTower([8, 8], stem=4)),
        "lm": CausalLM(8194, 16, 1, 2, length=96),
        "image_token": 8192,
        "answer_token": 8193,
        "projector": PooledGrid(1),
    }
