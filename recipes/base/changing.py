"""Base of recipes whose model changes between training stages, and their checkpoints."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

from torch import Tensor

from descant.modules.adaptation.grow import structure
from descant.modules.adaptation.stage_changes import Boundary, StageChange, Trial
from descant.modules.core.errors import no_such
from descant.modules.core.part import teachings
from descant.modules.training_setup.flops import twin_of
from descant.recipes.base.boundaries import Batches, Boundaries, Growths, estimate_statistics, short_training
from descant.recipes.base.recipe import Recipe
from descant.recipes.base.stage import Stage
from descant.recipes.base.wrapper import Wrapper


class Changing(Wrapper):
    """Recipe in stages: each one loads weights, changes the model and chooses what trains. Resumes in any stage.

    A subclass implements ``_choose(stage)``: settings, objective and trainable parameters of a stage.

    Args:
        recipe: the recipe to train. stages: stages by name, in this order. each: one stage for every stage of the data.
    """

    def __init__(self, recipe: Recipe, stages: dict[str, Stage] | None, each: Stage | None, **kwargs: Any) -> None:
        if not stages and each is None:
            raise ValueError("stages: none; such as {answers: {class_path: Stage}}")
        if stages and each is not None:
            raise ValueError(f"stages {', '.join(stages)} and each: one of the two")
        self._each = each
        self.stages = dict(stages) if stages else {"each": each} if each else {}
        self.stage = next(iter(self.stages))
        super().__init__(recipe, **kwargs)
        self._trainable: list[str] = []
        self.boundaries = Boundaries(self.stages)

    @property
    def now(self) -> Stage:
        """Return the current stage."""
        return self.stages[self.stage]

    def named_as(self, names: Iterable[str]) -> None:
        """Set the names of the stages, if one stage is given for all."""
        if self._each is not None:
            self.stages.clear()
            self.stages.update(dict.fromkeys(names, self._each))

    def begin_stage(
        self, name: str, average: Mapping[str, Tensor] | None = None, batches: Batches | None = None
    ) -> Growths:
        """Begin a stage: load weights if it names some, apply its ``begin`` changes and choose what trains.

        ``average``: average of the weights over steps, by parameter names of this recipe. ``batches(n)``: this rank's
        first micro-batches of the stage's data.
        """
        own = {n.removeprefix("inner."): x for n, x in (average or {}).items() if n.startswith("inner.")}
        if (load := self.stages[name].load) is not None:
            load.apply(self)
        with self._new_parameters():
            # read once, because all copies train on the same micro-batches
            trial = None if batches is None else partial(self._trial, name, cache(lambda n: list(batches(n))))
            growths = self._grow_teacher(self.boundaries.begin(self.inner, name, own, trial))
        self._choose(name)
        for _, student, teaching in teachings(self):
            teaching.teacher.begin(student)
        return growths

    def _trial(self, name: str, batches: Batches, space: Any, change: StageChange | None, at: Boundary) -> Trial:
        """Train a changed copy briefly, with the same result on all ranks."""
        return short_training(twin_of(self, lambda twin: twin._apply_change(name, change, at)), batches, space)

    def _apply_change(self, name: str, change: StageChange | None, at: Boundary) -> None:
        with self._new_parameters():
            growths = None if change is None else change.apply(self.inner, at)
            self._grow_teacher([growths] if growths else [])
        self._choose(name)

    def _grow_teacher(self, growths: Growths) -> Growths:
        """Grow the teacher too, if it is a copy of the model. Return the growths."""
        if growths and self.inner.distill is not None:
            raise ValueError(f"begin: {type(self.inner).__name__} has a teacher of its own, which does not grow")
        if self.distill is not None and self.distill.is_prepared:
            for growth in growths:
                self.distill.teacher.grow(growth)
        return growths

    def end_stage(self, batches: Batches) -> None:
        """Apply the stage's ``end`` changes; ``batches(n)``: this rank's first micro-batches of its data."""
        if self.boundaries.end(self.inner, self.stage):
            estimate_statistics(self, batches)

    def _choose(self, stage: str) -> None:
        raise NotImplementedError

    def _as_in(self, begun: list[str]) -> None:
        """Set structure and trainable parameters to those after these stages have begun."""
        with self._new_parameters():
            self._grow_teacher(self.boundaries.rebuild(self.inner, begun))
        self._choose(begun[-1])

    @contextmanager
    def _new_parameters(self) -> Iterator[None]:
        """Make parameters trainable that are added to the inner model within the context."""
        was = {name for name, _ in self.inner.named_parameters()}
        yield
        now = [name for name, _ in self.inner.named_parameters()]
        self._trainable = [name for name in now if name in self._trainable or name not in was]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["stage"] = self.stage
        if self._each is not None:
            checkpoint["stages"] = list(self.stages)
        if self.boundaries.changes:
            checkpoint["boundaries"] = self.boundaries.state_dict()
        if self.boundaries.grows:
            checkpoint["structure"] = structure(self.inner)  # for readers that load only weights

    def return_to_stage(self, checkpoint: Mapping[str, Any]) -> None:
        """Go to a checkpoint's stage and choose what trains, before weights and optimizers are loaded."""
        name = checkpoint.get("stage", self.stage)
        if self._each is not None and "stages" in checkpoint:
            self.named_as(checkpoint["stages"])
        if name not in self.stages:
            raise ValueError(f"the checkpoint is of the stage {name!r}; {no_such(name, self.stages)}")
        self.stage = name
        if self._trainable:
            self._choose(name)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.return_to_stage(checkpoint)
        if self.boundaries.changes and "boundaries" in checkpoint:
            with self._new_parameters():
                self._grow_teacher(self.boundaries.load_state_dict(self.inner, checkpoint["boundaries"]))
        if self._trainable:
            self._choose(self.stage)  # now with parameters that the changes added
