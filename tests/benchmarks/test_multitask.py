"""The benchmark of shared streams on a few samples; no speed is judged here."""

from __future__ import annotations

from benchmarks.multitask import joint_pass


def test_one_step_of_all_costs_less_than_one_of_each() -> None:
    (row,) = joint_pass(rounds=3, rows=2)
    assert row.name == "multitask/shared" and 0 < row.value < 1
