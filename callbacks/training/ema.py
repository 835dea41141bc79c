"""EMA: an exponential moving average of the weights, which is evaluated and saved; training never uses it."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from descant.modules.core.compat.foreach import foreach_copy_, foreach_lerp_
from descant.modules.core.compat.layers import NormBase
from descant.modules.core.dtensor import reshard
from descant.modules.core.errors import require_value
from descant.modules.core.ranks import world

if TYPE_CHECKING:
    from descant.modules.adaptation.growth import Growth

AVERAGING_STATE = "averaging_state"
CURRENT_MODEL_STATE = "current_model_state"


class EMA(L.Callback):
    """EMA: exponential moving average of the weights, updated at each optimizer step, evaluated and saved.

    With ``n`` updates made so far and ``w`` the weights after this optimizer step::

        average = w                                 n = 0: before the first update there is no average
        average = d_n * average + (1 - d_n) * w     n > 0
        d_n     = min(decay, (1 + n) / (10 + n))    with warm-up, else decay

    The trainable parameters and the running statistics of normalization layers are averaged, in float32 or wider.
    Everything else (frozen towers, counters, queues, masks) has one copy, the module's own.

    From the first update on, every validation uses the average. A checkpoint's ``state_dict`` is the average, and its
    ``current_model_state`` holds the raw weights. So ``validate --ckpt_path`` repeats the fit's own validation, and
    resuming is bit-identical. After the fit the module keeps the average, for the test. The checkpoint layout is that
    of Lightning's WeightAveraging. That callback, in contrast, copies the whole module, averages every buffer (an -inf
    mask becomes NaN), evaluates an average before its first update, overwrites the raw weights before the last
    checkpoints are written, and updates one tensor at a time.

    The module holds the average from ``on_validation_start`` to ``on_validation_end``, whatever the order of callbacks.
    Each rank averages its own part of sharded parameters (FSDP2). A checkpoint holds the whole average, gathered or in
    parts like its weights.

    Args:
        decay: decay of the average; 0.999 averages over about a thousand steps.
        warmup: use a smaller decay at first, so that the average follows the first steps of a run.
        start: optimizer steps before the first update.

    >>> [round(EMA(decay=0.5).rate(n), 3) for n in (1, 2, 8, 100)]
    [0.182, 0.25, 0.5, 0.5]
    """

    once = True
    writes_at_end = True

    def __init__(self, decay: float = 0.999, warmup: bool = True, start: int = 0) -> None:
        require_value(0 <= decay <= 1, f"decay {decay} is not between 0 and 1")
        require_value(start >= 0, f"start {start} is a number of steps")
        self.decay, self.warmup, self.start = decay, warmup, start
        self.updates = 0
        self._module: weakref.ref[nn.Module] | None = None
        self._live: dict[str, Tensor] = {}  # name -> the module's own tensor, or this rank's part of it
        self._average: dict[str, Tensor] = {}
        self._raw: dict[str, Tensor] | None = None  # raw weights, while the module holds the average
        self._pairs: tuple[list[Tensor], list[Tensor]] | None = None
        self._statistics: set[str] = set()  # running statistics, which no strategy shards
        self._step = 0  # the global step of the last update

    @property
    def average(self) -> dict[str, Tensor]:
        """Averages by the name of their parameter or statistic; empty before the first update."""
        return self._average

    def rate(self, n: int) -> float:
        """Return the decay of the next update after ``n`` updates."""
        return min(self.decay, (1 + n) / (10 + n)) if self.warmup else self.decay

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        strategy = trainer.strategy
        if strategy.restore_checkpoint_after_setup and getattr(strategy, "_save_distributed_checkpoint", True):
            raise ValueError(
                f"EMA: {type(strategy).__name__} does not save whole parameters; "
                "descant.run.sharded.Sharded (on/fsdp) has whole checkpoints"
            )
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, ModelCheckpoint) and callback.save_weights_only:
                raise ValueError(
                    "ModelCheckpoint(save_weights_only: true) skips callbacks and would save the raw weights, "
                    "not the average that was evaluated; remove it"
                )
        if self._module is None or self._module() is not pl_module:
            self._forget()
            self._module = weakref.ref(pl_module)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._bind(pl_module)
        if self._raw is None:
            return
        # a second fit continues from the raw weights, unless other weights have been loaded into the module
        if all(torch.equal(self._live[name], a.to(self._live[name].dtype)) for name, a in self._average.items()):
            self._show_raw()
        else:
            self._forget()
            self._bind(pl_module)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self._average:
            self._step = trainer.global_step  # a micro-batch after a resume is not yet a step

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._bind(pl_module)  # a callback may have unfrozen parameters

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        # global_step does not change within an accumulation
        if trainer.global_step > max(self._step, self.start):
            self._step = trainer.global_step
            self.update()

    @torch.no_grad()
    def update(self) -> None:
        """Update the average from the module's weights."""
        if len(self._average) < len(self._live):  # first update, or parameters were unfrozen
            self._pairs = None
            for name, tensor in self._live.items():
                if name not in self._average:
                    dtype = torch.promote_types(tensor.dtype, torch.float32)
                    self._average[name] = tensor.detach().to(dtype, copy=True)
            if self.updates == 0:
                self.updates = 1
                return
        if self._pairs is None:
            self._pairs = (list(self._average.values()), [self._live[name].detach() for name in self._average])
        average, live = self._pairs
        if any(a.dtype != w.dtype for a, w in zip(average, live, strict=True)):
            live = [w.to(a.dtype) for a, w in zip(average, live, strict=True)]
        foreach_lerp_(average, live, 1 - self.rate(self.updates))
        self.updates += 1

    def grow(self, module: L.LightningModule, growths: Mapping[str, Growth]) -> None:
        """Grow the average like the module's towers; ``growths``: name of a tower -> its growth, from ``Grow.grow``.

        Called once the stage has decided what trains. A teacher that is a copy of the module has such towers too.
        """
        held = {name for name, p in module.named_parameters() if p.requires_grad} | dict(module.named_buffers()).keys()
        for place, growth in growths.items():
            for prefix in {f"{n.partition(f'{place}.')[0]}{place}." for n in self._average if f".{place}." in f".{n}"}:
                part = {n.removeprefix(prefix): a for n, a in self._average.items() if n.startswith(prefix)}
                grown = {prefix + n: a for n, a in growth(part).items()}
                self._average |= {n: a for n, a in grown.items() if n in self._average or n in held}
        self._bind(module)

    def _bind(self, module: L.LightningModule) -> None:
        """Look up the module's tensors again (a move replaces buffers) and move the average to their devices."""
        reshard(module)
        chosen = {
            name: p.to_local() if isinstance(p, DTensor) else p
            for name, p in module.named_parameters()
            if p.requires_grad or name in self._average
        }
        self._statistics = set()
        for prefix, part in module.named_modules():
            if isinstance(part, NormBase):
                statistics = part.named_buffers(prefix, recurse=False)
                buffers = {name: b for name, b in statistics if b.is_floating_point()}
                chosen |= buffers
                self._statistics |= buffers.keys()
        self._live, self._pairs = chosen, None
        self._average = {n: a.to(chosen[n].device) for n, a in self._average.items() if n in chosen}
        if self._raw is not None:
            self._raw = {n: w.to(chosen[n].device) for n, w in self._raw.items() if n in chosen}

    def _forget(self) -> None:
        self._live, self._average, self._raw, self._pairs = {}, {}, None, None
        self.updates = self._step = 0

    @torch.no_grad()
    def _show_average(self) -> None:
        if self._raw is not None or not self._average:
            return
        if world() > 1:
            # running statistics differ between ranks, and a checkpoint holds those of rank 0: evaluate with those
            for name, tensor in self._average.items():
                if name in self._statistics:
                    dist.broadcast(tensor, src=0)
        self._raw = {name: self._live[name].detach().clone() for name in self._average}
        # copy the contents and keep the storage: compiled graphs, optimizers and DDP buckets point at these tensors
        foreach_copy_([self._live[name].detach() for name in self._average], list(self._average.values()))

    @torch.no_grad()
    def _show_raw(self) -> None:
        if self._raw is None:
            return
        foreach_copy_([self._live[name].detach() for name in self._raw], list(self._raw.values()))
        self._raw = None

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            self._show_average()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            reshard(pl_module)  # its gathered parameters hold the average
            self._show_raw()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        if self._live:  # interrupted inside a validation; after the fit there is nothing to restore
            self._show_raw()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._average and self._raw is None:
            self._bind(pl_module)  # a run without remaining steps has not done so
            self._show_average()

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # without Resume, a run that is resumed at its end never calls on_train_end
        self.on_train_end(trainer, pl_module)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        # keep the average for checkpoints after the fit and for a second fit, but off the device
        self._live, self._pairs = {}, None
        self._average = {name: tensor.cpu() for name, tensor in self._average.items()}
        if self._raw is not None:
            self._raw = {name: tensor.cpu() for name, tensor in self._raw.items()}

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if not self._average:
            return
        state = checkpoint["state_dict"]
        keys = list(_keys(pl_module, self._average))
        average, raw = copy.copy(state), copy.copy(state)  # copy.copy keeps the metadata of the state dict
        in_parts = any(isinstance(tensor, DTensor) for tensor in state.values())
        saved = {name: _to_checkpoint(pl_module, name, part, in_parts) for name, part in self._average.items()}
        average.update({key: saved[name] for key, name in keys if key in state})
        if self._raw is not None:
            saved = {name: _to_checkpoint(pl_module, name, part, in_parts) for name, part in self._raw.items()}
            raw.update({key: saved[name] for key, name in keys if key in state})
        checkpoint["state_dict"], checkpoint[CURRENT_MODEL_STATE] = average, raw
        checkpoint[AVERAGING_STATE] = {"updates": self.updates, "step": self._step, "names": sorted(self._average)}

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self._forget()
        if trainer.state.fn != TrainerFn.FITTING:
            return  # the module holds the checkpoint's `state_dict`, the average
        state = checkpoint.get(AVERAGING_STATE, {})
        if "names" not in state or CURRENT_MODEL_STATE not in checkpoint:
            if checkpoint.get("global_step", 0) > self.start:
                rank_zero_warn("the checkpoint has no EMA average: averaging starts at the next optimizer step")
            return
        self.updates, self._step = int(state["updates"]), int(state["step"])
        if "state_dict" not in checkpoint:  # FSDP2: already loaded into the module, a part on each rank
            self._split(pl_module, set(state["names"]), checkpoint[CURRENT_MODEL_STATE])
            return
        keys = _keys(pl_module, set(state["names"]))
        dtype = {name: tensor.dtype for name, tensor in pl_module.state_dict(keep_vars=True).items()}
        # a lean checkpoint omits frozen weights: their average is the module's value
        whole = {**pl_module.state_dict(), **checkpoint["state_dict"]}
        self._average = {
            name: whole[key].to(torch.promote_types(dtype[key], torch.float32), copy=True) for key, name in keys
        }
        pl_module.load_state_dict(checkpoint[CURRENT_MODEL_STATE], strict=pl_module.strict_loading)

    @torch.no_grad()
    def _split(self, module: L.LightningModule, names: set[str], raw: dict[str, Tensor]) -> None:
        """Take the average from the module and load ``raw`` into it."""
        self._bind(module)
        for name in sorted(names):  # in the same order on all ranks: saving gathers them one by one
            dtype = torch.promote_types(self._live[name].dtype, torch.float32)
            self._average[name] = self._live[name].detach().to(dtype, copy=True)
        for key, name in _keys(module, names):
            tensor = module.get_parameter(name) if name not in self._statistics else module.get_buffer(name)
            part = raw[key].to(tensor.device)
            if isinstance(part, DTensor):  # from a sharded checkpoint: take this rank's part
                part = part.to_local()
            elif isinstance(tensor, DTensor):
                part = distribute_tensor(part, tensor.device_mesh, tensor.placements).to_local()
            self._live[name].detach().copy_(part)


def _to_checkpoint(module: nn.Module, name: str, part: Tensor, in_parts: bool) -> Tensor:
    """Convert this rank's part of an average to what a checkpoint holds: the full tensor, or a shard if ``in_parts``.

    Collective if it gathers the full tensor.
    """
    try:
        tensor: Tensor = module.get_parameter(name)
    except AttributeError:  # a statistic
        return part
    if not isinstance(tensor, DTensor):
        return part
    sharded = DTensor.from_local(
        part, tensor.device_mesh, tensor.placements, shape=tensor.shape, stride=tensor.stride()
    )
    return sharded if in_parts else sharded.full_tensor().cpu()


def _keys(module: nn.Module, names: Iterable[str]) -> Iterable[tuple[str, str]]:
    """Yield (state-dict key, parameter name) of each averaged tensor; a tied weight has one name and several keys."""
    averaged = set(names)
    by_id = {id(t): n for part in (module.named_parameters(), module.named_buffers()) for n, t in part}
    for key, tensor in module.state_dict(keep_vars=True).items():
        name = by_id.get(id(tensor))
        if name in averaged:
            yield key, name
