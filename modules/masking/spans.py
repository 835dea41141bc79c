"""Spans of a text that are hidden, in T5's and 4M's format. Letters: B samples, T tokens, S tokens with sentinels."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


def starts(hidden_BT: Tensor) -> Tensor:
    """Bool ``[B, T]``: the first token of each span of hidden tokens.

    >>> starts(torch.tensor([[True, True, False, True]])).int().tolist()
    [[1, 0, 0, 1]]
    """
    return hidden_BT & ~F.pad(hidden_BT[:, :-1], (1, 0))


def lengths(kept_BT: Tensor, hidden_BT: Tensor) -> Tensor:
    """Int64 ``[B]``: length of the encoder's input, kept tokens and one sentinel a span.

    >>> lengths(torch.tensor([[False, False, True, False]]), torch.tensor([[True, True, False, True]])).tolist()
    [3]
    """
    return kept_BT.sum(dim=1) + starts(hidden_BT).sum(dim=1)


def cost(hidden_BT: Tensor) -> Tensor:
    """Int64 ``[B, T]``: what each hidden token takes of a budget of targets: itself, its span's sentinel, the last one.

    >>> cost(torch.tensor([[True, True, False, True]])).tolist()
    [[2, 1, 0, 3]]
    """
    last_BT = hidden_BT & (hidden_BT.cumsum(dim=1) == hidden_BT.sum(dim=1, keepdim=True))
    return hidden_BT.long() + starts(hidden_BT) + last_BT


def target_run(hidden_BT: Tensor, budget_B: Tensor, u_B: Tensor) -> Tensor:
    """Bool ``[B, T]``: the hidden tokens that are targets, so that with their sentinels they fit a budget (4M).

    Where all do not fit, they begin with a random span, and end where the budget does; if less is left from there on
    than the budget, with the earliest span from which all fit. The sentinel at the end comes with the last token alone.

    Args:
        budget_B: int64, tokens with sentinels. u_B: draws in [0, 1), for the span.

    Source: apple/ml-4m, ``UnifiedMasking.sequence_mask``, which may cut between the last token and the last sentinel.

    >>> hidden_BT = torch.tensor([[True, True, False, True, False, True]])
    >>> target_run(hidden_BT, torch.tensor([4]), torch.tensor([0.4])).int().tolist()
    [[0, 0, 0, 1, 0, 0]]
    """
    before_BT, cost_BT = _from_begin(hidden_BT, budget_B, u_B)
    return hidden_BT & (before_BT >= 0) & (before_BT + cost_BT <= budget_B[:, None])


def target_window(hidden_BT: Tensor, budget_B: Tensor, u_B: Tensor) -> tuple[Tensor, Tensor]:
    """Targets and those that count, bool ``[B, T]`` each: as :func:`target_run`, but the sequence of targets is cut.

    Sentinels and tokens fill the budget. Where it ends after the last token of a span, that span's tokens are the last
    targets; where it ends one later, the next sentinel is predicted too. The last place is no token: a target there
    marks a window, which counts there if its end is a sentinel. Source: apple/ml-4m, ``UnifiedMasking.sequence_mask``.

    >>> hidden_BT, u_1 = torch.tensor([[True, True, False, True, False, True, False]]), torch.tensor([0.4])
    >>> [target_window(hidden_BT, torch.tensor([n]), u_1)[1].int().tolist() for n in (2, 3)]
    [[[0, 0, 0, 1, 0, 0, 0]], [[0, 0, 0, 1, 0, 0, 1]]]
    """
    before_BT, _ = _from_begin(hidden_BT, budget_B, u_B)
    target_BT = hidden_BT & (before_BT >= 0) & (before_BT + starts(hidden_BT) < budget_B[:, None])
    used_B = (target_BT.long() + (target_BT & starts(hidden_BT))).sum(dim=1)
    some_B = target_BT.any(dim=1)
    ends = [torch.cat([target_BT[:, :-1], last_B[:, None]], dim=1) for last_B in (some_B, some_B & (used_B < budget_B))]
    return ends[0], ends[1]


def _from_begin(hidden_BT: Tensor, budget_B: Tensor, u_B: Tensor) -> tuple[Tensor, Tensor]:
    """Int64 ``[B, T]`` each: what the tokens from the first target to before each one cost, and what it costs."""
    start_BT, cost_BT = starts(hidden_BT), cost(hidden_BT)
    through_BT = cost_BT.cumsum(dim=1)
    before_BT, total_B, budget_B1 = through_BT - cost_BT, through_BT[:, -1], budget_B[:, None]
    chosen_B1 = 1 + (u_B[:, None] * start_BT.sum(dim=1, keepdim=True)).long()
    chosen_B = (before_BT * (start_BT & (start_BT.cumsum(dim=1) == chosen_B1))).sum(dim=1)
    fits_BT = start_BT & (total_B[:, None] - before_BT <= budget_B1)
    early_B = torch.where(fits_BT, before_BT, total_B[:, None]).amin(dim=1)
    begin_B = torch.where(total_B - chosen_B >= budget_B, chosen_B, early_B)
    return before_BT - torch.where(total_B <= budget_B, 0, begin_B)[:, None], cost_BT


class Spans(NamedTuple):
    """A text with hidden spans, ids and masks ``[B, S]``, with S = T.

    ``input_BS``, real where ``visible_BS``: kept tokens, and one sentinel a span. ``given_BS`` and ``wanted_BS``, real
    where ``target_BS``: each token of the targets and the one behind it; it counts where ``loss_BS``.
    """

    input_BS: Tensor
    visible_BS: Tensor
    given_BS: Tensor
    wanted_BS: Tensor
    target_BS: Tensor
    loss_BS: Tensor


def with_sentinels(
    x_BT: Tensor, real_BT: Tensor, visible_BT: Tensor, target_BT: Tensor, loss_BT: Tensor, first: int
) -> Spans:
    """Span corruption of 4M and T5: ``a b c d`` without b and d is ``a <0> c <1>``, with targets ``<0> b <1> d <2>``.

    The first sentinel of the targets is given and not predicted. Of a text without a visible token nothing is an input,
    not even a sentinel. Hidden tokens that are no targets are left out of the targets. The sentinel at the end comes
    with the last hidden token; in a window, as :func:`target_window` has it. T is one more than the tokens of a text at
    most, since targets may be one longer than it.

    Args:
        first: id of sentinel <0>.

    >>> one = torch.ones(1, 5, dtype=torch.bool)
    >>> real_BT, seen_BT = one & (torch.arange(5) < 4), torch.tensor([[True, False, True, False, False]])
    >>> s = with_sentinels(torch.tensor([[1, 2, 3, 4, 0]]), real_BT, seen_BT, real_BT & ~seen_BT, real_BT, first=90)
    >>> s.input_BS[s.visible_BS].tolist(), s.given_BS[s.target_BS].tolist(), s.wanted_BS[s.target_BS].tolist()
    ([1, 90, 3, 91], [90, 2, 91, 4], [2, 91, 4, 92])
    """
    T, hidden_BT = x_BT.shape[1], real_BT & ~visible_BT
    window_B1, target_BT = (target_BT & ~hidden_BT)[:, -1:], target_BT & hidden_BT
    start_BT = starts(hidden_BT)
    number_BT = start_BT.cumsum(dim=1)  # of the span, from 1
    sentinel_BT, place = first - 1 + number_BT, torch.arange(T, device=x_BT.device)
    input_BT = (visible_BT | start_BT) & visible_BT.any(dim=1, keepdim=True)
    seen_BS = _packed(torch.where(visible_BT, x_BT, sentinel_BT), input_BT.cumsum(dim=1) - 1, input_BT, T)
    # of each span that has a target: its sentinel before the first of them; one sentinel more behind the last token
    at_BT = torch.where(target_BT, number_BT, 0)
    head_BT = target_BT & (number_BT > F.pad(at_BT.cummax(dim=1).values[:, :-1], (1, 0)))
    last_BT = target_BT & (hidden_BT.cumsum(dim=1) == hidden_BT.sum(dim=1, keepdim=True))
    end_BT = target_BT & (target_BT.cumsum(dim=1) == target_BT.sum(dim=1, keepdim=True))
    last_BT = torch.where(window_B1, end_BT & loss_BT[:, -1:], last_BT)
    size_BT = target_BT.long() + head_BT + last_BT
    offset_BT = size_BT.cumsum(dim=1) - size_BT
    parts = (
        (sentinel_BT, offset_BT, head_BT),
        (x_BT, offset_BT + head_BT, target_BT),
        (sentinel_BT + 1, offset_BT + head_BT + 1, last_BT),
    )
    sequence_BS = torch.stack([_packed(*part, T + 1) for part in parts]).sum(dim=0)
    counts_BS = torch.stack([_packed(loss_BT.long(), *part[1:], T + 1) for part in parts]).sum(dim=0) > 0
    target_BS = place < size_BT.sum(dim=1, keepdim=True) - 1
    visible_BS = place < input_BT.sum(dim=1, keepdim=True)
    return Spans(seen_BS, visible_BS, sequence_BS[:, :T], sequence_BS[:, 1:], target_BS, counts_BS[:, 1:] & target_BS)


def _packed(value_BT: Tensor, place_BT: Tensor, used_BT: Tensor, size: int) -> Tensor:
    """``[B, size]``: used values at their places, zeros elsewhere."""
    out_BS = value_BT.new_zeros(len(value_BT), size + 1)
    return out_BS.scatter(1, torch.where(used_BT, place_BT, size), value_BT)[:, :size]
