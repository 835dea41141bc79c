from __future__ import annotations

import copy
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from descant.modules.training_setup.optim import Member, OptimizerGroup, parameter_groups
from descant.modules.training_setup.schedule import REX, TorchSchedule, WarmupCosine, WarmupStableDecay
from tests.tolerance import ulps


def sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.1, momentum=0.9)


def adam(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=0.01, weight_decay=0.0)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))


def first_weight(model: nn.Module) -> torch.Tensor:
    return next(model.parameters())


def train(model: nn.Module, optimizers: list[torch.optim.Optimizer], steps: int = 3) -> None:
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(1))
    for _ in range(steps):
        for optimizer in optimizers:
            optimizer.zero_grad()
        model(x).pow(2).mean().backward()
        for optimizer in optimizers:
            optimizer.step()


def test_a_group_is_its_members_bitwise() -> None:
    one, two = net(), net()
    train(one, [sgd(one[0].parameters()), adam(one[2].parameters())])
    train(two, [OptimizerGroup(parameter_groups(two), [Member(sgd, r"^0\."), Member(adam)])])
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(first_weight(two), first_weight(net()))


def test_state_resumes_bitwise_and_writes_through() -> None:
    model = net()
    group = OptimizerGroup(parameter_groups(model), [Member(sgd, r"^0\."), Member(adam)])
    train(model, [group])
    saved, weights = copy.deepcopy(group.state_dict()), copy.deepcopy(model.state_dict())
    train(model, [group])
    other = net()
    other.load_state_dict(weights)
    resumed = OptimizerGroup(parameter_groups(other), [Member(sgd, r"^0\."), Member(adam)])
    resumed.load_state_dict(saved)
    train(other, [resumed])
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    weight = first_weight(other)
    resumed.state[weight] = {"momentum_buffer": torch.zeros_like(weight)}  # as Lightning moves state to a device
    assert not resumed.members[0].state[weight]["momentum_buffer"].any()
    assert len(resumed.state) == 4


def test_learning_rates_are_the_members_own() -> None:
    model = net()
    group = OptimizerGroup(parameter_groups(model), [Member(sgd, r"^0\."), Member(adam)])
    scheduler = WarmupCosine(warmup=4)(group, 10)
    assert [g["lr"] for g in group.members[0].param_groups] == [0.1 / 4, 0.1 / 4]
    group.step()
    scheduler.step()
    assert [g["lr"] for g in group.members[1].param_groups] == [0.005, 0.005]


def test_every_parameter_needs_a_member_and_every_member_a_parameter() -> None:
    with pytest.raises(ValueError, match=r"takes the parameter '2\.weight'"):
        OptimizerGroup(parameter_groups(net()), [Member(sgd, r"^0\.")])
    with pytest.raises(ValueError, match="match 'nothing' takes no parameter"):
        OptimizerGroup(parameter_groups(net()), [Member(sgd, "nothing"), Member(adam)])


class Toy(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        return self.net(batch[0]).pow(2).mean()

    def configure_optimizers(self) -> Any:
        group = OptimizerGroup(parameter_groups(self), [Member(sgd, r"net\.0\."), Member(adam)])
        self.scheduler = WarmupCosine(warmup=0)(group, 6)
        return {"optimizer": group, "lr_scheduler": {"scheduler": self.scheduler, "interval": "step"}}


def test_lightning_counts_one_step_where_there_is_one() -> None:
    toy = Toy()
    trainer = L.Trainer(
        max_steps=6,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        gradient_clip_val=1.0,
    )
    trainer.fit(toy, DataLoader(TensorDataset(torch.randn(80, 3)), batch_size=8))
    assert trainer.global_step == 6
    assert toy.scheduler.last_epoch == 6


def test_warmup_then_cosine() -> None:
    schedule = WarmupCosine(warmup=0.2, floor=0.1)
    assert [round(schedule.factor(t, 10), 4) for t in (0, 1, 2, 6, 10)] == [0.5, 1.0, 1.0, 0.55, 0.1]
    with pytest.raises(ValueError, match="warmup of 20 steps is not shorter than the run of 10"):
        WarmupCosine(warmup=20)(sgd(net().parameters()), 10)


def test_any_torch_schedule_fits() -> None:
    optimizer = sgd(net().parameters())
    schedule = TorchSchedule(lambda o: torch.optim.lr_scheduler.StepLR(o, 1, 0.5), interval="epoch")
    scheduler = schedule(optimizer, 10)
    optimizer.step()
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.05
    with pytest.raises(ValueError, match="neither 'step' nor 'epoch'"):
        TorchSchedule(lambda o: torch.optim.lr_scheduler.StepLR(o, 1), interval="steps")


def test_everything_frozen_is_refused() -> None:
    with pytest.raises(ValueError, match="everything is frozen"):
        parameter_groups(net().requires_grad_(False))


def test_warmup_stable_decay() -> None:
    schedule = WarmupStableDecay(warmup=2, cooldown=0.4, floor=0.1)
    got = [round(schedule.factor(t, 10), 4) for t in (0, 1, 2, 6, 7, 8, 10, 11)]
    assert got == [0.5, 1.0, 1.0, 1.0, 0.55, round(0.1 + 0.9 * (1 - 0.5**0.5), 4), 0.1, 0.1]
    # until its cooldown a run does not depend on its length
    assert [schedule.factor(t, 100) for t in range(60)] == [schedule.factor(t, 1000) for t in range(60)]
    linear = WarmupStableDecay(warmup=0, cooldown=5, power=1)
    assert [round(linear.factor(t, 5), 4) for t in range(6)] == [1.0, 0.8, 0.6, 0.4, 0.2, 0.0]
    assert WarmupStableDecay(0, 0).factor(10, 10) == 1
    scheduler = schedule(sgd(net().parameters()), 10)
    assert scheduler.optimizer.param_groups[0]["lr"] == 0.05
    with pytest.raises(ValueError, match="warmup of 6 steps and cooldown of 5 are longer than the run of 10"):
        WarmupStableDecay(warmup=6, cooldown=5)(sgd(net().parameters()), 10)
    with pytest.raises(ValueError, match="power -1"):
        WarmupStableDecay(power=-1)


def test_rex() -> None:
    schedule = REX(warmup=2)
    assert [schedule.factor(t, 10) for t in (0, 1)] == [0.5, 1.0]
    for t in range(2, 11):
        z = (t - 2) / 8
        # the paper's form; rounded once more
        assert schedule.factor(t, 10) == pytest.approx((1 - z) / (0.5 + 0.5 * (1 - z)), rel=ulps(4, torch.float64))
    assert schedule.factor(11, 10) == 0
    with pytest.raises(ValueError, match="warmup of 20 steps is not shorter than the run of 10"):
        REX(warmup=20)(sgd(net().parameters()), 10)
    with pytest.raises(ValueError, match="must not be negative"):
        REX(warmup=-1)
