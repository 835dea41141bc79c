"""What occurs twice: equal bytes, and captions that say the same, within and across splits."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Twins:
    """Samples that have the content of another.

    Attributes:
        groups: contents that occur more than once.
        extra: samples beyond the first of each.
        across: pair of splits -> contents that both have.
        examples: names of some samples with equal content, those across splits first.
    """

    groups: int = 0
    extra: int = 0
    across: dict[str, int] = field(default_factory=dict)
    examples: list[list[str]] = field(default_factory=list)


def equal(content: Iterable[tuple[Any, str, str]], shown: int = 3) -> Twins:
    """Twins among (content, split, name) of samples.

    >>> equal([("x", "train", "a"), ("x", "val", "b"), ("y", "val", "c")])
    Twins(groups=1, extra=1, across={'train/val': 1}, examples=[['train: a', 'val: b']])
    """
    members: dict[Any, list[tuple[str, str]]] = defaultdict(list)
    for value, split, name in content:
        members[value].append((split, name))
    found = [group for group in members.values() if len(group) > 1]
    across: Counter[str] = Counter()
    for group in found:
        splits = list(dict.fromkeys(split for split, _ in group))
        across.update(f"{a}/{b}" for n, a in enumerate(splits) for b in splits[n + 1 :])
    found.sort(key=lambda group: len({split for split, _ in group}) < 2)  # a leak is worth more than a copy
    examples = [[f"{split}: {name}" for split, name in group[:4]] for group in found[:shown]]
    return Twins(len(found), sum(len(group) - 1 for group in found), dict(across), examples)


@dataclass
class Echoes:
    """Captions of one split that another has too: ``equal`` but for case and punctuation, or ``near``."""

    captions: int = 0
    equal: int = 0
    near: int = 0
    examples: list[tuple[str, str]] = field(default_factory=list)


def echoes(texts: Sequence[str], others: Sequence[str], threshold: float = 0.8, shown: int = 3) -> Echoes:
    """How many different captions of ``texts`` are, or nearly are, among ``others``.

    Near: the sets of their words have a Jaccard similarity ``|a & b| / |a | b|`` of at least ``threshold``. Only sets
    that share one of their rarest words can be, so few are compared (Chaudhuri 2006, prefix filtering).

    >>> echoes(["A red car.", "two old dogs in a park", "fish"], ["a red car", "two old dogs in the a park"])
    Echoes(captions=3, equal=1, near=1, examples=[('two old dogs in a park', 'two old dogs in the a park')])
    """
    ours, theirs = _bags(texts), _bags(others)
    common = Counter(word for bag in (*ours, *theirs) for word in bag)
    index: dict[str, list[frozenset[str]]] = defaultdict(list)
    for bag in theirs:
        for word in _rarest(bag, common, threshold):
            index[word].append(bag)
    found = Echoes(len(ours))
    for bag, text in ours.items():
        if bag in theirs:
            found.equal += 1
            continue
        twin = _twin(bag, index, common, threshold)
        if twin is not None:
            found.near += 1
            if len(found.examples) < shown:
                found.examples.append((text, theirs[twin]))
    return found


def _bags(texts: Iterable[str]) -> dict[frozenset[str], str]:
    """Set of words -> the first text that has it; texts without a word are left out."""
    bags: dict[frozenset[str], str] = {}
    for text in texts:
        bag = frozenset(re.findall(r"\w+", text.casefold()))
        if bag:
            bags.setdefault(bag, text)
    return bags


def _rarest(bag: frozenset[str], common: Mapping[str, int], threshold: float) -> list[str]:
    kept = len(bag) - math.ceil(threshold * len(bag)) + 1
    return sorted(bag, key=lambda word: (common[word], word))[:kept]


def _twin(
    bag: frozenset[str], index: Mapping[str, list[frozenset[str]]], common: Mapping[str, int], threshold: float
) -> frozenset[str] | None:
    for word in _rarest(bag, common, threshold):
        for other in index.get(word, ()):
            both = len(bag & other)
            if both >= threshold * (len(bag) + len(other) - both):
                return other
    return None
