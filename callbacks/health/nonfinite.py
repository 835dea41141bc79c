"""NaN or infinite losses and gradients: raise, skip the step, or roll back to a resume point and skip it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import lightning as L
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from descant.callbacks.callback_order import callbacks_of
from descant.callbacks.checkpoints.resume import Resume
from descant.modules.core.compat.foreach import foreach_norm
from descant.modules.core.errors import require_value, say
from descant.modules.core.faults import UNREAD, Unread
from descant.modules.core.loss_reduction import Step
from descant.modules.core.ranks import gather_objects
from descant.modules.io import jsonl
from descant.modules.training_setup.trainer import log_interval


class RollBack(Exception):
    """Raised when a step was not finite and the run has to continue from a resume point before it.

    Args:
        step: the step that was not finite.
        path: the resume point.
    """

    def __init__(self, step: int, path: Path) -> None:
        super().__init__(f"step {step} was not finite: back to {path.name}")
        self.step, self.path = step, path


class _Waiting(NamedTuple):
    """A step whose result was not read yet: whether it was finite (0-d, bool, on the device), and its terms."""

    step: int
    epoch: int
    finite: Tensor
    unread: list[Unread]


class NonFinite(L.Callback):
    """Checks the gradients of every step for NaN and infinity before the optimizer uses them, and keeps a ledger.

        a step is finite  <=>  all of its loss terms and all of its gradients are

    One non-finite loss makes the gradients of all ranks non-finite (through :class:`Step` and the sum over ranks), so
    all ranks make the same decision without further communication. Policies:

    * ``raise``: end the run and report term, step and samples. No weight was changed.
    * ``skip``: leave the step out. Weights, optimizer and buffers (batch-norm statistics) stay as before it; the
      schedule advances.
    * ``rollback``: go back to the newest resume point from before the ``window`` steps that end with this one, and skip
      these steps this time (Chowdhery 2022, PaLM 5.1: the steps before a divergence are part of its cause).

    On a CPU all policies act before the step changes a weight. On an accelerator ``skip`` and ``rollback`` wait for the
    device once per step. ``raise`` does not wait. It finds a non-finite step at the next logging step, before a
    validation, at the end of an epoch, or before a checkpoint, and ends the run with the number of that step. In the
    meantime a fused optimizer of torch (``fused: true`` of Adam, AdamW, SGD and Adagrad) skips the step on the device.
    With any other optimizer the weights are NaN from that step on, and are never saved.

    ``nonfinite.jsonl`` in the run's folder has a line for each non-finite step: step, action, terms, samples. A resumed
    run skips the same steps.

    Args:
        policy: one of the three policies.
        limit: number of non-finite steps after which the run ends whatever the policy.
        window: steps to skip after going back.

    Raises:
        ValueError: for numbers below 1; in setup, for a policy that the precision or the callbacks rule out.
        FloatingPointError: with step, term and samples, by ``raise``, past the limit, or with no point to go back to.
        RollBack: to the caller of fit, which calls it again with the resume point; ``descant fit`` does.
    """

    once = True

    def __init__(
        self, policy: Literal["raise", "skip", "rollback"] = "raise", limit: int = 10, window: int = 1
    ) -> None:
        require_value(limit >= 1 and window >= 1, f"limit {limit}, window {window}: at least 1 each")
        self.policy, self.limit, self.window = policy, limit, window
        self.entries: list[dict[str, Any]] = []  # lines of the ledger
        self._left_out: set[int] = set()
        self._buffers: list[Tensor] = []
        self._step: Step | None = None
        self._waiting: list[_Waiting] = []  # not read yet

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit" or self.policy == "raise":
            return
        if _scaler(trainer):
            raise ValueError(
                f"NonFinite.policy {self.policy}: precision {trainer.precision} has a scaler that skips steps by "
                "itself; bf16-mixed has none"
            )
        if self.policy == "rollback":
            resume = _resume(trainer)
            if resume is None:
                raise ValueError("NonFinite.policy rollback: it needs the callback Resume, which saves points; add it")
            most = (resume.keep - 1) * resume.every + 1
            if self.window > most:
                raise ValueError(
                    f"NonFinite.window {self.window}: Resume keeps {resume.keep} points, one each {resume.every} "
                    f"steps; {most} is the most"
                )
            resume.at_start = True

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        step = getattr(pl_module, "step", None)
        self._step = step if isinstance(step, Step) and not _scaler(trainer) else None
        if self._step is not None:
            self._step.faults.raises = False
        self._waiting = []
        entries = jsonl.objects(_ledger(trainer)) if trainer.is_global_zero else []
        self.entries = trainer.strategy.broadcast(entries)
        self._left_out = {step for entry in self.entries for step in entry.get("leaves_out", [])}

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        opens = trainer.fit_loop.epoch_loop.batch_progress.current.completed % trainer.accumulate_grad_batches == 0
        if opens and (self.policy == "skip" or trainer.global_step in self._left_out):
            self._buffers = [buffer.clone() for buffer in pl_module.buffers()]

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        if _scaler(trainer):
            return  # the scaler expects gradients that overflow
        if getattr(optimizer, "found_inf", None) is not None:
            optimizer.found_inf = None  # type: ignore[attr-defined]  # set at the step before
        step, parameters = trainer.global_step, [p for group in optimizer.param_groups for p in group["params"]]
        if step in self._left_out:
            self._leave_out(pl_module, parameters)
            return
        if self.policy == "raise" and pl_module.device.type != "cpu":
            self._wait(trainer, optimizer, parameters)
            return
        if _finite(trainer, parameters):
            if self._step is not None:
                self._step.faults.unread.clear()
            return
        entry = {"step": step, "epoch": trainer.current_epoch, "action": self.policy, **self._fault(trainer)}
        noted = any(e["step"] == step and e["action"] == self.policy for e in self.entries)
        line = f"step {step}: {_entry_text(entry)}"
        if self.policy == "raise" or (not noted and len(self.entries) >= self.limit):
            self._note(trainer, entry | {"action": "raise"})
            past = f"; {self.limit} steps were not finite before it" if self.policy != "raise" else ""
            raise FloatingPointError(f"{line}{past}")
        if self.policy == "skip":
            if not noted:  # a kill may have undone the step but not the line
                self._note(trainer, entry)
            self._leave_out(pl_module, parameters)
        else:
            self._back(trainer, entry, line)
        if trainer.is_global_zero:
            say(f"{line}; skipped ({len(self.entries)} of at most {self.limit})")

    def _wait(self, trainer: L.Trainer, optimizer: Optimizer, parameters: Iterable[nn.Parameter]) -> None:
        """Queue this step to be read later, and let the device skip it if the optimizer can."""
        finite = _all_finite(parameters)
        unread: list[Unread] = []
        if self._step is not None:
            unread, self._step.faults.unread = self._step.faults.unread, unread
        self._waiting.append(_Waiting(trainer.global_step, trainer.current_epoch, finite, unread))
        if getattr(optimizer, "_step_supports_amp_scaling", False):  # as under a scaler, the kernel skips the step
            optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
        if len(self._waiting) == UNREAD:
            self._look(trainer)

    def _look(self, trainer: L.Trainer, *_: Any, **__: Any) -> None:
        """Read, in one wait, whether the queued steps were finite, and raise for the first that was not. Collective."""
        waiting, self._waiting = self._waiting, []
        if not waiting:
            return
        finite = torch.stack([one.finite for one in waiting]).tolist()
        wrong = next((one for one, good in zip(waiting, finite, strict=True) if not good), None)
        if wrong is None:
            return
        if self._step is not None:
            self._step.faults.unread = wrong.unread
        entry = {"step": wrong.step, "epoch": wrong.epoch, "action": "raise", **self._fault(trainer)}
        self._note(trainer, entry)
        raise FloatingPointError(f"step {wrong.step}: {_entry_text(entry)} (read at step {trainer.global_step})")

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if self._waiting and trainer.global_step % log_interval(trainer) == 0:
            self._look(trainer)

    on_train_epoch_end = on_train_end = on_validation_start = on_save_checkpoint = _look

    def _back(self, trainer: L.Trainer, entry: dict[str, Any], line: str) -> None:
        step, resume = trainer.global_step, _resume(trainer)
        first = max(step - self.window + 1, 0)
        path = resume.back_to(trainer, first) if resume is not None else None
        if path is None:
            self._note(trainer, entry | {"action": "raise"})
            raise FloatingPointError(f"{line}; there is no resume point of step {first} or before to go back to")
        self._note(trainer, entry | {"to": path.name, "leaves_out": list(range(first, step + 1))})
        if trainer.is_global_zero:
            say(f"{line}; back to {path.name} ({len(self.entries)} of at most {self.limit})")
        raise RollBack(step, path)

    def _leave_out(self, pl_module: L.LightningModule, parameters: Iterable[nn.Parameter]) -> None:
        """Undo the step: drop the gradients, so that the optimizer keeps its state, and restore the buffers."""
        for parameter in parameters:
            parameter.grad = None
        with torch.no_grad():
            for buffer, before in zip(pl_module.buffers(), self._buffers, strict=True):
                buffer.copy_(before)
        if self._step is not None:
            self._step.faults.terms.clear()
            self._step.faults.unread.clear()

    def _fault(self, trainer: L.Trainer) -> dict[str, Any]:
        """Find the terms that were not finite, and their samples, over all ranks. Collective."""
        faults: dict[str, Any] = {}
        if self._step is not None:
            self._step.faults.read()
            faults = dict(self._step.faults.terms)
            self._step.faults.terms.clear()
        by_rank = gather_objects(faults)
        terms = {name: value for some in by_rank for name, (value, _) in some.items()}
        ids = sorted({i for some in by_rank for _, index in some.values() for i in index})
        name = getattr(getattr(trainer, "datamodule", None), "sample_name", str)
        return {"terms": {key: str(value) for key, value in terms.items()}, "samples": [name(i) for i in ids]}

    def _note(self, trainer: L.Trainer, entry: dict[str, Any]) -> None:
        self.entries.append(entry)
        if trainer.is_global_zero:
            path = _ledger(trainer)
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("ab+") as file:
                jsonl.append(file, json.dumps(entry).encode())


def _local_gradients(parameters: Iterable[nn.Parameter]) -> tuple[list[Tensor], bool]:
    """Return this rank's gradients, and whether they are sharded over ranks."""
    grads = [p.grad for p in parameters if p.grad is not None]
    local = [grad.to_local() if isinstance(grad, DTensor) else grad for grad in grads]
    return local, any(isinstance(grad, DTensor) for grad in grads)


def _finite(trainer: L.Trainer, parameters: Iterable[nn.Parameter]) -> bool:
    """Whether all gradients are finite; the same on all ranks."""
    local, sharded = _local_gradients(parameters)
    # norms cost a tenth of testing every number; for finite numbers they overflow only if these are very large
    finite = not local or math.isfinite(float(torch.stack([n.float() for n in foreach_norm(local)]).sum()))
    finite = finite or all(bool(torch.isfinite(grad).all()) for grad in local)
    if sharded:
        finite = trainer.strategy.reduce_boolean_decision(finite, all=True)
    return finite


def _all_finite(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Test on the device whether all gradients are finite, by their largest values: 0-d bool, equal on all ranks."""
    local, sharded = _local_gradients(parameters)
    device = local[0].device if local else None
    local = [grad for grad in local if grad.numel()]
    if not local:
        return torch.ones((), dtype=torch.bool, device=device)
    finite = torch.stack([n.float() for n in foreach_norm(local, torch.inf)]).isfinite().all()
    if sharded:
        good = finite.float()
        dist.all_reduce(good, op=dist.ReduceOp.MIN)
        finite = good > 0
    return finite


def _entry_text(entry: dict[str, Any]) -> str:
    if not entry["terms"]:
        return "its losses are finite, but a gradient is not"
    terms = ", ".join(f"{name!r} is {value}" for name, value in entry["terms"].items())
    names, more = entry["samples"][:5], len(entry["samples"]) - 5
    of = f", first in sample {', '.join(names)}" + (f" and {more} more" if more > 0 else "") if names else ""
    return f"loss term {terms}: not finite{of}"


def _ledger(trainer: L.Trainer) -> Path:
    return Path(trainer.default_root_dir) / "nonfinite.jsonl"


def _resume(trainer: L.Trainer) -> Resume | None:
    return next(iter(callbacks_of(trainer, Resume)), None)


def _scaler(trainer: L.Trainer) -> bool:
    return getattr(trainer.precision_plugin, "scaler", None) is not None
