"""One Landsat-7 scene of six bands: ``L7_ETMs.tif`` of the Debian package r-cran-stars.

A piece of the coast near Olinda, Brazil, 352 x 349 pixels of 28.5 m, uint8; bands 1 to 5 and 7 of the ETM+ sensor.
Letters: C bands, H and W pixels.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from descant.datamodules.prepare.deb import Deb
from descant.datamodules.prepare.package import first_line

DEB = Deb(
    "r-cran-stars",
    known={"ffaf053a6f966a73a1eda30687d77e7ee3825515cc93583de1736f645e84a42b": "0.6-8-1"},
    under="usr/lib/R/site-library/stars/tif",
)
#: Modality -> planes of the file: blue, green and red; near infrared and the two short-wave ones.
BANDS = {"visible": (0, 1, 2), "infrared": (3, 4, 5)}
# a whole Landsat scene
MAX_PIXELS = 2**26


def load(folder: Path) -> dict[str, np.ndarray]:
    """Return modality -> uint8 ``[C, H, W]``. Raise ValueError naming the file if it is missing or broken."""
    x_CHW = bands(folder / "L7_ETMs.tif")
    return {modality: np.ascontiguousarray(x_CHW[list(planes)]) for modality, planes in BANDS.items()}


def bands(file: Path) -> np.ndarray:
    """Read uint8 ``[6, H, W]`` from a TIFF; Pillow does not read six bands."""
    import tifffile  # needed here only

    try:
        with tifffile.TiffFile(file) as tiff:
            page = tiff.pages[0]
            shape, kind = page.shape, page.dtype
            if len(shape) != 3 or shape[2] != 6 or not 0 < math.prod(shape[:2]) <= MAX_PIXELS:
                raise ValueError(f"an array of {shape}, where H x W x 6 is expected")
            if kind != np.uint8:
                raise ValueError(f"pixels of {kind}, where uint8 is expected")
            return page.asarray().transpose(2, 0, 1)
    except Exception as error:  # the reader and zlib have errors of their own
        raise ValueError(f"{file.name}: not a readable image of six bands ({first_line(error)})") from None
