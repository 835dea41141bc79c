"""Record what torch's dispatcher sees in a step: operations, messages and live bytes."""

from __future__ import annotations

import weakref
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from descant.modules.core.compat.dispatch import TorchDispatchMode
from descant.modules.core.compat.fake import FakeTensor
from descant.modules.core.compat.memory import storage_id
from descant.modules.core.compat.pytree import tree_leaves
from descant.modules.training_setup.flops import repeated_share
from descant.plan.costs import WITHOUT_KERNEL, flops, is_view, kernel_bytes, nbytes, unmasked_share, writes
from descant.plan.fake_device import NAME, channels_last
from descant.plan.trace import Collective, Operation

#: Operators of torch's dispatcher -> names in a trace.
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
#: Operators in which ranks wait for each other without sending data.
_EMPTY = ("barrier", "monitored_barrier_")
#: Messages for which gloo keeps a second, flat copy of the larger side.
_COPIED = ("_allgather_base_", "allgather_", "_reduce_scatter_base_", "reduce_scatter_")
#: Messages that FSDP2 or a ring sends while the rank computes.
_BESIDE = ("_allgather_base_", "_reduce_scatter_base_", "send", "recv_")
#: Convolutions -> position of their weight among the arguments; the input comes just before it.
_WEIGHTS = {"aten::convolution": 1, "aten::convolution_backward": 2}


class Recorder(TorchDispatchMode):
    """Records the operations, collectives and live bytes of tensors that are made on the simulated device inside it.

    ``copies``: whether backends copy gathered and scattered data, and the weights of convolutions, as gloo and oneDNN
    do.
    """

    def __init__(self, copies: bool = False) -> None:
        super().__init__()
        self.copies = copies
        self.operations: list[Operation] = []
        self.collectives: list[Collective] = []
        self.phase = "forward"
        self.live = self.peak = self.largest = 0
        self._sizes: dict[int, int] = {}
        self._gathered: dict[int, weakref.ref[Any]] = {}  # storages that FSDP2 frees by resizing them

    def again(self) -> None:
        """Clear the recorded operations, collectives and peaks, but keep the live tensors."""
        self.operations, self.collectives = [], []
        self.peak, self.largest = self.live, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:
            return NotImplemented  # DTensor calls this again with its local part
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # a shortcut: called ten thousand times a step
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func.namespace == "prim":
            return out
        if func.namespace == "c10d":
            self._message(func, args)
            return out
        operation = operation_of(func, args, kwargs, out, self.phase, FakeTensor)
        if operation is not None:
            self.operations.append(operation)
        if self._gathered:
            self._look()
        for tensor in tree_leaves(out):
            if isinstance(tensor, FakeTensor) and tensor.device.type == NAME:
                self._hold(tensor.untyped_storage())
        self.peak = max(self.peak, self.live + _within(func, args, self.copies))
        if func.namespace == "fsdp" and "out" in kwargs:
            for tensor in kwargs["out"]:
                storage = tensor.untyped_storage()
                self._hold(storage)
                self._gathered[storage._cdata] = weakref.ref(storage)
        return out

    def _message(self, func: Any, args: Any) -> None:
        name = func._schema.name.partition("::")[2]
        if name in _EMPTY:
            return
        sides = [sum(map(nbytes, tree_leaves(arg))) for arg in args]
        group = next(x for x in args if isinstance(x, torch.ScriptObject) and "ProcessGroup" in str(x._type()))
        members = dist.get_process_group_ranks(dist.ProcessGroup.unbox(group))
        if self.copies and name in _COPIED:
            self.peak = max(self.peak, self.live + max(sides))
        of_copies = bool(self._gathered) and len(members) < dist.get_world_size()  # for hybrid shards
        beside = name in _BESIDE or (name == "allreduce_" and self.phase == "backward" and of_copies)
        stride = members[1] - members[0] if len(members) > 1 else 1
        name, done = MESSAGES.get(name, name), len(self.operations)
        message = Collective(name, self.phase, max(sides), len(members), stride, beside, done)
        self.collectives.append(message)

    def _hold(self, storage: torch.UntypedStorage) -> None:
        key, size = storage_id(storage), storage.nbytes()
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


def _within(func: Any, args: Any, copies: bool) -> int:
    """Return the bytes that an operator holds only while it runs.

    For logsumexp, these are the exponentiated values. A convolution of oneDNN holds its weight, or the weight's
    gradient, in a layout of its own, and the weight once more if only the images are channels last.
    """
    name = func._overloadpacket._qualified_op_name
    if name == "aten::logsumexp":
        return nbytes(args[0])
    if not copies or name not in _WEIGHTS:
        return 0
    x, weight = args[_WEIGHTS[name] - 1 : _WEIGHTS[name] + 1]
    mixed = channels_last(x) and not weight.is_contiguous(memory_format=torch.channels_last)
    return nbytes(weight) * (2 if mixed else 1)


def operation_of(
    func: Any, args: Any, kwargs: dict[str, Any], out: Any, phase: str, kind: type[Tensor] = Tensor
) -> Operation | None:
    """Return a call of an operator as an operation of a plan.

    It is None if the call launches no kernel, or has no tensor of ``kind``. Bytes written are those of the outputs, or
    of all arguments changed in place if there are no outputs.

    >>> aten, x = torch.ops.aten, torch.zeros(6)
    >>> made = operation_of(aten._foreach_mul_.Scalar, ([x, x[:2]], 2.0), {}, (), "optimizer")
    >>> made.name, made.read, made.written
    ('_foreach_mul_', 32, 32)
    >>> operation_of(aten.view.default, (x, [2, 3]), {}, x.view(2, 3), "forward") is None
    True
    """
    given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, kind)]
    made = [x for x in tree_leaves(out) if isinstance(x, kind)]
    name = func._schema.name.partition("::")[2]
    if is_view(func) or name in WITHOUT_KERNEL or not (given or made):
        return None
    floats = [x.dtype for x in given if x.is_floating_point()] or [x.dtype for x in (*made, *given)]
    return Operation(
        name=name,
        phase=phase,
        flops=flops(func, args, kwargs, out),
        read=sum(map(kernel_bytes, given)),
        written=sum(map(kernel_bytes, made or _list_written(func, args, kwargs, kind))),
        dtype=str(floats[0]).removeprefix("torch."),
        done=unmasked_share(func, args),
        repeated=repeated_share(func),
    )


def _list_written(func: Any, args: Any, kwargs: dict[str, Any], kind: type[Tensor]) -> list[Tensor]:
    """List the tensors that a call writes in place if it returns none, such as those of optimizers."""
    found: list[Tensor] = []
    for place, name in writes(func):
        value = args[place] if place < len(args) else kwargs.get(name)
        found += [x for x in tree_leaves(value) if isinstance(x, kind)]
    return found
