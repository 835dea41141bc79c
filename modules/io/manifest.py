"""Files that are written whole or not at all, and beside each a manifest that says what was written.

A write is: temporary file, fsync, ``NAME.manifest``, rename. Killed anywhere in it, a process leaves a name as it was
or as it was to be, and valid: while a file is replaced its manifest tells of both. A manifest comes before its file
and goes after it, so a file without one was not written here.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import socket
import stat
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from io import BufferedReader, BufferedWriter
from pathlib import Path
from typing import Any

SUFFIX = ".manifest"
#: The fault of a file that was not written here.
NONE = "no manifest"
#: In the environment: seconds added to each stage of a write, for tests that kill a process inside one.
SLOW = "DESCANT_SLOW_SAVE"
#: Bytes of a manifest that are read.
_MOST = 10_000_000
_HOST = re.sub(r"[^A-Za-z0-9-]", "-", socket.gethostname())
_SCRATCH = re.compile(r"\.(?P<name>.+)\.(?P<host>[A-Za-z0-9-]*)\.(?P<pid>\d+)\.tmp")
_writing: set[Path] = set()

Facts = dict[str, Any]


def write(path: Path, fill: Callable[[Any], object], facts: Mapping[str, object] | None = None) -> None:
    """Let ``fill(stream)`` write ``path``, and put the ``facts`` (JSON) into its manifest.

    Raises:
        OSError: one line with the path and the free space. After any error the file that was there is still there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    told = _told(path)
    old = [] if isinstance(told, str) else told  # of two accounts that a killed write left, one is true: keep both
    try:
        with _replacing(path) as stream:
            fill(stream)
            stage("filled")
            new = stream.synced() | {"facts": dict(facts or {})}
            stage("synced")
            _note(path, new, *old)
            stage("noted")
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):  # torch.save buries it under one of its own
            cause = cause.__context__
        if cause is None:
            raise
        free = shutil.disk_usage(path.parent).free / 1e9
        line = OSError(f"{path}: not written: {cause.strerror or cause} ({free:,.1f} GB free there)")
        line.errno = cause.errno
        raise line from error
    stage("renamed")
    if old:
        with contextlib.suppress(OSError):  # the file is there and valid: an account too many does no harm
            _note(path, new)


def confirm(path: Path, facts: Mapping[str, object] | None = None) -> str:
    """Give a file that something else has written its manifest, and return its SHA-256."""
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
        size = os.fstat(stream.fileno()).st_size
    _note(path, {"sha256": digest, "size": size, "facts": dict(facts or {})})
    return digest


def stage(name: str) -> None:
    """A write is ``filled``, ``synced``, ``noted`` or ``renamed``: here tests slow it down, or end it."""
    time.sleep(float(os.environ.get(SLOW) or 0))


def remove(path: Path) -> None:
    """Remove a file, then its manifest; what is not there is no error."""
    path.unlink(missing_ok=True)
    _manifest(path).unlink(missing_ok=True)


def sweep(folder: Path) -> None:
    """Remove what killed writes left in ``folder``, and nothing that a process still writes."""
    begun = set()
    for path in folder.glob(".*.tmp"):
        match = _SCRATCH.fullmatch(path.name)
        if match and _alive(path, match["host"], int(match["pid"])):
            begun.add(match["name"])
        elif match:
            path.unlink(missing_ok=True)
    for manifest in folder.glob(f"*{SUFFIX}"):
        if manifest.stem not in begun and not os.path.lexists(manifest.with_suffix("")):
            manifest.unlink(missing_ok=True)


def confirmed(path: Path) -> tuple[BufferedReader, Facts] | str:
    """The file, open, each byte as it was written, and its facts; or why not. Of a link: what it points to."""
    found = _confirmed(path)
    return found if isinstance(found, str) else (found[0], found[1]["facts"])


def account(path: Path) -> Facts | str:
    """``sha256``, ``size`` and ``facts`` of a file of which each byte is as it was written; or why not."""
    found = _confirmed(path)
    if isinstance(found, str):
        return found
    found[0].close()
    return found[1]


def _confirmed(path: Path) -> tuple[BufferedReader, Facts] | str:
    before, why = None, "missing"
    while (told := _told(path)) != before:  # what was replaced between two looks is looked at again
        before = told
        try:
            stream = _regular(path)
            found = _matching(stream, told)
            if not isinstance(found, str):
                return stream, found
            stream.close()
            why = found
        except OSError as error:
            why = "missing" if isinstance(error, FileNotFoundError) else str(error.strerror)
    return why


def fault(path: Path) -> str | None:
    """Why a file is not valid, in a few words, or None if it is."""
    found = account(path)
    return found if isinstance(found, str) else None


def fault_of_size(path: Path) -> str | None:
    """The same without a look at the bytes: whether there is a manifest, and of a file of this size."""
    told = _told(path)
    if isinstance(told, str):
        return told
    try:
        size = path.stat().st_size
    except OSError as error:
        return "missing" if isinstance(error, FileNotFoundError) else str(error.strerror)
    return _size_fault(size, told)


def known(path: Path) -> Facts:
    """The facts of what was written last, without a look at the file itself; empty if there are none."""
    told = _told(path)
    return {} if isinstance(told, str) else dict(told[0]["facts"])


def newest(folder: Path, pattern: str) -> tuple[Path | None, list[tuple[Path, str]]]:
    """The valid file with the highest step (the last number) in its name, and what was skipped and why."""
    names = {path.name.removesuffix(SUFFIX) for end in ("", SUFFIX) for path in folder.glob(pattern + end)}
    steps = {name: int(numbers[-1]) for name in names if (numbers := re.findall(r"\d+", name))}
    return first(folder / name for name in sorted(steps, key=lambda name: (steps[name], name), reverse=True))


def first(paths: Iterable[Path]) -> tuple[Path | None, list[tuple[Path, str]]]:
    """The first valid one of ``paths``, and those before it with their faults."""
    skipped: list[tuple[Path, str]] = []
    for path in paths:
        if (why := fault(path)) is None:
            return path, skipped
        skipped.append((path, why))
    return None, skipped


class _Stream:
    """Digests what is written through it."""

    def __init__(self, file: BufferedWriter) -> None:
        self.file, self.flush = file, file.flush
        self.digest, self.size = hashlib.sha256(), 0

    def write(self, data: Any) -> int:
        self.digest.update(data)
        self.size += (count := self.file.write(data))
        return count

    def synced(self) -> Facts:
        self.file.flush()
        os.fsync(self.file.fileno())
        return {"sha256": self.digest.hexdigest(), "size": self.size}


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[_Stream]:
    """A stream to a temporary file that takes the place of ``path`` at the end, or goes after an error."""
    scratch = path.with_name(f".{path.name}.{_HOST}.{os.getpid()}.tmp")
    _writing.add(scratch)
    try:
        with scratch.open("wb") as file:
            yield _Stream(file)
        os.replace(scratch, path)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise
    finally:
        _writing.discard(scratch)


def _alive(path: Path, host: str, pid: int) -> bool:
    """Whether a process may still be writing this temporary file."""
    if host != _HOST:  # its processes cannot be asked, but one that writes does not pause for an hour
        return path.exists() and time.time() - path.stat().st_mtime < 3600
    if pid == os.getpid():
        return path in _writing  # else it is of an earlier process with this number
    try:
        os.kill(pid, 0)
    except OSError as error:
        return isinstance(error, PermissionError)
    return True


def _regular(path: Path) -> BufferedReader:
    """A file, open to be read; a pipe or a device, whose reader may wait for ever, is an OSError."""
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, os.strerror(errno.EISDIR) if stat.S_ISDIR(mode) else "not a regular file")
    return os.fdopen(descriptor, "rb")


def _manifest(path: Path) -> Path:
    return path.with_name(path.name + SUFFIX)


def _note(path: Path, *told: Facts) -> None:
    with _replacing(_manifest(path)) as stream:
        stream.write(json.dumps([each | {"crc32": _crc(each)} for each in told]).encode())
        stream.synced()


def _crc(told: Facts) -> int:
    """Of one account: its facts say which file is the newest, so a damaged one would choose another."""
    content = {key: told[key] for key in ("sha256", "size", "facts")}
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def _told(path: Path) -> list[Facts] | str:
    """What the manifest tells, newest first, or what is wrong with it."""
    try:
        with _regular(_manifest(path.resolve())) as stream:
            found = json.loads(stream.read(_MOST))
        told = [{"sha256": str(f["sha256"]), "size": int(f["size"]), "facts": dict(f["facts"])} for f in found]
        for each, read in zip(told, found, strict=True):  # earlier versions wrote no checksum
            if read.keys() - {*each, "crc32"} or read.get("crc32", _crc(each)) != _crc(each):
                raise ValueError("changed")
    except FileNotFoundError:
        return NONE
    except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError):
        told = []
    return told or "its manifest is not readable"


def _matching(stream: BufferedReader, told: list[Facts] | str) -> Facts | str:
    """The account of the content that the stream has, or why it has none of those told of."""
    if isinstance(told, str):
        return told
    size = os.fstat(stream.fileno()).st_size
    if (why := _size_fault(size, told)) is not None:
        return why
    digest = hashlib.file_digest(stream, "sha256").hexdigest()
    stream.seek(0)
    return next((each for each in told if each["sha256"] == digest), "not the bytes that were written")


def _size_fault(size: int, told: list[Facts]) -> str | None:
    sizes = [written["size"] for written in told]
    if size in sizes:
        return None
    return f"{size:,} of {sizes[0]:,} bytes" if size < sizes[0] else f"{size:,} bytes, written were {sizes[0]:,}"
