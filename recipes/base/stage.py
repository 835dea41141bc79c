"""What is learned in one stage of a run, and by which parameters."""

from __future__ import annotations

import re

from lightning.pytorch.cli import OptimizerCallable

from descant.modules.core.batch import Batch
from descant.modules.core.objective import Term
from descant.modules.engine.schedule import Schedule
from descant.modules.io.inherit import Begin
from descant.modules.policy import DPO, PolicyLoss
from descant.recipes.chat import Chat
from descant.recipes.preferred import preference
from descant.recipes.reinforced import Reinforced


class Imitate:
    """To say what the data says: captions (continued pre-training) or answers (fine-tuning)."""

    def terms(self, model: Reinforced, batch: Batch) -> dict[str, Term]:
        return Chat.terms(model, batch)


class Reinforce(Imitate):
    """To say more often what earned more; the callback Rollouts asks. ``loss``: the recipe's where not given."""

    def __init__(self, loss: PolicyLoss | None = None) -> None:
        self.loss = loss

    def terms(self, model: Reinforced, batch: Batch) -> dict[str, Term]:
        return Reinforced.terms(model, batch)


class Prefer(Imitate):
    """To say the better of two answers rather than the worse, beside ``model.distill``, such as of a TeacherStage."""

    def __init__(self, loss: DPO | None = None) -> None:
        self.loss = loss or DPO()

    def terms(self, model: Reinforced, batch: Batch) -> dict[str, Term]:
        return preference(model, batch, self.loss)


class Stage:
    """What is learned in a stage, and by which parameters.

    Args:
        learns: Imitate where not given.
        train: a regular expression, searched in the names of parameters; all train that can where it is empty.
        optimizer, schedule: of the stage, whose steps the schedule counts; the recipe's where not given.
        load: weights to begin with, in place of those that the stage before it left.

    Raises:
        ValueError: for an expression that is none.
    """

    def __init__(
        self,
        learns: Imitate | None = None,
        train: str = "",
        optimizer: OptimizerCallable | None = None,
        schedule: Schedule | None = None,
        load: Begin | None = None,
    ) -> None:
        try:
            self.train = re.compile(train)
        except re.error as error:
            raise ValueError(f"train {train!r}: {error}") from None
        self.learns, self.optimizer, self.schedule, self.load = learns or Imitate(), optimizer, schedule, load

    @property
    def loss(self) -> PolicyLoss | None:
        """Of reinforcement, where the stage has one of its own."""
        return self.learns.loss if isinstance(self.learns, Reinforce) else None

    @property
    def near(self) -> bool:
        """Whether it is measured by a policy that stands still."""
        return isinstance(self.learns, Prefer) or (self.loss is not None and self.loss.kl is not None)
