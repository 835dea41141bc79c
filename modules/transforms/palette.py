"""Descriptions of pictures in a few numbers: their dominant colours, and the orientations of their edges.

Letters: B pictures, N pixels, V cells of colour space, M colours, H and W pixels of a side, C cells, O orientations.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from descant.modules.core.host import to_device
from descant.modules.transforms.image import gradient

#: Side of the cells in which pixels of 0..255 are counted; the lowest value of any channel of a background pixel.
_SIDE, _WHITE = 32, 243


def dominant_colours(x_B3HW: Tensor, colours: int = 4, rounds: int = 8) -> Tensor:
    """Find a picture's colours by k-means, the most frequent first: ``[B, M, 3]`` in -1..1, of pixels in -1..1.

        c_m = mean of the pixels nearest to c_m,   begun at the commonest cell of 8 x 8 x 8, then at argmax n_v d_v^2

    with n pixels in cell v, whose mean is d from the nearest colour. Nearly white pixels are background, and count only
    if there are no others. A picture with fewer colours repeats its most frequent one. Sums are of whole numbers, so
    the colours of a picture are bit-identical in any batch and on any device.
    Source: Bachmann 2024 (4M-21, arXiv 2406.09406), dominant colours of pictures; the method is our reading.

    >>> x_B3HW = torch.ones(1, 3, 2, 3)
    >>> x_B3HW[0, 1:, :, 0], x_B3HW[0, :2, 0, 1] = -1, -1
    >>> dominant_colours(x_B3HW, 3).tolist()
    [[[1.0, -1.0, -1.0], [-1.0, -1.0, 1.0], [1.0, -1.0, -1.0]]]
    """
    B, device, V = len(x_B3HW), x_B3HW.device, (256 // _SIDE) ** 3
    x_BN3 = ((x_B3HW.float().flatten(2).transpose(1, 2) + 1) * 127.5).round().clamp(0, 255).long()
    ink_BN = (x_BN3 < _WHITE).any(dim=2)
    ink_BN = (ink_BN | ~ink_BN.any(dim=1, keepdim=True)).long()
    power_3 = to_device(torch.tensor([(256 // _SIDE) ** k for k in range(3)]), device)
    cell_BN = (x_BN3.div(_SIDE, rounding_mode="floor") * power_3).sum(dim=2)
    n_BV, sum_BV3 = _sums(cell_BN, ink_BN, x_BN3 * ink_BN[..., None], V)
    mean_BV3 = sum_BV3 / n_BV.clamp(min=1)[..., None]
    far_BV = torch.ones_like(mean_BV3[..., 0])
    found = list[Tensor]()
    for m in range(colours):
        most_B = (n_BV * far_BV).argmax(dim=1)
        found.append(mean_BV3.gather(1, most_B[:, None, None].expand(-1, 1, 3)))
        away_BV = (mean_BV3 - found[-1]).square().sum(dim=2)
        far_BV = away_BV if m == 0 else far_BV.minimum(away_BV)
    c_BM3 = torch.cat(found, dim=1)
    for _ in range(rounds):
        at_BV = (mean_BV3[:, :, None] - c_BM3[:, None]).square().sum(dim=3).argmin(dim=2)
        n_BM, sum_BM3 = _sums(at_BV, n_BV, sum_BV3, colours)
        c_BM3 = torch.where(n_BM[..., None] > 0, sum_BM3 / n_BM.clamp(min=1)[..., None], c_BM3)
    n_BM, order_BM = n_BM.sort(dim=1, descending=True, stable=True)
    c_BM3 = c_BM3.gather(1, order_BM[..., None].expand(B, -1, 3))
    return torch.where(n_BM[..., None] > 0, c_BM3, c_BM3[:, :1]) / 127.5 - 1


def _sums(at_BN: Tensor, n_BN: Tensor, x_BN3: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Compute counts and sums of groups, int64 ``[B, G]`` and ``[B, G, 3]``."""
    at_N = (at_BN + groups * torch.arange(len(at_BN), device=at_BN.device)[:, None]).flatten()
    n_G = n_BN.new_zeros(len(at_BN) * groups).index_add(0, at_N, n_BN.flatten())
    sum_G3 = x_BN3.new_zeros(len(at_BN) * groups, 3).index_add(0, at_N, x_BN3.flatten(0, 1))
    return n_G.view(len(at_BN), groups), sum_G3.view(len(at_BN), groups, 3)


def orientations(x_B3HW: Tensor, cells: int = 4, bins: int = 8) -> Tensor:
    """Compute histograms of oriented gradients of cells x cells parts of a picture, of length 1: float ``[B, C C O]``.

        h_co = mean over pixels of c whose gradient lies in bin o of [0, pi):  |gradient of the luma|

    Source: Dalal and Triggs 2005, without blocks; vectors of hand-made features, as targets in MaskFeat (2112.09133).

    >>> x_B3HW = torch.zeros(1, 3, 4, 4)
    >>> x_B3HW[..., 2:] = 1
    >>> orientations(x_B3HW, cells=1, bins=4).tolist()
    [[1.0, 0.0, 0.0, 0.0]]
    """
    across_BHW, down_BHW = gradient(x_B3HW).unbind(dim=1)
    turn_BHW = torch.atan2(down_BHW, across_BHW).remainder(math.pi) * (bins / math.pi)
    size_BHW = (across_BHW.square() + down_BHW.square()).sqrt()
    id_O11 = torch.arange(bins, device=x_B3HW.device)[:, None, None]
    at_BOHW = (turn_BHW.long().clamp(max=bins - 1)[:, None] == id_O11) * size_BHW[:, None]
    cell_BOCC = F.adaptive_avg_pool2d(at_BOHW, cells)
    return F.normalize(cell_BOCC.flatten(1), dim=1)


def hue_error(asked_BM3: Tensor, made_BK3: Tensor, grey: float = 0.2) -> tuple[Tensor, Tensor]:
    """Compute the mean angle in degrees from asked colours to the nearest made ones, float ``[B]``; bool: has a hue.

        e_b = sum_m w_m min_k angle(h(asked_m), h(made_k)) / sum_m w_m,   w_m = |h(asked_m)| of those above grey
        h(r, g, b) = (r - (g + b) / 2,  sqrt(3) / 2 (g - b))

    A made colour that is grey has no hue and counts as 90 degrees from any. Colours are in -1..1, lengths in 0..2.

    >>> red, orange, blue = [1.0, -1.0, -1.0], [1.0, 0.0, -1.0], [-1.0, -1.0, 1.0]
    >>> made_BK3 = torch.tensor([[orange, blue], [blue, blue]])
    >>> [round(e, 3) for e in hue_error(torch.tensor([[red], [red]]), made_BK3)[0].tolist()]
    [30.0, 120.0]
    """
    h = [
        torch.stack([r - (g + b) / 2, (g - b) * (math.sqrt(3) / 2)], dim=-1)
        for r, g, b in (x.unbind(dim=-1) for x in (asked_BM3, made_BK3))
    ]
    size_BM, size_BK = (x.norm(dim=-1) for x in h)
    cos_BMK = (h[0] @ h[1].mT) / (size_BM[:, :, None] * size_BK[:, None]).clamp(min=1e-6)
    angle_BMK = torch.where(size_BK[:, None] > grey, cos_BMK.clamp(-1, 1).acos().rad2deg(), 90.0)
    w_BM = size_BM * (size_BM > grey)
    error_B = (w_BM * angle_BMK.amin(dim=2)).sum(dim=1) / w_BM.sum(dim=1).clamp(min=grey)
    return error_B, (w_BM > 0).any(dim=1)
