"""The diagnosis of a run: its numbers by hand, and planted conflicts and imbalances, and runs without them.

Letters: B samples, D width, N rows.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from descant.callbacks import Diagnose
from descant.datamodules.corpora.partial_information import PartialInformation
from descant.modules.core.batch import Batch
from descant.modules.core.objective import Term
from descant.modules.core.output import Output
from descant.modules.core.rng import uniform_N
from descant.modules.evaluation.diagnosis import conflict, cross_fit
from descant.modules.fusion.classifiers import FusionHead, LateFusion, MidFusion
from descant.modules.towers import Towers, VectorTower
from descant.recipes import Fusion
from descant.recipes.base.recipe import Recipe
from tests.callbacks.balance.test_balance import model, one
from tests.callbacks.harmonize.test_terms import Watching, of_terms
from tests.ranks import run_ranks
from tests.recipes.test_fusion import SignData
from tests.step_toy import MIX, QUIET, ToyData, ToyRecipe
from tests.tolerance import F64, ulps

WIDTH, STEPS = 16, 80
CLEAR, EQUAL, SLOW = {"a": 0.2, "b": 0.2}, {"a": 0.4, "b": 0.4}, {"b": 2}


# planted runs --------------------------------------------------------------------------------------------------------


class TwoHeads(Recipe):
    """A linear trunk, and two fixed linear heads of it with this angle between them."""

    def __init__(self, degrees: float) -> None:
        super().__init__(optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.005))
        self.towers = nn.ModuleDict({"trunk": nn.Linear(WIDTH, 4, bias=False)})
        angle = math.radians(degrees)
        self.heads = {"a": torch.tensor([1.0, 0, 0, 0]), "b": torch.tensor([math.cos(angle), math.sin(angle), 0, 0])}

    def forward(self, batch: Batch) -> Output:
        z_BD = self.towers["trunk"](batch.inputs["x"])
        return Output({k: Term((z_BD @ u_D - batch.targets[k]).square()) for k, u_D in self.heads.items()})


def two_heads(seed: int, degrees: float, signal: float) -> Diagnose:
    """Both heads learn one linear function of the input, times ``signal``, with noise of their own."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    w_D = torch.randn(WIDTH, generator=generator)

    def batch() -> Batch:
        x_BD = torch.randn(32, WIDTH, generator=generator)
        targets = {k: signal * (x_BD @ w_D) + torch.randn(32, generator=generator) for k in ("a", "b")}
        return Batch({"x": x_BD}, {"x": torch.ones(32, dtype=torch.bool)}, targets)

    seen = Diagnose(every=2)
    loader: Any = DataLoader([batch() for _ in range(STEPS)], batch_size=None)  # type: ignore[arg-type]
    L.Trainer(max_steps=STEPS, callbacks=[seen], **QUIET).fit(TwoHeads(degrees), loader)
    return seen


def two_modalities(
    seed: int, noise: dict[str, float], factors: dict[str, int] | None = None, **options: Any
) -> Diagnose:
    """Both carry all three bits of the label."""
    L.seed_everything(seed, verbose=False)
    data = PartialInformation(noise, factors, unique=0, shared=3, synergy=0, samples=2048, batch_size=64)
    towers = Towers(others={m: VectorTower(16, WIDTH, depth=1 if factors is None else 2) for m in noise})
    options["optimizer"] = lambda parameters: torch.optim.AdamW(parameters, lr=4e-3)
    seen = Diagnose(every=5)
    trainer = L.Trainer(max_steps=200, callbacks=[seen], log_every_n_steps=0, **QUIET)
    trainer.fit(Fusion(towers, "label", 8, WIDTH, **options), datamodule=data)
    return seen


def mixed() -> MidFusion:
    return MidFusion(hidden=64)


def called(seen: Diagnose) -> tuple[bool, bool]:
    """Whether a harmonizer, and a balancer, could matter."""
    harmony, balance = (f": a {method} could matter" in seen.line for method in ("harmonizer", "balancer"))
    return harmony, balance


#: Run -> whether it is planted that a harmonizer, and a balancer, could matter; how it is made.
PLANTED: dict[str, tuple[bool, bool, Callable[[int], Diagnose]]] = {
    "conflict": (True, False, lambda seed: two_heads(seed, 120, signal=1.0)),
    "agreement": (False, False, lambda seed: two_heads(seed, 60, signal=1.0)),
    "unrelated": (False, False, lambda seed: two_heads(seed, 0, signal=0.0)),
    "clear and noisy": (False, True, lambda seed: two_modalities(seed, {"a": 0.2, "b": 0.6})),
    "clear and slow": (False, True, lambda seed: two_modalities(seed, CLEAR, SLOW)),
    "clear and slow, mixed": (False, True, lambda seed: two_modalities(seed, CLEAR, SLOW, fusion=mixed())),
    "equal": (False, False, lambda seed: two_modalities(seed, EQUAL)),
    "equal, mixed": (False, False, lambda seed: two_modalities(seed, EQUAL, fusion=mixed())),
    "one is noise": (False, False, lambda seed: two_modalities(seed, {"a": 0.2, "b": 8.0})),
    "own losses": (False, False, lambda seed: two_modalities(seed, {"a": 0.2, "b": 0.6}, unimodal=True)),
}


@pytest.mark.parametrize("name", ["conflict", "unrelated", "clear and noisy", "one is noise"])
def test_a_planted_run_is_called(name: str) -> None:
    *wanted, run = PLANTED[name]
    seen = run(0)
    assert called(seen) == tuple(wanted), seen.line


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANTED)
def test_planted_runs_are_called(name: str) -> None:
    """At least four of five seeds."""
    *wanted, run = PLANTED[name]
    lines = [run(seed) for seed in range(100, 105)]
    assert sum(called(seen) == tuple(wanted) for seen in lines) >= 4, [seen.line for seen in lines]


# numbers by hand -----------------------------------------------------------------------------------------------------


def probed(accumulate: int = 1, devices: int = 1, every: int = 1) -> tuple[Diagnose, Watching]:
    seen, watch = Diagnose(every), Watching()
    trainer = L.Trainer(
        max_steps=3,
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        accumulate_grad_batches=accumulate,
        callbacks=[seen, watch],
        **QUIET,
    )
    trainer.fit(ToyRecipe(harmonize=False).double(), datamodule=ToyData(F64))
    return seen, watch


def cosines(watched: list[Any]) -> list[float]:
    """Of every step, from the gradients of one sample at a time; ``watched``: the steps of each rank."""
    found = []
    for steps in zip(*watched, strict=True):
        grads, _ = of_terms(steps[0][1], [i for step in steps for rows in step[2] for i in rows])
        a, b = (torch.cat([g.flatten() for g in grads[k].values()]) for k in MIX)
        found.append(float(a @ b / a.norm() / b.norm()))
    return found


@pytest.mark.parametrize("accumulate", [1, 2])
def test_cosines_are_those_of_the_whole_step(accumulate: int) -> None:
    seen, watch = probed(accumulate)
    wanted = cosines([watch.steps])
    assert seen.cosines == {"a~b": pytest.approx(wanted, abs=ulps(4096, F64))}
    assert probed(accumulate, every=2)[0].cosines == {"a~b": pytest.approx(wanted[::2], abs=ulps(4096, F64))}
    assert "3 probes of gradients, 20 are the least" in seen.line


def _on_rank(rank: int) -> Any:
    seen, watch = probed(devices=2)
    return seen.cosines["a~b"], watch.steps


@pytest.mark.slow
@pytest.mark.ddp
def test_two_ranks_probe_the_whole_step() -> None:
    (one_rank, first), (other, second) = run_ranks(2, _on_rank)
    assert one_rank == other == pytest.approx(cosines([first, second]), abs=ulps(4096, F64))


def judged(world: int = 1, accumulate: int = 1) -> dict[str, float]:
    L.seed_everything(0, verbose=False)
    data = PartialInformation({"a": 0.2, "b": 0.6}, unique=0, shared=2, synergy=0, held_out=400, batch_size=64)
    towers = Towers(others={m: VectorTower(16, WIDTH, 1) for m in data.modalities})
    trainer = L.Trainer(
        max_steps=20,
        devices=world,
        strategy="ddp" if world > 1 else "auto",
        accumulate_grad_batches=accumulate,
        callbacks=[Diagnose(every=5, limit=200)],
        **QUIET,
    )
    trainer.fit(Fusion(towers, "label", 4, WIDTH), datamodule=data)
    return {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("diagnose/")}


def _judged_on_rank(rank: int) -> dict[str, float]:
    return judged(world=2)


@pytest.mark.slow
@pytest.mark.ddp
def test_two_ranks_judge_as_one() -> None:
    wanted = judged()
    assert {"diagnose/alone/a", "diagnose/readout/b", "diagnose/joint", "diagnose/gap/b"} <= wanted.keys()
    for found in run_ranks(2, _judged_on_rank):
        assert found == pytest.approx(wanted, rel=ulps(4096, torch.float32))


class Recorded(SignData):
    """Remembers which batches it was asked to prepare as of training."""

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        self.prepared = [*getattr(self, "prepared", []), self.training]
        return super().on_after_batch_transfer(batch, dataloader_idx)


def test_accuracies_are_those_of_the_validation_set() -> None:
    seen, recipe, data = Diagnose(every=1), model("mid"), Recorded(batch_size=24, whole=False)
    modes: list[tuple[bool, bool]] = []
    after = LambdaCallback(on_train_end=lambda trainer, module: modes.append((trainer.training, module.training)))
    trainer = L.Trainer(max_steps=2, callbacks=[seen, after], **QUIET)
    trainer.fit(recipe, datamodule=data)
    assert data.prepared == [True, True, *[False] * (len(data.prepared) - 2)] and len(data.prepared) > 2
    assert modes == [(True, True)]
    rows = data.evaluation_sets("validate")["val"]
    x = {m: x_ND.double() for m, x_ND in rows.x.items()}  # type: ignore[attr-defined]
    batch = Batch(x, rows.has, {"kind": rows.label})  # type: ignore[attr-defined]
    with torch.no_grad():
        z = recipe.eval().latents(batch)
        kept = batch.both("image", "text") & (rows.label >= 0)  # type: ignore[attr-defined]
        logits = {"joint": recipe.fuse(z), **{f"alone/{m}": recipe.own[m](z[m]) for m in z}}
    for name, x_NC in logits.items():
        by_hand = float((x_NC.argmax(1) == batch.targets["kind"])[kept].double().mean())
        assert float(trainer.callback_metrics[f"diagnose/{name}"]) == pytest.approx(by_hand, abs=ulps(8, torch.float32))
    assert f"{int(kept.sum())} rows of val" in seen.line


def test_the_readout_of_a_row_is_fitted_on_other_folds() -> None:
    generator = torch.Generator().manual_seed(0)
    z_ND, id_N = torch.randn(60, 3, generator=generator, dtype=torch.float64), torch.arange(60)
    label_N = (z_ND[:, 0] * z_ND[:, 1] > 0).long() + (z_ND[:, 2] > 1).long()
    fold_N = (uniform_N(id_N, "diagnose/fold") * 5).long()
    x_ND = (z_ND - z_ND.mean(0)) / z_ND.std(0, correction=0)
    square = [[float((x - y) @ (x - y)) for y in x_ND] for x in x_ND]
    median = float(torch.tensor(square, dtype=torch.float64).median())
    for n in range(60):
        rest = [i for i in range(60) if fold_N[i] != fold_N[n]]
        k = torch.tensor([[math.exp(-square[i][j] / median) for j in rest] for i in (*rest, n)], dtype=torch.float64)
        y = torch.eye(3, dtype=torch.float64)[label_N[rest]]
        weights = torch.linalg.inv(k[:-1] + 0.03 * torch.eye(len(rest), dtype=torch.float64)) @ (y - y.mean(0))
        decided = int((k[-1] @ weights + y.mean(0)).argmax())
        assert bool(cross_fit(z_ND, label_N, id_N)[n]) == (decided == int(label_N[n])), n
    assert not cross_fit(z_ND.index_fill(0, id_N[:1], math.nan), label_N, id_N).any()


def test_a_conflict_of_the_last_half_counts() -> None:
    late = conflict({"a~b": [0.5] * 40 + [-0.5, -0.4] * 20})
    assert late is not None and late.late and late.matters and late.probes == 40
    noise = conflict({"a~b": [0.3, -0.3] * 40})
    assert noise is not None and not noise.matters and noise.share.value == 0.5
    assert conflict({"a~b": [-0.5] * 19}) is None


# a fit with it -------------------------------------------------------------------------------------------------------


class Dropped(LateFusion):
    """Draws from the global generator."""

    def logits(self, z: dict[str, Tensor], present: dict[str, Tensor]) -> Tensor:
        return super().logits({m: F.dropout(z_BD, 0.5, self.training) for m, z_BD in z.items()}, present)

    def parts(self, z: Any, present: Any = None) -> dict[str, Tensor]:
        return FusionHead.parts(self, z, present)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_training_is_the_same_to_the_bit(accumulate: int) -> None:
    def weights(*callbacks: L.Callback) -> tuple[dict[str, Tensor], Tensor]:
        recipe = model()
        recipe.fusion = Dropped().build(dict.fromkeys(recipe.towers, 8), 2).double()
        torch.manual_seed(1)
        trainer = L.Trainer(max_steps=3, accumulate_grad_batches=accumulate, callbacks=list(callbacks), **QUIET)
        trainer.fit(recipe, datamodule=SignData(batch_size=24, whole=False))
        return recipe.state_dict(), torch.get_rng_state()

    (plain, draws), (found, after) = weights(), weights(Diagnose(every=1))
    assert all(torch.equal(plain[name], found[name]) for name in plain) and torch.equal(draws, after)


def test_a_resumed_run_reads_the_same_to_the_bit(tmp_path: Path) -> None:
    def fit(steps: int, path: Path | None = None) -> tuple[L.Trainer, Diagnose]:
        seen = Diagnose(every=1)
        trainer = L.Trainer(max_steps=steps, callbacks=[seen], **QUIET)
        trainer.fit(model("mid"), datamodule=SignData(batch_size=24, whole=False), ckpt_path=path, weights_only=False)
        return trainer, seen

    _, whole = fit(24)
    fit(9)[0].save_checkpoint(tmp_path / "half.ckpt")
    _, resumed = fit(24, tmp_path / "half.ckpt")
    assert resumed.line == whole.line and resumed.state_dict() == whole.state_dict()
    assert len(whole.cosines["fused~image"]) == 24 and "of 24 probes" in whole.line


# what it is asked for ------------------------------------------------------------------------------------------------


def fit(recipe: Any, seen: Diagnose | None = None, data: Any = None) -> Diagnose:
    seen = seen or Diagnose(every=1)
    data = data or SignData(batch_size=24, whole=False)
    L.Trainer(max_steps=2, callbacks=[seen], **QUIET).fit(recipe, datamodule=data)
    return seen


def lone() -> Fusion:
    recipe = model(unimodal=False)
    recipe.modalities = ("image",)
    return recipe


class Unlabelled(SignData):
    def evaluation_sets(self, stage: str) -> dict[str, Any]:
        return {}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fit(model(unimodal=False)), "^Diagnose: one term: nothing to harmonize; (image|text) alone has"),
        (lambda: fit(one()), "one modality, image: nothing to balance$"),
        (lambda: fit(model(), data=Unlabelled(24, whole=False)), "0 rows of a validation set have all modalities"),
        (lambda: fit(model(), Diagnose()), "1 probes of gradients, 20 are the least to judge by: every 1 has 2"),
    ],
)
def test_the_line_names_what_is_not_read(make: Callable[[], Diagnose], message: str) -> None:
    line = make().line
    assert re.search(message, line) and "\n" not in line, line


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Diagnose(every=0), "Diagnose: every 0: 1 is the least"),
        (lambda: Diagnose(limit=10), "Diagnose: limit 10: 100 to 5000 rows"),
        (lambda: Diagnose(conflict=25), "Diagnose: conflict 25: above 0 and below 1"),
        (lambda: Diagnose(level=1.0), "Diagnose: level 1: above 0 and below 1"),
        (lambda: fit(BoringModel()), "Diagnose needs the protocol HasObjective .*; BoringModel lacks it"),
        (
            lambda: fit(lone()),
            "Diagnose: one term, fused, and one modality, image: there is nothing to read",
        ),
    ],
)
def test_wrong_arguments_are_one_line(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
