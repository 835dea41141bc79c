"""What a masked model is shown, what it has to predict, and what of that counts: one interface, many corruptions.

Everything random is drawn from a sample's own key, so a mask is a pure function of (seed, epoch, index), whatever the
rank, the batch and the order. Letters: B samples, T tokens of one modality, M modalities, U tokens of all modalities.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from descant.modules.core.errors import nearest
from descant.modules.core.host import host_copy, to_device
from descant.modules.core.rng import mix_N, uniform_NK

#: Tokens of a modality along each axis: (4, 4) patches of an image, (2, 4, 4) of a volume, (80,) of a text.
Grid = tuple[int, ...]


@dataclass
class Masks:
    """One bool ``[B, T]`` a modality, each.

    Attributes:
        visible: what the encoder is shown.
        target: what is to be predicted, none of it visible.
        loss: what of the targets counts.
    """

    visible: dict[str, Tensor]
    target: dict[str, Tensor]
    loss: dict[str, Tensor]


class Corruption:
    """``corruption(real, grids, draw_B) -> Masks``: tokens that are not real are neither shown nor asked for.

    A subclass implements ``visible``; the target is then all that is real and not visible.
    """

    def __call__(self, real: Mapping[str, Tensor], grids: Mapping[str, Grid], draw_B: Tensor) -> Masks:
        """The masks of a batch.

        Args:
            real: modality -> bool ``[B, T]``: tokens that are there (a sample without the modality has none).
            grids: modality -> tokens along each axis.
            draw_B: int64, each sample's key.
        """
        visible = {m: mask_BT & real[m] for m, mask_BT in self.visible(real, grids, draw_B).items()}
        target = {m: real[m] & ~visible[m] for m in real}
        return Masks(visible, target, dict(target))

    def visible(self, real: Mapping[str, Tensor], grids: Mapping[str, Grid], draw_B: Tensor) -> dict[str, Tensor]:
        """Modality -> bool ``[B, T]``."""
        raise NotImplementedError

    def check(self, grids: Mapping[str, Grid]) -> None:
        """Raises ValueError where it would leave no token visible, or none masked, of whole samples."""


class Ratio(Corruption):
    """A fixed share of the tokens of each modality is masked: those that come first in an order that is drawn.

        n_visible = round((1 - ratio) * n_real),   at least one, and at least one masked of two or more

    Args:
        ratio: share of a sample's real tokens that is masked.

    Raises:
        ValueError: for a ratio that is no share; in ``check``, for one that leaves nothing to see or to predict.
    """

    def __init__(self, ratio: float = 0.75) -> None:
        if not 0 < ratio < 1:
            raise ValueError(f"ratio {ratio:g}: a share of the tokens, above 0 and below 1; such as 0.75")
        self.ratio = ratio

    def order(self, name: str, grid: Grid, draw_B: Tensor) -> Tensor:
        """Float ``[B, T]``: who of a modality is masked first (the least)."""
        raise NotImplementedError

    def visible(self, real: Mapping[str, Tensor], grids: Mapping[str, Grid], draw_B: Tensor) -> dict[str, Tensor]:
        order = {m: self.order(m, grids[m], draw_B).to(mask_BT.device) for m, mask_BT in real.items()}
        return {m: last(order[m], mask_BT, self.count(mask_BT.sum(dim=1))) for m, mask_BT in real.items()}

    def count(self, real_B: Tensor) -> Tensor:
        """Int64 ``[B]``: how many of so many real tokens stay visible."""
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
    """Any tokens, each as likely (MAE, He 2021): of each modality by itself, or of all of them together.

    Args:
        ratio: share of a sample's real tokens that is masked.
        joint: the share is of all modalities together, and each token of any is as likely (BM-MAE).

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
        return parted(last(order_BU, real_BU, self.count(real_BU.sum(dim=1))), real)

    def check(self, grids: Mapping[str, Grid]) -> None:
        if not self.joint:
            return super().check(grids)
        tokens = sum(math.prod(grid) for grid in grids.values())
        return self._require(tokens, f"{tokens} tokens of {', '.join(grids)}")


class TokenBudget(Corruption):
    """A fixed number of tokens is visible, and how many of which modality is drawn for each sample (MultiMAE).

        share_b ~ Dirichlet(alpha, ..., alpha),   n_bm = round(share_bm * visible),   any n_bm tokens of m

    Where rounding, or a modality with fewer tokens, makes the sum another number, tokens are added or taken away at
    random: it is ``visible`` of every sample that has all modalities, and the same share of what a sample has.

    Args:
        visible: tokens of a whole sample that are visible.
        alpha: of the Dirichlet distribution: small for samples that show one modality, large for equal shares.
        subset_first: a random non-empty set of modalities is drawn first, and shares among those.
        targets: tokens that count in the loss, at most, drawn from what is masked (4M); all where not given.

    Source: arXiv 2204.01678; targets: arXiv 2312.06647.

    Raises:
        ValueError: for a budget below 1 or an alpha that is not positive; in ``check``, for a budget of all tokens.

    >>> real = {m: torch.ones(3, 16, dtype=torch.bool) for m in ("image", "depth")}
    >>> masks = TokenBudget(visible=8)(real, {"image": (4, 4), "depth": (4, 4)}, torch.arange(3))
    >>> [masks.visible[m].sum(dim=1).tolist() for m in real]
    [[4, 5, 1], [4, 3, 7]]
    """

    def __init__(
        self, visible: int, alpha: float = 1.0, subset_first: bool = False, targets: int | None = None
    ) -> None:
        if visible < 1 or (targets is not None and targets < 1):
            what = f"visible {visible}" if visible < 1 else f"targets {targets}"
            raise ValueError(f"{what}: a number of tokens, at least 1")
        if alpha <= 0:
            raise ValueError(f"alpha {alpha:g}: greater than 0; 1 makes all shares as likely")
        self.budget, self.alpha, self.subset_first, self.targets = visible, alpha, subset_first, targets

    def __call__(self, real: Mapping[str, Tensor], grids: Mapping[str, Grid], draw_B: Tensor) -> Masks:
        masks = super().__call__(real, grids, draw_B)
        if self.targets is not None:
            target_BU = torch.cat(list(masks.target.values()), dim=1)
            order_BU = torch.cat([noise(draw_B, f"target/{m}", math.prod(grids[m])) for m in real], dim=1)
            asked_BU = last(order_BU.to(target_BU.device), target_BU, target_BU.sum(dim=1).clamp(max=self.targets))
            masks.target = masks.loss = parted(asked_BU, real)
        return masks

    def visible(self, real: Mapping[str, Tensor], grids: Mapping[str, Grid], draw_B: Tensor) -> dict[str, Tensor]:
        count_BM = torch.stack([mask_BT.sum(dim=1) for mask_BT in real.values()], dim=1).cpu()
        whole = sum(math.prod(grids[m]) for m in real)
        total_B = count_BM.sum(dim=1)
        kept_B = (self.budget / whole * total_B).round().long()
        kept_B = torch.where(total_B > 1, kept_B.clamp(min=1).minimum(total_B - 1), total_B)
        wanted_BM = (self.shares(count_BM > 0, draw_B) * kept_B[:, None]).round()
        order = []
        for (m, mask_BT), wanted_B in zip(real.items(), wanted_BM.unbind(dim=1), strict=True):
            u_BT = noise(draw_B, f"mask/{m}", math.prod(grids[m])).to(mask_BT.device)
            rank_BT = ranks(u_BT.masked_fill(~mask_BT, -1.0), descending=True)
            # those that are wanted come last, so they are what stays visible, and others only where too few are wanted
            order.append(u_BT + (rank_BT < wanted_B.to(mask_BT.device)[:, None]))
        real_BU = torch.cat(list(real.values()), dim=1)
        # noise of its own: the least wanted of a modality must not be who goes where all together are too many
        order_BU = torch.cat(order, dim=1).floor() + noise(draw_B, "mask/all", real_BU.shape[1]).to(real_BU.device)
        return parted(last(order_BU, real_BU, kept_B.to(real_BU.device)), real)

    def shares(self, there_BM: Tensor, draw_B: Tensor) -> Tensor:
        """Float ``[B, M]``: each sample's shares of the modalities that it has, which sum to 1 (or are all 0)."""
        rows = []
        for key, there_M in zip(mix_N(draw_B, "mask/shares").tolist(), there_BM.numpy(), strict=True):
            generator = np.random.Generator(np.random.Philox(key))
            chosen = np.flatnonzero(there_M)
            if self.subset_first and len(chosen) > 1:
                subset = int(generator.integers(1, 2 ** len(chosen)))
                chosen = chosen[[bool(subset >> k & 1) for k in range(len(chosen))]]
            share_M = np.zeros(len(there_M))
            if len(chosen):
                share_M[chosen] = generator.dirichlet([self.alpha] * len(chosen))
            rows.append(share_M)
        return torch.from_numpy(np.stack(rows))

    def check(self, grids: Mapping[str, Grid]) -> None:
        tokens = sum(math.prod(grid) for grid in grids.values())
        if self.budget >= tokens:
            raise ValueError(f"visible {self.budget} of {tokens} tokens leaves no token masked; at most {tokens - 1}")


class BlockMask(Ratio):
    """Rectangles of patches, until the share is masked (BEiT): what is missing has no neighbours that show it.

    The last two axes of a grid are its height and width; each step of the others has rectangles of its own.

    Args:
        ratio: share of a sample's real tokens that is masked.
        least, most: share of the grid's area that one rectangle covers.
        aspect: height over width is between ``aspect`` and 1 / ``aspect``.

    >>> real = {"image": torch.ones(1, 16, dtype=torch.bool)}
    >>> BlockMask(0.5, least=0.5, most=0.5, aspect=1)(real, {"image": (4, 4)}, torch.tensor([4])).target["image"].sum()
    tensor(8)
    """

    def __init__(self, ratio: float = 0.4, least: float = 0.1, most: float = 0.3, aspect: float = 0.3) -> None:
        super().__init__(ratio)
        if not 0 < least <= most <= 1:
            raise ValueError(f"least {least:g}, most {most:g}: two shares of the area, 0 < least <= most <= 1")
        if not 0 < aspect <= 1:
            raise ValueError(f"aspect {aspect:g}: above 0, at most 1 (squares)")
        self.least, self.most, self.aspect = least, most, aspect

    def order(self, name: str, grid: Grid, draw_B: Tensor) -> Tensor:
        high, wide, steps = grid[-2], grid[-1], math.prod(grid[:-2])
        blocks = math.ceil(4 * self.ratio / self.least) + 4  # rectangles overlap; few that are left over cost little
        what = ("area", "aspect", "top", "left")
        purposes = [f"mask/{name}/{w}{s}.{k}" for w in what for s in range(steps) for k in range(blocks)]
        area, aspect, top, left = uniform_NK(draw_B, purposes).view(-1, 4, steps, blocks).unbind(dim=1)
        area = (self.least + (self.most - self.least) * area) * high * wide
        aspect = torch.exp((2 * aspect - 1) * math.log(1 / self.aspect))
        height = (area * aspect).sqrt().round().clamp(1, high)
        width = (area / aspect).sqrt().round().clamp(1, wide)
        top, left = (top * (high - height + 1)).floor(), (left * (wide - width + 1)).floor()
        inside = [
            (at >= first[..., None]) & (at < (first + length)[..., None])
            for at, first, length in ((torch.arange(high), top, height), (torch.arange(wide), left, width))
        ]
        covered_BSKHW = inside[0][..., :, None] & inside[1][..., None, :]
        u_BT = noise(draw_B, f"mask/{name}", math.prod(grid))
        return first_of(covered_BSKHW, dim=2).flatten(1) + u_BT

    def check(self, grids: Mapping[str, Grid]) -> None:
        for m, grid in grids.items():
            if len(grid) < 2:
                raise ValueError(f"BlockMask: {m} has {len(grid)} axis and no rectangles; use SpanMask for it")
        super().check(grids)


class TubeMask(Ratio):
    """The same patches in every step of the first axis, such as time (VideoMAE): nothing is seen a step later.

    Args:
        ratio: share of a sample's real tokens that is masked.

    >>> real = {"video": torch.ones(1, 8, dtype=torch.bool)}
    >>> TubeMask(0.5)(real, {"video": (2, 2, 2)}, torch.tensor([1])).visible["video"].view(2, 4).int().tolist()
    [[1, 0, 1, 0], [1, 0, 1, 0]]
    """

    def order(self, name: str, grid: Grid, draw_B: Tensor) -> Tensor:
        return noise(draw_B, f"mask/{name}", math.prod(grid[1:]))

    def visible(self, real: Mapping[str, Tensor], grids: Mapping[str, Grid], draw_B: Tensor) -> dict[str, Tensor]:
        # a patch is there if it is in any step, and is then seen in all steps that have it
        steps = {m: real[m].unflatten(1, (grids[m][0], -1)) for m in real}
        once = super().visible({m: mask_BST.any(dim=1) for m, mask_BST in steps.items()}, grids, draw_B)
        return {m: (mask_BST & once[m][:, None]).flatten(1) for m, mask_BST in steps.items()}

    def check(self, grids: Mapping[str, Grid]) -> None:
        for m, grid in grids.items():
            if len(grid) < 2:
                raise ValueError(
                    f"TubeMask: {m} has {len(grid)} axis, and nothing to repeat along it; use SpanMask for it"
                )
        super().check({m: grid[1:] for m, grid in grids.items()})


class SpanMask(Ratio):
    """Runs of neighbouring tokens of a sequence (T5, SpanBERT), with lengths from a geometric distribution.

    Args:
        ratio: share of a sample's real tokens that is masked.
        mean: length of a run, on average; the last one of a sample is cut where the share is reached.

    >>> real = {"text": torch.ones(1, 12, dtype=torch.bool)}
    >>> SpanMask(0.5, mean=3)(real, {"text": (12,)}, torch.tensor([3])).target["text"].int().tolist()
    [[1, 1, 1, 0, 1, 0, 0, 0, 1, 1, 0, 0]]
    """

    def __init__(self, ratio: float = 0.5, mean: float = 3.0) -> None:
        super().__init__(ratio)
        if mean < 1:
            raise ValueError(f"mean {mean:g}: of the length of a run, at least 1 token")
        self.mean = mean

    def order(self, name: str, grid: Grid, draw_B: Tensor) -> Tensor:
        tokens = math.prod(grid)
        start_BT, u_BT = noise(draw_B, f"mask/{name}/start", tokens), noise(draw_B, f"mask/{name}/length", tokens)
        stay = 1 - 1 / self.mean
        length_BT = 1 + (u_BT.clamp(min=1e-7).log() / math.log(stay)).floor() if stay else torch.ones_like(u_BT)
        place = torch.arange(tokens)
        order_BT = start_BT.argsort(dim=1)  # run k begins at the place that is k-th in the draw
        begin_BK, length_BK = order_BT, length_BT.gather(1, order_BT)
        covered_BKT = (place >= begin_BK[..., None]) & (place < (begin_BK + length_BK)[..., None])
        run_BT = first_of(covered_BKT, dim=1)
        return run_BT + (place - begin_BK.gather(1, run_BT)) / tokens  # the last run is cut at its end


class EachMask(Corruption):
    """A corruption of its own for each modality, such as rectangles of an image and runs of a text.

    Args:
        each: modality -> corruption.
        other: of modalities without one; 75 % at random where not given.

    >>> EachMask({"text": SpanMask()}).of("image").ratio
    0.75
    """

    def __init__(self, each: dict[str, Corruption], other: Corruption | None = None) -> None:
        self.each, self.other = each, other or UniformMask()

    def of(self, modality: str) -> Corruption:
        return self.each.get(modality, self.other)

    def __call__(self, real: Mapping[str, Tensor], grids: Mapping[str, Grid], draw_B: Tensor) -> Masks:
        parts = [self.of(m)({m: mask_BT}, {m: grids[m]}, draw_B) for m, mask_BT in real.items()]
        kinds = ("visible", "target", "loss")
        return Masks(*({m: mask for part in parts for m, mask in getattr(part, kind).items()} for kind in kinds))

    def check(self, grids: Mapping[str, Grid]) -> None:
        for m in self.each:
            if m not in grids:
                raise ValueError(f"EachMask: no modality {m!r}; there are {', '.join(grids)}")
        for m, grid in grids.items():
            self.of(m).check({m: grid})


class Hide(Corruption):
    """All of some modalities is hidden and asked for, all of the others is shown: one modality made from others.

        visible_m = none of m,  loss_m = all real of m      for the hidden m
        visible_m = all real of m, or what ``base`` shows;  loss_m = none       for the others

    The targets of ``base`` are predicted as ever, but do not count.

    Args:
        modalities: that are hidden.
        base: masks the others, which alone it sees; nothing does where not given.

    Raises:
        ValueError: without a modality; when used, for one that is not there, or where nothing else is.

    >>> real = {"image": torch.ones(1, 3, dtype=torch.bool), "edges": torch.ones(1, 2, dtype=torch.bool)}
    >>> masks = Hide(["image"])(real, {"image": (3,), "edges": (2,)}, torch.arange(1))
    >>> masks.visible["image"].tolist(), masks.loss["image"].tolist(), masks.visible["edges"].tolist()
    ([[False, False, False]], [[True, True, True]], [[True, True]])
    """

    def __init__(self, modalities: list[str], base: Corruption | None = None) -> None:
        if not modalities:
            raise ValueError("Hide: modalities: none to hide; such as [image]")
        self.modalities, self.base = modalities, base

    def __call__(self, real: Mapping[str, Tensor], grids: Mapping[str, Grid], draw_B: Tensor) -> Masks:
        shown = {m: real[m] for m in self._shown(real)}
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
        shown = self._shown(grids)
        if self.base is not None:
            self.base.check({m: grids[m] for m in shown})

    def _shown(self, known: Mapping[str, object]) -> list[str]:
        for m in self.modalities:
            if m not in known:
                near = nearest(m, known)
                guess = f"; did you mean {near}?" if near else ";"
                raise ValueError(f"Hide: no modality {m!r}{guess} there are {', '.join(known)}")
        shown = [m for m in known if m not in self.modalities]
        if not shown:
            raise ValueError(f"Hide: {', '.join(known)} hidden, so no token is visible; leave one of them out")
        return shown


def corrupted(corruption: Corruption, real: Mapping[str, Tensor], grids: Mapping[str, Grid], draw_B: Tensor) -> Masks:
    """``corruption(real, grids, draw_B)``, worked out on the CPU: what is visible decides the shapes of a step.

    >>> real = {"image": torch.ones(1, 4, dtype=torch.bool)}
    >>> corrupted(UniformMask(0.5), real, {"image": (2, 2)}, torch.arange(1)).visible["image"].sum().item()
    2
    """
    masks = corruption({m: host_copy(real_BT) for m, real_BT in real.items()}, grids, host_copy(draw_B))
    device, moved = draw_B.device, dict[int, Tensor]()

    def there(mask_BT: Tensor) -> Tensor:  # target and loss are often the same
        if id(mask_BT) not in moved:
            moved[id(mask_BT)] = to_device(mask_BT, device)
        return moved[id(mask_BT)]

    kinds = (masks.visible, masks.target, masks.loss)
    return Masks(*({m: there(mask_BT) for m, mask_BT in kind.items()} for kind in kinds))


# what they share ----------------------------------------------------------------------------------------------------


def noise(draw_B: Tensor, purpose: str, tokens: int) -> Tensor:
    """Float ``[B, T]`` in [0, 1): one draw a token, of each sample's own key."""
    return uniform_NK(draw_B, _purposes(purpose, tokens))


@lru_cache(maxsize=256)
def _purposes(purpose: str, tokens: int) -> tuple[str, ...]:
    return tuple(f"{purpose}/{t}" for t in range(tokens))


def ranks(x_BT: Tensor, descending: bool = False) -> Tensor:
    """Int64 ``[B, T]``: the place of each entry in the order of its row.

    >>> ranks(torch.tensor([[0.3, 0.1, 0.2]])).tolist()
    [[2, 0, 1]]
    """
    order_BT = x_BT.argsort(dim=1, descending=descending, stable=True)
    place_T = torch.arange(x_BT.shape[1], device=x_BT.device).expand_as(order_BT)
    return torch.empty_like(order_BT).scatter_(1, order_BT, place_T)


def last(order_BT: Tensor, real_BT: Tensor, count_B: Tensor) -> Tensor:
    """Bool ``[B, T]``: the ``count_B`` real tokens of each row that come last in the order."""
    rank_BT = ranks(order_BT.masked_fill(~real_BT, -1.0), descending=True)
    return (rank_BT < count_B[:, None]) & real_BT


def first_of(covered: Tensor, dim: int) -> Tensor:
    """Int64: the first index along ``dim`` where it is true; the number of them where none is.

    >>> first_of(torch.tensor([[False, True, True], [False, False, False]]), dim=1).tolist()
    [1, 3]
    """
    found, first = covered.max(dim=dim)
    return torch.where(found, first, covered.shape[dim])


def parted(mask_BU: Tensor, real: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``[B, U]`` of all modalities, cut into theirs."""
    return dict(zip(real, mask_BU.split([mask_BT.shape[1] for mask_BT in real.values()], dim=1), strict=True))
