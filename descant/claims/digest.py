"""Digests of a claim: of each arm's composed configuration, and of the rule that judges the arms."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from descant.claims.claim import BEFORE, Claim

#: Names of configurations -> contents of their files, in order of precedence.
Contents = Callable[[Iterable[str]], list[Any]]
#: Key of the rule's digest, beside those of the arms.
RULE = "rule"


def digests(claim: Claim, contents: Contents) -> dict[str, str]:
    """Map each arm to the digest of its runs, and ``RULE`` to the digest of the rule that judges them.

    Digests read what configurations compose to, not their names or files. So a digest stays if an overlay becomes part
    of an arm or an experiment moves, and a new arm changes no other digest. Comments, layout, the order of keys and the
    module of a class do not count. Neither does the callback ``Sanity``, which changes no number.
    """
    found: dict[str, str] = {}
    for arm in ([BEFORE] if claim.before is not None else []) + list(claim.arms):
        found[arm] = _of_arm(claim, arm, contents, found)
    metric = claim.metric
    rule: list[Any] = [metric.name, metric.higher, metric.margin, claim.oracle, claim.equal, claim.reference]
    rule += [{key: list(some) for key, some in claim.seeds.items()}, [str(condition) for condition in claim.also]]
    return found | {RULE: sha([*rule, str(claim.signal), claim.calls])}


def _of_arm(claim: Claim, arm: str, contents: Contents, known: dict[str, str]) -> str:
    if arm in known:
        return known[arm]
    added = claim.before if arm == BEFORE else claim.arms[arm]
    assert added is not None
    names = added.configs if arm == BEFORE else (claim.experiment, *added.configs)
    begins = {other: _of_arm(claim, other, contents, known) for other in sorted(claim.begins_from(arm))}
    what: list[Any] = [compose(contents(names)), claim.options(arm, "full"), list(added.settings), begins]
    what += [added.predict, claim.before_seed] if arm == BEFORE else []
    return sha(what)


def compose(parts: Iterable[Any]) -> dict[str, Any]:
    """Compose the contents of configurations into one. ``trainer.precision: auto`` counts as bf16-mixed.

    ``auto`` means bf16-mixed on machines that compute bfloat16; a result stores the precision of its runs.
    """
    config: Any = {}
    for part in parts:
        config = merge_config(config, {key: value for key, value in (part or {}).items() if key != "extends"})
    trainer = config.get("trainer") or {}
    if trainer.get("precision") == "auto":
        config["trainer"] = {**trainer, "precision": "bf16-mixed"}
    return dict(config)


def merge_config(first: Any, over: Any) -> Any:
    """Merge ``over`` into ``first``: objects merge, lists at keys that end in ``+`` are joined, the rest is replaced.

    >>> merge_config({"a": {"b": 1, "c+": [1]}, "d": [1]}, {"a": {"c+": [2]}, "d": [2]})
    {'a': {'b': 1, 'c+': [1, 2]}, 'd': [2]}
    """
    if not isinstance(first, Mapping) or not isinstance(over, Mapping):
        return over
    result = dict(first)
    for key, value in over.items():
        before = result.get(key)
        join = str(key).endswith("+") and isinstance(before, list) and isinstance(value, list)
        result[key] = [*before, *value] if join and isinstance(before, list) else merge_config(before, value)
    return result


def sha(value: Any) -> str:
    """Return the first 16 digits of the SHA-256 of a value of plain types, for any order of its keys."""
    return hashlib.sha256(json.dumps(_plain(value), default=str).encode()).hexdigest()[:16]


def _plain(value: Any) -> Any:
    """Return a value with sorted keys, with classes without their modules, and without ``Sanity``."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in sorted(value.items(), key=lambda of: str(of[0]))}
    if isinstance(value, list | tuple):
        kept = (item for item in value if not (isinstance(item, Mapping) and item.get("class_path") == "Sanity"))
        return [_plain(item) for item in kept]
    if isinstance(value, str):
        return value.rpartition(".")[2] if value.startswith("descant.") else value
    return value
