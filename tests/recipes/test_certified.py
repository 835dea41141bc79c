"""CRMT's second phase: weights alone are trained, by the radius that they certify. Letters: C classes, M modalities."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from descant.callbacks import Resume
from descant.modules.core.protocols import (
    Classifies,
    Embeds,
    Fuses,
    HasObjective,
    HasTowers,
    MultimodalClassifier,
    Scores,
    Unimodal,
)
from descant.modules.evaluation.attacks import Nudge, certified_radius, slopes
from descant.modules.fusion.classifiers import OrthogonalFusion
from descant.modules.training_setup.compile_and_shard import Shard
from descant.recipes import Certified
from tests.callbacks.checkpoints.test_resume import Act, equal, fit, point, state
from tests.ranks import run_ranks
from tests.recipes.test_missing import PatternData, batch, build, fusion, train, write
from tests.step_toy import QUIET
from tests.tolerance import F32, rounding

NAMES = ("image", "text")


class Banked(PatternData):
    def __init__(self) -> None:
        super().__init__()
        self.eval_batch_size = 8

    def bank_set(self) -> Any:
        return self.training_set()


def sgd(groups: Any) -> torch.optim.SGD:
    return torch.optim.SGD(groups, lr=0.5, momentum=0.9)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for name, kind in (("margins", "OrthogonalFusion"), ("late", "LateFusion")):
        model = fusion(kind, *NAMES)
        recipe = build(model)
        train(recipe, 40)
        found[name] = write(tmp_path_factory.mktemp("runs") / name / "001", model, recipe)
    return found


def trained(path: Path, steps: int = 20, rows: int = 44, world: int = 1) -> Certified:
    model = Certified(path, checkpoint="last", rows=rows, optimizer=sgd)
    strategy = "ddp" if world > 1 else "auto"
    L.Trainer(max_steps=steps, devices=world, strategy=strategy, **QUIET).fit(model, datamodule=Banked())
    return model


def radius(model: Certified) -> Tensor:
    b = batch(44, modalities=NAMES)
    slope = dict(zip(NAMES, model.slope_MC, strict=True))
    with torch.no_grad():
        logits = model.eval().fuse(model.latents(b), b.present)
        return certified_radius(logits, model.fusion.weights, slope, b.present, b.targets["label"])


def test_weights_alone_are_trained_and_the_radius_grows(runs: dict[str, Path]) -> None:
    start, model = Certified(runs["margins"], checkpoint="last"), trained(runs["margins"])
    before = dict(start.state_dict())
    moved = {name for name, x in model.state_dict().items() if not torch.equal(x, before[name])}
    assert moved == {"slope_MC", *(f"fusion.log_weights.{m}" for m in NAMES)}
    start.slope_MC.copy_(model.slope_MC)
    gained = radius(model).mean() / radius(start).mean()
    assert gained > 1.05 and (torch.stack(list(model.fusion.weights.values())) > 0).all()
    assert not any(part.training for part in model.train().towers.modules())


def test_slopes_are_the_steepest_of_the_training_rows(runs: dict[str, Path]) -> None:
    model = trained(runs["margins"], steps=1)
    b = batch(44, modalities=NAMES)
    for i, m in enumerate(NAMES):
        torch.testing.assert_close(model.slope_MC[i], slopes(Nudge(model, b, [m]), m).amax(dim=0), **rounding(64, F32))
    few = trained(runs["margins"], steps=1, rows=8)
    assert (few.slope_MC <= model.slope_MC).all() and not torch.equal(few.slope_MC, model.slope_MC)


def test_the_term_is_the_radius_of_the_labelled_rows(runs: dict[str, Path]) -> None:
    model = trained(runs["margins"], steps=1)
    b = batch(44, modalities=NAMES)
    wanted = -radius(model)
    b.targets["label"][3] = -1
    b.present["image"][5] = b.present["text"][5] = False
    b.step = dict(b.present)
    (term,) = model.terms(b).values()
    assert term.valid is not None and term.valid.tolist() == [n not in (3, 5) for n in range(44)]
    torch.testing.assert_close(term.value[term.valid], wanted[term.valid], **rounding(64, F32))
    torch.testing.assert_close(
        model.step({"radius": term}, b).total, wanted[term.valid].sum() / 43, **rounding(64, F32)
    )


def test_the_sham_is_trained_by_the_slopes_of_the_other_modality(runs: dict[str, Path]) -> None:
    b = batch(44, modalities=NAMES)
    model = Certified(runs["margins"], checkpoint="last", sham="permute")
    model.slope_MC.copy_(torch.tensor([[1.0] * 4, [9.0] * 4]))
    (term,) = model.terms(b).values()
    handed = dict(zip(NAMES, model.slope_MC.flip(0), strict=True))
    wanted = certified_radius(model.fuse(model.latents(b)), model.fusion.weights, handed, b.present, b.targets["label"])
    torch.testing.assert_close(term.value, -wanted, **rounding(64, F32))


@pytest.mark.ddp
@pytest.mark.slow
def test_two_ranks_as_one(runs: dict[str, Path]) -> None:
    one = trained(runs["margins"], steps=4).state_dict()
    for found in run_ranks(2, _on_rank, runs["margins"]):
        for name, x in one.items():
            # two ranks add gradients in another order: 8 ulps beside 1, and 800 where four steps magnify them
            torch.testing.assert_close(found[name], x, rtol=1e-4, atol=1e-6)


def _on_rank(rank: int, path: Path) -> dict[str, Tensor]:
    return dict(trained(path, steps=4, world=2).state_dict())


def test_a_resumed_run_ends_in_the_same_bits(runs: dict[str, Path], tmp_path: Path) -> None:
    def net() -> Certified:
        return Certified(runs["margins"], checkpoint="last", rows=8, optimizer=sgd)

    whole, rest = Act(), Act()
    options: dict[str, Any] = {"data": Banked(), "max_epochs": 2}
    _, model = fit(tmp_path / "a", Resume(every=1, keep=99), whole, net=net(), **options)
    path = point(tmp_path / "a", 7)
    _, again = fit(tmp_path / "b", Resume(every=1), rest, path=path, net=net(), **options)
    assert equal(state(model), state(again)) and rest.losses == whole.losses[7:]
    assert len(set(whole.losses)) == len(whole.losses)


def test_protocols_and_what_cannot_be(runs: dict[str, Path]) -> None:
    model = Certified(runs["margins"], checkpoint="last")
    for protocol in (HasObjective, HasTowers, Embeds, Fuses, Unimodal, Scores, Classifies):
        assert isinstance(model, protocol), protocol
    assert not isinstance(model, MultimodalClassifier) and isinstance(model.fusion, OrthogonalFusion)
    cases: list[tuple[Callable[[], Any], str]] = [
        (lambda: Certified(runs["late"], checkpoint="last"), "no classifier with a fusion OrthogonalFusion"),
        (lambda: Certified(runs["margins"], rows=0), "rows 0: 1 is the least"),
        (lambda: Certified(Path("gone")), "gone: no such run"),
    ]
    for make, message in cases:
        with pytest.raises(ValueError, match=message):
            make()
    with pytest.raises(ValueError, match="Certified needs bank_set"):
        L.Trainer(max_steps=1, **QUIET).fit(model, datamodule=PatternData())
    split = copy.deepcopy(model)
    split.sharding = Shard()
    with pytest.raises(ValueError, match=r"^shard: Certified measures slopes before training, on whole parameters"):
        split.configure_model()
    copied = copy.deepcopy(model)
    assert copied.train().training and not copied.towers.training
