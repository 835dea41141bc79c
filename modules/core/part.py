"""What a recipe may be given beside its towers; the base recipe knows these interfaces and no class behind them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal, Protocol, runtime_checkable

from torch import Tensor, nn

from descant.modules.core.batch import Batch
from descant.modules.core.objective import Term
from descant.modules.core.output import Output


class RecipePart:
    """A change to a recipe before training. The base calls ``apply`` once, before the optimizers are built."""

    def apply(self, recipe: Any) -> None:
        raise NotImplementedError


class StepPart:
    """Base of modules that act at some moments of a run, wherever they are inside a recipe.

    A class acts once for all of its modules, which it finds in the recipe: routers count together, in one exchange.
    """

    @staticmethod
    def before_training(recipe: Any) -> None:
        """Act once before training, after the recipe's parts are applied and before parameters are split over ranks."""

    @staticmethod
    def before_step(recipe: Any) -> None:
        """Act after the last backward of an optimizer step."""

    @staticmethod
    def after_step(recipe: Any) -> None:
        """Act after an optimizer step."""


def call_step_parts(recipe: nn.Module, moment: Literal["before_training", "before_step", "after_step"]) -> None:
    """Call a method of :class:`StepPart` once for each class of such modules in a recipe."""
    classes = (type(module) for module in recipe.modules() if isinstance(module, StepPart))
    for act in dict.fromkeys(getattr(cls, moment) for cls in classes):
        act(recipe)


class Teaching(nn.Module, StepPart):
    """Base of what a recipe learns from another network (``model.distill``).

    A checkpoint of the run contains it, under ``distill``, and a model for use lacks it.
    """

    teacher: Any

    @property
    def is_prepared(self) -> bool:
        """Whether the network is there."""
        raise NotImplementedError

    @property
    def network(self) -> nn.Module:
        """The teacher's network in eval mode, after :meth:`prepare`."""
        raise NotImplementedError

    def prepare(self, recipe: Any) -> None:
        """Build the teacher's network, once, before training."""
        raise NotImplementedError

    def forward(self, recipe: Any, batch: Batch, output: Output) -> dict[str, Term]:
        """Return the terms that join those of the recipe."""
        raise NotImplementedError

    def follow(self, recipe: Any) -> None:
        """Update the teacher after an optimizer step."""

    @staticmethod
    def before_training(recipe: Any) -> None:
        for _, student, teaching in teachings(recipe):
            if not teaching.is_prepared:
                teaching.prepare(student)

    @staticmethod
    def after_step(recipe: Any) -> None:
        for _, student, teaching in teachings(recipe):
            teaching.follow(student)


def nested(recipe: Any) -> dict[str, Any]:
    """Return a recipe and those that it wraps, by the prefix of their parameters' names."""
    inner = getattr(recipe, "inner", None)
    wrapped = nested(inner) if isinstance(inner, nn.Module) else {}
    return {"": recipe} | {f"inner.{prefix}": one for prefix, one in wrapped.items()}


def teachings(recipe: Any) -> Iterator[tuple[str, Any, Teaching]]:
    """Yield the prefix, the student and the teaching of each nested recipe that has a teacher."""
    for prefix, student in nested(recipe).items():
        if (teaching := getattr(student, "distill", None)) is not None:
            yield prefix, student, teaching


def without_distill(state: Mapping[str, Tensor], recipe: Any = None) -> dict[str, Tensor]:
    """Return a state dict without teachers; those that are prepared in ``recipe`` are kept, if it is given.

    >>> sorted(without_distill({"a": Tensor(), "distill.b": Tensor(), "inner.distill.c": Tensor()}))
    ['a']
    """
    found = () if recipe is None else teachings(recipe)
    kept = tuple(f"{prefix}distill." for prefix, _, teaching in found if teaching.is_prepared)
    return {name: x for name, x in state.items() if name.startswith(kept) or not re.match(r"(inner\.)*distill\.", name)}


@runtime_checkable
class ReadsData(Protocol):
    """``require_data(name, data, stage)``: raise ValueError if the data of modality ``name`` does not fit a tower."""

    def require_data(self, name: str, data: Any, stage: str) -> None: ...
