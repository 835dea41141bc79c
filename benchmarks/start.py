"""From the installed wheel, in an empty folder, without a network: seconds until the first optimizer step.

The wheel is built from this checkout and installed into its own folder. ``descant fit --config contrastive/emoji`` then
starts there, as a newcomer would start it. Extra flags only end it after a step, and print when that step is done. The
clock runs from the start of the process to the end of the first optimizer step (a line that a callback prints).
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L

from benchmarks import Row

BAR, HELP_BAR = 12.0, 0.3
ROOT = Path(__file__).parent.parent


class SayStep(L.Callback):
    """Prints one line once the first optimizer step is done."""

    def on_before_zero_grad(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        if trainer.global_step == 1:
            print("first step done", flush=True)

    def on_train_batch_end(self, trainer: L.Trainer, *rest: Any) -> None:
        if trainer.global_step == 1:
            print("first step done", flush=True)


def start() -> Iterator[Row]:
    """Measure the seconds to the first step: the median of three starts; the first also reads uncached files."""
    with tempfile.TemporaryDirectory() as folder:
        site = install_wheel(Path(folder))
        times = [first_step(site, Path(folder) / f"empty-{k}") for k in range(3)]
    value = statistics.median(times)
    yield Row.at_most("start/first_step_seconds", value, BAR, (min(times), max(times)))
    yield Row.at_most("start/help_seconds", min(help_seconds() for _ in range(5)), HELP_BAR)


def help_seconds() -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "descant", "--help"], capture_output=True, check=True)
    return time.perf_counter() - began


def install_wheel(folder: Path) -> Path:
    """Build the wheel from a copy of the checkout, and unpack it into a folder of its own."""
    ignore = shutil.ignore_patterns(".venv", "runs", "build", "*.egg-info", ".git", "__pycache__", ".mypy_cache")
    shutil.copytree(ROOT, folder / "source", symlinks=True, ignore=ignore)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", str(folder), str(folder / "source")], check=True)
    (wheel,) = folder.glob("descant-*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", str(folder / "site"), str(wheel)], check=True)
    return folder / "site"


def first_step(site: Path, folder: Path) -> float:
    """Measure the seconds from the start of the process to the end of its first optimizer step."""
    folder.mkdir()
    shutil.copytree(ROOT / "benchmarks", site / "benchmarks", dirs_exist_ok=True)
    command = [sys.executable, "-m", "descant", "fit", "--config", "contrastive/emoji", "--trainer.max_steps", "1"]
    command += ["--test", "false", "--trust", "benchmarks", "--trainer.callbacks+=benchmarks.start.SayStep"]
    environment = {**os.environ, "PYTHONPATH": str(site), "HF_HUB_OFFLINE": "1"}
    isolate = shutil.which("unshare")  # without a network, if the system allows that
    if isolate and subprocess.run([isolate, "-rn", "true"], capture_output=True).returncode == 0:
        command = [isolate, "-rn", *command]
    began = time.perf_counter()
    with subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "first step done" in line:
                took = time.perf_counter() - began
                process.communicate()
                return took
    raise RuntimeError(f"the run ended without a step, with exit code {process.returncode}")
