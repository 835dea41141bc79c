"""Save and restore the values logged so far in an epoch, which Lightning keeps in memory only.

A row of metrics.csv holds the values of its own step and some from earlier steps of the epoch (terms that alternate, a
rule that is solved every tenth step). The row of an epoch holds means over all its steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor

from descant.modules.core.compat.logged import Metadata, ResultMetric, Sync

#: Arguments of ``log`` that Lightning compares with those of the next call.
_ARGUMENTS = ("fx", "name", "prog_bar", "logger", "on_step", "on_epoch", "enable_graph", "add_dataloader_idx")


class _OtherRanksMetadata(Metadata):
    """Arguments of ``log`` saved with another number of ranks; the next call decides whether ranks are averaged."""

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Metadata):
            return NotImplemented
        self.sync = other.sync
        return all(getattr(self, name) == getattr(other, name) for name in _ARGUMENTS)


def snapshot(trainer: L.Trainer) -> dict[str, dict[str, Any]]:
    """Return this rank's values of the epoch so far, without torchmetrics, whose state is in the module."""
    values = {}
    for key, result in trainer.fit_loop.epoch_loop._results.items():
        meta = result.meta
        if result.has_reset or not result.is_tensor or meta.sync.group is not None or meta.dataloader_idx is not None:
            continue
        values[key] = {
            **{name: getattr(meta, name) for name in _ARGUMENTS},
            "reduce_fx": meta.reduce_fx.__name__,
            "sync": meta.sync.should,
            "rank_zero_only": meta.sync.rank_zero_only,
            "value": _plain(result.value),
            "rows": _plain(result.cumulated_batch_size) if meta.is_mean_reduction else None,
            "last": _plain(result._forward_cache),
        }
    return values


def share(by_rank: Sequence[Mapping[str, Any]], rank: int, world: int) -> Mapping[str, Any]:
    """Return this rank's logged values after a resume: its own, or an equal share if the number of ranks changed."""
    if len(by_rank) == world:
        return by_rank[rank]
    return {key: _merge([values[key] for values in by_rank if key in values], world) for key in by_rank[0]}


def _merge(each: Sequence[Mapping[str, Any]], world: int) -> dict[str, Any]:
    """Merge one value of several ranks: a new rank's share of sums, and the mean of the last logged values."""
    merged, reduce = dict(each[0]), each[0]["reduce_fx"]
    for key, by in (("value", world), ("rows", world), ("last", len(each))):
        if merged[key] is not None:
            x_R = torch.stack([one[key] for one in each])
            extreme = key == "value" and reduce in ("max", "min")
            merged[key] = getattr(x_R, f"a{reduce}")(0) if extreme else x_R.sum(0) / by
    return merged


def restore(trainer: L.Trainer, by_rank: Sequence[Mapping[str, Any]], within: bool) -> None:
    """Restore the logged values at the start of the first batch; ``within``: it is not the first of its epoch."""
    results, world = trainer.fit_loop.epoch_loop._results, trainer.world_size
    kind = Metadata if len(by_rank) == world else _OtherRanksMetadata
    for key, saved in share(by_rank, trainer.global_rank, world).items():
        if key in results and not results[key].has_reset:
            continue  # logged in this process already
        meta = kind(**{name: saved[name] for name in _ARGUMENTS}, reduce_fx=saved["reduce_fx"])
        meta.sync = Sync(fn=trainer.strategy.reduce, _should=saved["sync"], rank_zero_only=saved["rank_zero_only"])
        result = ResultMetric(meta, is_tensor=True)
        result.value, result._forward_cache = saved["value"], saved["last"]
        if meta.is_mean_reduction:
            result.cumulated_batch_size = saved["rows"]
        result._update_count, result.has_reset = 1, False
        results[key] = result.to(trainer.strategy.root_device)
    if within:  # else Lightning resets the values at the first batch of a process
        trainer._logger_connector._first_loop_iter = False


def _plain(value: object) -> Tensor | None:
    return value.detach().cpu().clone() if isinstance(value, Tensor) else None
