"""``make gpu``: run the device tests on CUDA, then GPU benchmarks, in a fixed time; write one JSON file and a page.

The page names the card. Nothing is downloaded. ``--device cpu`` tries the code at toy sizes: its figures mean nothing,
and the page notes that.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from benchmarks.budget import Benchmark, Figure, run

SKIPPED = "make gpu: no CUDA device here, nothing was run"
#: Share of the whole time that the tests may take.
TESTS_SHARE = 0.35
#: Seconds that the tests have to end after an interrupt.
ENDING = 20.0
PACKAGES = ("lightning", "transformers", "timm", "open-clip-torch", "lightly", "trl", "bitsandbytes", "triton")


def pytest() -> list[str]:
    """Return the command of the device tests, several at once if pytest can."""
    many = ["-n", "auto", "--maxprocesses", "4"] if find_spec("xdist") else []
    return [sys.executable, "-m", "pytest", *many, "tests/device"]


def tests(command: Sequence[str], seconds: float, **environment: str) -> dict[str, Any]:
    """Run pytest for at most ``seconds``, and count its tests; ``stopped``: it was interrupted before its end."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "tests.xml")
        process = subprocess.Popen(
            [*command, f"--junitxml={report}"], start_new_session=True, env={**os.environ, **environment}
        )
        stopped = False
        try:
            process.wait(max(seconds - ENDING, 0.5 * seconds))
        except subprocess.TimeoutExpired:
            stopped = True
            process.send_signal(signal.SIGINT)  # pytest then writes the results that it has
            try:
                process.wait(min(ENDING, 0.5 * seconds))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        found = {"passed": 0, "failed": 0, "skipped": 0}
        if report.exists():
            for suite in ElementTree.parse(report).iter("testsuite"):  # its cases include interrupted tests
                count = {kind: int(suite.get(kind, 0)) for kind in ("tests", "failures", "errors", "skipped")}
                found["failed"] += count["failures"] + count["errors"]
                found["skipped"] += count["skipped"]
                found["passed"] += count["tests"] - count["failures"] - count["errors"] - count["skipped"]
    ok = not found["failed"] and (found["passed"] > 0 if stopped else process.returncode == 0)
    return {**found, "ok": ok, "stopped": stopped, "seconds": round(time.monotonic() - began, 1)}


def machine(device: str) -> dict[str, Any]:
    """Return the facts that figures depend on: card, driver, versions."""
    import torch

    from benchmarks.timing import cpu

    told: dict[str, Any] = {"card": None, "memory_bytes": None, "driver": None}
    if device == "cuda":
        card = torch.cuda.get_device_properties(0)
        told = {"card": card.name, "memory_bytes": card.total_memory, "driver": _driver()}
    versions = {"torch": torch.__version__, "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    packages = {name: _version(name) for name in PACKAGES}
    return {**told, **versions, "python": platform.python_version(), "cpu": cpu(), "packages": packages}


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def page(report: Mapping[str, Any]) -> str:
    """Format the report as Markdown: the card, each figure with its interval, and what was left out."""
    on = report["machine"]
    lines = ["# Measured on a GPU", ""]
    if on["card"] is None:
        lines = ["# Not measured on a GPU", "", "**A trial on a CPU at toy sizes: these figures say nothing.**", ""]
    else:
        size = f"{on['memory_bytes'] / 2**30:.0f} GiB, driver {on['driver']}"
        lines += [f"On one {on['card']} ({size}, torch {on['torch']}, CUDA {on['cuda']}, Python {on['python']})."]
        owners = ", ".join(f"{name} {version}" for name, version in on["packages"].items() if version)
        lines += [f"With {owners}; its CPU: {on['cpu']}.", ""]
    lines += [f"`make gpu` took {report['seconds']:.0f} of at most {report['budget_seconds']:.0f} seconds."]
    if (of := report["tests"]) is not None:
        counts = ", ".join(f"{of[kind]} {kind}" for kind in ("passed", "failed", "skipped"))
        ended = ", stopped before all were through" if of["stopped"] else ""
        lines += [f"Device tests: {counts}{ended}, in {of['seconds']:.0f} seconds."]
    lines += ["", "| figure | what | value | 95 % | rounds |", "|---|---|---|---|---|"]
    for figure in report["figures"]:
        ends = figure["interval"]
        interval = f"[{_number(ends[0])}, {_number(ends[1])}]" if ends else ""
        value = f"{_number(figure['value'])} {figure['unit']}".strip()
        lines += [f"| {figure['name']} | {figure['what']} | {value} | {interval} | {figure['rounds']} |"]
    if report["left_out"]:
        lines += ["", "Left out:", ""]
        for left in report["left_out"]:
            lines += [f"- {left['name']}: {'failed: ' if left['failed'] else ''}{left['why']}"]
    return "\n".join(lines) + "\n"


def _number(value: float | None) -> str:
    return "?" if value is None else f"{value:.4g}"


def run_benchmarks(
    benchmarks: Mapping[str, tuple[float, Benchmark]],
    report: dict[str, Any],
    into: Path,
    until: float,
    began: float,
    clock: Callable[[], float] = time.monotonic,
) -> dict[str, Any]:
    """Run the benchmarks; write ``gpu.json`` and ``gpu.md`` after each, so that a killed run leaves its results."""
    report |= {"figures": [], "left_out": []}
    into.mkdir(parents=True, exist_ok=True)
    for found in chain([[]], (items for _, items in run(benchmarks, until, clock))):
        for item in found:
            report["figures" if isinstance(item, Figure) else "left_out"].append(item.as_json())
            print(json.dumps(item.as_json()), flush=True)
        report["seconds"] = round(clock() - began, 1)
        (into / "gpu.json").write_text(json.dumps(report, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        (into / "gpu.md").write_text(page(report), encoding="utf-8")
    return report


def main(args: Sequence[str] | None = None) -> int:
    """Return 0 if all went well or there is no GPU, 1 if a test or a benchmark failed, 2 for a wrong request."""
    parser = argparse.ArgumentParser("python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="benchmarks; tests: the device tests (all of them)")
    parser.add_argument("--minutes", type=float, default=9.0, metavar="N", help="in all (9)")
    parser.add_argument("--since", type=float, metavar="SECONDS", help="when they began, as `date +%%s` says it (now)")
    parser.add_argument("--into", type=Path, default=Path("build/gpu"), metavar="FOLDER", help="of gpu.json and gpu.md")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a trial at toy sizes")
    options = parser.parse_args(args)
    began = time.monotonic() - (0.0 if options.since is None else max(time.time() - options.since, 0.0))
    if not options.minutes > 0:
        return _refuse(f"--minutes {options.minutes:g}: more than 0")
    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        print(SKIPPED)
        return 0
    from benchmarks.accelerated import Sizes, Suite, toy
    from descant.cli.errors import hint

    cuda = options.device == "cuda"
    if not cuda:
        torch.set_num_threads(1)  # small tensors: more threads only wait for each other
    benchmarks = Suite(options.device, Sizes() if cuda else toy()).benchmarks()
    unknown = next((name for name in options.names if name not in (known := ["tests", *benchmarks])), None)
    if unknown is not None:
        return _refuse(f"{unknown}: no such benchmark{hint(unknown, known)}")
    chosen = {name: of for name, of in benchmarks.items() if not options.names or name in options.names}
    seconds = 60 * options.minutes
    report: dict[str, Any] = {"machine": machine(options.device), "budget_seconds": seconds, "tests": None}
    if cuda and (not options.names or "tests" in options.names):
        left = began + seconds - time.monotonic()
        report["tests"] = tests(pytest(), left * (TESTS_SHARE if chosen else 1.0), DESCANT_TEST_DEVICE="cuda")
    report = run_benchmarks(chosen, report, options.into, began + seconds, began)
    print(f"{options.into / 'gpu.json'}, {options.into / 'gpu.md'}: {report['seconds']:.0f} s")
    failed = any(left["failed"] for left in report["left_out"])
    return 1 if failed or (report["tests"] is not None and not report["tests"]["ok"]) else 0


def _refuse(line: str) -> int:
    print(f"benchmarks.gpu: {line}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
