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
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
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
    it between the two may stand anywhere in the list. Of parameters that are split over ranks (FSDP2) each
    rank averages its own part, and a checkpoint holds the whole.

    Args:
        decay: of the average; 0.999 looks back about a thousand steps.
        warmup: begin with a shorter memory, so that the average follows the first steps of a run.
        start: optimizer steps before the first update.

    Raises:
        ValueError: if ``decay`` is outside 0..1, a strategy shards parameters in another way than FSDP2 with
        whole checkpoints, or a ModelCheckpoint saves weights only.

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
        self._live: dict[str, Tensor] = {}  # name -> the module's own tensor, or this rank's part of it
        self._average: dict[str, Tensor] = {}
        self._raw: dict[str, Tensor] | None = None  # the raw weights, while the module holds the average
        self._pairs: tuple[list[Tensor], list[Tensor]] | None = None
        self._statistics: set[str] = set()  # names of running statistics, which no strategy splits
        self._step = 0  # the global step of the last update

    def rate(self, n: int) -> float:
        """The decay of the update that follows ``n`` updates."""
        return min(self.decay, (1 + n) / (10 + n)) if self.warmup else self.decay

    # updating -----------------------------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        strategy = trainer.strategy
        if strategy.restore_checkpoint_after_setup and getattr(strategy, "_save_distributed_checkpoint", True):
            raise ValueError(
                f"EMA: of {type(strategy).__name__} it cannot save whole parameters; "
                "descant.run.sharded.Sharded (on/fsdp) has whole checkpoints"
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
        _reshard(module)
        chosen = {
            name: p.to_local() if isinstance(p, DTensor) else p
            for name, p in module.named_parameters()
            if p.requires_grad or name in self._average
        }
        self._statistics = set()
        for prefix, part in module.named_modules():
            if isinstance(part, _NormBase):
                statistics = part.named_buffers(prefix, recurse=False)
                found = {name: b for name, b in statistics if b.is_floating_point()}
                chosen |= found
                self._statistics |= found.keys()
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
                if name in self._statistics:
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
            _reshard(pl_module)  # what it gathered for the validation is of the average
            self._show_raw()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        if self._live:  # interrupted inside a validation; in a test of a run that has ended nothing is to go on
            self._show_raw()

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
        whole = {name: _whole(pl_module, name, part) for name, part in self._average.items()}
        average.update({key: whole[name] for key, name in keys if key in held})
        if self._raw is not None:
            whole = {name: _whole(pl_module, name, part) for name, part in self._raw.items()}
            raw.update({key: whole[name] for key, name in keys if key in held})
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
        self.updates, self._step = int(state["updates"]), int(state["step"])
        if "state_dict" not in checkpoint:  # FSDP2: it has been loaded into the module, a part on each rank
            self._split(pl_module, set(state["names"]), checkpoint[CURRENT_MODEL_STATE])
            return
        keys = _keys(pl_module, set(state["names"]))
        dtype = {name: tensor.dtype for name, tensor in pl_module.state_dict(keep_vars=True).items()}
        # what a lean checkpoint leaves out stands still: its average is what the module has
        held = {**pl_module.state_dict(), **checkpoint["state_dict"]}
        self._average = {
            name: held[key].to(torch.promote_types(dtype[key], torch.float32), copy=True) for key, name in keys
        }
        pl_module.load_state_dict(checkpoint[CURRENT_MODEL_STATE], strict=pl_module.strict_loading)

    @torch.no_grad()
    def _split(self, module: L.LightningModule, names: set[str], raw: dict[str, Tensor]) -> None:
        """The average is what the module holds, and ``raw`` takes its place there."""
        self._bind(module)
        for name in sorted(names):  # on all ranks in one order: saving gathers them one by one
            dtype = torch.promote_types(self._live[name].dtype, torch.float32)
            self._average[name] = self._live[name].detach().to(dtype, copy=True)
        for key, name in _keys(module, names):
            tensor = module.get_parameter(name) if name not in self._statistics else module.get_buffer(name)
            part = raw[key].to(tensor.device)
            if isinstance(tensor, DTensor):
                part = distribute_tensor(part, tensor.device_mesh, tensor.placements).to_local()
            self._live[name].detach().copy_(part)


def _reshard(module: nn.Module) -> None:
    """What FSDP2 has gathered for an evaluation, which no backward follows, is freed: the parts are the truth."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def _whole(module: nn.Module, name: str, part: Tensor) -> Tensor:
    """The whole of a tensor that lies beside a parameter, of which this rank may have a part only. Collective."""
    try:
        tensor: Tensor = module.get_parameter(name)
    except AttributeError:  # a statistic
        return part
    if not isinstance(tensor, DTensor):
        return part
    beside = DTensor.from_local(part, tensor.device_mesh, tensor.placements, shape=tensor.shape, stride=tensor.stride())
    return beside.full_tensor().cpu()


def _keys(module: nn.Module, names: Iterable[str]) -> Iterable[tuple[str, str]]:
    """(state-dict key, name) of each averaged tensor: a tied weight has one name and several keys."""
    wanted = set(names)
    by_id = {id(t): n for part in (module.named_parameters(), module.named_buffers()) for n, t in part}
    for key, tensor in module.state_dict(keep_vars=True).items():
        name = by_id.get(id(tensor))
        if name in wanted:
            yield key, name
