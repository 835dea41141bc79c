"""Order of callbacks: declared by their classes, checked in one line, and moved to the front when a fit starts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest

from descant.callbacks import Resume, Stages
from descant.callbacks.run.order import move_to_front, require_order


class First(L.Callback):
    pass


class Derived(First):
    pass


class Second(L.Callback):
    after = ("First",)


def test_a_callback_before_one_of_its_after_is_refused_in_one_line() -> None:
    require_order([First(), Second()])
    require_order([Second()])
    for first in (First, Derived):
        line = rf"^trainer\.callbacks: Second must come after {first.__name__}: list {first.__name__} first$"
        with pytest.raises(ValueError, match=line):
            require_order([Second(), first()])


def test_resume_and_then_stages_lead_wherever_they_are_listed() -> None:
    first, resume, stages = First(), Resume(), Stages()
    require_order([first, stages, resume])
    for moves in ((stages, resume, stages), (resume, stages)):
        trainer: Any = SimpleNamespace(callbacks=[first, stages, resume])
        for callback in moves:
            move_to_front(trainer, callback)
        assert trainer.callbacks == [resume, stages, first]
