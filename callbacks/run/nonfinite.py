"""What happens when a loss or a gradient is not finite: raise, leave the step out, or go back and leave it out."""

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

from descant.callbacks.run.resume import Resume, say
from descant.modules.core.faults import UNREAD, Unread
from descant.modules.core.step import Step
from descant.modules.engine.trainer import log_interval
from descant.modules.io import jsonl as lines


class RollBack(Exception):
    """A step was not finite, and the run goes on from before it.

    Args:
        step: the one that was not finite.
        path: of the resume point to go on from.
    """

    def __init__(self, step: int, path: Path) -> None:
        super().__init__(f"step {step} was not finite: back to {path.name}")
        self.step, self.path = step, path


class _Waiting(NamedTuple):
    """A step of an accelerator: whether it was finite (0-d, bool), and the values of its micro-batches."""

    step: int
    epoch: int
    finite: Tensor
    unread: list[Unread]


class NonFinite(L.Callback):
    """Looks at every step's gradients before the optimizer does, on all ranks alike, and keeps a ledger.

        a step is finite  <=>  all of its loss terms and all of its gradients are

    One loss that is not finite makes the gradients of all ranks so (:class:`Step` sees to it, and the ranks' own sum
    carries it), so all ranks decide the same without another message. Policies:

    * ``raise``: end the run with the term, the step and the samples. No weight was changed.
    * ``skip``: leave the step out. Weights, optimizer and buffers (the statistics of batch norms) are as before it;
      the schedule goes on.
    * ``rollback``: go back to the newest resume point from before the ``window`` steps that end with this one, and
      leave these out when they come again (Chowdhery 2022, PaLM 5.1: where training diverges, the steps before the
      one that shows it are part of the cause).

    On a CPU all of them act before the step changes a weight. On an accelerator ``skip`` and ``rollback`` wait once a
    step for the device to say whether it was finite. ``raise`` waits for nothing: what was not finite is found in the
    next step that is logged, before a validation, at the end of an epoch, and before anything is saved, and then ends
    the run, naming the step that it was. Until then that step is left out by the device itself where the optimizer is a
    fused one of torch (``fused: true`` of Adam, AdamW, SGD and Adagrad), so that no weight was changed by it; by any
    other optimizer the weights are nan from it on, which nothing saves.

    ``nonfinite.jsonl`` in the run's folder has a line for each: step, what was done, terms, samples. A resumed run
    reads it, so what was left out stays left out.

    Args:
        policy: one of the three.
        limit: after so many such steps the run ends all the same: something is wrong with it, and not with a step.
        window: steps that are left out after going back.

    Raises:
        ValueError: for numbers below 1; in setup, for a policy that the precision or the callbacks rule out.
        FloatingPointError: naming step, term and samples, by ``raise``, past the limit, or with nothing to go back to.
        RollBack: to whoever called fit, who calls it again with the resume point; ``descant fit`` does.
    """

    #: Said twice (by an experiment and an overlay), the last one counts.
    once = True

    def __init__(
        self, policy: Literal["raise", "skip", "rollback"] = "raise", limit: int = 10, window: int = 1
    ) -> None:
        if limit < 1 or window < 1:
            raise ValueError(f"limit {limit}, window {window}: at least 1 each")
        self.policy, self.limit, self.window = policy, limit, window
        self.entries: list[dict[str, Any]] = []  # of the ledger
        self._left_out: set[int] = set()
        self._buffers: list[Tensor] = []
        self._step: Step | None = None
        self._waiting: list[_Waiting] = []  # steps of an accelerator that nobody has looked at yet

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit" or self.policy == "raise":
            return
        if _scaler(trainer):
            raise ValueError(
                f"NonFinite.policy {self.policy}: precision {trainer.precision} has a scaler of its own that leaves "
                "steps out; bf16-mixed has none"
            )
        if self.policy == "rollback":
            resume = _resume(trainer)
            if resume is None:
                raise ValueError("NonFinite.policy rollback: it goes back to what the callback Resume saves; add that")
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
        noted = lines.objects(_ledger(trainer)) if trainer.is_global_zero else []
        self.entries = trainer.strategy.broadcast(noted)
        self._left_out = {step for entry in self.entries for step in entry.get("leaves_out", [])}

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        opens = trainer.fit_loop.epoch_loop.batch_progress.current.completed % trainer.accumulate_grad_batches == 0
        if opens and (self.policy == "skip" or trainer.global_step in self._left_out):
            self._buffers = [buffer.clone() for buffer in pl_module.buffers()]

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        if _scaler(trainer):
            return  # a gradient that overflows is a daily matter there
        if getattr(optimizer, "found_inf", None) is not None:
            optimizer.found_inf = None  # type: ignore[attr-defined]  # of the step before
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
        known = any(e["step"] == step and e["action"] == self.policy for e in self.entries)
        told = f"step {step}: {_told(entry)}"
        if self.policy == "raise" or (not known and len(self.entries) >= self.limit):
            self._note(trainer, entry | {"action": "raise"})
            past = f"; {self.limit} steps were not finite before it" if self.policy != "raise" else ""
            raise FloatingPointError(f"{told}{past}")
        if self.policy == "skip":
            if not known:  # a kill may have undone the step, and not the line
                self._note(trainer, entry)
            self._leave_out(pl_module, parameters)
        else:
            self._back(trainer, entry, told)
        if trainer.is_global_zero:
            say(f"{told}; left out ({len(self.entries)} of at most {self.limit})")

    # an accelerator is not waited for --------------------------------------------------------------------------------

    def _wait(self, trainer: L.Trainer, optimizer: Optimizer, parameters: Iterable[nn.Parameter]) -> None:
        """Note this step to be looked at later, and let the device leave it out if it can."""
        finite = _all_finite(parameters)
        unread: list[Unread] = []
        if self._step is not None:
            unread, self._step.faults.unread = self._step.faults.unread, unread
        self._waiting.append(_Waiting(trainer.global_step, trainer.current_epoch, finite, unread))
        if getattr(optimizer, "_step_supports_amp_scaling", False):  # as under a scaler: a kernel that does nothing
            optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
        if len(self._waiting) == UNREAD:
            self._look(trainer)

    def _look(self, trainer: L.Trainer) -> None:
        """Read whether the steps since the last time were finite: one wait. The run ends for the first that was not.

        Collective: gradients are alike on all ranks.
        """
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
        raise FloatingPointError(f"step {wrong.step}: {_told(entry)} (read at step {trainer.global_step})")

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._waiting and trainer.global_step % log_interval(trainer) == 0:
            self._look(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._look(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._look(trainer)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._look(trainer)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self._look(trainer)

    # what is done -------------------------------------------------------------------------------------------------

    def _back(self, trainer: L.Trainer, entry: dict[str, Any], told: str) -> None:
        step, resume = trainer.global_step, _resume(trainer)
        first = max(step - self.window + 1, 0)
        path = resume.back_to(trainer, first) if resume is not None else None
        if path is None:
            self._note(trainer, entry | {"action": "raise"})
            raise FloatingPointError(f"{told}; there is no resume point of step {first} or before to go back to")
        self._note(trainer, entry | {"to": path.name, "leaves_out": list(range(first, step + 1))})
        if trainer.is_global_zero:
            say(f"{told}; back to {path.name} ({len(self.entries)} of at most {self.limit})")
        raise RollBack(step, path)

    def _leave_out(self, pl_module: L.LightningModule, parameters: Iterable[nn.Parameter]) -> None:
        """The step as if it had not been: no gradient, so no optimizer touches its state; and the buffers of before."""
        for parameter in parameters:
            parameter.grad = None
        with torch.no_grad():
            for buffer, before in zip(pl_module.buffers(), self._buffers, strict=True):
                buffer.copy_(before)
        if self._step is not None:
            self._step.faults.terms.clear()
            self._step.faults.unread.clear()

    def _fault(self, trainer: L.Trainer) -> dict[str, Any]:
        """Which terms were not finite, and of which samples, over all ranks. Collective."""
        if self._step is not None:
            self._step.faults.read()
        faults = dict(self._step.faults.terms) if self._step is not None else {}
        every = [faults]
        if self._step is not None:
            self._step.faults.terms.clear()
        if trainer.world_size > 1:
            every = [{} for _ in range(trainer.world_size)]
            dist.all_gather_object(every, faults)
        terms = {name: value for found in every for name, (value, _) in found.items()}
        ids = sorted({i for found in every for _, index in found.values() for i in index})
        name = getattr(getattr(trainer, "datamodule", None), "sample_name", str)
        return {"terms": {key: str(value) for key, value in terms.items()}, "samples": [name(i) for i in ids]}

    def _note(self, trainer: L.Trainer, entry: dict[str, Any]) -> None:
        self.entries.append(entry)
        if trainer.is_global_zero:
            path = _ledger(trainer)
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("ab+") as file:
                lines.append(file, json.dumps(entry).encode())


def _finite(trainer: L.Trainer, parameters: Iterable[nn.Parameter]) -> bool:
    """Whether all gradients are finite: the same answer on all ranks."""
    grads = [p.grad for p in parameters if p.grad is not None]
    local = [grad.to_local() if isinstance(grad, DTensor) else grad for grad in grads]
    # norms cost a tenth of a test of every number, and only large finite numbers have one that is not finite
    finite = not local or math.isfinite(float(torch.stack([n.float() for n in torch._foreach_norm(local)]).sum()))
    finite = finite or all(bool(torch.isfinite(grad).all()) for grad in local)
    if any(isinstance(grad, DTensor) for grad in grads):  # each rank has seen its own part
        finite = trainer.strategy.reduce_boolean_decision(finite, all=True)
    return finite


def _all_finite(parameters: Iterable[nn.Parameter]) -> Tensor:
    """0-d bool on the device: whether all gradients are finite, the same on all ranks; nothing is read.

    By the largest of each, which is finite exactly where all are.
    """
    grads = [p.grad for p in parameters if p.grad is not None and p.grad.numel()]
    local = [grad.to_local() if isinstance(grad, DTensor) else grad for grad in grads]
    local = [grad for grad in local if grad.numel()]
    if not local:
        return torch.ones((), dtype=torch.bool, device=grads[0].device if grads else None)
    finite = torch.stack([n.float() for n in torch._foreach_norm(local, torch.inf)]).isfinite().all()
    if any(isinstance(grad, DTensor) for grad in grads):  # each rank has seen its own part
        good = finite.float()
        dist.all_reduce(good, op=dist.ReduceOp.MIN)
        finite = good > 0
    return finite


def _told(entry: dict[str, Any]) -> str:
    if not entry["terms"]:
        return "its losses are finite, and a gradient is not"
    terms = ", ".join(f"{name!r} is {value}" for name, value in entry["terms"].items())
    names, more = entry["samples"][:5], len(entry["samples"]) - 5
    of = f", first in sample {', '.join(names)}" + (f" and {more} more" if more > 0 else "") if names else ""
    return f"loss term {terms}: not finite{of}"


def _ledger(trainer: L.Trainer) -> Path:
    return Path(trainer.default_root_dir) / "nonfinite.jsonl"


def _resume(trainer: L.Trainer) -> Resume | None:
    return next((c for c in trainer.callbacks if isinstance(c, Resume)), None)  # type: ignore[attr-defined]


def _scaler(trainer: L.Trainer) -> bool:
    return getattr(trainer.precision_plugin, "scaler", None) is not None
