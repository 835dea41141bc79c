"""Build objects from saved configurations (``class_path`` and ``init_args``), of allowed classes only."""

from __future__ import annotations

import pkgutil
from collections import abc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from torch import Tensor

from descant.modules.core.errors import one_line
from descant.modules.io import hub

T = TypeVar("T")
Node = dict[str, Any]


def build(kind: type[T] | tuple[type[T], ...], node: Node, place: Path) -> T:
    """Build the object of ``{class_path: ..., init_args: ...}``; its class derives from ``kind`` or one of them."""
    from jsonargparse import ArgumentError, ArgumentParser

    for name in class_paths(node):
        _policies[-1](name)
        if _is_function(name):  # the parser would call it
            raise ValueError(f"{place}: class_path {name}: not a class")
    _require_uncalled(node, place)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(kind, "part", required=True)
    try:
        config = parser.parse_object({"part": node})
    except (ArgumentError, TypeError, KeyError) as error:
        raise ValueError(f"{place}: {_cause(error)}") from None
    try:
        with hub.pinning_revisions(place):
            return cast(T, parser.instantiate_classes(config)["part"])
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:  # the parser wraps a constructor's error in its own
            cause = cause.__cause__
        raise cause from None


def _is_function(name: str) -> bool:
    try:
        return not isinstance(pkgutil.resolve_name(name), type)
    except (ImportError, AttributeError, ValueError):  # the parser reports what does not exist
        return False


def _require_uncalled(node: object, place: Path) -> None:
    """Raise ValueError if an argument that would be called is given anything but a class of its return type."""
    if isinstance(node, list):
        for item in node:
            _require_uncalled(item, place)
    if not isinstance(node, Mapping):
        return
    for value in node.values():
        _require_uncalled(value, place)
    arguments = node.get("init_args")
    cls = _resolve(node.get("class_path"))
    if "class_path" in node and node.get("dict_kwargs"):
        raise ValueError(f"{place}: {node['class_path']}: dict_kwargs are not checked against types; use init_args")
    if not isinstance(cls, type) or not isinstance(arguments, Mapping):
        return
    hints = _hints(cls)
    for key, value in arguments.items():
        for made in _factories(hints.get(str(key))):
            for name in _list_paths(value):
                value = _resolve(name)
                if not (made and isinstance(value, type) and issubclass(value, made)):
                    raise ValueError(f"{place}: {cls.__name__}.{key}: {name} would be called")


def _resolve(name: object) -> Any:
    """Return the object at a dotted path; None if it does not exist, which the parser reports."""
    try:
        return pkgutil.resolve_name(name) if isinstance(name, str) and "." in name else None
    except (ImportError, AttributeError, ValueError):
        return None


def _hints(cls: type) -> dict[str, Any]:
    """Return the types of a class's arguments, including those that it passes on to its bases."""
    merged: dict[str, Any] = {}
    for base in cls.__mro__:
        function = base.__dict__.get("__init__")
        try:
            hints = get_type_hints(function) if function is not None else {}
        except Exception:  # names that are imported for type checkers only
            hints = getattr(function, "__annotations__", {})
        merged = hints | merged
    return merged


def _factories(hint: Any) -> Iterator[tuple[type, ...]]:
    """Yield, for each callable in a type, the classes that it returns; an empty tuple if it returns anything else."""
    if isinstance(hint, str):
        yield from [()] * ("Callable" in hint)
    elif hint is abc.Callable or hint is Callable:
        yield ()
    elif get_origin(hint) is abc.Callable:
        last = get_args(hint)[-1]
        made = get_args(last) if get_origin(last) in (Union, UnionType) else (last,)
        plain = any(not isinstance(cls, type) or cls.__module__ == "builtins" or cls is Tensor for cls in made)
        yield () if plain else made
    else:
        for part in get_args(hint):
            yield from _factories(part)


def _list_paths(value: object) -> Iterator[str]:
    """Yield class paths and dotted texts, at any depth of lists."""
    if isinstance(value, Mapping) and "class_path" in value:
        yield str(value["class_path"])
    elif isinstance(value, str) and "." in value:
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _list_paths(item)


def class_paths(node: object) -> Iterator[str]:
    """Iterate over every class path in a configuration, at any depth.

    >>> list(class_paths({"class_path": "a.B", "init_args": {"parts": [{"class_path": "c.D"}]}}))
    ['a.B', 'c.D']
    """
    return texts_at(node, "class_path")


def texts_at(node: object, key: str) -> Iterator[str]:
    """Yield every text at a key of nested mappings and lists, at any depth."""
    if isinstance(node, Mapping):
        if isinstance(node.get(key), str):
            yield node[key]
        for value in node.values():
            yield from texts_at(value, key)
    elif isinstance(node, list):
        for value in node:
            yield from texts_at(value, key)


@contextmanager
def policy(require: Callable[[str], None]) -> Iterator[None]:
    """Decide, within the block, which classes saved configurations may name: ``require(class_path)`` raises for others.

    Outside, only classes of Descant, torch.nn and torch.optim are allowed.
    """
    _policies.append(require)
    try:
        yield
    finally:
        _policies.remove(require)


def _ours(name: str) -> None:
    if not name.startswith(_OURS):
        raise ValueError(f"class_path {name} is not allowed in a saved configuration; descant.load has trust=")


_OURS = ("descant.modules.", "descant.recipes.", "descant.datamodules.", "torch.nn.", "torch.optim.")
_policies: list[Callable[[str], None]] = [_ours]


#: Beginnings of lines in the parser's message that do not name the fault.
_NOISE = ("Does not validate", "Subtypes:", "Errors:", "Given value", "Expected a <class 'NoneType'>")


def _cause(error: BaseException) -> str:
    """Extract class, key and fault from a parser's long message about a union."""
    names: list[str] = []
    for line in (line.strip(" -") for line in str(error).splitlines()):
        if line.startswith(("Problem with given class_path", "Parser key")):
            name = line.split()[-1].strip("':\"")
            names = [name] if line.startswith("Problem") else [*names, name]
        elif line and not line.startswith(_NOISE):
            return ": ".join([name for name in names if name != "part"] + [line])[:300]
    return one_line(error, 200)
