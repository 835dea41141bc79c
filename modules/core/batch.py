"""Batch, the contract between data and recipes: inputs, presence masks, targets, content ids and random seeds.

Letters: B samples of this micro-batch on this rank, G samples of the whole optimizer step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from descant.modules.core.host import derive, to_device

#: Suffix of a modality's name that marks its hard negatives.
NEGATIVE = "_neg"


@dataclass
class Batch:
    """``B`` samples of several modalities. A mask marks absent samples; shapes and zeros never do.

    On an accelerator, each tensor keeps a host copy (:mod:`descant.modules.core.host`), and so do the masks that this
    class computes from presence. So no step waits for the device to find out which samples are absent.

    Attributes:
        inputs: modality -> tensor ``[B, ...]``; rows of absent samples may hold anything (zeros by convention).
        present: modality -> bool ``[B]``; a padding row (added so that all ranks have the same shape) is absent in
            every modality.
        targets: name -> tensor ``[B, ...]``: prediction targets, and labels that metrics read.
        index: int64 ``[B]``, a stable id of the sample in its data set.
        content_id: int64 ``[B]``; samples with equal ids have the same content and are never each other's negatives.
        source: int64 ``[B]``, the data set of a mixture that each sample came from.
        rng_seed: int64 ``[B]``, one random key per sample, a pure function of (seed, epoch, index). Everything random
            about a sample (augmentation, caption, masking) is drawn from it by :mod:`descant.modules.core.rng`.
        step: modality -> bool ``[G]``, presence in the whole optimizer step (all ranks, all micro-batches). The sampler
            knows the whole step, so the counts that losses are divided by need no communication.

    >>> batch = Batch(inputs={"image": torch.zeros(3, 2), "text": torch.zeros(3, 4)},
    ...               present={"image": torch.tensor([True, True, False]), "text": torch.tensor([True, False, False])})
    >>> batch.both("image", "text").tolist(), int(batch.count("image")), int(batch.count("image", "text"))
    ([True, False, False], 2, 1)
    """

    inputs: dict[str, Tensor]
    present: dict[str, Tensor]
    targets: dict[str, Tensor] = field(default_factory=dict)
    index: Tensor = None  # type: ignore[assignment]  # __post_init__ fills it with row numbers
    content_id: Tensor = None  # type: ignore[assignment]
    source: Tensor = None  # type: ignore[assignment]
    rng_seed: Tensor = None  # type: ignore[assignment]
    step: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.index is None:
            self.index = to_device(torch.arange(len(self)), self.device)
        self.content_id = self.index if self.content_id is None else self.content_id
        if self.source is None:
            self.source = to_device(torch.zeros(len(self), dtype=torch.long), self.device)
        self.rng_seed = self.index if self.rng_seed is None else self.rng_seed
        self.step = self.step or dict(self.present)

    def __len__(self) -> int:
        return len(next(iter(self.present.values())))

    @property
    def device(self) -> torch.device:
        return next(iter(self.present.values())).device

    @property
    def modalities(self) -> tuple[str, ...]:
        return tuple(self.present)

    def to(self, device: torch.device | str) -> Batch:
        """Copy the batch to a device without waiting for the copies. Lightning calls this for each batch.

        >>> batch = Batch({"image": torch.zeros(2, 1)}, {"image": torch.tensor([True, False])})
        >>> batch.to("cpu").present["image"] is batch.present["image"]
        True
        """
        to = torch.device(device)
        if to.type != "cpu" and to.index is None:
            to = torch.empty(0, device=to).device
        return self._each(lambda x: to_device(x, to))

    def pin_memory(self) -> Batch:
        """Copy the batch to pinned memory, for asynchronous device copies; loaders with ``pin_memory`` call this."""
        return self._each(lambda x: x.pin_memory())

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        made: dict[int, Tensor] = {}  # by identity: fields that share a tensor, such as index and content_id, still do

        def changed(value: Any) -> Any:
            if isinstance(value, dict):
                return {name: changed(x) for name, x in value.items()}
            if id(value) not in made:
                made[id(value)] = change(value)
            return made[id(value)]

        return Batch(**{field.name: changed(getattr(self, field.name)) for field in fields(Batch)})

    def both(self, *modalities: str) -> Tensor:
        """Return a bool mask ``[B]`` of the rows where all of ``modalities`` are present."""
        return _all(self.present, modalities)

    def has_all(self, name: str) -> Tensor:
        """Return a bool mask ``[B]`` of the rows that have every modality of an embedding, such as ``image+sketch``."""
        return self.both(*parts(name))

    def count(self, *modalities: str) -> Tensor:
        """Count the rows of the *whole optimizer step* where all of ``modalities`` are present, as an int64 scalar."""
        return derive(Tensor.sum, _all(self.step, modalities))

    def only(self, *modalities: str) -> Batch:
        """Return the batch with all other modalities absent, here and in the whole optimizer step.

        >>> present = {"image": torch.tensor([True, False]), "text": torch.tensor([True, True])}
        >>> batch = Batch({"image": torch.zeros(2, 1), "text": torch.zeros(2, 1)}, present).only("text")
        >>> batch.present["image"].tolist(), batch.present["text"].tolist()
        ([False, False], [True, True])
        """
        return replace(self, present=only(self.present, *modalities), step=only(self.step, *modalities))

    def negatives(self) -> Batch:
        """Return the hard negatives as a separate batch: ``text_neg`` becomes ``text``, and nothing else is present.

        A hard negative nearly fits a sample but is wrong. Its input and its presence mask have the modality's name
        with the suffix ``_neg``.
        """
        inputs, present, step = (
            {name.removesuffix(NEGATIVE): x for name, x in tensors.items() if name.endswith(NEGATIVE)}
            for tensors in (self.inputs, self.present, self.step)
        )
        return Batch(inputs, present, self.targets, self.index, self.content_id, self.source, self.rng_seed, step)

    def select(self, rows: Tensor | slice) -> Batch:
        """Select some rows; ``step`` still describes the whole optimizer step."""
        part = replace(self, step=self.present)._each(lambda x: select_rows(x, rows))
        part.step = self.step
        return part


def only(present: Mapping[str, Tensor], *modalities: str) -> dict[str, Tensor]:
    """Return presence masks ``[B]`` by modality, all False except those of ``modalities``."""
    return {m: mask_B if m in modalities else derive(torch.zeros_like, mask_B) for m, mask_B in present.items()}


def parts(name: str) -> list[str]:
    """Split an embedding's name into its modalities: ``image+sketch`` embeds both together.

    >>> parts("image+sketch"), parts("image")
    (['image', 'sketch'], ['image'])
    """
    return name.split("+")


def _all(presence: dict[str, Tensor], modalities: tuple[str, ...]) -> Tensor:
    missing = [m for m in modalities if m not in presence]
    if missing:
        raise KeyError(f"modality {missing[0]!r} is not in this batch, which has {', '.join(presence)}")
    return derive(lambda *masks: torch.stack(masks).all(dim=0), *(presence[m] for m in modalities))


def select_rows(x: Tensor, rows: Tensor | slice) -> Tensor:
    """Return ``x[rows]``, with a host copy if both have one."""
    return derive(Tensor.__getitem__, x, rows) if isinstance(rows, Tensor) else derive(lambda x: x[rows], x)


def append_axes(x_B: Tensor, like: Tensor) -> Tensor:
    """Return ``x_B`` as ``[B, 1, ...]`` with as many axes as ``like``, so that it broadcasts over the rest of a row.

    >>> append_axes(torch.tensor([True, False]), torch.zeros(2, 3, 4)).shape
    torch.Size([2, 1, 1])
    """
    return x_B.view(-1, *[1] * (like.ndim - 1))


def some(*masks: Tensor) -> Tensor:
    """Combine masks by logical or, with a host copy if all have one.

    >>> some(torch.tensor([True, False]), torch.tensor([False, False])).tolist()
    [True, False]
    """
    return derive(lambda *every: torch.stack(every).any(dim=0), *masks)


def count_rows(batch: Any) -> int:
    """Count the rows of a :class:`Batch`, a tensor, or the first tensor of a mapping or sequence; otherwise return 0.

    >>> count_rows((torch.zeros(4, 2), torch.zeros(4))), count_rows({"x": torch.zeros(3, 1)}), count_rows(0)
    (4, 3, 0)
    """
    if isinstance(batch, Tensor):
        return batch.shape[0] if batch.ndim else 1
    if isinstance(batch, Mapping):
        batch = tuple(batch.values())
    if isinstance(batch, list | tuple):
        return next((n for n in map(count_rows, batch) if n), 0)
    return len(batch) if hasattr(batch, "__len__") and not isinstance(batch, str | bytes) else 0
