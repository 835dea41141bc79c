"""Atomic writes: kills, truncation, bit flips, full disks."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from descant.modules.io import manifest
from descant.modules.io.manifest import SUFFIX, fault, last_facts, newest, open_verified, remove, sweep, write

STAGES = ("filled", "synced", "noted", "renamed")


def put(path: Path, content: bytes, **facts: object) -> Path:
    write(path, lambda stream: stream.write(content), facts)
    return path


def content_of(path: Path) -> bytes:
    found = open_verified(path)
    assert not isinstance(found, str), found
    with found[0] as stream:
        return stream.read()


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.fixture
def three(tmp_path: Path) -> list[Path]:
    """Steps 9, 10 and 110, whose names do not sort like their numbers."""
    return [put(tmp_path / f"step-{n}.ckpt", bytes([n]) * 4096, step=n) for n in (9, 10, 110)]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:1203])


def longer(path: Path) -> None:
    with path.open("ab") as stream:
        stream.write(b"x")


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[2000] ^= 1
    path.write_bytes(content)


def half(path: Path) -> None:
    """As a crash of a whole machine leaves a name whose manifest got to the disk first."""
    path.unlink()


def no_manifest(path: Path) -> None:
    path.with_name(path.name + SUFFIX).unlink()


def torn_manifest(path: Path) -> None:
    path.with_name(path.name + SUFFIX).write_text('[{"sha256": "ab')


def empty_manifest(path: Path) -> None:
    path.with_name(path.name + SUFFIX).write_text("[]")


DAMAGE: list[tuple[Callable[[Path], None], str]] = [
    (cut, "1,203 of 4,096 bytes"),
    (longer, "4,097 bytes, and 4,096 were written"),
    (flip, "not the bytes that were written"),
    (half, "missing"),
    (no_manifest, "no manifest"),
    (torn_manifest, "its manifest is not readable"),
    (empty_manifest, "its manifest is not readable"),
]


def test_written_files_are_confirmed_with_their_facts(tmp_path: Path) -> None:
    path = put(tmp_path / "new" / "folder" / "a.ckpt", b"abc", step=3)
    found = open_verified(path)
    assert not isinstance(found, str) and found[0].read() == b"abc" and found[1] == {"step": 3}
    assert last_facts(path) == {"step": 3} and last_facts(tmp_path / "none") == {}
    assert names(path.parent) == {"a.ckpt", f"a.ckpt{SUFFIX}"}
    remove(path)
    remove(path)
    assert names(path.parent) == set()


def test_the_newest_is_by_number(three: list[Path], tmp_path: Path) -> None:
    (tmp_path / "step-none.ckpt").write_bytes(b"")  # no step, no choice
    assert newest(tmp_path, "step-*.ckpt") == (three[2], [])
    assert newest(tmp_path / "absent", "*.ckpt") == (None, [])


@pytest.mark.parametrize(("damage", "why"), DAMAGE, ids=[damage.__name__ for damage, _ in DAMAGE])
def test_a_damaged_one_is_skipped_and_says_why(
    three: list[Path], tmp_path: Path, damage: Callable[[Path], None], why: str
) -> None:
    damage(three[2])
    assert fault(three[2]) == why and fault(three[1]) is None
    assert newest(tmp_path, "step-*.ckpt") == (three[1], [(three[2], why)])
    damage(three[1])
    damage(three[0])
    assert newest(tmp_path, "step-*.ckpt") == (None, [(path, why) for path in reversed(three)])


def test_every_single_bit_counts(tmp_path: Path) -> None:
    path = put(tmp_path / "a", b"0123456789abcdef")
    whole = path.read_bytes()
    for bit in range(8 * len(whole)):
        path.write_bytes(bytes(byte ^ (1 << bit % 8) if n == bit // 8 else byte for n, byte in enumerate(whole)))
        assert fault(path) is not None, bit


def test_links_are_followed(three: list[Path], tmp_path: Path) -> None:
    link = tmp_path / "last.ckpt"
    link.symlink_to(three[2].name)
    assert fault(link) is None and content_of(link) == bytes([110]) * 4096 and last_facts(link) == {"step": 110}
    put(link, b"a file of its own")  # takes the link's place, not its target's
    assert not link.is_symlink() and content_of(link) == b"a file of its own" and fault(three[2]) is None
    remove(three[2])
    link.unlink()
    link.symlink_to(three[2].name)
    assert fault(link) == "missing"


# killed -----------------------------------------------------------------------------------------------------------


def killed(path: Path, content: str, stage: str) -> None:
    """A process writes, and SIGKILL meets it in this stage."""
    child = os.fork()
    if child == 0:
        manifest.stage = lambda name: os.kill(os.getpid(), signal.SIGKILL) if name == stage else None
        put(path, content.encode() * 1000, step=2)
        os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL


@pytest.mark.parametrize("stage", STAGES)
def test_kill_while_writing_a_new_file(tmp_path: Path, stage: str) -> None:
    old, new = put(tmp_path / "step-1.ckpt", b"old"), tmp_path / "step-2.ckpt"
    killed(new, "b", stage)
    found, skipped = newest(tmp_path, "step-*.ckpt")
    assert found == (new if stage == "renamed" else old)
    assert content_of(found) == (b"b" * 1000 if stage == "renamed" else b"old")
    assert skipped == ([(new, "missing")] if stage == "noted" else [])
    sweep(tmp_path)
    assert names(tmp_path) == {each for file in {old, found} for each in (file.name, file.name + SUFFIX)}
    assert newest(tmp_path, "step-*.ckpt") == (found, [])


@pytest.mark.parametrize("second", STAGES)
@pytest.mark.parametrize("stage", STAGES)
def test_two_kills_while_replacing_a_file(tmp_path: Path, stage: str, second: str) -> None:
    path = put(tmp_path / "last.ckpt", b"a" * 1000)  # each of one size: only digests tell them apart
    expected = b"a" * 1000
    for content, at in (("b", stage), ("c", second)):
        killed(path, content, at)
        expected = content.encode() * 1000 if at == "renamed" else expected
        assert content_of(path) == expected
    sweep(tmp_path)
    assert names(tmp_path) == {"last.ckpt", f"last.ckpt{SUFFIX}"}
    put(path, b"d" * 1000)
    assert content_of(path) == b"d" * 1000
    path.write_bytes(b"a" * 1000)
    assert fault(path) == "not the bytes that were written"  # earlier contents are forgotten


def test_kill_at_random_moments(tmp_path: Path) -> None:
    """A process that writes the same two names for ever, and a kill wherever it is."""
    code = (
        "import itertools, sys; from pathlib import Path; from descant.modules.io import manifest\n"
        "for n in itertools.count():\n"
        "    for name in ('a', 'b'):\n"
        "        fill = lambda stream: [stream.write(bytes([n % 256]) * 50_000) for _ in range(4)]\n"
        "        manifest.write(Path(sys.argv[1], name), fill)\n"
        "        print(n, flush=True)\n"
    )
    for kill in range(12):
        process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline(), process.stdout.readline()
        threading.Event().wait(0.003 * kill)
        process.kill()
        process.communicate()
        for name in ("a", "b"):
            content = content_of(tmp_path / name)
            assert len(content) == 200_000 and len(set(content)) == 1
    sweep(tmp_path)
    assert names(tmp_path) == {"a", "b", f"a{SUFFIX}", f"b{SUFFIX}"}


def test_a_reader_never_sees_a_partial_write(tmp_path: Path) -> None:
    path, end, faults = put(tmp_path / "a", b"0" * 1000), threading.Event(), []

    def read() -> None:
        while not end.is_set():
            faults.append(fault(path))

    reader = threading.Thread(target=read)
    reader.start()
    for n in range(60):
        put(path, bytes([n]) * 1000)
    end.set()
    reader.join()
    assert len(faults) > 20 and set(faults) == {None}


def test_sweep_keeps_files_of_running_writes(tmp_path: Path) -> None:
    seen: list[set[str]] = []

    def fill(stream: Any) -> None:
        sweep(tmp_path)
        seen.append(names(tmp_path))

    sleeper = subprocess.Popen(["sleep", "60"])
    dead = subprocess.Popen(["true"])
    dead.wait()
    host = manifest._HOST
    stay = {f".x.ckpt.{host}.{sleeper.pid}.tmp", ".y.ckpt.elsewhere.1.tmp", "x.ckpt.manifest", "notes.tmp", ".z.tmp"}
    go = {
        f".x.ckpt.{host}.{dead.pid}.tmp",
        f".u.{host}.{os.getpid()}.tmp",
        ".old.elsewhere.1.tmp",
        "gone.ckpt.manifest",
    }
    for name in stay | go:
        (tmp_path / name).touch()
    os.utime(tmp_path / ".old.elsewhere.1.tmp", (0, 0))
    try:
        write(tmp_path / "a.ckpt", fill)
    finally:
        sleeper.kill()
        sleeper.wait()
    assert seen == [stay | {f".a.ckpt.{host}.{os.getpid()}.tmp"}]
    assert names(tmp_path) == stay | {"a.ckpt", "a.ckpt.manifest"}


# errors -----------------------------------------------------------------------------------------------------------


def test_no_space_leaves_the_old_file(tmp_path: Path) -> None:
    path = put(tmp_path / "last.ckpt", b"old", step=1)

    def fill(stream: Any) -> None:
        stream.write(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError, match=r"last\.ckpt: not written: No space left on device \([0-9.,]+ GB free") as error:
        write(path, fill)
    assert error.value.errno == errno.ENOSPC and "\n" not in str(error.value)
    assert content_of(path) == b"old" and last_facts(path) == {"step": 1}
    assert names(tmp_path) == {"last.ckpt", f"last.ckpt{SUFFIX}"}


@pytest.mark.parametrize("stage", STAGES[:-1])
@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), KeyError("state"), KeyboardInterrupt()])
def test_an_error_anywhere_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, error: BaseException
) -> None:
    path = put(tmp_path / "last.ckpt", b"old")

    def fail(name: str) -> None:
        if name == stage:
            raise error

    monkeypatch.setattr(manifest, "stage", fail)
    with pytest.raises(type(error)):
        put(path, b"new")
    assert content_of(path) == b"old" and names(tmp_path) == {"last.ckpt", f"last.ckpt{SUFFIX}"}
    monkeypatch.undo()
    put(path, b"new")
    assert content_of(path) == b"new"


def test_a_limit_of_the_system(tmp_path: Path) -> None:
    """The kernel itself stops the write, in the middle of a file or in its manifest."""
    path = put(tmp_path / "last.ckpt", b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (100_000, 50):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            with pytest.raises(OSError, match="not written: File too large"):
                put(path, b"x" * (1_000_000 if limit > 50 else 10))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert content_of(path) == b"old" and names(tmp_path) == {"last.ckpt", f"last.ckpt{SUFFIX}"}


def test_a_pipe_is_refused_without_waiting(tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"
    manifest.write(path, lambda stream: stream.write(b"x"))
    path.unlink()
    os.mkfifo(path)
    assert manifest.fault(path) == "not a regular file"
    other = tmp_path / "y.ckpt"
    other.write_bytes(b"y")
    os.mkfifo(tmp_path / "y.ckpt.manifest")
    assert manifest.fault(other) == "its manifest is not readable"


@pytest.mark.parametrize("text", ["1e999", "-1e999", "[" * 100_000, '[{"sha256": 1, "size": 1e999, "facts": {}}]'])
def test_an_unreadable_manifest_is_a_fault(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.ckpt").write_bytes(b"x")
    (tmp_path / "x.ckpt.manifest").write_text(text)
    assert manifest.fault(tmp_path / "x.ckpt") == "its manifest is not readable"
