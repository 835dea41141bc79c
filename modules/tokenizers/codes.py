"""Tokenizers of anything but text: they convert pictures, speech or vectors to a fixed number of ids, and back.

This module imports no network, so data modules may import it. Letters: B samples, T places of a layer, L layers.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from descant.modules.core.host import everyone


class CodeTokenizer(nn.Module):
    """Base of tokenizers of codes: ``encode(x) -> code_BT``; ``decode(code_BT) -> x``, in shape and units of the input.

    Ids are int64 ``[B, length]``, layer by layer in blocks of equal length, as SpeechTokenizer's in MIO (arXiv
    2409.17692). Those of layer l are ``l * codes`` to ``(l + 1) * codes - 1``. No id means padding; padding has any id.
    No model trains the tokenizer whose codes it reads: no gradient passes it.

    Args:
        grid: tokens along each axis. codes: number of ids of one layer. layers: number of residual quantizers.

    >>> tokenizer = CodeTokenizer(grid=[2], codes=8, layers=2)
    >>> code_BT = tokenizer.join_layers(torch.tensor([[[1, 7], [3, 0]]]))
    >>> code_BT.tolist(), tokenizer.split(code_BT).tolist(), tokenizer.vocabulary
    ([[1, 3, 15, 8]], [[[1, 7], [3, 0]]], 16)
    """

    def __init__(self, grid: Sequence[int], codes: int, layers: int = 1) -> None:
        super().__init__()
        self.grid, self.codes, self.layers = tuple(grid), codes, layers

    @property
    def length(self) -> int:
        """Return the number of ids of a sample."""
        return self.layers * math.prod(self.grid)

    @property
    def vocabulary(self) -> int:
        """Return the number of ids of all layers."""
        return self.layers * self.codes

    #: Number of training samples that :meth:`fit` needs before the first step; 0 for a tokenizer that needs none.
    samples: int = 0
    #: Whether it has been fitted, in this process or by loaded weights.
    fitted: bool = False

    def fit(self, x: Tensor) -> None:
        """Learn from the inputs of some training samples; only if ``samples`` is above 0."""
        raise NotImplementedError

    def real(self, x: Tensor) -> Tensor:
        """Return which ids are content and not padding, bool ``[B, length]``; all by default."""
        return everyone((len(x), self.length), x.device)

    def encode(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def decode(self, code_BT: Tensor) -> Tensor:
        raise NotImplementedError

    def cover(self, x_BT: Tensor) -> Tensor:
        """Copy values of the first layer's tokens, such as masks, to all input numbers that each token represents."""
        raise NotImplementedError

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode, whatever ``mode`` is."""
        return super().train(False)

    def join_layers(self, id_BTL: Tensor) -> Tensor:
        """Join ids of each layer, from 0, to one row ``[B, length]``."""
        return (id_BTL + self.codes * torch.arange(self.layers, device=id_BTL.device)).transpose(1, 2).flatten(1)

    def split(self, code_BT: Tensor) -> Tensor:
        """Split a row into the ids of each layer, from 0: the inverse of ``joined``."""
        if code_BT.ndim != 2 or code_BT.shape[1] != self.length:
            sizes = f"{' x '.join(map(str, self.grid))} in {self.layers} layer{'s' * (self.layers > 1)}"
            raise ValueError(f"codes {list(code_BT.shape)}: this tokenizer has rows of {self.length} ids, {sizes}")
        first_L1 = self.codes * torch.arange(self.layers, device=code_BT.device)[:, None]
        id_BLT = code_BT.view(len(code_BT), self.layers, -1) - first_L1
        for b, layer, t in ((id_BLT < 0) | (id_BLT >= self.codes)).nonzero()[:1].tolist():
            first, place = layer * self.codes, layer * id_BLT.shape[2] + t
            has = f"{first} to {first + self.codes - 1}"
            raise ValueError(f"codes [{b}, {place}]: id {int(code_BT[b, place])}, and layer {layer} has {has}")
        return id_BLT.transpose(1, 2)

    def digest(self) -> str:
        """Compute a hexadecimal digest of type, sizes and weights; if equal, the same input gets the same ids."""
        digest = hashlib.blake2b(
            f"{type(self).__name__} {self.grid} {self.codes} {self.layers}".encode(), digest_size=16
        )
        for name, x in sorted(self.state_dict().items()):
            digest.update(f"{name} {x.dtype} {list(x.shape)}".encode())
            digest.update(x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    @staticmethod
    def from_run(path: Path | str, checkpoint: str = "best", objective: str | None = None) -> CodeTokenizer:
        """Load the tokenizer that a run of MultiTask has trained as an objective :class:`QuantizedTokens`.

        Args:
            path: a run folder, a checkpoint in one, or an export.
            checkpoint: in a run folder: best, last or a file in it.
            objective: its name; needed if the run has several.
        """
        from descant.modules.adaptation.saved_tokenizer import SavedTokenizer  # late, since it imports networks

        return SavedTokenizer(Path(path), checkpoint, objective)
