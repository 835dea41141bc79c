"""torchrun restarts: finding the run, and a new store. Real restarts: tests/test_elastic.py."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from descant.run import elastic

RESTART = {"TORCHELASTIC_RUN_ID": "a", "TORCHELASTIC_RESTART_COUNT": "1", "TORCHELASTIC_USE_AGENT_STORE": "True"}


def test_a_restart_finds_the_run_of_its_launch(tmp_path: Path) -> None:
    for name, run in (
        (f".torchrun-a-1-0-{os.getppid()}", "002"),
        (".torchrun-a-1-0-7", "003"),
        (".torchrun-b-1-0", "4"),
    ):
        (tmp_path / run).mkdir()
        (tmp_path / name).write_text(json.dumps([str(tmp_path / run), None]))
    assert elastic.find_run_before_restart(tmp_path, RESTART) == tmp_path / "002"
    assert (
        elastic.find_run_before_restart(tmp_path, {})
        is elastic.find_run_before_restart(tmp_path, RESTART | {"TORCHELASTIC_RESTART_COUNT": "0"})
        is None
    )
    (tmp_path / "002").rmdir()  # taken away, as it had not begun
    assert elastic.find_run_before_restart(tmp_path, RESTART) is None


@pytest.mark.parametrize(
    ("other", "own"),
    [({}, True), ({"TORCHELASTIC_RESTART_COUNT": "0"}, False), ({"GROUP_WORLD_SIZE": "2"}, False)],
    ids=["restarted", "first", "nodes"],
)
def test_the_ranks_of_a_restart_use_a_new_store(other: dict[str, str], own: bool) -> None:
    agent = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(agent.port)}
    ranks = [RESTART | place | {"RANK": str(rank)} | other for rank in (0, 1)]
    for environment in ranks:
        elastic.own_store(environment)
    (port,) = {environment["MASTER_PORT"] for environment in ranks}
    assert (port != str(agent.port)) is own
    assert {environment["TORCHELASTIC_USE_AGENT_STORE"] for environment in ranks} == {"False" if own else "True"}
