"""Heights and widths of the images of a source, from their headers. Letters: N samples of a source."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from descant.datamodules.fields.columns import Column
from descant.datamodules.fields.images import Images
from descant.datamodules.sources.array_cache import cached_by
from descant.datamodules.sources.base import Source
from descant.modules.core.errors import say


def image_shapes(source: Source, column: Column, images: Images) -> np.ndarray:
    """Return upright (height, width) of each sample's image, int64 ``[N, 2]``; 0 x 0 if none can be read.

    No pixel is decoded, but each file is opened once; then the shapes are in the cache until the corpus changes.

    >>> from descant.datamodules.sources.synthetic import Synthetic
    >>> source = Synthetic(2, size=48)
    >>> image_shapes(source, Column(["jpg"], np.ones((2, 1), dtype=bool)), Images(8)).tolist()
    [[48, 48], [48, 48]]
    """
    corpus = source.corpus()
    if corpus is None:
        return _read(source, column, images)
    mark = f"image shapes\0{corpus.place}\0{column.names}\0{images.limit}\0{_digests(corpus.state())}"
    return cached_by(mark, "image-shapes", lambda: {"shape_N2": _read(source, column, images)})["shape_N2"]


def _read(source: Source, column: Column, images: Images) -> np.ndarray:
    shape_N2 = np.zeros((len(source), 2), dtype=np.int64)
    pick_N = column.pick(np.arange(len(source)), None, "")
    some_N = np.flatnonzero(pick_N >= 0)
    if len(some_N) >= 10_000:
        say(f"data: the sizes of {len(some_N):,} images are read once; later runs take them from the cache")
    for row in some_N.tolist():
        name = column.names[pick_N[row]]
        try:
            raw = source.read(row, [name])[name]
            shape_N2[row] = images.header(raw.encode() if isinstance(raw, str) else raw)[:2]
        except (OSError, ValueError, KeyError):
            continue  # training reports it when it is read
    return shape_N2


def _digests(state: Mapping[str, Any]) -> list[Any]:
    """List the digests of all that a resume point holds of a corpus."""
    parts = [*state["parts"].values(), state["sizes"], state["times"]]
    return [part["digest"] for part in parts if part is not None]
