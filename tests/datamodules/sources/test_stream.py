from __future__ import annotations

import functools
import http.server
import os
import threading
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from descant.datamodules.sources.addresses import open_address
from descant.datamodules.sources.base import Raw
from descant.datamodules.sources.object_store import Remote
from descant.datamodules.sources.stream import BEGINNING, Mark, Sample, Stream
from tests.files import write_tar


def shards(folder: Path, sizes: list[int]) -> list[str]:
    folder.mkdir(exist_ok=True)
    paths = []
    for k, size in enumerate(sizes):
        members = [(f"{i:03}.{ending}", f"{k}/{i}".encode()) for i in range(size) for ending in ("txt", "cls")]
        paths.append(str(write_tar(folder / f"{k}.tar", members)))
    return paths


def whole(raw: dict[str, Raw]) -> bool:
    return "txt" in raw and "cls" in raw


def take(stream: Stream, n: int, epoch: int = 0, skipped: list | None = None) -> list:
    note = (
        (lambda *reported: skipped.append(reported))
        if skipped is not None
        else (lambda *fault: pytest.fail(str(fault)))
    )
    return [s.raw["txt"] for s in islice(stream.read(0, epoch, 0, 1, whole, note), n)]


@pytest.mark.parametrize("readers", [1, 2, 3, 4, 6, 7])
@pytest.mark.parametrize("sizes", [[5, 1, 9, 4, 2], [6, 3], [8]])
def test_readers_share_every_pass_without_overlap(tmp_path: Path, sizes: list[int], readers: int) -> None:
    stream = Stream(shards(tmp_path, sizes), samples=10, buffer=1)
    for turn in (0, 1):
        parts = []
        for reader in range(readers):
            for url, step, start in stream.share(0, 0, turn, reader, readers):
                size = sizes[int(Path(url).stem)]
                parts += [(url, i) for i in range(size) if i % step == start]
        assert max(Counter(parts).values()) == 1 and len(parts) == sum(sizes)


def test_a_pass_yields_every_sample_once_and_the_next_has_another_order(tmp_path: Path) -> None:
    stream = Stream(shards(tmp_path, [4, 3, 5, 2]), samples=10, buffer=1)
    seen = take(stream, 28)
    first, second = seen[:14], seen[14:]
    assert sorted(first) == sorted(second) == sorted(f"{k}/{i}" for k, n in enumerate([4, 3, 5, 2]) for i in range(n))
    assert first != second


def test_the_order_is_a_function_of_seed_epoch_and_reader(tmp_path: Path) -> None:
    stream = Stream(shards(tmp_path, [40, 30, 50]), samples=10, buffer=20)
    assert take(stream, 60) == take(stream, 60)
    assert take(stream, 60) != take(stream, 60, epoch=1)
    assert set(Counter(take(stream, 240)).values()) == {2}, "two passes"
    mixed = take(stream, 60)
    assert len({text.split("/")[0] for text in mixed[:30]}) > 1 or mixed[:30] != sorted(mixed[:30])
    one = [int(t.split("/")[1]) for t in mixed if t.startswith(mixed[0].split("/")[0])]
    assert one != sorted(one), "the buffer shuffles within a shard"


@pytest.mark.parametrize("readers", [1, 2, 5])
@pytest.mark.parametrize("sizes", [[5, 1, 9, 4, 2], [6, 3], [8]])
def test_it_resumes_after_any_sample_without_opening_finished_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sizes: list[int], readers: int
) -> None:
    made = Stream(shards(tmp_path, sizes), samples=10, buffer=3)
    opened: list[str] = []

    def noted(url: str, remote: Remote) -> Any:
        opened.append(url)
        return open_address(url, remote)

    monkeypatch.setattr("descant.datamodules.sources.stream.open_address", noted)
    for reader in range(readers):

        def read(n: int, mark: Mark = BEGINNING, reader: int = reader) -> Iterator[Sample]:
            opened.clear()
            return islice(made.read(7, 3, reader, readers, whole, lambda *fault: pytest.fail(str(fault)), mark), n)

        seen = [(sample, len(opened)) for sample in read(18)]
        shards_in_order = list(opened)
        for k, (last, count) in enumerate(seen[:-1], 1):
            assert list(read(18 - k, last.mark)) == [sample for sample, _ in seen[k:]]
            again = [last.place] if last.mark.taken else []
            assert opened == again + shards_in_order[count:]


@pytest.mark.parametrize("buffer", [1, 3, 40, 1000])
def test_a_shard_is_shuffled_by_itself_and_all_of_it_comes(tmp_path: Path, buffer: int) -> None:
    made = Stream(shards(tmp_path, [90, 50]), samples=10, buffer=buffer)
    seen = [(int(k), int(i)) for k, _, i in (text.partition("/") for text in take(made, 140))]
    first = seen[0][0]
    parts = [[i for k, i in seen if k == shard] for shard in (first, 1 - first)]
    assert [k for k, _ in seen] == [first] * len(parts[0]) + [1 - first] * len(parts[1])
    assert all(sorted(part) == list(range(len(part))) for part in parts)
    late = max(i - place for part in parts for place, i in enumerate(part))
    assert (late == 0) == (buffer == 1) and late <= min(buffer, 90)


def test_a_broken_shard_is_skipped_and_reported(tmp_path: Path) -> None:
    paths = shards(tmp_path, [3, 3, 3])
    data = Path(paths[1]).read_bytes()
    Path(paths[1]).write_bytes(data[:2000])
    skipped: list = []
    seen = take(Stream([*paths, str(tmp_path / "gone.tar")], samples=9, buffer=1), 14, skipped=skipped)
    assert {"0/0", "0/1", "0/2", "2/0", "2/1", "2/2"} <= set(seen)
    reported = dict(skipped)
    assert reported[str(tmp_path / "gone.tar")] == "no such file" and paths[1] in reported


def test_incomplete_samples_are_passed_over(tmp_path: Path) -> None:
    members = [("0.txt", b"a"), ("1.txt", b"b"), ("1.cls", b"1"), ("2.txt", b"  "), ("2.cls", b"2")]
    stream = Stream(str(write_tar(tmp_path / "a.tar", members)), samples=4, buffer=1)
    assert take(stream, 3) == ["b", "b", "b"]


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda f: shards(f, [0, 0]), r"the stream yields nothing \(no samples\)"),
        (lambda f: [str(write_tar(f / "a.tar", {"0.txt": b"a"}))], "none of 1 samples has all fields"),
        (lambda f: [str(f / "gone.tar")], r"gone\.tar: no such file"),
        (lambda f: ["pipe:exit 3"], "its command ended with exit status 3"),
    ],
)
def test_a_stream_that_yields_nothing_is_one_line(tmp_path: Path, make, line: str) -> None:
    with pytest.raises(ValueError, match=line) as caught:
        take(Stream(make(tmp_path), samples=4, allow_pipes=True), 1, skipped=[])
    assert "\n" not in str(caught.value)


def test_pipes_have_to_be_allowed(tmp_path: Path) -> None:
    path = shards(tmp_path, [3])[0]
    marker = tmp_path / "ran"
    for url in (f"pipe:touch {marker}; cat {path}", f"PIPE:touch {marker}"):
        with pytest.raises(ValueError, match="runs a command in a shell; allow_pipes: true allows it"):
            Stream(["a.tar", url], samples=3)
    assert not marker.exists()
    stream = Stream(f"pipe:touch {marker}; cat {path}", samples=3, buffer=1, allow_pipes=True)
    assert sorted(take(stream, 3)) == ["0/0", "0/1", "0/2"] and marker.exists()


@pytest.mark.parametrize(
    ("url", "line"),
    [
        ("http://x/a.tar'; touch ran; '", "is no plain address"),
        ("https://x/$(id).tar", "is no plain address"),
        ("s3://b/`id`.tar", "is no plain address"),
        ("htttp://x/a.tar", "no way to read htttp:; nearest: http"),
        ("ftp://x/a.tar", "no way to read ftp:"),
        ("-", "standard input"),
    ],
)
def test_addresses_are_only_addresses(url: str, line: str) -> None:
    with pytest.raises(ValueError, match=line):
        Stream([url], samples=1)


def test_addresses_are_read(tmp_path: Path) -> None:
    """From a server without ranges or tags; what goes wrong on the way is in test_object_store.py."""
    shards(tmp_path, [3, 2])

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        base = f"http://127.0.0.1:{server.server_port}"
        assert sorted(take(Stream(base + "/{0..1}.tar", samples=5, buffer=1), 5)) == ["0/0", "0/1", "0/2", "1/0", "1/1"]
        skipped: list = []
        assert len(take(Stream([base + "/0.tar", base + "/7.tar"], samples=5, buffer=1), 6, skipped=skipped)) == 6
        assert skipped[0] == (base + "/7.tar", "status 404: no such object, 1 attempt")
    finally:
        server.shutdown()


def test_closing_a_stream_ends_its_command(tmp_path: Path) -> None:
    path = shards(tmp_path, [300])[0]
    command = f"echo $$ > {tmp_path}/pid; while true; do cat {path}; done"
    samples = Stream(f"pipe:{command}", samples=3, buffer=1, allow_pipes=True).read(
        0, 0, 0, 1, whole, lambda *fault: pytest.fail(str(fault))
    )
    next(samples)
    pid = int((tmp_path / "pid").read_text())
    os.kill(pid, 0)  # it runs
    samples.close()  # type: ignore[attr-defined]
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
