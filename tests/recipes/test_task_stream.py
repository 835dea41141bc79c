"""A stream of tasks: replay in exact shares, merged weights, running statistics, and resume to the bit."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from descant.callbacks import Accumulation, Resume, Stages
from descant.datamodules.base import DataModule
from descant.datamodules.combined.task_stream import TaskStream
from descant.modules.adaptation.merging import Interpolate, MergeRule, Permuted, Slerp, TaskArithmetic, Weights
from descant.modules.adaptation.stage_changes import Boundary, Rewind, StageChange, TaskMerge
from descant.modules.training_setup.compile_and_shard import Shard
from descant.modules.training_setup.schedule import InverseSquareRoot, MetaSchedule, WarmupCosine
from descant.recipes import Fusion, Stage, Staged
from descant.recipes.base.boundaries import ESTIMATED
from tests._suites import SampleData, towers
from tests._suites.data import CLASSES
from tests.callbacks.checkpoints.test_resume import Act, equal, fit, point, state
from tests.ranks import run_ranks
from tests.rotation import quick
from tests.tolerance import F64, ulps

NAMES, TASKS, STEPS = ("image", "text"), ("a", "b", "c"), 4


def data(**options: Any) -> TaskStream:
    parts: dict[str, DataModule] = {
        name: SampleData(rows, 12, NAMES) for name, rows in zip(TASKS, (20, 24, 28), strict=True)
    }
    given: dict[str, Any] = {"mix": {"update": 1, "replay": 1, "pretraining": 1}, "steps": STEPS, "batch_size": 12}
    return TaskStream(parts, SampleData(16, 12, NAMES), **given | options)


def fusion() -> Fusion:
    held = towers(*NAMES)
    for tower in held.values():
        tower.layers.insert(1, nn.BatchNorm1d(8))  # type: ignore[operator, union-attr]
    return Fusion(held, "label", CLASSES, width=4)


class Kept(L.Callback):
    """Parameters when a stage begins to train and when its last step is done; rows by source; learning rates."""

    def __init__(self) -> None:
        self.begin: list[dict[str, Tensor]] = []
        self.end: list[dict[str, Tensor]] = []
        self.sources: list[Tensor] = []
        self.lr: list[float] = []

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, i: int) -> None:
        if i == 0:
            self.begin.append(weights(pl_module))
        self.sources.append(torch.bincount(batch.source, minlength=4))
        self.lr.append(trainer.optimizers[0].param_groups[0]["lr"])

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, out: Any, batch: Any, i: int) -> None:
        if i == STEPS - 1:
            self.end.append(weights(pl_module))


def weights(net: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in net.inner.named_parameters()}  # type: ignore[union-attr]


def run(folder: Path, *more: Any, stage: Stage | None = None, **options: Any) -> tuple[L.Trainer, Staged]:
    torch.manual_seed(0)
    make = options.pop("optimizer", None) or (lambda groups: torch.optim.AdamW(groups, lr=0.05))
    net = Staged(fusion(), each=stage or Stage(), optimizer=make).double()
    fixed: dict[str, Any] = {"max_epochs": -1, "limit_val_batches": 0, "precision": "64-true"}
    held = options.pop("data", None) or data()
    trainer, _ = fit(folder, Stages(), *more, net=net, data=held, **fixed | options)
    return trainer, net


# what a merge is -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "wanted"),
    [
        (Interpolate(0.3), lambda t, b, f: 0.3 * t + 0.7 * b),
        (Interpolate(0.3, "first"), lambda t, b, f: 0.3 * t + 0.7 * f),
        (TaskArithmetic(0.5), lambda t, b, f: (t + b) / 2),
        (TaskArithmetic(), lambda t, b, f: t + b - f),
    ],
)
def test_each_task_ends_in_the_weights_of_the_rule(tmp_path: Path, rule: MergeRule, wanted: Any) -> None:
    kept = Kept()
    _, net = run(tmp_path, kept, stage=Stage(end=[TaskMerge(rule)]))
    merged = [*kept.begin[1:], weights(net)]
    for t in range(len(TASKS)):
        for name, x in merged[t].items():
            explicit = wanted(kept.end[t][name], kept.begin[t][name], kept.begin[0][name])
            torch.testing.assert_close(x, explicit, rtol=ulps(8, F64), atol=ulps(8, F64))


def test_a_merge_at_weight_one_is_the_identity_to_the_bit(tmp_path: Path) -> None:
    _, plain = run(tmp_path / "plain")
    for rule in (Interpolate(1.0), Slerp(1.0)):
        _, merged = run(tmp_path / "merged", stage=Stage(end=[TaskMerge(rule)]))
        assert equal(weights(plain), weights(merged))


def test_slerp_follows_the_arc_and_its_control_adds_the_same_numbers() -> None:
    g = torch.Generator().manual_seed(0)
    tuned, before = (torch.randn(6, 4, generator=g, dtype=torch.float64) for _ in range(2))
    before *= tuned.norm() / before.norm()
    arc = Slerp(0.3)(Weights(tuned, before, before))
    assert arc.norm() == pytest.approx(float(tuned.norm()), rel=ulps(16, F64)), "the chord is shorter"
    angle = [torch.acos((arc * x).sum() / tuned.norm() ** 2) for x in (before, tuned)]
    # 1e-9: acos loses half the digits of a cosine near 1
    assert float(angle[0] / angle[1]) == pytest.approx(0.3 / 0.7, rel=1e-9)
    x = Weights(tuned, before, before)
    method, control = Interpolate(0.5)(x) - tuned, Permuted(Interpolate(0.5))(x) - tuned
    # 1e-12: differences of float64 numbers of about 1
    torch.testing.assert_close(method.flatten().sort()[0], control.flatten().sort()[0], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(method, control)


def test_a_task_that_rewinds_begins_at_the_first_weights(tmp_path: Path) -> None:
    kept = Kept()
    _, net = run(tmp_path, kept, stage=Stage(begin=[Rewind()], end=[TaskMerge()]))
    assert all(equal(begin, kept.begin[0]) for begin in kept.begin)
    merged = kept.begin[0]
    for end in kept.end:  # into what the tasks before left, not into where this one began
        merged = {name: torch.lerp(merged[name], end[name], 0.5) for name in end}
    assert equal(weights(net), merged)


def test_running_statistics_are_those_of_the_merged_weights(tmp_path: Path) -> None:
    held = data(steps=1)
    _, net = run(tmp_path, stage=Stage(end=[TaskMerge()]), data=held)
    norm: Any = net.inner.towers["image"].layers[1]  # type: ignore[index]
    seen: list[Tensor] = []
    hook = norm.register_forward_hook(lambda module, x, y: seen.append(x[0].mean(dim=0)))
    net.train()
    was = norm.running_mean.clone()
    for batch in held.batches_of("c", ESTIMATED):
        net.inner.forward(batch)
    hook.remove()
    # 1e-9: float64 sums of a few layers in another order
    torch.testing.assert_close(was, torch.stack(seen).mean(dim=0).detach(), rtol=1e-9, atol=1e-9)


# what a stream is ----------------------------------------------------------------------------------------------------


def test_rows_of_a_step_are_in_the_shares_of_the_mixture(tmp_path: Path) -> None:
    kept = Kept()
    run(tmp_path, kept)
    first, second, third = (torch.stack(kept.sources[t * STEPS : (t + 1) * STEPS]) for t in range(3))
    shares = {0: [6, 6, 0, 0], 1: [4, 4, 4, 0], 2: [4, 4, 2, 2]}  # of 12 rows; the first task has nothing to replay
    for t, steps in enumerate((first, second, third)):
        off = steps.cumsum(0) - torch.tensor(shares[t]) * torch.arange(1, STEPS + 1)[:, None]
        assert off.abs().max() <= 2 and not off[:, [n == 0 for n in shares[t]]].any()


def test_whatever_the_order_the_last_task_has_replayed_all_others() -> None:
    forth, back = data(), data(order=["c", "b", "a"])
    assert list(back.stages) == ["c", "b", "a"]
    of = [stream.stages[list(stream.stages)[-1]].data.parts for stream in (forth, back)]  # type: ignore[attr-defined]
    assert set(of[0]) == set(of[1]) == {*TASKS, "pretraining"}
    assert set(forth.evaluation_sets("validate")) == set(back.evaluation_sets("validate"))
    assert {name.partition("-")[0] for name in forth.evaluation_sets("validate")} == {*TASKS, "pretraining"}


def test_peaks_of_the_learning_rate_follow_the_run(tmp_path: Path) -> None:
    kept, each = Kept(), WarmupCosine(0.0)
    run(tmp_path, kept, stage=Stage(schedule=MetaSchedule(each, InverseSquareRoot(0.0))))
    wanted = [0.05 / (1 + t // STEPS * STEPS) ** 0.5 * each.factor(t % STEPS, STEPS) for t in range(3 * STEPS)]
    assert kept.lr == pytest.approx(wanted, rel=ulps(8, F64), abs=ulps(1, F64))


class Logged(L.Callback):
    """Metrics that an evaluation has left."""

    values = {"a-val/r5": 0.2, "b-val/r5": 0.4, "c-val/r5": 0.6, "pretraining-val/r5": 0.1}

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        pl_module.log_dict(self.values)


def test_accumulation_is_of_all_tasks_and_retention_of_the_original_data(tmp_path: Path) -> None:
    trainer, _ = run(tmp_path, Accumulation(["r5"]), Logged(), limit_val_batches=1)
    found = [float(trainer.callback_metrics[f"val/{name}/r5"]) for name in ("accumulated", "retained", "geometric")]
    # 1e-6: logged as float32
    assert found == pytest.approx([0.4, 0.1, 0.2], rel=1e-6)


# going on ------------------------------------------------------------------------------------------------------------

CHANGES: dict[str, tuple[list[StageChange], list[StageChange]]] = {
    "merge": ([], [TaskMerge()]),
    "rewind": ([Rewind()], [TaskMerge(Interpolate(0.5, "first"))]),
}


@functools.cache
def _whole(folder: Path, changes: str) -> tuple[Act, dict[str, Tensor]]:
    act, (begin, end) = Act(), CHANGES[changes]
    _, net = run(folder / changes, act, Resume(every=1, keep=99), stage=Stage(begin=begin, end=end))
    return act, state(net)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stream")


@pytest.mark.parametrize("changes", CHANGES)
@pytest.mark.parametrize("step", quick([1, STEPS - 1, STEPS, STEPS + 1, 2 * STEPS, 3 * STEPS - 1, 3 * STEPS], 3))
def test_from_any_step_of_any_task_it_ends_in_the_same_bits(
    folder: Path, tmp_path: Path, step: int, changes: str
) -> None:
    act, whole = _whole(folder, changes)
    again, (begin, end) = Act(), CHANGES[changes]
    _, net = run(tmp_path, again, Resume(), stage=Stage(begin=begin, end=end), path=point(folder / changes, step))
    assert equal(state(net), whole) and again.losses == act.losses[step:]


@pytest.mark.slow
def test_two_ranks_are_one(tmp_path: Path) -> None:
    whole = _merged(0, tmp_path / "one", 1)
    for found in run_ranks(2, _merged, tmp_path / "two", 2):
        for name, x in found.items():
            torch.testing.assert_close(x, whole[name], rtol=ulps(2**14, F64), atol=ulps(2**10, F64))


def _merged(rank: int, folder: Path, world: int) -> dict[str, Tensor]:
    cut: dict[str, Any] = {"strategy": "ddp", "devices": 2} if world > 1 else {}
    # not Adam, which divides rounding by gradients near zero
    _, net = run(folder, stage=Stage(end=[TaskMerge()]), optimizer=lambda g: torch.optim.SGD(g, lr=0.1), **cut)
    return state(net)


# mistakes ------------------------------------------------------------------------------------------------------------


class Structural(StageChange):
    structural = True


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (lambda: TaskStream({}), "tasks: none"),
        (lambda: data(steps=None), "TaskStream: no budget of a task; give steps, samples or flops"),
        (lambda: data(order=["a", "b"]), "order a, b: each of the tasks once: a, b, c"),
        (lambda: data(order=["a", "b", "d"]), "order: 'd' is not one of a, b, c"),
        (lambda: data(mix={"replay": 1}), "mix .*: shares of 0 or more, and of update above 0"),
        (lambda: data(mix={"udpate": 1}), "mix: 'udpate' is not one of update, replay, pretraining"),
        (
            lambda: TaskStream({"a": SampleData()}, mix={"update": 1, "pretraining": 1}, steps=1),
            "mix: pretraining 1, and there is no original data; give pretraining",
        ),
        (
            lambda: TaskStream({m: SampleData(modalities=(m,)) for m in NAMES}, steps=1),
            "tasks: no modality is in all of them .image: image; text: text.",
        ),
        (lambda: Staged(fusion(), {"a": Stage()}, Stage()), "stages a and each: one of the two"),
        (lambda: Interpolate(1.5), "Interpolate: w 1.5: a share from 0 to 1"),
        (lambda: Staged(fusion(), each=Stage(end=[Structural()])), "stages.each.end: Structural changes the structure"),
    ],
)
def test_a_mistake_is_one_line(what: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        what()
    assert "\n" not in str(error.value)


def test_what_has_grown_is_neither_merged_nor_taken_back() -> None:
    then = {"weight": torch.zeros(2, 2)}
    at = Boundary("b", {"before": then, "first": then}, seed=0)
    for net, line in ((nn.Linear(2, 3, bias=False), r"weight is \[3, 2\] and was \[2, 2\]"), (nn.Linear(2, 2), "bias")):
        for change, place in ((TaskMerge(), "end: TaskMerge"), (Rewind(), "begin: Rewind")):
            with pytest.raises(ValueError, match=f"stages.b.{place}: {line}"):
                change.apply(net, at)


def test_a_model_that_is_split_over_ranks_is_not_merged() -> None:
    with pytest.raises(ValueError, match="shard: the parameters of a model that is split over ranks cannot be merged"):
        Staged(fusion(), each=Stage(end=[TaskMerge()]), shard=Shard()).configure_model()
