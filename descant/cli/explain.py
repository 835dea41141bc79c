"""``descant check --explain``: the file, line, option or default that set each value."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any

from descant.cli.catalogue import BASE
from descant.cli.document import Node, load, option, path_to_show
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
    given = [load(file) for file in (BASE, *files)] + [option(key, text) for key, text in options if text is not None]
    whole = reduce(overlaid, given, None)
    found = [(place, value, _find(whole, place)) for place, value in _leaves(config, ())]
    rows = [(_dots(place), _short(value), node.where if node else DEFAULT) for place, value, node in found]
    first, second = (min(_WIDTH, max(len(row[k]) for row in rows)) for k in (0, 1))
    return [f"{key:<{first}}  {value:<{second}}  {where}" for key, value, where in rows]


def inert(files: Sequence[Path], default: Callable[[Place], str | None]) -> list[Path]:
    """List the files, after the first, that change no value of earlier files or of the defaults.

    Args:
        default: returns the default of a place, as text; None if there is none or it is unknown.
    """
    before, same = reduce(overlaid, map(load, (BASE, *files[:1])), None), []
    for file in files[1:]:
        after = overlaid(before, load(file))
        if not _differs(before, after, default, ()):
            same.append(file)
        before = after
    return same


def composition_warnings(files: Sequence[Path], options: Sequence[tuple[str, str | None]]) -> list[str]:
    """Return warnings for compositions that are probably mistakes.

    These are two experiments, each with a recipe and data, whose keys are mixed; and data whose image size differs from
    the experiment's, unless an option sets the size.
    """
    given = [Path(value) for key, value in options if key == "data" and value and value.endswith(".yaml")]
    if len(files) + len(given) < 2:
        return []
    parts = [(path_to_show(file), overlaid(None, load(file))) for file in files]
    whole = [name for name, part in parts if all(_find(part, (key, "class_path")) for key in ("model", "data"))]
    lines = []
    if len(whole) > 1:
        names = " and --config ".join(whole)
        lines.append(f"--config {names}: each is a whole experiment; keys of both count, the last wins")
    of_data = [(name, _find(part, ("data",))) for name, part in parts]
    of_data += [(path_to_show(file), overlaid(None, load(file))) for file in given]
    sizes = [(name, key_size) for name, part in of_data if (key_size := _image_size(part))]
    typed = {key for key, _ in options}
    if len(sizes) > 1 and sizes[-1][1][1] != sizes[0][1][1] and sizes[-1][1][0] not in typed:
        (first, (_, before)), (last, (key, now)) = sizes[0], sizes[-1]
        slower = f", {(now / before) ** 2:.0f} times as many pixels a sample" if now > before else ""
        lines.append(f"{last}: images of {now} px, where {first} has {before}{slower}; --{key} {before} keeps them")
    return lines


def _image_size(data: Node | None) -> tuple[str, int] | None:
    """Return the dotted key and the value of the image size in the data section."""
    for place in (("size",), ("fields", "image", "size")):
        if (node := _find(data, place)) is not None and isinstance(node.content, int):
            return ".".join(("data", *place)), node.content
    return None


def overlaid(below: Node | None, node: Node) -> Node:
    """Merge a source over those before it; each value keeps its place, and ``init_args`` join their class."""
    content, old = node.content, _parts(below)
    if isinstance(content, list):
        return replace(node, content=[overlaid(None, item) for item in content])
    if isinstance(content, str):
        file = node.folder / content
        if content.endswith((".yaml", ".yml")) and file.is_file():
            return overlaid(below, load(file))
        if "class_path" in old:  # another class keeps the arguments that it has, too
            return replace(node, content={**old, "class_path": node})
    if not isinstance(content, dict):
        return node
    if node.typed and 0 in old:  # an option below a list sets its last item
        *first, last = old.values()
        return replace(node, content=[*first, overlaid(last, node)])
    for key, child in content.items():
        if key == "init_args":
            old = _parts(overlaid(replace(node, content=old), child))
        elif key.endswith("+"):
            items = [*_items(old.get(key[:-1])), *_items(overlaid(None, child))]
            old[key[:-1]] = replace(child, content=items)
        else:
            old[key] = overlaid(old.get(key), child)
    return replace(node, content=old)


def _parts(node: Node | None) -> dict[str | int, Node]:
    """Return the parts of a node by key or index; the name of a class stands for a class without arguments."""
    if node is None:
        return {}
    if isinstance(node.content, list):
        return dict(enumerate(node.content))
    if isinstance(node.content, str):
        return {"class_path": node}
    return dict(node.content) if isinstance(node.content, dict) else {}


def _items(node: Node | None) -> list[Node]:
    if node is None or node.content is None:
        return []
    return node.content if isinstance(node.content, list) else [node]


def _find(node: Node | None, place: Place) -> Node | None:
    for step in place:
        node = _parts(node).get(step)
    return node


def _differs(before: Node | None, after: Node, default: Callable[[Place], str | None], place: Place) -> bool:
    """Whether a value below a place changes; a value without predecessor is compared with its default."""
    if isinstance(after.content, dict):
        old = _parts(before)
        return any(_differs(old.get(key), part, default, (*place, key)) for key, part in after.content.items())
    if before is None:
        return in_text(after.plain) != default(place)
    return _plain(before.plain) != _plain(after.plain)


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
