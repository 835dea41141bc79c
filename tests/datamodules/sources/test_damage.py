"""Files that were cut or flipped: what loses a sample or changes one is told, wherever the damage lies."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from descant.data.make import make
from descant.datamodules.own import Own
from descant.datamodules.sources import find
from descant.datamodules.sources.shards import Shards, index
from descant.datamodules.sources.stream import Sample, Stream, _samples
from tests.files import shapes, write_tar

MEMBERS = [(f"{i:02}.{e}", f"{e} {i}".encode() * 9) for i in range(40) for e in ("bin", "txt")]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DESCANT_CACHE", str(tmp_path / "cache"))


def contents(samples: Iterator[Sample]) -> list[tuple[str, object]]:
    return [(sample.name, sorted(sample.raw.items())) for sample in samples]


def indexed(path: Path) -> tuple[list[tuple[str, object]], str | None]:
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


def streamed(path: Path) -> tuple[list[tuple[str, object]], str | None]:
    told: list[str] = []
    found = contents(_samples(str(path), lambda place, why: told.append(why)))
    return found, next(iter(told), None)


@pytest.mark.parametrize("read", [indexed, streamed])
def test_a_shard_is_cut_at_every_block(tmp_path: Path, read: Callable[..., object]) -> None:
    path = write_tar(tmp_path / "a.tar", MEMBERS)
    data = path.read_bytes()
    whole, why = read(path)  # type: ignore[misc]
    assert why is None and len(whole) == 40
    told = 0
    cuts = [at + off for at in range(0, len(data) + 1, 512) for off in (-1, 0, 1) if 0 <= at + off < len(data)]
    for cut in cuts:
        path.write_bytes(data[:cut])
        found, why = read(path)  # type: ignore[misc]
        assert why is not None or found == whole, cut
        assert found[:-1] == whole[: max(len(found) - 1, 0)], "what is before the cut is as it was"
        told += why is not None
    end = 1024 * len(MEMBERS) + 1024
    assert told == sum(cut < end for cut in cuts) and len(cuts) > 500


@pytest.mark.parametrize("packed", ["gz", "bz2", "xz"])
def test_a_packed_stream_is_cut_anywhere(tmp_path: Path, packed: str) -> None:
    import bz2
    import gzip
    import lzma

    pack = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}[packed]
    path = tmp_path / f"a.tar.{packed}"
    data = pack(write_tar(tmp_path / "a.tar", MEMBERS).read_bytes())
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
        (lambda data: data[:81_920], "cut off: 81,920 bytes, and the two empty blocks that end a tar are not there"),
        (lambda data: data[:82_432], "cut off: 82,432 bytes, and only one of the two empty blocks"),
    ],
)
def test_an_end_in_the_middle_is_told(tmp_path: Path, spoil: Callable[[bytes], bytes], why: str) -> None:
    path = write_tar(tmp_path / "a.tar", MEMBERS)
    path.write_bytes(spoil(path.read_bytes()))
    for read in (indexed, streamed):
        found, told = read(path)
        assert told is not None and why in told and len(found) in (1, 40)
    with pytest.raises(ValueError, match=r"a\.tar: .*; damaged: skip reads the rest"):
        Shards(path)
    source = Shards(path, damaged="skip")
    assert len(source) in (1, 40) and [fault.file for fault in source.faults] == [str(path)]
    with pytest.raises(ValueError, match=r"a\.tar: (cut off|\d)") if "cut off" in why else _nothing():
        Stream(str(path), samples=8).require_whole()


def _nothing() -> object:
    import contextlib

    return contextlib.nullcontext()


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


def test_a_manifest_tells_what_is_lost(made: Path, tmp_path: Path) -> None:
    folder = copied(made, tmp_path / "s")
    assert len(find(folder)[""]) == 40
    second = folder / "train-000001.tar"
    data = second.read_bytes()
    second.unlink()
    why = r"train-000001\.tar: its manifest tells of it, and it is not there: 10 samples are lost; damaged: skip"
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
    with pytest.raises(ValueError, match=r"\d bytes, and its manifest tells of [\d,]+; damaged: skip"):
        find(folder)
    second.write_bytes(data)
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(text.replace('"samples": 10', '"samples": 12'))
    with pytest.raises(
        ValueError, match=r"10 samples, and its manifest tells of 12; 2 of 12 samples are lost; damaged"
    ):
        find(folder)
    (folder / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match=r"manifest\.json: not readable \(.*\); damaged: skip"):
        find(folder)
    assert find(folder, damaged="skip")[""].faults[0].file == str(folder / "manifest.json")
    (folder / "manifest.json").write_text('{"manifest_version": 3}')  # of a browser's extension
    assert len(find(folder)[""]) == 40


def test_a_stream_of_local_shards_is_looked_at_before_it_is_read(made: Path, tmp_path: Path) -> None:
    folder = copied(made, tmp_path / "s")
    urls = [str(folder / f"train-{k:06d}.tar") for k in range(4)]
    stream = Stream(urls, samples=40)
    stream.require_whole()
    data = (folder / "train-000002.tar").read_bytes()
    (folder / "train-000002.tar").write_bytes(data[:-10240])
    with pytest.raises(
        ValueError, match=r"train-000002\.tar: [\d,]+ bytes, and its manifest tells .*10 samples are in it"
    ):
        stream.require_whole()
    own = Own(stream=stream, batch_size=8)
    with pytest.raises(ValueError, match="train-000002"):
        own.prepare_data()
    Own(stream=stream, batch_size=8, damaged="skip").prepare_data()
    (folder / "train-000002.tar").unlink()
    with pytest.raises(ValueError, match=r"train-000002\.tar: no such file; damaged: skip"):
        stream.require_whole()


def test_a_stream_counts_what_its_manifest_tells(made: Path, tmp_path: Path) -> None:
    folder = copied(made, tmp_path / "s")
    file = folder / "manifest.json"
    file.write_text(file.read_text().replace('"samples": 10', '"samples": 21'))
    found, why = streamed(folder / "train-000000.tar")
    assert len(found) == 10 and why == "10 samples, and its manifest tells of 21"


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


def test_a_flip_in_a_tar_is_told_or_in_the_bytes_of_a_member(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", MEMBERS)
    whole, _ = indexed(path)
    for read in (indexed, streamed):
        told = same = inside = 0
        for at, _ in flips(path):
            try:
                found, why = read(path)
            except UnicodeDecodeError as error:  # of the helper here, as reading the sample does
                found, why = [], str(error)
            content = at < 1024 * len(MEMBERS) and at % 1024 >= 512
            told, same = told + (why is not None), same + (found == whole)
            inside += why is None and found != whole
            assert why is not None or found == whole or content, at
        assert told > 50 and inside > 0 and told + same + inside >= 200
