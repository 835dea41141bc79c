"""Random permutations with random access: slices of a permutation of any size (Feistel network).

Letters: N numbers.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from descant.modules.core.rng import mix, mix_N

#: Largest n whose permutation is made at once (less than a second, 64 MB).
WHOLE = 1 << 23
_ROUNDS = 6


class Permutation:
    """``perm(n, key)``, a permutation of ``0..n-1`` that is a function of both.

    Small ones are made at once. Slices of a large one are computed on demand, in constant memory. A Feistel network of
    six rounds permutes the numbers below ``4^h >= n``, and is applied again to results of n or more (Black and Rogaway
    2002).

    Args:
        n: how many numbers.
        key: key of the permutation.
        whole: the largest n that is made at once.

    >>> permutation = Permutation(10, key=3, whole=0)
    >>> sorted(permutation[0:10].tolist()) == list(range(10)), torch.equal(permutation[4:7], permutation[0:10][4:7])
    (True, True)
    """

    def __init__(self, n: int, key: int, whole: int = WHOLE) -> None:
        self.n, self.key = n, key
        self._whole = torch.randperm(n, generator=torch.Generator().manual_seed(key)) if n <= whole else None
        self._half = max((n - 1).bit_length() + 1 >> 1, 1)

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, place: slice) -> Tensor:
        """Return the numbers at a slice of positions, int64."""
        low, high, _ = place.indices(self.n)
        if self._whole is not None:
            return self._whole[low:high]
        x_N = self._network(np.arange(low, max(high, low), dtype=np.uint64))
        while (out_N := x_N >= self.n).any():
            x_N[out_N] = self._network(x_N[out_N])
        return torch.from_numpy(x_N.astype(np.int64))

    def _network(self, x_N: np.ndarray) -> np.ndarray:
        half, mask = np.uint64(self._half), np.uint64((1 << self._half) - 1)
        left_N, right_N = x_N >> half, x_N & mask
        for turn in range(_ROUNDS):
            random_N = mix_N(right_N, mix(self.key, "feistel", turn)).astype(np.uint64)
            left_N, right_N = right_N, left_N ^ (random_N & mask)
        return left_N << half | right_N
