"""Lists that a teacher mines: gradients by hand, columns that stay aligned, weights that are not inert.

Letters: B samples, K of a list.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from descant.modules.core.batch import Batch
from descant.modules.core.loss_reduction import Step
from descant.modules.core.output import Output
from descant.modules.distill.distill import DistillContext
from descant.modules.distill.ranking import (
    AsReleased,
    CentredListMSE,
    ListKL,
    ListMSE,
    Lists,
    RankTarget,
    StudentLag,
    TeacherConfidence,
    TeacherUncertainty,
    UniformWeighting,
    Weighting,
    truth_loss,
)
from tests.recipes.test_missing import batch
from tests.tolerance import F32, F64, conditioned, rounding, ulps

B = 10


class Scores(nn.Module):
    """A network whose scores of all pairs are a matrix."""

    pairs = ("image-text",)

    def __init__(self, s_BB: Tensor) -> None:
        super().__init__()
        self.s_BB = s_BB
        self.asked = 0

    def scorers(self, batch: Any) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
        return {"image-text": self.score}

    def score(self, row_N: Tensor, column_N: Tensor) -> Tensor:
        self.asked = len(row_N)
        return self.s_BB[row_N, column_N]


def samples(rows: int = B) -> Batch:
    b = batch(rows, modalities=("image", "text"))
    b.content_id = torch.arange(rows)
    return b


def matrix(seed: int = 0, rows: int = B) -> Tensor:
    return torch.randn(rows, rows, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def lesson(teacher_BB: Tensor, student_BB: Tensor, b: Batch) -> DistillContext:
    student = Scores(student_BB)
    return DistillContext(student, Scores(teacher_BB), b, Output({}, pairs=student.scorers(b)))


def by_hand(t_BB: Tensor, b: Batch, kept: int) -> list[list[int]]:
    """The own text, then the best of all others in the teacher's eyes."""
    found = []
    for i in range(len(b)):
        others = [
            j
            for j in range(len(b))
            if b.present["text"][j] and b.present["image"][j] and b.content_id[i] != b.content_id[j]
        ]
        found.append([i, *sorted(others, key=lambda j: -float(t_BB[i, j]))[:kept]])
    return found


def test_lists_are_the_own_text_and_those_that_the_teacher_scores_highest() -> None:
    b, t_BB = samples(), matrix()
    b.present["text"][3] = False
    b.content_id[5] = b.content_id[6]
    column_BK, t_BK, valid_B = RankTarget(kept=4).mine_columns(b, Scores(t_BB).score)
    for i, wanted in enumerate(by_hand(t_BB, b, 4)):
        assert bool(valid_B[i]) == (i != 3)
        if i != 3:
            assert column_BK[i].tolist() == wanted
            torch.testing.assert_close(t_BK[i], t_BB[i, wanted].float(), **rounding(2, F32))


def test_the_teacher_is_asked_for_what_is_drawn_alone_and_draws_follow_the_samples() -> None:
    b, teacher = samples(), Scores(matrix())
    target = RankTarget(drawn=5, kept=3)
    column_BK, _, valid_B = target.mine_columns(b, teacher.score)
    assert teacher.asked == B * 6 and valid_B.all()
    order = torch.randperm(B, generator=torch.Generator().manual_seed(1))
    again_BK, _, _ = target.mine_columns(b.select(order), lambda r, c: teacher.score(order[r], order[c]))
    assert torch.equal(order[again_BK], column_BK[order])
    rest = RankTarget(drawn=5, kept=3, mine="random").mine_columns(b, teacher.score)[0]
    assert not torch.equal(rest, column_BK)
    assert set(map(tuple, column_BK.tolist())) != set(map(tuple, rest.tolist()))


def test_columns_stay_aligned_where_the_teacher_errs() -> None:
    """A student that scores as a teacher whose own text is never the first has nothing to learn of it."""
    t_BB = matrix()
    t_BB.fill_diagonal_(-5.0)
    for imitation in (ListMSE(), ListKL(2.0)):
        terms = RankTarget(kept=4, imitation=imitation)(lesson(t_BB, t_BB.clone(), samples()))
        assert terms["rank"].value.abs().max() < ulps(8, F32)
    released_BK = t_BB[:, :5].sort(dim=1, descending=True).values  # sorted by score, as the release leaves them
    assert (released_BK - t_BB[:, :5]).abs().max() > 1


def entropy(t: list[float]) -> float:
    total = sum(math.exp(x) for x in t)
    return -sum(math.exp(x) / total * math.log(math.exp(x) / total) for x in t) / math.log(len(t))


def ce(x: list[float]) -> float:
    return math.log(sum(math.exp(v) for v in x)) - x[0]


FORMULAS: list[tuple[Weighting, Callable[[list[float], list[float]], float]]] = [
    (UniformWeighting(), lambda t, s: 1.0),
    (TeacherConfidence(), lambda t, s: 1 - entropy(t)),
    (TeacherUncertainty(), lambda t, s: entropy(t)),
    (StudentLag(), lambda t, s: 1 - math.exp(-ce(s) / ce(t))),
]


@pytest.mark.parametrize(("weighting", "formula"), FORMULAS, ids=lambda x: type(x).__name__)
def test_every_weight_scales_the_gradient_of_its_sample_and_of_no_other(
    weighting: Weighting, formula: Callable[[list[float], list[float]], float]
) -> None:
    b, t_BB, s_BB = samples(), matrix(0), matrix(1)
    lists = by_hand(t_BB, b, 4)
    w = [formula(t_BB[i, k].tolist(), s_BB[i, k].tolist()) for i, k in enumerate(lists)]
    w = [x * B / sum(w) for x in w]
    for name, at in (("rank", {"weigh": weighting}), ("truth", {"weigh_truth": weighting})):
        grads = []
        for options in (at, {}):
            leaf_BB = s_BB.clone().requires_grad_()
            term = RankTarget(kept=4, imitation=ListMSE(), **options)(lesson(t_BB, leaf_BB, b))[name]  # type: ignore[arg-type]
            Step()({name: term}, b).total.backward()
            assert leaf_BB.grad is not None
            grads.append(leaf_BB.grad)
        weighed_BB, plain_BB = grads
        assert plain_BB.abs().sum(dim=1).min() > 1e-4
        torch.testing.assert_close(
            weighed_BB, torch.tensor(w, dtype=torch.float64)[:, None] * plain_BB, rtol=2e-5, atol=1e-9
        )  # float32 weights: exponentials of scores up to 10, in sums of 4 and of all samples: 168 ulps
    # what the release does: the mean first, and weights of it that add up to 1
    if not isinstance(weighting, UniformWeighting):
        assert max(w) / min(w) > 1.05


def test_the_released_weights_hardly_differ() -> None:
    t_BK = 3 * torch.randn(128, 8, generator=torch.Generator().manual_seed(2))
    w_B = AsReleased()(Lists(t_BK, t_BK, torch.ones(128, dtype=torch.bool)))
    assert w_B.sum().item() == pytest.approx(1, rel=ulps(128, F32)) and 1.0 < w_B.max() / w_B.min() < 1.05


def kl(t: list[float], s: list[float]) -> float:
    p, q = ([math.exp(x / 2) for x in scores] for scores in (t, s))
    return 4 * sum(a / sum(p) * math.log(a / sum(p) * sum(q) / c) for a, c in zip(p, q, strict=True))


def mse(t: list[float], s: list[float], centred: bool = False) -> float:
    off = (sum(s) - sum(t)) / len(t) if centred else 0.0
    return sum((b - a - off) ** 2 for a, b in zip(t, s, strict=True)) / len(t)


def bce(s: list[float]) -> float:
    return sum(math.log(1 + math.exp(-x if k == 0 else x)) for k, x in enumerate(s)) / len(s)


@pytest.mark.parametrize(
    ("imitation", "by_loop"),
    [(None, mse), (ListMSE(), mse), (CentredListMSE(), lambda t, s: mse(t, s, True)), (ListKL(2.0), kl)],
)
@pytest.mark.parametrize(("form", "truth"), [("binary", bce), ("softmax", ce)])
def test_terms_by_hand(imitation: Any, by_loop: Any, form: Any, truth: Any) -> None:
    """In single precision, as in a run."""
    b, t_BB, s_BB = samples(), matrix(0), matrix(1)
    target = RankTarget(kept=4, imitation=imitation, rank=3.0, truth=0.5, truth_form=form)
    terms = target(lesson(t_BB, s_BB, b))
    for i, k in enumerate(by_hand(t_BB, b, 4)):
        t, s = t_BB[i, k].tolist(), s_BB[i, k].tolist()
        # logarithms that cancel down to an eighth
        assert float(terms["rank"].value[i]) == pytest.approx(3 * by_loop(t, s), rel=conditioned(8, F32, terms=10))
        assert float(terms["truth"].value[i]) == pytest.approx(0.5 * truth(s), rel=ulps(64, F32))


def test_the_terms_of_dcd_are_those_of_its_release() -> None:
    """In double precision: the squares of all scores averaged, and binary cross-entropies weighed by entropy shares."""
    t_BK, s_BK = matrix(0)[:, :5], matrix(1)[:, :5]
    lists = Lists(t_BK, s_BK, torch.ones(B, dtype=torch.bool))
    rows = list(zip(t_BK.tolist(), s_BK.tolist(), strict=True))
    released = sum((b - a) ** 2 for t, s in rows for a, b in zip(t, s, strict=True)) / (B * 5)
    assert float(ListMSE()(lists).mean()) == pytest.approx(released, rel=ulps(64, F64))
    h = [entropy(t) for t, _ in rows]
    released = sum(h_b / sum(h) * bce(s) for h_b, (_, s) in zip(h, rows, strict=True))
    v_B = RankTarget()._weights(TeacherUncertainty(), lists)
    assert float((v_B * truth_loss(s_BK, "binary")).mean()) == pytest.approx(released, rel=ulps(64, F64))
    assert float((v_B * truth_loss(s_BK, "softmax")).mean()) > released + 0.1


def test_the_sham_hands_weights_on() -> None:
    b, t_BB = samples(), matrix()
    own, other = (
        RankTarget(kept=4, weigh=TeacherConfidence(), sham=mode)(lesson(t_BB, matrix(1), b))["rank"]
        for mode in (None, "permute")
    )
    assert own.weight is not None and other.weight is not None
    assert (own.weight != other.weight).all()
    torch.testing.assert_close(own.weight.sort().values, other.weight.sort().values, **rounding(8, F32))
    assert own.weight.mean().item() == pytest.approx(1, rel=ulps(64, F32))


def test_absent_samples_change_nothing_and_too_few_make_no_list() -> None:
    b, t_BB, s_BB = samples(), matrix(0), matrix(1).requires_grad_()
    b.present["image"][2] = b.present["text"][7] = False
    b.step = dict(b.present)
    terms = RankTarget(kept=3, weigh=TeacherConfidence())(lesson(t_BB, s_BB, b))
    Step()(terms, b).total.backward()
    assert s_BB.grad is not None and s_BB.grad.isfinite().all()
    for row in (2, 7):
        assert not s_BB.grad[row].any() and not s_BB.grad[:, row].any()
    few = samples(3)
    terms = RankTarget(kept=4)(lesson(matrix(0, 3), matrix(1, 3), few))
    assert not cast(Tensor, terms["rank"].valid).any()
    assert Step()(terms, few).total == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RankTarget(drawn=3, kept=4), "kept 4 of drawn 3"),
        (lambda: ListKL(0), "temperature 0: above 0"),
        (
            lambda: RankTarget("image-audio").build(Scores(matrix()), Scores(matrix())),
            "no pair 'image-audio', only image-text",
        ),
        (lambda: RankTarget().build(nn.Linear(1, 1), Scores(matrix())), "the student, Linear, scores no pairs"),
    ],
)
def test_what_cannot_be(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
