"""What was logged in an epoch that goes on: Lightning keeps it in memory, and a resumed run begins without it.

A row of metrics.csv holds, beside what its own step logged, what earlier steps of the epoch did and this one did not
(terms that take turns, a rule that is solved every tenth step), and the row of an epoch means over all of its steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning as L
from lightning.pytorch.trainer.connectors.logger_connector.result import _Metadata, _ResultMetric, _Sync
from torch import Tensor

#: Of what was said to ``log``: what is looked at again at the next time.
_SAID = ("fx", "name", "prog_bar", "logger", "on_step", "on_epoch", "enable_graph", "add_dataloader_idx")


def kept(trainer: L.Trainer) -> dict[str, dict[str, Any]]:
    """The numbers of the epoch so far, on this rank, without those that torchmetrics computes: the module has them."""
    found = {}
    for key, result in trainer.fit_loop.epoch_loop._results.items():
        meta = result.meta
        if result.has_reset or not result.is_tensor or meta.sync.group is not None or meta.dataloader_idx is not None:
            continue
        found[key] = {
            **{name: getattr(meta, name) for name in _SAID},
            "reduce_fx": meta.reduce_fx.__name__,
            "sync": meta.sync.should,
            "rank_zero_only": meta.sync.rank_zero_only,
            "value": _plain(result.value),
            "rows": _plain(result.cumulated_batch_size) if meta.is_mean_reduction else None,
            "last": _plain(result._forward_cache),
        }
    return found


def again(trainer: L.Trainer, numbers: Mapping[str, Mapping[str, Any]], within: bool) -> None:
    """Put them back, at the start of the first batch; ``within``: it is not the first of its epoch."""
    results = trainer.fit_loop.epoch_loop._results
    for key, said in numbers.items():
        if key in results and not results[key].has_reset:
            continue  # said in this process already
        meta = _Metadata(**{name: said[name] for name in _SAID}, reduce_fx=said["reduce_fx"])
        meta.sync = _Sync(fn=trainer.strategy.reduce, _should=said["sync"], rank_zero_only=said["rank_zero_only"])
        result = _ResultMetric(meta, is_tensor=True)
        result.value, result._forward_cache = said["value"], said["last"]
        if meta.is_mean_reduction:
            result.cumulated_batch_size = said["rows"]
        result._update_count, result.has_reset = 1, False
        results[key] = result.to(trainer.strategy.root_device)
    if within:  # else the first batch of a process is taken for that of an epoch, which forgets what was said before
        trainer._logger_connector._first_loop_iter = False


def _plain(value: object) -> Tensor | None:
    return value.detach().cpu().clone() if isinstance(value, Tensor) else None
