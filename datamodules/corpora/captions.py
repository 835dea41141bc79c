"""Captions of several kinds, one drawn at each visit: names as the web gives them, and what is measured in a drawing.

Letters: B samples of a batch, R drawings of a corpus, C concepts, S sources of captions, U distinct captions, T tokens,
K colour terms, H and W pixels.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from descant.modules.core.errors import nearest
from descant.modules.core.rng import mix, uniform_N
from descant.modules.tokenizers.text import Tokenizer

#: The eleven basic colour terms of English (Berlin and Kay 1969), each with the CSS colours that stand for it.
COLOURS = {
    "black": ("000000", "202020"),
    "white": ("ffffff", "f5f5f5"),
    "grey": ("808080", "a9a9a9", "d3d3d3", "696969"),
    "red": ("ff0000", "dc143c", "b22222", "8b0000"),
    "orange": ("ffa500", "ff8c00", "ff7f50"),
    "yellow": ("ffff00", "ffd700", "f0e68c"),
    "green": ("008000", "32cd32", "006400", "90ee90", "6b8e23"),
    "blue": ("0000ff", "1e90ff", "000080", "87ceeb", "4682b4"),
    "purple": ("800080", "9932cc", "4b0082", "9370db"),
    "pink": ("ffc0cb", "ff69b4", "ff1493"),
    "brown": ("8b4513", "a0522d", "d2b48c", "654321"),
}
OPAQUE = 128  # alpha from which a pixel belongs to the drawing
SECOND = 0.15  # share of a drawing's area from which its second colour is named
BITS = 6  # of a colour channel, in the table of nearest terms


def oklab(rgb_N3: Tensor) -> Tensor:
    """sRGB in 0..1 to Oklab ``[N, 3]`` (lightness 0..1, two of hue), where equal distances look about equal.

        Lab = M2 (M1 linear(rgb))^(1/3)        Ottosson 2020, "A perceptual color space for image processing"

    >>> [round(x, 2) for x in oklab(torch.tensor([[1.0, 0.0, 0.0]]))[0].tolist()]  # red
    [0.63, 0.22, 0.13]
    """
    linear_N3 = torch.where(rgb_N3 <= 0.04045, rgb_N3 / 12.92, ((rgb_N3 + 0.055) / 1.055) ** 2.4)
    to_lms = torch.tensor(
        [
            [0.4122214708, 0.5363325363, 0.0514459929],
            [0.2119034982, 0.6806995451, 0.1073969566],
            [0.0883024619, 0.2817188376, 0.6299787005],
        ]
    )
    to_lab = torch.tensor(
        [
            [0.2104542553, 0.7936177850, -0.0040720468],
            [1.9779984951, -2.4285922050, 0.4505937099],
            [0.0259040371, 0.7827717662, -0.8086757660],
        ]
    )
    return (linear_N3 @ to_lms.T).clamp(min=0) ** (1 / 3) @ to_lab.T


@lru_cache(maxsize=1)
def _nearest() -> tuple[Tensor, Tensor]:
    """For every colour of 6 bits a channel: the number of its nearest term, and its lightness."""
    side = 1 << BITS
    level = (torch.arange(side) + 0.5) / side
    lab_N3 = oklab(torch.cartesian_prod(level, level, level))
    codes = [(k, code) for k, codes in enumerate(COLOURS.values()) for code in codes]
    rgb = torch.tensor([[int(code[i : i + 2], 16) for i in (0, 2, 4)] for _, code in codes])
    term = torch.tensor([k for k, _ in codes])
    return term[torch.cdist(lab_N3, oklab(rgb / 255)).argmin(dim=1)], lab_N3[:, 0]


@dataclass
class MeasuredCaption:
    """What is measured in R drawings: ``share_RK`` of each colour in the area, and where it lies.

    ``x_RK``, ``y_RK``: its centre less that of the drawing, in sides of the drawing's box (right and down are
    positive). ``far_RK``: its mean distance from the drawing's centre, over that of the whole drawing. ``side_R``: the
    longer side of the box, of the picture's. ``wide_R``: the box's width over its height. ``filled_R``: share of the
    box. ``light_R``: mean Oklab lightness. ``dark_R``: share of black in the rim. ``mirror_R``: overlap with its own
    mirror image, intersection over union. An empty drawing has zeros.
    """

    share_RK: np.ndarray
    x_RK: np.ndarray
    y_RK: np.ndarray
    far_RK: np.ndarray
    side_R: np.ndarray
    wide_R: np.ndarray
    filled_R: np.ndarray
    light_R: np.ndarray
    dark_R: np.ndarray
    mirror_R: np.ndarray

    def colours(self, r: int) -> list[int]:
        """Numbers of the drawing's one or two main colours, by area; none of an empty drawing."""
        order = np.argsort(-self.share_RK[r], kind="stable")[:2]
        return [int(k) for i, k in enumerate(order) if self.share_RK[r, k] >= (SECOND if i else 1e-9)]


def measure(pictures_R4HW: Tensor) -> MeasuredCaption:
    """Colours, extent and rim of RGBA drawings, uint8 ``[R, 4, H, W]``; only pixels that are mostly opaque count.

    A pixel's colour is the term whose nearest prototype is nearest to it in Oklab.

    >>> square = torch.zeros(1, 4, 8, 8, dtype=torch.uint8)
    >>> square[:, 0, 2:6, 2:6], square[:, 3, 2:6, 2:6] = 250, 255
    >>> found = measure(square)
    >>> [list(COLOURS)[k] for k in found.colours(0)], float(found.side_R[0]), float(found.filled_R[0])
    (['red'], 0.5, 1.0)
    """
    parts = [_measure(part) for part in pictures_R4HW.split(256)]  # floats of a whole corpus would be gigabytes
    return MeasuredCaption(*(np.concatenate([part[i] for part in parts]) for i in range(len(parts[0]))))


def _measure(x_R4HW: Tensor) -> list[np.ndarray]:
    rows, _, high, wide = x_R4HW.shape
    terms, lightness = _nearest()
    r, g, b = (x_R4HW[:, c].long() >> (8 - BITS) for c in range(3))
    colour_RHW = (r << 2 * BITS) | (g << BITS) | b
    mask_RHW = x_R4HW[:, 3] >= OPAQUE
    term_RHW = terms[colour_RHW]
    area_R = mask_RHW.sum(dim=(1, 2)).clamp(min=1).double()
    y_RHW, x_RHW = (
        t.expand(rows, high, wide).double() for t in (torch.arange(high)[:, None], torch.arange(wide)[None])
    )
    top_R, bottom_R = _ends(mask_RHW.any(dim=2))
    left_R, right_R = _ends(mask_RHW.any(dim=1))
    box_h_R, box_w_R = (bottom_R - top_R).double(), (right_R - left_R).double()
    side_R = torch.maximum(box_h_R, box_w_R).clamp(min=1)
    cx_R, cy_R = ((t * mask_RHW).sum(dim=(1, 2)) / area_R for t in (x_RHW, y_RHW))
    dx_RHW, dy_RHW = ((t - c[:, None, None]) / side_R[:, None, None] for t, c in ((x_RHW, cx_R), (y_RHW, cy_R)))
    far_RHW = (dx_RHW**2 + dy_RHW**2).sqrt()
    # one number a (drawing, colour): each sum over pixels is one pass
    terms_K = len(COLOURS)
    bin_N = (torch.arange(rows)[:, None, None] * terms_K + term_RHW)[mask_RHW]

    def total(weight_RHW: Tensor | None) -> Tensor:
        weight_N = None if weight_RHW is None else weight_RHW[mask_RHW]
        return torch.bincount(bin_N, weight_N, minlength=rows * terms_K).view(rows, terms_K).double()

    count_RK = total(None)
    x_RK, y_RK, far_RK = (total(t) / count_RK.clamp(min=1) for t in (dx_RHW, dy_RHW, far_RHW))
    far_R = (far_RHW * mask_RHW).sum(dim=(1, 2)) / area_R
    inner_RHW = 1 - F.max_pool2d(F.pad(1 - mask_RHW.float(), (1, 1, 1, 1), value=1.0)[:, None], 3, 1)[:, 0]
    rim_RHW = mask_RHW & (inner_RHW < 0.5)
    black_RHW = rim_RHW & (term_RHW == list(COLOURS).index("black"))
    light_R = (lightness[colour_RHW].double() * mask_RHW).sum(dim=(1, 2)) / area_R
    mirror_RHW = _mirrored(mask_RHW, left_R, right_R)
    both_R = (mask_RHW & mirror_RHW).sum(dim=(1, 2)).double()
    either_R = (mask_RHW | mirror_RHW).sum(dim=(1, 2)).clamp(min=1)
    found = [
        count_RK / area_R[:, None],
        x_RK,
        y_RK,
        far_RK / far_R.clamp(min=1e-9)[:, None],
        torch.maximum(box_h_R, box_w_R) / max(high, wide),
        box_w_R / box_h_R.clamp(min=1),
        mask_RHW.sum(dim=(1, 2)) / (box_h_R * box_w_R).clamp(min=1),
        light_R,
        black_RHW.sum(dim=(1, 2)) / rim_RHW.sum(dim=(1, 2)).clamp(min=1),
        both_R / either_R,
    ]
    return [t.double().numpy() for t in found]


def _ends(any_RN: Tensor) -> tuple[Tensor, Tensor]:
    """First of the True, and one past the last; both 0 where there is none."""
    size = any_RN.shape[1]
    some_R = any_RN.any(dim=1)
    first_R, last_R = any_RN.int().argmax(dim=1), size - any_RN.flip(1).int().argmax(dim=1)
    return first_R * some_R, last_R * some_R


def _mirrored(mask_RHW: Tensor, left_R: Tensor, right_R: Tensor) -> Tensor:
    """Left for right within the drawing's own box."""
    wide = mask_RHW.shape[2]
    from_RW = (left_R + right_R - 1)[:, None] - torch.arange(wide)
    inside_RW = (from_RW >= 0) & (from_RW < wide)
    at_RHW = from_RW.clamp(0, wide - 1)[:, None].expand(mask_RHW.shape)
    return mask_RHW.gather(2, at_RHW) & inside_RW[:, None]


# what captions are written from ----------------------------------------------------------------------------------


@dataclass
class Drawings:
    """R drawings that get captions: which concept, by whom, and what is known of it.

    Args:
        name_C, kind_C, code_C: of each concept its name, its coarse kind and its stable id.
        concept_R, hand_R: of each drawing its concept, and the number of who drew it.
        hands: names of those who draw.
        pictures: number of who drew -> all concepts as uint8 RGBA ``[C, 4, H, W]``.
        told_R: the drawing whose alt-text each drawing is handed; its own where None.
    """

    name_C: Sequence[str]
    kind_C: Sequence[str]
    code_C: Sequence[str]
    concept_R: np.ndarray
    hand_R: np.ndarray
    hands: Sequence[str]
    pictures: Callable[[int], Tensor]
    told_R: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.concept_R)

    @cached_property
    def code_R(self) -> list[str]:
        pairs = zip(self.concept_R.tolist(), self.hand_R.tolist(), strict=True)
        return [f"{self.code_C[c]}/{self.hands[h]}" for c, h in pairs]

    @cached_property
    def measured(self) -> MeasuredCaption:
        """Of each drawing, once: a picture is looked at before training, at its full size."""
        found: list[MeasuredCaption] = []
        order = []
        for hand in np.unique(self.hand_R):
            rows = np.flatnonzero(self.hand_R == hand)
            found.append(measure(self.pictures(int(hand))[torch.from_numpy(self.concept_R[rows])]))
            order.append(rows)
        back = np.argsort(np.concatenate(order), kind="stable")
        return MeasuredCaption(*(np.concatenate([getattr(m, name) for m in found])[back] for name in vars(found[0])))

    def permuted(self) -> Drawings:
        """Each drawing is handed the alt-text of the next one, in one cycle through the drawings of each hand in turn.

        Within a hand no two drawings show one concept, so neighbours show two. A pure function of what the drawings
        are, not of their order.
        """
        turn = [mix(code, "sham") for code in self.code_R]
        cycle = np.array(sorted(range(len(self)), key=lambda r: (int(self.hand_R[r]), turn[r])))
        told_R = np.empty(len(self), dtype=np.int64)
        told_R[cycle] = np.roll(cycle, -1)
        return replace(self, told_R=told_R)


class CaptionSource:
    """One kind of caption: ``texts(drawings)`` gives one text to each of R drawings, always the same."""

    def texts(self, drawings: Drawings) -> list[str]:
        raise NotImplementedError


class AltText(CaptionSource):
    """The drawing's name, and for a share of the drawings the name of another concept: diverse, and noisy.

        text_r = name of (another concept if r is among the round(noise R) first by mix(seed, r) else its own)

    Drawings are chosen, not concepts: on the web each picture stands on a page of its own, whose author wrote well or
    badly, and another picture of the same thing may be told right. What is told is fixed; training more repeats it.
    Other names are those of concepts that are drawn here: no name of a concept that training never sees.

    Args:
        noise: share of the drawings that are told wrong.
        seed: of the choice, apart from the run's: all runs read the same web.

    Raises:
        ValueError: if ``noise`` is no share, or there is no other name to tell.

    >>> names, pictures = ["sun", "moon", "fox"], lambda hand: torch.zeros(3, 4, 8, 8, dtype=torch.uint8)
    >>> kinds, hand_R = ["sky", "sky", "animal"], np.zeros(3, dtype=int)
    >>> drawings = Drawings(names, kinds, list("abc"), np.arange(3), hand_R, ["x"], pictures)
    >>> AltText(noise=0.0).texts(drawings), sum(a == b for a, b in zip(AltText(0.67).texts(drawings), names))
    (['sun', 'moon', 'fox'], 1)
    """

    def __init__(self, noise: float = 0.5, seed: int = 0) -> None:
        if not 0 <= noise <= 1:
            near = min(max(noise, 0.0), 1.0) if noise == noise else 0.5
            raise ValueError(f"noise {noise} is no share of the drawings; nearest: {near}")
        self.noise, self.seed = noise, seed

    def wrong(self, drawings: Drawings) -> np.ndarray:
        """Bool ``[R]``: which drawings are told wrong."""
        order = sorted(range(len(drawings)), key=lambda r: mix(self.seed, "alt/noise", drawings.code_R[r]))
        wrong_R = np.zeros(len(drawings), dtype=bool)
        wrong_R[order[: round(self.noise * len(drawings))]] = True
        return wrong_R

    def texts(self, drawings: Drawings) -> list[str]:
        own = [drawings.name_C[c] for c in drawings.concept_R.tolist()]
        wrong_R = self.wrong(drawings)
        names = sorted({name.casefold(): name for name in own}.items())
        if wrong_R.any() and len(names) < 2:
            raise ValueError(
                f"noise {self.noise}: all drawings have the name {names[0][1]!r}, so none can be told wrong"
            )
        place = {folded: k for k, (folded, _) in enumerate(names)}
        told = list(own)
        for r in np.flatnonzero(wrong_R).tolist():
            # any step but a whole round ends at another name
            step = 1 + mix(self.seed, "alt/other", drawings.code_R[r]) % (len(names) - 1)
            told[r] = names[(place[own[r].casefold()] + step) % len(names)][1]
        return told if drawings.told_R is None else [told[r] for r in drawings.told_R.tolist()]


def _places(m: MeasuredCaption, r: int) -> list[str]:
    """Where each main colour lies: on one side of the drawing, at its rim, at its heart, or nowhere in particular."""
    terms, said = list(COLOURS), []
    for k in m.colours(r):
        x, y, far = m.x_RK[r, k], m.y_RK[r, k], m.far_RK[r, k]
        if max(abs(x), abs(y)) > 0.08:
            across = "right" if x > 0 else "left"
            place = ("bottom" if y > 0 else "top") if abs(y) >= abs(x) else across
        else:
            place = "edge" if far > 1.15 else "middle" if far < 0.85 else "everywhere"
        said.append(f"{terms[k]} {place}")
    return said


def _word(value: float, bounds: Sequence[float], words: Sequence[str]) -> str:
    return words[sum(value >= bound for bound in bounds)]


class SyntheticCaption(CaptionSource):
    """What is measured in the drawing, and its coarse kind: true of each drawing, and the same of many.

    * ``short`` (the paper's SSC): main colours and kind, "red and green food fruit".
    * ``descriptive`` (DSC): and how large, of what shape and how full it is.
    * ``dense`` (DSC+): and where its colours lie, its outline, brightness, symmetry and number of colours.

    Colours are the nearest basic terms in Oklab, by area of opaque pixels. The paper asks a tuned language model;
    here nothing is said that was not measured, so nothing is made up.

    Args:
        form: short, descriptive or dense.

    >>> picture = torch.zeros(1, 4, 8, 8, dtype=torch.uint8)
    >>> picture[:, 0], picture[:, 3] = 250, 255
    >>> drawings = Drawings(["apple"], ["food-fruit"], ["a"], np.array([0]), np.array([0]), ["x"], lambda hand: picture)
    >>> SyntheticCaption("descriptive").texts(drawings)
    ['red food fruit, large, square, full']
    """

    def __init__(self, form: Literal["short", "descriptive", "dense"] = "short") -> None:
        forms = {"short": self.short, "descriptive": self.descriptive, "dense": self.dense}
        if form not in forms:
            raise ValueError(f"form {form!r} is none of {', '.join(forms)}; nearest: {_near(form, list(forms))}")
        self.form = form
        self._write = forms[form]

    def texts(self, drawings: Drawings) -> list[str]:
        m, kinds = drawings.measured, [drawings.kind_C[c].replace("-", " ") for c in drawings.concept_R.tolist()]
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
    """Alt-text and synthetic caption in one text, ``"synthetic, alt"``: a codec that cuts it loses the end first.

    Args:
        alt: the first kind. synthetic: the second.
    """

    def __init__(self, alt: CaptionSource, synthetic: CaptionSource) -> None:
        self.alt, self.synthetic = alt, synthetic

    def texts(self, drawings: Drawings) -> list[str]:
        pairs = zip(self.synthetic.texts(drawings), self.alt.texts(drawings), strict=True)
        return [", ".join(pair) for pair in pairs]


# which is drawn --------------------------------------------------------------------------------------------------


class Drift:
    """Probabilities that move over the run: ``pi_e = (1 - t) probs + t to`` with ``t = min(1, e / epochs)``.

    A sample's visit knows its epoch, so a resumed run goes on as it would have.

    Args:
        to: the probabilities at the end.
        epochs: e from which they hold.

    Raises:
        ValueError: if ``epochs`` is less than 1.
    """

    def __init__(self, to: dict[str, float], epochs: int) -> None:
        if epochs < 1:
            raise ValueError(f"schedule: epochs {epochs}: probabilities need at least 1 to move")
        self.to, self.epochs = to, epochs


class CaptionMixer:
    """Which kind of caption a sample gets at a visit: ``c ~ Categorical(pi)``, drawn from the sample's own key.

        c_b = the first source whose cumulated pi exceeds uniform(draw_b, "caption/source")

    So a visit is a pure function of (seed, epoch, index), drawn anew each epoch, and neither ranks, workers nor batches
    matter. Samples of equal caption get equal keys and are no negatives of each other: many drawings are a "red and
    yellow food fruit", and two drawings of a concept have its name. One key cannot also say that two drawings show one
    concept while one is told by name and the other by its looks: these remain each other's negatives.

    Source: Lai 2024, "Revisit Large-Scale Image-Caption Data" (arXiv 2410.02740).

    Args:
        sources: name -> kind of caption.
        probs: name -> probability, at the start where there is a schedule; made to sum to one, 0 where not given.
        schedule: how they move over the epochs, or none.
        sham: ``permute`` hands each drawing the alt-text of another drawing, by a fixed permutation in one cycle
            (a control): shares, lengths and words stay, and what alt-texts say of the picture goes.

    Raises:
        ValueError: for a probability of no source, a negative one, or none above 0.

    >>> mixer = CaptionMixer({"alt": AltText(), "synthetic": SyntheticCaption()}, probs={"alt": 1, "synthetic": 3})
    >>> mixer.pi(0).tolist()
    [0.25, 0.75]
    """

    def __init__(
        self,
        sources: dict[str, CaptionSource],
        probs: dict[str, float],
        schedule: Drift | None = None,
        sham: Literal["permute"] | None = None,
    ) -> None:
        if not sources:
            raise ValueError("sources: a mixer needs at least one kind of caption, such as alt: AltText")
        for name in sources:
            if not re.fullmatch(r"\w+", name):
                raise ValueError(f"sources: {name!r}: letters, digits and _ only, since it begins names of metrics")
        self.sources, self.schedule, self.sham = dict(sources), schedule, sham
        self.calls = 0  # draws so far, of method and control alike
        self._start_S = self._checked("probs", probs)
        self._end_S = self._start_S if schedule is None else self._checked("schedule.to", schedule.to)

    def _checked(self, what: str, probs: dict[str, float]) -> np.ndarray:
        for name, value in probs.items():
            if name not in self.sources:
                near = _near(name, list(self.sources))
                raise ValueError(f"{what}: no source {name!r} among {', '.join(self.sources)}; nearest: {near}")
            if not 0 <= value < math.inf:
                raise ValueError(f"{what}: {name} {value} is no probability; nearest: 0")
        pi_S = np.array([float(probs.get(name, 0.0)) for name in self.sources])
        if not pi_S.sum() > 0:
            first = next(iter(self.sources))
            raise ValueError(f"{what}: no source has a probability above 0; nearest: {{{first}: 1.0}}")
        return pi_S / pi_S.sum()

    def pi(self, epoch: int | np.ndarray) -> np.ndarray:
        """Float64 ``[..., S]``: the probabilities of an epoch, or of each of several."""
        if self.schedule is None:
            return np.broadcast_to(self._start_S, (*np.shape(epoch), len(self.sources)))
        t = np.minimum(1.0, np.asarray(epoch, dtype=np.float64) / self.schedule.epochs)[..., None]
        return (1 - t) * self._start_S + t * self._end_S

    def choose(self, draw_B: np.ndarray, epoch_B: np.ndarray) -> np.ndarray:
        """Int64 ``[B]``: number of the source of each visit."""
        edge_BS = self.pi(epoch_B).cumsum(axis=-1)
        edge_BS = edge_BS / edge_BS[:, -1:]  # the last edge is 1 exactly, so a source of probability 0 is never drawn
        u_B = uniform_N(draw_B, "caption/source").double().numpy()
        return (u_B[:, None] >= edge_BS).sum(axis=-1)

    def write(self, drawings: Drawings, codec: Tokenizer) -> MixedCaptions:
        """All that may be said of some drawings, as token ids."""
        handed = drawings if self.sham is None else drawings.permuted()
        return MixedCaptions(self, [source.texts(handed) for source in self.sources.values()], codec)


class MixedCaptions:
    """All captions of a corpus, one a source and drawing, and which of them a visit gets.

    Args:
        mixer: that draws. codec: of the texts.
        texts: for each source R texts.
    """

    def __init__(self, mixer: CaptionMixer, texts: Sequence[Sequence[str]], codec: Tokenizer) -> None:
        self.mixer, self.codec = mixer, codec
        number: dict[str, int] = {}
        self.text_SR = np.array([[number.setdefault(text, len(number)) for text in row] for row in texts])
        self.texts = list(number)
        ids = [codec.ids(text) for text in self.texts]
        self.tokens_UT = torch.tensor([codec.row([piece]) for piece in ids])
        self.length_U = np.array([len(piece) for piece in ids])
        self.cut_U = self.length_U + len(codec.begin) + len(codec.end) > codec.length
        folded: dict[str, int] = {}
        self.key_U = torch.tensor([folded.setdefault(text.casefold(), len(folded)) for text in self.texts])

    def draw(self, row_B: np.ndarray, draw_B: np.ndarray, epoch_B: np.ndarray) -> tuple[Tensor, Tensor]:
        """``tokens_BT`` and ``key_B``, both int64, of visits of the drawings ``row_B``."""
        self.mixer.calls += 1
        text_B = torch.from_numpy(self.text_SR[self.mixer.choose(draw_B, epoch_B), row_B])
        return self.tokens_UT[text_B], self.key_U[text_B]

    def statistics(self, row_B: np.ndarray, draw_B: np.ndarray, epoch_B: np.ndarray) -> dict[str, float]:
        """Of the captions that these visits get, without drawing for training.

        ``tokens``: their mean length in tokens before a row is filled or cut. ``truncated``: share that the codec cuts.
        ``coverage``: distinct tokens that are read, over the codec's vocabulary. ``distinct``: distinct captions over
        captions. ``{source}_share``: share of each source.
        """
        chosen_B = self.mixer.choose(draw_B, epoch_B)
        text_B = self.text_SR[chosen_B, row_B]
        read = np.unique(self.tokens_UT[torch.from_numpy(np.unique(text_B))].numpy())
        words = np.setdiff1d(read, [self.codec.pad, *self.codec.begin, *self.codec.end])
        shares = {f"{name}_share": float((chosen_B == s).mean()) for s, name in enumerate(self.mixer.sources)}
        return {
            "tokens": float(self.length_U[text_B].mean()),
            "truncated": float(self.cut_U[text_B].mean()),
            "coverage": len(words) / self.codec.vocabulary,
            "distinct": len(np.unique(text_B)) / len(text_B),
            **shares,
        }


def _near(name: str, known: list[str]) -> str:
    return str(nearest(name, known, cutoff=0.0))
