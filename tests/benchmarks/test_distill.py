"""The benchmark of ranking on a few pictures; no speed is judged here."""

from __future__ import annotations

from benchmarks.distill import ranking


def test_both_rank_and_the_student_is_the_faster_one() -> None:
    (row,) = ranking(pairs=30, pictures=24)
    assert row.name == "distill/ranking" and row.value > 1
