"""`make gpu` without a GPU: its time, its report, and each benchmark at toy sizes; no figure is judged here."""

from __future__ import annotations

import contextlib
import dataclasses
import doctest
import json
import signal
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from benchmarks import accelerated, budget, gpu, timing, wheels
from benchmarks.budget import Figure, LeftOut, Share, run
from tests.conftest import TRUST
from tests.rotation import quick


class Clock:
    """Time that passes when it is told to."""

    now = 0.0

    def __call__(self) -> float:
        return self.now

    def run(self, **benchmarks: tuple[float, float]) -> tuple[dict[str, list[Any]], dict[str, float]]:
        """Of name -> (weight, seconds that it takes): what was found, and the share that each was given."""
        shares: dict[str, float] = {}

        def measure(name: str, seconds: float, share: Share) -> Iterator[Figure]:
            shares[name] = share.remaining_seconds()
            self.now += seconds
            yield Figure(name, "what", 1.0)

        made = {name: (weight, partial(measure, name, s)) for name, (weight, s) in benchmarks.items()}
        return dict(run(made, 100.0, self, lambda seconds: contextlib.nullcontext())), shares


def test_what_one_does_not_use_is_shared_by_the_rest() -> None:
    found, shares = Clock().run(a=(1, 20.0), b=(1, 20.0), c=(2, 0.0))
    # shares are quotients of small whole numbers: a rounding or two of float64, far below approx's 1e-6
    assert shares == {"a": pytest.approx(25.0), "b": pytest.approx(80 / 3), "c": pytest.approx(60.0)}
    assert all(isinstance(item, Figure) for (item,) in found.values())
    found, shares = Clock().run(a=(1, 150.0), b=(1, 1.0))
    assert list(shares) == ["a"] and found["b"] == [LeftOut("b", "no time was left")]


def test_one_that_does_not_stop_is_interrupted_and_the_next_one_runs() -> None:
    def endless(share: Share) -> Iterator[Figure]:
        yield Figure("first", "what", 1.0)
        while True:
            with contextlib.suppress(Exception):  # as libraries do
                time.sleep(0.01)

    before, began = signal.getsignal(signal.SIGALRM), time.perf_counter()
    last = {"endless": (1.0, endless), "next": (1.0, lambda share: iter([Figure("next", "what", 1.0)]))}
    found = dict(run(last, time.perf_counter() + 0.6))
    assert [type(item) for item in found["endless"]] == [Figure, LeftOut]
    assert "interrupted" in str(found["endless"][1])
    assert isinstance(found["next"][0], Figure) and time.perf_counter() - began >= 0.4
    assert signal.getsignal(signal.SIGALRM) is before and signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("error", "why", "failed"),
    [
        (ModuleNotFoundError("no", name="trl"), "trl is not installed", False),
        (torch.OutOfMemoryError("CUDA out of memory"), "more memory than the card has", False),
        (RuntimeError("not the same step\nmore"), "RuntimeError: not the same step", True),
    ],
)
def test_an_error_is_told_and_only_what_should_have_worked_is_a_failure(error: Any, why: str, failed: bool) -> None:
    def broken(share: Share) -> Iterator[Figure]:
        yield Figure("first", "what", 1.0)
        raise error

    ((_, found),) = run({"x": (1.0, broken)}, time.perf_counter() + 60)
    assert found == [Figure("first", "what", 1.0), LeftOut("x", why, failed)]


def test_rounds_end_at_the_share_and_a_block_is_several_calls() -> None:
    clock = Clock()
    calls: list[str] = []

    def side(name: str, seconds: float) -> Any:
        def go() -> None:
            calls.append(name)
            clock.now += seconds

        return go

    times_RN = timing.time_interleaved([side("a", 1.0), side("b", 3.0)], 9, 1, block=2, until=20.0, clock=clock)
    assert times_RN.tolist() == [[1.0, 3.0], [1.0, 3.0]], "8 s of warming up, 8 a round; none begins after 20"
    assert calls[-8:] == ["a", "a", "b", "b", "b", "b", "a", "a"]
    assert timing.time_interleaved([side("a", 1.0)], 9, 1, until=0.0, clock=clock).shape == (0, 1)


ONES = {"precision": 3, "optimizers": 2, "breakdown": 3, "open_clip": 2, "lightly": 4, "generate": 4, "compile": 4}


@pytest.mark.parametrize("name", [*quick(ONES, 4), pytest.param("reinforce", marks=pytest.mark.slow)])
def test_each_benchmark_runs_at_toy_sizes(name: str) -> None:
    pytest.importorskip({"reinforce": "trl", "open_clip": "open_clip"}.get(name, "lightly"))
    _, benchmark = accelerated.Suite("cpu", accelerated.toy()).benchmarks()[name]
    found = list(benchmark(Share(time.perf_counter() + 600)))
    figures = [item for item in found if isinstance(item, Figure)]
    if name == "reinforce":  # answers of few steps differ by chance in their lengths, and then there is no ratio
        assert [item.name for item in found] == ["reinforce/step", "reinforce/generation"]
    else:
        assert figures == found and len(found) >= ONES[name]
    assert all(item.value > 0 and (item.interval is None or item.rounds == 2) for item in figures)
    assert all(item.value == 1 for item in figures if item.name.startswith("generate/same"))
    assert name != "breakdown" or sum(item.value for item in figures) == pytest.approx(1.0, abs=0.2)  # timed apart


def test_a_benchmark_whose_share_is_over_says_so() -> None:
    _, benchmark = accelerated.Suite("cpu", accelerated.toy()).benchmarks()["optimizers"]
    why = "0 rounds fitted into its share, 2 are asked for"
    found = list(benchmark(Share(time.perf_counter() - 1)))
    assert found == [LeftOut("optimizers/loop", why), LeftOut("optimizers/foreach", why)]


def test_memory_is_held_against_the_estimate(cli: Any) -> None:
    sizes = dataclasses.replace(accelerated.toy(), experiments=("toy.yaml",), options=TRUST)
    (figure,) = accelerated.Suite("cpu", sizes).memory(Share(time.perf_counter() + 600))
    assert isinstance(figure, Figure) and 0.5 < figure.value < 2


def test_the_report_and_its_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def one(share: Share) -> Iterator[Figure | LeftOut]:
        yield Figure("a/b", "theirs / ours", 1.2345678, (1.1, 1.3), 30, "x")
        yield Figure("a/nan", "nothing", float("nan"))
        yield LeftOut("a/c", "3 rounds fitted")

    machine = {"card": "Some Card", "memory_bytes": 80 << 30, "driver": "580.1", "torch": "2.11.0", "cuda": "13.0"}
    machine |= {"cudnn": 9, "python": "3.12.3", "cpu": "some cpu", "packages": {"trl": "1.16", "peft": None}}
    tests = {"passed": 5, "failed": 1, "skipped": 2, "ok": False, "stopped": True, "seconds": 3.0}
    report: dict[str, Any] = {"machine": machine, "budget_seconds": 540.0, "tests": tests}
    gpu.run_benchmarks({"a": (1.0, one)}, report, tmp_path / "into", until=60.0, began=0.0, clock=Clock())
    written = json.loads((tmp_path / "into/gpu.json").read_text())
    assert list(written) == ["machine", "budget_seconds", "tests", "figures", "left_out", "seconds"]
    assert written["figures"][0]["interval"] == [1.1, 1.3] and written["figures"][1]["value"] is None
    text = (tmp_path / "into/gpu.md").read_text()
    assert text == gpu.page(written) and text.startswith("# Measured on a GPU\n")
    assert "On one Some Card (80 GiB, driver 580.1, torch 2.11.0, CUDA 13.0, Python 3.12.3)." in text
    assert "| a/b | theirs / ours | 1.235 x | [1.1, 1.3] | 30 |" in text and "- a/c: 3 rounds fitted" in text
    assert "5 passed, 1 failed, 2 skipped, stopped before all were through" in text and "trl 1.16" in text


def test_a_trial_on_the_cpu_says_that_it_says_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["optimizers", "--device", "cpu", "--into", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert report["machine"]["card"] is None and report["machine"]["torch"] == torch.__version__
    assert [figure["name"] for figure in report["figures"]] == ["optimizers/loop", "optimizers/foreach"]
    assert (tmp_path / "gpu.md").read_text().startswith("# Not measured on a GPU\n") and report["tests"] is None


def test_without_a_gpu_there_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with patch("torch.cuda.is_available", lambda: False):
        assert gpu.main(["--into", str(tmp_path / "into")]) == 0 and not (tmp_path / "into").exists()
    assert capsys.readouterr().out == "make gpu: no CUDA device here, nothing was run\n"


def test_a_wrong_request_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--minutes", "0"]) == 2 and gpu.main(["opticlip", "--device", "cpu"]) == 2
    lines = ["--minutes 0: more than 0", "opticlip: no such benchmark; nearest: open_clip"]
    assert capsys.readouterr().err.splitlines() == [f"benchmarks.gpu: {line}" for line in lines]


@pytest.mark.parametrize("hangs", [False, True])
def test_device_tests_are_counted_and_stopped_at_their_share(hangs: bool, tmp_path: Path) -> None:
    last = "import time; time.sleep(300)" if hangs else "pytest.skip('x')"
    lines = ["import os, pytest", "def test_a(): assert os.environ['WHERE'] == 'cuda'", "def test_b():", f"    {last}"]
    (tmp_path / "test_x.py").write_text("\n".join([*lines, *([] if hangs else ["def test_c(): assert 0"]), ""]))
    command = [sys.executable, "-m", "pytest", "-q", "-c", "/dev/null", f"--rootdir={tmp_path}", str(tmp_path)]
    found = gpu.tests(command, 4.0 if hangs else 120.0, WHERE="cuda")
    if hangs:
        assert found["stopped"] and not found["failed"] and found["ok"] == (found["passed"] > 0)
    else:
        assert [found[of] for of in ("passed", "failed", "skipped", "ok", "stopped")] == [1, 1, 1, False, False]


def test_wheels_are_of_all_that_is_needed_but_not_there() -> None:
    environment = {"python_version": "3.12", "python_full_version": "3.12.0"}
    needed = wheels.list_requirements(wheels.ASKED, environment, {})
    assert {"jsonargparse", "trl", "datasets", "lightly", "hydra-core", "open-clip-torch", "ftfy"} < set(needed)
    assert not [name for name in needed if name in wheels.THERE or name.startswith(wheels.THERE_BEGIN)]
    less = wheels.list_requirements(
        wheels.ASKED, environment, wheels.parse_releases(["transformers==5.99", "trl==1.15", "Hydra_Core"])
    )
    assert {"transformers", "hydra-core", "omegaconf"}.isdisjoint(less) and "trl" in less, "trl 1.15 will not do"


def test_examples_hold() -> None:
    for module in (budget, timing, wheels):
        found = doctest.testmod(module)
        assert found.attempted and not found.failed, module
