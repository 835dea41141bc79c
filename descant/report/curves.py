"""The scalars of runs over steps: read from their folders, drawn as SVG. Page units are pixels."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path

from descant.cli.errors import printable as clean
from descant.cli.untrusted import opened
from descant.run.events import OVERVIEW, read
from descant.run.groups import Group

#: One scalar of one run: step -> value, in the order of steps.
Curve = dict[int, float]
WIDTH, HEIGHT = 360, 220
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 10, 34
COLOURS = 8
#: Bytes of a ``metrics.csv``: what is drawn of it is held in memory.
MOST = 500_000_000


def scalars(folder: Path) -> dict[str, Curve]:
    """Every scalar that a run logged, of ``metrics.csv``, or of its event files where it has none.

    What is no number that can be drawn is left out; of values at one step the last counts.

    Raises:
        OSError, ValueError, csv.Error: if the file cannot be read.
    """
    found: dict[str, Curve] = {}
    file = folder / "metrics.csv"
    if file.exists():
        with io.TextIOWrapper(opened(file, folder, MOST), encoding="utf-8", newline="") as lines:
            rows = csv.reader(lines)
            names = [clean(name) for name in next(rows, [])]
            if "step" not in names:
                return {}
            at = names.index("step")
            for row in rows:
                if len(row) > at and row[at].isdecimal() and len(row[at]) <= 15:
                    for name, text in zip(names, row, strict=False):
                        if text and name not in ("step", "epoch"):
                            _add(found, name, int(row[at]), text)
    else:
        for step, value in read(folder):
            if value.HasField("simple_value") and not value.tag.startswith(f"{OVERVIEW}/"):  # told twice
                _add(found, clean(value.tag), step, value.simple_value)
    return {name: dict(sorted(curve.items())) for name, curve in sorted(found.items())}


def _add(found: dict[str, Curve], name: str, step: int, value: str | float) -> None:
    try:
        number = float(value)
    except ValueError:
        return
    if abs(number) < 1e100:
        found.setdefault(name, {})[step] = number


def mean(curves: Sequence[Curve]) -> Curve:
    """The mean over curves, at the steps that all of them have.

    >>> mean([{0: 1.0, 5: 2.0}, {5: 4.0}])
    {5: 3.0}
    """
    shared = [step for step in curves[0] if all(step in other for other in curves[1:])]
    return {step: math.fsum(curve[step] for curve in curves) / len(curves) for step in shared}


def thin(curve: Curve, points: int) -> Curve:
    """At most about ``points`` points: first and last, and of each span of steps the lowest and the highest.

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


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers from ``low`` to ``high``: multiples of 1, 2 or 5 times a power of ten, at most ``most``.

    >>> ticks(0.13, 0.88)
    [0.2, 0.4, 0.6, 0.8]
    """
    span = high - low
    if not span > 0:
        return [low]
    power = math.floor(math.log10(span / most))
    steps = (factor * 10.0**exponent for exponent in (power, power + 1) for factor in (1, 2, 5))
    step = next((s for s in steps if math.floor(high / s) - math.ceil(low / s) < most), span)
    return [float(f"{k * step:.12g}") for k in range(math.ceil(low / step), math.floor(high / step) + 1)]


def figure(title: str, groups: Sequence[Group], curves: Sequence[Mapping[str, Curve]], points: int) -> str:
    """One chart as SVG: for each group its seeds as thin lines, and their mean as a thick one.

    Args:
        title: the scalar. groups: in the order of their colours.
        curves: of each group: name of a run -> its curve; empty where it has none.
        points: of one line.
    """
    everything = [curve for some in curves for curve in some.values()]
    steps = [step for curve in everything for step in curve]
    values = [value for curve in everything for value in curve.values()]
    x0, x1 = min(steps), max(steps)
    y0, y1 = _padded(min(values), max(values))
    kx, ky = (WIDTH - LEFT - RIGHT) / max(x1 - x0, 1), (HEIGHT - TOP - BOTTOM) / (y1 - y0)

    def x(step: float) -> float:
        return LEFT + (step - x0) * kx

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (value - y0) * ky

    def line(curve: Curve, kind: str, number: int, name: str) -> str:
        path = "L".join(f"{x(step):.1f},{y(value):.2f}" for step, value in thin(curve, points).items())
        return (
            f'<path class="{kind} {colour(number)}" data-g="{number}" d="M{path}"><title>{escape(name)}</title></path>'
        )

    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}" '
        f'data-x0="{x0}" data-kx="{kx:.9g}" data-y0="{y0:.9g}" data-ky="{ky:.9g}">'
    ]
    for value, text in zip(found := ticks(y0, y1), _texts(found), strict=True):
        parts.append(f'<path class="grid" d="M{LEFT},{y(value):.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text class="tick end" x="{LEFT - 6}" y="{y(value) + 3.5:.1f}">{text}</text>')
    for step, text in zip(found := [t for t in ticks(x0, x1) if t == int(t)], _texts(found), strict=True):
        parts.append(f'<path class="axis" d="M{x(step):.1f},{HEIGHT - BOTTOM}v4"/>')
        parts.append(f'<text class="tick mid" x="{x(step):.1f}" y="{HEIGHT - BOTTOM + 16}">{text}</text>')
    parts.append(f'<path class="axis" d="M{LEFT},{TOP}V{HEIGHT - BOTTOM}H{WIDTH - RIGHT}"/>')
    parts.append(f'<text class="tick mid" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 4}">step</text>')
    for kind in ("seed", "mean"):  # every mean lies over every seed
        for number, some in enumerate(curves):
            if kind == "seed" and len(some) > 1:
                parts += [line(curve, kind, number, name) for name, curve in some.items()]
            elif kind == "mean" and some and (middle := mean(list(some.values()))):
                parts.append(line(middle, kind, number, groups[number].name))
    parts.append(f'<path class="cursor" d="M0,{TOP}V{HEIGHT - BOTTOM}"/></svg>')
    return f'<figure class="chart"><figcaption>{escape(title)}</figcaption>{"".join(parts)}</figure>'


def colour(number: int) -> str:
    """The classes of a group's colour: there are eight, then they come again with other dashes."""
    again = number // COLOURS
    return f"c{number % COLOURS}" + (f" d{(again - 1) % 3 + 1}" if again else "")


def _padded(low: float, high: float) -> tuple[float, float]:
    size = max(abs(low), abs(high))
    pad = (high - low) * 0.04 if high - low > 1e-9 * size + 1e-90 else size * 0.1 + 1e-3
    return low - pad, high + pad


def _texts(values: Iterable[float]) -> list[str]:
    """Labels of ticks, none longer than it must be: 2500 as 2.5k, 0.00012 as 1.2e-4."""
    return [_text(value) for value in values]


def _text(value: float) -> str:
    """
    >>> [_text(v) for v in (0.0, 0.25, 2500.0, 3e6, 0.00012)]
    ['0', '0.25', '2.5k', '3M', '1.2e-4']
    """
    size = abs(value)
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if unit <= size < 1000 * unit:
            return f"{value / unit:.6g}{letter}"
    if size and (size < 1e-3 or size >= 1e12):
        digits, _, power = f"{value:.6e}".partition("e")
        return f"{float(digits):g}e{int(power)}"
    return f"{value:.6g}"
