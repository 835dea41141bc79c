"""Sets of available modalities: numbered, sampled in training, and looked up by the presence masks of samples.

Letters: B samples, M modalities, S sets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Literal

import torch
from torch import Tensor

from descant.modules.core.errors import no_such
from descant.modules.core.host import host_copy, to_device
from descant.modules.core.ranks import gather, world
from descant.modules.core.rng import uniform_N

#: Used instead of a set's number: for a sample with all modalities, with none, and with a set that has no number.
WHOLE, NOTHING, UNKNOWN = -1, -2, -3


class Sets:
    """Numbered sets of modalities, and the look-up of each sample's set.

    Args:
        modalities: all modalities for which a recipe has a tower, at most 16.
        sets: some of their subsets, none empty; by default all. A set of all modalities has no number.

    >>> sets = Sets(["image", "text"])
    >>> sets.names
    ['image', 'text']
    >>> has = {"image": torch.tensor([True, False, True]), "text": torch.tensor([False, True, True])}
    >>> sets.of(has).tolist()
    [0, 1, -1]
    """

    def __init__(self, modalities: Sequence[str], sets: Sequence[Sequence[str]] | None = None) -> None:
        self.modalities = tuple(modalities)
        if len(self.modalities) > 16:
            raise ValueError(f"{len(self.modalities)} modalities have too many sets to be numbered; at most 16")
        subsets = [s for size in range(1, len(self.modalities)) for s in combinations(self.modalities, size)]
        chosen = subsets if sets is None else [self._check_set(s) for s in sets]
        self.sets = [s for s in chosen if s != self.modalities]
        #: One per set, such as ``image+text``, with modalities in their order.
        self.names = ["+".join(s) for s in self.sets]
        twice = next((name for name in self.names if self.names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"sets: {twice} is given twice")
        number = torch.full((2 ** len(self.modalities),), UNKNOWN)
        number[0], number[-1] = NOTHING, WHOLE
        for k, s in enumerate(self.sets):
            number[sum(2**i for i, m in enumerate(self.modalities) if m in s)] = k
        self._number = number

    def _check_set(self, names: Sequence[str]) -> tuple[str, ...]:
        unknown = [m for m in names if m not in self.modalities]
        if unknown:
            raise ValueError(f"sets: {unknown[0]!r}: {no_such(unknown[0], self.modalities)}")
        if not names or len(set(names)) < len(names):
            raise ValueError(f"sets: {list(names)} is no set of modalities, such as [{self.modalities[0]}]")
        return tuple(m for m in self.modalities if m in names)

    def __len__(self) -> int:
        return len(self.sets)

    def of(self, present: Mapping[str, Tensor]) -> Tensor:
        """Look up each sample's set, or a number below 0: int64 ``[B]`` on the CPU. Modalities not given are absent."""
        there = [present[m] for m in self.modalities if m in present]
        if not there:
            raise ValueError(f"present: none of {', '.join(self.modalities)} in it")
        code_B = torch.zeros(len(there[0]), dtype=torch.long)
        for i, m in enumerate(self.modalities):
            if m in present:
                code_B += host_copy(present[m]).long() * 2**i
        return self._number[code_B]

    def require_set(self, present: Mapping[str, Tensor], what: str) -> Tensor:
        """Return :meth:`of`; raise ValueError if a set is unknown."""
        set_B = self.of(present)
        if bool((set_B == UNKNOWN).any()):
            raise ValueError(self.refusal(present, set_B, what))
        return set_B

    def refusal(self, present: Mapping[str, Tensor], set_B: Tensor, what: str) -> str:
        """Describe the first sample whose set has no number, in one line."""
        row = int((set_B == UNKNOWN).int().argmax())
        has = tuple(m for m in self.modalities if m in present and bool(host_copy(present[m])[row]))

        def likeness(s: Sequence[str]) -> float:
            return len(set(s) & set(has)) / len(set(s) | set(has))

        near = max(self.names, key=lambda name: likeness(name.split("+"))) if self.sets else "none"
        return f"{what} has no parameters for samples with {'+'.join(has)} only; the nearest set is {near}"


class AvailableSets:
    """Random dropping of modalities from the samples on which a frozen network is adapted.

        set_b = one of the sets within sample b's modalities, with odds by weight        (of its random key alone)

    A sample without a complete set keeps its modalities. With ``per: batch`` all samples of a micro-batch on all ranks
    use one set, as in the paper; samples that lack a part of it keep their modalities.

    Args:
        sets: such as [[image], [text]]; by default all subsets except the empty and the full one.
        weights: one per set; equal by default.
        per: ``sample`` or ``batch``: the unit for which a set is sampled.

    >>> keep = AvailableSets([["text"]])
    >>> here = torch.tensor([True, True])
    >>> present = {"image": here, "text": torch.tensor([True, False])}
    >>> left = keep.remaining_modalities(present, torch.arange(2), ["image", "text"])
    >>> left["image"].tolist(), left["text"].tolist()
    ([False, True], [True, False])
    """

    def __init__(
        self,
        sets: list[list[str]] | None = None,
        weights: list[float] | None = None,
        per: Literal["sample", "batch"] = "sample",
    ) -> None:
        if sets is not None and not sets:
            raise ValueError("sets: none given; such as [[image], [text]]")
        if weights is not None and (sets is None or len(weights) != len(sets) or min(weights) <= 0):
            raise ValueError(f"weights {weights}: one positive number for each of the sets, which have to be named")
        self.sets, self.weights, self.per = sets, weights, per

    def of(self, modalities: Sequence[str]) -> list[tuple[str, ...]]:
        """Return the sets that are sampled for a recipe with these modalities."""
        if self.sets is None:
            return Sets(modalities).sets
        whole = [tuple(modalities)] if any(set(s) == set(modalities) for s in self.sets) else []
        return [*Sets(modalities, self.sets).sets, *whole]

    def remaining_modalities(
        self, present: Mapping[str, Tensor], draw_B: Tensor, modalities: Sequence[str]
    ) -> dict[str, Tensor]:
        """Return ``present`` without the modalities that sampled sets leave out; other names are unchanged."""
        weights = self.weights or [1.0] * len(self.of(modalities))
        sampled = [tuple(m for m in modalities if m in s) for s in (self.sets or self.of(modalities))]
        member_SM = torch.tensor([[m in s for m in modalities] for s in sampled])
        absent_B, keys_B = torch.zeros(len(draw_B), dtype=torch.bool), host_copy(draw_B)
        present_BM = torch.stack([host_copy(present[m]) if m in present else absent_B for m in modalities], dim=1)
        fits_BS = ~(member_SM & ~present_BM[:, None]).any(dim=2)
        odds_BS = torch.tensor(weights, dtype=torch.float64).expand(len(draw_B), -1)
        if self.per == "batch":
            keys_B = (keys_B if world() == 1 else gather(draw_B).cpu()).min().expand(len(draw_B))
        else:
            odds_BS = odds_BS * fits_BS
        edge_BS = odds_BS.cumsum(dim=1)
        u_B = uniform_N(keys_B, "available").double() * edge_BS[:, -1]
        set_B = (edge_BS <= u_B[:, None]).sum(dim=1).clamp(max=len(sampled) - 1)
        kept_BM = present_BM & (member_SM[set_B] | ~fits_BS.gather(1, set_B[:, None]))
        kept = dict(zip(modalities, kept_BM.unbind(dim=1), strict=True))
        return {m: to_device(kept[m], draw_B.device) if m in kept else x_B for m, x_B in present.items()}
