"""Mistakes that no schema knows: values, shapes, files, headers, addresses, packages, devices, checkpoints and ports.

Each is answered in at most five lines that name the fault, or by a warning before the first step. The counterparts are
``test_mistakes.py``, of keys and types drawn by lot, and ``test_bad_input.py``, of what parsers and file systems meet.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch

from descant import callbacks, datamodules
from descant.cli import bounds
from descant.cli.explain import composition_warnings
from descant.modules.core.objects import require_objects
from descant.modules.io import names
from descant.modules.multitask import PCGrad, Rule
from tests.conftest import TOY, TRUST, Result, captured, settings_kept
from tests.rotation import quick

MOST = 5
PICTURE = bytes.fromhex(  # one grey pixel
    "89504e470d0a1a0a0000000d49484452000000010000000108000000003a7e9b550000000a49444154789c636000000002000148afa471"
    "0000000049454e44ae426082"
)
ROWS = "".join(f"{k}.png,a picture of {k}\n" for k in range(8))
FILES = {
    "empty.yaml": "",
    "comment.yaml": "# nothing yet\n",
    "whole.yaml": "model: {class_path: Contrastive}\ndata: {class_path: Emoji, init_args: {size: 32}}\n",
    "headless/captions.csv": ROWS,
    "tabs/captions.tsv": ROWS.replace(",", "\t"),
    "header/captions.csv": "file,caption\n",
    "words/captions.csv": "title,caption\na,b\n",
    "good/captions.csv": f"file,caption\n{ROWS}",
    "no.ckpt": "this is no archive",
    "neither/notes.bin": "x",
    "splits/dataset_dict.json": '{"splits": ["train", "tests"]}',
    **{f"splits/{split}/state.json": "{}" for split in ("train", "test")},
    **{f"{name}/dataset_info.json": "{}" for name in ("ordered", "damaged")},
    **{f"{name}/a.arrow": "no arrow" for name in ("ordered", "damaged")},
    "ordered/state.json": '{"_data_files": [{"filename": "a.arrow"}],'
    ' "_indices_data_files": [{"filename": "i.arrow"}]}',
    "damaged/state.json": '{"_data_files": [{"filename": "a.arrow"}]}',
}
SHORT = ("--config", "on/tiny", "--trainer.max_steps=200", "--trainer.log_every_n_steps=10")
EMOJI = ("check", "--config", "contrastive/emoji", *SHORT)
VIT = ("check", "--config", "contrastive/emoji-vit", *SHORT)
OWN = ("check", "--config", "contrastive/own", "--trainer.accelerator=cpu", "--data.batch_size=4")
FIT = ("fit", "--config", "toy.yaml", *TRUST)
IMAGE, TEXT = "--model.towers.image.", "--model.towers.text."


@dataclass(frozen=True)
class Case:
    """A command, what its answer says, and whether it is a warning of a run that goes on."""

    kind: str
    words: tuple[str, ...]
    line: str
    warns: bool = False


def numbers(base: tuple[str, ...], *given: tuple[str, str, str]) -> list[Case]:
    return [Case("value", (*base, key, value), line) for key, value, line in given]


CASES = [
    *numbers(
        EMOJI,
        ("--data.num_workers", "-3", "--data.num_workers: at least 0, got -3"),
        ("--data.eval_batch_size", "0", "--data.eval_batch_size: at least 1, got 0"),
        ("--data.batch_size", "1", "batch_size 1: contrast and batch statistics need at least 2"),
        ("--data.size", "-5", "--data.size: at least 1, got -5"),
        ("--data.token_dropout", "5", "--data.token_dropout: between 0 and 1, got 5"),
        ("--data.token_dropout", "-1", "--data.token_dropout: between 0 and 1, got -1"),
        ("--data.name_only", "1.5", "--data.name_only: between 0 and 1, got 1.5"),
        ("--data.nameless", "-0.5", "--data.nameless: between 0 and 1, got -0.5"),
        ("--data.drop", "{text: 5}", "--data.drop: between 0 and 1, got 5"),
        ("--data.text.n", "0", "n 0 is at least 2"),
        ("--data.text.length", "-1", "--data.text.length: at least 1, got -1"),
        ("--model.width", "-4", "--model.width: at least 1, got -4"),
        (f"{TEXT}width", "-4", f"{TEXT}width: at least 1, got -4"),
        (f"{TEXT}vocab", "0", f"{TEXT}vocab: at least 1, got 0"),
        (f"{TEXT}vocab", "99999999999999999", "BagTower: it cannot be built: Storage size calculation overflowed"),
        (f"{IMAGE}widths", "[0]", f"{IMAGE}widths: at least 1, got 0"),
        (f"{IMAGE}stem", "0", f"{IMAGE}stem: at least 1, got 0"),
        (f"{IMAGE}blocks", "-1", f"{IMAGE}blocks: at least 1, got -1"),
        (f"{IMAGE}expand", "0", f"{IMAGE}expand: above 0, got 0"),
        ("--model.loss.temperature", "0", "--model.loss.temperature: above 0, got 0"),
        ("--model.schedule.warmup", "-5", "warmup -5.0 must not be negative"),
        ("--model.optimizer.lr", "-1", "Invalid learning rate: -1.0"),
        ("--model.optimizer.betas", "[2, 3]", "Invalid beta parameter at index 0: 2.0"),
        ("--model.chunks", "0", "--model.chunks: at least 1, got 0"),
        ("--trainer.gradient_clip_val", "-1", "--trainer.gradient_clip_val: at least 0, got -1"),
        ("--trainer.num_nodes", "0", "--trainer.num_nodes: at least 1, got 0"),
        ("--trainer.max_steps", "-5", "`max_steps` must be a non-negative integer or -1"),
        ("--seed_everything", "-1", "--seed_everything: between 0 and 4294967295, got -1"),
        ("--trainer.callbacks+", "{class_path: EMA, init_args: {decay: 5}}", "between 0 and 1, got 5"),
    ),
    *numbers(
        VIT,
        (f"{IMAGE}depth", "0", f"{IMAGE}depth: at least 1, got 0"),
        (f"{IMAGE}depth", "-1", f"{IMAGE}depth: at least 1, got -1"),
        (f"{IMAGE}heads", "0", f"{IMAGE}heads: at least 1, got 0"),
        (f"{IMAGE}patch", "0", f"{IMAGE}patch: at least 1, got 0"),
        (f"{IMAGE}dropout", "5", f"{IMAGE}dropout: between 0 and 1, got 5"),
        (f"{IMAGE}mlp_ratio", "-4", f"{IMAGE}mlp_ratio: above 0, got -4"),
    ),
    Case("shape", (*VIT, f"{IMAGE}heads", "7"), "heads 7 does not divide width 192; the nearest that does is 6"),
    Case("shape", (*VIT, f"{IMAGE}patch", "128"), "patch 128 does not divide size 64; the nearest that does is 64"),
    Case("shape", (*VIT, f"{IMAGE}channels", "1"), "image (3, 64, 64): this tower takes (1, 64, 64)"),
    Case("shape", (*VIT, f"{IMAGE}size", "32"), "image (3, 64, 64): this tower takes (3, 32, 32)"),
    Case("shape", (*EMOJI, "--data.size", "3"), "model.towers.image.stem.0 (Conv2d): the first batch does not fit"),
    Case("shape", (*EMOJI, f"{TEXT}vocab", "10"), "NgramTokenizer has 16384 ids, and tower text embeds 10"),
    Case("shape", (*EMOJI, "--model.chunks", "7"), "chunks 7 does not divide the 32 rows of a rank's batch"),
    Case(
        "shape", ("check", "--config", "masked/emoji", *SHORT, "--data.size", "33"), "augment.size 32 is not the data's"
    ),
    Case("modality", (*EMOJI, "--data.drop", "{sound: 0.5}"), "drop: no modality 'sound'; this data has image, text"),
    Case("modality", (*EMOJI, "--data", "stamps"), "the data has audio, and no tower reads it", True),
    Case("rate", (*EMOJI, "--model.optimizer.lr", "1000"), "a learning rate of 1000 is far above what AdamW", True),
    Case("rate", (*FIT, "--trainer.max_steps", "0"), "trainer.max_steps 0: the run has no step to take", True),
    # files
    Case("file", (*EMOJI, "--config", "empty.yaml"), "empty.yaml: empty"),
    Case("file", (*EMOJI, "--config", "comment.yaml"), "comment.yaml: empty"),
    Case(
        "file",
        (*EMOJI, "--config", "fusion/emoji"),
        "--config contrastive/emoji and --config fusion/emoji: 2 experiments at once",
    ),
    Case("file", (*EMOJI, "--config", "whole.yaml"), "each is a whole experiment; keys of both count", True),
    Case("header", (*OWN, "--data.path", "headless"), "captions.csv: line 1 is a sample (0.png) and no header"),
    Case("header", (*OWN, "--data.path", "tabs"), "captions.tsv: line 1 is a sample (0.png) and no header"),
    Case("header", (*OWN, "--data.path", "header/captions.csv"), "captions.csv: no rows below the header"),
    Case("header", (*OWN, "--data.path", "words"), "no image field: fields are title (text), caption (text)"),
    Case("header", (*OWN, "--data.path", "good", "--data.fields.text.captions", "x"), "no column 'x'; there are file"),
    Case("header", (*OWN, "--data.path", "good", "--data.split", "part"), "no column 'part'; there are file"),
    # saved datasets
    Case("saved", (*OWN, "--data.path", "neither"), "nor a saved dataset (state.json, dataset_info.json)"),
    Case("saved", (*OWN, "--data.path", "splits"), "the split 'tests' is listed, and not there; nearest: test"),
    Case("saved", (*OWN, "--data.path", "splits/tran"), "splits/tran: no such file or folder; nearest: train"),
    Case("saved", (*OWN, "--data.path", "ordered"), "state.json: i.arrow is listed, and not there; nearest: a.arrow"),
    Case("saved", (*OWN, "--data.path", "damaged"), "a.arrow: not a readable stream of Arrow"),
    # addresses
    Case("address", (*OWN, "--data.path", "https://x.example/a.tar"), "--data.stream.urls 'https://x.example/a.tar'"),
    Case("address", (*OWN, "--data.path", "s3://b/a.parquet"), "s3://b/a.parquet: not read from there; shards (*.tar)"),
    Case("address", (*OWN, "--data.path", "hf://datasets/x"), "hf://datasets/x: not read from there; shards (*.tar)"),
    Case("address", (*OWN, "--data.path", "pipe:cat a.tar"), "--data.stream.allow_pipes true"),
    Case("address", (*OWN, "--data", "stream", "--data.stream.urls", "hf://x/a.tar"), "no way to read hf:"),
    # packages and devices
    Case("package", (*FIT, "--trainer.logger", "WandbLogger"), "WandbLogger: the package wandb is not installed: pip"),
    Case("package", (*FIT, "--trainer.logger+", "WandbLogger"), "WandbLogger: the package wandb is not installed: pip"),
    Case("package", (*FIT, "--trainer.logger", "MLFlowLogger"), "the package mlflow is not installed: pip install"),
    Case("package", (*FIT, "--trainer.logger", "CometLogger"), "the package comet-ml is not installed: pip install"),
    Case("device", (*EMOJI, "--config", "on/gpu"), "no GPU that torch can use on this machine; --config on/cpu"),
    # checkpoints
    Case(
        "checkpoint",
        ("validate", "--config", "toy.yaml", *TRUST, "--ckpt_path", "runs/emoji/001/resume/step-0000001.ckpt"),
        "the checkpoint does not have the weights of this ToyRecipe",
    ),
    Case(
        "checkpoint",
        ("validate", "--run", "toy/001", *TRUST, "--ckpt_path", "runs/wide/001/resume/step-0000001.ckpt"),
        "towers.image.layers.0.weight is [16, 4] in the file and [8, 4] in the model",
    ),
    Case(
        "checkpoint",
        ("validate", "--run", "toy/001", *TRUST, "--ckpt_path", "runs/scaled/001/resume/step-0000001.ckpt"),
        "runs/scaled/001, and is evaluated with the configuration of runs/toy/001: model.scale 2.0 there, 1.0 here",
        True,
    ),
    Case(
        "checkpoint",
        (*FIT, "--resume", "runs/emoji/001/resume/step-0000001.ckpt"),
        "runs/emoji/001 trains Contrastive, and this is ToyRecipe",
    ),
    Case("checkpoint", ("validate", "--config", "toy.yaml", *TRUST, "--ckpt_path", "no.ckpt"), "no.ckpt"),
    # ports: TAKEN stands for one that another program listens at
    Case(
        "port",
        (*FIT, "--trainer.devices", "2", "MASTER_PORT=TAKEN"),
        "in use on this machine; set another one, or none",
    ),
    Case("port", (*FIT, "--trainer.devices", "2", "MASTER_PORT=70000"), "MASTER_PORT 70000: not the number of a port"),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, written_content: dict[str, Any]) -> Iterator[Path]:
    """A folder with FILES, three runs of the toy and one of another recipe."""
    folder = tmp_path_factory.mktemp("outside")
    before = Path.cwd()
    os.chdir(folder)
    for name, text in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    for k in range(8):
        for part in ("headless", "tabs", "good"):
            (folder / part / f"{k}.png").write_bytes(PICTURE)
    (folder / "toy.yaml").write_text(TOY)
    one = ("--trainer.max_epochs=-1", "--trainer.max_steps=1", "--trainer.check_val_every_n_epoch=1000")
    for words in (
        (*FIT, *one),
        (*FIT, *one, "--name=scaled", "--model.scale=2.0"),
        (*FIT, *one, "--name=wide", "--model.image.width=16", "--model.text.width=16"),
        ("fit", "--config", "contrastive/emoji", *SHORT, *one, "--test=false", "--name=emoji"),
    ):
        with settings_kept():
            done = captured(*words)
        assert done.rc == 0, done.err
    os.chdir(before)
    yield folder


@pytest.fixture
def typed(place: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Result]]:
    monkeypatch.chdir(place)
    with settings_kept():
        yield captured


@pytest.mark.parametrize("case", quick(CASES, 4, ids=[f"{n}-{case.kind}" for n, case in enumerate(CASES)]))
def test_a_mistake_is_at_most_five_lines(
    typed: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, case: Case
) -> None:
    if case.kind == "device" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    words = [word for word in case.words if not word.startswith("MASTER_PORT=")]
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        for word in set(case.words) - set(words):
            monkeypatch.setenv("MASTER_PORT", word.partition("=")[2].replace("TAKEN", str(taken.getsockname()[1])))
        result = typed(*words)
    lines = result.err.splitlines()
    assert len(lines) <= MOST and "Traceback" not in result.err, result.err
    told = [line for line in lines if case.line in line]
    assert told, result.err
    assert result.rc == (0 if case.warns else 2) and told[0].startswith("descant: warning:") == case.warns, result.err


def test_the_table_is_of_sixty_mistakes_and_of_all_kinds() -> None:
    count = Counter(case.kind for case in CASES)
    wanted = {
        "value",
        "shape",
        "modality",
        "rate",
        "file",
        "header",
        "address",
        "package",
        "device",
        "checkpoint",
        "port",
        "saved",
    }
    assert sum(count.values()) >= 60 and set(count) == wanted and len(set(CASES)) == len(CASES)


# by class: numbers of every argument, objects of every callback -------------------------------------------------------


def test_defaults_are_within_their_bounds(written_content: dict[str, Any]) -> None:
    tried = 0
    for path, entry in written_content["classes"].items():
        for name, (_, default, _) in entry["keys"].items():
            if not path.startswith("descant.") or default is None:
                continue
            with contextlib.suppress(ValueError):
                values = [float(word) for word in default.strip("[]").split(",")]
                assert bounds.wrong(name, values) is None, (path, name, default)
                tried += name in bounds.OF_NAMES
    assert tried > 200


def test_every_bound_is_of_an_argument(written_content: dict[str, Any]) -> None:
    known = {key for path, e in written_content["classes"].items() if path.startswith("descant.") for key in e["keys"]}
    beyond = {"lr", "weight_decay"}  # of optimizers of the user's own, too
    assert {*bounds.OF_NAMES, *bounds.ABOVE_ZERO} - beyond <= known
    assert set(bounds.OF_COMMAND) <= set(written_content["commands"]["fit"])


def test_a_name_in_place_of_an_object_is_refused_by_every_callback() -> None:
    tried = []
    for name, cls in inspect.getmembers(callbacks, inspect.isclass):
        hints = get_type_hints(cls.__init__)
        of = {key: kind for key, hint in hints.items() if (kind := _ours(hint)) is not None}
        needed = [
            key
            for key, p in inspect.signature(cls.__init__).parameters.items()
            if p.default is p.empty and key != "self" and p.kind is p.POSITIONAL_OR_KEYWORD
        ]
        for key, kind in of.items():
            with pytest.raises(
                ValueError, match=rf"^{name}: {key} is 'x', and an object of kind {kind.__name__} is"
            ) as e:
                cls(**{**{k: None if k in of else "x" for k in needed}, key: "x"})
            assert "\n" not in str(e.value)
            tried.append((name, key))
    assert len(tried) >= 12 and ("Harmonize", "rule") in tried


def _ours(hint: Any) -> type | None:
    """The class of ours that an argument is an object of."""
    kinds = [hint, *get_args(hint)]
    return next((k for k in kinds if inspect.isclass(k) and k.__module__.startswith("descant.")), None)


def test_the_nearest_class_is_named() -> None:
    class Owner:
        pass

    require_objects(Owner(), rule=(PCGrad(), Rule), other=(None, Rule))
    for value, told in (("PCGard", "'PCGard'"), (PCGrad, "the class PCGrad"), (["pcgrad"] * 99, "a list")):
        with pytest.raises(
            ValueError, match=rf"^Owner: rule is {told}, .* wanted: descant\.modules\.multitask[.\w]+\(\)$"
        ) as e:
            require_objects(Owner(), rule=(value, Rule))
        assert "PCGrad()" in str(e.value) or isinstance(value, list)


# the package of data modules ------------------------------------------------------------------------------------------


def test_data_modules_are_exported_and_configurations_keep_their_full_paths() -> None:
    from jsonargparse._util import get_import_path

    known = {*names.of_kind("DataModule", "datamodules"), "DataModule"}
    assert known == set(dir(datamodules))
    for name in known:
        found = getattr(datamodules, name)
        assert get_import_path(found) == names.full(name) == f"{found.__module__}.{name}"
    with pytest.raises(AttributeError, match="no attribute 'Emojis'"):
        datamodules.Emojis  # noqa: B018


# what is composed -----------------------------------------------------------------------------------------------------


def test_data_of_another_image_size_warns(tmp_path: Path) -> None:
    (first := tmp_path / "first.yaml").write_text("data: {class_path: Emoji, init_args: {size: 32}}\n")
    (data := tmp_path / "data.yaml").write_text(
        "class_path: UserData\n"
        "init_args: {fields: {class_path: Fields, init_args: {image: {init_args: {size: 224}}}}}\n"
    )
    (line,) = composition_warnings([first], [("data", str(data))])
    assert "data.yaml: images of 224 px, where " in line and "has 32, 49 times as many pixels a sample" in line
    assert line.endswith("--data.fields.image.size 32 keeps them")
    assert composition_warnings([first], [("data", str(data)), ("data.fields.image.size", "224")]) == []
    assert composition_warnings([first], []) == composition_warnings([first, first], []) == []
