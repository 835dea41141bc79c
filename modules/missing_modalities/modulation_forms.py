"""Forms of modulation (scale and shift, low rank): parameters of one set of modalities that change a layer's output.

Letters: B samples of a batch, R rows that run in a layer, S sets, C channels of a layer's output and I of its input,
r rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from descant.modules.core.compat.layers import BatchNorm
from descant.modules.core.host import to_device


class Modulated(nn.Module):
    """Modulation of the output of one layer for one set of modalities; ``several`` is for rows of several sets.

    ``forward(x, h)`` takes the layer's input and output; None in a list of several leaves h unchanged.
    """

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        raise NotImplementedError

    @staticmethod
    def several(parts: Sequence[Modulated | None], part_R: Tensor, x: Tensor, h: Tensor) -> Tensor:
        """Change row r by ``parts[part_R[r]]``."""
        raise NotImplementedError


class Modulation:
    """Form of modulation: ``of(layer)`` creates its parameters for one set, or None for a layer it leaves alone."""

    def of(self, layer: nn.Module) -> Modulated | None:
        raise NotImplementedError


class ScaleShift(Modulation):
    """``h' = gamma * h + beta`` for each channel of a layer's output; gamma 1 and beta 0 at the start.

    It follows linear layers, convolutions and norms (as in SSF, Lian 2022, arXiv 2210.08823; our reading of the paper's
    "each layer"), and embeddings if a bank names them: 2 C parameters each.

    >>> ScaleShift().of(nn.Linear(3, 4))(torch.zeros(2, 3), torch.ones(2, 4)).tolist() == torch.ones(2, 4).tolist()
    True
    """

    def of(self, layer: nn.Module) -> Modulated | None:
        width = layer_width(layer)
        return None if width is None else _ScaleShift(width, _axis(layer))


class _ScaleShift(Modulated):
    def __init__(self, width: int, axis: int) -> None:
        super().__init__()
        self.axis = axis
        self.gamma_C, self.beta_C = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        shape = [1] * h.ndim
        shape[self.axis] = -1
        return h * self.gamma_C.to(h.dtype).view(shape) + self.beta_C.to(h.dtype).view(shape)

    @staticmethod
    def several(parts: Sequence[Modulated | None], part_R: Tensor, x: Tensor, h: Tensor) -> Tensor:
        some = cast("list[_ScaleShift | None]", list(parts))
        one = next(part for part in some if part is not None)
        ones, zeros = torch.ones_like(one.gamma_C), torch.zeros_like(one.beta_C)
        gamma_SC = torch.stack([ones if part is None else part.gamma_C for part in some])
        beta_SC = torch.stack([zeros if part is None else part.beta_C for part in some])
        shape = [len(part_R), *[1] * (h.ndim - 1)]
        shape[one.axis] = -1
        gamma, beta = (table_SC.to(h.dtype)[part_R].view(shape) for table_SC in (gamma_SC, beta_SC))
        return h * gamma + beta


class LowRank(Modulation):
    """``h' = W x + B A x`` for linear layers and convolutions; B is zero at the start.

    For a convolution, A has the kernel, stride and padding of the layer and B is 1 x 1, as in LoRA (Hu 2022): our
    reading. Norms, and convolutions with groups or with other padding than zeros, are left alone.

    Args:
        r: rank.

    >>> sum(p.numel() for p in LowRank(r=2).of(nn.Conv2d(3, 4, 5)).parameters())  # 2 * 3 * 25 + 4 * 2
    158
    """

    def __init__(self, r: int = 1) -> None:
        if r < 1:
            raise ValueError(f"r {r}: a rank is at least 1")
        self.r = r

    def of(self, layer: nn.Module) -> Modulated | None:
        if isinstance(layer, nn.Linear):
            return _LowRank(layer.in_features, layer.out_features, self.r)
        if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d) and layer.groups == 1 and layer.padding_mode == "zeros":
            return _LowRankConv(layer, self.r)
        return None


class _LowRank(Modulated):
    def __init__(self, width_in: int, width: int, r: int) -> None:
        super().__init__()
        self.a_rI = nn.Parameter(torch.empty(r, width_in))
        self.b_Cr = nn.Parameter(torch.zeros(width, r))
        nn.init.kaiming_uniform_(self.a_rI, a=5**0.5)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return h + F.linear(F.linear(x, self.a_rI.to(x.dtype)), self.b_Cr.to(x.dtype)).to(h.dtype)

    @staticmethod
    def several(parts: Sequence[Modulated | None], part_R: Tensor, x: Tensor, h: Tensor) -> Tensor:
        some = cast("list[_LowRank | None]", list(parts))
        one = next(part for part in some if part is not None)
        zeros_rI, zeros_Cr = torch.zeros_like(one.a_rI), torch.zeros_like(one.b_Cr)
        a_SrI = torch.stack([zeros_rI if part is None else part.a_rI for part in some]).to(x.dtype)
        b_SCr = torch.stack([zeros_Cr if part is None else part.b_Cr for part in some]).to(x.dtype)
        x_RTI = x.reshape(len(x), -1, x.shape[-1])
        low_RTr = torch.bmm(x_RTI, a_SrI[part_R].transpose(1, 2))
        return h + torch.bmm(low_RTr, b_SCr[part_R].transpose(1, 2)).reshape(h.shape).to(h.dtype)


class _LowRankConv(Modulated):
    def __init__(self, layer: nn.Conv1d | nn.Conv2d | nn.Conv3d, r: int) -> None:
        super().__init__()
        self.convolve = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(layer.kernel_size)]
        self.how = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation}
        self.a_rI = nn.Parameter(torch.empty(r, layer.in_channels, *layer.kernel_size))
        self.b_Cr = nn.Parameter(torch.zeros(layer.out_channels, r))
        nn.init.kaiming_uniform_(self.a_rI, a=5**0.5)

    def low(self, x: Tensor, a_rI: Tensor) -> Tensor:
        return cast(Tensor, cast(Any, self.convolve)(x, a_rI.to(x.dtype), **self.how))

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        low_Rr = self.low(x, self.a_rI)
        return h + torch.einsum("nr...,cr->nc...", low_Rr, self.b_Cr.to(low_Rr.dtype)).to(h.dtype)

    @staticmethod
    def several(parts: Sequence[Modulated | None], part_R: Tensor, x: Tensor, h: Tensor) -> Tensor:
        some = cast("list[_LowRankConv | None]", list(parts))
        one = next(part for part in some if part is not None)
        real = [part for part in some if part is not None]
        # one convolution computes all sets' channels; each row takes those of its own set
        low = one.low(x, torch.cat([part.a_rI for part in real]))
        low_RSr = low.unflatten(1, (len(real), -1))
        number = to_device(torch.tensor([0 if part is None else real.index(part) for part in some]), part_R.device)
        low_Rr = low_RSr[torch.arange(len(part_R), device=part_R.device), number[part_R]]
        zeros_Cr = torch.zeros_like(one.b_Cr)
        b_SCr = torch.stack([zeros_Cr if part is None else part.b_Cr for part in some]).to(low.dtype)
        return h + torch.einsum("nr...,ncr->nc...", low_Rr, b_SCr[part_R]).to(h.dtype)


_NORMS = (BatchNorm, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
#: Attributes that hold a width.
_WIDTHS = ("out_features", "out_channels", "num_features", "num_channels", "embedding_dim")


def layer_width(layer: nn.Module) -> int | None:
    """Return the number of channels of a layer's output; None for any other module."""
    if not isinstance(layer, (nn.Linear, *_CONVS, *_NORMS, *EMBEDDINGS)):
        return None
    width = next((getattr(layer, name) for name in _WIDTHS if hasattr(layer, name)), None)
    return int(cast(Any, layer).normalized_shape[-1] if width is None else width)


def _axis(layer: nn.Module) -> int:
    """Return the axis of the channels: 1 for convolutions and norms of images, volumes and waves, else the last."""
    return 1 if isinstance(layer, nn.GroupNorm) or type(layer).__name__[-2:] in ("1d", "2d", "3d") else -1
