"""Captions of a run's data, on which the tokenizer of another package is tried.

Letters: N samples.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress

import numpy as np

from descant.datamodules.base import BatchDataset, DataModule

#: Largest number of samples that are read.
MOST = 10_000


def captions_of(data: object, most: int = MOST) -> list[str]:
    """List distinct captions of training and evaluation samples, as ``describe`` returns them, in order of sample ids.

    Args:
        data: the data module of a run; None if it cannot be built.
        most: number of samples that are read; if there are more, evenly spaced ones.

    Returns:
        An empty list for data without texts, or whose files are no longer there. For a stream, only captions of its
            evaluation sets.
    """
    if not isinstance(data, DataModule):
        return []
    try:
        if "text" not in data.modalities:
            return []
        ids = [_with_text(part) for part in _sets(data) if part.by_position]
        id_N = np.unique(np.concatenate([np.zeros(0, np.int64), *ids]))
        some = np.linspace(0, len(id_N) - 1, min(most, len(id_N))).round().astype(np.int64)
        return list(dict.fromkeys(data.describe(index) for index in id_N[some].tolist()))
    except (OSError, ValueError):  # files that were moved, or are damaged
        return []


def _sets(data: DataModule) -> Iterator[BatchDataset]:
    with suppress(ValueError, NotImplementedError):  # a stream has no plain set
        yield data.plain_set()
    for stage in ("validate", "test"):
        yield from data.evaluation_sets(stage).values()


def _with_text(part: BatchDataset) -> np.ndarray:
    """Return the ids of a set's samples that have a text, int64 ``[N]``."""
    row_N = np.arange(len(part))
    has_N = part.present(row_N).get("text")
    return part.identity(row_N if has_N is None else row_N[has_N.numpy()])
