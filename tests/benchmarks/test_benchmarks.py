"""The benchmarks' own arithmetic on fake clocks and tiny sizes; no speed is judged here."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from benchmarks import Row, __main__, timing
from tests.tolerance import F64, ulps


class Clock:
    """Time that passes only when a side runs; the sides' calls are noted in their order."""

    def __init__(self, ours: float, owner: float) -> None:
        self.now, self.times = 0.0, {"ours": ours, "owner": owner}
        self.calls: list[str] = []
        self.generator = torch.Generator().manual_seed(0)

    def side(self, name: str, noise: float = 0.0):
        def run() -> None:
            self.calls.append(name)
            jitter = noise * float(torch.rand((), generator=self.generator) - 0.5)
            self.now += self.times[name] * (1 + jitter)

        return run

    def ratio(self, noise: float = 0.0, pairs: int = 30, warmup: int = 3) -> timing.Ratio:
        sides = self.side("ours", noise), self.side("owner", noise)
        return timing.ratio(*sides, pairs=pairs, warmup=warmup, clock=lambda: self.now)


def test_ratio_is_speed_relative_to_the_owner() -> None:
    assert Clock(ours=2.0, owner=3.0).ratio() == pytest.approx((1.5, 1.5, 1.5), rel=ulps(2, F64))


def test_interval_holds_the_true_ratio_under_noise() -> None:
    value, low, high = Clock(ours=1.0, owner=1.25).ratio(noise=0.4, pairs=60)
    assert low < value < high and low < 1.25 < high and high - low < 0.2


def test_order_alternates_within_pairs() -> None:
    clock = Clock(1.0, 1.0)
    clock.ratio(pairs=30, warmup=2)
    assert clock.calls[:4] == ["ours", "owner"] * 2
    pairs = list(zip(clock.calls[4::2], clock.calls[5::2], strict=True))
    assert pairs == [("ours", "owner"), ("owner", "ours")] * 15


def test_too_few_pairs_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 30"):
        Clock(1.0, 1.0).ratio(pairs=29)


def test_rows_judge_the_right_end() -> None:
    assert Row.at_least("a", 0.99, 0.98, (0.981, 1.0)).ok
    assert not Row.at_least("a", 1.5, 0.98, (0.979, 2.0)).ok
    assert Row.within("a", 0.02, (0.0, 0.02)).ok and not Row.within("a", 0.03, (0.0, 0.02)).ok
    assert not Row.at_least("a", math.nan, 0.0).ok and not Row.at_most("a", math.nan, 1.0).ok


def test_json_is_a_list_of_rows_and_a_missed_bar_is_exit_code_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [Row.at_least("x/a", 1.0, 0.98, (0.99, 1.01)), Row.informs("x/b", 2.0), Row.within("x/c", 0.1, (0, 0.2))]
    monkeypatch.setattr(__main__, "load", lambda name: lambda: iter(rows))
    file = tmp_path / "rows.json"
    assert __main__.main(["control", "--json", str(file)]) == 0
    assert json.loads(file.read_text()) == [
        {"name": "x/a", "value": 1.0, "bar": 0.98, "ok": True, "interval": [0.99, 1.01]},
        {"name": "x/b", "value": 2.0, "bar": None, "ok": True},
        {"name": "x/c", "value": 0.1, "bar": [0, 0.2], "ok": True},
    ]
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and torch.__version__ in lines[0] and "1 thread" in lines[0]
    rows.append(Row.at_most("x/d", 0.5, 0.1))
    assert __main__.main(["control"]) == 1
    assert "MISSED" in capsys.readouterr().out


def test_an_unknown_name_is_one_line_with_the_nearest_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert __main__.main(["contrastiv"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "contrastiv:" in line and line.endswith("nearest: contrastive")


def test_every_name_leads_to_a_benchmark() -> None:
    assert __main__.select("all") == list(__main__.BENCHMARKS)
    assert __main__.select("contrastive/demo") == ["contrastive/demo"]
    assert {"contrastive/step", "contrastive/demo"} < set(__main__.select("contrastive"))
    assert "control" not in __main__.select("contrastive")
    assert all(callable(__main__.load(name)) for name in __main__.BENCHMARKS)


def test_checkpointing_meets_its_bars_on_tiny_sizes() -> None:
    from benchmarks.contrastive import checkpointing

    memory, gradients = checkpointing(width=32, batch_size=8)
    assert memory.ok and gradients.ok
    # the inputs of ten blocks are still kept: a share near zero would mean that something was not counted
    assert memory.value > 0.02


def test_activation_bytes_count_each_storage_once_and_no_parameter() -> None:
    from benchmarks import contrastive
    from benchmarks.contrastive import Size, activation_bytes, batches, recipe_like

    pytest.importorskip("open_clip")
    size = Size(image=16, patch=8, width=32, layers=1, text_width=32, text_layers=1, length=8, vocab=50, embed=16)
    recipe = recipe_like(contrastive.open_clip_model(size))
    small, large = (activation_bytes(recipe, batches(Size(**{**vars(size), "batch": b}), 1)[0]) for b in (8, 16))
    weights = sum(p.numel() * p.element_size() for p in recipe.parameters())
    assert small < large < 2.5 * small and small < weights * 4


def test_our_step_is_open_clips_step() -> None:
    open_clip = pytest.importorskip("open_clip")
    from benchmarks.contrastive import Size, batches, disagreement, open_clip_model, recipe_like, require_agreement

    torch.manual_seed(0)
    size = Size(16, 8, width=64, layers=2, text_width=64, text_layers=2, length=12, vocab=99, embed=32, batch=8)
    clip, criterion = open_clip_model(size), open_clip.ClipLoss()
    recipe, (batch,) = recipe_like(clip), batches(size, 1)
    loss, gradient = disagreement(recipe, clip, criterion, batch)
    # float32: 84 ulps of a loss of 2; gradients of sums over 8 samples and 12 tokens, through two layers
    assert loss <= 1e-5 and gradient <= 1e-4
    with torch.no_grad():  # copies, not shared: and another function is refused
        recipe.towers["image"].get_parameter("visual.conv1.weight").mul_(1.5)
    with pytest.raises(RuntimeError, match="not the same step"):
        require_agreement(recipe, clip, criterion, batch)


def test_overhead_is_measured_inside_a_fit(capfd: pytest.CaptureFixture[str]) -> None:
    from benchmarks.contrastive import LOG_EVERY, excess, overhead_periods

    lightning, plain = overhead_periods(batch_size=4, steps=2 * LOG_EVERY + 1)
    assert len(lightning) == len(plain) == 2 * LOG_EVERY and min(*lightning, *plain) > 0
    assert len(excess(lightning, plain)) == 2
    assert capfd.readouterr().out == ""  # Lightning's own output does not get into the table


def test_demo_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from benchmarks.contrastive import demo

    assert list(demo(tmp_path)) == [] and "skipped" in capsys.readouterr().out
    metrics = {"vendor/i2t_r1": 0.43, "vendor/i2t_r10": 0.8, "concept/i2t_r10": None, "train_seconds": 250.0}
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    found = {row.name: row.ok for row in demo(tmp_path)}
    assert found == {
        "contrastive/demo_vendor_i2t_r1": True,
        "contrastive/demo_vendor_i2t_r10": True,
        "contrastive/demo_concept_i2t_r10": False,
        "contrastive/demo_both_i2t_r10": False,
        "contrastive/demo_train_seconds": True,
    }


@pytest.mark.parametrize("learned", [False, True])
def test_control_tells_chance_from_knowledge(learned: bool) -> None:
    from benchmarks.control import compare_with_vendor, recalls

    generator = torch.Generator().manual_seed(1)
    text_ND = torch.nn.functional.normalize(torch.randn(120, 16, generator=generator), dim=-1)
    other_ND = torch.nn.functional.normalize(torch.randn(120, 16, generator=generator), dim=-1)
    image_ND = text_ND + 0.3 * other_ND if learned else other_ND
    present_N = torch.ones(120, dtype=torch.bool)
    key_N = torch.arange(120)
    vendor = {
        "z": {"image": image_ND, "text": text_ND},
        "present": {"image": present_N, "text": present_N},
        "key": key_N,
    }
    r10, r1 = recalls(image_ND, key_N, text_ND, key_N, (10, 1))
    rows = list(compare_with_vendor(vendor, {"vendor/i2t_r10": r10, "vendor/i2t_r1": r1}, permutations=200))
    assert [row.value for row in rows] == [r10, r1]
    assert rows[0].ok is not learned and rows[1].ok is not learned
    low, high = rows[0].bar  # type: ignore[misc]
    assert low < 10 / 120 < high
    with pytest.raises(RuntimeError, match=r"metrics\.json"):
        list(compare_with_vendor(vendor, {"vendor/i2t_r10": r10 + 0.1, "vendor/i2t_r1": r1}, permutations=30))


@pytest.mark.slow
def test_harmony_is_timed_on_small_batches() -> None:
    from benchmarks.harmonize import overhead

    rows = {row.name: row.value for row in overhead(rounds=2, rows=8)}
    assert len(rows) == 8 and min(rows.values()) > 0
