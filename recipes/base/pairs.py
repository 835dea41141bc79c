"""Pairs of modalities that are contrasted, and how well samples of one match samples of the other. Letters: N pairs."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations

from torch import Tensor, nn

from descant.modules.core.output import Scorer
from descant.modules.losses.contrastive import similarity_scorer


def pair_scorers(
    pairs: Mapping[str, tuple[str, str]], losses: nn.ModuleDict, z: Mapping[str, Tensor]
) -> dict[str, Scorer]:
    """By the name of a pair: ``scale z_a . z_b`` of rows of one modality and rows of the other."""
    return {name: similarity_scorer(losses[name], z[a], z[b]) for name, (a, b) in pairs.items()}


def modality_pairs(pairs: list[list[str]] | None, modalities: tuple[str, ...]) -> dict[str, tuple[str, str]]:
    """Name -> pair; all of them where none are given. Raises ValueError for a pair of other modalities."""
    if len(modalities) < 2:
        raise ValueError(f"towers: contrast needs two modalities, got {', '.join(modalities) or 'none'}")
    for pair in pairs or []:
        unknown = [m for m in pair if m not in modalities]
        if unknown or not len(set(pair)) == len(pair) == 2:
            fault = f"no tower {unknown[0]!r}" if unknown else "not two modalities"
            raise ValueError(f"pairs: {pair}: {fault}; the towers are {', '.join(modalities)}")
    chosen = [(a, b) for a, b in pairs] if pairs else list(combinations(modalities, 2))
    return {f"{a}-{b}": (a, b) for a, b in chosen}
