"""Hub models as folders, ``hub:OWNER/NAME[@REVISION]``: downloaded only if the user allows it, and recorded.

A revision (a commit) and a digest of its files identify a downloaded model. A run keeps both in ``hub.json``; it is
resumed, evaluated and exported with these files only.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from descant.modules.core.errors import one_line
from descant.modules.io.files import open_regular, sha256_of

PREFIX, RECORD = "hub:", "hub.json"
#: Files to download: configurations, tokenizers, and weights without code. Never Python files or pickles.
PATTERNS = ["*.json", "*.txt", "*.model", "*.safetensors"]
#: The most bytes of a record that are read.
_MOST = 1_000_000
_PART = r"[A-Za-z0-9][\w-]*(?:\.[\w-]+)*"
_NAME = re.compile(rf"hub:({_PART}/{_PART})(?:@({_PART}(?:/{_PART})*))?")


class Snapshot(NamedTuple):
    """Model in ``folder`` on this machine; ``revision``: its commit; ``digest``: SHA-256 of file names and digests."""

    folder: Path
    revision: str
    digest: str


_permitted = [False]
_pins: list[Mapping[str, Any]] = [{}]
_found: dict[str, Snapshot] = {}


@contextmanager
def allowing_downloads(allowed: bool = True) -> Iterator[None]:
    """Allow (or refuse) downloads of hub models within the block; outside they are refused."""
    _permitted.append(allowed)
    try:
        yield
    finally:
        _permitted.pop()


@contextmanager
def pinning_revisions(run: Path) -> Iterator[None]:
    """Require hub models to match the revisions and digests in a run's folder, within the block.

    Models that the folder does not list are unrestricted.
    """
    _pins.append(_read_record(run))
    try:
        yield
    finally:
        _pins.pop()


def _read_record(run: Path) -> dict[str, Any]:
    file = (run if run.is_dir() else run.parent) / RECORD
    try:
        with open_regular(file) as stream:
            content = json.loads(stream.read(_MOST))
        return {str(name): {key: str(one[key]) for key in ("revision", "digest")} for name, one in content.items()}
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"{file}: cannot be read ({one_line(error, 200)})") from None


def record() -> dict[str, dict[str, str]]:
    """Return name -> revision and digest of each hub model that this process has used."""
    return {name: {"revision": one.revision, "digest": one.digest} for name, one in sorted(_found.items())}


def forget() -> None:
    """Forget the models that an earlier run in this process used."""
    _found.clear()


def is_hub_name(folder: Path | str) -> bool:
    """Whether this is the name of a hub model.

    >>> is_hub_name("hub:google/siglip-base"), is_hub_name("models/siglip")
    (True, False)
    """
    return str(folder).startswith(PREFIX)


def resolve_folder(folder: Path | str) -> Path:
    """Resolve a folder, or the folder of a hub model. A model that is not in the hub's cache is downloaded."""
    name = str(folder)
    if not is_hub_name(name):
        return Path(folder)
    if not _permitted[-1]:
        raise ValueError(f"folder {name}: of a hub; --trust hub lets it be downloaded")
    if (match := _NAME.fullmatch(name)) is None:
        raise ValueError(f"folder {name}: no name of a hub's model, which is hub:OWNER/NAME or hub:OWNER/NAME@REVISION")
    pin = _pins[-1].get(name)
    if name not in _found or (pin is not None and _found[name].revision != pin["revision"]):
        _found[name] = _download(match[1], pin["revision"] if pin is not None else match[2], name)
    one = _found[name]
    if pin is not None and one.digest != pin["digest"]:
        raise ValueError(
            f"folder {name}: files of revision {one.revision} have digest {one.digest[:12]}, and the run's {RECORD} "
            f"has {pin['digest'][:12]}"
        )
    return one.folder


def _download(repository: str, revision: str | None, name: str) -> Snapshot:
    from huggingface_hub import constants, snapshot_download

    offline, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, False  # commands set it, against all other downloads
    try:
        folder = Path(snapshot_download(repository, revision=revision, allow_patterns=PATTERNS))
    except Exception as error:  # an error of the hub, the network or the disk
        raise ValueError(f"folder {name}: cannot be downloaded ({one_line(error, 200)})") from None
    finally:
        constants.HF_HUB_OFFLINE = offline
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    lines = [f"{sha256_of(file)} {file.relative_to(folder).as_posix()}\n" for file in files]
    if not any(file.suffix == ".safetensors" for file in files):
        raise ValueError(f"folder {name}: no safetensors in it; other weights are not downloaded")
    # a hub's cache names a snapshot's folder by its commit
    return Snapshot(folder, folder.name, hashlib.sha256("".join(lines).encode()).hexdigest())
