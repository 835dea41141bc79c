"""Gradient hooks of a step: forks where several terms share a feature, and how harmonizers change gradients there.

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
    """Forks of shared features and per-row gradient weights: everything that harmonizers need from a recipe.

    Attributes:
        rule: combines the gradients of the terms at every fork; None: their plain sum.
        watched: keep ``terms`` and ``forked`` (names and copies of each fork) of the last forward, and scale the
            gradients of a term's rows by ``keep`` (name -> ``[N]``, read at backward time). The term's value stays.
        probing: true while a callback differentiates terms one by one; forks then do not apply ``rule``.
    """

    rule: ForkRule | None = None
    watched: bool = False
    probing: bool = False
    terms: Mapping[str, Term] = field(default_factory=dict)
    forked: list[tuple[tuple[str, ...], tuple[Tensor, ...]]] = field(default_factory=list)
    keep: dict[str, Tensor] = field(default_factory=dict)

    def fork(self, z_BD: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        """Return one copy of a shared feature for each of K terms; their gradients meet at the fork.

        The value is unchanged. In backward the fork receives ``g_KBD``, one row per term and sample, and returns
        ``rule(g_KBD, names)``, or the sum without a rule. This takes one backward pass, whatever K is.
        """
        names = tuple(names)
        if len(names) == 1 or not z_BD.requires_grad:
            return dict.fromkeys(names, z_BD)
        copies = _Fork.apply(z_BD, self, names)
        if self.watched:
            self.forked.append((names, copies))
        return dict(zip(names, copies, strict=True))

    def watch(self, terms: Mapping[str, Term]) -> Mapping[str, Term]:
        """Return the terms; if watched, their gradients are weighted by row with ``keep``."""
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
    """Identity whose backward scales each row by its weight in ``keep``, which it reads at that time."""

    @staticmethod
    def forward(ctx: Any, value_N: Tensor, keep: Mapping[str, Tensor], name: str) -> Tensor:
        ctx.keep, ctx.name = keep, name
        return value_N.view_as(value_N)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        keep_N = ctx.keep.get(ctx.name)
        return grads[0] if keep_N is None else grads[0] * keep_N.to(grads[0]), None, None
