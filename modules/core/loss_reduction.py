"""Loss reduction: the terms of all micro-batches and ranks of an optimizer step, summed into one scalar.

Letters: B samples, K terms.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from descant.modules.core.batch import Batch, some
from descant.modules.core.chunks import compute_in_chunks, nearest_divisor
from descant.modules.core.faults import Faults
from descant.modules.core.host import host_copy
from descant.modules.core.objective import Objective, Term
from descant.modules.core.ranks import gather, gather_objects, world


def require_split(batch: Batch) -> None:
    """Raise ValueError if all ranks read the same samples, or if their batches have no sample ids. Collective."""
    if world() == 1:
        return
    read_B = host_copy(batch.rng_seed)[host_copy(some(*batch.present.values()))]
    by_rank = gather_objects(read_B.tolist())
    if by_rank[0] and by_rank.count(by_rank[0]) == len(by_rank):
        raise ValueError(
            f"{len(by_rank)} ranks read the same samples: split the loader (use_distributed_sampler=True or a "
            "DistributedSampler), and give each Batch its index= of the whole data"
        )


@dataclass
class Step:
    """Turns named terms into the scalar that Lightning's own backward differentiates.

    Lightning divides a micro-batch's loss by ``accumulate``, and the strategy averages gradients over ``world`` ranks.
    But a term is already divided by a count of the whole step, so both factors are multiplied back here. The gradient
    is then ``d/dtheta sum_k mix_k * sum_n(weight * value * valid) / norm_k`` over the whole step, however it is divided
    into micro-batches and ranks.

    Attributes:
        world: ranks that share the step. accumulate: micro-batches that share it.
        mix: fixed coefficients by term name (1 for absent names).
        chunks: number of pieces of a rank's batch for :meth:`compute_in_chunks`.
        objective: the last objective, for callbacks between forward and backward.
        faults: record of terms that were not finite.
    """

    world: int = 1
    accumulate: int = 1
    mix: Mapping[str, float] = field(default_factory=dict)
    chunks: int = 1
    objective: Objective | None = None
    faults: Faults = field(default_factory=Faults)

    def __call__(self, terms: Mapping[str, Term], batch: Batch) -> Objective:
        """Return this micro-batch's objective. Raise FloatingPointError for a term that is not finite: see Faults."""
        self._require_samples(terms, batch)
        norms = self._norms(terms, batch)
        scale = float(self.world * self.accumulate)
        # multiply first: a number divided by an integer tensor would be float32, whatever the dtype of the terms
        scalars = {name: term.sum() * scale / norms[name] for name, term in terms.items()}
        self.objective = Objective(self.faults.check_terms(terms, scalars, batch.index), self.mix)
        return self.objective

    def with_counts(self, batch: Batch) -> Batch:
        """Add presence in the whole step to a batch; gather it over ranks unless the loader counted it. Collective."""
        # all ranks take the same branch, however many rows they have: a loader's counts cover more rows than one rank's
        if self.world * self.accumulate == 1 or not batch.present or len(next(iter(batch.step.values()))) > len(batch):
            return batch
        if self.accumulate > 1:
            raise ValueError(
                f"trainer.accumulate_grad_batches {self.accumulate}: losses are divided by counts of the whole step, "
                "which these batches lack; give the trainer datamodule=, each Batch its step=, or accumulate 1"
            )
        mask_GM = gather(torch.stack(list(batch.present.values()), dim=1))
        return replace(batch, step=dict(zip(batch.present, mask_GM.unbind(1), strict=True)))

    def _require_samples(self, terms: Mapping[str, Term], batch: Batch) -> None:
        """Raise ValueError for a batch-level loss that each rank or micro-batch would compute on its own part only."""
        if not terms:
            raise ValueError("an objective needs at least one term; the recipe's forward returned none")
        for name, term in terms.items():
            if term.value.numel() != 1 or len(batch) == 1 or term.norm == "local":
                continue
            if self.world > 1 and not term.whole:
                raise ValueError(
                    f"term {name!r} is one number for {len(batch)} samples: on {self.world} ranks each would have its "
                    "own; gather(...) what it is made of, and use Term(..., whole=True)"
                )
            if self.accumulate > 1:
                raise ValueError(
                    f"term {name!r} is one number for a batch: accumulated small batches would each have their own"
                )

    def _norms(self, terms: Mapping[str, Term], batch: Batch) -> dict[str, Tensor | float]:
        norms: dict[str, Tensor | float] = {}
        unknown: list[str] = []
        for name, term in terms.items():
            if not isinstance(term.norm, str):
                norms[name] = term.norm
            elif term.norm == "local":
                # cancel the scale of __call__: the gradient of a local norm is averaged, not summed
                norms[name] = term.count().clamp(min=1) * self.world * self.accumulate
            elif term.given:
                norms[name] = batch.count(*term.given).clamp(min=1)
            else:
                unknown.append(name)
        if unknown and self.accumulate > 1:
            raise ValueError(
                f"term {unknown[0]!r} is divided by the valid rows of {self.accumulate} micro-batches, which only its "
                "forward computes: give the term `given=(modalities)`, a number as `norm`, or do not accumulate"
            )
        if unknown:
            counts = torch.stack([terms[name].count() for name in unknown])
            if self.world > 1:
                dist.all_reduce(counts)
            norms |= zip(unknown, counts.clamp(min=1).unbind(), strict=True)
        return norms

    def compute_in_chunks(self, function: Callable[[Tensor], Tensor], x_B: Tensor, module: nn.Module) -> Tensor:
        """Compute ``function(x_B)`` with the activations of one of ``chunks`` pieces at a time."""
        return compute_in_chunks(function, x_B, self.chunks, module)

    def require_chunks(self, rows: int) -> None:
        """Raise ValueError unless ``chunks`` divides a rank's rows; the error has the nearest number that does."""
        if rows % self.chunks:
            raise ValueError(
                f"chunks {self.chunks} does not divide the {rows} rows of a rank's batch; "
                f"{nearest_divisor(rows, self.chunks)} does"
            )
