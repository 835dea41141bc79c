"""Plain values of a checkpoint as exact JSON, without the tensors; reading it back runs no code.

``torch.save`` writes a pickle, and so does torch's distributed checkpoint for its metadata. Numbers, texts and
containers of them need no pickle: JSON holds lists, texts, booleans, null, integers of any size and floats to the bit
(the shortest text that reads back as the same number; NaN and infinities by name). Any other type becomes an object
with one key, which begins with ``$``.
"""

from __future__ import annotations

import base64
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_PLAIN = (type(None), bool, int, float, str)


def encode(value: Any, key_of: Callable[[Tensor, str], str], place: str = "") -> Any:
    """Convert ``value`` to what ``json`` writes; the result shares nothing with ``value``.

    Args:
        key_of: function of a tensor and its place; returns the name under which the tensor is stored elsewhere.
        place: of the value, for errors and names: keys and indices joined by dots.

    >>> text = encode({"a": (1, 2.5), 3: b"x"}, lambda tensor, place: place)
    >>> text
    {'$dict': [['a', {'$tuple': [1, 2.5]}], [3, {'$bytes': 'eA=='}]]}
    >>> decode(text, str)
    {'a': (1, 2.5), 3: b'x'}
    """

    def inner(item: Any, key: object) -> Any:
        return encode(item, key_of, f"{place}.{key}" if place else str(key))

    kind = type(value)
    if kind in _PLAIN:
        return value
    if isinstance(value, Tensor):
        return {"$tensor": key_of(value, place)}
    if kind is list:
        return [inner(item, n) for n, item in enumerate(value)]
    if kind is tuple or kind is set or kind is torch.Size:
        return {f"${kind.__name__.lower()}": [inner(item, n) for n, item in enumerate(value)]}
    if kind is dict:
        if all(type(key) is str and not key.startswith("$") for key in value):
            return {key: inner(item, key) for key, item in value.items()}
        return {"$dict": _pairs(value, inner)}
    if kind is OrderedDict:  # a state dict keeps the versions of its modules in an attribute, which loading reads
        return {"$ordered": [_pairs(value, inner), inner(getattr(value, "_metadata", None), "_metadata")]}
    if kind is Counter:
        return {"$counter": _pairs(value, inner)}
    if kind is bytes or kind is bytearray:
        return {f"${kind.__name__}": base64.b64encode(value).decode()}
    if kind is complex:
        return {"$complex": [value.real, value.imag]}
    if kind is torch.dtype or kind is torch.device:
        return {f"${kind.__name__}": str(value).removeprefix("torch.")}
    name = f"{kind.__module__}.{kind.__qualname__}"
    raise ValueError(f"{place or 'checkpoint'}: {name} is no tensor, number, text or container of them: not saved")


def _pairs(value: dict[Any, Any], inner: Callable[[Any, object], Any]) -> list[Any]:
    return [[inner(key, "key"), inner(item, key)] for key, item in value.items()]


def decode(value: Any, tensor_of: Callable[[str], Any]) -> Any:
    """Invert :func:`encode`. ``tensor_of`` returns the tensor of a name."""

    def pairs(items: Any) -> list[tuple[Any, Any]]:
        return [(decode(key, tensor_of), decode(item, tensor_of)) for key, item in items]

    if type(value) in _PLAIN:
        return value
    if isinstance(value, list):
        return [decode(item, tensor_of) for item in value]
    if len(value) != 1 or not next(iter(value)).startswith("$"):
        return {key: decode(item, tensor_of) for key, item in value.items()}
    ((kind, content),) = value.items()
    try:
        if kind == "$tensor":
            return tensor_of(content)
        if kind in ("$tuple", "$set", "$size"):
            return {"$tuple": tuple, "$set": set, "$size": torch.Size}[kind](decode(content, tensor_of))
        if kind == "$dict":
            return dict(pairs(content))
        if kind == "$ordered":
            ordered: OrderedDict[Any, Any] = OrderedDict(pairs(content[0]))
            if content[1] is not None:
                ordered._metadata = decode(content[1], tensor_of)  # type: ignore[attr-defined]
            return ordered
        if kind == "$counter":
            return Counter(dict(pairs(content)))
        if kind in ("$bytes", "$bytearray"):
            data = base64.b64decode(content, validate=True)
            return data if kind == "$bytes" else bytearray(data)
        if kind == "$complex":
            return complex(*content)
        if kind == "$device":
            return torch.device(content)
        if kind == "$dtype" and isinstance(dtype := getattr(torch, content, None), torch.dtype):
            return dtype
    except (TypeError, ValueError, KeyError, RuntimeError) as error:
        raise ValueError(f"not a plain value: {kind} ({error})") from None
    raise ValueError(f"not a plain value: {kind}")
