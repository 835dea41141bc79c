"""Synchronized batch norm: statistics over the rows of all ranks, on any device and backend.

Letters: R ranks, B rows of this rank, C channels.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

from descant.modules.core.compat.layers import BatchNorm
from descant.modules.core.ranks import awaited_total, gather, rank, world


def synchronize(module: nn.Module) -> int:
    """Make every batch norm of a module use the rows of all ranks in train mode; return their number.

    In place: parameters, buffers and names stay. Unlike ``torch.nn.SyncBatchNorm`` it runs on CPUs too and converts
    subclasses with their own forward (timm's with an activation). Evaluation and a single rank are unchanged.

    >>> net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    >>> synchronize(net), synchronize(net), type(net[1]).__name__
    (1, 0, 'SynchronizedBatchNorm1d')
    """
    plain = [m for m in module.modules() if isinstance(m, BatchNorm) and not getattr(type(m), "_synchronized", False)]
    for norm in plain:
        cls = type(norm)
        if not isinstance(norm, nn.SyncBatchNorm):
            members = {"forward": _forward(cls.forward), "_synchronized": True, "counted": True}
            norm.__class__ = type(f"Synchronized{cls.__name__}", (cls,), members)
    return len(plain)


def batch_norm(
    x: Tensor,
    running_mean_C: Tensor | None,
    running_var_C: Tensor | None,
    weight_C: Tensor | None,
    bias_C: Tensor | None,
    momentum: float,
    eps: float,
    counted: bool = True,
) -> Tensor:
    """Normalize over the rows of all ranks: ``(x - mean_C) / sqrt(var_C + eps) * weight_C + bias_C``.

    One exchange gathers count, mean and sum of squared deviations of each rank (and backward needs one more). They are
    combined by Chan, Golub and LeVeque 1979. Running statistics move by ``momentum``, as in torch.

    Args:
        x: ``[B, C, ...]``; ranks may have different numbers of rows. Statistics are float32 or finer.
        counted: whether this rank's rows are part of the statistics; they are always normalized.

    >>> x_BC = torch.tensor([[1.0], [3.0]])
    >>> batch_norm(x_BC, None, None, None, None, 0.1, 1e-12).tolist()
    [[-1.0], [1.0]]
    """
    axes = [0, *range(2, x.ndim)]
    with torch.no_grad():
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        mean_C = wide.mean(axes)
        squares_C = (wide - _over(mean_C, x)).square_().sum(axes)
        rows = torch.full_like(mean_C[:1], x.numel() // x.shape[1] if counted else 0)
        gathered = gather(torch.cat([rows, mean_C, squares_C])[None])
        rows_R1, mean_RC, squares_RC = gathered[:, :1], *gathered[:, 1:].chunk(2, dim=1)
        seen = (rows_R1.sum() > 0).to(mean_C.dtype)
        if not counted:  # if no rank counts, each uses its own statistics
            alone_R1 = torch.zeros_like(rows_R1)
            alone_R1[rank()] = x.numel() // x.shape[1]
            rows_R1 = torch.where(seen > 0, rows_R1, alone_R1)
        total = rows_R1.sum()
        mean_C = (rows_R1 * mean_RC).sum(0) / total
        squares_C = (squares_RC * (rows_R1 > 0)).sum(0) + (rows_R1 * (mean_RC - mean_C).square()).sum(0)
        if running_mean_C is not None and running_var_C is not None:
            var_C = squares_C / (total - 1).clamp(min=1)
            running_mean_C.lerp_(mean_C.to(running_mean_C.dtype), (momentum * seen).to(running_mean_C.dtype))
            running_var_C.lerp_(var_C.to(running_var_C.dtype), (momentum * seen).to(running_var_C.dtype))
    weight_C = torch.ones_like(mean_C) if weight_C is None else weight_C.to(mean_C.dtype)
    bias_C = torch.zeros_like(mean_C) if bias_C is None else bias_C.to(mean_C.dtype)
    share = (1 if counted else 1 - seen) / total  # weight of one of these rows in the statistics
    y: Tensor = _Normalize.apply(x, weight_C, bias_C, mean_C, squares_C / total, share, seen, eps)
    return y


def _over(a_C: Tensor, x: Tensor) -> Tensor:
    return a_C.view(1, -1, *[1] * (x.ndim - 2))


class _Normalize(torch.autograd.Function):
    """``y = z w_C + b_C`` with ``z = (x - mean_C) s_C``, ``s_C = 1 / sqrt(var_C + eps)``, by torch's kernels.

    Mean and variance are functions of x, too: ``dx = w_C s_C (dy - share (sum dy + z sum (dy z)))``, with the sums over
    all ranks, or over this rank if each uses its own statistics (``seen`` 0).
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight_C: Tensor,
        bias_C: Tensor,
        mean_C: Tensor,
        var_C: Tensor,
        share: Tensor,
        seen: Tensor,
        eps: float,
    ) -> Tensor:
        ctx.save_for_backward(x, weight_C, mean_C, var_C, share, seen)
        ctx.eps = eps
        return F.batch_norm(x, mean_C, var_C, weight_C, bias_C, False, 0.0, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_C, mean_C, var_C, share, seen = ctx.saved_tensors
        backward: Any = torch.ops.aten.native_batch_norm_backward
        fixed = (weight_C, mean_C, var_C, None, None, False, ctx.eps, [True] * 3)  # as if statistics were constants
        grad_x, grad_weight_C, grad_bias_C = backward(grad, x, *fixed)
        sums = torch.cat([grad_weight_C, grad_bias_C]).to(mean_C.dtype)
        weighted_C, plain_C = torch.where(seen > 0, awaited_total(sums.clone()), sums).chunk(2)
        scale_C = torch.rsqrt(var_C + ctx.eps)
        factor_C = -share * scale_C * weight_C
        grad_x += F.batch_norm(x, mean_C, var_C, factor_C * weighted_C, factor_C * plain_C, False, 0.0, ctx.eps)
        return grad_x, grad_weight_C, grad_bias_C, None, None, None, None, None


_SIGNATURE = inspect.signature(F.batch_norm)


class _OfAllRanks(TorchFunctionMode):
    """Mode that replaces ``F.batch_norm`` by :func:`batch_norm`, whichever subclass calls it."""

    def __init__(self, counted: bool) -> None:
        super().__init__()
        self.counted = counted

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.batch_norm:
            return func(*args, **(kwargs or {}))
        bound = _SIGNATURE.bind(*args, **(kwargs or {}))
        bound.apply_defaults()
        x, mean_C, var_C, weight_C, bias_C, _, momentum, eps = bound.args
        return batch_norm(x, mean_C, var_C, weight_C, bias_C, momentum, eps, self.counted)


def _forward(plain: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def forward(self: Any, x: Tensor) -> Tensor:
        if not self.training or world() == 1:
            return plain(self, x)
        with _OfAllRanks(self.counted):
            return plain(self, x)

    return forward
