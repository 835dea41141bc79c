"""Students and teachers: targets by hand, what a run keeps, teachers that follow, and that a student learns of one.

Letters: B samples, N decisions, K choices.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from descant.callbacks import Resume
from descant.modules.adaptation.grow import Grow
from descant.modules.core.batch import Batch
from descant.modules.core.output import Decisions, Output
from descant.modules.distill import distill as parts
from descant.modules.distill.distill import Distill, DistillContext, FeatureTarget, HardTarget, SoftTarget, Target
from descant.modules.distill.ranking import RankTarget
from descant.modules.io import saved
from descant.modules.towers import ConvTower, PretrainedTower, TextTower, Towers
from descant.modules.transforms.image import Pixels
from descant.recipes import Contrastive, TeacherAverage, TeacherRun, TeacherStage, TeacherTowers
from descant.recipes.base.rebuild import rebuild
from tests.callbacks.checkpoints.test_resume import Act, equal, fit, point, state
from tests.modules.towers import folders
from tests.recipes.test_missing import PatternData, batch, build, fusion, node, some_absent, train, write
from tests.tolerance import F32, F64, rounding, ulps

NAMES = ("image", "text")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    found = {}
    models = {
        "both": (fusion("LateFusion", *NAMES), 120),
        "five": (node("Fusion", *NAMES, target="label", classes=5), 0),
        "clip": (node("Contrastive", *NAMES), 5),
    }
    for name, (model, steps) in models.items():
        recipe = build(model)
        train(recipe, steps)
        found[name] = str(write(tmp_path_factory.mktemp("runs") / name / "001", model, recipe))
    return found


def teacher(runs: dict[str, str], name: str = "both") -> Any:
    return rebuild(saved.find(Path(runs[name]), "last"))


def taught(student: Any, network: Any, *targets: Target) -> Distill:
    """As training makes it, without a trainer."""
    found = Distill(TeacherRun("unused"), list(targets))
    found._network.append(network)
    for target in targets:
        target.build(student, network)
    return found


def test_soft_and_hard_by_hand_over_who_is_there(runs: dict[str, str]) -> None:
    student, network, b = build(fusion("LateFusion", *NAMES)).eval(), teacher(runs), some_absent().only(*NAMES)
    terms = taught(student, network, SoftTarget(3.0, weight=2.0), HardTarget())(student, b, student.forward(b))
    some_B = b.present["image"] | b.present["text"]
    with torch.no_grad():
        s_BK = student.fuse(student.latents(b), b.present)
        t_BK = network.fuse(network.latents(b), b.present)
    for term in terms.values():
        assert term.valid is not None and torch.equal(term.valid, some_B)
        assert int(cast(Tensor, term.norm)) == int(some_B.sum())
    for n in some_B.nonzero().flatten().tolist():
        p, q = ([math.exp(x / 3) for x in x_BK[n].tolist()] for x_BK in (t_BK, s_BK))
        kl = sum(a / sum(p) * math.log(a / sum(p) * sum(q) / c) for a, c in zip(p, q, strict=True))
        # 18 times logarithms, each with a few roundings
        assert float(terms["soft"].value[n].detach()) == pytest.approx(
            2 * 9 * kl, rel=ulps(64, F32), abs=ulps(18 * 4, F32)
        )
        hard = float(torch.logsumexp(s_BK[n], 0) - s_BK[n, t_BK[n].argmax()])
        assert float(terms["hard"].value[n].detach()) == pytest.approx(hard, abs=ulps(32, F32))


def test_no_term_is_lost_to_another_of_its_name(runs: dict[str, str]) -> None:
    student, b = build(fusion("LateFusion", *NAMES)), batch(8, modalities=NAMES)
    with pytest.raises(ValueError, match="two of them make a term 'soft'"):
        taught(student, teacher(runs), SoftTarget(), SoftTarget(2.0))(student, b, student.forward(b))


def test_decisions_a_few_at_a_time_are_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens of three samples, one of which has none: means of each, and gradients, however few logits are there."""
    h_NW, w_KW = torch.randn(11, 4, dtype=torch.float64), torch.randn(7, 4, dtype=torch.float64)
    t_NK = torch.randn(11, 7, dtype=torch.float64)
    sample_N = torch.tensor([0] * 4 + [2] * 7)

    class Net(nn.Module):
        choices = 7

        def __init__(self, h: Tensor) -> None:
            super().__init__()
            self.output = Output({}, decisions=lambda: Decisions(lambda at: h[at] @ w_KW.T, sample_N))
            self.largest = 0

        def decide(self, b: Any) -> Decisions:
            def logits(at: Tensor) -> Tensor:
                self.largest = max(self.largest, len(t_NK[at]))
                return t_NK[at]

            return Decisions(logits, sample_N)

    found = {}
    for cells in (1 << 22, 3 * 7):
        monkeypatch.setattr(parts, "CELLS", cells)
        leaf = h_NW.clone().requires_grad_()
        net, b = Net(leaf), batch(3)
        (term,) = SoftTarget(2.0)(DistillContext(net, net, b, net.output)).values()
        term.sum().backward()
        assert term.valid is not None and term.valid.tolist() == [True, False, True]
        found[cells] = term.value.detach(), leaf.grad, net.largest
    (value, grad, most), (few_value, few_grad, few) = found.values()
    torch.testing.assert_close(value, few_value, **rounding(64, F64))
    torch.testing.assert_close(grad, few_grad, **rounding(64, F64))
    assert most == 11 and few == 3


def test_where_one_knows_samples_that_the_other_does_not_those_in_common_are_compared(runs: dict[str, str]) -> None:
    """A student of pictures and a teacher of both: samples without a picture teach nothing."""
    student, network, b = build(fusion("LateFusion", "image")).eval(), teacher(runs), some_absent().only(*NAMES)
    (term,) = taught(student, network, SoftTarget())(student, b, student.forward(b)).values()
    assert term.valid is not None and torch.equal(term.valid, b.present["image"])
    with torch.no_grad():
        s_BK, t_BK = student.fuse(student.latents(b), b.present), network.fuse(network.latents(b), b.present)
    wanted_B = parts.divergence(s_BK, t_BK)
    torch.testing.assert_close(term.value[term.valid], wanted_B[term.valid], **rounding(64, F32))
    with pytest.raises(ValueError, match="do not decide of the same tokens"):
        parts.in_common(torch.tensor([0, 0, 1]), torch.tensor([0, 1, 1]))


def test_features_by_hand(runs: dict[str, str]) -> None:
    student, network, b = build(node("Contrastive", *NAMES)).eval(), teacher(runs, "clip"), some_absent().only(*NAMES)
    target = FeatureTarget("image", weight=3.0)
    (term,) = taught(student, network, target)(student, b, student.forward(b)).values()
    with torch.no_grad():
        z_BD, t_BD = target.map(student.embed(b)["image"]), network.embed(b)["image"]
        wanted = 3 * (1 - nn.functional.cosine_similarity(z_BD, t_BD))
    here_B = b.present["image"]
    torch.testing.assert_close(term.value[here_B], wanted[here_B], **rounding(64, F32))


def test_a_student_learns_of_its_teacher_alone(runs: dict[str, str]) -> None:
    """Without a label: as its teacher decides, so it decides in the end; a sham teacher's student does not."""
    b, network = batch(256, seed=7, modalities=NAMES), teacher(runs)
    with torch.no_grad():
        wanted_B = network.fuse(network.latents(b)).argmax(dim=1)
    agreed = []
    for real in (True, False):
        student = build(fusion("LateFusion", *NAMES))
        lessons = taught(student, network if real else build(fusion("LateFusion", *NAMES)).eval(), SoftTarget())
        optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
        for step in range(60):
            seen = batch(seed=1000 + step, modalities=NAMES)
            optimizer.zero_grad()
            student.step(lessons(student, seen, student.forward(seen)), seen).total.backward()
            optimizer.step()
        with torch.no_grad():
            agreed.append(float((student.eval().fuse(student.latents(b)).argmax(dim=1) == wanted_B).float().mean()))
    assert agreed[0] > 0.9 and agreed[1] < 0.6


def test_a_run_keeps_nothing_of_a_teacher_and_needs_none(runs: dict[str, str], tmp_path: Path) -> None:
    model = node("Contrastive", *NAMES)
    plain = set(build(model).state_dict())
    lessons = Distill(TeacherRun(runs["clip"], "last"), [FeatureTarget("image"), RankTarget(kept=2)])
    student = build(model)
    student.distill = lessons
    _, trained = fit(tmp_path / "a", Resume(), net=student, data=PatternData(), max_epochs=1)
    extra = {name for name in trained.state_dict() if name not in plain}
    assert extra == {"distill.targets.0.map.weight", "distill.targets.0.map.bias"}
    model["init_args"]["distill"] = {
        "class_path": "descant.modules.distill.distill.Distill",
        "init_args": {"teacher": "gone"},
    }
    folder = write(tmp_path / "student", model, trained)
    again = rebuild(saved.find(folder, "last"))
    assert set(again.state_dict()) == plain and again.distill is None
    assert equal(again.state_dict(), {k: v for k, v in trained.state_dict().items() if k in plain})
    before = {"state_dict": dict(trained.state_dict())}
    build(node("Contrastive", *NAMES)).on_load_checkpoint(before)
    assert set(before["state_dict"]) == plain


def test_an_average_follows_and_a_resumed_run_ends_in_the_same_bits(tmp_path: Path) -> None:
    def net() -> Any:
        student = build(fusion("LateFusion", *NAMES))
        student.distill = Distill(TeacherAverage(0.5), [SoftTarget()])
        return student

    whole, rest = Act(), Act()
    options: dict[str, Any] = {"data": PatternData(), "max_epochs": 2}
    _, model = fit(tmp_path / "a", Resume(every=1, keep=99), whole, net=net(), **options)
    _, again = fit(tmp_path / "b", Resume(every=1), rest, path=point(tmp_path / "a", 7), net=net(), **options)
    assert equal(state(model), state(again)) and rest.losses == whole.losses[7:]
    average: Any = model.distill.teacher.average  # type: ignore[union-attr]
    assert not average.training and average.distill is None and not any(p.requires_grad for p in average.parameters())
    first, now = build(fusion("LateFusion", *NAMES)).state_dict(), dict(model.named_parameters())
    for name, p in average.named_parameters():
        assert not torch.equal(p, now[name]) and not torch.equal(p, first[name])
    assert all(torch.equal(x, dict(model.named_buffers())[name]) for name, x in average.named_buffers())


def test_the_average_by_hand() -> None:
    student = build(fusion("LateFusion", *NAMES))
    part = TeacherAverage(0.9)
    network = part.network(student)
    before = {name: p.clone() for name, p in network.named_parameters()}
    with torch.no_grad():
        for p in student.parameters():
            p.add_(1.0)
    part.follow(student)
    for name, p in network.named_parameters():
        torch.testing.assert_close(p, before[name] + 0.1, **rounding(4, F32))


@pytest.mark.parametrize("make", [lambda: TeacherAverage(0.9), TeacherStage])
def test_a_teacher_that_is_a_copy_grows_with_the_student(make: Callable[[], TeacherAverage]) -> None:
    torch.manual_seed(0)
    student = Contrastive(Towers(image=ConvTower([8, 16], stem=4), text=TextTower(20, 8, 1, 2, 5)), width=8)
    teacher = make()
    student.distill = Distill(teacher)
    student.distill.prepare(student)
    with torch.no_grad():
        for p in student.parameters():
            p.mul_(1.2)
    kept = copy.deepcopy(teacher.average)
    teacher.grow(Grow(depth=1, mlp_ratio=6.0).grow(student, seed=3))
    Grow(depth=1, mlp_ratio=6.0).grow(kept, seed=3)
    assert student.distill.network is teacher.average and equal(kept.state_dict(), teacher.average.state_dict())
    assert not any(p.requires_grad for p in teacher.average.parameters()) and not teacher.average.training
    before = dict(kept.named_parameters())
    teacher.begin(student)
    teacher.follow(student)
    weight = 1.0 if isinstance(teacher, TeacherStage) else 0.1
    for name, p in teacher.average.named_parameters():
        # float32: the average is updated in another order of operations
        torch.testing.assert_close(p, torch.lerp(before[name], student.get_parameter(name), weight))


def test_what_cannot_be(runs: dict[str, str], tmp_path: Path) -> None:
    clip, both = build(node("Contrastive", *NAMES)), build(fusion("LateFusion", *NAMES))
    cases: list[tuple[Callable[[], Any], str]] = [
        (lambda: TeacherRun("gone").network(both), "gone: no such run"),
        (lambda: TeacherAverage(1.0), "decay 1: at least 0 and below 1"),
        (lambda: SoftTarget(0), "temperature 0: above 0"),
        (
            lambda: SoftTarget().build(both, teacher(runs, "five")),
            "the teacher decides between 5, the student",
        ),
        (lambda: SoftTarget().build(clip, both), "the student, Contrastive, has no decisions"),
        (lambda: FeatureTarget("audio").build(clip, clip), "the student, Contrastive, has no embeddings of 'audio'"),
    ]
    for make, message in cases:
        with pytest.raises(ValueError, match=message):
            make()


def test_pretrained_towers_teach_their_owners_embeddings(tmp_path: Path) -> None:
    owner = folders.clip(tmp_path)
    x_BCHW = torch.rand(3, 3, folders.SIDE, folders.SIDE) * 2 - 1
    there_B = torch.ones(3, dtype=torch.bool)
    student: Any = Contrastive(Towers(image=ConvTower([8]), text=TextTower(9, 8, 1, 2, 8)), width=8)
    data = SimpleNamespace(pixels=Pixels(folders.SIDE))
    student._trainer = SimpleNamespace(datamodule=data)
    distill = Distill(TeacherTowers(Towers(image=PretrainedTower(tmp_path, "image"))), [FeatureTarget("image")])
    assert not list(distill.state_dict())
    distill.prepare(student)
    batch = Batch({"image": x_BCHW}, {"image": there_B})
    z_BD = torch.randn(3, 8, requires_grad=True)
    term = distill(student, batch, Output({}, latents={"image": z_BD}))["features-image"]
    mean_3, std_3 = (torch.tensor(values)[:, None, None] for values in (folders.MEAN, folders.STD))
    with torch.no_grad():
        t_BD = owner.get_image_features((x_BCHW * 0.5 + 0.5 - mean_3) / std_3).pooler_output
    target = cast(FeatureTarget, distill.targets[0])
    value_B = 1 - nn.functional.cosine_similarity(target.map(z_BD), t_BD, dim=1)
    torch.testing.assert_close(term.value, value_B, rtol=0, atol=1e-5)  # what an embedding may differ by
    assert not any(p.requires_grad for p in distill.network.parameters())
    data.pixels = Pixels(8)
    with pytest.raises(ValueError, match=r"images of 8 pixels, and towers\.image reads 16"):
        Distill(TeacherTowers(Towers(image=PretrainedTower(tmp_path, "image")))).prepare(student)
    with pytest.raises(ValueError, match=r"towers\.image: ConvTower has no embedding that was trained"):
        TeacherTowers(Towers(image=ConvTower([8])))
    with pytest.raises(ValueError, match="TeacherTowers: towers: none"):
        TeacherTowers(Towers())
