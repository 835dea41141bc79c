"""Exchange samples between ranks as negatives: gather all, gather and compute in blocks, or pass around a ring.

Letters: B samples per rank, W ranks, G = W B, R rows per block, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from descant.modules.core.ranks import Passing, rank, world


def exclusion_mask(
    key_B: Tensor, valid_B: Tensor, key_G: Tensor, valid_G: Tensor, diagonal: int | None = None
) -> Tensor:
    """Return a bool mask ``[B, G]`` of pairs that are not negatives: one is absent, or both have the same content.

    ``diagonal`` is the column of row 0's positive, or None if the columns contain no positives. Positives are never
    excluded, so the row of an absent sample stays finite.

    >>> key, valid = torch.tensor([7, 7, 8]), torch.tensor([True, True, False])
    >>> exclusion_mask(key, valid, key, valid, diagonal=0).int().tolist()
    [[0, 1, 1], [1, 0, 1], [1, 1, 0]]
    """
    out_BG = key_B[:, None] == key_G
    out_BG |= ~valid_G
    out_BG |= ~valid_B[:, None]
    if diagonal is not None:
        out_BG.diagonal(diagonal).fill_(False)
    return out_BG


#: One hop: the tensors of a rank, the carried tensor for its rows (or None), and whether it is this rank.
Hop = tuple[list[Tensor], Any, bool]


class Exchange:
    """Base of the ways to get samples from other ranks, as negatives for InfoNCE and SigLIP; all give the same value.

    For InfoNCE, the columns are: numbers that a rank holds besides its own embeddings; numbers that it receives; its
    products of ``[B, D]`` with ``[D, B]`` or ``[B, B]`` with ``[B, D]``. The last two count forward and backward.

        AllGather    2 B G + 2 G D    4 (W - 1) B D    6 W
        Chunks       R B + 2 G D      3 (W - 1) B D    4 W
        Ring         R B + 4 B D      (3 W - 2) B D    4 W, while embeddings are on their way

    Chunks and Ring compute each product once for both directions, and once more in backward.
    """

    def hops(
        self,
        sent: Sequence[Tensor],
        carried: list[Tensor] | None = None,
        combine: Callable[[Tensor], Tensor] | None = None,
    ) -> Iterator[Hop]:
        """Yield the rows of each rank in turn, this rank's own first.

        Args:
            sent: tensors ``[B, ...]`` of this rank, which the other ranks receive.
            carried: a list of one tensor ``[B, ...]`` that belongs to the rows of ``sent``. Each hop yields the tensor
                of that hop's rows, and the caller adds to it in place. After the last hop, the list holds the tensor
                of this rank's rows, with what all ranks added. It starts as the neutral value of ``combine``, such as
                0 for a sum.
            combine: ``[W, B, ...] -> [B, ...]``, combines what W ranks have added.
        """
        raise NotImplementedError


class AllGather(Exchange):
    """Exchange that gathers all embeddings and computes full logit matrices: the fastest if ``[B, G]`` is small."""


class Blocks(Exchange):
    """Base of exchanges that compute logits block by block, never all at once; backward recomputes each block.

    Args:
        rows: R, rows of one block; None takes all B at once.
    """

    def __init__(self, rows: int | None = 1024) -> None:
        if rows is not None and rows < 1:
            raise ValueError(f"rows {rows}: a block of logits has at least 1")
        self.rows = rows

    def slices(self, rows: int) -> Iterator[slice]:
        """Return slices that divide ``rows`` rows into blocks."""
        size = self.rows or max(rows, 1)
        return (slice(first, first + size) for first in range(0, rows, size))


class Chunks(Blocks):
    """Exchange that gathers one side's embeddings and compares with them rank by rank, in blocks of rows.

    For large batches, in which logits and not embeddings fill the memory. Inf-CL (Cheng 2024, arXiv 2410.17243) uses
    such blocks within a rank.
    """

    def hops(
        self,
        sent: Sequence[Tensor],
        carried: list[Tensor] | None = None,
        combine: Callable[[Tensor], Tensor] | None = None,
    ) -> Iterator[Hop]:
        ranks, own = world(), rank()
        if ranks == 1:
            yield list(sent), carried[0] if carried else None, True
            return
        gathered = [_gather_ranks(x) for x in sent]
        kept = carried[0].expand(ranks, *carried[0].shape).contiguous() if carried else None
        for hop in range(ranks):
            other = (own + hop) % ranks
            yield [x_W[other] for x_W in gathered], None if kept is None else kept[other], hop == 0
        if carried and kept is not None and combine is not None:
            parts = torch.empty_like(kept)
            dist.all_to_all_single(parts, kept)
            carried[0] = combine(parts)


class Ring(Blocks):
    """Exchange that passes one side's embeddings around the ranks, while each rank computes with those that it holds.

    It needs the least memory, independent of W, and the most messages, about 3 W per step. Algorithm 1 of SigLIP (Zhai
    2023, arXiv 2303.15343, section 3.3), and Inf-CL (Cheng 2024, arXiv 2410.17243) for InfoNCE.
    """

    def hops(
        self,
        sent: Sequence[Tensor],
        carried: list[Tensor] | None = None,
        combine: Callable[[Tensor], Tensor] | None = None,
    ) -> Iterator[Hop]:
        now = list(sent)
        for hop in range(world()):
            passing = Passing(now) if hop + 1 < world() else None
            yield now, carried[0] if carried else None, hop == 0
            if carried and world() > 1:  # after W hops the tensor is back on its own rank
                (carried[0],) = Passing(carried).wait()
            if passing is not None:
                now = passing.wait()


def _gather_ranks(x_B: Tensor) -> Tensor:
    """Gather ``[B, ...] -> [W, B, ...]``, without gradients."""
    x_WB = x_B.new_empty(world(), *x_B.shape)
    dist.all_gather(list(x_WB), x_B.contiguous())
    return x_WB
