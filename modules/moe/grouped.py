"""Expert MLPs on rows that are sorted by expert: a loop over segments on CPUs, one grouped kernel on CUDA.

Letters: M rows, sorted by expert; E experts, D width, Z width before the activation, F after it, R rows of a block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from descant.modules.core.host import host_copy

#: Rows of a block on a CPU, few enough that the activations between an MLP's two products stay in the cache.
BLOCK = 512


class Segments:
    """Segments of rows by expert: offsets on the device for a grouped kernel, or counts on the host for a loop.

    Args:
        count_E: int64 ``[E]``. fused: whether a grouped kernel uses them, which needs no counts on the host.
    """

    def __init__(self, count_E: Tensor, fused: bool) -> None:
        self.offset_E = count_E.cumsum(dim=0).to(torch.int32) if fused else None
        self.counts: list[int] = [] if fused else host_copy(count_E).tolist()

    def rows(self, order_M: Tensor) -> Tensor:
        """Return the rows to compute: those of experts, or all rows if only the device knows the number."""
        return order_M if self.offset_E is not None else order_M[: sum(self.counts)]

    def blocks(self) -> Iterator[tuple[int, int, int, bool]]:
        """Yield blocks of rows: expert, first row, row after the last, and whether it is the expert's first block."""
        begin = 0
        for e, count in enumerate(self.counts):
            for at in range(begin, begin + count, BLOCK):
                yield e, at, min(at + BLOCK, begin + count), at == begin
            begin += count


def fusible(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether torch has a grouped kernel here: bfloat16 on CUDA of compute capability 8 or more."""
    return (
        x.is_cuda
        and dtype == torch.bfloat16
        and hasattr(F, "grouped_mm")
        and torch.cuda.get_device_capability(x.device) >= (8, 0)
    )


class SwiGLU:
    """Activation ``silu(gate) * up`` of ``[gate, up]``."""

    @staticmethod
    def forward(z_RZ: Tensor) -> Tensor:
        gate, up = z_RZ.chunk(2, dim=1)
        return F.silu(gate) * up

    @staticmethod
    def backward(grad_RF: Tensor, z_RZ: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradient of z, and the activations, recomputed."""
        (gate, up), grad_RZ = z_RZ.chunk(2, dim=1), torch.empty_like(z_RZ)
        to_gate, to_up = grad_RZ.chunk(2, dim=1)
        silu = F.silu(gate)
        torch.mul(grad_RF, silu, out=to_up)
        to_gate.copy_(torch.ops.aten.silu_backward(grad_RF * up, gate))
        return grad_RZ, silu.mul_(up)


class GELU:
    """Activation ``gelu(z)``."""

    @staticmethod
    def forward(z_RZ: Tensor) -> Tensor:
        return F.gelu(z_RZ)

    @staticmethod
    def backward(grad_RF: Tensor, z_RZ: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradient of z, and the activations, recomputed."""
        return torch.ops.aten.gelu_backward(grad_RF, z_RZ), F.gelu(z_RZ)


class Weights(NamedTuple):
    """Weights of E experts: matrices, as one tensor ``[E, out, in]`` or as E ``[out, in]``, and biases ``[E, out]``."""

    inward: Sequence[Tensor]
    outward: Sequence[Tensor]
    inward_bias: Tensor | None = None
    outward_bias: Tensor | None = None


def expert_mlp(x_MD: Tensor, weights: Weights, activation: type[SwiGLU | GELU], segments: Segments) -> Tensor:
    """Compute ``y_m = W2_e act(W1_e x_m + b1_e) + b2_e`` for each row m of segment e, with that expert's weights only.

    An expert without rows gets a gradient of zeros.

    >>> one_E11 = torch.tensor([[[1.0]], [[2.0]]])
    >>> weights = Weights([one_E11], [one_E11])
    >>> expert_mlp(torch.full((3, 1), 9.0), weights, GELU, Segments(torch.tensor([1, 2]), fused=False)).tolist()
    [[9.0], [36.0], [36.0]]
    """
    if segments.offset_E is None:
        several, (inward, outward, *biases) = len(weights.inward), weights
        y_MD: Tensor = _Loop.apply(segments, activation, several, x_MD, *biases, *inward, *outward)
        return y_MD
    z_MZ = _grouped_product(_clear(x_MD, segments.offset_E), weights.inward, weights.inward_bias, segments.offset_E)
    return _grouped_product(activation.forward(z_MZ), weights.outward, weights.outward_bias, segments.offset_E)


def _grouped_product(x_MI: Tensor, weights: Sequence[Tensor], bias_EO: Tensor | None, offset_E: Tensor) -> Tensor:
    w_EOI = weights[0] if weights[0].ndim == 3 else torch.stack(list(weights))
    y_MO = F.grouped_mm(x_MI, w_EOI.transpose(1, 2), offs=offset_E)
    if bias_EO is not None:
        expert_M = torch.searchsorted(offset_E, torch.arange(len(x_MI), device=x_MI.device), right=True)
        y_MO = y_MO + bias_EO[expert_M.clamp(max=len(bias_EO) - 1)]
    return _clear(y_MO, offset_E)


def _clear(x_MD: Tensor, offset_E: Tensor) -> Tensor:
    """Set rows after the last expert to zero, in values and gradients, because a grouped kernel does not write them."""
    here_M1 = (torch.arange(len(x_MD), device=x_MD.device) < offset_E[-1])[:, None]
    return torch.where(here_M1, x_MD, torch.zeros((), dtype=x_MD.dtype, device=x_MD.device))


class _Loop(torch.autograd.Function):
    """Loop over blocks through both products, into slices of one result; backward needs no activations but x and z."""

    @staticmethod
    def forward(
        ctx: Any,
        segments: Segments,
        activation: type[SwiGLU | GELU],
        several: int,
        x_MD: Tensor,
        bias_EZ: Tensor | None,
        bias_ED: Tensor | None,
        *matrices: Tensor,
    ) -> Tensor:
        inward, outward = _pieces(matrices[:several]), _pieces(matrices[several:])
        learns, y_MD = any(ctx.needs_input_grad), x_MD.new_empty(len(x_MD), outward[0].shape[0])
        z_MZ = x_MD.new_empty(len(x_MD) if learns else 0, inward[0].shape[0])
        for e, a, b, _ in segments.blocks():
            z = _linear(x_MD[a:b], inward[e], bias_EZ, e, z_MZ[a:b] if learns else None)
            _linear(activation.forward(z), outward[e], bias_ED, e, y_MD[a:b])
        ctx.save_for_backward(x_MD, z_MZ, *matrices)
        ctx.segments, ctx.activation, ctx.several = segments, activation, several
        return y_MD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_MD: Tensor) -> tuple[Tensor | None, ...]:
        x_MD, z_MZ, *matrices = ctx.saved_tensors
        _, _, _, to_x, to_bias_z, to_bias_y, *_ = ctx.needs_input_grad
        learns = [
            any(part) for part in (ctx.needs_input_grad[6 : 6 + ctx.several], ctx.needs_input_grad[6 + ctx.several :])
        ]
        inward, outward = _pieces(matrices[: ctx.several]), _pieces(matrices[ctx.several :])
        grad_x, E = torch.empty_like(x_MD) if to_x else None, len(inward)
        grad_bias_z, grad_bias_y = x_MD.new_zeros(E, inward[0].shape[0]), x_MD.new_zeros(E, outward[0].shape[0])
        grads = [
            [torch.empty_like(w) for w in part] if learns[i] else [None] * len(part)
            for i, part in enumerate((matrices[: ctx.several], matrices[ctx.several :]))
        ]
        into = [_pieces(part) if learns[i] else [] for i, part in enumerate(grads)]
        for e, a, b, first in ctx.segments.blocks():
            grad_y = grad_MD[a:b]
            grad_z, act = ctx.activation.backward(torch.mm(grad_y, outward[e]), z_MZ[a:b])
            for i, (g, values) in enumerate(((grad_z, x_MD[a:b]), (grad_y, act))):
                if learns[i]:
                    torch.addmm(into[i][e], g.t(), values, beta=0 if first else 1, out=into[i][e])
            if to_bias_z:
                grad_bias_z[e] += grad_z.sum(dim=0)
            if to_bias_y:
                grad_bias_y[e] += grad_y.sum(dim=0)
            if grad_x is not None:
                torch.mm(grad_z, inward[e], out=grad_x[a:b])
        for e, count in enumerate(ctx.segments.counts):
            for part in into if count == 0 else []:
                if part:
                    part[e].zero_()
        biases = (grad_bias_z if to_bias_z else None, grad_bias_y if to_bias_y else None)
        return None, None, None, grad_x, *biases, *grads[0], *grads[1]


def _linear(x: Tensor, weight: Tensor, bias_EO: Tensor | None, e: int, out: Tensor | None) -> Tensor:
    if bias_EO is None:
        return torch.mm(x, weight.t(), out=out)
    return torch.addmm(bias_EO[e], x, weight.t(), out=out)


def _pieces(weights: Sequence[Any]) -> Sequence[Tensor]:
    return weights[0].unbind(0) if weights[0].ndim == 3 else weights
