"""YAML files and options as nodes that keep file and line, for error messages."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from descant.cli.catalogue import ROOT
from descant.cli.errors import Refusal
from descant.cli.untrusted import text_of
from descant.modules.io.files import real_path
from descant.modules.io.plain_yaml import BITS, MOST

#: Maximum size of a file in bytes.
MOST_BYTES = 10_000_000
_MERGE, _PYTHON = "tag:yaml.org,2002:merge", "tag:yaml.org,2002:python/"


@dataclass
class Node:
    """One value of a configuration and its place.

    Attributes:
        content: a dict of nodes, a list of nodes, or a plain value.
        where: file and line, or the option, that set it. folder: folder that relative files in it refer to.
        raw: the text of a value from the command line, else None. typed: whether it is from the command line.
        text: for a file, its whole content. from_file: whether a file gave the option, not the user.
    """

    content: Any
    where: str
    folder: Path
    raw: str | None = None
    typed: bool = False
    text: str = ""
    from_file: bool = False

    @property
    def is_of_user(self) -> bool:
        """Whether the user typed it; an option that a file gives is not trusted."""
        return self.typed and not self.from_file

    @property
    def plain(self) -> Any:
        """Return the value without places."""
        if isinstance(self.content, dict):
            return {key: node.plain for key, node in self.content.items()}
        if isinstance(self.content, list):
            return [node.plain for node in self.content]
        return self.content

    def walk(self) -> Iterator[tuple[str, Node]]:
        """Yield every (key, node) below this one, at any depth; items of lists have the key of their list."""
        if isinstance(self.content, list):
            for node in self.content:
                yield from node.walk()
        elif isinstance(self.content, dict):
            for key, node in self.content.items():
                yield key, node
                yield from node.walk()


def load(file: Path) -> Node:
    """Read a YAML file as nodes."""
    name = path_to_show(file)
    try:
        text = text_of(file, real_path(file).parent, MOST_BYTES)
    except (OSError, ValueError) as error:
        raise Refusal(f"{name}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    node = _parse(text, name, file.parent)
    if node.content is None:
        return Node({}, name, file.parent)
    if not isinstance(node.content, dict):
        raise Refusal(f"{name}: a configuration is a mapping of keys, and this is not one")
    node.text = text
    return node


#: Text of a file -> its nodes, for files in which a short class name was completed; the parser reads these nodes.
replaced: dict[str, Node] = {}


class FileKey(str):
    """Key of an option that a file gives, such as an arm of a claim. It may set only what a file may set."""


def option(key: str, text: str) -> Node:
    """Parse a command-line option as nested nodes: ``model.width=3`` is ``{model: {width: 3}}``."""
    where, here = f"option {key}" if isinstance(key, FileKey) else f"--{key}", Path.cwd()
    try:
        node = _parse(text, where, here, lines=False)
    except Refusal:  # not YAML, such as "a: b: c", but plain text
        node = Node(text, where, here)
    node.raw = text
    for part in reversed(key.split(".")):
        node = Node({part: node}, where, here)
    for child in (node, *(child for _, child in node.walk())):
        child.typed, child.from_file = True, isinstance(key, FileKey)
    return node


def path_to_show(file: Path) -> str:
    """Return a file's path as shown to the user: relative if that is shorter."""
    for root, prefix in ((Path.cwd(), ""), (ROOT, "experiments/"), (ROOT.resolve(), "experiments/")):
        if file.is_relative_to(root):
            return prefix + file.relative_to(root).as_posix()
    return str(file)


def _parse(text: str, name: str, folder: Path, lines: bool = True) -> Node:
    from descant.modules.core.compat.jsonargparse import get_yaml_default_loader  # late: takes a third of a Tab

    loader = None
    try:
        loader = get_yaml_default_loader()(text)
        root = loader.get_single_node()
        left = [MOST]
        return Node(None, name, folder) if root is None else _convert(root, loader, name, folder, lines, left)
    except RecursionError:
        raise Refusal(f"{name}: nested too deeply, or within itself") from None
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise Refusal(f"{name}{line}: not valid YAML: {error.problem}") from error
    except (yaml.YAMLError, ValueError, TypeError, AttributeError) as error:  # a malformed scalar, such as 0x_
        raise Refusal(f"{name}: not valid YAML: {' '.join(str(error).split())}") from error
    finally:
        if loader is not None:
            loader.dispose()


def _convert(node: yaml.Node, loader: Any, name: str, folder: Path, lines: bool, left: list[int]) -> Node:
    left[0] -= 1
    if left[0] < 0:
        raise Refusal(f"{name}: more than {MOST:,} values, aliases included")
    where = f"{name}:{node.start_mark.line + 1}" if lines else name
    if node.tag.startswith(_PYTHON):
        raise Refusal(f"{where}: !!{node.tag.removeprefix('tag:yaml.org,2002:')}: objects are not read from YAML")
    if isinstance(node, yaml.SequenceNode):
        return Node([_convert(item, loader, name, folder, lines, left) for item in node.value], where, folder)
    if not isinstance(node, yaml.MappingNode):
        value = loader.construct_object(node)
        if isinstance(value, int) and value.bit_length() > BITS:  # neither a float nor a text can hold it
            raise Refusal(f"{where}: a number of more than {BITS} bits")
        return Node(value, where, folder)
    seen: set[str] = set()
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise Refusal(f"{name}:{key.start_mark.line + 1}: a key is a word, and this is not one")
        if key.tag != _MERGE and key.value in seen:
            raise Refusal(f"{name}:{key.start_mark.line + 1}: {key.value}: given twice")
        seen.add(key.value)
    loader.flatten_mapping(node)
    content: dict[str, Node] = {}
    for key, value in node.value:
        child = _convert(value, loader, name, folder, lines, left)
        child.where = f"{name}:{key.start_mark.line + 1}" if lines else name
        content[str(key.value)] = child
    return Node(content, where, folder)
