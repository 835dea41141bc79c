"""``descant plan`` as it is typed: its files and table, and wrong requests, each one line, before anything is written.

What reaches a step runs in a process that is forked for it: see test_simulate.py.
"""

from __future__ import annotations

import json
import os
import re
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import yaml

from descant.cli.errors import Refusal
from descant.modules.training_setup.activation_checkpointing import Checkpointing
from descant.modules.training_setup.compile_and_shard import Shard
from descant.plan import plan
from descant.plan.layout import Layout
from descant.plan.report import overlay
from descant.plan.roofline import StepTime
from descant.plan.search import Planned, best
from descant.plan.trace import Memory, Trace
from tests.conftest import Result, captured
from tests.ranks import run_ranks, stand_alone

FIT = ["--", "fit", "--config", "contrastive/emoji", "--config", "on/tiny"]
#: Name -> words before ``FIT``, and what the line has.
WRONG: dict[str, tuple[list[str], str]] = {
    "an option": (["--nodse", "2", *FIT], "plan: --nodse: no such option; nearest: nodes"),
    "no value": (["--nodes", *FIT], "plan: --nodes: its value is missing"),
    "zero": (["--nodes", "0", *FIT], "plan: --nodes 0: a number of at least 1"),
    "no number": (["--batch=many", *FIT], "plan: --batch many: a number of at least 1"),
    "no command": (["--nodes", "2"], "plan: no command: it comes after --"),
    "not fit": (["--", "test", "--run", "x"], "plan: test: only fit is planned"),
    "a picture": (["--picture", "step.bmp", *FIT], "plan: --picture step.bmp: its name ends in .png, .svg, .pdf"),
    "a folder": (["--save", "nowhere/emoji", *FIT], "plan: --save nowhere/emoji: no folder nowhere"),
    "a card": (["--gpu", "h10", *FIT], "hardware 'h10': "),
    "a file": (["--gpu", "none.yaml", *FIT], "hardware 'none.yaml': no such file"),
    "calibrate": (["--calibrate", "here.yaml", *FIT], "plan: --calibrate takes a file"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_words_are_one_line_before_torch(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words, line = WRONG[name]
    result = captured("plan", *words)
    assert result.rc == 2 and result.out == "" and result.err.count("\n") == 1, result.err
    assert result.err.startswith(f"descant: {line}"), result.err
    assert not list(tmp_path.iterdir())


def test_a_wrong_key_of_a_hardware_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("own.yaml").write_text("extends: h100\ncard: {memroy: 96 GB}\n")
    result = captured("plan", "--gpu", "own.yaml", *FIT)
    assert result.rc == 2 and result.err.count("\n") == 1
    assert "own.yaml: card.memroy: " in result.err and "memory" in result.err


def test_numbers_are_read() -> None:
    given = plan._read(["--nodes=2", "--gpus-per-node", "4", "--batch", "64"], ["fit"])
    assert (given.nodes, given.gpus_per_node, given.batch, given.gpu) == (2, 4, 64, "h100")


# what a plan writes -------------------------------------------------------------------------------------------------


def typed(rank: int, folder: str) -> dict[str, Result]:
    stand_alone()
    os.chdir(folder)
    Path("small.yaml").write_text("extends: h100\ncard: {memory: 1 MB}\n")
    files = ["--save", "tiny", "--json", "tiny.json", "--picture", "tiny.png"]
    return {
        "whole": captured("plan", "--nodes", "2", "--gpus-per-node", "2", *files, *FIT),
        "divides": captured("plan", "--gpus-per-node", "7", "--json", "no.json", *FIT),
        "small": captured("plan", "--gpus-per-node", "2", "--gpu", "small.yaml", "--save", "no", *FIT),
    }


@cache
def results() -> tuple[dict[str, Result], dict[str, bytes]]:
    with TemporaryDirectory() as folder:
        found: dict[str, Result] = run_ranks(1, typed, folder)[0]
        return found, {file.name: file.read_bytes() for file in Path(folder).iterdir() if file.is_file()}


@pytest.mark.slow
def test_the_table_the_overlays_the_numbers_and_the_picture(tmp_path: Path) -> None:
    found, files = results()
    whole = found["whole"]
    assert whole.rc == 0, whole.err
    lines = whole.out.splitlines()
    assert lines[0].startswith("plan       Contrastive, ") and "4 ranks (2 x 2)" in lines[1]
    rows = [line for line in lines if re.match(r"(ddp|fsdp|hsdp)\b", line)]
    content = json.loads(files["tiny.json"])["lines"]
    assert [row[:32].rstrip() for row in rows] == [one["layout"] for one in content]
    assert [f"{one['mfu']:6.1%}" in row for row, one in zip(rows, content, strict=True)] == [True] * len(rows)
    assert all(sum(one["seconds"]["parts"].values()) <= one["seconds"]["total"] * 1.001 for one in content)
    assert files["tiny.png"].startswith(b"\x89PNG") and len(files["tiny.png"]) > 5000
    for number in (1, 2, 3):
        over = tmp_path / f"tiny-{number}.yaml"
        over.write_bytes(files[over.name])
        checked = captured("fit", *FIT[2:], "--config", str(over), "--print_config")
        assert checked.rc == 0, checked.err
        assert yaml.safe_load(checked.out)["trainer"]["num_nodes"] == 2


@pytest.mark.slow
def test_ranks_that_do_not_divide_and_a_card_that_is_too_small() -> None:
    found, files = results()
    line = found["divides"].err.splitlines()[-1]
    assert found["divides"].rc == 2 and "7 ranks do not divide it; nearest: " in line
    small = found["small"]
    assert small.rc == 2 and re.search(r"on each of 2 ranks needs at least [\d.e-]+ GB", small.err.splitlines()[-1])
    assert not [name for name in files if name.startswith("no")]


# overlays and choice ------------------------------------------------------------------------------------------------


def one(layout: Layout, total: float = 1.0, peak: int = 1, fits: bool = True) -> Planned:
    parts = dict.fromkeys(("compute", "memory", "launches", "links"), 0.0)
    time = StepTime(total, 0.0, 0.0, 0.0, 0.0, 0.0, parts)
    return Planned(layout, Trace(8 * layout.micro, Memory(peak, 0, 0, 0, 0)), time, 8, fits)


class Experiment:
    """What an overlay asks of a recipe."""

    class trainer:
        accumulate_grad_batches = 2


def test_an_overlay_undoes_what_the_experiment_has() -> None:
    parts: list[Any] = [Shard(shard="node"), Checkpointing()]
    made = overlay(one(Layout("ddp", 4)), Experiment, 32, parts, nodes=2)
    assert made == {
        "trainer": {"num_nodes": 2, "devices": 2, "strategy": "ddp", "accumulate_grad_batches": 1},
        "model": {"init_args": {"shard": None, "checkpointing": None}},
        "data": {"init_args": {"batch_size": 32}},
    }
    made = overlay(one(Layout("fsdp", 4, checkpointing=Checkpointing(), micro=2)), Experiment, 64, parts, nodes=1)
    shard = {"class_path": "Shard", "init_args": {"replicate": None, "shard": None}}
    assert made["model"] == {"init_args": {"shard": shard}} and "data" not in made
    assert made["trainer"]["strategy"] == {"class_path": "descant.run.sharded.Sharded"}
    made = overlay(one(Layout("hsdp", 4, 2)), Experiment, 64, [], nodes=2)
    assert made["model"]["init_args"]["shard"]["init_args"] == {"shard": "node"}


def test_the_best_fit_are_fast_and_of_equally_fast_ones_small() -> None:
    names = {"slow": (2.0, 1, True), "large": (1.001, 9, True), "small": (1.0, 2, True), "too large": (0.5, 99, False)}
    made = {name: one(Layout(), *values) for name, values in names.items()}
    assert [next(n for n, x in made.items() if x is y) for y in best(list(made.values()))] == ["small", "large", "slow"]


def test_no_folder_is_a_refusal() -> None:
    with pytest.raises(Refusal, match="no folder nowhere"):
        plan._read(["--json", "nowhere/x.json"], ["fit"])
