"""Old names of classes, import paths, arguments and checkpoint states."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from descant.modules.io import names, renamed

#: Import paths of every public class of version 0.1.0, and of what its packages export.
OLD = (Path(__file__).parents[2] / "descant/old_paths.txt").read_text().split()


def test_every_old_import_path_is_that_of_a_class_of_now() -> None:
    assert len(OLD) > 600
    for old in OLD:
        module, _, last = renamed.current(old).rpartition(".")
        if last in renamed.GONE and last not in names.table():
            continue
        file = names.PACKAGE.joinpath(*module.split(".")[1:])
        file = file / "__init__.py" if file.is_dir() else file.with_suffix(".py")
        assert file.is_file() and re.search(rf"\b{last}\b", file.read_text()), f"{old}: {module}.{last}"


def test_modules_that_were_moved_since() -> None:
    paths = {
        "engine.configure.Lora": "adaptation.lora.Lora",
        "engine.configure.Shard": "training_setup.compile_and_shard.Shard",
        "engine.configure.Checkpointing": "training_setup.activation_checkpointing.Checkpointing",
        "engine.loggers.CSV": "training_setup.loggers.CSV",
        "adaptation.modulation.ScaleShift": "missing_modalities.modulation_forms.ScaleShift",
        "adaptation.imputation.MeanImputer": "missing_modalities.imputation.MeanImputer",
    }
    for old, new in paths.items():
        assert renamed.current(f"descant.modules.{old}") == f"descant.modules.{new}"


def test_new_names_are_classes_and_old_ones_are_none() -> None:
    for old, new in renamed.CLASSES.items():
        assert new in names.table() and old not in names.table(), f"{old} -> {new}"
    assert not {*renamed.GONE} & {*names.table()} and {*renamed.ARGUMENTS} <= {*names.table()}


def test_a_present_name_wins_and_others_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(renamed.CLASSES, "EMA", "GradientBlending")
    assert renamed.current("EMA") == "EMA"
    stay = ["descant.callbacks.EMA", "descant.nowhere.EMA", "descant.callbacks.run.ema.EMB", "torch.optim.Own", "Owm"]
    assert [renamed.current(name) for name in stay] == stay


def test_a_plain_configuration(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(renamed.ARGUMENTS, "UserData", {"pictures": "images", "kinds": "classes"})
    old = yaml.safe_load(
        "{data: {class_path: Own, init_args: {kinds: 3, pictures: [{class_path: descant.modules.text.Ngrams}]}},"
        " name: Own, also: [{class_path: Own, init_args: {kinds: 1, classes: 2}}]}"
    )
    renamed.forget()
    assert renamed.config(old, "config.yaml") == yaml.safe_load(
        "{data: {class_path: UserData, init_args:"
        " {classes: 3, images: [{class_path: descant.modules.tokenizers.text.NgramTokenizer}]}},"
        " name: Own, also: [{class_path: UserData, init_args: {kinds: 1, classes: 2}}]}"
    )
    assert old["data"]["class_path"] == "Own" and list(old["data"]["init_args"]) == ["kinds", "pictures"]
    assert set(capsys.readouterr().err.splitlines()) == {
        "descant: config.yaml: Own is now UserData",
        "descant: config.yaml: descant.modules.text.Ngrams is now descant.modules.tokenizers.text.NgramTokenizer",
        "descant: config.yaml: UserData.kinds is now classes",
        "descant: config.yaml: UserData.pictures is now images",
    }
    renamed.config(old, "config.yaml")
    renamed.config(old)
    assert not capsys.readouterr().err, "each old name is noticed once a run"


def test_a_value_that_changed_with_its_argument(capsys: pytest.CaptureFixture[str]) -> None:
    renamed.forget()
    zeros = "descant.modules.missing_modalities.imputation.ZeroImputer"
    for old, new in ((True, zeros), (False, None), ("other", "other")):
        made = renamed.config({"class_path": "Masked", "init_args": {"zeros": old}}, "config.yaml")
        assert made == {"class_path": "Masked", "init_args": {"fill": new}}
    assert capsys.readouterr().err == "descant: config.yaml: Masked.zeros is now fill\n"


@pytest.mark.parametrize("rank", ["RANK", "LOCAL_RANK", "SLURM_PROCID"])
def test_only_rank_0_notices(rank: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv(rank, "1")
    renamed.forget()
    assert renamed.read("Blend", "a.yaml:3") == "GradientBlending" and not capsys.readouterr().err
    monkeypatch.setenv(rank, "0")
    renamed.read("Blend", "a.yaml:3")
    assert capsys.readouterr().err == "descant: a.yaml:3: Blend is now GradientBlending\n"


def test_a_class_that_was_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(renamed.GONE, "Vanished", "ask for columns with fields")
    with pytest.raises(ValueError, match=r"^Vanished was removed: ask for columns with fields$"):
        renamed.read("Vanished", "a.yaml:3")


def test_states_of_a_checkpoint() -> None:
    old = {
        "callbacks": {"DropAhead": 1, "Told": 2, "EMA": 3, "ModelCheckpoint{'monitor': None}": 4, "Blend{'k': 1}": 5},
        "Own": {"position": 1},
        "epoch": 2,
        "descant": {"recipe": "descant.recipes.base.Recipe", "step": 1},
    }
    assert renamed.checkpoint(old) == {
        "callbacks": {
            "OPM": 1, "ResumableLog": 2, "EMA": 3, "ModelCheckpoint{'monitor': None}": 4, "GradientBlending{'k': 1}": 5
        },
        "UserData": {"position": 1},
        "epoch": 2,
        "descant": {"recipe": "descant.recipes.base.recipe.Recipe", "step": 1},
    }  # fmt: skip


def test_a_name_that_no_file_could_have_is_left_as_it_is() -> None:
    """Each comes from a damaged configuration; none is looked for on the disk in a way that raises."""
    for name in ("descant.recipes" + "[" * 5000 + "clip.Clip", f"descant.{'a' * 5000}.Clip", "descant.recipes.a\0b.C"):
        assert renamed.current(name) == name
