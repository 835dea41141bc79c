"""The overlays of optimizers and schedules on experiments of three recipes, and what of them is refused in one line."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import Result

Cli = Callable[..., Result]
#: Experiment -> how many of its tensors Muon takes.
BASES = {"contrastive/emoji": 8, "masked/emoji": 43, "chat/arithmetic": 12}
OVERLAYS = (("muon",), ("lion", "stable-decay"), ("schedule-free",))
#: The one that every commit tries.
FIRST = ("chat/arithmetic", ("muon",))


def cases() -> list[Any]:
    every = [(base, overlays) for base in BASES for overlays in OVERLAYS]
    slow = [[] if case == FIRST else [pytest.mark.slow] for case in every]
    return [pytest.param(*case, marks=marks) for case, marks in zip(every, slow, strict=True)]


@pytest.mark.parametrize(("base", "overlays"), cases())
def test_overlays_train_with_experiments_of_three_recipes(base: str, overlays: tuple[str, ...], cli: Cli) -> None:
    configs = [base, *(f"with/train/{name}" for name in overlays), "on/tiny"]
    result = cli("fit", *(part for name in configs for part in ("--config", name)), "--name", "x", "--test", "false")
    assert result.rc == 0, result.err
    run = Path("runs/x")
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["steps"] == 2 and metrics["train/loss"] == metrics["train/loss"]
    [point] = (run / "001/resume").glob("step-0000002.ckpt")
    saved = torch.load(point, weights_only=True)
    if "muon" in overlays:
        shares = json.loads((run / "001/optimizers.json").read_text())["optimizers"]
        assert [share["class"] for share in shares] == ["ConvMuon", "AdamW"]
        by_muon, by_adamw = (share["tensors"] for share in shares)
        assert len(by_muon) == BASES[base] and len(saved["optimizer_states"][0]["state"]) <= len(by_muon | by_adamw)
        assert any("embedding" in name or "table" in name for name in by_adamw)
        assert sum(map(sum, (by_muon.values(), by_adamw.values()))) == metrics["parameters_trainable"]
    else:
        assert not (run / "001/optimizers.json").exists()
    averaged = "schedule-free" in overlays
    assert averaged == ("current_model_state" in saved and saved["averaging_state"]["updates"] == 0)


def test_what_is_refused_in_one_line(cli: Cli, monkeypatch: pytest.MonkeyPatch, workplace: Path) -> None:
    base = ("fit", "--config", "chat/arithmetic", "--config", "on/tiny", "--config")
    group = "{class_path: OptimizerGroup, init_args: {members: [{optimizer: %s, rule: %s}]}}"
    rule = "{model: {init_args: {optimizer: " + group + "}}}"
    for optimizer, of, line in (
        ("{class_path: ConvMuon}", "{class_path: HiddenMatrice}", "HiddenMatrices"),
        ("{class_path: ConvMuon, init_args: {lr: -1}}", "null", "lr: at least 0"),
    ):
        (workplace / "wrong.yaml").write_text(rule % (optimizer, of))
        result = cli(*base, "wrong.yaml")
        assert result.rc == 2 and line in result.refusal, result.err
    monkeypatch.setitem(sys.modules, "schedulefree", None)
    result = cli(*base, "with/train/schedule-free")
    assert result.rc == 2 and "pip install 'descant[schedule-free]'" in result.refusal, result.err
