"""The arithmetic of the contrastive benchmarks on tiny sizes; no speed is judged here."""

from __future__ import annotations

import pytest
import torch

from benchmarks import contrastive
from benchmarks.contrastive import Size, bf16, gradcache_step, peak_bytes
from benchmarks.timing import time_interleaved


def test_peak_bytes_are_those_alive_at_once() -> None:
    def one_after_the_other() -> None:
        for _ in range(5):
            torch.zeros(1000)

    def together() -> list[torch.Tensor]:
        return [torch.zeros(1000) for _ in range(5)]

    assert peak_bytes(one_after_the_other) == pytest.approx(4000, rel=0.1)  # an allocator rounds up to 64 bytes
    assert peak_bytes(together) == pytest.approx(20_000, rel=0.1)  # as above


def test_gradcache_needs_little_more_than_the_small_batch() -> None:
    common = {"image": 16, "patch": 4, "width": 32, "layers": 3, "text_width": 32, "text_layers": 1}
    sizes = [Size(**common, length=8, vocab=50, embed=16, batch=b) for b in (8, 64)]
    small, whole, cut = (
        peak_bytes(gradcache_step(size, chunks)) for size, chunks in ((sizes[0], 1), (sizes[1], 1), (sizes[1], 8))
    )
    assert whole > 4 * small
    assert cut < 0.4 * whole


def test_every_run_is_first_in_turn() -> None:
    calls: list[int] = []
    times = time_interleaved([lambda k=k: calls.append(k) for k in range(3)], rounds=3, warmup=1)  # type: ignore[misc]
    assert times.shape == (3, 3) and (times > 0).all()
    assert calls == [0, 1, 2, 0, 1, 2, 1, 2, 0, 2, 0, 1]


def test_bf16_is_skipped_where_the_cpu_has_none(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(contrastive, "has_bf16", lambda: False)
    assert list(bf16()) == []
    assert "skipped" in capsys.readouterr().out


def test_bf16_compares_the_same_run_of_both() -> None:
    pytest.importorskip("open_clip")
    if not contrastive.has_bf16():
        pytest.skip("no bfloat16 instructions")
    size = Size(image=16, patch=8, width=32, layers=1, text_width=32, text_layers=1, length=8, vocab=50, embed=16)
    rows = {row.name.partition("/")[2]: row.value for row in bf16(size, rounds=3)}
    assert list(rows) == ["bf16_vs_fp32", "bf16_vs_fp32_open_clip", "bf16_gain_vs_open_clip"]
    assert all(value > 0 for value in rows.values())
