"""Load balancing of experts: balance loss, z-loss, loss of causal routers, and biases updated between steps.

Letters: N tokens, E experts, K slots of a token, M kinds of tokens, L layers, R ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from descant.modules.core.host import to_device
from descant.modules.core.objective import Term
from descant.modules.core.ranks import gather, world
from descant.modules.moe.layer import ExpertLayers
from descant.modules.moe.routing import Router, Routing, TopKRouter


class Usage(NamedTuple):
    """Sums over each kind's valid tokens: choices ``count_ME``, probabilities ``mass_ME`` and tokens ``token_M``."""

    count_ME: Tensor
    mass_ME: Tensor
    token_M: Tensor


def selected_probability(routing: Routing) -> Tensor:
    """Return ``[N, E]``: the softmax over the logits of a token's chosen experts, 0 for all others.

    Source: the release of Uni-MoE-2.0-Omni (HITsz-TMG/Uni-MoE, ``DCMoE``, ``load_balancing_loss_func``).

    >>> routing = Routing(torch.tensor([[2, 0]]), torch.ones(1, 2), torch.ones(1, 2).bool(), logit=torch.zeros(1, 3))
    >>> selected_probability(routing).tolist()
    [[0.5, 0.0, 0.5]]
    """
    assert routing.logit is not None
    chosen_NE = torch.zeros_like(routing.logit, dtype=torch.bool).scatter(1, routing.expert, routing.used)
    return routing.logit.masked_fill(~chosen_NE, torch.finfo(routing.logit.dtype).min).softmax(dim=1)


def usage(routing: Routing, kinds: int = 1) -> Usage:
    """Sum each token kind's use of each expert, null experts included, weighted by the tokens' weights.

    Only the mass has a gradient.

    >>> routing = Routing(torch.tensor([[0], [1]]), torch.ones(2, 1), torch.ones(2, 1).bool())
    >>> usage(routing._replace(probability=torch.tensor([[0.75, 0.25], [0.25, 0.75]]))).mass_ME.tolist()
    [[1.0, 1.0]]
    """
    index_NK, used_NK, probability_NE, marks = routing.expert, routing.used, routing.probability, routing.marks
    assert probability_NE is not None
    E, dtype = probability_NE.shape[1], probability_NE.dtype
    kind_N = torch.zeros_like(index_NK[:, 0]) if kinds == 1 or marks.kind is None else marks.kind
    valid_N = torch.ones_like(kind_N, dtype=dtype) if marks.valid is None else marks.valid.to(dtype)
    valid_N = valid_N if marks.weight is None else valid_N * marks.weight.to(dtype)
    cell_M = (kind_N[:, None] * E + index_NK).flatten()
    count_M = valid_N.new_zeros(kinds * E).index_add(0, cell_M, (used_NK * valid_N[:, None]).flatten())
    mass_ME = valid_N.new_zeros(kinds, E).index_add(0, kind_N, probability_NE * valid_N[:, None])
    return Usage(count_M.view(kinds, E), mass_ME, valid_N.new_zeros(kinds).index_add(0, kind_N, valid_N))


def balance_loss(count_ME: Tensor, mass_ME: Tensor, token_M: Tensor, visible_M: Tensor | None = None) -> Tensor:
    """Compute ``sum over kinds m of E_m sum_e f_me P_me``: f is an expert's choices per token, P its mean probability.

    With k choices per token, the least is k for each kind, at even use. E_m is ``visible_M``, the number of experts
    visible to a kind; by default all. A kind without tokens adds 0. Source: Switch (Fedus 2021, arXiv 2101.03961) for
    k = 1, otherwise as in transformers' Mixtral; by kinds MoIIE (2508.09779).

    >>> float(balance_loss(torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0, 1.0]]), torch.tensor([2.0])))
    1.0
    """
    token_M1 = token_M.clamp(min=1)[:, None]
    loss_M = (count_ME / token_M1 * (mass_ME / token_M1)).sum(dim=1)
    return (loss_M * (count_ME.shape[1] if visible_M is None else visible_M.to(loss_M))).sum()


def z_loss(logit_NE: Tensor) -> Tensor:
    """Compute each token's ``logsumexp(s)^2``, ``[N]``, a loss that keeps logits small.

    Source: ST-MoE (Zoph 2022, arXiv 2202.08906).

    >>> z_loss(torch.zeros(1, 8)).item() == torch.tensor(8.0).log().square().item()
    True
    """
    return logit_NE.logsumexp(dim=1).square()


def expert_terms(experts: ExpertLayers | None, routings: Sequence[Routing]) -> dict[str, Term]:
    """Compute a micro-batch's auxiliary terms ``experts/balance``, ``/z`` and ``/causal``, each a mean over layers.

    Each term is one number per batch, over the routings of all ranks, for which the ranks make one exchange. Without
    experts the result is empty.
    """
    if experts is None or not routings:
        return {}
    visible_ME = getattr(experts.router, "visible", None)
    visible_M = None if visible_ME is None else torch.tensor([len(row) for row in visible_ME], dtype=torch.float32)
    if visible_M is not None and experts.balance is not None:
        visible_M = to_device(visible_M, routings[0].expert.device)
    sums: dict[str, list[list[Tensor]]] = {}
    for routing in routings:
        if experts.balance is not None and routing.probability is not None:
            if experts.balance_over == "chosen":
                routing = routing._replace(probability=selected_probability(routing))
            sums.setdefault("balance", []).append(list(usage(routing, experts.router.kinds)))
        if experts.z is not None and routing.logit is not None:
            sums.setdefault("z", []).append(sum_and_count(z_loss(routing.logit), routing))
        if routing.causal is not None:
            sums.setdefault("causal", []).append(sum_and_count(routing.causal, routing))
    terms = {}
    for name, layers in over_ranks(sums).items():
        if name == "balance":
            values = [balance_loss(*parts, visible_M) for parts in layers]  # type: ignore[call-arg]
        else:
            values = [total / count.clamp(min=1) for total, count in layers]
        weight = {"balance": experts.balance, "z": experts.z}.get(name) or 1.0
        terms[f"experts/{name}"] = mean_term(values, weight)
    return terms


def mean_term(values: Sequence[Tensor], weight: float = 1.0) -> Term:
    """Return the weighted mean over layers of a number that all ranks share."""
    return Term(weight * torch.stack(list(values)).mean()[None], norm=float(world()), whole=True)


def sum_and_count(value_N: Tensor, routing: Routing) -> list[Tensor]:
    """Return the sum over a routing's valid tokens, and the number of these tokens."""
    valid_N = routing.marks.valid
    if valid_N is None:
        return [value_N.sum(), value_N.new_full((), len(value_N))]
    return [torch.where(valid_N, value_N, 0.0).sum(), valid_N.sum().to(value_N)]


def over_ranks(sums: dict[str, list[list[Tensor]]]) -> dict[str, list[list[Tensor]]]:
    """Add up the sums of all ranks, with gradients, in one exchange."""
    flat = [x for layers in sums.values() for parts in layers for x in parts]
    if world() == 1 or not flat:
        return sums
    total = gather(torch.cat([x.flatten() for x in flat])[None]).sum(dim=0)
    pieces = iter(total.split([x.numel() for x in flat]))
    return {name: [[next(pieces).view(x.shape) for x in parts] for parts in layers] for name, layers in sums.items()}


@torch.no_grad()
def observe(routings: Sequence[tuple[nn.Module, Routing]]) -> None:
    """Count, in a training forward, the choices of routers balanced by biases, and the choices beyond capacity."""
    for router, routing in routings:
        if isinstance(router, Router) and routing.dropped is not None:
            chosen = (routing.used & (routing.expert < router.experts)).sum()
            count_2 = torch.stack([routing.dropped.sum(), chosen])
            router.dropped = count_2 if router.dropped is None else router.dropped + count_2
        if isinstance(router, TopKRouter) and router.bias_rate is not None:
            count_E = router.bias_E.new_zeros(router.experts)
            count_E.index_add_(0, routing.expert.flatten(), routing.used.flatten().to(count_E.dtype))
            router.pending = count_E if router.pending is None else router.pending + count_E
