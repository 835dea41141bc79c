"""Pooling (tokens to one vector per sample) and projection heads. Letters: B samples, T tokens, D width, H heads."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from descant.modules.core.modalities import given_modules, with_others
from descant.modules.towers.base import Tokens
from descant.modules.towers.image import checked_heads, cross_attention, key_mask, xavier


class Pool(nn.Module):
    """Base of pooling: ``pool(tokens) -> h_BD``, one vector per sample from its real tokens; zeros without any."""

    def forward(self, tokens: Tokens) -> Tensor:
        raise NotImplementedError


class MeanPool(Pool):
    """Mean pooling over real tokens: ``h_b = sum_t mask_bt h_bt / sum_t mask_bt``.

    >>> h_BTD = torch.tensor([[[1.0], [3.0], [9.0]]])
    >>> MeanPool()(Tokens(h_BTD, torch.tensor([[True, True, False]]))).item()
    2.0
    """

    def forward(self, tokens: Tokens) -> Tensor:
        h_BTD, mask_BT = tokens
        # filled, not multiplied: padding may hold inf or nan
        sum_BD = h_BTD.masked_fill(~mask_BT[..., None], 0.0).sum(dim=1)
        return sum_BD / mask_BT.sum(dim=1, keepdim=True).clamp(min=1)


class FirstPool(Pool):
    """First real token of a sample (a class token).

    >>> h_BTD = torch.tensor([[[1.0], [3.0], [9.0]]])
    >>> FirstPool()(Tokens(h_BTD, torch.tensor([[False, True, True]]))).item()
    3.0
    """

    def forward(self, tokens: Tokens) -> Tensor:
        return _take(tokens, tokens.mask_BT.int().argmax(dim=1))


class LastPool(Pool):
    """Last real token of a sample (the one that attends to all, in a causal model).

    >>> h_BTD = torch.tensor([[[1.0], [3.0], [9.0]]])
    >>> LastPool()(Tokens(h_BTD, torch.tensor([[True, True, False]]))).item()
    3.0
    """

    def forward(self, tokens: Tokens) -> Tensor:
        mask_BT = tokens.mask_BT
        return _take(tokens, mask_BT.shape[1] - 1 - mask_BT.flip(1).int().argmax(dim=1))


def _take(tokens: Tokens, t_B: Tensor) -> Tensor:
    h_BTD, mask_BT = tokens
    h_BD = h_BTD[torch.arange(t_B.shape[0], device=t_B.device), t_B]  # len() would fix B in an exported graph
    return h_BD.masked_fill(~mask_BT.any(dim=1, keepdim=True), 0.0)


class MaxPool(Pool):
    """Max pooling over real tokens, for each coordinate: ``h_bd = max over t of (W h_bt)_d``; zeros without any.

    Source: the release of UniPT (ZhiyinShao-H/UniPT), which projects tokens before the maximum, but includes padding.

    Args:
        width: D of the tokens, for a linear map before the maximum; no map if not given.

    >>> h_BTD = torch.tensor([[[1.0, 4.0], [3.0, 2.0], [9.0, 9.0]]])
    >>> MaxPool()(Tokens(h_BTD, torch.tensor([[True, True, False]]))).tolist()
    [[3.0, 4.0]]
    """

    def __init__(self, width: int | None = None) -> None:
        super().__init__()
        self.linear = nn.Identity() if width is None else nn.Linear(width, width)

    def forward(self, tokens: Tokens) -> Tensor:
        mask_BT, padding_BT1 = tokens.mask_BT, ~tokens.mask_BT[..., None]
        h_BTD = self.linear(tokens.h_BTD.masked_fill(padding_BT1, 0.0))  # padding may hold inf or nan
        most_BD = h_BTD.masked_fill(padding_BT1, torch.finfo(h_BTD.dtype).min).amax(dim=1)
        return most_BD.masked_fill(~mask_BT.any(dim=1, keepdim=True), 0.0)


class AttentionPool(Pool):
    """Attention pooling with one learned query per head: ``h_b = W_o concat_h(sum_t softmax_t(q_h . k_bt / sqrt(D / H))
    v_bt)``.

    Args:
        width: D of the tokens.
        heads: H, number of queries.

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
        kv_BTC = self.kv(self.norm(h_BTD))
        q_B1D = self.query_D.to(kv_BTC.dtype).expand(h_BTD.shape[0], 1, -1)
        h_B1D = cross_attention(q_B1D, kv_BTC, self.heads, key_mask(mask_BT))
        return self.out(h_B1D[:, 0]).masked_fill(~mask_BT.any(dim=1, keepdim=True), 0.0)


class MAPPool(Pool):
    """Multihead attention pooling followed by an MLP, as SigLIP pools images: ``a_b = W_o attention(W_q p, W_k h_b,
    W_v h_b)`` with one learned query p, ``h_b = a_b + mlp(norm(a_b))``.

    It is the head of transformers' ``SiglipVisionModel`` (with that tower's ``eps=1e-6, tanh=True``) and timm's
    ``AttentionPoolLatent``. In a shared space without a projection (``project: {image: false}``), its output is the
    embedding.

    Source: Zhai 2022 (arXiv 2106.04560, appendix), big_vision's MAPHead.

    Args:
        width: D of the tokens, and of the output.
        heads: number of attention heads.
        mlp_ratio: hidden width of the MLP, divided by D.
        eps: epsilon of the norm.
        tanh: use the tanh approximation of the MLP's GELU.

    >>> pool = MAPPool(8, 2, mlp_ratio=2.0)
    >>> pool(Tokens(torch.randn(3, 5, 8), torch.ones(3, 5, dtype=torch.bool))).shape
    torch.Size([3, 8])
    >>> sum(p.numel() for p in pool.parameters())  # 8 + 4 * (64 + 8) + 16 + (8 * 16 + 16) + (16 * 8 + 8)
    592
    """

    def __init__(
        self, width: int, heads: int = 4, mlp_ratio: float = 4.0, eps: float = 1e-5, tanh: bool = False
    ) -> None:
        super().__init__()
        self.heads, hidden = checked_heads(width, heads), int(width * mlp_ratio)
        self.probe_1D = nn.Parameter(nn.init.xavier_uniform_(torch.empty(1, width)))
        self.q, self.kv, self.out = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=eps)
        self.mlp = nn.Sequential(
            nn.Linear(width, hidden), nn.GELU("tanh" if tanh else "none"), nn.Linear(hidden, width)
        )
        xavier(self.q, self.kv, self.out, self.mlp[0], self.mlp[2])

    def forward(self, tokens: Tokens) -> Tensor:
        h_BTD, mask_BT = tokens
        absent_B1 = ~mask_BT.any(dim=1, keepdim=True)
        kv_BTC = self.kv(h_BTD.masked_fill(~mask_BT[..., None], 0.0))
        q_B1D = self.q(self.probe_1D).expand(h_BTD.shape[0], 1, -1)
        h_BD = self.out(cross_attention(q_B1D, kv_BTC, self.heads, key_mask(mask_BT))[:, 0])
        return (h_BD + self.mlp(self.norm(h_BD))).masked_fill(absent_B1, 0.0)


class FlattenPool(Pool):
    """Flattening and projection: ``h_b = W vec(h_bTD)``. It keeps spatial positions, which a mean would lose.

    For towers with a fixed number of tokens, such as image towers; padding counts as zeros.

    Args:
        tokens: T.
        width: D of the tokens, and of the output.

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
    """Pool of each modality, :class:`MeanPool` by default. It is a class, so that YAML files can be overlaid.

    Args:
        image, text, audio, video, depth, volume, bands, table, others: as in ``Towers``.

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
        others: dict[str, Pool] | None = None,
    ) -> None:
        super().__init__(with_others(given_modules(locals()), others))

    def of(self, modality: str) -> nn.Module:
        return self[modality] if modality in self else MeanPool()


class Projection(nn.Module):
    """Projection head: optional LayerNorm, then linear map or MLP: ``z = W_n act(... act(W_1 norm(h) + b_1) ...)``.

    The last layer has no bias; the output is not normalised.

    Args:
        width_in: D of the features.
        width: D of the shared space.
        layers: number of linear layers; 1 is a linear map.
        hidden: width of the hidden layers; ``width_in`` by default.
        norm: begin with a LayerNorm.

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
