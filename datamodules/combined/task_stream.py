"""A stream of tasks for continual pre-training: each a stage, with replay of earlier tasks and of the original data."""

from __future__ import annotations

import math
from typing import Any

from descant.datamodules.base import DataModule
from descant.datamodules.combined.mixture import Mixture
from descant.datamodules.combined.stages import StageData, StagedData
from descant.datamodules.names import require_known

#: The parts of a batch: the current task, earlier tasks, and the data that the model was trained on before the stream.
UPDATE, REPLAY, PRETRAINING = "update", "replay", "pretraining"


class TaskStream(StagedData):
    """One stage per task; each step mixes the current task with earlier tasks and with the original data.

        rows of a step:    mix[update] task t,    mix[replay] / (t - 1) of each task before,    mix[pretraining]

    divided by the sum of those that exist; the first task has nothing to replay. Replayed rows count in the budget.
    After all stages, the model has seen the same tasks, whatever their order. At every stage, the evaluation sets are
    those of every task and of the original data, as ``task-set``, so that both learning and forgetting can be read (the
    callback Accumulation). The recipe is Staged, and one Stage serves all tasks (``each: {class_path: Stage}``).
    Source: Roth 2024 (FoMo-in-Flux), arXiv 2408.14471, whose default mixture is equal thirds.

    Args:
        tasks: name -> data, with equal modalities, tokens and shapes.
        pretraining: the original data, for replay and to see how much of it is kept.
        mix: shares of ``update``, ``replay`` and ``pretraining``; by default all of the current task.
        order: order of the tasks; as given by default.
        joint: an upper bound: every stage has all tasks, also later ones, in equal shares of update and replay.
        sealed: use the lock-box of all data, which must have one, such as Emoji.
        steps, samples, flops: the budget of each task, one of the three (see StageData).
        batch_size, eval_batch_size, num_workers, tiny: arguments of all data.
    """

    def __init__(
        self,
        tasks: dict[str, DataModule],
        pretraining: DataModule | None = None,
        mix: dict[str, float] | None = None,
        order: list[str] | None = None,
        joint: bool = False,
        sealed: bool = False,
        steps: int | None = None,
        samples: int | None = None,
        flops: float | None = None,
        batch_size: int = 256,
        eval_batch_size: int = 512,
        num_workers: int | None = None,
        tiny: bool = False,
    ) -> None:
        order = list(tasks) if order is None else order
        mix = {UPDATE: 1.0} if mix is None else mix
        _require(tasks, pretraining, mix, order, steps or samples or flops)
        parts = dict(tasks) if pretraining is None else {**tasks, PRETRAINING: pretraining}
        for name, part in parts.items() if sealed else ():
            if not hasattr(part, "sealed"):
                raise ValueError(f"sealed: {name}: {type(part).__name__} has no lock-box; Emoji has one")
            part.sealed = True
        common: dict[str, Any] = {"batch_size": batch_size, "eval_batch_size": eval_batch_size, "tiny": tiny}
        stages = {}
        for t, name in enumerate(order):
            update, replay = mix.get(UPDATE, 0.0), mix.get(REPLAY, 0.0)
            weights = {name: update} | {earlier: replay / t for earlier in order[:t]}
            if joint:
                weights = dict.fromkeys(order, (update + replay) / len(order))
            weights = {PRETRAINING: mix.get(PRETRAINING, 0.0)} | weights
            weights = {part: weight for part, weight in weights.items() if weight}
            data = Mixture({part: parts[part] for part in weights}, weights, num_workers=num_workers, **common)
            stages[name] = StageData(data, steps=steps, samples=samples, flops=flops)
        self.everything = Mixture(parts, dict.fromkeys(parts, 1.0), num_workers=num_workers, **common)
        super().__init__(stages, num_workers=num_workers, tiny=tiny)
        self.evaluated = self.everything

    @property
    def inner(self) -> list[DataModule]:
        return [*super().inner, self.everything]


def _require(
    tasks: dict[str, DataModule],
    pretraining: DataModule | None,
    mix: dict[str, float],
    order: list[str],
    budget: float | None,
) -> None:
    if not tasks:
        raise ValueError("tasks: none; such as {food: {class_path: Emoji, init_args: {groups: [food-drink]}}}")
    if not budget:
        raise ValueError("TaskStream: no budget of a task; give steps, samples or flops")
    require_known("order", order, list(tasks))
    if sorted(order) != sorted(tasks):
        raise ValueError(f"order {', '.join(order)}: each of the tasks once: {', '.join(tasks)}")
    require_known("mix", list(mix), (UPDATE, REPLAY, PRETRAINING))
    if mix.get(UPDATE, 0) <= 0 or any(not 0 <= share < math.inf for share in mix.values()):
        raise ValueError(f"mix {mix}: shares of 0 or more, and of {UPDATE} above 0")
    if mix.get(PRETRAINING) and pretraining is None:
        raise ValueError(f"mix: {PRETRAINING} {mix[PRETRAINING]:g}, and there is no original data; give pretraining")
    if PRETRAINING in tasks:
        raise ValueError(f"tasks: {PRETRAINING!r} is the name of the original data; give the task another")
    shared = set.intersection(*(set(data.modalities) for data in tasks.values()))
    if not shared:
        have = "; ".join(f"{name}: {', '.join(data.modalities)}" for name, data in tasks.items())
        raise ValueError(f"tasks: no modality is in all of them ({have})")
