"""Scores, groups and costs of the rows of a parquet table; a few graded rows give those of all others.

Letters: N rows of the table, L graded rows, K scores, D width of features.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch import Tensor
from torch.nn import functional as F

from descant.datamodules.selection.selected import COLUMN
from descant.modules.core.errors import hint
from descant.modules.core.rng import mix_N
from descant.modules.selection.scorers import RichScorer, Styler


def read(file: Path, columns: Sequence[str]) -> pa.Table:
    """Read columns from a parquet file, or from a folder of its parts."""
    if not file.exists():
        raise ValueError(f"{file}: no such file")
    try:
        known = pq.read_schema(file).names if file.is_file() else pq.ParquetDataset(file).schema.names
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{file}: no parquet file: {str(error).splitlines()[0]}") from None
    columns = list(dict.fromkeys(columns))
    for name in columns:
        if name not in known:
            raise ValueError(f"{file}: no column {name!r}{hint(name, known)}")
    return pq.read_table(file, columns=columns)


def columns_of(scores: Sequence[str]) -> list[str]:
    """Return the columns that scores need: ``quality`` itself, and embeddings for ``image,text``."""
    return [column for name in scores for column in ([f"z_{m}" for m in name.split(",")] if "," in name else [name])]


def score(rows: pa.Table, name: str) -> Tensor:
    """Return a column of numbers, or the cosine of two embeddings, ``image,text``: float64 ``[N]``, nan for none."""
    if "," not in name:
        if not pa.types.is_floating(kind := rows.schema.field(name).type) and not pa.types.is_integer(kind):
            raise ValueError(f"score {name}: a column of {kind}, not of numbers")
        return torch.from_numpy(pc.fill_null(rows[name].cast(pa.float64()), float("nan")).to_numpy().copy())
    if name.count(",") != 1:
        raise ValueError(f"score {name}: two modalities")
    a, b = (f"z_{m}" for m in name.split(","))
    score_N = torch.full((len(rows),), float("nan"), dtype=torch.float64)
    both_N = pc.and_(rows[a].is_valid(), rows[b].is_valid()).to_numpy()
    z = [_vectors(rows[column].filter(pa.array(both_N))) for column in (a, b)]
    score_N[torch.from_numpy(np.flatnonzero(both_N))] = F.cosine_similarity(z[0], z[1])
    return score_N


def groups(rows: pa.Table, column: str) -> tuple[list[str], Tensor]:
    """Return the names of the groups in a column, and each row's group number, int64 ``[N]``."""
    if rows[column].null_count:
        raise ValueError(f"group {column}: {rows[column].null_count} rows have no group")
    coded = rows[column].combine_chunks().dictionary_encode()
    return [str(x) for x in coded.dictionary.to_pylist()], torch.from_numpy(coded.indices.to_numpy().astype(np.int64))


def embeddings(features: Sequence[str]) -> list[str]:
    """Return the columns that features need: one for ``image``, and two for ``image*text``."""
    return [f"z_{m}" for name in features for m in name.split("*")]


def with_features(rows: pa.Table, features: Sequence[str]) -> pa.Table:
    """Select the rows that have all features."""
    return rows.filter(reduce(pc.and_, (rows[column].is_valid() for column in embeddings(features))))


def features_ND(rows: pa.Table, features: Sequence[str]) -> Tensor:
    """Compute features ``[N, D]`` of rows that have them: embeddings, and elementwise products of normalized ones.

    A linear scorer of ``image`` and ``text`` cannot see whether they match; ``image*text`` sums to their cosine.
    """

    def of(name: str) -> Tensor:
        z = [_vectors(rows[f"z_{m}"]) for m in name.split("*")]
        if len({x.shape[1] for x in z}) > 1:
            raise ValueError(f"features {name}: of widths {' and '.join(str(x.shape[1]) for x in z)}, not of one")
        return z[0] if len(z) == 1 else reduce(torch.mul, (F.normalize(x, dim=1) for x in z))

    return torch.cat([of(name) for name in features], dim=1)


def few_of(rows: pa.Table, columns: Sequence[str], share: float, seed: int) -> pa.Table:
    """Select a random share of the rows that have these columns, by the id of a row and the seed."""
    has_N = reduce(pc.and_, (rows[name].is_valid() for name in columns)).to_numpy()
    draw_N = mix_N(rows[COLUMN].to_numpy(), "graded", seed)
    few_L = np.flatnonzero(has_N)[np.argsort(draw_N[has_N], kind="stable")][: int(share * len(rows) + 0.5)]
    if not len(few_L):
        raise ValueError(f"graded_share {share:g}: none of {len(rows)} rows, of which {int(has_N.sum())} have grades")
    return rows.take(np.sort(few_L)).select([COLUMN, *columns])


def read_few(file: Path, columns: Sequence[str]) -> pa.Table:
    """Read the graded rows of a file, and refuse a row that lacks a column."""
    few = read(file, [COLUMN, *columns])
    for name in (COLUMN, *columns):
        if few[name].null_count:
            raise ValueError(f"{file}: {name}: {few[name].null_count} rows have none")
    return few


def add_grades(
    rows: pa.Table, few: pa.Table, scores: Sequence[str], group: str | None, features: Sequence[str], where: str
) -> pa.Table:
    """Add a column of expected grades for each score, and a column of styles for the group.

    Args:
        rows: with ``index`` and all features. few: ``index``, and grades 0, 1, ... in a column for each of ``scores``,
            and styles in the column ``group``. where: the place of the grades, for errors.
    """
    x_ND = features_ND(rows, features)
    at = {index: n for n, index in enumerate(rows[COLUMN].to_pylist())}
    missing = [index for index in few[COLUMN].to_pylist() if index not in at]
    if missing:
        raise ValueError(
            f"{where}: {len(missing)} rows are not in the table, or lack a feature, such as index {missing[0]}"
        )
    x_LD = x_ND[[at[index] for index in few[COLUMN].to_pylist()]]
    grade_LK = torch.stack([_grades(few, name, where) for name in scores], dim=1)
    score_NK = RichScorer(int(grade_LK.max()) + 1).fit(x_LD, grade_LK)(x_ND)
    for k, name in enumerate(scores):
        rows = _with(rows, name, pa.array(score_NK[:, k].numpy()))
    if group is not None:
        names, style_L = groups(few, group)
        style_N = Styler(len(names)).fit(x_LD, style_L)(x_ND)
        rows = _with(rows, group, pa.array(np.array(names)[style_N.numpy()]))
    return rows


def _grades(few: pa.Table, name: str, where: str) -> Tensor:
    if not pa.types.is_integer(kind := few.schema.field(name).type) or pc.min(few[name]).as_py() < 0:
        raise ValueError(f"{where}: {name}: grades are whole numbers from 0 on, not {kind}")
    return torch.from_numpy(few[name].to_numpy().astype(np.int64))


def _with(rows: pa.Table, name: str, column: pa.Array) -> pa.Table:
    return (rows.drop_columns([name]) if name in rows.schema.names else rows).append_column(name, column)


def _vectors(column: pa.ChunkedArray) -> Tensor:
    """Return float64 ``[N, D]``."""
    lists = column.combine_chunks()
    return torch.from_numpy(lists.flatten().to_numpy().astype(np.float64)).view(len(lists), -1)
