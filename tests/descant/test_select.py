"""``descant data select``: ids by score or quota, of a run's embeddings or a table, and a run that trains on them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.conftest import Result
from tests.descant.test_predict import EMOJI

Cli = Callable[..., Result]


def table(folder: Path, rows: int = 200, **columns: Any) -> Path:
    random = np.random.default_rng(0)
    made = {
        "index": np.arange(rows) * 7,
        "quality": random.integers(0, 6, rows),
        "style": [("short", "long", "list", "letter")[int(4 * u * u)] for u in random.random(rows)],
        "tokens": random.integers(5, 60, rows),
    }
    pq.write_table(pa.table(made | columns), folder / "pool.parquet")
    return folder / "pool.parquet"


def test_the_best_pairs_of_a_run_are_trained_on(cli: Cli, workplace: Path) -> None:
    assert cli("fit", *EMOJI, "--name", "emoji").rc == 0
    select = (
        "data",
        "select",
        "--run",
        "emoji/001",
        "--score",
        "image,text",
        "--share",
        "0.25",
        "--out",
        "ids.parquet",
    )
    line = "--run emoji/001: no embeddings of its training samples; descant predict --run emoji/001 --sets train writes"
    assert cli(*select).refusal.startswith(line)
    assert cli("predict", "--run", "emoji/001", "--sets", "train", "--trainer.limit_predict_batches", "null").rc == 0
    result = cli(*select)
    assert result.rc == 0, result.err
    (file,) = workplace.glob("runs/emoji/001/predict-001/embeddings-train.parquet")
    rows = [row for row in pq.read_table(file).to_pylist() if row["z_image"] is not None and row["z_text"] is not None]
    z = [np.array([row[f"z_{m}"] for row in rows], dtype=np.float64) for m in ("image", "text")]
    cosine = (z[0] * z[1]).sum(1) / np.linalg.norm(z[0], axis=1) / np.linalg.norm(z[1], axis=1)
    chosen = pq.read_table("ids.parquet")
    floor = np.sort(cosine)[::-1][len(chosen) - 1]
    assert len(chosen) == int(len(rows) * 0.25 + 0.5) and min(chosen["image,text"].to_pylist()) >= floor - 1e-9
    assert {*chosen["index"].to_pylist()} <= {row["index"] for row in rows}
    about = json.loads(chosen.schema.metadata[b"descant"])
    assert about["scores"] == ["image,text"] and about["rows"] == len(rows) and not about["sham"]
    assert f"ids.parquet: {len(chosen)} of {len(rows)} rows (25.0%)" in result.out
    fitted = cli("fit", *EMOJI, "--data.selected", "ids.parquet", "--name", "best")
    assert fitted.rc == 0, fitted.err
    assert cli(*select).refusal == "--out ids.parquet: it is there already, and nothing is overwritten"


def pool_and_grades(folder: Path, rows: int = 2000, few: int = 150) -> tuple[Path, Path, np.ndarray, np.ndarray]:
    """Embeddings of a pool, of which the first two numbers make quality and the others style; some rows are graded."""
    random = np.random.default_rng(1)
    z = random.standard_normal((rows, 6))
    quality = np.clip(np.round(2 + z[:, 0] + z[:, 1]), 0, 5).astype(int)
    style = z[:, 2:].argmax(1)
    columns = {"z_image": z[:, :3].tolist(), "z_text": [None, *z[1:, 3:].tolist()]}
    pool = table(folder, rows, **columns)
    graded = {"index": np.arange(1, few) * 7, "detail": quality[1:few], "style": [f"s{k}" for k in style[1:few]]}
    pq.write_table(pa.table(graded), folder / "graded.parquet")
    return pool, folder / "graded.parquet", quality, style


def test_few_grades_score_a_whole_pool(cli: Cli, workplace: Path) -> None:
    pool, graded, quality, style = pool_and_grades(workplace)
    word = ("data", "select", "--table", pool, "--graded", graded, "--score", "detail", "--share", "0.2")
    for name, more in {"best": (), "quota": ("--quota", "--group", "style")}.items():
        result = cli(*word, *more, "--out", f"{name}.parquet")
        assert result.rc == 0, result.err
        chosen = pq.read_table(f"{name}.parquet")["index"].to_numpy() // 7
        assert len(chosen) == 400 and 0 not in chosen, "a row without a feature has no score"
        assert quality[chosen].mean() > quality.mean() + 1
    counts = np.bincount(style[chosen], minlength=4)
    assert counts.min() > 60, "found styles have equal quotas"
    about = json.loads(pq.read_table("quota.parquet").schema.metadata[b"descant"])
    assert about["graded"] == "graded.parquet" and about["features"] == "image,text"


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (
            {"index": [10**6]},
            "graded graded.parquet: 1 rows are not in the table, or lack a feature, such as index 1000",
        ),
        ({"detail": [0.5]}, "graded graded.parquet: detail: grades are whole numbers from 0 on, not double"),
        ({"detial": [1], "detail": None}, "graded.parquet: no column 'detail'; nearest: detial"),
    ],
)
def test_grades_that_cannot_be_used_are_one_line(cli: Cli, workplace: Path, change: dict[str, Any], line: str) -> None:
    pool, _, _, _ = pool_and_grades(workplace)
    columns = {name: x for name, x in ({"index": [7], "detail": [1]} | change).items() if x is not None}
    pq.write_table(pa.table(columns), workplace / "graded.parquet")
    words = ("--graded", "graded.parquet", "--score", "detail", "--out", "ids.parquet")
    assert cli("data", "select", "--table", pool, *words).refusal.startswith(line)


def test_a_share_of_the_rows_is_graded_and_products_see_what_matches(cli: Cli, workplace: Path) -> None:
    random = np.random.default_rng(2)
    z = random.standard_normal((3000, 8))
    matches = random.random(3000) < 0.5
    other = np.where(matches[:, None], z, random.standard_normal(z.shape)) + 0.3 * random.standard_normal(z.shape)
    pool = table(workplace, 3000, z_image=z.tolist(), z_text=other.tolist(), detail=matches.astype(int))
    word = ("data", "select", "--table", pool, "--graded-share", "0.1", "--score", "detail", "--share", "0.4")
    right = dict[str, float]()
    for features in ("image,text", "image,text,image*text"):
        result = cli(*word, "--features", features, "--out", f"{len(right)}.parquet")
        assert result.rc == 0, result.err
        chosen = pq.read_table(f"{len(right)}.parquet")
        right[features] = matches[chosen["index"].to_numpy() // 7].mean()
        assert json.loads(chosen.schema.metadata[b"descant"])["graded"] == 0.1
    assert right["image,text"] < 0.6 < 0.95 < right["image,text,image*text"]


def test_quotas_and_costs_of_a_table(cli: Cli, workplace: Path) -> None:
    pool = table(workplace, 4000)
    word = ("data", "select", "--table", pool, "--score", "quality", "--group", "style", "--cost", "tokens")
    entropy = {}
    for name, more in {"best": (), "quota": ("--quota",), "sham": ("--quota", "--sham")}.items():
        result = cli(*word, "--share", "0.1", *more, "--out", f"{name}.parquet")
        assert result.rc == 0, result.err
        chosen = pq.read_table(f"{name}.parquet")["index"].to_numpy() // 7
        tokens = pq.read_table(pool)["tokens"].to_numpy()
        assert 0.099 <= tokens[chosen].sum() / tokens.sum() <= 0.1
        entropy[name] = float(result.out.split("entropy ")[1].split()[0])
    assert min(entropy["quota"], entropy["sham"]) >= 0.95 > entropy["best"]


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--score", "qualty"), "no column 'qualty'; nearest: quality"),
        (("--score", "style"), "score style: a column of string, not of numbers"),
        (("--score", "image,text"), "no column 'z_image'"),
        (("--score", "a,b,c"), "no column 'z_a'"),
        (("--score", "quality", "--group", "kind"), "no column 'kind'"),
        (("--score", "quality", "--share", "1.5"), "share 1.5: above 0 and at most 1"),
        (("--score", "quality", "--quota", "--least", "1"), "--least: not with --quota"),
        (("--score", "bad", "--share", "0.5"), "scores: row 1 has [inf]; all have to be finite"),
    ],
)
def test_what_is_wrong_is_one_line(cli: Cli, workplace: Path, more: tuple[str, ...], says: str) -> None:
    pool = table(workplace, 3, bad=[1.0, np.inf, 2.0])
    result = cli("data", "select", "--table", pool, *more, "--out", "ids.parquet")
    assert says in result.refusal and not Path("ids.parquet").exists() and not list(workplace.glob(".ids*"))


def test_no_table_and_no_run(cli: Cli, workplace: Path) -> None:
    (workplace / "text.parquet").write_text("no table")
    word = ("data", "select", "--score", "quality", "--out", "ids.parquet")
    assert "no such table or run" in cli(*word, "--table", "none.parquet").refusal
    assert "no parquet file" in cli(*word, "--table", "text.parquet").refusal
    assert "none/001" in cli(*word, "--run", "none/001").refusal
