"""Experiments that ship, by the command line, on the device: two steps, validation, resume, test and export.

Every recipe and callback runs two steps in test_runs.py; here one goes the whole way, in `make slow` others by turns.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from descant.cli.catalogue import find
from descant.modules.io import plain
from tests.rotation import turn
from tests.test_experiments import begin


def fit(cli: Any, device: Any, experiment: str, *more: str, steps: int = 2) -> dict[str, Any]:
    """``descant fit`` of an experiment at ``on/tiny`` on the device; what it measured."""
    configs = [part for name in (experiment, "on/tiny") for part in ("--config", name)]
    at = ("--trainer.max_steps", str(steps), "--name", "x", "--resume", "auto", "--changed", "allow")
    result = cli("fit", *configs, *device.options, *at, *more)
    assert result.rc == 0, result.err
    found: dict[str, Any] = json.loads(Path("runs/x/metrics.json").read_text())
    assert found["steps"] == steps and all(v == v for v in found.values() if isinstance(v, float))
    return found


#: One experiment of each recipe, the cheap one of contrastive first.
SHIPPED = (
    *("contrastive/emoji", "contrastive/emoji-gap", "distill/emoji-peers"),
    *("distill/emoji-rank", "fusion/emoji", "fusion/ensemble", "masked/emoji", "missing/emoji", "chat/emoji"),
    *("distill/questions-rounds", "reinforce/emoji", "staged/emoji-think"),
)


#: What is not exported: they go on from another run, which an export does not carry.
FROM_A_RUN = ("missing/emoji", "reinforce/emoji")


@pytest.mark.parametrize(
    "experiment", [SHIPPED[0], *(pytest.param(name, marks=pytest.mark.slow) for name in turn(SHIPPED[1:], 2))]
)
def test_what_ships_trains_resumes_and_is_exported(experiment: str, cli: Any, device: Any) -> None:
    begin(find(experiment), cli)
    few = ("--trainer.limit_val_batches", "1", "--trainer.limit_test_batches", "1")
    fit(cli, device, experiment, "--test", "false", *few, steps=1)
    fit(cli, device, experiment, "--test", "true" if experiment != SHIPPED[0] else "false", *few)
    point = next(Path("runs/x/001/resume").glob("step-0000002.ckpt"))
    state = plain.load_plain(point, map_location="cpu")["state_dict"]
    assert all(x.device == torch.device("cpu") for x in state.values())
    if experiment in FROM_A_RUN:
        return
    result = cli("export", "x/001", "--ckpt", "last", "--out", "out")
    assert result.rc == 0, result.err
