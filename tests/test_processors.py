"""The numeric tests once more with the kernels of other processors: bounds that hold here by chance fail there.

A process keeps the kernels that it began with, so that each setting has a pytest of its own.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.rotation import turn

TOP = Path(__file__).resolve().parent.parent

#: For torch, OpenBLAS (numpy), oneDNN and MKL an AVX2 machine; and torch's kernels without vector instructions.
SETTINGS = {
    "avx2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "OPENBLAS_CORETYPE": "Haswell",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    },
    "default": {"ATEN_CPU_CAPABILITY": "default"},
}

#: Those whose numbers depend on kernels and that are quick: losses, solvers, attention, towers, steps, metrics.
FILES = [
    "modules/losses",
    "modules/policy",
    "modules/language/test_language.py",
    "modules/masking/test_adapters.py",
    "modules/transforms/test_audio.py",
    "modules/core/test_chunks.py",
    "modules/masking/test_decoders.py",
    "modules/multitask/test_solvers.py::test_mgda_is_the_shortest_vector_of_the_hull",
    "modules/multitask/test_solvers.py::test_gradnorm_is_its_recurrence",
    "modules/multitask/test_solvers.py::test_samples_of_a_batch_are_mixed_as_each_alone",
    "modules/multitask/test_solvers.py::test_two_that_conflict_are_realigned_by_what_the_paper_gives",
    "modules/towers/test_heads.py",
    "modules/evaluation/test_metrics.py",
    "modules/towers/test_text.py",
    "modules/towers/test_image.py",
    "recipes/test_step.py",
    "recipes/test_gradcache.py",
    "callbacks/harmonize/test_towers.py::test_pareto_takes_the_sum_or_what_is_good_for_both_as_long_as_the_sum",
]
ON = "test_the_kernels_are_those_that_were_asked_for"


def test_the_kernels_are_those_that_were_asked_for() -> None:
    found, asked = torch.backends.cpu.get_cpu_capability(), os.environ.get("ATEN_CPU_CAPABILITY")
    assert found == asked.upper() if asked else found


@pytest.mark.slow
@pytest.mark.parametrize("setting", turn(list(SETTINGS), 2))
def test_numbers_hold_with_the_kernels_of(setting: str) -> None:
    if platform.machine().lower() not in ("x86_64", "amd64"):
        pytest.skip("kernels of x86")
    if setting == "avx2" and torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        pytest.skip("no AVX2 here")
    named = [f"tests/{name}" for name in (f"{Path(__file__).name}::{ON}", *FILES)]
    missing = [name for name in named if not (TOP / name.split("::")[0]).exists()]
    assert not missing, missing
    command = [sys.executable, "-m", "pytest", "-m", "not slow and not gpu and not ddp", *named]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(command, cwd=TOP, env=kept | SETTINGS[setting], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None and int(passed[1]) > 150, done.stdout[-2000:]
