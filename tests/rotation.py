"""Which part of many cases a commit has its turn with: the same on each machine, another one at the next commit.

``DESCANT_ROTATION`` says another commit's, so that what failed in its turn is run again: pytest's header prints it.
"""

from __future__ import annotations

import functools
import hashlib
import os
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pytest
from _pytest.mark.structures import ParameterSet

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


def by_turns(part: int, of: int) -> pytest.MarkDecorator:
    """The mark of a long test that runs at some commits only: ``part`` of ``of`` groups, one of which has its turn."""
    mine = turn(range(of), of) == [part % of]
    return pytest.mark.skipif(not mine, reason=f"one of {of} groups of long tests has its turn at a commit")


def quick(cases: Iterable[Any], of: int) -> list[Any]:
    """All cases as parameters of a test: those whose turn it is run in `make test`, the rest in `make slow`."""
    each = list(cases)
    mine = turn(range(len(each)), of)
    return [case if n in mine else _slow(case) for n, case in enumerate(each)]


def _slow(case: Any) -> Any:
    if isinstance(case, ParameterSet):
        return pytest.param(*case.values, id=case.id, marks=[*case.marks, pytest.mark.slow])
    return pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.slow)
