"""Encoded images of any size and aspect as batches: each at its own grid of patches, within a budget of tokens.

Letters: B samples, N images, H and W pixels of a batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from descant.datamodules.fields.fields import ImageField
from descant.datamodules.fields.image_cache import ImageCache
from descant.datamodules.fields.images import LIMIT, Header, Images, Reduced
from descant.modules.core.rng import uniform_NK
from descant.modules.transforms.any_size import CanvasPixels
from descant.modules.transforms.image import HALF, Colour

#: Largest aspect, either way: of longer images the middle is taken, since a batch is as high and wide as its largest.
LONGEST = 4
#: An image with more tokens than the budget is made smaller, or ends the run.
Oversize = Literal["resize", "error"]


def grids(shape_N2: np.ndarray, patch: int, tokens: int, enlarge: bool = False) -> np.ndarray:
    """Compute rows and columns of patches, int64 ``[N, 2]``, of images of (height, width):

        (ceil(s height / patch), ceil(s width / patch))    at the largest s of at most ``tokens`` patches

    where s is at most 1 unless ``enlarge``. This is NaFlex's rule (timm's ``get_image_size_for_seq``), in whole
    numbers: at the largest s, one side is a whole number of patches.

    >>> grids(np.array([[64, 128], [480, 640], [16, 16]]), patch=16, tokens=64).tolist()
    [[4, 8], [7, 9], [1, 1]]
    >>> grids(np.array([[16, 16]]), patch=16, tokens=64, enlarge=True).tolist()
    [[8, 8]]
    """
    high_N, wide_N = shape_N2.T.astype(np.int64)
    down_N, across_N = _most_patches(high_N, wide_N, tokens), _most_patches(wide_N, high_N, tokens)
    by_down_N2 = np.stack([down_N, -(-wide_N * down_N // high_N)], axis=1)
    by_across_N2 = np.stack([-(-high_N * across_N // wide_N), across_N], axis=1)
    larger_N1 = (down_N * wide_N >= across_N * high_N)[:, None]  # s is down / height or across / width, the larger one
    most_N2 = np.where(larger_N1, by_down_N2, by_across_N2)
    own_N2 = -(-shape_N2.astype(np.int64) // patch)
    return most_N2 if enlarge else np.where((own_N2.prod(axis=1) <= tokens)[:, None], own_N2, most_N2)


def _most_patches(side_N: np.ndarray, other_N: np.ndarray, tokens: int) -> np.ndarray:
    """Return the most patches n along one side for which ``n ceil(n other / side) <= tokens``; 0 if 1 is too many."""
    low_N, high_N = np.zeros_like(side_N), np.full_like(side_N, tokens)
    for _ in range(tokens.bit_length() + 1):
        middle_N = (low_N + high_N + 1) // 2
        fits_N = middle_N * -(-other_N * middle_N // side_N) <= tokens
        low_N, high_N = np.where(fits_N, middle_N, low_N), np.where(fits_N, high_N, middle_N - 1)
    return low_N


class AnySizeImages(Images):
    """Encoded images -> uint8 ``[B, 4, H, W]``: each at the top left, at its own grid of patches.

    The fourth channel is 255 on the image and 0 beside it. Training takes a box of ``scale`` of the area with the
    aspect of the image, at a random place, and flips; evaluation takes the whole image. The number of tokens does not
    depend on the box, which is resized to the grid of the whole. Formats and errors are those of :class:`Images`.

    Args:
        patch: pixels per side of a patch.
        tokens: the most patches per image.
        enlarge: images with fewer patches are enlarged to the budget, too.
        scale, flip, limit, filter, gap, stream: as in Images; ``gap`` is relative to the pixels of the grid.

    >>> import simplejpeg
    >>> white = simplejpeg.encode_jpeg(np.full((20, 40, 3), 255, dtype=np.uint8))
    >>> x_B4HW, _ = AnySizeImages(patch=8, tokens=8)([white, white], np.array([1, 2]))
    >>> x_B4HW.shape, x_B4HW[0, 3].sum().item() // 255
    (torch.Size([2, 4, 16, 32]), 512)
    """

    def __init__(
        self,
        patch: int,
        tokens: int,
        enlarge: bool = False,
        scale: tuple[float, float] = (1.0, 1.0),
        flip: float = 0.5,
        limit: int = LIMIT,
        filter: Literal["bicubic", "bilinear"] = "bicubic",
        gap: float = 1.4,
        stream: str = "image",
    ) -> None:
        super().__init__(patch, scale, flip=flip, limit=limit, filter=filter, gap=gap, stream=stream)
        if tokens < LONGEST:
            raise ValueError(f"tokens {tokens}: at least {LONGEST}, those of an image {LONGEST} times as long as high")
        self.patch, self.tokens, self.enlarge = patch, tokens, enlarge

    def grids(self, shape_N2: np.ndarray) -> np.ndarray:
        """Compute rows and columns of patches, int64 ``[N, 2]``, of images of (height, width)."""
        return grids(_within_longest(shape_N2), self.patch, self.tokens, self.enlarge)

    def boxes(self, shape_B2: np.ndarray, draw_B: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        whole_B2 = _within_longest(shape_B2)
        free_B2 = shape_B2 - whole_B2
        if draw_B is None:
            return np.concatenate([free_B2 // 2, whole_B2], axis=1), np.zeros(len(shape_B2), dtype=bool)
        u_BK = uniform_NK(draw_B, [f"whole/{self.stream}/{what}" for what in ("area", "top", "left", "flip")])
        u_area_B, u_top_B, u_left_B, u_flip_B = u_BK.numpy().astype(np.float64).T
        low, high = self.scale
        share_B1 = np.sqrt(low + (high - low) * u_area_B)[:, None]
        size_B2 = np.maximum((whole_B2 * share_B1).round(), 1).astype(np.int64)
        place_B2 = (np.stack([u_top_B, u_left_B], axis=1) * (shape_B2 - size_B2 + 1)).astype(np.int64)
        return np.concatenate([place_B2, size_B2], axis=1), u_flip_B < self.flip

    def __call__(
        self, data: Sequence[bytes | Reduced | None], draw_B: np.ndarray | None = None
    ) -> tuple[Tensor, list[str | None]]:
        errors: list[str | None] = [None] * len(data)
        headers: dict[int, Header] = {}
        for row, encoded in enumerate(data):
            try:
                if isinstance(encoded, bytes):
                    headers[row] = self.header(encoded)
            except ValueError as error:
                errors[row] = str(error)
        shape_N2 = np.array([header[:2] for header in headers.values()], dtype=np.int64).reshape(-1, 2)
        side_N2 = self.grids(shape_N2) * self.patch
        box_N4, flipped_N = self.boxes(shape_N2, None if draw_B is None else draw_B[list(headers)])
        high, wide = side_N2.max(axis=0).tolist() if len(headers) else (self.patch, self.patch)
        x_BHW4 = np.zeros((len(data), high, wide, 4), dtype=np.uint8)
        of_image = zip(list(headers), side_N2.tolist(), box_N4.tolist(), flipped_N.tolist(), strict=True)
        for row, (h, w), box, flipped in of_image:
            try:
                x_HWC, (top, left, height, width) = self.decode(headers.pop(row), box, (h, w))
            except ValueError as error:
                errors[row] = str(error)
                continue
            x_1CHW = torch.from_numpy(x_HWC[None, top : top + height, left : left + width]).permute(0, 3, 1, 2)
            x_1HW3 = torch.empty(1, h, w, 3, dtype=torch.uint8)
            self._resample(x_1CHW, x_1HW3.permute(0, 3, 1, 2))
            x_BHW4[row, :h, :w, :3] = (x_1HW3.flip(2) if flipped else x_1HW3)[0].numpy()
            x_BHW4[row, :h, :w, 3] = 255
        return torch.from_numpy(x_BHW4).permute(0, 3, 1, 2), errors


def _within_longest(shape_N2: np.ndarray) -> np.ndarray:
    return np.minimum(shape_N2, shape_N2.min(axis=1, keepdims=True) * LONGEST)


class AnySizeField(ImageField):
    """Encoded images of any size and aspect -> uint8 ``[B, 4, H, W]``, each at its own grid of patches.

    Each image has at most a budget of tokens; on the device, pixels beside it are ``-inf``. For :class:`AnySizeTower`
    and a PatchAdapter with ``padded``.

    Each side changes to whole patches, by less than a patch; aspects are kept otherwise: see :func:`grids`. If an image
    is more than 4 times as long as high, or as high as long, only its middle is taken.

    Args:
        field: as in ImageField.
        patch: pixels per side of a patch, as in the tower.
        tokens: the most patches per image.
        oversize: an image with more is resized to the budget, or refused. To refuse, the sizes of all are read before
            training.
        enlarge: images with fewer are enlarged to the budget, as NaFlex does; otherwise they stay as they are.
        scale: share of the area in a training image's box; the aspect is the image's. flip: probability of a mirrored
            image.
        filter, limit, mean, std: as in ImageField.

    >>> AnySizeField(patch=8, tokens=16).decode([b"no picture", None], None)[0].shape
    torch.Size([2, 4, 8, 8])
    """

    def __init__(
        self,
        field: str | None = None,
        patch: int = 16,
        tokens: int = 256,
        oversize: Oversize = "resize",
        enlarge: bool = False,
        scale: tuple[float, float] = (1.0, 1.0),
        flip: float = 0.5,
        filter: Literal["bicubic", "bilinear"] = "bicubic",
        limit: int = LIMIT,
        mean: Colour = HALF,
        std: Colour = HALF,
    ) -> None:
        super().__init__(field, patch * math.isqrt(tokens), limit=limit)
        self.patch, self.tokens, self.oversize = patch, tokens, oversize
        self.images = self.sizes = AnySizeImages(patch, tokens, enlarge, scale, flip, limit, filter)
        self.pixels = CanvasPixels(mean, std)

    def memory(self, rows: int) -> ImageCache | None:
        return None

    def counts(self, shape_N2: np.ndarray) -> np.ndarray:
        """Count the tokens of images of (height, width), int64 ``[N]``; the budget if a shape is not known, 0 x 0."""
        known_N = shape_N2.min(axis=1) > 0
        count_N = self.sizes.grids(np.where(known_N[:, None], shape_N2, 1)).prod(axis=1)
        return np.where(known_N, count_N, self.tokens)

    def require(self, shape_N2: np.ndarray, name: Callable[[int], str]) -> None:
        """Raise ValueError, by ``name`` of its number, for the largest image over the budget, if those are refused."""
        if self.oversize == "resize" or not len(shape_N2):
            return
        own_N2 = -(-_within_longest(shape_N2) // self.patch)
        largest = int(own_N2.prod(axis=1).argmax())
        (rows, columns), over = own_N2[largest].tolist(), int((own_N2.prod(axis=1) > self.tokens).sum())
        if over:
            more = f" ({over:,} images are over it)" if over > 1 else ""
            raise ValueError(
                f"{name(largest)}: {rows * columns:,} tokens, {rows} x {columns} patches of {self.patch} pixels, and "
                f"the budget is {self.tokens:,}{more}; tokens: {rows * columns} is the least that takes all, or "
                "oversize: resize"
            )
