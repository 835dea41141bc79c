"""The step: one object in every recipe that owns what a whole optimizer step must agree on.

Step-wide counts, the mix of the terms, the forks where features are shared, chunks of features, and whether a probe
is running.
Letters: B samples, D width, K terms.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from descant.modules.core.batch import Batch
from descant.modules.core.chunks import chunked, nearest_divisor
from descant.modules.core.objective import Objective, Term

#: Micro-batches after which their values are read, whoever asks: what is kept of each is a few numbers a sample.
UNREAD = 1000

#: ``rule(g_KBD, names) -> g_BD``: what a feature-level harmonizer does with the per-sample gradients of K terms.
ForkRule = Callable[[Tensor, tuple[str, ...]], Tensor]


class FusionInputs(NamedTuple):
    """What a classifier decided of in a forward: latents ``[B, D]`` and presence ``[B]`` by modality, and labels.

    ``label_B``: int64, below 0 where there is none.
    """

    z: Mapping[str, Tensor]
    present: Mapping[str, Tensor]
    label_B: Tensor


class Decisions(NamedTuple):
    """What a network decided of a batch: N decisions, of which a sample has one, or one a token.

    ``logits(at_n)``: ``[n, K]`` of the decisions with these numbers, made when they are asked for; ``sample_N``: int64,
    whose each is, in the order of samples.
    """

    logits: Callable[[Tensor], Tensor]
    sample_N: Tensor


class UnreadTerms(NamedTuple):
    """Of a micro-batch on an accelerator: whether its terms are finite (0-d, bool), and what to tell where not."""

    finite: Tensor
    terms: Mapping[str, Term]
    scalars: Mapping[str, Tensor]
    index_B: Tensor


@dataclass
class Step:
    """Turns a recipe's terms into the scalar that Lightning's own backward differentiates.

    Lightning divides a micro-batch's loss by ``accumulate`` and the strategy averages gradients over ``world``
    ranks, while a term is divided by a count of the whole step: both factors are put back here, so the gradient
    is ``d/dtheta sum_k mix_k * sum_n(weight * value * valid) / norm_k`` over the whole step, however it is cut.

    Attributes:
        world: ranks that share the step. accumulate: micro-batches that share it.
        mix: fixed coefficients by term name (absent names count 1).
        chunks: pieces of a rank's batch for :meth:`chunked`.
        rule: the harmonizer at the forks, or None for the plain sum.
        watched: keep ``terms`` and ``forked`` of the last forward, (names, copies) a fork, and let ``keep`` weigh rows:
            name -> ``[N]``, read at backward time, which scales the gradients of a term's rows and not its value.
        probing: while a callback differentiates terms one by one, forks pass gradients through untouched.
        objective: the last objective, for callbacks between forward and backward.
        decided: what a classifier was asked in the last forward, for those who weigh its modalities.
        said: makes the decisions of the last forward in training, for those who compare them with a teacher's.
        latents: its embeddings by modality. pairs: by the name of a pair how well ``(row_N, column_N)`` fit, ``[N]``.
        hears: what a callback lets a classifier's decision hear of who is present in a training batch, or None for all.
        extras: what callbacks add to the terms of a classifier, of :class:`descant.modules.balance.mcr.FusionContext`.
        raises: at once for a term that is not finite; on an accelerator, which would have to be waited for, when
            :meth:`require_finite` is called. If not, all gradients of the step become nan, so that whoever looks at
            them knows on every rank, and ``faults`` holds name -> (value, ids of the samples it began in).
        unread: on an accelerator, values of micro-batches that nobody has looked at yet; :meth:`read` does. All
            gradients of one with a term that is not finite are nan there, too.
    """

    world: int = 1
    accumulate: int = 1
    mix: Mapping[str, float] = field(default_factory=dict)
    chunks: int = 1
    rule: ForkRule | None = None
    watched: bool = False
    terms: Mapping[str, Term] = field(default_factory=dict)
    forked: list[tuple[tuple[str, ...], tuple[Tensor, ...]]] = field(default_factory=list)
    keep: dict[str, Tensor] = field(default_factory=dict)
    probing: bool = False
    objective: Objective | None = None
    decided: FusionInputs | None = None
    said: Callable[[], Decisions] | None = None
    latents: Mapping[str, Tensor] = field(default_factory=dict)
    pairs: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = field(default_factory=dict)
    hears: Callable[[Batch], Mapping[str, Tensor]] | None = None
    extras: list[Callable[[Any], Mapping[str, Term]]] = field(default_factory=list)
    raises: bool = True
    faults: dict[str, tuple[float, list[int]]] = field(default_factory=dict)
    unread: list[UnreadTerms] = field(default_factory=list)

    def __call__(self, terms: Mapping[str, Term], batch: Batch) -> Objective:
        """The objective of this micro-batch. Raises FloatingPointError naming a term that is not finite: see raises.

        On an accelerator nothing is read: gradients of a micro-batch with such a term become nan, and that is found by
        :meth:`read`, which is called where numbers of the device are read anyway.
        """
        self._require_samples(terms, batch)
        norms = self._norms(terms, batch)
        if self.watched:
            self.keep = {}
            terms = {name: replace(t, value=_Kept.apply(t.value, self.keep, name)) for name, t in terms.items()}
            self.terms = terms
        scale = float(self.world * self.accumulate)
        # in this order: a number over an integer tensor would be float32, whatever the terms are
        scalars = {name: term.sum() * scale / norms[name] for name, term in terms.items()}
        value_K = torch.stack([s.detach().float() for s in scalars.values()])
        finite = torch.isfinite(value_K).all()
        if value_K.is_cpu:
            if not finite:
                self._not_finite(terms, scalars, batch)
                scalars = {name: scalar * math.nan for name, scalar in scalars.items()}
        else:
            factor = torch.where(finite, 1.0, math.nan)
            kept = {name: replace(term, value=term.value.detach(), weight=None) for name, term in terms.items()}
            self.unread.append(UnreadTerms(finite, kept, {n: s.detach() for n, s in scalars.items()}, batch.index))
            scalars = {name: scalar * factor.to(scalar.dtype) for name, scalar in scalars.items()}
            if len(self.unread) == UNREAD:  # whoever never asks is told all the same
                self.require_finite() if self.raises else self.read()
        self.objective = Objective(scalars, self.mix)
        return self.objective

    def _require_samples(self, terms: Mapping[str, Term], batch: Batch) -> None:
        """Raises ValueError for a loss of a batch that would be one of each rank's or micro-batch's part of it."""
        for name, term in terms.items():
            if term.value.numel() != 1 or len(batch) == 1 or term.norm == "local":
                continue
            if self.world > 1 and not term.whole:
                raise ValueError(
                    f"term {name!r} is one number for {len(batch)} samples: on {self.world} ranks each would have its "
                    "own; gather(...) what it is made of, and say Term(..., whole=True)"
                )
            if self.accumulate > 1:
                raise ValueError(
                    f"term {name!r} is one number for a batch: accumulated small batches would each have their own"
                )

    def read(self) -> None:
        """Look at what an accelerator has found since the last time: one read, and more where something is wrong."""
        unread, self.unread = self.unread, []
        if unread:
            finite = torch.stack([one.finite for one in unread]).tolist()
            for one in (one for one, good in zip(unread, finite, strict=True) if not good):
                self._note(one.terms, one.scalars, one.index_B)

    def require_finite(self) -> None:
        """:meth:`read`. Raises FloatingPointError naming the first term that was not finite since the last time."""
        self.read()
        if self.faults:
            name, (value, _) = next(iter(self.faults.items()))
            self.faults.clear()
            raise FloatingPointError(f"loss term {name!r} is {value}: not finite")

    def _not_finite(self, terms: Mapping[str, Term], scalars: Mapping[str, Tensor], batch: Batch) -> None:
        self._note(terms, scalars, batch.index)
        if self.raises:
            self.require_finite()

    def _note(self, terms: Mapping[str, Term], scalars: Mapping[str, Tensor], index_B: Tensor) -> None:
        for name, value in ((name, float(s.detach())) for name, s in scalars.items()):
            if math.isfinite(value):
                continue
            term, ids = terms[name], []
            if term.value.shape == index_B.shape:
                wrong_B = ~torch.isfinite(term.value.detach())
                ids = index_B[wrong_B if term.valid is None else wrong_B & term.valid].tolist()
            self.faults[name] = value, self.faults.get(name, (value, []))[1] + ids

    def _norms(self, terms: Mapping[str, Term], batch: Batch) -> dict[str, Tensor | float]:
        norms: dict[str, Tensor | float] = {}
        unknown: list[str] = []
        for name, term in terms.items():
            if not isinstance(term.norm, str):
                norms[name] = term.norm
            elif term.norm == "local":
                # the scale of __call__ does not belong to a local norm: its gradient is averaged, not summed
                norms[name] = term.count().clamp(min=1) * self.world * self.accumulate
            elif term.given:
                norms[name] = batch.count(*term.given).clamp(min=1)
            else:
                unknown.append(name)
        if unknown and self.accumulate > 1:
            raise ValueError(
                f"term {unknown[0]!r} is divided by the valid rows of {self.accumulate} micro-batches, which only its "
                "forward knows: give the term `given=(modalities)`, a number as `norm`, or do not accumulate"
            )
        if unknown:
            counts = torch.stack([terms[name].count() for name in unknown])
            if self.world > 1:
                dist.all_reduce(counts)
            norms |= zip(unknown, counts.clamp(min=1).unbind(), strict=True)
        return norms

    def chunked(self, function: Callable[[Tensor], Tensor], x_B: Tensor, module: nn.Module) -> Tensor:
        """``function(x_B)`` with the activations of one of ``chunks`` pieces at a time: see :func:`chunked`."""
        return chunked(function, x_B, self.chunks, module)

    def require_chunks(self, rows: int) -> None:
        """Raises ValueError with the nearest number that works unless ``chunks`` divides a rank's rows."""
        if rows % self.chunks:
            raise ValueError(
                f"chunks {self.chunks} does not divide the {rows} rows of a rank's batch; "
                f"{nearest_divisor(rows, self.chunks)} does"
            )

    def fork(self, z_BD: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        """Hand each of K terms its own copy of a shared feature; backward harmonizes all K gradients at once.

        The value is unchanged. On the way back the fork receives ``g_KBD``, one row a term and sample, and returns
        ``rule(g_KBD, names)``, or their sum where no rule is set: one backward whatever K is.
        """
        names = tuple(names)
        if len(names) == 1 or not z_BD.requires_grad:
            return dict.fromkeys(names, z_BD)
        copies = _Fork.apply(z_BD, self, names)
        if self.watched:
            self.forked.append((names, copies))
        return dict(zip(names, copies, strict=True))


class _Fork(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, z_BD: Tensor, step: Step, names: tuple[str, ...]
    ) -> tuple[Tensor, ...]:
        ctx.step, ctx.names = step, names  # type: ignore[attr-defined]
        return tuple(z_BD.view_as(z_BD) for _ in names)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        step: Step = ctx.step  # type: ignore[attr-defined]
        g_KBD = torch.stack(grads)
        if step.rule is None or step.probing:
            return g_KBD.sum(dim=0), None, None
        return step.rule(g_KBD, ctx.names), None, None  # type: ignore[attr-defined]


class _Kept(torch.autograd.Function):
    """The value as it is; in backward each row times what ``keep`` says of the term by then."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, value_N: Tensor, keep: Mapping[str, Tensor], name: str
    ) -> Tensor:
        ctx.keep, ctx.name = keep, name  # type: ignore[attr-defined]
        return value_N.view_as(value_N)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        keep_N = ctx.keep.get(ctx.name)  # type: ignore[attr-defined]
        return grads[0] if keep_N is None else grads[0] * keep_N.to(grads[0]), None, None
