"""Captions from several sources, one sampled at each visit: noisy alt-texts, and texts from measurements of a drawing.

Letters: B samples of a batch, R drawings of a corpus, C concepts, S sources of captions, U distinct captions, T tokens.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from descant.datamodules.corpora.measure import COLOURS, MeasuredCaption, measure
from descant.datamodules.names import require_known
from descant.modules.core.errors import require_value
from descant.modules.core.rng import mix, uniform_N
from descant.modules.tokenizers.text import Tokenizer


@dataclass
class Drawings:
    """R drawings to be captioned: their concepts and artists.

    Args:
        name_C, kind_C, code_C: name, coarse class and stable id of each concept.
        concept_R, hand_R: concept and artist number of each drawing.
        hands: names of the artists.
        images: artist number -> all concepts as uint8 RGBA ``[C, 4, H, W]``.
        alt_R: the drawing whose alt-text each drawing gets; None: its own.
    """

    name_C: Sequence[str]
    kind_C: Sequence[str]
    code_C: Sequence[str]
    concept_R: np.ndarray
    hand_R: np.ndarray
    hands: Sequence[str]
    images: Callable[[int], Tensor]
    alt_R: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.concept_R)

    @cached_property
    def code_R(self) -> list[str]:
        pairs = zip(self.concept_R.tolist(), self.hand_R.tolist(), strict=True)
        return [f"{self.code_C[c]}/{self.hands[h]}" for c, h in pairs]

    @cached_property
    def measurements(self) -> MeasuredCaption:
        """Measure the drawings once, before training, at full size."""
        order = [np.flatnonzero(self.hand_R == hand) for hand in np.unique(self.hand_R)]
        parts = [measure(self.images(int(self.hand_R[r[0]]))[torch.from_numpy(self.concept_R[r])]) for r in order]
        back = np.argsort(np.concatenate(order), kind="stable")
        return MeasuredCaption(*(np.concatenate([getattr(m, name) for m in parts])[back] for name in vars(parts[0])))

    def permute_captions(self, within_kind: bool = False) -> Drawings:
        """Give each drawing the alt-text of the next one, in one cycle through the drawings of each artist in turn.

        Neighbours show different concepts, since an artist draws each once. The order of the drawings has no influence.
        ``within_kind``: one cycle per artist and coarse class, so that an alt-text names a concept of the same class.
        """
        turn = [mix(code, "sham") for code in self.code_R]
        hand_R, kind_R = self.hand_R.tolist(), [self.kind_C[c] for c in self.concept_R]
        cycle = np.array(sorted(range(len(self)), key=lambda r: (hand_R[r], kind_R[r] if within_kind else "", turn[r])))
        group_R = np.array([f"{hand_R[r]}/{kind_R[r]}" if within_kind else "" for r in cycle])
        alt_R = np.empty(len(self), dtype=np.int64)
        for group in dict.fromkeys(group_R.tolist()):
            rows = cycle[group_R == group]
            alt_R[rows] = np.roll(rows, -1)
        return replace(self, alt_R=alt_R)


class CaptionSource:
    """A source of captions: ``texts(drawings)`` returns one fixed text for each of R drawings."""

    def texts(self, drawings: Drawings) -> list[str]:
        raise NotImplementedError


class AltText(CaptionSource):
    """Noisy alt-texts: the drawing's name, or for a share of the drawings the name of another concept.

        text_r = name of (another concept if r is among the round(noise R) first by mix(seed, r) else its own)

    Noise is drawn per drawing, not per concept, since on the web each image has its own page. It is fixed: longer
    training repeats it. Wrong names come from concepts in ``drawings``, so never from a held-out concept.

    Args:
        noise: share of the drawings with a wrong name.
        seed: seed of the choice; independent of the run's seed.

    >>> names, images = ["sun", "moon", "fox"], lambda hand: torch.zeros(3, 4, 8, 8, dtype=torch.uint8)
    >>> kinds, hand_R = ["sky", "sky", "animal"], np.zeros(3, dtype=int)
    >>> drawings = Drawings(names, kinds, list("abc"), np.arange(3), hand_R, ["x"], images)
    >>> AltText(noise=0.0).texts(drawings), sum(a == b for a, b in zip(AltText(0.67).texts(drawings), names))
    (['sun', 'moon', 'fox'], 1)
    """

    def __init__(self, noise: float = 0.5, seed: int = 0) -> None:
        if not 0 <= noise <= 1:
            near = min(max(noise, 0.0), 1.0) if noise == noise else 0.5
            raise ValueError(f"noise {noise} is no share of the drawings; nearest: {near}")
        self.noise, self.seed = noise, seed

    def wrong(self, drawings: Drawings) -> np.ndarray:
        """Return bool ``[R]``: which drawings have a wrong name."""
        order = sorted(range(len(drawings)), key=lambda r: mix(self.seed, "alt/noise", drawings.code_R[r]))
        wrong_R = np.zeros(len(drawings), dtype=bool)
        wrong_R[order[: round(self.noise * len(drawings))]] = True
        return wrong_R

    def texts(self, drawings: Drawings) -> list[str]:
        texts = [drawings.name_C[c] for c in drawings.concept_R.tolist()]
        wrong_R = self.wrong(drawings)
        names = sorted({name.casefold(): name for name in texts}.items())
        if wrong_R.any() and len(names) < 2:
            raise ValueError(f"noise {self.noise}: all drawings have the name {names[0][1]!r}, so none can be wrong")
        place = {folded: k for k, (folded, _) in enumerate(names)}
        for r in np.flatnonzero(wrong_R).tolist():
            # any step but a whole round ends at another name
            step = 1 + mix(self.seed, "alt/other", drawings.code_R[r]) % (len(names) - 1)
            texts[r] = names[(place[texts[r].casefold()] + step) % len(names)][1]
        return texts if drawings.alt_R is None else [texts[r] for r in drawings.alt_R.tolist()]


def _places(m: MeasuredCaption, r: int) -> list[str]:
    """Name the place of each main colour: a side of the drawing, its edge, its middle, or everywhere."""
    terms, places = list(COLOURS), []
    for k in m.colours(r):
        x, y, far = m.x_RK[r, k], m.y_RK[r, k], m.far_RK[r, k]
        if max(abs(x), abs(y)) > 0.08:
            across = "right" if x > 0 else "left"
            place = ("bottom" if y > 0 else "top") if abs(y) >= abs(x) else across
        else:
            place = "edge" if far > 1.15 else "middle" if far < 0.85 else "everywhere"
        places.append(f"{terms[k]} {place}")
    return places


def _word(value: float, bounds: Sequence[float], words: Sequence[str]) -> str:
    return words[sum(value >= bound for bound in bounds)]


class SyntheticCaption(CaptionSource):
    """Synthetic captions: measurements of the drawing and its coarse class; always true, rarely unique.

    * ``short`` (the paper's SSC): main colours and class, "red and green food fruit".
    * ``descriptive`` (DSC): also size, shape and fill.
    * ``dense`` (DSC+): also places of its colours, outline, brightness, symmetry and number of colours.

    Colours are the nearest basic terms in Oklab, by area of opaque pixels. The paper uses a tuned language model;
    measurements cannot hallucinate.

    Args:
        form: short, descriptive or dense.

    >>> image = torch.zeros(1, 4, 8, 8, dtype=torch.uint8)
    >>> image[:, 0], image[:, 3] = 250, 255
    >>> drawings = Drawings(["apple"], ["food-fruit"], ["a"], np.array([0]), np.array([0]), ["x"], lambda hand: image)
    >>> SyntheticCaption("descriptive").texts(drawings)
    ['red food fruit, large, square, full']
    """

    def __init__(self, form: Literal["short", "descriptive", "dense"] = "short") -> None:
        forms = {"short": self.short, "descriptive": self.descriptive, "dense": self.dense}
        require_known("form", [form], list(forms))
        self.form = form
        self._write = forms[form]

    def texts(self, drawings: Drawings) -> list[str]:
        m, kinds = drawings.measurements, [drawings.kind_C[c].replace("-", " ") for c in drawings.concept_R.tolist()]
        return [self._write(m, r, kind) for r, kind in enumerate(kinds)]

    @staticmethod
    def short(m: MeasuredCaption, r: int, kind: str) -> str:
        terms = list(COLOURS)
        return f"{' and '.join(terms[k] for k in m.colours(r))} {kind}".strip()

    @classmethod
    def descriptive(cls, m: MeasuredCaption, r: int, kind: str) -> str:
        size = _word(m.side_R[r], (0.6, 0.88), ("small", "medium", "large"))
        shape = _word(m.wide_R[r], (0.8, 1.25), ("tall", "square", "wide"))
        fill = _word(m.filled_R[r], (0.45, 0.72), ("thin", "loose", "full"))
        return ", ".join([cls.short(m, r, kind), size, shape, fill])

    @classmethod
    def dense(cls, m: MeasuredCaption, r: int, kind: str) -> str:
        outline = "dark outline" if m.dark_R[r] > 0.5 else "no outline"
        light = _word(m.light_R[r], (0.55, 0.8), ("dim", "plain", "bright"))
        mirror = "symmetric" if m.mirror_R[r] > 0.85 else "lopsided"
        count = _word(int((m.share_RK[r] >= 0.05).sum()), (2, 3, 4), ("one", "two", "three", "many"))
        return ", ".join([cls.descriptive(m, r, kind), *_places(m, r), outline, light, mirror, f"{count} colours"])


class Fused(CaptionSource):
    """Alt-text and synthetic caption in one text, ``"synthetic, alt"``: truncation loses the end first.

    Args:
        alt, synthetic: the two sources.
    """

    def __init__(self, alt: CaptionSource, synthetic: CaptionSource) -> None:
        self.alt, self.synthetic = alt, synthetic

    def texts(self, drawings: Drawings) -> list[str]:
        pairs = zip(self.synthetic.texts(drawings), self.alt.texts(drawings), strict=True)
        return [", ".join(pair) for pair in pairs]


# which source is sampled -----------------------------------------------------------------------------------------


class Drift:
    """A linear schedule of probabilities: ``pi_e = (1 - t) probs + t to`` with ``t = min(1, e / epochs)``.

    Args:
        to: the probabilities at the end.
        epochs: the epoch e from which they hold.
    """

    def __init__(self, to: dict[str, float], epochs: int) -> None:
        require_value(epochs >= 1, f"schedule: epochs {epochs}: a schedule needs at least 1")
        self.to, self.epochs = to, epochs


class CaptionMixer:
    """Sampler of the caption source of each sample, at each visit: ``c ~ Categorical(pi)``.

        c_b = the first source whose cumulated pi exceeds uniform(draw_b, "caption/source")

    A visit is a pure function of (seed, epoch, index), whatever the ranks, workers and batches. Samples with equal
    captions have equal content keys and are never each other's negatives. Two drawings of one concept with captions
    from different sources are each other's negatives.

    Source: Lai 2024, "Revisit Large-Scale Image-Caption Data" (arXiv 2410.02740).

    Args:
        sources: name -> source of captions.
        probs: name -> probability, at the start of a schedule; normalised to sum to one; 0 for names not given.
        schedule: schedule of the probabilities over the epochs, or none.
        sham: a control. ``permute`` gives each drawing the alt-text of another drawing, by a fixed permutation in one
            cycle. Shares, lengths and words stay, but alt-texts no longer match images. ``permute-kind`` takes another
            drawing of the same coarse class, which the synthetic captions name.

    >>> mixer = CaptionMixer({"alt": AltText(), "synthetic": SyntheticCaption()}, probs={"alt": 1, "synthetic": 3})
    >>> mixer.pi(0).tolist()
    [0.25, 0.75]
    """

    def __init__(
        self,
        sources: dict[str, CaptionSource],
        probs: dict[str, float],
        schedule: Drift | None = None,
        sham: Literal["permute", "permute-kind"] | None = None,
    ) -> None:
        require_value(sources, "sources: a mixer needs at least one source of captions, such as alt: AltText")
        for name in sources:
            if not re.fullmatch(r"\w+", name):
                raise ValueError(f"sources: {name!r}: letters, digits and _ only, since names of metrics begin with it")
        self.sources, self.schedule, self.sham = dict(sources), schedule, sham
        self.calls = 0  # number of samplings so far, of method and control alike
        self._start_S = self._check_probs("probs", probs)
        self._end_S = self._start_S if schedule is None else self._check_probs("schedule.to", schedule.to)

    def _check_probs(self, what: str, probs: dict[str, float]) -> np.ndarray:
        require_known(what, list(probs), list(self.sources))
        for name, value in probs.items():
            if not 0 <= value < math.inf:
                raise ValueError(f"{what}: {name} {value} is no probability; nearest: 0")
        pi_S = np.array([float(probs.get(name, 0.0)) for name in self.sources])
        if not pi_S.sum() > 0:
            first = next(iter(self.sources))
            raise ValueError(f"{what}: no source has a probability above 0; nearest: {{{first}: 1.0}}")
        return pi_S / pi_S.sum()

    def pi(self, epoch: int | np.ndarray) -> np.ndarray:
        """Return float64 ``[..., S]``: the probabilities in an epoch, or in each of several."""
        if self.schedule is None:
            return np.broadcast_to(self._start_S, (*np.shape(epoch), len(self.sources)))
        t = np.minimum(1.0, np.asarray(epoch, dtype=np.float64) / self.schedule.epochs)[..., None]
        return (1 - t) * self._start_S + t * self._end_S

    def choose(self, draw_B: np.ndarray, epoch_B: np.ndarray) -> np.ndarray:
        """Choose the source of each visit: int64 ``[B]``, its number."""
        edge_BS = self.pi(epoch_B).cumsum(axis=-1)
        edge_BS = edge_BS / edge_BS[:, -1:]  # the last edge is 1 exactly: no source of probability 0 is sampled
        u_B = uniform_N(draw_B, "caption/source").double().numpy()
        return (u_B[:, None] >= edge_BS).sum(axis=-1)

    def write(self, drawings: Drawings, tokenizer: Tokenizer) -> MixedCaptions:
        """Write the captions of some drawings from all sources, as token ids."""
        drawings = drawings if self.sham is None else drawings.permute_captions(within_kind=self.sham == "permute-kind")
        return MixedCaptions(self, [source.texts(drawings) for source in self.sources.values()], tokenizer)


class MixedCaptions:
    """All captions of a corpus, one for each source and drawing; each visit samples one.

    Args:
        mixer: samples the source. tokenizer: encodes the texts.
        texts: R texts for each source.
    """

    def __init__(self, mixer: CaptionMixer, texts: Sequence[Sequence[str]], tokenizer: Tokenizer) -> None:
        self.mixer, self.tokenizer = mixer, tokenizer
        number: dict[str, int] = {}
        self.text_SR = np.array([[number.setdefault(text, len(number)) for text in row] for row in texts])
        self.texts = list(number)
        ids = [tokenizer.ids(text) for text in self.texts]
        self.tokens_UT = torch.tensor([tokenizer.row([piece]) for piece in ids])
        self.length_U = np.array([len(piece) for piece in ids])
        self.cut_U = self.length_U + len(tokenizer.begin) + len(tokenizer.end) > tokenizer.length
        folded: dict[str, int] = {}
        self.key_U = torch.tensor([folded.setdefault(text.casefold(), len(folded)) for text in self.texts])

    def draw(self, row_B: np.ndarray, draw_B: np.ndarray, epoch_B: np.ndarray) -> tuple[Tensor, Tensor]:
        """Sample ``tokens_BT`` and ``key_B``, both int64, for visits to the drawings ``row_B``."""
        self.mixer.calls += 1
        text_B = torch.from_numpy(self.text_SR[self.mixer.choose(draw_B, epoch_B), row_B])
        return self.tokens_UT[text_B], self.key_U[text_B]

    def statistics(self, row_B: np.ndarray, draw_B: np.ndarray, epoch_B: np.ndarray) -> dict[str, float]:
        """Compute statistics of the captions of these visits, without counting a call.

        ``tokens``: mean length in tokens before padding and truncation. ``truncated``: share of truncated captions.
        ``coverage``: distinct tokens divided by the tokenizer's vocabulary. ``distinct``: share of distinct captions.
        ``{source}_share``: share of each source.
        """
        chosen_B = self.mixer.choose(draw_B, epoch_B)
        text_B = self.text_SR[chosen_B, row_B]
        read = np.unique(self.tokens_UT[torch.from_numpy(np.unique(text_B))].numpy())
        words = np.setdiff1d(read, [self.tokenizer.pad, *self.tokenizer.begin, *self.tokenizer.end])
        shares = {f"{name}_share": float((chosen_B == s).mean()) for s, name in enumerate(self.mixer.sources)}
        return {
            "tokens": float(self.length_U[text_B].mean()),
            "truncated": float(self.cut_U[text_B].mean()),
            "coverage": len(words) / self.tokenizer.vocabulary,
            "distinct": len(np.unique(text_B)) / len(text_B),
            **shares,
        }
