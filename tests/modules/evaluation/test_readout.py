"""The readout against independent solutions, and what its folds, its alphas and its contrasts do on planted signals.

Letters: N stimuli, P features, S sites.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from descant.modules.evaluation.readout import (
    ALPHAS,
    ModelContrast,
    Products,
    RidgeReadout,
    benjamini_hochberg,
    pearson,
    projected_size,
    sparse_projection,
)
from tests.tolerance import F64, conditioned, rounding, statistical, ulps

#: Features at 100 with a deviation of 3 lose 33 ulps, in sums over 103 rows and Gram matrices of condition 3,000.
FIT = conditioned(33 * 3000, F64, terms=103)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_hand(x_NP: Tensor, y_N: Tensor, select: str, folds: int = 5) -> tuple[list[float], list[float], np.ndarray]:
    """r and alpha of every fold and the predictions, by least squares on an augmented system and loops.

    Alpha is that of the best validation r of a ``fold``, or the one of the best mean over folds (``target``).
    """
    x, y = x_NP.numpy(), y_N.numpy()
    n, fits = len(y), []
    for k in range(folds):
        first, last = n * k // folds, n * (k + 1) // folds
        middle = (first + last) // 2
        train = np.r_[0:first, last:n]
        z = (x - x[train].mean(0)) / x[train].std(0)
        for alpha in ALPHAS:
            # rows of sqrt(alpha) penalise the weights and leave the intercept, the last column, alone
            ones = np.c_[z[train], np.ones(len(train))]
            penalty = np.c_[np.sqrt(alpha) * np.eye(x.shape[1]), np.zeros(x.shape[1])]
            target = np.r_[y[train], np.zeros(x.shape[1])]
            w = np.linalg.lstsq(np.r_[ones, penalty], target, rcond=None)[0]
            p = np.c_[z, np.ones(n)] @ w
            r, r_test = (np.corrcoef(p[at], y[at])[0, 1] for at in (slice(first, middle), slice(middle, last)))
            fits.append((k, alpha, r, r_test, slice(middle, last), p))
    shared = max(ALPHAS, key=lambda alpha: sum(fit[2] for fit in fits if fit[1] == alpha))
    rs, alphas, predicted = [], [], np.full(n, np.nan)
    for k in range(folds):
        best = max((fit for fit in fits if fit[0] == k), key=lambda fit: fit[2])
        _, alpha, _, r_test, test, p = next(
            fit for fit in fits if fit[:2] == (k, shared if select == "target" else best[1])
        )
        rs.append(float(r_test))
        alphas.append(alpha)
        predicted[test] = p[test]
    return rs, alphas, predicted


@pytest.mark.parametrize("select", ["target", "fold"])
@pytest.mark.parametrize("features", [12, 150])  # the second has more features than training rows: the dual
def test_it_equals_least_squares_with_a_free_intercept(features: int, select: Any) -> None:
    x_NP, noise_NS = normal(103, features), normal(103, 3, seed=1)
    y_NS = 40 + x_NP[:, :3] * torch.tensor([3.0, 1.0, 0.3]) + noise_NS
    values = RidgeReadout(select=select)(3 * x_NP + 100, y_NS)
    for s in range(3):
        rs, alphas, predicted_N = by_hand(x_NP, y_NS[:, s], select)
        assert values.r_fold[:, s].tolist() == pytest.approx(rs, abs=FIT)
        assert values.alpha[:, s].tolist() == alphas
        torch.testing.assert_close(
            values.predicted[:, s], torch.from_numpy(predicted_N), equal_nan=True, rtol=0, atol=40 * FIT
        )
    assert values.r.tolist() == pytest.approx(values.r_fold.mean(0).tolist(), abs=ulps(8, F64))
    varies_S = (values.alpha != values.alpha[0]).any(0)
    assert varies_S.any() if select == "fold" else not varies_S.any()


def test_a_penalised_intercept_would_be_another_number() -> None:
    """At the strongest alpha the prediction is the mean of the training rows; a penalised one would pull it to zero."""
    x_NP, y_N = normal(100, 4), normal(100, seed=1) + 50
    values = RidgeReadout(alphas=[1e9])(x_NP, y_N)
    for k in range(5):
        train_N = torch.cat([y_N[: 20 * k], y_N[20 * (k + 1) :]])
        # 80 rows over an alpha of 1e9 are what a slope has left: 1e-7 of it
        assert values.predicted[20 * k + 10].item() == pytest.approx(train_N.mean().item(), abs=1e-6)


def test_each_target_has_its_own_alpha() -> None:
    x_NP = normal(500, 300)
    y_NS = torch.stack([x_NP[:, :200].sum(1), x_NP[:, :200].sum(1) + 30 * normal(500, seed=2)], dim=1)
    own = RidgeReadout()(x_NP, y_NS)
    assert (own.alpha[:, 0] < own.alpha[:, 1]).all()
    shared = max(float(RidgeReadout(alphas=[alpha])(x_NP, y_NS).r.mean()) for alpha in ALPHAS)
    assert float(own.r.mean()) > shared + 0.02


def test_features_are_scaled_by_training_rows_alone() -> None:
    """Test rows of another scale: by their own statistics the numbers would be others."""
    x_NP, y_N = normal(100, 5), normal(100, seed=1)
    y_N += x_NP[:, 0]
    moved = x_NP.clone()
    moved[95:] = 30 * moved[95:] + 7  # half of the test half of the last fold
    ridge = RidgeReadout(select="fold")  # rows of a test are training rows of other folds
    plain, other = ridge(x_NP, y_N), ridge(moved, y_N)
    assert other.alpha[4] == plain.alpha[4]
    torch.testing.assert_close(other.predicted[90:95], plain.predicted[90:95], rtol=0, atol=ulps(512, F64))
    whole = (moved - moved.mean(0)) / moved.std(0, correction=0)
    train = (moved[:80] - whole[:80]).abs().max()
    assert train > 0.3  # z-scores by all rows are not those by the training rows
    assert not torch.allclose(other.predicted[95:], plain.predicted[95:])


def test_contiguous_folds_are_harder_where_neighbours_are_alike() -> None:
    """Slow noise: features of a time say nothing of another time, and a random fold holds each row's neighbours."""
    x_NP, y_N = normal(400, 20).cumsum(0), normal(400, seed=1).cumsum(0)
    order = torch.randperm(400, generator=torch.Generator().manual_seed(3))
    contiguous, random = RidgeReadout()(x_NP, y_N), RidgeReadout()(x_NP[order], y_N[order])
    assert float(random.r) > 0.85
    assert float(contiguous.r) < 0.5
    assert contiguous.fold[:80].tolist() == [-1] * 40 + [0] * 40


def test_alpha_is_selected_on_validation_rows_only() -> None:
    ridge = RidgeReadout(select="fold")
    x_NP, y_N = normal(100, 30), normal(100, seed=1)
    y_N += x_NP[:, 0]
    spoiled = y_N.clone()
    tested = ridge(x_NP, y_N).fold == 0
    spoiled[tested] = normal(100, seed=5)[tested]
    assert ridge(x_NP, spoiled).alpha[0] == ridge(x_NP, y_N).alpha[0]
    torch.testing.assert_close(
        ridge(x_NP, spoiled).predicted[tested],
        ridge(x_NP, y_N).predicted[tested],
        **rounding(512, F64),
    )


def test_rows_without_a_value_have_no_effect() -> None:
    x_NP, y_NS = normal(150, 6), normal(150, 2, seed=1)
    y_NS += x_NP[:, :2]
    y_NS[::3, 1] = torch.nan
    valid = torch.arange(150) % 3 > 0
    values = RidgeReadout()(x_NP, y_NS)
    assert float(values.r[0]) == pytest.approx(float(RidgeReadout()(x_NP, y_NS[:, 0]).r), abs=ulps(1000, F64))
    alone = RidgeReadout()(x_NP[valid], y_NS[valid, 1])
    assert float(values.r[1]) == pytest.approx(float(alone.r), abs=ulps(1000, F64))
    assert (values.fold[~valid, 1] == -1).all()
    x_NP[::3] = torch.nan  # and what nobody reads may be anything
    assert float(RidgeReadout()(x_NP, y_NS[:, 1]).r) == pytest.approx(float(alone.r), abs=ulps(1000, F64))


def test_constant_and_short_targets_have_no_r() -> None:
    x_NP, y_N = normal(100, 4), normal(100, seed=1)
    assert RidgeReadout()(x_NP, torch.full((100,), 0.1)).r.isnan()
    few = torch.where(torch.arange(100) < 19, y_N, torch.nan)
    assert RidgeReadout()(x_NP, few).r.isnan()
    assert float(RidgeReadout()(torch.ones(100, 4) * 0.1, y_N).r) == 0.0  # features that say nothing
    x_NP[50, 2] = torch.nan
    assert RidgeReadout()(x_NP, y_N).r.isnan()


def test_permuted_rows_have_no_r() -> None:
    x_NP = normal(6000, 20)
    y_NS = x_NP[:, :8] + 0.5 * normal(6000, 8, seed=1)
    order = torch.randperm(6000, generator=torch.Generator().manual_seed(2))
    assert float(RidgeReadout()(x_NP, y_NS).r.min()) > 0.8
    assert float(RidgeReadout()(x_NP[order], y_NS).r.mean().abs()) < 0.03


def test_bins_are_targets_like_others() -> None:
    x_NP, y_NST = normal(100, 5), normal(100, 2, 3, seed=1)
    y_NST += x_NP[:, :1, None]
    values = RidgeReadout()(x_NP, y_NST)
    assert values.r.shape == (2, 3) and values.predicted.shape == (100, 2, 3)
    assert values.r[1].tolist() == pytest.approx(RidgeReadout()(x_NP, y_NST[:, 1]).r.tolist(), abs=ulps(1000, F64))


# projection ----------------------------------------------------------------------------------------------------


def test_a_sparse_projection_preserves_distances() -> None:
    x_NP = normal(40, 6000)
    size = projected_size(40)
    y_NJ = sparse_projection(x_NP, seed=3)
    assert y_NJ.shape == (40, size) and size < 6000
    ratio = torch.pdist(y_NJ) / torch.pdist(x_NP)
    assert float(ratio.min()) > 0.9 and float(ratio.max()) < 1.1
    assert torch.equal(y_NJ, sparse_projection(x_NP, seed=3))
    assert not torch.allclose(y_NJ, sparse_projection(x_NP, seed=4))
    r_PJ = sparse_projection(torch.eye(400, dtype=torch.float64), size=100)
    assert float((r_PJ != 0).double().mean()) == pytest.approx(1 / 20, abs=statistical(0.218, 40_000))
    assert float(r_PJ[r_PJ != 0].abs().unique()) == pytest.approx((20 / 100) ** 0.5, rel=ulps(4, F64))
    torch.testing.assert_close(sparse_projection(x_NP[:, :400], size=100), x_NP[:, :400] @ r_PJ, **rounding(400, F64))


def test_few_features_are_left_as_they_are() -> None:
    x_NP = normal(40, 30)
    assert sparse_projection(x_NP) is x_NP
    wide = normal(60, 9000)
    y_N = wide[:, :3000].sum(1)
    projected = RidgeReadout(seed=1)(wide, y_N)
    by_hand_first = RidgeReadout(eps=None)(sparse_projection(wide, seed=1), y_N)
    assert float(projected.r) == float(by_hand_first.r) != float(RidgeReadout(eps=None)(wide, y_N).r)


# contrasts -----------------------------------------------------------------------------------------------------


def read(x: Tensor | Products, y: Tensor) -> Any:
    return RidgeReadout()(x, y)


def test_resampled_r_equals_a_loop_over_drawn_rows() -> None:
    x_NP, y_NS = normal(90, 5), normal(90, 2, seed=1)
    y_NS += x_NP[:, :2]
    y_NS[::4, 1] = torch.nan
    values, contrast = read(x_NP, y_NS), ModelContrast(resamples=6)
    count_RN = contrast.counts(90)
    assert count_RN.sum(1).tolist() == [90.0] * 6
    r_RS = contrast.resample(values)
    for r in range(6):
        drawn = torch.arange(90).repeat_interleave(count_RN[r].long())
        for s in range(2):
            rs = []
            for k in range(5):
                rows = drawn[values.fold[drawn, s] == k]
                pair = torch.stack([values.predicted[rows, s], values.truth[rows, s]])
                rs.append(float(torch.corrcoef(pair)[0, 1]))
            assert float(r_RS[r, s]) == pytest.approx(sum(rs) / 5, abs=ulps(1000, F64))


def test_models_are_resampled_by_the_same_stimuli() -> None:
    """Two models that differ by little: paired, the difference is far surer than either r."""
    y_NS, noise_NS = normal(400, 4), normal(400, 4, seed=1)
    a, b = (read(y_NS + scale * noise_NS, y_NS) for scale in (1.0, 1.15))
    contrast = ModelContrast()
    tails = torch.tensor([0.025, 0.975], dtype=torch.float64)
    low_S, high_S = contrast.resample(a).nanquantile(tails, dim=0)
    assert ((low_S < a.r) & (a.r < high_S)).all()
    assert (high_S - low_S).min() > (a.r - b.r).max()  # the confidence intervals of the two overlap
    assert contrast.beats(a, b).all() and not contrast.beats(b, a).any()
    paired = (contrast.resample(a) - contrast.resample(b)).std(0)
    apart = (contrast.resample(a) - ModelContrast(seed=1).resample(b)).std(0)
    assert (paired < apart / 2).all()


def test_p_counts_the_resamples_that_are_no_win() -> None:
    y_NS = normal(100, 3)
    a, b = read(y_NS + normal(100, 3, seed=1), y_NS), read(y_NS + normal(100, 3, seed=2), y_NS)
    contrast = ModelContrast(resamples=99)
    wins = (contrast.resample(a) > contrast.resample(b)).sum(0)
    assert contrast.p_value(a, b).tolist() == pytest.approx([(100 - int(w)) / 100 for w in wins], abs=ulps(4, F64))
    assert contrast.p_value(a, a).tolist() == [1.0] * 3  # a tie is no win
    broken = read(normal(100, 3).fill_(torch.nan), y_NS)
    assert contrast.p_value(broken, b).tolist() == contrast.p_value(a, broken).tolist() == [1.0] * 3


def test_false_discoveries_against_a_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    for m in (1, 2, 7, 40):
        for _ in range(20):
            p = torch.rand(m, generator=generator) ** 3
            order = sorted(range(m), key=lambda i: float(p[i]))
            last = max((k for k in range(1, m + 1) if float(p[order[k - 1]]) <= 0.1 * k / m), default=0)
            wanted = [i in order[:last] for i in range(m)]
            assert benjamini_hochberg(p.double(), 0.1).tolist() == wanted
    assert benjamini_hochberg(torch.rand(4, 6, generator=generator), 0.1).shape == (4, 6)


def test_bins_make_a_site_by_their_number() -> None:
    y_NST = normal(200, 2, 4, seed=1)
    x_NP = torch.cat([y_NST[:, 0, :3], normal(200, 2, seed=2)], dim=1)  # three of the first site's four bins
    a, b = read(x_NP, y_NST), read(normal(200, 5, seed=3), y_NST)
    assert ModelContrast(bins=3).beats(a, b).tolist() == [True, False]
    assert ModelContrast(bins=4).beats(a, b).tolist() == [False, False]


def planted(n: int = 1500, s: int = 20) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Visual and text features, and targets by kind: what each of them is made of is known."""
    v_NP, t_NP = normal(n, 8), normal(n, 8, seed=1)
    mix_v, mix_t, noise_NS = normal(8, s, seed=2), normal(8, s, seed=3), normal(n, s, seed=4)
    v_NS, t_NS = v_NP @ mix_v / 8**0.5, t_NP @ mix_t / 8**0.5
    kinds = {"v": v_NS + noise_NS, "t": t_NS + noise_NS, "x": v_NS * t_NS + noise_NS, "0": noise_NS}
    # towers see mixtures of what is there, in more features
    return v_NP @ normal(8, 24, seed=5) + normal(n, 24, seed=6) / 2, t_NP @ normal(8, 24, seed=7), kinds


@pytest.mark.slow
def test_only_fused_features_find_where_two_modalities_meet() -> None:
    x_a_NP, x_b_NP, kinds = planted()
    contrast, share = ModelContrast(), {}
    for kind, y_NS in kinds.items():
        a, b, concat = (read(x, y_NS) for x in (x_a_NP, x_b_NP, torch.cat([x_a_NP, x_b_NP], 1)))
        fused = read(Products(x_a_NP, x_b_NP, components=8), y_NS)
        share[kind] = (
            float(contrast.integration(fused, a, b, concat).double().mean()),
            float(contrast.integration(concat, a, b).double().mean()),
        )
    assert share["x"][0] >= 0.75 and share["x"][1] <= 0.1
    assert max(share["v"][0], share["t"][0]) <= 0.1  # what one modality says is no meeting
    assert max(share["0"]) <= 0.05


def test_concatenated_features_find_additive_targets() -> None:
    x_a_NP, x_b_NP, kinds = planted(s=10)
    y_NS = kinds["v"] + kinds["t"]
    a, b, concat = (read(x, y_NS) for x in (x_a_NP, x_b_NP, torch.cat([x_a_NP, x_b_NP], 1)))
    contrast = ModelContrast()
    assert contrast.integration(concat, a, b).all()
    assert not contrast.integration(concat, a, b, concat).any()


def test_noise_is_flagged_at_most_at_its_rate() -> None:
    y_NS = normal(600, 200, seed=9)
    models = [read(normal(600, 10, seed=seed), y_NS) for seed in (1, 2)]
    assert float(ModelContrast().beats(*models).double().mean()) <= 0.05


def test_products_are_of_components_of_the_training_rows() -> None:
    x_a_NP, x_b_NP = normal(50, 4), normal(50, 6, seed=1)
    train_T = torch.arange(30)
    products, moved = Products(x_a_NP, x_b_NP, 2), x_a_NP.clone()
    moved[40:] *= 100
    x_NP = products(train_T)
    assert x_NP.shape == (50, 4 + 6 + 4)
    torch.testing.assert_close(Products(moved, x_b_NP, 2)(train_T)[:40], x_NP[:40], **rounding(512, F64))
    z_TP = (x_a_NP[:30] - x_a_NP[:30].mean(0)) / x_a_NP[:30].std(0, correction=0)
    u, _, _ = torch.linalg.svd(z_TP, full_matrices=False)
    z_b_TP = (x_b_NP[:30] - x_b_NP[:30].mean(0)) / x_b_NP[:30].std(0, correction=0)
    w, _, _ = torch.linalg.svd(z_b_TP, full_matrices=False)
    wanted = 30 * u[:, 0] * w[:, 1]
    torch.testing.assert_close(x_NP[:30, 11].abs(), wanted.abs(), **rounding(1000, F64))


@pytest.mark.parametrize(
    ("call", "line"),
    [
        (lambda: RidgeReadout(alphas=[]), "alphas \\[\\]: at least one"),
        (lambda: RidgeReadout(alphas=[0.0]), "alphas \\[0.0\\]: at least one, all positive"),
        (lambda: RidgeReadout(folds=1), "folds 1: 2 is the least"),
        (lambda: RidgeReadout(eps=1.5), "eps 1.5 is not between 0 and 1"),
        (lambda: RidgeReadout()(torch.zeros(3, 1), torch.zeros(4)), "y has 4 stimuli, x has 3"),
        (lambda: ModelContrast(resamples=0), "resamples 0: 1 is the least"),
        (lambda: ModelContrast(fdr=1.0), "fdr 1.0 is not between 0 and 1"),
        (lambda: ModelContrast(bins=0), "bins 0: 1 is the least"),
        (lambda: Products(torch.zeros(3, 1), torch.zeros(3, 1), 0), "components 0: 1 is the least"),
        (lambda: Products(torch.zeros(3, 1), torch.zeros(4, 1)), "x_b_NP: 4 stimuli, x_a_NP 3"),
        (
            lambda: ModelContrast().p_value(
                read(normal(50, 2), normal(50, 1)), read(normal(50, 2), normal(50, 1, seed=1))
            ),
            "tested on different stimuli",
        ),
    ],
)
def test_bad_arguments_are_one_line(call: Any, line: str) -> None:
    with pytest.raises(ValueError, match=line):
        call()


def test_pearson_equals_numpy() -> None:
    p_HS, y_HS = normal(30, 2), normal(30, 2, seed=1)
    wanted = [float(np.corrcoef(p_HS[:, s], y_HS[:, s])[0, 1]) for s in range(2)]
    # deviations of 1e-6 around 5
    assert pearson(1e-6 * p_HS + 5, y_HS).tolist() == pytest.approx(wanted, abs=conditioned(5e6, F64))
