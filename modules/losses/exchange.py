"""How the samples of all ranks meet as negatives: gathered at once, gathered and met in blocks, or around a ring.

Letters: B samples of a rank, W ranks, G = W B, R rows of a block, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from descant.modules.core.ranks import Passing, rank, world


def excluded(key_B: Tensor, valid_B: Tensor, key_G: Tensor, valid_G: Tensor, diagonal: int | None = None) -> Tensor:
    """Pairs that are no negatives, bool ``[B, G]``: one is absent, or both have the same content.

    ``diagonal`` is the column of row 0's positive, None where the columns hold none. Positives are never excluded, so
    the row of an absent sample stays finite.

    >>> key, valid = torch.tensor([7, 7, 8]), torch.tensor([True, True, False])
    >>> excluded(key, valid, key, valid, diagonal=0).int().tolist()
    [[0, 1, 1], [1, 0, 1], [1, 1, 0]]
    """
    out_BG = key_B[:, None] == key_G
    out_BG |= ~valid_G
    out_BG |= ~valid_B[:, None]
    if diagonal is not None:
        out_BG.diagonal(diagonal).fill_(False)
    return out_BG


#: What is met in one hop: the tensors of a rank, what is carried for its rows (or None), and whether it is this rank.
Hop = tuple[list[Tensor], Any, bool]


class Exchange:
    """Where the samples of other ranks come from, for the negatives of InfoNCE and SigLIP; the value is the same.

    What a rank holds beside its own embeddings, the numbers that it receives, and its products of ``[B, D]`` with
    ``[D, B]`` or ``[B, B]`` with ``[B, D]``, forward and backward, of InfoNCE:

        AllGather    2 B G + 2 G D    4 (W - 1) B D    6 W
        Chunks       R B + 2 G D      3 (W - 1) B D    4 W
        Ring         R B + 4 B D      (3 W - 2) B D    4 W, while embeddings are on their way

    since the last two make each product once for both directions, and again backward.
    """

    def hops(
        self,
        sent: Sequence[Tensor],
        carried: list[Tensor] | None = None,
        combine: Callable[[Tensor], Tensor] | None = None,
    ) -> Iterator[Hop]:
        """The rows of each rank in turn, this rank's own first.

        Args:
            sent: tensors ``[B, ...]`` of this rank, which the others get.
            carried: a list of one tensor ``[B, ...]`` that belongs to the rows of ``sent``: of each hop that of the
                rows met, for the caller to add to in place; after the last hop that of this rank's rows, from all
                ranks. It begins as what ``combine`` ignores, such as 0 of a sum.
            combine: ``[W, B, ...] -> [B, ...]`` of what W ranks have added.
        """
        raise NotImplementedError


class AllGather(Exchange):
    """Gather all embeddings and make the whole matrices of logits: the fastest while ``[B, G]`` is small."""


class Blocks(Exchange):
    """Logits block by block, never all of them; backward makes each block again.

    Args:
        rows: R, of one block; None takes all B at once.
    """

    def __init__(self, rows: int | None = 1024) -> None:
        if rows is not None and rows < 1:
            raise ValueError(f"rows {rows}: a block of logits has at least 1")
        self.rows = rows

    def slices(self, rows: int) -> Iterator[slice]:
        """The blocks of so many rows."""
        size = self.rows or max(rows, 1)
        return (slice(first, first + size) for first in range(0, rows, size))


class Chunks(Blocks):
    """Gather the embeddings of one side, and meet them rank by rank, in blocks of rows.

    For large batches, where logits and not embeddings fill the memory. Inf-CL (Cheng 2024, arXiv 2410.17243) has such
    blocks within a rank.
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
        gathered = [_gathered(x) for x in sent]
        kept = carried[0].expand(ranks, *carried[0].shape).contiguous() if carried else None
        for hop in range(ranks):
            other = (own + hop) % ranks
            yield [x_W[other] for x_W in gathered], None if kept is None else kept[other], hop == 0
        if carried and kept is not None and combine is not None:
            parts = torch.empty_like(kept)
            dist.all_to_all_single(parts, kept)
            carried[0] = combine(parts)


class Ring(Blocks):
    """Pass the embeddings of one side around the ranks, while each computes with those that it has.

    The least memory, whatever W, and the most messages: about 3 W a step. Algorithm 1 of SigLIP (Zhai 2023, arXiv
    2303.15343, section 3.3), and Inf-CL (Cheng 2024, arXiv 2410.17243) for InfoNCE.
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
            if carried and world() > 1:  # after W hops it is back at its rank
                (carried[0],) = Passing(carried).wait()
            if passing is not None:
                now = passing.wait()


def _gathered(x_B: Tensor) -> Tensor:
    """``[B, ...] -> [W, B, ...]``, without gradients."""
    x_WB = x_B.new_empty(world(), *x_B.shape)
    dist.all_gather(list(x_WB), x_B.contiguous())
    return x_WB
