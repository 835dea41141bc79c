"""Non-finite losses and gradients: raised, skipped or rolled back; on all ranks, with a ledger."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from torch import Tensor, nn

from descant.callbacks import EMA, NonFinite, Resume
from descant.callbacks.health.nonfinite import RollBack
from descant.modules.core.batch import Batch
from descant.modules.core.objective import Term
from descant.modules.core.output import Output
from tests.callbacks.checkpoints.test_resume import Act, Net, equal, fit, point, points, state
from tests.conftest import Result
from tests.ranks import run_ranks

BAD = 17  # the sample that spoils its step


class Spoiled(Net):
    """Its loss is nan for one sample, and batch norm sees a nan there too; ``where`` says in which part of it."""

    def __init__(self, where: str = "loss", bad: int = BAD, dropout: float = 0.3) -> None:
        super().__init__(dropout)
        self.where, self.bad = where, bad
        self.norm = nn.BatchNorm1d(3)

    def forward(self, batch: Batch) -> Output:
        spoilt_B = batch.index == self.bad
        x_BD = self.norm(batch.inputs["image"])
        value_B = (self.net(x_BD)[:, 0] - batch.index / 44).square()
        if self.where == "loss":
            value_B = value_B * torch.where(spoilt_B, torch.nan, 1.0)
        elif self.where == "input":  # the statistics of the batch norm are spoilt as well
            value_B = (self.net(self.norm(batch.inputs["image"] / (~spoilt_B[:, None])))[:, 0]).square()
        elif self.where == "gradient":  # finite forward: sqrt(0) has an infinite slope, and 0 * inf is nan
            value_B = value_B + (value_B * (~spoilt_B)).sqrt() * (~spoilt_B)
        return Output({"fit": Term(value_B, valid=batch.present["image"], given=("image",))})


class Watching(L.Callback):
    """The state before and after each step: weights, buffers and optimizer."""

    def __init__(self) -> None:
        self.before: list[dict[str, Tensor]] = []
        self.after: list[dict[str, Tensor]] = []
        self.index: list[list[int]] = []

    def _all(self, trainer: L.Trainer, module: L.LightningModule) -> dict[str, Tensor]:
        slots = trainer.optimizers[0].state.values()
        moments = {f"{i}/{k}": v.clone() for i, slot in enumerate(slots) for k, v in slot.items()}
        return state(module) | moments

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Batch, i: int) -> None:
        self.before.append(self._all(trainer, module))
        self.index.append(batch.index[batch.present["image"]].tolist())

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, out: Any, batch: Batch, i: int) -> None:
        self.after.append(self._all(trainer, module))


def ledger(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "nonfinite.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("where", ["loss", "input", "gradient"])
def test_a_skipped_step_changes_nothing(tmp_path: Path, where: str) -> None:
    watch = Watching()
    trainer, net = fit(tmp_path, NonFinite("skip"), watch, net=Spoiled(where))
    assert trainer.global_step == 18 and all(torch.isfinite(v).all() for v in state(net).values())
    spoilt = [BAD in ids for ids in watch.index]
    assert sum(spoilt) == 3  # once an epoch
    same = [equal(a, b) for a, b in zip(watch.before, watch.after, strict=True)]
    assert same[1:] == spoilt[1:]  # the very first step makes the optimizer's slots
    entries = ledger(tmp_path)
    assert [entry["step"] for entry in entries] == [i for i, bad in enumerate(spoilt) if bad]
    expected = {"loss": ({"fit": "nan"}, [str(BAD)]), "input": ({"fit": "nan"}, None), "gradient": ({}, [])}[where]
    for entry in entries:
        assert entry["action"] == "skip" and entry["terms"] == expected[0]
        assert expected[1] is None or entry["samples"] == expected[1]


def test_without_it_the_step_would_ruin_the_weights(tmp_path: Path) -> None:
    """The sham: what the callback does is what keeps them finite. Without it the loss of the next step tells."""
    net = Spoiled("gradient")
    with pytest.raises(FloatingPointError):
        fit(tmp_path, net=net)
    assert any(torch.isnan(value).any() for value in net.parameters())


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_raise_names_step_and_sample_and_changes_no_weight(tmp_path: Path, where: str) -> None:
    watch, net = Watching(), Spoiled(where)
    says = f"step [0-9]+: loss term 'fit' is nan: not finite, first in sample {BAD}$"
    if where == "gradient":
        says = "step [0-9]+: its losses are finite, but a gradient is not"
    with pytest.raises(FloatingPointError, match=says):
        fit(tmp_path, NonFinite(), watch, net=net)
    now = dict(net.named_parameters())
    assert all(torch.equal(now[name], watch.before[-1][name]) for name in now)
    assert ledger(tmp_path)[0]["action"] == "raise"


def test_accumulated_gradients_are_skipped_together(tmp_path: Path) -> None:
    watch = Watching()
    options: dict[str, Any] = {"accumulate_grad_batches": 2, "max_epochs": 1}
    fit(tmp_path, NonFinite("skip"), watch, net=Spoiled(), **options)
    step = next(i for i, ids in enumerate(watch.index) if BAD in ids) // 2
    assert step > 0 and equal(watch.before[2 * step], watch.after[2 * step + 1])
    assert [entry["step"] for entry in ledger(tmp_path)] == [step]


def test_past_the_limit_it_ends(tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError, match="; 2 steps were not finite before it"):
        fit(tmp_path, NonFinite("skip", limit=2), net=Spoiled())
    assert [entry["action"] for entry in ledger(tmp_path)] == ["skip", "skip", "raise"]


def test_a_resumed_run_skips_the_same_steps_and_logs_them_once(tmp_path: Path) -> None:
    _, net = fit(tmp_path, NonFinite("skip", limit=3), Resume(every=1, keep=99), EMA(0.8), net=Spoiled())
    entries = ledger(tmp_path)
    # as if killed just after the line of the second was written
    path = point(tmp_path, entries[1]["step"])
    _, again = fit(tmp_path, NonFinite("skip", limit=3), Resume(), EMA(0.8), net=Spoiled(), path=path)
    assert ledger(tmp_path) == entries and equal(state(net), state(again))


def rolled(folder: Path, window: int, **options: Any) -> tuple[Net, list[RollBack]]:
    """Fits until nothing rolls back any more, as ``descant fit`` does; a new callback each time, as after a kill."""
    path, seen = options.pop("path", None), list[RollBack]()
    while True:
        callbacks = (Resume(every=2, keep=99), EMA(0.8), NonFinite("rollback", window=window))
        try:
            return fit(folder, *callbacks, path=path, net=Spoiled(), **options)[1], seen
        except RollBack as back:
            seen.append(back)
            path = back.path


@pytest.mark.parametrize("window", [1, 3])
def test_it_rolls_back_and_skips_the_window(tmp_path: Path, window: int) -> None:
    net, seen = rolled(tmp_path / "a", window)
    entries = ledger(tmp_path / "a")
    assert len(seen) == len(entries) == 3
    for entry, back in zip(entries, seen, strict=True):
        assert entry["leaves_out"] == list(range(max(entry["step"] - window + 1, 0), entry["step"] + 1))
        assert int(back.path.stem[5:]) == entry["leaves_out"][0] // 2 * 2 and back.step == entry["step"]
    # the same as a run that knew it from the start, and never went back
    (tmp_path / "b").mkdir()
    (tmp_path / "b/nonfinite.jsonl").write_text((tmp_path / "a/nonfinite.jsonl").read_text())
    knowing, none = rolled(tmp_path / "b", window)
    assert none == [] and equal(state(net), state(knowing))


def test_resume_points_after_a_rollback_are_removed(tmp_path: Path) -> None:
    with pytest.raises(RollBack) as back:
        fit(tmp_path, Resume(every=1, keep=99), NonFinite("rollback", window=3), net=Spoiled())
    assert points(tmp_path) == list(range(max(back.value.step - 2, 0) + 1))


def test_before_the_first_save_it_rolls_back_to_step_0(tmp_path: Path) -> None:
    with pytest.raises(RollBack) as back:
        fit(tmp_path, Resume(every=99), NonFinite("rollback"), net=Spoiled())
    assert back.value.path == point(tmp_path, 0)


def test_without_a_point_to_roll_back_to_it_raises(tmp_path: Path) -> None:
    gone = Act("on_before_backward", 2, lambda trainer: point(tmp_path, 0).unlink())
    with pytest.raises(FloatingPointError, match=r"no resume point of step [0-9]+ or before to go back to"):
        fit(tmp_path, Resume(every=99), NonFinite("rollback"), gone, net=Spoiled())


def test_impossible_settings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="add it"):
        fit(tmp_path, NonFinite("rollback"))
    with pytest.raises(ValueError, match=r"window 9: .* keeps 2 points, one each 5 steps; 6 is the most"):
        fit(tmp_path, Resume(every=5), NonFinite("rollback", window=9))
    with pytest.raises(ValueError, match="limit 0, window 1: at least 1 each"):
        NonFinite(limit=0)
    half = SimpleNamespace(precision_plugin=SimpleNamespace(scaler=object()), precision="16-mixed")
    with pytest.raises(ValueError, match=r"precision 16-mixed has a scaler .*; bf16-mixed has none"):
        NonFinite("skip").setup(half, None, "fit")  # type: ignore[arg-type]


# ranks and the command line -----------------------------------------------------------------------------------------


def _on_rank(rank: int, folder: Path, policy: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    path, net, error = None, Spoiled(dropout=0.0), ""
    options: dict[str, Any] = {"strategy": "ddp", "devices": 2, "max_epochs": 2, "limit_val_batches": 0}
    while True:
        try:
            fit(folder, Resume(every=2, keep=99), NonFinite(policy), path=path, net=net, **options)
        except RollBack as back:
            path = back.path
            continue
        except FloatingPointError as fault:
            error = str(fault)
        return {"state": state(net), "error": error}


@pytest.mark.ddp
@pytest.mark.slow
@pytest.mark.parametrize("policy", ["raise", "skip", "rollback"])
def test_all_ranks_act_on_a_fault_of_one(tmp_path: Path, policy: str) -> None:
    one, two = run_ranks(2, _on_rank, tmp_path, policy)
    weights = [k for k in one["state"] if "running" not in k]
    assert all(torch.equal(one["state"][k], two["state"][k]) for k in weights)
    entries = ledger(tmp_path)
    assert all(entry["samples"] == [str(BAD)] for entry in entries)
    assert [entry["action"] for entry in entries] == {"raise": ["raise"]}.get(policy, [policy] * 2)
    assert one["error"] == two["error"] and (f"in sample {BAD}" in one["error"]) == (policy == "raise")


def test_the_command_rolls_back_and_its_curve_has_each_step_once(toy: Callable[..., Result], workplace: Path) -> None:
    overlay: dict[str, Any] = {
        "trainer": {
            "callbacks+": [
                {"class_path": "tests.toys.Spoil", "init_args": {"step": 5}},
                {"class_path": "Resume", "init_args": {"every": 2}},
                {"class_path": "NonFinite", "init_args": {"policy": "rollback"}},
            ]
        }
    }
    (workplace / "spoil.yaml").write_text(yaml.safe_dump(overlay))
    result = toy("fit", "--config", "spoil.yaml")
    assert result.rc == 0, result.err
    assert "step 5: its losses are finite, but a gradient is not; back to step-0000004.ckpt (1 of at most 10)" in (
        result.err
    )
    (entry,) = ledger(workplace / "runs/toy/001")
    assert entry["leaves_out"] == [5]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(workplace / "runs/toy/001"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(8))
    rows = (workplace / "runs/toy/001/metrics.csv").read_text().splitlines()
    column = rows[0].split(",").index("step")
    steps = [
        int(float(row.split(",")[column])) for row in rows[1:] if row.split(",")[rows[0].split(",").index("train/loss")]
    ]
    assert steps == list(range(8))
    refused = toy("fit", "--config", "spoil.yaml", "--trainer.callbacks+=NonFinite")
    assert refused.refusal.startswith("step 5: its losses are finite, but a gradient is not")
