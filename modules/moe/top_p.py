"""Dynamic capacity: a token takes the fewest experts that reach a probability, null ones included (Uni-MoE-2.0-Omni).

Letters: N tokens, D width, E experts including null ones, K slots of a token, S shared experts.
"""

from __future__ import annotations

from typing import Literal, Self

import torch
from torch import Tensor

from descant.modules.core.errors import require_value
from descant.modules.moe.routing import Marks, Router, Routing, TokenSham, logits, of_valid


def top_p(logit_NE: Tensor, p: float, most: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Choose the fewest experts that reach probability p, at most ``most``.

    Returns ``index_NK``, ``used_NK`` and ``probability_NE``.

        k = #{cumsum of sorted softmax(s) < p} + 1

    Source: Huang 2024 (arXiv 2403.07652); Uni-MoE-2.0-Omni (2511.12609), whose preview release has this count.

    >>> index_NK, used_NK, _ = top_p(torch.tensor([[0.1, 0.6, 0.3]]).log(), 0.7)
    >>> index_NK.tolist(), used_NK.sum(dim=1).tolist()
    ([[1, 2, 0]], [2])
    """
    probability_NE = logit_NE.softmax(dim=1)
    sorted_NE, index_NE = probability_NE.detach().sort(dim=1, descending=True, stable=True)
    count_N1 = (sorted_NE.cumsum(dim=1) < p).sum(dim=1, keepdim=True) + 1
    index_NK = index_NE[:, :most]
    used_NK = torch.arange(index_NK.shape[1], device=index_NK.device) < count_N1
    return index_NK, used_NK, probability_NE


def softmax_weights(logit_NK: Tensor, used_NK: Tensor, rest_NE: Tensor, jitter: float) -> Tensor:
    """Compute ``w = p / sum of the chosen p``, the paper's rule in our reading.

    >>> softmax_weights(torch.zeros(1, 2), torch.tensor([[True, True]]), torch.zeros(1, 2), 0.01).tolist()
    [[0.5, 0.5]]
    """
    return logit_NK.masked_fill(~used_NK, -torch.inf).softmax(dim=1)


def band_weights(logit_NK: Tensor, used_NK: Tensor, rest_NE: Tensor, jitter: float) -> Tensor:
    """Compute the release's weights: a softmax of each choice among the logits near it, then divided by their sum.

        q_j = e^(s_j) / sum over i >= j, s_j - s_i <= 2 jitter max(|s_i|, |s_j|), of e^(s_i),     w = q / sum q

    in sorted order: unless logits nearly tie, all q are 1, and weights are 1 / k. ``rest_NE``: all logits, sorted.
    Source: the preview release of Uni-MoE-2.0-Omni (``allocation_expert``, after GRIN's SparseMixer), which adds 1e-6
    to the last sum.

    >>> band_weights(torch.tensor([[2.0, 1.0]]), torch.ones(1, 2).bool(), torch.tensor([[2.0, 1.0]]), 0.01).tolist()
    [[0.5, 0.5]]
    """
    K, E = logit_NK.shape[1], rest_NE.shape[1]
    near_NKE = logit_NK[:, :, None] - rest_NE[:, None]
    scale_NKE = torch.maximum(logit_NK.abs()[:, :, None], rest_NE.abs()[:, None])
    later_KE = torch.arange(E, device=logit_NK.device) >= torch.arange(K, device=logit_NK.device)[:, None]
    band_NKE = (near_NKE.detach() <= 2 * jitter * scale_NKE.detach()) & later_KE
    q_NK = 1 / (-near_NKE).masked_fill(~band_NKE, -torch.inf).exp().sum(dim=2)
    q_NK = q_NK.masked_fill(~used_NK, 0.0)
    return q_NK / q_NK.sum(dim=1, keepdim=True)


class TopPRouter(Router):
    """Router to the fewest experts that reach probability p; null and shared experts also get weights: :func:`top_p`.

        w_routed = m w,   m = sum of e^s of the chosen / (that + sum of e^s of the shared),   w_shared = e^s / (...)

    A null expert computes nothing, but takes its part of the weights, which sum to 1 with it. A token that chooses one
    has fewer real experts, with smaller weights. Shared experts always run. Source: Uni-MoE-2.0-Omni (Li 2025, arXiv
    2511.12609) and its preview release.

    Args:
        p: probability to reach.
        null_experts: number of null experts besides the real ones.
        most: the most experts per token; by default all.
        weigh: weights of the chosen experts: their softmax (the paper), or by the band of the release.
        jitter: width of that band.
        sham: ``permute`` for the control: each token is routed like another token of its batch.

    >>> router = TopPRouter(p=0.9, null_experts=1).build(width=8, experts=4)
    >>> routing = router(torch.randn(3, 8))
    >>> routing.expert.shape, routing.weight.sum(dim=1).round(decimals=4).tolist()
    (torch.Size([3, 5]), [1.0, 1.0, 1.0])
    """

    def __init__(
        self,
        p: float = 0.7,
        null_experts: int = 0,
        most: int | None = None,
        weigh: Literal["softmax", "band"] = "softmax",
        jitter: float = 0.01,
        sham: Literal["permute"] | None = None,
    ) -> None:
        super().__init__()
        require_value(0 < p <= 1, f"p {p:g}: above 0, at most 1")
        require_value(null_experts >= 0, f"null_experts {null_experts}: 0 or more")
        if most is not None and most < 1:
            raise ValueError(f"most {most}: at least 1, or none")
        require_value(jitter >= 0, f"jitter {jitter:g}: 0 or more")
        self.p, self.most, self.weigh, self.jitter = p, most, weigh, jitter
        self.null_experts = null_experts
        self.sham, self.permuted = sham, TokenSham(sham)

    @property
    def sums_to_one(self) -> bool:
        return not self.null_experts

    def build(self, width: int, experts: int, shared: int = 0) -> Self:
        if (self.most or 1) > experts + self.null_experts:
            raise ValueError(f"most {self.most}: there are {experts + self.null_experts} experts to choose from")
        self.gate_ED = self._gate(experts + self.null_experts + shared, width)
        self.shared = shared
        return super().build(width, experts, shared)

    def route(self, h_ND: Tensor, marks: Marks) -> Routing:
        h_ND = self.permuted(h_ND, marks, self)
        logit_NE, shared_NS = logits(h_ND, self.gate_ED).split([self.experts + self.null_experts, self.shared], dim=1)
        index_NK, used_NK, probability_NE = top_p(logit_NE, self.p, self.most)
        chosen_NK, rest_NE = logit_NE.gather(1, index_NK), logit_NE.sort(dim=1, descending=True, stable=True).values
        weights = {"softmax": softmax_weights, "band": band_weights}[self.weigh]
        weight_NK, mass_NS = weights(chosen_NK, used_NK, rest_NE, self.jitter), None
        if self.shared:
            of_routed_N1 = chosen_NK.masked_fill(~used_NK, -torch.inf).logsumexp(dim=1, keepdim=True)
            mass = torch.cat([of_routed_N1, shared_NS], dim=1).softmax(dim=1)
            weight_NK, mass_NS = weight_NK * mass[:, :1], mass[:, 1:]
        used_NK = used_NK & of_valid(index_NK, marks)
        return Routing(index_NK, weight_NK, used_NK, marks, probability_NE, logit_NE, mass_NS)
