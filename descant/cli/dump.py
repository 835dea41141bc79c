"""Schema cache, which finds most mistakes without importing torch. ``python -m descant.cli.dump`` writes it.

The file in the user's cache is named after a hash of Descant's sources and of the versions of its dependencies.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from descant.cli.errors import hint
from descant.cli.schema import Entry, Key, Part, Unknown, fits, kinds, nested_classes
from descant.modules.io import names
from descant.modules.io.cache import cache_folder
from descant.modules.io.files import write_text
from descant.modules.io.jsonl import loads

COMMANDS = ("fit", "validate", "test", "predict")
#: Packages whose classes are cached; only the parser itself resolves others.
PACKAGES = ("descant.", "lightning.pytorch.", "torch.optim.")
_STANDS_ON = ("torch", "lightning", "jsonargparse", "torchmetrics")
#: Number of schemas that stay in the cache, including those of other installations and states.
KEPT = 8


class Written:
    """Schema read from the cache. ``kinds_`` are the kinds of class that a place expects.

    Args:
        content: from :func:`make`.
        command: one of COMMANDS.
    """

    def __init__(self, content: Mapping[str, Any], command: str) -> None:
        self._content, self._name = content, command

    @cached_property
    def command(self) -> Mapping[str, Key]:
        """Return dotted key -> argument of the command and its trainer."""
        return {name: Key(*key) for name, key in self._content["commands"][self._name].items()}

    def find(self, name: str, kinds_: Sequence[Part]) -> Entry:
        """Find the class that a short or full name means.

        Raises:
            LookupError: if there is none, with the rest of the error line. Ambiguous, Unknown: see there.
        """
        path = name if "." in name else self._short(name, kinds_)
        path = self._content["aliases"].get(path, path)
        if path not in self._content["classes"]:
            module, _, last = path.rpartition(".")
            if last in self._content["modules"].get(module, {last: None}):
                raise Unknown(name)
            raise LookupError(f"there is no {name}{hint(last, self.names(kinds_), 0)}")
        skip = max(part.get("skip", 0) for part in kinds_ if isinstance(part, dict))
        entry = self.entry(path, skip)
        if not any(isinstance(part, dict) and part["class"] in entry.lineage for part in kinds_):
            raise LookupError(f"{name} is not of kind {kinds(kinds_)}{hint(name, self.names(kinds_), 0)}")
        return entry

    def _short(self, name: str, kinds_: Sequence[Part]) -> str:
        known, ours = self.names(kinds_), names.full(name)
        if name in known:
            return known[name]
        if ours is not None:
            return ours
        if any(kind["open"] for kind in self._kinds(kinds_)) or len(names.table().get(name, ())) > 1:
            raise Unknown(name)
        near = hint(name, {**known, **dict.fromkeys(names.table())})
        raise LookupError(f"no class {name} of kind {kinds(kinds_)}{near}")

    def names(self, kinds_: Sequence[Part]) -> Mapping[str, str]:
        """Return short name -> import path of the classes of some kinds."""
        return {path.rpartition(".")[2]: path for path in sorted(self.paths(kinds_))}

    def paths(self, kinds_: Sequence[Part]) -> list[str]:
        return [path for kind in self._kinds(kinds_) for path in kind["paths"]]

    def alone(self, kinds_: Sequence[Part]) -> Entry | None:
        """Return the class that is used if none is named: the only kind, unless it is abstract."""
        if len(kinds_) != 1 or not isinstance(part := kinds_[0], dict):
            return None
        path = self._content["aliases"].get(part["class"], part["class"])
        if path not in self._content["classes"]:
            return None
        entry = self.entry(path, part.get("skip", 0))
        return None if entry.abstract else entry

    def _kinds(self, kinds_: Sequence[Part]) -> Iterator[Mapping[str, Any]]:
        for part in kinds_:
            if isinstance(part, dict):
                yield self._content["kinds"].get(part["class"], {"paths": [], "open": True})

    def accepts(self, owner: Entry | None, name: str, value: Any) -> bool:
        """Whether a value is valid for the argument ``name`` of a class, or of the command."""
        return fits((self.command if owner is None else owner.keys)[name].type, value)

    def is_class(self, name: str) -> bool:
        return True  # not imported, so not known

    def entry(self, path: str, skip: int = 0) -> Entry:
        """Return a class by its path, without the first ``skip`` arguments, which a factory's caller gives."""
        fields = dict(self._content["classes"][path])
        keys = {name: Key(*key) for name, key in fields["keys"].items()}
        given = list(keys)[:skip]
        for name in given:
            del keys[name]
        return Entry(**{**fields, "keys": keys, "required": [name for name in fields["required"] if name not in given]})


def fingerprint() -> str:
    """Return a hash of everything that determines the schema."""
    digest = hashlib.sha256("|".join([sys.version, *map(version, _STANDS_ON)]).encode())
    for part in ("", *names.PARTS):  # each of PARTS may be a link, which rglob does not follow
        for file in sorted((names.PACKAGE / part).rglob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def place() -> Path:
    """Return the file of this installation's schema."""
    return cache_folder() / f"schema-{fingerprint()}.json"


def read(command: str) -> Written | None:
    """Read the cached schema of a command; None if there is none."""
    file = place()
    try:
        content = loads(file.read_bytes())
    except (OSError, ValueError):
        return None
    if not isinstance(content, dict) or content.get("of") != file.stem.removeprefix("schema-"):
        return None
    return Written(content, "fit" if command == "check" else command)


def write() -> None:
    """Write the schema in a fresh process; failures are ignored, since only later calls benefit from it."""
    if not place().exists():
        subprocess.run([sys.executable, "-P", "-m", "descant.cli.dump"], capture_output=True, check=False)


# how it is made -----------------------------------------------------------------------------------------------------


def make() -> dict[str, Any]:
    """Build the schema of all commands and of the classes in PACKAGES, from the live parsers."""
    from descant.cli.main import live

    for ours in names.table().values():
        for path in ours:
            names.import_path(path)
    parsers = {command: live(command) for command in COMMANDS}
    known = parsers["fit"]
    commands = {name: parser.command for name, parser in parsers.items()}
    classes: dict[str, Entry] = {}
    of_kind: dict[str, dict[str, Any]] = {}
    todo = [part for keys in commands.values() for key in keys.values() for part in nested_classes(key.type)]
    while todo:
        kind = todo.pop()["class"]
        if kind in of_kind:
            continue
        paths = known.paths([{"class": kind}])
        entries = list(known.entries([{"class": kind}], PACKAGES))
        within = sorted({entry.path for entry in entries} & paths)
        of_kind[kind] = {"paths": within, "open": any(not path.startswith(PACKAGES) for path in paths)}
        for entry in entries:
            if entry.path not in classes:
                classes[entry.path] = entry
                todo += [part for key in entry.keys.values() for part in nested_classes(key.type)]
    modules = {path.rpartition(".")[0] for entry in classes.values() for path in (entry.path, entry.lineage[0])}
    return {
        "of": fingerprint(),
        "commands": {name: {key: astuple(value) for key, value in keys.items()} for name, keys in commands.items()},
        "classes": {
            path: {name: getattr(entry, name) for name in ("path", "lineage", "required", "abstract", "about")}
            | {"keys": {name: astuple(key) for name, key in entry.keys.items()}}
            for path, entry in sorted(classes.items())
        },
        "aliases": {entry.lineage[0]: path for path, entry in classes.items() if entry.lineage[0] != path},
        "kinds": of_kind,
        "modules": {name: dict.fromkeys(sorted(vars(importlib.import_module(name)))) for name in sorted(modules)},
    }


def main() -> None:
    file, content = place(), json.dumps(make())
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, content)
    kept = sorted(file.parent.glob("schema-*.json"), key=lambda other: -other.stat().st_mtime_ns)
    for other in kept[KEPT:]:
        other.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
