"""Stateless randomness: every draw is a pure function of what it is for, so nothing has to be saved or resumed.

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

from descant.modules.core.host import host_copy, to_device

_MASK = 0xFFFFFFFFFFFFFFFF
_GOLDEN, _M1, _M2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def global_seed() -> int:
    """The run's seed, as ``seed_everything`` has left it for all processes."""
    return int(os.environ.get("PL_GLOBAL_SEED", "0"))


@lru_cache(maxsize=65536)
def salt(purpose: str) -> int:
    """A 64-bit number for a purpose such as ``"augment/image"``: the same in every process and version."""
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
    """:func:`mix` of one key a sample with the same ``parts``, in numpy's wrapping 64-bit arithmetic.

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
    """One float32 in [0, 1) a key, a pure function of (key, parts): ``(mix(key, *parts) >> 39) / 2**24``."""
    return torch.from_numpy((mix_N(key_N, *parts) >> 39).astype(np.float32)) * 2.0**-24


def uniform_NK(key_N: np.ndarray | Tensor, purposes: Sequence[str]) -> Tensor:
    """``[N, K]``: :func:`uniform_N` of each key for K purposes, all in one pass.

    >>> key_N = np.array([5, 6])
    >>> torch.equal(uniform_NK(key_N, ("a", "b"))[:, 1], uniform_N(key_N, "b"))
    True
    """
    return uniform_N(_array(key_N)[:, None], _salts(tuple(purposes)))


def _array(key_N: np.ndarray | Tensor) -> np.ndarray:
    return host_copy(key_N).numpy() if isinstance(key_N, Tensor) else np.asarray(key_N)


def normal_NK(key_N: np.ndarray | Tensor, width: int, purpose: str, device: torch.device | None = None) -> Tensor:
    """``[N, K]`` standard normal numbers: for each key a piece of one series of a million, from a drawn place on.

    A pure function of (key, purpose), for long rows: a hash a number would take ten times as long. A wider row begins
    as a narrower one does; rows of two keys may overlap.

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
    # not the default dtype, which is float64 inside a step of precision 64-true, where it may be first asked for
    return torch.randn(1 << 20, generator=generator, dtype=torch.float32).to(device)


@lru_cache(maxsize=256)
def _salts(purposes: tuple[str, ...]) -> np.ndarray:
    return np.array([salt(purpose) for purpose in purposes], dtype=np.uint64)


@contextlib.contextmanager
def seeded(*parts: int | str) -> Iterator[None]:
    """Run a block that draws from torch's global CPU generator under ``mix(*parts)``; the state is put back.

    For transforms written for the global generator (torchvision v2): about 7 microseconds a use. The CPU
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
    """Parts whose losses differ between one rank and several: name -> their ``by_rank``, the reason in words.

    Such a part reads other samples of its rank, but of no other rank.

    >>> part = nn.Identity()
    >>> part.by_rank = "draws of the rows of a rank"
    >>> by_rank(nn.Sequential(nn.Linear(2, 2), part))
    {'1 (Identity)': 'draws of the rows of a rank'}
    """
    parts = ((name, part, getattr(part, "by_rank", None)) for name, part in module.named_modules())
    return {f"{name} ({type(part).__name__})".strip(): why for name, part, why in parts if isinstance(why, str)}


def drawn_by_rank(module: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Dropout by torch's global generator: name -> the part, and the attribute that holds its probability.

    All other draws are by sample. The global generator is seeded by (seed, step, rank): with the same number of ranks a
    step is bit-identical; with another, other elements are dropped. Parts in eval mode drop nothing.

    >>> drawn_by_rank(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5), nn.Dropout(0.0))).keys()
    dict_keys(['1'])
    """
    parts = {}
    for name, part in ((name, part) for name, part in module.named_modules() if part.training):
        is_dropout = isinstance(part, nn.modules.dropout._DropoutNd)
        for key in ["p"] if is_dropout else [key for key in vars(part) if "drop" in key]:
            if isinstance(vars(part)[key], float) and 0 < vars(part)[key] <= 1:
                parts[name] = part, key
    return parts
