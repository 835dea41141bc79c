"""Gradient hooks of a step: where several terms share a feature, and what harmonizers do to their gradients there.

Letters: B samples, N rows of a term, D width, K terms.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from descant.modules.core.objective import Term

#: ``rule(g_KBD, names) -> g_BD``: combines the per-sample gradients of K terms at a shared feature.
ForkRule = Callable[[Tensor, tuple[str, ...]], Tensor]


@dataclass
class GradientHooks:
    """Forks of shared features and per-row gradient weights; everything that harmonizers need of a recipe.

    Attributes:
        rule: combines the gradients of the terms at every fork; the plain sum where None.
        watched: keep ``terms`` and ``forked`` of the last forward, (names, copies) a fork, and scale the gradients of
            a term's rows by ``keep``: name -> ``[N]``, read at backward time; the term's value stays.
        probing: while a callback differentiates terms one by one, forks pass gradients through untouched.
    """

    rule: ForkRule | None = None
    watched: bool = False
    probing: bool = False
    terms: Mapping[str, Term] = field(default_factory=dict)
    forked: list[tuple[tuple[str, ...], tuple[Tensor, ...]]] = field(default_factory=list)
    keep: dict[str, Tensor] = field(default_factory=dict)

    def fork(self, z_BD: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        """A copy of a shared feature for each of K terms, whose gradients meet at the fork.

        The value is unchanged. In backward the fork receives ``g_KBD``, one row a term and sample, and returns
        ``rule(g_KBD, names)``, or their sum without a rule: one backward pass whatever K is.
        """
        names = tuple(names)
        if len(names) == 1 or not z_BD.requires_grad:
            return dict.fromkeys(names, z_BD)
        copies = _Fork.apply(z_BD, self, names)
        if self.watched:
            self.forked.append((names, copies))
        return dict(zip(names, copies, strict=True))

    def watch(self, terms: Mapping[str, Term]) -> Mapping[str, Term]:
        """The same terms; where watched, with row weights from ``keep`` on their gradients."""
        if not self.watched:
            return terms
        self.keep = {}
        self.terms = {name: replace(t, value=_KeepRows.apply(t.value, self.keep, name)) for name, t in terms.items()}
        return self.terms


class _Fork(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z_BD: Tensor, hooks: GradientHooks, names: tuple[str, ...]) -> tuple[Tensor, ...]:
        ctx.hooks, ctx.names = hooks, names
        return tuple(z_BD.view_as(z_BD) for _ in names)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        g_KBD = torch.stack(grads)
        if ctx.hooks.rule is None or ctx.hooks.probing:
            return g_KBD.sum(dim=0), None, None
        return ctx.hooks.rule(g_KBD, ctx.names), None, None


class _KeepRows(torch.autograd.Function):
    """The value as it is; in backward each row times its weight in ``keep``, read then."""

    @staticmethod
    def forward(ctx: Any, value_N: Tensor, keep: Mapping[str, Tensor], name: str) -> Tensor:
        ctx.keep, ctx.name = keep, name
        return value_N.view_as(value_N)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        keep_N = ctx.keep.get(ctx.name)
        return grads[0] if keep_N is None else grads[0] * keep_N.to(grads[0]), None, None
