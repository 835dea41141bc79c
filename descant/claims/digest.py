"""Digest of a claim: what its runs compose to and the rule that judges them, whatever files and names they stand in."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from descant.modules.io.upgrade import upgrade

#: What only changes how a claim is shown.
LOOKS = ("title", "source", "baseline_tuning", "alone", "note", "setting")
#: Contents of the configurations that a name stands for, in the order in which they count.
Contents = Callable[[Iterable[str]], list[Any]]


def digest(claim: Mapping[str, Any], contents: Contents, renamed: Mapping[str, str]) -> str:
    """SHA-256 of a claim in its canonical form; the first 16 digits.

    The canonical form has, in place of the names of configurations, what they compose to: an overlay may become part
    of an arm, or an experiment move, and the digest stays. A class has its oldest name, without its module. Comments,
    layout, the order of keys, the form that classes had before they were merged, texts that only a reader sees and the
    callback ``Sanity``, which changes no number, do not count. ``trainer.precision: auto`` counts as bf16-mixed, what
    it is on machines that compute bfloat16: what it was in a result is stored with the result.

    Args:
        claim: the content of its file. contents: of names of configurations. renamed: old name of a class -> new name.
    """
    oldest = {new: old for old, new in renamed.items()}
    form = {key: value for key, value in claim.items() if key not in LOOKS}
    experiment = form.pop("experiment")
    form["arms"] = {name: composed(experiment, arm or {}, contents) for name, arm in claim["arms"].items()}
    if claim.get("before") is not None:
        form["before"] = composed(claim["before"]["experiment"], claim["before"], contents)
        if "seed" in claim["before"]:
            form["before"]["seed"] = claim["before"]["seed"]
    return hashlib.sha256(json.dumps(_plain(form, oldest), default=str).encode()).hexdigest()[:16]


def composed(experiment: str, arm: Mapping[str, Any], contents: Contents) -> dict[str, Any]:
    """What the runs of an arm compose to (``config``), and its options and settings."""
    parts = [*contents([experiment, *(arm.get("configs") or ())])]
    own = dict(arm.get("config") or {})
    below = own.pop("extends", ())
    parts += [*contents([below] if isinstance(below, str) else below), own]
    config: Any = {}
    for part in parts:
        config = merged(config, {key: value for key, value in (part or {}).items() if key != "extends"})
    config = upgrade(config)
    trainer = config.get("trainer") or {}
    if trainer.get("precision") == "auto":
        config["trainer"] = {**trainer, "precision": "bf16-mixed"}
    rest = {key: value for key, value in arm.items() if key not in ("experiment", "configs", "config")}
    return {"config": config, **rest}


def merged(first: Any, over: Any) -> Any:
    """One configuration laid over another: objects merge, lists of keys that end in ``+`` are joined, the rest wins.

    >>> merged({"a": {"b": 1, "c+": [1]}, "d": [1]}, {"a": {"c+": [2]}, "d": [2]})
    {'a': {'b': 1, 'c+': [1, 2]}, 'd': [2]}
    """
    if not isinstance(first, Mapping) or not isinstance(over, Mapping):
        return over
    result = dict(first)
    for key, value in over.items():
        before = result.get(key)
        join = str(key).endswith("+") and isinstance(before, list) and isinstance(value, list)
        result[key] = [*before, *value] if join and isinstance(before, list) else merged(before, value)
    return result


def _plain(value: Any, oldest: Mapping[str, str]) -> Any:
    """With sorted keys and the oldest names of classes, and without ``Sanity``."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item, oldest) for key, item in sorted(value.items(), key=lambda of: str(of[0]))}
    if isinstance(value, list | tuple):
        kept = (item for item in value if not (isinstance(item, Mapping) and item.get("class_path") == "Sanity"))
        return [_plain(item, oldest) for item in kept]
    if isinstance(value, str):
        short = value.rpartition(".")[2] if value.startswith("descant.") else value
        return oldest.get(short, short)
    return value
