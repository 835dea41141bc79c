"""Resume points: the safe point, signals, refusals, other ranks. Kills of real processes are in test_torture.py."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch import callbacks as lightnings
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.callbacks.weight_averaging import EMAWeightAveraging, WeightAveraging
from torch import Tensor, nn

import descant.callbacks
from descant.callbacks import EMA, Harmonize, NonFinite, Progress, Report, Resume, Watch
from descant.callbacks.checkpoints.exact_resume import evaluate_at
from descant.callbacks.checkpoints.resume import ENTRY, Stopped
from descant.callbacks.checkpoints.stop_signals import AGREE_STEPS, CODES
from descant.datamodules.base import BatchDataset, DataModule, Rows
from descant.modules.core.batch import Batch
from descant.modules.core.objective import Term
from descant.modules.core.output import Output
from descant.modules.io import manifest
from descant.modules.multitask import MGDA, PCGrad, Rule
from descant.modules.training_setup.compile_and_shard import Shard
from descant.modules.training_setup.schedule import WarmupCosine
from descant.recipes.base.recipe import Recipe
from descant.run.sharded import Sharded
from descant.run.store import AtomicIO
from tests.quiet import quiet_trainer
from tests.ranks import run_ranks

N, STEPS = 44, 6  # samples, and steps of an epoch of batches of 8


class Numbers(BatchDataset):
    def __len__(self) -> int:
        return N

    def present(self, index_N: np.ndarray) -> dict[str, Tensor]:
        return {"image": torch.ones(len(index_N), dtype=torch.bool)}

    def rows(self, index_B: np.ndarray, draw_B: np.ndarray) -> Rows:
        index = torch.from_numpy(index_B)
        noise_B = torch.from_numpy(draw_B % 1000) / 1000
        x_BD = torch.stack([index.cos(), index.sin(), noise_B.float()], dim=1)
        return Rows({"image": x_BD.float()}, {}, index)


class NumberData(DataModule):
    def __init__(self, batch_size: int = 8, seed: int | None = None) -> None:
        super().__init__(batch_size)
        self.own_seed = seed

    @property
    def modalities(self) -> tuple[str, ...]:
        return ("image",)

    def training_set(self) -> BatchDataset:
        return Numbers(0)

    def evaluation_sets(self, stage: str) -> dict[str, BatchDataset]:
        return {"val": Numbers(0)}

    @property
    def seed(self) -> int:
        return super().seed if self.own_seed is None else self.own_seed


class Net(Recipe):
    def __init__(self, dropout: float = 0.3, **kwargs: Any) -> None:
        super().__init__(optimizer=lambda groups: torch.optim.AdamW(groups, lr=1e-2), **kwargs)
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, 1))

    def forward(self, batch: Batch) -> Output:
        value_B = (self.net(batch.inputs["image"])[:, 0] - batch.index / N).square()
        return Output({"fit": Term(value_B, valid=batch.present["image"], given=("image",))})


class Act(L.Callback):
    """Does something at the n-th call of a hook; keeps what every batch held."""

    def __init__(self, hook: str = "", n: int = 0, what: Callable[[L.Trainer], object] = lambda trainer: None) -> None:
        self.seen: list[tuple[int, list[int]]] = []
        self.losses: list[float] = []
        self.calls, self.n, self.what = 0, n, what
        if hook:
            setattr(self, hook, self._act)

    def _act(self, trainer: L.Trainer, *_: Any) -> None:
        self.calls += 1
        if self.calls == self.n:
            self.what(trainer)

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, out: Any, batch: Batch, i: int) -> None:
        self.seen.append((trainer.current_epoch, batch.index[batch.present["image"]].tolist()))
        self.losses.append(float(out["loss"]))


def fit(folder: Path, *callbacks: L.Callback, path: str | Path | None = None, **options: Any) -> tuple[L.Trainer, Net]:
    data = options.pop("data", None) or NumberData()
    net = options.pop("net", None) or Net()
    defaults: dict[str, Any] = {"max_epochs": 3, "devices": 1, "plugins": [options.pop("io", None) or AtomicIO()]}
    defaults["enable_checkpointing"] = any(isinstance(c, ModelCheckpoint) for c in callbacks)
    trainer = quiet_trainer(folder, *callbacks, **defaults | options)
    trainer.fit(net, datamodule=data, ckpt_path=path, weights_only=True)
    return trainer, net


def points(folder: Path) -> list[int]:
    return sorted(int(file.stem[5:]) for file in (folder / "resume").glob("step-*.ckpt"))


def point(folder: Path, step: int) -> Path:
    return folder / "resume" / f"step-{step:07d}.ckpt"


def state(net: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in net.state_dict().items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# going on ---------------------------------------------------------------------------------------------------------


AFTER = [1, 5, 6, 7, 12, 17]


@pytest.mark.parametrize(
    ("accumulate", "precision", "step"),
    [*((accumulate, "32-true", step) for accumulate in (1, 2) for step in AFTER), (1, "64-true", 5)],
)
def test_resuming_from_any_step_is_bit_identical(tmp_path: Path, accumulate: int, precision: str, step: int) -> None:
    options: dict[str, Any] = {"accumulate_grad_batches": accumulate, "precision": precision}
    whole, resumed = Act(), Act()
    _, net = fit(tmp_path / "a", Resume(every=1, keep=100), EMA(0.8), whole, **options)
    _, again = fit(tmp_path / "b", Resume(every=1), EMA(0.8), resumed, path=point(tmp_path / "a", step), **options)
    assert equal(state(net), state(again))
    assert resumed.seen == whole.seen[step * accumulate :] and resumed.losses == whole.losses[step * accumulate :]
    for epoch in range(3):
        assert sorted(i for e, ids in whole.seen for i in ids if e == epoch) == list(range(N))


def test_a_run_can_be_extended_from_its_end(tmp_path: Path) -> None:
    """Cut off inside an epoch by max_steps, and extended: the rest of that epoch comes first."""
    first, rest = Act(), Act()
    fit(tmp_path / "a", Resume(every=100), first, max_epochs=-1, max_steps=8)
    assert points(tmp_path / "a") == [8]
    fit(tmp_path / "a", Resume(every=100), rest, max_epochs=-1, max_steps=12, path=point(tmp_path / "a", 8))
    whole = Act()
    fit(tmp_path / "b", whole, max_epochs=-1, max_steps=12)
    assert first.seen + rest.seen == whole.seen


@pytest.mark.parametrize(("ended", "step"), [(True, STEPS), (False, STEPS), (False, STEPS + 1)])
def test_epoch_hooks_are_called_once(tmp_path: Path, ended: bool, step: int) -> None:
    """Of one that a finished run is extended by, too; of one that was begun when it was saved, not again."""
    first, rest = Act("on_train_epoch_start"), Act("on_train_epoch_start")
    fit(tmp_path / "a", Resume(every=1, keep=99), first, max_epochs=1 if ended else 2)
    fit(tmp_path / "b", Resume(), rest, max_epochs=2, path=point(tmp_path / "a", step))
    assert first.calls + rest.calls == 2


def test_a_finished_run_has_nothing_left_to_do(tmp_path: Path) -> None:
    _, net = fit(tmp_path, Resume(), EMA(0.8))
    act = Act()
    _, again = fit(tmp_path, Resume(), EMA(0.8), act, path=point(tmp_path, 18))
    assert act.seen == [] and equal(state(net), state(again)), "both end with the average in the module, for the test"


def test_what_a_kill_after_the_last_point_left_unwritten_is_written_by_the_resumed_run(tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    class Writes(L.Callback):
        writes_at_end = True

        def __init__(self, dies: bool) -> None:
            self.dies = dies

        def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            if self.dies:
                raise Killed
            (tmp_path / "written").write_text(str(trainer.global_step))

    with pytest.raises(Killed):
        fit(tmp_path, Resume(), Writes(dies=True))
    assert points(tmp_path)[-1] == 18 and not (tmp_path / "written").exists()
    fit(tmp_path, Resume(), Writes(dies=False), path=point(tmp_path, 18))
    assert (tmp_path / "written").read_text() == "18"


def test_all_that_writes_at_the_end_of_training_is_declared() -> None:
    """The others save the point, measure time, look at the last losses and close the progress bar."""
    kinds = [kind for kind in vars(descant.callbacks).values() if isinstance(kind, type)]
    ending = {kind for kind in kinds if "on_train_end" in vars(kind)} - {Resume, Report, NonFinite, Progress, Watch}
    assert ending and {kind for kind in ending if not getattr(kind, "writes_at_end", False)} == set()


def test_points_are_kept_by_number_and_every_so_many_steps(tmp_path: Path) -> None:
    fit(tmp_path, Resume(every=4, keep=2))
    assert points(tmp_path) == [16, 18]


class Clock:
    """Time that passes when a test says so: ``step`` seconds a batch, ``save`` seconds a checkpoint."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, step: float = 0.0, save: float = 0.0) -> None:
        self.now = 1e6
        for module in ("resume", "stop_signals"):
            monkeypatch.setattr(
                f"descant.callbacks.checkpoints.{module}.time", SimpleNamespace(monotonic=lambda: self.now)
            )
        self.batches = Act()
        self.batches.on_train_batch_end = lambda *_: self.passes(step)  # type: ignore[method-assign]
        self.batches.on_save_checkpoint = lambda *_: self.passes(save)  # type: ignore[method-assign]

    def passes(self, seconds: float) -> None:
        self.now += seconds


@pytest.mark.parametrize(
    ("step", "save", "minutes", "found"),
    [
        (60.0, 0.0, 5.0, [5, 10, 15, 18]),
        (90.0, 0.0, 5.0, [3, 6, 9, 12, 15, 18]),  # the fourth step would end a minute too late
        (200.0, 0.0, 5.0, list(range(1, 19))),
        (60.0, 30.0, 5.0, [5, 15, 18]),  # ten minutes after one that took half of one
        (60.0, 0.0, None, [18]),
    ],
)
def test_points_are_saved_by_time_whatever_a_step_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: float, save: float, minutes: float | None, found: list[int]
) -> None:
    clock = Clock(monkeypatch, step, save)
    fit(tmp_path, Resume(keep=99, minutes=minutes), clock.batches, limit_val_batches=0)
    assert points(tmp_path) == found


def test_resuming_from_a_point_by_time_is_bit_identical(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, net = fit(tmp_path / "plain", Resume(), EMA(0.8))
    clock = Clock(monkeypatch, 70.0)
    _, same = fit(tmp_path / "a", Resume(keep=99), EMA(0.8), clock.batches)
    assert points(tmp_path / "a") == [4, 8, 12, 16, 18]
    _, again = fit(tmp_path / "b", Resume(), EMA(0.8), clock.batches, path=point(tmp_path / "a", 4))
    assert equal(state(net), state(same)) and equal(state(net), state(again))


def test_points_by_time_replace_none_that_rollback_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, resume = Clock(monkeypatch, 200.0), Resume(every=8)
    resume.at_start = True
    fit(tmp_path, resume, clock.batches, max_epochs=-1, max_steps=15)
    assert points(tmp_path) == [0, 8, 14, 15]


def test_asynchronous_saves_leave_the_same_points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest, "stage", lambda name: time.sleep(0.05))  # a step takes less
    fit(tmp_path / "a", Resume(every=4, keep=2), io=AtomicIO(asynchronous=True))
    assert points(tmp_path / "a") == [16, 18]
    resume, found = Resume(every=4, keep=9), list[Path | None]()
    back = Act("on_before_backward", 9, lambda trainer: found.append(resume.back_to(trainer, 4)))  # 8 is on its way
    fit(tmp_path / "b", resume, back, io=AtomicIO(asynchronous=True))
    assert found == [point(tmp_path / "b", 4)] and points(tmp_path / "b") == [4, 12, 16, 18]


def test_random_numbers_of_a_step_do_not_depend_on_earlier_ones(tmp_path: Path) -> None:
    whole, noisy = Act(), Act()
    fit(tmp_path / "a", Resume(), whole)
    fit(tmp_path / "b", Resume(), noisy, Act("on_before_zero_grad", 1, lambda trainer: torch.rand(7).sum()))
    assert whole.losses == noisy.losses
    plain, drawn = Act(), Act()
    fit(tmp_path / "c", plain)
    fit(tmp_path / "d", drawn, Act("on_before_zero_grad", 1, lambda trainer: torch.rand(7).sum()))
    assert plain.losses != drawn.losses


# signals ----------------------------------------------------------------------------------------------------------


HOOKS = {
    "batch": "on_train_batch_start",
    "backward": "on_before_backward",
    "step": "on_before_optimizer_step",
    "validation": "on_validation_batch_start",
    "saving": "on_save_checkpoint",
}


@pytest.mark.parametrize("number", CODES, ids=lambda n: n.name)
@pytest.mark.parametrize("when", HOOKS)
def test_a_signal_saves_at_the_next_step_and_sets_the_exit_code(
    tmp_path: Path, when: str, number: signal.Signals
) -> None:
    whole = Act()
    _, net = fit(tmp_path / "a", Resume(every=4), whole)
    stop = Act(HOOKS[when], 2, lambda trainer: os.kill(os.getpid(), number))
    before = signal.getsignal(number)
    with pytest.raises(Stopped) as stopped:
        fit(tmp_path / "b", Resume(every=4), stop)
    assert stopped.value.code == CODES[number] and signal.getsignal(number) is before
    assert stopped.value.path == point(tmp_path / "b", stopped.value.step)
    rest = Act()
    _, again = fit(tmp_path / "b", Resume(every=4), rest, path=stopped.value.path)
    assert stop.seen + rest.seen == whole.seen and equal(state(net), state(again))


def test_a_second_interrupt_stops_at_once_and_reports_the_loss(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def twice(trainer: L.Trainer) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(SystemExit):
        fit(tmp_path, Resume(), Act("on_before_backward", 2, twice))
    assert points(tmp_path) == []
    lost = "interrupted before the first resume point (due after 500 steps or 5 minutes): 1 step(s) are lost"
    assert f"descant: {lost}" in capsys.readouterr().err.splitlines()
    with pytest.raises(SystemExit):
        fit(tmp_path, Resume(every=2), Act("on_before_backward", 4, twice))
    lost = "interrupted: 1 step(s) since step 2 are lost; --resume auto continues there"
    assert points(tmp_path) == [2] and f"descant: {lost}" in capsys.readouterr().err.splitlines()


def test_the_strongest_signal_gives_the_code(tmp_path: Path) -> None:
    def both(trainer: L.Trainer) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGUSR1)

    with pytest.raises(Stopped) as stopped:
        fit(tmp_path, Resume(), Act("on_before_backward", 2, both))
    assert stopped.value.code == 143


# refusals ---------------------------------------------------------------------------------------------------------


def test_a_checkpoint_within_a_step_is_no_resume_point(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path / "checkpoints", filename="{step}", save_top_k=-1)
    fit(tmp_path, Resume(), saver)
    file = next((tmp_path / "checkpoints").glob("*.ckpt"))
    assert torch.load(file, weights_only=True)[ENTRY]["safe"] is False
    with pytest.raises(ValueError, match="no resume point"):
        fit(tmp_path, Resume(), path=file)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"data": NumberData(batch_size=4)}, "batch_size 8, and here it is 4"),
        ({"data": NumberData(seed=7)}, "seed 0, and here it is 7"),
    ],
)
def test_other_data_is_refused(tmp_path: Path, options: dict[str, Any], says: str) -> None:
    fit(tmp_path, Resume())
    with pytest.raises(ValueError, match=says):
        fit(tmp_path, Resume(), path=point(tmp_path, 18), max_epochs=4, **options)


def test_another_recipe_and_another_layout_are_refused(tmp_path: Path) -> None:
    class Other(Net):
        pass

    fit(tmp_path, Resume())
    with pytest.raises(ValueError, match=r"a resume point of .*Net, and the recipe here is .*Other"):
        fit(tmp_path, Resume(), path=point(tmp_path, 18), max_epochs=4, net=Other())
    content = torch.load(point(tmp_path, 18), weights_only=True)
    for layout, line in ((99, "of a newer version"), (1, "its layout 1 is older than 2; commit 677e9b65 reads it")):
        content[ENTRY]["format"] = layout
        AtomicIO().save_checkpoint(content, tmp_path / "resume/new.ckpt")
        with pytest.raises(ValueError, match=line):
            fit(tmp_path, Resume(), path=tmp_path / "resume/new.ckpt", max_epochs=4)


def test_a_validation_inside_a_step_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"val_check_interval 3: .* 4 can"):
        fit(tmp_path, Resume(), accumulate_grad_batches=2, val_check_interval=3)


#: Callbacks of Lightning beside which a run is resumed exactly, as tried, and those that are refused.
EXACT: dict[str, Callable[[], L.Callback]] = {
    "WeightAveraging": WeightAveraging,
    "EMAWeightAveraging": lambda: EMAWeightAveraging(decay=0.9, update_every_n_steps=2),
    "Timer": lambda: lightnings.Timer(duration="00:00:05:00"),
    "EarlyStopping": lambda: lightnings.EarlyStopping("train/loss", patience=1, strict=False),
    "ThroughputMonitor": lambda: lightnings.ThroughputMonitor(batch_size_fn=lambda batch: 8),
    "LambdaCallback": lambda: lightnings.LambdaCallback(on_train_batch_start=lambda *_: None),
}
REFUSED: dict[str, Callable[[], L.Callback]] = {
    "StochasticWeightAveraging": lambda: lightnings.StochasticWeightAveraging(swa_lrs=1e-2, swa_epoch_start=1),
    "GradientAccumulationScheduler": lambda: lightnings.GradientAccumulationScheduler({0: 1, 1: 2}),
    "ModelPruning": lambda: lightnings.ModelPruning("l1_unstructured", amount=0.3),
    "SpikeDetection": lightnings.SpikeDetection,
    "BackboneFinetuning": lightnings.BackboneFinetuning,
    "LearningRateFinder": lightnings.LearningRateFinder,
    "BatchSizeFinder": lightnings.BatchSizeFinder,
}


@pytest.mark.parametrize("name", EXACT)
def test_resuming_with_callbacks_of_lightning_is_bit_identical(tmp_path: Path, name: str) -> None:
    _, whole = fit(tmp_path / "whole", Resume(every=1, keep=99), EXACT[name]())
    for step in (5, 6, 13):  # within an epoch, and at the end of one
        _, net = fit(tmp_path / f"{step}", Resume(), EXACT[name](), path=point(tmp_path / "whole", step))
        assert equal(state(whole), state(net)), step


@pytest.mark.parametrize("name", REFUSED)
def test_callbacks_that_a_resume_would_change_are_refused_with_what_to_use(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=rf"^trainer\.callbacks: {name}: .*; \S+") as caught:
        fit(tmp_path, Resume(), REFUSED[name]())
    assert "\n" not in str(caught.value) and not (tmp_path / "resume").exists()


@pytest.mark.parametrize("wrong", [{"every": 0}, {"keep": 0}, {"minutes": 0}, {"minutes": float("nan")}])
def test_wrong_numbers(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"at least 1|minutes (0|nan): above 0; or null"):
        Resume(**wrong)


# ranks ------------------------------------------------------------------------------------------------------------


def _on_rank(rank: int, folder: Path, world: int, path: Path | None, steps: int, stop: int = 0) -> dict[str, Any]:
    """Trains on one of ``world`` ranks; rank 1 alone is sent a signal at batch ``stop``."""
    act = Act()
    more: list[L.Callback] = []
    if stop and rank == 1:
        more = [Act("on_before_backward", stop, lambda trainer: os.kill(os.getpid(), signal.SIGUSR1))]
    code, net = 0, Net(dropout=0.0)
    options = dict(strategy="ddp", devices=world, max_epochs=-1, max_steps=steps, limit_val_batches=0)
    try:
        fit(folder, Resume(every=3, keep=9), act, *more, path=path, net=net, **options)
    except Stopped as stopped:
        code = stopped.code
    return {"seen": act.seen, "code": code, "state": state(net), "grads": act.losses}


def _global(parts: list[dict[str, Any]]) -> list[tuple[int, list[int]]]:
    """The samples of each step over all ranks, sorted."""
    steps = zip(*(part["seen"] for part in parts), strict=True)
    return [(step[0][0], sorted(i for _, ids in step for i in ids)) for step in steps]


@pytest.mark.ddp
@pytest.mark.slow
def test_saved_on_two_ranks_it_resumes_on_one_and_on_four(tmp_path: Path) -> None:
    whole = run_ranks(2, _on_rank, tmp_path / "whole", 2, None, 9)
    order = _global(whole)
    for world in (1, 2, 4):
        parts = run_ranks(world, _on_rank, tmp_path / f"on{world}", world, point(tmp_path / "whole", 3), 9)
        assert _global(parts) == order[3:]
        worst = max(float((parts[0]["state"][k] - v).abs().max()) for k, v in whole[0]["state"].items())
        # another number of ranks adds gradients in another order: 8 ulps of float32
        assert worst == 0 if world == 2 else worst < 1e-6


@pytest.mark.ddp
@pytest.mark.slow
def test_a_signal_to_one_rank_stops_all_at_the_same_step(tmp_path: Path) -> None:
    whole = run_ranks(2, _on_rank, tmp_path / "whole", 2, None, 20)
    parts = run_ranks(2, _on_rank, tmp_path / "cut", 2, None, 20, 4)
    assert [part["code"] for part in parts] == [75, 75]
    (step,) = {len(part["seen"]) for part in parts}
    assert 4 <= step <= 5 + AGREE_STEPS
    rest = run_ranks(2, _on_rank, tmp_path / "cut", 2, point(tmp_path / "cut", step), 20)
    assert equal(rest[0]["state"], whole[0]["state"])


def _clocked(rank: int, folder: Path, steps: int) -> list[int]:
    """Trains on two ranks, of which the second alone has a clock that goes; the steps at which it saved."""
    with pytest.MonkeyPatch.context() as patch:
        clock, saved = Clock(patch, 100.0 * rank), list[int]()
        saver = Act("on_save_checkpoint", 0)
        saver.on_save_checkpoint = lambda trainer, *_: saved.append(trainer.global_step)  # type: ignore[method-assign]
        options: dict[str, Any] = dict(strategy="ddp", devices=2, max_epochs=-1, max_steps=steps, limit_val_batches=0)
        fit(folder, Resume(keep=99), clock.batches, saver, net=Net(dropout=0.0), **options)
    return saved


@pytest.mark.ddp
@pytest.mark.slow
def test_ranks_agree_on_a_point_that_is_due_by_the_clock_of_one(tmp_path: Path) -> None:
    one, two = run_ranks(2, _clocked, tmp_path, 9)
    assert one == two == [3, 6, 9]


def _sharded(rank: int, folder: Path, path: Path | None = None) -> list[tuple[int, list[int]]]:
    """A schedule over epochs, which counts the loader's batches before a checkpoint is read."""
    net, act = Net(dropout=0.0, schedule=WarmupCosine(0.0), shard=Shard()), Act()
    options = dict(strategy=Sharded("gloo"), devices=2, max_epochs=2, limit_val_batches=0)
    fit(folder, Resume(every=1, keep=99), act, net=net, path=path, **options)
    return act.seen


@pytest.mark.ddp
@pytest.mark.slow
def test_a_sharded_run_resumes_inside_an_epoch(tmp_path: Path) -> None:
    whole = run_ranks(2, _sharded, tmp_path / "whole")
    assert run_ranks(2, _sharded, tmp_path / "on", point(tmp_path / "whole", 3)) == [seen[3:] for seen in whole]


class Telling(Net):
    """Logs what turns by turns, what is solved now and then, and means over an epoch."""

    def on_train_epoch_start(self) -> None:
        self.log("epoch/begun", float(self.global_step), on_step=False, on_epoch=True)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        if self.global_step % 4 == 0:
            self.log("rule/solved", float(self.global_step))

    def forward(self, batch: Batch) -> Output:
        output = super().forward(batch)
        found = output.terms
        if self.training:
            self.log(f"turn/{'odd' if self.global_step % 2 else 'even'}", found["fit"].value.mean())
            many = self.trainer.world_size > 1
            self.log("mean/of_epoch", found["fit"].value.mean(), on_step=True, on_epoch=True, sync_dist=many)
            worst = found["fit"].value.max()
            self.log("worst/of_epoch", worst, on_step=False, on_epoch=True, reduce_fx="max", sync_dist=many)
        return output


class InMemory(L.pytorch.loggers.CSVLogger):
    """Rows in memory."""

    def __init__(self) -> None:
        super().__init__("/nowhere")
        self.rows: list[dict[str, Any]] = []

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.rows.append({"step": step, **metrics})

    def save(self) -> None: ...


def told(folder: Path, resume: Resume, path: Path | None = None, **options: Any) -> list[dict[str, Any]]:
    rows = InMemory()
    fit(folder, resume, net=Telling(), path=path, logger=rows, log_every_n_steps=1, **options)
    return rows.rows


def test_every_row_is_logged_as_in_a_run_that_was_not_stopped(tmp_path: Path) -> None:
    """Lightning keeps numbers of earlier steps of an epoch in its rows, and averages over all of them."""
    whole = told(tmp_path / "whole", Resume(every=1, keep=99))
    assert {"rule/solved", "turn/odd", "turn/even", "mean/of_epoch_step"} < set(whole[4])
    assert any({"epoch/begun", "mean/of_epoch_epoch", "worst/of_epoch"} <= set(row) for row in whole)
    for step in (2, 5, 6, 7, 17):
        rest = told(tmp_path / f"{step}", Resume(), point(tmp_path / "whole", step))
        assert rest == [row for row in whole if row["step"] >= step], step


def test_buffered_rows_are_written_before_a_point(tmp_path: Path) -> None:
    """A callback that speaks to a logger by itself does not write; after a kill nobody would say it again."""
    seen: list[int] = []

    class Direct(L.Callback):
        def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            if not trainer.sanity_checking:
                logger.log_metrics({"direct": 1.0}, step=trainer.global_step - 1)

        def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: Any) -> None:
            file = Path(logger.log_dir, "metrics.csv")
            seen.append(file.read_text().count("1.0") if file.is_file() else 0)

    logger = L.pytorch.loggers.CSVLogger(tmp_path, flush_logs_every_n_steps=10_000)
    fit(tmp_path, Resume(every=1, keep=99), Direct(), logger=logger, log_every_n_steps=10_000)
    assert max(seen) >= 1 and seen == sorted(seen)


class Pulled(Net):
    """Two terms that a rule mixes."""

    def forward(self, batch: Batch) -> Output:
        fit = super().forward(batch).terms["fit"]
        value_B = (self.net(batch.inputs["image"])[:, 0] + 1).square()
        return Output({"fit": fit, "low": Term(value_B, valid=batch.present["image"], given=("image",))})


@pytest.mark.parametrize("rule", [PCGrad, MGDA])
def test_values_of_a_rule_that_is_solved_rarely_are_in_every_row(tmp_path: Path, rule: Callable[[], Rule]) -> None:
    def rows(folder: Path, resume: Resume, path: Path | None = None) -> list[dict[str, Any]]:
        logger = InMemory()
        fit(folder, resume, Harmonize(rule(), every=4), net=Pulled(), path=path, logger=logger, log_every_n_steps=1)
        return logger.rows

    whole = rows(tmp_path / "whole", Resume(every=1, keep=99))
    assert "harmony/cos/fit~low" in whole[5]
    for step in (5, 7, 10):
        rest = rows(tmp_path / f"{step}", Resume(), point(tmp_path / "whole", step))
        assert rest == [row for row in whole if row["step"] >= step], step


def _told_on_rank(rank: int, folder: Path, path: Path | None = None) -> list[dict[str, Any]]:
    options = dict(strategy="ddp", devices=2, max_epochs=2, limit_val_batches=0)
    return told(folder, Resume(every=1, keep=99), path, **options)


@pytest.mark.ddp
@pytest.mark.slow
def test_each_rank_restores_its_own_values_of_an_epoch(tmp_path: Path) -> None:
    whole, _ = run_ranks(2, _told_on_rank, tmp_path / "whole")
    rest, _ = run_ranks(2, _told_on_rank, tmp_path / "on", point(tmp_path / "whole", 4))
    assert len(rest) > STEPS and rest == [row for row in whole if row["step"] >= 4]


def test_an_evaluation_of_a_checkpoint_is_of_its_step_and_a_trained_trainer_keeps_its_own() -> None:
    """What ``descant validate`` logs and draws names the step that the weights are of, though nothing was trained."""
    steps = []

    class Validated(L.LightningModule):
        def validation_step(self, batch: Tensor, batch_idx: int) -> None:
            self.log("loss", batch.mean())

    class Steps(L.pytorch.loggers.logger.DummyLogger):
        def log_metrics(self, *args: Any, **kwargs: Any) -> None:
            steps.append(kwargs["step"])

    trainer = L.Trainer(accelerator="cpu", logger=Steps(), enable_progress_bar=False, enable_model_summary=False)
    evaluate_at(trainer, 7)
    trainer.validate(Validated(), torch.utils.data.DataLoader([1.0, 1.0]), verbose=False)  # type: ignore[arg-type]
    assert (trainer.global_step, set(steps)) == (7, {7})
    evaluate_at(trainer, 9)
    assert trainer.global_step == 7
