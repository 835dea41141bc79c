"""Lock of a run's folder: one process writes it, and the system releases the lock when that process dies.

``RUN/.lock`` is held by ``flock`` and names its holder. Forked processes do not hold it, so data loaders that outlive a
killed run block no other run. On file systems without ``flock``, the content of the file decides. A process of this
machine holds the lock while it lives, and one of another machine until nothing was written in the folder for an hour.
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

from descant.cli.document import path_to_show
from descant.cli.errors import fail
from descant.modules.io.jsonl import loads
from descant.run.runs import identity

try:
    import fcntl
except ImportError:  # no such locks on this system
    fcntl = None  # type: ignore[assignment]

FILE = ".lock"
#: Seconds to wait for a killed process to go; for a lost node, whose job was requeued.
GRACE, LOST = 2.0, 120.0
#: Seconds without a write after which a holder on another machine counts as dead.
STALE = 3600.0
_NONE = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)
#: Folder -> the locked open file, or None if the file's content is the lock.
_held: dict[Path, int | None] = {}


def take(folder: Path) -> None:
    """Lock the folder until :func:`release` or the end of this process; no effect if this process holds it."""
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
        os.pwrite(handle, _holder(), 0)
        return
    os.close(handle)
    other = _note(folder)
    if other and not _again(other) and _lives(folder, other):
        _refuse(folder, other)
    scratch = folder / f"{FILE}.{os.getpid()}"
    scratch.write_bytes(_holder())
    (folder / FILE).unlink(missing_ok=True)
    try:
        os.link(scratch, folder / FILE)  # atomic: of two processes one fails
    except FileExistsError:
        _refuse(folder, _note(folder))
    finally:
        scratch.unlink()
    _held[folder] = None


def release(folder: Path | None = None) -> None:
    """Release one folder, or all that this process holds; no error if it holds none."""
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
    """Forget the locks in a forked process; they stay its parent's."""
    for handle in _held.values():
        if handle is not None:
            os.close(handle)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def _flock(handle: int) -> bool | None:
    """Whether the lock was taken; None if the file system has no such locks."""
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


def _holder() -> bytes:
    note = {"pid": os.getpid(), "born": _start_time(os.getpid()), "host": socket.gethostname(), "job": _job()}
    return json.dumps(note).encode()


def _note(folder: Path) -> dict[str, Any]:
    try:
        note = loads((folder / FILE).read_bytes())
    except (OSError, ValueError):
        return {}
    return note if isinstance(note, dict) else {}


def _job() -> str | None:
    """Return the id of a SLURM or torchrun job, which restarts a run elsewhere or before the last process is gone."""
    launch = os.environ.get("TORCHELASTIC_RUN_ID")
    return identity() or (launch if launch != "none" else None)


def _again(other: Mapping[str, Any]) -> bool:
    """Whether the holder was an earlier start of this job."""
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
    return other.get("born") == _start_time(pid)


def _start_time(pid: int) -> str | None:
    """Return the start time of a process in clock ticks, since pids repeat; None if it is unknown."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None


def _refuse(folder: Path, other: Mapping[str, Any]) -> None:
    who = f"process {other['pid']} on {other.get('host')}" if "pid" in other else "another process"
    away = "" if other.get("host") == socket.gethostname() else f"; if it is gone, remove {FILE} there"
    fail(f"{path_to_show(folder)}: {who} writes this run; wait for its end, or leave out --resume for a new run{away}")
