"""Image grid of reconstructions. Letters: B samples, C channels, H, W pixels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from descant.callbacks.plots.style import FAINT, SMALL, TEXT, TITLE, page, text_width, with_style, wrap
from descant.modules.core.protocols import ReconstructionOutput
from descant.modules.core.rng import mix

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TILE, GAP, LABEL, HIDDEN = 96, 12, 96, (150, 150, 150)
#: Colours of categories: distinct, dark and light in turn; further categories have a colour by a hash of their number.
PALETTE = (
    *((27, 27, 30), (230, 75, 60), (60, 140, 220), (250, 200, 60), (70, 170, 90), (245, 240, 230)),
    *((150, 85, 170), (240, 140, 40), (110, 75, 50), (250, 170, 190), (40, 180, 180), (120, 120, 120)),
)
COLUMNS = ("seen", "predicted", "truth")


@with_style
def gallery(
    rebuilt: Mapping[str, ReconstructionOutput], present: Mapping[str, Tensor], names: Sequence[str], title: str
) -> Figure | None:
    """Draw a row per sample, three tiles per modality: visible input, prediction in its place, truth.

    Returns None without images.

    Args:
        rebuilt: modality -> reconstructions of all samples.
        present: modality -> bool ``[B]``: a sample without it has empty tiles.

    >>> x_B = torch.zeros(2, 3, 8, 8)
    >>> rebuilt = {"image": ReconstructionOutput(x_B, x_B > 1, x_B)}
    >>> made = gallery(rebuilt, {"image": torch.tensor([True, True])}, "ab", "title")
    >>> [text.get_text() for text in made.axes[0].texts]
    ['title', 'image', 'seen', 'predicted', 'truth', 'a', 'b']
    """
    shown = [m for m, r in rebuilt.items() if len(r.truth) and _plane(r.truth[0], r.truth[0]) is not None]
    if not shown:
        return None
    step, group = TILE + 4, len(COLUMNS) * (TILE + 4) + GAP
    top = 2 * GAP + TITLE + TEXT + SMALL + 12
    width = max(GAP + LABEL + len(shown) * group + GAP // 2, int(text_width(title, TITLE)) + 2 * GAP)
    canvas = np.full((top + len(names) * step + GAP, width, 3), 255, dtype=np.uint8)
    absent = []
    for j, m in enumerate(shown):
        for i in range(len(names)):
            x, y = GAP + LABEL + j * group, top + i * step
            if not bool(present[m][i]):
                absent.append((x + (group - GAP - 4) / 2, y + TILE / 2))
                continue
            for k, tile in enumerate(_tiles(ReconstructionOutput(*(t[i].cpu() for t in rebuilt[m])))):
                canvas[y : y + TILE, x + k * step : x + k * step + TILE] = tile
    figure, axes = page(canvas)
    axes.text(GAP, GAP, title, fontsize=TITLE, va="top")
    for j, m in enumerate(shown):
        x = GAP + LABEL + j * group
        axes.text(x, top - SMALL - 10, m, fontsize=TEXT, va="bottom")
        for k, column in enumerate(COLUMNS):
            axes.text(x + k * step + TILE / 2, top - 5, column, fontsize=SMALL, color=FAINT, ha="center", va="bottom")
    for i, name in enumerate(names):
        lines = "\n".join(wrap(name, SMALL, LABEL - 8, 5))
        axes.text(GAP, top + i * step, lines, fontsize=SMALL, va="top")
    for centre in absent:
        axes.text(*centre, "absent", fontsize=SMALL, color=FAINT, ha="center", va="center")
    return figure


def _tiles(sample: ReconstructionOutput) -> list[np.ndarray]:
    """Draw the columns of one sample: uint8 ``[TILE, TILE, 3]`` each."""
    x = sample.truth
    truth, visible, prediction = (_plane(t, x) for t in (x, sample.visible, sample.prediction.to(x.dtype)))
    assert truth is not None and visible is not None and prediction is not None
    low, high = _scale(x)
    # visible input is unchanged; if nothing was hidden, as in a tokenizer, all of it was predicted
    shown = prediction if bool(visible.all()) else torch.where(visible, truth, prediction)
    seen, predicted, whole = (_pixels(t, low, high) for t in (truth, shown, truth))
    seen_HW1 = visible.reshape(-1, *visible.shape[-2:]).all(0).numpy()[..., None]
    seen = np.where(seen_HW1, seen, np.array(HIDDEN, dtype=np.uint8))
    return [_tile(Image.fromarray(t)) for t in (seen, predicted, whole)]


def _plane(x: Tensor, like: Tensor) -> Tensor | None:
    """Select the image of one sample: ``[C, H, W]`` of numbers or ``[H, W]`` of categories; None if it has none.

    ``like``: the input, whose dtype decides between the two.
    """
    if not like.is_floating_point():
        return {2: x, 3: x[len(x) // 2]}.get(x.ndim) if x.ndim else None
    if x.ndim == 2:
        return x.flip(0)[None]  # a spectrogram's low bins are at the bottom
    if x.ndim == 4:
        return x[:, x.shape[1] // 2]
    return x if x.ndim == 3 else None


def _scale(x: Tensor) -> tuple[float, float]:
    """Return the numbers that are black and white: -1 and 1 for an image, else the least and the largest."""
    finite = x[x.isfinite()].float() if x.is_floating_point() else x.new_zeros(0).float()
    if len(finite) == 0 or (x.ndim == 3 and float(finite.abs().max()) <= 1.001):
        return -1.0, 1.0
    return float(finite.min()), float(finite.max())


def _pixels(x: Tensor, low: float, high: float) -> np.ndarray:
    """Convert to uint8 ``[H, W, 3]``."""
    if not x.is_floating_point():
        white = (255, 255, 255)  # below 0 is no category
        colours = np.array([_colour(c) for c in range(max(int(x.max()), 0) + 1)] + [white], dtype=np.uint8)
        return colours[x.clamp(min=-1).numpy()]
    x = ((x.float().nan_to_num(low, high, low) - low) / max(high - low, 1e-12)).clamp(0, 1)
    x = x[:3] if len(x) >= 3 else x.mean(0, keepdim=True).expand(3, -1, -1)
    return (x * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()


def _colour(category: int) -> tuple[int, int, int]:
    if category < len(PALETTE):
        return PALETTE[category]
    code = mix(category, "colour")
    return code & 255, code >> 8 & 255, code >> 16 & 255


def _tile(image: Image.Image) -> np.ndarray:
    """Centre an image in a tile, as large as fits; small images show their pixels."""
    share = TILE / max(image.size)
    size = max(round(image.width * share), 1), max(round(image.height * share), 1)
    tile = Image.new("RGB", (TILE, TILE), "white")
    how = Image.Resampling.NEAREST if share >= 1 else Image.Resampling.BOX
    tile.paste(image.resize(size, how), ((TILE - size[0]) // 2, (TILE - size[1]) // 2))
    return np.asarray(tile)
