"""Table of generated answers beside their images, questions and references."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from descant.callbacks.plots.style import (
    FAINT,
    GREEN,
    GRID,
    INK,
    TEXT,
    TITLE,
    VERMILLION,
    page,
    resize_image,
    rgb,
    with_style,
    wrap,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIDE, QUESTION, ANSWER, GAP = 96, 400, 190, 12  # pixels of an image, of the columns of text, and between them


class AnswerRow(NamedTuple):
    """One row of the table; ``image`` ``[C, H, W]`` from -1 to 1."""

    image: Tensor | None
    question: str
    reference: str
    answer: str
    correct: bool


@with_style
def answer_table(rows: Sequence[AnswerRow], title: str) -> Figure:
    """Draw rows of image, question, reference and answer: answers are green if correct, else orange-red.

    >>> made = answer_table([AnswerRow(None, "what colour is it?", "red", "green", False)], "val: answers")
    >>> [text.get_text() for text in made.axes[0].texts][-3:]
    ['what colour is it?', 'red', '✗ green']
    """
    left = [GAP, 2 * GAP + SIDE, 3 * GAP + SIDE + QUESTION, 4 * GAP + SIDE + QUESTION + ANSWER]
    top, step = 3 * GAP + TITLE + TEXT, SIDE + GAP
    canvas = np.full((top + step * len(rows), left[3] + ANSWER + GAP, 3), 255, dtype=np.uint8)
    for k, row in enumerate(rows):
        tile = canvas[top + k * step : top + k * step + SIDE, GAP : GAP + SIDE]
        if row.image is None:
            tile[:] = rgb(GRID)
            tile[1:-1, 1:-1] = 255
        else:
            x_CHW = ((row.image[:3].float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).expand(3, -1, -1)
            tile[:] = resize_image(x_CHW.permute(1, 2, 0).contiguous().numpy(), SIDE)
    figure, axes = page(canvas)
    axes.text(GAP, GAP, title, fontsize=TITLE, va="top")
    for x, head in zip(left[1:], ("question", "reference", "answer"), strict=True):
        axes.text(x, top - GAP / 2, head, color=FAINT, va="bottom")
    for k, row in enumerate(rows):
        answer = f"{'✓' if row.correct else '✗'} {row.answer or '(empty)'}"
        for x, text, width, colour in (
            (left[1], row.question, QUESTION, INK),
            (left[2], row.reference, ANSWER, INK),
            (left[3], answer, ANSWER, GREEN if row.correct else VERMILLION),
        ):
            for i, line in enumerate(wrap(text, TEXT, width, 5)):
                axes.text(x, top + k * step + TEXT + i * (TEXT + 4), line, color=colour, va="baseline")
    return figure
