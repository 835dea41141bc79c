"""The arithmetic of the masked benchmarks on tiny sizes; no speed is judged here."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.masked import Size, absent, fashion, ideal, step

TINY = Size(image=16, patch=4, width=24, depth=2, heads=3, out=12, out_depth=1, batch=4)


def test_all_three_steps_run_and_ours_is_required_to_be_lightlys() -> None:
    pytest.importorskip("lightly")
    rows = {row.name: row.value for row in step(TINY, pairs=30)}
    assert list(rows) == ["masked/step_vs_lightly", "masked/step_vs_timm_loop"] and min(rows.values()) > 0


@pytest.mark.slow
def test_the_ideal_is_less_than_the_step() -> None:
    (row,) = ideal(TINY, pairs=30)
    assert row.value > 1


def test_half_the_tokens_are_half_the_operations() -> None:
    rows = {row.name: row for row in absent(TINY, pairs=30)}
    # attention is not linear in tokens, and heads count whole
    assert rows["masked/half_absent_flops"].value == pytest.approx(0.5, abs=0.06)


def test_without_a_run_there_is_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert list(fashion(tmp_path / "runs/fashion")) == []
    assert "descant fit --config masked/fashion makes it" in capsys.readouterr().out
