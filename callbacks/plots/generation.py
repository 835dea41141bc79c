"""Grid of generated modalities. Letters: H, W pixels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image
from torch import Tensor

from descant.callbacks.plots.reconstruction import GAP, LABEL, TILE, _pixels, _plane, _scale, _tile
from descant.callbacks.plots.style import FAINT, SMALL, TEXT, TITLE, page, text_width, with_style, wrap

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: A sample of one modality: a tensor in the shape of the input, or a text.
Shown = Tensor | str


@with_style
def grid(
    truth: Mapping[str, Sequence[Shown | None]],
    made: Mapping[tuple[str, str], Sequence[Shown | None]],
    given: Sequence[str],
    targets: Sequence[str],
    names: Sequence[str],
    title: str,
) -> Figure:
    """Draw for each sample a row of the truth, and a row per given modality: its content, and targets made from it.

    Args:
        truth: modality -> each sample's content. made: (given, target) -> what was generated.

    >>> import torch
    >>> map_HW = torch.zeros(4, 4, dtype=torch.long)
    >>> drawn = grid({"a": ["word"], "b": [map_HW]}, {("a", "b"): [map_HW]}, ["a"], ["b"], ["name"], "title")
    >>> [text.get_text() for text in drawn.axes[0].texts]
    ['title', 'given', 'b', 'name', 'truth', 'from a', 'word']
    """
    step, top = TILE + 4, 2 * GAP + TITLE + TEXT + 12
    rows = [(k, g) for k in range(len(names)) for g in (None, *given)]
    width = max(2 * GAP + LABEL + (1 + len(targets)) * step, int(text_width(title, TITLE)) + 2 * GAP)
    canvas = np.full((top + len(rows) * step + len(names) * GAP, width, 3), 255, dtype=np.uint8)
    words, labels = list[tuple[int, int, str]](), list[tuple[int, int, str]]()
    for r, (k, g) in enumerate(rows):
        y = top + r * step + k * GAP
        labels.append((GAP, y, "\n".join([*(wrap(names[k], SMALL, LABEL - 8, 3) if g is None else []), ""]).strip()))
        labels.append((GAP, y + TILE - SMALL, "truth" if g is None else f"from {g}"))
        first = [] if g is None else [truth[g][k]]
        cells = [*first, *(truth[m][k] if g is None else made.get((g, m), [None] * len(names))[k] for m in targets)]
        for c, cell in enumerate(cells, 1 - len(first)):
            x = GAP + LABEL + c * step
            if isinstance(cell, str):
                words.append((x, y, "\n".join(wrap(cell, SMALL, TILE - 4, 6))))
            elif cell is not None and (tile := _image(cell)) is not None:
                canvas[y : y + TILE, x : x + TILE] = tile
    figure, axes = page(canvas)
    axes.text(GAP, GAP, title, fontsize=TITLE, va="top")
    for c, column in enumerate(("given", *targets)):
        axes.text(GAP + LABEL + c * step + TILE / 2, top - 5, column, fontsize=TEXT, ha="center", va="bottom")
    for x, y, text in labels:
        if text:
            axes.text(x, y, text, fontsize=SMALL, color=FAINT, va="top")
    for x, y, text in words:
        axes.text(x + 2, y + 2, text, fontsize=SMALL, va="top")
    return figure


def _image(x: Tensor) -> np.ndarray | None:
    plane = _plane(x, x)
    return None if plane is None else _tile(Image.fromarray(_pixels(plane, *_scale(x))))
