"""Find non-finite loss terms and their samples, without a device read in every step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from descant.modules.core.objective import Term

#: The most micro-batches whose checks stay unread on an accelerator; each takes a few numbers per sample.
UNREAD = 1000


class Unread(NamedTuple):
    """Unread check of one micro-batch on an accelerator: whether its terms are finite (0-d, bool), and the terms."""

    finite: Tensor
    terms: Mapping[str, Term]
    scalars: Mapping[str, Tensor]
    index_B: Tensor


@dataclass
class Faults:
    """Record of loss terms that were not finite.

    Attributes:
        raises: raise an error for such a term: on the CPU at once; on an accelerator, where that would mean waiting,
            when :meth:`require_finite` is called. If false, the step's gradients all become nan, which every rank sees.
        terms: name -> (value, ids of the samples with a non-finite value), since the terms were last cleared.
        unread: checks of micro-batches that have not been read from the accelerator yet.
    """

    raises: bool = True
    terms: dict[str, tuple[float, list[int]]] = field(default_factory=dict)
    unread: list[Unread] = field(default_factory=list)

    def check_terms(self, terms: Mapping[str, Term], scalars: dict[str, Tensor], index_B: Tensor) -> dict[str, Tensor]:
        """Return the scalars; all become nan if one of them is not finite.

        Raises:
            FloatingPointError: naming the term, if ``raises``.
        """
        value_K = torch.stack([s.detach().float() for s in scalars.values()])
        finite = torch.isfinite(value_K).all()
        if value_K.is_cpu:
            if finite:
                return scalars
            self._note(terms, scalars, index_B)
            if self.raises:
                self.require_finite()
            return {name: scalar * math.nan for name, scalar in scalars.items()}
        factor = torch.where(finite, 1.0, math.nan)
        kept = {name: Term(term.value.detach(), None, term.valid) for name, term in terms.items()}
        self.unread.append(Unread(finite, kept, {n: s.detach() for n, s in scalars.items()}, index_B))
        scalars = {name: scalar * factor.to(scalar.dtype) for name, scalar in scalars.items()}
        if len(self.unread) == UNREAD:
            self.require_finite() if self.raises else self.read()
        return scalars

    def read(self) -> None:
        """Read all checks that are still on the accelerator: in one read, plus more for terms that were not finite."""
        unread, self.unread = self.unread, []
        if unread:
            finite = torch.stack([one.finite for one in unread]).tolist()
            for one in (one for one, good in zip(unread, finite, strict=True) if not good):
                self._note(one.terms, one.scalars, one.index_B)

    def require_finite(self) -> None:
        """Read all checks. Raise FloatingPointError for the first term that was not finite since the last call."""
        self.read()
        if self.terms:
            name, (value, _) = next(iter(self.terms.items()))
            self.terms.clear()
            raise FloatingPointError(f"loss term {name!r} is {value}: not finite")

    def _note(self, terms: Mapping[str, Term], scalars: Mapping[str, Tensor], index_B: Tensor) -> None:
        for name, value in ((name, float(s.detach())) for name, s in scalars.items()):
            if math.isfinite(value):
                continue
            term, ids = terms[name], []
            if term.value.shape == index_B.shape:
                wrong_B = ~torch.isfinite(term.value.detach())
                ids = index_B[wrong_B if term.valid is None else wrong_B & term.valid].tolist()
            self.terms[name] = value, self.terms.get(name, (value, []))[1] + ids
