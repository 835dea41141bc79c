"""The commands end to end, in process."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from descant.__main__ import COMMANDS, main
from descant.cli import dump, helptext
from descant.cli.catalogue import experiments, header, list_shipped, overlays
from descant.modules.io import names
from descant.modules.io.checkpoints import follow_latest
from tests.conftest import Result
from tests.rotation import quick, turn

Cli = Callable[..., Result]


# the front ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "args", [[], ["--help"], ["--version"], ["list"], ["fit", "--help"], ["new", "--help"], ["fti"]]
)
def test_front_imports_no_torch(args: list[str]) -> None:
    code = f"import sys; from descant.__main__ import main; main({args!r}); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_unknown_command_names_the_nearest(cli: Cli) -> None:
    assert cli("fti", "--config", "x").refusal == "fti: no such command; nearest: fit"


def test_config_before_the_command(cli: Cli) -> None:
    assert "descant fit --config toy.yaml" in cli("--config", "toy.yaml").refusal


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_short_help_fits_a_screen(cli: Cli, command: str) -> None:
    result = cli(command, "--help")
    assert result.rc == 0 and 3 <= len(result.out.splitlines()) <= 60
    assert max(map(len, result.out.splitlines())) <= 110


@pytest.mark.parametrize("command", ["fit", "claims"])
def test_help_takes_the_name_of_a_command(cli: Cli, command: str) -> None:
    assert cli("help", command).out == cli(command, "--help").out


def test_short_help_lists_no_option_that_the_command_refuses(cli: Cli) -> None:
    assert "--test true" in cli("fit", "--help").out and "--test true" not in cli("predict", "--help").out
    assert cli("predict", "--test", "true").refusal == "--test: only fit takes it"


def test_help_of_fit_has_experiments_in_a_line_each_as_far_as_a_screen_goes(cli: Cli) -> None:
    lines = cli("fit", "--help").out.splitlines()
    shown = [line.split() for line in lines[lines.index("Experiments:") + 1 :] if line.startswith("  ")]
    every = sorted(name for name in experiments() if not name.startswith("papers/"))
    named = [words[0] for words in shown if words[0] != "..."]
    assert len(named) > 30 and named == every[: len(named)] and "... and" in " ".join(shown[-1])
    assert int(shown[-1][2]) == len(every) - len(named)
    assert "--explain" in cli("check", "--help").out and not any("--explain" in line for line in lines)


@pytest.mark.parametrize("option", turn(["--model.help", "--data.help"], 2))
def test_help_of_a_class_needs_no_cache(option: str, tmp_path: Path) -> None:
    env = {**os.environ, "DESCANT_CACHE": str(tmp_path)}
    name = {"--model.help": "Contrastive", "--data.help": "Emoji"}[option]
    command = [sys.executable, "-m", "descant", "fit", option, name]
    result = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path)
    assert result.returncode == 0 and result.stdout.startswith("usage: "), result.stderr


def test_help_of_a_class_needs_no_torch(tmp_path: Path, written_content: dict[str, Any]) -> None:
    (tmp_path / dump.place().name).write_text(json.dumps(written_content))
    code = (
        "import sys; from descant.__main__ import main; rc = main(sys.argv[1:]); sys.exit('torch' in sys.modules or rc)"
    )

    def ask(*args: str) -> subprocess.CompletedProcess[str]:
        env = {**os.environ, "DESCANT_CACHE": str(tmp_path)}
        return subprocess.run([sys.executable, "-c", code, "fit", *args], capture_output=True, text=True, env=env)

    told = ask("--model.help", "Contrastive")
    assert (
        told.returncode == 0
        and "  width: a whole number (128)\n      width of the shared embedding space." in told.stdout
    )
    assert "  towers: a class of kind Towers (needed)" in told.stdout
    assert max(map(len, told.stdout.splitlines())) <= 110
    below = ask("--config", "contrastive/emoji", "--model.optimizer.help", "SGD")
    assert "class_path: torch.optim.SGD" in below.stdout and "\n  params:" not in below.stdout
    assert "patience" in ask("--trainer.callbacks.help", "EarlyStopping").stdout
    assert "Emoji, EmojiCodes, Fashion" in ask("--data.help").stdout
    wrong = ask("--model.help", "Contrastiv")
    assert wrong.returncode == 2 and wrong.stderr.endswith("of kind Recipe; nearest: Contrastive\n")


@pytest.mark.parametrize(
    "words", [("help", "SeriesTower"), ("--help", "SeriesTower"), ("fit", "--help", "SeriesTower")]
)
def test_help_of_any_class(cli: Cli, words: tuple[str, ...]) -> None:
    result = cli(*words)
    assert result.rc == 0 and result.out.startswith("SeriesTower(channels: int, patch: int, width: int = 128")
    assert "class_path: descant.modules.towers.series.SeriesTower" in result.out
    assert "    patch: P." in result.out and ">>> tower(x_BWT).mask_BT.tolist()" in result.out


def test_help_of_an_unknown_class_names_the_nearest(cli: Cli) -> None:
    assert cli("fit", "--help", "SeriesTowre").refusal == "--help SeriesTowre: no such class; nearest: SeriesTower"


def test_full_help_is_the_parsers_own(cli: Cli) -> None:
    result = cli("fit", "--help", "all")
    assert result.rc == 0 and "--trainer.gradient_clip_val" in result.out and "--resume" in result.out


def test_help_shows_every_command(cli: Cli) -> None:
    lines = cli("--help").out.splitlines()
    assert [line.split()[0] for line in lines if line.startswith("  ")] == list(COMMANDS)
    assert max(map(len, lines)) <= 110


def test_list_shows_all_that_ships_one_line_each(cli: Cli) -> None:
    lines = cli("list").out.splitlines()
    shown = [line.split()[0] for line in lines if line.startswith("  ")]
    assert sorted(shown) == sorted({**experiments(), **overlays()})
    for name, file in (*experiments().items(), *overlays().items()):
        (line,) = [line for line in lines if line.startswith(f"  {name} ")]
        told, whole = line.removeprefix(f"  {name}").strip(), header(file)
        assert len(line) <= 110
        assert told == whole or (told.endswith(" ...") and f"{whole} ".startswith(told.removesuffix("...")))
    assert "base" not in list_shipped()


def test_list_looks_for_words(cli: Cli) -> None:
    listed = cli("list", "overlays", "SigLIP", "ring").out.splitlines()[1:]
    assert [line.split()[0] for line in listed] == ["with/train/siglip-ring"]
    assert "Experiments" not in cli("list", "with/train/siglip").out
    assert cli("list", "callbacks", "EMA").out.splitlines()[1].startswith("  EMA ")
    found = cli("list", "temperature").out  # of all groups
    assert "Callbacks (--trainer.callbacks+ NAME):" in found and "  Temperature" in found
    assert len(cli("list", "--help").out.splitlines()) < 10
    assert cli("list", "sigl1p").refusal == "list sigl1p: nothing that ships has that in its name or its line"
    assert cli("list", "--config").refusal == "--config: list takes a group and words to look for, and no options"


@pytest.mark.parametrize(
    ("group", "name"),
    [
        ("towers", "SeriesTower"),
        ("fields", "NumberField"),
        ("fields", "ArrayField"),
        ("fusions", "LateFusion"),
        ("objectives", "Regress"),
        ("losses", "Huber"),
        ("adapters", "PatchAdapter"),
        ("corruptions", "UniformMask"),
        ("metrics", "NumberErrors"),
    ],
)
def test_list_has_every_kind_of_part(cli: Cli, group: str, name: str) -> None:
    lines = cli("list", group).out.splitlines()
    assert any(line.startswith(f"  {name} ") for line in lines) and len({*lines}) == len(lines) > 4


def test_list_knows_everyday_words(cli: Cli) -> None:
    for word, name in {"sensor": "SeriesTower", "spectrum": "SeriesField", "regression": "NumberField"}.items():
        assert f"\n  {name} " in cli("list", word).out


def test_list_has_recipes_data_modules_and_claims(cli: Cli) -> None:
    from descant import recipes

    def shown(group: str) -> list[str]:
        return [line.split()[0] for line in cli("list", group).out.splitlines()[1:]]

    theirs = [n for n in recipes.__all__ if n != "Recipe" and issubclass(getattr(recipes, n), recipes.Recipe)]
    assert sorted(shown("recipes")) == sorted({*theirs} - {"Wrapper"}) and shown("recipes")[0] == "Contrastive"
    assert {"Emoji", "UserData", "Mixture"} <= set(shown("datamodules")) and "DataModule" not in shown("datamodules")
    assert {"EMA", "Harmonize", "Rollouts"} <= set(shown("callbacks")) and "EmbeddingEvaluator" not in shown(
        "callbacks"
    )
    assert "harmony-triplets" in shown("claims") and shown("overlays") == [
        n for n in sorted(overlays()) if "data/" not in n
    ]


def test_the_line_of_a_class_is_the_first_of_its_docstring() -> None:
    for name, some in names.classes().items():
        for found in some:
            cls = getattr(importlib.import_module(found.path.rpartition(".")[0]), name)
            doc = " ".join(
                (inspect.cleandoc(cls.__doc__ or "") if "__doc__" in vars(cls) else "").partition("\n\n")[0].split()
            )
            assert found.about in (doc, ""), found.path  # dataclasses and tuples get one of their own


def test_help_stays_on_its_screen_as_experiments_and_overlays_grow(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    file = next(iter(experiments().values()))
    monkeypatch.setattr(helptext, "experiments", lambda: {f"family/experiment-{n}": file for n in range(100)})
    monkeypatch.setattr(helptext, "overlays", lambda: {f"with/overlay-{n}": file for n in range(50)})
    lines = cli("fit", "--help").out.splitlines()
    assert len(lines) <= 60 and max(map(len, lines)) <= 110
    assert sum("family/experiment-" in line for line in lines) >= 5
    assert "all 50" in lines[-2]
    (more,) = [line for line in lines if "more: descant list" in line]
    assert int(more.split()[2]) + sum("family/experiment-" in line for line in lines) == 100


# fit ------------------------------------------------------------------------------------------------------------


def test_fit_leaves_a_whole_run_folder(toy: Cli, workplace: Path) -> None:
    result = toy("fit")
    assert result.rc == 0, result.err
    run = workplace / "runs/toy/001"
    names = {path.name for path in run.iterdir()}
    assert {"config.yaml", "versions.json", "metrics.csv", "metrics.json", "checkpoints"} <= names
    assert any(name.startswith("events.out") for name in names) and not any(run.glob("version_*"))
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"0000008.ckpt", "0000008.ckpt.manifest"}
    assert {path.name for path in (run / "resume").iterdir()} == {"step-0000008.ckpt", "step-0000008.ckpt.manifest"}


def test_terminal_is_quiet(toy: Cli) -> None:
    result = toy("fit", "--trainer.max_epochs", "3")
    lines = [line for line in (result.out + result.err).splitlines() if not line.startswith("descant: warning")]
    before = [n for n, line in enumerate(lines) if line.startswith("step ")]
    assert before[0] <= 25 and len(before) == 3
    assert "\x1b" not in result.out and "GPU available" not in result.out + result.err


def test_test_metrics_of_the_final_weights(toy: Cli, workplace: Path) -> None:
    assert toy("fit", "--test", "true").rc == 0
    text = (workplace / "runs/toy/metrics.json").read_text()
    assert '"test/gap"' in text and '"val/gap"' in text


def test_the_command_line_wins_over_configurations(toy: Cli, workplace: Path) -> None:
    (workplace / "more.yaml").write_text("trainer: {max_epochs: 7}\n")
    result = toy("fit", "--trainer.max_epochs", "1", "--config", "more.yaml")
    assert result.rc == 0 and "epoch 1" in result.out and "epoch 2" not in result.out


def test_callbacks_append_from_a_second_configuration(toy: Cli, workplace: Path) -> None:
    (workplace / "stop.yaml").write_text(
        "trainer:\n  callbacks+:\n    - class_path: EarlyStopping\n      init_args: {monitor: val/gap}\n"
    )
    assert toy("fit", "--config", "stop.yaml", "--trainer.callbacks+=LearningRateMonitor").rc == 0
    saved = yaml.safe_load((workplace / "runs/toy/001/config.yaml").read_text())
    names = [callback["class_path"].rpartition(".")[2] for callback in saved["trainer"]["callbacks"]]
    base = yaml.safe_load(shipped_base())["trainer"]["callbacks"]
    assert names == [c["class_path"].rpartition(".")[2] for c in base] + [
        "EarlyStopping",
        "LearningRateMonitor",
    ]


def shipped_base() -> str:
    from descant.cli.catalogue import BASE

    return BASE.read_text()


def test_sub_files_are_relative_to_their_file(cli: Cli, workplace: Path) -> None:
    (workplace / "a/b").mkdir(parents=True)
    (workplace / "a/data.yaml").write_text("class_path: tests.toys.ToyData\ninit_args: {batch_size: 6}\n")
    text = (workplace / "toy.yaml").read_text()
    head, _, tail = text.partition("data:\n")
    (workplace / "a/b/mine.yaml").write_text(f"{head}data: ../data.yaml\ntrainer:\n{tail.partition('trainer:')[2]}")
    assert cli("fit", "--config", "a/b/mine.yaml", "--trust", "tests.toys", "--data.batches", "3").rc == 0
    saved = yaml.safe_load((workplace / "runs/mine/001/config.yaml").read_text())
    assert saved["data"]["init_args"]["batch_size"] == 6 and saved["data"]["init_args"]["batches"] == 3


def test_shipped_overlay_by_name_from_another_folder(toy: Cli, workplace: Path) -> None:
    assert toy("fit", "--config", "on/tiny").rc == 0
    saved = yaml.safe_load((workplace / "runs/toy/001/config.yaml").read_text())
    assert saved["trainer"]["max_steps"] == 2 and saved["data"]["init_args"]["tiny"] is True


def test_a_folder_of_runs_is_no_address(toy: Cli, workplace: Path) -> None:
    line = toy("fit", "--runs", "file:///tmp/runs").refusal
    assert line == "--runs file:///tmp/runs: a folder of this machine; --checkpoint_mirror takes an address"
    assert not (workplace / "file:").exists()


# replay ---------------------------------------------------------------------------------------------------------


def test_a_run_replays_to_the_same_weights(toy: Cli, cli: Cli, workplace: Path) -> None:
    assert toy("fit", "--name", "first").rc == 0
    assert cli("fit", "--config", "runs/first/001/config.yaml", "--trust", "tests.toys").rc == 0
    one, two = (
        torch.load(workplace / f"runs/first/{n}/checkpoints/0000008.ckpt", weights_only=True)["state_dict"]
        for n in ("001", "002")
    )
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize("which", quick(["best", "last", "runs/toy/001/checkpoints/0000008.ckpt", None], 4))
@pytest.mark.parametrize("command", ["validate", "test"])
def test_a_run_is_evaluated_from_its_own_configuration(
    toy: Cli, cli: Cli, workplace: Path, command: str, which: str | None
) -> None:
    assert toy("fit", "--resume", "never").rc == 0
    run = workplace / "runs/toy/001"
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    choice = ["--ckpt_path", which] if which else []
    result = cli(command, "--config", "runs/toy/001/config.yaml", "--trust", "tests.toys", *choice)
    assert result.rc == 0, result.err
    assert {path: path.read_bytes() for path in before} == before
    key = {"validate": "val", "test": "test"}[command]
    assert (run / f"{command}-001/metrics.csv").is_file() and f"{key}" in result.out
    assert follow_latest(workplace / "runs/toy/latest") == run and len(list((workplace / "runs/toy").iterdir())) == 3


def test_best_is_what_the_monitor_chose(toy: Cli, cli: Cli, workplace: Path) -> None:
    (workplace / "best.yaml").write_text(
        "trainer:\n  callbacks+:\n    - class_path: ModelCheckpoint\n      init_args:\n"
        "        {dirpath: RUN/checkpoints, filename: best, monitor: val/gap, mode: max, save_last: false}\n"
    )
    assert toy("fit", "--config", "best.yaml", "--trainer.max_epochs", "3").rc == 0
    result = cli("validate", "--run", "toy/001", "--trust", "tests.toys", "--ckpt_path", "best")
    assert result.rc == 0, result.err
    stored = torch.load(workplace / "runs/toy/001/checkpoints/best.ckpt", weights_only=True)
    assert stored["global_step"] == 4  # mode max of a falling gap: the first epoch, not the last
    rows = (workplace / "runs/toy/001/metrics.csv").read_text().splitlines()
    first = float(re.findall(r"0\.\d+", next(row for row in rows[1:] if row.startswith("0,3,") and row[-1] != ","))[-1])
    assert f"{first:.3f}" in result.out


# check ----------------------------------------------------------------------------------------------------------


def test_check_reports_and_trains_nothing(toy: Cli, workplace: Path) -> None:
    result = toy("check")
    assert result.rc == 0, result.err
    assert not (workplace / "runs").exists()
    for word in ("ToyRecipe", "image: ToyTower", "image-text: ", "AdamW", "on 2 samples", "8 steps"):
        assert word in result.out, word
    assert len(result.out.splitlines()) <= 15


def test_check_refuses_what_fit_refuses_at_setup(toy: Cli) -> None:
    assert toy("check", "--data.folder", "/nope").refusal == "no such file: /nope"
    assert toy("check", "--model.explode", "value").refusal == "the data has no modality 'sound'"


@pytest.mark.slow
def test_check_of_answers_that_are_not_sampled_yet(cli: Cli) -> None:
    stages = [f"--data.stages.{name}.epochs=0" for name in ("captions", "answers")]
    result = cli("check", "--config", "staged/emoji_vqa", "--config", "on/tiny", *stages)
    assert result.rc == 0 and "of answers, which are sampled first" in result.out
    assert "no parameter got a gradient" not in result.err  # answers of equal rewards have zero gradients


def test_help_of_the_console_script() -> None:
    assert main(["--version"]) == 0


def test_of_a_callback_listed_twice_the_last_one_counts(toy: Callable[..., Result], workplace: Path) -> None:
    lines = "trainer:\n  callbacks+:\n    - {class_path: EMA, init_args: {decay: DECAY}}\n"
    for name, decay in (("one", "0.5"), ("two", "0.9")):
        (workplace / f"{name}.yaml").write_text(lines.replace("DECAY", decay))
    result = toy("fit", "--config", "one.yaml", "--config", "two.yaml", "--trainer.max_steps", "1")
    assert result.rc == 0, result.err
    from descant.callbacks import EMA, ModalitySubsetEval, Retrieval
    from descant.cli.trainer_parts import once

    for first, last in ((EMA(0.5), EMA(0.9)), (ModalitySubsetEval(), ModalitySubsetEval(target="group"))):
        judges = [Retrieval(), Retrieval()]
        assert once([first, *judges, last]) == [*judges, last]


def test_a_short_name_of_two_packages_is_refused_with_both(toy: Callable[..., Result]) -> None:
    import bitsandbytes  # noqa: F401  # brings another AdamW

    line = toy("fit", "--model.optimizer", "AdamW").refusal
    assert "bitsandbytes.optim" in line
    assert "torch.optim" in line


def test_a_data_set_is_given_by_name(cli: Cli) -> None:
    tiny = ("--config", "on/tiny", "--data.tiny", "true")
    result = cli("check", "--config", "contrastive/own", *tiny, "--data", "emoji")
    assert result.rc == 0, result.err
    assert "Emoji" in result.out
    assert "nearest: Emoji" in cli("check", "--config", "contrastive/own", "--data", "emojy").refusal


def test_callbacks_of_lightning_that_no_run_can_use_are_refused_without_resume_too(toy: Cli) -> None:
    options = ("--trainer.callbacks=descant.callbacks.logs.report.Report", "--trainer.callbacks+=LearningRateFinder")
    assert toy("check", *options).refusal.startswith("trainer.callbacks: LearningRateFinder: recipes have no rate")


def test_a_word_of_an_enumeration_is_written_as_a_word(toy: Cli, workplace: Path) -> None:
    timer = ("--trainer.callbacks+=Timer", "--trainer.callbacks.duration=00:00:05:00")
    assert toy("fit", *timer, "--trainer.max_epochs", "1").rc == 0
    saved = yaml.safe_load((workplace / "runs/toy/001/config.yaml").read_text())
    assert saved["trainer"]["callbacks"][-1]["init_args"]["interval"] == "step"
