"""Subsets of modalities, and the embedding of a sample that has only some of them. Letters: N rows, D width."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

import torch
from torch import Tensor
from torch.nn import functional as F

from descant.modules.core.rng import mix

MOST = 10  # the most modalities of which all subsets (1023) are evaluated by default
Subset = tuple[str, ...]


def subsets_of(modalities: Sequence[str], count: int | None = None) -> list[Subset]:
    """Return non-empty subsets, small ones first: all ``2^M - 1``, or ``count`` of them, sampled with a fixed seed.

    A sample contains the full set, and each modality alone if ``count`` has room for them.

    >>> subsets_of(["a", "b"]), len(subsets_of("abcdef", 9))
    ([('a',), ('b',), ('a', 'b')], 9)
    """
    m, full = len(modalities), 2 ** len(modalities) - 1
    if count is None and m > MOST:
        raise ValueError(
            f"ModalitySubsetEval: {m} modalities have {full} subsets; give `subsets`, such as 64 of them, or fewer "
            "`modalities`"
        )
    if count is None or count >= full:
        return [s for size in range(1, m + 1) for s in combinations(modalities, size)]
    codes = {full, *((1 << i for i in range(m)) if count > m else ())}  # one bit per modality
    draw = 0
    while len(codes) < count:
        codes.add(mix(draw, "subsets", m) % full + 1)
        draw += 1
    places = [tuple(i for i in range(m) if code >> i & 1) for code in codes]
    return [tuple(modalities[i] for i in place) for place in sorted(places, key=lambda p: (len(p), p))]


def subset_name(subset: Subset) -> str:
    """Return a subset's name, such as ``image+text``."""
    return "+".join(subset)


def fuse_embeddings(z: Mapping[str, Tensor], subset: Subset) -> Tensor:
    """Compute ``normalise(sum over m in S of z_m)``, or use a row's joint embedding of S (named image+text) if any.

    If no modality of S has an embedding, all embeddings are joint ones of whatever is present, and are added.

    Shapes: ``{name: z_ND} -> [N, D]``.

    >>> z = {"a": torch.tensor([[3.0, 0.0]]), "b": torch.tensor([[0.0, 4.0]]), "a+b": torch.tensor([[0.0, 2.0]])}
    >>> fuse_embeddings(z, ("a",)).tolist(), fuse_embeddings(z, ("a", "b")).tolist()
    ([[1.0, 0.0]], [[0.0, 1.0]])
    """
    single = [z[m].float() for m in subset if m in z]
    sum_ND = torch.stack(single or [z_ND.float() for z_ND in z.values()]).sum(0)
    for name, z_ND in z.items():
        if set(name.split("+")) == set(subset):
            sum_ND = torch.where((z_ND != 0).any(1, keepdim=True), z_ND.float(), sum_ND)
    return F.normalize(sum_ND, dim=-1)


def worst_subset(values: Mapping[Subset, float], less: bool) -> Subset:
    """Return the first subset with the worst value; nan is worse than any number. ``less``: smaller is better.

    >>> worst_subset({("a",): 0.5, ("b",): 0.2}, less=False)
    ('b',)
    """
    return min(values, key=lambda s: (values[s] == values[s], -values[s] if less else values[s]))
