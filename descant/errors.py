"""What the user sees when something is wrong: one line: file, key, fault and nearest key."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable
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


def say(line: str) -> None:
    """One line to the user, beside the program's output."""
    print(f"descant: {line}", file=sys.stderr, flush=True)


def one_line(error: BaseException) -> str:
    """The message of an exception on one line.

    >>> one_line(ValueError("batch_size 1:  at\\n least 2"))
    'batch_size 1: at least 2'
    """
    if isinstance(error, FileNotFoundError) and error.strerror and error.filename is not None:
        return f"no such file: {error.filename}"
    return " ".join(str(error).split()) or type(error).__name__
