"""The benchmarks of tokens on a few samples; no speed is judged here."""

from __future__ import annotations

import pytest

from benchmarks import timing
from benchmarks.tokens import decode, step


def test_both_run_on_a_few_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "LEAST", 2)
    rows = [*step(pairs=2, rows=2), *decode(pairs=2, rows=1)]
    assert [row.name for row in rows] == ["tokens/step_vs_plain", "tokens/parallel_decoding"]
    assert all(row.value > 0 for row in rows)
