"""Matrix products of sorted rows with the weights of their experts: one of each segment, or one grouped kernel.

Letters: M rows, sorted by expert; E experts, I and O widths before and behind.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from descant.modules.core.host import host_copy


class Segments:
    """Rows of each expert: counts on the device, and on the host where a loop needs them.

    ``count_E``: int64 ``[E]``. ``total``: rows that belong to an expert, the first of those that are there.
    """

    def __init__(self, count_E: Tensor, fused: bool) -> None:
        self.fused, self.count_E = fused, count_E
        self.offset_E = count_E.cumsum(dim=0).to(torch.int32) if fused else None
        self.counts: list[int] = [] if fused else host_copy(count_E).tolist()

    def rows(self, order_M: Tensor) -> Tensor:
        """The rows that are computed: those of experts, or where only the device knows their number, all."""
        return order_M if self.fused else order_M[: sum(self.counts)]

    def clear(self, x_MD: Tensor) -> Tensor:
        """Zeros behind the last expert, in values and in gradients: a fused kernel writes nothing there."""
        if self.offset_E is None:
            return x_MD
        here_M1 = (torch.arange(len(x_MD), device=x_MD.device) < self.offset_E[-1])[:, None]
        return torch.where(here_M1, x_MD, torch.zeros((), dtype=x_MD.dtype, device=x_MD.device))


def fusible(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether torch has a grouped kernel here: bfloat16 on CUDA of compute capability 8 or more."""
    return (
        x.is_cuda
        and dtype == torch.bfloat16
        and hasattr(F, "grouped_mm")
        and torch.cuda.get_device_capability(x.device) >= (8, 0)
    )


def grouped_linear(
    x_MI: Tensor, weights: Sequence[Tensor], segments: Segments, bias_EO: Tensor | None = None
) -> Tensor:
    """``y_m = W_e x_m + b_e`` for the rows m of segment e: no row meets the weights of another expert.

    ``weights``: one tensor ``[E, O, I]``, or E of ``[O, I]``. An expert without rows has a gradient of zeros.

    >>> w_EOI = torch.tensor([[[1.0]], [[10.0]]])
    >>> grouped_linear(torch.ones(3, 1), [w_EOI], Segments(torch.tensor([1, 2]), fused=False)).flatten().tolist()
    [1.0, 10.0, 10.0]
    """
    if segments.offset_E is None:
        y_MO: Tensor = _Loop.apply(segments.counts, x_MI, bias_EO, *weights)
        return y_MO
    w_EOI = weights[0] if weights[0].ndim == 3 else torch.stack(list(weights))
    y_MO = F.grouped_mm(x_MI, w_EOI.transpose(1, 2), offs=segments.offset_E)
    if bias_EO is None:
        return y_MO
    expert_M = torch.searchsorted(segments.offset_E, torch.arange(len(x_MI), device=x_MI.device), right=True)
    return y_MO + bias_EO[expert_M.clamp(max=len(bias_EO) - 1)]


class _Loop(torch.autograd.Function):
    """Products into slices of one result, forward and backward: nothing is concatenated, stacked or added up."""

    @staticmethod
    def forward(ctx: Any, counts: list[int], x_MI: Tensor, bias_EO: Tensor | None, *weights: Tensor) -> Tensor:
        ctx.save_for_backward(x_MI, *weights)
        ctx.counts = counts
        pieces = _pieces(weights)
        y_MO = x_MI.new_empty(len(x_MI), pieces[0].shape[0])
        for e, (x, y) in enumerate(zip(x_MI.split(counts), y_MO.split(counts), strict=True)):
            if not len(x):
                continue
            if bias_EO is None:
                torch.mm(x, pieces[e].t(), out=y)
            else:
                torch.addmm(bias_EO[e], x, pieces[e].t(), out=y)
        return y_MO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_MO: Tensor) -> tuple[Tensor | None, ...]:
        x_MI, *weights = ctx.saved_tensors
        pieces, grads = _pieces(weights), grad_MO.split(ctx.counts)
        to_x, to_bias = (torch.empty_like(x_MI) if ctx.needs_input_grad[1] else None), None
        to_weights: list[Tensor | None] = [None] * len(weights)
        if to_x is not None:
            for piece, grad, into in zip(pieces, grads, to_x.split(ctx.counts), strict=True):
                if len(grad):
                    torch.mm(grad, piece, out=into)
        if ctx.needs_input_grad[2]:
            to_bias = torch.stack([grad.sum(dim=0) for grad in grads])
        if any(ctx.needs_input_grad[3:]):
            to_weights = [torch.empty_like(w) for w in weights]
            for into, grad, x in zip(_pieces(to_weights), grads, x_MI.split(ctx.counts), strict=True):
                torch.mm(grad.t(), x, out=into)  # zeros without rows
        return None, to_x, to_bias, *to_weights


def _pieces(weights: Sequence[Any]) -> Sequence[Tensor]:
    return weights[0].unbind(0) if weights[0].ndim == 3 else weights
