"""Image preprocessing and augmentation of uint8 batches on the device: one affine and one colour operation, then
normalisation.

Parameters come from each sample's random key, so an augmentation is a pure function of (seed, epoch, index) on any
device and in any batch. torchvision pipelines per sample are many times slower (``benchmarks/data.py``); data modules
take them as ``transform``. Letters: B samples, C channels, H and W pixels in, S pixels out.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms import v2

from descant.modules.core.host import to_device
from descant.modules.core.rng import uniform_NK

#: Luma of linear RGB (ITU-R BT.601), as in colour jitter.
_LUMA = (0.299, 0.587, 0.114)


def over_white(x_BCHW: Tensor, background_B3: Tensor | None = None) -> Tensor:
    """Composite RGBA (or RGB) in 0..1 over a background colour, white by default: RGB ``[B, 3, H, W]``."""
    if x_BCHW.shape[1] == 3:
        return x_BCHW
    rgb, alpha = x_BCHW[:, :3], x_BCHW[:, 3:4]
    back: Tensor | float = 1.0 if background_B3 is None else background_B3[:, :, None, None]
    return rgb * alpha + back * (1 - alpha)


def reduce_rgba(x_NCHW: Tensor, size: int) -> Tensor:
    """Downsample uint8 RGBA ``[N, 4, H, W]`` to ``[N, 4, size, size]``, with colours weighted by opacity."""
    parts = []
    for x in x_NCHW.split(256):  # in parts: a whole corpus as floats would be gigabytes
        rgb, alpha = x[:, :3].float(), x[:, 3:].float() / 255
        opaque = v2.functional.resize(torch.cat([rgb * alpha, alpha], dim=1), [size, size], antialias=True)
        rgb = opaque[:, :3] / opaque[:, 3:].clamp(min=1e-4)
        parts.append(torch.cat([rgb, opaque[:, 3:] * 255], dim=1).round().clamp(0, 255).to(torch.uint8))
    return torch.cat(parts)


def edges(x_B3HW: Tensor) -> Tensor:
    """Compute an edge map of pixels in -1..1: ``min(|grad luma|, 1) * 2 - 1`` by Sobel's masks, float ``[B, 1, H, W]``.

    It is 1 where brightness changes by half its range or more, and -1 where it is constant.

    >>> x_B3HW = torch.ones(1, 3, 4, 6)
    >>> x_B3HW[..., 3:] = -1
    >>> edges(x_B3HW)[0, 0, 1].tolist()
    [-1.0, -1.0, 1.0, 1.0, -1.0, -1.0]
    """
    return gradient(x_B3HW).square().sum(1, keepdim=True).sqrt().clamp(max=1) * 2 - 1


def gradient(x_B3HW: Tensor) -> Tensor:
    """Compute the gradient of the luma per pixel, across and down, by Sobel's masks: float ``[B, 2, H, W]``.

    >>> gradient(torch.arange(3.0).expand(1, 3, 3, 3))[0, :, 1, 1].tolist()
    [2.0, 0.0]
    """
    luma = (x_B3HW.float() * to_device(torch.tensor(_LUMA), x_B3HW.device)[:, None, None]).sum(1, keepdim=True)
    mask = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]]) / 4
    mask = to_device(mask, luma.device)
    return F.conv2d(F.pad(luma, (1, 1, 1, 1), mode="replicate"), torch.stack([mask, mask.T])[:, None])


#: The eleven basic colour terms of English (Berlin and Kay 1969), and a typical colour of each in 0..255.
BASIC_COLOURS = {
    "black": (0, 0, 0),
    "grey": (128, 128, 128),
    "white": (255, 255, 255),
    "red": (220, 30, 40),
    "orange": (245, 140, 30),
    "yellow": (250, 220, 60),
    "green": (70, 160, 60),
    "blue": (50, 110, 220),
    "purple": (130, 60, 170),
    "pink": (245, 150, 190),
    "brown": (125, 75, 40),
}


def colour_names(x_B3HW: Tensor) -> Tensor:
    """Find the nearest of the :data:`BASIC_COLOURS` for each pixel in -1..1: int64 ``[B, H, W]``, 0 to 10.

    >>> white_and_red = torch.tensor([[1.0, 0.7], [1.0, -0.8], [1.0, -0.7]]).view(1, 3, 1, 2)
    >>> [list(BASIC_COLOURS)[k] for k in colour_names(white_and_red).flatten()]
    ['white', 'red']
    """
    colour_C3 = torch.tensor(list(BASIC_COLOURS.values()), dtype=torch.float32) / 127.5 - 1
    colour_C3 = to_device(colour_C3, x_B3HW.device)
    x = x_B3HW.float()
    # |x - c|^2 - |x|^2, whose last term is the same for all colours: one matrix product
    distance = colour_C3.square().sum(1)[:, None, None] - 2 * torch.einsum("bkhw,ck->bchw", x, colour_C3)
    return distance.min(dim=1).indices  # a CPU's argmin takes four times as long


#: Mean or standard deviation of each colour, of pixels in 0..1.
Colour = tuple[float, float, float]
#: Default mean and deviation: pixels in -1..1.
HALF: Colour = (0.5, 0.5, 0.5)


class Pixels(nn.Module):
    """Evaluation preprocessing: uint8 ``[B, 3 or 4, H, W]`` -> float ``[B, 3, S, S]``, ``(x / 255 - mean) / std``, over
    white.

    Args:
        size: S, pixels out (antialiased resize).
        mean, std: of each colour, as in the training of a pretrained tower; by default pixels in -1..1.

    >>> Pixels(2)(torch.full((1, 3, 4, 4), 255, dtype=torch.uint8), torch.zeros(1, dtype=torch.long)).unique().tolist()
    [1.0]
    """

    def __init__(self, size: int, mean: Colour = HALF, std: Colour = HALF) -> None:
        super().__init__()
        self.size = size
        self.mean, self.std = colours(mean, std)

    def forward(self, x_BCHW: Tensor, draw_B: Tensor) -> Tensor:
        x = over_white(x_BCHW.to(torch.float32, copy=True).div_(255))
        if x.shape[-1] != self.size or x.shape[-2] != self.size:
            x = v2.functional.resize(x, [self.size, self.size], antialias=True)
        return normalise(x, self.mean, self.std)


def colours(mean: Sequence[float], std: Sequence[float]) -> tuple[Colour, Colour]:
    """Return both as tuples of three numbers; raise ValueError otherwise."""
    for name, values in (("mean", mean), ("std", std)):
        if len(values) != 3:
            raise ValueError(f"{name} {list(values)}: three numbers, one a colour")
    if min(std) <= 0:
        raise ValueError(f"std {list(std)}: must be above 0; of pixels in 0..1, such as 0.5")
    if max(mean) > 1:
        raise ValueError(f"mean {list(mean)}: of pixels in 0..1, such as 0.5")
    return (mean[0], mean[1], mean[2]), (std[0], std[1], std[2])


def normalise(x_B3HW: Tensor, mean: Colour, std: Colour) -> Tensor:
    """Compute ``(x - mean) / std`` of float pixels in 0..1, in place.

    >>> normalise(torch.full((1, 3, 1, 1), 0.75), HALF, (0.5, 0.25, 0.125)).flatten().tolist()
    [0.5, 1.0, 2.0]
    """
    if len(set(mean)) + len(set(std)) == 2:
        return x_B3HW.sub_(mean[0]).mul_(1 / std[0])
    shift_3, std_3 = (to_device(torch.tensor(x, dtype=x_B3HW.dtype), x_B3HW.device) for x in (mean, std))
    scale_3 = 1 / std_3
    if x_B3HW.is_contiguous(memory_format=torch.channels_last):
        # by lines of pixels: broadcasting over the last three numbers would be slow
        rows, _, high, wide = x_B3HW.shape
        line_BHR = x_B3HW.permute(0, 2, 3, 1).view(rows, high, 3 * wide)
        line_BHR.sub_(shift_3.repeat(wide)).mul_(scale_3.repeat(wide))
        return x_B3HW
    return x_B3HW.sub_(shift_3[:, None, None]).mul_(scale_3[:, None, None])


class Augment(nn.Module):
    """Training augmentation: random affine map and colour of each image, uint8 ``[B, 3 or 4, H, W]`` -> float ``[B, 3,
    S, S]``.

    ``x'(p) = M x(A p) + c`` with ``A`` affine (rotation, scale, stretch, shear, shift, mirror) and ``M, c`` a mix of
    colour channels (saturation, hue, contrast, brightness, inversion), each sampled uniformly.

    Args:
        size: S, pixels out.
        rotate: degrees, drawn from -rotate..rotate.
        scale: log-uniform factor between 1/scale and scale. stretch: the same, of width against height.
        shear: degrees. shift: share of the image.
        mirror: probability of a horizontal flip.
        colour: strength of the random mixing of channels (0 none). brightness, contrast: half-width of their ranges.
        grey: probability of a grey image. invert: probability of a negative.
        background: probability of a random background behind transparent pixels (else white).
        texture: probability of a random 3 x 3 filter, blended with the image at random (RandConv, Xu 2021, arXiv
            2007.13003): changes texture, not shape.
        erase: largest side of a grey square over the image, as a share of the image's side (0 none).
        stream: name of the random stream; two views of one sample use two streams.
        mean, std: as in :class:`Pixels`.
    """

    def __init__(
        self,
        size: int,
        rotate: float = 15.0,
        scale: float = 1.25,
        stretch: float = 1.15,
        shear: float = 8.0,
        shift: float = 0.1,
        mirror: float = 0.0,
        colour: float = 0.3,
        brightness: float = 0.2,
        contrast: float = 0.3,
        grey: float = 0.1,
        invert: float = 0.0,
        background: float = 0.5,
        texture: float = 0.0,
        erase: float = 0.0,
        stream: str = "image",
        mean: Colour = HALF,
        std: Colour = HALF,
    ) -> None:
        super().__init__()
        if scale < 1 or stretch < 1:
            raise ValueError(f"scale {scale} and stretch {stretch}: factors of at least 1")
        self.size, self.rotate, self.scale, self.stretch, self.shear = size, rotate, scale, stretch, shear
        self.shift, self.mirror, self.colour, self.brightness = shift, mirror, colour, brightness
        self.contrast, self.grey, self.invert, self.background = contrast, grey, invert, background
        self.texture, self.erase, self.stream = texture, erase, stream
        self.mean, self.std = colours(mean, std)

    def stream_copy(self, stream: str) -> Augment:
        """Copy the augmentation with another random stream, for a second view."""
        twin = copy.copy(self)
        twin.stream = stream
        return twin

    def _u(self, draw_B: Tensor, device: torch.device, *what: str) -> tuple[Tensor, ...]:
        """Draw uniformly from -1..1, once per sample and purpose."""
        u_BK = uniform_NK(draw_B, [f"augment/{self.stream}/{w}" for w in what]) * 2 - 1
        return to_device(u_BK, device).unbind(dim=1)

    def affine(self, draw_B: Tensor, device: torch.device) -> Tensor:
        """Compute ``A`` of every sample: ``[B, 2, 3]``, from output to input coordinates in -1..1."""
        purposes = ("rotate", "shear", "scale", "stretch", "mirror", "x", "y")
        rotate, shear, scale, stretch, mirror, x, y = self._u(draw_B, device, *purposes)
        angle, shear = rotate * math.radians(self.rotate), shear * math.radians(self.shear)
        size, ratio = torch.exp(scale * math.log(self.scale)), torch.exp(stretch * math.log(self.stretch))
        flip = torch.where(mirror < 2 * self.mirror - 1, -1.0, 1.0)
        cos, sin, tan = angle.cos(), angle.sin(), shear.tan()
        row_x = torch.stack([flip * size * ratio * cos, flip * size * ratio * (cos * tan - sin)], dim=-1)
        row_y = torch.stack([size / ratio * sin, size / ratio * (sin * tan + cos)], dim=-1)
        shift = torch.stack([x, y], dim=-1) * 2 * self.shift
        return torch.cat([torch.stack([row_x, row_y], dim=1), shift[:, :, None]], dim=2)

    def mixing(self, draw_B: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        """Compute ``M`` and ``c`` of every sample: ``[B, 3, 3]`` and ``[B, 3]``, for colours in -1..1."""
        is_grey, gain, is_negative, offset = self._u(draw_B, device, "grey", "contrast", "invert", "brightness")
        noise = torch.stack(self._u(draw_B, device, *(f"colour{k}" for k in range(9))), dim=-1).view(-1, 3, 3)
        # rows of the noise sum to zero, so greys stay grey
        mix = torch.eye(3, device=device) + self.colour * (noise - noise.mean(dim=2, keepdim=True))
        grey = to_device(torch.tensor(_LUMA), device).expand(3, 3)
        mix = torch.where((is_grey < 2 * self.grey - 1)[:, None, None], grey, mix)
        gain = 1 + self.contrast * gain
        gain = torch.where(is_negative < 2 * self.invert - 1, -gain, gain)
        return mix * gain[:, None, None], (self.brightness * offset)[:, None].expand(-1, 3)

    def forward(self, x_BCHW: Tensor, draw_B: Tensor) -> Tensor:
        device, rows, channels = x_BCHW.device, len(x_BCHW), x_BCHW.shape[1]
        x = x_BCHW.float().mul_(1 / 255)
        if channels == 4:  # premultiplied, so that no colour bleeds in from transparent pixels
            x[:, :3] *= x[:, 3:]
        grid = F.affine_grid(self.affine(draw_B, device), [rows, channels, self.size, self.size], align_corners=False)
        if x.shape[-1] >= 2 * self.size:  # sampling every second pixel would alias: average down first
            x = F.avg_pool2d(x, x.shape[-1] // self.size)
        x = F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        mix, offset = self.mixing(draw_B, device)
        # M (2x - 1) + c, where x = rgb + b (1 - alpha) over a background b: one affine map of the channels
        offset = offset - mix.sum(dim=2)
        mix = 2 * mix
        if channels == 4:
            behind = (mix @ self._background(draw_B, device)[:, :, None]).squeeze(2)
            mix, offset = torch.cat([mix, -behind[:, :, None]], dim=2), offset + behind
        x = torch.baddbmm(offset[:, :, None], mix, x.flatten(2)).view(rows, 3, self.size, self.size)
        if self.texture > 0:
            x = self._filter(x, draw_B)
        x = x.clamp_(-1, 1)
        if self.erase > 0:
            x = self._erase(x, draw_B)
        # pixels in -1..1 are normalised by HALF already
        return x if (self.mean, self.std) == (HALF, HALF) else normalise(x.mul_(0.5).add_(0.5), self.mean, self.std)

    def _background(self, draw_B: Tensor, device: torch.device) -> Tensor:
        """Choose the background colour of each image, ``[B, 3]``: white, or random."""
        coloured, *rgb = self._u(draw_B, device, "background", "back0", "back1", "back2")
        back = torch.stack(rgb, dim=-1) * 0.5 + 0.5
        return torch.where((coloured < 2 * self.background - 1)[:, None], back, torch.ones_like(back))

    def _filter(self, x: Tensor, draw_B: Tensor) -> Tensor:
        """Compute ``b * x + (1 - b) * conv(x, w)`` with a random 3 x 3 filter ``w`` on all channels of a sample."""
        rows, device = len(x), x.device
        filtered_B, keep, *weights = self._u(draw_B, device, "texture", "blend", *(f"filter{k}" for k in range(81)))
        w = torch.stack(weights, dim=-1).view(rows * 3, 3, 3, 3)
        w = w * math.sqrt(3 / 27)  # uniform weights of variance 1/27 keep the contrast
        padded = F.pad(x.reshape(1, rows * 3, *x.shape[2:]), (1, 1, 1, 1), mode="replicate")
        filtered = F.conv2d(padded, w, groups=rows).view_as(x)
        keep = torch.where(filtered_B < 2 * self.texture - 1, keep * 0.5 + 0.5, torch.ones_like(keep))
        return torch.lerp(filtered, x, keep[:, None, None, None])

    def _erase(self, x: Tensor, draw_B: Tensor) -> Tensor:
        centre = torch.linspace(-1, 1, self.size, device=x.device)
        side, y, x0 = self._u(draw_B, x.device, "erase", "erase-y", "erase-x")
        half = self.erase * (side * 0.5 + 0.5)[:, None]
        inside = [(centre - place[:, None]).abs() < half for place in (y, x0)]
        return torch.where((inside[0][:, :, None] & inside[1][:, None, :])[:, None], torch.zeros_like(x), x)


def require_crop(size: int, scale: tuple[float, float], ratio: tuple[float, float], flip: float) -> None:
    """Raise ValueError for arguments that describe no random resized crop and flip."""
    if size < 1:
        raise ValueError(f"size {size}: at least 1 pixel")
    if not 0 < scale[0] <= scale[1] <= 1:
        raise ValueError(f"scale {scale[0]:g}, {scale[1]:g}: two shares of the area, 0 < low <= high <= 1")
    if not 0 < ratio[0] <= ratio[1] < math.inf:
        raise ValueError(f"ratio {ratio[0]:g}, {ratio[1]:g}: two ratios of width to height, 0 < low <= high")
    if not 0 <= flip <= 1:
        raise ValueError(f"flip {flip:g} is not a probability")


class Crop(nn.Module):
    """Random resized crop and flip (as MAE, He 2022, arXiv 2111.06377): uint8 ``[B, C, H, W]`` -> float ``[B, C, S,
    S]``.

    ``x'(p) = 2 x(c + s p) / 255 - 1`` with ``s`` half the sides of a box of area ``a ~ U(scale)`` and aspect ``r``,
    ``log r ~ U(log ratio)``. The box is the first of ten that fits, otherwise the whole image, and its centre ``c`` is
    uniform. Sampling is bicubic, clamped to -1..1.

    Args:
        size: S, pixels out.
        scale: range of the box's area, as a share of the image's. ratio: range of its width over its height.
        flip: probability of a horizontal flip.

    >>> x_B1HW = torch.tensor([[[[0, 255], [255, 0]]]], dtype=torch.uint8)
    >>> Crop(2, scale=(1, 1), ratio=(1, 1), flip=1)(x_B1HW, torch.tensor([5])).tolist()
    [[[[1.0, -1.0], [-1.0, 1.0]]]]
    """

    ATTEMPTS = 10

    def __init__(
        self,
        size: int,
        scale: tuple[float, float] = (0.2, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        flip: float = 0.5,
    ) -> None:
        super().__init__()
        require_crop(size, scale, ratio, flip)
        self.size, self.scale, self.ratio, self.flip = size, scale, ratio, flip

    def boxes(self, draw_B: Tensor, device: torch.device) -> Tensor:
        """Draw affine maps ``[B, 2, 3]`` from output to input coordinates in -1..1.

        The diagonal holds half the sides, the last column the centre.
        """
        attempts = [f"crop/{what}{k}" for what in ("area", "ratio") for k in range(self.ATTEMPTS)]
        u_BK = to_device(uniform_NK(draw_B, [*attempts, "crop/x", "crop/y", "crop/flip"]), device)
        u_area_BK, u_ratio_BK = u_BK[:, : self.ATTEMPTS], u_BK[:, self.ATTEMPTS : 2 * self.ATTEMPTS]
        area_BK = self.scale[0] + (self.scale[1] - self.scale[0]) * u_area_BK
        low, high = math.log(self.ratio[0]), math.log(self.ratio[1])
        aspect_BK = torch.exp(low + (high - low) * u_ratio_BK)
        side_BK2 = torch.stack([(area_BK * aspect_BK).sqrt(), (area_BK / aspect_BK).sqrt()], dim=2)
        fits_BK = (side_BK2 <= 1).all(dim=2)
        first_B = fits_BK.int().argmax(dim=1)
        side_B2 = side_BK2[torch.arange(len(u_BK), device=device), first_B]
        side_B2 = torch.where(fits_BK.any(dim=1)[:, None], side_B2, torch.ones_like(side_B2))
        x_B, y_B, flip_B = u_BK[:, 2 * self.ATTEMPTS :].unbind(dim=1)
        middle_B2 = (2 * torch.stack([x_B, y_B], dim=1) - 1) * (1 - side_B2)
        mirror_B = torch.where(flip_B < self.flip, -1.0, 1.0)
        scale_B22 = torch.diag_embed(side_B2 * torch.stack([mirror_B, torch.ones_like(mirror_B)], dim=1))
        return torch.cat([scale_B22, middle_B2[:, :, None]], dim=2)

    def forward(self, x_BCHW: Tensor, draw_B: Tensor) -> Tensor:
        shape = [*x_BCHW.shape[:2], self.size, self.size]
        grid = F.affine_grid(self.boxes(draw_B, x_BCHW.device), shape, align_corners=False)
        x = x_BCHW.float().mul_(2 / 255).sub_(1)
        return F.grid_sample(x, grid, mode="bicubic", padding_mode="border", align_corners=False).clamp_(-1, 1)
