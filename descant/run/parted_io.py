"""Checkpoint I/O in which each rank writes its own part in a thread, and rank 0 the index once all parts are there."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from descant.modules.core.errors import one_line, require_value
from descant.modules.io import manifest, parts
from descant.modules.io.files import write_text
from descant.modules.io.parts import PartTable, Piece, name_of, which
from descant.run.store import AtomicIO, facts_of

#: Suffix of the file in which a rank reports why its part is not written.
_FAILED = ".failed"
#: Seconds that rank 0 waits at most once a run ends, since other ranks may have ended; and that a rank waits to see a
#: folder.
_LAST, _SEEN = 30.0, 10.0


class PartedIO(AtomicIO):
    """Checkpoint I/O in which each rank writes its part in a thread: safetensors, and an index in JSON without code.

    A save copies this rank's part of the state into CPU memory while training waits. A thread then writes, syncs and
    hashes the part. Ranks meet in the folder of the parts, not in a collective. Once the manifest of every part is
    there and the parts hold every tensor whole, rank 0 writes the index and, last, its manifest
    (:mod:`descant.modules.io.parts`). If the run is killed at any point, the previous checkpoint is the newest valid
    one.

    With ``Sharded`` (on/fsdp), no rank gathers what others hold; with other strategies, rank 0 writes the only part.
    Any number of ranks can read a checkpoint, and so can every reader of checkpoints in one file.

    torch.distributed.checkpoint writes the same boxes, but its metadata is a pickle, its Hugging Face format holds only
    tensors, and neither is hashed. A thread that plans a save with collectives also needs its own process group.

    Args:
        asynchronous: whether training continues while parts are written. The copies, pinned if they are from a GPU, are
            kept from save to save; they need as much CPU memory as the parts.
        patience: seconds that rank 0 waits while no byte is added to the parts, before it gives the checkpoint up.

    Raises:
        OSError: if a part cannot be written, or is not there in time; asynchronously, at the next call or at the end.
        ValueError: for a state with values other than plain ones and tensors, or ranks that share no folder.
    """

    def __init__(self, asynchronous: bool = True, patience: float = 600.0) -> None:
        super().__init__(asynchronous)
        require_value(patience > 0, f"patience {patience:g}: seconds above 0")
        self.patience, self._ending = patience, False
        self._copies: dict[str, Tensor] = {}

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Path | str, storage_options: object = None) -> None:
        self._require_place(path, storage_options)
        self.save_part(checkpoint, Path(path), self.begin(path))

    def begin(self, path: Path | str) -> str:
        """Wait for the last save, make the folder of a new one's parts, as rank 0 does, and return its name."""
        self._require_place(path, None)
        self.wait()
        return manifest.parts_folder(Path(path)).name

    def save_part(self, checkpoint: Mapping[str, Any], path: Path, folder: str, rank: int = 0, world: int = 1) -> None:
        """Save this rank's part of a checkpoint; rank 0 completes it.

        Args:
            folder: name of the folder of the parts, from rank 0's :meth:`begin`.
        """
        self._require_place(path, None)
        self.wait()
        place = path.with_name(folder)
        _require_seen(place, rank)
        tree, pieces, names = parts.split(checkpoint, first=rank == 0)
        pieces = self._on_cpu(pieces)
        facts = facts_of(checkpoint)

        def write() -> None:
            part = place / name_of(rank)
            try:
                manifest.write(part, lambda stream: parts.write(stream, pieces))
                if rank == 0:
                    self._complete(path, place, tree, names, world, facts)
            except BaseException as error:
                if rank == 0:
                    shutil.rmtree(place, ignore_errors=True)
                else:
                    with contextlib.suppress(OSError):
                        write_text(part.with_suffix(_FAILED), one_line(error, 300))
                raise

        self._do(write)

    def _complete(self, path: Path, place: Path, tree: Any, names: set[str], world: int, facts: dict[str, Any]) -> None:
        """Wait for the parts of all ranks, write the index, and remove the parts of a checkpoint that it replaces."""
        files = [
            {"name": f"{place.name}/{name_of(rank)}", "sha256": entry["sha256"], "size": entry["size"]}
            for rank, entry in enumerate(self._entries(path, place, world))
        ]
        manifest.stage("parts")
        try:
            PartTable(place / name_of(rank) for rank in range(world)).require_whole(names)
        except ValueError as error:
            raise OSError(f"{path}: not written: {error}") from None
        text = parts.index(tree, files)
        manifest.write(path, lambda stream: stream.write(text), {**facts, "parts": files})
        manifest.settle_parts(path, place)
        self._copy(path)

    def _entries(self, path: Path, place: Path, world: int) -> list[manifest.Facts]:
        """Wait for the manifests of all parts, and return them in the order of ranks."""
        entries: dict[int, manifest.Facts] = {}
        size, moved, pause = -1, time.monotonic(), 0.01
        while True:
            for rank in range(world):
                part = place / name_of(rank)
                if rank not in entries and (entry := manifest.read_entry(part)) is not None:
                    entries[rank] = entry
                elif rank not in entries and (failed := part.with_suffix(_FAILED)).exists():
                    raise OSError(f"{path}: not written: rank {rank} of {world}: {failed.read_text()}")
            if len(entries) == world:
                return [entries[rank] for rank in range(world)]
            total = _bytes(place)
            if total != size:
                size, moved = total, time.monotonic()
            if time.monotonic() - moved > (min(self.patience, _LAST) if self._ending else self.patience):
                late = min(set(range(world)) - entries.keys())
                raise OSError(f"{path}: not written: {which(late, world, place / name_of(late))} does not come")
            time.sleep(pause)
            pause = min(0.25, 1.5 * pause)

    def _on_cpu(self, pieces: Mapping[str, Piece]) -> dict[str, Piece]:
        """Return pieces in CPU memory; if asynchronous, as copies in the memory of the previous ones."""
        if not self.asynchronous:
            return {name: piece._replace(tensor=piece.tensor.cpu()) for name, piece in pieces.items()}
        before, self._copies, device = self._copies, {}, False
        for name, (tensor, _, _) in pieces.items():
            copy = before.pop(name, None)
            if copy is None or copy.shape != tensor.shape or copy.dtype != tensor.dtype:
                copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            copy.copy_(tensor, non_blocking=True)
            self._copies[name] = copy
            device = device or not tensor.is_cpu
        if device:
            torch.accelerator.synchronize()  # the CPU reads the copies next
        return {name: piece._replace(tensor=self._copies[name]) for name, piece in pieces.items()}

    def teardown(self) -> None:
        self._ending = True
        try:
            super().teardown()
        finally:
            self._ending = False


def _bytes(place: Path) -> int:
    """Count the bytes in a folder whose files may be renamed meanwhile."""
    total = 0
    for file in place.iterdir():
        with contextlib.suppress(FileNotFoundError):
            total += file.stat().st_size
    return total


def _require_seen(place: Path, rank: int) -> None:
    """Raise ValueError if a rank does not see the folder that rank 0 has made; a network file system may be late."""
    end = time.monotonic() + _SEEN
    while not place.is_dir():
        if time.monotonic() > end:
            raise ValueError(f"{place}: rank {rank} does not see it, and rank 0 made it: ranks share no file system")
        time.sleep(0.05)
