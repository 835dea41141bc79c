"""Sanity: one line for each absurd setting, none for a sound run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LinearLR, SequentialLR
from torch.utils.data import DataLoader, TensorDataset

from descant.callbacks.health.sanity import Sanity, _by_rank
from descant.modules.core.batch import Batch
from descant.modules.core.capabilities import has
from descant.modules.core.objective import Term
from descant.modules.core.output import Output
from descant.modules.core.rollouts import RolloutData
from descant.modules.distill.ranking import RankTarget
from descant.modules.towers import TextTower
from descant.modules.training_setup.schedule import WarmupCosine
from descant.recipes.base.recipe import Recipe
from tests.toys import ToyData


class Toy(L.LightningModule):
    def __init__(self, schedule: Callable[[Any], Any] | None = None, lr: float = 0.1) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 1)
        self.schedule, self.lr = schedule, lr

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.b(self.a(batch[0])).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None: ...

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=self.lr)
        if self.schedule is None:
            return optimizer
        return [optimizer], [{"scheduler": self.schedule(optimizer), "interval": "step"}]


class HalfHeld(Toy):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.a.parameters(), lr=0.1)


class NoOptimizer(Toy):
    def configure_optimizers(self) -> Any:
        return None


class Detached(Toy):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) * 0


class Late(Toy):
    """Everything is frozen, and the loss is a leaf, so that backward runs."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return torch.zeros((), requires_grad=True)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)


def run(tmp_path: Path, capsys: pytest.CaptureFixture[str], toy: Toy, batch_size: int = 4, **kwargs: Any) -> list[str]:
    rows = TensorDataset(torch.randn(16, 2))
    loader = DataLoader(rows, batch_size=batch_size)
    options: dict[str, Any] = {"max_epochs": 2, "log_every_n_steps": 1, "logger": CSVLogger(tmp_path)} | kwargs
    L.Trainer(
        **options,
        default_root_dir=tmp_path,
        callbacks=[Sanity()],
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(toy, loader, loader)
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("descant: warning: ")]


def warm(steps: int) -> Callable[[Any], Any]:
    return lambda o: LambdaLR(o, lambda t: min(1.0, (t + 1) / steps))


def linear(steps: int) -> Callable[[Any], Any]:
    def make(o: Any) -> Any:
        parts = [LinearLR(o, 0.1, total_iters=steps), CosineAnnealingLR(o, 100)]
        return SequentialLR(o, parts, milestones=[steps])

    return make


@pytest.mark.parametrize(
    "schedule", [None, warm(4), linear(4), lambda o: WarmupCosine(2)(o, 8), lambda o: CosineAnnealingLR(o, 8)]
)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_sound_run_is_silent(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], schedule: Any, accumulate: int
) -> None:
    epochs = 2 * accumulate
    assert run(tmp_path, capsys, Toy(schedule), max_epochs=epochs, accumulate_grad_batches=accumulate) == []


def test_just_enough_is_silent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    toy = Toy(warm(4))  # warm-up, logging and validation all fall on the last step, and the batch is the data
    assert run(tmp_path, capsys, toy, max_epochs=1, log_every_n_steps=4) == []
    assert run(tmp_path, capsys, Toy(), batch_size=16) == []


CASES: dict[str, tuple[Callable[[], Toy], dict[str, Any], str]] = {
    "warm-up": (lambda: Toy(warm(10_000)), {}, "still warms up when the run ends after 8 steps"),
    "sequential": (lambda: Toy(linear(9)), {}, "still warms up when the run ends after 8 steps"),
    "rate": (lambda: Toy(lr=0.0), {}, "the learning rate is 0"),
    "log": (Toy, {"log_every_n_steps": 9}, "log_every_n_steps 9 is more than the 8 steps"),
    "batch": (Toy, {"batch_size": 32}, "the batch of 32 is larger than the data set of 16"),
    "optimizer": (HalfHeld, {}, "3 of 9 trainable parameters are in no optimizer"),
    "none": (NoOptimizer, {}, "NoOptimizer has no optimizer"),
    "frozen": (lambda: Late().requires_grad_(False), {}, "every parameter of Late is frozen"),
    "gradient": (Detached, {}, "no parameter got a gradient"),
    "epochs": (Toy, {"check_val_every_n_epoch": 3}, "first validation is due after 12 steps and the run has 8"),
    "steps": (Toy, {"max_steps": 3}, "first validation is due after 4 steps and the run has 3"),
}


@pytest.mark.parametrize("case", CASES)
def test_one_line_each(tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str) -> None:
    make, kwargs, expected = CASES[case]
    lines = run(tmp_path, capsys, make(), **kwargs)
    assert len(lines) == 1 and expected in lines[0], lines


class PlainData(L.LightningDataModule):
    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(torch.randn(8, 2)), batch_size=4)


class EqualRewards(PlainData):
    """Rollouts whose answers all have equal rewards."""

    version, items, group, answer_length, answer_token = 0, 1, 2, 1, 0
    fresh = asking = rows = renew = spell = entry = staticmethod(lambda *_: None)


@pytest.mark.parametrize(("data", "warned"), [(PlainData, True), (EqualRewards, False)])
def test_zero_gradients_of_equal_rewards_are_no_fault_of_the_loss(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], data: type[PlainData], warned: bool
) -> None:
    assert has(data(), RolloutData) != warned
    lines = late(tmp_path, capsys, Detached(), data(), max_steps=2)
    assert any("no parameter got a gradient" in line for line in lines) == warned


class Stuck(Toy):
    """A loss that depends on the model, and cannot fall."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return 2.0 + 0 * super().training_step(batch, batch_idx) + 1e-9 * self.a.weight.sum()


class Embedding(Recipe):
    """``z`` that is one for all samples, or not; ``mix`` may leave a term out."""

    def __init__(self, collapsed: bool, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        torch.manual_seed(0)  # from some weights the loss has not fallen after 40 steps
        self.a, self.collapsed = nn.Linear(4, 3), collapsed

    def embed(self, batch: Batch) -> dict[str, Tensor]:
        z_BD = self.a(batch.inputs["image"]) * (0 if self.collapsed else 1) + (1.0 if self.collapsed else 0.0)
        return {"image": nn.functional.normalize(z_BD, dim=1)}

    def forward(self, batch: Batch) -> Output:
        value_B = self.a(batch.inputs["image"]).square().mean(1)
        one, two = (Term(value_B, valid=batch.present["image"]) for _ in range(2))
        return Output({"one": one, "two": two})


def late(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], toy: L.LightningModule, data: Any, **kwargs: Any
) -> list[str]:
    options: dict[str, Any] = {"max_steps": 60, "max_epochs": -1, "log_every_n_steps": 1, "logger": CSVLogger(tmp_path)}
    options |= kwargs
    L.Trainer(
        **options,
        default_root_dir=tmp_path,
        callbacks=[Sanity(late=40)],
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    ).fit(toy, data)
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("descant: warning: ")]


def rows() -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.randn(16, 2)), batch_size=4)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_loss_that_does_not_fall(tmp_path: Path, capsys: pytest.CaptureFixture[str], accumulate: int) -> None:
    (line,) = late(tmp_path, capsys, Stuck(), rows(), accumulate_grad_batches=accumulate)
    assert line == "descant: warning: after 40 steps the loss is 100.0% of its start: nothing is learned so far"
    assert late(tmp_path, capsys, Toy(), rows(), accumulate_grad_batches=accumulate) == []
    assert late(tmp_path, capsys, Stuck(), rows(), max_steps=30) == []


def test_collapsed_embeddings_and_an_unused_term(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = lambda: ToyData(batch_size=4)  # noqa: E731
    assert late(tmp_path, capsys, Embedding(False), data()) == []
    (line,) = late(tmp_path, capsys, Embedding(True), data())
    assert line.endswith("the embeddings of image are all alike (mean cosine 1.000): they have collapsed")
    (line,) = late(tmp_path, capsys, Embedding(False, mix={"two": 0.0}), data())
    assert line.endswith("mix two: 0: the term is computed and thrown away")


def test_a_mix_for_an_unknown_term(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (line,) = late(tmp_path, capsys, Embedding(False, mix={"oen": 0.5}), ToyData(batch_size=4))
    assert line.endswith("mix oen: no such term in the first step; there is one, two")


def test_dropout_by_rank_is_named_on_several_ranks() -> None:
    text = TextTower(vocab=8, width=8, depth=2, heads=2, length=4, dropout=0.1)
    net = nn.ModuleDict({"text": text, "plain": nn.Linear(2, 2), "off": nn.Dropout(0.0), "taught": nn.Dropout(0.5)})
    net["taught"].eval()
    trainer: Any = SimpleNamespace(world_size=2)
    differ = "on 2 ranks losses differ from those on another number of ranks"
    dropout = f"text.layers.0 and 1 more sample dropout by rank: {differ} by these masks"
    assert _by_rank(trainer, net) == [dropout]  # type: ignore[arg-type]
    net["lists"] = RankTarget()
    assert _by_rank(trainer, net) == [  # type: ignore[arg-type]
        f"lists (RankTarget) draws its lists of the rows of a rank: {differ}",
        dropout,
    ]
    assert _by_rank(trainer, nn.ModuleDict({"plain": nn.Linear(2, 2)})) == []  # type: ignore[arg-type]
    trainer.world_size = 1
    assert _by_rank(trainer, net) == []  # type: ignore[arg-type]


def test_nothing_is_logged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (line,) = late(tmp_path, capsys, Toy(), rows(), logger=False)
    assert line.endswith("nothing is logged: trainer.logger leaves no logger")


def test_frozen_parameters_with_a_learning_rate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Held(Toy):
        def configure_optimizers(self) -> Any:
            self.a.requires_grad_(False)
            groups: list[dict[str, Any]] = [
                {"params": list(self.a.parameters()), "lr": 0.5},
                {"params": list(self.b.parameters())},
            ]
            return torch.optim.SGD(groups, lr=0.1)

    (line,) = late(tmp_path, capsys, Held(), rows())
    assert line.endswith("6 parameters with a learning rate of 0.5 are frozen")


def test_rewards_that_are_all_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Flat(Toy):
        def on_train_epoch_start(self) -> None:
            self.log("rollouts/flat", 1.0 if self.current_epoch > 2 else 0.5)
            self.log("rollouts/reward", 0.25)

    (line,) = late(tmp_path, capsys, Flat(), rows())
    assert line.endswith("all answers to each question had the same reward, 3 times (mean 0.25): nothing is learned")
