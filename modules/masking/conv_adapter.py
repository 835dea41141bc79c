"""Adapter of masked models for images that pass through a convolutional network.

Letters as in ``adapters.py``; R samples with visible tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from descant.modules.core.host import to_device
from descant.modules.masking.adapters import PatchAdapter
from descant.modules.masking.decoders import At
from descant.modules.towers.base import Tower


class ConvAdapter(PatchAdapter):
    """Patches of an image through a convolutional network: ``h = W tower(x of visible patches)_t + sincos + modality``.

    Hidden patches are set to zero before the network, so that no token depends on them, as in ConvMAE (Gao 2022, arXiv
    2205.03892). Samples without visible tokens skip the network. With few images, convolutions learn more than patch
    embeddings do. Targets and losses are those of PatchAdapter.

    Args:
        tower: tower for images with one token per patch, such as ConvTower; its norm must not depend on the batch
            (``group``).
        kwargs: arguments of PatchAdapter; ``patch`` is the tower's stride.

    >>> from descant.modules.towers.image import ConvTower
    >>> ConvAdapter(ConvTower(widths=[8, 8], stem=4, norm="group"), size=[32, 32], patch=8).grid
    (4, 4)
    """

    def __init__(self, tower: Tower, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        with torch.no_grad():
            tokens = tower(torch.zeros(1, self.channels, *self.size)).h_BTD.shape[1]
        if tokens != self.tokens:
            raise ValueError(f"patch {list(self.patch)}: {self.tokens} tokens, and the tower has {tokens}")
        self.tower = tower

    def build(self, width: int, out: int) -> None:
        super().build(width, out)
        self.inward = nn.Linear(self.tower.width, width)

    def visible(self, x_BTP: Tensor, at: At) -> Tensor:
        row_R, of_N = at.host_row_N.unique(return_inverse=True)
        if not len(row_R):  # run one sample without tokens, so that every rank's backward reaches the same parameters
            row_R = torch.zeros(1, dtype=torch.long)
        row_R, of_N = to_device(row_R, x_BTP.device), to_device(of_N, x_BTP.device)
        seen_RTP = x_BTP.new_zeros(len(row_R), *x_BTP.shape[1:])
        seen_RTP[of_N, at.place_N] = x_BTP[at.row_N, at.place_N]
        return self.embed(self.tower(self.to_input_shape(seen_RTP)).h_BTD[of_N, at.place_N], at.place_N)
