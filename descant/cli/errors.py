"""What the user sees when something is wrong: one line: file, key, fault and nearest key."""

from __future__ import annotations

import difflib
import errno
import re
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NoReturn

#: Exit codes: a wrong request, interrupted from the keyboard, told to end.
WRONG, INTERRUPTED, TERMINATED = 2, 130, 143


class Refusal(Exception):
    """A request that cannot be served, with the one line that says why. Ends the command with exit code 2."""


def fail(line: str) -> NoReturn:
    """Raise :class:`Refusal` with ``line``."""
    raise Refusal(line)


def nearest(name: str, known: Iterable[str], cutoff: float = 0.5) -> str | None:
    """The known name that is most like ``name``, or None where none is alike.

    >>> nearest("widht", ["width", "depth"]), nearest("zzz", ["width", "depth"])
    ('width', None)
    """
    options = sorted(set(known))
    lower = {option.lower(): option for option in reversed(options)}
    found = difflib.get_close_matches(name.lower(), lower, n=1, cutoff=cutoff)
    return lower[found[0]] if found else None


def hint(name: str, known: Iterable[str], most: int = 12) -> str:
    """``; nearest: X``, or the whole choice where nothing is near and the choice is small.

    >>> hint("widht", ["width"]), hint("zzz", ["width", "depth"]), hint("zzz", [])
    ('; nearest: width', '; known: depth, width', '')
    """
    options = sorted(set(known))
    found = nearest(name, options)
    if found:
        return f"; nearest: {found}"
    return f"; known: {', '.join(options)}" if 0 < len(options) <= most else ""


def printable(text: object) -> str:
    """Text on one line of which every character prints: what a file or a folder is called may hold anything.

    Control characters, line ends, bidirectional controls and halves of surrogate pairs become question marks.

    >>> printable("a\\x1b[31m\\nb\\u202ec")
    'a?[31m?b?c'
    """
    return "".join(c if c.isprintable() else "?" for c in str(text))


def say(line: str) -> None:
    """One line to the user, beside the program's output: line ends become spaces, words of many letters are cut."""
    text = printable(" ".join(line.split()))
    text = re.sub(rf"\S{{{_LONGEST},}}", lambda word: f"{word[0][: _LONGEST // 2]}...{word[0][-20:]}", text)
    print(f"descant: {text}", file=sys.stderr, flush=True)


#: Letters of a word that is shown whole; paths are shorter.
_LONGEST = 400
#: Errors of a disk, a file system or a network: the words after them say how much is free, or what is to be done.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def one_line(error: BaseException) -> str:
    """The message of an exception on one line; of an error of the operating system, its file first.

    >>> one_line(ValueError("batch_size 1:  at\\n least 2"))
    'batch_size 1: at least 2'
    >>> one_line(IsADirectoryError(21, "Is a directory", "runs"))
    'runs: Is a directory'
    """
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if isinstance(error, MemoryError):
        return " ".join(f"out of memory: {error}".split()).removesuffix(":")
    if isinstance(error, OSError) and error.strerror:
        if isinstance(error, FileNotFoundError) and error.filename is not None:
            return f"no such file: {error.filename}"
        place = "" if error.filename is None else f"{error.filename}: "
        return f"{place}{error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


def disk_fault(error: BaseException, folder: Path) -> str | None:
    """The line for what a disk did not take below ``folder``, with the room that is left there; None for other errors.

    Writers in threads and in C++ lose the name of the file, so the folder is named.
    """
    cause: BaseException | None = error
    while cause is not None and not (isinstance(cause, OSError) and cause.errno in (*_FULL, errno.EROFS, errno.EIO)):
        cause = cause.__cause__ or cause.__context__
    if not isinstance(cause, OSError):
        return None
    why = " ".join((cause.strerror or str(cause)).split())
    if "free there" in why:  # a checkpoint's own writer has said it
        return why
    try:
        room = shutil.disk_usage(folder).free
    except OSError:
        return f"{folder}: not written: {why}"
    free = f"{room / 1e9:,.1f} GB" if room >= 1e8 else f"{room / 1e6:,.1f} MB"
    return f"{folder}: not written: {why} ({free} free there)"
