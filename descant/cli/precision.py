"""``trainer.precision: auto``: bfloat16 if the machine computes it natively, resolved before the Trainer exists."""

from __future__ import annotations

import timeit
from collections.abc import Callable, Iterable
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.accelerators import Accelerator

from descant.cli.errors import fail
from descant.datamodules.changes import DataPolicy
from descant.modules.core.compat.accelerator import PrecisionInput, choose_auto_accelerator

AUTO = "auto"
_FULL, _HALF = "32-true", "bf16-mixed"
#: Size and count of the products that :func:`slowdown` times: large enough for a vectorised kernel, a few milliseconds.
_SIDE, _REPEATS = 256, 3


class Trainer(L.Trainer):
    """Lightning's Trainer, whose ``precision`` may be ``auto`` in a configuration.

    Args:
        precision: one of Lightning's, or auto: bf16-mixed if the device computes bfloat16 natively, else 32-true.
            The command line replaces auto before this class is built.
    """

    #: The command line sets it, and data modules read it.
    data_policy = DataPolicy()

    def __init__(
        self,
        *,
        accelerator: str | Accelerator = AUTO,
        precision: PrecisionInput | Literal["auto"] | None = None,
        **kwargs: Any,
    ) -> None:
        resolved: Any = choose(accelerator)[0] if precision == AUTO else precision
        super().__init__(accelerator=accelerator, precision=resolved, **kwargs)


def choose(accelerator: object = AUTO) -> tuple[Any, str]:
    """Choose the precision for an accelerator on this machine, and give the reason in a few words.

    Args:
        accelerator: as ``trainer.accelerator``: auto, gpu, cpu, cuda, mps or another name.
    """
    kind = accelerator if accelerator is not None else AUTO
    if kind == AUTO:
        kind = choose_auto_accelerator()
    elif kind == "gpu":  # only what torch has; Lightning refuses the rest and gives its reason
        kind = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cuda"
    if kind == "cuda":
        if not torch.cuda.is_available():
            return _FULL, "no CUDA device is available"
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return _HALF, f"{torch.cuda.get_device_name()} computes bfloat16 natively"
        return _FULL, f"{torch.cuda.get_device_name()} has no bfloat16 units"
    if kind == "cpu":
        unit = cpu_bfloat16()
        return (_HALF, f"this CPU has {unit}") if unit else (_FULL, "this CPU would have to emulate bfloat16")
    if kind != "mps":
        fail(f"trainer.precision: auto knows cpu, cuda and mps, not {_name(kind)}; name one, such as 32-true")
    return _FULL, "float32 on MPS"


def cpu_bfloat16() -> str | None:
    """Return the instructions by which torch multiplies bfloat16 on this CPU, or None if it would emulate them.

    ``ATEN_CPU_CAPABILITY`` counts: kernels below AVX-512 convert every operand to float32.
    """
    if not torch.backends.mkldnn.is_available() or not torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        return None
    has = torch.cpu.get_capabilities().get
    return "AMX" if has("amx_tile") else "AVX512-BF16" if has("avx512_bf16") else None


def choose_precision(trainer: Any) -> tuple[Any, str]:
    """Return what ``trainer.precision`` becomes on this machine and, if it was auto, the reason.

    Args:
        trainer: the options of the Trainer: accelerator, strategy, plugins, precision.
    """
    wanted = trainer.get("precision")
    if wanted != AUTO:
        return wanted, ""
    owner = _owner(trainer.get("strategy"), trainer.get("plugins"))
    if owner is not None:
        fail(f"trainer.precision: auto, but {owner} sets the precision itself; trainer.precision: null leaves it so")
    return choose(trainer.get("accelerator"))


def resolve(trainer: Any, kept: str | None, tell: Callable[[str], None]) -> str | None:
    """Return the final value of ``trainer.precision``; print in one line what auto became, or what is slow.

    Args:
        trainer: see :func:`choose_precision`, whose errors this raises too.
        kept: the precision of the resumed run, which auto keeps.
        tell: prints a line.
    """
    wanted, why = choose_precision(trainer)
    if why and kept is not None:
        wanted, why = kept, "that of the run which is resumed"
    if why:
        tell(f"precision {wanted}: {why}")
    if str(wanted).startswith("bf16") and _on_cpu(trainer.get("accelerator")) and cpu_bfloat16() is None:
        tell(
            f"warning: trainer.precision {wanted}: this CPU emulates bfloat16, a matrix product takes {slowdown():.0f} "
            f"times as long as in float32; --trainer.precision {_FULL} is faster"
        )
    return None if wanted is None else str(wanted)


def slowdown() -> float:
    """Measure the time of a matrix product in bfloat16 / in float32 on this CPU.

    >>> slowdown() > 0
    True
    """
    return _seconds(torch.bfloat16) / _seconds(torch.float32)


def _seconds(dtype: torch.dtype) -> float:
    x_NN = torch.full((_SIDE, _SIDE), 0.5, dtype=dtype)
    torch.mm(x_NN, x_NN)
    return max(min(timeit.repeat(lambda: torch.mm(x_NN, x_NN), repeat=_REPEATS, number=1)), 1e-9)


def _on_cpu(accelerator: object) -> bool:
    if accelerator in (None, AUTO):
        accelerator = choose_auto_accelerator()
    return accelerator == "cpu"


def _owner(strategy: Any, plugins: Any) -> str | None:
    """Return the part of the configuration that sets its own precision: a precision plugin, or an XLA strategy."""
    for plugin in plugins if isinstance(plugins, Iterable) and not isinstance(plugins, str) else [plugins]:
        if "Precision" in _name(plugin):
            return f"trainer.plugins {_name(plugin)}"
    inside = getattr(strategy, "init_args", None)
    if inside is not None and inside.get("precision_plugin") is not None:
        return f"trainer.strategy {_name(strategy)}.precision_plugin"
    return f"trainer.strategy {_name(strategy)}" if "xla" in _name(strategy).lower() else None


def _name(part: Any) -> str:
    """Return the short name of a part of the configuration: a text, a class_path, an object."""
    path = part if isinstance(part, str) else getattr(part, "class_path", None) or type(part).__name__
    return str(path).rpartition(".")[2]
