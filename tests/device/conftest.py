"""The device under test: emulated, or what ``DESCANT_TEST_DEVICE`` names, such as ``cuda``."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

#: Set to ``cuda``, the same tests run on a GPU.
VARIABLE = "DESCANT_TEST_DEVICE"


@dataclass(frozen=True)
class Device:
    """The device under test.

    Attributes:
        device: where tensors go. options: of a command that runs on it. trainer: options of a trainer.
    """

    device: torch.device
    options: tuple[str, ...]
    trainer: dict[str, Any]

    @property
    def emulated(self) -> bool:
        return self.device.type == "acc"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Register the emulated device before the first backward of a process that runs nothing but these tests.

    Autograd makes a queue for each device when it first runs; one that comes later has none.
    """
    here = Path(__file__).parent
    if os.environ.get(VARIABLE, "acc") == "acc" and all(item.path.is_relative_to(here) for item in items):
        importlib.import_module("tests.device.emulated")


@pytest.fixture(scope="module")
def device() -> Iterator[Device]:
    """The device under test; skips where it is not there. What it changes in torch ends with the file."""
    named = os.environ.get(VARIABLE, "acc")
    if named != "acc":
        if not getattr(torch, torch.device(named).type).is_available():
            pytest.skip(f"{VARIABLE}={named}: no such device here")
        accelerator = torch.device(named).type
        options: tuple[str, ...] = ("--trainer.accelerator", accelerator, "--trainer.devices", "1")
        yield Device(torch.device(named, 0), options, {"accelerator": accelerator, "devices": 1})
        return
    from tests.device import accelerator as ours
    from tests.device import emulated

    options = ("--trainer.accelerator", emulated.NAME, "--trainer.strategy", ours.STRATEGY, "--trainer.devices", "1")
    try:
        torch.ones(1, device=emulated.DEVICE, requires_grad=True).sum().backward()
    except RuntimeError as error:
        if "device_ready_queues_" not in str(error):
            raise
        pytest.fail("autograd ran in this process before the emulated device was there: run tests/device by itself")
    with emulated.emulation():
        yield Device(emulated.DEVICE, options, {"accelerator": emulated.NAME, "strategy": ours.STRATEGY, "devices": 1})
