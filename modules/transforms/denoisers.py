"""Mixture of denoisers (UL2): span corruption, extreme span corruption and prefix language modelling of one text.

    hidden = denoiser(text, u)                         which tokens are hidden: spans apart, or a suffix
    input  = [mode] visible tokens, one sentinel for each hidden span
    target = of each span its sentinel and its tokens

Source: Tay 2022 (UL2, arXiv 2205.05131), whose appendix calls ``random_spans_noise_mask`` and ``prefix_lm`` of T5's
release (google-research/text-to-text-transfer-transformer, t5/data/preprocessors.py). Where paper and release differ,
both are available: by ``deviation`` and ``free`` of :class:`SpanCorruption`, and ``share`` and ``uniform`` of
:class:`Suffix`.
Letters: B texts, T tokens of a text, K segments, U slots of a target, D denoisers.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from descant.modules.core.errors import hint, require_value
from descant.modules.core.rng import mix_N, uniform_N

#: Mode tokens: regular, sequential and extreme denoising (in UL2's checkpoints [NLU], [S2S] and [NLG]).
MODES = ("R", "S", "X")
#: UL2's spans: (mean, rate), the first two R and the others X; and the share of S (section 4.5: about a fifth).
SPANS, SEQUENTIAL = ((3, 0.15), (8, 0.15), (3, 0.5), (8, 0.5), (64, 0.15), (64, 0.5)), 0.2


def mode_number(mode: str) -> int:
    """Return the place of a mode in MODES. Raise ValueError with the nearest for one that does not exist.

    >>> mode_number("X")
    2
    """
    if mode not in MODES:
        raise ValueError(f"mode {mode!r}: not one of {', '.join(MODES)}{hint(mode, MODES, most=0)}")
    return MODES.index(mode)


# which tokens are hidden ----------------------------------------------------------------------------------------------


def segments(items_B: Tensor, parts_B: Tensor, u_BT: Tensor) -> Tensor:
    """Draw lengths of ``parts`` non-empty segments of ``items``, all ways equally likely: int64 ``[B, K = T]``.

    The ``parts - 1`` smallest draws among the first ``items`` are cuts, as in T5's ``_random_segmentation``; T is at
    least ``items``. After the last segment, lengths are 0.

    >>> segments(torch.tensor([5]), torch.tensor([2]), torch.tensor([[0.0, 0.5, 0.1, 0.7, 0.3, 0.0]])).tolist()
    [[2, 3, 0, 0, 0, 0]]
    """
    place_T = torch.arange(u_BT.shape[1])
    key_BT = u_BT.masked_fill((place_T == 0) | (place_T >= items_B[:, None]), torch.inf)  # a cut is before an item
    cut_BT = key_BT.argsort(dim=1, stable=True).argsort(dim=1) < parts_B[:, None] - 1
    one_BT = (place_T < items_B[:, None]).long()
    return torch.zeros_like(one_BT).scatter_add_(1, cut_BT.long().cumsum(dim=1), one_BT)


def _weighted_segments(items_B: Tensor, parts_B: Tensor, weight_BK: Tensor) -> Tensor:
    """Compute lengths of ``parts`` segments of ``items``: one each, the rest by weights, int64 ``[B, K]``."""
    there_BK = torch.arange(weight_BK.shape[1]) < parts_B[:, None]
    total_BK = (weight_BK * there_BK).double().cumsum(dim=1)
    end_BK = (total_BK / total_BK[:, -1:] * (items_B - parts_B)[:, None]).round().long()
    return there_BK + end_BK.diff(dim=1, prepend=torch.zeros_like(end_BK[:, :1]))


def span_counts(length_B: Tensor, mean: float, rate: float) -> tuple[Tensor, Tensor]:
    """Count hidden tokens, ``max(1, round(L rate))``, and spans, ``max(1, round(hidden / mean))``: int64 ``[B]`` each.

    At least one token stays visible, and one between any two spans.

    >>> [x.tolist() for x in span_counts(torch.tensor([512, 64, 2]), 3, 0.15)]
    [[77, 10, 1], [26, 3, 1]]
    """
    hidden_B = torch.minimum((length_B.double() * rate).round().long().clamp(min=1), length_B - 1)
    spans_B = (hidden_B.double() / mean).round().long().clamp(min=1)
    return hidden_B, torch.minimum(spans_B, torch.minimum(hidden_B, length_B - hidden_B))


def _span_mask(span_BK: Tensor, gap_BK: Tensor, tokens: int) -> Tensor:
    """Mark spans, bool ``[B, tokens]``: ``gap_0 span_0 gap_1 span_1 ...``."""
    end_BK = (span_BK + gap_BK).cumsum(dim=1)
    edge_BT = torch.zeros(len(end_BK), tokens + 1, dtype=torch.long)
    for place_BK, step in ((end_BK - span_BK, 1), (end_BK, -1)):
        edge_BT.scatter_add_(1, place_BK.clamp(max=tokens), step * (span_BK > 0).long())
    return edge_BT.cumsum(dim=1)[:, :tokens] > 0


class Denoiser:
    """Base of denoisers, which choose the tokens of a text to hide and to predict.

    Args:
        mode: token before the input, R, S or X. weight: weight of the denoiser in a mixture, 0 or more.
    """

    #: Whether a hidden span has a sentinel in the input; otherwise it is the end of the text.
    marked = True

    def __init__(self, mode: str, weight: float) -> None:
        self.number, self.mode, self.weight = mode_number(mode), mode, weight
        require_value(weight >= 0, f"weight {weight:g}: 0 or more")

    def hide_tokens(self, length_B: Tensor, u_B2T: Tensor) -> Tensor:
        """Return the hidden tokens of texts of 2 to T - 2 tokens, by draws from [0, 1): bool ``[B, T - 2]``."""
        raise NotImplementedError

    def spans(self, length: int) -> int:
        """Count the sentinels of a text. Raise ValueError for a text that is no longer than a span."""
        return 0


class SpanCorruption(Denoiser):
    """Span corruption (T5): it hides ``round(L rate)`` tokens in ``round(L rate / mean)`` separate spans.

    Args:
        mean: mean number of tokens in a span. rate: share of the tokens that are hidden.
        mode: R or X; if not given, X for a mean of 12 or more or a rate of 0.3 or more (UL2's definition).
        weight: weight in a mixture.
        free: spans may be anywhere. Otherwise a text begins with a visible token and ends with a hidden one, as in T5's
            release; a single span, as in UL2's (64, .15), is then always the end of the text.
        deviation: draw span lengths from a normal distribution, as in UL2's paper, with this standard deviation in
            units of ``mean``; they are at least 1 and scaled to the number of tokens (our reading). Otherwise all ways
            to cut are equally likely, as in the release.

    >>> u_B2T = torch.rand(1, 2, 12, generator=torch.Generator().manual_seed(0))
    >>> SpanCorruption(2, 0.4).hide_tokens(torch.tensor([10]), u_B2T).int().tolist()
    [[0, 1, 1, 0, 0, 0, 0, 0, 1, 1]]
    """

    def __init__(
        self,
        mean: float,
        rate: float,
        mode: str | None = None,
        weight: float = 1.0,
        free: bool = False,
        deviation: float | None = None,
    ) -> None:
        super().__init__(mode or ("X" if mean >= 12 or rate >= 0.3 else "R"), weight)
        if not 0 < rate < 1:
            raise ValueError(f"rate {rate:g}: nothing is {'hidden' if rate <= 0 else 'left'}; such as 0.15")
        if not mean >= 1 or (deviation is not None and not deviation >= 0):
            raise ValueError(f"mean {mean:g}, deviation {deviation}: at least 1 token of a span, and at least 0")
        self.mean, self.rate, self.free, self.deviation = mean, rate, free, deviation

    def hide_tokens(self, length_B: Tensor, u_B2T: Tensor) -> Tensor:
        hidden_B, spans_B = span_counts(length_B, self.mean, self.rate)
        span_BK = segments(hidden_B, spans_B, u_B2T[:, 0])
        if self.deviation is not None:
            normal_BK = (2 * u_B2T[:, 0].double().clamp(min=1e-9) - 1).erfinv() * 2**0.5
            span_BK = _weighted_segments(hidden_B, spans_B, (1 + self.deviation * normal_BK).clamp(min=1 / self.mean))
        ends = int(self.free)  # the first gap and the one after the last span may then be empty
        gap_BK = segments(length_B - hidden_B + 2 * ends, spans_B + ends, u_B2T[:, 1])
        gap_BK[:, 0] -= ends
        return _span_mask(span_BK, gap_BK, u_B2T.shape[2] - 2)

    def spans(self, length: int) -> int:
        if length <= self.mean:
            raise ValueError(f"mean {self.mean:g}: a text of {length} tokens is no longer than a span")
        return int(span_counts(torch.tensor([length]), self.mean, self.rate)[1])


class Suffix(Denoiser):
    """Prefix language modelling: it hides the end of a text, without a sentinel.

    Args:
        share: hidden share of the tokens, on average.
        uniform: draw the length from 1 to ``2 share L - 1``: with share 0.25 as in UL2's paper (our reading), with 0.5
            as in T5's ``prefix_lm``, which UL2's appendix calls. Otherwise it is ``round(share L)``.
        mode, weight: as in every denoiser.

    >>> Suffix(0.25, uniform=False).hide_tokens(torch.tensor([8]), torch.zeros(1, 2, 10)).int().tolist()
    [[0, 0, 0, 0, 0, 0, 1, 1]]
    """

    marked = False

    def __init__(self, share: float = 0.25, uniform: bool = True, mode: str = "S", weight: float = 1.0) -> None:
        super().__init__(mode, weight)
        if not 0 < share < 1 or (uniform and share > 0.5):
            raise ValueError(f"share {share:g}: above 0 and {'at most 0.5, if uniform' if uniform else 'below 1'}")
        self.share, self.uniform = share, uniform

    def hide_tokens(self, length_B: Tensor, u_B2T: Tensor) -> Tensor:
        size_B = length_B.double() * self.share
        if self.uniform:
            size_B = 1 + (u_B2T[:, 0, 0] * ((2 * size_B).round() - 1).clamp(min=1)).floor()
        size_B = torch.minimum(size_B.round().long().clamp(min=1), length_B - 1)
        place_T = torch.arange(u_B2T.shape[2] - 2)
        return (place_T >= (length_B - size_B)[:, None]) & (place_T < length_B[:, None])


# inputs and targets ---------------------------------------------------------------------------------------------------


class Denoised(NamedTuple):
    """Inputs and targets of B texts, real tokens first, then 0.

    Attributes:
        input_BT, target_BU: int64 ids. real_BT, real_BU: bool, those that are not padding.
        text_BU: bool, tokens of the text: neither sentinels nor padding.
        mode_B: int64, the place of the mode token in MODES. denoiser_B: int64, the denoiser's number in the mixture.
    """

    input_BT: Tensor
    real_BT: Tensor
    target_BU: Tensor
    real_BU: Tensor
    text_BU: Tensor
    mode_B: Tensor
    denoiser_B: Tensor


def compact_rows(keep_BT: Tensor, *x_BT: Tensor) -> tuple[Tensor, ...]:
    """Move kept entries to the front, in order, with zeros after them: in ``keep_BT`` itself and each other tensor."""
    order_BT = (~keep_BT).long().argsort(dim=1, stable=True)
    kept_BT = keep_BT.gather(1, order_BT)
    return kept_BT, *(x.gather(1, order_BT).where(kept_BT, torch.zeros((), dtype=x.dtype)) for x in x_BT)


def divide_spans(
    ids_BT: Tensor, length_B: Tensor, hidden_BT: Tensor, marked_B: Tensor, first: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the first five tensors of :class:`Denoised`; the k-th span of a text has the sentinel ``first + k``.

    A target ends with the last span, as in T5's release.

    >>> hidden_BT = torch.tensor([[False, True, True, False, True, False]])
    >>> parts = divide_spans(torch.arange(10, 16)[None], torch.tensor([6]), hidden_BT, torch.tensor([True]), 90)
    >>> parts[0][parts[1]].tolist(), parts[2][parts[3]].tolist()
    ([10, 90, 13, 91, 15], [90, 11, 12, 91, 14])
    """
    real_BT = torch.arange(ids_BT.shape[1]) < length_B[:, None]
    begins_BT = hidden_BT & ~F.pad(hidden_BT[:, :-1], (1, 0))
    sentinel_BT, mark_BT = first - 1 + begins_BT.long().cumsum(dim=1), begins_BT & marked_B[:, None]
    seen_BT, input_BT = compact_rows((real_BT & ~hidden_BT) | mark_BT, torch.where(mark_BT, sentinel_BT, ids_BT))
    # before each token there is a slot for a sentinel
    pairs = (mark_BT, hidden_BT), (sentinel_BT, ids_BT), (torch.zeros_like(hidden_BT), hidden_BT)
    keep_BU, both_BU, text_BU = (torch.stack(pair, dim=2).flatten(1) for pair in pairs)
    asked_BU, target_BU, text_BU = compact_rows(keep_BU, both_BU, text_BU)
    return input_BT, seen_BT, target_BU, asked_BU, text_BU


class MixtureOfDenoisers:
    """Mixture of denoisers (UL2): each text is corrupted by one, drawn by weight, which a mode token names.

    Args:
        denoisers: UL2's seven if not given: S has a fifth, and the others equal parts of the rest.
        sham: ``permute`` gives each text the mode token of an independent draw from the same mixture.

    >>> ids_BT, length_B = torch.arange(100, 164).expand(2, 64), torch.tensor([64, 50])
    >>> out = MixtureOfDenoisers([SpanCorruption(8, 0.5)])(ids_BT, length_B, np.array([1, 2]), first=900)
    >>> out.text_BU.sum(dim=1).tolist(), [MODES[m] for m in out.mode_B.tolist()]
    ([32, 25], ['X', 'X'])
    """

    def __init__(self, denoisers: list[Denoiser] | None = None, sham: Literal["permute"] | None = None) -> None:
        if denoisers is None:
            spans = [SpanCorruption(*pair, weight=(1 - SEQUENTIAL) / len(SPANS)) for pair in SPANS]
            denoisers = [*spans, Suffix(weight=SEQUENTIAL)]
        self.denoisers, self.sham = denoisers, sham
        weight_D = torch.tensor([denoiser.weight for denoiser in denoisers], dtype=torch.float64)
        if not weight_D.sum() > 0:
            raise ValueError(f"denoisers: {'their weights are all 0' if denoisers else 'none'}")
        self._below_D = (weight_D / weight_D.sum()).cumsum(dim=0)[:-1]
        self._number_D = torch.tensor([denoiser.number for denoiser in denoisers])

    def spans(self, length: int) -> int:
        """Return the most sentinels of a text. Raise ValueError for a text that is no longer than a span."""
        return max(denoiser.spans(length) for denoiser in self.denoisers)

    def draw(self, key_B: np.ndarray, purpose: str = "denoiser") -> Tensor:
        """Draw the denoiser of each text by its key: int64 ``[B]``."""
        return torch.bucketize(uniform_N(key_B, purpose).double(), self._below_D, right=True)

    def __call__(
        self, ids_BT: Tensor, length_B: Tensor, key_B: np.ndarray, first: int, denoiser_B: Tensor | None = None
    ) -> Denoised:
        """Corrupt texts (int64, of 2 tokens or more), as a pure function of texts and keys.

        ``first``: id of the first sentinel; ``denoiser_B``: numbers of the denoisers, if not drawn.
        """
        if (length_B < 2).any():
            raise ValueError(f"a text of {int(length_B.min())} tokens: 2 are the least, one to see and one to predict")
        B, T = ids_BT.shape
        denoiser_B = self.draw(key_B) if denoiser_B is None else denoiser_B
        u_B2T = uniform_N(mix_N(key_B, "denoise")[:, None], np.arange(2 * (T + 2), dtype=np.uint64)).view(B, 2, T + 2)
        hidden_BT, marked_B = torch.zeros(B, T, dtype=torch.bool), torch.zeros(B, dtype=torch.bool)
        for number, denoiser in enumerate(self.denoisers):
            of_B = denoiser_B == number
            hidden_BT[of_B], marked_B[of_B] = denoiser.hide_tokens(length_B[of_B], u_B2T[of_B]), denoiser.marked
        named_B = denoiser_B if self.sham is None else self.draw(key_B, "denoiser/sham")
        return Denoised(
            *divide_spans(ids_BT, length_B, hidden_BT, marked_B, first), self._number_D[named_B], denoiser_B
        )
