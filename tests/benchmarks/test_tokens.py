"""The benchmarks of tokens on a few samples; no speed is judged here."""

from __future__ import annotations

import pytest

from benchmarks import timing
from benchmarks.tokens import PROPORTIONAL, compute, decode, step


def test_all_run_on_a_few_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "LEAST", 2)
    rows = [*step(pairs=2, rows=2), *decode(pairs=2, rows=1), *compute(pairs=2, rows=2)]
    names = ("step_vs_plain", "parallel_decoding", "operations_by_share", "time_by_share")
    assert [row.name for row in rows] == [f"tokens/{name}" for name in names]
    assert all(row.value > 0 for row in rows)
    assert PROPORTIONAL[0] <= rows[2].value <= PROPORTIONAL[1]
