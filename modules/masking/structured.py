"""Structured masks: blocks of patches, tubes through time, spans of a sequence. Letters: B samples, T tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from descant.modules.core.errors import require_value
from descant.modules.core.rng import uniform_NK
from descant.modules.masking.corruptions import Corruption, Grid, Ratio, first_of, noise


class BlockMask(Ratio):
    """Block-wise masking (BEiT, Bao 2021, arXiv 2106.08254): random rectangles of patches, up to the ratio.

    The last two axes of a grid are height and width; each step of the other axes has its own rectangles.

    Args:
        ratio: share of a sample's real tokens that is masked.
        least, most: smallest and largest share of the grid's area that one rectangle covers.
        aspect: height over width is between ``aspect`` and 1 / ``aspect``.

    >>> real = {"image": torch.ones(1, 16, dtype=torch.bool)}
    >>> BlockMask(0.5, least=0.5, most=0.5, aspect=1)(real, {"image": (4, 4)}, torch.tensor([4])).target["image"].sum()
    tensor(8)
    """

    def __init__(self, ratio: float = 0.4, least: float = 0.1, most: float = 0.3, aspect: float = 0.3) -> None:
        super().__init__(ratio)
        if not 0 < least <= most <= 1:
            raise ValueError(f"least {least:g}, most {most:g}: two shares of the area, 0 < least <= most <= 1")
        require_value(0 < aspect <= 1, f"aspect {aspect:g}: above 0, at most 1 (squares)")
        self.least, self.most, self.aspect = least, most, aspect

    def order(self, name: str, grid: Grid, draw_B: Tensor) -> Tensor:
        high, wide, steps = grid[-2], grid[-1], math.prod(grid[:-2])
        blocks = math.ceil(4 * self.ratio / self.least) + 4  # enough even if they overlap
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
        require_axes(grids, "BlockMask", "rectangles")
        super().check(grids)


class TubeMask(Ratio):
    """Tube masking (VideoMAE, Tong 2022, arXiv 2203.12602): the same masked patches in every step of the first axis,
    such as time.

    Args:
        ratio: share of a sample's real tokens that is masked.

    >>> real = {"video": torch.ones(1, 8, dtype=torch.bool)}
    >>> TubeMask(0.5)(real, {"video": (2, 2, 2)}, torch.tensor([1])).visible["video"].view(2, 4).int().tolist()
    [[1, 0, 1, 0], [1, 0, 1, 0]]
    """

    def order(self, name: str, grid: Grid, draw_B: Tensor) -> Tensor:
        return noise(draw_B, f"mask/{name}", math.prod(grid[1:]))

    def visible(self, real: Mapping[str, Tensor], grids: Mapping[str, Grid], draw_B: Tensor) -> dict[str, Tensor]:
        # a patch that is real in any step is either masked or visible in all steps
        steps = {m: real[m].unflatten(1, (grids[m][0], -1)) for m in real}
        once = super().visible({m: mask_BST.any(dim=1) for m, mask_BST in steps.items()}, grids, draw_B)
        return {m: (mask_BST & once[m][:, None]).flatten(1) for m, mask_BST in steps.items()}

    def check(self, grids: Mapping[str, Grid]) -> None:
        require_axes(grids, "TubeMask", "tubes")
        super().check({m: grid[1:] for m, grid in grids.items()})


def require_axes(grids: Mapping[str, Grid], mask: str, shape: str) -> None:
    """Raise ValueError if a modality's grid has only one axis."""
    for m, grid in grids.items():
        if len(grid) < 2:
            raise ValueError(f"{mask}: {m} has {len(grid)} axis, and {shape} need 2; use SpanMask for it")


class SpanMask(Ratio):
    """Span masking (T5, SpanBERT) of a sequence, with geometric span lengths.

    Args:
        ratio: share of a sample's real tokens that is masked.
        mean: mean span length; the last span of a sample is cut at the ratio.

    >>> real = {"text": torch.ones(1, 12, dtype=torch.bool)}
    >>> SpanMask(0.5, mean=3)(real, {"text": (12,)}, torch.tensor([3])).target["text"].int().tolist()
    [[1, 1, 1, 0, 1, 0, 0, 0, 1, 1, 0, 0]]
    """

    def __init__(self, ratio: float = 0.5, mean: float = 3.0) -> None:
        super().__init__(ratio)
        require_value(mean >= 1, f"mean {mean:g}: span length of at least 1 token")
        self.mean = mean

    def order(self, name: str, grid: Grid, draw_B: Tensor) -> Tensor:
        tokens = math.prod(grid)
        start_BT, u_BT = noise(draw_B, f"mask/{name}/start", tokens), noise(draw_B, f"mask/{name}/length", tokens)
        stay = 1 - 1 / self.mean
        length_BT = 1 + (u_BT.clamp(min=1e-7).log() / math.log(stay)).floor() if stay else torch.ones_like(u_BT)
        place = torch.arange(tokens)
        order_BT = start_BT.argsort(dim=1)  # span k begins at the k-th place of the random order
        begin_BK, length_BK = order_BT, length_BT.gather(1, order_BT)
        covered_BKT = (place >= begin_BK[..., None]) & (place < (begin_BK + length_BK)[..., None])
        span_BT = first_of(covered_BKT, dim=1)
        return span_BT + (place - begin_BK.gather(1, span_BT)) / tokens  # the last span is cut at its end


def one_segment(n_B: Tensor, start_B: Tensor, length_B: Tensor) -> tuple[Tensor, Tensor]:
    """Choose the start and length ``[B]`` of one segment among n tokens, from two draws in [0, 1): InterBERT's release.

        s = floor(start (n + 1)),   L = 1 + floor(length n),   hidden: min(L, n - s)

        P(k hidden) = (2 (n - k) + 1) / (n (n + 1)) for k > 0,   P(0) = 1 / (n + 1),   mean (2n + 1) / 6

    As in the release, a start at n hides nothing, a segment is cut at the end of the text, and texts with fewer than
    four tokens have none hidden.

    >>> one_segment(torch.tensor([10, 10, 3]), torch.tensor([0.2, 0.8, 0.0]), torch.tensor([0.35, 0.95, 0.9]))
    (tensor([2, 8, 0]), tensor([4, 2, 0]))
    """
    start_B = (start_B * (n_B + 1)).long()
    length_B = (1 + (length_B * n_B).long()).minimum(n_B - start_B)
    return start_B, torch.where(n_B < 4, 0, length_B)


def anchored_segments(anchor_BT: Tensor, length_BT: Tensor, rate: float, most: int) -> Tensor:
    """Hide segments, bool ``[B, T]``: each token starts one with probability ``rate``, of 1 to ``most`` tokens.

        P(t hidden) = 1 - product over k = 0 .. min(t, most - 1) of (1 - rate (most - k) / most)

    All lengths are equally likely.

    Args:
        anchor_BT, length_BT: draws in [0, 1).

    >>> anchored_segments(torch.tensor([[0.0, 0.9, 0.9]]), torch.tensor([[0.7, 0.0, 0.0]]), rate=0.1, most=2).tolist()
    [[True, True, False]]
    """
    length_BT = torch.where(anchor_BT < rate, 1 + (length_BT * most).long(), 0)
    hidden_BT = torch.zeros_like(length_BT, dtype=torch.bool)
    for k in range(min(most, hidden_BT.shape[1])):  # tokens k places after an anchor
        hidden_BT[:, k:] |= length_BT[:, : hidden_BT.shape[1] - k] > k
    return hidden_BT


class SegmentMask(Corruption):
    """Masked segments of InterBERT (Lin 2020, arXiv 2003.13198): one of any length, or short ones at random anchors.

    :func:`one_segment` is the release's form; it hides 35 % of 10 tokens. :func:`anchored_segments` is our reading of
    the paper; it hides about 15 % of a text. A sample may have nothing hidden.

    Args:
        anchors: probability of each token to start a segment; by default one segment per sample.
        most: maximum number of tokens in a segment at an anchor.

    >>> real = {"text": torch.ones(1, 12, dtype=torch.bool)}
    >>> SegmentMask()(real, {"text": (12,)}, torch.tensor([3])).target["text"].int().tolist()
    [[0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1]]
    """

    def __init__(self, anchors: float | None = None, most: int = 2) -> None:
        if most < 1 or (anchors is not None and not 0 < anchors < 1):
            raise ValueError(
                f"anchors {anchors}, most {most}: a chance above 0 and below 1, such as 0.1; at least 1 token"
            )
        self.anchors, self.most = anchors, most

    def visible(self, real: Mapping[str, Tensor], grids: Mapping[str, Grid], draw_B: Tensor) -> dict[str, Tensor]:
        return {m: real_BT & ~self.hide_tokens(m, real_BT, draw_B).to(real_BT.device) for m, real_BT in real.items()}

    def hide_tokens(self, name: str, real_BT: Tensor, draw_B: Tensor) -> Tensor:
        """Mark hidden tokens, bool ``[B, T]``; places count real tokens only, not padding."""
        place_BT, n_B, purpose = real_BT.cumsum(dim=1) - 1, real_BT.sum(dim=1), f"mask/{name}/segment"
        if self.anchors is None:
            u_B2 = uniform_NK(draw_B, (f"{purpose}/start", f"{purpose}/length")).to(real_BT.device)
            start_B, length_B = one_segment(n_B, *u_B2.unbind(dim=1))
            return (place_BT >= start_B[:, None]) & (place_BT < (start_B + length_B)[:, None])
        anchor_BT, length_BT = (noise(draw_B, f"{purpose}/{w}", real_BT.shape[1]) for w in ("anchor", "length"))
        hidden_BT = anchored_segments(anchor_BT, length_BT, self.anchors, self.most).to(real_BT.device)
        return hidden_BT.gather(1, place_BT.clamp(min=0))
