"""Masking of tokens for masked modelling: which tokens are visible, which are predicted, and which count in the loss.

A mask is a pure function of a sample's random key (seed, epoch, index), independent of rank, batch and order.
Structured masks (blocks, tubes, spans) are in ``structured.py``, token budgets over modalities in ``budget.py``.
Letters: B samples, T tokens of one modality, M modalities, U tokens of all modalities.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from descant.modules.core.errors import nearest, no_such, require_value
from descant.modules.core.host import host_copy, to_device
from descant.modules.core.rng import uniform_NK

#: Number of a modality's tokens along each axis: (4, 4) patches of an image, (2, 4, 4) of a volume, (80,) of a text.
Grid = tuple[int, ...]


@dataclass
class Masks:
    """Masks of a batch, each a bool ``[B, T]`` per modality.

    Attributes:
        visible: encoder inputs.
        target: tokens to predict; none of them is visible.
        loss: targets that count in the loss.
    """

    visible: dict[str, Tensor]
    target: dict[str, Tensor]
    loss: dict[str, Tensor]


class Corruption:
    """Base of masking strategies: ``corruption(real, grids, draw_B) -> Masks``; padding is neither visible nor a
    target.

    A subclass implements ``visible``; targets are all other real tokens.
    """

    def __call__(self, real: Mapping[str, Tensor], grids: Mapping[str, Grid], draw_B: Tensor) -> Masks:
        """Make the masks of a batch.

        Args:
            real: modality -> bool ``[B, T]``: real tokens (none if the sample lacks the modality).
            grids: modality -> tokens along each axis.
            draw_B: int64, random key of each sample.
        """
        visible = {m: mask_BT & real[m] for m, mask_BT in self.visible(real, grids, draw_B).items()}
        target = {m: real[m] & ~visible[m] for m in real}
        return Masks(visible, target, dict(target))

    def __eq__(self, other: object) -> bool:
        """Whether both hide the same tokens in every batch: same class, equal arguments."""
        return type(self) is type(other) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash(type(self))

    def visible(self, real: Mapping[str, Tensor], grids: Mapping[str, Grid], draw_B: Tensor) -> dict[str, Tensor]:
        """Return visible tokens: modality -> bool ``[B, T]``."""
        raise NotImplementedError

    def check(self, grids: Mapping[str, Grid]) -> None:
        """Raise ValueError if a complete sample would have no visible or no masked token."""

    def predicts(self, modality: str) -> bool:
        """Whether a modality's tokens may be targets."""
        return True


class Ratio(Corruption):
    """Base of masks with a fixed ratio: in each modality, the first tokens of a random order are masked.

        n_visible = round((1 - ratio) * n_real),   at least one, and at least one masked of two or more

    Args:
        ratio: share of a sample's real tokens that is masked.
    """

    def __init__(self, ratio: float = 0.75) -> None:
        require_value(0 < ratio < 1, f"ratio {ratio:g}: a share of the tokens, above 0 and below 1; such as 0.75")
        self.ratio = ratio

    def order(self, name: str, grid: Grid, draw_B: Tensor) -> Tensor:
        """Return float ``[B, T]``: tokens with the lowest values are masked first."""
        raise NotImplementedError

    def visible(self, real: Mapping[str, Tensor], grids: Mapping[str, Grid], draw_B: Tensor) -> dict[str, Tensor]:
        order = {m: self.order(m, grids[m], draw_B).to(mask_BT.device) for m, mask_BT in real.items()}
        return {m: last(order[m], mask_BT, self.count(mask_BT.sum(dim=1))) for m, mask_BT in real.items()}

    def count(self, real_B: Tensor) -> Tensor:
        """Return the number of visible tokens for a number of real tokens, int64 ``[B]``."""
        kept_B = ((1 - self.ratio) * real_B).round().long()
        return torch.where(real_B > 1, kept_B.clamp(min=1).minimum(real_B - 1), real_B)

    def check(self, grids: Mapping[str, Grid]) -> None:
        for m, grid in grids.items():
            self._require(math.prod(grid), f"{math.prod(grid)} tokens of {m}")

    def _require(self, tokens: int, of: str) -> None:
        kept = round((1 - self.ratio) * tokens)
        if tokens < 2 or not 0 < kept < tokens:
            what = "no token visible" if kept <= 0 else "no token masked"
            near = 1 - min(max(kept, 1), tokens - 1) / tokens
            nearest = f"; the nearest that does not is {near:.3g}" if tokens > 1 else "; smaller patches make more"
            raise ValueError(f"ratio {self.ratio:g} of {of} leaves {what}{nearest}")


class UniformMask(Ratio):
    """Uniform random masking (MAE, He 2021, arXiv 2111.06377), by modality or over all modalities together.

    Args:
        ratio: share of a sample's real tokens that is masked.
        joint: whether the ratio applies to the tokens of all modalities together (BM-MAE).

    >>> real = {"image": torch.ones(2, 16, dtype=torch.bool)}
    >>> masks = UniformMask(0.75)(real, {"image": (4, 4)}, torch.arange(2))
    >>> masks.visible["image"].sum(dim=1).tolist(), masks.loss["image"].sum(dim=1).tolist()
    ([4, 4], [12, 12])
    """

    def __init__(self, ratio: float = 0.75, joint: bool = False) -> None:
        super().__init__(ratio)
        self.joint = joint

    def order(self, name: str, grid: Grid, draw_B: Tensor) -> Tensor:
        return noise(draw_B, f"mask/{name}", math.prod(grid))

    def visible(self, real: Mapping[str, Tensor], grids: Mapping[str, Grid], draw_B: Tensor) -> dict[str, Tensor]:
        if not self.joint:
            return super().visible(real, grids, draw_B)
        real_BU = torch.cat(list(real.values()), dim=1)
        order_BU = torch.cat([self.order(m, grids[m], draw_B) for m in real], dim=1).to(real_BU.device)
        return split_by_modality(last(order_BU, real_BU, self.count(real_BU.sum(dim=1))), real)

    def check(self, grids: Mapping[str, Grid]) -> None:
        if not self.joint:
            return super().check(grids)
        tokens = sum(math.prod(grid) for grid in grids.values())
        return self._require(tokens, f"{tokens} tokens of {', '.join(grids)}")


class Hide(Corruption):
    """Cross-modal prediction: some modalities are masked completely, the others are visible.

        visible_m = none of m,  loss_m = all real of m      for the hidden m
        visible_m = all real of m, or as masked by ``base``;  loss_m = none       for the others

    Targets of ``base`` are predicted, but do not count in the loss.

    Args:
        modalities: the hidden modalities.
        base: mask of the others; by default they are not masked.

    >>> real = {"image": torch.ones(1, 3, dtype=torch.bool), "edges": torch.ones(1, 2, dtype=torch.bool)}
    >>> masks = Hide(["image"])(real, {"image": (3,), "edges": (2,)}, torch.arange(1))
    >>> masks.visible["image"].tolist(), masks.loss["image"].tolist(), masks.visible["edges"].tolist()
    ([[False, False, False]], [[True, True, True]], [[True, True]])
    """

    def __init__(self, modalities: list[str], base: Corruption | None = None) -> None:
        require_value(modalities, "Hide: modalities: none given; such as [image]")
        self.modalities, self.base = modalities, base

    def __call__(self, real: Mapping[str, Tensor], grids: Mapping[str, Grid], draw_B: Tensor) -> Masks:
        shown = {m: real[m] for m in self._visible_modalities(real)}
        nothing = {m: torch.zeros_like(mask_BT) for m, mask_BT in real.items()}
        visible, target, loss = nothing | shown, nothing | dict(real), nothing | dict(real)
        for m in shown:
            target[m] = loss[m] = nothing[m]
        if self.base is not None:
            masks = self.base(shown, {m: grids[m] for m in shown}, draw_B)
            visible |= masks.visible
            target |= masks.target
        return Masks(visible, target, loss)

    def check(self, grids: Mapping[str, Grid]) -> None:
        shown = self._visible_modalities(grids)
        if self.base is not None:
            self.base.check({m: grids[m] for m in shown})

    def _visible_modalities(self, known: Mapping[str, object]) -> list[str]:
        for m in self.modalities:
            if m not in known:
                near = nearest(m, known)
                guess = f"; did you mean {near}?" if near else ";"
                raise ValueError(f"Hide: no modality {m!r}{guess} there are {', '.join(known)}")
        shown = [m for m in known if m not in self.modalities]
        if not shown:
            raise ValueError(f"Hide: {', '.join(known)} hidden, so no token is visible; leave one of them out")
        return shown


class From(Corruption):
    """Prediction in one direction: some modalities are fully visible, others are targets, the rest are neither.

    Args:
        given, targets: the visible modalities and the target modalities.

    >>> real = {m: torch.ones(1, 2, dtype=torch.bool) for m in ("image", "text", "audio")}
    >>> masks = From(["image"], ["text"])(real, dict.fromkeys(real, (2,)), torch.arange(1))
    >>> [m for m in real if masks.visible[m].any()], [m for m in real if masks.target[m].any()]
    (['image'], ['text'])
    """

    def __init__(self, given: list[str], targets: list[str]) -> None:
        if not given or not targets or set(given) & set(targets):
            raise ValueError(f"From: given {given}, targets {targets}: at least one of each, and none of them in both")
        self.given, self.targets = given, targets

    def __call__(self, real: Mapping[str, Tensor], grids: Mapping[str, Grid], draw_B: Tensor) -> Masks:
        self.check(grids)
        visible, target = (
            {m: mask_BT if m in chosen else torch.zeros_like(mask_BT) for m, mask_BT in real.items()}
            for chosen in (self.given, self.targets)
        )
        return Masks(visible, target, dict(target))

    def predicts(self, modality: str) -> bool:
        return modality in self.targets

    def check(self, grids: Mapping[str, Grid]) -> None:
        for m in (*self.given, *self.targets):
            if m not in grids:
                raise ValueError(f"From: modality {m!r}: {no_such(m, grids)}")


def corrupt_on_host(
    corruption: Corruption, real: Mapping[str, Tensor], grids: Mapping[str, Grid], draw_B: Tensor
) -> Masks:
    """Compute ``corruption(real, grids, draw_B)`` on the CPU, because visible tokens determine the shapes of a step.

    >>> real = {"image": torch.ones(1, 4, dtype=torch.bool)}
    >>> corrupt_on_host(UniformMask(0.5), real, {"image": (2, 2)}, torch.arange(1)).visible["image"].sum().item()
    2
    """
    masks = corruption({m: host_copy(real_BT) for m, real_BT in real.items()}, grids, host_copy(draw_B))
    device, moved = draw_B.device, dict[int, Tensor]()

    def to_batch_device(mask_BT: Tensor) -> Tensor:  # target and loss are often the same tensor
        if id(mask_BT) not in moved:
            moved[id(mask_BT)] = to_device(mask_BT, device)
        return moved[id(mask_BT)]

    parts = (masks.visible, masks.target, masks.loss)
    return Masks(*({m: to_batch_device(mask_BT) for m, mask_BT in part.items()} for part in parts))


def noise(draw_B: Tensor, purpose: str, tokens: int) -> Tensor:
    """Draw float ``[B, T]`` in [0, 1): one random number per token, from the key of each sample."""
    return uniform_NK(draw_B, _purposes(purpose, tokens))


@lru_cache(maxsize=256)
def _purposes(purpose: str, tokens: int) -> tuple[str, ...]:
    return tuple(f"{purpose}/{t}" for t in range(tokens))


def ranks(x_BT: Tensor, descending: bool = False) -> Tensor:
    """Return the rank of each entry in its row, int64 ``[B, T]``.

    >>> ranks(torch.tensor([[0.3, 0.1, 0.2]])).tolist()
    [[2, 0, 1]]
    """
    order_BT = x_BT.argsort(dim=1, descending=descending, stable=True)
    place_T = torch.arange(x_BT.shape[1], device=x_BT.device).expand_as(order_BT)
    return torch.empty_like(order_BT).scatter_(1, order_BT, place_T)


def last(order_BT: Tensor, real_BT: Tensor, count_B: Tensor) -> Tensor:
    """Mark the ``count_B`` real tokens with the highest values in each row, bool ``[B, T]``."""
    rank_BT = ranks(order_BT.masked_fill(~real_BT, -1.0), descending=True)
    return (rank_BT < count_B[:, None]) & real_BT


def first_of(covered: Tensor, dim: int) -> Tensor:
    """Return the index of the first True along ``dim``, or the size of ``dim`` if there is none, int64.

    >>> first_of(torch.tensor([[False, True, True], [False, False, False]]), dim=1).tolist()
    [1, 3]
    """
    covers, first = covered.max(dim=dim)
    return torch.where(covers, first, covered.shape[dim])


def split_by_modality(mask_BU: Tensor, real: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Split ``[B, U]`` by modality."""
    return dict(zip(real, mask_BU.split([mask_BT.shape[1] for mask_BT in real.values()], dim=1), strict=True))
