"""Hidden spans of a text, in T5's and 4M's format. Letters: B samples, T tokens, S tokens with sentinels."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


def starts(hidden_BT: Tensor) -> Tensor:
    """Mark the first token of each span of hidden tokens, bool ``[B, T]``.

    >>> starts(torch.tensor([[True, True, False, True]])).int().tolist()
    [[1, 0, 0, 1]]
    """
    return hidden_BT & ~F.pad(hidden_BT[:, :-1], (1, 0))


def lengths(kept_BT: Tensor, hidden_BT: Tensor) -> Tensor:
    """Compute the length of the encoder's input, kept tokens and one sentinel per span, int64 ``[B]``.

    >>> lengths(torch.tensor([[False, False, True, False]]), torch.tensor([[True, True, False, True]])).tolist()
    [3]
    """
    return kept_BT.sum(dim=1) + starts(hidden_BT).sum(dim=1)


def cost(hidden_BT: Tensor) -> Tensor:
    """Compute each hidden token's cost in a target budget, int64 ``[B, T]``: itself, and sentinels that it brings.

    A span's first token brings the span's sentinel; the last hidden token brings the final sentinel.

    >>> cost(torch.tensor([[True, True, False, True]])).tolist()
    [[2, 1, 0, 3]]
    """
    last_BT = hidden_BT & (hidden_BT.cumsum(dim=1) == hidden_BT.sum(dim=1, keepdim=True))
    return hidden_BT.long() + starts(hidden_BT) + last_BT


def target_run(hidden_BT: Tensor, budget_B: Tensor, u_B: Tensor) -> Tensor:
    """Choose the hidden tokens that are targets, so that with their sentinels they fit a budget (4M), bool ``[B, T]``.

    If not all fit, the targets start at a random span and end where the budget ends. If the rest from that span does
    not fill the budget, they start at the earliest span from which the rest fits. Only the last hidden token brings the
    final sentinel.

    Args:
        budget_B: int64, number of tokens and sentinels. u_B: draws in [0, 1), which select the span.

    Source: apple/ml-4m, ``UnifiedMasking.sequence_mask``, which may cut between the last token and the last sentinel.

    >>> hidden_BT = torch.tensor([[True, True, False, True, False, True]])
    >>> target_run(hidden_BT, torch.tensor([4]), torch.tensor([0.4])).int().tolist()
    [[0, 0, 0, 1, 0, 0]]
    """
    before_BT, cost_BT = _from_begin(hidden_BT, budget_B, u_B)
    return hidden_BT & (before_BT >= 0) & (before_BT + cost_BT <= budget_B[:, None])


def target_window(hidden_BT: Tensor, budget_B: Tensor, u_B: Tensor) -> tuple[Tensor, Tensor]:
    """Choose targets and those that count in the loss, bool ``[B, T]`` each, if the budget cuts the target sequence.

    As :func:`target_run`, but sentinels and tokens fill the budget. If it ends after the last token of a span, that
    span's tokens are the last targets. If it ends one later, the next sentinel is predicted as well. The last place
    holds no token: a target there marks a window, and it counts in the loss if the window ends with a sentinel.
    Source: apple/ml-4m, ``UnifiedMasking.sequence_mask``.

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
    """Compute int64 ``[B, T]`` each: the cost from the first target up to, not including, a token, and its own cost."""
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
    """Text with hidden spans: ids and masks ``[B, S]``, with S = T.

    ``input_BS``: kept tokens and one sentinel per span, real where ``visible_BS``. ``given_BS`` and ``wanted_BS``: each
    token of the target sequence and the token after it, real where ``target_BS``; it counts where ``loss_BS``.
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
    """Insert sentinels (4M, T5): ``a b c d`` without b and d becomes ``a <0> c <1>``, with targets ``<0> b <1> d <2>``.

    The first sentinel of the targets is given, not predicted. A text without visible tokens has no inputs, not even
    sentinels. The target sequence omits hidden tokens that are not targets. The final sentinel comes with the last
    hidden token; in a window, it follows :func:`target_window`. T is one more than the longest text, since the target
    sequence may be one longer than the text.

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
    number_BT = start_BT.cumsum(dim=1)  # number of the span, from 1
    sentinel_BT, place = first - 1 + number_BT, torch.arange(T, device=x_BT.device)
    input_BT = (visible_BT | start_BT) & visible_BT.any(dim=1, keepdim=True)
    seen_BS = _scatter_used(torch.where(visible_BT, x_BT, sentinel_BT), input_BT.cumsum(dim=1) - 1, input_BT, T)
    # each span with targets has its sentinel before its first target; one more sentinel follows the last token
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
    sequence_BS = torch.stack([_scatter_used(*part, T + 1) for part in parts]).sum(dim=0)
    counts_BS = torch.stack([_scatter_used(loss_BT.long(), *part[1:], T + 1) for part in parts]).sum(dim=0) > 0
    target_BS = place < size_BT.sum(dim=1, keepdim=True) - 1
    visible_BS = place < input_BT.sum(dim=1, keepdim=True)
    return Spans(seen_BS, visible_BS, sequence_BS[:, :T], sequence_BS[:, 1:], target_BS, counts_BS[:, 1:] & target_BS)


def _scatter_used(value_BT: Tensor, place_BT: Tensor, used_BT: Tensor, size: int) -> Tensor:
    """Scatter used values to their places in ``[B, size]``, with zeros elsewhere."""
    out_BS = value_BT.new_zeros(len(value_BT), size + 1)
    return out_BS.scatter(1, torch.where(used_BT, place_BT, size), value_BT)[:, :size]
