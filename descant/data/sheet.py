"""Contact sheet of samples: a grid of images, each with its split and caption."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

_TILE, _GAP, _TEXT, _LINES, _TITLE = 160, 14, 13, 3, 20  # pixels, and lines of a caption
_INK, _FAINT, _PAPER, _EMPTY = (30, 30, 30), (120, 120, 120), (255, 255, 255), (238, 238, 238)
#: Colours of splits, by Okabe and Ito: they differ for readers with any kind of colour blindness.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


@dataclass
class Tile:
    """One sample: its image (None: ``note`` gives why there is none), split and caption."""

    image: Image.Image | None
    split: str
    caption: str
    note: str = "no image"


def sheet(tiles: Sequence[Tile], title: str, columns: int = 6) -> Image.Image:
    """The tiles row by row under a title; a coloured line below each image marks its split.

    >>> sheet([Tile(Image.new("RGB", (50, 20)), "train", "a cat")] * 8, "cats").size
    (1058, 540)
    """
    columns = min(columns, max(len(tiles), 3))
    high = _TILE + 8 + (_LINES + 1) * (_TEXT + 3)
    top = 2 * _GAP + _TITLE
    size = (_GAP + columns * (_TILE + _GAP), top + -(-len(tiles) // columns) * (high + _GAP))
    page = Image.new("RGB", size, _PAPER)
    draw = ImageDraw.Draw(page)
    font = _font(_TITLE, title)
    draw.text((_GAP, _GAP), _wrap(title, font, size[0] - 2 * _GAP, 1)[0], _INK, font)
    splits = list(dict.fromkeys(tile.split for tile in tiles))
    for n, tile in enumerate(tiles):
        x, y = _GAP + n % columns * (_TILE + _GAP), top + n // columns * (high + _GAP)
        _draw_image(page, draw, tile, x, y)
        colour = _COLOURS[splits.index(tile.split) % len(_COLOURS)]
        draw.rectangle((x, y + _TILE, x + _TILE - 1, y + _TILE + 2), fill=colour)
        draw.text((x, y + _TILE + 6), tile.split, colour, _font(_TEXT, tile.split))
        font = _font(_TEXT, tile.caption)
        ink = _INK if tile.caption else _FAINT
        for k, line in enumerate(_wrap(tile.caption or "no caption", font, _TILE, _LINES)):
            draw.text((x, y + _TILE + 6 + (k + 1) * (_TEXT + 3)), line, ink, font)
    return page


def _draw_image(page: Image.Image, draw: ImageDraw.ImageDraw, tile: Tile, x: int, y: int) -> None:
    draw.rectangle((x, y, x + _TILE - 1, y + _TILE - 1), fill=_EMPTY)
    if tile.image is None:
        font = _font(_TEXT, tile.note)
        text = "\n".join(_wrap(tile.note, font, _TILE - 12, 5))
        draw.text((x + _TILE / 2, y + _TILE / 2), text, _FAINT, font, anchor="mm", align="center")
        return
    scale = _TILE / max(tile.image.size)
    wide, high = (max(1, round(n * scale)) for n in tile.image.size)
    # enlarged images show their pixels
    method = Image.Resampling.NEAREST if scale >= 2 else Image.Resampling.LANCZOS
    page.paste(tile.image.resize((wide, high), method), (x + (_TILE - wide) // 2, y + (_TILE - high) // 2))


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int, most: int) -> list[str]:
    """``text`` in at most ``most`` lines of ``width`` pixels, with an ellipsis where it is cut."""
    text = " ".join(text.split())[:1000]
    columns = max(1, min(len(text), round(width / max(font.getlength(text) / max(len(text), 1), 1)) + 6))
    lines = [text]
    while columns > 0:
        lines = textwrap.wrap(text, columns) or [""]
        if len(lines) > most:
            lines = [*lines[: most - 1], lines[most - 1][: max(columns - 1, 1)].rstrip() + "…"]
        if all(font.getlength(line) <= width for line in lines):
            break
        columns -= 1
    return lines


def _font(size: int, text: str) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own font, the same on every machine; DejaVu, where installed, for characters that it lacks."""
    if any(ord(c) > 0x24F and not 0x2010 <= ord(c) <= 0x2026 for c in text):
        try:
            return ImageFont.truetype("DejaVuSans.ttf", size)
        except OSError:
            pass
    return ImageFont.load_default(size)
