"""One training step of the real recipe as a rank of many would take it, on tensors without data.

Recipe, parts, optimizer and FSDP2 are those of a run, and so are their kernels, messages and tensors; nothing is
computed and nothing sent. DDP, whose reducer needs data, follows from its rules. Callbacks do not take part.
Letters: B rows of a micro-batch on a rank, W ranks.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from descant.modules.core.batch import Batch, some
from descant.modules.core.hooks import GradientHooks
from descant.modules.losses.exchange import Exchange
from descant.modules.training_setup.activation_checkpointing import Checkpointing
from descant.modules.training_setup.compile_and_shard import Shard
from descant.modules.training_setup.optim import make_optimizer
from descant.modules.training_setup.sync_batch_norm import synchronize
from descant.plan.costs import WITHOUT_KERNEL, done, flops, is_view, moved, nbytes, writes
from descant.plan.fake_device import NAME, Simulated, adapted, on_device, register
from descant.plan.trace import Collective, Memory, Operation, Trace

#: Operators of torch's dispatcher -> names here.
MESSAGES = {
    "allgather_": "all_gather",
    "_allgather_base_": "all_gather",
    "allreduce_": "all_reduce",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_": "reduce_scatter",
    "alltoall_base_": "all_to_all",
    "send": "send",
    "recv_": "recv",
    "broadcast_": "broadcast",
}
#: Those that ranks wait for each other in, without a byte.
_EMPTY = ("barrier", "monitored_barrier_")
#: Messages whose larger side gloo holds twice, once flat.
_COPIED = ("_allgather_base_", "allgather_", "_reduce_scatter_base_", "reduce_scatter_")
#: Messages that FSDP2 sends beside the computation, and a ring's.
_BESIDE = ("_allgather_base_", "_reduce_scatter_base_", "send", "recv_")
#: Bytes of DDP's first bucket and of the others, as torch has them.
BUCKETS = (1 << 20, 25 << 20)


@dataclass(frozen=True)
class Layout:
    """How a step is laid over ranks and in time.

    Attributes:
        strategy: ddp, fsdp (parameters freed between forward and backward), kept (FSDP2 that keeps them), or hsdp
            (split within groups of ``shard`` ranks, replicated over them).
        world: W. shard: ranks of a shard group, of hsdp.
        checkpointing: of which blocks are recomputed in backward.
        chunks: pieces of a batch with in-batch negatives (GradCache). micro: micro-batches of a step.
        exchange: how samples of all ranks meet in losses that have a choice; None is their own.
        dtype: of parameters in compute under FSDP2; None is the trainer's.
    """

    strategy: Literal["ddp", "fsdp", "kept", "hsdp"] = "ddp"
    world: int = 1
    shard: int = 1
    checkpointing: Checkpointing | None = None
    chunks: int = 1
    micro: int = 1
    exchange: Exchange | None = None
    dtype: Any = None

    @property
    def sharding(self) -> Shard | None:
        """As a recipe is given it."""
        if self.strategy == "ddp":
            return None
        return Shard(self.strategy != "kept", self.dtype, shard=self.shard if self.strategy == "hsdp" else None)


@dataclass(frozen=True)
class Precision:
    """Of Lightning's names: autocast in a type, or everything in one.

    >>> Precision.of("bf16-mixed"), Precision.of("32-true")
    (Precision(autocast=torch.bfloat16, whole=None), Precision(autocast=None, whole=None))
    """

    autocast: torch.dtype | None = None
    whole: torch.dtype | None = None

    @staticmethod
    def of(name: str | int | None) -> Precision:
        text = str(name or "32-true")
        dtype = torch.bfloat16 if text.startswith("bf16") else torch.float16 if text.startswith("16") else None
        return Precision(dtype, None) if text.endswith("mixed") or text in ("16", "bf16") else Precision(None, dtype)

    def context(self) -> AbstractContextManager[Any]:
        return torch.autocast(NAME, self.autocast) if self.autocast is not None else nullcontext()


class Recorder(TorchDispatchMode):
    """Operations, collectives and live bytes of the tensors on the simulated device that are made inside.

    ``copies``: whether a backend copies what it gathers and scatters, as gloo does.
    """

    def __init__(self, copies: bool = False) -> None:
        super().__init__()
        self.copies = copies
        self.operations: list[Operation] = []
        self.collectives: list[Collective] = []
        self.phase = "forward"
        self.live = self.peak = self.largest = 0
        self._sizes: dict[int, int] = {}
        self._gathered: dict[int, weakref.ref[Any]] = {}  # storages that FSDP2 frees by their size

    def again(self) -> None:
        """Forget what was recorded; what is live remains so."""
        self.operations, self.collectives = [], []
        self.peak, self.largest = self.live, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:
            return NotImplemented  # it asks again for its part
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # asked for ten thousand times a step
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func.namespace == "prim":
            return out
        if func.namespace == "c10d":
            self._message(func, args)
            return out
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, FakeTensor)]
        made = [x for x in tree_leaves(out) if isinstance(x, FakeTensor) and x.device.type == NAME]
        if not given and not made:
            return out
        if self._gathered:
            self._look()
        for tensor in made:
            self._hold(tensor.untyped_storage())
        if func.namespace == "fsdp" and "out" in kwargs:
            for tensor in kwargs["out"]:
                storage = tensor.untyped_storage()
                self._hold(storage)
                self._gathered[storage._cdata] = weakref.ref(storage)
        if not is_view(func) and func._schema.name.partition("::")[2] not in WITHOUT_KERNEL:
            self._operation(func, args, kwargs, out, given, made)
        return out

    def _operation(self, func: Any, args: Any, kwargs: Any, out: Any, given: list[Any], made: list[Any]) -> None:
        floats = [x.dtype for x in given if x.is_floating_point()] or [x.dtype for x in (*made, *given)]
        written = sum(map(moved, made)) or sum(moved(given[n]) for n in writes(func) if n < len(given))
        record = Operation(
            name=func._schema.name.partition("::")[2],
            phase=self.phase,
            flops=flops(func, args, kwargs, out),
            read=sum(map(moved, given)),
            written=written,
            dtype=str(floats[0]).removeprefix("torch."),
            done=done(func, args),
        )
        self.operations.append(record)

    def _message(self, func: Any, args: Any) -> None:
        name = func._schema.name.partition("::")[2]
        if name in _EMPTY:
            return
        sides = [sum(map(nbytes, tree_leaves(arg))) for arg in args]
        group = next(x for x in args if isinstance(x, torch.ScriptObject) and "ProcessGroup" in str(x._type()))
        members = dist.get_process_group_ranks(dist.ProcessGroup.unbox(group))
        if self.copies and name in _COPIED:
            self.peak = max(self.peak, self.live + max(sides))
        beside = name in _BESIDE or (name == "allreduce_" and self.phase == "backward" and bool(self._gathered))
        stride = members[1] - members[0] if len(members) > 1 else 1
        message = Collective(MESSAGES.get(name, name), self.phase, max(sides), len(members), stride, beside)
        self.collectives.append(message)

    def _hold(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        before = self._sizes.get(key)
        if before is None:
            weakref.finalize(storage, self._drop, key)
        if size != (before or 0) or before is None:
            self._sizes[key] = size
            self.live += size - (before or 0)
            self.peak, self.largest = max(self.peak, self.live), max(self.largest, size)

    def _drop(self, key: int) -> None:
        self.live -= self._sizes.pop(key, 0)
        self._gathered.pop(key, None)

    def _look(self) -> None:
        for reference in list(self._gathered.values()):
            storage = reference()
            if storage is not None:
                self._hold(storage)


# steps --------------------------------------------------------------------------------------------------------------


class Simulation:
    """A copy of a recipe in one layout, whose steps can be asked for at several batch sizes.

    Inside :func:`descant.plan.fake_device.ranks` of the layout's ``world``, if that is above 1.

    Args:
        recipe: in training, configured but not sharded, on any device (meta, where it would not fit).
        batch: some real samples on the CPU, which a planned batch repeats.
        gloo: whether ranks are on CPUs, whose messages gloo carries.
    """

    def __init__(self, recipe: Any, batch: Batch, layout: Layout, gloo: bool = False) -> None:
        self.batch, self.layout = batch, layout
        self.precision = Precision.of(recipe.trainer.precision)
        self.simulated, self.record = Simulated(), Recorder(copies=gloo)
        with self._context(recipe.trainer):
            self.twin = _twin(recipe, layout, self.precision)
            self.optimizer = make_optimizer(recipe.optimizer_now, self.twin)
        for group in self.optimizer.param_groups:
            if group.get("foreach") is None and not group.get("fused"):  # torch's choice goes by the device's name
                group["foreach"] = not gloo
        self._warm = False

    @contextmanager
    def _context(self, trainer: Any) -> Iterator[None]:
        kept, trainer.log_every_n_steps = trainer.log_every_n_steps, 0
        try:
            with self.simulated, adapted(cpu=self.record.copies), self.record:
                yield
        finally:
            trainer.log_every_n_steps = kept

    def step(self, rows: int) -> Trace:
        """A step with ``rows`` samples in each micro-batch of this rank; the optimizer has its states.

        Raises:
            RuntimeError: where a step reads a value of the device that has no host copy.
        """
        with self._context(self.twin.trainer):
            tokens = self._one(rows) if self._warm else self._first(rows)
            self._warm = True
        twin, record, layout = self.twin, self.record, self.layout
        held = {id(x): x for state in self.optimizer.state.values() for x in tree_leaves(state)}
        states = sum(nbytes(_local(x)) for x in held.values() if on_device(_local(x)))
        weights = sum(nbytes(_local(x)) for x in (*twin.parameters(), *twin.buffers()))
        gradients = sum(nbytes(_local(p.grad)) for p in twin.parameters() if p.grad is not None)
        reduced = layout.strategy == "ddp" and layout.world > 1
        collectives = record.collectives + (list(_reducing(twin, layout)) if reduced else [])
        beside = record.peak - weights - states - gradients
        memory = Memory(weights, states, gradients, gradients if reduced else 0, beside, record.largest)
        return Trace(rows * layout.micro, memory, record.operations, collectives, tokens)

    def _first(self, rows: int) -> int:
        """A step after what the first one of a run makes: gradients, and states of the optimizer.

        They are those of gradients of zeros; of a real step, where recipes make sure of something in it, or where
        parameters have no part in one.
        """
        trained = [p for p in self.twin.parameters() if p.requires_grad]
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()
        try:
            tokens = self._one(rows)
            if all(p.grad is not None for p in trained):
                return tokens
        except DataDependentOutputException:
            self.twin.output = None
        self.optimizer.state.clear()
        self.optimizer.zero_grad()
        self.simulated.once = True
        self._one(min(rows, len(self.batch)))
        self.simulated.once = False
        return self._one(rows)

    def _one(self, rows: int) -> int:
        """One optimizer step; returns the tokens in it."""
        made = [
            _repeated(self.batch, rows, self.layout)._each(_whole(self.precision)) for _ in range(self.layout.micro)
        ]
        there = [batch.to(register()) for batch in made]
        self.record.again()
        _step(self.twin, self.optimizer, there, self.precision, self.record)
        return sum(map(_tokens, made))


def _twin(recipe: Any, layout: Layout, precision: Precision) -> Any:
    memo = {id(recipe.hooks): GradientHooks(), id(recipe.step.objective): None, id(recipe._trainer): recipe._trainer}
    twin = copy.deepcopy(recipe, memo)
    for one in twin.nested.values():
        one.trainer = recipe.trainer
    twin.step.world, twin.step.accumulate = layout.world, layout.micro
    if layout.chunks > 1:
        twin.step.chunks = layout.chunks
    if layout.world > 1:
        synchronize(twin)
    _to_device(twin, precision.whole)
    if layout.checkpointing is not None:
        layout.checkpointing.apply(twin)
    for part in twin.modules() if layout.exchange is not None else ():
        if hasattr(part, "exchange"):
            part.exchange = layout.exchange
    sharding = layout.sharding
    if sharding is not None:
        twin._device_mesh = init_device_mesh(NAME, (layout.world,), mesh_dim_names=("data_parallel",))
        twin._parts.append(sharding)
        sharding.apply(twin)
    return twin.train(recipe.training)


def _to_device(module: nn.Module, dtype: torch.dtype | None) -> None:
    """Parameters and buffers as tensors of their shape on the device; what was shared stays shared."""
    made: dict[int, Tensor] = {}

    def like(x: Tensor) -> Tensor:
        kind = dtype if dtype is not None and x.is_floating_point() else x.dtype
        return torch.empty_like(x, device=register(), dtype=kind)

    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False, remove_duplicate=False)):
            if id(parameter) not in made:
                made[id(parameter)] = nn.Parameter(like(parameter), parameter.requires_grad)
            part._parameters[name] = made[id(parameter)]  # type: ignore[assignment]
        for name, buffer in list(part.named_buffers(recurse=False, remove_duplicate=False)):
            part._buffers[name] = made.setdefault(id(buffer), like(buffer))


def _repeated(batch: Batch, rows: int, layout: Layout) -> Batch:
    real_N = some(*batch.present.values()).nonzero()[:, 0]  # without rows of padding
    part = batch.select(real_N[torch.arange(rows) % len(real_N)])
    times = layout.world * layout.micro
    return replace(part, step={name: mask_B.repeat(times) for name, mask_B in part.present.items()})


def _whole(precision: Precision) -> Any:
    def change(x: Tensor) -> Tensor:
        return x.to(precision.whole) if precision.whole is not None and x.is_floating_point() else x

    return change


def _step(twin: Any, optimizer: Any, batches: list[Batch], precision: Precision, record: Recorder) -> None:
    for n, batch in enumerate(batches):
        last = n + 1 == len(batches)
        with nullcontext() if last or twin.sharding is None else twin.sharding.accumulating(twin):
            record.phase = "forward"
            with precision.context():
                loss = twin.training_step(batch, n)
            if n == 0:
                optimizer.zero_grad()  # as Lightning does, between forward and backward
            record.phase = "backward"
            (loss / len(batches)).backward()
            del loss
            twin.output = twin.step.objective = None
    record.phase = "optimizer"
    clip = twin.trainer.gradient_clip_val
    if clip:
        nn.utils.clip_grad_norm_([p for p in twin.parameters() if p.grad is not None], clip)
    optimizer.step()


def _reducing(twin: nn.Module, layout: Layout) -> Iterator[Collective]:
    """What DDP sends: buffers from the first rank before a forward, and gradients in buckets, the last ones first."""
    buffers: dict[torch.dtype, int] = {}
    for buffer in twin.buffers():
        buffers[buffer.dtype] = buffers.get(buffer.dtype, 0) + nbytes(buffer)
    for size in buffers.values():
        yield Collective("broadcast", "forward", size, layout.world)
    limit, held = BUCKETS[0], 0
    for parameter in reversed([p for p in twin.parameters() if p.requires_grad]):
        held += nbytes(parameter)
        if held >= limit:
            yield Collective("all_reduce", "backward", held, layout.world, overlapped=True)
            limit, held = BUCKETS[1], 0
    if held:
        yield Collective("all_reduce", "backward", held, layout.world, overlapped=True)


def _local(x: Any) -> Any:
    return x._local_tensor if isinstance(x, DTensor) else x


def _tokens(batch: Batch) -> int:
    """Of inputs that are sequences of codes, padding among them; a mask of them is none."""
    codes = [x for x in batch.inputs.values() if x.ndim == 2 and not x.is_floating_point() and x.dtype != torch.bool]
    return sum(x.numel() for x in codes)
