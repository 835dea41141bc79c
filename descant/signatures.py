"""What a class accepts, as the parser itself sees it. The one file that reaches into jsonargparse's insides.

Asking the parser's own sub-parsers keeps the early check and the real parse from disagreeing.
"""

from __future__ import annotations

import argparse
import collections.abc as abc
import inspect
import types
import typing
from collections.abc import Iterator
from typing import Any, Literal, Union, get_args, get_origin

from jsonargparse import ArgumentParser, Namespace
from jsonargparse._actions import ActionConfigFile, filter_non_parsing_actions
from jsonargparse._common import parser_context
from jsonargparse._required import iter_required_keys
from jsonargparse._typehints import ActionTypeHint, adapt_partial_callable_class, get_all_subclass_paths
from jsonargparse._util import import_object
from torch import Tensor

_UNIONS = (Union, types.UnionType)
_LISTS = (list, tuple, set, abc.Sequence, abc.Iterable, abc.Collection)
_MAPS = (dict, abc.Mapping, abc.MutableMapping)


def actions(parser: ArgumentParser) -> dict[str, argparse.Action]:
    """Key -> action of everything that a parser takes as configuration."""
    found = filter_non_parsing_actions(parser._actions)
    # a group such as `trainer` has an action for a sub-configuration: its keys are the group's
    return {a.dest: a for a in found if not isinstance(a, ActionConfigFile) and hasattr(a, "_typehint")}


def class_parser(cls: type, hint: Any, parent: ArgumentParser) -> ArgumentParser:
    """The parser of a class's arguments, where a value of type ``hint`` is expected.

    A factory (``Callable[[X], Y]``) gets its first arguments from the program, so they are no keys.
    """
    skip = None
    for part in parts(hint):
        if get_origin(part) is abc.Callable:
            path = f"{cls.__module__}.{cls.__qualname__}"
            _, skip = adapt_partial_callable_class(part, Namespace(class_path=path))
    with parser_context(parent_parser=parent, load_value_mode=parent.parser_mode):
        parser: ArgumentParser = ActionTypeHint.get_class_parser(cls, {"fail_untyped": False}, skip_args=skip)
    return parser


def required(parser: ArgumentParser) -> list[str]:
    """The keys that must be given."""
    return list(iter_required_keys(parser))


def hint_of(action: argparse.Action) -> Any:
    """The type of an action's value."""
    return getattr(action, "_typehint", None)


def accepts(parser: ArgumentParser, action: argparse.Action, value: Any) -> bool:
    """Whether the parser itself takes ``value`` for this action."""
    try:
        with parser_context(load_value_mode=parser.parser_mode, parent_parser=parser):
            parser._check_value_key(action, value, action.dest, Namespace())
    except (TypeError, ValueError, KeyError, argparse.ArgumentError):
        return False
    return True


def find_class(path: str) -> Any:
    """The object of a full path, under the import policy.

    Raises:
        ImportError, AttributeError, ValueError: where there is none, or it is not allowed.
    """
    return import_object(path)


def subclasses(classes: tuple[type, ...]) -> dict[str, str]:
    """Short name -> full path of the loaded subclasses of some classes."""
    return {path.rpartition(".")[2]: path for cls in classes for path in get_all_subclass_paths(cls)}


def namesakes(classes: tuple[type, ...], name: str) -> list[str]:
    """The full paths of loaded subclasses that carry a short name; more than one where another package has it too."""
    paths = {path for cls in classes for path in get_all_subclass_paths(cls)}
    return sorted(path for path in paths if path.rpartition(".")[2] == name)


def parts(hint: Any) -> Iterator[Any]:
    """The members of a union, or the type itself; annotations and aliases are looked through."""
    if hasattr(hint, "__value__"):
        yield from parts(hint.__value__)
    elif get_origin(hint) is typing.Annotated:
        yield from parts(get_args(hint)[0])
    elif get_origin(hint) in _UNIONS:
        for part in get_args(hint):
            yield from parts(part)
    else:
        yield hint


def classes_of(hint: Any) -> tuple[type, ...]:
    """The classes that ``class_path`` and ``init_args`` may build, directly or by a factory."""
    found: list[type] = []
    for part in parts(hint):
        if get_origin(part) is abc.Callable:
            arguments = get_args(part)
            found += classes_of(arguments[-1]) if arguments else ()
        elif inspect.isclass(part) and ActionTypeHint.is_subclass_typehint(part):
            found += [part] if part is not Tensor else []  # `float | Tensor` means a number here
        elif inspect.isclass(origin := get_origin(part)) and ActionTypeHint.is_subclass_typehint(part):
            found.append(origin)
    return tuple(found)


def is_factory(hint: Any) -> bool:
    return any(get_origin(part) is abc.Callable for part in parts(hint))


def items_of(hint: Any) -> Any:
    """The type of the items of a list, or None."""
    found = [get_args(p)[0] for p in parts(hint) if get_origin(p) in _LISTS and get_args(p)]
    return Union[tuple(found)] if found else None  # noqa: UP007  # of a list of types


def values_of(hint: Any) -> Any:
    """The type of the values of a mapping, or None."""
    found = [get_args(p)[1] for p in parts(hint) if get_origin(p) in _MAPS and len(get_args(p)) == 2]
    return Union[tuple(found)] if found else None  # noqa: UP007  # of a list of types


def takes_text(hint: Any) -> bool:
    """Whether a text can be a value by itself, and need not name a class or a file."""
    plain = [p for p in parts(hint) if p in (str, Any, object) or get_origin(p) is Literal]
    return bool(plain) or any(inspect.isclass(p) and issubclass(p, str) for p in parts(hint) if inspect.isclass(p))


_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", type(None): "null"}


def in_words(hint: Any) -> str:
    """A type as a user would say it.

    >>> in_words(int | None), in_words(dict[str, float]), in_words(Literal["a", "b"])
    ('a whole number or null', 'a mapping of names to numbers', 'a or b')
    """
    words: list[str] = []
    for part in parts(hint):
        if part in _WORDS:
            words.append(_WORDS[part])
        elif get_origin(part) is Literal:
            words += [str(choice) for choice in get_args(part)]
        elif get_origin(part) in _LISTS:
            inner = get_args(part)
            words.append(f"a list of {_many(in_words(inner[0]))}" if inner else "a list")
        elif get_origin(part) in _MAPS:
            inner = get_args(part)
            words.append(f"a mapping of names to {_many(in_words(inner[1]))}" if inner else "a mapping")
        elif part is not Tensor:
            found = classes_of(part)
            words.append(f"a class of kind {found[0].__name__}" if found else _name(part))
    unique = list(dict.fromkeys(words))
    unique.sort(key=lambda word: word == "null")
    return unique[0] if len(unique) == 1 else f"{', '.join(unique[:-1])} or {unique[-1]}"


def _many(word: str) -> str:
    singular = word.removeprefix("a whole ").removeprefix("a ")
    return f"{'whole ' if word.startswith('a whole') else ''}{singular}s" if word.startswith("a ") else word


def _name(part: Any) -> str:
    return part.__name__ if inspect.isclass(part) else str(part).replace("typing.", "")
