"""A device of tensors without data, for steps of real recipes in which only sizes matter.

Tensors on ``plan:0`` are torch's FakeTensors: they have shapes, types and strides, but no storage. CPU tensors stay
real, so a step reads its host copies (:mod:`descant.modules.core.host`) as on an accelerator. Values on the device
cannot be read. FSDP2, DTensor, autocast (with CUDA's lists) and process groups of any number of ranks run on it.

torch allows each process to register one such device from Python without kernels: :func:`register` cannot be undone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from descant.cli.errors import fail
from descant.modules.core.compat.dispatch import TorchDispatchMode
from descant.modules.core.compat.fake import FakeTensor, FakeTensorMode
from descant.modules.core.compat.fsdp import chunking_with
from descant.modules.core.compat.python_device import PythonDeviceModule, register_python_device
from descant.modules.core.compat.pytree import tree_leaves, tree_map
from descant.plan import autocast

NAME = "plan"
#: torch's fake process group, for collectives on tensors of the device.
GROUP = "plan"


class _Stream:
    """A stream that never has to be waited for; also used as an event, and as its own context."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *args: object) -> None:
        pass

    def record_event(self, event: _Stream | None = None) -> _Stream:
        return event or self

    def _nothing(self, *args: Any) -> None:
        pass

    wait = wait_stream = wait_event = record = synchronize = _nothing


class _Backend(PythonDeviceModule):
    """The module ``torch.plan``, with the names of ``torch.cuda`` that FSDP2 uses."""

    Stream = Event = _Stream

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def current_stream(self, device: Any = None) -> _Stream:
        return _Stream()

    def stream(self, stream: _Stream) -> _Stream:
        return stream

    def set_device(self, device: Any) -> None:
        pass

    # no random numbers are drawn on this device, but torch asks every device for its generators in a later training
    def get_rng_state(self, device: Any = None) -> torch.Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_rng_state(self, state: torch.Tensor, device: Any = None) -> None:
        pass

    def manual_seed(self, seed: int) -> None:
        pass

    def manual_seed_all(self, seed: int) -> None:
        pass


@cache
def register() -> torch.device:
    """Return the device; the first call registers it in this process."""
    backend = _Backend()
    register_python_device(NAME, backend_module=backend)
    for name in ("Stream", "Event", "current_stream", "stream", "set_device"):
        setattr(torch.get_device_module(NAME), name, getattr(backend, name))
    library = torch.library.Library("aten", "IMPL")
    for key in ("AutogradPrivateUse1", "PrivateUse1"):
        library.impl("scaled_dot_product_attention", _attention, key)
        library.impl("rms_norm", _rms_norm, key)
    for name, kernel in KERNELS.items():
        library.impl(name, kernel, "PrivateUse1")
    _kept.extend([*autocast.register(NAME), library])
    from descant.modules.core.compat.fake_group import create_fake_group

    dist.Backend.register_backend(GROUP, create_fake_group, extended_api=True, devices=[NAME])
    return torch.device(NAME, 0)


@cache
def _differentiates() -> None:
    """Run a first backward. In it autograd makes a queue for each device; devices registered later get no queue."""
    try:
        with FakeTensorMode():
            torch.empty(1, device=register(), requires_grad=True).sum().backward()
    except RuntimeError as error:
        if "device_ready_queues_" not in str(error):
            raise
        fail("plan: this process computed gradients before: plan in a process of its own")


_kept: list[torch.library.Library] = []  # their registrations end when they are freed


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Compute fused attention, or math attention if ``torch.nn.attention.sdpa_kernel`` allows no fused kernel.

    For backward, fused attention keeps the inputs, the output and one number per row, but no matrix of weights. Queries
    may share keys; CUDA's kernel does not copy shared keys.
    """
    cuda = torch.backends.cuda
    chosen = cuda.flash_sdp_enabled() or cuda.mem_efficient_sdp_enabled() or cuda.cudnn_sdp_enabled()
    fused = chosen and q.ndim == 4 and not (attn_mask is not None and attn_mask.requires_grad)
    aten: Any = torch.ops.aten
    if enable_gqa and q.shape[1] != k.shape[1] and (_of_cpu or not fused):
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    if fused:
        out: Tensor = aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
        )[0]
        return out
    plain: Tensor = aten._scaled_dot_product_attention_math(q, k, v, attn_mask, dropout_p, is_causal, scale=scale)[0]
    return plain


def _rms_norm(x: Tensor, shape: list[int], weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    """Compute RMS norm: one kernel on CUDA if the types agree, several on the CPU."""
    one: Any = torch.ops.aten._fused_rms_norm.default
    alike = weight is None or weight.dtype == x.dtype
    made = one(x, shape, weight, eps) if alike and not _of_cpu else one.decompose(x, shape, weight, eps)
    out: Tensor = made[0]
    return out


def _fused_rms_norm(x: Tensor, shape: list[int], weight: Tensor | None, eps: float | None) -> tuple[Tensor, Tensor]:
    rows = [*x.shape[: x.ndim - len(shape)], *[1] * len(shape)]
    return torch.empty_like(x), x.new_empty(rows, dtype=torch.promote_types(x.dtype, torch.float32))


#: Single kernels on CUDA that torch splits into several on a device without kernels of its own.
KERNELS: dict[str, Any] = {"_fused_rms_norm": _fused_rms_norm, "silu_backward": lambda grad, x: torch.empty_like(x)}


class Simulated(TorchDispatchMode):
    """Mode in which operators that use the device or its tensors return tensors on it; others run unchanged.

    While ``once`` is set, every number read from the device is 1, for checks that recipes make in their first step.
    Otherwise torch raises an error because the operator depends on data.
    """

    def __init__(self) -> None:
        super().__init__()
        _differentiates()
        self.once = False
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:
            return NotImplemented  # DTensor calls this again with its local part
        kwargs = kwargs or {}
        if not on_device((args, kwargs)):
            return func(*args, **kwargs)
        if self.once and func is torch.ops.aten._local_scalar_dense.default:
            return torch.ones((), dtype=args[0].dtype).item()

        def known(x: Any) -> Any:
            return self.fake.from_tensor(x) if isinstance(x, Tensor) and not isinstance(x, FakeTensor) else x

        args, kwargs = tree_map(known, (args, kwargs))
        with self.fake:
            out = func(*args, **kwargs)
            if func is torch.ops.aten.convolution.default and any(map(channels_last, args[:2])):
                # real kernels keep the layout, but torch has none for this device
                out = out.contiguous(memory_format=torch.channels_last)
            return out


def channels_last(x: Tensor) -> bool:
    """Whether images or weights are stored with the channels last, and not also contiguous."""
    return x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def on_device(values: Any) -> bool:
    """Whether values contain a tensor of the device, or the device itself."""
    return any(
        isinstance(x, FakeTensor) or (isinstance(x, torch.device) and x.type == NAME) for x in tree_leaves(values)
    )


@contextmanager
def ranks(world: int) -> Iterator[None]:
    """Open a process group of ``world`` ranks, in which this process is rank 0 and no other rank exists."""
    register()
    store = dist.HashStore()  # type: ignore[attr-defined]  # torch documents it
    dist.init_process_group(f"cpu:fake,{NAME}:{GROUP}", rank=0, world_size=world, store=store)
    try:
        yield
    finally:
        dist.destroy_process_group()


class _Chunks(Sequence[Tensor]):
    """The chunks of a tensor along a dimension, with empty ones at the end; each is made on access."""

    def __init__(self, x: Tensor, number: int, dim: int) -> None:
        self.x, self.number, self.dim = x, number, dim
        self.size = -(-x.shape[dim] // number)

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, n: Any) -> Any:
        first = min(n * self.size, self.x.shape[self.dim])
        size = min(self.size, self.x.shape[self.dim] - first)
        return self.x.narrow(self.dim, first, size) if size else self.x.new_empty(0)


#: Not empty while a step on CPUs is simulated: they have fewer fused kernels than CUDA.
_of_cpu: list[bool] = []


@contextmanager
def patching_torch(cpu: bool = False) -> Iterator[None]:
    """Patch torch so that steps run on the device. ``cpu``: use the kernels of a CPU instead of CUDA's.

    ``Tensor.record_stream`` does nothing. ``torch.accelerator.current_stream`` returns a stream of this module, since
    torch's own has no device set and cannot be waited for. FSDP2 makes the chunk of one rank only, not those of a
    thousand ranks for each parameter.
    """
    _of_cpu[:] = [True] * cpu
    kept = Tensor.record_stream, torch.accelerator.current_stream
    torch.accelerator.current_stream = lambda device=None: _Stream()  # type: ignore[assignment, return-value]
    Tensor.record_stream = lambda self, stream: None  # type: ignore[method-assign, assignment]
    try:
        with chunking_with(_Chunks):
            yield
    finally:
        Tensor.record_stream, torch.accelerator.current_stream = kept  # type: ignore[method-assign]
        _of_cpu.clear()
