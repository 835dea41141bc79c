"""Base of multi-task rules: coefficients of loss terms, from their gradients or their values.

    loss = sum_k weight_k term_k,        weights = rule(G, values) * (the recipe's own mix)

Rules get the same numbers on every rank and return the same weights; their state is in the checkpoint.
Letters: B Gram matrices (1 for parameters, one per sample for a feature), K terms.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from descant.modules.multitask.solvers import solve_nonzero

#: Lower bound of divisors.
LEAST = 1e-12
#: Entry of a rule's saved state: steps and fallbacks of its :class:`Loop`.
_LOOP = "loop"


@dataclass
class Loop:
    """State that :func:`descant.harmonize` keeps for a rule between calls; only ``steps`` and ``fallbacks`` are saved.

    Attributes:
        steps: optimizer steps begun. fallbacks: calls that used the plain sum because something was not finite.
        names: names of the terms in the last call.
        mark: a parameter's number, and the identity and version of its gradient after the last call.
        state, sums: those of the rule before it learned from the last call.
    """

    steps: int = 0
    fallbacks: int = 0
    names: tuple[str, ...] = ()
    mark: tuple[int, int, int] | None = None
    state: dict[str, Tensor] = field(default_factory=dict)
    sums: dict[str, Tensor] = field(default_factory=dict)


class Rule:
    """Rule for the weights of loss terms: ``weights`` reads its state, ``learn`` updates it once per optimizer step.

    A subclass implements ``weights`` and ``update``. ``weights(gramian_BKK, value_K, draw)`` returns float64
    ``[B, K]``, about 1 if terms do not conflict, from:

        gramian_BKK: float64 dot products of the terms' gradients; empty for a rule that does not read them.
        value_K: the terms' values, over all ranks; ones for a feature.
        draw: random seed of this step, the same on every rank.
    """

    #: Whether it needs the gradients.
    reads_gradients = True
    #: Whether it needs the values of the terms besides their gradients.
    reads_values = False
    #: Whether it combines whole gradients at a feature (``combine``), instead of using their dot products.
    whole_gradients = False
    #: Whether each sample of a feature may have its own weights.
    per_sample = False
    #: Whether weights depend on earlier steps.
    remembers = False
    #: Whether it needs dot products across independent batches, ``<g_k, g_l>`` from two of the step's micro-batches.
    across_batches = False

    def __init__(self) -> None:
        self.state: dict[str, Tensor] = {}
        self.sums: dict[str, Tensor] = {}  # sums of the values accumulated since the last update
        self.loop = Loop()

    def weights(self, gramian_BKK: Tensor, value_K: Tensor, draw: int) -> Tensor:
        raise NotImplementedError

    def precondition(self, grads: Sequence[Tensor]) -> Sequence[Tensor]:
        """Transform the gradients (``[K, ...]`` per parameter, over all ranks) before their dot products are taken."""
        return grads

    def combine(self, g_KBD: Tensor, draw: int) -> Tensor:
        """Combine the gradients of K terms at a shared feature into ``g_BD``; for a rule with ``whole_gradients``."""
        raise NotImplementedError

    def learn(self, total: Callable[[Tensor], Tensor]) -> None:
        """Update the state; ``total`` sums values over ranks if they differ between ranks."""
        if self.sums:
            self.update(total)
        self.sums = {}

    def update(self, total: Callable[[Tensor], Tensor]) -> None:
        """Update the state from ``sums``."""

    def accumulate(self, **values: Tensor) -> None:
        for name, value in values.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value

    def state_dict(self) -> dict[str, Tensor]:
        counts = {_LOOP: torch.tensor([self.loop.steps, self.loop.fallbacks])} if self.loop.steps else {}
        return {name: value.clone() for name, value in self.state.items()} | counts

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.state = {name: value.clone() for name, value in state.items() if name != _LOOP}
        self.loop = Loop(*(state[_LOOP].tolist() if _LOOP in state else ()))


class SolverRule(Rule):
    """Deterministic, stateless rule that depends on the correlations and lengths of the gradients."""

    def weights(self, gramian_BKK: Tensor, value_K: Tensor, draw: int) -> Tensor:
        return solve_nonzero(gramian_BKK, lambda c_BKK, d_BK, live_K: self.solve(c_BKK, d_BK))

    def solve(self, c_BKK: Tensor, d_BK: Tensor) -> Tensor:
        """Solve for the coefficients, as a :data:`descant.modules.multitask.solvers.Solver` does."""
        raise NotImplementedError


class PreferenceRule(Rule):
    """Deterministic, stateless rule that takes a preference for each term.

    Args:
        preference: a number above 0 for each term, in their order, such as [2.0, 1.0]; by default 1 for all. Without
            conflict, these numbers are the weights.
    """

    def __init__(self, preference: list[float] | None = None) -> None:
        super().__init__()
        if not all(p > 0 for p in preference or ()):
            raise ValueError(f"preference {preference}: numbers above 0")
        self.preference = preference

    def weights(self, gramian_BKK: Tensor, value_K: Tensor, draw: int) -> Tensor:
        terms, given = gramian_BKK.shape[-1], self.preference
        if given is not None and len(given) != terms:
            raise ValueError(f"{type(self).__name__}: preference {given}: {terms} terms, a number for each")
        p_K = torch.ones(terms) if given is None else torch.tensor(given)
        p_K = p_K.to(gramian_BKK.device, torch.float64)
        return solve_nonzero(gramian_BKK, lambda c_BKK, d_BK, live_K: self.solve(c_BKK, d_BK, p_K[live_K]))

    def solve(self, c_BKK: Tensor, d_BK: Tensor, p_K: Tensor) -> Tensor:
        """Solve for the coefficients of the terms with gradients, given their preferences."""
        raise NotImplementedError


class SimplexRule(Rule):
    """Rule with weights that sum to 1, updated in each step (``moved``); terms without gradient keep their weights."""

    remembers = True

    def weights(self, gramian_BKK: Tensor, value_K: Tensor, draw: int) -> Tensor:
        even_K = torch.full(
            gramian_BKK.shape[-1:], 1 / gramian_BKK.shape[-1], dtype=torch.float64, device=gramian_BKK.device
        )
        w_K = self.state.get("w", even_K).to(even_K)
        weight_BK, next_BK = torch.ones(len(gramian_BKK), len(w_K)).to(w_K), w_K.repeat(len(gramian_BKK), 1)
        for gramian_KK, weight_K, next_K in zip(gramian_BKK.double(), weight_BK, next_BK, strict=True):
            at = (gramian_KK != 0).any(dim=1).nonzero()[:, 0]
            share = w_K[at].sum()
            start_K = w_K[at] / share if share > 0 else torch.full_like(w_K[at], 1 / max(len(at), 1))
            moved_K = self.update_weights(gramian_KK[at[:, None], at], start_K) if len(at) else start_K
            next_K[at], weight_K[at] = moved_K * share, self.coefficients(moved_K)
        self.accumulate(w=next_BK.mean(dim=0), count=torch.ones(()))
        return weight_BK

    def update(self, total: Callable[[Tensor], Tensor]) -> None:
        self.state["w"] = self.sums["w"] / self.sums["count"]

    def update_weights(self, gramian_KK: Tensor, w_K: Tensor) -> Tensor:
        """Compute the weights after this step, from those before it and the dot products of the gradients."""
        raise NotImplementedError

    def coefficients(self, w_K: Tensor) -> Tensor:
        return len(w_K) * w_K


def above(rule: Rule, value_K: Tensor, least: float) -> Tensor:
    """Return bool ``[K]``: the values above ``least``, for rules that take logarithms; other terms have no samples.

    >>> above(Rule(), torch.tensor([2.0, 0.0]), 0.0).tolist()
    [True, False]
    """
    if bool((value_K < least).any()):
        k = int((value_K - least).argmin())
        raise ValueError(f"{type(rule).__name__}: term {k} is {value_K[k]:g}, and has no logarithm below {least:g}")
    return value_K > least


def orders(terms: int, draw: int) -> list[list[int]]:
    """Return, for each term, the other terms in random order.

    >>> orders(3, 0) == orders(3, 0), [sorted(order) for order in orders(3, 0)]
    (True, [[1, 2], [0, 2], [0, 1]])
    """
    generator = torch.Generator().manual_seed(draw)
    return [[j for j in torch.randperm(terms, generator=generator).tolist() if j != i] for i in range(terms)]


def among(order: list[list[int]], live: Tensor) -> list[list[int]]:
    """Restrict the orders to terms with a gradient, renumbered among themselves."""
    place = {k: n for n, k in enumerate(live.nonzero()[:, 0].tolist())}
    return [[place[j] for j in order[i] if j in place] for i in place]
