"""FSDP2 strategy of ``on/fsdp``: parameters, gradients and optimizer states sharded over all ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.strategies.model_parallel import _align_compiled_param_names_with_module
from lightning.pytorch.utilities import rank_zero_warn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FullyShardedDataParallel, OptimStateKeyType
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.optim import Optimizer

from descant.modules.io import renamed
from descant.modules.io.manifest import NONE, fault_of_share
from descant.modules.io.parts import Name, Parted, filled
from descant.modules.io.plain import in_parts, load_plain
from descant.run.parted_io import PartedIO

#: Weights in a checkpoint, by the names of parameters: those that are evaluated, and where an average is, the raw ones.
_WEIGHTS = ("state_dict", "current_model_state")


class Sharded(ModelParallelStrategy):
    """ModelParallelStrategy with data parallelism only, over all ranks; checkpoints are read by any number of them.

    Lightning's own needs the number of ranks in the YAML or uses tensor parallelism within a node, and its checkpoints
    are folders that only the same number of ranks can read. ``model.shard`` sets what is sharded.

    A checkpoint is one file, which rank 0 writes with what it gathers from all; with the plugin
    :class:`~descant.run.parted_io.PartedIO` (``with/train/sharded-save``) each rank writes what it holds. Of either
    each rank reads what it will hold.

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
        """Context of a micro-batch that no optimizer step follows, as ``Shard.accumulated`` has it.

        Lightning's own blocks DDP only: every micro-batch would exchange its gradients.
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
        optimizer = optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        begun = bool(optimizer.state)
        groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
        state = self._optimizer_state(optimizer)
        if begun:
            return state
        # torch has made a state to read by a step without gradients, which counts: Adam would correct its moments, and
        # a schedule-free optimizer weigh its average, as in a later step than the next one
        optimizer.state.clear()
        for group, before in zip(optimizer.param_groups, groups, strict=True):
            group.update(before)
        return state | {"state": {}} if state else state

    def _optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        if not isinstance(self.checkpoint_io, PartedIO):
            return super().optimizer_state(optimizer)
        assert self.model is not None
        state = _align_compiled_param_names_with_module(get_optimizer_state_dict(self.model, optimizer), self.model)
        by_id = OptimStateKeyType.PARAM_ID
        return FullyShardedDataParallel.rekey_optim_state_dict(state, by_id, self.model)

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        io = self.checkpoint_io
        if not isinstance(io, PartedIO):
            return super().save_checkpoint(checkpoint, filepath, storage_options)
        io.wait()
        place = (str(filepath), io.begin(filepath)) if self.is_global_zero else None
        path, folder = self.broadcast(place)  # type: ignore[misc]
        return io.save_part(checkpoint, Path(path), folder, self.global_rank, self.world_size)

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint into the module and its optimizers, and return the rest of it. Collective.

        Raises:
            ValueError: for a folder, whose index is a pickle that may run code; for a checkpoint of several parts of
                which one is missing or changed, or which is not of this module.
        """
        path = Path(checkpoint_path)
        if path.is_dir():
            raise ValueError(f"{checkpoint_path}: a folder; a checkpoint is one file")
        if not in_parts(path):
            content = load_plain(path, map_location="cpu", mmap=True)
            self.restore_stage(lambda: content)
            kept = self._optimizers
            if not any(state["state"] for state in content.get("optimizer_states", ())):
                self._optimizers = []  # saved before the first step: there is nothing to read
            try:
                return renamed.checkpoint(super().load_checkpoint(checkpoint_path, weights_only=weights_only))
            finally:
                self._optimizers = kept
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
        parted = Parted(path)
        self.restore_stage(lambda: parted.content)
        return renamed.checkpoint(self._load_parts(parted))

    def restore_stage(self, read: Callable[[], Mapping[str, Any]]) -> None:
        """Build the optimizer of the stage that a checkpoint is of, whose state is then read into it."""
        module: Any = self.lightning_module
        if hasattr(module, "return_to_stage"):
            module.return_to_stage(read())
            if self.optimizers:
                self.setup_optimizers(module.trainer)

    def teardown(self) -> None:
        super().teardown()
        self.checkpoint_io.teardown()  # Lightning forgets it, and an asynchronous save with it

    def _load_parts(self, parted: Parted) -> dict[str, Any]:
        assert self.model is not None and self.lightning_module is not None
        content, strict = dict(parted.content), self.lightning_module.strict_loading
        like = get_model_state_dict(self.model)
        for key in _WEIGHTS:
            if key in content:
                saved = content[key].items()
                content[key] = {name: self._read(parted, value, like.get(name)) for name, value in saved}
        weights = content.pop("state_dict")
        _require_keys(parted.path, like, weights, strict)
        set_model_state_dict(self.model, weights, options=StateDictOptions(strict=strict))
        states = content.get("optimizer_states", [])
        for optimizer, state in zip(self.optimizers, states, strict=bool(states)):
            if state["state"]:  # it was saved before its first step, otherwise
                self._load_optimizer(parted, optimizer, state)
        content.pop("optimizer_states", None)
        rest: dict[str, Any] = parted.fill(content)
        return rest

    def _load_optimizer(self, parted: Parted, optimizer: Optimizer, state: dict[str, Any]) -> None:
        """The state of an optimizer, whose parameters are numbered in the order of its groups."""
        assert self.model is not None
        own = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        numbers = [number for group in state["param_groups"] for number in group["params"]]
        if len(own) != len(numbers):
            raise ValueError(f"{parted.path}: an optimizer of {len(numbers)} parameters, and here it has {len(own)}")
        names = {id(p): name.replace("_orig_mod.", "") for name, p in self.model.named_parameters()}
        named = {number: names[id(parameter)] for number, parameter in zip(numbers, own, strict=True)}
        like = dict(zip(numbers, own, strict=True))
        read = {
            named[number]: filled(value, partial(self._read, parted, like=like[number]))
            for number, value in state["state"].items()
        }
        groups = [{**group, "params": [named[n] for n in group["params"]]} for group in state["param_groups"]]
        whole = {"state": read, "param_groups": parted.fill(groups)}
        set_optimizer_state_dict(self.model, optimizer, whole, options=StateDictOptions())

    def _read(self, parted: Parted, name: Any, like: Any) -> Any:
        """What this rank will hold of a tensor: a box, where ``like`` is split and of the same shape; else all."""
        if not isinstance(name, Name):
            return name
        table, shape = parted.table, parted.table.shape(name)
        row = shape == () and tuple(like.shape) == (1,) if isinstance(like, DTensor) else False  # of whole parameters
        if not isinstance(like, DTensor) or not (row or shape == tuple(like.shape)):
            return table.whole(name)
        mesh, placements = like.device_mesh, like.placements
        size, offset = compute_local_shape_and_global_offset(like.shape, mesh, placements)
        local = table.whole(name).reshape(1)[: size[0]] if row else table.box(name, offset, size)
        how: dict[str, Any] = {"run_check": False, "shape": like.shape, "stride": like.stride()}
        split: DTensor = DTensor.from_local(local.to(like.device), mesh, placements, **how)
        return split


def _require_keys(path: Path, here: Mapping[str, Any], saved: Mapping[str, Any], strict: bool) -> None:
    """Raise ValueError, where ``strict``, for the first weight that only the model or only the checkpoint has."""
    missing, left = (next((k for k in a if k not in b), None) for a, b in ((here, saved), (saved, here)))
    if strict and missing is not None:
        raise ValueError(f"{path}: not the weights of this model: {missing} is not in it")
    if strict and left is not None:
        raise ValueError(f"{path}: not the weights of this model, which has no {left}")
