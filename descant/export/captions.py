"""Captions of a run's data, which the tokenizer of another package is tried on.

Letters: N samples.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress

import numpy as np

from descant.datamodules.base import BatchDataset, DataModule

#: Samples that are read at most.
MOST = 10_000


def captions_of(data: object, most: int = MOST) -> list[str]:
    """Different captions of training and evaluation samples, each as ``describe`` has it, in the order of their ids.

    Args:
        data: the data module of a run; None where it cannot be built.
        most: samples that are read; of more, evenly spaced ones.

    Returns:
        An empty list for data without texts, or whose files are no longer there; of a stream, captions of its
        evaluation sets alone.
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
    with suppress(ValueError, NotImplementedError):  # a stream has none
        yield data.plain_set()
    for stage in ("validate", "test"):
        yield from data.evaluation_sets(stage).values()


def _with_text(part: BatchDataset) -> np.ndarray:
    """int64 ``[N]``: ids of the samples of a set that have a text."""
    row_N = np.arange(len(part))
    has_N = part.present(row_N).get("text")
    return part.identity(row_N if has_N is None else row_N[has_N.numpy()])
