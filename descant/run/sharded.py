"""FSDP2 strategy of ``on/fsdp``: parameters, gradients and optimizer states sharded over all ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy

from descant.modules.io import renamed


class Sharded(ModelParallelStrategy):
    """ModelParallelStrategy with data parallelism only, over all ranks, and one-file checkpoints.

    Lightning's own needs the number of ranks in the YAML or uses tensor parallelism within a node, and its checkpoints
    are folders that only the same number of ranks can read. ``model.shard`` sets what is sharded.

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

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Raise ValueError for a folder, whose index is a pickle that may run code."""
        if Path(checkpoint_path).is_dir():
            raise ValueError(f"{checkpoint_path}: a folder; a checkpoint is one file")
        return renamed.checkpoint(super().load_checkpoint(checkpoint_path, weights_only=weights_only))

    def teardown(self) -> None:
        super().teardown()
        self.checkpoint_io.teardown()  # Lightning forgets it, and an asynchronous save with it
