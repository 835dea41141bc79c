"""Statistics of reconstruction: baselines that need no model, fitted on a bank, and R2 and PSNR against them.

Letters: B rows of a batch, C channels, F, T bins and frames, K bins of a baseline, L patches, P, Q numbers of a given
and of a target patch.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from descant.modules.core.batch import append_axes
from descant.modules.evaluation.metrics import psnr, ridge_weights, wide

BINS = 10  # bins of the mean of an input


class Nulls(NamedTuple):
    """Predictions of a target without a model, fitted on the bank by :class:`NullFit`.

    ``mean``: the mean target ``[...]``. ``bins``: given modality -> edges ``[K - 1]`` of its mean and the mean target
    of each bin ``[K, ...]``. ``ridge``: weights ``[1 + P, Q]`` from given patches to the patch in the same place, or
    None. ``span``: the largest minus the smallest number of a target. ``classes``: number of categories of a given
    modality. ``patch``: side of a patch.
    """

    mean: Tensor
    bins: dict[str, tuple[Tensor, Tensor]]
    ridge: Tensor | None
    span: Tensor
    classes: dict[str, int]
    patch: int

    def predictions(self, given: Mapping[str, Tensor], x_B: Tensor) -> dict[str, Tensor]:
        """Return predictor -> prediction ``[B, ...]``, or a tensor that broadcasts to it."""
        sample_mean_B = append_axes(row_means(x_B).to(x_B), x_B)
        predictions = {"mean": self.mean, "sample mean": sample_mean_B}
        for m, (edge, mean_K) in self.bins.items():
            predictions[f"bins {m}"] = mean_K[torch.bucketize(row_means(given[m]), edge)]
        if self.ridge is not None:
            patches = _patches(given, x_B, self.classes, self.patch)
            assert patches is not None
            given_LP = patches[0].nan_to_num(0.0, 0.0, 0.0)
            predictions["ridge"] = _unpatch(self.ridge[0] + given_LP @ self.ridge[1:], x_B, self.patch)
        return predictions

    def scores(self, error: Mapping[str, Tensor], sham: bool) -> dict[str, Tensor]:
        """Compute R2 and PSNR by key; each key has a place ``{}`` for ``target_from_given``.

        Args:
            error: summed squared errors of these predictions, of ``model`` and of ``shuffled``; ``count`` of numbers.
            sham: whether other content can be given, so that ``shuffled`` means something.
        """
        mse = {name: e / error["count"] for name, e in error.items()}
        r2 = {name: 1 - e / error["mean"] for name, e in error.items()}
        best = torch.stack([r2[name] for name in ("mean", *(f"bins {m}" for m in self.bins))]).amax()
        values = {"r2_{}": r2["model"], "r2_{}_null": best, "psnr_{}": psnr(mse["model"], self.span)}
        if sham:
            values["r2_{}_shuffled"] = r2["shuffled"]
            values["r2_{}_gain"] = r2["model"] - best.maximum(r2["shuffled"])
        if self.ridge is not None:
            values["r2_{}_ridge"], values["psnr_{}_ridge"] = r2["ridge"], psnr(mse["ridge"], self.span)
        if self.mean.ndim == 4:
            values["psnr_{}_over_mean"] = 10 * (mse["sample mean"] / mse["model"]).log10()
        return values


class NullFit:
    """Sums over the bank from which :class:`Nulls` of one target are computed.

    Args:
        edges: given modality -> edges of the bins of its mean.
        classes: number of categories of a given modality.
        patch: side of a patch.

    >>> fit = NullFit({}, {}, patch=2)
    >>> fit.add(torch.tensor([[[[0.0, 4.0]]], [[[2.0, 0.0]]]]), {})
    >>> nulls = fit.fit(lambda sums, how: sums, l2=0.0)
    >>> nulls.mean.tolist(), nulls.span.item()
    ([[[1.0, 2.0]]], 4.0)
    """

    def __init__(self, edges: dict[str, Tensor], classes: dict[str, int], patch: int) -> None:
        self.edges, self.classes, self.patch = edges, classes, patch
        self.sums: dict[str, Tensor] = {}
        self.bounds: Tensor | None = None
        self.numbers = 0  # Q

    def _sum(self, name: str, value: Tensor) -> None:
        self.sums[name] = value if name not in self.sums else self.sums[name] + value

    def add(self, x_B: Tensor, given: Mapping[str, Tensor]) -> None:
        """Add rows that have the target and all given modalities; zero rows are fine."""
        x_B = x_B.to(wide(x_B.device))
        real_B = x_B.isfinite()
        x_0_B, n_B = torch.where(real_B, x_B, 0.0), real_B.to(x_B)
        self._sum("x", x_0_B.sum(0))
        self._sum("n", n_B.sum(0))
        for m, edge in self.edges.items():
            bin_B = torch.bucketize(row_means(given[m]), edge)
            zero_K = x_B.new_zeros(BINS, *x_B.shape[1:])
            self._sum(f"x {m}", zero_K.index_add(0, bin_B, x_0_B))
            self._sum(f"n {m}", zero_K.index_add(0, bin_B, n_B))
        infinite_1 = x_B.new_full((1,), -torch.inf)
        bounds = torch.stack([torch.cat([s[real_B], infinite_1]).amax() for s in (x_B, -x_B)])
        self.bounds = bounds if self.bounds is None else bounds.maximum(self.bounds)
        patches = _patches(given, x_B, self.classes, self.patch)
        if patches is not None:
            self.numbers = patches[1].shape[1]
            all_LR = torch.cat([torch.ones_like(patches[0][:, :1]), *patches], dim=1)
            all_LR = all_LR[all_LR.isfinite().all(1)]
            self._sum("moments", all_LR.T @ all_LR)

    def fit(self, reduce: Callable[[Tensor, str], Tensor], l2: float) -> Nulls:
        """Compute the predictions from the sums; ``reduce(value, "sum" or "max")`` reduces over ranks."""
        sums = {name: reduce(value, "sum") for name, value in self.sums.items()}
        mean, bins = sums["x"] / sums["n"].clamp(min=1), {}
        for m, edge in self.edges.items():
            n_K = sums[f"n {m}"]
            bins[m] = edge, torch.where(n_K > 0, sums[f"x {m}"] / n_K.clamp(min=1), mean)
        moments = sums.get("moments")
        ridge = None if moments is None else ridge_weights(moments, len(moments) - 1 - self.numbers, l2)
        assert self.bounds is not None
        return Nulls(mean, bins, ridge, reduce(self.bounds, "max").sum(), self.classes, self.patch)


def row_means(x: Tensor) -> Tensor:
    """Compute the mean over the finite numbers of each row, float32 ``[B]``; 0 without any."""
    x = x.flatten(1).to(wide(x.device))
    real = x.isfinite()
    return (torch.where(real, x, 0.0).sum(1) / real.sum(1).clamp(min=1)).float()


def deciles(mean_N: Tensor) -> Tensor:
    """Compute the nine edges of ten bins of equal counts."""
    return mean_N.quantile(torch.arange(1, BINS, device=mean_N.device) / BINS)


def _extent(x_B: Tensor) -> tuple[int, ...]:
    """Return the sizes of a target's axes: both of ``[B, F, T]``, or those after the channels of ``[B, C, ...]``."""
    return tuple(x_B.shape[1:] if x_B.ndim == 3 else x_B.shape[2:])


def _channels(x: Tensor, extent: tuple[int, ...], classes: int | None) -> Tensor | None:
    """Return the input as ``[B, C, ...]`` of this extent, categories as one-hot; None if it has another extent."""
    if x.shape[1:] == extent:
        x = x.unsqueeze(1)
    if x.shape[2:] != extent:
        return None
    if x.is_floating_point():
        return x
    if classes is None or x.shape[1] != 1:
        return None
    known = (x >= 0) & (x < classes)  # a category that is not in the bank gets zeros
    return (F.one_hot(x.clamp(0, classes - 1), classes) * known[..., None]).squeeze(1).movedim(-1, 1)


def _patches(
    given: Mapping[str, Tensor], x_B: Tensor, classes: Mapping[str, int], patch: int
) -> tuple[Tensor, Tensor] | None:
    """Cut patches ``[L, P]`` of given inputs that have the target's extent, and ``[L, Q]`` of the target; or None."""
    extent = _extent(x_B)
    channels = [_channels(x, extent, classes.get(m)) for m, x in given.items()]
    aligned = [x.to(x_B) for x in channels if x is not None]
    if not extent or not aligned:
        return None
    wrong = [side for side in extent if side % patch]
    if wrong:
        near = next(p for p in range(patch, 0, -1) if all(side % p == 0 for side in extent))
        raise ValueError(f"Reconstruction: patch {patch} does not divide {wrong[0]}; {near} does")
    return _patch(torch.cat(aligned, dim=1), patch), _patch(x_B.reshape(len(x_B), -1, *extent), patch)


def _patch(x_BC: Tensor, patch: int) -> Tensor:
    """Cut patches, ``[B, C, ...] -> [L, C patch^d]``, L = B times the patches of a sample."""
    extent = x_BC.shape[2:]
    sides = itertools.chain.from_iterable((side // patch, patch) for side in extent)
    x = x_BC.reshape(*x_BC.shape[:2], *sides)
    d = len(extent)
    x = x.permute(0, *range(2, 2 + 2 * d, 2), 1, *range(3, 3 + 2 * d, 2))
    return x.reshape(len(x_BC) * (extent.numel() // patch**d), x_BC.shape[1] * patch**d)


def _unpatch(y_LQ: Tensor, x_B: Tensor, patch: int) -> Tensor:
    """Invert the cutting of patches, in the shape of ``x_B``."""
    extent = _extent(x_B)
    d, grid = len(extent), [side // patch for side in extent]
    y = y_LQ.reshape(len(x_B), *grid, y_LQ.shape[1] // patch**d, *[patch] * d)
    y = y.permute(0, 1 + d, *itertools.chain.from_iterable((1 + i, 2 + d + i) for i in range(d)))
    return y.reshape(x_B.shape)
