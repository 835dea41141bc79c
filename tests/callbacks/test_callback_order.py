"""Order of callbacks: declared by their classes and sorted by the setup of any of them, wherever they are listed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest

from descant.callbacks import Harmonize, HarmonizeFeatures, HarmonizeTowers, Resume, Stages, WorstGroup
from descant.callbacks.balance.balance import Balance
from descant.callbacks.callback_order import Ordered, sort_callbacks
from descant.modules.balance.ogm import OGM
from descant.modules.multitask.cmgh import CMGH
from descant.modules.multitask.pcgrad import PCGrad


class First(L.Callback):
    pass


class Derived(First):
    pass


class Second(Ordered):
    after = ("First",)


class Third(Ordered):
    after = ("Fourth",)


class Fourth(Ordered):
    after = ("Third",)


@pytest.mark.parametrize("first", [First(), Derived()])
def test_a_callback_comes_behind_those_of_its_after_and_others_stay(first: First) -> None:
    second, other, last = Second(), L.Callback(), L.Callback()
    assert sort_callbacks([other, second, last, first]) == [other, first, second, last]
    assert sort_callbacks([first, other, second]) == [first, other, second] and sort_callbacks([second]) == [second]
    trainer: Any = SimpleNamespace(callbacks=[second, first])
    second.setup(trainer, L.LightningModule(), "fit")
    assert trainer.callbacks == [first, second]


def test_of_the_suite() -> None:
    first, resume, stages, worst = First(), Resume(), Stages(), WorstGroup(["accuracy"])
    assert sort_callbacks([first, stages, worst, resume]) == [resume, worst, stages, first]
    harmonize, balance = Harmonize(PCGrad()), Balance(OGM())
    assert sort_callbacks([balance, harmonize]) == [harmonize, balance]


@pytest.mark.parametrize(
    ("callbacks", "line"),
    [
        ([Third(), Fourth()], "Third and Fourth: each is declared to come after the other"),
        ([Harmonize(PCGrad()), HarmonizeFeatures(CMGH())], "HarmonizeFeatures cannot be combined with Harmonize; use"),
        ([HarmonizeTowers(PCGrad()), Harmonize(PCGrad())], "HarmonizeTowers cannot be combined with Harmonize; use"),
    ],
)
def test_what_cannot_be_is_one_line(callbacks: list[L.Callback], line: str) -> None:
    with pytest.raises(ValueError, match=rf"^trainer\.callbacks: {line}"):
        sort_callbacks(callbacks)
