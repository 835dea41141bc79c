"""How terms pulled with and against each other in the course of a run, to look at.

Letters: S looks, Q pairs of terms.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from descant.callbacks.plots.images import FAINT, GAP, INK, PAPER, TEXT, TITLE, _font

MOST = 512  # looks that are kept: twice as far apart from then on
ROW, WIDTH = 30, 640  # pixels of a pair
AGAINST, WITH = (180, 30, 20), (30, 80, 180)


class Track:
    """Numbers of a run, at most 512 of them and evenly spread: of each further look, the mean of those it stands for.

    >>> track = Track()
    >>> for step in range(2000):
    ...     track.add(step, [float(step)])
    >>> steps, values = track.seen()
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
        self.sums = [
            [x + y for x, y in zip(a, b, strict=True)] for a, b in zip(self.sums[::2], self.sums[1::2], strict=True)
        ]
        self.counts = [a + b for a, b in zip(self.counts[::2], self.counts[1::2], strict=True)]

    def seen(self) -> tuple[list[int], np.ndarray]:
        """Steps, and ``[S, Q]``."""
        return self.steps, np.array([[x / n for x in row] for row, n in zip(self.sums, self.counts, strict=True)])

    def state_dict(self) -> dict[str, object]:
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, object]) -> None:
        vars(self).update(state)


def cosine_map(title: str, pairs: Sequence[tuple[str, str]], steps: Sequence[int], cos_SQ: np.ndarray) -> Image.Image:
    """A row a pair, from the first look to the last: blue where their gradients agree, red where they conflict.

    >>> cosine_map("title", [("a", "b")], [0, 1], np.array([[-1.0], [0.5]])).size
    (796, 143)
    """
    names = [f"{a} ~ {b}" for a, b in pairs]
    left = GAP + max(120, *(int(_font(TEXT, name).getlength(name)) for name in names)) + GAP
    top = GAP + TITLE + 10 + TEXT + 14
    image = Image.new("RGB", (left + WIDTH + GAP, top + ROW * len(pairs) + TEXT + GAP + 4 + GAP), PAPER)
    draw = ImageDraw.Draw(image)
    draw.text((GAP, GAP), title, INK, _font(TITLE, title))
    most = max(float(np.abs(cos_SQ).max()), 1e-3)
    legend = f"cosine of their gradients: red {-most:.2f} (conflict), white 0, blue {most:.2f}"
    draw.text((GAP, GAP + TITLE + 10), legend, FAINT, _font(TEXT, legend))
    at_X = (np.arange(WIDTH) * len(steps)) // WIDTH
    for q, name in enumerate(names):
        y = top + q * ROW
        draw.text((GAP, y + ROW // 2), name, INK, _font(TEXT, name), anchor="lm")
        share_X1 = (cos_SQ[at_X, q] / most)[:, None]
        end_X3 = np.where(share_X1 < 0, np.array(AGAINST), np.array(WITH))
        colour_X3 = np.array(PAPER) + np.abs(share_X1) * (end_X3 - np.array(PAPER))
        band = Image.fromarray(np.tile(colour_X3.round().astype(np.uint8)[None], (ROW - 4, 1, 1)))
        image.paste(band, (left, y + 2))
        draw.rectangle((left - 1, y + 1, left + WIDTH, y + ROW - 2), outline=FAINT)
    bottom = top + ROW * len(pairs) + 4
    draw.text((left, bottom), f"step {steps[0]:,}", FAINT, _font(TEXT, ""))
    draw.text((left + WIDTH, bottom), f"{steps[-1]:,}", FAINT, _font(TEXT, ""), anchor="ra")
    return image
