"""``descant data select``: ids of the rows that a selector takes, by the scores of a table.

Letters: N rows of the table, K scores.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch import Tensor

from descant import __version__
from descant.cli.errors import fail, hint
from descant.data.graded import graded as of_grades
from descant.data.graded import vectors
from descant.datamodules.selected import COLUMN
from descant.modules.core.rng import mix_N
from descant.modules.selection.selectors import Quota, ScoreFilter, Selector, entropy_share
from descant.run.runs import existing


def select(
    run: str | None,
    table: Path | None,
    scores: Sequence[str],
    out: Path,
    share: float,
    least: float | None,
    quota: bool,
    group: str | None,
    cost: str | None,
    graded: Path | None,
    features: str,
    seed: int,
    sham: bool,
    runs: Path,
) -> str:
    """Write the ids; returns lines that say what they are.

    Raises:
        Refusal: for a table or a column that is missing, a file that is there already, or options that exclude each
            other. ValueError: of the selector.
    """
    if out.exists():
        fail(f"--out {out}: it is there already, and nothing is overwritten")
    if quota and least is not None:
        fail("--least: not with --quota, which takes the best of each score and group")
    mode: Literal["permute"] | None = "permute" if sham else None
    selector: Selector = Quota(share, sham=mode) if quota else ScoreFilter(share, least, sham=mode)
    file = _of_run(runs, run) if run is not None else table
    assert file is not None
    if graded is not None:
        rows = _of_grades(file, graded, scores, group, features, cost)
    else:
        rows = _read(file, scores, [name for name in (COLUMN, group, cost) if name is not None])
    score_NK = torch.stack([_score(rows, name) for name in scores], dim=1)
    whole_N = ~score_NK.isnan().any(dim=1)
    index_N = rows[COLUMN].to_numpy()[whole_N.numpy()]
    names, group_N = _groups(rows, group, whole_N)
    cost_N = None if cost is None else torch.from_numpy(rows[cost].to_numpy().copy())[whole_N]
    score_NK = score_NK[whole_N]
    chosen = selector(score_NK, group_N, torch.from_numpy(mix_N(index_N, "select", seed)), cost_N)
    index_S = chosen.index_S.numpy()
    about = {"version": __version__, "of": file.name, "scores": list(scores), "share": share, "least": least}
    about |= {"quota": quota, "group": group, "cost": cost, "seed": seed, "sham": sham, "rows": len(index_N)}
    about |= {} if graded is None else {"graded": graded.name, "features": features}
    columns = {COLUMN: index_N[index_S], **{name: score_NK[index_S, k].numpy() for k, name in enumerate(scores)}}
    made = pa.table(columns).replace_schema_metadata({"descant": json.dumps(about)})
    scratch = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        pq.write_table(made, scratch)
        scratch.replace(out)
    finally:
        scratch.unlink(missing_ok=True)
    lines = [f"{out}: {len(index_S):,} of {len(index_N):,} rows"]
    lines[0] += f" ({len(index_S) / max(len(index_N), 1):.1%})"
    if cost_N is not None:
        lines[0] += f", {float(cost_N[index_S].sum()) / float(cost_N.sum()):.1%} of {cost}"
    lines += [
        f"  {name}: mean {float(score_NK[index_S, k].mean()):.4g}, of all {float(score_NK[:, k].mean()):.4g}"
        for k, name in enumerate(scores)
    ]
    if group_N is not None:
        lines.append(f"  {group}: entropy {entropy_share(group_N[index_S], len(names)):.3f} of log {len(names)}")
    without = int((~whole_N).sum())
    lines += [f"  {without:,} rows have no score and are left out"] if without else []
    return "\n".join([*lines, *(f"  short: {line}" for line in chosen.short)])


def _of_run(runs: Path, run: str) -> Path:
    """The newest table of a run's training samples."""
    files = existing(runs, run).glob("predict-*/embeddings-train.parquet")
    found = sorted(files, key=lambda file: file.stat().st_mtime)
    if not found:
        fail(
            f"--run {run}: no embeddings of its training samples; descant predict --run {run} --sets train writes them"
        )
    return found[-1]


def _of_grades(
    file: Path, graded: Path, scores: Sequence[str], group: str | None, features: str, cost: str | None
) -> pa.Table:
    if cost is not None:
        fail(f"--cost {cost}: not with --graded, whose rows cost 1 each")
    names = [f"z_{name}" for name in features.split(",")]
    return of_grades(_read(file, (), [COLUMN, *names]), graded, scores, group, names)


def _read(file: Path, scores: Sequence[str], others: Sequence[str]) -> pa.Table:
    """The columns that are needed; embeddings are ``z_image`` for ``image,text``."""
    if not file.exists():
        fail(f"--table {file}: no such file")
    try:
        known = pq.read_schema(file).names if file.is_file() else pq.ParquetDataset(file).schema.names
    except (OSError, pa.ArrowException) as error:
        fail(f"--table {file}: no parquet file: {str(error).splitlines()[0]}")
    embedded = {f"z_{m}" for name in scores if "," in name for m in name.split(",")}
    needed = list(dict.fromkeys([*others, *(name for name in scores if "," not in name), *sorted(embedded)]))
    for name in needed:
        if name not in known:
            fail(f"{file}: no column {name!r}{hint(name, known)}")
    return pq.read_table(file, columns=needed)


def _score(rows: pa.Table, name: str) -> Tensor:
    """float64 ``[N]``; nan where a row has none."""
    if "," not in name:
        if not pa.types.is_floating(kind := rows.schema.field(name).type) and not pa.types.is_integer(kind):
            fail(f"--score {name}: a column of {kind}, not of numbers")
        return torch.from_numpy(pc.fill_null(rows[name].cast(pa.float64()), float("nan")).to_numpy().copy())
    a, b = (f"z_{m}" for m in name.split(",")) if name.count(",") == 1 else fail(f"--score {name}: two modalities")
    score_N = torch.full((len(rows),), float("nan"), dtype=torch.float64)
    both_N = pc.and_(rows[a].is_valid(), rows[b].is_valid()).to_numpy()
    z = [vectors(rows[column].filter(pa.array(both_N))) for column in (a, b)]
    score_N[torch.from_numpy(np.flatnonzero(both_N))] = torch.nn.functional.cosine_similarity(z[0], z[1])
    return score_N


def _groups(rows: pa.Table, column: str | None, whole_N: Tensor) -> tuple[list[str], Tensor | None]:
    """Names of the groups, and the number of each row's; none without a column."""
    if column is None:
        return [], None
    if rows[column].null_count:
        fail(f"--group {column}: {rows[column].null_count} rows have no group")
    coded = rows[column].combine_chunks().dictionary_encode()
    return [str(x) for x in coded.dictionary.to_pylist()], torch.from_numpy(coded.indices.to_numpy().astype(np.int64))[
        whole_N
    ]
