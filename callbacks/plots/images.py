"""Images of samples: a sheet of queries and candidates, and tiles of text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from torch import Tensor

from descant.callbacks.plots.style import (
    FAINT,
    GRID,
    INK,
    SMALL,
    page,
    pixels,
    resize_image,
    rgb,
    text_width,
    with_style,
    wrap,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TILE, FRAME, GAP = 128, 4, 12  # pixels
#: Sizes of captions; the largest that fits is used: 30 pixels of a sheet are 9 in TensorBoard.
CAPTIONS, ROOM, HEAD = (28, 23, 18, 14), 72, 30


@runtime_checkable
class Pictured(Protocol):
    """A data module that shows samples: ``describe`` returns a line, ``picture`` uint8 ``[3, H, W]`` or None."""

    def describe(self, index: int) -> str: ...

    def picture(self, index: int) -> Tensor | None: ...


def sample_image(data: Any, index: int, size: int | None = None) -> np.ndarray | None:
    """Return the image of a sample, uint8 ``[H, W, 3]`` or ``[size, size, 3]``; None if the data module has none."""
    image = data.picture(index) if isinstance(data, Pictured) else None
    if image is None:
        return None
    image_HW3 = image.permute(1, 2, 0).contiguous().cpu().numpy()
    return image_HW3 if size is None else resize_image(image_HW3, size, smooth=True)


def sample_line(data: Any, index: int) -> str:
    """Describe a sample in a line of text, by the data module's ``describe``; else by its index."""
    text = data.describe(index) if hasattr(data, "describe") else str(index)
    return " ".join(text.split()) or str(index)  # the projector's tables have no tabs and no empty cells


class Cell(NamedTuple):
    """A tile of a sheet: an image ``[H, W, 3]`` over its caption, or the caption alone."""

    image: np.ndarray | None
    caption: str
    frame: str  # colour


@with_style
def sheet(rows: Sequence[Sequence[Cell]], title: str, note: str) -> Figure:
    """Draw rows of cells under a header line; the first cell of a row, the query, is set apart.

    >>> pixels(sheet([[Cell(None, "a caption", GRID)] * 3] * 2, "title", "note")).shape
    (509, 480, 3)
    """
    if not rows:
        raise ValueError("a sheet needs at least one row")
    side = TILE + 2 * FRAME
    columns, top, split = max(len(cells) for cells in rows), 2 * GAP + HEAD + 9, 2 * GAP
    height, width = top + len(rows) * (side + 3 + ROOM + GAP), columns * (side + GAP) + GAP + split
    canvas = np.full((height, width, 3), 255, dtype=np.uint8)
    places = [
        (GAP + j * (side + GAP) + (split if j else 0), top + i * (side + 3 + ROOM + GAP), cell)
        for i, cells in enumerate(rows)
        for j, cell in enumerate(cells)
    ]
    for x, y, cell in places:
        canvas[y : y + side, x : x + side] = rgb(cell.frame)
        tile = 255 if cell.image is None else resize_image(cell.image, TILE)
        canvas[y + FRAME : y + FRAME + TILE, x + FRAME : x + FRAME + TILE] = tile
    figure, axes = page(canvas)
    for x, y, cell in places:
        if cell.image is None:
            _caption(axes, cell.caption, x + side / 2, y + side / 2, TILE, TILE, "center")
        else:
            _caption(axes, cell.caption, x + side / 2, y + side + 3, side, ROOM, "top")
    axes.text(GAP, GAP, title, fontsize=HEAD, va="top")
    if text_width(note, CAPTIONS[-1]) < width - 3 * GAP - text_width(title, HEAD):
        axes.text(width - GAP, GAP + HEAD, note, fontsize=CAPTIONS[-1], color=FAINT, ha="right", va="bottom")
    axes.plot([GAP, width - GAP], [top - 7, top - 7], color=GRID, linewidth=1)
    return figure


def _caption(axes: Any, text: str, x: float, y: float, width: float, height: float, va: str) -> None:
    """Write a text in the largest caption size at which it fits and no word is broken; else in the smallest."""
    for size in CAPTIONS:
        most = int(height // (1.2 * size))
        if size > CAPTIONS[-1] and text_width(text, size) > width * most:
            continue  # it cannot fit, and wrapping a long text takes milliseconds
        lines = wrap(text, size, width - 2, most)
        if " ".join(lines) == text:
            break
    axes.text(x, y, "\n".join(lines), fontsize=size, color=INK, ha="center", va=va, linespacing=1.0)


@with_style
def text_tiles(texts: Sequence[str], size: int) -> np.ndarray:
    """Draw each text in its own tile: uint8 ``[N, size, size, 3]``.

    >>> text_tiles(["a", "b", "c"], 48).shape
    (3, 48, 48, 3)
    """
    columns = max(int(np.ceil(len(texts) ** 0.5)), 1)
    rows = -(-len(texts) // columns)
    if not texts:
        return np.zeros((0, size, size, 3), dtype=np.uint8)
    figure, axes = page(np.full((rows * size, columns * size, 3), 255, dtype=np.uint8))
    for k, text in enumerate(texts):
        lines = wrap(text, SMALL, size - 4, max(size // (SMALL + 2), 1))
        place = (k % columns + 0.5) * size, (k // columns + 0.5) * size
        axes.text(*place, "\n".join(lines), fontsize=SMALL, ha="center", va="center", linespacing=1.0)
    sheets = pixels(figure).reshape(rows, size, columns, size, 3)
    return sheets.swapaxes(1, 2).reshape(-1, size, size, 3)[: len(texts)]
