"""Bars of how each rank spends a step. Letters: R ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from descant.callbacks.plots.style import CYCLE, FAINT, GRID, SMALL, TITLE, figure, text_width, with_style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BAR, GAP, WIDTH = 22, 14, 720  # pixels


@with_style
def rank_times(
    title: str, ranks: Sequence[str], milliseconds: Mapping[str, Sequence[float]], unit: str = "milliseconds a step"
) -> Figure:
    """Draw a bar per rank, from top to bottom: the milliseconds of its parts, one after another; waiting is grey.

    Args:
        title: the first line. ranks: names of the ranks.
        milliseconds: part -> ``[R]``, in the order of a step. unit: label of the axis.

    >>> made = rank_times("title", ["0", "1"], {"data": [1.0, 9.0], "waiting": [8.0, 0.0]})
    >>> [float(patch.get_width()) for patch in made.axes[0].patches]
    [1.0, 9.0, 8.0, 0.0]
    """
    side = 2 * GAP + max(text_width(name, SMALL) for name in ranks)
    top, body, foot = GAP + TITLE + GAP, BAR * len(ranks), 84
    height = top + body + foot
    width = max(WIDTH, text_width(title, TITLE) + 2 * GAP)
    made = figure(width, height)
    made.text(GAP / width, 1 - GAP / height, title, fontsize=TITLE, va="top")
    axes = made.add_axes((side / width, foot / height, (width - side - GAP) / width, body / height))
    begun_R = np.zeros(len(ranks))
    for n, (part, values_R) in enumerate(milliseconds.items()):
        colour = GRID if part == "waiting" else CYCLE[n % len(CYCLE)]
        axes.barh(range(len(ranks)), values_R, left=begun_R, height=0.8, color=colour, label=part)
        begun_R = begun_R + np.asarray(values_R)
    axes.set(ylim=(len(ranks) - 0.5, -0.5))
    axes.set_yticks(range(len(ranks)), ranks)
    axes.set_xlabel(unit, color=FAINT)
    axes.tick_params(length=0)
    made.legend(loc="lower left", ncols=len(milliseconds), fontsize=SMALL, bbox_to_anchor=(GAP / width, 4 / height))
    return made
