"""torchrun restarts: find the run that the workers began, and give them their own rendezvous store."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, MutableMapping
from pathlib import Path

from descant.cli.untrusted import json_of
from descant.run.runs import read_integer, word


def restarts(environment: Mapping[str, str] = os.environ) -> int:
    """Return how often torchrun has restarted these workers."""
    return read_integer("TORCHELASTIC_RESTART_COUNT", environment)


def find_run_before_restart(parent: Path, environment: Mapping[str, str] = os.environ) -> Path | None:
    """Find the run of the workers before a restart; None at a first start or if they had no run."""
    if not restarts(environment):
        return None
    notes = list(parent.glob(f".torchrun-{word(environment['TORCHELASTIC_RUN_ID'])}-*"))
    if _alone(environment):  # run ids repeat; the agent of this launch is the parent process
        notes = [note for note in notes if note.name.endswith(f"-{os.getppid()}")]
    newest = max(notes, key=lambda note: note.stat().st_mtime_ns, default=None)
    note = json_of(newest) if newest is not None else None
    folder = Path(str(note[0])) if isinstance(note, list) and note else parent
    return folder if folder.is_dir() and folder.resolve().parent == parent.resolve() else None


def own_store(environment: MutableMapping[str, str] = os.environ) -> None:
    """Use a new TCP store for the ranks of a restart.

    torchrun's store outlives them and still has the addresses of dead ranks, which makes early connections fail
    (github.com/pytorch/pytorch/issues/135712). On several nodes, restart counts may differ, so the store is kept there;
    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 helps if the rendezvous is c10d.
    """
    if not restarts(environment) or not _alone(environment):
        return
    if environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    store = TCPStore(environment["MASTER_ADDR"], read_integer("MASTER_PORT", environment), is_master=False)
    key = f"descant/port/{restarts(environment)}"
    if environment["RANK"] == "0":
        with socket.socket() as probe:
            probe.bind(("", 0))
            store.set(key, str(probe.getsockname()[1]))
    environment.update(MASTER_PORT=store.get(key).decode(), TORCHELASTIC_USE_AGENT_STORE="False")


def _alone(environment: Mapping[str, str]) -> bool:
    """Whether one agent starts all ranks."""
    return environment.get("GROUP_WORLD_SIZE", "1") == "1"
