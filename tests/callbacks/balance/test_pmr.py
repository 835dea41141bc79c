"""Prototypes in real fits, against explicit loops over samples in double precision."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import Tensor

from descant.callbacks.balance.pmr import PMR
from descant.recipes import Fusion
from tests.callbacks.balance.test_balance import Steps, model, one, whole
from tests.callbacks.balance.test_balance import fitted as balanced
from tests.ranks import run_ranks
from tests.recipes.test_fusion import WIDTHS, SignData, Signs, gradients
from tests.step_toy import QUIET, largest_gap
from tests.tolerance import F64, ulps


def fitted(callback: L.Callback, **options: Any) -> Steps:
    return balanced(callback, steps=5, **options)


def loop(steps: Steps, alpha: float, every: int) -> tuple[float, list[str]]:
    """The largest gap to what the formulas give, a sample at a time; and who was pulled at in each step."""
    b, behind, largest, pulled = whole(), None, 0.0, []
    middle: dict[str, dict[int, Tensor]] = {}
    sums: dict[str, dict[int, list[Tensor]]] = {m: {} for m in WIDTHS}
    label = b.targets["kind"].tolist()
    for step, (weights, found) in enumerate(steps):
        at: Any = model()
        at.load_state_dict(weights, strict=False)
        wanted = gradients(at, b)
        at.zero_grad()
        z, extra, score = at.latents(b), torch.zeros((), dtype=torch.float64), {}
        for m in WIDTHS:
            each = []
            for n in range(len(b)):
                if not b.present[m][n] or label[n] < 0:
                    continue
                sums[m].setdefault(label[n], []).append(z[m][n].detach())
                if label[n] in middle.get(m, {}):
                    far = {c: (z[m][n] - p).square().sum().sqrt() for c, p in middle[m].items()}
                    log = -far[label[n]] - torch.stack([-x for x in far.values()]).logsumexp(dim=0)
                    each.append(log)
            if each:
                score[m] = math.fsum(math.exp(float(log)) for log in each) / len(each)
            if m == behind:
                extra = extra - alpha * sum(each) / 20
        pulled.append(behind or "nobody")
        if extra.requires_grad:
            torch.autograd.backward(extra)
            for name, p in at.named_parameters():
                wanted[name] = wanted[name] + (0 if p.grad is None else p.grad)
        largest = max(largest, largest_gap(found, wanted))
        if len(score) == 2:
            behind = min(score, key=lambda m: score[m])
        if (step + 1) % every == 0:
            for m, by in sums.items():
                for c, rows in by.items():
                    new = torch.stack(rows).mean(dim=0)
                    old = middle.setdefault(m, {}).get(c)
                    middle[m][c] = new if old is None else 0.5 * old + 0.5 * new
            sums = {m: {} for m in WIDTHS}
    return largest, pulled


@pytest.mark.parametrize("every", [1, 2])
def test_each_step_equals_the_loop(every: int) -> None:
    for accumulate in (1, 4):
        largest, pulled = loop(fitted(PMR(alpha=0.6, every=every), accumulate=accumulate), 0.6, every)
        assert largest < ulps(4096, F64), accumulate
        # prototypes, then scores of them, then a pull
        assert pulled[: every + 1] == ["nobody"] * (every + 1) and set(pulled[every + 1 :]) <= set(WIDTHS)
        assert "nobody" not in pulled[every + 1 :]


def on_a_rank(rank: int) -> list[Any]:
    return [fitted(PMR(every=1), accumulate=n, world=2) for n in (1, 2)]


@pytest.mark.slow
@pytest.mark.ddp
def test_two_ranks_equal_the_loop_and_each_other() -> None:
    for one_of, two_of in zip(*run_ranks(2, on_a_rank), strict=True):
        assert all(largest_gap(a[1], b[1]) == 0 for a, b in zip(one_of, two_of, strict=True))
        assert loop(one_of, 0.6, 1)[0] < ulps(4096, F64)


def test_only_the_tower_that_is_behind_is_pulled_at() -> None:
    plain, pulled = fitted(PMR(alpha=0.0, every=1)), fitted(PMR(alpha=0.6, every=1))
    _, who = loop(pulled, 0.6, 1)
    step = who.index(next(w for w in who if w != "nobody"))
    assert largest_gap(plain[step - 1][1], pulled[step - 1][1]) == 0
    for m in WIDTHS:
        name = f"towers.{m}.linear.weight"
        assert torch.equal(plain[step][1][name], pulled[step][1][name]) == (m != who[step])
    assert torch.equal(plain[step][1]["fusion.maps.image.weight"], pulled[step][1]["fusion.maps.image.weight"])


def test_a_class_that_was_never_seen_is_no_candidate_and_is_not_pulled() -> None:
    class Rare(SignData):
        def training_set(self) -> Signs:
            data = super().training_set()
            data.label[data.label == 1] = -1
            return data

    callback = PMR(every=1)
    steps = fitted(callback, data=Rare(24, whole=False))
    assert all(g.isfinite().all() for _, found in steps for g in found.values())
    assert callback.middle["image"].isfinite().all(dim=1).tolist() == [True, False]
    # one candidate: its share is 1, whatever the latents are
    assert callback.behind is not None


def test_it_goes_on_where_it_was() -> None:
    callback = PMR(every=2)
    fitted(callback)
    again = PMR(every=2)
    again.load_state_dict(callback.state_dict())
    assert again.behind == callback.behind
    for name in ("middle", "_sums"):
        mine, theirs = getattr(again, name), getattr(callback, name)
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[m], theirs[m]) for m in mine)
    assert callback._sums, "of the fifth step"


def fit(recipe: Any, callback: L.Callback) -> None:
    L.Trainer(max_steps=1, callbacks=[callback], **QUIET).fit(recipe, datamodule=SignData(24, whole=False))


def test_nothing_of_it_is_left_behind() -> None:
    model_: Fusion = model()
    fit(model_, PMR())
    assert len(model_.regularizers) == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PMR(alpha=-1), "alpha -1"),
        (lambda: PMR(beta=1), "beta 1"),
        (lambda: PMR(every=0), "every 0"),
        (lambda: fit(BoringModel(), PMR()), "the protocol MultimodalClassifier .*; BoringModel lacks it"),
        (lambda: fit(one(), PMR()), "one modality"),
    ],
)
def test_what_cannot_be_is_one_line(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_row_that_is_not_finite_spoils_no_class() -> None:
    rule = PMR()
    z_RD, label_R = torch.randn(6, 3).double(), torch.arange(6) % 3
    rule._add_latents("image", z_RD, label_R, 3)
    whole = rule._sums["image"].clone()
    rule._add_latents("image", torch.full((1, 3), torch.nan).double(), torch.tensor([1]), 3)
    assert torch.equal(rule._sums["image"], whole)


def test_what_is_saved_is_of_all_ranks_and_counted_once_behind_a_resume() -> None:
    before, after = zip(*run_ranks(2, _resumed), strict=True)
    assert torch.equal(before[0], before[1]) and torch.equal(after[0] + after[1], before[0])


def _resumed(rank: int) -> tuple[Tensor, Tensor]:
    torch.distributed.init_process_group("gloo")
    rule = PMR()
    rule._add_latents("image", torch.eye(3)[rank : rank + 1].double(), torch.tensor([rank]), 3)
    state = rule.state_dict()
    first = [state]
    torch.distributed.broadcast_object_list(first)  # one file, which rank 0 wrote
    resumed = PMR()
    resumed.load_state_dict(first[0])
    return state["sums"]["image"], resumed._sums["image"]
