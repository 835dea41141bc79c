"""A run judged on other data: all rows, prepared as its own, as the Embedder computes; and what is refused."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import descant
from descant.datamodules import Emoji
from descant.datamodules.fields.fields import Fields, ImageField, LabelField, TextField
from descant.datamodules.prepared import OtherData, prepare_image, require_alike
from descant.datamodules.user.user_data import UserData
from descant.modules.tokenizers.text import NgramTokenizer
from descant.recipes import Contrastive
from tests.conftest import Result
from tests.files import shapes

Cli = Callable[..., Result]
EMOJI = ("--config", "contrastive/emoji", "--config", "on/tiny", "--test", "false")


def folder(path: Path, words: tuple[str, ...] = ("",), **columns: list[str]) -> Path:
    """Twenty pictures of noise and a table, with a split of ``words`` by turns."""
    path.mkdir()
    random = np.random.default_rng(0)
    rows = []
    for n in range(20):
        Image.fromarray(random.integers(0, 256, (20 + n, 30, 3), dtype=np.uint8)).save(path / f"{n:02}.png")
        rows.append({"file": f"{n:02}.png", "caption": f"number {n} of all", "split": words[n % len(words)]})
        rows[-1] |= {name: values[n % len(values)] for name, values in columns.items()}
    with (path / "table.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.fixture
def run(cli: Cli, workplace: Path) -> Path:
    assert cli("fit", *EMOJI, "--name", "a").rc == 0
    return workplace


def metrics(place: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(place.read_text())
    return found


def test_all_rows_are_judged_as_the_embedder_embeds_them(run: Path, cli: Cli) -> None:
    folder(run / "one", ("train", "val", "test"))
    done = cli("test", "--run", "a/001", "--data.path", "one")
    assert done.rc == 0 and "20 rows read; samples: test 20" in done.out
    embedder = descant.Embedder("runs/a/001")
    z_ND = embedder.images(sorted((run / "one").glob("*.png")))
    t_ND = embedder.texts([f"number {n} of all" for n in range(20)])
    right = ((z_ND @ t_ND.T).argmax(1) == torch.arange(20)).double().mean()
    recall = metrics(run / "runs/a/001/test-001/metrics.json")["test/i2t_r1"]
    assert recall == pytest.approx(float(right), abs=1e-6)  # a share of 20 rows
    assert cli("predict", "--run", "a/001", "--data.path", "one").rc == 0
    (table,) = (run / "runs/a/001/predict-001").glob("embeddings-*.parquet")
    rows = pq.read_table(table).to_pylist()
    assert len(rows) == 20
    found_ND = torch.tensor([row["z_image"] for row in rows])
    torch.testing.assert_close(found_ND, z_ND)  # float32, in batches of other sizes


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_a_split_is_judged_alone(run: Path, cli: Cli, command: str) -> None:
    folder(run / "one", ("train", "validation", "test"))
    done = cli(command, "--run", "a/001", "--data.path", "one", "--data.split", "val")
    assert done.rc == 0 and "samples: test 7" in done.out


def test_what_is_not_prepared_as_the_run_was_is_refused(run: Path, cli: Cli) -> None:
    shapes(run / "one")
    line = cli("test", "--run", "a/001", "--data", "folder", "--data.path", "one").refusal
    assert "image: shape [3, 224, 224], and [3, 32, 32] where the run was trained; without --data" in line
    assert "shape [3, 64, 64], and [3, 32, 32]" in cli("test", "--run", "a/001", "--data.size", "64").refusal
    assert cli("test", "--run", "a/001", "--data.eval_batch_size", "16").rc == 0


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("--data.path", "two"), "two: no such"),
        (("--data.path", "one", "--data.split", "val"), "no row of split val"),
        (("--data.path", "http://127.0.0.1/a.tar"), "stream"),
    ],
)
def test_other_data_that_are_not_there(run: Path, cli: Cli, words: tuple[str, ...], line: str) -> None:
    folder(run / "one", ("train", "test"))
    assert line in cli("test", "--run", "a/001", *words).refusal


OWN = """# A classifier of a folder.
model:
  class_path: Fusion
  init_args:
    target: kind
    classes: 3
    width: 8
    towers: {class_path: Towers, init_args: {image: {class_path: ConvTower, init_args: {widths: [8, 8], blocks: 1}}}}
data:
  class_path: UserData
  init_args:
    path: one
    batch_size: 4
    fields:
      class_path: Fields
      init_args:
        image: {class_path: ImageField, init_args: {size: 16}}
        labels: {kind: {class_path: LabelField, init_args: {field: kind}}}
trainer: {max_steps: 2, max_epochs: -1, accelerator: cpu, precision: 32-true, callbacks+: [{class_path: Accuracy}]}
"""


def test_a_classifier_predicts_classes_by_name_with_probabilities(cli: Cli, workplace: Path) -> None:
    """Also of rows without any label; the names are in the run and in its export."""
    (workplace / "own.yaml").write_text(OWN)
    folder(workplace / "one", kind=["cat", "dog", "owl"])
    assert cli("fit", "--config", "own.yaml", "--name", "f").rc == 0
    names = metrics(workplace / "runs/f/001/classes.json")
    assert names == {"kind": ["cat", "dog", "owl"]}
    for path, words in (("predict-001", ()), ("predict-002", ("--data.path", str(folder(workplace / "two"))))):
        assert cli("predict", "--run", "f/001", *words).rc == 0
        (file,) = (workplace / "runs/f/001" / path).glob("embeddings-*.parquet")
        table = pq.read_table(file)
        assert words == () or len(table) == 20
        assert json.loads(table.schema.metadata[b"descant"])["classes"] == names
        for row in table.to_pylist():
            assert sum(row["kind_probability"]) == pytest.approx(1)  # a sum of float32
            assert row["kind_class"] == names["kind"][int(np.argmax(row["kind_probability"]))]
    assert cli("export", "f/001", "--out", "out").rc == 0
    assert metrics(workplace / "out/classes.json") == names
    unlabelled = cli("test", "--run", "f/001", "--data.path", "two")
    assert unlabelled.rc == 2 and "target: no classes of 'kind' in the data" in unlabelled.err
    shutil.rmtree(workplace / "two")
    folder(workplace / "two", kind=["owl", "cat"])
    assert cli("test", "--run", "f/001", "--data.path", "two").rc == 0
    newest = max((workplace / "runs/f/001").glob("test-*"))
    assert 0 <= metrics(newest / "metrics.json")["test/accuracy"] <= 1


def test_lightnings_own_loader_says_what_loads_a_checkpoint(run: Path) -> None:
    (file, *_) = sorted((run / "runs/a/001").glob("*/*.ckpt"))
    with pytest.raises(TypeError, match=r"Contrastive.load_from_checkpoint: .*'towers'.*: descant.load\('.*\.ckpt'\)"):
        Contrastive.load_from_checkpoint(file)
    assert type(descant.load(file)) is Contrastive


# the data module -----------------------------------------------------------------------------------------------------


def test_inputs_are_prepared_by_the_steps_of_the_run(tmp_path: Path) -> None:
    trained = Emoji(tiny=True, size=16, text=NgramTokenizer(buckets=64, length=12))
    data = OtherData(str(folder(tmp_path / "one")), trained)
    data.setup("test")
    (loader,) = data.test_dataloader()
    (batch,) = list(loader)
    batch = data.on_after_batch_transfer(batch, 0)
    assert batch.inputs["image"].shape == (20, 3, 16, 16) and batch.present["image"].all()
    with Image.open(tmp_path / "one/07.png") as image:
        wanted = prepare_image([trained.pixels], image)
    torch.testing.assert_close(batch.inputs["image"][7], wanted[0])  # the same steps, on a batch
    assert batch.inputs["text"][7].tolist() == trained.tokenizer(["number 7 of all"])[0].tolist()
    picture = data.picture(7)
    assert picture is not None and picture.dtype == torch.uint8
    with pytest.raises(ValueError, match="no sample is left for training"):
        data.train_dataloader()


def test_labels_have_the_classes_of_the_run(tmp_path: Path) -> None:
    fields = Fields(ImageField(size=16), labels={"kind": LabelField("kind")})
    trained = UserData(path=str(folder(tmp_path / "one", kind=["cat", "dog", "owl"])), fields=fields, batch_size=4)
    other = folder(tmp_path / "two", kind=["owl", "cat"])
    data = OtherData(str(other), trained)
    assert data.classes == {"kind": ["cat", "dog", "owl"]}
    assert data.target_values["kind"]["test"].tolist() == [2, 0] * 10
    wrong = folder(tmp_path / "three", kind=["owls", "cat"])
    with pytest.raises(ValueError, match=r"kind: 'owls' is no class; nearest: owl"):
        _ = OtherData(str(wrong), trained).target_values


def test_a_picture_that_cannot_be_read_is_listed(tmp_path: Path) -> None:
    place = folder(tmp_path / "one")
    (place / "03.png").write_bytes(b"\x89PNG\r\n\x1a\n no picture")
    data = OtherData(str(place), Emoji(tiny=True, size=16))
    (batch,) = list(data.test_dataloader()[0])
    assert not batch.present["image"][3] and batch.present["image"].sum() == 19


def test_data_of_nothing_that_the_run_knows_is_refused(tmp_path: Path) -> None:
    trained = UserData(path="x", fields=Fields(text=TextField("caption")), batch_size=4)
    (tmp_path / "one").mkdir()
    for n in range(3):
        (tmp_path / "one" / f"{n}.png").write_bytes((folder(tmp_path / f"f{n}") / "00.png").read_bytes())
    with pytest.raises(ValueError, match=r"none of text of the run; it has .* \(image\)"):
        OtherData(str(tmp_path / "one"), trained)


@pytest.mark.parametrize(
    ("size", "mean", "line"),
    [(32, (0.5, 0.5, 0.5), "shape"), (16, (0.4, 0.4, 0.4), "black and white are"), (16, (0.5, 0.5, 0.5), None)],
)
def test_images_are_compared_by_what_the_tower_sees(
    size: int, mean: tuple[float, float, float], line: str | None
) -> None:
    trained = Emoji(tiny=True, size=16)
    given = UserData(path="x", fields=Fields(ImageField(size=size, mean=mean)), batch_size=4)
    if line is None:
        require_alike(given, trained)
    else:
        with pytest.raises(ValueError, match=f"data: image: {line}"):
            require_alike(given, trained)


@pytest.mark.parametrize("word", ["test", "val"])
def test_a_table_of_one_split_is_judged(tmp_path: Path, word: str) -> None:
    data = UserData(path=str(folder(tmp_path / "one", (word,))), fields=Fields(ImageField(size=16)), batch_size=4)
    (evaluated,) = data.evaluation_sets("test" if word == "test" else "validate").values()
    assert len(evaluated) == 20
    with pytest.raises(ValueError, match="no sample is left for training"):
        data.train_dataloader()
