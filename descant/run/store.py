"""Checkpoint I/O: atomic, optionally asynchronous writes, verified by manifests, plain values only."""

from __future__ import annotations

import atexit
import copy
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from descant.modules.io import manifest
from descant.modules.io.part_files import remove_parts
from descant.modules.io.plain import load_plain, require_sums
from descant.run.mirror import Mirror


class AtomicIO(CheckpointIO):
    """Checkpoint I/O: atomic writes with a manifest (:mod:`descant.modules.io.manifest`), and verified reads.

    A file without a manifest, from another program or an earlier version, is read with a warning, but ``--resume`` does
    not accept it. Only plain values are ever unpickled.

    Lightning's AsyncCheckpointIO has no manifest and an unbounded queue of states, and removes the old file before the
    new one is written. Its copies break ties, lose the metadata of state dicts, and share lists and dicts with
    training.

    Args:
        asynchronous: copy the state to CPU memory (as much as the file's size) and write it in a thread while training
            continues. The next save waits for the last one and raises its error.

    Attributes:
        inside: the folder below which checkpoints are written and removed; None means anywhere.
        mirror: a second place, which has a copy of the newest resume point (``--checkpoint_mirror``).

    Raises:
        OSError: if a file cannot be written; asynchronously, at the next call or at the end.
        ValueError: if a file differs from its manifest, or would be outside ``inside``.
    """

    inside: Path | None = None
    mirror: Mirror | None = None

    def __init__(self, asynchronous: bool = False) -> None:
        self.asynchronous = asynchronous
        self._thread: ThreadPoolExecutor | None = None
        self._last: Future[None] | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Path | str, storage_options: object = None) -> None:
        self._require_place(path, storage_options)
        self.wait()
        Path(path).parent.mkdir(parents=True, exist_ok=True)  # now: a link beside it may be made next
        state, facts = snapshot(checkpoint) if self.asynchronous else checkpoint, facts_of(checkpoint)

        def write() -> None:
            manifest.write(Path(path), lambda stream: torch.save(state, stream), facts)
            remove_parts(Path(path))  # of a replaced checkpoint of several parts
            self._copy(Path(path))

        self._do(write)

    def _copy(self, path: Path) -> None:
        """Copy a resume point that is on disk to the second place, if there is one."""
        if self.mirror is not None and manifest.last_facts(path).get("safe") is True:
            self.mirror.copy(path)

    def load_checkpoint(
        self, path: Path | str, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        self.wait()
        confirmed = manifest.open_verified(Path(path))
        if confirmed == manifest.NONE:
            rank_zero_warn(f"{path}: no manifest confirms its content")
            require_sums(Path(path))
            return _checkpoint(path, load_plain(path, map_location=map_location))
        if isinstance(confirmed, str):
            raise ValueError(f"{path}: {confirmed}")
        with confirmed[0] as stream:
            content: dict[str, Any] = load_plain(stream, path, map_location=map_location)
            return content

    def remove_checkpoint(self, path: Path | str) -> None:
        self._require_inside(path)
        sharded = Path(path).is_dir() and not Path(path).is_symlink()
        self._do(lambda: shutil.rmtree(path) if sharded else manifest.remove(Path(path)))

    def _require_place(self, path: Path | str, storage_options: object) -> None:
        if storage_options is not None or "://" in str(path):
            raise ValueError(f"{path}: checkpoints go to a folder of this machine, without storage options")
        self._require_inside(path)

    def _require_inside(self, path: Path | str) -> None:
        """Raise ValueError for a path outside ``inside``, whether it came from a format, a link or a metric's name."""
        if self.inside is not None and not Path(path).resolve().is_relative_to(self.inside.resolve()):
            raise ValueError(
                f"{path}: a checkpoint outside the run's folder, {self.inside}: --trust writes lets a configuration "
                "write there"
            )

    def valid(self, path: Path) -> bool:
        """Whether a file matches its manifest, after all pending writes."""
        self.wait()
        return manifest.fault(path) is None

    def wait(self) -> None:
        """Wait until everything is on disk; raise the error of the last write."""
        if self._last is not None:
            error = self._last.exception()  # kept if a second INT interrupts the wait
            self._last = None
            if error is not None:
                raise error

    def teardown(self) -> None:
        try:
            self.wait()
        finally:
            atexit.unregister(self.teardown)
            if self.mirror is not None:
                self.mirror.wait()
            if self._thread is not None:
                self._thread.shutdown()
                self._thread = None

    def _do(self, job: Callable[[], None]) -> None:
        """Run a job now, or in the thread after all earlier ones: a file is removed once its successor is written."""
        if not self.asynchronous:
            return job()
        before = self._last

        def follow() -> None:
            if before is not None:
                before.result()  # raises if it failed, and then this job must not run
            job()

        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "checkpoints")
            atexit.register(self.teardown)  # ModelParallelStrategy never calls teardown
        self._last = self._thread.submit(follow)
        return None


def facts_of(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a manifest lists besides digest and size: step and epoch, and whether it is a resume point.

    >>> facts_of({"global_step": 4, "epoch": 0, "descant": {"safe": True, "log_step": 3}})
    {'step': 4, 'epoch': 0, 'safe': True, 'log_step': 3}
    """
    entry = checkpoint.get("descant")
    entry = entry if isinstance(entry, Mapping) else {}
    facts: dict[str, Any] = {"step": checkpoint.get("global_step"), "epoch": checkpoint.get("epoch")}
    facts["safe"] = entry.get("safe") is True
    return facts | ({"log_step": entry["log_step"]} if "log_step" in entry else {})


def _checkpoint(path: Path | str, content: Any) -> dict[str, Any]:
    """Return the content of another program's checkpoint, with a version if it has none."""
    if not isinstance(content, dict) or not isinstance(content.get("state_dict"), Mapping):
        raise ValueError(f"{path}: not a checkpoint: it holds no state_dict")
    content.setdefault("pytorch-lightning_version", lightning.__version__)  # by which Lightning would migrate it
    return content


def snapshot(state: dict[str, Any]) -> dict[str, Any]:
    """Return a deep copy in CPU memory. Tensors that share memory, such as tied weights, still do.

    >>> weight = torch.ones(2)
    >>> copied = snapshot({"a": weight, "b": weight.view(2), "steps": [1]})
    >>> _ = weight.zero_()
    >>> copied["a"].tolist(), copied["a"] is copied["b"], copied["steps"]
    ([1.0, 1.0], True, [1])
    """
    copies: dict[object, Tensor] = {}
    memo: dict[int, Any] = {}
    for tensor in _tensors(state):
        place = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if place not in copies:
            copies[place] = tensor.detach().to("cpu", copy=True)
        memo[id(tensor)] = copies[place]
    return copy.deepcopy(state, memo)


def _tensors(value: object) -> Iterator[Tensor]:
    """Yield plain tensors at any depth; others (quantized, sparse) have their own deep copy."""
    if isinstance(value, Tensor):
        if type(value) in (Tensor, nn.Parameter) and value.layout == torch.strided:
            yield value
    elif isinstance(value, Mapping | list | tuple | set):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(inner)
