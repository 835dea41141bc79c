"""Training curves of runs: scalars read from run folders, thinned, and drawn as one SVG chart per scalar."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from operator import itemgetter
from pathlib import Path

from descant.cli.errors import printable as clean
from descant.cli.untrusted import open_below
from descant.report import figures
from descant.run.events import OVERVIEW, read
from descant.run.groups import Group

#: One scalar of one run: step -> value, in the order of steps.
Curve = dict[int, float]
#: Pixels of a chart, and of the margins around its axes.
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 360, 220, 52, 10, 10, 34
#: Largest ``metrics.csv`` in bytes: its curves are held in memory.
_MAX_BYTES = 500_000_000


def scalars(folder: Path) -> dict[str, Curve]:
    """Read every scalar that a run logged: from ``metrics.csv`` or, if there is none, from TensorBoard event files.

    Values that cannot be plotted are left out; of several values at one step, the last counts.

    Raises:
        OSError, ValueError, csv.Error: if the file cannot be read.
    """
    curves: dict[str, Curve] = {}
    file = folder / "metrics.csv"
    if file.exists():
        with io.TextIOWrapper(open_below(file, folder, _MAX_BYTES), encoding="utf-8", newline="") as lines:
            rows = csv.reader(lines)
            names = [clean(name) for name in next(rows, [])]
            if "step" not in names:
                return {}
            at = names.index("step")
            for row in rows:
                if len(row) > at and row[at].isdecimal() and len(row[at]) <= 15:
                    for name, text in zip(names, row, strict=False):
                        if text and name not in ("step", "epoch"):
                            _add(curves, name, int(row[at]), text)
    else:
        for step, value in read(folder):
            if value.HasField("simple_value") and not value.tag.startswith(f"{OVERVIEW}/"):  # logged twice
                _add(curves, clean(value.tag), step, value.simple_value)
    return {name: dict(sorted(curve.items())) for name, curve in sorted(curves.items())}


def _add(curves: dict[str, Curve], name: str, step: int, value: str | float) -> None:
    try:
        number = float(value)
    except ValueError:
        return
    if abs(number) < 1e100:
        curves.setdefault(name, {})[step] = number


def mean(curves: Sequence[Curve]) -> Curve:
    """Compute the mean of several curves at the steps that all of them have.

    >>> mean([{0: 1.0, 5: 2.0}, {5: 4.0}])
    {5: 3.0}
    """
    shared = [step for step in curves[0] if all(step in other for other in curves[1:])]
    return {step: math.fsum(curve[step] for curve in curves) / len(curves) for step in shared}


def thin(curve: Curve, points: int) -> Curve:
    """Thin a curve to at most about ``points`` points: both ends, and the minimum and maximum of each span of steps.

    >>> thin({k: float(k == 50) for k in range(100)}, 8)
    {0: 0.0, 33: 0.0, 50: 1.0, 66: 0.0, 99: 0.0}
    """
    steps = list(curve)
    if len(steps) <= points:
        return curve
    spans = max(1, (points - 2) // 2)
    kept = {steps[0], steps[-1]}
    for k in range(spans):
        some = steps[len(steps) * k // spans : len(steps) * (k + 1) // spans]
        kept |= {min(some, key=curve.__getitem__), max(some, key=curve.__getitem__)}
    return {step: curve[step] for step in sorted(kept)}


def chart(
    groups: Sequence[Group], curves: Sequence[Mapping[str, Curve]], points: int, chance: Sequence[float] = ()
) -> str:
    """Draw one scalar as an SVG chart: a thin line per seed, and the mean of each group as a thick one.

    Lines have the classes ``seed`` or ``mean`` and :func:`colour`, and their group in ``data-g``. ``data-step`` and
    ``data-value`` of the ``<svg>`` are ``a b`` with ``step = a x + b`` and ``value = a y + b`` for pixels ``x, y``.

    Args:
        groups: groups in the order of their colours.
        curves: for each group, name of a run -> its curve; empty if it logged none.
        points: approximate maximum number of points of one line.
        chance: levels that a guess reaches, as dashed lines.
    """
    from matplotlib.ticker import EngFormatter, MaxNLocator

    every = [curve for runs in curves for curve in runs.values()]
    steps, values = [s for curve in every for s in curve], [v for curve in every for v in curve.values()]
    x0, x1 = min(steps), max(max(steps), min(steps) + 1)
    y0, y1 = (
        _pad_range(min(*values, *chance), max(*values, *chance)) if chance else _pad_range(min(values), max(values))
    )
    seeds = [(n, name, curve) for n, runs in enumerate(curves) if len(runs) > 1 for name, curve in runs.items()]
    means = [(n, groups[n].name, mean(list(runs.values()))) for n, runs in enumerate(curves) if runs]
    marks: dict[str, dict[str, str]] = {}
    wide, high = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM
    with figures.style():
        made = figures.figure(_WIDTH, _HEIGHT)
        axes = made.add_axes(
            (_LEFT / _WIDTH, _BOTTOM / _HEIGHT, wide / _WIDTH, high / _HEIGHT), xlim=(x0, x1), ylim=(y0, y1)
        )
        axes.grid(visible=False, axis="x")
        made.patch.set_visible(False)
        axes.patch.set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.6g}")
        axes.set_xlabel("step", color=figures.FAINT, labelpad=2)
        for number, level in enumerate(chance):
            axes.plot([x0, x1], [level, level], "--", color=figures.FAINT, gid=f"chance{number}")
            marks[f"chance{number}"] = {"class": "chance", "title": f"by chance {level:.4g}"}
        for kind, lines in (("seed", seeds), ("mean", means)):  # means lie over seeds
            for n, name, curve in filter(itemgetter(2), lines):
                some = thin(curve, points)
                axes.plot(list(some), list(some.values()), gid=f"line{len(marks)}")
                marks[f"line{len(marks)}"] = {"class": f"{kind} {colour(n)}", "data-g": str(n), "title": name}
        axes.plot([x0, x0], [y0, y1], gid="cursor")
        svg = figures.to_svg(made, marks | {"cursor": {"class": "cursor"}})
    kx, ky = (x1 - x0) / wide, (y0 - y1) / high
    numbers = f'data-step="{kx:.9g} {x0 - _LEFT * kx:.9g}" data-value="{ky:.9g} {y1 - _TOP * ky:.9g}"'
    return svg.replace("<svg ", f"<svg {numbers} ", 1)


def colour(number: int) -> str:
    """Return the CSS classes of a group's colour; after the last colour they start again, with other dashes."""
    again, place = divmod(number, len(figures.CYCLE))
    return f"c{place}" + (f" d{(again - 1) % 3 + 1}" if again else "")


def _pad_range(low: float, high: float) -> tuple[float, float]:
    size = max(abs(low), abs(high))
    pad = (high - low) * 0.04 if high - low > 1e-9 * size + 1e-90 else size * 0.1 + 1e-3
    return low - pad, high + pad
