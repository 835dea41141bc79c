"""Colours, extent, outline and symmetry of RGBA drawings, measured for synthetic captions.

Letters: R drawings, K colour terms, H and W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

#: The eleven basic colour terms of English (Berlin and Kay 1969), each with CSS colours as its prototypes.
COLOURS = {
    "black": ("000000", "202020"),
    "white": ("ffffff", "f5f5f5"),
    "grey": ("808080", "a9a9a9", "d3d3d3", "696969"),
    "red": ("ff0000", "dc143c", "b22222", "8b0000"),
    "orange": ("ffa500", "ff8c00", "ff7f50"),
    "yellow": ("ffff00", "ffd700", "f0e68c"),
    "green": ("008000", "32cd32", "006400", "90ee90", "6b8e23"),
    "blue": ("0000ff", "1e90ff", "000080", "87ceeb", "4682b4"),
    "purple": ("800080", "9932cc", "4b0082", "9370db"),
    "pink": ("ffc0cb", "ff69b4", "ff1493"),
    "brown": ("8b4513", "a0522d", "d2b48c", "654321"),
}
OPAQUE = 128  # alpha from which a pixel belongs to the drawing
SECOND = 0.15  # share of a drawing's area from which its second colour is named
BITS = 6  # bits per colour channel, in the table of nearest terms


def oklab(rgb_N3: Tensor) -> Tensor:
    """Convert sRGB in 0..1 to Oklab ``[N, 3]`` (lightness 0..1, two of hue), where equal distances look about equal.

        Lab = M2 (M1 linear(rgb))^(1/3)        Ottosson 2020, "A perceptual color space for image processing"

    >>> [round(x, 2) for x in oklab(torch.tensor([[1.0, 0.0, 0.0]]))[0].tolist()]  # red
    [0.63, 0.22, 0.13]
    """
    linear_N3 = torch.where(rgb_N3 <= 0.04045, rgb_N3 / 12.92, ((rgb_N3 + 0.055) / 1.055) ** 2.4)
    to_lms = torch.tensor(
        [
            [0.4122214708, 0.5363325363, 0.0514459929],
            [0.2119034982, 0.6806995451, 0.1073969566],
            [0.0883024619, 0.2817188376, 0.6299787005],
        ]
    )
    to_lab = torch.tensor(
        [
            [0.2104542553, 0.7936177850, -0.0040720468],
            [1.9779984951, -2.4285922050, 0.4505937099],
            [0.0259040371, 0.7827717662, -0.8086757660],
        ]
    )
    return (linear_N3 @ to_lms.T).clamp(min=0) ** (1 / 3) @ to_lab.T


@lru_cache(maxsize=1)
def _nearest() -> tuple[Tensor, Tensor]:
    """Return the number of the nearest term, and the lightness, for each colour of 6 bits per channel."""
    side = 1 << BITS
    level = (torch.arange(side) + 0.5) / side
    lab_N3 = oklab(torch.cartesian_prod(level, level, level))
    codes = [(k, code) for k, codes in enumerate(COLOURS.values()) for code in codes]
    rgb = torch.tensor([[int(code[i : i + 2], 16) for i in (0, 2, 4)] for _, code in codes])
    term = torch.tensor([k for k, _ in codes])
    return term[torch.cdist(lab_N3, oklab(rgb / 255)).argmin(dim=1)], lab_N3[:, 0]


@dataclass
class MeasuredCaption:
    """Measurements of R drawings; ``share_RK``: share of each colour in the area.

    ``x_RK``, ``y_RK``: the colour's centre minus that of the drawing, in sides of the drawing's box (right and down are
    positive). ``far_RK``: its mean distance from the drawing's centre, divided by that of the whole drawing.
    ``side_R``: the longer side of the box, divided by that of the image. ``wide_R``: the box's width divided by its
    height. ``filled_R``: share of the box that is opaque. ``light_R``: mean Oklab lightness. ``dark_R``: share of black
    in the rim. ``mirror_R``: intersection over union with the mirror image. An empty drawing has zeros.
    """

    share_RK: np.ndarray
    x_RK: np.ndarray
    y_RK: np.ndarray
    far_RK: np.ndarray
    side_R: np.ndarray
    wide_R: np.ndarray
    filled_R: np.ndarray
    light_R: np.ndarray
    dark_R: np.ndarray
    mirror_R: np.ndarray

    def colours(self, r: int) -> list[int]:
        """Return the numbers of the drawing's one or two main colours, by area; none for an empty drawing."""
        order = np.argsort(-self.share_RK[r], kind="stable")[:2]
        return [int(k) for i, k in enumerate(order) if self.share_RK[r, k] >= (SECOND if i else 1e-9)]


def measure(x_R4HW: Tensor) -> MeasuredCaption:
    """Measure RGBA drawings, uint8 ``[R, 4, H, W]``; only pixels that are mostly opaque count.

    A pixel's colour is the term of the prototype that is nearest to it in Oklab.

    >>> square = torch.zeros(1, 4, 8, 8, dtype=torch.uint8)
    >>> square[:, 0, 2:6, 2:6], square[:, 3, 2:6, 2:6] = 250, 255
    >>> m = measure(square)
    >>> [list(COLOURS)[k] for k in m.colours(0)], float(m.side_R[0]), float(m.filled_R[0])
    (['red'], 0.5, 1.0)
    """
    parts = [_measure(part) for part in x_R4HW.split(256)]  # floats of a whole corpus would be gigabytes
    return MeasuredCaption(*(np.concatenate([part[i] for part in parts]) for i in range(len(parts[0]))))


def _measure(x_R4HW: Tensor) -> list[np.ndarray]:
    rows, _, high, wide = x_R4HW.shape
    terms, lightness = _nearest()
    r, g, b = (x_R4HW[:, c].long() >> (8 - BITS) for c in range(3))
    colour_RHW = (r << 2 * BITS) | (g << BITS) | b
    mask_RHW = x_R4HW[:, 3] >= OPAQUE
    term_RHW = terms[colour_RHW]
    area_R = mask_RHW.sum(dim=(1, 2)).clamp(min=1).double()
    y_RHW, x_RHW = (
        t.expand(rows, high, wide).double() for t in (torch.arange(high)[:, None], torch.arange(wide)[None])
    )
    top_R, bottom_R = first_and_end(mask_RHW.any(dim=2))
    left_R, right_R = first_and_end(mask_RHW.any(dim=1))
    box_h_R, box_w_R = (bottom_R - top_R).double(), (right_R - left_R).double()
    side_R = torch.maximum(box_h_R, box_w_R).clamp(min=1)
    cx_R, cy_R = ((t * mask_RHW).sum(dim=(1, 2)) / area_R for t in (x_RHW, y_RHW))
    dx_RHW, dy_RHW = ((t - c[:, None, None]) / side_R[:, None, None] for t, c in ((x_RHW, cx_R), (y_RHW, cy_R)))
    far_RHW = (dx_RHW**2 + dy_RHW**2).sqrt()
    # one bin per (drawing, colour): each sum over pixels is one pass
    terms_K = len(COLOURS)
    bin_N = (torch.arange(rows)[:, None, None] * terms_K + term_RHW)[mask_RHW]

    def total(weight_RHW: Tensor | None) -> Tensor:
        weight_N = None if weight_RHW is None else weight_RHW[mask_RHW]
        return torch.bincount(bin_N, weight_N, minlength=rows * terms_K).view(rows, terms_K).double()

    count_RK = total(None)
    x_RK, y_RK, far_RK = (total(t) / count_RK.clamp(min=1) for t in (dx_RHW, dy_RHW, far_RHW))
    far_R = (far_RHW * mask_RHW).sum(dim=(1, 2)) / area_R
    inner_RHW = 1 - F.max_pool2d(F.pad(1 - mask_RHW.float(), (1, 1, 1, 1), value=1.0)[:, None], 3, 1)[:, 0]
    rim_RHW = mask_RHW & (inner_RHW < 0.5)
    black_RHW = rim_RHW & (term_RHW == list(COLOURS).index("black"))
    light_R = (lightness[colour_RHW].double() * mask_RHW).sum(dim=(1, 2)) / area_R
    mirror_RHW = _mirror_mask(mask_RHW, left_R, right_R)
    both_R = (mask_RHW & mirror_RHW).sum(dim=(1, 2)).double()
    either_R = (mask_RHW | mirror_RHW).sum(dim=(1, 2)).clamp(min=1)
    measured = [
        count_RK / area_R[:, None],
        x_RK,
        y_RK,
        far_RK / far_R.clamp(min=1e-9)[:, None],
        torch.maximum(box_h_R, box_w_R) / max(high, wide),
        box_w_R / box_h_R.clamp(min=1),
        mask_RHW.sum(dim=(1, 2)) / (box_h_R * box_w_R).clamp(min=1),
        light_R,
        black_RHW.sum(dim=(1, 2)) / rim_RHW.sum(dim=(1, 2)).clamp(min=1),
        both_R / either_R,
    ]
    return [t.double().numpy() for t in measured]


def first_and_end(any_RN: Tensor) -> tuple[Tensor, Tensor]:
    """Return the index of the first True, and one past the last; both are 0 if there is none."""
    size = any_RN.shape[1]
    some_R = any_RN.any(dim=1)
    first_R, last_R = any_RN.int().argmax(dim=1), size - any_RN.flip(1).int().argmax(dim=1)
    return first_R * some_R, last_R * some_R


def _mirror_mask(mask_RHW: Tensor, left_R: Tensor, right_R: Tensor) -> Tensor:
    """Mirror a mask within the drawing's box."""
    wide = mask_RHW.shape[2]
    from_RW = (left_R + right_R - 1)[:, None] - torch.arange(wide)
    inside_RW = (from_RW >= 0) & (from_RW < wide)
    at_RHW = from_RW.clamp(0, wide - 1)[:, None].expand(mask_RHW.shape)
    return mask_RHW.gather(2, at_RHW) & inside_RW[:, None]
