"""The emulated accelerator as Lightning sees it: ``trainer.accelerator: acc`` and ``trainer.strategy: acc_single``.

Lightning puts one device of an accelerator that it does not know on the CPU, so the strategy has to be named as well.
"""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from lightning.pytorch.accelerators import Accelerator, AcceleratorRegistry
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import SingleDeviceStrategy, StrategyRegistry

from tests.device.emulated import DEVICE, NAME, Counts, counting

STRATEGY = f"{NAME}_single"


class Emulated(Accelerator):
    """One device that is computed on the CPU."""

    def setup_device(self, device: torch.device) -> None:
        if device.type != NAME:
            raise ValueError(f"the device should be {DEVICE}, got {device}")

    def get_device_stats(self, device: Any) -> dict[str, Any]:
        return {}

    def teardown(self) -> None:
        pass

    @staticmethod
    def parse_devices(devices: Any) -> int:
        return int(devices)

    @staticmethod
    def get_parallel_devices(devices: Any) -> list[torch.device]:
        return [DEVICE] * int(devices)

    @staticmethod
    def auto_device_count() -> int:
        return 1

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def name() -> str:
        return NAME


class OneDevice(SingleDeviceStrategy):
    """Lightning's own, with autocast of this device where Lightning would take CUDA's."""

    strategy_name = STRATEGY

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(device=DEVICE, **kwargs)

    @property
    def precision_plugin(self) -> Precision:
        return super().precision_plugin

    @precision_plugin.setter
    def precision_plugin(self, plugin: Precision | None) -> None:
        if isinstance(plugin, MixedPrecision):
            plugin.device = NAME
        self._precision_plugin = plugin

    def teardown(self) -> None:
        # parameters that are moved back stay the same objects, as they do on CUDA
        kept = torch.__future__.get_swap_module_params_on_conversion()
        torch.__future__.set_swap_module_params_on_conversion(True)
        try:
            super().teardown()
        finally:
            torch.__future__.set_swap_module_params_on_conversion(kept)


class CountSteps(L.Callback):
    """Counts of each training step: from its beginning to the beginning of the next, loading and moving included.

    ``steps`` holds them in order; what follows the last step (validation, checkpoints) is in ``after``. What a step's
    validation asked is in the step's own counts: count runs without one, or look at ``validations``.
    """

    def __init__(self) -> None:
        self.steps: list[Counts] = []
        self.validations: list[Counts] = []
        self._open: list[Any] = []

    def _begin(self, found: list[Counts]) -> None:
        context = counting()
        found.append(context.__enter__())
        self._open.append(context)

    def _end(self) -> None:
        if self._open:
            self._open.pop().__exit__(None, None, None)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self._begin(self.steps)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self._end()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._begin(self.validations)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._end()


if NAME not in AcceleratorRegistry.available_accelerators():
    AcceleratorRegistry.register(NAME, Emulated, description="computed on the CPU")
    StrategyRegistry.register(STRATEGY, OneDevice, description="one emulated device")
