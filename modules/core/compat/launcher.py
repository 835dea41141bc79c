"""Lightning's launcher of the ranks of one machine.

Lightning has to keep: strategies with local ranks have this launcher. Its ``launch`` checks the cluster environment,
starts the ranks, lists them in ``procs`` and sets the number of threads before it calls the function. Descant replaces
``launch``, because Lightning's leaves ranks running when one fails, and has no public hook there.
"""

from __future__ import annotations

from lightning.fabric.utilities.distributed import _set_num_threads_if_needed as set_num_threads_if_needed
from lightning.pytorch.strategies.launchers.subprocess_script import (
    _SubprocessScriptLauncher as SubprocessScriptLauncher,
)

__all__ = ["SubprocessScriptLauncher", "set_num_threads_if_needed", "start_ranks"]


def start_ranks(launcher: SubprocessScriptLauncher) -> None:
    """Start the other ranks of this machine, which run the command of this process; ``launcher.procs`` lists them."""
    launcher._call_children_scripts()
