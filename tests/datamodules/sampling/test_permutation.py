from __future__ import annotations

import pytest
import torch

from descant.datamodules.sampling.permutation import Permutation


@pytest.mark.parametrize("n", [1, 2, 3, 10, 1000, 99_991])
@pytest.mark.parametrize("whole", [0, 1 << 20])
def test_every_number_once(n: int, whole: int) -> None:
    assert torch.equal(Permutation(n, key=5, whole=whole)[0:n].sort().values, torch.arange(n))


def test_slices_are_slices_of_the_whole() -> None:
    for whole in (0, 1 << 20):
        permutation = Permutation(1000, key=5, whole=whole)
        parts = [permutation[low : low + 64] for low in range(0, 1000, 64)]
        assert torch.equal(torch.cat(parts), permutation[0:1000])


def test_other_keys_give_other_permutations_without_a_pattern() -> None:
    """Neighbours, places and keys tell nothing: the rank correlation of 10,000 numbers is below 4 / sqrt(n)."""
    a, b = (Permutation(10_000, key=key, whole=0)[0:10_000].double() for key in (1, 2))
    place = torch.arange(10_000).double()
    for x, y in ((a, b), (a, place), (a[1:], a[:-1])):
        assert abs(float(torch.corrcoef(torch.stack([x, y]))[0, 1])) < 0.04
    assert int((a == place).sum()) < 8  # one number in n stays, on average one in all


def test_random_access_far_inside_a_billion_samples() -> None:
    permutation = Permutation(10**9, key=7)
    batch = permutation[999_000_000:999_000_256]
    assert len(set(batch.tolist())) == 256 and int(batch.min()) >= 0 and int(batch.max()) < 10**9
