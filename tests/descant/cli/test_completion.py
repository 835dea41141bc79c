"""Completion: what is offered, and that real shells offer it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from descant.cli import dump
from descant.cli.completion import SHELLS
from tests.conftest import Result

Cli = Callable[..., Result]


@pytest.fixture
def tab(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written_content: dict[str, Any]
) -> Callable[..., list[str]]:
    """What is offered for the last of some words."""
    monkeypatch.setenv("DESCANT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    dump.place().write_text(json.dumps(written_content))
    return lambda *words: cli("__complete", *words).out.split()


def test_words_of_the_line(tab: Callable[..., list[str]], workplace: Path) -> None:
    assert tab("fi") == ["fit"] and {"fit", "claims", "--help"} <= set(tab(""))
    assert tab("fit", "--conf") == ["--config"] and tab("completion", "") == ["bash", "fish", "zsh"]
    assert "contrastive/emoji" in tab("fit", "--config", "contr") and "on/tiny" in tab("fit", "--config", "on/")
    (workplace / "runs/mine/001").mkdir(parents=True)
    (workplace / "runs/mine/001/config.yaml").touch()
    assert tab("test", "--run", "") == ["mine/001"]
    assert tab("data", "--") == []  # it has a parser of its own


def test_keys_are_of_the_class_that_the_line_chooses(tab: Callable[..., list[str]]) -> None:
    chosen = tab("fit", "--config", "contrastive/emoji", "--model.")
    assert {"--model.width", "--model.optimizer.", "--model.adapt+"} <= set(chosen)
    assert "--model.corruption" not in chosen and "--model.corruption" in tab("fit", "--model.")
    assert "--model.optimizer.lr" in tab("fit", "--config", "contrastive/emoji", "--model.optimizer.l")
    assert "--model.optimizer.params" not in tab("fit", "--model.optimizer.")
    towers = ("fit", "--config", "contrastive/emoji", "--model.towers.init_args.image.init_args.")
    assert f"{towers[-1]}widths" in tab(*towers)
    assert tab("fit", "--trainer.max_s") == ["--trainer.max_steps"]
    assert tab("fit", "--no.such.key.") == [] and tab("fit", "--config", "nope", "--trainer.max_s") == [
        "--trainer.max_steps"
    ]


def test_values_are_classes_and_choices(tab: Callable[..., list[str]]) -> None:
    assert "AdamW" in tab("fit", "--config", "contrastive/emoji", "--model.optimizer", "Ad")
    assert "Masked" in tab("fit", "--model", "Ma") and "Emoji" in tab("fit", "--data", "")
    assert {"bf16-mixed", "32-true"} <= set(tab("fit", "--trainer.precision", ""))
    assert tab("fit", "--test", "") == ["false", "true"]
    assert "EarlyStopping" in tab("fit", "--trainer.callbacks+", "Early")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_real_shell_offers_them(shell: str, tab: Callable[..., list[str]], tmp_path: Path) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell} here")
    asks = {
        "bash": "COMP_WORDS=(descant fit --config contrastive/emoji --model.w); COMP_CWORD=4; _descant; "
        'printf "%s\\n" "${COMPREPLY[@]}"',
        "fish": "complete -C 'descant fit --config contrastive/emoji --model.w'",
        # a widget of zsh wants a terminal: that its script is one, and defines the function, is what can be seen here
        "zsh": 'whence -w _descant | sed "s/.*function/--model.width/"',
    }
    before = "compdef() { :; }\n" if shell == "zsh" else ""
    (tmp_path / "script").write_text(f"{before}{SHELLS[shell]}\n{asks[shell]}\n")
    (tmp_path / "descant").write_text(f'#!/bin/sh\nexec {sys.executable} -m descant "$@"\n')  # of these packages
    (tmp_path / "descant").chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = subprocess.run(
        [shell, tmp_path / "script"], capture_output=True, text=True, env={**os.environ, "PATH": path}
    )
    assert done.stdout.split() == ["--model.width"], done.stderr


@pytest.mark.parametrize("shell", ["bash", "fish"])
def test_names_of_folders_are_not_run(shell: str, tab: Callable[..., list[str]], workplace: Path) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell} here")
    odd = ["$(touch a)", "`touch b`", "x; touch c", "x' 'y", "x\ny", "$HOME", "x\ty", "<(touch d)"]
    for name in [*odd, "plain"]:
        (workplace / "runs" / name / "001").mkdir(parents=True)
        (workplace / "runs" / name / "001/config.yaml").touch()
    assert tab("test", "--run", "") == ["plain/001"]
    # whatever is offered: a line of a name is one word, and nothing of it is run
    (workplace / "offers").write_text("\n".join(f"{name}/001" for name in odd if "\n" not in name) + "\n")
    asks = {
        "bash": "COMP_WORDS=(descant test --run ''); COMP_CWORD=3; _descant; "
        'for word in "${COMPREPLY[@]}"; do eval "printf \'%s\\n\' $word"; done',
        "fish": "complete -C 'descant test --run '",
    }
    stand_in = {"bash": "descant() { cat offers; }", "fish": "function descant; cat offers; end"}
    (workplace / "script").write_text(f"{SHELLS[shell]}\n{stand_in[shell]}\n{asks[shell]}\n")
    done = subprocess.run([shell, "script"], capture_output=True, text=True)
    assert not done.stderr and not {"a", "b", "c", "d"} & {file.name for file in workplace.iterdir()}
    if shell == "bash":
        assert done.stdout.splitlines() == (workplace / "offers").read_text().splitlines()


def test_the_command_prints_the_script(tab: Callable[..., list[str]], cli: Cli) -> None:
    assert cli("completion", "bash").out == SHELLS["bash"]
    assert cli("completion", "bsh").refusal == "completion bsh: no such shell; nearest: bash"
    assert "source <(descant completion bash)" in cli("completion").out
