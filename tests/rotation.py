"""Which part of many cases a commit has its turn with: the same on each machine, another one at the next commit.

``DESCANT_ROTATION`` says another commit's, so that what failed in its turn is run again: pytest's header prints it.
``all`` gives every case its turn.
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
#: The rotation that leaves nothing out.
ALL = "all"


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
    if rotation() == ALL:
        return list(cases)
    return list(cases[int(hashlib.sha256(rotation().encode()).hexdigest(), 16) % of :: of])


def by_turns(part: int, of: int) -> pytest.MarkDecorator:
    """The mark of a long test that runs at some commits only: ``part`` of ``of`` groups, one of which has its turn."""
    mine = part % of in turn(range(of), of)
    return pytest.mark.skipif(not mine, reason=f"one of {of} groups of long tests has its turn at a commit")


def quick(cases: Iterable[Any], of: int, ids: Sequence[str] | None = None) -> list[Any]:
    """Cases as parameters of a test: one of ``of`` parts runs in `make test`, a sixteenth of the others in `make slow`.

    Every case has its turn at some commit. ``ids``: of the cases.
    """
    each = list(cases)
    now = range(0, len(each), of) if rotation() == ALL else turn(range(len(each)), of)
    later = turn([n for n in range(len(each)) if n not in now], 16)
    names: Sequence[str | None] = ids or [None] * len(each)
    return [_parameter(case, names[n], n in later) for n, case in enumerate(each) if n in now or n in later]


def _parameter(case: Any, name: str | None, slow: bool) -> Any:
    marks = [pytest.mark.slow] if slow else []
    if isinstance(case, ParameterSet):
        return pytest.param(*case.values, id=name or case.id, marks=[*marks, *case.marks])
    return pytest.param(*(case if isinstance(case, tuple) else (case,)), id=name, marks=marks)
