"""Scores and styles of a whole table from a few graded rows of it, as ``descant data select --graded`` has them.

Letters: N rows of the table, L graded rows.
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

from descant.cli.errors import fail, hint
from descant.datamodules.selected import COLUMN
from descant.modules.selection.scorers import RichScorer, Styler


def graded(rows: pa.Table, file: Path, scores: Sequence[str], group: str | None, features: Sequence[str]) -> pa.Table:
    """Rows that have all features, with a column of expected grades for each score, and of styles.

    Args:
        rows: with ``index`` and a column of vectors for each of ``features``.
        file: parquet with ``index``, a column of whole numbers from 0 on for each of ``scores``, and ``group``.

    Raises:
        Refusal: for a file or column that is missing, grades that are no whole numbers, or graded rows that are not in
            the table.
    """
    few = _few(file, [COLUMN, *scores, *([group] if group else [])])
    rows = rows.filter(reduce(pc.and_, (rows[name].is_valid() for name in features)))
    x_ND = torch.cat([vectors(rows[name]) for name in features], dim=1)
    at = {index: n for n, index in enumerate(rows[COLUMN].to_pylist())}
    missing = [index for index in few[COLUMN].to_pylist() if index not in at]
    if missing:
        fail(
            f"--graded {file}: {len(missing)} rows are not in the table, or lack a feature, such as index {missing[0]}"
        )
    x_LD = x_ND[[at[index] for index in few[COLUMN].to_pylist()]]
    grade_LK = torch.stack([_grades(file, few, name) for name in scores], dim=1)
    score_NK = RichScorer(int(grade_LK.max()) + 1).fit(x_LD, grade_LK)(x_ND)
    made = {COLUMN: rows[COLUMN], **{name: score_NK[:, k].numpy() for k, name in enumerate(scores)}}
    if group is not None:
        coded = few[group].combine_chunks().dictionary_encode()
        names = np.array(coded.dictionary.to_pylist())
        style_L = torch.from_numpy(coded.indices.to_numpy().astype(np.int64))
        made[group] = names[Styler(len(names)).fit(x_LD, style_L)(x_ND).numpy()]
    return pa.table(made)


def _few(file: Path, columns: list[str]) -> pa.Table:
    if not file.is_file():
        fail(f"--graded {file}: no such file")
    try:
        known = pq.read_schema(file).names
    except (OSError, pa.ArrowException) as error:
        fail(f"--graded {file}: no parquet file: {str(error).splitlines()[0]}")
    for name in columns:
        if name not in known:
            fail(f"--graded {file}: no column {name!r}{hint(name, known)}")
    few = pq.read_table(file, columns=columns)
    for name in columns:
        if few[name].null_count:
            fail(f"--graded {file}: {name}: {few[name].null_count} rows have none")
    return few


def _grades(file: Path, few: pa.Table, name: str) -> Tensor:
    if not pa.types.is_integer(kind := few.schema.field(name).type) or pc.min(few[name]).as_py() < 0:
        fail(f"--graded {file}: {name}: grades are whole numbers from 0 on, not {kind}")
    return torch.from_numpy(few[name].to_numpy().astype(np.int64))


def vectors(column: pa.ChunkedArray) -> Tensor:
    """float64 ``[N, D]``."""
    lists = column.combine_chunks()
    return torch.from_numpy(lists.flatten().to_numpy().astype(np.float64)).view(len(lists), -1)
