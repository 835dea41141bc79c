"""Output of a recipe's forward: named losses, and the latents and decisions that callbacks and teachers read.

Letters: B samples, N decisions (one per sample, or one per token), K choices, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from descant.modules.core.objective import Term

#: ``scorer(row_N, column_N)`` -> ``[N]``: how well one modality of sample row_N matches the other of sample column_N.
Scorer = Callable[[Tensor, Tensor], Tensor]


class Decisions(NamedTuple):
    """Logits of N decisions of a batch, and the sample that each belongs to.

    ``logits(at_n)``: logits ``[n, K]`` of the decisions with these numbers, computed on demand. ``sample_N``:
    int64, in the order of samples.
    """

    logits: Callable[[Tensor], Tensor]
    sample_N: Tensor


class FusionInputs(NamedTuple):
    """Inputs of the fusion head: latents ``[B, D]`` and presence masks ``[B]`` by modality, and labels.

    ``label_B``: int64, below 0 for a sample without a label.
    """

    z: Mapping[str, Tensor]
    present: Mapping[str, Tensor]
    label_B: Tensor


@dataclass
class Output:
    """Result of ``recipe(batch)``.

    Attributes:
        terms: loss terms by name, one value per sample.
        latents: embeddings ``z_BD`` by modality, as trained.
        decisions: returns the decisions of the batch, for distillation; None for a recipe without decisions.
        logits: name of an objective -> function that returns its decisions, for soft labels.
        pairs: name of a pair of modalities -> scorer of how well rows match columns.
        aux: auxiliary terms from parts of the network, such as router balance, codebook commitment or regularizers;
            the base recipe adds them to the terms.
        fusion: inputs of a classifier's fusion head, for callbacks that weight its modalities.

    >>> import torch
    >>> list(Output({"loss": Term(torch.zeros(2))}).all_terms())
    ['loss']
    """

    terms: dict[str, Term]
    latents: Mapping[str, Tensor] = field(default_factory=dict)
    decisions: Callable[[], Decisions] | None = None
    logits: Mapping[str, Callable[[], Decisions]] = field(default_factory=dict)
    pairs: Mapping[str, Scorer] = field(default_factory=dict)
    aux: dict[str, Term] = field(default_factory=dict)
    fusion: FusionInputs | None = None

    def all_terms(self) -> dict[str, Term]:
        """Return terms and auxiliary terms together. Raise ValueError for a name that is in both."""
        twice = self.terms.keys() & self.aux.keys()
        if twice:
            raise ValueError(f"term {min(twice)!r}: both a term and an auxiliary term; rename one")
        return {**self.terms, **self.aux}
