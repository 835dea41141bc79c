"""``descant check --explain``: where each value of a composed configuration came from."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from descant.catalogue import BASE
from descant.document import Node, load, option

#: A place in a configuration: keys, and numbers in lists; ``init_args`` is no step of it.
Place = tuple[str | int, ...]
DEFAULT = "default"
_WIDTH = 60


def explain(config: Mapping[str, Any], files: Sequence[Path], options: Sequence[tuple[str, str | None]]) -> list[str]:
    """A line a value: key, value, and the file and line, the option or the default that it is of.

    Args:
        config: composed. files, options: of which, in the order in which they count.
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


class Origin:
    """Who said each value last."""

    def __init__(self) -> None:
        self._said: dict[Place, str] = {}
        self._length: dict[Place, int] = {}

    def source(self, root: Node) -> None:
        """One file or option, after those before it."""
        self._walk(root, ())

    def of(self, place: Place) -> str:
        return self._said.get(place, DEFAULT)

    def _walk(self, node: Node, place: Place) -> None:
        if isinstance(node.content, dict):
            if place in self._length and node.where.startswith("--"):
                place = (*place, self._length[place] - 1)  # an option below a list speaks of its last item
            for key, child in node.content.items():
                if key == "init_args":
                    self._walk(child, place)
                elif key.endswith("+"):
                    self._add(child, (*place, key[:-1]))
                else:
                    self._walk(child, (*place, key))
        elif isinstance(node.content, list):
            self._forget(place)
            self._said[place] = node.where
            self._length[place] = 0
            self._add(node, place)
        elif isinstance(node.content, str) and node.content.endswith((".yaml", ".yml")) and place:
            file = node.folder / node.content
            self._walk(load(file), place) if file.is_file() else self._say(place, node.where)
        else:
            self._say(place, node.where)

    def _say(self, place: Place, where: str) -> None:
        self._forget(place)
        self._said[place] = where
        self._said[(*place, "class_path")] = where  # a class by its name alone

    def _add(self, node: Node, place: Place) -> None:
        for item in node.content if isinstance(node.content, list) else [node]:
            self._length[place] = self._length.get(place, 0) + 1
            self._walk(item, (*place, self._length[place] - 1))

    def _forget(self, place: Place) -> None:
        for table in (self._said, self._length):
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


def _dots(place: Place) -> str:
    """As a user writes it; a class stands where it is chosen."""
    steps = place[:-1] if place[-1] == "class_path" else place
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps).lstrip(".")


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    text = " ".join(text.split())
    return text if len(text) <= _WIDTH else f"{text[: _WIDTH - 3]}..."
