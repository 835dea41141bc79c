"""FSDP2 strategy of ``on/fsdp``: parameters, gradients and optimizer states sharded over all ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy

from descant.modules.io import renamed
from descant.modules.io.plain import load_plain


class Sharded(ModelParallelStrategy):
    """ModelParallelStrategy with data parallelism only, over all ranks, and one-file checkpoints.

    Lightning's own needs the number of ranks in the YAML or uses tensor parallelism within a node, and its checkpoints
    are folders that only the same number of ranks can read. ``model.shard`` sets what is sharded.

    Args:
        process_group_backend: gloo or nccl; by default chosen by the device.
    """

    #: Whether optimizers are those of a checkpoint's stage before their state is read.
    returns_to_stage = True

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

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Raise ValueError for a folder, whose index is a pickle that may run code."""
        if Path(checkpoint_path).is_dir():
            raise ValueError(f"{checkpoint_path}: a folder; a checkpoint is one file")
        self._return_to_stage(checkpoint_path)
        return renamed.checkpoint(super().load_checkpoint(checkpoint_path, weights_only=weights_only))

    def _return_to_stage(self, path: str | Path) -> None:
        """Build the optimizer of the stage that a checkpoint is of, whose state is then read into it."""
        module: Any = self.lightning_module
        if hasattr(module, "return_to_stage"):
            module.return_to_stage(load_plain(path, map_location="cpu", mmap=True))
            if self.optimizers:
                self.setup_optimizers(module.trainer)

    def teardown(self) -> None:
        super().teardown()
        self.checkpoint_io.teardown()  # Lightning forgets it, and an asynchronous save with it
