"""ScheduleFree: what is evaluated and saved is the optimizer's average; training and resuming are bit-identical."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from schedulefree import AdamWScheduleFree
from torch import Tensor
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau

from descant.callbacks import EMA, Resume, ScheduleFree
from descant.modules.training_setup.compile_and_shard import Shard
from descant.modules.training_setup.optim import Member, OptimizerGroup
from descant.modules.training_setup.schedule import REX, Schedule, TorchSchedule, WarmupStableDecay
from descant.run.sharded import Sharded
from tests.quiet import quiet_trainer
from tests.ranks import run_ranks
from tests.tolerance import F32, ulps
from tests.toys import ToyData, ToyRecipe, ToyTower

STEPS = 12
Weights = dict[str, Tensor]


def averaging(groups: Any) -> Any:
    return AdamWScheduleFree(groups, lr=0.05, warmup_steps=3, weight_decay=0.1)


def copied(module: torch.nn.Module) -> Weights:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


class Seen(L.Callback):
    """Weights after each step and in each validation, and those that the optimizer's own eval() has then."""

    def __init__(self) -> None:
        self.trained, self.judged, self.own = list[Weights](), list[Weights](), list[Weights]()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self.trained.append(copied(pl_module))

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.judged.append(copied(pl_module))
        state, beta = trainer.optimizers[0].state, 0.9
        last = dict(pl_module.named_parameters())
        self.own.append({n: y.lerp(state[last[n]]["z"], 1 - 1 / beta) for n, y in self.trained[-1].items()})


def fit(
    folder: Path,
    *callbacks: L.Callback,
    make: Any = averaging,
    path: Path | None = None,
    shard: Shard | None = None,
    schedule: Schedule | None = None,
    **options: Any,
) -> ToyRecipe:
    torch.manual_seed(0)
    recipe = ToyRecipe(ToyTower(depth=2, width=5), ToyTower(width=5), optimizer=make, shard=shard, schedule=schedule)
    settings: dict[str, Any] = {"max_epochs": 3, "devices": 1, **options}
    trainer = quiet_trainer(folder, Resume(every=4, keep=9), *callbacks, **settings)
    trainer.fit(recipe, datamodule=ToyData(), ckpt_path=path, weights_only=True)
    return recipe


def point(folder: Path, step: int = STEPS) -> dict[str, Any]:
    return torch.load(folder / f"resume/step-{step:07d}.ckpt", weights_only=True)


def equal(a: Any, b: Any) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_validations_see_the_average_and_training_does_not_depend_on_them(tmp_path: Path) -> None:
    seen, alone = Seen(), Seen()
    recipe = fit(tmp_path / "one", ScheduleFree(), seen)
    fit(tmp_path / "two", ScheduleFree(), alone, limit_val_batches=0)
    assert len(seen.judged) == 3 and len(seen.trained) == STEPS
    equal(seen.trained, alone.trained)
    equal(seen.judged, seen.own)
    name = "towers.image.layers.0.weight"
    assert float((seen.judged[0][name] - seen.trained[3][name]).abs().max()) > 1e-3
    equal(copied(recipe), seen.judged[-1])  # the module keeps the average, for the test


def test_checkpoints_hold_the_average_and_resume_bitwise(tmp_path: Path) -> None:
    seen, keep = Seen(), ModelCheckpoint(tmp_path / "kept", save_last=True)
    fit(tmp_path / "whole", ScheduleFree(), seen, keep, enable_checkpointing=True)
    whole = point(tmp_path / "whole")
    equal(dict(whole["state_dict"]), seen.judged[-1])
    equal(dict(whole["current_model_state"]), seen.trained[-1])
    last = torch.load(tmp_path / "kept/last.ckpt", weights_only=True)
    equal(dict(last["state_dict"]), seen.judged[-1])
    for step in (4, 8):  # one before a validation, and one inside of an epoch
        again = tmp_path / f"again{step}"
        fit(again, ScheduleFree(), path=tmp_path / f"whole/resume/step-{step:07d}.ckpt")
        for part in ("state_dict", "current_model_state"):
            equal(point(again)[part], whole[part])
        [ours], [theirs] = point(again)["optimizer_states"], whole["optimizer_states"]
        equal(ours["state"], theirs["state"])
        assert ours["param_groups"] == theirs["param_groups"] and ours["param_groups"][0]["k"] == STEPS


def test_it_takes_the_place_of_ema_and_of_members_of_a_group(tmp_path: Path, capsys: Any) -> None:
    seen, both = Seen(), Seen()
    fit(tmp_path / "one", ScheduleFree(), seen)
    fit(
        tmp_path / "two",
        EMA(0.5),
        both,
        ScheduleFree(),
        make=lambda groups: OptimizerGroup(groups, [Member(averaging, "bias"), Member(averaging)]),
    )
    equal(both.judged, seen.judged)
    assert "EMA is left out" in capsys.readouterr().err


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"AdamWScheduleFree: its average .* add the callback ScheduleFree"):
        fit(tmp_path)
    with pytest.raises(ValueError, match="AdamW keeps no average of the weights; use schedulefree"):
        fit(tmp_path, ScheduleFree(), make=lambda groups: AdamW(groups, lr=0.1))

    class Stages(L.Callback):
        pass

    with pytest.raises(ValueError, match="cannot be combined with Stages"):
        fit(tmp_path, ScheduleFree(), Stages())
    with pytest.raises(ValueError, match=r"split over ranks \(on/fsdp\) are not averaged; use on/ddp"):
        fit(tmp_path, ScheduleFree(), strategy=Sharded("gloo"), shard=Shard())


@pytest.mark.parametrize(
    "schedule",
    [WarmupStableDecay(), REX(), TorchSchedule(lambda o: ReduceLROnPlateau(o), "epoch", "val/gap")],
    ids=lambda schedule: type(schedule).__name__,
)
@pytest.mark.parametrize("grouped", [False, True])
def test_any_schedule_of_the_rate_is_refused(tmp_path: Path, schedule: Schedule, grouped: bool) -> None:
    def group(groups: Any) -> OptimizerGroup:
        return OptimizerGroup(groups, [Member(averaging, "bias"), Member(lambda rest: AdamW(rest, lr=0.1))])

    line = f"model.schedule {type(schedule).__name__}: .* takes no schedule; nearest: model.schedule null"
    with pytest.raises(ValueError, match=line):
        fit(tmp_path, ScheduleFree(), make=group if grouped else averaging, schedule=schedule)
    assert not list(tmp_path.rglob("*.ckpt"))


def test_a_schedule_of_a_module_that_is_no_recipe_is_refused(tmp_path: Path) -> None:
    class Own(ToyRecipe):
        def configure_optimizers(self) -> Any:
            optimizer = averaging(self.parameters())
            optimizer.train()
            return [optimizer], [LambdaLR(optimizer, lambda step: 0.5**step)]

    trainer = quiet_trainer(tmp_path, ScheduleFree(), max_epochs=1, devices=1)
    with pytest.raises(ValueError, match=r"model\.schedule LambdaLR: a schedule-free optimizer takes no schedule"):
        trainer.fit(Own(ToyTower(width=5), ToyTower(width=5)), datamodule=ToyData())


def _on_rank(rank: int, folder: Path, path: Path | None) -> dict[str, Any]:
    fit(folder, ScheduleFree(), path=path, strategy="ddp", devices=2)
    return {}


@pytest.mark.ddp
@pytest.mark.slow
def test_two_ranks_train_and_resume_as_one(tmp_path: Path) -> None:
    fit(tmp_path / "one", ScheduleFree())
    run_ranks(2, _on_rank, tmp_path / "two", None)
    run_ranks(2, _on_rank, tmp_path / "again", tmp_path / "two/resume/step-0000004.ckpt")
    for part in ("state_dict", "current_model_state"):
        equal(point(tmp_path / "again")[part], point(tmp_path / "two")[part])
        # gradients are summed in another order, which a division by their size magnifies at the first steps
        a, b = point(tmp_path / "two")[part], point(tmp_path / "one")[part]
        torch.testing.assert_close(a, b, rtol=0, atol=0.05 * STEPS * ulps(84, F32))
