"""Blending in real fits, against an explicit loop in double precision.

Letters: K terms.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import Tensor

from descant.callbacks.balance.g_blending import GradientBlending
from descant.datamodules.base import BatchDataset
from descant.modules.core.batch import Batch
from descant.modules.core.objective import Objective
from descant.recipes import Fusion
from tests.callbacks.balance.test_balance import Watching, model, whole
from tests.ranks import run_ranks
from tests.recipes.test_fusion import SignData, Signs, double, gradients, recipe
from tests.step_toy import QUIET, largest_gap
from tests.tolerance import F32, F64, ulps

NAMES = ("fused", "image", "text")
EPOCHS = 5
Seen = tuple[list[tuple[dict[str, Tensor], dict[str, Tensor]]], dict[str, Any]]


class AdvantageOutput(SignData):
    def evaluation_sets(self, stage: str) -> dict[str, BatchDataset]:
        return {"val": Signs(16, seed=1, whole=False), "more": Signs(8, seed=2, whole=False)}


def fitted(accumulate: int = 1, world: int = 1, sham: Any = None) -> Seen:
    """Epochs of one step each, and a validation after each."""
    watch, blend = Watching(), GradientBlending(sham=sham)
    options = {name: value for name, value in QUIET.items() if name != "limit_val_batches"}
    trainer = L.Trainer(
        max_epochs=EPOCHS,
        devices=world,
        strategy="ddp" if world > 1 else "auto",
        accumulate_grad_batches=accumulate,
        num_sanity_val_steps=1,
        callbacks=[blend, watch],
        **options,
    )
    trainer.fit(model(), datamodule=AdvantageOutput(batch_size=24, whole=False))
    return watch.steps, blend.state_dict()


def held_out() -> list[Batch]:
    sets = AdvantageOutput(batch_size=24, whole=False).evaluation_sets("validate").values()
    return [double(Batch(dict(s.x), dict(s.has), {"kind": s.label})) for s in sets if isinstance(s, Signs)]


def means(at: Fusion, batches: list[Batch]) -> list[float]:
    found = []
    for name in NAMES:
        terms = [at.terms(b)[name] for b in batches]
        found.append(float(sum(t.sum() for t in terms) / sum(t.count() for t in terms)))
    return found


def gap(seen: Seen, sham: bool = False) -> tuple[float, list[list[float]]]:
    """The largest to what the formulas give, and the weights of each step."""
    largest, weights_of, before, b = 0.0, [], None, whole()
    weight = [1.0, 1.0, 1.0]
    states = [state for state, _ in seen[0]]
    for step, (state, found) in enumerate(seen[0]):
        at: Any = model()
        at.load_state_dict(state, strict=False)
        weights_of.append(weight)
        at.step.mix = dict(zip(NAMES, weight, strict=True))
        largest = max(largest, largest_gap(found, gradients(at, b)))
        if step + 1 == len(states):
            break
        train = [float(v) for v in at.step(at.terms(b), b).terms.values()]
        after: Any = model()
        after.load_state_dict(states[step + 1], strict=False)
        val = means(after, held_out())
        if before is not None:
            gain = [max(old - new, 0.0) for old, new in zip(before[0], val, strict=True)]
            over = [abs((v - t) - (w - u)) for v, t, w, u in zip(val, train, *before, strict=True)]
            value = [g / max(o, 1e-3 * max(over)) ** 2 for g, o in zip(gain, over, strict=True)]
            weight = [3 * v / sum(value) for v in value] if sum(value) > 0 else [1.0, 1.0, 1.0]
            weight = [weight[-1], *weight[:-1]] if sham else weight
        before = val, train
    return largest, weights_of


def test_each_step_equals_the_loop() -> None:
    for accumulate in (1, 4):
        largest, weights = gap(fitted(accumulate))
        assert largest < ulps(2**16, F64), accumulate
        assert weights[0] == weights[1] == [1.0] * 3 and all(abs(w[0] - 1) > 1e-3 for w in weights[2:])
    assert gap(fitted(sham="permute"), sham=True)[0] < ulps(2**16, F64)


def on_a_rank(rank: int) -> list[Seen]:
    return [fitted(n, world=2) for n in (1, 2)]


@pytest.mark.slow
@pytest.mark.ddp
def test_two_ranks_equal_the_loop_and_each_other() -> None:
    for one, two in zip(*run_ranks(2, on_a_rank), strict=True):
        assert all(largest_gap(a[1], b[1]) == 0 for a, b in zip(one[0], two[0], strict=True))
        assert gap(one)[0] < ulps(2**16, F64)


def test_weights_by_hand() -> None:
    before = torch.tensor([[2.0, 2.0, 2.0], [2.0, 2.0, 2.0]])
    now = torch.tensor([[1.0, 1.5, 2.5], [0.5, 1.0, 1.0]])  # the third one got worse
    assert GradientBlending.compute_weights(before, now).tolist() == pytest.approx([2.0, 1.0, 0.0], abs=ulps(8, F32))
    worse = torch.tensor([[3.0, 3.0, 3.0], [1.0, 1.0, 1.0]])
    assert GradientBlending.compute_weights(before, worse).tolist() == [1.0] * 3, "nobody got better"
    even = torch.tensor([[1.0, 1.5, 2.0], [1.0, 1.5, 2.0]])
    assert GradientBlending.compute_weights(before, even).tolist() == pytest.approx(
        [2.0, 1.0, 0.0], abs=ulps(8, F32)
    ), "no gap opened: by the gains alone"
    exact = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.5, 0.5]])
    assert GradientBlending.compute_weights(before, exact).isfinite().all()


def test_it_goes_on_where_it_was() -> None:
    _, state = fitted()
    again = GradientBlending()
    again.load_state_dict(state)
    assert again.validations == EPOCHS and again.weight_K is not None and torch.equal(again.weight_K, state["weight_K"])
    assert again.before_2K is not None and again.names == NAMES


def fit(recipe: Any, *callbacks: L.Callback) -> None:
    L.Trainer(max_steps=1, callbacks=list(callbacks), **QUIET).fit(recipe, datamodule=SignData(24, whole=False))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GradientBlending(every=0), "every 0: 1 is the least"),
        (lambda: fit(BoringModel(), GradientBlending()), "the protocol HasTerms .*; BoringModel lacks it"),
        (lambda: fit(recipe(unimodal=False, classes=2).double(), GradientBlending()), "one term, fused"),
    ],
)
def test_what_cannot_be_is_one_line(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_step_that_is_left_out_says_nothing() -> None:
    rule, recipe = GradientBlending(), Fusion.__new__(Fusion)
    for values in ([1.0, 2.0], [math.nan, 4.0]):
        terms = {name: torch.tensor(value, requires_grad=True) for name, value in zip("ab", values, strict=True)}
        object.__setattr__(recipe, "step", SimpleNamespace(objective=Objective(terms)))
        rule.on_before_backward(None, recipe, torch.zeros(()))  # type: ignore[arg-type]
    assert rule.state_dict()["_train_2K"].tolist() == [[1.0, 6.0], [1.0, 2.0]]
