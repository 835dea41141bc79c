"""Vision transformer on ragged batches: any number of tokens per sample, from several modalities.

On one modality it is timm's ViT. Letters: B samples, S groups of tokens (global ones, then one per modality), N tokens
of all samples, M with global ones, K tokens of one sample, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from descant.modules.core.host import derive, host_copy, to_device
from descant.modules.core.objects import record_arguments
from descant.modules.core.rows import RowTracker
from descant.modules.moe import ExpertLayers, Marks, MoELayer, Routing, observe
from descant.modules.moe.routing import UNMARKED
from descant.modules.towers.base import Tokens, Tower
from descant.modules.towers.image import Block, checked_heads
from descant.modules.towers.timm import load_exactly, read_weights

#: Epsilon of the norms, as in timm's vision transformers.
EPS = 1e-6


class Layout:
    """Memory layout of ragged tokens for dense attention: samples of equal length are stored together.

    Within a sample its groups follow each other. ``join`` packs groups into this order, and ``part`` unpacks them.

    Args:
        counts: for each group, the tokens of each sample: int64 ``[B]`` on the CPU.
        by: int64 ``[B]``: a key that samples of one piece share, if it is finer than their length; layouts with equal
            ``by`` have equal pieces.
        device: of the tokens; by default that of the counts.

    Attributes:
        pieces: (samples, tokens per sample), in memory order.
        sample_B: the samples in that order, on the CPU.
        order_M: for each token in memory, its index in the concatenated groups; None if all samples have equal counts.

    >>> layout = Layout([torch.tensor([1, 1, 1]), torch.tensor([2, 0, 2])])
    >>> layout.pieces, layout.sample_B.tolist(), layout.order_M.tolist()
    ([(1, 1), (2, 3)], [1, 0, 2], [1, 0, 3, 4, 2, 5, 6])
    """

    def __init__(self, counts: Sequence[Tensor], by: Tensor | None = None, device: torch.device | None = None) -> None:
        device = counts[0].device if device is None else device
        count_SB = torch.stack([host_copy(count_B) for count_B in counts])
        by = None if by is None else host_copy(by)
        same_SB = count_SB if by is None else torch.cat([count_SB, by[None]])
        self.count_SB = count_SB
        self.sizes: list[int] | None = None
        self.order_M: Tensor | None = None
        B = count_SB.shape[1]
        if bool((same_SB == same_SB[:, :1]).all()):
            self.sizes = count_SB[:, 0].tolist()
            self.pieces = [(B, sum(self.sizes))]
            self.sample_B = torch.arange(B)
            return
        total_B = count_SB.sum(dim=0)
        length_B = total_B if by is None else by
        self.sample_B = length_B.argsort(stable=True)
        rows = torch.unique_consecutive(length_B[self.sample_B], return_counts=True)[1].tolist()
        tokens = total_B[self.sample_B][torch.tensor(rows).cumsum(0) - 1].tolist()
        self.pieces = list(zip(rows, tokens, strict=True))
        rank_B = torch.empty_like(self.sample_B)
        rank_B[self.sample_B] = torch.arange(B)
        rank_M = torch.cat([rank_B.repeat_interleave(count_B) for count_B in count_SB])
        self.order_M = to_device(rank_M.argsort(stable=True), device)

    def join(self, groups: Sequence[Tensor]) -> Tensor:
        """Pack groups ``[N, D]``, each ordered by sample, into ``[M, D]`` in memory order."""
        if self.order_M is not None:
            return take(torch.cat(list(groups)), self.order_M)
        assert self.sizes is not None
        rows = self.pieces[0][0]
        views = [h.view(rows, n, h.shape[1]) for h, n in zip(groups, self.sizes, strict=True)]
        return torch.cat(views, dim=1).flatten(0, 1)

    def part(self, h_MD: Tensor) -> list[Tensor]:
        """Unpack tokens in memory order into groups: the inverse of ``join``."""
        if self.order_M is not None:
            inverse_M = torch.empty_like(self.order_M)
            inverse_M[self.order_M] = torch.arange(len(inverse_M), device=inverse_M.device)
            return list(take(h_MD, inverse_M).split(self.count_SB.sum(dim=1).tolist()))
        assert self.sizes is not None
        parts = h_MD.view(*self.pieces[0], h_MD.shape[1]).split(self.sizes, dim=1)
        return [part.reshape(-1, h_MD.shape[1]) for part in parts]

    @cached_property
    def rows(self) -> Tensor:
        """Return the sample of each token in memory order, int64 ``[M]`` on the CPU."""
        return self.sample_B.repeat_interleave(self.count_SB.sum(dim=0)[self.sample_B])

    @cached_property
    def kinds(self) -> Tensor:
        """Return the group of each token in memory order, int64 ``[M]`` on the CPU."""
        S, B = self.count_SB.shape
        return torch.arange(S).repeat(B).repeat_interleave(self.count_SB[:, self.sample_B].T.flatten())

    def split(self, h_MD: Tensor) -> list[Tensor]:
        """Split tokens in memory order into pieces ``[samples, tokens, ...]``."""
        if len(self.pieces) == 1:
            return [h_MD.view(*self.pieces[0], *h_MD.shape[1:])]  # without a split, whose backward is a copy
        parts = h_MD.split([rows * tokens for rows, tokens in self.pieces])
        return [part.view(*piece, *h_MD.shape[1:]) for part, piece in zip(parts, self.pieces, strict=True)]


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h_ND: Tensor, index_K: Tensor) -> Tensor:
        ctx.save_for_backward(index_K)
        ctx.rows = len(h_ND)
        return h_ND.index_select(0, index_K)

    @staticmethod
    def backward(ctx: Any, grad_KD: Tensor) -> tuple[Tensor, None]:
        (index_K,) = ctx.saved_tensors
        grad_ND = grad_KD.new_zeros(ctx.rows, *grad_KD.shape[1:])
        return grad_ND.index_copy_(0, index_K, grad_KD), None


def take(h_ND: Tensor, index_K: Tensor) -> Tensor:
    """Return ``h_ND[index_K]`` for distinct indices; backward copies gradients, where that of indexing adds them.

    >>> take(torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([2, 0])).tolist()
    [[3.0], [1.0]]
    """
    return _Take.apply(h_ND, index_K)


#: The most keys for which bfloat16 attention on a CPU is two matrix products, with weights kept for backward.
SHORT = 512


def attend(q_BHQE: Tensor, k_BHKE: Tensor, v_BHKE: Tensor, dropout: float = 0.0) -> Tensor:
    """Compute attention ``softmax(q k^T / sqrt(E)) v`` by torch's fused kernel, except short bfloat16 ones on a CPU.

    For short bfloat16 sequences on a CPU, the fused backward takes 3 to 12 times as long as two matrix products (33 to
    145 tokens, AMX). The products round the logits to bfloat16, as unfused attention under autocast does.

    >>> attend(*(torch.ones(1, 1, 2, 4) for _ in range(3)))[0, 0, 0].tolist()
    [1.0, 1.0, 1.0, 1.0]
    """
    slow = q_BHQE.device.type == "cpu" and q_BHQE.dtype == torch.bfloat16 and q_BHQE.requires_grad
    if not slow or k_BHKE.shape[2] > SHORT:
        return F.scaled_dot_product_attention(q_BHQE, k_BHKE, v_BHKE, dropout_p=dropout)
    weight_BHQK = torch.softmax(q_BHQE * q_BHQE.shape[-1] ** -0.5 @ k_BHKE.transpose(-2, -1), dim=-1)
    return F.dropout(weight_BHQK, dropout) @ v_BHKE


class RaggedBlock(Block):
    """Pre-norm transformer block on the tokens ``[N, D]`` of all samples; attention stays within a sample.

    >>> layout = Layout([torch.tensor([2, 3])])
    >>> RaggedBlock(8, 2)(torch.randn(5, 8), layout).shape
    torch.Size([5, 8])
    """

    def __init__(self, width: int, heads: int, mlp_ratio: float = 4.0, dropout: float = 0.0, eps: float = EPS) -> None:
        super().__init__(width, heads, mlp_ratio, dropout)
        self.norm_1, self.norm_2 = nn.LayerNorm(width, eps), nn.LayerNorm(width, eps)

    def forward(self, h_ND: Tensor, layout: Layout) -> Tensor:  # type: ignore[override]  # tokens of all samples
        h_ND = h_ND + self._drop(self.attend_ragged(self.norm_1(h_ND), layout))
        return h_ND + self._drop(self.mlp(self.norm_2(h_ND)))

    def attend_ragged(self, h_ND: Tensor, layout: Layout) -> Tensor:
        D, p, mixed = h_ND.shape[1], self.dropout if self.training else 0.0, []
        qkv_N3D = self.qkv(h_ND)
        for qkv in layout.split(qkv_N3D):
            q, k, v = qkv.unflatten(2, (3, self.heads, D // self.heads)).permute(2, 0, 3, 1, 4).unbind(0)
            if qkv.shape[1]:
                mixed.append(attend(q, k, v, p).transpose(1, 2).reshape(-1, D))
        return self.out(torch.cat(mixed) if len(mixed) > 1 else mixed[0] if mixed else qkv_N3D[:, :D])


class RoutedBlock(RaggedBlock):
    """:class:`RaggedBlock` with sparse experts instead of its MLP; it also returns the routing of the tokens.

    >>> from descant.modules.moe import TopKRouter
    >>> block = RoutedBlock(8, 2, ExpertLayers(experts=4, router=TopKRouter()).build(8, 32, "gelu"))
    >>> h_ND, routing = block(torch.randn(5, 8), Layout([torch.tensor([2, 3])]))
    >>> h_ND.shape, routing.expert.shape
    (torch.Size([5, 8]), torch.Size([5, 2]))
    """

    def __init__(self, width: int, heads: int, moe: MoELayer, dropout: float = 0.0) -> None:
        super().__init__(width, heads, 1.0, dropout)
        del self.mlp
        self.moe = moe

    def forward(  # type: ignore[override]  # also takes marks and returns the routing
        self, h_ND: Tensor, layout: Layout, marks: Marks = UNMARKED
    ) -> tuple[Tensor, Routing]:
        h_ND = h_ND + self._drop(self.attend_ragged(self.norm_1(h_ND), layout))
        y_ND, routing = self.moe(self.norm_2(h_ND), marks)
        return h_ND + self._drop(y_ND), routing


class Trunk(Tower):
    """ViT encoder over ragged tokens, ``[N, D] -> [B + N, D]``: ``h = norm(block_n(... block_1([cls; tokens])))``
    within each sample.

    Each sample begins with one global token (timm's class token). As a registered tower of the recipe, the encoder can
    be adapted, checkpointed, compiled and sharded.

    Args:
        width: D.
        depth: number of blocks.
        heads: number of attention heads.
        mlp_ratio: hidden width of the MLP, divided by D.
        dropout: probability on the attention weights and on both branches of a block.
        weights: a local file of a plain timm ViT (safetensors, or torch's, loaded without running code). Its blocks,
            norm and class token are read; patches and positions belong to the adapters.
        experts: which blocks have sparse experts instead of their MLP; none if not given. The kind of a token is its
            group: 0 for global tokens, then one per modality.

    >>> layout = Layout([torch.tensor([1, 1]), torch.tensor([2, 3])])  # global tokens, and five of a modality
    >>> Trunk(width=8, depth=1, heads=2)(torch.randn(5, 8), layout).h_BTD.shape
    torch.Size([7, 8])
    """

    def __init__(
        self,
        width: int = 192,
        depth: int = 12,
        heads: int = 3,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
        weights: Path | None = None,
        experts: ExpertLayers | None = None,
    ) -> None:
        self.arguments = record_arguments(locals())
        super().__init__()
        self.row_tracker = RowTracker()
        checked_heads(width, heads)
        self.width, self.heads, self.depth, self.mlp_ratio = width, heads, depth, mlp_ratio
        self.cls_D = nn.Parameter(torch.randn(width) * 0.02)
        self.experts = experts
        if experts is not None:
            experts.require(depth)
        self.layers = nn.ModuleList(self._block(i, dropout) for i in range(depth))
        self.norm = nn.LayerNorm(width, EPS)
        if weights is not None:
            state = {k: v for k, v in from_timm(read_weights(weights)).items() if not k.startswith(OUTSIDE)}
            load_exactly(self, state, weights, f"a ViT of width {width} and depth {depth}")

    def _block(self, layer: int, dropout: float) -> RaggedBlock:
        if self.experts is None or not self.experts.at(layer):
            return RaggedBlock(self.width, self.heads, self.mlp_ratio, dropout)
        moe = self.experts.build(self.width, int(self.width * self.mlp_ratio), "gelu")
        return RoutedBlock(self.width, self.heads, moe, dropout)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | Layout | None = None,
        task_B: Tensor | None = None,
        routings: list[Routing] | None = None,
    ) -> Tokens:
        """Encode global tokens and ``x``.

        Args:
            x: ``[N, D]``, tokens with positions of all samples, group by group; or dense ``[B, K, D]``.
            mask: the layout of one global token per sample and the groups; for dense ``x``, a bool ``[B, K]`` or None.
                Masked tokens are not computed and are zero in the output, which has the shape of ``x``, without global
                tokens.
            task_B: int64, the task of each sample, for routers of experts.
            routings: a list to which each block with experts appends its routing.
        """
        if isinstance(mask, Layout):
            sizes = mask.count_SB.sum(dim=1).tolist()
            groups = [self.cls_D.to(x.dtype).expand(sizes[0], -1), *x.split(sizes[1:])]
            h_MD = mask.join(groups)
            with self.row_tracker.select(mask.rows):
                h_MD = self.norm(self._blocks(h_MD, mask, task_B, routings))
            h_MD = torch.cat(mask.part(h_MD))
            return Tokens(h_MD, torch.ones(len(h_MD), dtype=torch.bool, device=h_MD.device))
        host_BK = None if mask is None else host_copy(mask)
        mask = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if mask is None else mask
        count_B = torch.full((len(x),), x.shape[1]) if host_BK is None else host_BK.sum(dim=1)
        layout = Layout([torch.ones_like(count_B), count_B], device=x.device)
        if host_BK is None or bool(host_BK.all()):
            h_MD = self(x.flatten(0, 1), layout, task_B, routings).h_BTD
            return Tokens(h_MD[len(x) :].view(x.shape), mask)
        at_N = to_device(host_BK.flatten().nonzero()[:, 0], x.device)
        h_MD = self(x.flatten(0, 1)[at_N], layout, task_B, routings).h_BTD
        h_ND = h_MD.new_zeros(len(x) * x.shape[1], x.shape[2]).index_copy(0, at_N, h_MD[len(x) :])
        return Tokens(h_ND.view(x.shape), mask)

    def _blocks(self, h_MD: Tensor, layout: Layout, task_B: Tensor | None, routings: list[Routing] | None) -> Tensor:
        marks, routed = UNMARKED if self.experts is None else _marks(layout, task_B, h_MD.device), []
        for layer in self.layers:
            if isinstance(layer, RoutedBlock):
                h_MD, routing = layer(h_MD, layout, marks)
                routed.append((layer.moe.router, routing))
            else:
                h_MD = layer(h_MD, layout)
        if self.training and torch.is_grad_enabled():
            observe(routed)
        if routings is not None:
            routings += [routing for _, routing in routed]
        return h_MD


def _marks(layout: Layout, task_B: Tensor | None, device: torch.device) -> Marks:
    """Return kind and task of tokens in memory order."""
    kind_M, row_M = to_device(layout.kinds, device), to_device(layout.rows, device)
    return Marks(kind_M, None if task_B is None else derive(lambda task, row: task[row], task_B, row_M))


#: Keys of a timm ViT that the trunk does not have.
OUTSIDE = ("patch_embed.", "pos_embed", "head.", "fc_norm.", "head_dist.")
#: Name of a module inside a block of the trunk -> its name in a timm ViT.
TIMM_NAMES = {
    "norm_1": "norm1",
    "norm_2": "norm2",
    "qkv": "attn.qkv",
    "out": "attn.proj",
    "mlp.0": "mlp.fc1",
    "mlp.2": "mlp.fc2",
}


def from_timm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the keys of a timm ViT's state dict to the trunk's; other keys are unchanged."""
    to_ours = {f"{timm}.": f"{ours}." for ours, timm in TIMM_NAMES.items()}
    named = {rename_key(k, "blocks.", "layers.", to_ours): v for k, v in state.items() if k != "cls_token"}
    return named | ({"cls_D": state["cls_token"].flatten()} if "cls_token" in state else {})


def rename_key(key: str, before: str, after: str, names: Mapping[str, str]) -> str:
    """Rename the key of a block's parameter: the prefix of the blocks, and the beginning of the rest by ``names``."""
    if not key.startswith(before):
        return key
    number, _, rest = key.removeprefix(before).partition(".")
    for old, new in names.items():
        if rest.startswith(old):
            rest = new + rest.removeprefix(old)
            break
    return f"{after}{number}.{rest}"
