"""Checkpoints on disk: whole or not there, confirmed by their manifests, plain values only."""

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

from descant.modules.io import manifest, renamed
from descant.modules.io.plain import load_plain, require_sums


class AtomicIO(CheckpointIO):
    """Writes checkpoints through :mod:`descant.modules.io.manifest`, and reads what their manifests confirm.

    A file without a manifest is of another program, or of an earlier version: it is read with a warning, and
    ``--resume`` takes none. Whatever is asked for, nothing but plain values is unpickled.

    Not Lightning's AsyncCheckpointIO: that has no manifest, its queue of states grows without a bound, it removes the
    old file while the new one is still to be written, and its copies break ties, lose the metadata of state dicts and
    leave lists and dicts to be changed by training.

    Args:
        asynchronous: copy the state to CPU memory (as much as the file is large), and write it in a thread while
            training goes on. One save is in flight at most: the next one waits, and raises what stopped the last.

    Attributes:
        inside: the folder below which checkpoints are written and removed; anywhere where None.

    Raises:
        OSError: if a file cannot be written: when it is, or asynchronously at the next call or at the end.
        ValueError: if a file is not what its manifest tells of, or would lie outside ``inside``.
    """

    inside: Path | None = None

    def __init__(self, asynchronous: bool = False) -> None:
        self.asynchronous = asynchronous
        self._thread: ThreadPoolExecutor | None = None
        self._last: Future[None] | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Path | str, storage_options: object = None) -> None:
        if storage_options is not None or "://" in str(path):
            raise ValueError(f"{path}: checkpoints go to a folder of this machine, without storage options")
        self._require_inside(path)
        self.wait()
        mine = checkpoint.get("descant")
        safe = isinstance(mine, Mapping) and mine.get("safe") is True
        facts: dict[str, Any] = {"step": checkpoint.get("global_step"), "epoch": checkpoint.get("epoch"), "safe": safe}
        if isinstance(mine, Mapping) and "log_step" in mine:
            facts["log_step"] = mine["log_step"]
        Path(path).parent.mkdir(parents=True, exist_ok=True)  # now: the next thing may be a link beside it
        state = snapshot(checkpoint) if self.asynchronous else checkpoint
        self._do(lambda: manifest.write(Path(path), lambda stream: torch.save(state, stream), facts))

    def load_checkpoint(
        self, path: Path | str, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        self.wait()
        found = manifest.confirmed(Path(path))
        if found == manifest.NONE:
            rank_zero_warn(f"{path}: no manifest confirms what it holds")
            require_sums(Path(path))
            return renamed.checkpoint(_checkpoint(path, load_plain(path, map_location=map_location)))
        if isinstance(found, str):
            raise ValueError(f"{path}: {found}")
        with found[0] as stream:
            content: dict[str, Any] = load_plain(stream, path, map_location=map_location)
            return renamed.checkpoint(content)

    def remove_checkpoint(self, path: Path | str) -> None:
        self._require_inside(path)
        sharded = Path(path).is_dir() and not Path(path).is_symlink()
        self._do(lambda: shutil.rmtree(path) if sharded else manifest.remove(Path(path)))

    def _require_inside(self, path: Path | str) -> None:
        """Whatever made the path: a format, a link, a metric's name."""
        if self.inside is not None and not Path(path).resolve().is_relative_to(self.inside.resolve()):
            raise ValueError(
                f"{path}: a checkpoint outside the run's folder, {self.inside}: --trust writes lets a configuration "
                "write there"
            )

    def valid(self, path: Path) -> bool:
        """Whether its manifest confirms it, now that all that was asked for is written."""
        self.wait()
        return manifest.fault(path) is None

    def wait(self) -> None:
        """Until everything is on disk.

        Raises:
            OSError: what kept it from there.
        """
        if self._last is not None:
            error = self._last.exception()  # interrupted while it waits, by a second INT, it forgets nothing
            self._last = None
            if error is not None:
                raise error

    def teardown(self) -> None:
        try:
            self.wait()
        finally:
            atexit.unregister(self.teardown)
            if self._thread is not None:
                self._thread.shutdown()
                self._thread = None

    def _do(self, job: Callable[[], None]) -> None:
        """Now, or in the thread and after all that was asked for before: a file goes when its successor is there."""
        if not self.asynchronous:
            return job()
        before = self._last

        def follow() -> None:
            if before is not None:
                before.result()  # done; raises if it failed, and then what should follow must not
            job()

        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "checkpoints")
            atexit.register(self.teardown)  # ModelParallelStrategy never calls it: an error is told, if late
        self._last = self._thread.submit(follow)
        return None


def _checkpoint(path: Path | str, content: Any) -> dict[str, Any]:
    """What was read of another program, if it is a checkpoint; one that says no version is taken as it is."""
    if not isinstance(content, dict) or not isinstance(content.get("state_dict"), Mapping):
        raise ValueError(f"{path}: not a checkpoint: it holds no state_dict")
    content.setdefault("pytorch-lightning_version", lightning.__version__)  # Lightning would migrate it by that
    return content


def snapshot(state: dict[str, Any]) -> dict[str, Any]:
    """A copy in CPU memory that nothing changes. Tensors of one memory, such as tied weights, stay one.

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
    """Plain tensors at any depth; other kinds (quantized, sparse) know themselves how to be copied."""
    if isinstance(value, Tensor):
        if type(value) in (Tensor, nn.Parameter) and value.layout == torch.strided:
            yield value
    elif isinstance(value, Mapping | list | tuple | set):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(inner)
