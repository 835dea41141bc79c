"""Error and log lines: the nearest valid name, an exception on one line, one line to stderr. Imports nothing heavy."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable

#: EX_TEMPFAIL: the exit code with which a cluster job asks to be queued again.
AGAIN = 75


class Outage(ValueError):
    """Raised when a service that the run depends on does not answer after all attempts; the run may go on later."""


def closest(name: str, known: Iterable[str], most: int = 3, cutoff: float = 0.5) -> list[str]:
    """Return the known names most similar to ``name``, best first, ignoring case.

    >>> closest("widht", ["Width", "depth"]), closest("zzz", ["width"])
    (['Width'], [])
    """
    lower = {option.lower(): option for option in sorted(set(known))}  # if only case differs, the lower-case name wins
    return [lower[near] for near in difflib.get_close_matches(name.lower(), lower, n=most, cutoff=cutoff)]


def nearest(name: str, known: Iterable[str], cutoff: float = 0.5) -> str | None:
    """Return the known name most similar to ``name``, or None if none is similar.

    >>> nearest("widht", ["width", "depth"]), nearest("zzz", ["width", "depth"])
    ('width', None)
    """
    return next(iter(closest(name, known, 1, cutoff)), None)


def hint(name: str, known: Iterable[str], most: int = 12) -> str:
    """Return the end of an error line: ``; nearest: X``; if none is similar, all names unless more than ``most``.

    >>> hint("widht", ["width"]), hint("zzz", ["width", "depth"]), hint("zzz", [])
    ('; nearest: width', '; known: depth, width', '')
    """
    options = sorted(set(known))
    if (near := nearest(name, options)) is not None:
        return f"; nearest: {near}"
    return f"; known: {', '.join(options)}" if 0 < len(options) <= most else ""


def no_such(name: str, known: Iterable[str]) -> str:
    """Return the end of an error line about a wrong name among few: the nearest name, and all of them.

    >>> no_such("imgae", ["image", "text"])
    'no such name; did you mean image? (known: image, text)'
    """
    known = list(known)
    near = nearest(name, known)
    return f"no such name{f'; did you mean {near}?' if near else ''} (known: {', '.join(known) or 'none'})"


def one_line(error: BaseException, most: int | None = None) -> str:
    """Return an exception's message on one line of at most ``most`` characters; for an OSError, its file comes first.

    >>> one_line(ValueError("batch_size 1:  at\\n least 2"))
    'batch_size 1: at least 2'
    >>> one_line(IsADirectoryError(21, "Is a directory", "runs"))
    'runs: Is a directory'
    """
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, RecursionError):
        text = "nested too deeply"
    elif isinstance(error, MemoryError):
        text = " ".join(f"out of memory: {error}".split()).removesuffix(":")
    elif isinstance(error, FileNotFoundError) and error.filename is not None:
        text = f"no such file: {error.filename}"
    elif isinstance(error, OSError) and error.strerror:
        text = f"{'' if error.filename is None else f'{error.filename}: '}{error.strerror}"
    return text[:most]


def require_value(condition: object, line: str) -> None:
    """Raise ValueError with this line unless the condition on an argument holds."""
    if not condition:
        raise ValueError(line)


def say(line: str) -> None:
    """Print one line to stderr, as ``descant: LINE``."""
    print(f"descant: {line}", file=sys.stderr, flush=True)


def warn(line: str) -> None:
    """Print one warning to stderr, as ``descant: warning: LINE``."""
    say(f"warning: {line}")
