"""Sequence packing: documents of all lengths in few rows with hardly any padding. Letters: B rows, T tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Self

import torch
from torch import Tensor

from descant.modules.core.host import derive, host_copy, to_device
from descant.modules.language.model import NOWHERE, CausalLM
from descant.modules.moe import Marks, Routing
from descant.modules.moe.routing import UNMARKED


class Packed(NamedTuple):
    """Rows of packed documents.

    Attributes:
        ids_BT: int64, 0 after the last document.
        segment_BT: int64, 1, 2, ... in each row; 0 is padding.
        loss_mask_BT: bool, tokens to be predicted; never the first of a document, which has no context.
        document_BT: int64, the document of each token; -1 for padding.
    """

    ids_BT: Tensor
    segment_BT: Tensor
    loss_mask_BT: Tensor
    document_BT: Tensor


def first_fit_decreasing(lengths: Sequence[int], size: int) -> list[list[int]]:
    """List each row's documents by first-fit-decreasing bin packing: longest first, each in the first row with room.

    It takes at most 11/9 of the optimal number of rows, plus one (Johnson 1973). Documents of equal length are placed
    together, as many as a row has room for; one after the other, they would go to the same rows. Finding a row takes
    logarithmic time.

    >>> first_fit_decreasing([4, 8, 1, 4, 2, 1], size=10)
    [[1, 4], [0, 3, 2, 5]]
    """
    wrong = next((i for i, n in enumerate(lengths) if not 0 < n <= size), None)
    if wrong is not None:
        raise ValueError(f"document {wrong}: {lengths[wrong]} tokens, where a row takes 1 to {size}")
    alike: dict[int, list[int]] = {}
    for i, n in enumerate(lengths):
        alike.setdefault(n, []).append(i)
    leaves, most = 1, 2 * sum(lengths) // max(size, 1) + 1  # any two rows hold more than one row's tokens
    while leaves < most:
        leaves *= 2
    room = [size] * (2 * leaves)  # a binary tree of the most room in any row below
    rows: list[list[int]] = []
    for n in sorted(alike, reverse=True):
        members, done = alike[n], 0
        while done < len(members):
            at = 1
            while at < leaves:
                at *= 2
                at += room[at] < n
            if at - leaves == len(rows):
                rows.append([])
            placed = members[done : done + room[at] // n]
            rows[at - leaves] += placed
            room[at] -= n * len(placed)
            done += len(placed)
            while at > 1:
                at //= 2
                largest = max(room[2 * at], room[2 * at + 1])
                if room[at] == largest:
                    break
                room[at] = largest
    return rows


class Places(NamedTuple):
    """Place of each of N documents: row, first token in it, and segment, int64 ``[N]``.

    ``rows``, ``width``: number of rows, and tokens of the longest.
    """

    row_N: Tensor
    first_N: Tensor
    segment_N: Tensor
    rows: int
    width: int


def places(lengths: Sequence[int], size: int) -> Places:
    """Place documents in as few rows as :func:`first_fit_decreasing` takes, and in rows as short as possible.

    Bisection finds the smallest row size that takes no more rows, so that rows are about equally full.

    >>> plan = places([2, 3, 1], size=5)
    >>> plan.row_N.tolist(), plan.first_N.tolist(), plan.segment_N.tolist(), plan.rows, plan.width
    ([1, 0, 1], [0, 0, 2], [1, 1, 2], 2, 3)
    """
    rows = first_fit_decreasing(lengths, size)
    low, high = max([*lengths, -(-sum(lengths) // max(len(rows), 1))], default=0), size
    while low < high:
        middle = (low + high) // 2
        fewer = first_fit_decreasing(lengths, middle)
        low, high = (low, middle) if len(fewer) <= len(rows) else (middle + 1, high)
        rows = fewer if len(fewer) <= len(rows) else rows
    place = [(0, 0, 0)] * len(lengths)
    width = 0
    for b, members in enumerate(rows):
        at = 0
        for k, i in enumerate(members, 1):
            place[i] = (b, at, k)
            at += lengths[i]
        width = max(width, at)
    row_N, first_N, segment_N = torch.tensor(place, dtype=torch.long).view(-1, 3).unbind(dim=1)
    return Places(row_N, first_N, segment_N, len(rows), width)


@dataclass
class PackingCounts:
    """Counts of packed rows since the last reset, on the CPU: rows, documents, tokens, and cells (tokens and padding).

    >>> counts = PackingCounts()
    >>> counts.add(places([2, 3, 1], size=5), 6)
    >>> counts.padding, counts.documents / counts.rows
    (0.0, 1.5)
    """

    rows: int = 0
    documents: int = 0
    tokens: int = 0
    cells: int = 0

    def add(self, plan: Places, tokens: int) -> None:
        self.rows += plan.rows
        self.documents += len(plan.row_N)
        self.tokens += tokens
        self.cells += plan.rows * plan.width

    def __iadd__(self, other: PackingCounts) -> Self:
        self.rows, self.documents = self.rows + other.rows, self.documents + other.documents
        self.tokens, self.cells = self.tokens + other.tokens, self.cells + other.cells
        return self

    def reset(self) -> None:
        self.rows = self.documents = self.tokens = self.cells = 0

    @property
    def padding(self) -> float:
        """Return the share of the cells without a token."""
        return 1 - self.tokens / max(self.cells, 1)


def through(
    lm: CausalLM,
    h_BSW: Tensor,
    real_BS: Tensor,
    size: int,
    position_BS: Tensor | None = None,
    document_mask: bool = True,
    counts: PackingCounts | None = None,
    prefix_BS: Tensor | None = None,
    marks: Marks = UNMARKED,
    routings: list[Routing] | None = None,
) -> Tensor:
    """Run a language model on packed samples: features ``[B, S, W]`` of the real tokens, zeros elsewhere.

    Padding is computed only at the ends of rows.

    Args:
        real_BS: bool, without gaps. position_BS: counted by default; ``[B, S, 3]`` on three axes.
        document_mask: tokens attend within their document, whose positions begin with 0, so that features are those of
            each sample alone. Otherwise they attend to all earlier tokens of the row, and positions count from its
            start.
        counts: counts to which those of the rows are added.
        prefix_BS: bool, the first tokens of each sample, which all of its tokens see; none by default.
        marks: marks of the tokens for routers of experts, ``[B, S]`` each; real tokens are valid.
        routings: a list to which layers with experts append the routings of the rows' tokens.
    """
    if prefix_BS is not None and not document_mask:
        raise ValueError("document_mask false: a prefix is that of a document; prefix_sight needs the document mask")
    if position_BS is not None and not document_mask:
        raise ValueError("document_mask false: positions are those of the row; visual steps need the document mask")
    device, real_BS = h_BSW.device, host_copy(real_BS)  # the plan is made on the CPU
    length_B = real_BS.sum(dim=1)
    some_B = (length_B > 0).nonzero().flatten()
    plan = places(length_B[some_B].tolist(), size)
    if counts is not None:
        counts.add(plan, int(length_B.sum()))
    place_B3 = torch.zeros(len(h_BSW), 3, dtype=torch.long)
    place_B3[some_B] = torch.stack(plan[:3], dim=1)
    row_BS, first_BS, segment_BS = place_B3[:, :, None].expand(-1, -1, real_BS.shape[1]).unbind(dim=1)
    there = row_BS[real_BS], (first_BS + real_BS.cumsum(dim=1) - 1)[real_BS]
    shape = torch.Size((max(plan.rows, 1), max(plan.width, 1)))
    to = tuple(to_device(x_N, device) for x_N in there)
    of = tuple(to_device(x_N, device) for x_N in real_BS.nonzero(as_tuple=True))
    packed = h_BSW.new_zeros(*shape, h_BSW.shape[2]).index_put(to, h_BSW[of])
    segment = position = None  # without either, a row is one causal sequence, and its padding is after all tokens
    if document_mask:
        segment = torch.full(shape, NOWHERE)
        segment[there] = segment_BS[real_BS]
        segment = to_device(segment, device)
    if position_BS is not None:
        position = derive(partial(_put, shape), *to, *of, position_BS)
    prefix = None if prefix_BS is None else derive(partial(_put, shape), *to, *of, prefix_BS)
    if lm.routes:
        marks = marks._replace(valid=to_device(real_BS, device))
        marks = marks.map(lambda x_BS, row, at, sample, place: _put(shape, row, at, sample, place, x_BS), *to, *of)
    h_RTW = lm(packed, segment, position, prefix, marks, routings)
    return torch.zeros_like(h_BSW, dtype=h_RTW.dtype).index_put(of, h_RTW[to])


def _put(shape: torch.Size, row_N: Tensor, at_N: Tensor, sample_N: Tensor, from_N: Tensor, x_BS: Tensor) -> Tensor:
    """Copy some entries of ``x_BS`` into a tensor of zeros."""
    placed = x_BS.new_zeros(*shape, *x_BS.shape[2:])
    placed[row_N, at_N] = x_BS[sample_N, from_N]
    return placed


def pack(documents: Sequence[Tensor], loss_masks: Sequence[Tensor], size: int) -> Packed:
    """Pack documents (int64 ``[t]`` each, with loss masks bool ``[t]``) into rows of at most ``size`` tokens.

    >>> packed = pack([torch.tensor([5, 6]), torch.tensor([7])], [torch.ones(2).bool(), torch.ones(1).bool()], size=4)
    >>> packed.ids_BT.tolist(), packed.segment_BT.tolist(), packed.loss_mask_BT.int().tolist()
    ([[5, 6, 7]], [[1, 1, 2]], [[0, 1, 0]])
    """
    plan = places([len(x) for x in documents], size)
    shape = plan.rows, plan.width
    ids, segment = torch.zeros(shape, dtype=torch.long), torch.full(shape, NOWHERE)
    loss_mask, document = torch.zeros(shape, dtype=torch.bool), torch.full(shape, -1)
    for i, (b, at, k) in enumerate(zip(*(x.tolist() for x in plan[:3]), strict=True)):
        here = slice(at, at + len(documents[i]))
        ids[b, here], segment[b, here], loss_mask[b, here], document[b, here] = documents[i], k, loss_masks[i], i
        loss_mask[b, at] = False
    return Packed(ids, segment, loss_mask, document)
