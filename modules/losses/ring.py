"""SigLIP without a full matrix of logits: embeddings are passed around the ranks, one block of logits at a time.

Letters: B samples on this rank, R rows of one block, W ranks, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from descant.modules.core.dtype import promote
from descant.modules.core.ranks import Passing, world
from descant.modules.losses.contrastive import SigLIP, excluded


class RingSigLIP(SigLIP):
    """Chunked SigLIP: the value of :class:`SigLIP`, with logits computed block by block.

    Algorithm 1 of Zhai 2023 (arXiv 2303.15343, section 3.3): in each of W hops a rank compares its ``z_a`` with the
    ``z_b`` of one rank and passes these on, with keys and presence. Backward goes round again, recomputes each block,
    and returns the gradients of ``z_b``. Memory is ``rows * B`` logits and two ``[B, D]`` for any W, where gathering
    takes B * G and G * D.

    Args:
        temperature: 1/s at the start (the paper's 0.1).
        bias: c at the start (the paper's -10).
        max_scale: upper bound of s.
        rows: R, of one block; None takes all B at once.

    Raises:
        ValueError: if ``rows`` is below 1.

    >>> z, key, valid = torch.eye(2), torch.arange(2), torch.ones(2, dtype=torch.bool)
    >>> [round(v, 4) for v in RingSigLIP(temperature=1.0, bias=0.0, rows=1)(z, z, key, valid).tolist()]
    [1.0064, 1.0064]
    """

    def __init__(
        self, temperature: float = 0.1, bias: float = -10.0, max_scale: float = 1000.0, rows: int | None = 1024
    ) -> None:
        super().__init__(temperature, bias, max_scale)
        if rows is not None and rows < 1:
            raise ValueError(f"rows {rows}: a block of logits has at least 1")
        self.rows = rows

    def forward(self, z_a_BD: Tensor, z_b_BD: Tensor, key_B: Tensor, valid_B: Tensor) -> Tensor:
        with torch.autocast(z_a_BD.device.type, enabled=False):
            a_BD, b_BD = promote(z_a_BD), promote(z_b_BD)
            return _Ring.apply(a_BD, b_BD, self.scale(), self.bias, key_B, valid_B, self.rows or len(a_BD))


class _Other(NamedTuple):
    """The embeddings that are at this rank for one hop, and whose they are."""

    z_BD: Tensor
    key_B: Tensor
    valid_B: Tensor
    is_own: bool


def _travel(z_BD: Tensor, key_B: Tensor, valid_B: Tensor) -> Iterator[_Other]:
    """W hops, this rank's own rows first; the next rows are sent while the caller computes."""
    key_valid_B2 = torch.stack([key_B, valid_B.to(key_B.dtype)], dim=1)
    for hop in range(world()):
        passing = Passing([z_BD, key_valid_B2]) if hop + 1 < world() else None
        yield _Other(z_BD, key_valid_B2[:, 0], key_valid_B2[:, 1].bool(), is_own=hop == 0)
        if passing is not None:
            z_BD, key_valid_B2 = passing.wait()


class _Block(NamedTuple):
    """One block: rows of this rank, cosines, ``y * logits``, ``y``, and the excluded pairs."""

    rows: slice
    cos_RB: Tensor
    signed_RB: Tensor
    y_RB: Tensor
    out_RB: Tensor


def _blocks(
    a_BD: Tensor, key_B: Tensor, valid_B: Tensor, other: _Other, scale: Tensor, bias: Tensor, size: int
) -> Iterator[_Block]:
    for first in range(0, len(a_BD), size):
        rows = slice(first, first + size)
        cos_RB = a_BD[rows] @ other.z_BD.T
        diagonal = first if other.is_own else None
        out_RB = excluded(key_B[rows], valid_B[rows], other.key_B, other.valid_B, diagonal)
        y_RB = torch.full_like(cos_RB, -1.0)
        if diagonal is not None:
            y_RB.diagonal(diagonal).fill_(1.0)
        yield _Block(rows, cos_RB, (cos_RB * scale + bias).mul_(y_RB), y_RB, out_RB)


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, a_BD: Tensor, b_BD: Tensor, scale: Tensor, bias: Tensor, key_B: Tensor, valid_B: Tensor, size: int
    ) -> Tensor:
        ctx.save_for_backward(a_BD, b_BD, scale, bias, key_B, valid_B)
        ctx.size = size
        value_B = a_BD.new_zeros(len(a_BD))
        for other in _travel(b_BD, key_B, valid_B):
            for block in _blocks(a_BD, key_B, valid_B, other, scale, bias, size):
                value_B[block.rows] -= F.logsigmoid(block.signed_RB).masked_fill_(block.out_RB, 0.0).sum(dim=1)
        return value_B

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_B: Tensor) -> tuple[Tensor | None, ...]:
        a_BD, b_BD, scale, bias, key_B, valid_B = ctx.saved_tensors
        grad_a_BD, grad_b_BD = torch.zeros_like(a_BD), torch.zeros_like(b_BD)
        grad_scale, grad_bias = torch.zeros_like(scale), torch.zeros_like(bias)
        with torch.autocast(a_BD.device.type, enabled=False):
            for other in _travel(b_BD, key_B, valid_B):
                for block in _blocks(a_BD, key_B, valid_B, other, scale, bias, ctx.size):
                    # d -log sigmoid(y l) / dl = -y sigmoid(-y l)
                    g_RB = torch.sigmoid(block.signed_RB.neg_()).mul_(block.y_RB).mul_(-grad_B[block.rows, None])
                    g_RB.masked_fill_(block.out_RB, 0.0)
                    grad_scale += (g_RB * block.cos_RB).sum()
                    grad_bias += g_RB.sum()
                    grad_a_BD[block.rows].addmm_(g_RB, other.z_BD)
                    grad_b_BD.addmm_(g_RB.T, a_BD[block.rows])
                if world() > 1:  # after W hops the sums are back at their rank
                    (grad_b_BD,) = Passing([grad_b_BD]).wait()
        return grad_a_BD.mul_(scale), grad_b_BD.mul_(scale), grad_scale, grad_bias, None, None, None
