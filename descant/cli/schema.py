"""Schema of configurations as plain data: argument names, types, defaults; no torch, no imports of classes.

The parser itself (:mod:`descant.cli.signatures`) and a cached copy (:mod:`descant.cli.dump`) implement it.

A type is a list of parts, any of which a value may be: "null", "int", "float", "bool", "str", "any", {"choice": words},
{"list": type}, {"map": type}, {"class": path, "skip": number of arguments that the program gives a factory},
{"other": name}.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from descant.cli.dump import Written
    from descant.cli.signatures import Live

#: A part of a type; a type.
Part = str | dict[str, Any]
Type = list[Part]
#: The cached schema, or that of a live parser, which has the same methods.
Schema: TypeAlias = "Written | Live"


@dataclass(frozen=True)
class Key:
    """One argument: type, default as text (None if it is required), and help text."""

    type: Type
    default: str | None = None
    about: str = ""


@dataclass(frozen=True)
class Entry:
    """One class: import path, paths of its bases, and its arguments in order."""

    path: str
    lineage: Sequence[str]
    keys: Mapping[str, Key]
    required: Sequence[str] = ()
    abstract: bool = False
    about: str = ""
    source: Any = field(default=None, compare=False, repr=False)

    @property
    def name(self) -> str:
        return self.path.rpartition(".")[2]


class Unknown(Exception):
    """Raised for a class of a module that is not in the cache; only the parser resolves it."""


class Ambiguous(LookupError):
    """Raised for a short name that several classes have."""


# types --------------------------------------------------------------------------------------------------------------


def parts(type: Type, of: str) -> Iterator[Any]:
    """Yield the values of ``of`` in the parts that have it."""
    yield from (part[of] for part in type if isinstance(part, dict) and of in part)


def classes(type: Type) -> list[Part]:
    """Return the parts that ``class_path`` and ``init_args`` may build, directly or by a factory."""
    return [part for part in type if isinstance(part, dict) and "class" in part]


def items(type: Type) -> Type | None:
    """Return the type of the items of a list, or None."""
    return [part for inner in parts(type, "list") for part in inner] or None


def values(type: Type) -> Type | None:
    """Return the type of the values of a mapping, or None."""
    return [part for inner in parts(type, "map") for part in inner] or None


def nested_classes(type: Type) -> Iterator[dict[str, Any]]:
    """Yield all class parts of a type, at any depth."""
    for part in type:
        if isinstance(part, dict):
            if "class" in part:
                yield part
            yield from nested_classes(part.get("list") or part.get("map") or [])


def has_classes(type: Type) -> bool:
    return next(nested_classes(type), None) is not None


def names_class(value: object) -> bool:
    """Whether a value of a configuration is a class, with or without its arguments.

    >>> names_class({"class_path": "KNN", "init_args": {"k": 1}}), names_class({"k": 1}), names_class("KNN")
    (True, False, False)
    """
    return isinstance(value, Mapping) and isinstance(value.get("class_path"), str)


def takes_text(type: Type) -> bool:
    """Whether a text can be a value by itself, so that it need not name a class or a file."""
    return any(part in ("str", "any") or (isinstance(part, dict) and "choice" in part) for part in type)


def calls(type: Type) -> bool:
    """Whether a value may be a function or an object that is called directly; a factory of classes is not.

    >>> calls([{"list": [{"other": "Callable[[int], float]"}]}, "null"]), calls([{"class": "a.B", "skip": 1}])
    (True, False)
    """
    inner = (part for of in ("list", "map") for part in parts(type, of))
    return any("Callable" in name for name in parts(type, "other")) or any(map(calls, inner))


def kinds(some: Sequence[Part]) -> str:
    """Join the names of kinds, for an error line."""
    return " or ".join(dict.fromkeys(part["class"].rpartition(".")[2] for part in some if isinstance(part, dict)))


_WORDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "a text", "any": "anything"}


def in_words(type: Type) -> str:
    """Describe a type in plain words.

    >>> in_words(["int", "null"]), in_words([{"map": ["float"]}]), in_words([{"list": [{"list": ["int"]}]}])
    ('a whole number or null', 'a mapping of names to numbers', 'a list of lists of whole numbers')
    """
    words: list[str] = []
    for part in type:
        if isinstance(part, str):
            words.append(_WORDS.get(part, part))
        elif "choice" in part:
            words += [str(choice) for choice in part["choice"]]
        elif "list" in part:
            words.append(f"a list of {_many(in_words(part['list']))}" if part["list"] else "a list")
        elif "map" in part:
            words.append(f"a mapping of names to {_many(in_words(part['map']))}" if part["map"] else "a mapping")
        else:
            words.append(f"a class of kind {kinds([part])}" if "class" in part else part["other"])
    unique = list(dict.fromkeys(words))
    unique.sort(key=lambda word: word == "null")
    return unique[0] if len(unique) == 1 else f"{', '.join(unique[:-1])} or {unique[-1]}"


def _many(word: str) -> str:
    """Return the plural of a type's words; a choice stays unchanged."""
    if " or " in word or not word.startswith("a "):
        return word
    noun, of, rest = word.removeprefix("a ").partition(" of ")
    return f"{noun}{'es' if noun.endswith('s') else 's'}{of}{rest}"


def fits(type: Type, value: Any) -> bool:
    """Whether a value may be of a type; True if only the parser can decide.

    >>> fits(["int", "null"], 3), fits(["int"], 3.5), fits([{"list": ["float"]}], ["x"]), fits(["int"], "3")
    (True, False, False, True)
    """
    return not type or any(_fits(part, value) for part in type)


def _fits(part: Part, value: Any) -> bool:
    if isinstance(part, dict):
        if "choice" in part:
            return value in part["choice"] or (isinstance(value, str) and _number(value) in part["choice"])
        if "list" in part:
            return isinstance(value, list) and all(fits(part["list"], item) for item in value)
        if "map" in part:
            return isinstance(value, dict) and all(fits(part["map"], item) for item in value.values())
        return "other" in part or isinstance(value, str | dict)
    if part == "null":
        return value is None or (isinstance(value, str) and _number(value) is None)
    if part == "str":
        return isinstance(value, str)
    if part == "any":
        return True
    plain = _number(value) if isinstance(value, str) else value
    if part == "bool":
        return isinstance(plain, bool)
    number = (int, float) if part == "float" else (int,)
    return isinstance(plain, number) and not isinstance(plain, bool)


def _number(text: str) -> Any:
    """Return the value that the parser reads from a text."""
    import yaml

    from descant.modules.core.compat.jsonargparse import get_yaml_default_loader

    try:
        return yaml.load(text, get_yaml_default_loader())  # safe: it is a SafeLoader that reads 1e-3 as a number
    except (yaml.YAMLError, ValueError, TypeError, AttributeError):  # 0x_ looks like a number but is not
        return text
