"""One process writes a run's folder: a lock that the system takes back when its holder dies, however that was.

``RUN/.lock`` is held by ``flock``, and says who holds it. Processes that the holder forks do not hold it, so readers of
data that outlive a killed run keep nobody out. Where a file system has no ``flock``, what the file says has to do: a
process that lives on this machine holds it, one of another machine until nothing was written in the folder for an hour.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from descant.cli.document import shown
from descant.cli.errors import fail
from descant.run.runs import identity

try:
    import fcntl
except ImportError:  # no such locks on this system
    fcntl = None  # type: ignore[assignment]

FILE = ".lock"
#: Seconds in which a process that was killed may still be there; those of a node that was lost, whose job begins again.
GRACE, LOST = 2.0, 120.0
#: Seconds without a write after which a holder on another machine, which cannot be asked, is taken for dead.
STALE = 3600.0
_NONE = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)
#: Folder -> what holds its lock: an open file, or None where the note alone does.
_held: dict[Path, int | None] = {}


def take(folder: Path) -> None:
    """Hold the folder until :func:`release`, or until this process ends. Taken twice it is held once.

    Raises:
        Refusal: if another process writes there; it names that process.
    """
    folder = folder.resolve()
    if folder in _held:
        return
    try:
        handle = os.open(folder / FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        fail(f"{folder}: a run cannot be written there: {error.strerror}")
    begun = time.monotonic()
    while (locked := _flock(handle)) is False:
        other = _note(folder)
        if time.monotonic() - begun > (LOST if _again(other) else GRACE):
            os.close(handle)
            _refuse(folder, other)
        time.sleep(0.1)
    if locked:
        _held[folder] = handle
        os.ftruncate(handle, 0)
        os.pwrite(handle, _own(), 0)
        return
    os.close(handle)
    other = _note(folder)
    if other and not _again(other) and _lives(folder, other):
        _refuse(folder, other)
    scratch = folder / f"{FILE}.{os.getpid()}"
    scratch.write_bytes(_own())
    (folder / FILE).unlink(missing_ok=True)
    try:
        os.link(scratch, folder / FILE)  # of two that do so at once one fails
    except FileExistsError:
        _refuse(folder, _note(folder))
    finally:
        scratch.unlink()
    _held[folder] = None


def release(folder: Path | None = None) -> None:
    """Give back what this process holds, or one folder of it; what it does not hold is no error."""
    for place in [folder.resolve()] if folder is not None else list(_held):
        if place not in _held:
            continue
        handle = _held.pop(place)
        with contextlib.suppress(OSError):
            if handle is None:
                (place / FILE).unlink()
            else:
                os.ftruncate(handle, 0)
        if handle is not None:
            os.close(handle)


def _forget() -> None:
    """In a process that was forked: the lock is its parent's."""
    for handle in _held.values():
        if handle is not None:
            os.close(handle)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def _flock(handle: int) -> bool | None:
    """Whether it is ours now; None where the file system has no such locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _NONE:
            return None
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        raise
    return True


def _own() -> bytes:
    note = {"pid": os.getpid(), "born": _born(os.getpid()), "host": socket.gethostname(), "job": _job()}
    return json.dumps(note).encode()


def _note(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / FILE).read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _job() -> str | None:
    """Of a scheduler or launcher that begins a run again on another machine, or before the last one is quite gone."""
    launch = os.environ.get("TORCHELASTIC_RUN_ID")
    return identity() or (launch if launch != "none" else None)


def _again(other: Mapping[str, Any]) -> bool:
    """Whether the holder was an earlier start of this very job."""
    return _job() is not None and other.get("job") == _job()


def _lives(folder: Path, other: Mapping[str, Any]) -> bool:
    if other.get("host") != socket.gethostname():
        times = [file.stat().st_mtime for file in (folder, *folder.glob("*"), *folder.glob("resume/*"))]
        return time.time() - max(times) < STALE
    pid = other.get("pid")
    if not isinstance(pid, int):
        return False
    try:
        os.kill(pid, 0)
    except OSError as error:
        if not isinstance(error, PermissionError):
            return False
    return other.get("born") == _born(pid)


def _born(pid: int) -> str | None:
    """When a process began, in ticks of this machine: numbers of processes repeat. None where nothing tells."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None


def _refuse(folder: Path, other: Mapping[str, Any]) -> None:
    who = f"process {other['pid']} on {other.get('host')}" if "pid" in other else "another process"
    away = "" if other.get("host") == socket.gethostname() else f"; if that one is gone, remove {FILE} there"
    fail(f"{shown(folder)}: {who} writes this run; wait for its end, or leave out --resume for a new run{away}")
