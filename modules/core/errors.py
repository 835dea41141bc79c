"""Error and log lines: the nearest valid name, an exception on one line, one line to stderr."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str]) -> str:
    """End of a one-line error for an unknown name: the closest valid one, and all of them.

    >>> nearest("imgae", ["image", "text"])
    'no such name; did you mean image? (known: image, text)'
    """
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]}?" if close else ""
    return f"no such name{hint} (known: {', '.join(known) or 'none'})"


def near(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """``; nearest: NAME``, or nothing where no name is close.

    >>> near("imgae", ["image", "text"]), near("x", ["image"])
    ('; nearest: image', '')
    """
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return f"; nearest: {close[0]}" if close else ""


def one_line(error: BaseException) -> str:
    """The message of an exception on one line of at most 200 characters; its type where it has none.

    >>> one_line(ValueError("a\\n  b")), one_line(KeyError())
    ('a b', 'KeyError')
    """
    return (" ".join(str(error).split()) or type(error).__name__)[:200]


def say(line: str) -> None:
    """Print one line to stderr, as ``descant: LINE``."""
    print(f"descant: {line}", file=sys.stderr, flush=True)


def warn(line: str) -> None:
    """Print one warning to stderr, as ``descant: warning: LINE``."""
    say(f"warning: {line}")
