"""An exponential moving average of the weights: it is evaluated and saved, and training never sees it."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterable
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

AVERAGING_STATE = "averaging_state"
CURRENT_MODEL_STATE = "current_model_state"


class EMA(L.Callback):
    """Averages the weights once every optimizer step, and evaluates and saves the average.

    With ``n`` updates made so far and ``w`` the weights after this optimizer step::

        average = w                                 n = 0: before the first update there is no average
        average = d_n * average + (1 - d_n) * w     n > 0
        d_n     = min(decay, (1 + n) / (10 + n))    with warm-up, else decay

    Averaged are the trainable parameters and the running statistics of normalisation layers, in float32 or
    wider. Everything else (frozen towers, counters, queues, masks) has one copy, the module's own: averaging
    a queue of embeddings or a mask of -inf is wrong, and copying a frozen tower costs its memory.

    Once there are updates, every validation sees the average, and a checkpoint's ``state_dict`` is the
    average while ``current_model_state`` holds the raw weights, so ``validate --ckpt_path`` repeats the fit's
    own validation and resuming is bitwise exact. After the fit the module keeps the average, for the test.
    The layout is that of Lightning's WeightAveraging, which differs in this: it copies the whole module
    (frozen towers and all), averages every buffer (an -inf mask becomes NaN), evaluates and saves an average
    that has seen no update, overwrites the raw weights before the last checkpoints are written, and updates
    one tensor at a time.

    The module holds the average from ``on_validation_start`` to ``on_validation_end``; callbacks that judge
    it between the two may stand anywhere in the list.

    Args:
        decay: of the average; 0.999 looks back about a thousand steps.
        warmup: begin with a shorter memory, so that the average follows the first steps of a run.
        start: optimizer steps before the first update.

    Raises:
        ValueError: if ``decay`` is outside 0..1, parameters are sharded, or a ModelCheckpoint saves weights
        only.

    >>> [round(EMA(decay=0.5).rate(n), 3) for n in (1, 2, 8, 100)]
    [0.182, 0.25, 0.5, 0.5]
    """

    #: Said twice (by an experiment and an overlay), the last one counts.
    once = True

    def __init__(self, decay: float = 0.999, warmup: bool = True, start: int = 0) -> None:
        if not 0 <= decay <= 1:
            raise ValueError(f"decay {decay} is not between 0 and 1")
        if start < 0:
            raise ValueError(f"start {start} is a number of steps")
        self.decay, self.warmup, self.start = decay, warmup, start
        self.updates = 0
        self._module: weakref.ref[nn.Module] | None = None
        self._live: dict[str, Tensor] = {}  # name -> the module's own tensor
        self._average: dict[str, Tensor] = {}
        self._raw: dict[str, Tensor] | None = None  # the raw weights, while the module holds the average
        self._pairs: tuple[list[Tensor], list[Tensor]] | None = None
        self._step = 0  # the global step of the last update

    def rate(self, n: int) -> float:
        """The decay of the update that follows ``n`` updates."""
        return min(self.decay, (1 + n) / (10 + n)) if self.warmup else self.decay

    # updating -----------------------------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if trainer.strategy.restore_checkpoint_after_setup:
            raise ValueError(
                f"EMA needs whole parameters on every rank, and {type(trainer.strategy).__name__} shards them"
            )
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, ModelCheckpoint) and callback.save_weights_only:
                raise ValueError(
                    "ModelCheckpoint(save_weights_only: true) skips callbacks and would save the raw weights "
                    "and not the average that was judged; drop it"
                )
        if self._module is None or self._module() is not pl_module:
            self._forget()
            self._module = weakref.ref(pl_module)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._bind(pl_module)
        if self._raw is None:
            return
        # A second fit goes on from where training was, unless somebody has put other weights into the module
        # since.
        if all(torch.equal(self._live[name], a.to(self._live[name].dtype)) for name, a in self._average.items()):
            self._show_raw()
        else:
            self._forget()
            self._bind(pl_module)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self._average:
            self._step = trainer.global_step  # a micro-batch after a resume is not yet a step

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._bind(pl_module)  # a callback may have unfrozen something

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # global_step stands still inside an accumulation window
        if trainer.global_step > max(self._step, self.start):
            self._step = trainer.global_step
            self.update()

    @torch.no_grad()
    def update(self) -> None:
        """One update of the average from the module's weights."""
        if len(self._average) < len(self._live):  # the first time, or after an unfreezing
            self._pairs = None
            for name, tensor in self._live.items():
                if name not in self._average:
                    dtype = torch.promote_types(tensor.dtype, torch.float32)
                    self._average[name] = tensor.detach().to(dtype, copy=True)
            if self.updates == 0:
                self.updates = 1
                return
        if self._pairs is None:
            self._pairs = (
                list(self._average.values()),
                [self._live[name].detach() for name in self._average],
            )
        average, live = self._pairs
        if any(a.dtype != w.dtype for a, w in zip(average, live, strict=True)):
            live = [w.to(a.dtype) for a, w in zip(average, live, strict=True)]
        torch._foreach_lerp_(average, live, 1 - self.rate(self.updates))
        self.updates += 1

    def _bind(self, module: L.LightningModule) -> None:
        """Find the module's tensors again (a move replaces buffers) and put the average beside them."""
        chosen: dict[str, Tensor] = {
            name: p for name, p in module.named_parameters() if p.requires_grad or name in self._average
        }
        for prefix, part in module.named_modules():
            if isinstance(part, _NormBase):
                statistics = part.named_buffers(prefix, recurse=False)
                chosen |= {name: b for name, b in statistics if b.is_floating_point()}
        self._live, self._pairs = chosen, None
        self._average = {n: a.to(chosen[n].device) for n, a in self._average.items() if n in chosen}
        if self._raw is not None:
            self._raw = {n: w.to(chosen[n].device) for n, w in self._raw.items() if n in chosen}

    def _forget(self) -> None:
        self._live, self._average, self._raw, self._pairs = {}, {}, None, None
        self.updates = self._step = 0

    # evaluating ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _show_average(self) -> None:
        if self._raw is not None or not self._average:
            return
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            # Ranks differ in their running statistics, and a checkpoint holds those of rank 0: judge those.
            for name, tensor in self._average.items():
                if not isinstance(self._live[name], nn.Parameter):
                    dist.broadcast(tensor, src=0)
        self._raw = {name: self._live[name].detach().clone() for name in self._average}
        # Contents move, never storage: compiled graphs, optimizers and DDP buckets keep pointing at these
        # tensors.
        torch._foreach_copy_([self._live[name].detach() for name in self._average], list(self._average.values()))

    @torch.no_grad()
    def _show_raw(self) -> None:
        if self._raw is None:
            return
        torch._foreach_copy_([self._live[name].detach() for name in self._raw], list(self._raw.values()))
        self._raw = None

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            self._show_average()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            self._show_raw()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._show_raw()  # interrupted inside a validation

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._show_average()

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # A finished run that was resumed had nothing left to train, so no end of training has shown the average.
        if self._average and self._raw is None:
            self._bind(pl_module)
            self._show_average()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        # Kept, so that a checkpoint saved after the fit is whole and a second fit goes on; but not on the
        # device.
        self._live, self._pairs = {}, None
        self._average = {name: tensor.cpu() for name, tensor in self._average.items()}
        if self._raw is not None:
            self._raw = {name: tensor.cpu() for name, tensor in self._raw.items()}

    # saving and loading -------------------------------------------------------------------------------------

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if not self._average:
            return
        held = checkpoint["state_dict"]
        keys = list(_keys(pl_module, self._average))
        average, raw = copy.copy(held), copy.copy(held)  # copy.copy keeps the state dict's metadata
        average.update({key: self._average[name] for key, name in keys})
        if self._raw is not None:
            raw.update({key: self._raw[name] for key, name in keys})
        checkpoint["state_dict"], checkpoint[CURRENT_MODEL_STATE] = average, raw
        checkpoint[AVERAGING_STATE] = {
            "updates": self.updates,
            "step": self._step,
            "names": sorted(self._average),
        }

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self._forget()
        if trainer.state.fn != TrainerFn.FITTING:
            return  # the module holds the checkpoint's `state_dict`: the average, which is what is evaluated
        state = checkpoint.get(AVERAGING_STATE, {})
        if "names" not in state or CURRENT_MODEL_STATE not in checkpoint:
            if checkpoint.get("global_step", 0) > self.start:
                rank_zero_warn("the checkpoint holds no average of EMA: it begins at the next optimizer step")
            return
        keys = _keys(pl_module, set(state["names"]))
        dtype = {name: tensor.dtype for name, tensor in pl_module.state_dict(keep_vars=True).items()}
        self._average = {
            name: checkpoint["state_dict"][key].to(torch.promote_types(dtype[key], torch.float32), copy=True)
            for key, name in keys
        }
        self.updates, self._step = int(state["updates"]), int(state["step"])
        pl_module.load_state_dict(checkpoint[CURRENT_MODEL_STATE], strict=pl_module.strict_loading)


def _keys(module: nn.Module, names: Iterable[str]) -> Iterable[tuple[str, str]]:
    """(state-dict key, name) of each averaged tensor: a tied weight has one name and several keys."""
    wanted = set(names)
    by_id = {id(t): n for part in (module.named_parameters(), module.named_buffers()) for n, t in part}
    for key, tensor in module.state_dict(keep_vars=True).items():
        name = by_id.get(id(tensor))
        if name in wanted:
            yield key, name
