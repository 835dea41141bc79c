from __future__ import annotations

import gzip
import io
import json
import multiprocessing
import os
import pickle
import random
import tarfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from descant.datamodules.sources import shards
from descant.datamodules.sources.shards import Shards
from tests.files import jpeg, wav, write_tar


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DESCANT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def samples(n: int, first: int = 0) -> Iterator[tuple[str, bytes]]:
    for i in range(first, first + n):
        yield f"{i:04}.jpg", jpeg("red", (8 + i % 3, 8))
        yield f"{i:04}.txt", f"caption {i}".encode()
        yield f"{i:04}.json", json.dumps({"caption": f"json {i}", "size": {"w": i}, "empty": ""}).encode()


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_member_is_what_tarfile_reads(tmp_path: Path, format: int) -> None:
    rng = random.Random(0)
    long = "folder/" * (12 if format == tarfile.USTAR_FORMAT else 40) + "x.jpg"
    odd = [(long, rng.randbytes(1)), ("a/b.c/zoë.seg.PNG", rng.randbytes(512)), ("./d.bin", rng.randbytes(70_000))]
    path = write_tar(tmp_path / "a.tar", [*samples(20), *odd], format)
    with tarfile.open(path) as tar:
        expected = {m.name: tar.extractfile(m).read() for m in tar if m.isreg()}  # type: ignore[union-attr]
    source, found = Shards(path), {}
    for i in range(len(source)):
        for field in ("jpg", "seg.png", "bin"):
            if source.has(field)[i]:
                found[source.name(i).removeprefix("a/"), field] = source.read(i, [field])[field]
    split = {shards.split_name(name): data for name, data in expected.items() if not name.endswith(("txt", "json"))}
    assert found == split and len(found) == 23
    assert source.texts("txt")[:2] == ["caption 0", "caption 1"]
    assert source.texts("json.caption")[3] == "json 3" and source.texts("json.size.w")[7] == "7"
    assert source.fields == ("jpg", "txt", "json", "seg.png", "bin", "json.caption", "json.size.w")


def test_order_of_reading_does_not_matter_and_spread_members_meet(tmp_path: Path) -> None:
    members = list(samples(12))
    random.Random(1).shuffle(members)  # as a tar that was not sorted by name
    source = Shards(write_tar(tmp_path / "a.tar", members))
    assert len(source) == 12
    rows = list(range(12))
    random.Random(2).shuffle(rows)
    for i in rows:
        number = int(source.name(i).rpartition("/")[2])
        assert source.read(i, ["txt", "json.caption", "jpg"]) == {
            "txt": f"caption {number}",
            "json.caption": f"json {number}",
            "jpg": jpeg("red", (8 + number % 3, 8)),
        }


def test_a_member_of_a_foreign_size_field(tmp_path: Path) -> None:
    """GNU tar writes sizes of 8 GiB and more in base 256: the same, for a small one, by hand."""
    data = bytearray(write_tar(tmp_path / "a.tar", {"0.txt": b"hello", "1.txt": b"you"}).read_bytes())
    data[124:136] = b"\x80" + (5).to_bytes(11, "big")
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:512])
    (tmp_path / "a.tar").write_bytes(data)
    assert Shards(tmp_path / "a.tar").texts("txt") == ["hello", "you"]


def test_links_folders_and_meta_are_no_samples(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for kind, name in ((tarfile.DIRTYPE, "a.dir"), (tarfile.SYMTYPE, "0.jpg"), (tarfile.FIFOTYPE, "pipe.jpg")):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        for name in ("__meta__.json", "README", ".hidden", "0.txt"):
            info = tarfile.TarInfo(name)
            info.size = 2
            tar.addfile(info, io.BytesIO(b"ab"))
    source = Shards(tmp_path / "a.tar")
    assert [source.name(i) for i in range(len(source))] == ["a/0"]
    assert source.fields == ("txt",)


def test_missing_members_are_known_before_reading(tmp_path: Path) -> None:
    members = []
    for i in range(10):
        members.append((f"{i}.jpg", jpeg()))
        if i % 2:
            members.append((f"{i}.txt", b"x" if i > 2 else b" \n"))
        members.append((f"{i}.json", b'{"title": "t"}' if i < 5 else b'{"title": " "}' if i < 8 else b"{broken"))
    source = Shards(write_tar(tmp_path / "a.tar", members))
    assert source.has("txt").tolist() == [i % 2 == 1 and i > 2 for i in range(10)], "a blank text is none"
    assert source.has("json.title").tolist() == [i < 5 for i in range(10)]
    assert source.has("jpg").all()
    with pytest.raises(ValueError, match=r"a\.tar: no field 'json\.titel'; nearest: json\.title"):
        source.has("json.titel")


def test_uneven_shards_with_other_fields_are_one_source(tmp_path: Path) -> None:
    write_tar(tmp_path / "d-000.tar", list(samples(7)))
    write_tar(tmp_path / "d-001.tar", {})
    write_tar(tmp_path / "d-002.tar", {"0000.wav": wav(), "0000.png": jpeg(format="PNG")})
    source = Shards(str(tmp_path / "d-{000..002}.tar"))
    assert len(source) == 8 and source.has("wav").tolist() == [False] * 7 + [True]
    assert source.name(7) == "d-002/0000" and source.place(7).endswith("d-002.tar")
    assert source.read(7, ["wav", "jpg", "png"]).keys() == {"wav", "png"}
    assert len(Shards(str(tmp_path / "d-*.tar"))) == 8
    names = [source.name(i) for i in range(8)]
    assert len(set(names)) == 8


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda data: gzip.compress(data), "gzip-compressed"),
        (lambda data: data[:700], "cut off in 0000.jpg: 700 bytes"),
        (lambda data: data[:100], r"not a tar file, or cut off \(100 bytes\)"),
        (lambda data: b"hello world" * 100, "not a tar file at byte 0"),
        (lambda data: data.replace(b"0000.txt", b"0000.txu", 1), r"not a tar file at byte \d{3,}"),
        (lambda data: bytes(1024), "no samples here"),
    ],
)
def test_what_is_no_tar_is_refused_in_one_line(tmp_path: Path, change: object, line: str) -> None:
    data = write_tar(tmp_path / "a.tar", list(samples(3))).read_bytes()
    (tmp_path / "a.tar").write_bytes(change(data))  # type: ignore[operator]
    with pytest.raises(ValueError, match=line) as caught:
        Shards(tmp_path / "a.tar")
    assert "\n" not in str(caught.value) and "a.tar" in str(caught.value)


def test_headers_cannot_request_huge_allocations(tmp_path: Path) -> None:
    data = bytearray(write_tar(tmp_path / "a.tar", {"0.jpg": b"x"}).read_bytes())
    data[156:157] = b"L"  # a long name of 7 GiB
    data[124:136] = b"77777777777\0"
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:512])
    (tmp_path / "a.tar").write_bytes(data)
    with pytest.raises(ValueError, match="cut off"):
        Shards(tmp_path / "a.tar")


def test_two_members_of_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a\.tar: two members are named 0\.jpg"):
        Shards(write_tar(tmp_path / "a.tar", [("0.jpg", b"a"), ("0.jpg", b"b")]))


def test_missing_shards_name_the_nearest(tmp_path: Path) -> None:
    write_tar(tmp_path / "train-000.tar", list(samples(1)))
    with pytest.raises(ValueError, match=r"train-001\.tar: no such file; nearest: train-000\.tar"):
        Shards(str(tmp_path / "train-{000..001}.tar"))
    with pytest.raises(ValueError, match=r"trian-\*\.tar: no such file; nearest: train-000\.tar"):
        Shards(str(tmp_path / "trian-*.tar"))
    with pytest.raises(ValueError, match="given twice"):
        Shards([tmp_path / "train-000.tar", str(tmp_path / "train-000.tar")])


def test_the_index_is_made_once_and_again_when_the_shard_changes(tmp_path: Path, cache: Path) -> None:
    path = write_tar(tmp_path / "a.tar", list(samples(5)))
    with mock.patch.object(shards, "index", wraps=shards.index) as spy:
        first, second = Shards(path), Shards(path)
        assert spy.call_count == 1 and len(list((cache / "index").iterdir())) == 1
        assert [first.read(i, ["jpg", "txt"]) for i in range(5)] == [second.read(i, ["jpg", "txt"]) for i in range(5)]
        kept = next((cache / "index").iterdir())
        kept.write_bytes(kept.read_bytes()[:100])  # a broken index is made again
        assert len(Shards(path)) == 5 and spy.call_count == 2
        write_tar(path, list(samples(6)))
        os.utime(path, ns=(1, 1))
        assert len(Shards(path)) == 6 and spy.call_count == 3


def test_a_cache_that_cannot_be_written_is_no_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DESCANT_CACHE", str(tmp_path / "file"))
    assert len(Shards(write_tar(tmp_path / "a.tar", list(samples(2))))) == 2


def _read_all(source: Shards) -> list[object]:
    return [source.read(i, ["jpg", "txt"]) for i in range(len(source))]


def _count(path: Path) -> int:
    return len(Shards(path))


def test_several_processes_read_and_index_at_once(tmp_path: Path, cache: Path) -> None:
    path = write_tar(tmp_path / "a.tar", list(samples(30)))
    context = multiprocessing.get_context("fork")
    # multiprocessing.Pool ends its processes by SIGTERM: where a test left a handler of it, they wait for ever
    with ProcessPoolExecutor(4, mp_context=context) as pool:
        assert list(pool.map(_count, [path] * 8)) == [30] * 8
    assert [p.suffix for p in (cache / "index").iterdir()] == [".npz"]
    source = Shards(path)
    expected = _read_all(source)  # the handle is open before the fork: children share it
    with ProcessPoolExecutor(4, mp_context=context) as pool:
        assert list(pool.map(_read_all, [source] * 8)) == [expected] * 8
    assert _read_all(pickle.loads(pickle.dumps(source))) == expected


def test_many_shards_need_few_handles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "_OPEN", 3)
    for k in range(10):
        write_tar(tmp_path / f"{k}.tar", {"a.txt": str(k).encode()})
    source = Shards(str(tmp_path / "*.tar"))
    for i in np.random.default_rng(0).integers(0, 10, 50).tolist():
        assert source.read(i, ["txt"]) == {"txt": str(i)}
    assert len(source._handles) == 3


def test_a_shard_that_shrinks_while_it_is_read_is_a_value_error(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", list(samples(3)))
    source = Shards(path)
    os.truncate(path, 600)
    with pytest.raises(ValueError, match="the file ends before the sample does"):
        source.read(2, ["jpg"])
