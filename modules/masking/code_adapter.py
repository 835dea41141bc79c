"""Adapter of masked models for codes of any input.

Letters: B samples, T tokens of a sample, N tokens of all samples, P raw numbers per token, E width of the decoder, C
ids of all layers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from descant.modules.masking.discrete_adapters import TokenAdapter
from descant.modules.tokenizers.codes import CodeTokenizer


class CodeAdapter(TokenAdapter):
    """Adapter for a tokenizer's codes of an input, as inputs and targets, with embeddings and cross-entropy (4M).

        x_t = encode(x)_t,   h_t = w[x_t] + sincos(place) + modality,   loss_t = -log softmax(W y_t)[x_t]

    The softmax is over the codes of the token's own layer, the only ones possible at its position. The data has the
    input itself, such as images, augmented as for any recipe. Predictions are decoded, so that reconstructions have the
    input's shape and units. With several layers, the first axis of the grid is the layer.
    Source: Mizrahi 2023 (4M, arXiv 2312.06647).

    Args:
        tokenizer: tokenizer of the input; it is frozen.

    >>> from descant.modules.masking.kmeans import KMeansPatches
    >>> CodeAdapter(KMeansPatches(size=[48, 48], patch=8, codes=256, layers=2)).grid
    (2, 6, 6)
    """

    def __init__(self, tokenizer: CodeTokenizer) -> None:
        super().__init__(tokenizer.vocabulary, tokenizer.length, pad=None)
        self.grid = tokenizer.grid if tokenizer.layers == 1 else (tokenizer.layers, *tokenizer.grid)
        self.tokenizer = tokenizer.requires_grad_(False).train()

    @property
    def layers(self) -> int:
        return self.tokenizer.layers

    @property
    def vocabulary(self) -> None:  # type: ignore[override]
        """None: inputs have no ids."""

    def raw(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            return self.tokenizer.encode(x)[..., None], self.tokenizer.real(x)

    def scores(self, h_NE: Tensor, place_N: Tensor) -> Tensor:
        codes, layer_N = self.tokenizer.codes, place_N // (self.tokens // self.layers)
        other_NC = torch.arange(self.vocab, device=h_NE.device) // codes != layer_N[:, None]
        return super().scores(h_NE, place_N).masked_fill(other_NC[:, None], -torch.inf)

    def to_input_shape(self, x_BTP: Tensor) -> Tensor:
        return self.tokenizer.cover(x_BTP.squeeze(2))

    def input(self, x_BTP: Tensor) -> Tensor:
        return self.tokenizer.decode(x_BTP.squeeze(2))
