"""Loss terms, one value per sample until the very end, and the objective that mixes them.

Letters: N rows of one term (samples or tokens), K terms.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from descant.modules.core.host import has_host_copy, host_copy, to_device


@dataclass
class Term:
    """One named loss term, ``contribution = sum(weight * value * valid) / norm``.

    Attributes:
        value: float ``[N]``, one loss per row; invalid rows may hold any value, finite or not.
        weight: float ``[N]`` or None for ones. It is never divided by its own sum, so a weight changes the gradient of
            its sample only (three public releases average first, so that their weights have no effect).
        valid: bool ``[N]`` or None for all rows.
        norm: ``"valid"`` divides by the valid rows of the whole optimizer step (all ranks, all micro-batches);
            ``"local"`` deliberately divides by those of this micro-batch on this rank; a number is used as it is.
        whole: the value is one number computed from the rows of all ranks, gathered with gradients
            (:func:`descant.modules.losses.gather`): a batch-level loss, such as decorrelation. Without gathering, each
            rank would have a number of its own.
        given: the modalities whose joint presence is exactly ``valid``. The batch then knows the step's count in
            advance, which accumulation needs; without ``given``, the count is summed over ranks.

    >>> term = Term(torch.tensor([1.0, 2.0, 9.0]), valid=torch.tensor([True, True, False]))
    >>> float(term.sum() / term.count())
    1.5
    """

    value: Tensor
    weight: Tensor | None = None
    valid: Tensor | None = None
    norm: Literal["valid", "local"] | float | Tensor = "valid"
    given: tuple[str, ...] = ()
    whole: bool = False

    def sum(self) -> Tensor:
        """Return the scalar ``sum(weight * value * valid)``; an invalid row adds exactly zero to value and gradient."""
        value_N = self.value if self.weight is None else self.value * self.weight
        if self.valid is not None:
            # torch.where instead of a product: 0 * inf would be nan, in the value and in the gradient
            value_N = torch.where(self.valid, value_N, torch.zeros((), dtype=value_N.dtype, device=value_N.device))
        return value_N.sum()

    def count(self) -> Tensor:
        """Count the valid rows of this micro-batch on this rank, as an int64 scalar."""
        if self.valid is None:
            return torch.full((), self.value.numel(), device=self.value.device)  # made on the device: no copy
        return self.valid.sum()


def held_out_losses(terms: Mapping[str, Term], mix: Mapping[str, float] | None = None) -> dict[str, Term]:
    """Return ``loss``, the mixed sum of each sample's terms, and ``loss_{term}`` for each term if there are several.

    A sample counts if one of its terms is valid; an invalid term adds zero. Weights have no effect.

    >>> a = Term(torch.tensor([1.0, 2.0]), valid=torch.tensor([True, False]))
    >>> losses = held_out_losses({"a": a, "b": Term(torch.tensor([3.0, 4.0]))}, {"b": 0.5})
    >>> losses["loss"].value.tolist(), list(losses)
    ([2.5, 2.0], ['loss', 'loss_a', 'loss_b'])
    """
    device = next(iter(terms.values())).value.device
    total_N, any_N = torch.zeros((), device=device), torch.zeros((), dtype=torch.bool, device=device)
    for name, term in terms.items():
        valid_N = torch.ones_like(term.value, dtype=torch.bool) if term.valid is None else term.valid
        total_N = total_N + (mix or {}).get(name, 1.0) * torch.where(valid_N, term.value, 0.0)
        any_N = any_N | valid_N
    each = {f"loss_{name}": term for name, term in terms.items()} if len(terms) > 1 else {}
    return {"loss": Term(total_N, valid=any_N), **each}


class _Mix(torch.autograd.Function):
    """``sum_k mix_k * term_k``; backward reads the coefficients from the live tensor."""

    @staticmethod
    def forward(ctx: Any, mix_K: Tensor, *terms: Tensor) -> Tensor:
        # an attribute, not save_for_backward: a callback may rewrite the coefficients between forward and backward
        ctx.mix_K = mix_K
        terms_K = torch.stack(terms)
        return (mix_K.to(terms_K.dtype) * terms_K).sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, *(grad * mix_k.to(grad.dtype) for mix_k in ctx.mix_K.unbind())


class Objective:
    """The terms of one backward, already normalised, and the coefficients that mix them.

    ``terms``: name -> scalar. ``mix``: float ``[K]`` in the order of ``terms``, initially the given coefficients or
    ones; a harmonizer writes it in place before the backward reaches the mix. ``total``: ``sum_k mix_k * term_k``.

    >>> x = torch.ones((), requires_grad=True)
    >>> objective = Objective({"a": 2 * x, "b": 3 * x})
    >>> objective.mix.copy_(torch.tensor([1.0, 10.0])) is objective.mix
    True
    >>> objective.total.backward(); float(x.grad)
    32.0
    """

    def __init__(self, terms: Mapping[str, Tensor], mix: Mapping[str, float] | None = None) -> None:
        if not terms:
            raise ValueError("an objective needs at least one term; the recipe's terms() returned none")
        self.terms = dict(terms)
        first = next(iter(self.terms.values()))
        # at least float32: a coefficient is not an activation
        dtype = torch.promote_types(first.dtype, torch.float32)
        mix_K = torch.tensor([(mix or {}).get(name, 1.0) for name in self.terms], dtype=dtype)
        self.mix = to_device(mix_K, first.device)
        self.total: Tensor = _Mix.apply(self.mix, *self.terms.values())


def means(value_N: Tensor, sample_N: Tensor, samples: int) -> tuple[Tensor, Tensor]:
    """Average the rows of each sample: the means ``[B]``, and which samples have rows. All samples count alike.

    >>> means(torch.tensor([1.0, 3.0, 5.0]), torch.tensor([0, 0, 2]), 3)
    (tensor([2., 0., 5.]), tensor([ True, False,  True]))
    """
    total_B = value_N.new_zeros(samples).index_add(0, sample_N, value_N)
    count_B = count_rows_by_sample(sample_N, samples)
    return total_B / count_B.clamp(min=1), count_B > 0


def count_rows_by_sample(sample_N: Tensor, samples: int) -> Tensor:
    """Count the rows of each sample: int64 ``[B]``.

    >>> count_rows_by_sample(torch.tensor([0, 2, 2]), 4).tolist()
    [1, 0, 2, 0]
    """
    if has_host_copy(sample_N):  # on a device, bincount waits to read the largest number
        return to_device(torch.bincount(host_copy(sample_N), minlength=samples), sample_N.device)
    return sample_N.new_zeros(samples).index_add(0, sample_N, torch.ones_like(sample_N))
