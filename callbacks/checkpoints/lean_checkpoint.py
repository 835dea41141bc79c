"""Lean checkpoints: trained weights only (adapters, heads, losses, running statistics), not the frozen base."""

from __future__ import annotations

import weakref
from typing import Any

import lightning as L
from torch import nn
from torch.utils.hooks import RemovableHandle

from descant.callbacks.training.ema import CURRENT_MODEL_STATE
from descant.modules.io.lean import base_of, complete_state, find_differences, lean


class LeanCheckpoint(L.Callback):
    """Lean checkpoints, without frozen weights: a LoRA run saves its adapters, a locked tower's run its head.

    They omit every weight or buffer that takes no gradient and still has its bytes from before the fit; its 128-bit
    digest is saved instead. Such a checkpoint loads into the model that the configuration builds if the digests agree;
    everything else loads strictly. Full checkpoints load too. Hashing at the start and at every save takes about a
    second per gigabyte.
    """

    once = True

    def __init__(self) -> None:
        self._module: weakref.ref[nn.Module] | None = None
        self._base: dict[str, str] | None = None
        self._brought: set[str] = set()  # loaded from checkpoints: not from the configuration
        self._hook: RemovableHandle | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if trainer.strategy.restore_checkpoint_after_setup:
            name = type(trainer.strategy).__name__
            raise ValueError(f"LeanCheckpoint needs whole parameters on every rank, and {name} shards them")
        if self._module is None or self._module() is not pl_module:
            self._module, self._base, self._brought = weakref.ref(pl_module), None, set()
        if self._hook is None:
            self._hook = pl_module.register_load_state_dict_pre_hook(self._load)

    def _load(self, module: nn.Module, state: dict[str, Any], *_: object) -> None:
        """Complete a checkpoint before it is loaded, and record what it changes."""
        whole = complete_state(state, module)
        state.clear()
        state.update(whole)
        self._brought |= find_differences(state, module)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._base is None:  # a second fit keeps the first one's base
            self._base = base_of(pl_module)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if not trainer.is_global_zero or self._base is None:
            return
        base = {name: digest for name, digest in self._base.items() if name not in self._brought}
        for key in ("state_dict", CURRENT_MODEL_STATE):
            if key in checkpoint:
                checkpoint[key] = lean(checkpoint[key], base)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
