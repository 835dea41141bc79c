"""The native text tower. Letters: B samples, T tokens, D width."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from descant.modules.core.host import derived, host_copy
from descant.modules.towers.base import Tokens, Tower
from descant.modules.towers.image import Block, all_real

PAD = 0


class TextTower(Tower):
    """A pre-norm transformer: ``h = norm(block_n(... block_1(embedding(x) + positions)))``.

    ``x_BT -> [B, T, width]``; padding (id 0, or where ``mask`` is False) is never looked at and comes out as
    zeros. Columns to the right of the longest text of a batch are not computed.

    Args:
        vocab: number of token ids.
        width: D.
        depth: number of blocks, at least 1; a tower without any is :class:`BagTower`.
        heads: of the attention.
        length: most tokens of a text.
        mlp_ratio: hidden width of the MLP over D.
        dropout: on the attention weights and on both branches of a block.
        causal: a token sees only itself and what is left of it.
        std: of the token embeddings at the start; that of the positions is half of it. As small as it is in language
            models, what a block first adds is the same for all tokens: who learns order from few examples wants more.

    Raises:
        ValueError: if ``depth`` is below 1, or ``heads`` does not divide ``width``; in forward, if a text is longer
            than ``length``.

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
    ) -> None:
        super().__init__()
        if depth < 1:
            raise ValueError(f"depth {depth}: at least 1; without blocks a text is a bag of tokens: BagTower")
        self.width, self.length, self.causal, self.vocabulary = width, length, causal, vocab
        self.embedding = nn.Embedding(vocab, width, padding_idx=PAD)
        nn.init.normal_(self.embedding.weight, std=std)
        self.positions_TD = nn.Parameter(torch.randn(length, width) * (std / 2))
        self.layers = nn.ModuleList(Block(width, heads, mlp_ratio, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def embed(self, x_BT: Tensor) -> Tensor:
        """Token embeddings with their positions: ``[B, T] -> [B, T, D]``. Inversion puts its own among them."""
        return self.embedding(x_BT) + self.positions_TD[: x_BT.shape[1]]

    def encode(self, h_BTD: Tensor, mask_BT: Tensor | None = None) -> Tensor:
        """Blocks and norm; nobody looks at a token whose mask is False, and it comes out as zeros."""
        mask_BT = all_real(h_BTD) if mask_BT is None else mask_BT
        see = self._see(mask_BT)
        for layer in self.layers:
            h_BTD = layer(h_BTD, see)
        return self.norm(h_BTD).masked_fill(~mask_BT[..., None], 0.0)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tokens:
        T = x.shape[1]
        if self.length < T:
            raise ValueError(f"length {self.length}: a text of {T} tokens does not fit; cut it or raise length")
        # a compiled graph keeps its static shape: the longest text is only known from the data
        whole = torch.compiler.is_compiling()
        if mask is None:
            mask = x != PAD if whole else derived(_real, x)
        mask_BT, kept = mask, T if whole else _longest(mask)
        h_BTD = self.encode(self.embed(x[:, :kept]), mask_BT[:, :kept])
        return Tokens(F.pad(h_BTD, (0, 0, 0, T - kept)) if kept < T else h_BTD, mask_BT)

    def _see(self, mask_BT: Tensor) -> Tensor:
        """Bool ``[B, 1, 1 or T, T]``: which keys a query sees; at least one, or its softmax is NaN."""
        if not self.causal:
            return (mask_BT | ~mask_BT.any(dim=1, keepdim=True))[:, None, None]
        T = mask_BT.shape[1]
        square_TT = torch.ones(T, T, dtype=torch.bool, device=mask_BT.device)
        itself_TT = torch.eye(T, dtype=torch.bool, device=mask_BT.device)
        return (mask_BT[:, None] & square_TT.tril() | itself_TT)[:, None]

    def blocks(self) -> list[nn.Module]:
        return list(self.layers)


def _real(x_BT: Tensor) -> Tensor:
    return x_BT != PAD


def _longest(mask_BT: Tensor) -> int:
    """Columns up to the last one in which any text has a token; at least 1."""
    columns = host_copy(mask_BT).any(dim=0).nonzero()
    return int(columns[-1]) + 1 if len(columns) else 1


class BagTower(Tower):
    """A bag of token embeddings: one token a text, ``h_b = mean over real tokens of embedding(x_bt)``.

    ``x_BT -> [B, 1, width]``; a text without a real token has none, and zeros. As a mean pool over the embeddings would
    give, but summed where they lie: for rows of eighty n-grams, about a tenth of the time.

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
