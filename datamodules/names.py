"""What an argument may be called, and the one line that refuses another name."""

from __future__ import annotations

from collections.abc import Sequence


def require_known(what: str, given: Sequence[str], known: Sequence[str]) -> None:
    """Raises ValueError naming the first of ``given`` that is not ``known``.

    >>> require_known("vendors", ["noto"], ("noto", "fluent"))
    """
    unknown = [name for name in given if name not in known]
    if unknown:
        raise ValueError(f"{what}: {unknown[0]!r} is not one of {', '.join(known)}")
