"""Batch sampler of a mixture of corpora: how many samples of a step come from each part, and which."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction

from torch import Tensor

from descant.datamodules.sampling.permutation import Permutation
from descant.datamodules.sampling.resumable_sampler import BlockShuffle, Order, Slot, Window
from descant.modules.core.rng import mix


class Shares:
    """Number of each part's samples among the first ``n`` of a sequence: a function of ``n`` alone.

    The parts are the leaves of a Huffman tree of the weights, and each node divides its ``n`` among its two children:

        left(n) = floor(n * w_left / (w_left + w_right) + 1/2),    right(n) = n - left(n)

    The shares sum to ``n``, none decreases as ``n`` grows, and any ``n`` costs the same, so a resumed run replays
    nothing. The error of a share against ``n * weight`` is below 1.5 for up to five parts, and below 1.7 (half the sum
    of the reciprocal Fibonacci numbers) for any number of them.

    Args:
        weights: at least one, all positive; their ratios are kept exactly.

    >>> shares = Shares([Fraction(1, 2), Fraction(3, 10), Fraction(1, 5)])
    >>> shares.at(4), shares.at(10), shares.at(20)
    ([2, 1, 1], [5, 3, 2], [10, 6, 4])
    """

    def __init__(self, weights: Sequence[Fraction]) -> None:
        whole = math.lcm(*(weight.denominator for weight in weights))
        self.parts = len(weights)
        # (weight, number): leaves have the numbers of their parts, inner nodes later ones than their children
        heap = [(int(weight * whole), number) for number, weight in enumerate(weights)]
        heapq.heapify(heap)
        nodes: list[tuple[int, int, int, int, int]] = []
        while len(heap) > 1:
            (low, right), (high, left) = heapq.heappop(heap), heapq.heappop(heap)
            node = self.parts + len(nodes)
            nodes.append((node, left, right, high, low + high))
            heapq.heappush(heap, (low + high, node))
        self.nodes = nodes[::-1]  # from the root down

    def at(self, n: int) -> list[int]:
        """Return the share of each part in the first ``n``."""
        count = [0] * (2 * self.parts - 1)
        count[-1] = n
        for node, left, right, part, whole in self.nodes:
            count[left] = (2 * count[node] * part + whole) // (2 * whole)
            count[right] = count[node] - count[left]
        return count[: self.parts]


class MixedOrder(Order):
    """The order of a mixture: a pure function of (seed, epoch, position), as :class:`Order` is for one corpus.

    Each part has its own permutations, one per pass. ``Shares`` gives its progress at any position, over epochs: an
    epoch continues where the previous one ended. A slot's ``sample`` counts through all parts, and its ``epoch`` is the
    pass of its part, so (epoch, sample) is one visit with its own random numbers.

    Args:
        sizes: samples of each part.
        names: names of the parts; a part's permutations depend on its name, not on the other parts.
        weights: weights of the parts, all positive.
        samples: samples per epoch; with homogeneous batches, rounded up to whole batches.
        homogeneous: each batch from one part. The weights then count batches, and a pass is cut into batches of nearly
            equal size, as Order cuts an epoch, so no batch spans two passes.
        blocked: part -> the order of its passes, for parts that are read a block at a time.
        batch_size, seed, cut: as in Order.

    >>> order = MixedOrder([2, 6], ["a", "b"], [Fraction(1), Fraction(3)], samples=8, batch_size=4, seed=0)
    >>> [sorted(slot.sample for slot in window.step) for window in order]
    [[1, 2, 3, 5], [0, 4, 6, 7]]
    """

    def __init__(
        self,
        sizes: Sequence[int],
        names: Sequence[str],
        weights: Sequence[Fraction],
        samples: int,
        batch_size: int,
        seed: int,
        homogeneous: bool = False,
        blocked: Mapping[int, BlockShuffle] | None = None,
        **cut: int,
    ) -> None:
        super().__init__(samples, batch_size, seed, **cut)  # type: ignore[arg-type]  # cut holds no shuffle
        self.sizes, self.names, self.homogeneous = sizes, names, homogeneous
        self.shares = Shares(weights)
        self.offsets = [sum(sizes[:part]) for part in range(len(sizes))]
        self.blocked = blocked or {}
        self._walks: dict[int, tuple[int, Permutation | Tensor]] = {}

    @property
    def facts(self) -> dict[str, int | bool | str]:
        facts = super().facts
        if self.blocked:
            facts["order"] = f"{facts['order']}, {', '.join(self.names[part] for part in self.blocked)} by blocks"
        return facts

    def __iter__(self) -> Iterator[Window]:
        epoch, samples_of = self.epoch, self._one_part if self.homogeneous else self._all_parts
        for position in range(self.first, len(self)):
            batch, micro = divmod(position, self.accumulate)
            yield self.window(samples_of(epoch, batch), micro)

    def steps_for(self, samples: int) -> int:
        if not self.homogeneous:
            return super().steps_for(samples)
        steps = seen = 0
        while seen < samples:
            _, low, high = self._bounds(steps)
            steps, seen = steps + 1, seen + high - low
        return steps

    def _all_parts(self, epoch: int, batch: int) -> list[Slot]:
        """Return the samples of a global batch, part by part."""
        bounds = (epoch * self.n + self.n * b // self.global_batches for b in (batch, batch + 1))
        walked, goal = map(self.shares.at, bounds)
        return [s for part, (a, b) in enumerate(zip(walked, goal, strict=True)) for s in self._walk(part, a, b)]

    def _one_part(self, epoch: int, batch: int) -> list[Slot]:
        return self._walk(*self._bounds(epoch * self.global_batches + batch))

    def _bounds(self, number: int) -> tuple[int, int, int]:
        """Return the part of a homogeneous batch, and which samples of the part's sequence it holds."""
        walked, goal = self.shares.at(number), self.shares.at(number + 1)
        part = next(part for part in range(len(goal)) if goal[part] > walked[part])
        size, batches = self.sizes[part], -(-self.sizes[part] // self.batch_size)
        turn, piece = divmod(walked[part], batches)
        low, high = (turn * size + size * k // batches for k in (piece, piece + 1))
        return part, low, high

    def _walk(self, part: int, low: int, high: int) -> list[Slot]:
        """Return samples ``low`` to ``high`` of a part's sequence of permutations."""
        size, slots = self.sizes[part], []
        while low < high:
            turn, start = divmod(low, size)
            stop = min(size, start + high - low)
            samples = self._permutation(part, turn)[start:stop] + self.offsets[part]
            slots += [Slot(turn, sample, True) for sample in samples.tolist()]
            low += stop - start
        return slots

    def _permutation(self, part: int, turn: int) -> Permutation | Tensor:
        if self._walks.get(part, (-1,))[0] != turn:
            if part in self.blocked:
                self._walks[part] = turn, self.blocked[part].permutation(turn)
            else:
                seed = mix(self.seed, "order", self.names[part], turn)
                self._walks[part] = turn, Permutation(self.sizes[part], seed)
        return self._walks[part][1]


def require_temperature(alpha: float | None, times: float | None, what: str) -> None:
    """Raise ValueError for arguments that :func:`temper_shares` cannot use; ``what`` names the parts."""
    if alpha is not None and not 0 <= alpha <= 1:
        raise ValueError(f"alpha {alpha:g}: from 0, all {what} alike, to 1, by their sizes; such as 0.5")
    if times is not None and (alpha is None or not times > 1):
        raise ValueError(f"times {times:g}: more than 1, and with an alpha; such as 4")


def temper_shares(sizes: Sequence[int], alpha: float, times: float | None = None) -> list[Fraction]:
    """Compute shares proportional to ``size ** alpha``, each at most ``times`` its share by size; others get the rest.

    >>> [[float(x) for x in temper_shares([900, 100], 0.5, times)] for times in (None, 2.0)]
    [[0.75, 0.25], [0.8, 0.2]]
    """
    whole, wish = sum(sizes), [size**alpha for size in sizes]
    most = [math.inf if times is None else times * size / whole for size in sizes]
    capped: dict[int, float] = {}
    while True:
        left = (1 - sum(capped.values())) / sum(w for k, w in enumerate(wish) if k not in capped)
        over = [k for k, w in enumerate(wish) if k not in capped and w * left > most[k]]
        if not over:
            return [Fraction(round(1e6 * capped.get(k, w * left)) or 1, 10**6) for k, w in enumerate(wish)]
        capped |= {k: most[k] for k in over}
