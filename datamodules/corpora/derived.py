"""Modalities that are computed from the image, on the device."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from descant.modules.transforms.image import colour_names, edges
from descant.modules.transforms.palette import dominant_colours, orientations

DERIVED: dict[str, Callable[[Tensor], Tensor]] = {
    "sketch": edges,
    "palette": colour_names,
    "dominant": dominant_colours,
    "orientations": orientations,
    "rgb": torch.clone,
}
