"""Rich scorers and a styler: they score and style a whole pool from frozen features, given a few graded samples.

Letters: L labelled rows, N rows of the pool, D width of features, K capabilities, J grades above the lowest, S styles.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from descant.modules.evaluation.metrics import fit_logistic


def fit_ordinal(
    x_LD: Tensor, grade_L: Tensor, grades: int, l2: float = 1e-3, steps: int = 200
) -> tuple[Tensor, Tensor]:
    """Fit ordinal logistic regression (proportional odds) by L-BFGS, in the precision of ``x``.

        P(grade >= j | x) = sigmoid(w x - theta_j),    theta_1 < theta_2 < ... < theta_J
        w, theta = argmin  - mean_l log P(grade_l | x_l) + l2 / 2 * ||w||^2

    The form ``theta_j = theta_{j-1} + softplus(d_j)`` keeps the thresholds in order. Grades that no labelled row has
    are allowed. Source: McCullagh 1980.

    Shapes: ``x_LD``, ``grade_L`` int64 0 to ``grades - 1`` ``-> w_D, theta_J``.

    >>> x_LD = torch.tensor([[-2.0], [-1.0], [0.0], [1.0], [2.0], [3.0]], dtype=torch.float64)
    >>> w_D, theta_J = fit_ordinal(x_LD, torch.tensor([0, 0, 1, 1, 2, 2]), grades=3)
    >>> expected_grade(x_LD, w_D, theta_J).round().tolist()
    [0.0, 0.0, 1.0, 1.0, 2.0, 2.0]
    """
    if grades < 2 or int(grade_L.min()) < 0 or int(grade_L.max()) >= grades:
        raise ValueError(f"grades {int(grade_L.min())} to {int(grade_L.max())}: at least two, 0 to {grades - 1}")
    with torch.inference_mode(False), torch.enable_grad():
        x_LD, grade_L = x_LD.detach().clone(), grade_L.detach().clone()
        w_D = x_LD.new_zeros(x_LD.shape[1], requires_grad=True)
        step_J = x_LD.new_zeros(grades - 1, requires_grad=True)
        optimizer = torch.optim.LBFGS(
            [w_D, step_J], max_iter=steps, tolerance_grad=1e-9, tolerance_change=1e-15, line_search_fn="strong_wolfe"
        )

        def closure() -> Tensor:
            optimizer.zero_grad()
            at_L = x_LD @ w_D
            edge = x_LD.new_full((len(x_LD), 1), torch.inf)
            z_LJ = torch.cat(
                [edge, at_L[:, None] - _ordered_steps(step_J), -edge], dim=1
            )  # logits of P(grade >= 0), ..., P(>= J + 1)
            low_L, high_L = (z_LJ.gather(1, (grade_L + j)[:, None])[:, 0] for j in (1, 0))
            # log(sigmoid(high) - sigmoid(low)), without the difference of numbers near 1
            log_L = F.logsigmoid(high_L) + F.logsigmoid(-low_L) + torch.log(-torch.expm1(low_L - high_L))
            loss = l2 / 2 * w_D.square().sum() - log_L.mean()
            torch.autograd.backward(loss)
            return loss

        optimizer.step(closure)
    return w_D.detach(), _ordered_steps(step_J).detach()


def _ordered_steps(step_J: Tensor) -> Tensor:
    return torch.cat([step_J[:1], step_J[:1] + F.softplus(step_J[1:]).cumsum(0)])


def expected_grade(x_ND: Tensor, w_D: Tensor, theta_J: Tensor) -> Tensor:
    """Compute ``sum_j P(grade >= j | x)``, the mean grade of an ordinal regression; unlike the mode it has no ties.

    Shapes: ``x_ND, w_D, theta_J -> score_N``, from 0 to J.
    """
    return torch.sigmoid((x_ND @ w_D)[:, None] - theta_J).sum(dim=1)


class RichScorer:
    """Scores of K capabilities from frozen features, each an ordinal regression on the graded rows (mmSSR).

        score_nk = sum_j P(grade_k >= j | x_n)

    Features are standardized by the labelled rows. Source: mmSSR (Ge 2025, arXiv 2503.13383), where the model itself is
    the scorer, fine-tuned on GPT-4o's grades of 0 to 5; regressions on frozen features are our reading.

    Args:
        grades: number of grades.
        l2: weight of the penalty.

    >>> x_LD = torch.tensor([[-2.0, 0.0], [-1.0, 1.0], [1.0, 0.0], [2.0, 1.0]], dtype=torch.float64)
    >>> scorer = RichScorer(grades=2).fit(x_LD, torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]]))
    >>> scorer(x_LD).round().tolist()
    [[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]]
    """

    def __init__(self, grades: int = 6, l2: float = 1e-3) -> None:
        self.grades, self.l2 = grades, l2
        self.heads: list[tuple[Tensor, Tensor]] = []

    def fit(self, x_LD: Tensor, grade_LK: Tensor) -> RichScorer:
        _check(x_LD, grade_LK)
        self.scale = _scale(x_LD)
        columns = grade_LK.unbind(dim=1)
        self.heads = [fit_ordinal(_standard(x_LD, self.scale), grade_L, self.grades, self.l2) for grade_L in columns]
        return self

    def __call__(self, x_ND: Tensor) -> Tensor:
        x_ND = _standard(x_ND, self.scale)
        return torch.stack([expected_grade(x_ND, *head) for head in self.heads], dim=1)


class Styler:
    """Interaction style of each row from frozen features, by multinomial regression on the labelled rows (mmSSR).

    Args:
        styles: number of styles.
        l2: weight of the penalty.

    >>> x_LD = torch.tensor([[-2.0], [-1.0], [1.0], [2.0]], dtype=torch.float64)
    >>> Styler(2).fit(x_LD, torch.tensor([0, 0, 1, 1]))(x_LD).tolist()
    [0, 0, 1, 1]
    """

    def __init__(self, styles: int, l2: float = 1e-3) -> None:
        self.styles, self.l2 = styles, l2

    def fit(self, x_LD: Tensor, style_L: Tensor) -> Styler:
        _check(x_LD, style_L)
        self.scale = _scale(x_LD)
        self.head = fit_logistic(_standard(x_LD, self.scale), style_L, self.styles, self.l2)
        return self

    def __call__(self, x_ND: Tensor) -> Tensor:
        w_SD, b_S = self.head
        return (_standard(x_ND, self.scale) @ w_SD.T + b_S).argmax(dim=1)


def _scale(x_LD: Tensor) -> tuple[Tensor, Tensor]:
    return x_LD.mean(dim=0), x_LD.std(dim=0).clamp_min(1e-12)


def _standard(x_ND: Tensor, scale: tuple[Tensor, Tensor]) -> Tensor:
    return (x_ND - scale[0]) / scale[1]


def _check(x_LD: Tensor, label_L: Tensor) -> None:
    if len(x_LD) != len(label_L):
        raise ValueError(f"{len(x_LD)} rows of features and {len(label_L)} of labels")
    if not x_LD.isfinite().all():
        raise ValueError(f"features: row {int((~x_LD.isfinite()).any(dim=1).nonzero()[0, 0])} is not finite")
