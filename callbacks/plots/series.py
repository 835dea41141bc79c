"""Line plots of time series and their reconstructions. Letters: B samples, W channels, T steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from descant.callbacks.plots.style import (
    BLUE,
    FAINT,
    GRID,
    INK,
    SMALL,
    TEXT,
    TITLE,
    VERMILLION,
    figure,
    with_style,
    wrap,
)
from descant.modules.core.protocols import ReconstructionOutput, SeriesAxes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CHANNELS, DOTTED = 4, 60  # maximum channels of a modality; maximum steps of a series with dots
NAME, LEFT, WIDE, HIGH, GAP = 96, 46, 240, 92, 14  # pixels: a sample's name; a panel's labels, width and height
LEAST = 640  # width of a figure, so that title and legend fit


def trace(axes: Axes, at_T: np.ndarray, x_T: np.ndarray, colour: str, width: float = 2.0, dots: bool = False) -> None:
    """Draw numbers as a line with gaps where they are not finite; one between two gaps is a dot, with ``dots`` all."""
    finite_T = np.pad(np.isfinite(x_T), 1)
    dot_T = finite_T[1:-1] & (dots | ~(finite_T[:-2] | finite_T[2:]))
    axes.plot(at_T, np.where(finite_T[1:-1], x_T, np.nan), color=colour, linewidth=width)
    axes.plot(at_T[dot_T], x_T[dot_T], "o", color=colour, markersize=2.5 * width, markeredgewidth=0)


class _Sample(NamedTuple):
    """A series in the data's units. nan in ``truth_WT`` and ``rebuilt_WT`` marks steps that are not drawn."""

    period: float
    at_T: np.ndarray
    truth_WT: np.ndarray
    seen_WT: np.ndarray
    rebuilt_WT: np.ndarray

    @classmethod
    def of(cls, output: ReconstructionOutput, row: int, units: SeriesAxes) -> _Sample:
        x_WT, seen_WT, y_WT = (t[row].cpu().double().numpy() for t in output)
        mean_W1, std_W1 = (np.reshape(value, (-1, 1)) for value in (units.mean, units.std))
        finite_WT = np.isfinite(x_WT)
        # outside the rebuilt steps, a prediction repeats the truth
        rebuilt_WT = np.where(finite_WT & (y_WT != x_WT), y_WT, np.nan)
        truth_WT, rebuilt_WT = (mean_W1 + std_W1 * z_WT for z_WT in (np.where(finite_WT, x_WT, np.nan), rebuilt_WT))
        period = units.period or 1.0
        return cls(period, period * np.arange(x_WT.shape[1]), truth_WT, finite_WT & (seen_WT > 0), rebuilt_WT)


@with_style
def series_gallery(
    rebuilt: Mapping[str, ReconstructionOutput],
    units: Mapping[str, Sequence[SeriesAxes | None]],
    names: Sequence[str],
    title: str,
) -> Figure | None:
    """Draw a row per sample, with a panel for each of the first 4 channels of a modality; None without series.

    Numbers are in the data's units. Steps that are hidden from the encoder are shaded. The truth is blue where it is
    seen and a thin line where it is hidden; the reconstruction is red. Gaps, and the padding after the end of a series,
    are not drawn. All panels of a channel have equal limits, which depend on the truth alone, so that figures of
    several steps can be compared. A reconstruction outside them lies on the edge of its panel, and the legend reports
    it.

    Args:
        rebuilt: modality -> reconstructions ``[B, W, T]`` of all samples; nan is a gap, or after the end.
        units: modality -> the axes of each sample; None if it lacks the modality.

    >>> import torch
    >>> x_BWT = torch.tensor([[[0.0, 1.0, 2.0, torch.nan]]])
    >>> rebuilt = {"pulse": ReconstructionOutput(x_BWT, x_BWT < 2, x_BWT)}
    >>> axes = series_gallery(rebuilt, {"pulse": [SeriesAxes(["volts"], 0.5, 10.0, 2.0)]}, ["a"], "title").axes[0]
    >>> axes.get_title("left"), axes.get_xlabel(), axes.lines[0].get_ydata().tolist()
    ('volts', 'time from the start', [10.0, 12.0, 14.0, nan])
    """
    samples = {
        m: {i: _Sample.of(output, i, axes) for i, axes in enumerate(units[m]) if axes is not None}
        for m, output in rebuilt.items()
    }
    columns = [(m, w) for m in rebuilt if samples[m] for w in range(min(rebuilt[m].truth.shape[1], CHANNELS))]
    if not columns:
        return None
    top, column, row = 2 * GAP + TITLE + 2 * SMALL + TEXT + 30, LEFT + WIDE + GAP, HIGH + GAP
    height = top + len(names) * row + 3 * SMALL
    width = max(2 * GAP + NAME + len(columns) * column, LEAST)
    made = figure(width, height)

    def write(x: float, y: float, text: str, size: int) -> None:
        made.text(x / width, 1 - y / height, text, fontsize=size, va="top")

    write(GAP, GAP, title, TITLE)
    for i, name in enumerate(names):
        write(GAP, top + i * row, "\n".join(wrap(name, SMALL, NAME - 8, 5)), SMALL)
    outside = False
    for j, (m, w) in enumerate(columns):
        left, channels = GAP + NAME + j * column + LEFT, rebuilt[m].truth.shape[1]
        if w == 0:
            write(left, top - 38, m if channels <= CHANNELS else f"{m}, {CHANNELS} of {channels} channels", TEXT)
        first = next(axes for axes in units[m] if axes is not None)
        limits = _limits(list(samples[m].values()), w)
        for i in range(len(names)):
            bottom = height - top - i * row - HIGH
            axes = made.add_axes((left / width, bottom / height, WIDE / width, HIGH / height))
            axes.set(xlim=limits[0], ylim=limits[1])
            if i in samples[m]:
                outside |= _fill(axes, samples[m][i], w)
            else:
                axes.text(0.5, 0.5, "absent", color=FAINT, ha="center", va="center", transform=axes.transAxes)
            axes.locator_params(axis="x", nbins=6, integer=first.period is None)
            axes.locator_params(axis="y", nbins=3)
            axes.yaxis.set_major_formatter("{x:g}")
            axes.tick_params(labelbottom=i == len(names) - 1, length=3)
            if i == 0:
                axes.set_title(first.channels[w], fontsize=SMALL, color=FAINT, pad=4)
        axes.set_xlabel("step" if first.period is None else "time from the start", loc="right")
    _add_legend(made, GAP / width, 1 - (1.5 * GAP + TITLE) / height, outside)
    return made


def _limits(samples: Sequence[_Sample], w: int) -> tuple[tuple[float, float], tuple[float, float]]:
    """Compute the limits of both axes: all steps up to the last one with a number, and the truth of channel ``w``."""
    ends = [s.at_T[np.isfinite(s.truth_WT).any(axis=0)].max(initial=0) for s in samples]
    half = max(s.period / 2 for s in samples)
    x = np.concatenate([s.truth_WT[w][np.isfinite(s.truth_WT[w])] for s in samples])
    low, high = (float(x.min()), float(x.max())) if len(x) else (0.0, 1.0)
    margin = 0.1 * (high - low) or 0.1 * abs(high) or 1.0
    return (-half, max(ends) + half), (low - margin, high + margin)


def _fill(axes: Axes, sample: _Sample, w: int) -> bool:
    """Draw a channel of a sample; return whether some of its reconstruction is outside the axes."""
    low, high = axes.get_ylim()
    period, at_T, (truth_T, seen_T, rebuilt_T) = *sample[:2], (x_WT[w] for x_WT in sample[2:])
    hidden_T = np.isfinite(truth_T) & ~seen_T
    runs = np.flatnonzero(np.diff(np.pad(hidden_T, 1).astype(int))).reshape(-1, 2)
    spans = [(period * (first - 0.5), period * (end - first)) for first, end in runs.tolist()]
    axes.broken_barh(spans, (0, 1), transform=axes.get_xaxis_transform(), color=GRID, linewidth=0, zorder=0)
    dots = int(np.isfinite(truth_T).sum()) <= DOTTED
    trace(axes, at_T, truth_T, INK, 0.8)
    trace(axes, at_T, np.where(seen_T, truth_T, np.nan), BLUE, 2, dots)
    trace(axes, at_T, rebuilt_T.clip(low, high), VERMILLION, 2, dots)
    return bool(((rebuilt_T < low) | (rebuilt_T > high)).any())


def _add_legend(made: Figure, x: float, y: float, outside: bool) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    name = "reconstruction" + " (on an edge: beyond it)" * outside
    lines = {"truth": (INK, 0.8), "seen": (BLUE, 2), name: (VERMILLION, 2)}
    marks = [Line2D([], [], color=colour, linewidth=width, label=label) for label, (colour, width) in lines.items()]
    place = {"loc": "upper left", "bbox_to_anchor": (x, y), "borderpad": 0, "borderaxespad": 0}
    made.legend(handles=[*marks, Patch(color=GRID, label="hidden")], ncols=4, **place)
