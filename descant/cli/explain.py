"""``descant check --explain``: the file, line, option or default that set each value."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from descant.cli.catalogue import BASE
from descant.cli.document import Node, load, option, shown
from descant.cli.signatures import in_text

#: A place in a configuration: keys, and indices in lists; ``init_args`` is not a part of it.
Place = tuple[str | int, ...]
DEFAULT = "default"
_WIDTH = 60


def explain(config: Mapping[str, Any], files: Sequence[Path], options: Sequence[tuple[str, str | None]]) -> list[str]:
    """Format one line per value: key, value, origin.

    Args:
        config: the composed configuration. files, options: its sources, in the order in which they apply.
    """
    origin = Origin()
    for file in (BASE, *files):
        origin.source(load(file))
    for key, text in options:
        if text is not None:
            origin.source(option(key, text))
    rows = [(_dots(place), _short(value), origin.of(place)) for place, value in _leaves(config, ())]
    first, second = (min(_WIDTH, max(len(row[k]) for row in rows)) for k in (0, 1))
    return [f"{key:<{first}}  {value:<{second}}  {where}" for key, value, where in rows]


def inert(files: Sequence[Path], default: Callable[[Place], str | None]) -> list[Path]:
    """List the files, after the first, that change no value of earlier files or of the defaults.

    Args:
        default: returns the default of a place, as text; None if there is none or it is unknown.
    """
    origin = Origin(default)
    for file in (BASE, *files[:1]):
        origin.source(load(file))
    return [file for file in files[1:] if not origin.source(load(file))]


def composed(files: Sequence[Path], options: Sequence[tuple[str, str | None]]) -> list[str]:
    """Return warnings for compositions that are probably mistakes.

    These are two experiments, each with a recipe and data, whose keys are mixed; and data whose image size differs from
    the experiment's, unless an option sets the size.
    """
    given = [Path(value) for key, value in options if key == "data" and value and value.endswith(".yaml")]
    if len(files) + len(given) < 2:
        return []
    parts = [(shown(file), load(file).plain) for file in files]
    whole = [
        name
        for name, part in parts
        if all(isinstance(part.get(key), Mapping) and "class_path" in part[key] for key in ("model", "data"))
    ]
    lines = []
    if len(whole) > 1:
        names = " and --config ".join(whole)
        lines.append(f"--config {names}: each is a whole experiment; keys of both count, the last wins")
    of_data = [(name, part.get("data")) for name, part in parts] + [(shown(f), load(f).plain) for f in given]
    sizes = [(name, key_size) for name, part in of_data if (key_size := _image_size(part))]
    typed = {key for key, _ in options}
    if len(sizes) > 1 and sizes[-1][1][1] != sizes[0][1][1] and sizes[-1][1][0] not in typed:
        (first, (_, before)), (last, (key, now)) = sizes[0], sizes[-1]
        slower = f", {(now / before) ** 2:.0f} times as many pixels a sample" if now > before else ""
        lines.append(f"{last}: images of {now} px, where {first} has {before}{slower}; --{key} {before} keeps them")
    return lines


def _image_size(data: Any) -> tuple[str, int] | None:
    """Return the dotted key and the value of the image size in the data section."""
    args = data.get("init_args", data) if isinstance(data, Mapping) else {}
    if isinstance(args.get("size"), int):
        return "data.size", args["size"]
    for step in ("fields", "image"):
        args = args.get(step) if isinstance(args, Mapping) else None
        args = args.get("init_args", args) if isinstance(args, Mapping) else None
    size = args.get("size") if isinstance(args, Mapping) else None
    return ("data.fields.image.size", size) if isinstance(size, int) else None


class Origin:
    """The source that set each value last.

    Args:
        default: returns the default of a place, as text; None if there is none or it is unknown.
    """

    def __init__(self, default: Callable[[Place], str | None] = lambda _: None) -> None:
        self._default = default
        self._source: dict[Place, str] = {}
        self._value: dict[Place, Any] = {}
        self._length: dict[Place, int] = {}
        self._changed = False

    def source(self, root: Node) -> bool:
        """Add a file or option; return whether it changes a value."""
        self._changed = False
        self._walk(root, ())
        return self._changed

    def of(self, place: Place) -> str:
        return self._source.get(place, DEFAULT)

    def _walk(self, node: Node, place: Place) -> None:
        if isinstance(node.content, dict):
            if place in self._length and node.typed:
                place = (*place, self._length[place] - 1)  # an option below a list sets its last item
            for key, child in node.content.items():
                if key == "init_args":
                    self._walk(child, place)
                elif key.endswith("+"):
                    self._add(child, (*place, key[:-1]))
                else:
                    self._walk(child, (*place, key))
        elif isinstance(node.content, list):
            self._note(place, node.plain)
            self._forget(place)
            self._source[place], self._value[place] = node.where, node.plain
            self._length[place] = 0
            changed = self._changed
            self._add(node, place)
            self._changed = changed
        elif isinstance(node.content, str) and node.content.endswith((".yaml", ".yml")) and place:
            file = node.folder / node.content
            self._walk(load(file), place) if file.is_file() else self._set(place, node)
        else:
            self._set(place, node)

    def _set(self, place: Place, node: Node) -> None:
        self._note(place, node.plain)
        self._forget(place)
        for key in (place, (*place, "class_path")):  # it may be a class name
            self._source[key], self._value[key] = node.where, node.plain

    def _note(self, place: Place, value: Any) -> None:
        """Record whether a value differs from the previous one."""
        if place in self._value:
            self._changed |= _plain(self._value[place]) != _plain(value)
        elif (*place, "class_path") in self._value:  # now a class name alone, or null
            self._changed |= _plain(self._value[*place, "class_path"]) != _plain(value)
        else:
            self._changed |= in_text(value) != self._default(place)

    def _add(self, node: Node, place: Place) -> None:
        self._changed = True
        for item in node.content if isinstance(node.content, list) else [node]:
            self._length[place] = self._length.get(place, 0) + 1
            self._walk(item, (*place, self._length[place] - 1))

    def _forget(self, place: Place) -> None:
        tables: tuple[dict[Place, Any], ...] = (self._source, self._value, self._length)
        for table in tables:
            for key in [key for key in table if key[: len(place)] == place]:
                del table[key]


def _leaves(value: Any, place: Place) -> Iterator[tuple[Place, Any]]:
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _leaves(inner, place if key == "init_args" and "class_path" in value else (*place, key))
    elif isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        for number, inner in enumerate(value):
            yield from _leaves(inner, (*place, number))
    elif value != {}:
        yield place, value


def _plain(value: Any) -> Any:
    """Shorten the path of a class to its name."""
    return value.rpartition(".")[2] if isinstance(value, str) and "/" not in value else value


def _dots(place: Place) -> str:
    """Return the dotted key; a class is shown at the key that chooses it."""
    steps = place[:-1] if place[-1] == "class_path" else place
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps).lstrip(".")


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    text = " ".join(text.split())
    return text if len(text) <= _WIDTH else f"{text[: _WIDTH - 3]}..."
