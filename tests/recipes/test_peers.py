"""Networks that teach each other: what each learns of the others, by hand, and that no gradient goes back."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from descant.callbacks import Resume
from descant.modules.core.protocols import HasObjective, HasTerms, HasTowers, Scores
from descant.modules.distill.distill import Distill, HardTarget, SoftTarget
from descant.recipes import Peers, TeacherAverage
from tests.callbacks.checkpoints.test_resume import Act, equal, fit, point, state
from tests.recipes.test_missing import PatternData, batch, build, fusion, node, some_absent
from tests.tolerance import F32, ulps

NAMES = ("image", "text")


def peers(count: int = 3, *targets: Any, **options: Any) -> Peers:
    made = []
    for i in range(count):
        student = build(fusion("LateFusion", *NAMES))
        torch.manual_seed(10 + i)
        with torch.no_grad():
            for p in student.parameters():
                p.add_(0.1 * torch.randn_like(p))
        made.append(student)
    return Peers(made, list(targets) or None, **options)


def test_each_learns_of_the_mean_of_the_others_by_hand() -> None:
    model, b = peers(3, SoftTarget(2.0)).eval(), some_absent().only(*NAMES)
    terms = model.terms(b)
    assert list(terms) == ["fused", "soft", "fused/1", "soft/1", "fused/2", "soft/2"]
    with torch.no_grad():
        x = [s.fuse(s.latents(b), b.present) / 2 for s in model.peers]  # type: ignore[operator]
    some = (b.present["image"] | b.present["text"]).nonzero().flatten().tolist()
    for i, name in enumerate(("soft", "soft/1", "soft/2")):
        for n in some:
            wanted = 0.0
            for j in {0, 1, 2} - {i}:
                p, q = ([math.exp(v) for v in x[k][n].tolist()] for k in (j, i))
                wanted += 4 / 2 * sum(a / sum(p) * math.log(a / sum(p) * sum(q) / c) for a, c in zip(p, q, strict=True))
            # a divergence is what is left of logarithms: of 1, a few hundredths
            assert float(terms[name].value[n].detach()) == pytest.approx(wanted, rel=ulps(256, F32), abs=ulps(16, F32))


def test_gradients_go_to_who_listens() -> None:
    model, b = peers(2, SoftTarget(), HardTarget()), batch(16, modalities=NAMES)
    terms = model.terms(b)
    model.step({name: terms[name] for name in ("soft", "hard")}, b).total.backward()
    assert any(p.grad is not None and p.grad.any() for p in model.peers[0].parameters())
    assert all(p.grad is None or not p.grad.any() for p in model.peers[1].parameters())


def test_they_come_to_agree_and_all_are_judged(tmp_path: Any) -> None:
    model = peers(2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    held = batch(256, seed=7, modalities=NAMES)

    def agree() -> float:
        with torch.no_grad():
            a, c = (s.eval().fuse(s.latents(held), held.present).argmax(dim=1) for s in model.peers)  # type: ignore[operator]
        return float((a == c).float().mean())

    before = agree()
    for step in range(60):
        b = batch(seed=1000 + step, modalities=NAMES)
        optimizer.zero_grad()
        model.train().step(model.terms(b), b).total.backward()
        optimizer.step()
    assert before < 0.7 and agree() > 0.9
    scores = model.eval().scores(held)
    assert set(scores) == {"accuracy", "loss", "accuracy/1", "loss/1"}
    assert float(scores["accuracy"].value.mean()) > 0.9 and float(scores["accuracy/1"].value.mean()) > 0.9


def test_a_resumed_run_ends_in_the_same_bits(tmp_path: Any) -> None:
    whole, rest = Act(), Act()
    options: dict[str, Any] = {"data": PatternData(), "max_epochs": 2}
    _, model = fit(tmp_path / "a", Resume(every=1, keep=99), whole, net=peers(2), **options)
    _, again = fit(tmp_path / "b", Resume(every=1), rest, path=point(tmp_path / "a", 7), net=peers(2), **options)
    assert equal(state(model), state(again)) and rest.losses == whole.losses[7:]


def test_protocols_and_what_cannot_be() -> None:
    model = peers(2)
    for protocol in (HasObjective, HasTerms, HasTowers, Scores):
        assert isinstance(model, protocol), protocol
    taught = build(fusion("LateFusion", *NAMES))
    taught.distill = Distill(TeacherAverage())
    one, clip = build(fusion("LateFusion", *NAMES)), build(node("Contrastive", *NAMES))
    five = build(node("Fusion", *NAMES, target="label", classes=5))
    cases: list[tuple[Callable[[], Any], str]] = [
        (lambda: Peers([one]), "students: 1; two are the fewest"),
        (lambda: Peers([one, taught]), "one has model.distill"),
        (lambda: Peers([one, clip]), "Contrastive, has no decisions"),
        (lambda: Peers([one, five]), "decides between 4, the student between 5"),
    ]
    for make, message in cases:
        with pytest.raises(ValueError, match=message):
            make()
