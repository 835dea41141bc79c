from __future__ import annotations

import random

import numpy as np
import torch

from descant.modules.core import rng
from descant.modules.core.rng import mix, mix_N, normal_NK, seeding, uniform_N, uniform_NK
from tests.tolerance import statistical


def test_vectors_equal_scalars() -> None:
    keys = np.array([0, 1, 2**62, 12345], dtype=np.int64)
    epochs = np.array([0, 1, 2, 3], dtype=np.uint64)
    assert mix_N(keys, "purpose", 7).tolist() == [mix(int(k), "purpose", 7) for k in keys]
    wanted = [mix(9, "sample", int(e), int(k)) for e, k in zip(epochs, keys, strict=True)]
    assert mix_N(np.array([9]), "sample", epochs, keys.astype(np.uint64)).tolist() == wanted


def test_draws_are_uniform_and_independent_of_each_other() -> None:
    u_NK = uniform_NK(np.arange(20_000), ("a", "b"))
    assert u_NK.min() >= 0
    assert u_NK.max() < 1
    assert torch.allclose(u_NK.mean(0), torch.tensor(0.5), rtol=0, atol=statistical(12**-0.5, 20_000))
    # E[x^4] - var^2 = 1/80 - 1/144
    assert torch.allclose(u_NK.var(0), torch.tensor(1 / 12), rtol=0, atol=statistical(180**-0.5, 20_000))
    assert abs(float(torch.corrcoef(u_NK.T)[0, 1])) < 0.02
    neighbours = torch.corrcoef(torch.stack([u_NK[:-1, 0], u_NK[1:, 0]]))[0, 1]
    assert abs(float(neighbours)) < 0.02
    assert torch.equal(u_NK[:, 1], uniform_N(np.arange(20_000), "b"))


def test_seeded_blocks_repeat_and_leave_no_trace() -> None:
    torch.manual_seed(random.randrange(1000))
    before = torch.default_generator.get_state()
    with seeding(3, "crop"):
        first = torch.rand(3)
    with seeding(3, "crop"):
        again = torch.rand(3)
    with seeding(4, "crop"):
        other = torch.rand(3)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.default_generator.get_state(), before)


def test_the_series_of_normal_numbers_does_not_depend_on_the_default_dtype() -> None:
    wanted = normal_NK(np.arange(3), 4, "noise")
    rng._series.cache_clear()
    torch.set_default_dtype(torch.float64)  # as precision 64-true does in a step
    try:
        assert torch.equal(normal_NK(np.arange(3), 4, "noise"), wanted)
    finally:
        torch.set_default_dtype(torch.float32)
