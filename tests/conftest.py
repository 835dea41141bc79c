"""What all tests share: one thread, and the command line in process."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import io
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# numpy's threads wait in a loop for each other, and it reads this when it is imported
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# by default a run has as many threads as the load of the machine leaves it, and other numbers of them give other bits
os.environ.setdefault("OMP_NUM_THREADS", "1")
# graphs that other tests compiled are not what is tested: cached ones were seen to give other gradients
os.environ.setdefault("TORCHINDUCTOR_AUTOGRAD_CACHE", "0")
os.environ.setdefault("TORCHINDUCTOR_FX_GRAPH_CACHE", "0")

import pytest
import torch

from descant.__main__ import main
from descant.cli import dump
from descant.cli import main as command
from tests.rotation import rotation

torch.set_num_threads(1)  # many small tensors: more threads only wait for each other, or for other jobs

TOY = """\
# A toy of two linear towers.
model:
  class_path: tests.toys.ToyRecipe
  init_args:
    image: {class_path: tests.toys.ToyTower, init_args: {width: 8, depth: 2}}
    text: {class_path: tests.toys.ToyTower, init_args: {width: 8}}
    optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 0.01}}
data:
  class_path: tests.toys.ToyData
  init_args: {batch_size: 8}
trainer:
  accelerator: cpu
  max_epochs: 2
  log_every_n_steps: 1
"""
TRUST = ("--trust", "tests.toys")


def pytest_report_header() -> str:
    return f"rotation: {rotation()} (DESCANT_ROTATION={rotation()} chooses the same cases again)"


#: Files of `make slow` by how long they take, as far as that matters: a file's tests stay on one worker, and those that
#: are begun last are to be short, so that the workers end together.
LONGEST = (
    *(
        "slurm/test_slurm.py",
        "test_torture.py",
        "test_kills.py",
        "test_harmony_everywhere.py",
        "test_signals.py",
        "descant/test_claims.py",
    ),
    *(
        "test_experiments.py",
        "descant/test_warnings.py",
        "descant/cli/test_estimate.py",
        "test_wheel.py",
        "test_site.py",
        "test_tutorials.py",
    ),
    *(
        "descant/cli/test_new.py",
        "modules/training_setup/test_compile_and_shard.py",
        "test_balance_everywhere.py",
        "recipes/test_smollm.py",
    ),
    *(
        "callbacks/checkpoints/test_resume.py",
        "descant/slurm/test_sweep.py",
        "test_elastic.py",
        "modules/policy/test_trl.py",
    ),
)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of slow tests the longest files first; `--no-loadscope-reorder` keeps xdist from another order."""
    if config.option.markexpr == "slow":
        place = {Path(__file__).parent / name: number for number, name in enumerate(LONGEST)}
        items.sort(key=lambda item: place.get(item.path, len(place)))


def pytest_collection_finish() -> None:
    """Keep what was imported out of garbage collection, which takes a third of a short fit otherwise.

    A fit that freezes and thaws objects by itself would thaw these, too, and search all of them first.
    """
    gc.collect()
    gc.freeze()
    command.freezing_long_lived_objects = contextlib.nullcontext  # type: ignore[attr-defined, assignment]


@dataclass
class Result:
    """What a command came to."""

    rc: int
    out: str
    err: str

    @property
    def refusal(self) -> str:
        """The one line of a refused request; anything beside it is a failure."""
        lines = [line for line in self.err.splitlines() if not line.startswith("descant: warning:")]
        assert self.rc == 2 and len(lines) == 1, (self.rc, self.err)
        return lines[0].removeprefix("descant: ")


@pytest.fixture(autouse=True)
def no_seed_of_another() -> Iterator[None]:
    """Lightning keeps a seed in the environment, and data modules draw by it, and a port: none is handed on to the
    next test."""
    _forget()
    yield
    _forget()


@pytest.fixture(autouse=True)
def memory_given_back(request: pytest.FixtureRequest) -> Iterator[None]:
    """Longer tests leave gigabytes in pieces, which the C library keeps; ranks beside them need it."""
    yield
    if request.node.get_closest_marker("slow") and sys.platform == "linux":
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)


def _forget() -> None:
    for key in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS", "DESCANT_RUN_DIR", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(key, None)


@pytest.fixture(scope="session")
def written_content() -> dict[str, Any]:
    """The schema as it is written down, by a process in which nothing else is loaded."""
    dump.write()
    content: dict[str, Any] = json.loads(dump.place().read_bytes())
    return content


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder that holds ``toy.yaml``."""
    (tmp_path / "toy.yaml").write_text(TOY)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def cli(workplace: Path) -> Iterator[Callable[..., Result]]:
    """``cli("fit", "--config", "toy.yaml")``: one command in process, in an empty folder, with what it printed."""
    path = list(sys.path)
    levels = {name: logging.getLogger(name).level for name in ("lightning", "lightning.pytorch", "lightning.fabric")}
    with settings_kept():
        yield captured
    sys.path[:] = path
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


@pytest.fixture
def toy(cli: Callable[..., Result]) -> Callable[..., Result]:
    """``toy("fit", ...)``: a command on ``toy.yaml``, whose module is trusted."""

    def call(command: str, *args: str | Path) -> Result:
        return cli(command, "--config", "toy.yaml", *TRUST, *args)

    return call


def captured(*args: str | Path) -> Result:
    """One command in this process, with what it printed."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
        rc = main([str(arg) for arg in args])
    return Result(rc, out.getvalue(), err.getvalue())


@contextlib.contextmanager
def settings_kept() -> Iterator[None]:
    """What commands inside set for the whole process is as before: the parser's settings, the seed, the run folder."""
    from jsonargparse import _common

    before = dict(_common.parsing_settings)
    try:
        yield
    finally:
        _common.parsing_settings.clear()
        _common.parsing_settings.update(before)
        _forget()
