"""Valid ranges of numbers by argument name, for all of Descant's classes, checked before any is built.

A size below 1 or a probability above 1 is a mistake in any class. Without the check, torch fails far from the cause.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

_INFINITE = math.inf
_COUNTS = """
answer_length bank batch_size blocks buckets buffer channels chunks classes components depth digits embedding
eval_batch_size folds grid group heads hidden hop items keep kernel key_heads layers length mels memory new numbers
objects passes patch permutations queries r rows samples scenes side size sizes stem stride tokens vocab width width_in
widths
"""
_NOT_NEGATIVE = "capacity extra l2 lr num_workers resample tolerance weight_decay"
_SHARES = """
decay drop dropout erase fdr flip grey invert mirror name_only nameless share smoothing token_dropout
"""
#: Argument -> smallest and largest value. Names with different meanings in different classes are left out.
OF_NAMES: dict[str, tuple[float, float]] = {
    **dict.fromkeys(_COUNTS.split(), (1, _INFINITE)),
    **dict.fromkeys(_NOT_NEGATIVE.split(), (0, _INFINITE)),
    **dict.fromkeys(_SHARES.split(), (0, 1)),
}
#: Numbers that must be above zero.
ABOVE_ZERO = ("seconds", "mlp_ratio", "expand", "temperature", "tempo", "peak_flops")
#: Ranges for the command and its trainer.
OF_COMMAND: dict[str, tuple[float, float]] = {
    "trainer.num_nodes": (1, _INFINITE),
    "trainer.gradient_clip_val": (0, _INFINITE),
    "trainer.log_every_n_steps": (0, _INFINITE),
    "seed_everything": (0, 2**32 - 1),
}


def wrong(name: str, value: Any, table: Mapping[str, tuple[float, float]] = OF_NAMES) -> str | None:
    """Describe what is wrong with a number, or with one in a list or mapping; None if all are valid.

    >>> wrong("width", -4), wrong("drop", {"text": 5}), wrong("dropout", 0.1), wrong("mean", -4)
    ('at least 1, got -4', 'between 0 and 1, got 5', None, None)
    >>> wrong("seconds", 0)
    'above 0, got 0'
    """
    if name in ABOVE_ZERO and table is OF_NAMES:
        return next((f"above 0, got {number:g}" for number in _numbers(value) if not number > 0), None)
    if name not in table:
        return None
    least, most = table[name]
    for number in _numbers(value):
        if not least <= number <= most:
            bound = f"at least {least:g}" if most == _INFINITE else f"between {least:g} and {most:.10g}"
            return f"{bound}, got {number:.10g}" if abs(number) < 1e300 else bound
    return None


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, bool):
        return
    if isinstance(value, int | float):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _numbers(inner)
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for inner in value:
            yield from _numbers(inner)
