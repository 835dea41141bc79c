"""Numbers in the course of a run, as lines. Letters: S steps, K lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
from PIL import Image, ImageDraw

from descant.callbacks.plots.images import FAINT, GAP, GREEN, INK, PAPER, RED, TEXT, TITLE, _font

WIDE, HIGH, LEFT, PAD = 560, 220, 48, 14  # pixels of a panel, and of what stands around it
#: Told apart by whoever sees no red, and in print: the colours differ in lightness too.
COLOURS = ((27, 94, 168), (226, 120, 20), (110, 60, 140), (90, 170, 200), RED, GREEN)


def lines(
    title: str,
    panels: Mapping[str, tuple[Sequence[str], Sequence[int], np.ndarray]],
    marks: Mapping[str, int] | None = None,
) -> Image.Image:
    """A panel for each of ``name -> (names of lines, steps, values_SK)``, from 0 to the largest value; the last of
    several lines is black. What is not finite leaves a gap. With ``marks``, the first steps of parts of the run by
    their names, all panels are of the whole run, and its parts are equally wide, however long they are.

    >>> values = np.array([[0.1, 0.2], [0.3, np.nan], [0.5, 0.6]])
    >>> lines("title", {"val": (["image", "joint"], [0, 10, 20], values)}).size
    (765, 331)
    """
    names = [name for of, _, _ in panels.values() for name in of]
    right = LEFT + WIDE + 2 * GAP + max(100, *(int(_font(TEXT, n).getlength(n)) + 80 for n in names))
    tall = TEXT + GAP + HIGH + PAD + TEXT + GAP
    image = Image.new("RGB", (right + GAP, GAP + TITLE + GAP + tall * len(panels)), PAPER)
    draw = ImageDraw.Draw(image)
    draw.text((GAP, GAP), title, INK, _font(TITLE, title))
    for p, (panel, (of, steps, values_SK)) in enumerate(panels.items()):
        top = GAP + TITLE + GAP + p * tall
        draw.text((LEFT, top), panel, INK, _font(TEXT, panel))
        every = [step for _, its, _ in panels.values() for step in its] if marks else steps
        first, last = min([*every, *(marks or {}).values()]), max(every)
        _panel(draw, (LEFT, top + TEXT + GAP // 2), of, steps, values_SK, (first, last), marks or {})
    return image


def _panel(
    draw: ImageDraw.ImageDraw,
    corner: tuple[int, int],
    names: Sequence[str],
    steps: Sequence[int],
    x_SK: np.ndarray,
    ends_at: tuple[int, int],
    marks: Mapping[str, int],
) -> None:
    left, top = corner
    real = x_SK[np.isfinite(x_SK)]
    most = max(float(real.max()) if len(real) else 1.0, 1e-12)
    bounds = [*sorted(marks.values()), ends_at[1]] if marks else list(ends_at)

    def across(step: int) -> float:
        part = max(sum(step >= bound for bound in bounds[:-1]) - 1, 0)
        low, high = bounds[part], bounds[part + 1]
        return left + (part + (step - low) / max(high - low, 1)) / (len(bounds) - 1) * WIDE

    for share in (0.0, 0.5, 1.0):
        y = top + HIGH - round(share * HIGH)
        draw.line((left, y, left + WIDE, y), (225, 225, 225))
        draw.text((left - 6, y), f"{share * most:.2g}", FAINT, _font(TEXT, ""), anchor="rm")
    for name, step in marks.items():
        draw.line((across(step), top, across(step), top + HIGH), FAINT)
        draw.text((across(step), top + HIGH + PAD // 2), f"{name}, {step:,}", FAINT, _font(TEXT, name))
    if not marks:
        draw.text((left, top + HIGH + PAD // 2), f"step {ends_at[0]:,}", FAINT, _font(TEXT, ""))
    draw.text((left + WIDE, top + HIGH + PAD // 2), f"{ends_at[1]:,}", FAINT, _font(TEXT, ""), anchor="ra")
    ends: list[tuple[float, str, tuple[int, int, int]]] = []
    for k, name in enumerate(names):
        colour = INK if k == len(names) - 1 > 0 else COLOURS[k % len(COLOURS)]
        points = [
            (across(step), top + HIGH - value / most * HIGH) for step, value in zip(steps, x_SK[:, k], strict=True)
        ]
        for a, b in pairwise(points):
            if np.isfinite([*a, *b]).all():
                draw.line((*a, *b), colour, 2)
        for x, y in points if len(points) < 40 else ():
            if np.isfinite(y):
                draw.ellipse((x - 2, y - 2, x + 2, y + 2), colour)
        last = [(y, value) for (_, y), value in zip(points, x_SK[:, k], strict=True) if np.isfinite(y)]
        if last:
            ends.append((last[-1][0], f"{name} {last[-1][1]:.3f}", colour))
    at: float = -np.inf
    for place, text, colour in sorted(ends):  # below each other, however near the lines end
        at = max(place, at + TEXT + 2)
        draw.text((left + WIDE + GAP, at), text, colour, _font(TEXT, text), anchor="lm")
