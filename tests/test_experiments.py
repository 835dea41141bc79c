"""Every experiment trains two steps, every overlay does on one base: a YAML that nobody runs cannot exist."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

EXPERIMENTS = Path(__file__).parent.parent / "experiments"
RUNNABLE = sorted(p for p in EXPERIMENTS.glob("*/*.yaml") if p.parent.name not in {"data", "with", "on", "claims"})
OVERLAYS = sorted(EXPERIMENTS.glob("with/*.yaml"))
SLOW = {"compile"}


def name(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


def two_steps(cli: Any, *configs: str) -> dict[str, float]:
    result = cli("fit", *(part for c in (*configs, "on/tiny") for part in ("--config", c)), "--name", "x")
    assert result.rc == 0, result.err
    metrics = json.loads(Path("runs/x/metrics.json").read_text())
    assert metrics["steps"] == 2
    assert all(value == value for value in metrics.values() if isinstance(value, float))
    return metrics


@pytest.mark.parametrize("path", RUNNABLE, ids=name)
def test_every_experiment_trains(path: Path, cli: Any) -> None:
    metrics = two_steps(cli, name(path))
    assert "train/loss" in metrics
    header = path.read_text().split("\n\n")[0]
    for word in ("# Claim:", "# Source:", "# Command:", "# Expect:"):
        assert word in header, f"{path}: the header lacks {word}"


@pytest.mark.parametrize(
    "path", [pytest.param(p, marks=pytest.mark.slow if p.stem in SLOW else ()) for p in OVERLAYS], ids=name
)
def test_every_overlay_trains_on_one_base(path: Path, cli: Any) -> None:
    two_steps(cli, "contrastive/emoji", name(path))
    assert path.read_text().startswith("# ")
