"""MNI152 brain template (ICBM 2009a, symmetric) from the nilearn wheel: T1, grey and white matter, 1 mm per voxel.

Three maps of 197 x 233 x 189 voxels of uint8 (Fonov 2011, NeuroImage 54:313). The template is the mean of 152 heads and
of their mirror images: its left half *is* its right half, mirrored, bit for bit.
Letters: X, Y, Z voxels to the right, to the front and up.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from descant.datamodules.prepare.package import first_line
from descant.datamodules.prepare.wheel import Wheel

WHEEL = Wheel(
    "nilearn",
    known={"725206484e9fb3f6691f9c2d20204a068759d5072f12055324702ee0cb2bbe8a": "0.14.1"},
    under="nilearn/datasets/data",
)
#: Modality -> its name in the file's name.
FILES = {"t1": "t1", "grey": "gm", "white": "wm"}
# fifteen times the template
MAX_VOXELS = 2**27


def load(folder: Path) -> dict[str, np.ndarray]:
    """Map each modality to its volume, uint8 ``[1, X, Y, Z]``."""
    found = {m: volume(folder / f"mni_icbm152_{name}_tal_nlin_sym_09a_converted.nii.gz") for m, name in FILES.items()}
    shape = found["t1"].shape
    for modality, x_XYZ in found.items():
        if x_XYZ.shape != shape:
            raise ValueError(f"{modality}: a volume of {x_XYZ.shape}, where t1 has {shape}")
    return {modality: x_XYZ[None] for modality, x_XYZ in found.items()}


def volume(file: Path) -> np.ndarray:
    """Read uint8 ``[X, Y, Z]`` from a NIfTI file, its axes turned so that they lead right, to the front and up."""
    import nibabel  # needed here only

    try:
        image = nibabel.load(file)
        if len(image.shape) != 3 or not 0 < math.prod(image.shape) <= MAX_VOXELS:
            raise ValueError(f"{image.shape} voxels, where a volume of at most {MAX_VOXELS:,} is expected")
        if image.get_data_dtype() != np.uint8:
            raise ValueError(f"voxels of {image.get_data_dtype()}, where uint8 is expected")
        return np.ascontiguousarray(np.asanyarray(nibabel.as_closest_canonical(image).dataobj), dtype=np.uint8)
    except Exception as error:  # nibabel, gzip and zlib have errors of their own
        raise ValueError(f"{file.name}: not a readable NIfTI volume ({first_line(error)})") from None
