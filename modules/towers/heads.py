"""Between a tower and a loss: pooling (tokens to one vector a sample) and projection (to the shared space).

Letters: B samples, T tokens, D width, H heads.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from descant.modules.towers.base import Tokens
from descant.modules.towers.image import checked_heads


class Pool(nn.Module):
    """``pool(tokens) -> h_BD``: one vector a sample, from real tokens only; zeros where there is none."""

    def forward(self, tokens: Tokens) -> Tensor:
        raise NotImplementedError


class MeanPool(Pool):
    """``h_b = sum_t mask_bt h_bt / sum_t mask_bt``, and zeros for a sample without a real token.

    >>> h_BTD = torch.tensor([[[1.0], [3.0], [9.0]]])
    >>> MeanPool()(Tokens(h_BTD, torch.tensor([[True, True, False]]))).item()
    2.0
    """

    def forward(self, tokens: Tokens) -> Tensor:
        h_BTD, mask_BT = tokens
        # filled, not multiplied: whatever a padding position holds (even inf), it adds zero
        sum_BD = h_BTD.masked_fill(~mask_BT[..., None], 0.0).sum(dim=1)
        return sum_BD / mask_BT.sum(dim=1, keepdim=True).clamp(min=1)


class FirstPool(Pool):
    """``h_b = h_bt`` at the first real token t (a class token), and zeros for a sample without one.

    >>> h_BTD = torch.tensor([[[1.0], [3.0], [9.0]]])
    >>> FirstPool()(Tokens(h_BTD, torch.tensor([[False, True, True]]))).item()
    3.0
    """

    def forward(self, tokens: Tokens) -> Tensor:
        return _take(tokens, tokens.mask_BT.int().argmax(dim=1))


class LastPool(Pool):
    """``h_b = h_bt`` at the last real token t (the one that saw all, if causal), zeros where there is none.

    >>> h_BTD = torch.tensor([[[1.0], [3.0], [9.0]]])
    >>> LastPool()(Tokens(h_BTD, torch.tensor([[True, True, False]]))).item()
    3.0
    """

    def forward(self, tokens: Tokens) -> Tensor:
        mask_BT = tokens.mask_BT
        return _take(tokens, mask_BT.shape[1] - 1 - mask_BT.flip(1).int().argmax(dim=1))


def _take(tokens: Tokens, t_B: Tensor) -> Tensor:
    h_BTD, mask_BT = tokens
    h_BD = h_BTD[torch.arange(len(t_B), device=t_B.device), t_B]
    return h_BD.masked_fill(~mask_BT.any(dim=1, keepdim=True), 0.0)


class AttentionPool(Pool):
    """``h_b = W_o concat_h(sum_t softmax_t(q_h . k_bt / sqrt(D / H)) v_bt)`` with one learned query a head.

    A sample without a real token gives zeros.

    Args:
        width: D of the tokens.
        heads: H, how many queries look at the tokens.

    Raises:
        ValueError: if ``heads`` does not divide ``width``.

    >>> AttentionPool(8, 2)(Tokens(torch.randn(3, 5, 8), torch.ones(3, 5, dtype=torch.bool))).shape
    torch.Size([3, 8])
    """

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = checked_heads(width, heads)
        self.query_D = nn.Parameter(torch.randn(width) * width**-0.5)
        self.norm = nn.LayerNorm(width)
        self.kv = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, tokens: Tokens) -> Tensor:
        h_BTD, mask_BT = tokens
        B, T, D = h_BTD.shape
        some_B1 = mask_BT.any(dim=1, keepdim=True)
        keys_B11T = (mask_BT | ~some_B1)[:, None, None]  # softmax over no key at all would be NaN
        kv = self.kv(self.norm(h_BTD)).view(B, T, 2, self.heads, D // self.heads)
        k_BHTd, v_BHTd = kv.permute(2, 0, 3, 1, 4).unbind(0)
        q_BH1d = self.query_D.to(k_BHTd.dtype).view(1, self.heads, 1, -1).expand(B, -1, -1, -1)
        h_BH1d = F.scaled_dot_product_attention(q_BH1d, k_BHTd, v_BHTd, attn_mask=keys_B11T)
        return self.out(h_BH1d.reshape(B, D)).masked_fill(~some_B1, 0.0)


class FlattenPool(Pool):
    """``h_b = W vec(h_bTD)``: a weight of its own for every place, so what is where is not averaged away.

    For towers that always give the same tokens, such as those of pictures; a token that is not real counts as zeros.

    Args:
        tokens: T.
        width: D of the tokens, and of the outcome.

    Raises:
        ValueError: in forward, for another number of tokens.

    >>> pool, h_BTD = FlattenPool(tokens=2, width=1), torch.tensor([[[1.0], [3.0]]])
    >>> everything = torch.ones(1, 2, dtype=torch.bool)
    >>> bool(pool(Tokens(h_BTD, everything)) == pool(Tokens(h_BTD.flip(1), everything)))
    False
    """

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.tokens = tokens
        self.linear = nn.Linear(tokens * width, width)

    def forward(self, tokens: Tokens) -> Tensor:
        h_BTD, mask_BT = tokens
        if h_BTD.shape[1] != self.tokens:
            raise ValueError(f"tokens {self.tokens}: this tower gives {h_BTD.shape[1]}")
        h_BD = self.linear(h_BTD.masked_fill(~mask_BT[..., None], 0.0).flatten(1))
        return h_BD.masked_fill(~mask_BT.any(dim=1, keepdim=True), 0.0)


class Pools(nn.ModuleDict):
    """One optional pool a modality, the mean of the tokens for the others. A class, not a dict, so that a second YAML
    that names one pool keeps the others.

    Args:
        image, text, audio, video, depth, volume, bands, table: as in ``Towers``.

    >>> pools = Pools(text=LastPool())
    >>> type(pools.of("text")).__name__, type(pools.of("image")).__name__
    ('LastPool', 'MeanPool')
    """

    def __init__(
        self,
        image: Pool | None = None,
        text: Pool | None = None,
        audio: Pool | None = None,
        video: Pool | None = None,
        depth: Pool | None = None,
        volume: Pool | None = None,
        bands: Pool | None = None,
        table: Pool | None = None,
    ) -> None:
        given = dict(
            image=image, text=text, audio=audio, video=video, depth=depth, volume=volume, bands=bands, table=table
        )
        super().__init__({name: pool for name, pool in given.items() if pool is not None})

    def of(self, modality: str) -> nn.Module:
        return self[modality] if modality in self else MeanPool()


class Projection(nn.Module):
    """``z = W_n act(... act(W_1 norm(h) + b_1) ...)``: optional LayerNorm, then a linear map or small MLP.

    The last layer has no bias, and the output is not normalised: a loss or a recipe does that.

    Args:
        width_in: D of the features.
        width: D of the shared space.
        layers: how many linear layers; 1 is a linear map.
        hidden: width of the hidden layers; ``width_in`` where not given.
        norm: a LayerNorm first.

    Raises:
        ValueError: if ``layers`` is below 1.

    >>> sum(p.numel() for p in Projection(8, 4, layers=2, hidden=16, norm=False).parameters())
    208
    """

    def __init__(
        self, width_in: int, width: int, layers: int = 1, hidden: int | None = None, norm: bool = True
    ) -> None:
        super().__init__()
        if layers < 1:
            raise ValueError(f"layers {layers}: a projection has at least 1")
        self.norm = nn.LayerNorm(width_in) if norm else nn.Identity()
        widths = [width_in, *[hidden or width_in] * (layers - 1)]
        parts: list[nn.Module] = []
        for a, b in pairwise(widths):
            parts += [nn.Linear(a, b), nn.GELU()]
        self.layers = nn.Sequential(*parts, nn.Linear(widths[-1], width, bias=False))

    def forward(self, h_BD: Tensor) -> Tensor:
        return self.layers(self.norm(h_BD))
