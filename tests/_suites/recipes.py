"""Properties of recipes, losses and towers, as mixins of test classes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from descant.callbacks import Resume as ResumePoints
from descant.datamodules.base import DataModule
from descant.modules.core.batch import Batch
from descant.recipes.base.recipe import Recipe
from descant.run.store import AtomicIO
from tests._suites.data import SampleData, samples
from tests.ranks import run_ranks
from tests.tolerance import F64, ulps

#: Of the largest gradient: sums over rows, widths and negatives in another order.
EXACT = ulps(4096, F64)


class Subject:
    """What suites ask of a test class."""

    def recipe(self) -> Recipe:
        """A new recipe, always with the same weights, without dropout."""
        raise NotImplementedError

    def batch(self) -> Batch:
        """16 samples, some without a modality; absent rows hold nan."""
        return samples(16, *self.recipe().towers)

    def made(self) -> Recipe:
        return self.recipe().double().train()

    def data(self) -> DataModule:
        """Samples for a fit of a few steps."""
        return SampleData(modalities=tuple(self.recipe().towers))

    def callbacks(self) -> list[L.Callback]:
        """Callbacks of the fit, for a paper that is one."""
        return []


def step_of(recipe: Recipe, batch: Batch, parts: int = 1, world: int = 1) -> dict[str, Tensor]:
    """Loss terms and gradients of one optimizer step, in ``parts`` micro-batches, on one of ``world`` ranks."""
    recipe.step.world, recipe.step.accumulate = world, parts
    values: dict[str, Tensor] = {}
    for part in range(parts):
        micro = batch.select(slice(part, None, parts)) if parts > 1 else batch
        objective = recipe.step(recipe.terms(micro), replace(micro, step=batch.step))
        (objective.total / parts).backward()
        for name, value in objective.terms.items():
            values[f"loss/{name}"] = values.get(f"loss/{name}", 0.0) + value.detach() / parts
    grads = {name: p.grad for name, p in recipe.named_parameters() if p.grad is not None}
    return {**values, **grads}


def gap(values: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """Largest difference of losses and of gradients, relative to the largest of each."""
    assert values.keys() == wanted.keys()
    worst = 0.0
    for loss in (True, False):
        names = [n for n in wanted if n.startswith("loss/") == loss]
        size = max(float(wanted[n].abs().max()) for n in names)
        worst = max([worst, *(float((values[n] - wanted[n]).abs().max()) / size for n in names)])
    return worst


class GradientExact(Subject):
    """The step equals an explicit float64 loop, and is the same in one batch and in micro-batches."""

    def explicit(self, recipe: Any, batch: Batch) -> dict[str, Tensor]:
        """Each term of the whole step as a scalar, written out over samples."""
        raise NotImplementedError

    def test_terms_and_gradients_equal_the_explicit_loop(self) -> None:
        batch, ours, plain = self.batch(), self.made(), self.made()
        found = step_of(ours, batch)
        terms = self.explicit(plain, batch)
        torch.stack([*terms.values()]).sum().backward()
        wanted = {f"loss/{name}": value.detach() for name, value in terms.items()}
        wanted |= {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
        assert any(value.any() for name, value in wanted.items() if not name.startswith("loss/"))
        assert gap(found, wanted) < EXACT

    def test_micro_batches_equal_the_whole_step(self) -> None:
        if self.recipe().in_batch_negatives:
            pytest.skip("its samples are compared within a batch: chunks, and not accumulation")
        whole = step_of(self.made(), self.batch())
        for parts in (2, 4):
            assert gap(step_of(self.made(), self.batch(), parts), whole) < EXACT


class Ranks(Subject):
    """Two ranks that average gradients, as a strategy does, equal one process with all samples."""

    @pytest.mark.ddp
    def test_two_ranks_equal_one(self) -> None:
        wanted = step_of(self.made(), self.batch())
        for found in run_ranks(2, _on_a_rank, type(self), 2):
            assert gap(found, wanted) < EXACT


def _on_a_rank(rank: int, kind: type[Subject], world: int) -> dict[str, Tensor]:
    dist.init_process_group("gloo")
    whole = kind().batch()
    part = replace(whole.select(slice(rank, None, world)), step=whole.step)
    values = step_of(kind().made(), part, world=world)
    for value in values.values():
        dist.all_reduce(value)
        value /= world
    dist.destroy_process_group()
    return values


class MissingModalities(Subject):
    """What absent rows hold changes nothing, and a step without any sample of a modality is finite."""

    def test_the_content_of_absent_rows_does_not_matter(self) -> None:
        batch = self.batch()
        zeros = {m: x.nan_to_num(nan=0.0) if x.is_floating_point() else x for m, x in batch.inputs.items()}
        wanted = step_of(self.made(), replace(batch, inputs=zeros))
        found = step_of(self.made(), batch)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)

    def test_a_step_without_a_modality_is_finite_and_reaches_the_same_parameters(self) -> None:
        batch = self.batch()
        whole = step_of(self.made(), batch)
        for m in batch.present:
            none = {**batch.present, m: torch.zeros_like(batch.present[m])}
            found = step_of(self.made(), replace(batch, present=none, step=none))
            assert found.keys() == whole.keys(), "every rank has to reach the same parameters"
            assert all(value.isfinite().all() for value in found.values())


class Resume(Subject):
    """A run that is stopped after any step and resumed ends bit-identical."""

    def test_a_resumed_run_is_bit_identical(self, tmp_path: Path) -> None:
        whole = self._fit(tmp_path / "whole", 5)
        self._fit(tmp_path / "cut", 2)
        again = self._fit(tmp_path / "cut", 5, tmp_path / "cut/resume/step-0000002.ckpt")
        assert whole.keys() == again.keys()
        assert all(torch.equal(whole[name], again[name]) for name in whole)

    def _fit(self, folder: Path, steps: int, path: Path | None = None) -> dict[str, Tensor]:
        recipe = self.made()
        trainer = L.Trainer(
            max_steps=steps,
            accelerator="cpu",
            devices=1,
            precision="64-true",
            logger=False,
            callbacks=[*self.callbacks(), ResumePoints(every=1, keep=9)],
            plugins=[AtomicIO()],
            default_root_dir=folder,
            limit_val_batches=0,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            use_distributed_sampler=False,
        )
        trainer.fit(recipe, datamodule=self.data(), ckpt_path=path, weights_only=True)
        return {name: value.clone() for name, value in recipe.state_dict().items()}


class OnDevice(Subject):
    """``tests/device`` finds the class: its recipe trains there, is resumed, and a step reads nothing back."""


class ShamNeutral(Subject):
    """The control arm runs the same code as often, on permuted signals, and without ``sham`` nothing is permuted."""

    def sham(self, mode: str | None) -> Recipe:
        """The recipe whose sham has this mode."""
        raise NotImplementedError

    def calls(self, recipe: Recipe) -> int:
        """How often its sham was called."""
        raise NotImplementedError

    def test_the_sham_differs_in_who_gets_which_signal_alone(self) -> None:
        plain, off, on = self.made(), self.sham(None).double().train(), self.sham("permute").double().train()
        values = [step_of(recipe, self.batch()) for recipe in (plain, off, on)]
        assert all(torch.equal(values[0][name], values[1][name]) for name in values[0])
        assert any(not torch.equal(values[1][name], values[2][name]) for name in values[1])
        assert self.calls(off) == self.calls(on) > 0
