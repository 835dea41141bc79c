"""Garbage collection beside the objects that a training run keeps."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def long_lived_objects_frozen() -> Iterator[None]:
    """Leave the objects that exist out of garbage collection.

    Python searches the oldest objects only once a quarter as many have been added. Beside half a million objects of
    libraries, the parts of drawn figures would stay for hundreds of validations.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
