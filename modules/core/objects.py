"""Objects where objects are wanted: YAML makes them of names, and in Python a name alone is refused."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

from descant.modules.core.errors import nearest


def require_objects(owner: object, /, **given: tuple[object, type]) -> None:
    """Refuse an argument that is no object of its kind; None passes, as what is not given.

    Args:
        owner: who takes the arguments. given: name -> the value, and the class that it is an object of.

    Raises:
        ValueError: for the first that is not, with the nearest class of the kind.

    >>> from descant.modules.balance.ogm import OGM
    >>> from descant.modules.balance.base import Pacing
    >>> require_objects(object(), pacing=(OGM(), Pacing), other=(None, Pacing))
    >>> require_objects(object(), pacing=("ogm", Pacing))
    Traceback (most recent call last):
    ValueError: object: pacing is 'ogm', and an object of kind Pacing is wanted: descant.modules.balance.ogm.OGM()
    """
    found: type | None
    for name, (value, kind) in given.items():
        if value is None or isinstance(value, kind):
            continue
        if inspect.isclass(value) and issubclass(value, kind):
            given_as, found = f"the class {value.__name__}", value
        else:
            given_as = repr(value) if len(repr(value)) <= 60 else f"a {type(value).__name__}"
            found = _nearest(str(value), kind)
        wanted = f": {found.__module__}.{found.__name__}()" if found is not None else ""
        raise ValueError(
            f"{type(owner).__name__}: {name} is {given_as}, and an object of kind {kind.__name__} is wanted{wanted}"
        )


def _nearest(text: str, kind: type) -> type | None:
    """The class of a kind that is most like a text; where none is, the first that can be made."""
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
