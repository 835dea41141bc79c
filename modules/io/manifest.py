"""Atomic file writes; a manifest beside each file holds SHA-256, size and facts of the content.

A write is: temporary file, fsync, ``NAME.manifest``, rename. A process killed at any point leaves the old file or the
new one, and either is valid: while a file is replaced, its manifest lists both. A manifest is written before its file
and removed after it, so a file without a manifest was not written by this module.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from io import BufferedReader, BufferedWriter
from pathlib import Path
from typing import Any

from descant.modules.io.files import open_regular, real_path, sha256_of
from descant.modules.io.part_files import (
    CHANGED,
    PARTS,
    fault_of_parts,
    missing_fault,
    parts_of,
    remove_parts,
    size_fault,
)

SUFFIX = ".manifest"
#: The fault of a file that this module did not write.
NONE = "no manifest"
#: Environment variable: seconds to wait at each stage of a write, for tests that kill a process inside one.
SLOW = "DESCANT_SLOW_SAVE"
#: The most bytes of a manifest that are read.
_LIMIT = 10_000_000
_HOST = re.sub(r"[^A-Za-z0-9-]", "-", socket.gethostname())
_SCRATCH = re.compile(r"\.(?P<name>.+)\.(?P<host>[A-Za-z0-9-]*)\.(?P<pid>\d+)\.tmp")
_writing: set[Path] = set()
_PARTS = re.compile(rf"(?P<name>.+){re.escape(PARTS)}(?P<host>[A-Za-z0-9-]*)\.(?P<pid>\d+)\.[0-9a-f]+")

Facts = dict[str, Any]


def write(path: Path, fill: Callable[[Any], object], facts: Mapping[str, object] | None = None) -> None:
    """Write ``path`` atomically by ``fill(stream)``, with the ``facts`` (JSON) in its manifest.

    Raises:
        OSError: one line with the path and the free space. After any error the previous file is unchanged.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    entries = _entries(path)
    old = [] if isinstance(entries, str) else entries  # a killed write may have left two entries, one of them true
    try:
        with _replacing(path) as stream:
            fill(stream)
            stage("filled")
            new = stream.sync() | {"facts": dict(facts or {})}
            stage("synced")
            _note(path, new, *old)
            stage("noted")
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):  # torch.save wraps an OSError
            cause = cause.__context__
        if cause is None:
            raise
        free = shutil.disk_usage(path.parent).free / 1e9
        line = OSError(f"{path}: not written: {cause.strerror or cause} ({free:,.1f} GB free there)")
        line.errno = cause.errno
        raise line from error
    stage("renamed")
    if old:
        with contextlib.suppress(OSError):  # the file is valid anyway: a superfluous entry does no harm
            _note(path, new)


def confirm(path: Path, facts: Mapping[str, object] | None = None) -> str:
    """Write the manifest of a file that another writer has made, and return its SHA-256."""
    digest, size = sha256_of(path), path.stat().st_size
    _note(path, {"sha256": digest, "size": size, "facts": dict(facts or {})})
    return digest


def stage(name: str) -> None:
    """Mark that a write was ``filled``, ``synced``, ``noted`` or ``renamed``: a hook for tests to delay or end it."""
    time.sleep(float(os.environ.get(SLOW) or 0))


def remove(path: Path) -> None:
    """Remove a file, then its manifest and parts; none has to exist."""
    path.unlink(missing_ok=True)
    _manifest(path).unlink(missing_ok=True)
    remove_parts(path)


def parts_folder(path: Path) -> Path:
    """Make a new folder for the parts of ``path``, which belongs to this process until :func:`settle_parts`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = path.with_name(f"{path.name}{PARTS}{_HOST}.{os.getpid()}.{secrets.token_hex(4)}")
    folder.mkdir()
    _writing.add(folder)
    return folder


def settle_parts(path: Path, folder: Path) -> None:
    """Remove all parts of ``path`` except those in ``folder``, which its manifest lists and protects from now on."""
    remove_parts(path, folder)
    _writing.discard(folder)


def sweep(folder: Path) -> None:
    """Remove temporary files, parts and manifests that killed writes left; those of running writes stay."""
    begun = set()
    for path in folder.glob(".*.tmp"):
        match = _SCRATCH.fullmatch(path.name)
        if match and _alive(path, match["host"], int(match["pid"])):
            begun.add(match["name"])
        elif match:
            path.unlink(missing_ok=True)
    for place in folder.glob(f"*{PARTS}*"):
        match = _PARTS.fullmatch(place.name)
        if match and not _alive(place, match["host"], int(match["pid"])) and not _in_use(place, folder / match["name"]):
            shutil.rmtree(place, ignore_errors=True)
    for manifest in folder.glob(f"*{SUFFIX}"):
        if manifest.stem not in begun and not os.path.lexists(manifest.with_suffix("")):
            manifest.unlink(missing_ok=True)


def _in_use(parts: Path, path: Path) -> bool:
    """Whether ``path`` may still use this folder of parts: its manifest lists one of them, or cannot be read."""
    entries = _entries(path)
    if isinstance(entries, str) or not path.exists():
        return path.exists()
    return any(str(part["name"]).startswith(f"{parts.name}/") for entry in entries for part in parts_of(entry))


def open_verified(path: Path) -> tuple[BufferedReader, Facts] | str:
    """Return the open file and its facts if every byte is as written, otherwise the fault. Links are followed."""
    result = _open_file_verified(path)
    return result if isinstance(result, str) else (result[0], result[1]["facts"])


def account(path: Path) -> Facts | str:
    """Return ``sha256``, ``size`` and ``facts`` of a file if every byte is as written, otherwise the fault."""
    result = _open_file_verified(path)
    if isinstance(result, str):
        return result
    result[0].close()
    return result[1]


def _open_file_verified(path: Path) -> tuple[BufferedReader, Facts] | str:
    before, why = None, "missing"
    while (entries := _entries(path)) != before:  # replaced between the two reads: try again
        before = entries
        try:
            stream = open_regular(path)
            match = _matching(stream, entries)
            if not isinstance(match, str):
                fault = fault_of_parts(path, match)
                if fault is None:
                    return stream, match
                match = fault
            stream.close()
            why = match
        except OSError as error:
            why = missing_fault(error)
    return why


def fault(path: Path) -> str | None:
    """Return in a few words why a file is not valid; None if it is valid."""
    entry = account(path)
    return entry if isinstance(entry, str) else None


def fault_of_share(path: Path, rank: int, world: int) -> str | None:
    """Return the :func:`fault` of a file of several parts. Each rank reads only its share, so all ranks must ask."""
    entries = _entries(path)
    try:
        with open_regular(path) as stream:
            match = _matching(stream, entries)
    except OSError as error:
        return missing_fault(error)
    return match if isinstance(match, str) else fault_of_parts(path, match, share=(rank, world))


def fault_of_size(path: Path) -> str | None:
    """Return the :func:`fault` that shows without reading the file: no manifest, or another size than it lists."""
    entries = _entries(path)
    if isinstance(entries, str):
        return entries
    try:
        size = path.stat().st_size
    except OSError as error:
        return missing_fault(error)
    if (why := size_fault(size, entries)) is not None:
        return why
    faults = [fault_of_parts(path, entry, read=False) for entry in entries if entry["size"] == size]
    return None if None in faults else faults[0]


def read_entry(path: Path) -> Facts | None:
    """Return ``sha256``, ``size`` and ``facts`` from the manifest alone; None without one, or if the size differs."""
    entries = _entries(path)
    if isinstance(entries, str) or fault_of_size(path) is not None:
        return None
    return next(entry for entry in entries if entry["size"] == path.stat().st_size)


def last_facts(path: Path) -> Facts:
    """Return the facts of the last write, from the manifest alone; empty if there are none."""
    entries = _entries(path)
    return {} if isinstance(entries, str) else dict(entries[0]["facts"])


def newest(folder: Path, pattern: str) -> tuple[Path | None, list[tuple[Path, str]]]:
    """Return the valid file with the highest step (the last number) in its name, and newer ones with their faults."""
    names = {path.name.removesuffix(SUFFIX) for end in ("", SUFFIX) for path in folder.glob(pattern + end)}
    steps = {name: int(numbers[-1]) for name in names if (numbers := re.findall(r"\d+", name))}
    return first(folder / name for name in sorted(steps, key=lambda name: (steps[name], name), reverse=True))


def first(paths: Iterable[Path]) -> tuple[Path | None, list[tuple[Path, str]]]:
    """Return the first valid file of ``paths``, and those before it with their faults."""
    skipped: list[tuple[Path, str]] = []
    for path in paths:
        if (why := fault(path)) is None:
            return path, skipped
        skipped.append((path, why))
    return None, skipped


class _Stream:
    """Stream that hashes the bytes written through it."""

    def __init__(self, file: BufferedWriter) -> None:
        self.file, self.flush = file, file.flush
        self.digest, self.size = hashlib.sha256(), 0

    def write(self, data: Any) -> int:
        self.digest.update(data)
        self.size += (count := self.file.write(data))
        return count

    def sync(self) -> Facts:
        self.file.flush()
        os.fsync(self.file.fileno())
        return {"sha256": self.digest.hexdigest(), "size": self.size}


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[_Stream]:
    """Open a stream to a temporary file that replaces ``path`` at the end, or is removed after an error."""
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
    if host != _HOST:  # its processes cannot be checked, but a running write does not pause for an hour
        return path.exists() and time.time() - path.stat().st_mtime < 3600
    if pid == os.getpid():
        return path in _writing  # otherwise it is of an earlier process with this pid
    try:
        os.kill(pid, 0)
    except OSError as error:
        return isinstance(error, PermissionError)
    return True


def _manifest(path: Path) -> Path:
    return path.with_name(path.name + SUFFIX)


def _note(path: Path, *entries: Facts) -> None:
    with _replacing(_manifest(path)) as stream:
        stream.write(json.dumps([entry | {"crc32": _crc(entry)} for entry in entries]).encode())
        stream.sync()


def _crc(entry: Facts) -> int:
    """Compute an entry's checksum: its facts decide which file is the newest, so damage would select another."""
    content = {key: entry[key] for key in ("sha256", "size", "facts")}
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def _entries(path: Path) -> list[Facts] | str:
    """Return the entries of a file's manifest, newest first, or the fault of the manifest."""
    try:
        with open_regular(_manifest(real_path(path))) as stream:
            content = json.loads(stream.read(_LIMIT))
        entries = [{"sha256": str(e["sha256"]), "size": int(e["size"]), "facts": dict(e["facts"])} for e in content]
        for entry, read in zip(entries, content, strict=True):  # earlier versions wrote no checksum
            if read.keys() - {*entry, "crc32"} or read.get("crc32", _crc(entry)) != _crc(entry):
                raise ValueError("changed")
    except FileNotFoundError:
        return NONE
    except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError):
        entries = []
    return entries or "its manifest is not readable"


def _matching(stream: BufferedReader, entries: list[Facts] | str) -> Facts | str:
    """Return the entry that the stream's content matches, or why it matches none."""
    if isinstance(entries, str):
        return entries
    size = os.fstat(stream.fileno()).st_size
    if (why := size_fault(size, entries)) is not None:
        return why
    digest = hashlib.file_digest(stream, "sha256").hexdigest()
    stream.seek(0)
    return next((entry for entry in entries if entry["sha256"] == digest), CHANGED)
