"""Contrastive losses between two sets of embeddings, one value a sample, over all ranks.

Letters: B samples on this rank, G samples on all ranks, D width.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_gather
from torch.nn import functional as F

from descant.modules.heads import Projection


def gather(x_B: Tensor) -> Tensor:
    """``[B, ...] -> [G, ...]``: the rows of all ranks, in rank order, with true gradients for floats.

    Every rank holds the same B (the sampler pads). Backward adds up what every rank's loss says about a row.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return x_B
    if x_B.is_floating_point():
        return torch.cat(all_gather(x_B))
    parts = [torch.empty_like(x_B) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x_B.contiguous())
    return torch.cat(parts)


def first_row(rows: int) -> int:
    """Where this rank's B rows begin among the G gathered ones."""
    return rows * dist.get_rank() if dist.is_initialized() else 0


def excluded(key_B: Tensor, key_G: Tensor, valid_G: Tensor) -> Tensor:
    """Bool ``[B, G]``: True where column g is no negative of row b, being absent or of the same content.

    The diagonal (a row's own positive) is never excluded, so a row of absent samples stays finite.

    >>> excluded(torch.tensor([7, 7, 8]), torch.tensor([7, 7, 8]), torch.tensor([True, True, False])).int().tolist()
    [[0, 1, 1], [1, 0, 1], [0, 0, 0]]
    """
    out_BG = (key_B[:, None] == key_G[None, :]) | ~valid_G[None, :]
    return _diagonal(out_BG, False)


def _diagonal(x_BG: Tensor, value: bool) -> Tensor:
    rows = torch.arange(x_BG.shape[0], device=x_BG.device)
    x_BG = x_BG.clone()
    x_BG[rows, rows + first_row(len(rows))] = value
    return x_BG


class ContrastiveLoss(nn.Module):
    """``loss(z_a_BD, z_b_BD, key_B, valid_B) -> value_B`` of unit-length embeddings whose rows correspond.

    ``valid_B`` marks the rows where both sides are present: the others are neither rows nor negatives.
    """

    def forward(self, z_a_BD: Tensor, z_b_BD: Tensor, key_B: Tensor, valid_B: Tensor) -> Tensor:
        raise NotImplementedError


class _Scaled(ContrastiveLoss):
    """A loss with a learned, bounded scale of its similarities."""

    def __init__(self, temperature: float, learn: bool, max_scale: float) -> None:
        super().__init__()
        if not 1 / max_scale <= temperature:
            raise ValueError(f"temperature {temperature} is below its bound 1 / max_scale = {1 / max_scale:g}")
        self.max_log_scale = math.log(max_scale)
        self.log_scale = nn.Parameter(torch.tensor(-math.log(temperature)), requires_grad=learn)

    def scale(self) -> Tensor:
        if self.training:
            with torch.no_grad():  # the parameter itself is bounded: clamping in the graph would leave it stuck
                self.log_scale.clamp_(max=self.max_log_scale)
        return self.log_scale.exp()


class InfoNCE(_Scaled):
    """``value_b = -(log softmax_g(s z_a_b.z_b_g)[b] + log softmax_g(s z_b_b.z_a_g)[b]) / 2`` (van den Oord 2018; CLIP).

    The scale ``s`` is learned and bounded. Samples of equal key and absent samples are no negatives.

    Args:
        temperature: 1/s at the start.
        learn: whether the scale is learned.
        max_scale: upper bound of s.

    >>> loss = InfoNCE(temperature=1.0)
    >>> z = torch.eye(2)
    >>> [round(v, 4) for v in loss(z, z, torch.arange(2), torch.ones(2, dtype=torch.bool)).tolist()]
    [0.3133, 0.3133]
    """

    def __init__(self, temperature: float = 0.07, learn: bool = True, max_scale: float = 100.0) -> None:
        super().__init__(temperature, learn, max_scale)

    def forward(self, z_a_BD: Tensor, z_b_BD: Tensor, key_B: Tensor, valid_B: Tensor) -> Tensor:
        with torch.autocast(z_a_BD.device.type, enabled=False):  # s = 100 times a bfloat16 cosine is noise
            z_a_BD, z_b_BD = promote(z_a_BD), promote(z_b_BD)
            out_BG = excluded(key_B, gather(key_B), gather(valid_B))
            scaled_a_BD, scaled_b_BD = z_a_BD * self.scale(), z_b_BD * self.scale()
            ab_B = _cross_entropy(scaled_a_BD @ gather(z_b_BD).T, out_BG)
            ba_B = _cross_entropy(scaled_b_BD @ gather(z_a_BD).T, out_BG)
            return (ab_B + ba_B) / 2


class SigLIP(_Scaled):
    """``value_b = -sum_g log sigmoid(y_bg (s z_a_b.z_b_g + c))``, y = 1 on the diagonal and -1 elsewhere (Zhai 2023).

    Samples of equal key and absent samples are no negatives. Scale and bias are learned.

    Args:
        temperature: 1/s at the start (the paper's 0.1).
        bias: c at the start (the paper's -10).
        max_scale: upper bound of s.
    """

    def __init__(self, temperature: float = 0.1, bias: float = -10.0, max_scale: float = 1000.0) -> None:
        super().__init__(temperature, True, max_scale)
        self.bias = nn.Parameter(torch.tensor(bias))

    def forward(self, z_a_BD: Tensor, z_b_BD: Tensor, key_B: Tensor, valid_B: Tensor) -> Tensor:
        with torch.autocast(z_a_BD.device.type, enabled=False):
            z_a_BD, z_b_BD = promote(z_a_BD), promote(z_b_BD)
            out_BG = excluded(key_B, gather(key_B), gather(valid_B))
            logits_BG = self.scale() * z_a_BD @ gather(z_b_BD).T + self.bias
            positive_BG = _diagonal(torch.zeros_like(out_BG), True)
            value_BG = F.softplus(torch.where(positive_BG, -logits_BG, logits_BG))
            return value_BG.masked_fill(out_BG, 0.0).sum(dim=1)


class Intra(nn.Module):
    """NT-Xent between two views of one modality (SimCLR; the intra-modal term of SLIP, Mu 2021), one value a sample.

    ``value_b`` is the mean over both views of ``-log(exp(s u.v_b) / (exp(s u.v_b) + sum over other rows of both
    views))``, on a projection of its own, so that the shared space is not asked to be invariant twice.

    Args:
        modality: whose two views (``inputs[modality]`` and ``inputs[modality + "@2"]``).
        width: of the modality's tower features. out: of the projection. hidden: of its hidden layer.
        temperature: 1/s, fixed.
    """

    def __init__(
        self,
        width: int,
        modality: str = "image",
        out: int = 128,
        hidden: int = 512,
        temperature: float = 0.1,
    ) -> None:
        super().__init__()
        self.modality, self.scale = modality, 1 / temperature
        self.projection = Projection(width, out, layers=2, hidden=hidden)

    def forward(self, h_1_BD: Tensor, h_2_BD: Tensor, key_B: Tensor, valid_B: Tensor) -> Tensor:
        u_BD, v_BD = (F.normalize(promote(self.projection(h_BD)), dim=-1) for h_BD in (h_1_BD, h_2_BD))
        with torch.autocast(u_BD.device.type, enabled=False):
            out_BG = excluded(key_B, gather(key_B), gather(valid_B))
            same_BG = _diagonal(out_BG, True)  # a view is no negative of itself
            u_GD, v_GD = gather(u_BD), gather(v_BD)
            uv_B = _cross_entropy(self.scale * u_BD @ v_GD.T, out_BG, self.scale * u_BD @ u_GD.T, same_BG)
            vu_B = _cross_entropy(self.scale * v_BD @ u_GD.T, out_BG, self.scale * v_BD @ v_GD.T, same_BG)
            return (uv_B + vu_B) / 2


def _cross_entropy(
    logits_BG: Tensor, out_BG: Tensor, extra_BG: Tensor | None = None, extra_out_BG: Tensor | None = None
) -> Tensor:
    """``logsumexp`` over what is not excluded, less the positive on this rank's diagonal: ``[B]``."""
    rows = torch.arange(len(logits_BG), device=logits_BG.device)
    positive_B = logits_BG[rows, rows + first_row(len(rows))]
    logits_BG = logits_BG.masked_fill(out_BG, -torch.inf)
    if extra_BG is not None and extra_out_BG is not None:
        logits_BG = torch.cat([logits_BG, extra_BG.masked_fill(extra_out_BG, -torch.inf)], dim=1)
    return torch.logsumexp(logits_BG, dim=1) - positive_B


def promote(x: Tensor) -> Tensor:
    """Half precision to float32; float32 and float64 stay."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
