"""Images with short texts from one ``.npz`` file, or synthetic ones if no file is given.

Letters: N samples of a set, B of a batch, S pixels, K texts of a sample, T tokens. Token 0 is padding. A sample with
fewer than K texts has rows of padding after them; a sample without any text lacks the modality.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from descant.datamodules.base import BatchDataset, DataModule, Rows
from descant.modules.core.batch import Batch
from descant.modules.core.rng import mix_N, uniform_N
from descant.modules.transforms.image import Pixels

#: Arrays of a file -> number of dimensions.
ARRAYS = {"image": 4, "text": 3, "label": 1}
COLOURS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (50, 80, 220), "yellow": (230, 210, 50)}


@dataclass
class Corpus:
    """Samples in memory: ``image`` uint8 ``[N, 3, S, S]``, ``text`` int64 ``[N, K, T]``, ``label`` int64 ``[N]``."""

    image: np.ndarray
    text: np.ndarray
    label: np.ndarray

    def __post_init__(self) -> None:
        for name, dimensions in ARRAYS.items():
            array: np.ndarray = getattr(self, name)
            if array.ndim != dimensions or len(array) != len(self.image):
                raise ValueError(
                    f"{name}: shape {list(array.shape)}: {dimensions} dimensions, as many rows as image has"
                )

        if self.image.dtype != np.uint8:
            raise ValueError(
                f"image: {self.image.dtype}, not uint8: pixels become numbers on the device, batch by batch"
            )

    @cached_property
    def texts_N(self) -> np.ndarray:
        """Return the number of texts of each sample."""
        return np.asarray(self.text.any(axis=2).sum(axis=1))

    @cached_property
    def key_N(self) -> np.ndarray:
        """Return content ids: samples with equal first text share one, so they are never each other's negatives."""
        key_N = np.unique(self.text[:, 0], axis=0, return_inverse=True)[1].reshape(-1)
        return np.where(self.texts_N > 0, key_N, len(key_N) + np.arange(len(key_N)))


def read(file: Path) -> Corpus:
    """Read ``image``, ``text`` and ``label`` of an ``.npz`` file: replace this by a reader of your own files."""
    try:
        with np.load(file, allow_pickle=False) as npz:  # a pickle may run code
            arrays = dict(npz)
    except (BadZipFile, EOFError, TypeError, ValueError):
        raise ValueError(f"{file}: not a readable .npz file") from None
    missing = [name for name in ARRAYS if name not in arrays]
    if missing:
        raise ValueError(f"{file}: no array {missing[0]!r}, only {', '.join(arrays)}")
    return Corpus(arrays["image"], arrays["text"].astype(np.int64), arrays["label"])


def synthetic(n: int, seed: int = 0, size: int = 16) -> Corpus:
    """Make ``n`` images of a coloured square on a 4 x 4 board, and texts like "red 3 1" and "red"; one in ten has none.

    >>> corpus = synthetic(4)
    >>> corpus.image.shape, corpus.text.shape, corpus.text[0].tolist()
    ((4, 3, 16, 16), (4, 2, 3), [[4, 6, 9], [4, 0, 0]])
    """
    g = np.random.default_rng(seed)
    label_N, x_N, y_N = g.integers(len(COLOURS), size=n), g.integers(4, size=n), g.integers(4, size=n)
    image = g.integers(200, 256, size=(n, 3, size, size)).astype(np.uint8)  # paper is not quite white
    palette, side = np.array(list(COLOURS.values()), dtype=np.uint8), size // 4
    for i, (label, x, y) in enumerate(zip(label_N, x_N, y_N, strict=True)):
        image[i, :, y * side : (y + 1) * side, x * side : (x + 1) * side] = palette[label][:, None, None]
    colour_N, zero_N = label_N + 1, np.zeros(n, dtype=np.int64)
    texts = [[colour_N, x_N + 5, y_N + 9], [colour_N, zero_N, zero_N]]
    text = np.stack([np.stack(tokens, axis=1) for tokens in texts], axis=1)
    text[g.random(n) < 0.1] = 0
    return Corpus(image, text, label_N)


class Pairs(BatchDataset):
    """Some rows of a corpus.

    Args:
        corpus: all samples. row_N: the samples of this set.
        seed: of everything random about a sample.
        random: draw one of a sample's texts at each visit; otherwise the first is read.
        drop: modality -> probability that a present sample is made absent.
    """

    def __init__(
        self,
        corpus: Corpus,
        row_N: np.ndarray,
        seed: int,
        random: bool = False,
        drop: dict[str, float] | None = None,
    ) -> None:
        super().__init__(seed, drop)
        self.corpus, self.row_N, self.random = corpus, row_N, random

    def __len__(self) -> int:
        return len(self.row_N)

    def identity(self, index_B: np.ndarray) -> np.ndarray:
        return self.row_N[index_B]

    def present(self, index_N: np.ndarray) -> dict[str, Tensor]:
        texts_N = torch.from_numpy(self.corpus.texts_N[self.row_N[index_N]])
        return {"image": torch.ones(len(index_N), dtype=torch.bool), "text": texts_N > 0}

    def rows(self, index_B: np.ndarray, draw_B: np.ndarray) -> Rows:
        row_B, choice_B = self.row_N[index_B], np.zeros(len(index_B), dtype=np.int64)
        if self.random:
            # from the sample's own key: the same for any batch, rank and worker
            choice_B = (uniform_N(draw_B, "text") * torch.from_numpy(self.corpus.texts_N[row_B])).long().numpy()
        inputs = {"image": self.corpus.image[row_B], "text": self.corpus.text[row_B, choice_B]}
        return Rows(
            inputs={name: torch.from_numpy(x) for name, x in inputs.items()},
            targets={"label": torch.from_numpy(self.corpus.label[row_B])},
            key=torch.from_numpy(self.corpus.key_N[row_B]),
        )


class MyData(DataModule):
    """Image-text pairs; equal texts are in one split, so evaluation texts are never trained on.

    Evaluation sets: "validate" has ``val`` and "test" has ``test``, a tenth of the texts each.

    Args:
        batch_size: rows of one whole optimizer step.
        eval_batch_size: rows of an evaluation batch on each rank.
        num_workers: processes that read ahead; the corpus is in memory, so 0 is best.
        drop: modality -> probability that a training sample is made absent.
        tiny: a few synthetic samples, for tests and for `check`.
        file: the ``.npz``; 2,000 synthetic images by default.
        size: pixels of a side of the images that towers read.
    """

    def __init__(
        self,
        batch_size: int = 64,
        eval_batch_size: int = 512,
        num_workers: int = 0,
        drop: dict[str, float] | None = None,
        tiny: bool = False,
        file: str | None = None,
        size: int = 16,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, num_workers, drop, tiny)
        self.file, self.pixels = file, Pixels(size)

    @property
    def modalities(self) -> tuple[str, ...]:
        return ("image", "text")

    @cached_property
    def corpus(self) -> Corpus:
        if self.tiny:
            return synthetic(200)
        return read(Path(self.file)) if self.file else synthetic(2000)

    @cached_property
    def part_N(self) -> np.ndarray:
        """Return each sample's tenth, 0 to 9, which depends on its text alone: 0 validates, 1 tests, others train."""
        return mix_N(self.corpus.key_N, "split") % 10

    def _set(self, parts: tuple[int, ...], **options: bool | dict[str, float]) -> Pairs:
        rows_N = np.flatnonzero(np.isin(self.part_N, parts))
        return Pairs(self.corpus, rows_N, self.seed, **options)  # type: ignore[arg-type]  # random, drop

    def training_set(self) -> Pairs:
        return self._set(tuple(range(2, 10)), random=True, drop=self.drop)

    def bank_set(self) -> Pairs:
        return self._set(tuple(range(2, 10)))

    def evaluation_sets(self, stage: str) -> dict[str, BatchDataset]:
        return {"val": self._set((0,))} if stage == "validate" else {"test": self._set((1,))}

    def describe(self, index: int) -> str:
        return f"{index}: {' '.join(str(token) for token in self.corpus.text[index, 0] if token)}"

    def picture(self, index: int) -> Tensor:
        return torch.from_numpy(self.corpus.image[index])

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        # images are uint8 until here, where the batch is on the device
        batch.inputs["image"] = self.pixels(batch.inputs["image"], batch.rng_seed)
        return batch
