"""A look at every key before the real parse: the first fault is told with its place and the nearest key.

The parser finds the same faults, but says them in the middle of a long union of attempts and names no file.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from descant import names, signatures, trust
from descant.catalogue import BASE
from descant.document import Node, load, option
from descant.errors import Refusal, hint, one_line

_SPEC = ("class_path", "init_args", "dict_kwargs")
#: Keys of the command line only.
_CALL_ONLY = {
    "trust": "a configuration cannot trust itself",
    "config": "files are composed on the command line",
}
Path_ = tuple[str, ...]


def precheck(
    parser: ArgumentParser,
    files: Sequence[Path],
    options: Sequence[tuple[str, str | None]],
    trusted: Sequence[str],
) -> None:
    """Check configurations and options in the order in which they count.

    Raises:
        Refusal: for the first unknown key, unknown or untrusted class, or value of a wrong type.
    """
    walk = _Walk(parser, trusted)
    for file in (BASE, *files):
        walk.source(load(file))
    for key, value in options:
        if value is not None and not key.endswith(("help", "print_config")):
            walk.source(option(key, value))
    walk.required()


class _Walk:
    """The state of a check: which class stands at each path so far, and which of its keys are given."""

    def __init__(self, parser: ArgumentParser, trusted: Sequence[str]) -> None:
        self.parser, self.trusted = parser, trusted
        self.classes: dict[Path_, type] = {}
        self.parsers: dict[Path_, ArgumentParser] = {}
        self.places: dict[Path_, str] = {}
        self.given: dict[Path_, set[str]] = {}
        self.last: dict[Path_, Path_] = {}  # list -> its last item

    def source(self, root: Node) -> None:
        """One file or option."""
        for key, node in root.walk():
            if key == "class_path" and isinstance(node.content, str) and "." in node.content:
                self._allowed(node.content, node.where)
        actions = signatures.actions(self.parser)
        groups = {key.split(".")[0] for key in actions if "." in key}
        for key, node in root.content.items():
            if key in groups:
                self._group(key, node, actions)
            elif key in actions:
                self._value(node, self.parser, actions[key], (key,))
            elif key in _CALL_ONLY:
                raise Refusal(f"{node.where}: {key}: {_CALL_ONLY[key]}")
            else:
                raise Refusal(f"{_at(node, (key,))}: no such key{hint(key, {*actions, *groups} - _dotted(actions))}")

    def _group(self, group: str, node: Node, actions: Mapping[str, Any]) -> None:
        node = self._file(node)
        known = {
            key.removeprefix(f"{group}."): action for key, action in actions.items() if key.startswith(f"{group}.")
        }
        if not isinstance(node.content, dict):
            raise Refusal(f"{_at(node, (group,))}: expected keys, got {node.content!r}")
        for key, child in node.content.items():
            plain = key.removesuffix("+")
            if plain not in known:
                raise Refusal(f"{_at(child, (group, key))}: no such key{hint(plain, known)}")
            self._value(child, self.parser, known[plain], (group, key))

    def _value(self, node: Node, parser: ArgumentParser, action: Any, path: Path_) -> None:
        """A value where ``action`` stands."""
        self._typed(node, signatures.hint_of(action), path)
        classy = isinstance(node.content, (dict, list, str)) and _has_classes(signatures.hint_of(action))
        if path[-1].endswith("+") or classy:
            return  # each class was looked at by itself
        if not signatures.accepts(parser, action, node.plain if node.raw is None else node.raw):
            expected = signatures.in_words(signatures.hint_of(action))
            raise Refusal(f"{_at(node, path)}: expected {expected}, got {_short(node.plain)}")

    def _typed(self, node: Node, kind: Any, path: Path_) -> None:
        """Look into a value of type ``kind`` for classes."""
        items, base = signatures.items_of(kind), (*path[:-1], path[-1].removesuffix("+"))
        if isinstance(node.content, list):
            if items is None:
                return
            if base == path:
                self._forget(path)  # a list replaces the one before it
            for number, item in enumerate(node.content):
                self._item(item, items, base, f"{number}@{item.where}")
        elif path != base and items is not None:
            self._item(node, items, base, f"@{node.where}{len(self.last)}")
        elif isinstance(node.content, dict) and node.where.startswith("--") and base in self.last:
            self._typed(node, items, self.last[base])  # an option below a list speaks of its last item
        elif classes := signatures.classes_of(kind):
            self._class(node, kind, classes, path)
        elif isinstance(node.content, dict) and (values := signatures.values_of(kind)) is not None:
            for key, child in node.content.items():
                self._typed(child, values, (*path, key))

    def _item(self, node: Node, items: Any, base: Path_, name: str) -> None:
        self.last[base] = (*base, name)
        self._typed(node, items, self.last[base])

    def _forget(self, path: Path_) -> None:
        self.last.pop(path, None)
        for state in (self.classes, self.parsers, self.places, self.given):
            for key in [key for key in state if key[: len(path)] == path]:
                state.pop(key)

    def _class(self, node: Node, kind: Any, classes: tuple[type, ...], path: Path_) -> None:
        if isinstance(node.content, str):
            text = node.content
            if signatures.takes_text(kind) and not _is_ours(text, classes):
                return
            node = self._file(node) if _is_file(text) else Node({"class_path": node}, node.where, node.folder)
        if not isinstance(node.content, dict):
            return
        content = node.content
        if "class_path" in content:
            self._named(content["class_path"], kind, classes, path)
            extra = [key for key in content if key not in _SPEC]
            if extra:
                child = content[extra[0]]
                raise Refusal(f"{_at(child, (*path, extra[0]))}: not beside class_path; put it under init_args")
        elif path not in self.classes and len(classes) == 1 and not inspect.isabstract(classes[0]):
            self._set(classes[0], kind, path, node.where)
        if path not in self.classes:
            return
        if "class_path" in content or "init_args" in content:
            inner = content.get("init_args", Node({}, node.where, node.folder))
        else:
            inner = Node({k: v for k, v in content.items() if k != "dict_kwargs"}, node.where, node.folder)
        if inner.content is None:
            return
        if not isinstance(inner.content, dict):
            raise Refusal(f"{_at(inner, path)}: init_args are keys, got {_short(inner.plain)}")
        self._arguments(inner, path)

    def _arguments(self, node: Node, path: Path_) -> None:
        cls, parser = self.classes[path], self.parsers[path]
        actions = signatures.actions(parser)
        for key, child in node.content.items():
            plain = key.removesuffix("+")
            if plain not in actions:
                raise Refusal(f"{_at(child, (*path, key))}: {cls.__name__} has no such key{hint(plain, actions)}")
            self.given[path].add(plain)
            self._value(child, parser, actions[plain], (*path, key))

    def _named(self, node: Node, kind: Any, classes: tuple[type, ...], path: Path_) -> None:
        """Find the class of a ``class_path``, and remember it at this path."""
        name = node.content
        if not isinstance(name, str):
            raise Refusal(f"{_at(node, path)}: class_path is a name, got {_short(name)}")
        if "." in name:
            self._allowed(name, node.where)
            found = self._import(name, node, path, classes)
        else:
            ours = names.full(name)
            if ours is not None:
                names.import_path(ours)
            same = signatures.namesakes(classes, name)
            if len(same) > 1:
                raise Refusal(
                    f"{_at(node, path)}: {name} is the name of {' and '.join(same)}: give the full path of one"
                )
            known = signatures.subclasses(classes)
            if name not in known and ours is None:
                near = hint(name, {**known, **dict.fromkeys(names.table())}) if known else ""
                raise Refusal(f"{_at(node, path)}: no class {name} of kind {_kinds(classes)}{near}")
            found = signatures.find_class(known.get(name) or str(ours))
        if inspect.isclass(found):
            if not issubclass(found, classes):
                near = hint(name, signatures.subclasses(classes), 0)
                raise Refusal(f"{_at(node, path)}: {name} is not of kind {_kinds(classes)}{near}")
            self._set(found, kind, path, node.where)

    def _import(self, name: str, node: Node, path: Path_, classes: tuple[type, ...]) -> Any:
        try:
            return signatures.find_class(name)
        except (ImportError, AttributeError, ValueError) as error:
            missing = isinstance(error, ModuleNotFoundError) and not name.startswith(f"{error.name}.")
            if missing or type(error).__name__ == "ImportDenied":
                raise Refusal(f"{_at(node, path)}: {name}: {one_line(error)}") from error
            near = hint(name.rpartition(".")[2], signatures.subclasses(classes), 0)
            raise Refusal(f"{_at(node, path)}: there is no {name}{near}") from error

    def _set(self, cls: type, kind: Any, path: Path_, where: str) -> None:
        before = self.classes.get(path)
        if before is cls:
            return
        self.classes[path], self.places[path] = cls, where
        self.parsers[path] = signatures.class_parser(cls, kind, self.parser)
        kept = signatures.actions(self.parsers[path])
        self.given[path] = {key for key in self.given.get(path, ()) if key in kept}

    def required(self) -> None:
        """What no source has given."""
        for key in ("model", "data"):
            if (key,) not in self.classes:
                raise Refusal(f"no {key}: --config NAME chooses an experiment (descant list)")
        for path, parser in self.parsers.items():
            for key in signatures.required(parser):
                if key.split(".")[0] not in self.given[path]:
                    name = self.classes[path].__name__
                    raise Refusal(f"{self.places[path]}: {_dots((*path, key))}: {name} needs it, and it is not given")

    def _allowed(self, name: str, where: str) -> None:
        try:
            trust.require(name, self.trusted)
        except Refusal as refusal:
            raise Refusal(f"{where}: {refusal}") from None

    def _file(self, node: Node) -> Node:
        """The content of a sub-file, where a value names one."""
        if not isinstance(node.content, str):
            return node
        file = node.folder / node.content
        if not file.is_file():
            raise Refusal(f"{node.where}: no such file: {file}")
        found = load(file)
        for key, child in found.walk():
            if key == "class_path" and isinstance(child.content, str) and "." in child.content:
                self._allowed(child.content, child.where)
        return found


def _is_file(text: str) -> bool:
    return text.endswith((".yaml", ".yml", ".json"))


def _is_ours(text: str, classes: tuple[type, ...]) -> bool:
    """Whether a text where texts are allowed too still means a class."""
    return text in names.table() or text in signatures.subclasses(classes)


def _has_classes(kind: Any) -> bool:
    inner = [signatures.items_of(kind), signatures.values_of(kind)]
    return bool(signatures.classes_of(kind)) or any(k is not None and _has_classes(k) for k in inner)


def _kinds(classes: tuple[type, ...]) -> str:
    return " or ".join(dict.fromkeys(cls.__name__ for cls in classes))


def _dots(path: Path_) -> str:
    """The path as a user writes it; items of lists have no name there."""
    return ".".join(part for part in path if "@" not in part)


def _at(node: Node, path: Path_) -> str:
    """``FILE:LINE: KEY``; an option says its key already."""
    return node.where if node.where.startswith("--") else f"{node.where}: {_dots(path)}"


def _dotted(actions: Mapping[str, Any]) -> set[str]:
    return {key for key in actions if "." in key}


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
