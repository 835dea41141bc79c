"""Metric names, ``set/metric``, and their order in tables. This file does not import torch."""

from __future__ import annotations

import re

#: The group of tags that TensorBoard opens first: it sorts groups by name, ``_`` before letters.
OVERVIEW = "_overview"
#: ``SET/chance/METRIC`` is the value that guessing reaches.
CHANCE = "chance"
_RECALL = re.compile(r"(.*?)(?:^|(?<=_))r(\d+)$")
_RANK = re.compile(r"(.*?)(?:^|(?<=_))(medr|meanr)$")


def order(name: str) -> tuple[str, str, int, int, str]:
    """Return a sort key: within a set and direction, recall comes before ranks, and recall at 5 before recall at 10.

    >>> sorted(["v/i2t_medr", "v/t2i_r1", "v/i2t_r10", "v/i2t_r5", "v/distinct/i2t_r1", "v/accuracy"], key=order)
    ['v/accuracy', 'v/i2t_r5', 'v/i2t_r10', 'v/i2t_medr', 'v/t2i_r1', 'v/distinct/i2t_r1']
    """
    of, _, last = name.rpartition("/")
    if match := _RECALL.match(last):
        return of, match[1], 1, int(match[2]), name
    if match := _RANK.match(last):
        return of, match[1], 2, 0, name
    return of, last, 0, 0, name
