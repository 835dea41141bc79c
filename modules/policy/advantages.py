"""Advantages of sampled answers: how much better an answer was than the others of its prompt (GRPO and variants).

    r_b = sum_k w_k r_bk        over the rewards k that apply to b; none if none does
    A_b = (r_b - mean of the group) / scale

Computed over all answers of a step, on all ranks, in double precision. A reward that does not apply is nan. An answer
without any reward is in no baseline and has A = 0. Letters: B answers, K rewards, G groups.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

#: Added to standard deviations, as in public trainers.
EPSILON = 1e-4


class AdvantageOutput(NamedTuple):
    """Advantages of B answers.

    Attributes:
        advantage_B: A, 0 where there is no learning signal.
        reward_B: r, nan where no reward applies.
        flat_B: bool, whether its group has zero variance: all rewards equal, or fewer than two answers rewarded.
    """

    advantage_B: Tensor
    reward_B: Tensor
    flat_B: Tensor


class Advantage:
    """Base of advantages: ``advantage(r_BK, w_K, group_B)`` from rewards, their weights, and each answer's prompt.

    ``group_B``: any int64 that identifies the prompt.
    """

    def __call__(self, r_BK: Tensor, w_K: Tensor, group_B: Tensor) -> AdvantageOutput:
        r_BK, w_K = r_BK.double(), w_K.double()
        _, id_B = torch.unique(group_B, return_inverse=True)
        reward_B = sum_rewards(r_BK, w_K)
        advantage_B = self.value(r_BK, w_K, id_B).nan_to_num(0.0)
        flat_BK = torch.stack([flat(x_B, id_B) for x_B in self.compare_rewards(r_BK, w_K, reward_B).unbind(1)], dim=1)
        return AdvantageOutput(advantage_B, reward_B, flat_BK.all(dim=1))

    def value(self, r_BK: Tensor, w_K: Tensor, id_B: Tensor) -> Tensor:
        raise NotImplementedError

    def compare_rewards(self, r_BK: Tensor, w_K: Tensor, reward_B: Tensor) -> Tensor:
        """Return rewards ``[B, ...]`` that compare the answers of a group; the group is flat if none of them varies."""
        return reward_B[:, None]


class GroupScaled(Advantage):
    """GRPO's advantage, ``A_b = (r_b - mean) / (std + 1e-4)`` over its group, std with n - 1 (Shao 2024, arXiv
    2402.03300).

    >>> r_BK, w_K = torch.tensor([[1.0], [0.0], [0.0], [0.0]]), torch.ones(1)
    >>> output = GroupScaled()(r_BK, w_K, torch.tensor([7, 7, 8, 8]))
    >>> [round(a, 3) for a in output.advantage_B.tolist()], output.flat_B.tolist()  # std sqrt 1/2
    ([0.707, -0.707, 0.0, 0.0], [False, False, True, True])
    """

    def value(self, r_BK: Tensor, w_K: Tensor, id_B: Tensor) -> Tensor:
        return scale_by_group(sum_rewards(r_BK, w_K), id_B)


class BatchScaled(Advantage):
    """Advantage centred by group, scaled over the batch: ``A_b = (r_b - mean of its group) / (std of all + 1e-4)``."""

    def value(self, r_BK: Tensor, w_K: Tensor, id_B: Tensor) -> Tensor:
        reward_B = sum_rewards(r_BK, w_K)
        mean_B, _ = statistics(reward_B, id_B)
        _, std_B = statistics(reward_B, torch.zeros_like(id_B))
        return (reward_B - mean_B) / (std_B + EPSILON)


class Centred(Advantage):
    """Dr. GRPO's advantage, ``A_b = r_b - mean of its group``, without scaling (Liu 2025, arXiv 2503.20783)."""

    def value(self, r_BK: Tensor, w_K: Tensor, id_B: Tensor) -> Tensor:
        reward_B = sum_rewards(r_BK, w_K)
        return reward_B - statistics(reward_B, id_B)[0]


class EachScaled(Advantage):
    """GDPO's advantage: each reward is scaled separately, so that none dominates (as in public trainers).

        z_bk = (r_bk - mean_k) / (std_k + 1e-4) of its group;    s_b = sum_k w_k z_bk
        A_b  = (s_b - mean of all s) / (std of all s + 1e-4)

    >>> r_BK = torch.tensor([[0.0, 20.0], [1.0, 0.0], [0.0, 0.0], [1.0, 20.0]])
    >>> a = EachScaled()(r_BK, torch.ones(2), torch.zeros(4, dtype=torch.long)).advantage_B
    >>> [round(x, 2) for x in a.tolist()[2:]]
    [-1.22, 1.22]
    """

    def value(self, r_BK: Tensor, w_K: Tensor, id_B: Tensor) -> Tensor:
        s_B = sum_rewards(torch.stack([scale_by_group(r_B, id_B) for r_B in r_BK.unbind(1)], dim=1), w_K)
        return scale_by_group(s_B, torch.zeros_like(id_B))

    def compare_rewards(self, r_BK: Tensor, w_K: Tensor, reward_B: Tensor) -> Tensor:
        return r_BK[:, w_K != 0]  # the others are only logged


def scale_by_group(x_B: Tensor, id_B: Tensor) -> Tensor:
    """Compute ``(x - mean) / (std + 1e-4)`` over each number's group."""
    mean_B, std_B = statistics(x_B, id_B)
    return (x_B - mean_B) / (std_B + EPSILON)


def sum_rewards(r_BK: Tensor, w_K: Tensor) -> Tensor:
    """Compute the weighted sum of the rewards that apply, ``[B]``, nan if none does.

    >>> nan = float("nan")
    >>> sum_rewards(torch.tensor([[1.0, nan], [nan, nan], [1.0, 3.0]]), torch.tensor([1.0, 0.5])).tolist()
    [1.0, nan, 2.5]
    """
    return torch.where(r_BK.isnan().all(dim=1), torch.nan, (r_BK * w_K).nansum(dim=1))


def statistics(x_B: Tensor, id_B: Tensor) -> tuple[Tensor, Tensor]:
    """Compute mean and standard deviation (n - 1; 0 of a single one) of each number's group, ignoring nan."""
    known_B, G = ~x_B.isnan(), int(id_B.max()) + 1 if len(id_B) else 0
    x_B = x_B.nan_to_num(0.0)
    count_G = torch.bincount(id_B[known_B], minlength=G)
    mean_G = x_B.new_zeros(G).index_add(0, id_B, torch.where(known_B, x_B, 0.0)) / count_G.clamp(min=1)
    deviation_B = torch.where(known_B, x_B - mean_G[id_B], 0.0)
    square_G = x_B.new_zeros(G).index_add(0, id_B, deviation_B.square())
    std_G = (square_G / (count_G - 1).clamp(min=1)).sqrt()
    return mean_G[id_B], std_G[id_B]


def flat(x_B: Tensor, id_B: Tensor) -> Tensor:
    """Return bool ``[B]``: whether all numbers of its group are equal."""
    G = int(id_B.max()) + 1 if len(id_B) else 0
    high_G = x_B.new_full((G,), -torch.inf).scatter_reduce(0, id_B, x_B.nan_to_num(-torch.inf), "amax")
    low_G = x_B.new_full((G,), torch.inf).scatter_reduce(0, id_B, x_B.nan_to_num(torch.inf), "amin")
    return ~(high_G > low_G)[id_B]
