"""How much better than the others of its prompt an answer was: what a policy's gradient is weighed by.

    r_b = sum_k w_k r_bk        over the rewards k that apply to b; none where none does
    A_b = (r_b - mean of the group) / scale

All answers of a step are judged together, those of other ranks too. A reward that does not apply is nan. An answer
without any is nobody's baseline and has A = 0. Double precision.
Letters: B answers, K rewards, G groups.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

#: What deviations are raised by, as in public trainers: a group that hardly differs is not blown up.
EPSILON = 1e-4


class AdvantageOutput(NamedTuple):
    """``advantage_B``: 0 where nothing can be learned. ``reward_B``: r, nan where none applies. ``flat_B``: of a group
    whose answers were all as good as each other, or of which fewer than two were judged: nothing to learn of it."""

    advantage_B: Tensor
    reward_B: Tensor
    flat_B: Tensor


class Advantage:
    """``advantage(r_BK, w_K, group_B)``: rewards, their weights, and whose answer each is (any int64 a prompt)."""

    def __call__(self, r_BK: Tensor, w_K: Tensor, group_B: Tensor) -> AdvantageOutput:
        r_BK, w_K = r_BK.double(), w_K.double()
        _, id_B = torch.unique(group_B, return_inverse=True)
        reward_B = summed(r_BK, w_K)
        advantage_B = self.value(r_BK, w_K, id_B).nan_to_num(0.0)
        flat_BK = torch.stack([flat(x_B, id_B) for x_B in self.told_apart_by(r_BK, w_K, reward_B).unbind(1)], dim=1)
        return AdvantageOutput(advantage_B, reward_B, flat_BK.all(dim=1))

    def value(self, r_BK: Tensor, w_K: Tensor, id_B: Tensor) -> Tensor:
        raise NotImplementedError

    def told_apart_by(self, r_BK: Tensor, w_K: Tensor, reward_B: Tensor) -> Tensor:
        """The numbers, a column each, that a group has to differ in."""
        return reward_B[:, None]


class GroupScaled(Advantage):
    """``A_b = (r_b - mean) / (std + 1e-4)`` of its group, std with n - 1 (GRPO: Shao 2024, arXiv 2402.03300).

    >>> r_BK, w_K = torch.tensor([[1.0], [0.0], [0.0], [0.0]]), torch.ones(1)
    >>> judged = GroupScaled()(r_BK, w_K, torch.tensor([7, 7, 8, 8]))
    >>> [round(a, 3) for a in judged.advantage_B.tolist()], judged.flat_B.tolist()  # std sqrt 1/2
    ([0.707, -0.707, 0.0, 0.0], [False, False, True, True])
    """

    def value(self, r_BK: Tensor, w_K: Tensor, id_B: Tensor) -> Tensor:
        reward_B = summed(r_BK, w_K)
        mean_B, std_B = statistics(reward_B, id_B)
        return (reward_B - mean_B) / (std_B + EPSILON)


class BatchScaled(Advantage):
    """``A_b = (r_b - mean of its group) / (std of all + 1e-4)``."""

    def value(self, r_BK: Tensor, w_K: Tensor, id_B: Tensor) -> Tensor:
        reward_B = summed(r_BK, w_K)
        mean_B, _ = statistics(reward_B, id_B)
        _, std_B = statistics(reward_B, torch.zeros_like(id_B))
        return (reward_B - mean_B) / (std_B + EPSILON)


class Centred(Advantage):
    """``A_b = r_b - mean of its group``: prompts count by how much their answers differ.

    Source: Dr. GRPO (Liu 2025, arXiv 2503.20783).
    """

    def value(self, r_BK: Tensor, w_K: Tensor, id_B: Tensor) -> Tensor:
        reward_B = summed(r_BK, w_K)
        return reward_B - statistics(reward_B, id_B)[0]


class EachScaled(Advantage):
    """Rewards are scaled one by one, so that none drowns the others (GDPO, as in public trainers):

        z_bk = (r_bk - mean_k) / (std_k + 1e-4) of its group;    s_b = sum_k w_k z_bk
        A_b  = (s_b - mean of all s) / (std of all s + 1e-4)

    >>> r_BK = torch.tensor([[0.0, 20.0], [1.0, 0.0], [0.0, 0.0], [1.0, 20.0]])
    >>> a = EachScaled()(r_BK, torch.ones(2), torch.zeros(4, dtype=torch.long)).advantage_B
    >>> [round(x, 2) for x in a.tolist()[2:]]
    [-1.22, 1.22]
    """

    def value(self, r_BK: Tensor, w_K: Tensor, id_B: Tensor) -> Tensor:
        columns = []
        for r_B in r_BK.unbind(1):
            mean_B, std_B = statistics(r_B, id_B)
            columns.append((r_B - mean_B) / (std_B + EPSILON))
        s_B = summed(torch.stack(columns, dim=1), w_K)
        mean_B, std_B = statistics(s_B, torch.zeros_like(id_B))
        return (s_B - mean_B) / (std_B + EPSILON)

    def told_apart_by(self, r_BK: Tensor, w_K: Tensor, reward_B: Tensor) -> Tensor:
        return r_BK[:, w_K != 0]  # the others are only looked at


def summed(r_BK: Tensor, w_K: Tensor) -> Tensor:
    """``[B]``: the weighted sum of the rewards that apply, nan where none does.

    >>> nan = float("nan")
    >>> summed(torch.tensor([[1.0, nan], [nan, nan], [1.0, 3.0]]), torch.tensor([1.0, 0.5])).tolist()
    [1.0, nan, 2.5]
    """
    return torch.where(r_BK.isnan().all(dim=1), torch.nan, (r_BK * w_K).nansum(dim=1))


def statistics(x_B: Tensor, id_B: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation (n - 1; 0 of a single one) of each number's group, over those of it that are numbers."""
    known_B, G = ~x_B.isnan(), int(id_B.max()) + 1 if len(id_B) else 0
    x_B, here_B = x_B.nan_to_num(0.0), id_B
    count_G = torch.bincount(here_B[known_B], minlength=G)
    mean_G = x_B.new_zeros(G).index_add(0, here_B, torch.where(known_B, x_B, 0.0)) / count_G.clamp(min=1)
    off_B = torch.where(known_B, x_B - mean_G[here_B], 0.0)
    square_G = x_B.new_zeros(G).index_add(0, here_B, off_B.square())
    std_G = (square_G / (count_G - 1).clamp(min=1)).sqrt()
    return mean_G[here_B], std_G[here_B]


def flat(x_B: Tensor, id_B: Tensor) -> Tensor:
    """``[B]`` bool: no two numbers of its group differ."""
    G = int(id_B.max()) + 1 if len(id_B) else 0
    high_G = x_B.new_full((G,), -torch.inf).scatter_reduce(0, id_B, x_B.nan_to_num(-torch.inf), "amax")
    low_G = x_B.new_full((G,), torch.inf).scatter_reduce(0, id_B, x_B.nan_to_num(torch.inf), "amin")
    return ~(high_G > low_G)[id_B]
