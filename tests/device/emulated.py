"""An emulated accelerator: tensors on device ``acc:0`` that are computed on the CPU, for tests without a GPU.

What it shows without a GPU:

- device mistakes. Mixing its tensors with CPU tensors fails where CUDA fails: CPU tensors without dimensions and CPU
  tensors as indices are taken, everything else is refused. Its random numbers come from a generator of its own.
- host reads: each place where the CPU needs a value of the device (``item``, ``bool``, ``tolist``, ``nonzero``, a mask
  as an index, a copy to the CPU), and so waits until the device has finished what it was given.
- uploads: copies from CPU memory. On CUDA one without ``non_blocking`` waits as well, so those are counted apart.
- operations: kernels that a device would be asked to launch. Views launch none and are not counted. They are upper
  bounds of CUDA's: attention runs as its parts, and autocast casts a weight each time it is used.

Numbers of the device are exactly those of the CPU. Loading this module registers the device for the whole process
(torch allows one such device), and is therefore left to the fixtures in ``conftest.py``.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

import descant
from descant.plan import autocast

NAME = "acc"
DEVICE = torch.device("privateuseone", 0)  # called by NAME once it is registered
CPU = torch.device("cpu")
aten: Any = torch.ops.aten

_SOURCE = str(Path(descant.__file__).parent) + "/"
#: What reads for others: the place is where it is asked.
_ASKED = "/modules/host.py"
#: Outside of our source: where the read is made, without what only carries it there.
_CARRIERS = (__file__, "/torch/utils/_pytree.py", "/torch/_tensor.py", "/torch/_ops.py")


# counting -----------------------------------------------------------------------------------------------------------


@dataclass
class Counts:
    """What was asked of the device.

    Attributes:
        operations: kernels, as an upper bound.
        reads: (place, what) -> times; a place is ``file:line`` of the innermost frame in descant's source, relative to
            it; else of the innermost frame at all, which in a backward pass is torch's own.
        uploads: the same of blocking copies of CPU memory to the device; those with ``non_blocking`` do not count.
        by_operator: operator -> times.
    """

    operations: int = 0
    reads: Counter[tuple[str, str]] = field(default_factory=Counter)
    uploads: Counter[tuple[str, str]] = field(default_factory=Counter)
    by_operator: Counter[str] = field(default_factory=Counter)

    @property
    def host_reads(self) -> int:
        """How often the CPU waited for a value."""
        return self.reads.total()

    def lines(self) -> list[str]:
        """A readable account, one place a line."""
        return [
            f"{times} x {what} at {place}"
            for kind in (self.reads, self.uploads)
            for (place, what), times in kind.most_common()
        ]


_counting: list[Counts] = []


@contextmanager
def counting() -> Iterator[Counts]:
    """Counts what is asked of the device inside; may be nested."""
    counts = Counts()
    _counting.append(counts)
    try:
        yield counts
    finally:
        _counting[:] = [other for other in _counting if other is not counts]


def _place() -> str:
    frame, first = sys._getframe(2), ""
    while frame is not None:
        file = frame.f_code.co_filename
        if (
            file.startswith(_SOURCE) and not file.endswith(_ASKED) and not (first and file.endswith("/cli.py"))
        ):  # Lightning's own, called by a command
            return f"{file.removeprefix(_SOURCE)}:{frame.f_lineno}"
        if not first and not file.endswith(_CARRIERS):
            first = f"{file.partition('site-packages/')[2] or file}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return first or "backward"


def _read(what: str) -> None:
    if _counting:
        place = _place()
        for counts in _counting:
            counts.reads[place, what] += 1


def _upload(what: str) -> None:
    if _counting:
        place = _place()
        for counts in _counting:
            counts.uploads[place, what] += 1


# tensors ------------------------------------------------------------------------------------------------------------


class DeviceTensor(Tensor):
    """A tensor on ``acc:0``; ``raw`` is where its numbers are, on the CPU."""

    raw: Tensor
    number = False  # whether it was a number in Python, which CUDA takes along and does not make a tensor of
    # its methods are ours where they are written below, and torch's own elsewhere
    __torch_function__: ClassVar[Any] = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, raw: Tensor) -> DeviceTensor:
        made: DeviceTensor = Tensor._make_wrapper_subclass(
            cls,
            raw.size(),
            strides=raw.stride(),
            storage_offset=raw.storage_offset(),
            dtype=raw.dtype,
            layout=raw.layout,
            device=DEVICE,
            requires_grad=False,
        )
        made.raw = raw
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # as torch asks for it, and not as it is annotated
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return run(func, args, kwargs or {})

    # so that Module.to keeps the identity of its parameters, as it does on CUDA
    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["raw"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], meta: None, size: Any, stride: Any) -> DeviceTensor:
        return DeviceTensor(inner["raw"])

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        _read("repr")
        return f"{self.raw!r} on {DEVICE}"

    def __format__(self, spec: str) -> str:
        return format(self.item() if self.ndim == 0 else self, spec) if spec else str(self)

    def tolist(self) -> Any:
        _read("tolist")
        return self.raw.tolist()

    def numpy(self, *_: Any, **__: Any) -> NoReturn:
        raise TypeError(f"can't convert {DEVICE} device type tensor to numpy. Use Tensor.cpu() to copy it first.")

    __array__ = numpy

    def data_ptr(self) -> int:
        return self.raw.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.raw.untyped_storage()

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        if not isinstance(value, DeviceTensor):
            raise RuntimeError(f"the data of a tensor on {DEVICE} set to a tensor on {value.device}: not emulated")
        torch._C.TensorBase.data.__set__(self, value)  # type: ignore[attr-defined]
        self.raw = value.raw

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) in memo:
            return memo[id(self)]
        if not self.is_leaf:
            raise RuntimeError("Only Tensors created explicitly by the user support the deepcopy protocol")
        copied: Tensor = DeviceTensor(self.raw.clone())
        copied = nn.Parameter(copied) if isinstance(self, nn.Parameter) else copied
        copied.requires_grad_(self.requires_grad)
        memo[id(self)] = copied
        if self.grad is not None:
            copied.grad = self.grad.__deepcopy__(memo)
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        _read("pickle")
        # as a CPU tensor: torch takes no callable map_location, which Lightning loads with, for tensors of such devices
        return self.raw.detach().clone().requires_grad_(self.requires_grad).__reduce_ex__(protocol)


# random numbers -----------------------------------------------------------------------------------------------------


class _Random:
    """The state of the device's generator, beside that of the CPU."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(torch.initial_seed() % 2**63)

    @contextmanager
    def drawn(self) -> Iterator[None]:
        """What draws of the CPU's generator inside draws of the device's."""
        kept = torch.default_generator.get_state()
        torch.default_generator.set_state(self.generator.get_state())
        try:
            yield
        finally:
            self.generator.set_state(torch.default_generator.get_state())
            torch.default_generator.set_state(kept)


class Backend(_DummyBackendModule):
    """What is found as ``torch.acc``, by the names of ``torch.cuda``."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def manual_seed_all(self, seed: int) -> None:
        random.generator.manual_seed(seed)

    manual_seed = manual_seed_all

    def get_rng_state(self, device: Any = DEVICE) -> Tensor:
        return random.generator.get_state()

    def set_rng_state(self, state: Tensor, device: Any = DEVICE) -> None:
        random.generator.set_state(state)

    def synchronize(self, device: Any = None) -> None:
        _read("synchronize")

    @contextmanager
    def device(self, device: Any) -> Iterator[None]:
        yield


# operators ----------------------------------------------------------------------------------------------------------

#: Operators whose result's size, or whose own checks, need values of the device.
_READERS = {
    "nonzero": "nonzero",
    "masked_select": "masked_select",
    "equal": "equal",
    "allclose": "allclose",
    "_unique": "unique",
    "_unique2": "unique",
    "unique_dim": "unique",
    "unique_consecutive": "unique",
    "unique_dim_consecutive": "unique",
    "repeat_interleave": "repeat_interleave without output_size",
    "bincount": "bincount",
    "histc": "histc",
    "_local_scalar_dense": "item",
    # the info of the solver is read and an error raised by it
    "_linalg_check_errors": "linalg check",
    "_linalg_eigh": "linalg check",
    "_linalg_svd": "linalg check",
    "linalg_eig": "linalg check",
    "linalg_lstsq": "linalg check",
}
_INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}
_COPIES = {"_to_copy", "copy_"}
#: What torch does lazily, by a mark on a tensor that it minds before it comes to us, and not behind.
_PHYSICAL: dict[str, Any] = {"_conj": aten._conj_physical.default, "_neg_view": aten.neg.default}


@dataclass(frozen=True)
class _Facts:
    """What is known of an operator before it is called."""

    name: str
    composite: bool
    view: bool
    random: bool
    written: tuple[int, ...]  # the numbers of arguments that it writes to
    reader: str | None


def _has_kernel(func: OpOverload[Any, Any], key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), key)


@cache
def _facts(func: OpOverload[Any, Any]) -> _Facts:
    name = func._schema.name.partition("::")[2]
    returns = [r.alias_info for r in func._schema.returns]
    arguments = func._schema.arguments
    return _Facts(
        name=name,
        composite=_has_kernel(func, "CompositeImplicitAutograd") and not _has_kernel(func, "CPU"),
        view=bool(returns) and all(alias is not None and not alias.is_write for alias in returns),
        random=torch.Tag.nondeterministic_seeded in func.tags,
        written=tuple(n for n, a in enumerate(arguments) if a.alias_info is not None and a.alias_info.is_write),
        reader=None if name == "repeat_interleave" and func._overloadname != "Tensor" else _READERS.get(name),
    )


def _map(function: Callable[[Any], Any], value: Any) -> Any:
    """``tree_map`` of what operators take and give: values, and lists and tuples of them; several times as fast."""
    if isinstance(value, list | tuple):
        found = [_map(function, inner) for inner in value]
        return found if isinstance(value, list) else tuple(found)
    return function(value)


def run(func: OpOverload[Any, Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """One operator, on the raw tensors of those on the device."""
    facts = _facts(func)
    if facts.composite:  # in inference mode what is made of other operators comes whole
        found = func.decompose(*args, **kwargs)
        if found is not NotImplemented:
            return found
    if facts.name == "_pin_memory":
        raise RuntimeError("cannot pin a tensor of a device: only dense CPU tensors can be pinned")
    known: dict[int, DeviceTensor] = {}

    def bare(value: Any) -> Any:
        if isinstance(value, DeviceTensor):
            known[id(value.raw)] = value
            return value.raw
        if isinstance(value, torch.device):
            return CPU if value.type == NAME else value
        return value

    target = kwargs.get("device")
    here = _map(bare, args)
    options = {key: _map(bare, value) for key, value in kwargs.items()}
    on_device = bool(known) if target is None else torch.device(target).type == NAME
    if facts.name in _COPIES:
        _copied(facts.name, args, kwargs, on_device)
    else:
        if known:
            _require_one_device(func, facts, args, kwargs)
        _require_generator(args, kwargs, on_device)
        if known and facts.reader is not None and kwargs.get("output_size") is None:
            _read(facts.reader)
        if known and facts.name in _INDEXED:
            _indexed(facts.name, args)
    if _counting and not facts.view and facts.name not in ("_local_scalar_dense", "lift_fresh", "detach"):
        for counts in _counting:
            counts.operations += 1
            counts.by_operator[facts.name] += 1
    call = _PHYSICAL.get(facts.name, func) if known else func
    with random.drawn() if facts.random and on_device else nullcontext():
        out = call(*here, **options)
    for number in facts.written:
        raw = _at(here, number)
        if id(raw) in known and raw.shape != known[id(raw)].shape:  # squeeze_ and the like
            torch._C.TensorBase.data.__set__(known[id(raw)], DeviceTensor(raw))  # type: ignore[attr-defined]

    def wrapped(value: Any) -> Any:
        if not isinstance(value, Tensor) or isinstance(value, DeviceTensor):
            return value
        if id(value) in known:  # written in place, or given back as it is
            return known[id(value)]
        return DeviceTensor(value) if on_device else value

    if facts.name == "copy_":
        return args[0]
    if facts.view and isinstance(args[0], Tensor):
        # a view is an inference tensor where what it is of is one, whatever the mode is
        with torch.inference_mode(args[0].is_inference()):
            return _map(wrapped, out)
    made = _map(wrapped, out)
    if facts.name == "scalar_tensor" and on_device:
        made.number = True
    return made


def _at(args: tuple[Any, ...], number: int) -> Any:
    return args[number] if number < len(args) else None


def _require_one_device(func: Any, facts: _Facts, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """What CUDA takes: CPU scalars that are read, and CPU indices."""

    def alien(value: Any, scalars: bool) -> bool:
        return isinstance(value, Tensor) and not isinstance(value, DeviceTensor) and not (scalars and value.ndim == 0)

    indices = 1 if facts.name in _INDEXED else None
    for number, value in [*enumerate(args), *((None, value) for value in kwargs.values())]:
        if number == indices and indices is not None:
            continue
        inner = value if isinstance(value, list | tuple) else (value,)
        scalars = number not in facts.written and not (isinstance(value, list | tuple) and "_foreach" not in facts.name)
        if any(alien(x, scalars) for x in inner):
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least two devices, "
                f"{DEVICE} and cpu! (argument {number} of {func})"
            )


def _require_generator(args: tuple[Any, ...], kwargs: dict[str, Any], on_device: bool) -> None:
    for value in (*args, *kwargs.values()):
        if on_device and isinstance(value, _Generator) and _key(value) not in _generators:
            raise RuntimeError(f"Expected a '{NAME}' device type for generator but found 'cpu'")


def _copied(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], on_device: bool) -> None:
    if name == "copy_":
        to, source = (isinstance(value, DeviceTensor) for value in args[:2])
        waits = not (kwargs.get("non_blocking") or (len(args) > 2 and args[2]))
    else:
        to, source = on_device, isinstance(args[0], DeviceTensor)
        waits = not kwargs.get("non_blocking")
    if source and not to and waits:
        _read("copy to the CPU")
    if to and not source and waits:
        _upload("upload")


def _indexed(name: str, args: tuple[Any, ...]) -> None:
    """A mask as an index is turned into numbers of rows, whose count is read; CPU indices are uploaded."""
    masks = [x for x in args[1] if x is not None and x.dtype in (torch.bool, torch.uint8)]
    if "put" in name:
        value = args[2]
        known = not isinstance(value, DeviceTensor) or value.number
        if len(masks) == 1 and sum(x is not None for x in args[1]) == 1 and value.numel() == 1 and known:
            return  # torch fills by the mask
    if any(isinstance(x, DeviceTensor) for x in masks):
        _read("mask as index")
    if any(isinstance(x, Tensor) and not isinstance(x, DeviceTensor) for x in args[1]):
        _upload("CPU index")


def _key(generator: torch.Generator) -> int:
    return generator._cdata  # type: ignore[attr-defined]  # without types in torch


class _Generators(type):
    def __call__(cls, device: Any = "cpu") -> torch.Generator:
        if torch.device(device).type != NAME:
            return _Generator(device)
        made = _Generator()
        _generators[_key(made)] = made  # kept, since another one could get its address
        return made

    def __instancecheck__(cls, value: object) -> bool:
        return isinstance(value, _Generator)


#: Generators of the device by what they are in C++: their Python objects change on the way through a dispatcher.
_generators: dict[int, torch.Generator] = {}
_Generator = torch.Generator


class _AnyGenerator(metaclass=_Generators):
    """In place of ``torch.Generator``, which cannot be made for a device that is registered from Python."""


def _synchronize(device: Any = None) -> None:
    _read("synchronize")


@contextmanager
def emulation() -> Iterator[None]:
    """What is beyond a device registered from Python: its generators, and to wait for it. Gone at the end.

    The rest is there since this module was loaded.
    """
    kept = torch.accelerator.synchronize
    torch.Generator = _AnyGenerator  # type: ignore[misc, assignment]
    torch.accelerator.synchronize = _synchronize
    try:
        yield
    finally:
        torch.Generator = _Generator  # type: ignore[misc]
        torch.accelerator.synchronize = kept


# factories: made of others they would write to an empty tensor and resize it ------------------------------------------


def _factory(func: OpOverload[Any, Any]) -> Callable[..., Any]:
    def make(*args: Any, **kwargs: Any) -> Any:
        return run(func, args, {**kwargs, "device": DEVICE})

    return make


def _register() -> torch.library.Library:
    _setup_privateuseone_for_python_backend(NAME, backend_module=Backend())
    library = torch.library.Library("aten", "IMPL")
    for name in dir(aten):
        packet = getattr(aten, name)
        for overload in packet.overloads() if hasattr(packet, "overloads") else ():
            func = getattr(packet, overload)
            if name in (
                "silu_backward",
                "mish_backward",
            ):  # one kernel on the CPU and on CUDA, and several on devices without one
                library.impl(func.name().partition("::")[2], partial(_whole, func), "PrivateUse1")
            arguments = func._schema.arguments
            if not any(a.name == "device" for a in arguments) or "Tensor" in " ".join(str(a.type) for a in arguments):
                continue
            if not _facts(func).composite:
                library.impl(func.name().partition("::")[2], _factory(func), "PrivateUse1")
    library.impl("_copy_from", _copy_from, "PrivateUse1")
    return library


def _whole(func: OpOverload[Any, Any], *args: Any, **kwargs: Any) -> Any:
    return run(func, args, kwargs)


def _copy_from(source: Tensor, to: Tensor, non_blocking: bool = False) -> Tensor:
    """What ``torch.tensor(data, device=...)`` copies by, past ``__torch_dispatch__``."""
    _copied("copy_", (to, source), {"non_blocking": non_blocking}, True)
    ours, other = (x.raw if isinstance(x, DeviceTensor) else x for x in (to, source))
    ours.copy_(other)
    return to


random = _Random()
library = _register()
casts = autocast.register(NAME)
