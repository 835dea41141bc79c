"""``descant data select``: ids of the rows that a selector takes, from the scores of a table.

Letters: N rows of the table, S rows that are taken.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq

from descant import __version__
from descant.cli.errors import fail
from descant.datamodules.selection.selected import COLUMN
from descant.datamodules.selection.table_selection import TableSelection, newest_table
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
    graded_share: float | None,
    features: str,
    seed: int,
    sham: bool,
    runs: Path,
) -> str:
    """Write the ids of the selected samples. Returns lines that describe them."""
    if out.exists():
        fail(f"--out {out}: it is there already, and nothing is overwritten")
    if quota and least is not None:
        fail("--least: not with --quota, which takes the best of each score and group")
    mode: Literal["permute"] | None = "permute" if sham else None
    selector: Selector = Quota(share, sham=mode) if quota else ScoreFilter(share, least, sham=mode)
    file = table if run is None else _of_run(runs, run)
    assert file is not None
    few = None if graded is None else str(graded)
    rule = TableSelection(str(file), list(scores), selector, group, cost, few, graded_share, features.split(","), seed)
    pool = rule.pool()
    chosen = rule.select(pool)
    index_S, number = chosen.index_S.numpy(), len(pool.id_N)
    about = {"version": __version__, "of": file.name, "scores": list(scores), "share": share, "least": least}
    about |= {"quota": quota, "group": group, "cost": cost, "seed": seed, "sham": sham, "rows": number}
    if graded is not None or graded_share is not None:
        about |= {"graded": graded_share if graded is None else graded.name, "features": features}
    columns = {COLUMN: pool.id_N[index_S], **{name: pool.score_NK[index_S, k].numpy() for k, name in enumerate(scores)}}
    made = pa.table(columns).replace_schema_metadata({"descant": json.dumps(about)})
    scratch = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        pq.write_table(made, scratch)
        scratch.replace(out)
    finally:
        scratch.unlink(missing_ok=True)
    lines = [f"{out}: {len(index_S):,} of {number:,} rows ({len(index_S) / max(number, 1):.1%})"]
    if pool.cost_N is not None:
        lines[0] += f", {float(pool.cost_N[index_S].sum()) / float(pool.cost_N.sum()):.1%} of {cost}"
    lines += [
        f"  {name}: mean {float(pool.score_NK[index_S, k].mean()):.4g}, of all {float(pool.score_NK[:, k].mean()):.4g}"
        for k, name in enumerate(scores)
    ]
    if pool.group_N is not None:
        entropy = entropy_share(pool.group_N[index_S], len(pool.groups))
        lines.append(f"  {group}: entropy {entropy:.3f} of log {len(pool.groups)}")
    lines += [f"  {pool.without:,} rows have no score and are left out"] if pool.without else []
    return "\n".join([*lines, *(f"  short: {line}" for line in chosen.short)])


def _of_run(runs: Path, run: str) -> Path:
    """Return the newest table of a run's training samples."""
    folder = existing(runs, run)
    try:
        return newest_table(folder)
    except ValueError:
        fail(
            f"--run {run}: no embeddings of its training samples; descant predict --run {run} --sets train writes them"
        )
