"""What a run or an export left on disk, read back: its configuration, its weights, and the objects that it names.

A configuration is data: it may name classes of allowed packages only, whoever reads it, and weights are read as plain
tensors. ``SavedTower`` and ``descant.load`` stand on this file.
"""

from __future__ import annotations

import hashlib
import json
import os
import pkgutil
import sys
import threading
from collections import abc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import UnionType
from typing import Any, NamedTuple, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import torch
import yaml
from torch import Tensor, nn

from descant.modules.core import errors
from descant.modules.io import manifest, renamed
from descant.modules.io.checkpoints import LATEST, NAMED, PLACES, followed, judged, nearest, of_run
from descant.modules.io.lean import BASE
from descant.modules.io.plain import load_plain, require_sums

WEIGHTS, CONFIG = "model.safetensors", "config.yaml"
#: Values that a file may hold, as in descant.cli.document.
MOST = 100_000
#: What begins a text of an export's files to mean the folder of the export, wherever it lies.
PLACE = "EXPORT"

T = TypeVar("T")
Node = dict[str, Any]


class Verified:
    """What the manifest beside a file of weights says of it, compared in a thread while a model is built.

    Args:
        file: a checkpoint, or an export's safetensors file.
    """

    def __init__(self, file: Path) -> None:
        self.file, self._pid = file, os.getpid()
        self._account: manifest.Facts | str | None = None
        self._told = False
        self._thread = threading.Thread(target=self._compare, daemon=True)
        self._thread.start()

    def _compare(self) -> None:
        self._account = manifest.account(self.file)

    def account(self) -> manifest.Facts:
        """``sha256``, ``size`` and ``facts``; empty where there is no manifest, which is told once.

        Raises:
            ValueError: if a byte differs from what was written; without a manifest, if the file's own checksums do.
        """
        if self._pid == os.getpid():
            self._thread.join()
        if self._account is None:  # forked meanwhile, or the thread had no chance
            self._compare()
        if isinstance(self._account, dict):
            return self._account
        if self._account != manifest.NONE:
            raise ValueError(f"{self.file}: {self._account}{nearest(self.file)}")
        if not self._told:
            if self.file.is_file():
                require_sums(self.file)
                say(f"{self.file}: no manifest confirms what it holds")
            self._told = True
        return {}


class Saved(NamedTuple):
    """A model on disk.

    Attributes:
        folder: of the run or export. weights: a checkpoint of the run, or the export's safetensors file.
        config: the content of config.yaml; its ``model`` has ``class_path`` and ``init_args``.
        verified: what is known of the file of weights.
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
        return cast(Node, self.config["model"])


def find(path: Path | str, checkpoint: str = "best") -> Saved:
    """The model that ``path`` means: a run folder, a checkpoint in one, or an export.

    Args:
        path: or the folder of all runs of a name, which means the latest, as ``NAME/latest`` does.
        checkpoint: of a run folder: best (what its ModelCheckpoint monitored; else last), last, or a file in it.

    The bytes are compared with the manifest beside them until :func:`read_checkpoint` needs them.

    Raises:
        ValueError: if there is none, or nothing says what the weights are of, or a file that says it is damaged.
    """
    path = Path(path).expanduser()
    path = followed(path)
    if path.is_dir() and not (path / CONFIG).is_file() and (followed(path / LATEST) / CONFIG).is_file():
        path = followed(path / LATEST).resolve()
    if path.is_file():
        folder, weights = (path.parent.parent if path.parent.name in (*PLACES, *NAMED) else path.parent), path
    elif path.is_dir():
        folder, weights = path, path / WEIGHTS
    else:
        raise ValueError(f"{path}: no such run, checkpoint or export{_neighbour(path)}")
    if not (folder / CONFIG).is_file():
        what = "weights alone do not say what they are of: give a run folder, a checkpoint in one, or an export"
        raise ValueError(f"{path}: no {CONFIG} in {folder}; {what}")
    _require_same_files(folder)
    config = read_yaml(folder / CONFIG, folder)
    if not isinstance(config.get("model"), dict) or "class_path" not in config["model"]:
        raise ValueError(f"{folder / CONFIG}: no model.class_path in it")
    weights = weights if weights.is_file() else _checkpoint(folder, checkpoint)
    return Saved(folder, weights, config, Verified(weights))


def read_yaml(file: Path, folder: Path) -> Node:
    """A mapping from a YAML file; texts that begin with ``EXPORT`` mean ``folder``.

    Raises:
        ValueError: if the file is no mapping.
    """
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
        _require_few(content, file)
    except RecursionError:
        raise ValueError(f"{file}: nested too deeply") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: not readable as YAML ({errors.one_line(error, 200)})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file}: not a mapping of keys")
    return cast(Node, _placed(renamed.config(content, str(file)), str(folder)))


def _require_few(content: Any, file: Path) -> None:
    """Raises ValueError for more values than anybody writes: aliases of aliases are millions in a few lines."""
    left, todo = MOST, [content]
    while todo:
        value = todo.pop()
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        left -= 1 + len(inner)
        if left < 0:
            raise ValueError(f"{file}: more than {MOST:,} values, aliases included")
        todo += [item for item in inner if isinstance(item, dict | list)]


def read_weights(saved: Saved) -> dict[str, Tensor]:
    """The weights that were judged: the average, where a callback kept one. Without code: plain tensors only.

    Raises:
        ValueError: if the file is missing, cut short or holds anything else.
    """
    return cast(dict[str, Tensor], read_checkpoint(saved)["state_dict"])


def part_of(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries under ``prefix``, without it; digests of base weights that were left out come along."""
    found = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    if BASE in state:
        base = json.loads(bytes(state[BASE].tolist()))
        note = json.dumps({k.removeprefix(prefix): v for k, v in base.items() if k.startswith(prefix)}).encode()
        found[BASE] = torch.frombuffer(bytearray(note), dtype=torch.uint8)
    return found


def read_checkpoint(saved: Saved) -> dict[str, Any]:
    """A whole checkpoint, tensors mapped and not read yet; of an export, its weights as ``state_dict``.

    Raises:
        ValueError: if the file is missing, damaged, or holds anything but plain values.
    """
    file = saved.weights
    if file.is_dir():
        raise ValueError(f"{file}: cannot be read (a folder of shards: not one file)")
    account(saved)
    try:
        if saved.exported:
            from safetensors.torch import load_file

            return {"state_dict": load_file(file)}
        content = load_plain(file, map_location="cpu", mmap=True)
    except Exception as error:  # each format has its own errors
        raise ValueError(f"{file}: cannot be read ({errors.one_line(error, 200)})") from None
    if not isinstance(content, dict) or not isinstance(content.get("state_dict"), Mapping):
        raise ValueError(f"{file}: not a checkpoint: it holds no state_dict")
    return content


def account(saved: Saved) -> manifest.Facts:
    """``sha256``, ``size`` and ``facts`` of the file of weights; empty where no manifest confirms it.

    Raises:
        ValueError: if a byte of it is not as it was written.
    """
    return (saved.verified or Verified(saved.weights)).account()


def load_exactly(module: nn.Module, state: Mapping[str, Tensor], place: Path) -> None:
    """``load_state_dict`` that takes all keys or none, and says in one line where the first difference is.

    Raises:
        ValueError: naming the first key that is missing, left over or of another shape.
    """
    own = module.state_dict()
    # a sharded run keeps its scalars as [1]
    state = {k: v.reshape(own[k].shape) if k in own and _one(v) and _one(own[k]) else v for k, v in state.items()}
    differing = [_differing(key, own, state) for key in (*own, *state)]
    faults = list(dict.fromkeys(fault for fault in differing if fault))
    if faults:
        more = f" (and {len(faults) - 1} more differ)" if len(faults) > 1 else ""
        raise ValueError(f"{place}: not the weights of this {type(module).__name__}: {faults[0]}{more}")
    module.load_state_dict(state)


def _differing(key: str, own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> str | None:
    if key not in state:
        return f"{key} {list(own[key].shape)} is not in the file"
    if key not in own:
        return f"{key} {list(state[key].shape)} is in the file, and the model has no such key"
    # bitsandbytes writes numbers out as text, of any length
    if own[key].shape != state[key].shape and ".quant_state." not in key:
        return f"{key} is {list(state[key].shape)} in the file and {list(own[key].shape)} in the model"
    return None


# objects ------------------------------------------------------------------------------------------------------------


def build(kind: type[T] | tuple[type[T], ...], node: Node, place: Path) -> T:
    """The object that ``{class_path: ..., init_args: ...}`` describes, of a subclass of ``kind`` or of one of them.

    Raises:
        ValueError: if a class is not allowed (see :func:`policy`), unknown or of another kind, or an argument is wrong.
    """
    from jsonargparse import ArgumentError, ArgumentParser

    for name in class_paths(node):
        _policies[-1](name)
        if _is_function(name):  # it would be called, and does what it does
            raise ValueError(f"{place}: class_path {name}: it is no class")
    _require_uncalled(node, place)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(kind, "part", required=True)
    try:
        config = parser.parse_object({"part": node})
    except (ArgumentError, TypeError, KeyError) as error:
        raise ValueError(f"{place}: {_cause(error)}") from None
    try:
        return cast(T, parser.instantiate_classes(config)["part"])
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:  # the parser wraps what a constructor raises in its account of a union
            cause = cause.__cause__
        raise cause from None


def _is_function(name: str) -> bool:
    try:
        return not isinstance(pkgutil.resolve_name(name), type)
    except (ImportError, AttributeError, ValueError):  # there is no such thing, which the parser tells
        return False


def _require_uncalled(node: object, place: Path) -> None:
    """Raises ValueError where an argument that is called is a function or an object that the file has chosen."""
    if isinstance(node, list):
        for item in node:
            _require_uncalled(item, place)
    if not isinstance(node, Mapping):
        return
    for value in node.values():
        _require_uncalled(value, place)
    arguments = node.get("init_args")
    cls = _resolved(node.get("class_path"))
    if "class_path" in node and node.get("dict_kwargs"):
        raise ValueError(f"{place}: {node['class_path']}: dict_kwargs: nobody knows what they are; init_args has types")
    if not isinstance(cls, type) or not isinstance(arguments, Mapping):
        return
    hints = _hints(cls)
    for key, value in arguments.items():
        for made in _factories(hints.get(str(key))):
            for name in _named(value):
                found = _resolved(name)
                if not (made and isinstance(found, type) and issubclass(found, made)):
                    raise ValueError(f"{place}: {cls.__name__}.{key}: {name} would be called")


def _resolved(name: object) -> Any:
    try:
        return pkgutil.resolve_name(name) if isinstance(name, str) and "." in name else None
    except (ImportError, AttributeError, ValueError):
        return None


def _hints(cls: type) -> dict[str, Any]:
    """The types of a class's arguments, of those too that it hands on to its bases."""
    found: dict[str, Any] = {}
    for base in cls.__mro__:
        function = base.__dict__.get("__init__")
        try:
            hints = get_type_hints(function) if function is not None else {}
        except Exception:  # of a module that imports what it names for type checkers only
            hints = getattr(function, "__annotations__", {})
        found = hints | found
    return found


def _factories(hint: Any) -> Iterator[tuple[type, ...]]:
    """For each callable in a type the classes that it makes; none where it is called for anything else."""
    if isinstance(hint, str):
        yield from [()] * ("Callable" in hint)
    elif hint is abc.Callable or hint is Callable:
        yield ()
    elif get_origin(hint) is abc.Callable:
        last = get_args(hint)[-1]
        made = get_args(last) if get_origin(last) in (Union, UnionType) else (last,)
        plain = any(not isinstance(cls, type) or cls.__module__ == "builtins" or cls is Tensor for cls in made)
        yield () if plain else made
    else:
        for part in get_args(hint):
            yield from _factories(part)


def _named(value: object) -> Iterator[str]:
    """Texts that may name an object, and classes, at any depth of lists."""
    if isinstance(value, Mapping) and "class_path" in value:
        yield str(value["class_path"])
    elif isinstance(value, str) and "." in value:
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _named(item)


def class_paths(node: object) -> Iterator[str]:
    """Every class that a configuration names, at any depth.

    >>> list(class_paths({"class_path": "a.B", "init_args": {"parts": [{"class_path": "c.D"}]}}))
    ['a.B', 'c.D']
    """
    if isinstance(node, Mapping):
        if isinstance(node.get("class_path"), str):
            yield node["class_path"]
        for value in node.values():
            yield from class_paths(value)
    elif isinstance(node, list):
        for value in node:
            yield from class_paths(value)


@contextmanager
def policy(require: Callable[[str], None]) -> Iterator[None]:
    """For a while, ``require(class_path)`` decides by raising which classes saved configurations may name.

    Without it only Descant's own and those of torch.nn and torch.optim are.
    """
    _policies.append(require)
    try:
        yield
    finally:
        _policies.remove(require)


def _ours(name: str) -> None:
    if not name.startswith(_OURS):
        raise ValueError(f"class_path {name} is outside what a saved configuration may name; descant.load has trust=")


_OURS = ("descant.modules.", "descant.recipes.", "descant.datamodules.", "torch.nn.", "torch.optim.")
_policies: list[Callable[[str], None]] = [_ours]


# files --------------------------------------------------------------------------------------------------------------


def _checkpoint(folder: Path, which: str) -> Path:
    found = of_run(folder)
    if which not in ("best", "last"):
        places = [folder / place / which for place in (*PLACES, *NAMED)]
        named = next((f for f in (*places, folder / which, Path(which)) if f.is_file()), None)
        if named is None:
            raise ValueError(f"{which}: no such checkpoint of {folder}; best, last or {_some(found)}")
        return named
    if not found:
        raise ValueError(f"{folder}: neither {WEIGHTS} nor a checkpoint in it")
    ours = [file for file in found if manifest.fault_of_size(file) != manifest.NONE]
    newest = (ours or found)[0]  # what no manifest tells of was not written here: taken where there is nothing else
    for other in found[: found.index(newest)]:
        say(f"{other}: no manifest confirms what it holds: passed over for {newest.name}")
    if which == "last":
        return newest
    for name, monitors in judged(_books(newest)):
        best = folder / "checkpoints" / name
        if monitors and best.exists():
            return best
        if monitors:
            say(f"{best}: the best, and it is not there: {newest.name} is read")
    return newest


def _books(file: Path) -> dict[str, Any]:
    """What a checkpoint holds beside its tensors, which are neither read nor compared."""
    why = manifest.fault_of_size(file)
    if why not in (None, manifest.NONE):
        raise ValueError(f"{file}: {why}{nearest(file)}")
    try:
        require_sums(file, only="/data.pkl")
        content = load_plain(file, map_location="cpu", mmap=True)
    except ValueError as error:
        raise ValueError(f"{error}{nearest(file)}") from None
    return content if isinstance(content, dict) else {}


#: In the facts of an export's manifest: SHA-256 of what its model is built from, file by file.
FILES = "files"
#: In versions.json of a run: SHA-256 of its config.yaml.
CONFIG_SUM = "config_sha256"


def _require_same_files(folder: Path) -> None:
    """Raises ValueError for a file of an export that is not as it was written; of a run's configuration it is told."""
    files = manifest.known(folder / WEIGHTS).get(FILES)
    for name, digest in files.items() if isinstance(files, dict) else ():
        file = folder / name
        if not file.resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"{folder / WEIGHTS}: its manifest names {name}, which is no file of the export")
        if not file.is_file():
            raise ValueError(f"{file}: missing; it was part of the export")
        if file_sum(file) != digest:
            raise ValueError(f"{file}: not the bytes that were exported; export the run again")
    if (told := changed(folder)) is not None:
        say(told)


def changed(folder: Path) -> str | None:
    """A line if the configuration in a run's folder is not the one that was written there."""
    if not (folder / "versions.json").is_file():
        return None
    try:
        versions = json.loads((folder / "versions.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return f"{folder / 'versions.json'}: cannot be read, so nothing confirms {CONFIG}"
    digest = versions.get(CONFIG_SUM) if isinstance(versions, dict) else None
    if digest is None or not (folder / CONFIG).is_file() or file_sum(folder / CONFIG) == digest:
        return None
    return f"{folder / CONFIG}: not as the run wrote it"


def file_sum(file: Path) -> str:
    """SHA-256 of a file's bytes."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def say(line: str) -> None:
    """One warning to the user, beside the output of the program."""
    print(f"descant: warning: {line}", file=sys.stderr, flush=True)


def _some(files: list[Path]) -> str:
    return ", ".join(sorted(file.name for file in files)[:6]) or "nothing: it has none"


def _neighbour(path: Path) -> str:
    """The nearest name where the path goes wrong."""
    while not path.parent.is_dir() and path != path.parent:
        path = path.parent
    near = errors.nearest(path.name, [p.name for p in path.parent.iterdir()])
    return f"; nearest: {path.parent / near}" if near else ""


def _placed(value: Any, folder: str) -> Any:
    if isinstance(value, str):
        return folder + value[len(PLACE) :] if value == PLACE or value.startswith(f"{PLACE}/") else value
    if isinstance(value, list):
        return [_placed(item, folder) for item in value]
    if isinstance(value, dict):
        return {key: _placed(item, folder) for key, item in value.items()}
    return value


def _one(tensor: Tensor) -> bool:
    return tensor.ndim <= 1 and tensor.numel() == 1


def _cause(error: BaseException) -> str:
    """The class, the key and the fault out of a parser's long account of a union of attempts."""
    names: list[str] = []
    for line in (line.strip(" -") for line in str(error).splitlines()):
        if line.startswith(("Problem with given class_path", "Parser key")):
            name = line.split()[-1].strip("':\"")
            names = [name] if line.startswith("Problem") else [*names, name]
        elif line and not line.startswith(_ACCOUNT):
            return ": ".join([name for name in names if name != "part"] + [line])[:300]
    return errors.one_line(error, 200)


#: How lines of that account begin that say nothing of the fault.
_ACCOUNT = ("Does not validate", "Subtypes:", "Errors:", "Given value", "Expected a <class 'NoneType'>")
