"""Cost of balancing relative to a plain step of a classifier of pictures, words and speech; the runs alternate.

Letters: B samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from benchmarks import Row
from benchmarks.harmonize import steps_of, towers
from benchmarks.timing import median, time_interleaved
from descant.callbacks.balance.balance import Balance
from descant.callbacks.balance.opm import OPM
from descant.callbacks.balance.pmr import PMR
from descant.callbacks.harmonize.towers import HarmonizeTowers
from descant.modules.balance.agm import AGM
from descant.modules.balance.mcr import GreedyGame, LabelContrast
from descant.modules.balance.ogm import OGM
from descant.modules.balance.regularizer import Regularizer
from descant.modules.fusion.classifiers import MidFusion
from descant.modules.multitask import MMPareto
from descant.recipes import Fusion

#: Bars for balancers that only read scores, and for those that play a game.
SCORES, GAME = 1.05, 1.5


def recipe(*regularizers: Regularizer) -> Fusion:
    own: Any = list(regularizers)
    return Fusion(towers(), "category", 12, fusion=MidFusion(hidden=256), unimodal=True, regularizers=own)


def overhead(rounds: int = 30, rows: int = 160) -> Iterator[Row]:
    """Measure the time of four steps with a balancer over that of four plain steps."""
    callbacks: dict[str, tuple[Any, float | None]] = {
        "ogm": (Balance(OGM()), SCORES),
        "agm": (Balance(AGM()), SCORES),
        "pmr": (PMR(), SCORES),
        "opm": (OPM(), SCORES),
        "ogm_ge": (Balance(OGM(), noise=True), None),
        "mmpareto": (HarmonizeTowers(MMPareto()), None),
    }
    games: dict[str, tuple[Callable[[], Fusion], float | None]] = {
        "mcr_8_permutations": (lambda: recipe(GreedyGame(permutations=8)), GAME),
        "mcr_with_contrast": (lambda: recipe(GreedyGame(permutations=8), LabelContrast()), None),
    }
    arms = [steps_of(None, rows, make=recipe)]
    arms += [steps_of(callback, rows, make=recipe) for callback, _ in callbacks.values()]
    arms += [steps_of(None, rows, make=make) for make, _ in games.values()]
    times = time_interleaved(arms, rounds)
    bars = {name: bar for name, (_, bar) in callbacks.items()} | {name: bar for name, (_, bar) in games.items()}
    for k, (name, bar) in enumerate(bars.items(), start=1):
        result = median(np.asarray(times[:, k] / times[:, 0]).tolist())
        if bar is not None:
            yield Row.at_most(f"balance/{name}", result.value, bar, result.interval)
        else:
            yield Row.informs(f"balance/{name}", result.value, result.interval)
