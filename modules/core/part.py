"""What a recipe may be given beside its towers; the base recipe knows these interfaces and no class behind them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from descant.modules.core.batch import Batch
from descant.modules.core.objective import Term
from descant.modules.core.output import Output


class RecipePart:
    """A change to a recipe before training. The base calls ``apply`` once, before the optimizers are built."""

    def apply(self, recipe: Any) -> None:
        raise NotImplementedError


class Teaching(nn.Module):
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


def without_distill(state: Mapping[str, Tensor], prefix: str | None = None) -> dict[str, Tensor]:
    """Return a state dict without the teachers of a recipe and of the recipes inside it.

    ``prefix``: of the names of one recipe, whose teacher alone is left out.

    >>> sorted(without_distill({"a": Tensor(), "distill.b": Tensor(), "inner.distill.c": Tensor()}))
    ['a']
    """
    own = re.compile(r"(inner\.)*distill\." if prefix is None else re.escape(f"{prefix}distill."))
    return {name: value for name, value in state.items() if not own.match(name)}


@runtime_checkable
class ReadsData(Protocol):
    """``require_data(name, data, stage)``: raise ValueError if the data of modality ``name`` does not fit a tower."""

    def require_data(self, name: str, data: Any, stage: str) -> None: ...
