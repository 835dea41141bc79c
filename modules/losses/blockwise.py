"""Sums of InfoNCE and SigLIP over the samples of all ranks, with logits computed block by block.

Letters: B samples on this rank, R rows of one block, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from descant.modules.core.recomputation import forward_arithmetic
from descant.modules.losses.exchange import Blocks, exclusion_mask


def _marks(key_B: Tensor, valid_B: Tensor) -> Tensor:
    """Stack keys and presence into one tensor, so that they are sent together."""
    return torch.stack([key_B, valid_B.to(key_B.dtype)], dim=1)


class _Block(NamedTuple):
    """A block of logits: this rank's rows, their products with the other rows, excluded pairs, the positives' diagonal.

    ``diagonal`` is the offset of the positives, None if the block has none.
    """

    rows: slice
    dot_RB: Tensor
    out_RB: Tensor
    diagonal: int | None


def _blocks(
    a_BD: Tensor, marks_B2: Tensor, other_BD: Tensor, other_B2: Tensor, is_own: bool, exchange: Blocks
) -> Iterator[_Block]:
    (key_B, valid_B), (other_key_B, other_valid_B) = marks_B2.unbind(1), other_B2.unbind(1)
    for rows in exchange.slices(len(a_BD)):
        with forward_arithmetic():
            dot_RB = a_BD[rows] @ other_BD.T
        diagonal = rows.start if is_own else None
        out_RB = exclusion_mask(key_B[rows], valid_B[rows].bool(), other_key_B, other_valid_B.bool(), diagonal)
        yield _Block(rows, dot_RB, out_RB, diagonal)


def log_sums(a_BD: Tensor, b_BD: Tensor, key_B: Tensor, valid_B: Tensor, exchange: Blocks) -> tuple[Tensor, Tensor]:
    """Compute the logarithms of InfoNCE's two denominators over all ranks, ``[B]`` each:

        ab_b = log(e^{a_b.b_b} + sum_g e^{a_b.b_g}),    ba_b = log(e^{b_b.a_b} + sum_g e^{b_b.a_g})

    The sums run over the negatives (:func:`exclusion_mask`). Each product is computed once for both directions, on the
    rank of its row.

    >>> from descant.modules.losses.exchange import Ring
    >>> z, key, valid = torch.eye(2), torch.arange(2), torch.ones(2, dtype=torch.bool)
    >>> [round(v, 4) for v in log_sums(z, z, key, valid, Ring(rows=1))[1].tolist()]  # log(e + 1)
    [1.3133, 1.3133]
    """
    ab_B, ba_B = _LogSums.apply(a_BD, b_BD, key_B, valid_B, exchange)
    return ab_B, ba_B


class _LogSums(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, a_BD: Tensor, b_BD: Tensor, key_B: Tensor, valid_B: Tensor, exchange: Blocks
    ) -> tuple[Tensor, Tensor]:
        lowest, marks_B2 = torch.finfo(a_BD.dtype).min, _marks(key_B, valid_B)
        ab_B = a_BD.new_full((len(a_BD),), lowest)
        carried = [ab_B.clone()]
        for (z_BD, other_B2), ba_B, is_own in exchange.hops([b_BD, marks_B2], carried, lambda x_WB: x_WB.logsumexp(0)):
            for block in _blocks(a_BD, marks_B2, z_BD, other_B2, is_own, exchange):
                logits_RB = block.dot_RB.masked_fill_(block.out_RB, lowest)
                torch.logaddexp(ab_B[block.rows], logits_RB.logsumexp(dim=1), out=ab_B[block.rows])
                torch.logaddexp(ba_B, logits_RB.logsumexp(dim=0), out=ba_B)
        ctx.save_for_backward(a_BD, b_BD, marks_B2, ab_B, carried[0])
        ctx.exchange = exchange
        return ab_B, carried[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_ab_B: Tensor, g_ba_B: Tensor) -> tuple[Tensor | None, ...]:
        a_BD, b_BD, marks_B2, ab_B, ba_B = ctx.saved_tensors
        grad_a_BD, carried = torch.zeros_like(a_BD), [torch.zeros_like(b_BD)]
        columns_B2 = torch.stack([ba_B, g_ba_B], dim=1)
        with torch.autocast(a_BD.device.type, enabled=False):
            hops = ctx.exchange.hops([b_BD, marks_B2, columns_B2], carried, lambda x_WBD: x_WBD.sum(0))
            for (z_BD, other_B2, column_B2), grad_BD, is_own in hops:
                for block in _blocks(a_BD, marks_B2, z_BD, other_B2, is_own, ctx.exchange):
                    of_rows_RB = (block.dot_RB - ab_B[block.rows, None]).exp_().mul_(g_ab_B[block.rows, None])
                    d_RB = block.dot_RB.sub_(column_B2[:, 0]).exp_().mul_(column_B2[:, 1]).add_(of_rows_RB)
                    d_RB.masked_fill_(block.out_RB, 0.0)
                    grad_a_BD[block.rows].addmm_(d_RB, z_BD)
                    grad_BD.addmm_(d_RB.T, a_BD[block.rows])
        return grad_a_BD, carried[0], None, None, None


def sigmoid_sums(
    a_BD: Tensor, b_BD: Tensor, scale: Tensor, bias: Tensor, key_B: Tensor, valid_B: Tensor, exchange: Blocks
) -> Tensor:
    """Compute SigLIP's value, ``[B]``: ``-sum_g log sigmoid(y_bg (scale a_b.b_g + bias))`` over all ranks.

    y is 1 for the positive and -1 elsewhere.

    >>> from descant.modules.losses.exchange import Ring
    >>> z, key, valid = torch.eye(2), torch.arange(2), torch.ones(2, dtype=torch.bool)
    >>> [round(v, 4) for v in sigmoid_sums(z, z, torch.ones(()), torch.zeros(()), key, valid, Ring(rows=1)).tolist()]
    [1.0064, 1.0064]
    """
    return _SigmoidSums.apply(a_BD, b_BD, scale, bias, key_B, valid_B, exchange)


def _signed_logits(block: _Block, scale: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``y * logits`` and ``y``, ``[R, B]`` each."""
    y_RB = torch.full_like(block.dot_RB, -1.0)
    if block.diagonal is not None:
        y_RB.diagonal(block.diagonal).fill_(1.0)
    return (block.dot_RB * scale + bias).mul_(y_RB), y_RB


class _SigmoidSums(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        a_BD: Tensor,
        b_BD: Tensor,
        scale: Tensor,
        bias: Tensor,
        key_B: Tensor,
        valid_B: Tensor,
        exchange: Blocks,
    ) -> Tensor:
        marks_B2 = _marks(key_B, valid_B)
        ctx.save_for_backward(a_BD, b_BD, scale, bias, marks_B2)
        ctx.exchange = exchange
        value_B = a_BD.new_zeros(len(a_BD))
        for (z_BD, other_B2), _, is_own in exchange.hops([b_BD, marks_B2]):
            for block in _blocks(a_BD, marks_B2, z_BD, other_B2, is_own, exchange):
                signed_RB, _ = _signed_logits(block, scale, bias)
                value_B[block.rows] -= F.logsigmoid(signed_RB).masked_fill_(block.out_RB, 0.0).sum(dim=1)
        return value_B

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_B: Tensor) -> tuple[Tensor | None, ...]:
        a_BD, b_BD, scale, bias, marks_B2 = ctx.saved_tensors
        grad_a_BD, carried = torch.zeros_like(a_BD), [torch.zeros_like(b_BD)]
        grad_scale, grad_bias = torch.zeros_like(scale), torch.zeros_like(bias)
        with torch.autocast(a_BD.device.type, enabled=False):
            hops = ctx.exchange.hops([b_BD, marks_B2], carried, lambda x_WBD: x_WBD.sum(0))
            for (z_BD, other_B2), grad_b_BD, is_own in hops:
                for block in _blocks(a_BD, marks_B2, z_BD, other_B2, is_own, ctx.exchange):
                    signed_RB, y_RB = _signed_logits(block, scale, bias)
                    # d -log sigmoid(y l) / dl = -y sigmoid(-y l)
                    g_RB = torch.sigmoid(signed_RB.neg_()).mul_(y_RB).mul_(-grad_B[block.rows, None])
                    g_RB.masked_fill_(block.out_RB, 0.0)
                    grad_scale += (g_RB * block.dot_RB).sum()
                    grad_bias += g_RB.sum()
                    grad_a_BD[block.rows].addmm_(g_RB, z_BD)
                    grad_b_BD.addmm_(g_RB.T, a_BD[block.rows])
        return grad_a_BD.mul_(scale), carried[0].mul_(scale), grad_scale, grad_bias, None, None, None
