"""Quantised tokens as one of several objectives: the step against an explicit loop, ranks, holes, resume.

Letters: B samples, T tokens, P numbers of a token, L layers.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from descant.modules.core.batch import Batch
from descant.modules.masking.adapters import MSE, PatchAdapter
from descant.modules.objectives.quantized import QuantizedTokens
from descant.modules.tokenizers.quantizers import FSQ, RVQ, VQ, Quantizer
from descant.modules.towers import Tokens, Tower, Towers
from descant.recipes import MultiTask
from tests._suites import GradientExact, MissingModalities, Ranks, Resume, samples
from tests._suites.recipes import step_of
from tests.ranks import run_ranks
from tests.tolerance import F64, rounding

T, P = 3, 2


class Thirds(Tower):
    """Three tokens of six numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.width, self.inward = 8, nn.Linear(P, 8)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tokens:
        return Tokens(self.inward(x.unflatten(1, (T, P))).tanh(), torch.ones(len(x), T, dtype=torch.bool))


class Exact(MSE):
    """In double precision, where that of the suite's data is."""

    def forward(self, y_NP: Tensor, x_NP: Tensor) -> Tensor:
        return (y_NP - x_NP).square().mean(dim=1)


class Codes(GradientExact, Ranks, MissingModalities, Resume):
    """Dead codes are replaced at most steps: half of even use is much, of a few tokens."""

    def quantizer(self) -> Quantizer:
        raise NotImplementedError

    def recipe(self) -> Any:
        torch.manual_seed(0)
        adapter = PatchAdapter(size=[T * P], patch=P, channels=1, losses=[Exact()])
        task = QuantizedTokens("image", adapter, self.quantizer(), width=6, depth=1, heads=2)
        return MultiTask(Towers(image=Thirds()), {"codes": task}, 8)

    def explicit(self, recipe: Any, batch: Batch) -> dict[str, Tensor]:
        task, here = recipe.objectives["codes"], batch.present["image"].nonzero().flatten().tolist()
        rebuild = commit = torch.zeros((), dtype=F64)
        for b in here:
            x_TP = batch.inputs["image"][b].view(T, P)
            found = [task.quantizer(h_1D) for h_1D in recipe.towers.image(x_TP.view(1, -1)).h_BTD[0].split(1)]
            y_1TE = (task.quantizer.outward(torch.cat([f.z_NC for f in found])) + task.place_TE)[None]
            for layer in task.layers:
                y_1TE = dense(layer, y_1TE)
            y_TP = task.adapter.outward[0](task.norm(y_1TE[0]))
            rebuild = rebuild + (y_TP - x_TP).square().mean() / len(here)
            commit = commit + sum(0.25 * f.commit_N.sum() / T / len(here) for f in found if f.commit_N is not None)
        return {"codes/rebuild": rebuild} | ({"codes/commit": commit} if task.quantizer.commitment else {})


def dense(block: Any, h_BTE: Tensor) -> Tensor:
    """A block of ragged tokens as that of a dense batch."""
    h_BTE = h_BTE + block.attention(block.norm_1(h_BTE), None, False)
    return h_BTE + block.mlp(block.norm_2(h_BTE))


class TestVQ(Codes):
    def quantizer(self) -> Quantizer:
        return VQ(codes=8, width=4, decay=0.7, dead=0.5)


class TestRVQ(Codes):
    def quantizer(self) -> Quantizer:
        return RVQ(codes=5, layers=3, width=4, decay=0.7, dead=0.5)


class TestFSQ(Codes):
    def quantizer(self) -> Quantizer:
        return FSQ([4, 3])


KINDS = [TestVQ, TestRVQ, TestFSQ]


def codebooks(recipe: Any) -> dict[str, Tensor]:
    return dict(recipe.objectives["codes"].quantizer.named_buffers())


def trained(kind: type[Codes], steps: int = 3, parts: int = 1, rank: int = 0, world: int = 1) -> dict[str, Tensor]:
    """Codebooks after some steps of one batch after another, cut into micro-batches or over ranks."""
    recipe, whole = kind().made(), samples(16, "image")
    for k in range(steps):
        moved = replace(whole, rng_seed=whole.rng_seed + k)
        part = replace(moved.select(slice(rank, None, world)), step=whole.step)
        step_of(recipe, part, parts, world)
    return codebooks(recipe)


@pytest.mark.parametrize("kind", KINDS)
def test_codes_move_once_an_optimizer_step_however_it_is_cut(kind: type[Codes]) -> None:
    begun, whole, cut = codebooks(kind().made()), trained(kind), trained(kind, parts=4)
    assert not torch.equal(begun["count_LK"], whole["count_LK"])
    for name in whole:
        torch.testing.assert_close(cut[name], whole[name], **rounding(1024, F64))


@pytest.mark.ddp
def test_codes_of_two_ranks_are_those_of_one_to_the_last_replacement() -> None:
    wanted = trained(TestRVQ)
    for found in run_ranks(2, on_a_rank, 2):
        for name in wanted:
            torch.testing.assert_close(found[name], wanted[name], **rounding(1024, F64))


def on_a_rank(rank: int, world: int) -> dict[str, Tensor]:
    dist.init_process_group("gloo")
    found = trained(TestRVQ, rank=rank, world=world)
    dist.destroy_process_group()
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_and_absent_samples_move_no_code(kind: type[Codes]) -> None:
    batch, recipe = samples(16, "image"), cast(Any, kind().made())
    before = {name: x.clone() for name, x in codebooks(recipe).items()}
    recipe.eval()(batch)
    with torch.no_grad():
        recipe.train()(batch)
        scores = recipe.scores(batch)
    assert {"loss_rebuild_codes"} <= scores.keys()
    nobody = {"image": torch.zeros(16, dtype=torch.bool)}
    recipe(replace(batch, present=nobody, step=nobody))
    assert all(torch.equal(x, before[name]) for name, x in codebooks(recipe).items())
    recipe(batch)
    few, count_LK = batch.select(batch.present["image"].nonzero().flatten()), codebooks(recipe)["count_LK"]
    few.step = dict(few.present)
    alone = kind().made()
    alone(few)
    assert torch.equal(codebooks(alone)["count_LK"], count_LK)


def test_a_step_that_was_cut_short_is_not_counted_with_the_next() -> None:
    batch, recipe = samples(16, "image"), cast(Any, TestVQ().made())
    quantizer = recipe.objectives["codes"].quantizer
    recipe(batch.select(slice(0, 4)))  # of a step of 16 rows
    assert not codebooks(recipe)["count_LK"].any() and quantizer._seen is not None
    recipe.objectives["codes"]._step = -1  # the optimizer has made a step since
    recipe(batch)
    assert torch.equal(codebooks(recipe)["count_LK"], trained(TestVQ, steps=1)["count_LK"])


def test_what_is_refused() -> None:
    def made(modality: str = "image", **options: Any) -> Any:
        arguments: dict[str, Any] = {"size": [6], "patch": 2, "channels": 1, **options}
        adapter = PatchAdapter(**arguments)
        return MultiTask(Towers(image=Thirds()), {"codes": QuantizedTokens(modality, adapter, FSQ([3]), heads=2)}, 8)

    with pytest.raises(ValueError, match=r"objectives: codes: 'imag': no such name; did you mean image\?"):
        made("imag")
    with pytest.raises(ValueError, match="adapter: patches less their own mean and spread are no input; add a loss"):
        made(losses=[MSE(norm=True)])
    with pytest.raises(ValueError, match="objectives: codes: the adapter has 2 tokens, and the tower 3"):
        made(patch=3).double()(samples(4, "image"))
