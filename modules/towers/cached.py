"""A frozen tower that computes every input once: locked-tower training (LiT) without the locked tower's cost.

Letters: B samples, M of them not yet known, N remembered rows, T tokens, D width.
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

from descant.modules.core.batch import chosen
from descant.modules.core.host import host_copy, to_device
from descant.modules.towers.base import Frozen, Tokens, Tower
from descant.modules.towers.heads import MeanPool, Pool

#: Bytes of a digest: two different rows share one with probability 2^-128 a pair.
DIGEST = 16


class Cached(Frozen):
    """``h_b = pool(tower(x))_b``, remembered by the content of row b: one token a sample, whatever the tower gives.

    ``x [B, ...] -> [B, 1, D]``. A row that was seen before costs a look-up; an augmented row is another row and simply
    misses. Unknown rows are computed in float32 (autocast is off) and always ``rows`` at a time, so a value depends
    neither on its neighbours in a batch nor on the trainer's precision: a resumed run computes the same bits.
    Nothing that is remembered is part of a state dict or of a copy, and other weights (a loaded checkpoint, a move to
    another device) begin anew.

    With ``folder`` the values outlive the run, in a sub-folder named by a hash of weights, settings, device and version
    of torch. Every process writes files of its own there and reads all, so ranks and runs may share it.

    Args:
        tower: frozen here, and kept in eval mode.
        pool: tokens to one vector a sample; the mean of real tokens where not given. Frozen too.
        capacity: N at most, of ``4 D`` bytes each in main memory; the row unused for longest goes first.
        rows: computed at a time; fewer are filled up.
        folder: where values are kept across runs; None keeps them in memory only.

    Raises:
        ValueError: if ``capacity`` is negative or ``rows`` below 1; in forward, if a kept file cannot be read.

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
        #: rows looked up, and rows computed, since this object was made
        self.lookups = self.misses = 0
        self._memory: _Memory | None = None
        for part in (self.tower, self.pool):
            part.register_load_state_dict_post_hook(self._forget)

    def train(self, mode: bool = True) -> Cached:
        super().train(mode)
        self.pool.eval()
        return self

    def blocks(self) -> list[nn.Module]:
        """None: which rank computes which rows is its own affair, so no rank may wait for another inside a block."""
        return []

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Left undone: rows are rarely computed, and compiled code has other last bits."""

    # looking up ----------------------------------------------------------------------------------------------

    @torch.compiler.disable
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tokens:
        # outside inference mode: what a validation remembers is used in training
        with torch.inference_mode(False), torch.no_grad():
            keys = digests(x, mask)
            memory = self._opened(x)
            slot_B = torch.tensor(memory.find(keys))
            known_B = slot_B >= 0
            firsts: dict[bytes, int] = {}  # of equal unknown rows, one is computed
            for b in (~known_B).nonzero().flatten().tolist():
                firsts.setdefault(keys[b], b)
            self.lookups, self.misses = self.lookups + len(keys), self.misses + len(firsts)
            if not firsts:
                return _tokens(memory.h_ND[slot_B], memory.real_N[slot_B], x.device)
            h_MD, real_M = self._computed(x, mask, list(firsts.values()))
            h_BD, real_B = h_MD.new_empty(len(keys), h_MD.shape[1]), torch.empty(len(keys), dtype=torch.bool)
            if known_B.any():
                h_BD[known_B], real_B[known_B] = memory.h_ND[slot_B[known_B]], memory.real_N[slot_B[known_B]]
            place = {key: m for m, key in enumerate(firsts)}
            m_U = torch.tensor([place[key] for key in keys if key in place])
            h_BD[~known_B], real_B[~known_B] = h_MD[m_U], real_M[m_U]
            memory.keep(list(firsts), h_MD, real_M)
            return _tokens(h_BD, real_B, x.device)

    def _computed(self, x: Tensor, mask: Tensor | None, unknown: list[int]) -> tuple[Tensor, Tensor]:
        """``[M, D]`` and bool ``[M]`` (has it a real token?) of some rows, in groups of one and the same shape."""
        h, real = [], []
        with torch.autocast(x.device.type, enabled=False):
            for start in range(0, len(unknown), self.rows):
                group = unknown[start : start + self.rows]
                filled = to_device(torch.tensor(group + group[:1] * (self.rows - len(group))), x.device)
                tokens = self.tower(chosen(x, filled), None if mask is None else chosen(mask, filled))
                h.append(self.pool(tokens)[: len(group)].cpu())
                real.append(tokens.mask_BT.any(dim=1)[: len(group)].cpu())
        return torch.cat(h), torch.cat(real)

    # the memory ----------------------------------------------------------------------------------------------

    def _opened(self, x: Tensor) -> _Memory:
        if self._memory is None:
            place = None if self.folder is None else Path(self.folder) / identity([self.tower, self.pool], x.device)
            self._memory = _Memory(self.capacity, place)
            # also where a run ends without a word: at the end of the interpreter
            weakref.finalize(self, self._memory.write)
        return self._memory

    def _forget(self, *_: object) -> None:
        if self._memory is not None:
            self._memory.write()
        self._memory = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Cached:
        before = _home(self)
        super()._apply(fn, recurse)
        if _home(self) != before:
            self._forget()
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Of a copy or a pickle: without the memory."""
        return {**self.__dict__, "_memory": None}


def _tokens(h_BD: Tensor, real_B: Tensor, device: torch.device) -> Tokens:
    return Tokens(to_device(h_BD[:, None], device), to_device(real_B[:, None], device))


class _Memory:
    """Digest -> row, at most ``capacity`` of them, the one unused for longest goes first; and its files.

    Args:
        capacity: N at most. folder: of the files of one tower, or None.
    """

    def __init__(self, capacity: int, folder: Path | None) -> None:
        self.capacity, self.folder = capacity, folder
        self.slots: OrderedDict[bytes, int] = OrderedDict()
        self.h_ND, self.real_N = torch.empty(0, 0), torch.empty(0, dtype=torch.bool)
        self.own: dict[bytes, None] = {}  # computed by this process, so its own file holds them
        self.written = 0
        self.file = f"{os.getpid()}-{secrets.token_hex(4)}.safetensors"
        if folder is not None:
            for file in sorted(folder.glob("*.safetensors")):
                self._read(file)

    def find(self, keys: list[bytes]) -> list[int]:
        """The slot of each key, -1 where there is none."""
        found = [self.slots.get(key, -1) for key in keys]
        for key, slot in zip(keys, found, strict=True):
            if slot >= 0:
                self.slots.move_to_end(key)
        return found

    def keep(self, keys: list[bytes], h_MD: Tensor, real_M: Tensor, own: bool = True) -> None:
        """Remember rows; of more than ``capacity`` the last."""
        if self.capacity == 0:
            return
        keys, h_MD, real_M = keys[-self.capacity :], h_MD[-self.capacity :], real_M[-self.capacity :]
        self._grow(min(self.capacity, len(self.slots) + len(keys)), h_MD)
        for key in keys:
            slot = len(self.slots)
            if slot == self.capacity:
                oldest, slot = self.slots.popitem(last=False)
                self.own.pop(oldest, None)
            self.slots[key] = slot
        slot_M = torch.tensor([self.slots[key] for key in keys])
        self.h_ND[slot_M], self.real_N[slot_M] = h_MD, real_M
        if own:
            self.own |= dict.fromkeys(keys)
            # as many new rows as old ones: all writing together costs twice the last
            if self.folder is not None and len(self.own) >= max(256, 2 * self.written):
                self.write()

    def _grow(self, size: int, like: Tensor) -> None:
        if size <= len(self.h_ND):
            return
        old_ND, old_N = self.h_ND, self.real_N
        size = min(self.capacity, max(size, 2 * len(old_ND), 256))
        self.h_ND, self.real_N = like.new_empty(size, like.shape[1]), old_N.new_empty(size)
        if len(old_ND):
            self.h_ND[: len(old_ND)], self.real_N[: len(old_ND)] = old_ND, old_N

    # on disk -------------------------------------------------------------------------------------------------

    def write(self) -> None:
        """This process's own file, in one atomic step."""
        if self.folder is None or len(self.own) <= self.written:
            return
        slot_M = torch.tensor([self.slots[key] for key in self.own])
        content = {
            "keys": torch.frombuffer(bytearray(b"".join(self.own)), dtype=torch.uint8).view(-1, DIGEST),
            "h": self.h_ND[slot_M],
            "real": self.real_N[slot_M],
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        scratch = self.folder / f".{self.file}"
        save_file(content, scratch)
        os.replace(scratch, self.folder / self.file)
        self.written = len(self.own)

    def _read(self, file: Path) -> None:
        try:
            with safe_open(file, "pt") as content:
                keys_ND, h_ND, real_N = (content.get_tensor(name) for name in ("keys", "h", "real"))
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{file}: not a file of remembered rows ({error}); delete it") from None
        data = keys_ND.numpy().tobytes()
        keys = [data[k : k + DIGEST] for k in range(0, len(data), DIGEST)]
        new = [n for n, key in enumerate(keys) if key not in self.slots]
        self.keep([keys[n] for n in new], h_ND[new], real_N[new], own=False)


# digests ------------------------------------------------------------------------------------------------------


def digests(x: Tensor, mask: Tensor | None = None) -> list[bytes]:
    """128 bits of each row's bytes, shape and type, and of its mask.

    >>> a, b, c = digests(torch.tensor([[1, 2], [1, 3], [1, 2]]))
    >>> a == c, a == b
    (True, False)
    """
    start = hashlib.blake2b(f"{x.dtype} {tuple(x.shape[1:])} {mask is None}".encode(), digest_size=DIGEST)
    parts = [_bytes(part) for part in (x, mask) if part is not None]
    found = []
    for b in range(len(x)):
        digest = start.copy()
        for part in parts:
            digest.update(part[b])
        found.append(digest.digest())
    return found


def _bytes(x: Tensor) -> Any:
    """uint8 ``[B, bytes of a row]`` on the CPU."""
    return host_copy(x).detach().reshape(len(x), -1).contiguous().view(torch.uint8).numpy()


def identity(parts: list[nn.Module], device: torch.device) -> str:
    """What a value depends on beside its row: weights and settings of ``parts``, kind of device, version of torch."""
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
    """The plain values that a module keeps (heads, epsilon, padding id), and those of a transformers configuration."""
    held, config = dict(vars(module)), getattr(module, "config", None)
    if callable(getattr(config, "to_dict", None)):
        held |= {f"config.{name}": value for name, value in cast(Any, config).to_dict().items()}
    # these say nothing of what is computed
    hidden = {"training", "name_or_path", "config._name_or_path", "config.transformers_version"}
    return {name: value for name, value in held.items() if name[0] != "_" and name not in hidden and _plain(value)}


def _plain(value: object) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_plain(item) for item in value)
    if isinstance(value, dict):
        return all(_plain(item) for pair in value.items() for item in pair)
    return value is None or isinstance(value, (bool, int, float, str))


def _home(module: nn.Module) -> tuple[torch.device, torch.dtype] | None:
    first = next((p for p in module.parameters() if p.is_floating_point()), None)
    return None if first is None else (first.device, first.dtype)
