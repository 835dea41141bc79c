"""Tower interface, frozen towers, and the towers of a recipe by modality. Letters: B samples, T tokens, D width."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from descant.modules.core.loaded import Loadable
from descant.modules.core.modalities import given_modules, with_others


class Tokens(NamedTuple):
    """Tokens of a batch. ``h_BTD``: features of T tokens. ``mask_BT``: bool, True at real tokens, False at padding."""

    h_BTD: Tensor
    mask_BT: Tensor


class Tower(Loadable):
    """Encoder of one modality: ``forward(x, mask=None) -> Tokens``; pooling and projection are separate parts.

    A subclass sets ``width`` (D). ``mask`` is bool ``[B, T_in]``, True at the real positions of a sequence.
    ``blocks()`` lists the repeated blocks, the units of activation checkpointing and sharding: ``layers`` by default. A
    text tower sets ``vocabulary`` (number of token ids), ``pad`` (id of the padding), ``pretrained`` (it needs the ids
    of its own tokenizer) and ``end`` (the id that ends a text, if the tower pools there). ``projected``: its single
    token per sample is already an embedding, so no head projects it.
    """

    width: int
    vocabulary: int | None = None
    pad: int = 0
    end: int | None = None
    pretrained: bool = False
    projected: bool = False

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tokens:
        raise NotImplementedError

    def blocks(self) -> list[nn.Module]:
        return list(getattr(self, "layers", ()))

    def require_data(self, name: str, data: Any, stage: str) -> None:
        """Raise ValueError if the data of modality ``name`` does not fit the tower, or the tower inside it."""
        tokenizer = getattr(data, "tokenizer", None)
        if name == "text" and tokenizer is not None:
            from descant.modules.tokenizers.text import Tokenizer, require_fit  # it imports the library tokenizers

            if isinstance(tokenizer, Tokenizer):
                require_fit(tokenizer, self)
        if isinstance(inner := getattr(self, "tower", None), Tower):
            inner.require_data(name, data, stage)


class Frozen(Tower):
    """Frozen tower: it has no gradients and stays in eval mode, also after ``train()``.

    In train mode, dropout and running statistics of a frozen tower would still change its features.
    """

    def __init__(self, tower: Tower) -> None:
        super().__init__()
        self.tower = tower.requires_grad_(False).eval()
        self.width, self.vocabulary, self.pad, self.end = tower.width, tower.vocabulary, tower.pad, tower.end
        self.pretrained, self.projected = tower.pretrained, tower.projected

    def train(self, mode: bool = True) -> Frozen:
        super().train(mode)
        self.tower.eval()
        return self

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tokens:
        with torch.no_grad():
            return self.tower(x, mask)

    def blocks(self) -> list[nn.Module]:
        return self.tower.blocks()


class Towers(nn.ModuleDict):
    """Towers of a recipe, at most one per modality.

    It is a class instead of a dict, so that a second YAML file can set one tower and keep the others.

    Args:
        image: pixels ``[B, 3, H, W]``.
        text: token ids ``[B, T]``.
        audio: audio features ``[B, ...]``.
        video: frames ``[B, F, 3, H, W]``.
        depth: a depth map ``[B, 1, H, W]``.
        volume: voxels ``[B, C, X, Y, Z]``.
        bands: spectral bands ``[B, C, H, W]``.
        sketch: an edge map ``[B, 1, H, W]``.
        t1, grey, white: volumes of one head by contrast, each ``[B, 1, X, Y, Z]``.
        visible, infrared: bands of a satellite image, each ``[B, C, H, W]``.
        table: columns ``[B, C]``.
        others: modality of any other name -> its tower.
    """

    def __init__(
        self,
        image: Tower | None = None,
        text: Tower | None = None,
        audio: Tower | None = None,
        video: Tower | None = None,
        depth: Tower | None = None,
        volume: Tower | None = None,
        bands: Tower | None = None,
        sketch: Tower | None = None,
        t1: Tower | None = None,
        grey: Tower | None = None,
        white: Tower | None = None,
        visible: Tower | None = None,
        infrared: Tower | None = None,
        table: Tower | None = None,
        others: dict[str, Tower] | None = None,
    ) -> None:
        super().__init__(with_others(given_modules(locals()), others))

    def width(self, modality: str) -> int:
        """Return D of a modality's tokens."""
        tower = self[modality]
        assert isinstance(tower, Tower)
        return tower.width
