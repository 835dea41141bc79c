"""A device of tensors without data, for steps of real recipes whose sizes matter and whose numbers do not.

Tensors on ``plan:0`` are torch's FakeTensors: shapes, types and strides, no storage. What is on the CPU stays real, so
that a step reads its host copies (:mod:`descant.modules.core.host`) as on an accelerator; a value of the device itself
cannot be read. FSDP2, DTensor, autocast (by the lists of CUDA) and process groups of any number of ranks run on it.

torch lets a process register one such device, from Python without kernels: :func:`register`, which is not undone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.fsdp._fully_shard import _fsdp_param
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

from descant.cli.errors import fail
from descant.plan import autocast

NAME = "plan"
#: torch's fake process group, for collectives of tensors on the device.
GROUP = "plan"


class _Stream:
    """A queue on which nothing is ever late; also an event, and its own context."""

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


class _Backend(_DummyBackendModule):
    """What is found as ``torch.plan``, by the names of ``torch.cuda`` that FSDP2 asks for."""

    Stream = Event = _Stream

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def current_stream(self, device: Any = None) -> _Stream:
        return _Stream()

    def stream(self, stream: _Stream) -> _Stream:
        return stream

    def set_device(self, device: Any) -> None:
        pass

    # nothing is drawn there, and a process that has planned may train next: torch asks each device for its generators
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
    """The device, registered in this process once."""
    backend = _Backend()
    _setup_privateuseone_for_python_backend(NAME, backend_module=backend)
    for name in ("Stream", "Event", "current_stream", "stream", "set_device"):
        setattr(torch.get_device_module(NAME), name, getattr(backend, name))
    library = torch.library.Library("aten", "IMPL")
    for key in ("AutogradPrivateUse1", "PrivateUse1"):
        library.impl("scaled_dot_product_attention", _attention, key)
        library.impl("rms_norm", _rms_norm, key)
    for name, kernel in KERNELS.items():
        library.impl(name, kernel, "PrivateUse1")
    _kept.extend([*autocast.register(NAME), library])
    from torch.testing._internal.distributed.fake_pg import _create_fake_pg

    dist.Backend.register_backend(GROUP, _create_fake_pg, extended_api=True, devices=[NAME])
    return torch.device(NAME, 0)


@cache
def _differentiates() -> None:
    """Run a first backward, in which autograd makes a queue for each device; a device that comes later has none."""
    try:
        with FakeTensorMode():
            torch.empty(1, device=register(), requires_grad=True).sum().backward()
    except RuntimeError as error:
        if "device_ready_queues_" not in str(error):
            raise
        fail("plan: this process computed gradients before: plan in a process of its own")


_kept: list[torch.library.Library] = []  # what they register goes with them


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
    """Fused attention, which keeps inputs, output and one number a row for backward, and no matrix of weights; queries
    may share keys, which CUDA's does not copy. Where ``torch.nn.attention.sdpa_kernel`` allows none, that of parts.
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
    """One kernel on CUDA where the types agree, several on the CPU."""
    one: Any = torch.ops.aten._fused_rms_norm.default
    alike = weight is None or weight.dtype == x.dtype
    made = one(x, shape, weight, eps) if alike and not _of_cpu else one.decompose(x, shape, weight, eps)
    out: Tensor = made[0]
    return out


def _fused_rms_norm(x: Tensor, shape: list[int], weight: Tensor | None, eps: float | None) -> tuple[Tensor, Tensor]:
    rows = [*x.shape[: x.ndim - len(shape)], *[1] * len(shape)]
    return torch.empty_like(x), x.new_empty(rows, dtype=torch.promote_types(x.dtype, torch.float32))


def _silu_backward(grad: Tensor, x: Tensor) -> Tensor:
    return torch.empty_like(x)


#: Single kernels of CUDA, which torch makes of several on a device that has none of its own.
KERNELS: dict[str, Any] = {"_fused_rms_norm": _fused_rms_norm, "silu_backward": _silu_backward}


class Simulated(TorchDispatchMode):
    """Operators of tensors on the device, or that make one, give such tensors; all others run as they are.

    A number of the device that is read is 1 while ``once`` is set, for what recipes make sure of in their first step;
    else torch raises an error, that it depends on data.
    """

    def __init__(self) -> None:
        super().__init__()
        _differentiates()
        self.once = False
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:
            return NotImplemented  # it asks again for its part
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
                # as kernels do, of which torch knows none on this device
                out = out.contiguous(memory_format=torch.channels_last)
            return out


def channels_last(x: Tensor) -> bool:
    """Whether images or weights have their channels last in memory, and not their columns."""
    return x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def on_device(values: Any) -> bool:
    """Whether a tensor of the device is among values, or the device itself."""
    return any(
        isinstance(x, FakeTensor) or (isinstance(x, torch.device) and x.type == NAME) for x in tree_leaves(values)
    )


@contextmanager
def ranks(world: int) -> Iterator[None]:
    """A process group of so many ranks, of which this is the first, and the only one that there is."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    register()
    dist.init_process_group(f"cpu:fake,{NAME}:{GROUP}", rank=0, world_size=world, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


class _Chunks(Sequence[Tensor]):
    """The parts of a tensor along a dimension, empty ones at the end, each made when it is asked for."""

    def __init__(self, x: Tensor, number: int, dim: int) -> None:
        self.x, self.number, self.dim = x, number, dim
        self.size = -(-x.shape[dim] // number)

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, n: Any) -> Any:
        first = min(n * self.size, self.x.shape[self.dim])
        size = min(self.size, self.x.shape[self.dim] - first)
        return self.x.narrow(self.dim, first, size) if size else self.x.new_empty(0)


#: Not empty while a step is that of processors, which have fewer kernels that do several operations than CUDA.
_of_cpu: list[bool] = []


@contextmanager
def adapted(cpu: bool = False) -> Iterator[None]:
    """torch as far as steps on the device need it: tensors of it cannot tell a stream that they are used there, its
    current stream is one of these (torch.accelerator's own has no device that is set, and waiting on it fails), and
    FSDP2 makes the part of one rank and not, of each parameter, those of a thousand. ``cpu``: of whose kernels."""
    part: Any = _fsdp_param
    _of_cpu[:] = [True] * cpu
    kept = Tensor.record_stream, part._chunk_with_empty, torch.accelerator.current_stream
    torch.accelerator.current_stream = lambda device=None: _Stream()  # type: ignore[assignment, return-value]
    Tensor.record_stream = lambda self, stream: None  # type: ignore[method-assign, assignment]
    part._chunk_with_empty = _Chunks
    try:
        yield
    finally:
        Tensor.record_stream, part._chunk_with_empty, torch.accelerator.current_stream = kept  # type: ignore[method-assign]
        _of_cpu.clear()
