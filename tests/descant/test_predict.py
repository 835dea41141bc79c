"""``descant predict``: embeddings with ids, one parquet file a set."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from descant.cli.errors import Refusal
from descant.datamodules.base import BatchDataset, DataModule, Rows
from descant.datamodules.user.user_data import UserData
from descant.report import predictions
from descant.report.predictions import Predictions
from descant.run.runs import Run
from tests.conftest import Result
from tests.files import shapes
from tests.tolerance import F32, ulps

Cli = Callable[..., Result]
EMOJI = (
    *("--config", "contrastive/emoji", "--config", "on/tiny", "--model.width", "16", "--data.size", "16"),
    *("--data.text", "NgramTokenizer", "--data.text.buckets", "512", "--model.towers.text.vocab", "512"),
    *("--model.towers.image.widths", "[8,16]", "--test", "false"),
)


def read(file: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows and the metadata of the schema."""
    table = pq.read_table(file)
    return table.to_pylist(), json.loads(table.schema.metadata[b"descant"])


# the command --------------------------------------------------------------------------------------------------------


def test_one_file_a_set_with_ids_names_and_nulls(cli: Cli, workplace: Path) -> None:
    assert cli("fit", *EMOJI, "--name", "emoji").rc == 0
    result = cli("predict", "--run", "emoji/001", "--trainer.limit_predict_batches", "null")
    assert result.rc == 0, result.err
    folder = workplace / "runs/emoji/001/predict-001"
    files = sorted(path.name for path in folder.glob("*.parquet*"))
    assert files == [f"embeddings-{name}.parquet" for name in ("apart", "both", "concept", "vendor")]
    assert all(name in result.out for name in files) and not list(folder.glob(".*"))
    rows, about = read(folder / "embeddings-vendor.parquet")
    assert about["run"] == "emoji/001" and about["checkpoint"] == "step-0000002.ckpt" and about["step"] == 2
    assert about["set"] == "vendor" and about["width"] == {"image": 16, "text": 16}
    # every name of the pack is in the gallery, but images of training concepts only
    pictures = [row for row in rows if row["z_image"] is not None]
    assert len({row["index"] for row in rows}) == len(rows) == 133 and len(pictures) == 116
    assert all(row["z_text"] is not None for row in rows)
    assert "articulated lorry" in {row["name"] for row in rows}
    z_ND = torch.tensor([row["z_image"] for row in pictures])
    assert torch.allclose(z_ND.norm(dim=1), torch.ones(len(z_ND)), rtol=0, atol=ulps(16, F32))
    schema = pq.read_schema(folder / "embeddings-vendor.parquet")
    assert [str(kind) for kind in schema.types[:2]] == ["int64", "string"]
    assert str(schema.field("z_image").type) == "list<element: float>"
    # other sets on request, and one line for one that is not there
    assert cli("predict", "--run", "emoji/001", "--sets", "val,train").rc == 0
    more = workplace / "runs/emoji/001/predict-002"
    assert sorted(path.name for path in more.glob("*.parquet")) == [
        "embeddings-train.parquet",
        "embeddings-val.parquet",
    ]
    assert all(row["z_image"] and row["z_text"] for row in read(more / "embeddings-train.parquet")[0])
    assert cli("predict", "--run", "emoji/001", "--sets", "val,vendr").err.endswith(
        "descant: --sets vendr: no such set; nearest: vendor\n"
    )
    assert not (workplace / "runs/emoji/001/predict-003").exists()


def test_data_without_named_sets(toy: Cli, cli: Cli, workplace: Path) -> None:
    assert toy("fit").rc == 0
    assert cli("predict", "--run", "toy/001", "--trust", "tests.toys").rc == 0
    rows, about = read(workplace / "runs/toy/001/predict-001/embeddings-0.parquet")
    assert len(rows) == 32 and len(rows[0]["z_image"]) == 8 and about["step"] == 8
    result = cli("predict", "--run", "toy/001", "--trust", "tests.toys", "--sets", "val")
    assert result.rc == 2 and "--sets: ToyData has no named sets" in result.err
    assert "sets" in toy("fit", "--sets", "val").refusal  # of predict only


@pytest.mark.slow
@pytest.mark.ddp
def test_ranks_write_parts_of_one_table(cli: Cli, workplace: Path) -> None:
    assert cli("fit", *EMOJI, "--name", "emoji").rc == 0
    every = ("predict", "--run", "emoji/001", "--trainer.limit_predict_batches", "null", "--data.eval_batch_size", "7")
    assert cli(*every).rc == 0
    command = [sys.executable, "-m", "descant", *every, "--trainer.devices", "2", "--trainer.strategy", "ddp"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=workplace)
    assert done.returncode == 0, done.stderr
    folders = [workplace / f"runs/emoji/001/predict-00{n}" for n in (1, 2)]
    for name in ("vendor", "both"):
        one, two = (read(folder / f"embeddings-{name}.parquet")[0] for folder in folders)
        assert {path.name for path in (folders[1] / f"embeddings-{name}.parquet").iterdir()} == {
            "part-00000.parquet",
            "part-00001.parquet",
        }
        assert len(one) == len(two) and {row["index"] for row in one} == {row["index"] for row in two}
        by_index = {row["index"]: row for row in two}
        for row in one:
            other = by_index[row["index"]]
            assert row["name"] == other["name"] and (row["z_image"] is None) == (other["z_image"] is None)
            assert np.allclose(row["z_text"], other["z_text"], rtol=0, atol=ulps(64, F32))


# the writer ---------------------------------------------------------------------------------------------------------


class Some(BatchDataset):
    """Nothing but a length."""

    def __init__(self, rows: int) -> None:
        super().__init__(seed=0)
        self.count = rows

    def __len__(self) -> int:
        return self.count

    def rows(self, index_B: np.ndarray, draw_B: np.ndarray) -> Rows:
        n = len(index_B)
        return Rows({"image": torch.zeros(n, 1)}, {}, torch.arange(n))

    def present(self, index_N: np.ndarray) -> dict[str, Tensor]:
        return {"image": torch.ones(len(index_N), dtype=torch.bool)}


class Sets(DataModule):
    """A test set, a validation set and the training samples, of 3, 4 and 5 rows."""

    @property
    def modalities(self) -> tuple[str, ...]:
        return ("image", "text")

    def evaluation_sets(self, stage: str) -> dict[str, BatchDataset]:
        return {"near": Some(3)} if stage == "test" else {"val": Some(4)}

    def bank_set(self) -> BatchDataset:
        return Some(5)

    def describe(self, index: int) -> str:
        return f"sample {index}"


class Callbacks:
    """The hooks of one ``predict``, called as Lightning calls them."""

    def __init__(self, folder: Path, rank: int = 0, world: int = 1, sets: tuple[str, ...] = ()) -> None:
        about = {"world_size": world, "global_rank": rank, "is_global_zero": rank == 0}
        self.trainer: Any = cast(Any, SimpleNamespace(datamodule=Sets(), **about))
        self.module: Any = cast(Any, SimpleNamespace(towers={"image": None, "text": None}))
        self.callback = Predictions(Run(folder, fresh=True), sets)
        self.callback.setup(self.trainer, self.module, "predict")

    def batch(
        self,
        index: list[int],
        z: dict[str, Tensor],
        present: dict[str, list[bool]],
        set_: int = 0,
        targets: dict[str, Tensor] | None = None,
    ) -> None:
        outputs = {
            "index": torch.tensor(index),
            "present": {modality: torch.tensor(mask) for modality, mask in present.items()},
            "z": z,
        }
        self.callback.on_predict_batch_end(
            self.trainer, self.module, outputs, SimpleNamespace(targets=targets or {}), 0, set_
        )

    def end(self) -> None:
        self.callback.on_predict_end(self.trainer, self.module)


def vectors(rows: int, width: int = 2, start: float = 0.0) -> Tensor:
    return start + torch.arange(rows * width, dtype=torch.float64).view(rows, width).bfloat16()


def test_absent_modalities_are_null_and_padding_has_no_row(tmp_path: Path) -> None:
    run = Callbacks(tmp_path)
    z = vectors(3)
    run.batch([7, 8, 7], {"image": z, "text": z}, {"image": [True, False, False], "text": [True, True, False]})
    run.batch([9], {"image": vectors(1)}, {"image": [True]})  # a batch without text
    assert not list(tmp_path.glob("[!.]*"))  # no file that a reader could take for complete
    run.end()
    rows, about = read(tmp_path / "embeddings-near.parquet")
    assert [(row["index"], row["name"]) for row in rows] == [(7, "sample 7"), (8, "sample 8"), (9, "sample 9")]
    assert [row["z_image"] for row in rows] == [[0.0, 1.0], None, [0.0, 1.0]]
    assert [row["z_text"] for row in rows] == [[0.0, 1.0], [2.0, 3.0], None]
    assert about["step"] is None and about["checkpoint"] is None


def test_targets_of_one_number_are_columns(tmp_path: Path) -> None:
    run = Callbacks(tmp_path, sets=("near",))
    targets = {
        "group": torch.tensor([3, 1, 0]),
        "clear": torch.tensor([True, False, True]),
        "valence": torch.tensor([0.5, float("nan"), 0.0], dtype=torch.bfloat16),
        "answer": torch.zeros(3, 4),
        "name": torch.arange(3),  # the column of that name is another
    }
    run.batch([7, 8, 0], {"image": vectors(3)}, {"image": [True, True, False]}, targets=targets)
    run.end()
    rows = pq.read_table(tmp_path / "embeddings-near.parquet")
    assert (
        rows["group"].to_pylist() == [3, 1]
        and rows["clear"].to_pylist() == [1, 0]
        and "answer" not in rows.schema.names
    )
    assert rows["valence"].to_pylist()[0] == 0.5 and rows["name"].to_pylist() == ["sample 7", "sample 8"]


def test_a_set_may_begin_without_a_modality(tmp_path: Path) -> None:
    run = Callbacks(tmp_path)
    run.batch([1], {"image": vectors(1)}, {"image": [True]})
    run.batch([2], {"image": vectors(1), "text": vectors(1)}, {"image": [True], "text": [True]})
    run.end()
    assert [row["z_text"] for row in read(tmp_path / "embeddings-near.parquet")[0]] == [None, [0.0, 1.0]]


def test_rows_of_user_data_have_the_path_of_their_file(tmp_path: Path) -> None:
    """Two images with one caption have the same name, and only their paths differ."""
    folder = shapes(tmp_path / "d", 5)
    odd = os.fsdecode(b"\xff.jpg")  # not valid UTF-8, which parquet needs
    (folder / "004.jpg").rename(folder / odd)
    names = ["000.jpg", "001.jpg", "002.jpg", "003.jpg", odd]
    (folder / "captions.csv").unlink()
    for name, caption in zip(names, ("twice", "twice", "c 2", "c 3", "c 4"), strict=True):
        (folder / name).with_suffix(".txt").write_text(caption)
    run = Callbacks(tmp_path)
    run.trainer.datamodule = UserData(path=str(folder), holdout=0.5)
    run.callback.names = ["val"]
    run.batch(list(range(5)), {"image": vectors(5)}, {"image": [True] * 5})
    run.end()
    found, _ = read(tmp_path / "embeddings-val.parquet")
    assert {row["sample"]: row["name"] for row in found} == {
        "000.jpg": "twice",
        "001.jpg": "twice",
        "002.jpg": "c 2",
        "003.jpg": "c 3",
        "\\xff.jpg": "c 4",
    }


def test_memory_is_bounded_by_the_row_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predictions, "GROUP", 4)
    run = Callbacks(tmp_path)
    for first in range(0, 12, 2):
        run.batch([first, first + 1], {"image": vectors(2)}, {"image": [True, True]})
        assert run.callback._table is not None and sum(len(b) for b in run.callback._table.batches) < 4
    run.end()
    file = pq.ParquetFile(tmp_path / "embeddings-near.parquet")
    assert file.metadata.num_row_groups == 3 and file.metadata.num_rows == 12


def test_sets_by_name(tmp_path: Path) -> None:
    run = Callbacks(tmp_path, sets=("train", "near", "val"))
    assert [len(loader.dataset) for loader in run.trainer.datamodule.predict_dataloader()] == [5, 3, 4]
    for number in range(3):
        run.batch([number], {"image": vectors(1)}, {"image": [True]}, number)
    run.end()
    assert {path.name for path in tmp_path.iterdir()} == {f"embeddings-{n}.parquet" for n in ("train", "near", "val")}
    assert len(Callbacks(tmp_path).trainer.datamodule.predict_dataloader()) == 1
    with pytest.raises(Refusal, match="--sets vla: no such set; nearest: val"):
        Callbacks(tmp_path, sets=("vla",))


def test_two_ranks_make_one_table(tmp_path: Path) -> None:
    runs = [Callbacks(tmp_path, rank, 2) for rank in (0, 1)]
    for rank, run in enumerate(runs):
        run.batch([rank, rank + 2], {"image": vectors(2, start=rank)}, {"image": [True, rank == 0]})
        run.end()
    rows, _ = read(tmp_path / "embeddings-near.parquet")
    assert [row["index"] for row in rows] == [0, 2, 1]


def test_an_interrupted_run_leaves_no_file(tmp_path: Path) -> None:
    run = Callbacks(tmp_path, sets=("near", "val"))
    run.batch([1], {"image": vectors(1)}, {"image": [True]})
    run.batch([1], {"image": vectors(1)}, {"image": [True]}, 1)
    run.callback.on_exception(run.trainer, run.module, KeyboardInterrupt())
    assert not list(tmp_path.iterdir())


def test_a_model_without_embeddings_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="gives no embeddings"):
        Callbacks(tmp_path).batch([1], {}, {"image": [True]})
    run = Callbacks(tmp_path)
    run.batch([1], {"image": vectors(1)}, {"image": [True]})
    with pytest.raises(ValueError, match="embeddings of width 3 after embeddings of width 2"):
        run.batch([1], {"image": vectors(1, 3)}, {"image": [True]})
