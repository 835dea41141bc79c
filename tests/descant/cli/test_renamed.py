"""Configurations and runs of version 0.1.0, by the command line of now."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import descant
from descant.cli.arguments import read
from descant.modules.io import renamed
from descant.modules.io.plain import load_plain
from descant.run.store import AtomicIO
from tests.conftest import Result

Cli = Callable[..., Result]
#: The config.yaml that version 0.1.0 wrote for fusion/emoji with DropAhead, made small.
RUN = Path(__file__).parent.parent / "old_run.yaml"
#: From experiments/contrastive/own.yaml and experiments/with/balance.yaml of version 0.1.0.
OWN = """\
model:
  class_path: Fusion
  init_args:
    target: kind
    classes: 4
    width: 8
    towers:
      class_path: descant.modules.towers.Towers
      init_args: {text: {class_path: BagTower, init_args: {vocab: 16384, width: 8}}}
    fusion: {class_path: descant.modules.fusion.LateFusion}
data: data.yaml
trainer:
  callbacks+:
    - class_path: Blend
    - DropAhead
"""
DATA = """\
class_path: Own
init_args:
  batch_size: 8
  path: photos
  fields:
    class_path: descant.datamodules.fields.Fields
    init_args:
      text: {class_path: TextField, init_args: {codec: {class_path: Ngrams, init_args: {buckets: 16384, length: 80}}}}
"""


def notices(result: Result) -> list[str]:
    return [line.removeprefix("descant: ") for line in result.err.splitlines() if " is now " in line]


def test_old_names_in_files_and_options_are_read_with_a_line_each(cli: Cli, workplace: Path) -> None:
    Path("old.yaml").write_text(OWN)
    Path("data.yaml").write_text(DATA)
    words = ["--trainer.callbacks+=Prototypes", "--trainer.callbacks+", "[{class_path: Blend}]"]
    done = cli("fit", "--config", "old.yaml", *words, "--data.fields.text.codec.length=40", "--print_config")
    assert done.rc == 0, done.err
    assert notices(done) == [
        "old.yaml:10: descant.modules.fusion.LateFusion is now descant.modules.fusion.classifiers.LateFusion; "
        "other import paths of before are read likewise",
        "old.yaml:14: Blend is now GradientBlending",
        "data.yaml:1: Own is now UserData",
        "data.yaml:8: TextField.codec is now tokenizer",
        "data.yaml:8: Ngrams is now NgramTokenizer",
        "old.yaml:15: DropAhead is now OPM",
        "--trainer.callbacks+: Prototypes is now PMR",
    ]
    shown = yaml.safe_load(done.out)
    callbacks = [item["class_path"].rpartition(".")[2] for item in shown["trainer"]["callbacks"]]
    assert callbacks[-4:] == ["GradientBlending", "OPM", "PMR", "GradientBlending"]
    assert shown["data"]["class_path"].endswith(".UserData")
    tokenizer = shown["data"]["init_args"]["fields"]["init_args"]["text"]["init_args"]["tokenizer"]
    assert tokenizer["class_path"].endswith(".NgramTokenizer") and tokenizer["init_args"]["length"] == 40


def test_old_arguments_in_files_overlays_and_options(
    cli: Cli, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(renamed.ARGUMENTS, "Fusion", {"kinds": "classes", "breadth": "width"})
    monkeypatch.setitem(renamed.ARGUMENTS, "GradientBlending", {"often": "every"})
    monkeypatch.setitem(renamed.ARGUMENTS, "BagTower", {"words": "vocab"})
    Path("old.yaml").write_text(OWN.replace("classes: 4", "kinds: 4"))
    Path("data.yaml").write_text(DATA)
    Path("over.yaml").write_text("model: {towers: {text: {words: 512}}}\n")
    files = ["--config", "old.yaml", "--config", "over.yaml"]
    done = cli("fit", *files, "--model.breadth=16", "--model.init_args.kinds", "5", "--print_config")
    assert done.rc == 0, done.err
    assert [line for line in notices(done) if ".breadth" in line or ".kinds" in line or ".words" in line] == [
        "old.yaml:5: Fusion.kinds is now classes",
        "over.yaml:1: BagTower.words is now vocab",
        "--model.breadth: Fusion.breadth is now width",
    ]
    model = yaml.safe_load(done.out)["model"]["init_args"]
    assert (model["classes"], model["width"], model["towers"]["init_args"]["text"]["init_args"]["vocab"]) == (
        5,
        16,
        512,
    )


def test_help_of_an_old_name_and_a_removed_class(cli: Cli, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert read("fit", ["--trainer.callbacks.help", "DropAhead"]).options == [("trainer.callbacks.help", "OPM")]
    monkeypatch.setitem(renamed.GONE, "Vanished", "take EMA")
    line = "--trainer.callbacks+: Vanished was removed: take EMA"
    assert cli("fit", "--config", "fusion/emoji", "--trainer.callbacks+=Vanished").refusal == line


def aged(folder: Path) -> None:
    """The files of a run as version 0.1.0 has written them."""
    text = RUN.read_text()
    (folder / "config.yaml").write_text(text)
    versions = json.loads((folder / "versions.json").read_text())
    versions["config_sha256"] = hashlib.sha256(text.encode()).hexdigest()
    (folder / "versions.json").write_text(json.dumps(versions))
    old: dict[str, str] = {new: old for old, new in renamed.CLASSES.items()}
    for file in folder.glob("*/*.ckpt"):
        content = load_plain(file, map_location="cpu")
        content["callbacks"] = {old.get(key, key): state for key, state in content["callbacks"].items()}
        AtomicIO().save_checkpoint(content, file)


def test_an_old_run_is_resumed_evaluated_embedded_exported_and_loaded(cli: Cli, workplace: Path) -> None:
    def ok(*words: str) -> Result:
        done = cli(*words)
        assert done.rc == 0, done.err
        return done

    small = ["--trainer.limit_test_batches=1", "--trainer.limit_predict_batches=1"]
    ok("fit", "--config", str(RUN), "--name", "old", *small)
    folder = Path("runs/old/001")
    point = "resume/step-0000002.ckpt"
    aged(folder)
    before = load_plain(folder / point, map_location="cpu")["callbacks"]["DropAhead"]
    lines = ["descant.loggers.TensorBoard is now", "descant.callbacks.DropAhead is now"]
    for words in (["validate", "--run", "old/001"], ["predict", "--run", "old/001", *small]):
        done = ok(*words)
        assert [line in told for line, told in zip(lines, notices(done), strict=True)] == [True, True], done.err
    assert "config.yaml: not as the run wrote it" not in done.err
    assert notices(ok("export", "old/001", "--out", "out"))
    assert type(descant.load("out")).__name__ == type(descant.load(folder)).__name__ == "Fusion"
    done = ok("fit", "--run", "old/001", "--resume", "auto", "--trainer.max_steps=3", "--changed=allow", *small)
    told = [
        line for line in done.err.splitlines() if "trainer: " in line and "max_steps 2 -> 3" in line
    ]  # arguments since then differ beside
    assert len(notices(done)) == 2 and len(told) == 1, done.err
    content: dict[str, Any] = load_plain(folder / "resume/step-0000003.ckpt", map_location="cpu")
    assert before["probability"] and content["callbacks"]["OPM"]["probability"].keys() == before["probability"].keys()
    assert "DropAhead" not in content["callbacks"]
