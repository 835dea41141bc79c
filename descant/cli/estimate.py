"""Estimate memory and FLOPs of a training step, from a few steps on slices of the first batch.

    peak(n) = resident + a + b n + c n^2,    fitted to an eighth, a quarter and a half of the batch

The quadratic part comes from losses over all pairs. Steps are real ones, with callbacks, gradient rules and optimizer.
Letters: n rows of a batch.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor

from descant.modules.core.batch import count_rows
from descant.modules.core.compat.memory import storage_id
from descant.modules.core.compat.pytree import tree_leaves
from descant.modules.training_setup.flops import FlopCount
from descant.modules.training_setup.memory import MemoryLedger

#: Divisors of a batch's rows that give the sizes of its slices.
PARTS = (8, 4, 2)
#: Batch sizes beyond this multiple are not extrapolated.
FAR = 100
#: Usable share of a device's memory.
USABLE = 0.9


@dataclass(frozen=True)
class Need:
    """Needs of a step of ``rows`` rows on one rank: resident bytes, peak bytes, FLOPs, and rows that would fit."""

    rows: int
    resident: int
    peak: float
    flops: float
    most: int
    total: int

    def lines(self) -> list[str]:
        """Format the lines that ``descant check`` shows."""
        stays = f"{_size(self.resident)} of them weights, averages and optimizer"
        if self.most > FAR * self.rows:
            fits = f"more than {FAR * self.rows:,} rows fit in {_size(self.total)}"
        elif self.most:
            fits = f"about {self.most:,} rows fit in {_size(self.total)}"
        else:
            fits = f"more than {_size(self.total)}"
        return [
            f"memory     about {_size(self.peak)} at once in a step of {self.rows:,} rows, {stays}; {fits}",
            f"compute    {_count(self.flops)}FLOP a step",
        ]


def estimate(trainer: L.Trainer, model: L.LightningModule, batch: Any) -> Need:
    """Estimate the needs from slices of ``batch``; the model has taken some steps afterwards."""
    rows = count_rows(batch)
    # at least two rows: one alone has no negatives, so a contrastive loss has no gradient
    sizes = sorted({max(rows // part, min(rows, 2)) for part in PARTS})
    _step(trainer, batch, sizes[0])  # allocate now what is allocated only once
    resident = sum(tensor.nbytes for tensor in _stays(trainer, model))
    peaks, flops = [], []
    for n in sizes:
        peak, count = _measure_step(trainer, model, batch, n)
        peaks.append(peak)
        flops.append(count)
    curve = fit_curve(sizes, peaks)
    total = _memory(model.device)
    return Need(
        rows,
        resident,
        resident + max(float(np.polyval(curve, rows)), peaks[-1]),
        max(float(np.polyval(fit_curve(sizes, flops), rows)), flops[-1]),
        most_rows(curve, USABLE * total - resident),
        total,
    )


def fit_curve(sizes: list[int], values: list[float]) -> np.ndarray:
    """Fit coefficients, the highest first; needs grow with a batch, so a line replaces a curve that bends down."""
    curve = np.polyfit(sizes, values, len(sizes) - 1)
    return curve if len(sizes) < 3 or curve[0] > 0 else np.polyfit(sizes, values, 1)


def _measure_step(trainer: L.Trainer, model: L.LightningModule, batch: Any, n: int) -> tuple[float, float]:
    """Measure peak memory above the resident tensors, and FLOPs, of the second step on ``n`` rows.

    The gradients of the first step stay until the backward of the second. On CUDA, everything that the allocator has
    given out counts, including workspaces of libraries and ``n`` rows of the batch itself.
    """
    on_cuda = model.device.type == "cuda"
    with FlopCount() as count, MemoryLedger() as ledger:
        _step(trainer, batch, n)
        ledger.peak, count.flops = ledger.live, 0
        if on_cuda:
            torch.cuda.reset_peak_memory_stats(model.device)
        _step(trainer, batch, n)
    if not on_cuda:
        return float(ledger.peak), float(count.flops)
    others = (1 - n / count_rows(batch)) * sum(tensor.nbytes for tensor in _once(tree_leaves(vars(batch))))
    resident = sum(tensor.nbytes for tensor in _stays(trainer, model))
    return torch.cuda.max_memory_allocated(model.device) - resident - others, float(count.flops)


def _step(trainer: L.Trainer, batch: Any, n: int) -> None:
    """Run one step of the trainer's own loop on some rows."""
    kwargs = OrderedDict(batch=batch.select(slice(0, n)), batch_idx=0)
    trainer.fit_loop.epoch_loop.automatic_optimization.run(trainer.optimizers[0], 0, kwargs)


def _stays(trainer: L.Trainer, model: L.LightningModule) -> Iterator[Tensor]:
    """Yield every tensor once that stays on the model's device from one step to the next."""
    states = (state for optimizer in trainer.optimizers for state in optimizer.state.values())
    held = (vars(callback) for callback in trainer.callbacks)  # type: ignore[attr-defined]
    some = _once([*model.parameters(), *model.buffers(), *tree_leaves([*states, *held])])
    return (tensor for tensor in some if tensor.device.type == model.device.type)


def _once(some: Iterable[Any]) -> Iterator[Tensor]:
    """Yield the tensors among ``some``, one per storage."""
    seen: set[int] = set()
    for tensor in some:
        if isinstance(tensor, Tensor) and (key := storage_id(tensor.untyped_storage())) not in seen:
            seen.add(key)
            yield tensor


def most_rows(curve: np.ndarray, room: float) -> int:
    """Return the largest number of rows whose peak is within ``room``; 0 if not even one fits.

    >>> most_rows(np.array([1.0, 0.0]), room=77.5)
    77
    """
    return bisect_right(range(1, (1 << 24) + 1), room, key=lambda n: float(np.polyval(curve, n)))


def _memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _size(count: float) -> str:
    """
    >>> _size(123), _size(45_600_000), _size(16_800_000_000)
    ('123 B', '46 MB', '16.8 GB')
    """
    for unit, size in {"GB": 1e9, "MB": 1e6, "kB": 1e3}.items():
        if count >= size:
            return f"{count / size:.1f} {unit}" if unit == "GB" else f"{count / size:.0f} {unit}"
    return f"{count:.0f} B"


def _count(count: float) -> str:
    """
    >>> _count(123_000_000), _count(4.5e12)
    ('123 M', '4.5 T')
    """
    for unit, size in {"T": 1e12, "G": 1e9, "M": 1e6}.items():
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} "
