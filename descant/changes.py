"""What differs between the configuration of a run and the one that it is to be resumed with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from descant.document import load
from descant.errors import fail, say

#: Where a run is made and how it is watched: none of these changes what is learned. (What damaged data has lost is told
#: by the digests of the data itself.)
FREE = (
    *("name", *(f"data.init_args.{key}" for key in ("num_workers", "eval_batch_size", "damaged", "outside"))),
    *(f"trainer.{key}" for key in ("accelerator", "devices", "num_nodes", "strategy", "logger", "plugins")),
    *(f"trainer.{key}" for key in ("default_root_dir", "profiler", "log_every_n_steps", "enable_progress_bar")),
    *("trainer.enable_model_summary", "trainer.detect_anomaly", "trainer.limit_test_batches"),
)
#: Differences that are told; more are counted.
_MOST = 12


def require_unchanged(checkpoint: Path, config: str, allowed: bool) -> None:
    """Refuse a resume with other settings than the run's own, unless that is ``allowed``; each is told in one line.

    Raises:
        Refusal: for the first time that a setting differs and nobody said that it may.
    """
    file = checkpoint.parent.parent / "config.yaml"
    if not file.is_file():
        return  # a resume point by itself: it tells of data, seed and recipe
    found = list(changes(load(file).plain, yaml.safe_load(config)))
    for key, then, now in found[:_MOST]:
        say(f"{key.replace('.init_args', '')}: {then} in the run, {now} here")
    more = f" ({len(found) - _MOST} more)" if len(found) > _MOST else ""
    if found and not allowed:
        fail(f"--resume: {len(found)} setting(s) differ from the run's own{more}; --changed allow goes on with them")


def changes(then: object, now: object) -> Iterator[tuple[str, object, object]]:
    """Dotted key, value before and value now, of all that differs and matters.

    >>> list(changes({"data": {"size": 32}, "name": "a"}, {"data": {"size": 64}, "name": "b"}))
    [('data.size', 32, 64)]
    """
    a, b = dict(_flat(then)), dict(_flat(now))
    for key in dict.fromkeys([*a, *b]):
        if a.get(key) != b.get(key) and not any(key == free or key.startswith(f"{free}.") for free in FREE):
            yield key, a.get(key, "not set"), b.get(key, "not set")


def _flat(value: object, path: str = "") -> Iterator[tuple[str, object]]:
    """Every value by its path; what is null is as good as not there."""
    items: list[tuple[Any, object]] = []
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list):
        items = list(enumerate(value))
    elif value is not None:
        yield path, value
    for key, inner in items:
        yield from _flat(inner, f"{path}.{key}" if path else str(key))
