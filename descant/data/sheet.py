"""Contact sheet of samples: a grid of images, each with its split and caption."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from descant.callbacks.plots.style import CYCLE, FAINT, INK, SMALL, TITLE, page, pixels, with_style, wrap

_TILE, _GAP, _LINE, _LINES = 160, 14, 16, 3  # pixels, and lines of a caption
_EMPTY = 238


@dataclass
class Tile:
    """One sample: its image (if None, ``note`` gives the reason), split and caption."""

    image: Image.Image | None
    split: str
    caption: str
    note: str = "no image"


@with_style
def sheet(tiles: Sequence[Tile], title: str, columns: int = 6) -> Image.Image:
    """Draw the tiles row by row under a title; a coloured line below each image marks its split.

    >>> sheet([Tile(Image.new("RGB", (50, 20)), "train", "a cat")] * 8, "cats").size
    (1058, 540)
    """
    columns = min(columns, max(len(tiles), 3))
    high, top = _TILE + 8 + (_LINES + 1) * _LINE, 2 * _GAP + 20
    width, height = _GAP + columns * (_TILE + _GAP), top + -(-len(tiles) // columns) * (high + _GAP)
    canvas = Image.new("RGB", (width, height), "white")
    places = [(_GAP + n % columns * (_TILE + _GAP), top + n // columns * (high + _GAP)) for n in range(len(tiles))]
    for tile, (x, y) in zip(tiles, places, strict=True):
        canvas.paste((_EMPTY,) * 3, (x, y, x + _TILE, y + _TILE))
        if tile.image is not None:
            image = _fit_tile(tile.image)
            canvas.paste(image, (x + (_TILE - image.width) // 2, y + (_TILE - image.height) // 2))
    figure, axes = page(np.asarray(canvas))
    axes.text(_GAP, _GAP, wrap(title, TITLE, width - 2 * _GAP, 1)[0], fontsize=TITLE, va="top")
    splits = list(dict.fromkeys(tile.split for tile in tiles))
    for tile, (x, y) in zip(tiles, places, strict=True):
        colour, below = CYCLE[splits.index(tile.split) % len(CYCLE)], y + _TILE
        axes.plot([x, x + _TILE], [below + 1.5] * 2, color=colour, linewidth=3, solid_capstyle="butt")
        axes.text(x, below + 6, tile.split, fontsize=SMALL, color=colour, va="top")
        caption, ink = " ".join(tile.caption.split())[:1000], INK if tile.caption else FAINT
        lines = wrap(caption or "no caption", SMALL, _TILE, _LINES)
        axes.text(x, below + 6 + _LINE, "\n".join(lines), fontsize=SMALL, color=ink, va="top")
        if tile.image is None:
            note = "\n".join(wrap(tile.note, SMALL, _TILE - 12, 5))
            axes.text(x + _TILE / 2, y + _TILE / 2, note, fontsize=SMALL, color=FAINT, ha="center", va="center")
    return Image.fromarray(pixels(figure))


def _fit_tile(image: Image.Image) -> Image.Image:
    """Resize the image so that its longer side fills a tile; enlarged images show their pixels."""
    scale = _TILE / max(image.size)
    method = Image.Resampling.NEAREST if scale >= 2 else Image.Resampling.LANCZOS
    return image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))), method)
