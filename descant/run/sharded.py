"""The strategy of ``on/fsdp``: parameters, gradients and optimizer states split over every rank there is (FSDP2)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy

from descant.modules.io import renamed


class Sharded(ModelParallelStrategy):
    """ModelParallelStrategy whose only dimension is data, over all ranks, and whose checkpoints are one file each.

    Lightning's own asks for the number of ranks in the YAML, or else splits the layers of a node over its devices; and
    its checkpoints are folders that only as many ranks can read. What is split, and how, is ``model.shard``.

    Args:
        process_group_backend: gloo or nccl; by the device where not given.
    """

    def __init__(self, process_group_backend: str | None = None) -> None:
        super().__init__(
            tensor_parallel_size=1, save_distributed_checkpoint=False, process_group_backend=process_group_backend
        )

    def _setup_distributed(self) -> None:
        super()._setup_distributed()
        self._data_parallel_size = dist.get_world_size()  # known here, and read next

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Raises ValueError for a folder: the index of one is a pickle, which may run anything."""
        if Path(checkpoint_path).is_dir():
            raise ValueError(f"{checkpoint_path}: a folder; a checkpoint is one file")
        return renamed.checkpoint(super().load_checkpoint(checkpoint_path, weights_only=weights_only))

    def teardown(self) -> None:
        super().teardown()
        self.checkpoint_io.teardown()  # Lightning's forgets it, and with it a save that is still on its way
