"""Heat map of a score over the subsets of modalities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from descant.callbacks.plots.style import (
    FAINT,
    GRID,
    INK,
    PAPER,
    SMALL,
    TITLE,
    VERMILLION,
    figure,
    text_width,
    with_style,
)
from descant.modules.evaluation.subsets import Subset, subset_name, worst_subset

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CELL, GAP = 28, 12  # pixels


@with_style
def heat_map(
    title: str,
    modalities: Sequence[str],
    subsets: Sequence[Subset],
    cells: Mapping[str, Mapping[Subset, float]],
    rows: Mapping[str, int],
    less: bool = False,
) -> Figure:
    """Draw a row per subset, with a dot for each of its modalities, and a column per set, its worst cell framed.

    Args:
        modalities: modalities in the order of their dots.
        subsets: subsets from top to bottom.
        cells: set -> subset -> value.
        rows: set -> number of samples in the mean.
        less: whether less is better.

    >>> one = {"val": {("a",): 0.25, ("a", "b"): 0.5}}
    >>> [len(axes.patches) for axes in heat_map("title", ["a", "b"], list(one["val"]), one, {"val": 9}).axes]
    [0, 1]
    """
    import matplotlib
    from matplotlib.patches import Rectangle

    worst = {name: worst_subset(by_subset, less) for name, by_subset in cells.items()}
    heads = [f"{name}\n{rows[name]:,} rows" for name in cells]
    dot = max(34, *(text_width(m, SMALL) + 12 for m in modalities))
    cell = max(92, *(text_width(line, SMALL) + 16 for head in heads for line in head.split("\n")))
    notes = [
        *(f"worst of {name}: {subset_name(s)} {_number(cells[name][s])}" for name, s in worst.items()),
        "framed: the worst of its set; darker is better",
    ]
    grid = dot * len(modalities) + GAP + cell * len(cells)
    width = 2 * GAP + max(grid, text_width(title, TITLE), *(text_width(note, SMALL) for note in notes))
    body, top = CELL * len(subsets), GAP + TITLE + 12 + len(notes) * (SMALL + 5) + 44
    height = top + body + GAP
    made = figure(width, height)
    made.text(GAP / width, 1 - GAP / height, title, fontsize=TITLE, va="top")
    for i, note in enumerate(notes):
        y = GAP + TITLE + 10 + i * (SMALL + 5)
        colour = FAINT if i == len(notes) - 1 else INK
        made.text(GAP / width, 1 - y / height, note, fontsize=SMALL, color=colour, va="top")

    dots = made.add_axes((GAP / width, GAP / height, dot * len(modalities) / width, body / height))
    dots.set(xlim=(-0.5, len(modalities) - 0.5), ylim=(len(subsets) - 0.5, -0.5), yticks=[])
    for filled, colour in ((False, GRID), (True, INK)):
        at = [(x, y) for y, s in enumerate(subsets) for x, m in enumerate(modalities) if (m in s) == filled]
        place_2P = np.array(at).reshape(-1, 2).T
        dots.scatter(place_2P[0], place_2P[1], s=150, color=colour if filled else PAPER, edgecolors=colour)
    dots.set_xticks(range(len(modalities)), modalities)

    heat = made.add_axes(
        ((GAP + dot * len(modalities) + GAP) / width, GAP / height, cell * len(cells) / width, body / height)
    )
    value_SK = np.array([[by_subset.get(s, np.nan) for by_subset in cells.values()] for s in subsets])
    finite = value_SK[np.isfinite(value_SK)]
    colours = matplotlib.colormaps["Blues_r" if less else "Blues"].with_extremes(bad=GRID)
    bounds = {"vmin": finite.min(), "vmax": finite.max()} if len(finite) else {}
    image = heat.imshow(np.ma.masked_invalid(value_SK), cmap=colours, aspect="auto", **bounds)
    for k, (name, by_subset) in enumerate(cells.items()):
        for j, s in enumerate(subsets):
            if s in by_subset:
                dark = np.isfinite(by_subset[s]) and sum(image.to_rgba(np.array([by_subset[s]]))[0, :3]) < 1.5
                colour = PAPER if dark else INK
                heat.text(k, j, _number(by_subset[s]), fontsize=SMALL, color=colour, ha="center", va="center")
        corner, size = (k - 0.5 + 2 / cell, subsets.index(worst[name]) - 0.5 + 2 / CELL), (1 - 4 / cell, 1 - 4 / CELL)
        heat.add_patch(Rectangle(corner, *size, fill=False, edgecolor=VERMILLION, linewidth=3, joinstyle="miter"))
    heat.set(yticks=[])
    heat.set_xticks(range(len(heads)), heads)
    for axes in (dots, heat):
        axes.xaxis.tick_top()
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    return made


def _number(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.4g}"
