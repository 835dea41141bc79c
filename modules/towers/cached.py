"""Frozen tower with a feature cache: locked-tower training (LiT) that does not recompute the locked tower.

Letters: B samples, M of them not cached, N cached rows, T tokens, D width.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import weakref
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from descant.modules.core.batch import select_rows
from descant.modules.core.host import host_copy, to_device
from descant.modules.towers.base import Frozen, Tokens, Tower
from descant.modules.towers.heads import MeanPool, Pool

#: Bytes of a digest: two different rows collide with probability 2^-128.
DIGEST = 16


class Cached(Frozen):
    """Frozen tower whose pooled features are cached by the content of each input row: ``h_b = pool(tower(x))_b``.

    ``x [B, ...] -> [B, 1, D]``, one token per sample. A repeated row costs one look-up; an augmented row is a new row.
    Rows are computed in float32 (autocast off) and always ``rows`` at a time. So values depend neither on the batch nor
    on the trainer's precision, and a resumed run is bit-identical. State dicts and copies do not contain the cache. New
    weights (a checkpoint) or another device clear it.

    With ``folder``, the cache is kept on disk, in a sub-folder named by a hash of weights, settings, device and torch
    version. Each process writes its own files and reads all files, so ranks and runs may share the folder.

    Args:
        tower: the tower, which is frozen here, in eval mode.
        pool: maps tokens to one vector per sample; by default the mean of real tokens. It is frozen too.
        capacity: maximum N, with ``4 D`` bytes each in main memory; the least recently used row is dropped first.
        rows: number of rows computed at a time; a smaller group is filled up.
        folder: folder of the cache on disk; None keeps it in memory.

    Source: Zhai 2022 (arXiv 2111.07991) for the locked tower.

    >>> from descant.modules.towers import TextTower
    >>> tower = Cached(TextTower(vocab=9, width=8, depth=1, heads=2, length=4))
    >>> x = torch.tensor([[1, 5, 2, 0], [1, 7, 2, 0], [1, 5, 2, 0]])
    >>> tower(x).h_BTD.shape, tower.misses, torch.equal(tower(x).h_BTD, tower(x).h_BTD), tower.misses
    (torch.Size([3, 1, 8]), 2, True, 2)
    """

    def __init__(
        self, tower: Tower, pool: Pool | None = None, capacity: int = 65_536, rows: int = 16, folder: Path | None = None
    ) -> None:
        if capacity < 0 or rows < 1:
            raise ValueError(f"capacity {capacity} is at least 0, rows {rows} at least 1")
        super().__init__(tower.tower if isinstance(tower, Frozen) else tower)
        self.pool = (pool or MeanPool()).requires_grad_(False).eval()
        self.capacity, self.rows, self.folder = capacity, rows, folder
        #: rows looked up, and rows computed
        self.lookups = self.misses = 0
        self._cache: _Cache | None = None
        for part in (self.tower, self.pool):
            part.register_load_state_dict_post_hook(self._clear)

    def train(self, mode: bool = True) -> Cached:
        super().train(mode)
        self.pool.eval()
        return self

    def blocks(self) -> list[nn.Module]:
        """Return no blocks: ranks compute different rows, so a block must not contain a collective."""
        return []

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: rows are computed once, and compiled code differs in the last bits."""

    @torch.compiler.disable
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tokens:
        # not in inference mode: features cached in validation are used in training
        with torch.inference_mode(False), torch.no_grad():
            keys = digests(x, mask)
            cache = self._open(x)
            slot_B = torch.tensor(cache.find(keys))
            cached_B = slot_B >= 0
            firsts: dict[bytes, int] = {}  # equal uncached rows are computed once
            for b in (~cached_B).nonzero().flatten().tolist():
                firsts.setdefault(keys[b], b)
            self.lookups, self.misses = self.lookups + len(keys), self.misses + len(firsts)
            if not firsts:
                return _tokens(cache.h_ND[slot_B], cache.real_N[slot_B], x.device)
            h_MD, real_M = self._compute(x, mask, list(firsts.values()))
            h_BD, real_B = h_MD.new_empty(len(keys), h_MD.shape[1]), torch.empty(len(keys), dtype=torch.bool)
            if cached_B.any():
                h_BD[cached_B], real_B[cached_B] = cache.h_ND[slot_B[cached_B]], cache.real_N[slot_B[cached_B]]
            row_of = {key: m for m, key in enumerate(firsts)}
            m_U = torch.tensor([row_of[key] for key in keys if key in row_of])
            h_BD[~cached_B], real_B[~cached_B] = h_MD[m_U], real_M[m_U]
            cache.add(list(firsts), h_MD, real_M)
            return _tokens(h_BD, real_B, x.device)

    def _compute(self, x: Tensor, mask: Tensor | None, uncached: list[int]) -> tuple[Tensor, Tensor]:
        """Compute features ``[M, D]`` of rows, in batches of one shape, and which have a real token, bool ``[M]``."""
        h, real = [], []
        with torch.autocast(x.device.type, enabled=False):
            for start in range(0, len(uncached), self.rows):
                group = uncached[start : start + self.rows]
                filled = to_device(torch.tensor(group + group[:1] * (self.rows - len(group))), x.device)
                tokens = self.tower(select_rows(x, filled), None if mask is None else select_rows(mask, filled))
                h.append(self.pool(tokens)[: len(group)].cpu())
                real.append(tokens.mask_BT.any(dim=1)[: len(group)].cpu())
        return torch.cat(h), torch.cat(real)

    def _open(self, x: Tensor) -> _Cache:
        if self._cache is None:
            place = None if self.folder is None else Path(self.folder) / identity([self.tower, self.pool], x.device)
            self._cache = _Cache(self.capacity, place)
            # runs when the interpreter exits, at the latest
            weakref.finalize(self, self._cache.write)
        return self._cache

    def _clear(self, *_: object) -> None:
        if self._cache is not None:
            self._cache.write()
        self._cache = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Cached:
        device_before = _device_and_dtype(self)
        super()._apply(fn, recurse)
        if _device_and_dtype(self) != device_before:
            self._clear()
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without the cache."""
        return {**self.__dict__, "_cache": None}


def _tokens(h_BD: Tensor, real_B: Tensor, device: torch.device) -> Tokens:
    return Tokens(to_device(h_BD[:, None], device), to_device(real_B[:, None], device))


class _Cache:
    """Least-recently-used cache of at most ``capacity`` rows, found by digest, with its files in ``folder``."""

    def __init__(self, capacity: int, folder: Path | None) -> None:
        self.capacity, self.folder = capacity, folder
        self.slots: OrderedDict[bytes, int] = OrderedDict()
        self.h_ND, self.real_N = torch.empty(0, 0), torch.empty(0, dtype=torch.bool)
        self.computed: dict[bytes, None] = {}  # rows that this process computed, which its file holds
        self.written = 0
        self.file = f"{os.getpid()}-{secrets.token_hex(4)}.safetensors"
        if folder is not None:
            for file in sorted(folder.glob("*.safetensors")):
                self._read(file)

    def find(self, keys: list[bytes]) -> list[int]:
        """Return the slot of each key, -1 if it is not cached."""
        slots = [self.slots.get(key, -1) for key in keys]
        for key, slot in zip(keys, slots, strict=True):
            if slot >= 0:
                self.slots.move_to_end(key)
        return slots

    def add(self, keys: list[bytes], h_MD: Tensor, real_M: Tensor, computed: bool = True) -> None:
        """Add rows; if there are more than ``capacity``, only the last ones."""
        if self.capacity == 0:
            return
        keys, h_MD, real_M = keys[-self.capacity :], h_MD[-self.capacity :], real_M[-self.capacity :]
        self._grow(min(self.capacity, len(self.slots) + len(keys)), h_MD)
        for key in keys:
            slot = len(self.slots)
            if slot == self.capacity:
                oldest, slot = self.slots.popitem(last=False)
                self.computed.pop(oldest, None)
            self.slots[key] = slot
        slot_M = torch.tensor([self.slots[key] for key in keys])
        self.h_ND[slot_M], self.real_N[slot_M] = h_MD, real_M
        if computed:
            self.computed |= dict.fromkeys(keys)
            # write whenever the file doubles: all writes together cost twice the last one
            if self.folder is not None and len(self.computed) >= max(256, 2 * self.written):
                self.write()

    def _grow(self, size: int, like: Tensor) -> None:
        if size <= len(self.h_ND):
            return
        old_ND, old_N = self.h_ND, self.real_N
        size = min(self.capacity, max(size, 2 * len(old_ND), 256))
        self.h_ND, self.real_N = like.new_empty(size, like.shape[1]), old_N.new_empty(size)
        if len(old_ND):
            self.h_ND[: len(old_ND)], self.real_N[: len(old_ND)] = old_ND, old_N

    def write(self) -> None:
        """Write this process's file atomically."""
        if self.folder is None or len(self.computed) <= self.written:
            return
        slot_M = torch.tensor([self.slots[key] for key in self.computed])
        content = {
            "keys": torch.frombuffer(bytearray(b"".join(self.computed)), dtype=torch.uint8).view(-1, DIGEST),
            "h": self.h_ND[slot_M],
            "real": self.real_N[slot_M],
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        scratch = self.folder / f".{self.file}"
        save_file(content, scratch)
        os.replace(scratch, self.folder / self.file)
        self.written = len(self.computed)

    def _read(self, file: Path) -> None:
        try:
            with safe_open(file, "pt") as content:
                keys_ND, h_ND, real_N = (content.get_tensor(name) for name in ("keys", "h", "real"))
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{file}: not a file of cached rows ({error}); delete it") from None
        data = keys_ND.numpy().tobytes()
        keys = [data[k : k + DIGEST] for k in range(0, len(data), DIGEST)]
        new = [n for n, key in enumerate(keys) if key not in self.slots]
        self.add([keys[n] for n in new], h_ND[new], real_N[new], computed=False)


def digests(x: Tensor, mask: Tensor | None = None) -> list[bytes]:
    """Compute a 128-bit digest of each row from its bytes, shape, dtype and mask.

    >>> a, b, c = digests(torch.tensor([[1, 2], [1, 3], [1, 2]]))
    >>> a == c, a == b
    (True, False)
    """
    start = hashlib.blake2b(f"{x.dtype} {tuple(x.shape[1:])} {mask is None}".encode(), digest_size=DIGEST)
    parts = [_bytes(part) for part in (x, mask) if part is not None]
    rows = []
    for b in range(len(x)):
        digest = start.copy()
        for part in parts:
            digest.update(part[b])
        rows.append(digest.digest())
    return rows


def _bytes(x: Tensor) -> Any:
    """Return the bytes of each row, uint8 ``[B, bytes of a row]`` on the CPU."""
    return host_copy(x).detach().reshape(len(x), -1).contiguous().view(torch.uint8).numpy()


def identity(parts: list[nn.Module], device: torch.device) -> str:
    """Hash everything that features depend on: weights and settings of ``parts``, device type, torch version."""
    digest = hashlib.blake2b(f"{device.type} {torch.__version__}".encode(), digest_size=DIGEST)
    for part in parts:
        digest.update(repr(part).encode())
        for name, module in part.named_modules():
            digest.update(f"{name} {json.dumps(_settings(module), sort_keys=True)}".encode())
        for name, value in sorted({**dict(part.named_buffers()), **part.state_dict()}.items()):
            digest.update(name.encode())
            if isinstance(value, Tensor):
                digest.update(f"{value.dtype} {tuple(value.shape)}".encode())
                digest.update(_bytes(value.reshape(1, -1)))
    return digest.hexdigest()


def _settings(module: nn.Module) -> dict[str, Any]:
    """Collect the plain attributes of a module (heads, epsilon, padding id) and its transformers configuration."""
    settings, config = dict(vars(module)), getattr(module, "config", None)
    if callable(getattr(config, "to_dict", None)):
        settings |= {f"config.{name}": value for name, value in cast(Any, config).to_dict().items()}
    # these do not change the features
    ignored = {"training", "name_or_path", "config._name_or_path", "config.transformers_version"}
    return {name: value for name, value in settings.items() if name[0] != "_" and name not in ignored and _plain(value)}


def _plain(value: object) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_plain(item) for item in value)
    if isinstance(value, dict):
        return all(_plain(item) for pair in value.items() for item in pair)
    return value is None or isinstance(value, (bool, int, float, str))


def _device_and_dtype(module: nn.Module) -> tuple[torch.device, torch.dtype] | None:
    first = next((p for p in module.parameters() if p.is_floating_point()), None)
    return None if first is None else (first.device, first.dtype)
