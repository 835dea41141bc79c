"""Image grids of retrieval: queries and their best candidates. Letters: N rows of an evaluation set, G gallery rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from torch import Tensor

from descant.callbacks.evaluate.embeddings import EmbeddingEvaluator, Rows, letters
from descant.callbacks.plots.images import Cell, sample_image, sample_line, sheet
from descant.callbacks.plots.output import save_figure
from descant.callbacks.plots.style import GREEN, GRID, VERMILLION

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN = 3  # queries that are readable in TensorBoard, which shows an image in 335 x 215 pixels until it is clicked


class RetrievalPictures(EmbeddingEvaluator):
    """Image grids of queries and their best candidates: correct ones framed green, wrong ones orange-red.

    After each evaluation, one figure per set and direction (``i2t``, ``t2i``) goes to
    ``{run folder}/pictures/{set}-i2t-{step}.png`` and, with at most three queries, which are readable there, to every
    TensorBoard logger as ``pictures/{set}-i2t``. Queries are evenly spaced over the set by sample id, hence the same in
    every evaluation, and no two share a key. If retrieved texts share a key, only the best is shown. The sanity check
    draws nothing.

    Args:
        queries: rows of the figure in the run's folder.
        top: candidates per query.
        pair: the two modalities.

    >>> RetrievalPictures(top=0)
    Traceback (most recent call last):
    ValueError: RetrievalPictures: queries 8 and top 0: 1 is the least
    """

    once = True

    def __init__(self, queries: int = 8, top: int = 5, pair: list[str] | None = None) -> None:
        super().__init__()
        self.queries, self.top, self.pair = queries, top, pair or ["image", "text"]
        if min(queries, top) < 1:
            raise ValueError(f"RetrievalPictures: queries {queries} and top {top}: 1 is the least")
        if len(self.pair) != 2 or self.pair[0] == self.pair[1]:
            raise ValueError(f"RetrievalPictures: pair: {self.pair} is not two modalities")

    def evaluate(self, trainer: L.Trainer, pl_module: L.LightningModule, sets: dict[str, Rows]) -> dict[str, Tensor]:
        for name, rows in sets.items():
            for m in self.pair:
                self.require_embedding(rows, m)
            if trainer.sanity_checking or not trainer.is_global_zero:
                continue
            for a, b in (self.pair, self.pair[::-1]):
                title = f"{name}: {a} to {b}, step {trainer.global_step}"
                figure = self.draw(rows, a, b, trainer, title)
                if figure is None:
                    continue
                small = self.draw(rows, a, b, trainer, title, SHOWN) if self.queries > SHOWN else None
                letter = letters(rows.z)
                tag = f"{name}-{letter[a]}2{letter[b]}"
                save_figure(trainer, figure, tag, f"pictures/{tag}", small)
        return {}

    def draw(
        self, rows: Rows, a: str, b: str, trainer: L.Trainer, title: str, queries: int | None = None
    ) -> Figure | None:
        """Draw the figure of one direction; None if no query has a match in the gallery."""
        gallery_G = rows.where(b)
        query = rows.where(a)
        query = query[torch.isin(rows.key[query], rows.key[gallery_G])]
        query = query[first_of_each(rows.key[query])]
        if len(query) == 0:
            return None
        spread = torch.linspace(0, len(query) - 1, min(queries or self.queries, len(query)), device=query.device)
        query = query[spread.round().long()]
        score = rows.z[a][query] @ rows.z[b][gallery_G].T
        ranked = list(score.nan_to_num(-2.0).argsort(dim=1, descending=True, stable=True))
        if b == "text":  # equal texts are shown once
            ranked = [line[first_of_each(rows.key[gallery_G[line]])] for line in ranked]
        best = torch.stack([gallery_G[line[: self.top]] for line in ranked])
        correct = rows.key[best] == rows.key[query][:, None]
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        cells = []
        for q, candidates, hits in zip(query.tolist(), best.tolist(), correct.tolist(), strict=True):
            cells.append([_cell(data, int(rows.index[q]), GRID, a != "text")])
            for n, hit in zip(candidates, hits, strict=True):
                cells[-1].append(_cell(data, int(rows.index[n]), GREEN if hit else VERMILLION, True))
        first = correct[:, 0].double().mean()
        return sheet(cells, title, f"first is correct: {first:.0%} of {len(query)} shown")


def first_of_each(key_N: Tensor) -> Tensor:
    """Return the positions of the first row of each key, ascending.

    >>> first_of_each(torch.tensor([7, 3, 7, 3, 5])).tolist()
    [0, 1, 4]
    """
    first: dict[int, int] = {}
    for n, key in enumerate(key_N.tolist()):
        first.setdefault(key, n)
    return torch.tensor(list(first.values()), dtype=torch.long, device=key_N.device)


def _cell(data: Any, index: int, frame: str, pictured: bool) -> Cell:
    return Cell(sample_image(data, index) if pictured else None, sample_line(data, index), frame)
