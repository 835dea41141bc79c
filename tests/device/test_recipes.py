"""Every recipe on the device under test: two steps of a real fit, validation, checkpoints, resume, test and export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from descant.modules import plain


def fit(cli: Any, device: Any, experiment: str, *more: str, steps: int = 2) -> dict[str, Any]:
    """``descant fit`` of an experiment at ``on/tiny`` on the device; what it measured."""
    configs = [part for name in (experiment, "on/tiny") for part in ("--config", name)]
    at = ("--trainer.max_steps", str(steps), "--name", "x", "--resume", "auto", "--changed", "allow")
    result = cli("fit", *configs, *device.options, *at, *more)
    assert result.rc == 0, result.err
    found: dict[str, Any] = json.loads(Path("runs/x/metrics.json").read_text())
    assert found["steps"] == steps and all(v == v for v in found.values() if isinstance(v, float))
    return found


@pytest.mark.parametrize("experiment", ["contrastive/emoji"])
def test_a_recipe_trains_resumes_and_is_exported(experiment: str, cli: Any, device: Any) -> None:
    fit(cli, device, experiment, "--test", "false", steps=1)
    fit(cli, device, experiment, "--trainer.precision", "bf16-mixed", "--test", "true")
    state = plain.load_plain(next(Path("runs/x/001/resume").glob("*.ckpt")), map_location="cpu")["state_dict"]
    assert all(x.device == torch.device("cpu") for x in state.values())
    assert cli("export", "x/001", "--out", "out").rc == 0
