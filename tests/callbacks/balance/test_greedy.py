"""Re-balancing steps in real fits, against an explicit loop in double precision: speeds, gates, resume."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from descant.callbacks.balance.greedy import GreedyRebalancing
from descant.callbacks.checkpoints.resume import Resume
from descant.modules.balance.conditional_speed import ConditionalSpeed
from descant.modules.fusion.mmtm import MMTMFusion
from descant.modules.towers import Towers
from descant.recipes import Fusion
from tests.callbacks.balance.test_balance import Watching, fit, model, one, whole
from tests.callbacks.checkpoints import test_resume as resumed
from tests.ranks import run_ranks
from tests.recipes.test_fusion import WIDTHS, Line, SignData
from tests.step_toy import QUIET, largest_gap
from tests.tolerance import F64, ulps

STEPS, WINDOW, EPSILON = 10, 2, 0.05


def gated() -> Any:
    torch.manual_seed(0)
    towers = Towers(others={m: Line(width) for m, width in WIDTHS.items()})
    options: dict[str, Any] = {"optimizer": lambda params: torch.optim.SGD(params, lr=0.3)}
    return Fusion(towers, "kind", 2, width=8, fusion=MMTMFusion(), unimodal=True, **options).double()


def rule(**options: Any) -> GreedyRebalancing:
    return GreedyRebalancing(**{"epsilon": EPSILON, "window": WINDOW, "start": 0.2} | options)


def fitted(callback: GreedyRebalancing, accumulate: int = 1, world: int = 1) -> Any:
    watch = Watching()
    trainer = L.Trainer(
        max_steps=STEPS,
        devices=world,
        strategy="ddp" if world > 1 else "auto",
        accumulate_grad_batches=accumulate,
        callbacks=[watch, callback],
        **QUIET,
    )
    trainer.fit(gated(), datamodule=SignData(batch_size=24, whole=False))
    return watch.steps


def explicit(at: Any, alone: str | None, mean: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, list[Tensor]]]:
    """Gradients of a step over all samples, one at a time, and the gates of each modality's samples."""
    b, f, loss = whole(), at.fusion, torch.zeros((), dtype=F64)
    z, count = at.latents(b), {m: int(b.present[m].sum()) for m in WIDTHS}
    gates: dict[str, list[Tensor]] = {m: [] for m in WIDTHS}
    for n in range(len(b)):
        y, there = int(b.targets["kind"][n]), [m for m in WIDTHS if b.present[m][n]]
        h_S = (sum(f.squeeze[m].weight @ z[m][n] for m in there) + f.squeeze_S).relu()
        logits = []
        for m in there:
            gate_D = torch.sigmoid(f.excite[m].weight @ h_S + f.excite[m].bias)
            gates[m].append(gate_D.detach())
            logits.append(f.maps[m].weight @ ((mean[m] if m == alone else gate_D) * z[m][n]) + f.maps[m].bias)
            if y >= 0:
                loss = loss - at.own[m](z[m][n]).log_softmax(dim=0)[y] / count[m]
        if y >= 0:
            loss = loss - (sum(logits) / len(logits)).log_softmax(dim=0)[y] / len(b)
    names = [name for name, _ in at.named_parameters()]
    found = torch.autograd.grad(loss, list(at.parameters()), allow_unused=True, materialize_grads=True)
    return dict(zip(names, found, strict=True)), gates


def gap(steps: Any, sham: bool = False) -> tuple[float, list[str | None]]:
    """The largest to the loop of the release, and who was left alone in each step."""
    largest, curation, alone = 0.0, 0, None
    seen: list[str | None] = []
    so_far: dict[str, list[Tensor]] = {m: [] for m in WIDTHS}
    mean = {m: torch.full((8,), 0.5, dtype=F64) for m in WIDTHS}
    mu = {(m, part): 0.0 for m in WIDTHS for part in ("gates", "own")}
    for k, (weights, found) in enumerate(steps):
        at = gated()
        at.load_state_dict(weights, strict=False)
        wanted, gates = explicit(at, alone, mean)
        largest = max(largest, largest_gap(found, wanted))
        seen.append(alone)
        for m in WIDTHS:
            so_far[m] += gates[m]
            mean[m] = torch.stack(so_far[m]).mean(dim=0)
        if alone is None:
            for m in WIDTHS:
                g, w = {"gates": 0.0, "own": 0.0}, {"gates": 0.0, "own": 0.0}
                for name, p in weights.items():
                    top, _, rest = name.partition(".")
                    shared = top == "fusion" and rest.startswith("squeeze")
                    part = "gates" if shared or rest.startswith("excite") else "own"
                    if top != "own" and (shared or m in name.split(".")):
                        g[part] += float((wanted[name] ** 2).sum())
                        w[part] += float((p**2).sum())
                for part in ("gates", "own"):
                    mu[m, part] += g[part] / w[part]
            one_, other = (math.log10(mu[m, "gates"] / mu[m, "own"]) for m in WIDTHS)
            if k >= 0.2 * STEPS and abs(one_ - other) > EPSILON:
                names = list(WIDTHS)
                alone, curation = names[int(other > one_) ^ sham], 0
        else:
            curation += 1
            alone = None if curation == WINDOW else alone
    return largest, seen


def test_each_step_equals_the_loop() -> None:
    # ten steps whose gradients and gates are sums over twenty samples
    for accumulate in (1, 4):
        largest, alone = gap(fitted(rule(), accumulate))
        assert largest < ulps(2**16, F64), accumulate
        assert alone[:3] == [None] * 3 and any(alone) and alone.count(None) > 3, alone
    largest, sham = gap(fitted(rule(sham="permute")), sham=True)
    assert largest < ulps(2**16, F64) and sham[3] not in (None, alone[3])


def on_a_rank(rank: int) -> list[Any]:
    return [fitted(rule(), accumulate=n, world=2) for n in (1, 2)]


@pytest.mark.slow
@pytest.mark.ddp
def test_two_ranks_equal_the_loop_and_each_other() -> None:
    for one_of, two in zip(*run_ranks(2, on_a_rank), strict=True):
        assert all(largest_gap(a[1], b[1]) == 0 for a, b in zip(one_of, two, strict=True))
        assert gap(one_of)[0] < ulps(2**16, F64)


@pytest.mark.parametrize("step", [2, 4])
def test_it_goes_on_where_it_was_to_the_bit(step: int, tmp_path: Path) -> None:
    options: dict[str, Any] = {"data": SignData(24, whole=False), "max_epochs": 8, "limit_val_batches": 0}
    _, first = resumed.fit(tmp_path / "a", Resume(every=1, keep=99), rule(), net=gated(), **options)
    path = resumed.point(tmp_path / "a", step)
    _, again = resumed.fit(tmp_path / "b", Resume(every=1), rule(), net=gated(), path=path, **options)
    assert resumed.equal(resumed.state(first), resumed.state(again))


@pytest.mark.parametrize("case", range(200))
def test_who_learns_alone_by_any_ratios_is_the_loop_of_the_release(case: int) -> None:
    """Two to eight modalities; for two this is the release's, most against least of more."""
    draws = torch.Generator().manual_seed(case)
    M, window, epsilon = 2 + case % 7, 1 + case % 4, (0.0, 0.01, 1.0)[case % 3]
    ratio_T2M = torch.rand(30, 2, M, generator=draws, dtype=F64) * 10.0 ** torch.randint(-9, 9, (2, M), generator=draws)
    ratio_T2M[:, :, 1] = ratio_T2M[:, :, 1 if case % 5 else 0]  # of one fifth two are always even
    rule, mu, alone, curation = ConditionalSpeed(epsilon, window), [[0.0, 0.0] for _ in range(M)], None, 0
    for k, ratio_2M in enumerate(ratio_T2M):
        if alone is None:
            for m in range(M):
                mu[m] = [total + float(x) for total, x in zip(mu[m], ratio_2M[:, m], strict=True)]
            speeds = [math.log10(gates / own) for gates, own in mu]
            if k > 3 and max(speeds) - min(speeds) > epsilon:
                alone, curation = speeds.index(max(speeds)), 0
        else:
            curation += 1
            alone = None if curation == window else alone
        found = rule.decide(ratio_2M, free=k > 3)
        assert found == alone, k


def test_averaged_gates_close_what_others_show_in_training_alone() -> None:
    fusion = gated().fusion
    z = {m: torch.randn(5, 8, dtype=F64) for m in WIDTHS}
    moved = z | {"text": z["text"] + 1}
    fusion.averaged = "image"
    for training in (True, False):
        fusion.train(training)
        change_BC = fusion(moved) - fusion(z)
        text_BC = sum(fusion.maps["text"](fusion.gates(x)["text"] * x["text"]) * s for x, s in ((moved, 1), (z, -1)))
        assert torch.allclose(change_BC, text_BC / 2, rtol=0, atol=ulps(64, F64)) == training


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GreedyRebalancing(window=0), "window 0, start 0: at least 0, at least 1"),
        (lambda: MMTMFusion(ratio=0.5), "ratio 0.5: 1 is the least"),
        (lambda: MMTMFusion(ratio=9.0).build({"image": 2, "text": 2}, 2), "at most twice the width of all latents, 8"),
        (lambda: fit(model(), GreedyRebalancing()), "model.fusion MMTMFusion has gates; LateFusion not"),
        (lambda: fit(one(), GreedyRebalancing()), "one modality, image"),
    ],
)
def test_what_cannot_be_is_one_line(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
