"""Heat maps of the use of experts. Letters: L layers, E experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from descant.callbacks.plots.style import FAINT, INK, PAPER, SMALL, TEXT, TITLE, figure, text_width, with_style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CELL, GAP = 30, 14  # pixels
#: Maximum number of experts for which shares are written into the cells.
WRITTEN = 16


@with_style
def expert_maps(title: str, layers: Sequence[str], experts: Sequence[str], share: Mapping[str, np.ndarray]) -> Figure:
    """Draw a panel per kind of tokens: each expert's share of its choices, by layer; white is 0, dark is 1.

    Args:
        title: the first line. layers, experts: names, from top to bottom and from left to right.
        share: kind -> ``[L, E]``; nan where a layer has no such expert, or no token of the kind.

    >>> made = expert_maps("title", ["1"], ["0", "1"], {"text": np.array([[0.25, 0.75]])})
    >>> [axes.get_title("left") for axes in made.axes], [text.get_text() for text in made.axes[0].texts]
    (['text'], ['25', '75'])
    """
    import matplotlib

    E = len(experts)
    cell = CELL if E <= WRITTEN else max(CELL // 3, 4)
    side, panel = 60 + max(text_width(name, SMALL) for name in layers), max(cell * E, 60)
    width = max(side + len(share) * (panel + GAP) + GAP, text_width(title, TITLE) + 2 * GAP)
    top, body = GAP + TITLE + 2 * TEXT + 24, CELL * len(layers)
    height = top + body + 40
    made = figure(width, height)
    made.text(GAP / width, 1 - GAP / height, title, fontsize=TITLE, va="top")
    note = "share of a kind's choices by expert (columns) and layer (rows), in %"
    made.text(GAP / width, 8 / height, note, fontsize=SMALL, color=FAINT)
    colours = matplotlib.colormaps["Blues"].with_extremes(bad="#eeeeee")
    for n, (kind, share_LE) in enumerate(share.items()):
        left = side + n * (panel + GAP)
        axes = made.add_axes((left / width, 40 / height, panel / width, body / height))
        axes.imshow(np.ma.masked_invalid(share_LE), cmap=colours, vmin=0, vmax=1, aspect="auto")
        for (row, column), value in np.ndenumerate(share_LE) if E <= WRITTEN else ():
            if np.isfinite(value):
                ink = PAPER if value > 0.55 else INK
                axes.text(column, row, f"{100 * value:.0f}", fontsize=SMALL, color=ink, ha="center", va="center")
        axes.set_title(kind)
        axes.set_yticks(range(len(layers)), [f"layer {name}" for name in layers] if n == 0 else [])
        axes.set_xticks(range(E) if E <= WRITTEN else [], experts if E <= WRITTEN else [])
        axes.xaxis.tick_top()
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    return made
