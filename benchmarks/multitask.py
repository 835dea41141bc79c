"""Four objectives over shared streams beside the same four as separate recipes, one after the other.

Letters: B samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from time import process_time

import torch

from benchmarks import Row
from benchmarks.timing import median, time_interleaved
from descant.modules.core.batch import Batch
from descant.modules.fusion.cross_encoder import FusionLayers
from descant.modules.masking.discrete_adapters import TokenAdapter
from descant.modules.objectives.base import TaskObjective
from descant.modules.objectives.classify import Classify
from descant.modules.objectives.contrast import Contrast
from descant.modules.objectives.masked import MaskedTokens
from descant.modules.objectives.match import Match
from descant.modules.towers import PatchTower, TextTower, Towers
from descant.recipes import MultiTask

#: Largest time of the shared step / of the four.
SHARE = 0.5
VOCAB, LENGTH, CLASSES = 1024, 16, 10

OBJECTIVES: dict[str, Callable[[], TaskObjective]] = {
    "contrast": lambda: Contrast([["image", "text"]]),
    "match": lambda: Match(["image", "text"]),
    "words": lambda: MaskedTokens("text", TokenAdapter(VOCAB, LENGTH), given="image"),
    "classes": lambda: Classify("class", CLASSES, ["image", "text"]),
}


def recipe(*names: str) -> MultiTask:
    """Build towers of 8 and 4 blocks, 64 patches and 16 words, under two fusion layers over all 81 tokens of a pair."""
    torch.manual_seed(0)
    image, text = PatchTower(64, 8, 96, depth=8, heads=3), TextTower(VOCAB, 96, depth=4, heads=3, length=LENGTH)
    objectives = {name: OBJECTIVES[name]() for name in names}
    return MultiTask(Towers(image=image, text=text), objectives, 96, FusionLayers(96, depth=2, heads=3))


def joint_pass(rounds: int = 30, rows: int = 16) -> Iterator[Row]:
    """Measure a joint forward and backward pass over the sum of the four separate ones, in CPU seconds."""
    drawn = torch.Generator().manual_seed(0)
    inputs = {
        "image": torch.rand(rows, 3, 64, 64, generator=drawn),
        "text": torch.randint(1, VOCAB, (rows, LENGTH), generator=drawn),
    }
    here = {m: torch.ones(rows, dtype=torch.bool) for m in inputs}
    batch = Batch(inputs, here, {"class": torch.randint(0, CLASSES, (rows,), generator=drawn)})

    def step(*names: str) -> Callable[[], None]:
        model = recipe(*names)

        def run() -> None:
            model.zero_grad()
            model.step(model.terms(batch), batch).total.backward()

        return run

    seconds = time_interleaved([step(*OBJECTIVES), *(step(name) for name in OBJECTIVES)], rounds, clock=process_time)
    share = median((seconds[:, 0] / seconds[:, 1:].sum(axis=1)).tolist())
    yield Row.at_most("multitask/shared", share.value, SHARE, share.interval)
