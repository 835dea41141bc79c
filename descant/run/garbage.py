"""Garbage collection without the objects that a training run keeps."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def freezing_long_lived_objects() -> Iterator[None]:
    """Exclude the objects that exist now from garbage collection.

    Python searches the oldest objects only once a quarter as many have been added. With half a million objects of
    libraries, the parts of drawn figures would stay for hundreds of validations.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
