"""Names of files, and a check of names; its error lists the valid names in one line, or the nearest of many."""

from __future__ import annotations

from collections.abc import Sequence

from descant.modules.core.errors import closest

#: File of the embeddings of a run's training samples, as ``descant predict --sets train`` writes it.
TABLE = "embeddings-train.parquet"
MANY = 20  # the most names that fit into a line


def require_known(what: str, given: Sequence[str], known: Sequence[str]) -> None:
    """Raise ValueError for the first of ``given`` that is not ``known``.

    >>> require_known("vendors", ["noto"], ("noto", "fluent"))
    """
    unknown = [name for name in given if name not in known]
    if unknown:
        near = closest(unknown[0], known, cutoff=0.0)
        some = ", ".join(known) if len(known) <= MANY else f"{len(known)}; nearest: {', '.join(near)}"
        raise ValueError(f"{what}: {unknown[0]!r} is not one of {some}")
