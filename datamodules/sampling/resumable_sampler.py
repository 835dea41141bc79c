"""Resumable batch sampler: the samples of a step by (seed, epoch, position), whatever the ranks and workers.

A resumed run skips what comes before its position (``Order.epoch`` and ``Order.first``): none of it is read.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DistributedSampler

from descant.datamodules.sampling.permutation import Permutation
from descant.modules.core.budget import whole_steps
from descant.modules.core.rng import mix


class Slot(NamedTuple):
    """One row of a batch: which sample, in which epoch; ``real`` is False for a padding row."""

    epoch: int
    sample: int
    real: bool


class Window(NamedTuple):
    """One rank's rows of a micro-batch, the whole optimizer step's rows, and the micro-batch's number in the epoch."""

    slots: list[Slot]
    step: list[Slot]
    number: int = 0


class Order(DistributedSampler[Window]):
    """A batch sampler over ``n`` samples. Global batch g of epoch e is a slice of ``perm(seed, e)``.

    The epoch is cut into ``ceil(n / batch_size)`` global batches of nearly equal size (n/G rounded up or down), so
    every sample is seen exactly once per epoch. Padding slots (``real=False``) fill the rows missing to ``batch_size``,
    so every cut on every rank has the same shape. A global batch is cut into ``accumulate * world`` equal pieces.
    Lightning does not split a ``DistributedSampler`` over ranks a second time; nothing else is inherited.

    Args:
        n: samples in the data set.
        batch_size: rows of one whole optimizer step, over all ranks and micro-batches.
        seed: seed of the order. shuffle: False walks 0..n-1 every epoch.
        rank, world, accumulate: this process's share; ``accumulate * world`` must divide ``batch_size``.
        epoch, first: where to start, ``first`` in micro-batches; a resumed run sets them before the loader is made.

    >>> order = Order(n=5, batch_size=4, seed=0)
    >>> [sum(s.real for s in window.slots) for window in order], len(order)
    ([2, 3], 2)
    """

    def __init__(
        self,
        n: int,
        batch_size: int,
        seed: int,
        shuffle: bool = True,
        rank: int = 0,
        world: int = 1,
        accumulate: int = 1,
        epoch: int = 0,
        first: int = 0,
    ) -> None:
        if batch_size % (world * accumulate):
            near = max(batch_size // (world * accumulate), 1) * world * accumulate
            raise ValueError(
                f"batch_size {batch_size} is the whole step's, and {world} rank(s) x {accumulate} micro-batch(es) do "
                f"not divide it; {near} works"
            )
        if n < 1:
            raise ValueError("the data set is empty")
        self.n, self.batch_size, self.seed, self.shuffle = n, batch_size, seed, shuffle
        self.rank, self.world, self.accumulate = rank, world, accumulate
        self.epoch, self.first = epoch, first
        self.global_batches = -(-n // batch_size)

    @property
    def sampler(self) -> Order:
        """Return itself: Lightning looks for ``set_epoch`` on ``loader.batch_sampler.sampler``."""
        return self

    @property
    def facts(self) -> dict[str, int | bool | str]:
        """Return the arguments that determine the order, besides the position: a resumed run must have the same."""
        return {"order": type(self).__name__, "samples": self.n, "batch_size": self.batch_size, "seed": self.seed}

    def set_epoch(self, epoch: int) -> None:
        if epoch != self.epoch:  # Lightning repeats the call on resume; only a new epoch starts at 0
            self.epoch, self.first = epoch, 0

    def __len__(self) -> int:
        return self.global_batches * self.accumulate  # always the full epoch: Lightning adds the restored position

    def steps_for(self, samples: int) -> int:
        """Compute the fewest optimizer steps from the beginning that see ``samples`` samples, without padding rows.

        >>> Order(n=5, batch_size=4, seed=0).steps_for(7), Order(n=5, batch_size=4, seed=0).steps_for(8)  # 2, 5, 7, 10
        (3, 4)
        """
        return whole_steps(samples, self.n, self.global_batches)

    def permutation(self, epoch: int) -> Permutation | Tensor:
        """Return the sample order of an epoch."""
        return Permutation(self.n, mix(self.seed, "order", epoch)) if self.shuffle else torch.arange(self.n)

    def __iter__(self) -> Iterator[Window]:
        epoch, permutation = self.epoch, self.permutation(self.epoch)
        for position in range(self.first, len(self)):
            batch, micro = divmod(position, self.accumulate)
            low, high = (self.n * b // self.global_batches for b in (batch, batch + 1))
            slots = [Slot(epoch, sample, True) for sample in permutation[low:high].tolist()]
            yield self.window(slots, micro)._replace(number=position)

    def window(self, real: list[Slot], micro: int) -> Window:
        """Return this rank's part of an optimizer step, given the step's samples: padded, then cut."""
        # padding repeats samples of the same step, so that it has ordinary content
        pads = (real[i % len(real)] for i in range(self.batch_size - len(real)))
        step = [*real, *(Slot(slot.epoch, slot.sample, False) for slot in pads)]
        # strided, so that padding spreads over ranks instead of emptying the last one
        return Window(step[micro * self.world + self.rank :: self.world * self.accumulate], step)


class BlockShuffle(Order):
    """An order for data that is read in blocks: blocks are shuffled, then the samples of a few blocks at once.

    A reader that caches ``together`` blocks reads each of them once per epoch. Otherwise as :class:`Order`: every
    sample once per epoch, whatever the ranks.

    Args:
        block_N: the block of each of the n samples.
        together: number of blocks that are shuffled as one.
        batch_size, seed, cut: as in Order.

    >>> order = BlockShuffle(np.array([0, 0, 1, 1, 2, 2]), together=1, batch_size=6, seed=3)
    >>> (order.permutation(0) // 2).tolist()
    [2, 2, 0, 0, 1, 1]
    """

    def __init__(self, block_N: np.ndarray, together: int, batch_size: int, seed: int, **cut: int) -> None:
        super().__init__(len(block_N), batch_size, seed, shuffle=True, **cut)
        self.block_N = torch.from_numpy(np.unique(block_N, return_inverse=True)[1].astype(np.int64))
        self.together = together

    def permutation(self, epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed(mix(self.seed, "order", epoch))
        turn_K = torch.randperm(int(self.block_N.max()) + 1, generator=generator)
        sample_N = torch.randperm(self.n, generator=generator)
        group_N = turn_K[self.block_N[sample_N]] // self.together
        return sample_N[group_N.argsort(stable=True)]
