"""Stateless randomness: every draw is a pure function of its key and purpose, so there is no state to save or resume.

Letters: N keys.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor, nn

from descant.modules.core.compat.layers import Dropout
from descant.modules.core.host import host_copy, to_device

_MASK = 0xFFFFFFFFFFFFFFFF
_GOLDEN, _M1, _M2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def global_seed() -> int:
    """Return the run's seed, which ``seed_everything`` has set for all processes."""
    return int(os.environ.get("PL_GLOBAL_SEED", "0"))


@lru_cache(maxsize=65536)
def salt(purpose: str) -> int:
    """Return a 64-bit number for a purpose such as ``"augment/image"``: the same in every process and version."""
    return int.from_bytes(hashlib.blake2b(purpose.encode(), digest_size=8).digest(), "little")


def mix(*parts: int | str) -> int:
    """Hash integers and purposes into 63 well-mixed bits (splitmix64, chained).

    >>> mix(0, "order", 3) == mix(0, "order", 3), mix(0, "order", 3) == mix(0, "order", 4)
    (True, False)
    """
    h = _GOLDEN
    for part in parts:
        value = salt(part) if isinstance(part, str) else part
        h = (h ^ (value & _MASK)) * _M1 & _MASK
        h ^= h >> 27
        h = h * _M2 & _MASK
        h ^= h >> 31
    return h >> 1


def mix_N(key_N: np.ndarray | Tensor, *parts: int | str | np.ndarray) -> np.ndarray:
    """Apply :func:`mix` to one key per sample with the same ``parts``, in numpy's wrapping 64-bit arithmetic.

    >>> import numpy as np
    >>> int(mix_N(np.array([5]), "caption")[0]) == mix(5, "caption")
    True
    """
    array = _array(key_N)
    h_N = np.full(array.shape, _GOLDEN, dtype=np.uint64)
    values: list[np.ndarray | np.uint64] = [array.astype(np.uint64)]
    for part in parts:
        whole = salt(part) if isinstance(part, str) else part
        values.append(whole if isinstance(whole, np.ndarray) else np.uint64(whole & _MASK))
    for value in values:
        h_N = (h_N ^ value) * np.uint64(_M1)
        h_N = h_N ^ (h_N >> np.uint64(27))
        h_N = h_N * np.uint64(_M2)
        h_N = h_N ^ (h_N >> np.uint64(31))
    return (h_N >> np.uint64(1)).astype(np.int64)


def uniform_N(key_N: np.ndarray | Tensor, *parts: int | str | np.ndarray) -> Tensor:
    """Draw one float32 in [0, 1) per key, a pure function of (key, parts): ``(mix(key, *parts) >> 39) / 2**24``."""
    return torch.from_numpy((mix_N(key_N, *parts) >> 39).astype(np.float32)) * 2.0**-24


def uniform_NK(key_N: np.ndarray | Tensor, purposes: Sequence[str]) -> Tensor:
    """Draw :func:`uniform_N` of each key for K purposes, ``[N, K]``, all in one pass.

    >>> key_N = np.array([5, 6])
    >>> torch.equal(uniform_NK(key_N, ("a", "b"))[:, 1], uniform_N(key_N, "b"))
    True
    """
    return uniform_N(_array(key_N)[:, None], _salts(tuple(purposes)))


def _array(key_N: np.ndarray | Tensor) -> np.ndarray:
    return host_copy(key_N).numpy() if isinstance(key_N, Tensor) else np.asarray(key_N)


def normal_NK(key_N: np.ndarray | Tensor, width: int, purpose: str, device: torch.device | None = None) -> Tensor:
    """Draw ``[N, K]`` standard normal numbers: each key reads one fixed series of a million from a random place on.

    A pure function of (key, purpose), for long rows: one hash per number would take ten times as long. A wider row
    begins with the numbers of a narrower one. Rows of two keys may overlap.

    >>> x_NK = normal_NK(np.arange(100), 5000, "noise")
    >>> round(float(x_NK.std()), 2), torch.equal(normal_NK(np.array([7]), 3, "noise")[0], x_NK[7, :3])
    (1.0, True)
    """
    series = _series(device)
    place_N = to_device((uniform_N(key_N, purpose) * len(series)).long(), series.device)
    return series[(place_N[:, None] + torch.arange(width, device=series.device)) % len(series)]


@lru_cache(maxsize=8)
def _series(device: torch.device | None) -> Tensor:
    generator = torch.Generator().manual_seed(salt("random/series"))
    # not the default dtype: the first call may come inside a step of precision 64-true, where that is float64
    return torch.randn(1 << 20, generator=generator, dtype=torch.float32).to(device)


@lru_cache(maxsize=256)
def _salts(purposes: tuple[str, ...]) -> np.ndarray:
    return np.array([salt(purpose) for purpose in purposes], dtype=np.uint64)


@contextlib.contextmanager
def seeding(*parts: int | str) -> Iterator[None]:
    """Seed torch's global CPU generator with ``mix(*parts)`` for a block, and restore its state afterwards.

    For transforms written for the global generator (torchvision v2); about 7 microseconds per use. The CPU
    generator ignores the upper half of a seed, so the low bits must be well mixed, which ``mix`` ensures.
    """
    generator = torch.default_generator
    state = generator.get_state()
    generator.manual_seed(mix(*parts))
    try:
        yield
    finally:
        generator.set_state(state)


def by_rank(module: nn.Module) -> dict[str, str]:
    """List the parts whose losses differ between one rank and several: name -> ``by_rank``, the reason in words.

    The loss of such a part depends on other samples of its own rank, but not on those of other ranks.

    >>> part = nn.Identity()
    >>> part.by_rank = "draws of the rows of a rank"
    >>> by_rank(nn.Sequential(nn.Linear(2, 2), part))
    {'1 (Identity)': 'draws of the rows of a rank'}
    """
    parts = ((name, part, getattr(part, "by_rank", None)) for name, part in module.named_modules())
    return {f"{name} ({type(part).__name__})".strip(): why for name, part, why in parts if isinstance(why, str)}


def drawn_by_rank(module: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """List dropout that uses torch's global generator: name -> the part, and the attribute with its probability.

    All other draws depend on the sample. The global generator is seeded by (seed, step, rank). So a step is
    bit-identical with the same number of ranks; with another number, other elements are dropped. Parts in eval mode
    drop nothing.

    >>> drawn_by_rank(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5), nn.Dropout(0.0))).keys()
    dict_keys(['1'])
    """
    parts = {}
    for name, part in ((name, part) for name, part in module.named_modules() if part.training):
        is_dropout = isinstance(part, Dropout)
        for key in ["p"] if is_dropout else [key for key in vars(part) if "drop" in key]:
            if isinstance(vars(part)[key], float) and 0 < vars(part)[key] <= 1:
                parts[name] = part, key
    return parts
