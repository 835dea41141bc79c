"""One-line error messages of the command line: place, what is wrong, nearest valid choice."""

from __future__ import annotations

import errno
import os
import re
import shutil
import sys
from pathlib import Path
from typing import NoReturn

from descant.modules.core.errors import AGAIN
from descant.modules.core.errors import hint as hint
from descant.modules.core.errors import nearest as nearest
from descant.modules.core.errors import one_line as one_line

#: Exit codes: wrong request, keyboard interrupt, SIGTERM.
WRONG, INTERRUPTED, TERMINATED = 2, 130, 143


class Refusal(Exception):
    """Error of a request that cannot be served, with a one-line reason. Ends the command with exit code 2."""

    code = WRONG


class Unavailable(Refusal):
    """Error of a command that an outside event ended; it may continue later. Exit code 75: a job is queued again."""

    code = AGAIN


def fail(line: str) -> NoReturn:
    """Raise :class:`Refusal` with ``line``."""
    raise Refusal(line)


def printable(text: object) -> str:
    """Return text on one line of printable characters only, because file names may hold any.

    Control characters, line ends, bidirectional controls and halves of surrogate pairs become question marks.

    >>> printable("a\\x1b[31m\\nb\\u202ec")
    'a?[31m?b?c'
    """
    return "".join(c if c.isprintable() else "?" for c in str(text))


def say(line: str) -> None:
    """Print one line to stderr; line ends become spaces, and very long words are cut."""
    text = printable(" ".join(line.split()))
    text = re.sub(rf"\S{{{_LONGEST},}}", lambda word: f"{word[0][: _LONGEST // 2]}...{word[0][-20:]}", text)
    print(f"descant: {text}", file=sys.stderr, flush=True)


#: Length of the longest word that is shown whole.
_LONGEST = 400
#: Errors of a full disk or quota.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def disk_fault(error: BaseException, folder: Path) -> str | None:
    """Return the line for a failed write below ``folder``, with the free space there; None for other errors.

    The line names the folder, since writers in threads and in C++ lose the file's name.
    """
    cause: BaseException | None = error
    seen = set[int]()  # an error that was raised again may be the context of its own context
    while cause is not None and not (isinstance(cause, OSError) and cause.errno in (*_FULL, errno.EROFS, errno.EIO)):
        seen.add(id(cause))
        cause = cause.__cause__ or cause.__context__
        cause = None if id(cause) in seen else cause
    if not isinstance(cause, OSError):
        code = re.search(r"(?:\(os error|\bOs \{ code:) (\d+)", str(error))  # from a library in Rust
        if code is None or int(code[1]) not in (*_FULL, errno.EROFS, errno.EIO):
            return None
        cause = OSError(int(code[1]), os.strerror(int(code[1])))
    why = " ".join((cause.strerror or str(cause)).split())
    if "free there" in why:  # already in the message
        return why
    try:
        room = shutil.disk_usage(folder).free
    except OSError:
        return f"{folder}: not written: {why}"
    free = f"{room / 1e9:,.1f} GB" if room >= 1e8 else f"{room / 1e6:,.1f} MB"
    return f"{folder}: not written: {why} ({free} free there)"
