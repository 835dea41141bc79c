"""What is written down of the parser says what the parser says, and needs no torch to say it."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from descant.cli import dump
from descant.cli.dump import Written
from descant.cli.schema import Entry, Key, Unknown, fits, has_classes, in_words, nested_classes
from descant.cli.signatures import Live
from tests.conftest import Result

Cli = Callable[..., Result]


@pytest.fixture(scope="module")
def live(written_content: dict[str, Any]) -> Live:
    from descant.cli.main import live

    found = live("fit")
    assert found.command
    for path in written_content["classes"]:  # kinds are known to it once the keys that ask for them are
        found.entry(_class(path))
    return found


@pytest.fixture(scope="module")
def written(written_content: dict[str, Any]) -> Written:
    return Written(written_content, "fit")


def _class(path: str) -> Any:
    # not find_class: a command that ran before in this process may have left its policy of imports
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def test_every_key_is_the_parsers(written_content: dict[str, Any], live: Live, written: Written) -> None:
    assert written.command == live.command
    assert len(written_content["classes"]) > 400
    for path in written_content["classes"]:
        assert written.entry(path) == live.entry(_class(path)), path


def test_a_factory_takes_what_the_program_does_not_give(
    written_content: dict[str, Any], live: Live, written: Written
) -> None:
    factories = {
        (kind["class"], kind["skip"])
        for entry in written_content["classes"].values()
        for key in entry["keys"].values()
        for kind in nested_classes(key[0])
        if "skip" in kind
    }
    assert ("torch.optim.optimizer.Optimizer", 1) in factories
    for kind, skip in factories:
        for path in written_content["kinds"][kind]["paths"]:
            theirs, ours = live.entry(_class(path), skip), written.entry(path, skip)
            assert (list(ours.keys), sorted(ours.required)) == (list(theirs.keys), sorted(theirs.required)), path


#: Of every sort, right somewhere and wrong elsewhere.
VALUES = [
    None,
    True,
    3,
    0,
    -1.5,
    1e-3,
    "x",
    "3",
    "1e-3",
    "true",
    "null",
    "",
    [],
    [1],
    ["x"],
    [[2.5]],
    {},
    {"a": 1},
    {"a": "x"},
]


def test_it_refuses_nothing_that_the_parser_takes(
    written_content: dict[str, Any], live: Live, written: Written
) -> None:
    seen: dict[str, tuple[Entry | None, str, Key]] = {}
    owners = [(None, live.command), *((e, e.keys) for e in map(live.entry, map(_class, written_content["classes"])))]
    for owner, keys in owners:
        for name, key in keys.items():
            if not has_classes(key.type):  # those are looked into, and each part is looked at by itself
                seen.setdefault(json.dumps(key.type), (owner, name, key))
    same = checked = 0
    for owner, name, key in seen.values():
        for value in VALUES:
            theirs, ours = live.accepts(owner, name, value), fits(key.type, value)
            assert ours or not theirs, f"{owner.path if owner else 'fit'}.{name}: {in_words(key.type)} of {value!r}"
            if "other" not in json.dumps(key.type):  # of which nothing is known but a name
                same, checked = same + (ours == theirs), checked + 1
    assert same / checked > 0.95, (same, checked)


def test_classes_are_found_by_any_of_their_names(written: Written) -> None:
    optimizers = [{"class": "torch.optim.optimizer.Optimizer", "skip": 1}]
    for name in ("AdamW", "torch.optim.AdamW", "torch.optim.adamw.AdamW"):
        found = written.find(name, optimizers)
        assert found.path == "torch.optim.AdamW" and "params" not in found.keys and found.required == []
    with pytest.raises(LookupError, match=r"there is no torch.optim.AdmaW; nearest: AdamW"):
        written.find("torch.optim.AdmaW", optimizers)
    with pytest.raises(LookupError, match=r"no class AdmaW of kind Optimizer; nearest: AdamW"):
        written.find("AdmaW", optimizers)
    with pytest.raises(LookupError, match="EarlyStopping is not of kind Optimizer"):
        written.find("lightning.pytorch.callbacks.EarlyStopping", optimizers)
    for name in ("my.Optimizer", "torch.nn.Linear"):  # not written down: the parser will say
        with pytest.raises(Unknown):
            written.find(name, optimizers)


def test_it_is_kept_until_a_file_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written_content: dict[str, Any]
) -> None:
    monkeypatch.setenv("DESCANT_CACHE", str(tmp_path))
    assert dump.read("fit") is None
    dump.place().write_text(json.dumps(written_content))
    found = dump.read("check")
    assert found is not None and "model" in found.command
    dump.place().write_text(json.dumps({**written_content, "of": "another"}))
    assert dump.read("fit") is None
    dump.place().write_text("{")
    assert dump.read("fit") is None
    before = dump.place()
    monkeypatch.setattr(dump, "version", lambda _: "0")
    assert dump.place() != before


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["fit", "--config", "contrastive/emoji", "--model.widt", "3"], "--model.widt: Contrastive has no such key"),
        (
            ["fit", "--config", "contrastive/emoji", "--trainer.callbacks.ModelCheckpoint.mode", "min"],
            "an option below a list sets its last item, here ModelCheckpoint: leave out the name",
        ),
        (
            ["fit", "--config", "contrastive/emoji", "--data.batch_size", "x"],
            "--data.batch_size: expected a whole number",
        ),
        (["check", "--config", "contrastive/emoji", "--model.optimizer", "AdmaW"], "nearest: AdamW"),
        (["test", "--config", "contrastive/emoji", "--trainer.device", "1"], "nearest: devices"),
    ],
)
def test_a_mistake_is_answered_without_torch(
    args: list[str], line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written_content: dict[str, Any]
) -> None:
    monkeypatch.setenv("DESCANT_CACHE", str(tmp_path))
    dump.place().write_text(json.dumps(written_content))
    code = (
        "import sys; from descant.__main__ import main; code = main(sys.argv[1:]); print('torch' in sys.modules, code)"
    )
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert done.stdout == "False 2\n"
    assert line in done.stderr and len(done.stderr.splitlines()) == 1
