"""The one contract between data and recipes: what a batch holds, and who is absent.

Letters: B samples of this micro-batch on this rank, G samples of the whole optimizer step.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

#: Behind the name of a modality: its hard negatives.
NEGATIVE = "_neg"


@dataclass
class Batch:
    """``B`` samples of several modalities. Absent is a mask, never a shape and never a guess from zeros.

    Attributes:
        inputs: modality -> tensor ``[B, ...]``; rows of absent samples hold anything (zeros by custom).
        present: modality -> bool ``[B]``; a padding row (there to keep every rank's shape) is absent everywhere.
        targets: name -> tensor ``[B, ...]``, for what is predicted and for labels that metrics read.
        index: int64 ``[B]``, a stable id of the sample in its data set.
        key: int64 ``[B]``; equal keys carry the same content, so they are never each other's negatives.
        source: int64 ``[B]``, which data set of a mixture a sample came from.
        draw: int64 ``[B]``, one random key a sample, a pure function of (seed, epoch, index): whatever is random
            about a sample (augmentation, caption, masking) is drawn from it by :mod:`descant.modules.random`.
        step: modality -> bool ``[G]``, presence in the whole optimizer step (all ranks, all micro-batches): the
            sampler knows the window, so the counts that losses are divided by need no communication.

    >>> batch = Batch(inputs={"image": torch.zeros(3, 2), "text": torch.zeros(3, 4)},
    ...               present={"image": torch.tensor([True, True, False]), "text": torch.tensor([True, False, False])})
    >>> batch.both("image", "text").tolist(), int(batch.count("image")), int(batch.count("image", "text"))
    ([True, False, False], 2, 1)
    """

    inputs: dict[str, Tensor]
    present: dict[str, Tensor]
    targets: dict[str, Tensor] = field(default_factory=dict)
    index: Tensor = None  # type: ignore[assignment]  # filled below: counting rows is the natural default
    key: Tensor = None  # type: ignore[assignment]
    source: Tensor = None  # type: ignore[assignment]
    draw: Tensor = None  # type: ignore[assignment]
    step: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rows = torch.arange(len(self), device=self.device)
        self.index = rows if self.index is None else self.index
        self.key = self.index if self.key is None else self.key
        self.source = torch.zeros_like(rows) if self.source is None else self.source
        self.draw = self.index if self.draw is None else self.draw
        self.step = self.step or dict(self.present)

    def __len__(self) -> int:
        return len(next(iter(self.present.values())))

    @property
    def device(self) -> torch.device:
        return next(iter(self.present.values())).device

    @property
    def modalities(self) -> tuple[str, ...]:
        return tuple(self.present)

    def both(self, *modalities: str) -> Tensor:
        """Bool ``[B]``: the rows where all of ``modalities`` are present."""
        return _all(self.present, modalities)

    def there(self, name: str) -> Tensor:
        """Bool ``[B]``: the rows that have what an embedding is of, one modality or, as ``image+sketch``, several."""
        return self.both(*parts(name))

    def count(self, *modalities: str) -> Tensor:
        """Int64 scalar: rows of the *whole optimizer step* where all of ``modalities`` are present."""
        return _all(self.step, modalities).sum()

    def only(self, *modalities: str) -> Batch:
        """The same samples with no other modality than these, here and in the whole optimizer step.

        >>> present = {"image": torch.tensor([True, False]), "text": torch.tensor([True, True])}
        >>> batch = Batch({"image": torch.zeros(2, 1), "text": torch.zeros(2, 1)}, present).only("text")
        >>> batch.present["image"].tolist(), batch.present["text"].tolist()
        ([False, False], [True, True])
        """
        present, step = (
            {m: mask if m in modalities else torch.zeros_like(mask) for m, mask in masks.items()}
            for masks in (self.present, self.step)
        )
        return replace(self, present=present, step=step)

    def negatives(self) -> Batch:
        """The hard negatives as a batch of their own: what is ``text_neg`` here is ``text`` there, and nothing else is.

        A hard negative is what nearly fits a sample and is wrong of it; its input, and whatever else it needs, has the
        name of what it stands beside with ``_neg`` behind it, and so has its presence.
        """
        inputs, present, step = (
            {name.removesuffix(NEGATIVE): x for name, x in tensors.items() if name.endswith(NEGATIVE)}
            for tensors in (self.inputs, self.present, self.step)
        )
        return Batch(inputs, present, self.targets, self.index, self.key, self.source, self.draw, step)

    def select(self, rows: Tensor | slice) -> Batch:
        """The sub-batch of some rows; ``step`` still describes the whole optimizer step."""
        return Batch(
            inputs={name: x[rows] for name, x in self.inputs.items()},
            present={name: x[rows] for name, x in self.present.items()},
            targets={name: x[rows] for name, x in self.targets.items()},
            index=self.index[rows],
            key=self.key[rows],
            source=self.source[rows],
            draw=self.draw[rows],
            step=self.step,
        )


def parts(name: str) -> list[str]:
    """The modalities that an embedding is of: ``image+sketch`` is of both together.

    >>> parts("image+sketch"), parts("image")
    (['image', 'sketch'], ['image'])
    """
    return name.split("+")


def _all(presence: dict[str, Tensor], modalities: tuple[str, ...]) -> Tensor:
    missing = [m for m in modalities if m not in presence]
    if missing:
        raise KeyError(f"modality {missing[0]!r} is not in this batch, which has {', '.join(presence)}")
    return torch.stack([presence[m] for m in modalities]).all(dim=0)
