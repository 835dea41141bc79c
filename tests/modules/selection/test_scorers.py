"""Scores and styles of a pool from few graded rows. Letters: L labelled rows, N of the pool, D width, J thresholds."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from descant.modules.selection.scorers import RichScorer, Styler, expected_grade, fit_ordinal
from descant.modules.selection.selectors import Quota, entropy_share

L, D, GRADES = 60, 3, 4


def graded(rows: int = L, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features and grades drawn from a proportional-odds model of known weights and thresholds."""
    g = torch.Generator().manual_seed(seed)
    x_LD = torch.randn(rows, D, generator=g, dtype=torch.float64)
    w_D = torch.tensor([1.5, -1.0, 0.5], dtype=torch.float64)
    theta_J = torch.tensor([-1.0, 0.2, 1.4], dtype=torch.float64)
    noise_L = torch.logit(torch.rand(rows, generator=g, dtype=torch.float64))
    return x_LD, (((x_LD @ w_D + noise_L)[:, None] > theta_J).sum(dim=1)), w_D, theta_J


def explicit(x_LD: Tensor, grade_L: Tensor, w_D: Tensor, theta_J: Tensor, l2: float) -> Tensor:
    """The objective, row by row and grade by grade."""
    total = torch.zeros((), dtype=torch.float64)
    for x_D, grade in zip(x_LD, grade_L.tolist(), strict=True):
        above = [torch.ones((), dtype=torch.float64)]
        above += [1 / (1 + torch.exp(theta - (x_D * w_D).sum())) for theta in theta_J]
        above += [torch.zeros((), dtype=torch.float64)]
        total = total - torch.log(above[grade] - above[grade + 1])
    return total / len(x_LD) + l2 / 2 * (w_D * w_D).sum()


def test_the_ordinal_regression_is_at_the_minimum_of_the_explicit_objective() -> None:
    x_LD, grade_L, _, _ = graded()
    w_D, theta_J = (x.requires_grad_() for x in fit_ordinal(x_LD, grade_L, GRADES, l2=0.01))
    gradients = torch.autograd.grad(explicit(x_LD, grade_L, w_D, theta_J, 0.01), (w_D, theta_J))
    # 1e-6: what L-BFGS leaves of the gradient at its end
    assert all(float(g.abs().max()) < 1e-6 for g in gradients)
    assert (theta_J.diff() > 0).all()


def test_it_recovers_what_the_grades_were_drawn_from() -> None:
    x_LD, grade_L, w_D, theta_J = graded(rows=20_000)
    found_D, found_J = fit_ordinal(x_LD, grade_L, GRADES, l2=0.0)
    # 0.08: four standard errors of 20,000 grades
    torch.testing.assert_close(found_D, w_D, atol=0.08, rtol=0)
    # 0.08: as above
    torch.testing.assert_close(found_J, theta_J, atol=0.08, rtol=0)


def test_a_grade_that_no_row_has_is_never_likely() -> None:
    x_LD, grade_L, _, _ = graded()
    grade_L = torch.where(grade_L == 2, 1, grade_L)
    w_D, theta_J = fit_ordinal(x_LD, grade_L, GRADES)
    p_LJ = torch.sigmoid((x_LD @ w_D)[:, None] - theta_J)
    assert float((p_LJ[:, 1] - p_LJ[:, 2]).max()) < 0.05 and torch.isfinite(expected_grade(x_LD, w_D, theta_J)).all()


def test_scores_do_not_depend_on_the_scale_of_the_features() -> None:
    x_LD, grade_L, _, _ = graded()
    grade_LK = torch.stack([grade_L, GRADES - 1 - grade_L], dim=1)
    score_LK = RichScorer(GRADES).fit(x_LD, grade_LK)(x_LD)
    scaled_LD = x_LD * torch.tensor([1e3, 1e-3, 1.0]) + 7
    # 1e-3: of two minima that L-BFGS stops near
    torch.testing.assert_close(RichScorer(GRADES).fit(scaled_LD, grade_LK)(scaled_LD), score_LK, atol=1e-3, rtol=0)
    assert torch.corrcoef(torch.stack([score_LK[:, 0], grade_L.double()]))[0, 1] > 0.6
    assert torch.corrcoef(score_LK.T)[0, 1] < -0.99 and len(score_LK[:, 0].unique()) == L, "no ties"


def test_scorers_and_styler_choose_good_rows_in_every_style() -> None:
    """mmSSR from 5 % graded rows: the quota of scores takes more good rows than chance, and all styles alike."""
    x_ND, grade_N, _, _ = graded(rows=2_000)
    style_N = torch.arange(2_000) % 4
    x_ND = torch.cat([x_ND, torch.eye(4, dtype=torch.float64)[style_N]], dim=1)
    few = slice(0, 100)
    score_NK = RichScorer(GRADES).fit(x_ND[few], grade_N[few, None])(x_ND)
    found_N = Styler(4).fit(x_ND[few], style_N[few])(x_ND)
    assert (found_N == style_N).all()
    chosen_S = Quota(0.2)(score_NK, found_N, torch.arange(2_000)).index_S
    assert grade_N[chosen_S].double().mean() > grade_N.double().mean() + 0.8
    assert entropy_share(style_N[chosen_S], 4) >= 0.95


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (lambda x, g: fit_ordinal(x, g + 1, GRADES), "grades 1 to 4: at least two, 0 to 3"),
        (lambda x, g: RichScorer(GRADES).fit(x[1:], g[:, None]), "59 rows of features and 60 of labels"),
        (lambda x, g: Styler(4).fit(x.index_fill(0, torch.tensor([7]), torch.nan), g), "features: row 7 is not finite"),
    ],
)
def test_what_cannot_be_fitted_is_one_line(what: object, message: str) -> None:
    x_LD, grade_L, _, _ = graded()
    with pytest.raises(ValueError, match=message):
        what(x_LD, grade_L)  # type: ignore[operator]
