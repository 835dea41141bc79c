"""Codes of pictures beside principal components and k-means of patches with equal bits, on another vendor's drawings.

Letters: N pictures, M components, P pixels, S pixels of a side.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import Row
from descant.__main__ import main
from descant.datamodules.corpora.emoji import Emoji
from descant.modules.masking.kmeans import KMeansPatches
from descant.modules.tokenizers.codes import CodeTokenizer

#: Required dB of the codes above the mean training picture.
OVER_MEAN = 6.0
SIZE, PATCH, COMPONENTS, MOST_BITS = 48, 8, 192, 10


def pictures(data: Emoji, vendors: list[str]) -> Tensor:
    """Return drawings of training concepts by these vendors, ``[N, 3, S, S]`` in -1..1, as in evaluation."""
    rows = [(c, v) for v in vendors for c in data.training_concepts if data.pack.drawings(v)[1][c]]
    x_N4HW = torch.stack([data.pack.downsample(vendor, data.size)[concept] for concept, vendor in rows])
    return data.pixels(x_N4HW, torch.arange(len(rows)))


def quantise(y_N: Tensor, bits: int, reach: Tensor) -> Tensor:
    """Quantise to the centres of ``2^bits`` equal steps over -reach..reach; zero bits give 0."""
    step = 2 * reach / 2**bits
    return ((y_N / step).floor().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) + 0.5) * step if bits else y_N * 0


class Components:
    """Principal components of whole training pictures, each quantised in equal steps.

    For each component with b bits, 24 reaches are tried, and the one with the least error on the training pictures is
    used. Bits are assigned one by one to the component whose error falls most.
    """

    def __init__(self, x_NP: Tensor, bits: int, components: int = COMPONENTS) -> None:
        self.mean_P = x_NP.mean(dim=0)
        self.axis_PM = torch.pca_lowrank(x_NP - self.mean_P, components, center=False, niter=4)[2]
        y_NM = (x_NP - self.mean_P) @ self.axis_PM
        tried = [[self._best(y_N, b) for b in range(MOST_BITS + 1)] for y_N in y_NM.T]
        self.bits = [0] * components
        for _ in range(bits):
            falls = [m[b][0] - m[b + 1][0] if b < MOST_BITS else -1.0 for m, b in zip(tried, self.bits, strict=True)]
            self.bits[falls.index(max(falls))] += 1
        self.reach = [m[b][1] for m, b in zip(tried, self.bits, strict=True)]

    @staticmethod
    def _best(y_N: Tensor, bits: int) -> tuple[float, Tensor]:
        """Return the least square error and its reach."""
        reaches = y_N.abs().amax() * torch.linspace(1, 24, 24) / 24
        errors = [float((quantise(y_N, bits, reach) - y_N).square().sum()) for reach in reaches]
        return min(errors), reaches[errors.index(min(errors))]

    def __call__(self, x_NP: Tensor) -> Tensor:
        """Return the pictures that the bits represent."""
        y_NM = (x_NP - self.mean_P) @ self.axis_PM
        columns = [quantise(y_N, b, r) for y_N, b, r in zip(y_NM.T, self.bits, self.reach, strict=True)]
        return self.mean_P + torch.stack(columns, dim=1) @ self.axis_PM.T


def decibels(x: Tensor, y: Tensor) -> float:
    """Compute PSNR of pictures in -1..1 from the mean square error over all: ``10 log10(4 / mse)``."""
    return 10 * math.log10(4 / float((x - y).double().square().mean()))


def measure_psnr(path: Path, data: Emoji, training: Tensor, unseen: Tensor) -> dict[str, float]:
    """Return PSNR of a trained tokenizer, of the mean training picture, and of two methods with equal bits."""
    tokenizer = CodeTokenizer.from_run(path, "last")
    bits = math.floor(tokenizer.length * math.log2(tokenizer.codes))
    rebuilt = torch.cat([tokenizer.decode(tokenizer.encode(x)) for x in unseen.split(256)])
    flat = Components(training.flatten(1), bits)(unseen.flatten(1)).view_as(unseen).clamp(-1, 1)
    patches = KMeansPatches([SIZE, SIZE], PATCH, codes=tokenizer.codes)
    patches.fit(training[:: len(training) // patches.samples])
    used = torch.cat([tokenizer.encode(x) for x in unseen.split(256)]).unique().numel()
    found = {
        "codes": decibels(unseen, rebuilt.clamp(-1, 1)),
        "components": decibels(unseen, flat),
        "patches": decibels(unseen, patches.decode(patches.encode(unseen))),
    }
    return found | {"mean": decibels(unseen, training.mean(dim=0)), "bits": bits, "used": used / tokenizer.vocabulary}


def tokenizer() -> Iterator[Row]:
    """Train multitask/tokenizer and rebuild drawings of the held-out vendor."""
    code = main(["fit", "--config", "multitask/tokenizer", "--name", "tokenizer", "--test", "false"])
    if code != 0:
        raise RuntimeError(f"the run ended with exit code {code}")
    data = Emoji(size=SIZE)
    training, unseen = pictures(data, data.vendors), pictures(data, [data.held_out_vendor])
    found = measure_psnr(Path("runs/tokenizer/latest"), data, training, unseen)
    yield Row.informs("tokenizer/psnr", found["codes"])
    yield Row.informs("tokenizer/used", found["used"])
    yield Row.informs("tokenizer/over_patches", found["codes"] - found["patches"])
    yield Row.at_least("tokenizer/over_mean", found["codes"] - found["mean"], OVER_MEAN)
    yield Row.at_least("tokenizer/over_components", found["codes"] - found["components"], 0.0)
