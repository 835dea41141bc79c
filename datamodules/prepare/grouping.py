"""Group items that share a key, directly or through other items (union-find): families that no split may separate."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence


def connected_groups(keys_N: Sequence[Iterable[Hashable]]) -> list[list[int]]:
    """Return groups of item numbers, each ascending, ordered by their first item.

    >>> connected_groups([["a"], ["b"], ["c", "a"], ["c"]])
    [[0, 2, 3], [1]]
    """
    parent = list(range(len(keys_N)))

    def root(node: int) -> int:
        while parent[node] != node:
            node = parent[node]
        return node

    first: dict[Hashable, int] = {}
    for node, keys in enumerate(keys_N):
        for key in keys:
            low, high = sorted((root(first.setdefault(key, node)), root(node)))
            parent[high] = low
    groups: dict[int, list[int]] = {}
    for node in range(len(keys_N)):
        groups.setdefault(root(node), []).append(node)
    return list(groups.values())
