"""Adversarial training: inside the ball, against the label, one modality of each sample, resumed to the bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import Tensor
from torch.nn import functional as F

from descant.callbacks import AdversarialTraining, Resume
from descant.modules.core.batch import Batch
from descant.modules.evaluation.attacks import Nudge, find_attacks
from descant.recipes import Fusion
from tests.callbacks.checkpoints.test_resume import Act, equal, fit, point, state
from tests.modules.evaluation import test_attacks as linear
from tests.recipes.test_fusion import SignData, recipe
from tests.step_toy import QUIET
from tests.tolerance import F64, rounding, ulps

RADIUS = {"image": 0.4, "audio": 0.2}


def perturbed(made: Fusion, b: Batch, **options: Any) -> Batch:
    after = Batch(dict(b.inputs), b.present, b.targets, rng_seed=b.rng_seed)
    AdversarialTraining(**({"radius": RADIUS} | options)).on_train_batch_start(L.Trainer(**QUIET), made, after, 0)
    return after


def loss_B(made: Fusion, b: Batch) -> Tensor:
    return F.cross_entropy(linear.decided(made, b), b.targets["kind"].clamp(min=0), reduction="none")


def test_one_modality_of_each_labelled_sample_moves_within_its_ball_and_the_loss_grows() -> None:
    made, b = linear.recipe().train(), linear.batch(whole=False)
    for m, x in b.inputs.items():
        x[~b.present[m]] = torch.nan
    b.targets["kind"][7] = -1
    clean = {m: x.clone() for m, x in b.inputs.items()}
    after = perturbed(made, b)
    assert made.training and all(p.grad is None for p in made.parameters())
    moved = {m: (after.inputs[m] != clean[m]).any(dim=1) & b.present[m] for m in clean}
    for m, x in clean.items():
        assert torch.equal(after.inputs[m][~moved[m]].nan_to_num(7), x[~moved[m]].nan_to_num(7)), "absent rows too"
        far_B = (after.inputs[m] - x).norm(dim=1)[moved[m]]
        size_B = (x - x.mean(dim=1, keepdim=True)).norm(dim=1)[moved[m]]
        # where a decision is linear, the loss grows towards the sphere
        torch.testing.assert_close(far_B, RADIUS[m] * size_B, **rounding(64, F64))
    labelled_B = b.targets["kind"] >= 0
    assert torch.equal(moved["image"].int() + moved["audio"], labelled_B.int()) and not labelled_B[7]
    assert all(moved[m][b.present["image"] & b.present["audio"]].any() for m in moved)
    assert (loss_B(made, after) >= loss_B(made, b))[labelled_B].all(), "a convex loss cannot fall on the way"


def test_the_worst_point_is_that_of_the_attack() -> None:
    """Two classes, linear: a row that an attack of the same radius flips is misclassified after it, and no other."""
    made, b = linear.recipe(classes=2), linear.batch()
    b.targets["kind"] = linear.decided(made, b).argmax(dim=1)
    after = perturbed(made, b, radius={"image": 0.3}, steps=8)
    nudge = Nudge(made, b, ["image"])
    wrong_B = find_attacks(nudge, 0.3 * nudge.size_B(), b.targets["kind"], steps=8)
    assert torch.equal(linear.decided(made, after).argmax(dim=1) != b.targets["kind"], wrong_B) and wrong_B.any()


def test_it_depends_on_the_sample_alone() -> None:
    made, b = linear.recipe(bent=True), linear.batch()
    rows = torch.tensor([40, 2, 11])
    whole, part = perturbed(made, b), perturbed(made, b.select(rows))
    for m, x in part.inputs.items():
        torch.testing.assert_close(x, whole.inputs[m][rows], rtol=0, atol=ulps(64, F64))
    again = Batch(b.inputs, b.present, b.targets, rng_seed=b.rng_seed + 1000)  # of another epoch
    chosen = [AdversarialTraining(RADIUS).draw_samples(x)["image"] for x in (b, again)]
    assert not torch.equal(*chosen) and 0.3 < chosen[0].double().mean() < 0.7


def test_a_resumed_run_is_bit_identical(tmp_path: Path) -> None:
    def run(folder: Path, act: Act, **options: Any) -> dict[str, Tensor]:
        torch.manual_seed(0)
        net = recipe("mid", classes=2, optimizer=lambda groups: torch.optim.AdamW(groups, lr=1e-2))
        attack = AdversarialTraining({"image": 0.3, "text": 0.3}, steps=2)
        trained = fit(folder, Resume(every=1, keep=99), attack, act, net=net, data=SignData(), max_epochs=2, **options)
        return state(trained[1])

    whole, rest = Act(), Act()
    wanted = run(tmp_path / "a", whole)
    assert equal(wanted, run(tmp_path / "b", rest, path=point(tmp_path / "a", 5))) and rest.losses == whole.losses[5:]


def on(made: Any, **options: Any) -> None:
    L.Trainer(max_steps=1, callbacks=[AdversarialTraining(**options)], **QUIET).fit(made, datamodule=SignData())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AdversarialTraining({}), r"radius \{\}: modalities, each with one above 0"),
        (lambda: AdversarialTraining({"image": 0.0}), "each with one above 0, such as 0.3"),
        (lambda: AdversarialTraining(RADIUS, steps=0), "steps 0: 1 is the least"),
        (lambda: on(BoringModel(), radius=RADIUS), "AdversarialTraining needs the protocol Classifies"),
        (lambda: on(recipe(classes=2), radius={"sound": 0.1}), "AdversarialTraining: radius 'sound': "),
        (lambda: perturbed(linear.recipe(), ids()), "audio: ids; inputs that are floats can be perturbed"),
        (lambda: perturbed(linear.recipe(), without()), "radius 'audio': in the data no such name"),
    ],
    ids=["none", "zero", "steps", "protocol", "modality", "ids", "data"],
)
def test_wrong_arguments_are_one_line(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def ids() -> Batch:
    b = linear.batch(4)
    b.inputs["audio"] = torch.ones(4, 9, dtype=torch.long)
    return b


def without() -> Batch:
    b = linear.batch(4)
    del b.inputs["audio"]
    return b
