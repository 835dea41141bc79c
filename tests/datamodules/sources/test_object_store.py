"""Shards of object stores: the samples of local files, whatever goes wrong on the way; bounded copies; one line.

The tests of s3 want moto and s3fs (155 MB): `make stores`.
"""

from __future__ import annotations

import errno
import gc
import importlib.util
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from descant.datamodules.fields.fields import Fields, TextField
from descant.datamodules.sources import object_store
from descant.datamodules.sources.addresses import open_address
from descant.datamodules.sources.object_store import Remote, StoreError, StoreObject
from descant.datamodules.sources.shard_cache import ShardCache
from descant.datamodules.sources.stream import BEGINNING, Sample, Stream
from descant.datamodules.user.user_data import UserData
from descant.modules.io.cache import cache_folder
from tests.conftest import Result
from tests.files import jpeg, write_tar
from tests.stores import KEY, SECRET, Fault, Store, http_store, s3_store, some, without_s3

SIZES = [23, 1, 9, 14]
BLOCK, FIRST = 16384, 4096


@pytest.fixture(scope="module", params=["http", "whole", "s3"])
def served(request: pytest.FixtureRequest) -> Iterator[Store]:
    if request.param == "s3" and without_s3 is not None:
        pytest.skip(f"{without_s3} is not installed: `make stores`")
    with s3_store() if request.param == "s3" else http_store(ranges=request.param == "http") as store:
        yield store


@pytest.fixture
def store(served: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Store:
    monkeypatch.setattr(object_store, "BLOCK", BLOCK)
    monkeypatch.setattr(object_store, "FIRST", FIRST)
    monkeypatch.setattr(object_store, "_WAIT", 0.001)
    (tmp_path / "netrc").touch()
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return served.reset()


@pytest.fixture
def cache_apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DESCANT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    (tmp_path / "shards").mkdir()
    paths = []
    for k, size in enumerate(SIZES):
        members = [
            (f"{i:03}.{e}", f"{k}/{i}".encode() * (40 if e == "txt" else 1))
            for i in range(size)
            for e in ("txt", "cls")
        ]
        paths.append(write_tar(tmp_path / "shards" / f"{k}.tar", members))
    return paths


def put(store: Store, files: list[Path]) -> list[str]:
    return [store.put(path.name, path.read_bytes()) for path in files]


def read(stream: Stream, n: int, reader: int = 0, readers: int = 1, mark: Any = BEGINNING, epoch: int = 0) -> list[Any]:
    """Names, raw fields and marks; any fault of a shard fails."""

    def fail(place: str, why: str) -> None:
        raise ValueError(f"{place}: {why}")

    def seen(sample: Sample) -> tuple[Any, ...]:
        return sample.place.rpartition("/")[2], sample.name, sample.raw, sample.mark

    samples = stream.read(0, epoch, reader, readers, lambda raw: len(raw) == 2, fail, mark)
    try:
        return [seen(sample) for sample in islice(samples, n)]
    finally:
        samples.close()  # type: ignore[attr-defined]


def of(urls: list[str], **options: Any) -> Stream:
    return Stream(urls, **{"samples": 10, "buffer": 5, "attempts": 30, "timeout": 10, **options})


def line(store: Store, fault: Fault, url: str, attempts: int = 3, timeout: float = 5.0) -> str:
    store.fault = lambda method, path, at, number: fault
    with pytest.raises(StoreError) as caught:
        object = open_address(url, Remote(attempts, timeout))
        object.read()
    text = str(caught.value)
    assert "\n" not in text and len(text) < 160
    return text


# the same samples ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("readers", [1, 3, 6])
def test_samples_are_those_of_local_files_with_errors_on_the_way(store: Store, files: list[Path], readers: int) -> None:
    urls, n = put(store, files), sum(SIZES) // readers + 5
    for share in (0.0, 0.3):
        store.fault = some(share, seed=readers)
        store.injected.clear()
        for reader in range(readers):
            expected = read(of([str(path) for path in files]), n, reader, readers)
            assert read(of(urls), n, reader, readers) == expected and len(expected) == n
        assert bool(store.injected) == (share > 0)


def test_a_stream_of_a_store_resumes_within_a_shard(store: Store, files: list[Path]) -> None:
    urls = put(store, files)
    whole = read(of(urls), 60)
    assert whole == read(of([str(path) for path in files]), 60)
    store.fault = some(0.1)
    within = 0
    for k in (1, 7, 22, 23, 31, 47):
        mark = whole[k - 1][3]
        within += mark.taken > 0
        store.requests.clear()
        assert read(of(urls), 60 - k, mark=mark) == whole[k:]
        first = next(path for method, path, _ in store.requests if method == "GET")
        assert first.endswith(whole[k - 1 if mark.taken else k][0]), "the shard that it stands in, and none before"
    assert within >= 4


def test_a_request_goes_on_where_the_last_one_failed(store: Store) -> None:
    data = os.urandom(20 * BLOCK)
    url = store.put("a.tar", data)
    broken: list[int] = []

    def once(method: str, path: str, at: int, number: int) -> Fault:
        if method == "GET" and at >= 5 * BLOCK and not broken:
            broken.append(at)
            return "cut"
        return None

    store.fault = once
    object = open_address(url, Remote())
    assert object.read(100) + object.read() == data and object.read() == b""
    starts = [at for method, _, at in store.requests if method == "GET"]
    if store.ranges:
        assert len(broken) == 1 and starts.count(broken[0]) == 2 and len(starts) == len(set(starts)) + 1
        assert starts[:4] == [0, FIRST, 2 * FIRST, 4 * FIRST], "the first sample need not wait for a whole block"


def test_a_stall_is_broken_off_and_repeated(store: Store) -> None:
    data = os.urandom(5 * BLOCK)
    url, stalled = store.put("a.tar", data), list[int]()

    def once(method: str, path: str, at: int, number: int) -> Fault:
        if method == "GET" and not stalled:
            stalled.append(at)
            return "stall"  # for longer than a test may take
        return None

    store.fault, store.stall = once, 3600.0
    assert open_address(url, Remote(timeout=0.5)).read() == data
    assert [at for method, _, at in store.requests if method == "GET"][:2] == stalled * 2


def test_workers_and_the_process_that_forked_them_read_the_same(store: Store, files: list[Path]) -> None:
    def batches(urls: list[str], workers: int) -> list[Any]:
        fields = Fields(text=TextField("txt"))
        data = UserData(batch_size=8, num_workers=workers, stream=of(urls, samples=40), fields=fields)
        data.prepare_data()  # the forking process has asked the store
        return [(batch.inputs["text"].tolist(), batch.content_id.tolist()) for batch in data.train_dataloader()]

    urls = put(store, files)
    store.fault = some(0.05)
    local = [str(path) for path in files]
    assert batches(urls, 0) == batches(local, 0) and batches(urls, 2) == batches(local, 2)


# what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_the_connections_of_a_process_live_on_after_it_forked(store: Store) -> None:
    url = store.put("a.tar", b"x")
    remote = Remote(timeout=5)
    StoreObject(url, remote).close()
    if (child := os.fork()) == 0:
        StoreObject(url, remote).close()
        gc.collect()  # what the child dropped
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    store.requests.clear()
    StoreObject(url, remote).close()
    assert len(store.requests) == 1  # an answer that is not seen is asked for again


def test_what_a_store_answers_is_one_line(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    url = store.put("a.tar", os.urandom(3 * BLOCK))
    keys = "AWS_PROFILE" if store.scheme == "s3" else "~/.netrc"
    assert line(store, 403, url).startswith("status 403") and keys in line(store, 403, url)
    assert ", 1 attempt; credentials come from" in line(store, 403, url)
    assert "no such object, 1 attempt" in line(store, None, store.url("gone.tar"))
    store.requests.clear()
    assert "status 500" in (text := line(store, 500, url)) and ", 3 attempts in 0 s" in text
    err = capsys.readouterr().err
    assert f"warning: {url}: status 500" in err and "attempt 1 of 3; again in 0.0 s" in err
    assert "status 429" in (text := line(store, 429, url)) and "3 attempts" in text
    text = line(store, "cut", url)
    assert ("broke at byte" in text or "cut off by the store" in text) and "3 attempts" in text
    assert "cut off by the store: " in (text := line(store, "short", url)) and "3 attempts" in text
    store.stall = 1.0
    assert line(store, "stall", url, attempts=2, timeout=0.2).startswith("no answer within 0.2 s, 2 attempts")


def test_a_store_that_is_not_there_is_one_line(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    if store.scheme == "s3":
        pytest.skip("its address is read once")
    text = line(store, None, "http://127.0.0.1:9/a.tar", attempts=2)
    assert "ConnectionRefusedError" in text and "2 attempts" in text


def test_an_object_that_changes_is_refused(store: Store) -> None:
    url = store.put("a.tar", os.urandom(12 * BLOCK))
    object = open_address(url, Remote())
    object.read(10)
    store.put("a.tar", os.urandom(12 * BLOCK))
    with pytest.raises(StoreError, match="another object took its place while it was read, 1 attempt"):
        object.read()


def test_half_an_object_is_named_and_counts_as_damage(store: Store, files: list[Path]) -> None:
    urls = put(store, files)
    store.put("0.tar", files[0].read_bytes()[:20480])  # half of it was uploaded
    with pytest.raises(ValueError, match=r"0\.tar: cut off: 20,480 bytes"):
        read(of(urls), 60)
    store.put("0.tar", files[0].read_bytes())
    store.fault = lambda method, path, at, number: "short" if method == "GET" and path.endswith("0.tar") else None
    with pytest.raises(ValueError, match=r"0\.tar: cut off by the store: .* bytes from byte .*, 2 attempts"):
        read(of(urls, attempts=2), 60)


def test_the_first_object_is_asked_for_before_training(store: Store, files: list[Path]) -> None:
    urls = put(store, files)
    stream = of(urls, attempts=2)
    stream.require_whole()
    store.fault = lambda *_: 403
    with pytest.raises(ValueError, match=rf"^{urls[0]}: status 403.*, 1 attempt; credentials come from"):
        stream.require_whole()


# addresses and credentials ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://me:secret-word@x.org/a.tar", "https://x.org/a.tar has"),
        ("s3://AKID:secret-word@bucket/a.tar", "s3://bucket/a.tar has"),
        ("https://x.org/a.tar?X-Amz-Signature=secret-word", "https://x.org/a.tar has"),
        ("https://x.org/a.tar?v=1&sig=secret-word", "https://x.org/a.tar has"),
    ],
)
def test_addresses_hold_no_credentials(url: str, shown: str) -> None:
    with pytest.raises(ValueError, match="has a password or signature in its address") as caught:
        Stream(url, samples=1)
    assert shown in str(caught.value) and "secret-word" not in str(caught.value)
    assert Stream("https://x.org/a@b/a.tar?version=3", samples=1).urls == ["https://x.org/a@b/a.tar?version=3"]


@pytest.mark.parametrize(("url", "extra"), [("gs://b/{0..3}.tar", "gs"), ("s3://b/a.tar", "s3")])
def test_a_package_that_is_not_installed_is_named(url: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=rf"fs, which is not installed: pip install 'descant\[{extra}\]'"):
        Stream(url, samples=1)


def test_a_password_of_netrc_opens_and_is_written_nowhere(store: Store, tmp_path: Path) -> None:
    if store.scheme == "s3":
        pytest.skip("of http")
    url = store.put("a.tar", b"x" * 3000)
    store.password = "Basic bWU6c2VjcmV0LXdvcmQ="
    assert "status 401, 1 attempt; credentials come from ~/.netrc" in line(store, None, url)
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password secret-word\n")
    assert open_address(url, Remote()).read() == b"x" * 3000


# copies ----------------------------------------------------------------------------------------------------------


def copies() -> list[Path]:
    return sorted(path for path in (cache_folder() / "streams").glob("*.tar-*"))


@pytest.mark.usefixtures("cache_apart")
def test_shards_are_kept_and_not_fetched_again(store: Store, files: list[Path]) -> None:
    urls = put(store, files)
    stream = of(urls, cache_gb=1.0)
    expected = read(of([str(path) for path in files]), 47)
    store.gets()
    assert read(stream, 47) == expected and store.gets() > 0
    _settle()
    assert len(copies()) == 4 and {path.stat().st_mode & 0o077 for path in copies()} == {0}
    store.gets()
    assert read(stream, 47) == expected and store.gets() == 0
    changed = write_tar(files[0].parent / "new.tar", [("000.txt", b"new"), ("000.cls", b"1")]).read_bytes()
    store.put("1.tar", changed)
    assert "new" in {raw["txt"] for _, _, raw, _ in read(stream, 47)}, "of another tag"


def _settle(seconds: float = 5.0) -> None:
    """Threads that fetch end soon after their readers."""
    end = time.monotonic() + seconds
    while any(thread.name == "object-store" for thread in threading.enumerate()) and time.monotonic() < end:
        time.sleep(0.01)


@pytest.mark.usefixtures("cache_apart")
def test_a_damaged_copy_is_fetched_again(store: Store, files: list[Path]) -> None:
    url = store.put("0.tar", files[0].read_bytes())
    stream = of([url], cache_gb=1.0)
    expected = read(stream, 23)
    _settle()
    copy = copies()[0]
    data = bytearray(copy.read_bytes())
    data[4 * 512 : 5 * 512] = bytes(512)  # a header
    copy.write_bytes(data)
    with pytest.raises(ValueError, match=r"0\.tar: "):
        read(stream, 23)
    assert not copy.exists() and read(stream, 23) == expected
    _settle()
    copy.write_bytes(b"short")
    assert read(stream, 23) == expected


@pytest.mark.usefixtures("cache_apart")
def test_a_reader_that_stops_within_a_shard_leaves_nothing(store: Store, files: list[Path]) -> None:
    url = store.put("a.tar", b"".join(path.read_bytes() for path in files) + os.urandom(40 * BLOCK))
    object: Any = open_address(url, Remote(cache=1 << 30))
    object.read(100)
    assert [path.suffix for path in copies()] == [".part"]
    object.close()
    _settle()
    assert copies() == []


def cache(tmp_path: Path, limit: int) -> ShardCache:
    return ShardCache(limit, tmp_path / "kept")


def keep(cache: ShardCache, name: str, data: bytes) -> bool:
    writer = cache.reserve(name, len(data))
    if writer is None:
        return False
    writer.write(data)
    writer.commit()
    return True


def test_the_copies_that_were_used_longest_ago_make_room(tmp_path: Path) -> None:
    kept = cache(tmp_path, 1000)
    for k, name in enumerate("abc"):
        assert keep(kept, name, b"x" * 300)
        os.utime(tmp_path / "kept" / name, (k, k))
    assert not keep(kept, "a", b"x" * 300), "it is there"
    used = kept.open("a", 300)
    assert used is not None and used.read(300) == b"x" * 300
    used.close()
    assert keep(kept, "d", b"y" * 400)
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == [".lock", "a", "c", "d"]
    held = kept.open("c", 300), kept.open("a", 300), kept.open("d", 400)
    assert kept.reserve("e", 100) is None, "all of them are being read"
    assert held[0] is not None
    held[0].close()
    assert keep(kept, "e", b"z" * 100) and kept.open("c", 300) is None
    assert kept.reserve("f", 1001) is None


def test_what_is_being_written_counts_and_is_removed_when_its_process_was_killed(tmp_path: Path) -> None:
    kept = cache(tmp_path, 1000)
    ready, tell = os.pipe()
    child = os.fork()
    if not child:
        writer = kept.reserve("a", 900)
        os.write(tell, b"1" if writer is not None and writer.write(b"x" * 100) else b"0")
        time.sleep(60)
        os._exit(0)
    try:
        assert os.read(ready, 1) == b"1"
        assert kept.reserve("b", 200) is None and kept.reserve("a", 50) is None
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert keep(kept, "b", b"x" * 200)
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == [".lock", "b"]


@pytest.mark.usefixtures("cache_apart")
def test_a_full_disk_costs_the_copy_alone(store: Store, files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    urls = put(store, files)
    write, calls = os.write, []

    def full(handle: int, data: Any) -> int:
        if threading.current_thread().name != "object-store":
            return write(handle, data)
        calls.append(handle)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    assert read(of(urls, cache_gb=1.0), 47) == read(of([str(path) for path in files]), 47)
    _settle()
    assert copies() == [] and len(calls) == 4


def _hammer(folder: Path, number: int) -> None:
    kept = ShardCache(5000, folder)
    for k in range(150):
        name, size = f"{(k * 7 + number) % 11}", 400 + 100 * ((k * 7 + number) % 11)
        copy = kept.open(name, size)
        if copy is not None:
            assert copy.read() == name.encode()[:1] * size
            copy.close()
        else:
            keep(kept, name, name.encode()[:1] * size)
        total = 0
        with kept.locking():
            total = sum(path.stat().st_size for path in folder.iterdir() if path.exists())
        assert total <= 5000, total
    os._exit(0)


def test_processes_share_the_bound(tmp_path: Path) -> None:
    children = []
    for number in range(4):
        child = os.fork()
        if not child:
            try:
                _hammer(tmp_path / "kept", number)
            finally:
                os._exit(1)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * 4
    assert not list((tmp_path / "kept").glob("*.part"))


# runs ------------------------------------------------------------------------------------------------------------


def fit(cli: Callable[..., Result], url: str, name: str, *args: str) -> Result:
    stream = ("--data.stream.urls", url, "--data.stream.samples", "64", "--data.stream.attempts", "2", *args)
    data = ("--data", "stream", *stream, "--data.batch_size", "8", "--data.fields.image.size", "24")
    few = ("--trainer.max_epochs", "1", "--name", name)
    return cli("fit", "--config", "contrastive/own", "--config", "on/cpu", *data, *few)


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_run_reads_from_a_store_and_no_credential_is_in_its_folder(
    store: Store, cli: Callable[..., Result], tmp_path: Path, workers: str
) -> None:
    if workers == "0" and store.scheme == "http" and not store.ranges:
        pytest.skip("as with ranges")
    members = [(f"{i}.{e}", d) for i in range(30) for e, d in (("jpg", jpeg("red")), ("txt", b"a red square"))]
    url = store.put("a.tar", write_tar(tmp_path / "a.tar", members).read_bytes())
    secrets = [KEY, SECRET]
    if store.scheme == "http":
        (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password secret-word\n")
        store.password, secrets = "Basic bWU6c2VjcmV0LXdvcmQ=", ["secret-word", "bWU6c2VjcmV0LXdvcmQ"]
    workers_are = ("--data.num_workers", workers)
    done = fit(cli, url, "read", *workers_are)
    assert done.rc == 0, done.err
    store.fault = lambda method, path, at, number: 403
    refused = fit(cli, url, "refused", *workers_are)
    assert refused.refusal.startswith(f"{url}: status 403") and ", 1 attempt; credentials come from" in refused.refusal
    # the store goes down after the run has begun
    store.fault = lambda method, path, at, number: 500 if method == "GET" else None
    down = fit(cli, url, "down", *workers_are)
    assert down.rc == 75 and re.search(rf"{re.escape(url)}: status 500.*, 2 attempts in 0 s", down.err.splitlines()[-1])
    printed = "".join(result.out + result.err for result in (done, refused, down))
    written = [path.read_bytes() for path in (tmp_path / "runs").rglob("*") if path.is_file()]
    assert len(written) > 5
    for secret in secrets:
        assert secret not in printed and not any(secret.encode() in content for content in written)


@pytest.mark.parametrize("options", [{"attempts": 0}, {"timeout": 0.0}, {"cache_gb": -1.0}])
def test_numbers_out_of_range_are_one_line(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"attempts .* >= 1, timeout .* > 0 and cache_gb .* >= 0 are needed"):
        of(["http://x.org/a.tar"], **options)


def test_an_object_that_is_only_asked_for_starts_no_thread(store: Store) -> None:
    StoreObject(store.put("a.tar", b"x"), Remote()).close()
    assert not [thread for thread in threading.enumerate() if thread.name == "object-store"]
