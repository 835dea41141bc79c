"""Token log-probabilities without a full matrix of logits. Letters: N tokens, D width, V vocabulary."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from descant.modules.core.dtype import promote
from descant.modules.core.recomputation import forward_arithmetic

#: Number of logits computed at once.
CELLS = 1 << 22
#: The fewest rows of a block. Each block reads all of W. With fewer rows than an accelerator has FLOPs per byte of its
#: memory (some 300 for an H100 in bfloat16), it would wait for W instead of computing.
ROWS = 512


def log_probabilities(h_ND: Tensor, w_VD: Tensor, token_N: Tensor, temperature: float = 1.0) -> Tensor:
    """Compute ``log softmax(h_n W^T / temperature)[token_n]``, float32 ``[N]`` (float64 of float64).

    Gradients go to h and W. About four million logits, or those of 512 tokens, are computed at a time and recomputed in
    backward, so memory does not grow with N.

    >>> h_ND, w_VD = torch.randn(5, 4), torch.randn(9, 4)
    >>> wanted = (h_ND @ w_VD.T).log_softmax(dim=1)[:, 3]
    >>> torch.allclose(log_probabilities(h_ND, w_VD, torch.full((5,), 3)), wanted, atol=1e-6)
    True
    """
    return _LogProbabilities.apply(h_ND, w_VD, token_N, temperature)


def _scaled_logits(h_nD: Tensor, w_VD: Tensor, temperature: float) -> Tensor:
    with forward_arithmetic():
        x_nV = promote(h_nD @ w_VD.T)
    return x_nV.div_(temperature) if temperature != 1 else x_nV


class _LogProbabilities(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h_ND: Tensor, w_VD: Tensor, token_N: Tensor, temperature: float) -> Tensor:
        rows = max(CELLS // len(w_VD), ROWS)
        parts, totals = [], []
        for h_nD, token_n in zip(h_ND.split(rows), token_N.split(rows), strict=True):
            x_nV = _scaled_logits(h_nD, w_VD, temperature)
            own_n1, max_n1 = x_nV.gather(1, token_n[:, None]), x_nV.amax(dim=1, keepdim=True)
            # not torch.logsumexp, which would make a second matrix of this size
            total_n = x_nV.sub_(max_n1).exp_().sum(dim=1).log_().add_(max_n1[:, 0])
            parts.append(own_n1[:, 0] - total_n)
            totals.append(total_n)
        ctx.save_for_backward(h_ND, w_VD, token_N, torch.cat(totals))
        ctx.temperature = temperature
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        h_ND, w_VD, token_N, total_N = ctx.saved_tensors
        rows = max(CELLS // len(w_VD), ROWS)
        needs_h, needs_w = ctx.needs_input_grad[:2]
        grad_h = torch.empty_like(h_ND) if needs_h else None
        grad_w = torch.zeros_like(w_VD) if needs_w else None
        for first in range(0, len(h_ND), rows):
            at = slice(first, first + rows)
            x_nV = _scaled_logits(h_ND[at], w_VD, ctx.temperature).sub_(total_N[at, None]).exp_()
            g_n = grads[0][at] / ctx.temperature
            x_nV.mul_(-g_n[:, None])
            x_nV.scatter_add_(1, token_N[at, None], g_n[:, None].to(x_nV))
            x_nV = x_nV.to(h_ND)
            if grad_h is not None:
                grad_h[at] = x_nV @ w_VD
            if grad_w is not None:
                grad_w.addmm_(x_nV.T, h_ND[at])
        return grad_h, grad_w, None, None
