from __future__ import annotations

import pytest
import torch

from descant.modules.core.batch import Batch
from descant.modules.core.hooks import GradientHooks
from descant.modules.core.loss_reduction import Step
from descant.modules.core.objective import Objective, Term
from tests.tolerance import F32, ulps


def batch_of(present: list[bool], step: list[bool] | None = None) -> Batch:
    mask = torch.tensor(present)
    return Batch({"a": torch.zeros(len(mask), 1)}, {"a": mask}, step={"a": torch.tensor(step or present)})


def test_one_weight_changes_one_samples_gradient() -> None:
    value = torch.tensor([1.0, 2.0, 3.0, 4.0], requires_grad=True)
    weight = torch.ones(4)

    def gradient(weight: torch.Tensor) -> torch.Tensor:
        objective = Step()({"t": Term(value, weight=weight)}, batch_of([True] * 4))
        (grad,) = torch.autograd.grad(objective.total, value)
        return grad

    before, after = gradient(weight), gradient(torch.tensor([1.0, 5.0, 1.0, 1.0]))
    assert (after - before).tolist() == [0.0, 1.0, 0.0, 0.0]


def test_invalid_rows_give_exactly_zero_even_when_infinite() -> None:
    raw = torch.tensor([1.0, 0.0], requires_grad=True)
    term = Term(raw.log(), valid=torch.tensor([True, False]))
    objective = Step()({"t": term}, batch_of([True, False]))
    objective.total.backward()
    assert float(objective.total) == 0.0
    assert raw.grad is not None
    assert raw.grad.tolist()[0] == 1.0


def test_norm_is_the_whole_steps_count() -> None:
    valid = torch.tensor([True, False])
    term = Term(torch.tensor([6.0, 9.0]), valid=valid, given=("a",))
    objective = Step(world=1, accumulate=2)({"t": term}, batch_of([True, False], [True, False, True, True]))
    # 3 valid rows in the step; Lightning divides by accumulate = 2 afterwards
    assert float(objective.total) == pytest.approx(6.0 / 3 * 2, rel=ulps(4, F32))


def test_local_and_given_norms() -> None:
    step, batch = Step(world=1, accumulate=2), batch_of([True, True])
    assert float(step({"t": Term(torch.tensor([2.0, 4.0]), norm="local")}, batch).total) == 3.0
    assert float(step({"t": Term(torch.tensor([2.0, 4.0]), norm=12.0)}, batch).total) == pytest.approx(
        1.0, rel=ulps(4, F32)
    )


def test_accumulating_a_count_that_only_the_forward_knows_is_refused() -> None:
    with pytest.raises(ValueError, match="term 't' is divided by the valid rows of 2 micro-batches"):
        Step(accumulate=2)({"t": Term(torch.ones(2))}, batch_of([True, True]))


def test_non_finite_term_is_named() -> None:
    with pytest.raises(FloatingPointError, match="'bad' is nan"):
        Step()({"good": Term(torch.ones(2)), "bad": Term(torch.tensor([1.0, torch.nan]))}, batch_of([True, True]))


def test_mix_is_read_at_backward_time() -> None:
    x = torch.ones((), requires_grad=True)
    objective = Objective({"a": 2 * x, "b": 3 * x})
    assert float(objective.total) == 5.0
    objective.mix.copy_(torch.tensor([0.0, 2.0]))
    objective.total.backward()
    assert x.grad is not None
    assert float(x.grad) == 6.0


def test_no_terms_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one term"):
        Objective({})


def test_probing_passes_forks_through() -> None:
    hooks = GradientHooks(rule=lambda g_KBD, names: g_KBD.sum(0) * 0)
    z = torch.ones(2, 3, requires_grad=True)
    copies = hooks.fork(z, ("a", "b"))
    total = copies["a"].sum() + 2 * copies["b"].sum()
    (ruled,) = torch.autograd.grad(total, z, retain_graph=True)
    hooks.probing = True
    (probed,) = torch.autograd.grad(total, z)
    assert ruled.unique().tolist() == [0.0]
    assert probed.unique().tolist() == [3.0]
