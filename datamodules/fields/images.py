"""Decode, crop and resize encoded images into one uint8 batch, with the work of one decode and one resampling each.

- libjpeg-turbo decodes a JPEG at 1/2, 1/4 or 1/8 of its size if the crop is that much larger than the result.
- The crop is a view of the decoded image, and the resampling writes into the batch.
- The crops of a batch are sampled at once, each with its sample's own seed, so they do not depend on the batch.

The batch is channels-last in memory, as decoders write images, with shape ``[B, 3, S, S]``. Normalisation to floats
happens on the device (:class:`descant.modules.transforms.image.Pixels`).
Letters: B samples, S pixels out, H and W pixels of an image, C channels, K attempts at a crop.
"""

from __future__ import annotations

import copy
import io
import math
import warnings
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import simplejpeg
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from descant.modules.core.errors import one_line, require_value
from descant.modules.core.rng import uniform_NK
from descant.modules.transforms.image import require_crop

#: Formats by Pillow's names; others are errors, whatever decoders are installed.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF")
#: The most pixels of an image: above it, Pillow warns of decompression bombs.
LIMIT = 89_478_485
#: The most bytes of a decoded image: the limit above at three bytes per pixel. A process decodes one image at a time.
BYTES = 1 << 28
#: Pixels of a large image that are converted to RGB at a time, since conversions make several copies.
_STRIP = 1 << 20
#: Bytes per pixel by Pillow's mode; 4 for all others.
_DEPTH = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16B": 2, "I;16L": 2, "I;16N": 2}
#: Bytes per pixel by decoder: WebP's holds the canvas of an animation twice.
_DECODERS = {"WEBP": 12}
#: Random boxes to try before the largest central one is taken, as in torchvision's RandomResizedCrop.
_ATTEMPTS = 10
#: Evaluation resizes at most this many times the shorter side of an image, and takes the central square.
_LONGEST = 4
#: F.interpolate has no ``out``, and makes a channels-last image contiguous, which costs another copy.
_RESAMPLE = {
    "bicubic": torch.ops.aten._upsample_bicubic2d_aa.out,
    "bilinear": torch.ops.aten._upsample_bilinear2d_aa.out,
}
#: EXIF's orientation tag: 1 upright, 2 to 4 mirrored or rotated by half a turn, 5 to 8 by a quarter.
_ORIENTATION = 0x0112


class Header(NamedTuple):
    """An encoded image and its upright height and width, before decoding.

    ``image`` is Pillow's, not yet loaded, or None if the fast JPEG decoder can read the data.
    """

    height: int
    width: int
    orientation: int
    data: bytes
    image: Image.Image | None


class Reduced(NamedTuple):
    """A decoded image of ``height`` x ``width`` pixels, resized to a square: uint8 ``[S', S', 3]``."""

    height: int
    width: int
    x_SS3: np.ndarray


class Images:
    """Encoded images -> uint8 ``[B, 3, S, S]``: random-resized crops with flips; in evaluation the central square.

    Crops are those of torchvision's ``RandomResizedCrop``: of area ``a H W`` and aspect ``r`` with ``a ~ U(scale)`` and
    ``log r ~ U(log ratio)``, the first of ten that fits, otherwise the largest central one. The central square is that
    of ``Resize(S)`` and ``CenterCrop(S)``. It reads JPEG, PNG, WebP and GIF; of animations, the first frame. Images are
    rotated by their EXIF orientation; grey and CMYK become RGB, 16 bits become 8, transparency becomes white. Colour
    profiles are not applied.

    Args:
        size: S, pixels out.
        scale: range of the crop's area, as a share of the image's area.
        ratio: range of the crop's width divided by its height.
        flip: probability of a mirrored image.
        limit: an image with more pixels, or with more than 256 MiB when decoded (RGBA and 16 bits have more bytes per
            pixel), is an error and is not decoded. Pillow, which reads all but JPEG, warns above 89,478,485 pixels.
        filter: filter of the resampling, always with antialias.
        gap: a JPEG is decoded at the smallest of 1, 1/2, 1/4 and 1/8 at which the crop still has ``gap * size`` pixels
            per side; ``inf`` decodes all pixels.
        stream: name of the random stream; two views of one sample use two streams.

    >>> white = simplejpeg.encode_jpeg(np.full((30, 40, 3), 255, dtype=np.uint8))
    >>> x_B3SS, errors = Images(8)([white, None, white[:99]], np.array([1, 2, 3]))
    >>> x_B3SS.shape, x_B3SS.amin((1, 2, 3)).tolist(), [error is None for error in errors]
    (torch.Size([3, 3, 8, 8]), [255, 0, 0], [True, True, False])
    """

    def __init__(
        self,
        size: int,
        scale: tuple[float, float] = (0.9, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        flip: float = 0.5,
        limit: int = LIMIT,
        filter: Literal["bicubic", "bilinear"] = "bicubic",
        gap: float = 1.4,
        stream: str = "image",
    ) -> None:
        require_crop(size, scale, ratio, flip)
        require_value(filter in _RESAMPLE, f"filter: {filter!r} is not one of {', '.join(_RESAMPLE)}")
        require_value(gap >= 1, f"gap {gap:g}: at least 1, or fewer pixels would be decoded than the batch has")
        require_value(limit >= 1, f"limit {limit}: at least 1 pixel")
        self.size, self.scale, self.ratio, self.flip = size, scale, ratio, flip
        self.limit, self.filter, self.gap, self.stream = limit, filter, gap, stream

    def stream_copy(self, stream: str) -> Images:
        """Return a copy with the same distribution and another random stream: a second view."""
        twin = copy.copy(self)
        twin.stream = stream
        return twin

    def __call__(
        self, data: Sequence[bytes | Reduced | None], draw_B: np.ndarray | None = None
    ) -> tuple[Tensor, list[str | None]]:
        """Decode the batch, and return for each row why it could not be read, or None.

        Args:
            data: one encoded (or :meth:`reduce`) image per row; None for a row of zeros.
            draw_B: each sample's seed, or None for evaluation: the central square, nothing random.
        """
        # in numpy's memory, which asks for huge pages: otherwise touching fresh pages takes a twentieth of the time
        x_BSS3 = np.empty((len(data), self.size, self.size, 3), dtype=np.uint8)
        x_B3SS = torch.from_numpy(x_BSS3).permute(0, 3, 1, 2)
        errors: list[str | None] = [None] * len(data)
        headers: dict[int, Header | Reduced] = {}
        for row, encoded in enumerate(data):
            try:
                if encoded is not None:
                    headers[row] = encoded if isinstance(encoded, Reduced) else self.header(encoded)
            except ValueError as error:
                errors[row] = str(error)
        shape_N2 = np.array([header[:2] for header in headers.values()], dtype=np.int64).reshape(-1, 2)
        box_N4, flipped_N = self.boxes(shape_N2, None if draw_B is None else draw_B[list(headers)])
        read = set()
        out_B = x_B3SS.split(1)
        for row, box, flipped in zip(list(headers), box_N4.tolist(), flipped_N.tolist(), strict=True):
            header = headers.pop(row)  # so that one decoded image is in memory at a time
            try:
                decoded = _within(header, box) if isinstance(header, Reduced) else self.decode(header, box)
                x_HWC, (top, left, height, width) = decoded
            except ValueError as error:
                errors[row] = str(error)
                continue
            del header
            x_1CHW = torch.from_numpy(x_HWC[None, top : top + height, left : left + width]).permute(0, 3, 1, 2)
            out_13SS = out_B[row]
            if draw_B is None:
                self._central(x_1CHW, box[2:], out_13SS)
            else:
                self._resample(x_1CHW, out_13SS)
            if flipped:
                out_13SS.copy_(out_13SS.flip(-1))
            read.add(row)
        for row in range(len(data)):
            if row not in read:
                x_B3SS[row] = 0
        return x_B3SS, errors

    def reduce(self, data: bytes, side: int) -> Reduced:
        """Resize a whole encoded image to ``side`` x ``side`` pixels, and keep its shape as numbers.

        Crops of the result are those of the image, resampled twice.

        >>> whole = Images(8).reduce(simplejpeg.encode_jpeg(np.full((30, 40, 3), 255, dtype=np.uint8)), 12)
        >>> whole.height, whole.width, whole.x_SS3.shape
        (30, 40, (12, 12, 3))
        """
        header = self.header(data)
        box_4 = self.boxes(np.array([header[:2]], dtype=np.int64), None)[0][0].tolist()
        x_HWC, (top, left, height, width) = self.decode(header, box_4)
        x_SS3 = np.empty((1, side, side, 3), dtype=np.uint8)
        x_1CHW = torch.from_numpy(x_HWC[None, top : top + height, left : left + width]).permute(0, 3, 1, 2)
        self._resample(x_1CHW, torch.from_numpy(x_SS3).permute(0, 3, 1, 2))
        return Reduced(box_4[2], box_4[3], x_SS3[0])

    def _resample(self, x_1CHW: Tensor, out_1CHW: Tensor) -> None:
        _RESAMPLE[self.filter](x_1CHW, list(out_1CHW.shape[2:]), False, None, None, out=out_1CHW)

    def _central(self, x_1CHW: Tensor, shape: Sequence[int], out_13SS: Tensor) -> None:
        """Resize the shorter side of an image of ``shape`` to S, and take the middle of the longer one."""
        high, wide = (self.size * side // min(shape) for side in shape)
        if high == wide:
            self._resample(x_1CHW, out_13SS)
            return
        whole_13HW = torch.empty(1, high, wide, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
        self._resample(x_1CHW, whole_13HW)
        top, left = round((high - self.size) / 2), round((wide - self.size) / 2)
        out_13SS.copy_(whole_13HW[:, :, top : top + self.size, left : left + self.size])

    # boxes of the crops ----------------------------------------------------------------------------------------

    def boxes(self, shape_B2: np.ndarray, draw_B: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """Sample crops ``[B, 4]``, (top, left, height, width) in images of (height, width), and bool ``[B]``: mirrored.

        A pure function of each image's shape and seed. Without seeds: the whole image, or the middle of a very long
        one.
        """
        high_B, wide_B = shape_B2.T
        if draw_B is None:
            size_B2 = np.minimum(shape_B2, shape_B2.min(axis=1, keepdims=True) * _LONGEST)
            return np.concatenate([(shape_B2 - size_B2) // 2, size_B2], axis=1), np.zeros(len(shape_B2), dtype=bool)
        attempts = [f"crop/{self.stream}/{what}{k}" for what in ("area", "ratio") for k in range(_ATTEMPTS)]
        purposes = [*attempts, *(f"crop/{self.stream}/{what}" for what in ("top", "left", "flip"))]
        u_BK = uniform_NK(draw_B, purposes).numpy().astype(np.float64)
        u_area_BK, u_ratio_BK = u_BK[:, :_ATTEMPTS], u_BK[:, _ATTEMPTS : 2 * _ATTEMPTS]
        u_top_B, u_left_B, u_flip_B = u_BK[:, 2 * _ATTEMPTS :].T
        low, high = self.ratio
        area_BK = (self.scale[0] + (self.scale[1] - self.scale[0]) * u_area_BK) * (high_B * wide_B)[:, None]
        ratio_BK = np.exp(math.log(low) + (math.log(high) - math.log(low)) * u_ratio_BK)
        width_BK, height_BK = np.sqrt(area_BK * ratio_BK).round(), np.sqrt(area_BK / ratio_BK).round()
        fits_BK = (width_BK >= 1) & (height_BK >= 1) & (width_BK <= wide_B[:, None]) & (height_BK <= high_B[:, None])
        row_B, first_B = np.arange(len(shape_B2)), fits_BK.argmax(axis=1)
        fits_B = fits_BK[row_B, first_B]
        # the largest central box of a permitted ratio
        wide_most_B = np.minimum(wide_B, np.maximum((high_B * high).round(), 1))
        high_most_B = np.minimum(high_B, np.maximum((wide_B / low).round(), 1))
        width_B = np.where(fits_B, width_BK[row_B, first_B], wide_most_B).astype(np.int64)
        height_B = np.where(fits_B, height_BK[row_B, first_B], high_most_B).astype(np.int64)
        free_top_B, free_left_B = high_B - height_B, wide_B - width_B
        top_B = np.where(fits_B, u_top_B * (free_top_B + 1), free_top_B // 2).astype(np.int64)
        left_B = np.where(fits_B, u_left_B * (free_left_B + 1), free_left_B // 2).astype(np.int64)
        return np.stack([top_B, left_B, height_B, width_B], axis=1), u_flip_B < self.flip

    # one image -------------------------------------------------------------------------------------------------

    def header(self, data: bytes) -> Header:
        """Read the shape and orientation of an image without decoding its pixels."""
        height, width, fast = _read_header(data)
        self._require_size(height, width)  # before Pillow, which allocates a WebP's canvas on opening
        image, exif = None, _jpeg_exif(data) if fast else None
        if not fast:
            image = _open(data)
            width, height = image.size
            self._require_size(height, width)
            _require_bounded(image)
            exif = image.info.get("exif")
        if min(height, width) < 1:
            raise ValueError("no pixels")
        orientation = _orientation(exif)
        if orientation >= 5:
            height, width = width, height
        return Header(height, width, orientation, data, image)

    def _require_size(self, height: int, width: int) -> None:
        if height * width > self.limit:
            raise ValueError(f"{width:,} x {height:,} pixels, more than the limit of {self.limit:,}")

    def decode(
        self, header: Header, box: Sequence[int], out: Sequence[int] | None = None
    ) -> tuple[np.ndarray, list[int]]:
        """Decode the upright image as uint8 ``[H, W, 3]``, at reduced size if ``box`` allows it, and the box in it.

        ``out``: height and width that the box is resized to; a square of ``size`` by default.
        """
        high, wide = header[:2] if header.orientation < 5 else header[1::-1]
        times = self.reduction(box, out) if header.image is None else 1
        try:
            if header.image is None:
                try:
                    # ask for no larger shape: other fractions of libjpeg-turbo, such as 3/8, are slow
                    least = {"min_height": -(-high // times), "min_width": -(-wide // times)}
                    x_HWC = simplejpeg.decode_jpeg(header.data, **least)
                except ValueError:  # simplejpeg raises libjpeg's warnings; Pillow reads images with harmless ones
                    times, x_HWC = 1, rgb_of(_open(header.data))
            else:
                x_HWC = rgb_of(header.image)
        except Exception as error:  # decoders of foreign bytes raise anything from SyntaxError to struct.error
            raise ValueError(one_line(error)) from error
        if x_HWC.shape[:2] != (-(-high // times), -(-wide // times)):
            raise ValueError(f"{x_HWC.shape[1]} x {x_HWC.shape[0]} pixels, but the header has {wide} x {high}")
        top, left, bottom, right = (round(edge / times) for edge in (box[0], box[1], box[0] + box[2], box[1] + box[3]))
        return _upright(x_HWC, header.orientation), [top, left, bottom - top, right - left]

    def reduction(self, box: Sequence[int], out: Sequence[int] | None = None) -> int:
        """Return 1, 2, 4 or 8: how many times smaller a JPEG may be decoded for a crop (top, left, height, width).

        >>> [Images(224).reduction([0, 0, side, side]) for side in (256, 640, 1024, 4000)]
        [1, 2, 2, 8]
        """
        high, wide = out or (self.size, self.size)
        spare = min(box[2] / high, box[3] / wide) / self.gap
        return max(times for times in (1, 2, 4, 8) if times == 1 or times <= spare)


def _within(image: Reduced, box: Sequence[int]) -> tuple[np.ndarray, list[int]]:
    """Return the pixels of a reduced image, and the full image's box in them, at least one pixel per side."""
    side = len(image.x_SS3)
    down, across = side / image.height, side / image.width
    top, left = min(round(box[0] * down), side - 1), min(round(box[1] * across), side - 1)
    bottom, right = round((box[0] + box[2]) * down), round((box[1] + box[3]) * across)
    return image.x_SS3, [top, left, max(bottom - top, 1), max(right - left, 1)]


# formats -------------------------------------------------------------------------------------------------------


def _jpeg_exif(data: bytes) -> bytes | None:
    """Find the EXIF block among the first application segments and comments of a JPEG."""
    at = 2
    for _ in range(64):
        marker = data[at : at + 2]
        if len(marker) < 2 or marker[0] != 0xFF or not (0xE0 <= marker[1] <= 0xEF or marker[1] == 0xFE):
            break
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if marker[1] == 0xE1 and data[at + 4 : at + 10] == b"Exif\0\0":
            return data[at + 4 : end]
        at = end
    return None


def _read_header(data: bytes) -> tuple[int, int, bool]:
    """Read height and width from the first bytes, and whether the fast JPEG decoder reads it; zeros if unknown."""
    width = height = 0
    if data.startswith(b"\xff\xd8"):
        try:
            height, width, space, _ = simplejpeg.decode_jpeg_header(data)
        except ValueError:  # broken or unusual: Pillow reads more, with better messages
            return 0, 0, False
        return int(height), int(width), space not in ("CMYK", "YCCK")
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        width, height = (int.from_bytes(data[k : k + 4], "big") for k in (16, 20))
    elif data.startswith(b"GIF8"):
        width, height = (int.from_bytes(data[k : k + 2], "little") for k in (6, 8))
    elif data[:4] == b"RIFF" and data[8:16] == b"WEBPVP8X":
        width, height = (int.from_bytes(data[k : k + 3], "little") + 1 for k in (24, 27))
    elif data[:4] == b"RIFF" and data[8:16] == b"WEBPVP8L":
        bits = int.from_bytes(data[21:25], "little")
        width, height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    elif data[:4] == b"RIFF" and data[8:16] == b"WEBPVP8 ":
        width, height = (int.from_bytes(data[k : k + 2], "little") & 0x3FFF for k in (26, 28))
    return height, width, False


def _open(data: bytes) -> Image.Image:
    """Open an image with Pillow, without decoding it."""
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        start = f"begins with {data[:4]!r}" if data else "no bytes"
        raise ValueError(f"not a whole JPEG, PNG, WebP or GIF ({len(data):,} bytes, {start})") from None
    except Exception as error:  # decoders of foreign bytes raise anything from SyntaxError to struct.error
        raise ValueError(one_line(error)) from error


def rgb_of(image: Image.Image) -> np.ndarray:
    """Convert an image of any Pillow mode to uint8 RGB ``[H, W, 3]``, over white."""
    image.load()
    strip = max(_STRIP // max(image.width, 1), 1)
    if image.height <= strip:
        return _strip_of(image)
    x_HW3 = np.empty((image.height, image.width, 3), dtype=np.uint8)
    for top in range(0, image.height, strip):
        box = (0, top, image.width, min(top + strip, image.height))
        x_HW3[top : top + strip] = _strip_of(image.crop(box))
    return x_HW3


def _strip_of(image: Image.Image) -> np.ndarray:
    if image.mode.startswith("I;16"):  # 16-bit grey, which convert() clips
        x_HW1 = (np.asarray(image) >> 8).astype(np.uint8)[:, :, None]
        return np.repeat(x_HW1, 3, axis=2)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.array(image.convert("RGB"))


def _require_bounded(image: Image.Image) -> None:
    """Raise ValueError for an image of more than ``BYTES`` when decoded."""
    depth = _DECODERS.get(image.format or "", _DEPTH.get(image.mode, 4))
    size = image.width * image.height * depth
    if size > BYTES:
        what = f"{image.width:,} x {image.height:,} pixels of {image.mode}"
        raise ValueError(f"{what} are {size:,} bytes when decoded, more than the limit of {BYTES:,}")


def _orientation(exif: bytes | None) -> int:
    """Return the orientation, 1 to 8, as in EXIF; 1 by default."""
    if not exif:
        return 1
    tags = Image.Exif()
    try:
        with warnings.catch_warnings(action="ignore"):
            tags.load(exif)
            value = tags.get(_ORIENTATION)
    except Exception:  # broken EXIF blocks are common, and their images are fine
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _upright(x_HWC: np.ndarray, orientation: int) -> np.ndarray:
    """Rotate an image by its EXIF orientation; return a copy, unless it was upright."""
    if orientation == 1:
        return x_HWC
    if orientation >= 5:
        x_HWC = x_HWC.transpose(1, 0, 2)
    down, across = orientation in (3, 4, 7, 8), orientation in (2, 3, 6, 7)
    return np.ascontiguousarray(x_HWC[:: -1 if down else 1, :: -1 if across else 1])
