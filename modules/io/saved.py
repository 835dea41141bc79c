"""Read a run or an export back from disk: configuration, weights, and which checkpoint is the best.

A configuration is data: it may name classes of allowed packages only (:mod:`descant.modules.io.build`), and weights
are read as plain tensors.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from descant.modules.core import errors
from descant.modules.core.dtensor import split_like
from descant.modules.core.errors import one_line, warn
from descant.modules.io import manifest, plain_yaml
from descant.modules.io.build import Node as Node
from descant.modules.io.build import build as build
from descant.modules.io.build import class_paths as class_paths
from descant.modules.io.build import policy as policy
from descant.modules.io.checkpoints import LATEST, NAMED, PLACES, best_checkpoints, follow_latest, nearest, of_run
from descant.modules.io.files import real_path, sha256_of
from descant.modules.io.lean import BASE
from descant.modules.io.plain import load_values, load_weights, require_sums

WEIGHTS, CONFIG = "model.safetensors", "config.yaml"
#: Placeholder for the export's own folder, at the start of a text in its files.
PLACE = "EXPORT"


class Verified:
    """Check of a file of weights against its manifest, in a thread while the model is built.

    Args:
        file: a checkpoint, or an export's safetensors file.
    """

    def __init__(self, file: Path) -> None:
        self.file, self._pid = file, os.getpid()
        self._account: manifest.Facts | str | None = None
        self._warned = False
        self._thread = threading.Thread(target=self._compare, daemon=True)
        self._thread.start()

    def _compare(self) -> None:
        self._account = manifest.account(self.file)

    def account(self) -> manifest.Facts:
        """Return ``sha256``, ``size`` and ``facts``; empty, with one warning, if there is no manifest."""
        if self._pid == os.getpid():
            self._thread.join()
        if self._account is None:  # in a forked process, or the thread failed
            self._compare()
        if isinstance(self._account, dict):
            return self._account
        if self._account != manifest.NONE:
            raise ValueError(f"{self.file}: {self._account}{nearest(self.file)}")
        if not self._warned:
            if self.file.is_file():
                require_sums(self.file)
                warn(f"{self.file}: no manifest confirms its content")
            self._warned = True
        return {}


#: Training-only wrappers of recipes -> the argument that holds the inner recipe; runs are read as the inner one's.
INSIDE = {"Staged": "recipe", "CompetitiveDistillation": "student"}


class Saved(NamedTuple):
    """A model on disk.

    Attributes:
        folder: of the run or export. weights: a checkpoint of the run, or the export's safetensors file.
        config: the content of config.yaml; its ``model`` has ``class_path`` and ``init_args``.
        verified: the running check of the file of weights.
    """

    folder: Path
    weights: Path
    config: Node
    verified: Verified | None = None

    @property
    def exported(self) -> bool:
        return self.weights.suffix == ".safetensors"

    @property
    def model(self) -> Node:
        """Return class and arguments of the recipe; for a training-only wrapper (Staged ...), of the inner recipe."""
        model = cast(Node, self.config["model"])
        return cast(Node, (model.get("init_args") or {}).get(self.inside, model)) if self.inside else model

    @property
    def inside(self) -> str | None:
        """Return the argument of a training-only wrapper that holds the inner recipe; None for other recipes."""
        return INSIDE.get(str(self.config["model"].get("class_path")).rpartition(".")[2])


def find(path: Path | str, checkpoint: str = "best") -> Saved:
    """Find the model at ``path``: a run folder, a checkpoint in one, or an export.

    Args:
        path: may also be the folder of all runs of a name, or ``NAME/latest``: then the latest run.
        checkpoint: in a run folder: best (by its ModelCheckpoint's monitor; otherwise last), last, or a file in it.

    A thread checks the weights against their manifest until :func:`read_checkpoint` needs them.
    """
    path = Path(path).expanduser()
    path = follow_latest(path)
    if path.is_dir() and not (path / CONFIG).is_file() and (follow_latest(path / LATEST) / CONFIG).is_file():
        path = follow_latest(path / LATEST).resolve()
    if path.is_file():
        folder, weights = (path.parent.parent if path.parent.name in (*PLACES, *NAMED) else path.parent), path
    elif path.is_dir():
        folder, weights = path, path / WEIGHTS
    else:
        raise ValueError(f"{path}: no such run, checkpoint or export{_neighbour(path)}")
    if not (folder / CONFIG).is_file():
        what = "weights without a configuration cannot be loaded: give a run folder, a checkpoint in one, or an export"
        raise ValueError(f"{path}: no {CONFIG} in {folder}; {what}")
    _require_same_files(folder)
    config = read_yaml(folder / CONFIG, folder)
    if not isinstance(config.get("model"), dict) or "class_path" not in config["model"]:
        raise ValueError(f"{folder / CONFIG}: no model.class_path in it")
    weights = weights if weights.is_file() else _checkpoint(folder, checkpoint)
    return Saved(folder, weights, config, Verified(weights))


def read_yaml(file: Path, folder: Path) -> Node:
    """Read a mapping from a YAML file; ``EXPORT`` at the start of a text becomes ``folder``."""
    try:
        content = plain_yaml.loads(file.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not readable as YAML ({one_line(error, 200)})") from None
    except ValueError as error:
        raise ValueError(f"{file}: {one_line(error)}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file}: not a mapping of keys")
    return cast(Node, _resolve_paths(content, str(folder)))


def read_weights(saved: Saved) -> dict[str, Tensor]:
    """Load the weights used for evaluation, the EMA weights if the run kept them, as plain tensors."""
    return weights_of(saved, read_checkpoint(saved))


def weights_of(saved: Saved, checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """Extract the weights from a loaded checkpoint, without the prefix of a training-only wrapper."""
    state = cast(dict[str, Tensor], checkpoint["state_dict"])
    wrapped = saved.inside is not None and any(name.startswith("inner.") for name in state)
    return part_of(state, "inner.") if wrapped else state


def part_of(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the entries under ``prefix``, without it, and the digests of base weights that a lean checkpoint omits."""
    entries = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    if BASE in state:
        base = json.loads(bytes(state[BASE].tolist()))
        note = json.dumps({k.removeprefix(prefix): v for k, v in base.items() if k.startswith(prefix)}).encode()
        entries[BASE] = torch.frombuffer(bytearray(note), dtype=torch.uint8)
    return entries


def read_checkpoint(saved: Saved) -> dict[str, Any]:
    """Open a checkpoint with memory-mapped tensors, or an export's weights as ``state_dict``."""
    file = saved.weights
    if file.is_dir():
        raise ValueError(f"{file}: cannot be read (a folder of shards: not one file)")
    account(saved)
    try:
        if saved.exported:
            from safetensors.torch import load_file

            return {"state_dict": load_file(file)}
        content = load_weights(file)
    except Exception as error:  # each format has its own errors
        raise ValueError(f"{file}: cannot be read ({one_line(error, 200)})") from None
    if not isinstance(content, dict) or not isinstance(content.get("state_dict"), Mapping):
        raise ValueError(f"{file}: not a checkpoint: it holds no state_dict")
    return content


def account(saved: Saved) -> manifest.Facts:
    """Return ``sha256``, ``size`` and ``facts`` of the file of weights; empty if no manifest confirms it."""
    return (saved.verified or Verified(saved.weights)).account()


def load_exactly(module: nn.Module, state: Mapping[str, Tensor], place: Path) -> None:
    """Load all keys of a state dict or none. The error names the first difference in one line."""
    here = module.state_dict()
    # a sharded run saves its scalars with shape [1]
    state = {
        k: v.reshape(here[k].shape) if k in here and _is_scalar(v) and _is_scalar(here[k]) else v
        for k, v in state.items()
    }
    faults = list(dict.fromkeys(fault for key in (*here, *state) if (fault := _differing(key, here, state))))
    if faults:
        more = f" (and {len(faults) - 1} more differ)" if len(faults) > 1 else ""
        raise ValueError(f"{place}: not the weights of this {type(module).__name__}: {faults[0]}{more}")
    module.load_state_dict({key: split_like(value, here[key]) for key, value in state.items()})


def _differing(key: str, here: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> str | None:
    if key not in state:
        return f"{key} {list(here[key].shape)} is not in the file"
    if key not in here:
        return f"{key} {list(state[key].shape)} is in the file, and the model has no such key"
    # bitsandbytes stores numbers as text of any length
    if here[key].shape != state[key].shape and ".quant_state." not in key:
        return f"{key} is {list(state[key].shape)} in the file and {list(here[key].shape)} in the model"
    return None


def _checkpoint(folder: Path, which: str) -> Path:
    files = of_run(folder)
    if which not in ("best", "last"):
        places = [folder / place / which for place in (*PLACES, *NAMED)]
        named = next((f for f in (*places, folder / which, Path(which)) if f.is_file()), None)
        if named is None:
            some = ", ".join(sorted(file.name for file in files)[:6]) or "nothing: it has none"
            raise ValueError(f"{which}: no such checkpoint of {folder}; best, last or {some}")
        return named
    if not files:
        raise ValueError(f"{folder}: neither {WEIGHTS} nor a checkpoint in it")
    confirmed = [file for file in files if manifest.fault_of_size(file) != manifest.NONE]
    newest = (confirmed or files)[0]  # a file without a manifest was not written by Descant: a last resort
    for other in files[: files.index(newest)]:
        warn(f"{other}: no manifest confirms its content: {newest.name} is used in its place")
    if which == "last":
        return newest
    for name, monitors in best_checkpoints(_metadata(newest)):
        best = folder / "checkpoints" / name
        if monitors and best.exists():
            return best
        if monitors:
            warn(f"{best}: the best checkpoint is missing: {newest.name} is used")
    return newest


def _metadata(file: Path) -> dict[str, Any]:
    """Load a checkpoint without reading or checking its tensors."""
    why = manifest.fault_of_size(file)
    if why not in (None, manifest.NONE):
        raise ValueError(f"{file}: {why}{nearest(file)}")
    try:
        require_sums(file, only="/data.pkl")
        content = load_values(file)
    except ValueError as error:
        raise ValueError(f"{error}{nearest(file)}") from None
    return content if isinstance(content, dict) else {}


#: Key in the facts of an export's manifest: file -> SHA-256, of all files that the model is built from.
FILES = "files"
#: Key in a run's versions.json: SHA-256 of its config.yaml.
CONFIG_SUM = "config_sha256"


def _require_same_files(folder: Path) -> None:
    """Raise ValueError for a changed file of an export; warn about a changed configuration of a run."""
    files = manifest.last_facts(folder / WEIGHTS).get(FILES)
    for name, digest in files.items() if isinstance(files, dict) else ():
        file = folder / name
        if not real_path(file).is_relative_to(folder.resolve()):
            raise ValueError(f"{folder / WEIGHTS}: its manifest lists {name}, which is outside the export")
        if not file.is_file():
            raise ValueError(f"{file}: missing; it was part of the export")
        if sha256_of(file) != digest:
            raise ValueError(f"{file}: not the bytes that were exported; export the run again")
    if (line := edit_warning(folder)) is not None:
        warn(line)


def edit_warning(folder: Path) -> str | None:
    """Return a warning line if a run's configuration was edited after the run wrote it; otherwise None."""
    if not (folder / "versions.json").is_file():
        return None
    try:
        versions = json.loads((folder / "versions.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return f"{folder / 'versions.json'}: cannot be read, so {CONFIG} cannot be checked"
    digest = versions.get(CONFIG_SUM) if isinstance(versions, dict) else None
    if digest is None or not (folder / CONFIG).is_file() or sha256_of(folder / CONFIG) == digest:
        return None
    return f"{folder / CONFIG}: edited since the run wrote it"


def _neighbour(path: Path) -> str:
    """Return the existing name nearest to the first missing part of a path, for an error line."""
    while not path.parent.is_dir() and path != path.parent:
        path = path.parent
    near = errors.nearest(path.name, [p.name for p in path.parent.iterdir()])
    return f"; nearest: {path.parent / near}" if near else ""


def _resolve_paths(value: Any, folder: str) -> Any:
    if isinstance(value, str):
        return folder + value[len(PLACE) :] if value == PLACE or value.startswith(f"{PLACE}/") else value
    if isinstance(value, list):
        return [_resolve_paths(item, folder) for item in value]
    if isinstance(value, dict):
        return {key: _resolve_paths(item, folder) for key, item in value.items()}
    return value


def _is_scalar(tensor: Tensor) -> bool:
    return tensor.ndim <= 1 and tensor.numel() == 1
