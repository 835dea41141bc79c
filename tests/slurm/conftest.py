"""A cluster for the session, and a user's folder on it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.lab import Lab, missing

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def lab() -> Iterator[Lab]:
    """A running cluster; without its packages a reason to skip, or to fail where DESCANT_REQUIRE_SLURM=1."""
    if lacking := missing():
        line = f"no {', '.join(lacking)}: apt-get install --no-install-recommends slurmctld slurmd slurm-client munge"
        if os.environ.get("DESCANT_REQUIRE_SLURM") == "1":
            pytest.fail(line)
        pytest.skip(line)
    cluster = Lab()
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Where a user works: a configuration, and a callback of the user's own beside it."""
    for name in ("run.yaml", "pace.py"):
        shutil.copy(HERE / name, tmp_path)
    return tmp_path
