"""Where each value of a configuration came from: the file and line that said it last, an option, or a default."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from descant.cli.catalogue import BASE, experiments, layers, overlays
from descant.cli.document import load
from descant.cli.dump import Written
from descant.cli.explain import inert
from descant.cli.precheck import Walk
from tests.conftest import Result
from tests.rotation import quick

Cli = Callable[..., Result]
OVERLAY = """\
model:
  init_args:
    scale: 0.5
    optimizer: torch.optim.SGD
trainer:
  max_epochs: 3
  callbacks+:
    - class_path: EarlyStopping
      init_args: {monitor: val/gap}
"""


def table(out: str) -> dict[str, tuple[str, str]]:
    """Key -> value, origin."""
    rows = [line.split() for line in out.partition("\n\n")[0].splitlines() if line.strip()]
    return {row[0]: (" ".join(row[1:-1]), row[-1]) for row in rows}


def test_each_value_has_its_origin(toy: Cli, workplace: Path) -> None:
    (workplace / "over.yaml").write_text(OVERLAY)
    result = toy(
        *("check", "--config", "over.yaml", "--explain", "--model.image.depth", "3"),
        *("--trainer.callbacks.patience", "7", "--seed_everything", "1"),
    )
    assert result.rc == 0, result.err
    said = table(result.out)
    assert said["model"] == ("tests.toys.ToyRecipe", "toy.yaml:3")
    assert said["model.scale"] == ("0.5", "over.yaml:3")
    assert said["model.image.width"] == ("8", "toy.yaml:5")
    assert said["model.image.depth"] == ("3", "--model.image.depth")
    assert said["model.optimizer"] == ("torch.optim.SGD", "over.yaml:4")
    assert said["model.optimizer.momentum"][1] == "default"
    assert said["trainer.max_epochs"] == ("3", "over.yaml:6") and said["trainer.min_epochs"] == ("null", "default")
    assert said["trainer.callbacks[0]"] == ("descant.callbacks.logs.report.Report", "experiments/base.yaml:11")
    assert said["trainer.callbacks[8].monitor"] == ("val/gap", "over.yaml:9")
    assert said["trainer.callbacks[8].patience"] == ("7", "--trainer.callbacks.patience")
    assert said["seed_everything"] == ("1", "--seed_everything")
    assert "recipe     ToyRecipe" in result.out


def test_a_list_given_again_replaces_the_whole_list(toy: Cli, workplace: Path) -> None:
    (workplace / "over.yaml").write_text(
        "trainer:\n  callbacks: [{class_path: EarlyStopping, init_args: {monitor: x}}]\n"
    )
    said = table(toy("check", "--config", "over.yaml", "--explain").out)
    assert said["trainer.callbacks[0].monitor"] == ("x", "over.yaml:2") and "trainer.callbacks[1]" not in said
    result = toy("check", "--config", "over.yaml", "--explain", "--data.batch_size", "4", "--trainer.devices", "[0, 1]")
    assert "expected" in result.err or table(result.out)["trainer.devices"] == ("[0, 1]", "--trainer.devices")


def test_arguments_that_another_class_keeps_keep_their_origin(toy: Cli) -> None:
    said = table(toy("check", "--explain", "--model.optimizer", "torch.optim.SGD").out)
    assert said["model.optimizer"] == ("torch.optim.SGD", "--model.optimizer")
    assert said["model.optimizer.lr"] == ("0.01", "toy.yaml:7") and said["model.optimizer.momentum"][1] == "default"


def test_it_is_a_word_of_check(toy: Cli) -> None:
    assert toy("fit", "--explain").refusal == "--explain: a word of check, without a value"


@pytest.mark.parametrize(
    ("text", "changes"),
    quick(
        [
            ("model: {init_args: {scale: 1.0}}", False),  # its default
            ("model: {init_args: {scale: 0.5}}", True),
            ("model: {init_args: {optimizer: torch.optim.AdamW}}", False),
            ("model: {init_args: {optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 0.01}}}}", False),
            ("model: {init_args: {optimizer: {init_args: {lr: 0.02}}}}", True),
            ("model: {init_args: {optimizer: torch.optim.SGD}}", True),
            ("trainer: {max_epochs: 2, min_epochs: null}", False),
            ("trainer: {max_epochs: 3}", True),
            ("trainer: {callbacks+: {class_path: EMA}}", True),
            ("trainer: {callbacks: []}", True),
            ("seed_everything: 0", False),
        ],
        3,
    ),
)
def test_an_overlay_that_changes_nothing_is_reported(toy: Cli, workplace: Path, text: str, changes: bool) -> None:
    (workplace / "over.yaml").write_text(text)
    told = "descant: warning: --config over.yaml changes nothing\n"
    assert (told not in toy("check", "--config", "over.yaml").err) == changes


def test_every_overlay_that_ships_changes_its_experiment(written_content: dict[str, Any]) -> None:
    """Of any experiment that it fits."""
    walk = {}
    for name, file in experiments().items():
        walk[name] = Walk(Written(written_content, "fit"), [])
        for source in (BASE, *layers([file])):
            walk[name].source(load(source))
    for name, over in overlays().items():
        if name.startswith("data/"):
            continue
        fits = any(not inert([file, over], walk[n].default) for n, file in experiments().items())
        assert fits, f"{name} changes nothing, whatever it is laid over"
