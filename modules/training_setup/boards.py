"""Images, texts, tables and histograms that a run shows beside its curves, on every logger that can show them.

Callbacks ask for :func:`boards` and know none of the loggers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from lightning.pytorch.loggers import TensorBoardLogger
from lightning_utilities.core.rank_zero import rank_zero_only


class Table(NamedTuple):
    """A table of texts: names of columns, and rows with one cell per column.

    >>> print(Table(("question", "answer"), (("2 + 2?", "4"), ("a|b?", ""))).markdown())
    | question | answer |
    |---|---|
    | 2 + 2? | 4 |
    | a\\|b? | (empty) |
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        """Return the table in Markdown, one line per row."""
        head = [f"| {' | '.join(self.columns)} |", "|---" * len(self.columns) + "|"]
        return "\n".join([*head, *(f"| {' | '.join(map(_cell, row))} |" for row in self.rows)])


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split()) or "(empty)"


@runtime_checkable
class Board(Protocol):
    """Board that shows images, texts, tables and histograms under a tag, at a step. On the first rank only."""

    def show_image(self, tag: str, image_HWC: np.ndarray, step: int) -> None:
        """Show an image, uint8 ``[height, width, 3]``."""

    def show_text(self, tag: str, text: str, step: int) -> None: ...

    def show_table(self, tag: str, table: Table, step: int) -> None: ...

    def show_histogram(self, tag: str, values_N: np.ndarray, step: int) -> None:
        """Show a histogram of finite floats ``[N]``, at least one."""


class TensorBoardBoard:
    """Board of a TensorBoardLogger, Lightning's own or a subclass of it.

    Args:
        writer: the logger's SummaryWriter.
    """

    def __init__(self, writer: Any) -> None:
        self.writer = writer

    def show_image(self, tag: str, image_HWC: np.ndarray, step: int) -> None:
        self.writer.add_image(tag, image_HWC, step, dataformats="HWC")

    def show_text(self, tag: str, text: str, step: int) -> None:
        self.writer.add_text(tag, text, step)

    def show_table(self, tag: str, table: Table, step: int) -> None:
        self.writer.add_text(tag, table.markdown(), step)

    def show_histogram(self, tag: str, values_N: np.ndarray, step: int) -> None:
        self.writer.add_histogram(tag, values_N, step)


def boards(loggers: Iterable[object]) -> list[Board]:
    """Return the boards of a run's loggers, in order. Loggers such as CSV, and later ranks, have none.

    >>> from descant.modules.training_setup.loggers import CSV, TensorBoard
    >>> [type(board).__name__ for board in boards([TensorBoard("runs/x"), CSV("runs/x")])]
    ['TensorBoardBoard']
    """
    found: list[Board] = []
    for logger in loggers if getattr(rank_zero_only, "rank", 0) == 0 else ():
        if isinstance(logger, TensorBoardLogger):
            found.append(TensorBoardBoard(logger.experiment))
        elif isinstance(logger, Board):
            found.append(logger)
    return found
