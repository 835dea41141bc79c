"""Layers of a language model on one token per row, as generation needs them: few operations on plain weights.

Letters: S rows, M rows of experts, D width, H heads, K key heads, E width of a head, O outputs of a layer, V
vocabulary; for experts, E experts, N padded rows of each, K slots of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from descant.modules.language.depths import DepthLayer
from descant.modules.language.model import CausalLM, Layer, apply_rope
from descant.modules.moe import Marks, ModalityLinear, MoELayer, Routing, SwiGLUExperts, TopKRouter
from descant.modules.moe.modality_linear import project_by_kind
from descant.modules.moe.routing import top_k

#: Tensors of at most this many numbers are copied where that is faster than indirection.
SMALL = 1 << 20
#: The most rows on a CPU whose experts are found in Python; the largest ratio of the experts' padded rows to slots.
FEW, PADDED = 128, 4
EXACT = (torch.float32, torch.float64)


def require_causal(lm: CausalLM) -> None:
    """Raise ValueError if a router, in its present mode, also decides by later tokens, which do not exist yet."""
    for depth, layer in zip(lm.layers, lm.blocks(), strict=True):
        if isinstance(depth, DepthLayer) and not depth.causal:
            raise ValueError(
                "generation: MixtureOfDepths takes tokens by those that come later; give it auxiliary: CausalAux, with "
                "the model in eval mode"
            )
        if layer.moe is not None and layer.moe.group is not None:
            raise ValueError(
                "generation: experts are split over ranks; load whole_experts(model) into a model of one rank"
            )
        if layer.moe is not None and not layer.moe.router.causal:
            name = type(layer.moe.router).__name__
            raise ValueError(
                f"generation: {name} routes by tokens that come later; give it auxiliary: CausalAux, with the model in "
                "eval mode, or take TopKRouter"
            )


class DecodeLayer:
    """Layer on one token per row, ``[S, D]``.

    Plain layers are computed from their weights: at this size, calling modules takes longer than the products. Small
    weights are transposed once and multiplied by those of the preceding norm. Replaced parts, such as adapters, are
    called, and so are experts. With ``text``, the new tokens are of kind 0, which needs no visual expert.
    """

    def __init__(self, layer: Layer, text: bool = True) -> None:
        self.layer, self.moe = layer, layer.moe
        parts = [layer.qkv, layer.out, layer.norm_1, layer.norm_2]
        parts += [layer.gate_up, layer.down] if self.moe is None else []
        plain = (nn.Linear, nn.RMSNorm, ModalityLinear) if text else (nn.Linear, nn.RMSNorm)
        self.plain = all(type(part) in plain and not part._forward_hooks for part in parts)
        if self.plain:
            self.norm_1, self.qkv = _fold_norm(layer.norm_1, layer.qkv)
            self.out = _transpose(layer.out.weight)
            if self.moe is None:
                self.norm_2, self.gate_up = _fold_norm(layer.norm_2, layer.gate_up)
                self.down = _transpose(layer.down.weight)
            else:
                self.norm_2 = _Norm(layer.norm_2, layer.norm_2.weight)
                self.experts = DecodeExperts(self.moe)

    def split_qkv(self, h_SD: Tensor, rope: Tensor, marks: Marks) -> tuple[Tensor, Tensor, Tensor]:
        """Project to ``q_SHE``, ``k_SKE`` and ``v_SKE``. ``rope``: complex ``[S, 1, E / 2]``."""
        layer = self.layer
        x = (
            torch.mm(self.norm_1(h_SD), self.qkv)
            if self.plain
            else project_by_kind(layer.qkv, layer.norm_1(h_SD), marks)
        )
        qk, v = x.view(len(x), -1, layer.head_width).split([layer.heads + layer.key_heads, layer.key_heads], dim=1)
        q, k = apply_rope(qk, rope).split([layer.heads, layer.key_heads], dim=1)
        return q, k, v

    def residual_mlp(self, h_SD: Tensor, attended_SD: Tensor, marks: Marks) -> Tensor:
        if not self.plain:
            return self.layer.residual_mlp(h_SD, attended_SD, marks)[0]
        h_SD = torch.addmm(h_SD, attended_SD, self.out)
        if self.moe is not None:
            return self.experts(h_SD, self.norm_2(h_SD), marks)
        gate, up = torch.mm(self.norm_2(h_SD), self.gate_up).chunk(2, dim=1)
        return torch.addmm(h_SD, F.silu(gate).mul_(up), self.down)


class DecodeExperts:
    """Experts on one token per row: ``h + moe(x)`` with few rows for each expert, on transposed weights.

    On a CPU, few rows are padded to the same number for each expert and computed in two batched products, unless one
    expert has far more rows than the others. Otherwise each expert's rows are a separate product.
    """

    def __init__(self, moe: MoELayer) -> None:
        self.moe, self.router, experts = moe, moe.router, moe.experts
        self.plain = isinstance(experts, SwiGLUExperts) and not experts.separate and moe.shared is None
        if self.plain:
            (gate_up,), (down,), *_ = experts.weights(lambda p: [p])
            self.gate_up, self.down = (_transpose_weights(p) for p in (gate_up, down))
            self.each = self.gate_up.unbind(0), self.down.unbind(0)
        self.gate = _transpose(self.router.gate_ED) if type(self.router) is TopKRouter else None

    def __call__(self, h_SD: Tensor, x_SD: Tensor, marks: Marks) -> Tensor:
        if not self.plain:
            return h_SD + self.moe(x_SD, marks)[0]
        if not x_SD.is_cpu or len(x_SD) > FEW:
            return self._compute_sorted(h_SD, x_SD, self.router(x_SD, marks))
        E = self.router.experts
        exact = x_SD.dtype in EXACT and not torch.is_autocast_enabled("cpu")
        if self.gate is not None and exact and self.gate.dtype == x_SD.dtype and marks.valid is None:
            router = cast(TopKRouter, self.router)
            bias_E = None if router.bias_rate is None else router.bias_E
            expert_SK, weight_SK, _ = top_k(torch.mm(x_SD, self.gate), router.k, router.norm, bias_E)
        else:
            routing = self.router(x_SD, marks)
            runs_SK = routing.runs(E)
            expert_SK, weight_SK = routing.expert.where(runs_SK, E), routing.weight.where(runs_SK, 0.0)
        row, place, most = padded_slots(expert_SK.tolist(), E)
        if most == 0:
            return h_SD
        if E * most > PADDED * expert_SK.numel():
            return self._compute_sorted(h_SD, x_SD, Routing(expert_SK, weight_SK, expert_SK < E))
        x_END = x_SD.index_select(0, torch.tensor(row)).view(E, most, -1)
        gate, up = torch.bmm(x_END, self.gate_up).chunk(2, dim=2)
        y_MD = torch.bmm(F.silu(gate).mul_(up), self.down).flatten(0, 1).index_select(0, torch.tensor(place))
        y_SKD = y_MD.view(*expert_SK.shape, -1)
        return torch.baddbmm(h_SD.unsqueeze(1), weight_SK.to(y_SKD.dtype).unsqueeze(1), y_SKD).squeeze(1)

    def _compute_sorted(self, h_SD: Tensor, x_SD: Tensor, routing: Routing) -> Tensor:
        segments, order_M, token_M = self.moe.sort_slots(routing)
        x_MD, (gate_up, down) = x_SD.index_select(0, token_M), self.each
        gate, up = _products(x_MD, gate_up, segments.counts).chunk(2, dim=1)
        y_MD = _products(F.silu(gate).mul_(up), down, segments.counts)
        weight_M = routing.weight.flatten().index_select(0, order_M).to(y_MD.dtype)
        return h_SD.index_add(0, token_M, y_MD.mul_(weight_M.unsqueeze(1)))


def padded_slots(expert_SK: Sequence[Sequence[int]], experts: int) -> tuple[list[int], list[int], int]:
    """Pad each expert's rows to the same count by row 0: return rows ``[E most]``, the place of each slot, and most.

    Slots with expert number E compute nothing; their place is 0.

    >>> padded_slots([[1, 0], [1, 2]], 2)
    ([0, 0, 0, 1], [2, 0, 3, 0], 2)
    """
    rows: list[list[int]] = [[] for _ in range(experts)]
    for row, chosen in enumerate(expert_SK):
        for e in chosen:
            if e < experts:
                rows[e].append(row)
    most = max(map(len, rows))
    at, place = [e * most for e in range(experts)], list[int]()
    for chosen in expert_SK:
        for e in chosen:
            place.append(at[e] if e < experts else 0)
            if e < experts:
                at[e] += 1
    return [row for some in rows for row in (*some, *[0] * (most - len(some)))], place, most


def _products(x_MI: Tensor, weights: Sequence[Tensor], counts: Sequence[int]) -> Tensor:
    """Multiply sorted rows by the weights ``[I, O]`` of their experts."""
    parts = [torch.mm(x, w) for x, w in zip(x_MI.split(counts), weights, strict=True) if len(x)]
    return torch.cat(parts) if parts else x_MI.new_zeros(0, weights[0].shape[1])


def _transpose_weights(w_EOI: Tensor) -> Tensor:
    return w_EOI.transpose(1, 2).contiguous() if w_EOI[0].numel() <= SMALL else w_EOI.transpose(1, 2)


def _transpose(w_OD: Tensor) -> Tensor:
    return w_OD.t().contiguous() if w_OD.numel() <= SMALL else w_OD.t()


def _fold_norm(norm: nn.RMSNorm, linear: nn.Linear) -> tuple[_Norm, Tensor]:
    """Return a norm and the transposed weights ``[D, O]`` of the layer after it; small ones include the norm's."""
    if linear.weight.numel() > SMALL:
        return _Norm(norm, norm.weight), linear.weight.t()
    return _Norm(norm, None), _transpose(linear.weight * (norm.weight * norm.normalized_shape[0] ** 0.5))


class _Norm:
    """RMSNorm in few operations: ``w sqrt(D) x / hypot(|x|, sqrt(D eps))``, or the same without w and sqrt(D)."""

    def __init__(self, norm: nn.RMSNorm, weight: Tensor | None) -> None:
        size = norm.normalized_shape[0]
        self.weight = None if weight is None else weight * size**0.5
        self.least = norm.weight.new_tensor((size * (norm.eps or 0.0)) ** 0.5)

    def __call__(self, x_SD: Tensor) -> Tensor:
        size_S1 = torch.linalg.vector_norm(x_SD, dim=1, keepdim=True)
        y_SD = x_SD / torch.hypot(size_S1, self.least)
        return y_SD if self.weight is None else y_SD.mul_(self.weight)


class DecodeHead:
    """Head from last hidden states to logits, ``[S, D] -> [S, V]``; plain parts work as in :class:`DecodeLayer`."""

    def __init__(self, lm: CausalLM) -> None:
        self.lm = lm
        parts = lm.norm, lm.head
        self.plain = all(type(part) in (nn.Linear, nn.RMSNorm) and not part._forward_hooks for part in parts)
        if self.plain:
            self.norm, self.w = _fold_norm(*parts)

    def __call__(self, h_SD: Tensor) -> Tensor:
        return torch.mm(self.norm(h_SD), self.w) if self.plain else self.lm.logits(self.lm.norm(h_SD))
