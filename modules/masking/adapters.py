"""Adapters of masked models: they split an input into tokens, embed them, and compute the loss of predicted tokens.

This file is for patches; categories, token ids and tables are in ``discrete_adapters.py``. Letters: B samples, T tokens
of a sample, N tokens of all samples, P raw numbers per token, D width of the encoder, E width of the decoder.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from descant.modules.core.errors import require_value
from descant.modules.core.host import derive, everyone, finite, has_host_copy, host_copy
from descant.modules.core.modalities import given_modules, with_others
from descant.modules.masking.corruptions import Grid
from descant.modules.masking.decoders import At
from descant.modules.towers.image import require_divisor, sincos
from descant.modules.towers.timm import read_weights


class PixelLoss(nn.Module):
    """Base of pixel losses, one value per token: ``mean_p |y_np - target_np|^power``.

    Args:
        norm: whether the target is the standardised patch, ``(x - mean_n) / std_n`` (MAE, arXiv 2111.06377; std with
            P - 1 degrees of freedom).

    Shapes: predictions and patches ``[N, P] -> [N]``, float32.
    """

    power: int
    kind: str

    def __init__(self, norm: bool = False) -> None:
        super().__init__()
        self.norm = norm

    @property
    def name(self) -> str:
        return f"{self.kind}{'-norm' if self.norm else ''}"

    def target(self, x_NP: Tensor) -> Tensor:
        if not self.norm:
            return x_NP
        var_N1, mean_N1 = torch.var_mean(x_NP, dim=1, keepdim=True)
        return (x_NP - mean_N1) / (var_N1 + 1e-6).sqrt()

    def forward(self, y_NP: Tensor, x_NP: Tensor) -> Tensor:
        return (y_NP.float() - self.target(x_NP.float())).abs().pow(self.power).mean(dim=1)


class MSE(PixelLoss):
    """Mean squared error of each token, ``mean_p (y_np - x_np)^2``; see :class:`PixelLoss`.

    >>> MSE()(torch.zeros(1, 2), torch.tensor([[1.0, 3.0]])).item(), MSE(norm=True).name
    (5.0, 'mse-norm')
    """

    power, kind = 2, "mse"


class L1(PixelLoss):
    """Mean absolute error of each token, ``mean_p |y_np - x_np|``; see :class:`PixelLoss`.

    >>> L1()(torch.zeros(1, 2), torch.tensor([[1.0, 3.0]])).item()
    2.0
    """

    power, kind = 1, "l1"


class Arranged(NamedTuple):
    """Tokens of a modality as encoder and decoder receive them: content ``[B, T, P]``, masks bool ``[B, T]``.

    ``x_BTP``: encoder inputs, used where ``visible_BT``. ``wanted_BTP``: content to predict where ``target_BT``; it
    counts in the loss where ``loss_BT``. ``given_BTP``: the token before each target if targets are predicted in order,
    else None.
    """

    x_BTP: Tensor
    visible_BT: Tensor
    wanted_BTP: Tensor
    target_BT: Tensor
    loss_BT: Tensor
    given_BTP: Tensor | None = None


class Adapter(nn.Module):
    """Base of adapters, which turn one modality into tokens.

    The model calls ``build`` once, with the widths of encoder and decoder.
    A subclass sets ``grid`` and implements ``raw``, ``content``, ``losses``, ``predict`` and ``whole``.
    """

    grid: Grid
    place_TD: Tensor
    #: Whether targets are predicted one after the other, each from the earlier ones.
    ordered = False

    @property
    def relative(self) -> bool:
        """Whether predictions are not in the units of the input, such as patches that are standardised individually."""
        return False

    @property
    def tokens(self) -> int:
        """Number of tokens, T."""
        return math.prod(self.grid)

    @property
    def numbers(self) -> int:
        """Raw numbers per token, P."""
        return 1

    @property
    def vocabulary(self) -> int | None:
        """Number of ids that an input may have, counted from 0; None for numbers."""
        return None

    @property
    def layers(self) -> int:
        """Number of blocks of tokens with disjoint ids; 1 unless a token has several codes."""
        return 1

    @property
    def output_size(self) -> int:
        """Number of outputs per token: logits, or P."""
        return self.numbers

    def build(self, width: int, out: int) -> None:
        """Make input layers to D = ``width`` and output layers from E = ``out``; no output layers if ``out`` is 0."""
        self.modality_D = nn.Parameter(torch.randn(width) * 0.02)
        self.register_buffer("place_TD", sincos(self.grid, width), persistent=False)

    def raw(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return raw content ``[B, T, P]`` of an input ``[B, ...]``, and bool ``[B, T]``: real tokens (not padding)."""
        raise NotImplementedError

    def arrange(
        self, x_BTP: Tensor, real_BT: Tensor, visible_BT: Tensor, target_BT: Tensor, loss_BT: Tensor
    ) -> Arranged:
        """Arrange raw tokens and their masks for encoder and decoder; by default each token keeps its place."""
        return Arranged(x_BTP, visible_BT, x_BTP, target_BT, loss_BT)

    def embed(self, x_NP: Tensor, place_N: Tensor) -> Tensor:
        """Embed raw content with positions, ``[N, D]``."""
        return self.content(x_NP, place_N) + self.place_TD[place_N] + self.modality_D

    def visible(self, x_BTP: Tensor, at: At) -> Tensor:
        """Embed the tokens that the encoder sees, ``[N, D]``; by default each token separately."""
        return self.embed(x_BTP[at.row_N, at.place_N], at.place_N)

    def content(self, x_NP: Tensor, place_N: Tensor) -> Tensor:
        raise NotImplementedError

    def losses(self, h_NE: Tensor, x_NP: Tensor, place_N: Tensor) -> dict[str, Tensor]:
        """Compute losses from the decoder's features: name ("" if there is only one) -> float32 ``[N]``."""
        raise NotImplementedError

    def predict(self, h_NE: Tensor, place_N: Tensor) -> Tensor:
        """Predict raw content ``[N, P]``, or class ids, from the decoder's features."""
        raise NotImplementedError

    def scores(self, h_NE: Tensor, place_N: Tensor) -> Tensor:
        """Return logits ``[N, P, C]`` of a token's ids, if tokens have ids; ``-inf`` for ids not possible there."""
        raise NotImplementedError

    def embed_previous(self, x_NP: Tensor) -> Tensor:
        """Embed the token before each target for an ordered decoder, ``[N, E]``."""
        raise NotImplementedError

    def to_input_shape(self, x_BTP: Tensor) -> Tensor:
        """Return raw content of all tokens in the shape of the input."""
        raise NotImplementedError

    def like(self, y: Tensor, x: Tensor) -> Tensor:
        """Crop a result of :meth:`to_input_shape` to the shape of an input ``x``, which may be smaller."""
        return y

    def input(self, x_BTP: Tensor) -> Tensor:
        """Return raw content of all tokens in shape and units of the input: the inverse of ``raw``."""
        return self.to_input_shape(x_BTP)


def require_ids(x_BT: Tensor, real_BT: Tensor, vocabulary: int, name: str) -> None:
    """Check on the CPU that real token ids are in ``[0, vocabulary)``. It skips ids without a host copy.

    >>> require_ids(torch.tensor([[3, 9]]), torch.tensor([[True, True]]), 9, "codes")
    Traceback (most recent call last):
    ValueError: codes: id 9 in row 0 of the batch; its adapter has 9 ids: vocab 10 at least
    """
    if not (has_host_copy(x_BT) and has_host_copy(real_BT)):
        return
    x_BT, real_BT = host_copy(x_BT), host_copy(real_BT)[:, : x_BT.shape[1]]
    outside_BT = ((x_BT < 0) | (x_BT >= vocabulary)) & real_BT
    if bool(outside_BT.any()):
        row, place = outside_BT.nonzero()[0].tolist()
        found, most = int(x_BT[row, place]), int(x_BT[real_BT].max())
        advice = "ids begin at 0" if found < 0 else f"vocab {most + 1} at least"
        raise ValueError(f"{name}: id {found} in row {row} of the batch; its adapter has {vocabulary} ids: {advice}")


class PatchAdapter(Adapter):
    """Patches of an image, volume, spectrogram or video: ``h = W patch + b + sincos(place) + modality``.

    Any number of axes: ``size: [64, 64], patch: [8, 8]`` for images ``[B, C, 64, 64]``; ``[32, 32, 32]`` for volumes
    ``[B, C, 32, 32, 32]``; ``[64, 250], [16, 10]`` for spectrograms ``[B, 64, 250]``. One channel needs no axis.

    Args:
        size: size of each axis.
        patch: patch size of each axis, or one number for all.
        channels: C.
        losses: losses of predicted patches, each with its own output layer; by default MSE of raw pixels.
        mean, spread: mean and spread that inputs are standardised with.
        padded: whether inputs may have padding. A patch with non-finite numbers then is not real (audio frames of
            ``-inf``). Smaller inputs are padded at the end of each axis: images of any size, within ``size``.
        weights: a local file of a plain timm ViT with such patches, for the patch embedding.

    >>> adapter = PatchAdapter(size=[4, 4], patch=2, channels=3)
    >>> x_BTP, real_BT = adapter.raw(torch.arange(48.0).view(1, 3, 4, 4))
    >>> x_BTP.shape, x_BTP[0, 0].tolist()
    (torch.Size([1, 4, 12]), [0.0, 1.0, 4.0, 5.0, 16.0, 17.0, 20.0, 21.0, 32.0, 33.0, 36.0, 37.0])
    """

    def __init__(
        self,
        size: list[int],
        patch: list[int] | int,
        channels: int = 3,
        losses: list[PixelLoss] | None = None,
        mean: float = 0.0,
        spread: float = 1.0,
        padded: bool = False,
        weights: Path | None = None,
    ) -> None:
        super().__init__()
        self.size, self.channels = tuple(size), channels
        self.patch = checked_patch(self.size, patch)
        self.grid = tuple(side // p for side, p in zip(self.size, self.patch, strict=True))
        require_value(spread > 0, f"spread {spread:g}: must be above 0")
        self.mean, self.spread, self.padded, self.weights = mean, spread, padded, weights
        self.terms = nn.ModuleList(copy.deepcopy(loss) for loss in losses or [MSE()])
        names = [term.name for term in self.losses_of()]
        require_value(len(set(names)) >= len(names), f"losses: {', '.join(names)}: one of each at most")

    @property
    def numbers(self) -> int:
        return self.channels * math.prod(self.patch)

    def build(self, width: int, out: int) -> None:
        super().build(width, out)
        self.inward = nn.Linear(self.numbers, width)
        nn.init.xavier_uniform_(self.inward.weight)
        nn.init.zeros_(self.inward.bias)
        if self.weights is not None:
            _take_patches(self.inward, self.weights)
        self.outward = nn.ModuleList(nn.Linear(out, self.numbers) for _ in self.terms) if out else nn.ModuleList()

    def raw(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if not self.padded:
            x_BTP = self._to_patches(x)
            return x_BTP, everyone(x_BTP.shape[:2], x.device)
        x_BTP = self._to_patches(self._pad(x, -math.inf))
        real_BT = derive(lambda finite_B: self._patches(self._pad(finite_B, False)).all(dim=2), finite(x))
        return x_BTP.masked_fill(~real_BT[..., None], 0.0), real_BT

    def like(self, y: Tensor, x: Tensor) -> Tensor:
        inside: Any = (..., *map(slice, x.shape[-len(self.size) :]))
        return y[inside] if self.padded else y

    def _pad(self, x: Tensor, value: float) -> Tensor:
        """Pad a smaller input at the end of each axis; return a larger one unchanged."""
        missing = [most - side for most, side in zip(self.size, x.shape[-len(self.size) :], strict=True)]
        if not any(missing) or min(missing) < 0:
            return x
        return F.pad(x, [n for side in reversed(missing) for n in (0, side)], value=value)

    def _to_patches(self, x: Tensor) -> Tensor:
        """Standardise an input and cut it into patches ``[B, T, P]``."""
        n = len(self.size)
        if self.channels == 1 and x.ndim == n + 1:
            x = x.unsqueeze(1)
        if x.shape[1:] != (self.channels, *self.size):
            raise ValueError(f"input {tuple(x.shape[1:])}: this adapter takes {(self.channels, *self.size)}")
        return self._patches((x - self.mean) / self.spread if self.mean or self.spread != 1 else x)

    def _patches(self, x: Tensor) -> Tensor:
        n = len(self.size)
        sides = [side for pair in zip(self.grid, self.patch, strict=True) for side in pair]
        x = x.reshape(len(x), self.channels, *sides)
        grid, inside = range(2, 2 + 2 * n, 2), range(3, 3 + 2 * n, 2)
        return x.permute(0, *grid, 1, *inside).reshape(len(x), self.tokens, self.numbers)

    def to_input_shape(self, x_BTP: Tensor) -> Tensor:
        n = len(self.size)
        x = x_BTP.reshape(len(x_BTP), *self.grid, self.channels, *self.patch)
        axes = [axis for k in range(n) for axis in (1 + k, 2 + n + k)]
        return x.permute(0, 1 + n, *axes).reshape(len(x), self.channels, *self.size)

    def input(self, x_BTP: Tensor) -> Tensor:
        return self.to_input_shape(x_BTP) * self.spread + self.mean

    def content(self, x_NP: Tensor, place_N: Tensor) -> Tensor:
        return self.inward(x_NP)

    def losses(self, h_NE: Tensor, x_NP: Tensor, place_N: Tensor) -> dict[str, Tensor]:
        values = {t.name: t(head(h_NE), x_NP) for t, head in zip(self.losses_of(), self.outward, strict=True)}
        return values if len(values) > 1 else {"": next(iter(values.values()))}

    def predict(self, h_NE: Tensor, place_N: Tensor) -> Tensor:
        """Predict with the output layer of the first loss on raw pixels, or else of the first loss."""
        layer = next((k for k, term in enumerate(self.losses_of()) if not term.norm), 0)
        return self.outward[layer](h_NE)

    @property
    def relative(self) -> bool:
        return all(term.norm for term in self.losses_of())

    def losses_of(self) -> list[PixelLoss]:
        return [term for term in self.terms if isinstance(term, PixelLoss)]


class Adapters(nn.ModuleDict):
    """Adapters of a masked model, at most one per modality; any adapter fits any modality of its shape.

    Args:
        image, sketch, palette: an image, its edge map, its map of colour names.
        text, table, audio, video, depth: token ids, columns, audio features, frames, a depth map.
        t1, grey, white: volumes of one head, by contrast.
        visible, infrared: spectral bands.
        volume, bands: any other volumes or bands.
        others: modality of any other name -> its adapter.
    """

    def __init__(
        self,
        image: Adapter | None = None,
        sketch: Adapter | None = None,
        palette: Adapter | None = None,
        text: Adapter | None = None,
        table: Adapter | None = None,
        audio: Adapter | None = None,
        video: Adapter | None = None,
        depth: Adapter | None = None,
        t1: Adapter | None = None,
        grey: Adapter | None = None,
        white: Adapter | None = None,
        visible: Adapter | None = None,
        infrared: Adapter | None = None,
        volume: Adapter | None = None,
        bands: Adapter | None = None,
        others: dict[str, Adapter] | None = None,
    ) -> None:
        adapters = with_others(given_modules(locals()), others)
        require_value(adapters, "adapters: none given; a masked model needs at least one modality")
        super().__init__(adapters)

    def each(self) -> dict[str, Adapter]:
        """Return the adapters by modality."""
        return {name: adapter for name, adapter in self.items() if isinstance(adapter, Adapter)}


def checked_patch(size: Sequence[int], patch: Sequence[int] | int) -> tuple[int, ...]:
    """Return one patch size per axis. Raises ValueError with the nearest size that divides an axis.

    >>> checked_patch((64, 250), 10)
    Traceback (most recent call last):
    ValueError: patch 10 does not divide size 64; the nearest that does is 8
    """
    sizes = (patch,) * len(size) if isinstance(patch, int) else tuple(patch)
    if len(sizes) != len(size):
        raise ValueError(f"patch {list(sizes)}: one number an axis of size {list(size)}, or one for all")
    for side, p in zip(size, sizes, strict=True):
        if p > side:
            raise ValueError(f"size {side} is smaller than a patch of {p}; at most {side}")
        require_divisor("patch", p, "size", side)
    return sizes


def _take_patches(layer: nn.Linear, path: Path) -> None:
    """Copy a ViT's patch convolution; its weight is the same matrix, ordered by channels, then axes."""
    state = read_weights(path)
    weight = state.get("patch_embed.proj.weight")
    if weight is None or weight.flatten(1).shape != layer.weight.shape:
        shape = "none" if weight is None else str(list(weight.shape))
        raise ValueError(f"weights {path}: patches {shape}, where {list(layer.weight.shape)} are needed")
    with torch.no_grad():
        layer.weight.copy_(weight.flatten(1))
        layer.bias.copy_(state["patch_embed.proj.bias"])
