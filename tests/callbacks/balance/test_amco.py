"""AMCo: a modality that is depended on is masked by the formula, the same for all samples of a step, and resumed."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from descant.callbacks.balance.amco import AMCo
from descant.callbacks.checkpoints.resume import Resume
from descant.modules.core.batch import Batch
from descant.modules.core.rng import global_seed, mix
from tests.callbacks.balance.test_balance import Watching, fit, model, one, whole
from tests.callbacks.balance.test_balance import fitted as balanced
from tests.callbacks.checkpoints import test_resume as resumed
from tests.ranks import run_ranks
from tests.recipes.test_fusion import WIDTHS, SignData
from tests.step_toy import largest_gap
from tests.tolerance import F64, ulps

STEPS, RAMP, GROWTH = 8, 0.3, 0.2
SIGMA = 0.5  # of two modalities one is depended on


class Rows(Watching):
    """And the ids of each step's samples."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[list[int]] = [[]]

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Batch, batch_idx: int) -> None:
        self.rows[-1] += batch.index[batch.present["image"] | batch.present["text"]].tolist()

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        self.rows.append([])


def fitted(callback: L.Callback, accumulate: int = 1, world: int = 1) -> tuple[Any, list[list[int]]]:
    """Two steps an epoch."""
    watch = Rows()
    data = SignData(batch_size=12, whole=False)
    return balanced(callback, accumulate=accumulate, world=world, steps=STEPS, watch=watch, data=data), watch.rows


def explicit(at: Any, rows: list[int], mask: dict[str, Tensor], over: str) -> tuple[dict[str, Tensor], list[float]]:
    """Gradients of one step, and how much each modality is depended on, a sample at a time."""
    b, loss, mass = whole(), torch.zeros((), dtype=F64), []
    z, bias_C = at.latents(b), at.fusion.bias_C
    own_count = {m: sum(bool(b.present[m][n]) for n in rows) for m in WIDTHS}
    for n in rows:
        y, there, scores = int(b.targets["kind"][n]), [m for m in WIDTHS if b.present[m][n]], {}
        for m in there:
            W_CD, keep = at.fusion.maps[m].weight, mask.get(m)
            z_D = z[m][n] if keep is None or over == "scores" else z[m][n] * keep
            scores[m] = W_CD @ z_D if keep is None or over == "latents" else (W_CD @ z_D) * keep
            if y >= 0:
                loss = loss - at.own[m](z[m][n]).log_softmax(dim=0)[y] / own_count[m]
        if y >= 0:
            loss = loss - (bias_C + sum(scores.values())).log_softmax(dim=0)[y] / len(rows)
        if len(there) == 2:
            side = torch.cat([scores[m] + bias_C / 2 for m in WIDTHS]).exp()
            mass.append([float((part / side.sum()).detach()) for part in (side[:2].sum(), side[2:].sum())])
    names = [name for name, _ in at.named_parameters()]
    found = torch.autograd.grad(loss, list(at.parameters()), allow_unused=True, materialize_grads=True)
    return dict(zip(names, found, strict=True)), [sum(column) / len(mass) for column in zip(*mass, strict=True)]


def gap(seen: tuple[Any, list[list[int]]], over: str = "scores", sham: bool = False) -> tuple[float, int]:
    """The largest to the loop, and in how many steps something was masked."""
    masked, largest, count = [False, False], 0.0, 0
    for k, ((weights, found), rows) in enumerate(zip(*seen, strict=False)):
        at = model()
        at.load_state_dict(weights, strict=False)
        epoch, step = divmod(k, 2)
        masked = masked if step else [False, False]
        size = 2 if over == "scores" else 8
        zeros = int(math.sin(math.pi / 2 * min(GROWTH * epoch * step / RAMP, 1)) * size)
        order = torch.randperm(size, generator=torch.Generator().manual_seed(mix(global_seed(), "amco", k)))
        mask = {m: (order >= zeros).double() for m, is_masked in zip(WIDTHS, masked, strict=True) if is_masked}
        wanted, mass = explicit(at, rows, mask, over)
        largest, count = max(largest, largest_gap(found, wanted)), count + bool(mask and zeros)
        masked = [x > SIGMA for x in (mass[::-1] if sham else mass)]
    return largest, count


@pytest.mark.parametrize("over", ["scores", "latents"])
@pytest.mark.parametrize("sham", [None, "permute"])
def test_each_step_equals_the_loop(over: Any, sham: Any) -> None:
    for accumulate in (1, 2):
        seen = fitted(AMCo(SIGMA, RAMP, GROWTH, over, sham), accumulate)
        largest, masked = gap(seen, over, sham is not None)
        assert largest < ulps(4096, F64) and masked >= 2, accumulate


def on_a_rank(rank: int) -> list[tuple[Any, list[list[int]]]]:
    return [fitted(AMCo(SIGMA, RAMP, GROWTH), accumulate=n, world=2) for n in (1, 2)]


@pytest.mark.slow
@pytest.mark.ddp
def test_two_ranks_equal_the_loop_and_each_other() -> None:
    for (one_of, rows), (two, more) in zip(*run_ranks(2, on_a_rank), strict=True):
        assert all(largest_gap(a[1], b[1]) == 0 for a, b in zip(one_of, two, strict=True))
        largest, masked = gap((one_of, [a + b for a, b in zip(rows, more, strict=True)]))
        assert largest < ulps(4096, F64) and masked >= 2


def test_it_goes_on_within_an_epoch_to_the_bit_and_leaves_nothing(tmp_path: Path) -> None:
    options: dict[str, Any] = {"data": SignData(batch_size=12, whole=False), "max_epochs": 4, "limit_val_batches": 0}

    def run(folder: str, *callbacks: L.Callback, **more: Any) -> Any:
        return resumed.fit(tmp_path / folder, *callbacks, AMCo(SIGMA, RAMP, GROWTH), net=model(), **options, **more)[1]

    first = run("a", Resume(every=1, keep=99))
    again = run("b", Resume(every=1), path=resumed.point(tmp_path / "a", 5))
    assert resumed.equal(resumed.state(first), resumed.state(again))
    layer = first.fusion.maps["image"]
    assert not layer._forward_hooks and not layer._forward_pre_hooks


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AMCo(sigma=1.0), "sigma 1: a share of the decision"),
        (lambda: AMCo(ramp=0.0), "ramp 0 and growth 0.1: above 0"),
        (lambda: fit(model("mid"), AMCo()), "model.fusion LateFusion has class scores to mask; MidFusion not"),
        (lambda: fit(one(), AMCo()), "one modality, image"),
    ],
)
def test_what_cannot_be_is_one_line(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
