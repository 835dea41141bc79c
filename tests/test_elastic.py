"""Restarts by torchrun: a rank dies, all are started again, and the run goes on as if nothing had happened."""

from __future__ import annotations

import os
import random
import signal
from typing import Any

import pytest

from tests.rotation import turn
from tests.torture import Case, differences, records, starts, wait

pytestmark = [pytest.mark.slow, pytest.mark.ddp]

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """The run that nobody disturbs."""
    case = Case(tmp_path_factory.mktemp("elastic"), "gradcache", ranks=2, options=("--trainer.max_epochs", "2"))
    case.finish("whole")
    return case


@pytest.mark.parametrize(
    ("name", "rank", "step"),
    turn(
        [
            pytest.param("before-a-save", 0, 1, id="before-a-save"),
            pytest.param("at-random", random.randrange(2), random.randrange(3, 23), id="at-random"),
        ],
        2,
    ),
)
def test_a_killed_rank_is_started_again_with_all_others_in_the_same_run(
    whole: Case, name: str, rank: int, step: int
) -> None:
    print(f"rank {rank} is killed after step {step}")

    def lines() -> list[dict[str, Any]]:
        return records(whole.folder(name), rank)

    with whole.start(name, launcher=TORCHRUN) as run:
        wait(lambda: run.code() is not None or any(line["step"] >= step for line in lines()), f"no step {step}")
        os.kill(next(line["pid"] for line in lines() if "pid" in line), signal.SIGKILL)
        whole.require(name, run.ended())
    assert starts(whole, name) == 2
    assert [folder.name for folder in (whole.root / "runs" / name).glob("0*")] == ["001"]
    assert differences(whole, name) == []
