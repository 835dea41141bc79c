from __future__ import annotations

import json
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset, DatasetDict, Features
from pyarrow import ipc

from descant.datamodules.fields.fields import Fields, ImageField, TextField, kinds
from descant.datamodules.sources import find
from descant.datamodules.sources.arrays import array_bytes, array_of
from descant.datamodules.sources.arrow import Arrow
from descant.datamodules.user.user_data import UserData
from tests.files import jpeg, wav

FEATURES = Features(
    {
        "image": datasets.Image(),
        "sound": datasets.Audio(),
        "caption": datasets.Value("string"),
        "label": datasets.ClassLabel(names=["cat", "dog"]),
        "captions": datasets.List(datasets.Value("string")),
        "vector": datasets.List(datasets.Value("float32")),
        "box": datasets.Array2D((2, 2), "int32"),
        "info": {"author": datasets.Value("string"), "thumb": datasets.Image()},
        "parts": datasets.List({"id": datasets.Value("int64"), "kind": datasets.ClassLabel(names=["x", "y"])}),
        "doc": datasets.Pdf(),
    }
)
BROKEN = r"[^\n]*"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DESCANT_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()


def row(i: int) -> dict[str, Any]:
    """Every fifth has no image, every third caption is blank, every seventh is of no class."""
    return {
        "image": None if i % 5 == 4 else {"bytes": jpeg("red", (8 + i, 8)), "path": None},
        "sound": {"bytes": wav(0.01), "path": None},
        "caption": " " if i % 3 == 2 else f"caption {i}",
        "label": -1 if i % 7 == 6 else i % 2,
        "captions": [f"{i}-{k}" for k in range(i % 3)],
        "vector": [float(i), 0.5],
        "box": [[i, 1], [2, 3]],
        "info": {"author": f"by {i}", "thumb": {"bytes": jpeg("blue", (8, 8 + i)), "path": None}},
        "parts": [{"id": i, "kind": 1}] * (i % 2),
        "doc": None,
    }


def dataset(n: int = 20) -> Dataset:
    stored = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    plain = Features({**FEATURES, "sound": stored})  # to encode recordings, the package asks for another one
    return Dataset.from_list([row(i) for i in range(n)], features=plain).cast_column("sound", FEATURES["sound"])


def save(folder: Path, n: int = 20, shards: int = 2) -> Path:
    dataset(n).save_to_disk(str(folder), num_shards=shards)
    return folder


def edited(folder: Path, name: str = "state.json", **values: object) -> Path:
    file = folder / name
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))
    return folder


def small(folder: Path, rows: int = 12) -> Path:
    """Captions and numbers in batches of 4."""
    folder.mkdir()
    table = pa.table({"caption": [f"c {i}" for i in range(rows)], "n": list(range(rows))})
    with ipc.new_stream(str(folder / "a.arrow"), table.schema) as out:
        out.write_table(table, max_chunksize=4)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "a.arrow"}]}))
    (folder / "dataset_info.json").write_text("{}")
    return folder


# what is read ----------------------------------------------------------------------------------------------------


def test_fields_and_values_are_those_of_datasets(tmp_path: Path) -> None:
    source = find(save(tmp_path / "a"))[""]
    names = ("caption", "label", "captions.0", "captions.1", "vector", "box", "info.author", "info.thumb")
    assert source.fields == ("image", "sound", *names, "parts.0.id", "parts.0.kind")
    assert source.unread == {"doc": "a feature Pdf"}
    known = kinds(source)
    assert known["image"] == known["info.thumb"] == "image" and known["sound"] == "audio"
    assert known["vector"] == known["box"] == "array" and known["label"] == known["caption"] == "text"
    stored = datasets.load_from_disk(str(tmp_path / "a")).with_format("arrow")
    for i in np.random.default_rng(0).permutation(20).tolist():
        raw, theirs = source.read(i, source.fields), stored[i].to_pylist()[0]
        image = theirs["image"]
        assert raw.get("image") == (None if image is None else image["bytes"])
        assert raw["info.thumb"] == theirs["info"]["thumb"]["bytes"] and raw["sound"] == theirs["sound"]["bytes"]
        assert raw.get("caption") == (theirs["caption"].strip() or None)
        assert raw.get("label") == (None if theirs["label"] < 0 else ["cat", "dog"][theirs["label"]])
        assert [raw[f"captions.{k}"] for k in range(i % 3)] == theirs["captions"]
        assert raw["vector"] == array_bytes(theirs["vector"]) and raw["info.author"] == f"by {i}"
        assert array_of(raw["box"]).tolist() == theirs["box"]  # type: ignore[arg-type]
        assert raw.get("parts.0.kind") == ("y" if i % 2 else None)
    for field in source.fields:
        assert source.has(field).tolist() == [field in source.read(i, [field]) for i in range(20)], field
    assert source.texts("label")[:7] == ["cat", "dog", "cat", "dog", "cat", "dog", None]
    assert source.texts("captions.1") == [f"{i}-1" if i % 3 == 2 else None for i in range(20)]
    assert source.values("label").to_pylist() == source.texts("label")
    assert source.name(3) == "row/3" and source.place(19).endswith("data-00001-of-00002.arrow")
    twin = pickle.loads(pickle.dumps(source))
    assert twin.read(7, source.fields) == source.read(7, source.fields)


def test_the_package_is_not_needed_for_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = find(save(tmp_path / "a"))[""].read(3, ["box", "label", "image"])
    name = datasets.Array2D((2, 2), "int32")().extension_name
    pa.unregister_extension_type(name)
    try:
        monkeypatch.setitem(sys.modules, "datasets", None)
        assert find(tmp_path / "a")[""].read(3, ["box", "label", "image"]) == expected
    finally:
        pa.register_extension_type(datasets.features.features.Array2DExtensionType((1, 2), "int64"))


def test_splits_of_a_saved_dict(tmp_path: Path) -> None:
    parts = {"train": dataset(9), "validation": dataset(4), "unsupervised": dataset(2)}
    DatasetDict(parts).save_to_disk(str(tmp_path / "a"))
    found = find(tmp_path / "a")
    assert {split: len(source) for split, source in found.items()} == {"train": 9, "val": 4}
    assert found["val"].name(2) == "validation/2" and len(find(tmp_path / "a/unsupervised")[""]) == 2
    fields = Fields(image=ImageField(field="image", size=8), text=TextField("caption"))
    data = UserData(path=str(tmp_path / "a"), batch_size=4, num_workers=0, fields=fields)
    assert {name: len(row_N) for name, (_, row_N) in data.splits.items()} == {"train": 9, "val": 4}


def test_files_by_their_names_and_both_forms_of_arrow(tmp_path: Path) -> None:
    table = pa.table({"text": [f"t {i}" for i in range(6)]})
    for name in ("shapes-train-00000-of-00002", "shapes-train-00001-of-00002", "shapes-test", "cache-0f3a"):
        with ipc.new_stream(str(tmp_path / f"{name}.arrow"), table.schema) as out:
            out.write_table(table)
    found = find(tmp_path)
    assert {split: len(source) for split, source in found.items()} == {"train": 12, "test": 6}
    assert found["train"].name(7) == "shapes-train-00001-of-00002/1"
    with ipc.new_file(str(tmp_path / "b.arrow"), table.schema) as out:
        out.write_table(table)
    assert find(tmp_path / "b.arrow")[""].texts("text") == table["text"].to_pylist()


def test_names_of_columns_that_are_no_text(tmp_path: Path) -> None:
    table = pa.table({"caption": ["a"], "of": [{"inside": 1}]})
    for name in (b"caption", b"inside"):
        file = tmp_path / "a.arrow"
        with ipc.new_stream(str(file), table.schema) as out:
            out.write_table(table)
        content = file.read_bytes()
        assert name in content
        file.write_bytes(content.replace(name, b"\xe8" * len(name)))
        with pytest.raises(ValueError, match=r"a\.arrow: not a readable stream of Arrow \('utf-8' codec"):
            find(file)


def test_an_order_that_early_releases_saved(tmp_path: Path) -> None:
    folder, order = small(tmp_path / "a"), [7, 3, 3, 11, 0]
    table = pa.table({"indices": pa.array(order, pa.uint64())})
    with ipc.new_stream(str(folder / "indices.arrow"), table.schema) as out:
        out.write_table(table)
    source = find(edited(folder, _indices_data_files=[{"filename": "indices.arrow"}]))[""]
    assert [source.read(i, ["n"])["n"] for i in range(len(source))] == [str(n) for n in order]
    assert source.texts("caption") == [f"c {n}" for n in order] and source.values("n").to_pylist() == order
    (folder / "indices.arrow").unlink()
    with pytest.raises(ValueError, match=r"state\.json: indices\.arrow is listed, and not there; nearest: a\.arrow"):
        find(folder)
    for wrong, line in (([12], "row 12 of 12"), ([-1], "row -1 of 12"), ([], "no rows")):
        with ipc.new_stream(str(folder / "indices.arrow"), pa.schema([("indices", pa.int64())])) as out:
            out.write_table(pa.table({"indices": pa.array(wrong, pa.int64())}))
        with pytest.raises(ValueError, match=rf"indices\.arrow: {line}$"):
            find(folder)


def test_a_change_is_named(tmp_path: Path) -> None:
    source = find(small(tmp_path / "a"))[""]
    source.has("caption")
    corpus = source.corpus()
    assert corpus is not None
    before = corpus.state()
    assert corpus.changes(before) == []
    again = find(small(tmp_path / "b", 11))[""]
    again.has("caption")
    first, *_ = again.corpus().changes(before)  # type: ignore[union-attr]
    assert first == "other batches: a.arrow (batch 2)"


# what is refused -------------------------------------------------------------------------------------------------


def listing(*names: str) -> list[dict[str, str]]:
    return [{"filename": name} for name in names]


WRONG: dict[str, tuple[Callable[[Path], object], str]] = {
    "parent": (lambda f: edited(f, _data_files=listing("../b.arrow")), r"'\.\./b\.arrow' is no file of this folder"),
    "absolute": (lambda f: edited(f, _data_files=listing("/etc/passwd")), "'/etc/passwd' is no file of this folder"),
    "order": (lambda f: edited(f, _indices_data_files=listing("../i.arrow")), r"'\.\./i\.arrow' is no file of this"),
    "gone": (lambda f: edited(f, _data_files=listing("b.arrow")), r"b\.arrow is listed, and not there; nearest: a\.a"),
    "twice": (lambda f: edited(f, _data_files=listing("a.arrow", "a.arrow")), r"a\.arrow is listed twice"),
    "none": (lambda f: edited(f, _data_files=[]), "_data_files: none listed"),
    "form": (lambda f: edited(f, _data_files={"a": 1}), "_data_files: a list of objects with filename is wanted"),
    "names": (lambda f: edited(f, _data_files=[["a.arrow"]]), "_data_files: a list of objects with filename"),
    "json": (lambda f: (f / "state.json").write_text("{"), r"state\.json: not JSON"),
    "list": (lambda f: (f / "dataset_info.json").write_text("[]"), "expected an object, got list"),
    "deep": (lambda f: (f / "dataset_info.json").write_text("[" * 9999), "not JSON"),
    "text": (lambda f: (f / "a.arrow").write_text("no arrow"), r"a\.arrow: not a readable stream of Arrow"),
    "empty": (lambda f: (f / "a.arrow").write_bytes(b""), r"a\.arrow: not a readable stream of Arrow"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_folder_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    make, line = WRONG[name]
    make(small(tmp_path / "a"))
    with pytest.raises(ValueError, match=rf"^{tmp_path}/a/{BROKEN}{line}") as caught:
        find(tmp_path / "a")
    assert "\n" not in str(caught.value)


def test_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    folder = small(tmp_path / "a")
    shutil.move(folder / "a.arrow", tmp_path / "b.arrow")
    (folder / "a.arrow").symlink_to(tmp_path / "b.arrow")
    with pytest.raises(ValueError, match=r"'a\.arrow' is no file of this folder"):
        find(folder)


def test_wrong_splits_and_columns_name_the_nearest(tmp_path: Path) -> None:
    DatasetDict({"train": dataset(3), "test": dataset(2)}).save_to_disk(str(tmp_path / "a"))
    source = find(tmp_path / "a")["train"]
    with pytest.raises(ValueError, match=r"column 'doc' is a feature Pdf, which nothing reads; there are image"):
        source.has("doc")
    with pytest.raises(ValueError, match=r"no column 'captoin'; nearest: caption"):
        source.has("captoin")
    with pytest.raises(ValueError, match=r"/a/tran: no such file or folder; nearest: train"):
        find(tmp_path / "a/tran")
    for splits, line in [
        (["train", "tests"], r"the split 'tests' is listed, and not there; nearest: test"),
        (["train", "../b"], r"'\.\./b' is no file of this folder"),
        ([], "splits: a list of names is wanted"),
        ([{}], "splits: a list of names is wanted"),
    ]:
        edited(tmp_path / "a", "dataset_dict.json", splits=splits)
        with pytest.raises(ValueError, match=line):
            find(tmp_path / "a")
    DatasetDict({"tiny": dataset(2), "large": dataset(2)}).save_to_disk(str(tmp_path / "b"))
    with pytest.raises(ValueError, match=r"none of its splits \(tiny, large\) is train, val or test: name one, .*tiny"):
        find(tmp_path / "b")
    DatasetDict({"dev": dataset(2), "validation": dataset(2)}).save_to_disk(str(tmp_path / "c"))
    with pytest.raises(ValueError, match="'dev' and 'validation' are both val: name one by its folder"):
        find(tmp_path / "c")
    Dataset.from_dict({"doc": [None]}, features=Features({"doc": datasets.Pdf()})).save_to_disk(str(tmp_path / "d"))
    with pytest.raises(ValueError, match=r"no column that anything reads \(doc is a feature Pdf\)"):
        find(tmp_path / "d")
    (tmp_path / "e").mkdir()
    (tmp_path / "e/dataset_info.json").write_text("{}")
    with pytest.raises(ValueError, match=r"/e: no image, recording or video here .* nor a saved dataset \(state\.json"):
        find(tmp_path / "e")


def test_a_path_of_an_image_stays_inside(tmp_path: Path) -> None:
    folder = small(tmp_path / "a")
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({"image": pa.array([{"bytes": None, "path": p} for p in ("a.jpg", "../b.jpg", "/b.jpg")], kind)})
    with ipc.new_stream(str(folder / "a.arrow"), table.schema) as out:
        out.write_table(table)
    (folder / "a.jpg").write_bytes(jpeg())
    (tmp_path / "b.jpg").write_bytes(jpeg())
    source = Arrow(folder)
    assert source.read(0, ["image"]) == {"image": jpeg()}
    for index in (1, 2):
        with pytest.raises(ValueError, match="is outside the data's own folder"):
            source.read(index, ["image"])
    assert Arrow(folder, outside=True).read(1, ["image"]) == {"image": jpeg()}


# damage ----------------------------------------------------------------------------------------------------------


def test_a_file_that_is_cut_off_is_refused_or_read_up_to_there(tmp_path: Path) -> None:
    file = small(tmp_path / "a") / "a.arrow"
    whole = file.read_bytes()
    for size, rows in ((len(whole) - 8, 12), (len(whole) - 60, 8), (len(whole) // 2, None)):
        file.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=rf"^{file}: .*; damaged: skip reads the rest$"):
            find(tmp_path / "a")
        source = find(tmp_path / "a", "skip")[""]
        assert len(source.faults) == 1 and source.faults[0].file == str(file)
        assert rows is None or source.texts("n") == [str(n) for n in range(rows)]


def test_offsets_outside_the_file_are_found_before_they_are_followed(tmp_path: Path) -> None:
    file = small(tmp_path / "a") / "a.arrow"
    data = bytearray(file.read_bytes())
    at = data.index(np.array([0, 3, 6, 9, 12], np.int32).tobytes())  # of the captions of the first batch
    data[at + 8 : at + 12] = (1 << 30).to_bytes(4, "little")
    file.write_bytes(bytes(data))
    source = find(tmp_path / "a")[""]
    with pytest.raises(ValueError, match=r"a\.arrow \(batch 0\): column 'caption': .*; damaged: skip reads the rest"):
        source.has("caption")
    with pytest.raises(ValueError, match=r"a\.arrow \(batch 0\), column 'caption': "):
        source.read(1, ["caption"])
    assert source.read(1, ["n"]) == {"n": "1"} and source.read(5, ["caption"]) == {"caption": "c 5"}
    rest = find(tmp_path / "a", "skip")[""]
    assert rest.has("caption").tolist() == [False] * 4 + [True] * 8 and len(rest.faults) == 1
    assert rest.texts("caption")[3:5] == [None, "c 4"]


@pytest.mark.parametrize("codec", ["lz4", "zstd"])
def test_compressed_batches_are_not_unpacked(tmp_path: Path, codec: str) -> None:
    table = pa.table({"caption": ["a" * 100_000] * 50})
    with ipc.new_stream(str(tmp_path / "a.arrow"), table.schema, options=ipc.IpcWriteOptions(compression=codec)) as out:
        out.write_table(table)
    with pytest.raises(ValueError, match=r"a\.arrow: .*its batches are compressed"):
        find(tmp_path / "a.arrow")


def test_rows_that_take_no_memory_are_refused(tmp_path: Path) -> None:
    schema = pa.schema([("a", pa.null())])
    with ipc.new_stream(str(tmp_path / "a.arrow"), schema) as out:
        out.write_batch(pa.record_batch([pa.Array.from_buffers(pa.null(), 1 << 30, [None])], schema=schema))
    with pytest.raises(ValueError, match=r"1,073,741,824 rows in \d+ bytes"):
        find(tmp_path / "a.arrow")


def test_files_of_other_columns_are_refused(tmp_path: Path) -> None:
    for name, column, values in (("a", "x", ["a"]), ("b", "y", ["a"]), ("c", "x", [1])):
        table = pa.table({column: values})
        with ipc.new_stream(str(tmp_path / f"{name}.arrow"), table.schema) as out:
            out.write_table(table)
    with pytest.raises(ValueError, match=r"b\.arrow: column 'x' is not in all files; .*a\.arrow has another schema"):
        find([tmp_path / "a.arrow", tmp_path / "b.arrow"])
    with pytest.raises(ValueError, match=r"c\.arrow: column 'x' is of type int64, and in .*a\.arrow it is string"):
        find([tmp_path / "a.arrow", tmp_path / "c.arrow"])
