"""Ten absurd runs of what ships, each told in one line before step 1; what ships itself is silent."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from descant.cli import check
from descant.cli.catalogue import experiments
from tests.conftest import Result
from tests.rotation import quick, turn

Cli = Callable[..., Result]
SOUND = ("--config=on/tiny", "--trainer.max_steps=200", "--trainer.log_every_n_steps=10")
#: What is absurd -> the options that make it so, and what the line says.
ABSURD = {
    "a warm-up longer than the run": (
        ["--model.schedule.warmup=500"],
        "warmup of 500 steps is not shorter than the run of 200",
    ),
    "a log interval longer than the run": (["--trainer.log_every_n_steps=10000"], "no training metric is logged"),
    "a batch larger than the data": (["--data.batch_size=4096"], "larger than the data set of"),
    "a validation after the end": (["--trainer.check_val_every_n_epoch=1000"], "it never runs"),
    "nothing is logged": (["--trainer.logger=false"], "nothing is logged"),
    "a term is thrown away": (["--model.mix={image-image: 0}"], "mix image-image: 0"),
    "an overlay that changes nothing": (["--config=same.yaml"], "same.yaml changes nothing"),
    "batch norms that see a chunk": (["--model.chunks=4"], "norms"),
    "a frozen tower with a learning rate": (["--model=frozen.Frozen", "--trust=frozen"], "with a learning rate of"),
    "a learning rate of zero": (["--model.schedule=null", "--model.optimizer.lr=0"], "the learning rate is 0"),
}
#: What auto became, and what is made once a machine.
MADE = ("descant: precision ", "descant: synthesizing ", "descant: preparing ")
SAME = "trainer: {max_steps: 2}\n"
FROZEN = """
from descant.recipes import Contrastive


class Frozen(Contrastive):
    def configure_optimizers(self):
        found = super().configure_optimizers()
        self.towers["image"].requires_grad_(False)
        return found
"""


def told(done: Result) -> list[str]:
    return done.err.splitlines()


def test_a_sound_run_is_silent(cli: Cli) -> None:
    assert told(cli("check", "--config=contrastive/emoji", *SOUND)) == []


@pytest.mark.parametrize("case", quick(ABSURD, 3))
def test_an_absurd_run_is_one_line(cli: Cli, case: str) -> None:
    Path("same.yaml").write_text(SAME)
    Path("frozen.py").write_text(FROZEN)
    options, line = ABSURD[case]
    experiment = "contrastive/emoji-slip" if "image-image" in line else "contrastive/emoji"
    lines = told(cli("check", f"--config={experiment}", *SOUND, *options))
    assert len(lines) == 1 and line in lines[0], lines


def test_what_is_meant_is_not_reported(cli: Cli) -> None:
    meant = "{class_path: Sanity, init_args: {meant: [validation]}}"
    words = ("--config=contrastive/emoji", *SOUND, "--trainer.check_val_every_n_epoch=1000", "--trainer.callbacks+")
    assert told(cli("check", *words, meant)) == []
    done = cli("check", *words, meant.replace("validation", "validatoin"))
    assert done.rc == 2 and "validatoin" in done.err and "validation" in done.err.replace("validatoin", "")


@pytest.mark.slow
@pytest.mark.parametrize("name", turn(sorted(experiments()), 20))
def test_what_ships_is_silent(cli: Cli, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    if "# Before:" in experiments()[name].read_text() or name.endswith(("/own", "/own-vit", "/any-size")):
        pytest.skip("it begins from a run, or from data, that are not here")
    monkeypatch.setattr(check, "estimate", lambda *_: Need())  # the steps that it takes are of no use here
    lines = [line for line in told(cli("check", "--config", name)) if "fetching" not in line]
    lines = [line for line in lines if not line.startswith(MADE)]
    assert lines == []


class Need:
    def lines(self) -> list[str]:
        return []
