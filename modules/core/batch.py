"""The one contract between data and recipes: what a batch holds, and who is absent.

Letters: B samples of this micro-batch on this rank, G samples of the whole optimizer step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from descant.modules.core.host import derived, to_device

#: Behind the name of a modality: its hard negatives.
NEGATIVE = "_neg"


@dataclass
class Batch:
    """``B`` samples of several modalities. Absent is a mask, never a shape and never a guess from zeros.

    On an accelerator each tensor remembers its original on the CPU (:mod:`descant.modules.core.host`), and so does what
    is made of presence here: no step waits for the device to know which samples are absent.

    Attributes:
        inputs: modality -> tensor ``[B, ...]``; rows of absent samples hold anything (zeros by custom).
        present: modality -> bool ``[B]``; a padding row (there to keep every rank's shape) is absent everywhere.
        targets: name -> tensor ``[B, ...]``, for what is predicted and for labels that metrics read.
        index: int64 ``[B]``, a stable id of the sample in its data set.
        content_id: int64 ``[B]``; equal ids carry the same content, so they are never each other's negatives.
        source: int64 ``[B]``, which data set of a mixture a sample came from.
        rng_seed: int64 ``[B]``, one random key a sample, a pure function of (seed, epoch, index): whatever is random
            about a sample (augmentation, caption, masking) is drawn from it by :mod:`descant.modules.core.rng`.
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
        """The batch on a device, by copies that are queued and not waited for; Lightning calls it for each batch.

        >>> batch = Batch({"image": torch.zeros(2, 1)}, {"image": torch.tensor([True, False])})
        >>> batch.to("cpu").present["image"] is batch.present["image"]
        True
        """
        to = torch.device(device)
        if to.type != "cpu" and to.index is None:
            to = torch.empty(0, device=to).device
        return self._each(lambda x: to_device(x, to))

    def pin_memory(self) -> Batch:
        """The batch in memory that an accelerator copies from by itself; loaders call it with ``pin_memory``."""
        return self._each(lambda x: x.pin_memory())

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        made: dict[int, Tensor] = {}  # by identity: what is one tensor, such as index and content_id, stays one

        def once(x: Tensor) -> Tensor:
            if id(x) not in made:
                made[id(x)] = change(x)
            return made[id(x)]

        def changed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            return {name: once(x) for name, x in tensors.items()}

        return Batch(
            inputs=changed(self.inputs),
            present=changed(self.present),
            targets=changed(self.targets),
            index=once(self.index),
            content_id=once(self.content_id),
            source=once(self.source),
            rng_seed=once(self.rng_seed),
            step=changed(self.step),
        )

    def both(self, *modalities: str) -> Tensor:
        """Bool ``[B]``: the rows where all of ``modalities`` are present."""
        return _all(self.present, modalities)

    def there(self, name: str) -> Tensor:
        """Bool ``[B]``: the rows that have what an embedding is of, one modality or, as ``image+sketch``, several."""
        return self.both(*parts(name))

    def count(self, *modalities: str) -> Tensor:
        """Int64 scalar: rows of the *whole optimizer step* where all of ``modalities`` are present."""
        return derived(Tensor.sum, _all(self.step, modalities))

    def only(self, *modalities: str) -> Batch:
        """The same samples with no other modality than these, here and in the whole optimizer step.

        >>> present = {"image": torch.tensor([True, False]), "text": torch.tensor([True, True])}
        >>> batch = Batch({"image": torch.zeros(2, 1), "text": torch.zeros(2, 1)}, present).only("text")
        >>> batch.present["image"].tolist(), batch.present["text"].tolist()
        ([False, False], [True, True])
        """
        present, step = (
            {m: mask if m in modalities else derived(torch.zeros_like, mask) for m, mask in masks.items()}
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
        return Batch(inputs, present, self.targets, self.index, self.content_id, self.source, self.rng_seed, step)

    def select(self, rows: Tensor | slice) -> Batch:
        """The sub-batch of some rows; ``step`` still describes the whole optimizer step."""
        return Batch(
            inputs={name: chosen(x, rows) for name, x in self.inputs.items()},
            present={name: chosen(x, rows) for name, x in self.present.items()},
            targets={name: chosen(x, rows) for name, x in self.targets.items()},
            index=chosen(self.index, rows),
            content_id=chosen(self.content_id, rows),
            source=chosen(self.source, rows),
            rng_seed=chosen(self.rng_seed, rows),
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
    return derived(_every, *(presence[m] for m in modalities))


def chosen(x: Tensor, rows: Tensor | slice) -> Tensor:
    """``x[rows]``, which the CPU knows where it knows both."""
    return derived(Tensor.__getitem__, x, rows) if isinstance(rows, Tensor) else derived(lambda x: x[rows], x)


def some(*masks: Tensor) -> Tensor:
    """Bool: where any of the masks is true, which the CPU knows where it knows all of them.

    >>> some(torch.tensor([True, False]), torch.tensor([False, False])).tolist()
    [True, False]
    """
    return derived(_any, *masks)


def _every(*masks: Tensor) -> Tensor:
    return torch.stack(masks).all(dim=0)


def _any(*masks: Tensor) -> Tensor:
    return torch.stack(masks).any(dim=0)
