"""Pairs of modalities to contrast, and scorers of how well samples of both match. Letters: N pairs."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations

from torch import Tensor, nn

from descant.modules.core.output import Scorer
from descant.modules.losses.contrastive import similarity_scorer


def pair_scorers(
    pairs: Mapping[str, tuple[str, str]], losses: nn.ModuleDict, z: Mapping[str, Tensor]
) -> dict[str, Scorer]:
    """Build a scorer per pair name: ``scale z_a . z_b`` between rows of one modality and rows of the other."""
    return {name: similarity_scorer(losses[name], z[a], z[b]) for name, (a, b) in pairs.items()}


def modality_pairs(pairs: list[list[str]] | None, modalities: tuple[str, ...]) -> dict[str, tuple[str, str]]:
    """Return pairs by name; all pairs if none are given. Raise ValueError for a pair of unknown modalities."""
    if len(modalities) < 2:
        raise ValueError(f"towers: contrast needs two modalities, got {', '.join(modalities) or 'none'}")
    for pair in pairs or []:
        unknown = [m for m in pair if m not in modalities]
        if unknown or not len(set(pair)) == len(pair) == 2:
            fault = f"no tower {unknown[0]!r}" if unknown else "not two modalities"
            raise ValueError(f"pairs: {pair}: {fault}; the towers are {', '.join(modalities)}")
    chosen = [(a, b) for a, b in pairs] if pairs else list(combinations(modalities, 2))
    return {f"{a}-{b}": (a, b) for a, b in chosen}
