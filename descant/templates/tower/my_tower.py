"""A tower: from the inputs of one modality to tokens. Letters: B samples, C channels, S side, T tokens, D width.

Every tower implements, for any modality,

    tower(x) -> Tokens(h_BTD, mask_BT)

``x`` is a batch of inputs from the data module, only of samples that have the modality. ``h_BTD`` has D numbers for
each of T tokens. ``mask_BT`` is bool, True for real tokens. A sample with fewer tokens has False for the rest, whose
values must not affect any result. ``self.width`` is D. Pooling and the projection to the shared space follow outside. A
tower has no loss, moves nothing between devices and reads nothing back.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from descant.modules.core.objects import record_arguments
from descant.modules.towers.base import Tokens, Tower


class MyTower(Tower):
    """An MLP on each patch: ``h_t = W_2 gelu(W_1 patch_t) + place_t``; one token per patch, and all tokens are real.

    Args:
        channels: C.
        size: S.
        patch: side of a patch, a divisor of S.
        width: D.

    >>> tower = MyTower(channels=3, size=32, patch=8, width=16)
    >>> h_BTD, mask_BT = tower(torch.zeros(2, 3, 32, 32))
    >>> h_BTD.shape, bool(mask_BT.all())
    (torch.Size([2, 16, 16]), True)
    """

    def __init__(self, channels: int = 3, size: int = 32, patch: int = 8, width: int = 64) -> None:
        self.arguments = record_arguments(locals())  # an export and SavedTower build it from these
        super().__init__()
        if patch < 1 or size % patch:
            raise ValueError(f"patch {patch}: it does not divide size {size}")
        self.width, self.shape = width, (channels, size, size)
        self.patches = nn.Conv2d(channels, 2 * width, patch, stride=patch)
        self.out = nn.Linear(2 * width, width)
        self.place_TD = nn.Parameter(torch.randn((size // patch) ** 2, width) * 0.02)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tokens:
        """Compute the tokens. ``mask``: real positions of sequences; images have none."""
        if x.shape[1:] != self.shape:
            raise ValueError(f"images {tuple(x.shape[1:])}: this tower takes {self.shape}")
        h_BTD = self.out(nn.functional.gelu(self.patches(x)).flatten(2).transpose(1, 2)) + self.place_TD
        return Tokens(h_BTD, torch.ones(h_BTD.shape[:2], dtype=torch.bool, device=h_BTD.device))
