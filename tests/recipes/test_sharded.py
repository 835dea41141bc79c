"""Recipes of all kinds under FSDP2 and HSDP: gradients of a step against one process; stages, also resumed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from descant.callbacks import Resume
from descant.modules.distill.distill import Distill, SoftTarget
from descant.modules.policy import KL, PolicyLoss
from descant.modules.training_setup.compile_and_shard import Shard
from descant.modules.training_setup.schedule import WarmupCosine
from descant.recipes import GRPO, CompetitiveDistillation, Stage, TeacherAverage, TeacherStage
from descant.run.sharded import Sharded
from tests.device.runs import RUNS, Run, patterns, prepare
from tests.ranks import run_ranks
from tests.recipes.test_missing import PatternData
from tests.recipes.test_staged import model as staged
from tests.recipes.test_staged import run as run_staged
from tests.rotation import by_turns
from tests.step_toy import QUIET

#: Of the largest gradient, as asked; sums of float32 over ranks differ by about a hundredth of it.
NEAR = 1e-5
#: How the four ranks hold the parameters.
SHAPES: dict[str, Callable[[], Shard]] = {
    "FSDP2": Shard,
    "HSDP": lambda: Shard(replicate=2, shard=2),
    "HSDP, kept": lambda: Shard(replicate=2, reshard_after_forward=False),
}


def competitive(before: Path) -> Run:
    teacher = TeacherAverage(0.5)
    return Run(
        CompetitiveDistillation(patterns(), teacher, [SoftTarget(temperature=2.0)], optimizer=torch.optim.SGD),
        PatternData(),
    )


def fusion(before: Path) -> Run:
    return Run(patterns(), PatternData())


KINDS: dict[str, Callable[[Path], Run]] = {
    **{name: RUNS[name] for name in ("contrastive", "masked", "missing", "preferred", "multitask", "self_distilled")},
    "competitive": competitive,
    "fusion": fusion,
}


class Whole(L.Callback):
    """Whole gradients before the first optimizer step, and how many parameters are split."""

    def __init__(self) -> None:
        self.gradients: dict[str, Tensor] = {}
        self.split = 0

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        named: list[tuple[str, Any]] = list(pl_module.named_parameters())
        self.split = sum(isinstance(p, DTensor) and p.to_local().numel() < p.numel() for _, p in named)
        for name, p in named:
            if p.grad is not None:
                whole = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
                self.gradients[name] = whole.detach().reshape(-1).clone()


def one_step(make: Callable[[Path], Run], before: Path, devices: int = 1, shard: Shard | None = None) -> Whole:
    L.seed_everything(0, verbose=False)
    run, seen = make(before), Whole()
    options: dict[str, Any] = {}
    if shard is not None:
        run.recipe.sharding = shard
        options = {"strategy": Sharded("gloo"), "devices": devices}
    trainer = L.Trainer(**({"devices": 1} | QUIET | options), max_steps=1, num_sanity_val_steps=0, callbacks=[seen])
    trainer.fit(run.recipe, datamodule=run.data)
    return seen


def on_four(rank: int, before: Path, names: tuple[str, ...]) -> dict[tuple[str, str], tuple[dict[str, Tensor], int]]:
    found = {}
    for name in names:
        for shape, shard in SHAPES.items():
            seen = one_step(KINDS[name], before, 4, shard())
            found[name, shape] = seen.gradients, seen.split
    return found


def gap(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """The largest difference, of the largest gradient. What has none in one process has none, or zeros."""
    assert wanted.keys() <= found.keys()
    assert not any(found[name].any() for name in found.keys() - wanted.keys())
    size = max(float(x.abs().max()) for x in wanted.values())
    return max(float((found[name] - x).abs().max()) for name, x in wanted.items()) / size


@pytest.mark.ddp
@pytest.mark.slow
@by_turns(3, 4)
def test_a_step_of_each_kind_of_recipe_on_four_ranks_is_that_of_one_process(tmp_path: Path) -> None:
    """Also where a rank has no sample of what others adapt, and with a teacher that is a copy of the student."""
    before, names = prepare(tmp_path), tuple(KINDS)
    wanted = {name: one_step(KINDS[name], before).gradients for name in names}
    for found in run_ranks(4, on_four, before, names):
        assert len(found) == len(names) * len(SHAPES)
        assert all(split > 10 for _, split in found.values())
        gaps = {case: gap(gradients, wanted[case[0]]) for case, (gradients, _) in found.items()}
        assert {case: x for case, x in gaps.items() if x >= NEAR} == {}


# stages -------------------------------------------------------------------------------------------------------------


def stages() -> dict[str, Stage]:
    """Three that train other parameters each, with other optimizers; the last stays near what it began with."""

    def sgd(groups: Any) -> torch.optim.SGD:
        return torch.optim.SGD(groups, lr=0.05, momentum=0.9)

    return {
        "captions": Stage(train=r"^projector|^lm\.layers", schedule=WarmupCosine(warmup=1)),
        "answers": Stage(optimizer=sgd),
        "reward": Stage(GRPO(PolicyLoss(kl=KL(0.1))), r"^lm", optimizer=sgd),
    }


def in_stages(rank: int, folder: Path, shard: bool, path: Path | None = None) -> tuple[dict[str, Tensor], int]:
    """Whole weights after all stages, and how many are split."""
    options: dict[str, Any] = {"strategy": Sharded("gloo") if shard else "ddp", "devices": 2}
    net = staged(stages(), distill=Distill(TeacherStage()), shard=Shard() if shard else None)
    _, net = run_staged(folder, Resume(every=1, keep=99), net=net, path=path, **options)
    state = dict(net.state_dict())
    split = sum(isinstance(x, DTensor) for x in state.values())
    return {n: (x.full_tensor() if isinstance(x, DTensor) else x).clone().reshape(-1) for n, x in state.items()}, split


@pytest.mark.ddp
@pytest.mark.slow
def test_stages_of_sharded_parameters_train_as_under_ddp_and_resume_to_the_bit(tmp_path: Path) -> None:
    """Another part trains in each stage; resumed in the second, with momentum, and in the third, with its teacher."""
    (whole, none), _ = run_ranks(2, in_stages, tmp_path / "whole", False)
    (parts, split), _ = run_ranks(2, in_stages, tmp_path / "parts", True)
    assert none == 0 and split > 50
    begun = staged(stages(), distill=Distill(TeacherStage())).state_dict()
    moved = [name for name, x in begun.items() if x.is_floating_point() and not torch.equal(x.reshape(-1), parts[name])]
    assert any(".lm." in name for name in moved) and any("projector" in name for name in moved)
    assert parts.keys() == whole.keys()
    for name, x in whole.items():
        torch.testing.assert_close(parts[name], x, rtol=0, atol=NEAR, msg=name)
    for at in (4, 10):
        (again, _), _ = run_ranks(2, in_stages, tmp_path / f"{at}", True, tmp_path / f"parts/resume/step-{at:07d}.ckpt")
        assert all(torch.equal(x, parts[name]) for name, x in again.items())
