"""Select the training samples of a run by the scores of a table. Letters: N rows of the table, K scores."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from descant.datamodules.names import TABLE
from descant.datamodules.selection.selected import COLUMN
from descant.modules.core.rng import global_seed, mix_N
from descant.modules.selection.selectors import ScoreFilter, Selection, Selector


@dataclass(frozen=True)
class Pool:
    """The rows of a table that have all scores.

    Attributes:
        id_N: int64. score_NK: float64. groups, group_N: names, and the number of each row's; none without groups.
        cost_N: float64; None for 1 each. without: number of rows that lack a score.
    """

    id_N: np.ndarray
    score_NK: Tensor
    groups: list[str]
    group_N: Tensor | None
    cost_N: Tensor | None
    without: int


class TableSelection:
    """Selection of samples by the scores of a table, as `descant data select` does, without a file of ids.

    The ids are computed when the data are first read, and are part of a resume point.

    Args:
        table: a parquet file with a column ``index`` of ids, or the folder of a run (or of all runs of a name), whose
            newest table of `descant predict --sets train` is read.
        scores: columns of numbers, or by default ``image,text``, the cosine of two embeddings; a row without one is not
            taken.
        selector: chooses samples by their scores; by default the better half by their mean.
        group, cost: columns of groups, and of costs such as tokens.
        graded: a parquet file of few rows with grades 0, 1, ... in columns named as ``scores`` (and styles in the
            column ``group``), from which the grades of all rows are predicted
            (:class:`~descant.modules.selection.scorers.RichScorer`).
        graded_share: the same, for a random share of the table's own rows; the table then has the columns of grades.
        features: features that grades are learned from, by default ``[image, text]``: embeddings, or ``image*text`` for
            the elementwise product of two.
        seed: seed of draws, such as the order of rows with equal scores; by default the run's.
    """

    def __init__(
        self,
        table: str,
        scores: list[str] | None = None,
        selector: Selector | None = None,
        group: str | None = None,
        cost: str | None = None,
        graded: str | None = None,
        graded_share: float | None = None,
        features: list[str] | None = None,
        seed: int | None = None,
    ) -> None:
        self.scores = ["image,text"] if scores is None else scores
        if not self.scores:
            raise ValueError("scores: none; a column of numbers, or two embeddings such as image,text")
        if graded is not None and graded_share is not None:
            raise ValueError("graded_share: of the table's own rows; not with graded, a file of them")
        if graded_share is not None and not 0 < graded_share <= 1:
            raise ValueError(f"graded_share {graded_share:g}: above 0 and at most 1, such as 0.05")
        self.table, self.selector = Path(table), selector or ScoreFilter(0.5)
        self.group, self.cost, self.features = group, cost, ["image", "text"] if features is None else features
        self.graded, self.graded_share, self._seed = None if graded is None else Path(graded), graded_share, seed

    @property
    def seed(self) -> int:
        return global_seed() if self._seed is None else self._seed

    def pool(self) -> Pool:
        """The rows of the table with their scores."""
        from descant.datamodules.selection import score_table as tables  # late: parquet takes long to import

        file = newest_table(self.table)
        labels = [*self.scores, *([self.group] if self.group is not None else [])]
        costs = [self.cost] if self.cost is not None else []
        if self.graded is None and self.graded_share is None:
            groups = [self.group] if self.group is not None else []
            rows = tables.read(file, [COLUMN, *groups, *costs, *tables.columns_of(self.scores)])
        else:
            own = labels if self.graded is None else []
            rows = tables.read(file, [COLUMN, *costs, *tables.embeddings(self.features), *own])
            rows = tables.with_features(rows, self.features)
            if self.graded is not None:
                few, where = tables.read_few(self.graded, labels), f"graded {self.graded}"
            else:
                assert self.graded_share is not None
                few, where = tables.few_of(rows, labels, self.graded_share, self.seed), f"graded rows of {file}"
            rows = tables.add_grades(rows, few, self.scores, self.group, self.features, where)
        score_NK = torch.stack([tables.score(rows, name) for name in self.scores], dim=1)
        whole_N = ~score_NK.isnan().any(dim=1)
        names, group_N = ([], None) if self.group is None else tables.groups(rows, self.group)
        cost_N = None if self.cost is None else tables.score(rows, self.cost)[whole_N]
        return Pool(
            id_N=rows[COLUMN].to_numpy()[whole_N.numpy()],
            score_NK=score_NK[whole_N],
            groups=names,
            group_N=None if group_N is None else group_N[whole_N],
            cost_N=cost_N,
            without=int((~whole_N).sum()),
        )

    def select(self, pool: Pool) -> Selection:
        """Select rows from a pool."""
        draw_N = torch.from_numpy(mix_N(pool.id_N, "select", self.seed))
        return self.selector(pool.score_NK, pool.group_N, draw_N, pool.cost_N)

    def ids(self) -> np.ndarray:
        """Return int64: ids of the selected samples."""
        pool = self.pool()
        return np.asarray(pool.id_N[self.select(pool).index_S.numpy()], dtype=np.int64)


def newest_table(place: str | Path, name: str = TABLE) -> Path:
    """Find the newest table of predictions if ``place`` is a run's folder; else return ``place``."""
    place = Path(place)
    if not place.exists():
        raise ValueError(
            f"{place}: no such table or run; descant predict --run NAME --sets train writes the table of a run"
        )
    if not place.is_dir() or any(place.glob("*.parquet")):
        return place
    tables = [*place.glob(f"predict-*/{name}"), *place.glob(f"*/predict-*/{name}")]
    if not tables:
        what = "embeddings" if name == TABLE else name
        raise ValueError(f"{place}: no {what} of training samples, which descant predict --sets train writes")
    return max(tables, key=lambda file: file.stat().st_mtime)
