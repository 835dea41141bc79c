"""FSDP2 strategy of ``on/fsdp``: parameters, gradients and optimizer states sharded over all ranks."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
)
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from descant.modules.core.compat.dtensor import local_shape_and_offset
from descant.modules.core.compat.pytree import tree_map
from descant.modules.core.dtensor import gather_parts
from descant.modules.io.manifest import NONE, fault_of_share
from descant.modules.io.parts import Name, Parted, PartTable, fill_names
from descant.modules.io.plain import in_parts, load_plain
from descant.modules.training_setup.compile_and_shard import SCALARS
from descant.run.parted_io import PartedIO

#: Weights in a checkpoint by parameter names: those that are evaluated and, if these are an average, the raw ones.
_WEIGHTS = ("state_dict", "current_model_state")


class Sharded(ModelParallelStrategy):
    """ModelParallelStrategy with data parallelism only, over all ranks; any number of ranks can read its checkpoints.

    Lightning's own strategy needs the number of ranks in the YAML or uses tensor parallelism within a node, and its
    checkpoints are folders that only the same number of ranks can read. ``model.shard`` sets what is sharded.

    A checkpoint is one file, which rank 0 writes with the state that it gathers from all ranks. With the plugin
    :class:`~descant.run.parted_io.PartedIO` (``with/train/sharded-save``), each rank writes the part that it holds. In
    both cases, each rank reads only the part that it will hold.

    Args:
        process_group_backend: gloo or nccl; by default chosen by the device.
    """

    def __init__(self, process_group_backend: str | None = None) -> None:
        super().__init__(
            tensor_parallel_size=1, save_distributed_checkpoint=False, process_group_backend=process_group_backend
        )

    def _setup_distributed(self) -> None:
        super()._setup_distributed()
        self._data_parallel_size = dist.get_world_size()  # known here, and read next

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Run a micro-batch that no optimizer step follows as ``Shard.accumulated`` sets it.

        Lightning's own method blocks DDP only, so every micro-batch would exchange its gradients.
        """
        sharding = getattr(self.lightning_module, "sharding", None)
        if sharding is None or self.model is None:
            yield
            return
        with sharding.accumulating(self.model):
            yield

    def lightning_module_state_dict(self) -> dict[str, Any]:
        if not isinstance(self.checkpoint_io, PartedIO):
            return super().lightning_module_state_dict()
        assert self.model is not None
        return get_model_state_dict(self.model)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return the state of an optimizer, numbered and shaped as in an unsharded run; on rank 0 only. Collective.

        With :class:`PartedIO`, each rank has its own parts.
        """
        optimizer = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        parted, scalars = isinstance(self.checkpoint_io, PartedIO), {id(p) for p in self._scalars().values()}
        state, own = optimizer.state_dict(), _parameters(optimizer)

        def convert(scalar: bool, value: Any) -> Any:
            if not isinstance(value, DTensor) or (parted and not scalar):
                return value
            whole = value.full_tensor()
            whole = whole.reshape(()) if scalar and whole.shape == (1,) else whole
            return whole.cpu() if parted or self.is_global_zero else None

        states = {
            number: tree_map(partial(convert, id(own[number]) in scalars), state["state"][number])
            for number in sorted(state["state"])  # in the same order on all ranks
        }
        return state | {"state": states} if parted or self.is_global_zero else {}

    def _scalars(self) -> dict[str, Tensor]:
        """Return state-dict key -> parameter, for parameters without dimensions, to which ``Shard`` gave one."""
        assert self.model is not None
        modules = self.model.named_modules(remove_duplicate=False)
        found = ((path, module, name) for path, module in modules for name in getattr(module, SCALARS, ()))
        return {f"{path}.{name}" if path else name: getattr(module, name) for path, module, name in found}

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        for state, key in itertools.product(_WEIGHTS, self._scalars()):
            if isinstance(value := checkpoint.get(state, {}).get(key), Tensor):
                checkpoint[state][key] = gather_parts(value).reshape(())
        io = self.checkpoint_io
        if not isinstance(io, PartedIO):
            return super().save_checkpoint(checkpoint, filepath, storage_options)
        io.wait()
        place = (str(filepath), io.begin(filepath)) if self.is_global_zero else None
        path, folder = self.broadcast(place)  # type: ignore[misc]
        return io.save_part(checkpoint, Path(path), folder, self.global_rank, self.world_size)

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint into the module and its optimizers, and return the rest of it. Collective."""
        path = Path(checkpoint_path)
        if path.is_dir():
            raise ValueError(f"{checkpoint_path}: a folder; a checkpoint is one file")
        table: PartTable | None = None
        if in_parts(path):
            parted = self._open_parts(path)
            content, table = parted.content, parted.table
        else:
            content = load_plain(path, map_location="cpu", mmap=True)
        self.restore_stage(lambda: content)
        return self._load(path, dict(content), partial(_read, table))

    def _open_parts(self, path: Path) -> Parted:
        """Open a checkpoint of several parts. The ranks share the verification of the parts. Collective."""
        getattr(self.checkpoint_io, "wait", lambda: None)()
        why = fault_of_share(path, self.global_rank, self.world_size)
        if why == NONE:
            rank_zero_warn(f"{path}: no manifest confirms its content")
            why = Parted(path).fault(self.global_rank, self.world_size)
        faults: list[str | None] = [None] * self.world_size
        dist.all_gather_object(faults, why)
        for why in faults:
            if why is not None:
                raise ValueError(f"{path}: {why}")
        return Parted(path)

    def restore_stage(self, read: Callable[[], Mapping[str, Any]]) -> None:
        """Build the optimizer of a checkpoint's stage, into which the state is then read."""
        module: Any = self.lightning_module
        if hasattr(module, "return_to_stage"):
            module.return_to_stage(read())
            if self.optimizers:
                self.setup_optimizers(module.trainer)

    def teardown(self) -> None:
        super().teardown()
        self.checkpoint_io.teardown()  # Lightning forgets it, and an asynchronous save with it

    def _load(self, path: Path, content: dict[str, Any], read: Callable[..., Any]) -> dict[str, Any]:
        """Read weights and optimizer states of a checkpoint's content into place, and return the rest.

        ``read`` is called with a value and with what this rank has in its place.
        """
        assert self.model is not None and self.lightning_module is not None
        strict, like = self.lightning_module.strict_loading, get_model_state_dict(self.model)
        for key in _WEIGHTS:
            if key in content:
                content[key] = {name: read(value, like.get(name)) for name, value in content[key].items()}
        weights = content.pop("state_dict")
        _require_keys(path, like, weights, strict)
        set_model_state_dict(self.model, weights, options=StateDictOptions(strict=strict))
        states = content.pop("optimizer_states", [])
        for optimizer, state in zip(self.optimizers, states, strict=bool(states)):
            self._load_optimizer(path, optimizer, state, read)
        rest: dict[str, Any] = fill_names(content, read)
        return rest

    def _load_optimizer(
        self, path: Path, optimizer: Optimizer, state: dict[str, Any], read: Callable[..., Any]
    ) -> None:
        """Read the state of an optimizer, whose parameters are numbered in the order of its groups."""
        assert self.model is not None
        own, numbers = _parameters(optimizer), [n for group in state["param_groups"] for n in group["params"]]
        if len(own) != len(numbers):
            raise ValueError(f"{path}: an optimizer of {len(numbers)} parameters, and here it has {len(own)}")
        if state["state"]:
            # a step with zero gradients shows which states the optimizer splits like parameters; the shape does not,
            # since Adam's count of steps has the shape of a scalar parameter
            get_optimizer_state_dict(self.model, optimizer)
        held = {number: dict(optimizer.state.get(p, {})) for number, p in zip(numbers, own, strict=True)}
        states = {number: _read_states(values, held[number], read) for number, values in state["state"].items()}
        optimizer.load_state_dict({"state": states, "param_groups": fill_names(state["param_groups"], read)})


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _read_states(saved: Mapping[str, Any], held: Mapping[str, Any], read: Callable[..., Any]) -> dict[str, Any]:
    """Read the states of a parameter, at any depth, each like the one that this rank holds in its place."""
    return {
        key: _read_states(value, held.get(key) or {}, read) if isinstance(value, dict) else read(value, held.get(key))
        for key, value in saved.items()
    }


def _read(table: PartTable | None, value: Any, like: Any = None) -> Any:
    """Read what this rank will hold of a tensor: a box if ``like`` is split and has the same shape, else all of it.

    ``table`` is that of the parts, if ``value`` is a name in it.
    """
    if isinstance(value, Name) and table is not None:
        shape, box = table.shape(value), partial(table.box, value)
    elif isinstance(value, Tensor):
        shape, box = tuple(value.shape), partial(_box, value)
    else:
        return value
    if not isinstance(like, DTensor) or (shape or (1,)) != tuple(like.shape):
        return box((0,) * len(shape), shape)
    mesh, placements = like.device_mesh, like.placements
    size, offset = local_shape_and_offset(like.shape, mesh, placements)
    local = box(offset, size) if shape else box((), ()).reshape(1)[: size[0]]
    how: dict[str, Any] = {"run_check": False, "shape": like.shape, "stride": like.stride()}
    split: DTensor = DTensor.from_local(local.to(like.device), mesh, placements, **how)
    return split


def _box(whole: Tensor, offset: Sequence[int], size: Sequence[int]) -> Tensor:
    """Copy a box of a tensor, which may lie in a mapped file."""
    return whole[tuple(slice(a, a + b) for a, b in zip(offset, size, strict=True))].clone()


def _require_keys(path: Path, here: Mapping[str, Any], saved: Mapping[str, Any], strict: bool) -> None:
    """Raise ValueError, if ``strict``, for the first weight that only the model or only the checkpoint has."""
    missing, left = (next((k for k in a if k not in b), None) for a, b in ((here, saved), (saved, here)))
    if strict and missing is not None:
        raise ValueError(f"{path}: not the weights of this model: {missing} is not in it")
    if strict and left is not None:
        raise ValueError(f"{path}: not the weights of this model, which has no {left}")
