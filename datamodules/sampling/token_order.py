"""Batches by a budget of tokens, which limits how many samples a step has. Letters: N samples."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from descant.datamodules.sampling.resumable_sampler import Order, Slot, Window


class TokenOrder(Order):
    """The samples of another order, cut into steps of nearly equal numbers of tokens, none above a budget.

    With ``c_i`` the tokens before sample i in an epoch's order, ``total`` those of all and ``longest`` the most of one
    sample:

        step of sample i = floor(G c_i / total),    G = ceil(total / (budget - longest + 1))

    The samples of a step begin within ``total / G`` tokens of each other, so a step has at most
    ``total / G + longest - 1``. G is the same in each epoch; every sample is seen once per epoch, in the same step
    whatever the ranks. Within a step, the longest samples come first, and go round the ``accumulate * world``
    micro-batches. The micro-batches' tokens differ by less than those of two samples, their rows by at most one, which
    is padding.

    Args:
        order: order of the samples; its seed, ranks and position are used.
        count_N: int64, tokens of each sample; one without any counts as 1.
        budget: the most tokens of one whole optimizer step, over all ranks and micro-batches.

    >>> order = TokenOrder(Order(n=6, batch_size=2, seed=0, shuffle=False), np.array([4, 1, 1, 3, 4, 3]), budget=16)
    >>> [[slot.sample for slot in window.slots] for window in order]
    [[0, 3, 1, 2], [4, 5]]
    """

    def __init__(self, order: Order, count_N: np.ndarray, budget: int) -> None:
        self.order, self.budget = order, budget
        self.count_N = torch.from_numpy(np.maximum(count_N, 1).astype(np.int64))
        self.total, longest = int(self.count_N.sum()), int(self.count_N.max())
        if budget < 4 * longest:
            raise ValueError(f"batch_tokens {budget}: a sample has {longest} tokens; {4 * longest} is the least")
        self.n, self.seed, self.shuffle = order.n, order.seed, order.shuffle
        self.rank, self.world, self.accumulate = order.rank, order.world, order.accumulate
        self.epoch, self.first = order.epoch, order.first
        self.global_batches = -(-self.total // (budget - longest + 1))
        self.batch_size = -(-self.n // self.global_batches)  # of a mean step, for code that reads it

    @property
    def facts(self) -> dict[str, int | bool | str]:
        counts = hashlib.blake2b(self.count_N.numpy().tobytes(), digest_size=8).hexdigest()
        own: dict[str, int | bool | str] = {"batch_tokens": self.budget, "tokens": counts}
        return {name: value for name, value in self.order.facts.items() if name != "batch_size"} | own

    def steps_for(self, samples: int) -> int:
        """Compute the fewest optimizer steps from the beginning that see ``samples`` samples.

        >>> order = TokenOrder(Order(n=6, batch_size=2, seed=0, shuffle=False), np.array([4, 1, 1, 3, 4, 3]), budget=16)
        >>> order.steps_for(4), order.steps_for(5), order.steps_for(10)
        (1, 2, 3)
        """
        epochs, left = divmod(samples, self.n)
        if not left:
            return epochs * self.global_batches
        ends_G = self.cut_epoch(epochs)[1][1:]
        return epochs * self.global_batches + int(torch.searchsorted(ends_G, left)) + 1

    def cut_epoch(self, epoch: int) -> tuple[Tensor, Tensor]:
        """Return the samples of an epoch ``[N]``, and where each of its steps begins and the last ends ``[G + 1]``."""
        permutation = self.order.permutation(epoch)
        sample_N = permutation[0 : self.n]
        count_N = self.count_N[sample_N]
        step_N = (count_N.cumsum(0) - count_N) * self.global_batches // self.total
        return sample_N, torch.searchsorted(step_N, torch.arange(self.global_batches + 1))

    def __iter__(self) -> Iterator[Window]:
        epoch, (sample_N, bound_G) = self.epoch, self.cut_epoch(self.epoch)
        for position in range(self.first, len(self)):
            batch, micro = divmod(position, self.accumulate)
            some = sample_N[bound_G[batch] : bound_G[batch + 1]]
            some = some[self.count_N[some].argsort(descending=True, stable=True)]
            slots = [Slot(epoch, sample, True) for sample in some.tolist()]
            yield self.window(slots, micro)._replace(number=position)

    def window(self, real: list[Slot], micro: int) -> Window:
        parts = self.world * self.accumulate
        pads = (Slot(slot.epoch, slot.sample, False) for slot in real[-1:] * (-len(real) % parts))  # the shortest one
        step = [*real, *pads]
        return Window(step[micro * self.world + self.rank :: parts], step)
