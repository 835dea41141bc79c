"""Linear readout: cross-validated ridge regression on features, and significance tests between two models.

Ridge regression on contiguous folds, and a paired bootstrap with a false discovery rate (Subramaniam et al. 2024,
arXiv 2406.14481). Everything is computed in float64 (float32 if the device lacks float64).
Letters: N stimuli, P features, S sites (the columns of a target), K folds, A alphas, R resamples, J projected features,
E eigenvalues, Q principal components, T training rows, H held-out rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from descant.modules.core.errors import require_value
from descant.modules.core.rng import mix, uniform_N
from descant.modules.evaluation.metrics import CELLS, wide

ALPHAS = (0.1, 1.0, 10.0, 100.0, 1e3, 1e4, 1e5)


class Reading(NamedTuple):
    """Results of a readout; ``...`` is the shape of a target without its rows: nothing, ``[S]`` or ``[S, bins]``.

    ``r [...]``, its values by fold ``r_fold [K, ...]``, and the selected strength ``alpha [K, ...]``. By stimulus:
    ``predicted [N, ...]`` and ``truth [N, ...]``, nan if not tested, and ``fold [N, ...]`` int64, -1 if not tested.
    """

    r: Tensor
    r_fold: Tensor
    alpha: Tensor
    predicted: Tensor
    truth: Tensor
    fold: Tensor


class Products:
    """Fused features: two feature sets, concatenated with the products of their leading principal components.

        [x_a, x_b, c_a (x) c_b],   c = the first Q principal components of z-scored features, of unit variance

    A linear readout of these can use interactions; a readout of the concatenation alone cannot. The components are
    computed from the training rows.

    Args:
        x_a_NP, x_b_NP: features of the same stimuli; their widths may differ.
        components: Q.

    >>> x_a_NP, x_b_NP = torch.randn(9, 4), torch.randn(9, 6)
    >>> Products(x_a_NP, x_b_NP, components=3)(torch.arange(5)).shape
    torch.Size([9, 19])
    """

    def __init__(self, x_a_NP: Tensor, x_b_NP: Tensor, components: int = 16) -> None:
        require_value(components >= 1, f"components {components}: 1 is the least")
        if len(x_a_NP) != len(x_b_NP):
            raise ValueError(f"x_b_NP: {len(x_b_NP)} stimuli, x_a_NP {len(x_a_NP)}; both sets need the same ones")
        self.parts, self.components = (x_a_NP, x_b_NP), components

    def __call__(self, train_T: Tensor) -> Tensor:
        """Compute the features ``[N, P_a + P_b + Q_a Q_b]``, with statistics of a fold's training rows."""
        parts = [standardise(x_NP.to(wide(x_NP.device)), train_T) for x_NP in self.parts]
        a_NQ, b_NQ = (self._components(x_NP, train_T) for x_NP in parts)
        return torch.cat([*parts, (a_NQ[:, :, None] * b_NQ[:, None]).flatten(1)], dim=1)

    def _components(self, x_NP: Tensor, train_T: Tensor) -> Tensor:
        x_TP = x_NP[train_T]
        value_P, vector_PP = torch.linalg.eigh(x_TP.T @ x_TP / len(x_TP))
        q = int((value_P > 1e-9 * value_P[-1].clamp(min=1e-9)).sum().clamp(max=self.components))
        value_Q, vector_PQ = value_P.flip(0)[:q], vector_PP.flip(1)[:, :q]
        return x_NP @ (vector_PQ / value_Q.sqrt())


class RidgeReadout:
    """Cross-validated ridge regression of every target on features (encoding models).

        w_s, b_s = argmin ||X w + b - y_s||^2 + alpha_s ||w||^2,    r_s = mean over folds of Pearson r on its test half

    A target's valid rows (those that are not nan) are split into contiguous folds, without shuffling, because
    neighbours in time or class must not be on both sides. Half of a held-out block is for validation, which selects
    alpha by r, and half for the test. Each target has one alpha, by its mean r over folds, as in the authors' release,
    or one alpha per fold (our variant). Features are z-scored by the training rows; the intercept is not penalized
    (in the paper's code it is). One eigendecomposition per fold, of the smaller Gram matrix, serves all alphas and
    targets. If features are not finite, r is nan.

    Args:
        alphas: values to select from.
        folds: K.
        eps: features beyond the Johnson-Lindenstrauss size for this distortion are projected first
            (:func:`sparse_projection`); None: never.
        seed: seed of the projection.
        select: one alpha for each ``target``, or for each target of a ``fold``.

    Shapes: ``x_NP`` (or :class:`Products`), ``y [N]``, ``[N, S]`` or ``[N, S, bins]`` ``-> Reading``. r is nan for a
    target that is constant or has fewer than four valid rows per fold, and 0 for a constant prediction.

    >>> x_NP = torch.linspace(-1, 1, 40)[:, None].sin()
    >>> round(float(RidgeReadout()(x_NP, 3 * x_NP[:, 0] + 1).r), 6)
    1.0
    """

    def __init__(
        self,
        alphas: Sequence[float] = ALPHAS,
        folds: int = 5,
        eps: float | None = 0.1,
        seed: int = 0,
        select: Literal["target", "fold"] = "target",
    ) -> None:
        require_value(alphas and min(alphas) > 0, f"alphas {list(alphas)}: at least one, all positive, such as 0.1")
        require_value(folds >= 2, f"folds {folds}: 2 is the least")
        if eps is not None and not 0 < eps < 1:
            raise ValueError(f"eps {eps} is not between 0 and 1; the paper has 0.1")
        self.alphas, self.folds, self.eps, self.seed, self.select = tuple(alphas), folds, eps, seed, select

    def __call__(self, x: Tensor | Products, y: Tensor) -> Reading:
        rows = len(x) if isinstance(x, Tensor) else len(x.parts[0])
        if rows != len(y):
            raise ValueError(f"y has {len(y)} stimuli, x has {rows}")
        y_NS = y.to(wide(y.device)).reshape(len(y), -1)
        if isinstance(x, Tensor):
            x = x.to(y_NS)
            x = x if self.eps is None else sparse_projection(x, eps=self.eps, seed=self.seed)
        reading = Reading(
            r=y_NS.new_full(y_NS.shape[1:], torch.nan),
            r_fold=y_NS.new_full((self.folds, y_NS.shape[1]), torch.nan),
            alpha=y_NS.new_full((self.folds, y_NS.shape[1]), torch.nan),
            predicted=torch.full_like(y_NS, torch.nan),
            truth=torch.full_like(y_NS, torch.nan),
            fold=torch.full_like(y_NS, -1, dtype=torch.long),
        )
        # targets with the same valid rows are solved together
        masks_GN, group_S = y_NS.isfinite().T.unique(dim=0, return_inverse=True)
        for group, mask_N in enumerate(masks_GN):
            rows_V, columns = mask_N.nonzero().squeeze(1), (group_S == group).nonzero().squeeze(1)
            if len(rows_V) >= 4 * self.folds:
                self._read(x, y_NS, rows_V, columns, reading)
        reading.r.copy_(reading.r_fold.nanmean(0))
        return Reading(*(value.reshape((*value.shape[:-1], *y.shape[1:])) for value in reading))

    def _read(self, x: Tensor | Products, y_NS: Tensor, rows_V: Tensor, columns: Tensor, reading: Reading) -> None:
        """Fill in the results of targets with the same valid rows."""
        tests, predictions, selections = zip(
            *(self._fold(k, x, y_NS, rows_V, columns) for k in range(self.folds)), strict=True
        )
        select_KAS = torch.stack(selections)
        if self.select == "target":
            select_KAS = select_KAS.nanmean(0).expand_as(select_KAS)
        best_KS = select_KAS.nan_to_num(-torch.inf).argmax(1)
        reading.alpha[:, columns] = y_NS.new_tensor(self.alphas)[best_KS]
        for k, (test_h, predicted_AhS) in enumerate(zip(tests, predictions, strict=True)):
            predicted_hS = predicted_AhS[best_KS[k], :, torch.arange(len(columns), device=best_KS.device)].T
            place, truth_hS = (test_h[:, None], columns), y_NS[test_h][:, columns]
            reading.r_fold[k, columns] = pearson(predicted_hS, truth_hS)
            reading.predicted[place], reading.truth[place] = predicted_hS, truth_hS
            reading.fold[place] = torch.tensor(k, device=reading.fold.device)

    def _fold(
        self, k: int, x: Tensor | Products, y_NS: Tensor, rows_V: Tensor, columns: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return a fold's test rows, their predictions per alpha ``[A, h, S]``, and r on validation rows ``[A, S]``."""
        first, last = (len(rows_V) * edge // self.folds for edge in (k, k + 1))
        train_T, held_H = torch.cat([rows_V[:first], rows_V[last:]]), rows_V[first:last]
        # held-out rows are transformed only by statistics of the training rows
        x_NP = standardise(x(train_T) if isinstance(x, Products) else x, train_T)
        mean_S = y_NS[train_T][:, columns].mean(0)
        predicted_AHS = mean_S + self._ridge(x_NP[train_T], y_NS[train_T][:, columns] - mean_S, x_NP[held_H])
        middle = len(held_H) // 2
        select_AS = pearson(predicted_AHS[:, :middle], y_NS[held_H[:middle]][:, columns])
        return held_H[middle:], predicted_AHS[:, middle:], select_AS

    def _ridge(self, x_TP: Tensor, y_TS: Tensor, x_HP: Tensor) -> Tensor:
        """Predict centred targets from centred features: ``[A, H, S]``."""
        if not bool(torch.cat([x_TP, x_HP]).isfinite().all()):
            # the eigenvalue solver would raise and end the run
            return y_TS.new_full((len(self.alphas), len(x_HP), y_TS.shape[1]), torch.nan)
        if x_TP.shape[1] <= x_TP.shape[0]:
            value_E, vector_PE = torch.linalg.eigh(x_TP.T @ x_TP)
            left_HE, right_ES = x_HP @ vector_PE, vector_PE.T @ (x_TP.T @ y_TS)
        else:  # the same weights by the dual, w = X' (X X' + alpha)^-1 y
            value_E, vector_TE = torch.linalg.eigh(x_TP @ x_TP.T)
            left_HE, right_ES = x_HP @ (x_TP.T @ vector_TE), vector_TE.T @ y_TS
        alpha_A11 = y_TS.new_tensor(self.alphas)[:, None, None]
        return left_HE @ (right_ES / (value_E.clamp(min=0)[:, None] + alpha_A11))


class ModelContrast:
    """Test of which model predicts better, by site: a paired bootstrap over stimuli with a false discovery rate.

        p_s = (1 + #{resamples: not r_s(a) > r_s(b)}) / (1 + R),   r = mean over folds of Pearson r of the resample

    A resample has the same stimuli for every model and site. Sites are flagged if Benjamini-Hochberg selects them at
    the given rate. A resample in which a model has no r counts against model a. The test covers the sampling of
    stimuli, not that of training runs.

    Args:
        resamples: R.
        fdr: false discovery rate.
        seed: seed of the resamples.
        bins: number of flagged bins that flag a site, if targets are ``[N, S, bins]`` (the paper: 10 of 161).

    >>> y_NS, noise_NS = torch.randn(2, 100, 3, generator=torch.Generator().manual_seed(0)).unbind()
    >>> good, bad = RidgeReadout()(y_NS + 0.1 * noise_NS, y_NS), RidgeReadout()(noise_NS, y_NS)
    >>> ModelContrast().beats(good, bad).tolist(), ModelContrast().beats(bad, good).tolist()
    ([True, True, True], [False, False, False])
    """

    def __init__(self, resamples: int = 1000, fdr: float = 0.05, seed: int = 0, bins: int = 1) -> None:
        require_value(resamples >= 1, f"resamples {resamples}: 1 is the least; the paper has 1000")
        require_value(0 < fdr < 1, f"fdr {fdr} is not between 0 and 1; such as 0.05")
        require_value(bins >= 1, f"bins {bins}: 1 is the least")
        self.resamples, self.fdr, self.seed, self.bins = resamples, fdr, seed, bins
        self._counts = torch.zeros(0, 0, dtype=torch.float64)  # for the last number of stimuli

    def counts(self, stimuli: int) -> Tensor:
        """Count how often a resample has each stimulus, float64 ``[R, N]``; a pure function of the seed and N."""
        if self._counts.shape[1] == stimuli:
            return self._counts
        generator = torch.Generator().manual_seed(mix(self.seed, "bootstrap"))
        drawn_RN = torch.randint(stimuli, (self.resamples, stimuli), generator=generator)
        one_RN = torch.ones(drawn_RN.shape, dtype=torch.float64)
        self._counts = torch.zeros_like(one_RN).scatter_add_(1, drawn_RN, one_RN)
        return self._counts

    def resample(self, reading: Reading) -> Tensor:
        """Compute ``r [R, ...]`` of every resample, by weighted moments; nan if a target is constant in it."""
        dtype, shape = reading.predicted.dtype, reading.r.shape
        p_NS, y_NS, fold_NS = (x.reshape(len(x), -1) for x in (reading.predicted, reading.truth, reading.fold))
        count_RN = self.counts(len(p_NS)).to(p_NS.device, dtype)
        r_KRS = [self._r(count_RN, p_NS, y_NS, fold_NS == k) for k in range(len(reading.r_fold))]
        return torch.stack(r_KRS).nanmean(0).reshape(self.resamples, *shape)

    def _r(self, count_RN: Tensor, p_NS: Tensor, y_NS: Tensor, tested_NS: Tensor) -> Tensor:
        # moments of standardized columns lose no digits
        (p_NS, p_S), (y_NS, y_S) = _standardize(p_NS, tested_NS), _standardize(y_NS, tested_NS)
        moments_6NS = torch.stack([tested_NS.to(p_NS), p_NS, y_NS, p_NS * p_NS, y_NS * y_NS, p_NS * y_NS])
        n_RS, sum_p_RS, sum_y_RS, pp_RS, yy_RS, py_RS = count_RN @ moments_6NS
        n_RS = n_RS.clamp(min=1)
        pp_RS, yy_RS = pp_RS / n_RS - (sum_p_RS / n_RS) ** 2, yy_RS / n_RS - (sum_y_RS / n_RS) ** 2
        py_RS = py_RS / n_RS - sum_p_RS * sum_y_RS / n_RS**2
        varies_RS = (pp_RS > 1e-12) & p_S
        r_RS = torch.where(varies_RS, py_RS / (pp_RS * yy_RS).clamp(min=1e-24).sqrt(), torch.zeros_like(py_RS))
        broken_S = (~p_NS.isfinite()).any(0)
        return r_RS.masked_fill((yy_RS <= 1e-12) | ~y_S | broken_S, torch.nan)

    def p_value(self, a: Reading, b: Reading) -> Tensor:
        """Compute the one-sided ``p [...]``, which is small if a predicts better than b."""
        if not torch.equal(a.fold, b.fold) or not torch.equal(a.truth.nan_to_num(), b.truth.nan_to_num()):
            raise ValueError(
                "ModelContrast: the two models were tested on different stimuli; use the same rows and targets"
            )
        wins = (self.resample(a) > self.resample(b)).sum(0)
        return (1 + self.resamples - wins).to(a.r) / (1 + self.resamples)

    def beats(self, a: Reading, b: Reading) -> Tensor:
        """Return bool ``[S]``: the sites where a predicts better than b."""
        return self.sites(benjamini_hochberg(self.p_value(a, b), self.fdr))

    def sites(self, flagged: Tensor) -> Tensor:
        """Return bool ``[]`` or ``[S]``: whether enough bins of a site are flagged; a site without bins is one bin."""
        return flagged.sum(-1) >= self.bins if flagged.ndim > 1 else flagged

    def integration(self, multi: Reading, vision: Reading, language: Reading, concat: Reading | None = None) -> Tensor:
        """Return bool ``[S]``: sites where ``multi`` beats vision, language and both concatenated, in enough bins."""
        others = [vision, language, *([] if concat is None else [concat])]
        flags = [benjamini_hochberg(self.p_value(multi, other), self.fdr) for other in others]
        return self.sites(torch.stack(flags).all(0))


# helpers -----------------------------------------------------------------------------------------------------------


def standardise(x_NP: Tensor, train_T: Tensor) -> Tensor:
    """Compute z-scores by mean and standard deviation of the training rows; features constant in these become 0.

    >>> standardise(torch.tensor([[1.0, 5.0], [3.0, 5.0], [9.0, 6.0]]), torch.tensor([0, 1])).tolist()
    [[-1.0, 0.0], [1.0, 0.0], [7.0, 0.0]]
    """
    std_P, mean_P = torch.std_mean(x_NP[train_T], dim=0, correction=0)
    varies_P = std_P > 1e-9 * mean_P.abs()
    return torch.where(varies_P, (x_NP - mean_P) / std_P.where(varies_P, torch.ones_like(std_P)), 0.0 * x_NP)


def pearson(p_HS: Tensor, y_HS: Tensor) -> Tensor:
    """Compute Pearson's r over rows, ``[..., H, S], [H, S] -> [..., S]``: nan for constant truth, 0 for constant p.

    >>> y_HS = torch.tensor([[1.0, 4.0], [2.0, 4.0], [3.0, 4.0]], dtype=torch.float64)
    >>> pearson(-2 * y_HS, y_HS).round(decimals=9).tolist(), pearson(torch.ones_like(y_HS), y_HS)[0].item()
    ([-1.0, nan], 0.0)
    """
    tested = torch.ones_like(p_HS[..., :1], dtype=torch.bool)
    (p_HS, p_S), (y_HS, y_S) = _standardize(p_HS, tested), _standardize(y_HS, tested)
    r_S = torch.where(p_S, (p_HS * y_HS).mean(-2), torch.zeros_like(p_HS[..., 0, :]))
    return r_S.clamp(-1, 1).masked_fill(~y_S, torch.nan).where(p_HS.isfinite().all(-2), torch.nan)


def _standardize(x_NS: Tensor, tested_NS: Tensor) -> tuple[Tensor, Tensor]:
    """Scale each column's tested rows to mean 0 and variance 1, others to 0; also return bool ``[S]``: not constant."""
    x_NS = x_NS.where(tested_NS, 0.0)
    size_S = tested_NS.sum(-2, keepdim=True).clamp(min=1)
    large_S = x_NS.abs().amax(-2, keepdim=True)
    x_NS = (x_NS - x_NS.sum(-2, keepdim=True) / size_S).where(tested_NS, 0.0)
    std_S = (x_NS.square().sum(-2, keepdim=True) / size_S).sqrt()
    varies_S = ~(std_S <= 1e-9 * large_S)  # true for nan, which stays nan
    return x_NS / std_S.where(varies_S, torch.ones_like(std_S)), varies_S.squeeze(-2)


def benjamini_hochberg(p: Tensor, fdr: float) -> Tensor:
    """Select the k smallest p, k the largest rank with ``p_(k) <= fdr k / m``, as bool of p's shape.

    Benjamini & Hochberg 1995.

    >>> benjamini_hochberg(torch.tensor([0.03, 0.9, 0.01, 0.02]), 0.05).tolist()
    [True, False, True, True]
    """
    sorted_M, order_M = p.flatten().sort(stable=True)
    rank_M = torch.arange(1, len(sorted_M) + 1, device=p.device)
    kept = (sorted_M <= fdr * rank_M / len(sorted_M)).long() * rank_M
    flagged_M = torch.zeros_like(sorted_M, dtype=torch.bool)
    flagged_M[order_M] = rank_M <= kept.amax()
    return flagged_M.reshape(p.shape)


def projected_size(stimuli: int, eps: float = 0.1) -> int:
    """Compute the Johnson-Lindenstrauss size ``4 ln N / (eps^2 / 2 - eps^3 / 3)``, for distances within 1 +- eps.

    >>> projected_size(1000)
    5920
    """
    return int(4 * math.log(max(stimuli, 2)) / (eps**2 / 2 - eps**3 / 3))


def sparse_projection(x_NP: Tensor, size: int | None = None, eps: float = 0.1, seed: int = 0) -> Tensor:
    """Project more than J features to J by a very sparse random ``x R`` (Li et al. 2006; Achlioptas 2003).

        R_pj = +-sqrt(sqrt(P) / J) with probability 1 / sqrt(P), else 0:   E ||x R||^2 = ||x||^2

    R is a pure function of (seed, p, j). ``x_NP`` is returned as it is if P is at most J.

    Args:
        size: J; by default that of :func:`projected_size`.
        eps: distortion of distances.

    Shapes: ``x_NP -> [N, J]``.

    >>> sparse_projection(torch.ones(5, 9000)).shape, sparse_projection(torch.ones(5, 900)).shape
    (torch.Size([5, 1379]), torch.Size([5, 900]))
    """
    many, size = x_NP.shape[1], projected_size(len(x_NP), eps) if size is None else size
    if many <= size:
        return x_NP
    out_NJ, density = x_NP.new_zeros(len(x_NP), size), many**-0.5
    step = max(CELLS // 4 // size, 1)
    for first in range(0, many, step):
        feature_p1 = np.arange(first, min(first + step, many))[:, None]
        u_pJ = uniform_N(feature_p1, "projection", seed, np.arange(size, dtype=np.uint64))
        sign_pJ = (u_pJ < density).to(x_NP) - 2 * (u_pJ < density / 2).to(x_NP)
        out_NJ += x_NP[:, first : first + step] @ sign_pJ.to(x_NP.device)
    return out_NJ * (many**0.5 / size) ** 0.5
