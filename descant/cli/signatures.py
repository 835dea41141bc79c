"""Schema of classes from jsonargparse's own actions.

The early check and the real parse agree, because both use the parser's own sub-parsers.
"""

from __future__ import annotations

import argparse
import collections.abc as abc
import inspect
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from functools import cached_property
from typing import Any, Literal, Union, get_args, get_origin

import yaml
from jsonargparse import ArgumentParser, Namespace, get_loader, set_loader
from torch import Tensor

from descant.cli.document import replaced
from descant.cli.errors import hint, one_line
from descant.cli.schema import Ambiguous, Entry, Key, Part, Type, Unknown, classes, kinds
from descant.cli.trust import is_allowed
from descant.modules.core.compat.jsonargparse import (
    ActionConfigFile,
    ActionTypeHint,
    check_value,
    filter_non_parsing_actions,
    get_all_subclass_paths,
    get_import_path,
    import_object,
    iter_required_keys,
    parser_context,
)
from descant.modules.io import names

#: Package whose classes a configuration may name -> the extra of descant that installs it.
EXTRAS = {"schedulefree": "schedule-free"}
#: jsonargparse's own loader, which :func:`read_replaced` replaces.
_load_yaml = get_loader("yaml")
#: Imports the object of a full path, under the import policy.
find_class = import_object
_UNIONS = (Union, types.UnionType)
_LISTS = (list, tuple, set, abc.Sequence, abc.Iterable, abc.Collection)
_MAPS = (dict, abc.Mapping, abc.MutableMapping)
_PLAIN: dict[Any, Part] = {
    int: "int",
    float: "float",
    bool: "bool",
    str: "str",
    type(None): "null",
    Any: "any",
    object: "any",
    inspect.Parameter.empty: "any",
}


class Live:
    """Schema of a live parser, which resolves every class that can be imported.

    Args:
        parser: parser of a command.
    """

    def __init__(self, parser: ArgumentParser) -> None:
        self.parser = parser
        self._classes: dict[str, type] = {}
        self._entries: dict[tuple[type, int], Entry] = {}

    @cached_property
    def command(self) -> Mapping[str, Key]:
        return {key: self._key(action) for key, action in _actions(self.parser).items()}

    def names(self, kinds_: Sequence[Part]) -> Mapping[str, str]:
        """Return short name -> import path of the classes of some kinds that are loaded."""
        return {path.rpartition(".")[2]: path for path in sorted(self.paths(kinds_))}

    def find(self, name: str, kinds_: Sequence[Part]) -> Entry:
        cls = self._full(name, kinds_) if "." in name else self._short(name, kinds_)
        if not inspect.isclass(cls):
            if is_allowed(name):  # a function would be called
                raise LookupError(f"{name} is no class")
            raise Unknown(name)  # of the user's own
        if not issubclass(cls, self._of(kinds_)):
            raise LookupError(f"{name} is not of kind {kinds(kinds_)}{hint(name, self.names(kinds_), 0)}")
        return self.entry(cls, max(part.get("skip", 0) for part in kinds_ if isinstance(part, dict)))

    def _full(self, name: str, kinds_: Sequence[Part]) -> Any:
        try:
            return find_class(name)
        except (ImportError, AttributeError, ValueError) as error:
            missing = isinstance(error, ModuleNotFoundError) and not name.startswith(f"{error.name}.")
            if missing or type(error).__name__ == "ImportDenied":
                raise LookupError(f"{name}: {one_line(error)}") from error
            extra = EXTRAS.get(name.partition(".")[0])
            if extra is not None and isinstance(error, ModuleNotFoundError):
                raise LookupError(f"{name} needs its package: pip install 'descant[{extra}]'") from error
            near = hint(name.rpartition(".")[2], self.names(kinds_), 0)
            raise LookupError(f"there is no {name}{near}") from error

    def _short(self, name: str, kinds_: Sequence[Part]) -> Any:
        ours = names.full(name)
        if ours is not None:
            names.import_path(ours)
        same = sorted(path for path in self.paths(kinds_) if path.rpartition(".")[2] == name)
        if len(same) > 1:
            raise Ambiguous(f"{name} is the name of {' and '.join(same)}: give the full path of one")
        if not same and ours is None:
            known = self.names(kinds_)
            near = hint(name, {**known, **dict.fromkeys(names.table())}) if known else ""
            raise LookupError(f"no class {name} of kind {kinds(kinds_)}{near}")
        return find_class(same[0] if same else str(ours))

    def accepts(self, owner: Entry | None, name: str, value: Any) -> bool:
        parser = self.parser if owner is None else owner.source
        action = _actions(parser)[name]
        try:
            check_value(parser, action, value)
        except (TypeError, ValueError, KeyError, argparse.ArgumentError):
            return False
        return True

    def is_class(self, name: str) -> bool:
        try:
            return inspect.isclass(find_class(name))
        except (ImportError, AttributeError, ValueError):
            return False

    def entry(self, cls: type, skip: int = 0) -> Entry:
        """Return a class with its arguments, without the first ``skip``, which a factory's caller gives."""
        if (cls, skip) not in self._entries:
            with parser_context(parent_parser=self.parser, load_value_mode=self.parser.parser_mode):
                parser: ArgumentParser = ActionTypeHint.get_class_parser(
                    cls, {"fail_untyped": False}, skip_args={skip} if skip else None
                )
            self._entries[cls, skip] = Entry(
                path=_canonical(cls),
                lineage=[_path(base) for base in cls.__mro__ if base is not object],
                keys={key: self._key(action) for key, action in _actions(parser).items()},
                required=sorted({key.split(".")[0] for key in iter_required_keys(parser)}),
                abstract=inspect.isabstract(cls),
                about=" ".join(inspect.cleandoc(cls.__doc__ or "").partition("\n\n")[0].split()),
                source=parser,
            )
        return self._entries[cls, skip]

    def alone(self, kinds_: Sequence[Part]) -> Entry | None:
        """Return the class that is meant if none is named: the only one that is expected, unless it is abstract."""
        if len(kinds_) != 1 or not isinstance(kinds_[0], dict) or inspect.isabstract(self._of(kinds_)[0]):
            return None
        return self.entry(self._of(kinds_)[0], kinds_[0].get("skip", 0))

    def paths(self, kinds_: Sequence[Part]) -> set[str]:
        """Return the paths of the classes that are loaded."""
        return {path for cls in self._of(kinds_) for path in get_all_subclass_paths(cls)}

    def entries(self, kinds_: Sequence[Part], packages: tuple[str, ...]) -> Iterator[Entry]:
        """Yield the classes of some kinds, including the kinds, in some packages, if they have a parser."""
        bases = {_canonical(cls): cls for cls in self._of(kinds_)}
        for path in sorted({*bases, *self.paths(kinds_)}):
            if path.startswith(packages):
                try:
                    yield self.entry(bases.get(path) or find_class(path))
                except (ValueError, ImportError):
                    continue

    def _of(self, kinds_: Sequence[Part]) -> tuple[type, ...]:
        return tuple(self._classes[part["class"]] for part in kinds_ if isinstance(part, dict))

    def _key(self, action: argparse.Action) -> Key:
        about = " ".join(str(action.help or "").split()) if action.help != argparse.SUPPRESS else ""
        default = None if action.default is inspect.Parameter.empty or action.required else in_text(action.default)
        return Key(self._type(action._typehint), default, about.split(" (type: ")[0])  # type: ignore[attr-defined]

    def _type(self, *hints: Any) -> Type:
        unique: Type = []
        for plain in (plain for one in hints for part in _parts(one) for plain in self._part(part)):
            if plain not in unique:
                unique.append(plain)
        return unique

    def _part(self, part: Any) -> Iterator[Part]:
        if part is Tensor:  # `float | Tensor` means a number here
            return
        if isinstance(part, abc.Hashable) and part in _PLAIN:
            yield _PLAIN[part]
        elif get_origin(part) is Literal:
            yield {"choice": list(get_args(part))}
        elif (get_origin(part) or part) in _LISTS:
            yield {"list": self._type(*(a for a in get_args(part) if a is not ...))}
        elif (get_origin(part) or part) in _MAPS:
            yield {"map": self._type(*get_args(part)[1:])}
        elif get_origin(part) is abc.Callable and (made := classes(self._type(*get_args(part)[-1:]))):  # a factory
            yield from ({**kind, "skip": len(part.__args__) - 1} for kind in made if isinstance(kind, dict))
        elif inspect.isclass(cls := get_origin(part) or part) and ActionTypeHint.is_subclass_typehint(part):
            self._classes[_path(cls)] = cls
            yield {"class": _path(cls)}
        elif inspect.isclass(part) and issubclass(part, Enum):
            yield {"choice": [*part.__members__]}
        elif inspect.isclass(part) and issubclass(part, str):
            yield "str"
        else:
            yield {"other": part.__name__ if inspect.isclass(part) else str(part).replace("typing.", "")}


def read_replaced() -> None:
    """Make parsers read the nodes in :data:`descant.cli.document.replaced` instead of the files with that text."""

    def load(text: str) -> Any:
        return replaced[text].plain if text in replaced else _load_yaml(text)

    set_loader("yaml", load, (yaml.YAMLError,))


def _actions(parser: ArgumentParser) -> dict[str, argparse.Action]:
    """Return key -> action of the configuration arguments of a parser."""
    actions = filter_non_parsing_actions(parser._actions)
    # a group such as `trainer` has an action for a sub-configuration, whose keys are the group's
    return {a.dest: a for a in actions if not isinstance(a, ActionConfigFile) and hasattr(a, "_typehint")}


def _parts(hint: Any) -> Iterator[Any]:
    """Yield the members of a union, or the type itself, without Annotated and aliases."""
    if hasattr(hint, "__value__"):
        yield from _parts(hint.__value__)
    elif get_origin(hint) is typing.Annotated:
        yield from _parts(get_args(hint)[0])
    elif get_origin(hint) in _UNIONS:
        for part in get_args(hint):
            yield from _parts(part)
    else:
        yield hint


def _path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _canonical(cls: type) -> str:
    """Return the shortest path that imports a class."""
    return str(get_import_path(cls))


def in_text(default: Any) -> str:
    """Format a default as YAML text."""
    if default is None or isinstance(default, bool):
        return {None: "null", True: "true", False: "false"}[default]
    if isinstance(default, Namespace | dict) and default.get("class_path"):
        return str(default["class_path"]).rpartition(".")[2]
    if isinstance(default, str | int | float | Enum):
        return default.name if isinstance(default, Enum) else str(default)
    if isinstance(default, list | tuple):
        return f"[{', '.join(map(in_text, default))}]"
    return str(default) if isinstance(default, dict) else type(default).__name__
