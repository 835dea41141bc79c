"""Text towers: a transformer over token ids, and a bag of embeddings. Letters: B samples, T tokens, D width."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from descant.modules.core.host import derive, host_copy
from descant.modules.core.objects import record_arguments
from descant.modules.towers.base import Tokens, Tower
from descant.modules.towers.image import Block, all_real, key_mask

PAD = 0


class TextTower(Tower):
    """Text transformer, pre-norm: ``h = norm(block_n(... block_1(embedding(x) + positions)))``.

    ``x_BT -> [B, T, width]``. Padding (id 0, or where ``mask`` is False) is not attended to and gives zeros, unless
    ``attend_padding``. Columns after the longest text of a batch are not computed.

    Args:
        vocab: number of token ids.
        width: D.
        depth: number of blocks, at least 1 (without any: :class:`BagTower`).
        heads: number of attention heads.
        length: maximum number of tokens in a text.
        mlp_ratio: hidden width of the MLP, divided by D.
        dropout: probability on the attention weights and on both branches of a block.
        causal: a token attends only to itself and to earlier ones.
        attend_padding: padding is a token like any other, and every text fills its row (as SigLIP's texts; pool them
            with ``LastPool``).
        std: standard deviation of the initial token embeddings, twice that of the positions; larger values help to
            learn word order from few examples.

    >>> tower = TextTower(vocab=9, width=8, depth=1, heads=2, length=6)
    >>> tower(torch.tensor([[1, 5, 2, 0], [1, 2, 0, 0]])).mask_BT.sum(dim=1).tolist()
    [3, 2]
    """

    def __init__(
        self,
        vocab: int,
        width: int,
        depth: int,
        heads: int,
        length: int,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
        causal: bool = False,
        std: float = 0.02,
        attend_padding: bool = False,
    ) -> None:
        self.arguments = record_arguments(locals())
        super().__init__()
        if depth < 1:
            raise ValueError(f"depth {depth}: at least 1; for a bag of tokens without blocks use BagTower")
        self.width, self.length, self.causal, self.vocabulary = width, length, causal, vocab
        self.attend_padding = attend_padding
        self.embedding = nn.Embedding(vocab, width, padding_idx=None if attend_padding else PAD)
        nn.init.normal_(self.embedding.weight, std=std)
        self.positions_TD = nn.Parameter(torch.randn(length, width) * (std / 2))
        self.layers = nn.ModuleList(Block(width, heads, mlp_ratio, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def embed(self, x_BT: Tensor) -> Tensor:
        """Embed tokens with positions, ``[B, T] -> [B, T, D]``; model inversion optimises the result."""
        return self.embedding(x_BT) + self.positions_TD[: x_BT.shape[1]]

    def encode(self, h_BTD: Tensor, mask_BT: Tensor | None = None) -> Tensor:
        """Apply blocks and norm; tokens whose mask is False are not attended to and give zeros."""
        mask_BT = all_real(h_BTD) if mask_BT is None else mask_BT
        attend = self._attention_mask(mask_BT)
        for layer in self.layers:
            h_BTD = layer(h_BTD, attend)
        return self.norm(h_BTD).masked_fill(~mask_BT[..., None], 0.0)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tokens:
        T = x.shape[1]
        if self.length < T:
            raise ValueError(f"length {self.length}: a text of {T} tokens does not fit; cut it or raise length")
        # a compiled graph has static shapes
        compiled = torch.compiler.is_compiling()
        if mask is None and self.attend_padding:
            return Tokens(self.encode(self.embed(x)), torch.ones_like(x, dtype=torch.bool))
        if mask is None:
            mask = x != PAD if compiled else derive(_real, x)
        mask_BT, longest = mask, T if compiled else columns(mask)
        h_BTD = self.encode(self.embed(x[:, :longest]), mask_BT[:, :longest])
        return Tokens(F.pad(h_BTD, (0, 0, 0, T - longest)) if longest < T else h_BTD, mask_BT)

    def _attention_mask(self, mask_BT: Tensor) -> Tensor:
        """Make the attention mask, bool ``[B, 1, 1 or T, T]``, with at least one key per query (none gives NaN)."""
        if not self.causal:
            return key_mask(mask_BT)
        T = mask_BT.shape[1]
        all_TT = torch.ones(T, T, dtype=torch.bool, device=mask_BT.device)
        diagonal_TT = torch.eye(T, dtype=torch.bool, device=mask_BT.device)
        return (mask_BT[:, None] & all_TT.tril() | diagonal_TT)[:, None]


def _real(x_BT: Tensor) -> Tensor:
    return x_BT != PAD


def columns(mask_BT: Tensor) -> int:
    """Count the columns up to the last real token of any text; at least 1."""
    columns = host_copy(mask_BT).any(dim=0).nonzero()
    return int(columns[-1]) + 1 if len(columns) else 1


class BagTower(Tower):
    """Bag of token embeddings: one token per text, ``h_b = mean over real tokens of embedding(x_bt)``.

    ``x_BT -> [B, 1, width]``; a text without real tokens gives zeros and no token. It equals a mean pool over
    embeddings, but takes about a tenth of the time for rows of eighty n-grams.

    Args:
        vocab: number of token ids.
        width: D.

    >>> tower = BagTower(vocab=9, width=4)
    >>> h_B1D, mask_B1 = tower(torch.tensor([[1, 5, 0], [0, 0, 0]]))
    >>> torch.allclose(h_B1D[0, 0], tower.embedding.weight[[1, 5]].mean(0)), mask_B1.flatten().tolist()
    (True, [True, False])
    """

    def __init__(self, vocab: int, width: int) -> None:
        super().__init__()
        self.width, self.vocabulary = width, vocab
        self.embedding = nn.EmbeddingBag(vocab, width, mode="mean", padding_idx=PAD)
        nn.init.normal_(self.embedding.weight, std=0.02)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tokens:
        x_BT = x if mask is None else x.masked_fill(~mask, PAD)
        return Tokens(self.embedding(x_BT)[:, None], (x_BT != PAD).any(dim=1, keepdim=True))
