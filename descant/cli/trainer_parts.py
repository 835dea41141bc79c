"""The ``trainer`` section before the Trainer is built: paths of the run, callbacks, plugins, ports, checkpoints."""

from __future__ import annotations

import enum
import errno
import re
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
from jsonargparse import Namespace
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import FSDPStrategy, Strategy

from descant.callbacks.evaluate.accuracy import Accuracy
from descant.callbacks.evaluate.held_out_loss import HeldOutLoss
from descant.callbacks.logs.progress import Progress
from descant.cli.errors import fail, one_line
from descant.modules.core.capabilities import has
from descant.modules.io import manifest
from descant.modules.io.plain import load_plain
from descant.run.mirror import Mirror
from descant.run.store import AtomicIO

#: Means the folder of the run at the beginning of a text in the section.
PLACE = "RUN"


def once(callbacks: list[L.Callback]) -> list[L.Callback]:
    """Keep only the last callback of each class with the attribute ``once = True``, so that overlays override."""
    last = {type(callback): callback for callback in callbacks}
    return [c for c in callbacks if not getattr(c, "once", False) or last[type(c)] is c]


def with_defaults(given: Any, recipe: object, bar: Any = None) -> list[L.Callback]:
    """Complete the callbacks that the option ``trainer.callbacks`` gives.

    If a class makes sense only once, its last callback stays (:func:`once`). ``bar``, the option
    ``enable_progress_bar``, removes Progress if it is False. A recipe with scores, or with losses of pairs, gets the
    callback that logs them, including ``val/loss``.
    """
    callbacks: list[L.Callback] = once(given if isinstance(given, list) else [given] if given else [])
    if bar is False:
        callbacks = [callback for callback in callbacks if not isinstance(callback, Progress)]
    for kind in (Accuracy, HeldOutLoss):
        can_run = all(has(recipe, protocol) for protocol in kind.needs)
        if can_run and not any(isinstance(callback, kind) for callback in callbacks):
            callbacks.append(kind())
    return callbacks


def with_store(given: Any) -> list[Any]:
    """Return the plugins of a trainer, with AtomicIO to write checkpoints unless another CheckpointIO is given."""
    plugins = given if isinstance(given, list) else [given] * (given is not None)
    return plugins if any(isinstance(plugin, CheckpointIO) for plugin in plugins) else [*plugins, AtomicIO()]


def mirror(plugins: list[Any], url: str | None, run: str) -> None:
    """Give the plugin that writes checkpoints a second place for the newest resume point (``--checkpoint_mirror``).

    Args:
        run: name and number of the run, below which the points are stored there.
    """
    if url is None:
        return
    try:
        place = Mirror(url, run)
    except ValueError as error:
        fail(f"--checkpoint_mirror {error}")
    store = next((plugin for plugin in plugins if isinstance(plugin, AtomicIO)), None)
    if store is None:
        fail("--checkpoint_mirror: checkpoints are written by a plugin that is no AtomicIO")
    store.mirror = place


def substitute_run(value: Any, folder: str) -> Any:
    """Replace ``RUN`` at the beginning of texts by the run's folder, at any depth."""

    def replace(text: Any) -> Any:
        if isinstance(text, str) and (text == PLACE or text.startswith(f"{PLACE}/")):
            return folder + text[len(PLACE) :]
        return text

    return _map_leaves(value, replace)


def without_enums(value: Any) -> Any:
    """Replace members of enumerations by their values, which YAML can hold, at any depth."""
    return _map_leaves(value, lambda leaf: leaf.value if isinstance(leaf, enum.Enum) else leaf)


def _map_leaves(value: Any, leaf: Callable[[Any], Any]) -> Any:
    if isinstance(value, list):
        return [_map_leaves(item, leaf) for item in value]
    if isinstance(value, dict):
        return {key: _map_leaves(item, leaf) for key, item in value.items()}
    if isinstance(value, Namespace):
        return Namespace({key: _map_leaves(item, leaf) for key, item in vars(value).items()})
    return leaf(value)


def purge_after(loggers: Any, point: str | Path | None) -> None:
    """Make TensorBoard hide what it logged after the resume point ``point``, once its writer opens the file."""
    facts = manifest.last_facts(Path(point)) if point is not None else {}
    for logger in loggers if isinstance(loggers, list) else [loggers]:
        if isinstance(logger, TensorBoardLogger):
            logger._kwargs["purge_step"] = facts.get("log_step") or 0


def require_plain(strategy: Strategy, checkpoint: str | None) -> None:
    """Raise ValueError for a checkpoint that runs code, if the strategy itself unpickles it, as FSDPStrategy does.

    Other strategies read it through the plugin, :class:`~descant.run.store.AtomicIO`, with weights_only.
    """
    if checkpoint is not None and isinstance(strategy, FSDPStrategy):
        try:
            load_plain(checkpoint, map_location="cpu", mmap=True)
        except RuntimeError as error:
            raise ValueError(f"{checkpoint}: cannot be read ({one_line(error)[:120]})") from None


def require_port(text: str | None) -> None:
    """Refuse a MASTER_PORT that is invalid or in use, because ranks that start first would wait for it in vain."""
    if text is None:
        return
    if not re.fullmatch(r"[0-9]{1,5}", text) or int(text) > 65535:
        fail(f"MASTER_PORT {text}: not the number of a port (0 to 65535)")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the ranks do, so that both find the same
        try:
            probe.bind(("", int(text)))
        except OSError as error:
            why = "in use on this machine" if error.errno == errno.EADDRINUSE else f"{error.strerror}".lower()
            fail(f"MASTER_PORT {text}: {why}; set another one, or none for a free one")
