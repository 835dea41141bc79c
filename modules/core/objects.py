"""Constructor arguments: record them to rebuild a module in other sizes, describe them as plain data, check types."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

from descant.modules.core.errors import nearest


def record_arguments(arguments: Mapping[str, object]) -> dict[str, Any]:
    """Return the arguments in a constructor's ``locals()``, without ``self``: its class builds an equal module of them.

    >>> record_arguments({"self": object(), "width": 8, "__class__": object})
    {'width': 8}
    """
    return {name: value for name, value in arguments.items() if name not in ("self", "__class__")}


def describe_object(part: object) -> dict[str, Any]:
    """Return an object as plain data, ``class_path`` and ``init_args``; its attributes must hold its arguments.

    >>> from descant.modules.moe import TopKRouter
    >>> describe_object(TopKRouter(k=3))["init_args"]
    {'k': 3, 'norm': 'after', 'bias_rate': None}
    """
    cls, arguments = type(part), {}
    for name in inspect.signature(cls).parameters:
        if not hasattr(part, name):
            raise ValueError(f"{cls.__name__}: it does not keep its argument {name}, and cannot be saved as plain data")
        value = getattr(part, name)
        plain = value is None or isinstance(value, bool | int | float | str | list)
        arguments[name] = value if plain else describe_object(value)
    return {"class_path": f"{cls.__module__}.{cls.__qualname__}", "init_args": arguments}


def require_objects(owner: object, /, **given: tuple[object, type]) -> None:
    """Refuse an argument that is not an instance of its class; None is accepted.

    Args:
        owner: the object that takes the arguments. given: name -> the value, and its class.

    >>> from descant.modules.balance.ogm import OGM
    >>> from descant.modules.balance.base import Pacing
    >>> require_objects(object(), pacing=(OGM(), Pacing), other=(None, Pacing))
    >>> require_objects(object(), pacing=("ogm", Pacing))
    Traceback (most recent call last):
    ValueError: object: pacing is 'ogm', and an object of kind Pacing is wanted: descant.modules.balance.ogm.OGM()
    """
    suggestion: type | None
    for name, (value, kind) in given.items():
        if value is None or isinstance(value, kind):
            continue
        if inspect.isclass(value) and issubclass(value, kind):
            given_as, suggestion = f"the class {value.__name__}", value
        else:
            given_as = repr(value) if len(repr(value)) <= 60 else f"a {type(value).__name__}"
            suggestion = _nearest(str(value), kind)
        example = f": {suggestion.__module__}.{suggestion.__name__}()" if suggestion is not None else ""
        raise ValueError(
            f"{type(owner).__name__}: {name} is {given_as}, and an object of kind {kind.__name__} is wanted{example}"
        )


def _nearest(text: str, kind: type) -> type | None:
    """Return the subclass whose name is most similar to a text, otherwise the first that is not abstract."""
    known = {cls.__name__.lower(): cls for cls in _below(kind) if not cls.__name__.startswith("_")}
    if (near := nearest(text, known, cutoff=0.4)) is not None:
        return known[near]
    return next((cls for cls in known.values() if not inspect.isabstract(cls)), None)


def _below(kind: type) -> Iterator[type]:
    below: list[type] = kind.__subclasses__()
    for cls in below:
        yield from _below(cls)
        yield cls
    yield kind
