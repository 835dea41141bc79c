"""Which part of many cases a commit has its turn with: the same on each machine, another one at the next commit.

``DESCANT_ROTATION`` says another commit's, so that what failed in its turn is run again: pytest's header prints it.
"""

from __future__ import annotations

import functools
import hashlib
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

Case = TypeVar("Case")


@functools.cache
def rotation() -> str:
    """``DESCANT_ROTATION``, else the commit that is checked out, else (no git) "none"."""
    given = os.environ.get("DESCANT_ROTATION")
    if given:
        return given
    try:
        top = Path(__file__).parent
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=top, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "none"
    return done.stdout.strip()


def turn(cases: Sequence[Case], of: int) -> list[Case]:
    """Every ``of``-th case, from one on that the rotation says; ``of`` parts in all, each case in one of them."""
    return list(cases[int(hashlib.sha256(rotation().encode()).hexdigest(), 16) % of :: of])
