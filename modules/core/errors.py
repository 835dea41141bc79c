"""Wording of one-line errors: the nearest valid choice. Imports nothing heavy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a one-line refusal: the closest known name, or all of them.

    >>> nearest("imgae", ["image", "text"])
    'no such name; did you mean image? (known: image, text)'
    """
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]}?" if close else ";"
    return f"no such name{hint} (known: {', '.join(known) or 'none'})".replace("; (", " (")
