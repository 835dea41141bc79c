"""Harmony tower by tower in real fits, against explicit loops in double precision, and the branches of its own rule.

Letters: K terms.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import Tensor

from descant.callbacks.harmonize.features import HarmonizeFeatures
from descant.callbacks.harmonize.terms import Harmonize
from descant.callbacks.harmonize.towers import HarmonizeTowers
from descant.modules.core.batch import Batch
from descant.modules.core.rng import mix
from descant.modules.multitask import DWA, MGDA, GradDrop, GradVac, MMPareto, PCGrad, Rule
from descant.recipes import Fusion
from tests.callbacks.balance.test_balance import Steps, Watching, model, whole
from tests.callbacks.balance.test_balance import fitted as balanced
from tests.callbacks.harmonize.test_terms import Counts
from tests.ranks import run_ranks
from tests.recipes.test_fusion import FUSIONS, WIDTHS, SignData, recipe
from tests.step_toy import QUIET, largest_gap
from tests.tolerance import F32, F64, rounding, ulps

RULES: dict[str, Callable[[], Rule]] = {"pareto": lambda: MMPareto(gamma=1.5), "pcgrad": PCGrad, "mgda": MGDA}
UNEVEN = {"fused": 0.5, "image": 2.0}  # the recipe's own mix


class Rows(Watching):
    """And which rows each micro-batch had."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[list[int]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Batch, batch_idx: int) -> None:
        there_B = batch.present["image"] | batch.present["text"]  # of samples, and not of padding
        self.rows.append(batch.index[there_B].tolist())


Seen = tuple[Steps, list[list[int]]]


def fitted(
    callback: L.Callback | None, kind: str = "late", accumulate: int = 1, world: int = 1, **options: Any
) -> Seen:
    watch = Rows()
    return balanced(callback, kind, accumulate, world, watch=watch, mix=UNEVEN, **options), watch.rows


def own(named: dict[str, Any], m: str) -> list[str]:
    return [n for n in named if n.split(".")[0] in ("towers", "pools", "heads") and n.split(".")[1] == m]


def wanted(rule: Rule, at: Fusion, cut: list[list[int]], step: int) -> dict[str, Tensor]:
    """The gradient of a step: of each micro-batch (its rows, of all ranks), mixed tower by tower, added up."""
    b, total = whole(), {name: torch.zeros_like(p) for name, p in at.named_parameters()}
    for rows in cut:
        part = b.select(torch.tensor(rows))
        part.step = dict(b.present)
        terms = at.step(at.terms(part), part).terms
        named = dict(at.named_parameters())
        scaled = {}
        for k, term in terms.items():
            each = torch.autograd.grad(term, list(named.values()), retain_graph=True, allow_unused=True)
            scaled[k] = {
                n: torch.zeros_like(p) if g is None else UNEVEN.get(k, 1.0) * g
                for (n, p), g in zip(named.items(), each, strict=True)
            }
        for name in named:
            total[name] += sum(of[name] for of in scaled.values())
        for m in WIDTHS:
            names = own(named, m)
            flat_KP = torch.stack([torch.cat([scaled[k][n].flatten() for n in names]) for k in ("fused", m)])
            mix_K = rule.weights((flat_KP @ flat_KP.T)[None], torch.ones(2), mix(0, "harmony", step, m))[0]
            for n in names:
                total[n] += (mix_K[0] - 1) * scaled["fused"][n] + (mix_K[1] - 1) * scaled[m][n]
    return total


def gap(rule: Rule, seen: Seen, kind: str, parts: list[list[list[int]]]) -> float:
    largest = 0.0
    for step, ((weights, found), cut) in enumerate(zip(seen[0], parts, strict=True)):
        at = model(kind, mix=UNEVEN)
        at.load_state_dict(weights, strict=False)
        largest = max(largest, largest_gap(found, wanted(rule, at, cut, step)))
    return largest


def cuts(rows: list[list[list[int]]], accumulate: int) -> list[list[list[int]]]:
    """Of the rows that each rank had: a step's micro-batches, of all ranks."""
    together = [[n for mine in micro for n in mine] for micro in zip(*rows, strict=True)]
    return [together[n : n + accumulate] for n in range(0, len(together), accumulate)]


@pytest.mark.parametrize("kind", FUSIONS)
@pytest.mark.parametrize("rule", RULES)
def test_each_step_equals_the_loop(rule: str, kind: str) -> None:
    plain = fitted(None, kind)[0][0][1]
    for accumulate in (1, 4):
        seen = fitted(HarmonizeTowers(RULES[rule]()), kind, accumulate)
        assert gap(RULES[rule](), seen, kind, cuts([seen[1]], accumulate)) < ulps(4096, F64), accumulate
        if rule != "pcgrad":  # these change something even where nothing conflicts
            assert largest_gap(seen[0][0][1], plain) > 1e-3


def on_a_rank(rank: int) -> list[Seen]:
    return [fitted(HarmonizeTowers(make()), accumulate=n, world=2) for make in RULES.values() for n in (1, 2)]


@pytest.mark.ddp
def test_two_ranks_equal_the_loop_and_each_other() -> None:
    first, second = run_ranks(2, on_a_rank)
    every = [(make, n) for make in RULES.values() for n in (1, 2)]
    for (make, n), one, two in zip(every, first, second, strict=True):
        assert all(largest_gap(a[1], b[1]) == 0 for a, b in zip(one[0], two[0], strict=True))
        assert gap(make(), one, "late", cuts([one[1], two[1]], n)) < ulps(4096, F64)


def test_heads_and_fusion_learn_as_they_would() -> None:
    plain, mixed = fitted(None)[0][0][1], fitted(HarmonizeTowers(MMPareto()))[0][0][1]
    for name, g in plain.items():
        after = name.split(".")[0] in ("own", "fusion")
        assert torch.allclose(mixed[name], g, **rounding(64, F64)) == after or not g.any(), name


# its own rule --------------------------------------------------------------------------------------------------------


def test_pareto_takes_the_sum_or_what_is_good_for_both_as_long_as_the_sum() -> None:
    random = np.random.default_rng(0)
    eps = float(np.finfo(np.float64).eps)
    conflicts = 0
    for _ in range(200):
        g = random.normal(size=(2, 5)) * 10.0 ** random.uniform(-6, 6, (2, 1))
        found = MMPareto(gamma=1.5).weights(torch.tensor(g @ g.T)[None], torch.ones(2), 0)[0].numpy() @ g
        total = g.sum(axis=0)
        if g[0] @ g[1] >= 0:
            # neither gradient is longer than their sum: a few roundings of that
            assert np.linalg.norm(found - 1.5 * total) < 16 * eps * np.linalg.norm(total)
            continue
        conflicts += 1
        apart = g[0] - g[1]
        # both weights directly: as 1 - w the second would lose as many digits as the lengths are apart, up to 12
        h = 2 * ((-apart @ g[1]) * g[0] + (apart @ g[0]) * g[1]) / (apart @ apart)
        h *= 1.5 * max(1.0, float(np.linalg.norm(total) / np.linalg.norm(h)))
        # the solution divides by 1 - cos^2, which magnifies roundings by 1 / (1 + cos); 2.4 of them were measured
        cos = g[0] @ g[1] / np.linalg.norm(g[0]) / np.linalg.norm(g[1])
        assert np.linalg.norm(found - h) < 16 * eps / (1 + cos) * np.linalg.norm(h)
        assert (g @ found > 0).all(), "good for both"
    assert 50 < conflicts < 150


def test_pareto_stands_still_where_gradients_are_opposite() -> None:
    rule = MMPareto()
    for ratio in (1.0, 3.0, 1e-6):
        g = torch.tensor([[1.0, 2.0], [-ratio, -2 * ratio]], dtype=torch.float64)
        assert rule.weights((g @ g.T)[None], torch.ones(2), 0).abs().max() == 0
        # as float32 leaves them
        off = (g.float() * (1 + 1e-7 * torch.tensor([[1.0, -1.0], [0.3, 0.7]]))).double()
        # of what float32 has left, a step at most as long as that
        assert float((rule.weights((off @ off.T)[None], torch.ones(2), 0)[0] @ off).norm()) <= ulps(84, F32) * float(
            g.norm()
        )
    alone = torch.tensor([[4.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    assert rule.weights(alone[None], torch.ones(2), 0)[0, 0] == 1.5, "the other one is zero"


def test_between_looks_the_mix_stays() -> None:
    rule = Counts()
    fitted(HarmonizeTowers(rule, every=2), steps=3)
    assert rule.calls == 4, "two towers, of steps 0 and 2"


def test_a_gradient_that_is_not_finite_leaves_the_plain_sum_and_is_counted() -> None:
    class Broken(MGDA):
        def weights(self, gramian_BKK: Tensor, *args: Any) -> Tensor:
            assert gramian_BKK.isfinite().all()
            return super().weights(gramian_BKK, *args)

    callback = HarmonizeTowers(Broken())
    huge = model(mix={"image": 1e200})
    L.Trainer(max_steps=1, callbacks=[callback], **QUIET).fit(huge, datamodule=SignData(24, whole=False))
    assert callback.fallbacks == 1, "the picture's Gram matrix overflows, and the text's does not"
    assert callback.mix["image"].tolist() == [1.0, 1.0] and callback.mix["text"].tolist() != [1.0, 1.0]
    again = HarmonizeTowers(MGDA())
    again.load_state_dict(callback.state_dict())
    assert again.fallbacks == 1 and torch.equal(again.mix["text"], callback.mix["text"])


def fit(recipe: Any, *callbacks: L.Callback) -> None:
    L.Trainer(max_steps=1, callbacks=list(callbacks), **QUIET).fit(recipe, datamodule=SignData(24, whole=False))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: HarmonizeTowers(PCGrad(), every=0), "every 0: 1 is the least"),
        (lambda: HarmonizeTowers(DWA()), "DWA is a rule for Harmonize"),
        (lambda: HarmonizeTowers(GradVac()), "GradVac is a rule for Harmonize"),
        (lambda: HarmonizeTowers(GradDrop()), "GradDrop is a rule for HarmonizeFeatures"),
        (lambda: MMPareto(gamma=0), "gamma 0: above 0"),
        (lambda: MMPareto().weights(torch.eye(3)[None].double(), torch.ones(3), 0), "3 terms; it is for two"),
        (
            lambda: fit(BoringModel(), HarmonizeTowers(PCGrad())),
            "the protocol MultimodalClassifier .*; BoringModel lacks it, Fusion has it",
        ),
        (lambda: fit(recipe(unimodal=False, classes=2).double(), HarmonizeTowers(PCGrad())), "model.unimodal true"),
        (lambda: fit(model(), HarmonizeTowers(PCGrad()), Harmonize(PCGrad())), "cannot be combined with"),
        (lambda: fit(model(), HarmonizeFeatures(PCGrad()), HarmonizeTowers(PCGrad())), "cannot be combined with"),
        (lambda: fit(model(), HarmonizeTowers(PCGrad()), HarmonizeFeatures(PCGrad())), "cannot be combined with"),
    ],
)
def test_what_cannot_be_is_one_line(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
