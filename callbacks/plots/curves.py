"""Record and draw numbers over the course of a run. Letters: S steps, K curves, Q pairs of terms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from descant.callbacks.plots.style import CYCLE, FAINT, INK, SMALL, TITLE, figure, text_width, with_style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST = 512  # points of a track; at the limit, neighbours are averaged
LEFT, WIDE, HIGH = 56, 560, 220  # pixels of a panel and of its left margin


class Track:
    """A series of vectors with at most 512 points: whenever it is full, each pair of neighbours becomes its mean.

    >>> track = Track()
    >>> for step in range(2000):
    ...     track.add(step, [float(step)])
    >>> steps, values = track.points()
    >>> len(steps), steps[:2], values[0].tolist(), values[1].tolist()
    (500, [0, 4], [1.5], [5.5])
    """

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.sums: list[list[float]] = []
        self.counts: list[int] = []
        self.each = 1

    def add(self, step: int, values: Sequence[float]) -> None:
        if not self.steps or self.counts[-1] == self.each:
            if len(self.steps) == MOST:
                self._halve()
            self.steps.append(step)
            self.sums.append([0.0] * len(values))
            self.counts.append(0)
        self.sums[-1] = [a + b for a, b in zip(self.sums[-1], values, strict=True)]
        self.counts[-1] += 1

    def _halve(self) -> None:
        self.each *= 2
        self.steps = self.steps[::2]
        pairs = zip(self.sums[::2], self.sums[1::2], strict=True)
        self.sums = [[x + y for x, y in zip(a, b, strict=True)] for a, b in pairs]
        self.counts = [a + b for a, b in zip(self.counts[::2], self.counts[1::2], strict=True)]

    def points(self) -> tuple[list[int], np.ndarray]:
        """Return steps, and values ``[S, Q]``."""
        return self.steps, np.array([[x / n for x in row] for row, n in zip(self.sums, self.counts, strict=True)])

    def state_dict(self) -> dict[str, object]:
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, object]) -> None:
        vars(self).update(state)


@with_style
def curves(
    title: str,
    panels: Mapping[str, tuple[Sequence[str], Sequence[int], np.ndarray]],
    marks: Mapping[str, int] | None = None,
) -> Figure:
    """Draw a panel for each ``name -> (names of curves, steps, values_SK)``; values that are not finite leave gaps.

    The last of several curves is black; the legend has their last values. With ``marks`` (parts of the run by name and
    first step), all panels cover the whole run, and all parts are equally wide, whatever their length.

    >>> values = np.array([[0.1, 0.2], [0.3, np.nan], [0.5, 0.6]])
    >>> len(curves("title", {"val": (["image", "joint"], [0, 10, 20], values)}).axes)
    1
    """
    labels = {
        panel: [_label(*of) for of in zip(names, x_SK.T, strict=True)] for panel, (names, _, x_SK) in panels.items()
    }
    right = 60 + max(text_width(label, SMALL) for of in labels.values() for label in of)
    panel_height = HIGH + (78 if marks else 62)
    width, height = LEFT + WIDE + right, 44 + panel_height * len(panels)
    made = figure(max(width, LEFT + text_width(title, TITLE)), height)
    width = made.bbox.width
    made.text(12 / width, 1 - 12 / height, title, fontsize=TITLE, va="top")
    every_step = [step for _, steps, _ in panels.values() for step in steps]
    for p, (panel, (_, steps, x_SK)) in enumerate(panels.items()):
        bottom = height - 44 - p * panel_height - 24 - HIGH
        axes = made.add_axes((LEFT / width, bottom / height, WIDE / width, HIGH / height))
        axes.set_title(panel)
        axes.grid(axis="y")
        if marks:
            bounds = [*sorted(marks.values()), max(every_step)]
            x_S = np.interp(steps, bounds, np.arange(len(bounds)))
            axes.set_xlim(0, len(bounds) - 1)
            named = [f"{name}\n{step:,}" for name, step in sorted(marks.items(), key=lambda mark: mark[1])]
            axes.set_xticks(range(len(bounds)), [*named, f"step\n{bounds[-1]:,}"])
            for k, tick in enumerate(axes.get_xticklabels(), 1):
                tick.set_horizontalalignment("left" if k < len(bounds) else "right")
            for part in range(1, len(bounds) - 1):
                axes.axvline(part, color=FAINT, linewidth=1)
        else:
            x_S = np.asarray(steps, dtype=float)
            axes.set_xlim(min(steps), max(max(steps), min(steps) + 1))
            axes.set_xlabel("step", loc="right")
            axes.xaxis.set_major_formatter("{x:,.0f}")
            axes.locator_params(axis="x", integer=True)
        for k, label in enumerate(labels[panel]):
            colour = INK if k == x_SK.shape[1] - 1 > 0 else CYCLE[k % len(CYCLE)]
            y_S = np.where(np.isfinite(x_SK[:, k]), x_SK[:, k], np.nan)
            axes.plot(x_S, y_S, color=colour, label=label, marker="o" if len(steps) < 40 else "", markersize=5)
        finite = x_SK[np.isfinite(x_SK)]
        axes.set_ylim(0, max(float(finite.max(initial=0.0)) or 1.0, 1e-12) * 1.04)
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
    return made


def _label(name: str, x_S: np.ndarray) -> str:
    finite = x_S[np.isfinite(x_S)]
    return f"{name} {finite[-1]:.3f}" if len(finite) else name


@with_style
def cosine_map(title: str, pairs: Sequence[tuple[str, str]], steps: Sequence[int], cos_SQ: np.ndarray) -> Figure:
    """Draw a row per pair of terms, over the steps of a run: blue where their gradients agree, red where they conflict.

    >>> made = cosine_map("title", [("a", "b")], [0, 1], np.array([[-1.0], [0.5]]))
    >>> made.axes[0].images[0].get_array().shape
    (1, 2)
    """
    names = [f"{a} ~ {b}" for a, b in pairs]
    left = 24 + max(text_width(name, SMALL) for name in names)
    body = 28 * len(pairs)
    height, width = 108 + body, max(left + WIDE + 24, 24 + text_width(title, TITLE))
    made = figure(width, height)
    made.text(12 / width, 1 - 12 / height, title, fontsize=TITLE, va="top")
    axes = made.add_axes((left / width, 60 / height, WIDE / width, body / height))
    most = max(float(np.abs(cos_SQ).max()), 1e-3)
    image = axes.imshow(cos_SQ.T, cmap="RdBu", vmin=-most, vmax=most, aspect="auto", interpolation="nearest")
    axes.spines[:].set_visible(False)
    axes.set_yticks(range(len(names)), names)
    axes.hlines(np.arange(1, len(names)) - 0.5, -0.5, len(steps) - 0.5, color="white", linewidth=4)
    axes.set_xticks([-0.5, len(steps) - 0.5], [f"step {steps[0]:,}", f"{steps[-1]:,}"])
    for k, tick in enumerate(axes.get_xticklabels()):
        tick.set_horizontalalignment("right" if k else "left")
    scale = made.add_axes(((left + 170) / width, 32 / height, 220 / width, 10 / height))
    made.colorbar(image, cax=scale, orientation="horizontal", ticks=[-most, 0, most], format="{x:.2f}")
    scale.tick_params(length=0, pad=2)
    made.text((left + 160) / width, 37 / height, "conflict", fontsize=SMALL, ha="right", va="center")
    made.text((left + 400) / width, 37 / height, "agreement (cosine)", fontsize=SMALL, va="center")
    return made
