"""Networks of one modality that vote: their mixture by hand, weights alone trained, and what cannot be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from descant.modules.core.protocols import Classifies, Embeds, Fuses, MultimodalClassifier, Scores, Unimodal
from descant.recipes import Ensemble
from tests.recipes.test_missing import build, fusion, node, some_absent, train, write
from tests.tolerance import F32, rounding

NAMES = ("image", "text")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    found = {}
    models = {m: fusion("LateFusion", m) for m in NAMES}
    models |= {"both": fusion("LateFusion", *NAMES), "five": node("Fusion", "text", target="label", classes=5)}
    for name, model in models.items():
        recipe = build(model)
        if name != "five":
            train(recipe, 40)
        found[name] = str(write(tmp_path_factory.mktemp("runs") / name / "001", model, recipe))
    return found


def ensemble(runs: dict[str, str]) -> Any:
    return Ensemble({m: runs[m] for m in NAMES}, checkpoint="last")


def test_the_mixture_of_what_members_say_of_those_they_know(runs: dict[str, str]) -> None:
    model, b = ensemble(runs).eval(), some_absent()
    with torch.no_grad():
        logits = model.fuse(model.latents(b), b.present)
        said = {}
        for m in NAMES:
            alone = build(fusion("LateFusion", m)).eval()
            alone.load_state_dict(torch.load(Path(runs[m]) / "checkpoints/last.ckpt")["state_dict"])
            said[m] = alone.fuse(alone.latents(b.only(m)), b.present).softmax(dim=1)
    for n in range(len(b)):
        there = [said[m][n] for m in NAMES if b.present[m][n]]
        wanted = torch.stack(there).mean(dim=0).log() if there else torch.zeros(4)
        torch.testing.assert_close(logits[n], wanted, **rounding(64, F32))


def test_weights_alone_are_trained_and_go_to_who_knows(runs: dict[str, str]) -> None:
    model = ensemble(runs)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    train(model, 30, lr=0.1)
    moved = {name for name, x in model.state_dict().items() if not torch.equal(x, before[name])}
    assert moved == {f"fusion.log_weights.{m}" for m in NAMES}
    weight = model.fusion.log_weights
    assert float(weight["text"]) > float(weight["image"]), "words say it without noise here"
    assert not any(part.training for part in model.train().towers.modules())


def test_a_batch_with_absences_has_finite_gradients(runs: dict[str, str]) -> None:
    model, b = ensemble(runs), some_absent()
    model.step(model.terms(b), b).total.backward()
    for p in model.fusion.log_weights.parameters():
        assert p.grad is not None and p.grad.isfinite() and p.grad != 0


def test_protocols_and_what_cannot_be(runs: dict[str, str]) -> None:
    model = ensemble(runs)
    for protocol in (Embeds, Fuses, Unimodal, Scores, Classifies):
        assert isinstance(model, protocol), protocol
    assert not isinstance(model, MultimodalClassifier)
    unlike = {"image": runs["image"], "text": runs["five"]}
    cases: list[tuple[Callable[[], Any], str]] = [
        (lambda: Ensemble({}), "paths: none; such as"),
        (lambda: Ensemble({"image": "gone"}), "gone: no such run"),
        (lambda: Ensemble({"image": runs["text"]}, checkpoint="last"), "no classifier of image alone"),
        (lambda: Ensemble({"image": runs["both"]}, checkpoint="last"), "no classifier of image alone"),
        (lambda: Ensemble(unlike, checkpoint="last"), "5 classes of 'label', and others have 4"),
    ]
    for make, message in cases:
        with pytest.raises(ValueError, match=message):
            make()
