"""Out-of-distribution detection by distances in an embedding space, without labels.

Letters: Q rows to score, N of the reference, M out of distribution, D width, R rows of one chunk, k neighbours.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from descant.modules.core.errors import require_value
from descant.modules.evaluation.metrics import CELLS, wide


class Detector:
    """Base of the detectors: score each row, higher if it is further from the reference.

    ``name``: the name under which its metrics are logged.
    """

    name: str

    def __call__(self, z_QD: Tensor, z_ND: Tensor) -> Tensor:
        """Compute ``score_Q`` of rows, given the reference rows ``z_ND``; nan if there is no distance."""
        raise NotImplementedError


class Mahalanobis(Detector):
    """Mahalanobis distance to one Gaussian of the reference (SSD, Sehwag 2021, arXiv 2103.12051, with one cluster).

        score = (z - mean)' (Sigma + shrink v I)^-1 (z - mean),    v: the mean variance, tr(Sigma) / D

    Args:
        shrink: shrinkage of the covariance, which features without full rank need (our choice).

    >>> z_ND = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 2.0], [0.0, -2.0]], dtype=torch.float64)
    >>> score_Q = Mahalanobis(shrink=1e-9)(torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.0, 4.0]]), z_ND)
    >>> score_Q.round(decimals=6).tolist()  # variances 1/2 and 2
    [2.0, 2.0, 8.0]
    """

    name = "mahalanobis"

    def __init__(self, shrink: float = 1e-3) -> None:
        require_value(shrink > 0, f"Mahalanobis: shrink {shrink:g} is not positive")
        self.shrink = shrink

    def __call__(self, z_QD: Tensor, z_ND: Tensor) -> Tensor:
        x_ND = z_ND.to(wide(z_ND.device))
        mean_D = x_ND.mean(dim=0)
        x_ND, x_QD = x_ND - mean_D, z_QD.to(x_ND) - mean_D
        sigma_DD = x_ND.T @ x_ND / len(x_ND)
        ridge = self.shrink * sigma_DD.diagonal().mean()
        if not bool(ridge.isfinite()) or ridge == 0:  # a broken or a collapsed encoder has no distances
            return x_QD.new_full((len(x_QD),), torch.nan)
        factor_DD = torch.linalg.cholesky(sigma_DD + ridge * torch.eye(len(mean_D)).to(sigma_DD))
        return torch.linalg.solve_triangular(factor_DD, x_QD.T, upper=False).square().sum(0)


class NearestNeighbours(Detector):
    """Distance to the k-th nearest row of the reference, with rows scaled to unit length (Sun 2022, arXiv 2204.06507).

        score = || z / ||z|| - z_(k) / ||z_(k)|| ||

    Args:
        k: the neighbour whose distance counts; if there are fewer rows, the farthest one.

    >>> z_ND = torch.tensor([[1.0, 0.0], [0.0, 3.0], [-1.0, 0.0]])
    >>> round(NearestNeighbours(k=2)(torch.tensor([[2.0, 0.0]]), z_ND).item(), 4)
    1.4142
    """

    name = "knn"

    def __init__(self, k: int = 50) -> None:
        require_value(k >= 1, f"NearestNeighbours: k {k} is no number of neighbours; 1 is the least")
        self.k = k

    def __call__(self, z_QD: Tensor, z_ND: Tensor) -> Tensor:
        unit_ND, k = F.normalize(z_ND, dim=1), min(self.k, len(z_ND))
        chunks = F.normalize(z_QD, dim=1).split(max(CELLS // max(len(z_ND), 1), 1))
        near = [(z_RD @ unit_ND.T).topk(k, dim=1).values[:, -1] for z_RD in chunks]
        return (2 - 2 * torch.cat(near)).clamp(min=0).sqrt()


def auroc_shares(score_N: Tensor, score_out_M: Tensor) -> Tensor:
    """Compute each row's share of out-of-distribution rows that score higher, ties by half; its mean is the AUROC.

        share_n = 1/M sum_m [s_m > s_n] + [s_m = s_n] / 2

    Shapes: ``score_N, score_out_M -> [N]`` float64 (float32 if the device lacks float64); nan if any score is nan.

    >>> auroc_shares(torch.tensor([1.0, 2.0, 5.0]), torch.tensor([2.0, 4.0])).tolist()
    [1.0, 0.75, 0.0]
    """
    dtype = wide(score_N.device)
    if bool(score_N.isnan().any() | score_out_M.isnan().any()):
        return torch.full_like(score_N, torch.nan, dtype=dtype)
    sorted_M = score_out_M.sort().values
    below_N = torch.searchsorted(sorted_M, score_N.contiguous())
    up_to_N = torch.searchsorted(sorted_M, score_N.contiguous(), right=True)
    return 1 - (below_N + up_to_N).to(dtype) / (2 * len(score_out_M))
