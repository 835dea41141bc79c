from __future__ import annotations

import multiprocessing
import pickle
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from descant.datamodules.fields.fields import kinds
from descant.datamodules.sources import find
from descant.datamodules.sources.arrays import array_of
from descant.datamodules.sources.parquet import Parquet
from tests.files import jpeg


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DESCANT_CACHE", str(tmp_path / "cache"))


def images(n: int) -> list[dict[str, Any] | None]:
    """As data hubs write them; every fifth has none."""
    return [None if i % 5 == 4 else {"bytes": jpeg("red", (8 + i, 8)), "path": f"{i}.jpg"} for i in range(n)]


def write(path: Path, n: int = 12, rows: int = 5) -> Path:
    columns = {
        "image": pa.array(images(n), pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        "raw": pa.array([b"abc%d" % i for i in range(n)]),
        "caption": pa.array([" " if i == 2 else None if i == 3 else f"caption {i}" for i in range(n)]),
        "captions": pa.array([[f"{i}-{k}" for k in range(i % 3)] for i in range(n)]),
        "label": pa.array(list(range(n)), pa.int32()),
        "group": pa.array(["ab"[i % 2] for i in range(n)]).dictionary_encode(),
        "info": pa.array([{"author": f"by {i}", "deep": {"w": i}} for i in range(n)]),
        "boxes": pa.array([[[1.0, 2.0]]] * n),
    }
    pq.write_table(pa.table(columns), path, row_group_size=rows)
    return path


def test_fields_by_the_type_of_the_column(tmp_path: Path) -> None:
    source = Parquet(write(tmp_path / "a.parquet"))
    assert source.fields == (
        *("image", "raw", "caption", "captions.0", "captions.1", "label"),
        *("group", "info.author", "info.deep.w", "boxes"),
    )
    assert source.has("image").tolist() == [i % 5 != 4 for i in range(12)]
    assert source.has("caption").tolist() == [i not in (2, 3) for i in range(12)]
    assert source.has("captions.1").tolist() == [i % 3 == 2 for i in range(12)]
    assert source.has("raw").all()
    assert array_of(source.read(7, ["boxes"])["boxes"]).tolist() == [[1.0, 2.0]]  # type: ignore[arg-type]
    read = source.read(7, source.fields[:-1])
    assert read == {
        "image": jpeg("red", (15, 8)),
        "raw": b"abc7",
        "caption": "caption 7",
        "captions.0": "7-0",
        "label": "7",
        "group": "b",
        "info.author": "by 7",
        "info.deep.w": "7",
    }
    assert source.texts("caption")[1:5] == ["caption 1", None, None, "caption 4"]
    assert source.texts("captions.1")[:3] == [None, None, "2-1"]
    with pytest.raises(ValueError, match=r"a\.parquet: no column 'captoin'; nearest: caption"):
        source.has("captoin")
    with pytest.raises(ValueError, match="'raw' holds bytes"):
        source.texts("raw")


def test_any_order_over_files_and_row_groups_reads_the_same(tmp_path: Path) -> None:
    write(tmp_path / "d-0.parquet", 12, 5)
    write(tmp_path / "d-1.parquet", 3, 2)
    source = Parquet(str(tmp_path / "d-{0..1}.parquet"), memory=1000)  # far less than a row group: all are read anew
    blocks = source.blocks
    assert blocks is not None and blocks[0].tolist() == [0] * 5 + [1] * 5 + [2] * 2 + [3] * 2 + [4] and blocks[1] == 1
    assert len(source) == 15 and Parquet(tmp_path / "d-0.parquet").blocks is None
    for i in np.random.default_rng(0).permutation(15).tolist():
        row = i if i < 12 else i - 12
        found = source.read(i, ["raw", "image"])
        assert found["raw"] == b"abc%d" % row and found.get("image") == (images(12)[row] or {}).get("bytes")
        assert source.name(i) == f"d-{int(i >= 12)}/{row}" and source.place(i).endswith(f"d-{int(i >= 12)}.parquet")
    assert len(source._kept) == 1


def test_presence_is_read_from_the_footer_where_it_can_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Parquet(write(tmp_path / "a.parquet"))
    monkeypatch.setattr(Parquet, "_values", lambda *_, **__: pytest.fail("the column was read"))
    assert source.has("raw").all()
    monkeypatch.undo()
    with mock.patch.object(Parquet, "_values", autospec=True, side_effect=Parquet._values) as spy:
        source.has("image")
    assert [call.args[1] for call in spy.call_args_list] == [0, 1], "the last row group has no null"


def test_the_latest_row_groups_are_cached(tmp_path: Path) -> None:
    source, real = Parquet(write(tmp_path / "a.parquet")), pq.ParquetFile.read_row_group
    with mock.patch.object(pq.ParquetFile, "read_row_group", autospec=True, side_effect=real) as spy:
        for _ in range(3):
            for i in range(12):
                source.read(i, ["raw"])
    assert spy.call_count == 3


def test_images_by_path_alone(tmp_path: Path) -> None:
    (tmp_path / "0.jpg").write_bytes(jpeg())
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    rows = [{"bytes": None, "path": "0.jpg"}, {"bytes": None, "path": None}, {"bytes": b"", "path": None}]
    pq.write_table(pa.table({"image": pa.array(rows, kind)}), tmp_path / "a.parquet")
    source = Parquet(tmp_path / "a.parquet")
    assert source.has("image").tolist() == [True, False, True], "an empty image is there, and cannot be read"
    assert source.read(0, ["image"]) == {"image": jpeg()} and source.read(1, ["image"]) == {}


def _all(source: Parquet) -> list[object]:
    return [source.read(i, ["raw", "image"]) for i in range(len(source))]


def test_forked_and_pickled_sources_read_the_same(tmp_path: Path) -> None:
    source = Parquet(write(tmp_path / "a.parquet"))
    expected = _all(source)
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("fork")) as pool:
        assert list(pool.map(_all, [source] * 4)) == [expected] * 4
    assert _all(pickle.loads(pickle.dumps(source))) == expected


def test_what_is_wrong_is_one_line(tmp_path: Path) -> None:
    whole = write(tmp_path / "a.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(whole[:-50])
    pq.write_table(pa.table({"other": [1]}), tmp_path / "b.parquet")
    pq.write_table(pa.table({"x": pa.array([], pa.string())}), tmp_path / "none.parquet")
    for paths, line in [
        ([tmp_path / "cut.parquet"], r"cut\.parquet: not a readable parquet file"),
        ([tmp_path / "a.parquet", tmp_path / "b.parquet"], r"b\.parquet: column '\w+' is not in all files"),
        ([tmp_path / "none.parquet"], "no rows"),
        ([tmp_path / "aa.parquet"], "no such file; nearest: a.parquet"),
    ]:
        with pytest.raises(ValueError, match=line) as caught:
            Parquet(paths)
        assert "\n" not in str(caught.value)


def test_splits_by_the_names_of_files(tmp_path: Path) -> None:
    for name in ("train-00000-of-00002", "train-00001-of-00002", "validation-00000-of-00001", "test"):
        write(tmp_path / f"{name}.parquet", 4)
    found = find(tmp_path)
    assert {split: len(source) for split, source in found.items()} == {"train": 8, "val": 4, "test": 4}
    write(tmp_path / "more.parquet", 4)
    with pytest.raises(ValueError, match=r"more\.parquet: its name begins with no split, and that of"):
        find(tmp_path)
    assert list(find(str(tmp_path / "train-*.parquet"))) == [""]


def test_dictionary_encoded_images(tmp_path: Path) -> None:
    images = pa.array([jpeg("red"), jpeg("blue"), jpeg("red")]).dictionary_encode()
    pq.write_table(pa.table({"image": images, "caption": ["a", "b", "c"]}), tmp_path / "x.parquet")
    assert kinds(Parquet([tmp_path / "x.parquet"])) == {"image": "image", "caption": "text"}
