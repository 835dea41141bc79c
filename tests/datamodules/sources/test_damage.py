"""Truncated and bit-flipped files: damage that loses or changes a sample is reported, wherever it is."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import json
import lzma
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from descant.data.make import make
from descant.datamodules.changes import Corpus
from descant.datamodules.fields.fields import kinds
from descant.datamodules.fields.images import Images
from descant.datamodules.sources import find
from descant.datamodules.sources.base import Damaged, Source
from descant.datamodules.sources.folder import Folder
from descant.datamodules.sources.ledger import Ledger
from descant.datamodules.sources.parquet import Parquet
from descant.datamodules.sources.shards import Shards, index
from descant.datamodules.sources.stream import Sample, Stream, read_samples
from descant.datamodules.user.user_data import UserData
from tests.files import jpeg, shapes, write_tar

Found = tuple[list[tuple[str, object]], str | None]
MEMBERS = [(f"{i:02}.{e}", f"{e} {i}".encode() * 9) for i in range(40) for e in ("bin", "txt")]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DESCANT_CACHE", str(tmp_path / "cache"))


def contents(samples: Iterator[Sample]) -> list[tuple[str, object]]:
    return [(sample.name, sorted(sample.raw.items())) for sample in samples]


def indexed(path: Path) -> Found:
    """All samples that an index finds, and why it says that some may be lost."""
    part, data = index(path), path.read_bytes()
    names = part["names"].tobytes().decode()
    start = [*part["start"].tolist(), len(names)]
    found: list[tuple[str, object]] = []
    for i in range(len(part["start"])):
        places = zip(part["fields"].tolist(), part["offset"][i].tolist(), part["size"][i].tolist(), strict=True)
        raw = [(f, data[at : at + size]) for f, at, size in places if at >= 0]
        found.append((names[start[i] : start[i + 1]], sorted((f, d.decode() if f == "txt" else d) for f, d in raw)))
    return found, next(iter(part["why"].tolist()), None)


def streamed(path: Path) -> Found:
    reported: list[str] = []
    found = contents(read_samples(str(path), lambda place, why: reported.append(why)))
    return found, next(iter(reported), None)


@pytest.mark.parametrize("read", [indexed, streamed])
def test_a_shard_is_cut_at_every_block(tmp_path: Path, read: Callable[[Path], Found]) -> None:
    path = write_tar(tmp_path / "a.tar", MEMBERS)
    data = path.read_bytes()
    whole, why = read(path)
    assert why is None and len(whole) == 40
    reported = 0
    cuts = [at + off for at in range(0, len(data) + 1, 512) for off in (-1, 0, 1) if 0 <= at + off < len(data)]
    for cut in cuts:
        path.write_bytes(data[:cut])
        found, why = read(path)
        assert why is not None or found == whole, cut
        assert found[:-1] == whole[: max(len(found) - 1, 0)], "what is before the cut is as it was"
        reported += why is not None
    end = 1024 * len(MEMBERS) + 1024
    assert reported == sum(cut < end for cut in cuts) and len(cuts) > 500


@pytest.mark.parametrize("packed", ["gz", "bz2", "xz"])
def test_a_packed_stream_is_cut_anywhere(tmp_path: Path, packed: str) -> None:
    packs: dict[str, Callable[[bytes], bytes]] = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}
    path = tmp_path / f"a.tar.{packed}"
    data = packs[packed](write_tar(tmp_path / "a.tar", MEMBERS).read_bytes())
    path.write_bytes(data)
    whole, why = streamed(path)
    assert why is None and len(whole) == 40
    for cut in range(0, len(data), max(len(data) // 100, 1)):
        path.write_bytes(data[:cut])
        found, why = streamed(path)
        assert why is not None, cut
        assert found[:-1] == whole[: max(len(found) - 1, 0)]


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda data: data[:2048] + bytes(512) + data[2560:], "more follows its end at byte 2,048: a header was lost"),
        (lambda data: data + data, "more follows its end"),
        (lambda data: data[:2048] + bytes(1 << 21), "only zeros from byte 2,048 on"),
        (lambda data: data[:81_920], "cut off: 81,920 bytes, and the two empty blocks that end a tar are missing"),
        (lambda data: data[:82_432], "cut off: 82,432 bytes, and only one of the two empty blocks"),
    ],
)
def test_an_end_in_the_middle_is_reported(tmp_path: Path, spoil: Callable[[bytes], bytes], why: str) -> None:
    path = write_tar(tmp_path / "a.tar", MEMBERS)
    path.write_bytes(spoil(path.read_bytes()))
    for read in (indexed, streamed):
        found, reported = read(path)
        assert reported is not None and why in reported and len(found) in (1, 40)
    with pytest.raises(ValueError, match=r"a\.tar: .*; damaged: skip reads the rest"):
        Shards(path)
    source = Shards(path, damaged="skip")
    assert len(source) in (1, 40) and [fault.file for fault in source.faults] == [str(path)]
    with pytest.raises(ValueError, match=r"a\.tar: (cut off|\d)") if "cut off" in why else contextlib.nullcontext():
        Stream(str(path), samples=8).require_whole()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four shards of 40 samples with their manifest."""
    folder = tmp_path_factory.mktemp("made")
    make(shapes(folder / "photos", 40), folder / "shards", samples=10, holdout=0.0)
    return folder / "shards"


def copied(made: Path, to: Path) -> Path:
    to.mkdir()
    for file in made.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


def test_losses_are_detected_by_a_manifest(made: Path, tmp_path: Path) -> None:
    folder = copied(made, tmp_path / "s")
    assert len(find(folder)[""]) == 40
    second = folder / "train-000001.tar"
    data = second.read_bytes()
    second.unlink()
    why = r"train-000001\.tar: listed in its manifest, but missing: 10 samples are lost; damaged: skip"
    for path in (folder, folder / "train-*.tar"):
        with pytest.raises(ValueError, match=why):
            find(path)
        source = find(path, damaged="skip")[""]
        assert len(source) == 30 and [fault.file for fault in source.faults] == [str(second)]
    assert len(find(folder / "train-00000[02].tar")[""]) == 20, "who asks for some gets them"
    second.write_bytes(data[:4000])
    with pytest.raises(ValueError, match=r"train-000001\.tar: cut off.*; \d of 10 samples are lost; damaged: skip"):
        find(folder)
    second.write_bytes(data + bytes(512))  # a whole tar, and another one
    with pytest.raises(ValueError, match=r"\d bytes, and its manifest lists [\d,]+; damaged: skip"):
        find(folder)
    second.write_bytes(data)
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(text.replace('"samples": 10', '"samples": 12'))
    with pytest.raises(ValueError, match=r"10 samples, and its manifest lists 12; 2 of 12 samples are lost; damaged"):
        find(folder)
    (folder / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match=r"manifest\.json: not readable \(.*\); damaged: skip"):
        find(folder)
    assert find(folder, damaged="skip")[""].faults[0].file == str(folder / "manifest.json")
    (folder / "manifest.json").write_text('{"manifest_version": 3}')  # of a browser's extension
    assert len(find(folder)[""]) == 40


def test_local_shards_of_a_stream_are_checked_before_reading(made: Path, tmp_path: Path) -> None:
    folder = copied(made, tmp_path / "s")
    urls = [str(folder / f"train-{k:06d}.tar") for k in range(4)]
    stream = Stream(urls, samples=40)
    stream.require_whole()
    data = (folder / "train-000002.tar").read_bytes()
    (folder / "train-000002.tar").write_bytes(data[:-10240])
    with pytest.raises(
        ValueError, match=r"train-000002\.tar: [\d,]+ bytes, and its manifest lists .*some of its 10 samples are lost"
    ):
        stream.require_whole()
    own = UserData(stream=stream, batch_size=8)
    with pytest.raises(ValueError, match="train-000002"):
        own.prepare_data()
    UserData(stream=stream, batch_size=8, damaged="skip").prepare_data()
    (folder / "train-000002.tar").unlink()
    with pytest.raises(ValueError, match=r"train-000002\.tar: no such file; damaged: skip"):
        stream.require_whole()


def test_a_stream_compares_its_count_with_the_manifest(made: Path, tmp_path: Path) -> None:
    folder = copied(made, tmp_path / "s")
    file = folder / "manifest.json"
    file.write_text(file.read_text().replace('"samples": 10', '"samples": 21'))
    found, why = streamed(folder / "train-000000.tar")
    assert len(found) == 10 and why == "10 samples, and its manifest lists 21"


# flips ---------------------------------------------------------------------------------------------------------------


def places(size: int, n: int = 200) -> list[tuple[int, int]]:
    """Byte and bit of ``n`` flips: some at both ends, the others anywhere."""
    rng = random.Random(size)
    some = [*range(min(20, size)), *range(max(size - 20, 0), size)]
    return [(at, 1 << rng.randrange(8)) for at in (*some, *(rng.randrange(size) for _ in range(n - len(some))))]


def flips(path: Path) -> Iterator[tuple[int, int]]:
    data = path.read_bytes()
    for at, bit in places(len(data)):
        path.write_bytes(data[:at] + bytes([data[at] ^ bit]) + data[at + 1 :])
        yield at, bit
    path.write_bytes(data)


def test_a_bit_flip_in_a_tar_is_reported_or_in_the_bytes_of_a_member(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", MEMBERS)
    whole, _ = indexed(path)
    for read in (indexed, streamed):
        reported = same = inside = 0
        for at, _ in flips(path):
            try:
                found, why = read(path)
            except UnicodeDecodeError as error:  # of the helper here, as reading the sample does
                found, why = [], str(error)
            content = at < 1024 * len(MEMBERS) and at % 1024 >= 512
            reported, same = reported + (why is not None), same + (found == whole)
            inside += why is None and found != whole
            assert why is not None or found == whole or content, at
        assert reported > 50 and inside > 0 and reported + same + inside >= 200


def images(folder: Path) -> Path:
    """Eight images of noise, of which every byte counts."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for k in range(8):
        out = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (6, 7, 3), dtype=np.uint8)).save(out, ("PNG", "JPEG")[k % 2])
        (folder / f"{k}.{('png', 'jpg')[k % 2]}").write_bytes(out.getvalue())
    names = [f"{k}.{('png', 'jpg')[k % 2]}" for k in range(8)]
    lines = [f"{name},what number {k} shows\n" for k, name in enumerate(names)]
    (folder / "captions.csv").write_text("image,caption\n" + "".join(lines))
    return folder


def reported_or_same(folder: Path, path: Path, table: Path, read: Callable[[], list[object]]) -> tuple[int, int, int]:
    """Bit flips of a file of a corpus: how many are reported on opening or reading, harmless, or detected by verify."""
    whole, corpus = read(), _corpus(table)
    corpus.content = list(corpus.hash_files().values())
    before = corpus.state()
    reported = same = verified = 0
    for at, bit in flips(path):
        try:
            found = read()
        except ValueError as error:
            assert "\n" not in str(error) and str(folder) in str(error), (at, bit)
            reported += 1
            continue
        if any(isinstance(each, ValueError) for each in found):
            reported += 1
        elif found == whole:
            same += 1
        else:
            now = _corpus(table)
            now.content = list(now.hash_files().values())
            assert now.changes(before), (at, bit)
            verified += 1
    return reported, same, verified


def _corpus(path: Path) -> Corpus:
    corpus = next(iter(find(path).values())).corpus()
    assert corpus is not None
    return corpus


def _decoded(source: Source) -> list[object]:
    """Pixels and captions of all samples, or why they cannot be read."""
    found: list[object] = []
    for i in range(len(source)):
        try:
            for name, raw in source.read(i, [name for name in source.fields if source.has(name)[i]]).items():
                x_13SS, errors = Images(4)([raw]) if isinstance(raw, bytes) else (None, [None])
                found.append(ValueError(errors[0]) if errors[0] else (name, raw if x_13SS is None else x_13SS.tolist()))
        except (OSError, ValueError) as error:
            found.append(ValueError(str(error)))
    return found


def parquet(folder: Path) -> Path:
    rows = [{"image": jpeg("red", (6, 6 + i)), "caption": f"what number {i} shows"} for i in range(20)]
    pq.write_table(pa.Table.from_pylist(rows), folder / "a.parquet", row_group_size=7, write_page_checksum=True)
    return folder / "a.parquet"


def lines(folder: Path) -> Path:
    names = [file.name for file in sorted(images(folder).glob("?.*"))]
    (folder / "captions.csv").unlink()
    text = "".join(json.dumps({"image": name, "caption": f"what {name} shows"}) + "\n" for name in names)
    (folder / "a.jsonl").write_text(text)
    return folder / "a.jsonl"


FLIPPED: dict[str, Callable[[Path], tuple[Path, Path]]] = {
    "csv": lambda folder: (images(folder / "p") / "captions.csv", folder / "p" / "captions.csv"),
    "json lines": lambda folder: (lines(folder / "p"), folder / "p" / "a.jsonl"),
    "png": lambda folder: (images(folder / "p") / "2.png", folder / "p"),
    "jpeg": lambda folder: (images(folder / "p") / "3.jpg", folder / "p"),
    "parquet": lambda folder: (parquet(folder), folder / "a.parquet"),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", FLIPPED)
def test_a_bit_flip_is_reported_or_harmless_or_detected_by_verify(tmp_path: Path, kind: str) -> None:
    path, table = FLIPPED[kind](tmp_path)
    reported, same, verified = reported_or_same(
        tmp_path, path, table, lambda: _decoded(next(iter(find(table).values())))
    )
    print(f"{kind}: {reported} reported, {same} the same, {verified} by verify")
    assert reported + same + verified >= 200 and reported > 0


@pytest.mark.parametrize("part", ["train-000001.tar", "manifest.json"])
def test_a_bit_flip_in_shards_with_a_manifest_is_reported(made: Path, tmp_path: Path, part: str) -> None:
    folder = copied(made, tmp_path / "s")
    whole = [indexed(file)[0] for file in sorted(folder.glob("*.tar"))]
    reported = same = 0
    for at, _ in flips(folder / part):
        try:
            source = find(folder)[""]
            corpus = source.corpus()
            assert corpus is not None
            why = corpus.verify()
        except ValueError as error:
            why = str(error)
        reported += why is not None
        if why is None:
            assert [indexed(file)[0] for file in sorted(folder.glob("*.tar"))] == whole, at
            same += 1
    assert reported + same >= 200 and (reported >= 200 if part.endswith("tar") else same > 0)


# tables ----------------------------------------------------------------------------------------------------------


def table(folder: Path, text: str | bytes, name: str = "captions.csv") -> Path:
    folder.mkdir(exist_ok=True)
    for i in range(3):
        (folder / f"{i}.jpg").write_bytes(jpeg())
    (folder / name).write_bytes(text.encode() if isinstance(text, str) else text)
    return folder


@pytest.mark.parametrize(
    ("text", "line", "why"),
    [
        ('image,caption\n0.jpg,a\n1.jpg,"b\n2.jpg,c\n', 3, "a quote opens that is not closed, as line 4 shows"),
        ('image,caption\n0.jpg,a\n1.jpg,"b\n' + "2.jpg,c\n" * 5000 + '0.jpg,"d"\n', 3, "a quote opens .* as line 5004"),
        ("image,caption\n0.jpg,a\n1.jpg,b,c\n2.jpg,c\n", 3, "has 3 cells, the header 2"),
        (b"image,caption\n0.jpg,a\n1.jpg,\xff\n2.jpg,c\n", 3, r"not UTF-8 text \(byte 0xff\)"),
        ('image,caption\n0.jpg,"a"b\n1.jpg,b\n2.jpg,c\n', 2, "',' expected after '\"'"),
    ],
)
def test_a_bad_row_is_named_and_may_be_skipped(tmp_path: Path, text: str | bytes, line: int, why: str) -> None:
    folder = table(tmp_path / "d", text)
    with pytest.raises(ValueError, match=rf"captions\.csv: line {line}:? {why}.*; damaged: skip reads the rest$"):
        Folder(folder)
    source = Folder(folder, damaged="skip")
    assert [(fault.file, fault.sample) for fault in source.faults[:1]] == [
        (str(folder / "captions.csv"), f"line {line}")
    ]
    assert len(source) == 2 and len(source.faults) == 1


def test_one_bad_row_of_json_lines(tmp_path: Path) -> None:
    rows = ['{"image": "0.jpg", "c": "a"}', "[" * 5000, '{"image": "1.jpg", "c": 1' + "0" * 5000 + "}", "3"]
    text = "\n".join([*rows, '{"image": "1.jpg", "c": "\udcff"}', '{"image": "2.jpg", "c": "z"}'])
    folder = table(tmp_path / "d", text.encode("utf-8", "surrogateescape"), "a.jsonl")
    with pytest.raises(ValueError, match=r"a\.jsonl: line 2: not JSON \(.*; damaged: skip reads the rest"):
        Folder(folder)
    source = Folder(folder, damaged="skip")
    assert [fault.sample for fault in source.faults] == ["line 2", "line 3", "line 4", "line 5"] and len(source) == 2


def test_a_table_of_many_bad_rows_is_refused_whole(tmp_path: Path) -> None:
    folder = table(tmp_path / "d", "image,caption\n0.jpg,a\n" + "1.jpg\n" * 1200)
    with pytest.raises(ValueError, match=r"line 1003 has 1 cells, .*; 1,000 rows before it cannot be read either"):
        Folder(folder, damaged="skip")


def test_skipped_rows_are_in_the_ledger(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = table(tmp_path / "d", "image,caption\n0.jpg,a\n1.jpg,b,c\n2.jpg,c\n")
    data = UserData(batch_size=2, num_workers=0, path=str(folder), holdout=0.0, damaged="skip")
    data.__dict__["ledger"] = Ledger(tmp_path / "run")
    data.training_set()
    data.training_set()
    note = json.loads((tmp_path / "run" / "ledger.jsonl").read_text())
    assert note == {"file": str(folder / "captions.csv"), "sample": "line 3", "why": "has 3 cells, the header 2"}
    assert capsys.readouterr().err.count("captions.csv: has 3 cells, the header 2 (1 in all: ") == 1


def test_files_outside_the_folder_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(jpeg(format="PNG"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "y.png").write_bytes(jpeg(format="PNG"))
    names = {
        "up": "../x.png",
        "absolute": str(tmp_path / "x.png"),
        "link": "l.png",
        "folder": "f/y.png",
        "in": "a/../0.jpg",
    }
    for kind, name in names.items():
        folder = table(tmp_path / kind, f"image,caption\n0.jpg,a\n{name},b\n")
        (folder / "l.png").symlink_to(tmp_path / "x.png")
        (folder / "f").symlink_to(tmp_path / "other")
        (folder / "a").mkdir()
        with pytest.raises(ValueError, match=r"captions\.csv: .* outside .*; outside: true reads it") as caught:
            Folder(folder)
        assert "\n" not in str(caught.value)
        assert len(Folder(folder, outside=True).read(1, ["image"])["image"]) > 50
        (folder / "captions.csv").unlink()
        with pytest.raises(ValueError, match=rf"{kind}: l\.png leads outside"):
            Folder(folder)
    within = table(tmp_path / "within", "image,caption\n0.jpg,a\nl.jpg,b\n")
    (within / "l.jpg").symlink_to("1.jpg")
    assert len(Folder(within)) == 2
    secret = table(tmp_path / "secret", "")
    (secret / "captions.csv").unlink()
    (secret / "0.txt").symlink_to("/etc/hostname")
    with pytest.raises(ValueError, match=r"0\.txt leads outside"):
        Folder(secret)


def test_a_parquet_file_names_no_file_outside(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(jpeg(format="PNG"))
    (tmp_path / "d").mkdir()
    rows = [{"image": {"bytes": None, "path": "../x.png"}}, {"image": {"bytes": jpeg(), "path": "/etc/passwd"}}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "d" / "a.parquet")
    source = Parquet(tmp_path / "d" / "a.parquet")
    with pytest.raises(ValueError, match=r"'\.\./x\.png' is outside"):
        source.read(0, ["image"])
    assert source.read(1, ["image"])["image"] == jpeg()
    assert Parquet(tmp_path / "d" / "a.parquet", outside=True).read(0, ["image"])["image"] == jpeg(format="PNG")


@pytest.mark.parametrize("damaged", ["refuse", "skip"])
def test_a_parquet_file_that_cannot_be_read(tmp_path: Path, damaged: Damaged) -> None:
    data = parquet(tmp_path).read_bytes()
    (tmp_path / "b.parquet").write_bytes(data[:-100])
    (tmp_path / "c.parquet").write_bytes(data[:30] + bytes(40) + data[70:])
    if damaged == "refuse":
        with pytest.raises(
            ValueError, match=r"b\.parquet: not a readable parquet file .*; damaged: skip reads the rest"
        ):
            Parquet(str(tmp_path / "*.parquet"))
        return
    source = Parquet(str(tmp_path / "*.parquet"), damaged="skip")
    assert [Path(fault.file).name for fault in source.faults] == ["b.parquet"] and len(source) == 40
    assert source.has("caption").sum() == 40 and source.has("image").sum() == 40
    with pytest.raises(ValueError, match=r"c\.parquet: row group 0: "):
        source.read(21, ["image"])


# bounds ----------------------------------------------------------------------------------------------------------


def test_many_keys_are_no_fields(tmp_path: Path) -> None:
    many = {f"key{k}": k for k in range(20_000)}
    members = [(f"{i}.{e}", d) for i in range(20) for e, d in (("jpg", jpeg()), ("json", json.dumps(many).encode()))]
    source = Shards(write_tar(tmp_path / "a.tar", members))
    assert kinds(source) == {"jpg": "image", "json": "text"} and len(source.faults) == 20
    assert source.faults[0][1:] == ("a/0", "json: more than 1,000 entries in one JSON object")
    each = [(f"{i}.json", json.dumps({f"{i} {k}": k for k in range(900)}).encode()) for i in range(20)]
    with pytest.raises(ValueError, match="more than 10,000 different fields"):
        Shards(write_tar(tmp_path / "b.tar", each))
    with pytest.raises(ValueError, match="more than 256 members of one sample, 0"):
        Shards(write_tar(tmp_path / "c.tar", [(f"0.k{k}", b"") for k in range(300)]))
    reported: list[str] = []
    assert len(list(read_samples(str(tmp_path / "c.tar"), lambda place, why: reported.append(why)))) == 1
    assert "more than 256 members of one sample" in reported[0]
    for k in range(12):  # a thousand in each of twelve shards
        write_tar(tmp_path / f"d{k}.tar", [("0.json", json.dumps({f"{k} {i}": i for i in range(1000)}).encode())])
    with pytest.raises(ValueError, match="more than 10,000 different fields"):
        Shards(str(tmp_path / "d*.tar"))


def test_a_sample_is_read_once_to_find_the_types_of_its_fields(tmp_path: Path) -> None:
    members = [(f"{i}.json", json.dumps({f"k{k}": f"text {k}" for k in range(200)}).encode()) for i in range(12)]
    source = Shards(write_tar(tmp_path / "a.tar", members))
    with mock.patch.object(source, "read", wraps=source.read) as spy:
        assert set(kinds(source).values()) == {"text"}
    assert spy.call_count == 10


def test_an_unreadable_text_is_reported_by_a_stream(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [("0.txt", b"\xff"), ("0.cls", b"1"), ("1.json", b"{"), ("2.txt", b"fine")])
    reported: list[tuple[str, str, str]] = []
    read = Stream(str(path), 4).read(
        0, 0, 0, 1, lambda raw: "txt" in raw, lambda *_: None, fault=lambda *f: reported.append(f)
    )
    assert next(read).name == "2"
    assert {(name, why.partition(":")[0]) for _, name, why in reported} == {("0", "txt"), ("1", "json")}


# addresses -------------------------------------------------------------------------------------------------------

#: Texts that Python's parser of addresses takes for another scheme than they begin with, or opens by a program.
DISGUISED = [
    *(f"{blank}pipe:touch {{ran}}" for blank in (" ", "\t", "\n", "\x00", "\x0b", "\x1f", "\u00a0", "\u2003")),
    *("pi\tpe:touch {ran}", "p\nipe:touch {ran}", "pipe\r:touch {ran}", "PIPE:touch {ran}", "Pipe:touch {ran}"),
    *("pipe:touch {ran} ", " http://127.0.0.1:9/a", "h\ttp://127.0.0.1:9/a", "http://127.0.0.1:9/a\n"),
    *(
        f"{scheme}://127.0.0.1/a.tar"
        for scheme in ("ais", "sftp", "ftps", "scp", "htgs", "hf", "ftp", "gopher", "data")
    ),
    *("file:/etc/passwd\n", "-", " -", "https://a b", "gs://$(touch {ran})", "s3://`touch {ran}`/a"),
]


@pytest.mark.parametrize("url", DISGUISED)
def test_a_disguised_address_runs_nothing(tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = tmp_path / "ran"
    monkeypatch.setattr(shutil, "which", lambda program: f"/bin/{program}")  # whatever is installed here
    with pytest.raises(ValueError, match="urls: ") as caught:
        Stream([url.format(ran=ran)], samples=1)
    assert "\n" not in str(caught.value) and not ran.exists()


def test_a_stream_of_a_pipe_or_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "a.tar")
    monkeypatch.setenv("GOPEN_REWRITE", f"{tmp_path}=pipe:touch {tmp_path}/ran; cat {tmp_path}")
    for name in ("a.tar", "."):
        assert streamed(tmp_path / name) == ([], "not a regular file") and not (tmp_path / "ran").exists()


def test_a_missing_folder_names_the_nearest_and_lists_nothing(tmp_path: Path) -> None:
    (tmp_path / "photos" / "train").mkdir(parents=True)
    for path, end in {
        "/no-such-folder-of-data": "no such file or folder",
        "/no-such-folder-of-data/train": "no such file or folder; there is no /no-such-folder-of-data",
        str(tmp_path / "photo" / "train"): f"no such file or folder; nearest: {tmp_path / 'photos'}",
        str(tmp_path / "photos" / "trian"): "no such file or folder; nearest: train",
        str(tmp_path / "zzz.csv"): "no such file or folder",
    }.items():
        with pytest.raises(ValueError, match=f"^{path}: {end}$"):
            find(path)
