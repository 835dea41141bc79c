"""Duplicates in a data set: samples with equal bytes, and captions that other splits share exactly or nearly."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any


@dataclass
class Duplicates:
    """Samples with the same content as another sample.

    Attributes:
        groups: number of contents that occur more than once.
        extra: number of samples beyond the first of each group.
        across: pair of splits -> number of contents that both have.
        examples: names of some samples with equal content, first those across splits.
    """

    groups: int = 0
    extra: int = 0
    across: dict[str, int] = field(default_factory=dict)
    examples: list[list[str]] = field(default_factory=list)


def duplicates(content: Iterable[tuple[Any, str, str]], shown: int = 3) -> Duplicates:
    """Find duplicates among (content, split, name) of samples.

    >>> duplicates([("x", "train", "a"), ("x", "val", "b"), ("y", "val", "c")])
    Duplicates(groups=1, extra=1, across={'train/val': 1}, examples=[['train: a', 'val: b']])
    """
    members: dict[Any, list[tuple[str, str]]] = defaultdict(list)
    for value, split, name in content:
        members[value].append((split, name))
    groups = [group for group in members.values() if len(group) > 1]
    groups.sort(key=lambda group: len({split for split, _ in group}) < 2)  # leaks between splits first
    across = Counter(f"{a}/{b}" for group in groups for a, b in combinations(dict.fromkeys(s for s, _ in group), 2))
    examples = [[f"{split}: {name}" for split, name in group[:4]] for group in groups[:shown]]
    return Duplicates(len(groups), sum(len(group) - 1 for group in groups), dict(across), examples)


@dataclass
class CaptionOverlap:
    """Captions of one split that another split has too: ``equal`` except for case and punctuation, or ``near``."""

    captions: int = 0
    equal: int = 0
    near: int = 0
    examples: list[tuple[str, str]] = field(default_factory=list)


def caption_overlap(
    texts: Sequence[str], others: Sequence[str], threshold: float = 0.8, shown: int = 3
) -> CaptionOverlap:
    """Count the distinct captions of ``texts`` that are among ``others``, exactly or nearly.

    Near: the sets of their words have a Jaccard similarity ``|a & b| / |a | b|`` of at least ``threshold``. Only sets
    that share one of their rarest words are compared (prefix filtering, Chaudhuri 2006).

    >>> caption_overlap(["A red car.", "two old dogs in a park", "fish"], ["a red car", "two old dogs in the a park"])
    CaptionOverlap(captions=3, equal=1, near=1, examples=[('two old dogs in a park', 'two old dogs in the a park')])
    """
    ours, theirs = _word_sets(texts), _word_sets(others)
    counts = Counter(word for words in (*ours, *theirs) for word in words)
    index: dict[str, list[frozenset[str]]] = defaultdict(list)
    for words in theirs:
        for word in _rarest(words, counts, threshold):
            index[word].append(words)
    overlap = CaptionOverlap(len(ours))
    for words, text in ours.items():
        if words in theirs:
            overlap.equal += 1
            continue
        candidates = (other for word in _rarest(words, counts, threshold) for other in index.get(word, ()))
        match = next((other for other in candidates if _jaccard(words, other) >= threshold), None)
        if match is not None:
            overlap.near += 1
            if len(overlap.examples) < shown:
                overlap.examples.append((text, theirs[match]))
    return overlap


def _word_sets(texts: Iterable[str]) -> dict[frozenset[str], str]:
    """Map each set of words to the first text that has it; texts without a word are left out."""
    sets: dict[frozenset[str], str] = {}
    for text in texts:
        words = frozenset(re.findall(r"\w+", text.casefold()))
        if words:
            sets.setdefault(words, text)
    return sets


def _rarest(words: frozenset[str], counts: Mapping[str, int], threshold: float) -> list[str]:
    kept = len(words) - math.ceil(threshold * len(words)) + 1
    return sorted(words, key=lambda word: (counts[word], word))[:kept]


def _jaccard(a: frozenset[str], b: frozenset[str]) -> float:
    shared = len(a & b)
    return shared / (len(a) + len(b) - shared)
