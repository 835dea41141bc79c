"""Moving emoji: short clips of an emoji that moves, grows or turns, with captions that state its name and its motion.

The splits are those of :class:`Emoji`: 200 concepts, the vendor Fluent, and drawings for validation are held out.
Letters: B samples, F frames, S pixels of a side, R pixels of a side of a drawing, N concepts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from descant.datamodules.base import BatchDataset, NumberedDataset, Rows
from descant.datamodules.corpora.base import ImageViews, class_prompts, flatten_alpha
from descant.datamodules.corpora.emoji import Emoji
from descant.datamodules.corpora.emoji_pack import VENDORS
from descant.datamodules.corpora.emoji_set import EmojiSet
from descant.datamodules.sampling.resumable_sampler import Slot
from descant.modules.core.batch import Batch
from descant.modules.core.errors import require_value
from descant.modules.core.host import derive
from descant.modules.core.rng import mix_N, uniform_N, uniform_NK
from descant.modules.tokenizers.text import Tokenizer
from descant.modules.transforms.image import Augment

#: Motion -> direction of its path (right, down), of its size and of its angle. Played backwards, each is its opposite.
MOTIONS: dict[str, tuple[int, int, int, int]] = {
    "standing still": (0, 0, 0, 0),
    "moving left": (-1, 0, 0, 0),
    "moving right": (1, 0, 0, 0),
    "moving up": (0, -1, 0, 0),
    "moving down": (0, 1, 0, 0),
    "growing": (0, 0, 1, 0),
    "shrinking": (0, 0, -1, 0),
    "turning clockwise": (0, 0, 0, 1),
    "turning anticlockwise": (0, 0, 0, -1),
}
#: Captions: pieces that the tokenizer joins; evaluation uses the first.
FORMS = (("{name}", "{motion}"), ("{motion}", "{name}"), ("a clip of {name}", "{motion}"))
#: Least and most: side and path as shares of the frame, ratio of last size to first, turn in radians.
SIDE, WAY, RATIO, TURN = (0.38, 0.46), (0.25, 0.4), (1.6, 2.2), (math.radians(75), math.radians(150))
#: Pixels of the ten digits, three by five: a row of three bits each.
DIGITS = ("75557", "26227", "71747", "71717", "55711", "74717", "74757", "71122", "75757", "75717")
#: How far the middle of the plate is below that of the drawing, as a share of the side.
BELOW = 0.25


def plates() -> Tensor:
    """Make plates of the ten digits, uint8 ``[10, 7, 5]``: black on the grey that makes the mean of each plate 128.

    >>> plates()[7, 1:6, 1:4].eq(0).int().tolist()
    [[1, 1, 1], [0, 0, 1], [0, 0, 1], [0, 1, 0], [0, 1, 0]]
    """
    bits = [[[int(row) >> shift & 1 for shift in (2, 1, 0)] for row in rows] for rows in DIGITS]
    ink_NHW = F.pad(torch.tensor(bits), (1, 1, 1, 1))
    grey_N = 128 * ink_NHW[0].numel() / (1 - ink_NHW).sum(dim=(1, 2))
    return ((1 - ink_NHW) * grey_N.round()[:, None, None]).to(torch.uint8)


class Motion(NamedTuple):
    """Course of clips: motion and digit, and the place, size and angle in each frame.

    Numbers of motions and digits ``[B]``; middles ``[B, F, 2]`` (right, down) and sides ``[B, F]`` as shares of the
    frame; clockwise angles ``[B, F]`` in radians.
    """

    motion_B: Tensor
    digit_B: Tensor
    middle_BF2: Tensor
    side_BF: Tensor
    angle_BF: Tensor


def motions(draw_B: np.ndarray, frames: int) -> Motion:
    """Sample clips from random keys: each has a uniform motion, digit, size, place and speed.

        middle(t) = m + t way,   side(t) = s ratio^t,   angle(t) = t turn,   t = f / (F - 1) - 1/2

    The drawing is inside the frame from the first frame to the last, and upright in the middle of its turn.

    >>> clip = motions(np.arange(3), frames=3)
    >>> list(MOTIONS)[clip.motion_B[0]], [round(x, 2) for x in clip.middle_BF2[0, :, 0].tolist()]
    ('moving right', [0.36, 0.54, 0.72])
    """
    what = ("motion", "digit", "side", "speed", "x", "y")
    u_motion, u_digit, u_side, u_speed, *u_2 = uniform_NK(draw_B, [f"clip/{w}" for w in what]).unbind(1)
    motion_B, t_F = (u_motion * len(MOTIONS)).long(), torch.linspace(-0.5, 0.5, frames)
    sign_B4 = torch.tensor(list(MOTIONS.values()), dtype=torch.float32)[motion_B]
    way_B2 = sign_B4[:, :2] * between(WAY, u_speed)[:, None]
    log_B = sign_B4[:, 2] * between(RATIO, u_speed).log()
    turn_B, side_B = sign_B4[:, 3] * between(TURN, u_speed), between(SIDE, u_side)
    # half of the largest side, or of the diagonal if the drawing turns; below, also half of the path
    half_B = side_B / 2 * (log_B.abs() / 2).exp() * torch.where(turn_B == 0, 1.0, math.sqrt(2))
    room_B2 = 0.5 - half_B[:, None] - way_B2.abs() / 2
    middle_B2 = 0.5 + room_B2 * (2 * torch.stack(u_2, dim=1) - 1)
    return Motion(
        motion_B,
        (u_digit * 10).long(),
        middle_B2[:, None] + t_F[:, None] * way_B2[:, None],
        side_B[:, None] * (t_F * log_B[:, None]).exp(),
        t_F * turn_B[:, None],
    )


def between(bounds: tuple[float, float], u_B: Tensor) -> Tensor:
    return bounds[0] + (bounds[1] - bounds[0]) * u_B


def render(x_B4RR: Tensor, clip: Motion, size: int) -> Tensor:
    """Render frames of moving drawings, uint8 RGBA ``[B, 4, R, R] -> [B, F, 4, S, S]``, bilinear.

    The plate is on whole pixels.

    >>> clip = motions(np.arange(3), frames=3)
    >>> x_BF4SS = render(torch.full((3, 4, 8, 8), 255, dtype=torch.uint8), clip, 32)
    >>> x_BF4SS.shape, int(x_BF4SS[0, 0, 3, 0].sum())
    (torch.Size([3, 3, 4, 32, 32]), 0)
    """
    B, frames = clip.side_BF.shape
    cos, sin, middle = clip.angle_BF.cos(), clip.angle_BF.sin(), 2 * clip.middle_BF2 - 1
    a_BF22 = (
        torch.stack([torch.stack([cos, sin], -1), torch.stack([-sin, cos], -1)], -2) / clip.side_BF[..., None, None]
    )
    a_BF23 = torch.cat([a_BF22, -a_BF22 @ middle[..., None]], dim=-1)  # maps a place in the frame to one in the drawing
    grid = F.affine_grid(a_BF23.flatten(0, 1), [B * frames, 4, size, size], align_corners=False)
    x = x_B4RR.float() / 255
    x = torch.cat([x[:, :3] * x[:, 3:], x[:, 3:]], dim=1).repeat_interleave(frames, dim=0)  # premultiplied
    x = F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    x = torch.cat([x[:, :3] / x[:, 3:].clamp(min=1e-4), x[:, 3:]], dim=1).mul_(255).round_().clamp_(0, 255)
    x_BF4SS = x.to(torch.uint8).unflatten(0, (B, frames))
    grey_BHW = plates()[clip.digit_B]
    rgba_BHW4 = torch.stack([*[grey_BHW] * 3, torch.full_like(grey_BHW, 255)], dim=-1)
    (high, wide), (down_BF, right_BF) = grey_BHW.shape[1:], corners(clip, size)
    down_BFH1 = (down_BF[..., None] + torch.arange(high))[..., None]
    right_BF1W = (right_BF[..., None] + torch.arange(wide))[:, :, None]
    at = torch.arange(B).view(-1, 1, 1, 1), torch.arange(frames).view(-1, 1, 1)
    x_BF4SS[(*at, slice(None), down_BFH1, right_BF1W)] = rgba_BHW4[:, None]
    return x_BF4SS


def corners(clip: Motion, size: int) -> tuple[Tensor, Tensor]:
    """Locate the plate's first pixel: row and column, int64 ``[B, F]``. It turns with the drawing but stays upright."""
    down = torch.stack([-clip.angle_BF.sin(), clip.angle_BF.cos()], dim=-1)
    middle_BF2 = (clip.middle_BF2 + BELOW * clip.side_BF[..., None] * down) * size
    high, wide = plates().shape[1:]
    right_BF, down_BF = (middle_BF2 - torch.tensor([wide, high]) / 2).round().long().unbind(-1)
    return down_BF.clamp(0, size - high), right_BF.clamp(0, size - wide)


class ClipSet(NumberedDataset):
    """Clips of the drawings of a set of :class:`Emoji`; in evaluation, the id decides everything about a clip."""

    def __init__(self, data: MovingEmoji, drawings: EmojiSet, random: bool = False) -> None:
        super().__init__(data.seed, data.drop if random else None)
        self.data, self.drawings, self.random, self.id_N = data, drawings, random, drawings.id_N

    def draws(self, slots: Sequence[Slot]) -> np.ndarray:
        return super().draws(slots) if self.random else evaluation_keys(self.id_N[[slot.sample for slot in slots]])

    def present(self, index_N: np.ndarray) -> dict[str, Tensor]:
        image_N, text_N = self.drawings.present(index_N).values()
        return {"video": image_N, "text": text_N} | ({"image": image_N.clone()} if self.data.image else {})

    def rows(self, index_B: np.ndarray, draw_B: np.ndarray) -> Rows:
        data, concept_B = self.data, self.drawings.concept_N[index_B]
        clip = motions(draw_B, data.frames)
        form_B = (uniform_N(draw_B, "clip/form") * len(FORMS)).long() * self.random
        pieces = zip(form_B.tolist(), concept_B.tolist(), clip.motion_B.tolist(), strict=True)
        text_BT = torch.from_numpy(
            np.array([data.tokenizer.row([data.ids(p) for p in data.pieces(*x)]) for x in pieces])
        )
        targets = {name: torch.from_numpy(label_N[concept_B]) for name, label_N in self.drawings.label.items()}
        targets |= {"identity": torch.from_numpy(concept_B), "motion": clip.motion_B, "digit": clip.digit_B}
        name_B = torch.from_numpy(data.emoji.pack.key_N[concept_B])
        video = render(data.sprites(concept_B, self.drawings.vendor_N[index_B]), clip, data.size)
        return Rows({"video": video, "text": text_BT}, targets, name_B * len(MOTIONS) + clip.motion_B)


class MovingEmoji(ImageViews):
    """Clips of moving emoji and their captions: "fox, moving left", one of nine motions, with a digit on the drawing.

    Inputs: ``video``, float ``[B, F, 3, size, size]``, and ``text``. Targets: ``group`` and ``subgroup`` of the
    concept, ``identity``, its number, ``motion``, 0 to 8, and ``digit``, 0 to 9. The digit has three by five pixels at
    every size: in frames reduced to a quarter, template matching at the known place finds three in ten. A training clip
    is a pure function of (seed, epoch, index), an evaluation clip a function of its id. Clips with equal names and
    equal motions have equal content. Evaluation sets are those of Emoji with ``paired``.

    Args:
        batch_size: rows of one whole optimizer step.
        size: S, pixels per side of the frames.
        frames: F.
        image: a further modality ``image``, the middle frame.
        text: the tokenizer; the pack's own BPE with rows of 24 by default.
        groups, vendors, development, sealed, folder: as in Emoji.
        augment: augmentation of training frames, on the device, the same for all frames of a clip; by default only
            colours.
        kwargs: arguments of every data module.

    >>> data = MovingEmoji(tiny=True, batch_size=8, size=24, frames=4)
    >>> batch = next(iter(data.train_dataloader()))
    >>> batch.inputs["video"].shape, data.describe(0)  # RGBA; on the device float RGB
    (torch.Size([8, 4, 4, 24, 24]), 'keycap: #, turning clockwise')
    """

    def __init__(
        self,
        batch_size: int = 128,
        size: int = 48,
        frames: int = 8,
        image: bool = False,
        text: Tokenizer | None = None,
        groups: list[str] | None = None,
        vendors: list[str] | None = None,
        development: bool = False,
        sealed: bool = False,
        augment: Augment | None = None,
        folder: str | None = None,
        **kwargs: Any,
    ) -> None:
        self.image = image
        super().__init__(batch_size=batch_size, **kwargs)
        require_value(frames >= 2, f"frames {frames}: a motion needs at least 2")
        require_value(size >= 24, f"size {size}: the digit needs frames of at least 24 pixels")
        self.frames = frames
        colours = Augment(size, rotate=0.0, scale=1.0, stretch=1.0, shear=0.0, shift=0.0, background=0.0)
        self.set_views(size, augment or colours)
        if self.augment.mirror > 0 or self.augment.rotate > 30:
            raise ValueError(
                f"augment.mirror {self.augment.mirror} and rotate {self.augment.rotate:g}: captions say left "
                "and right; mirror 0 and rotate of at most 30 keep them true"
            )
        options: dict[str, Any] = {"text": text, "groups": groups, "vendors": vendors, "folder": folder}
        options |= {"development": development, "sealed": sealed, "paired": True, "tiny": self.tiny}
        self._emoji = Emoji(size=round(sum(SIDE) / 2 * size), **options)
        self.folder: Path = self.emoji.folder
        self._ids: dict[str, list[int]] = {}

    @property
    def emoji(self) -> Emoji:
        self._emoji.tiny = self.tiny  # a mixture may have set it since
        return self._emoji

    def setup(self, stage: str) -> None:
        self.emoji.trainer = self.trainer

    @property
    def modalities(self) -> tuple[str, ...]:
        return ("video", "text", *(["image"] if self.image else []))

    @property
    def tokenizer(self) -> Tokenizer:
        return self.emoji.tokenizer

    # what a clip is made of --------------------------------------------------------------------------------------

    def pieces(self, form: int, concept: int, motion: int) -> list[str]:
        """Return the pieces of a caption."""
        words = {"name": self.emoji.pack.names[concept], "motion": list(MOTIONS)[motion]}
        return [piece.format(**words) for piece in FORMS[form]]

    def ids(self, piece: str) -> list[int]:
        if piece not in self._ids:
            self._ids[piece] = self.tokenizer.ids(piece)
        return self._ids[piece]

    def sprites(self, concept_B: np.ndarray, vendor_B: np.ndarray) -> Tensor:
        """Return drawings, uint8 ``[B, 4, R, R]``."""
        drawings = {v: self.emoji.pack.downsample(VENDORS[v], self.emoji.size) for v in np.unique(vendor_B)}
        return torch.stack([drawings[v][c] for c, v in zip(concept_B, vendor_B, strict=True)])

    # the sets ----------------------------------------------------------------------------------------------------

    def training_set(self) -> ClipSet:
        return ClipSet(self, self.emoji.training_set(), random=True)

    def bank_set(self) -> ClipSet:
        return ClipSet(self, self.emoji.bank_set())

    def evaluation_sets(self, stage: str) -> dict[str, BatchDataset]:
        sets = self.emoji.evaluation_sets(stage)
        return {name: ClipSet(self, rows) for name, rows in sets.items() if isinstance(rows, EmojiSet)}

    # what evaluation reads ---------------------------------------------------------------------------------------

    @cached_property
    def classes(self) -> dict[str, list[str]]:
        return self.emoji.classes | {"motion": list(MOTIONS), "digit": list("0123456789")}

    def prompts(self, target: str) -> tuple[Tensor, list[str]]:
        return class_prompts(target, self.classes, {"-": " "}, ("{}", "a clip of {}"), self.tokenizer)

    def _clip(self, index: int) -> Motion:
        """Return the clip of an id, as in evaluation."""
        return motions(evaluation_keys(np.array([index])), self.frames)

    def describe(self, index: int) -> str:
        return ", ".join(self.pieces(0, index // len(VENDORS), int(self._clip(index).motion_B)))

    def picture(self, index: int) -> Tensor:
        concept, vendor = divmod(index, len(VENDORS))
        clip = render(self.sprites(np.array([concept]), np.array([vendor])), self._clip(index), self.size)
        return flatten_alpha(clip[0, self.frames // 2])

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        view, x = self.augment if self.training else self.pixels, batch.inputs["video"]
        key_N = derive(lambda key_B: key_B.repeat_interleave(self.frames), batch.rng_seed)
        batch.inputs["video"] = view(x.flatten(0, 1), key_N).unflatten(0, x.shape[:2])
        if self.image:
            batch.inputs["image"] = batch.inputs["video"][:, self.frames // 2]
        return batch


def evaluation_keys(id_N: np.ndarray) -> np.ndarray:
    """Compute the keys of clips in evaluation sets, from their ids."""
    return mix_N(id_N, "clip/fixed")
