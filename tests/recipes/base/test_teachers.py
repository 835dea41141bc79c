"""Teachers of one modality: terms by hand, nothing of them in the run, and that a student follows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from descant.recipes.base.teachers import Teachers
from tests.recipes.test_missing import MODALITIES, batch, build, fusion, node, some_absent, train, write
from tests.tolerance import F32, ulps


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    found = {}
    for m in ("image", "text"):
        model = fusion("LateFusion", m)
        recipe = build(model)
        train(recipe, 20)
        found[m] = str(write(tmp_path_factory.mktemp("teachers") / m / "001", model, recipe))
    model = node("Fusion", "image", target="label", classes=4) | {}
    model["init_args"]["width"] = 8
    found["narrow"] = str(write(tmp_path_factory.mktemp("teachers") / "narrow" / "001", model, build(model)))
    model = node("Contrastive", "image", "text")
    found["contrastive"] = str(write(tmp_path_factory.mktemp("teachers") / "clip" / "001", model, build(model)))
    return found


def student(paths: dict[str, str], weight: float = 10.0) -> Any:
    model = build(fusion("LateFusion", *MODALITIES))
    model.regularizers.append(Teachers(paths, weight, checkpoint="last"))
    return model


def test_terms_by_hand_over_the_rows_that_have_the_modality(teachers: dict[str, str]) -> None:
    paths = {m: teachers[m] for m in ("image", "text")}
    model, b = student(paths, weight=3.0), some_absent()
    terms = model.terms(b)
    assert list(terms) == ["fused", "teacher-image", "teacher-text"]
    for m in paths:
        alone = build(fusion("LateFusion", m)).eval()
        alone.load_state_dict(torch.load(Path(paths[m]) / "checkpoints/last.ckpt")["state_dict"])
        with torch.no_grad():
            z_BD, t_BD = model.latents(b)[m], alone.latents(b)[m]
        term = terms[f"teacher-{m}"]
        assert term.valid is not None and torch.equal(term.valid, b.present[m])
        for n in b.present[m].nonzero().flatten().tolist():
            wanted = 3.0 * float((z_BD[n] - t_BD[n]).square().sum()) / 16
            assert float(term.value[n].detach()) == pytest.approx(wanted, rel=ulps(64, F32))


def test_teachers_are_no_part_of_the_run_and_are_not_read_before_training(teachers: dict[str, str]) -> None:
    model = student({"image": teachers["image"]})
    plain = build(fusion("LateFusion", *MODALITIES))
    assert model.state_dict().keys() == plain.state_dict().keys()
    model.terms(batch())
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in plain.named_parameters()]
    absent = student({"image": "gone"})
    absent.eval().scores(batch())  # who only looks needs no teacher
    with pytest.raises(ValueError, match="gone: no such run"):
        absent.train().terms(batch())


def test_a_student_follows_and_its_teacher_stays(teachers: dict[str, str]) -> None:
    model = student({"image": teachers["image"]})
    held = batch(seed=7)
    before = float(model.terms(held)["teacher-image"].value.mean())
    _, teacher = model.regularizers[0]._teachers[0]
    weights = {name: p.clone() for name, p in teacher.state_dict().items()}
    train(model, 60)
    assert float(model.terms(held)["teacher-image"].value.mean()) < 0.5 * before
    assert all(torch.equal(p, weights[name]) for name, p in teacher.state_dict().items())
    assert not teacher.training and all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda of: Teachers({}), "paths: none; such as"),
        (
            lambda of: student({"touch": of["image"]}).terms(batch()),
            "no modality 'touch' here, only image, text, sketch",
        ),
        (lambda of: student({"text": of["image"]}).terms(batch()), "Fusion has no latents of text"),
        (lambda of: student({"image": of["contrastive"]}).terms(batch()), "Contrastive has no latents of image"),
        (
            lambda of: student({"image": of["narrow"]}).terms(batch()),
            "latents of 8 numbers, and the recipe's image has 16",
        ),
    ],
)
def test_what_cannot_be_is_one_line(make: Callable[[Any], Any], message: str, teachers: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=message):
        make(teachers)
