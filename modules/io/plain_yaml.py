"""Read YAML from an untrusted source as plain values, within bounds."""

from __future__ import annotations

from typing import Any

import yaml

from descant.modules.core.errors import one_line

#: The most values in a file, including aliases (aliases of aliases expand exponentially), and most bits of an integer.
MOST, BITS = 100_000, 1000


def loads(text: str) -> Any:
    """Parse untrusted text as ``yaml.safe_load`` does.

    >>> loads("{a: [1, 2]}")
    {'a': [1, 2]}
    """
    try:
        content = yaml.safe_load(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError) as error:
        raise ValueError(f"not readable as YAML ({one_line(error, 200)})") from None  # a malformed scalar, such as 0x_
    left, todo = MOST, [content]
    while todo:  # nested aliases make millions of values out of a few lines
        value = todo.pop()
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        if isinstance(value, int) and value.bit_length() > BITS:
            raise ValueError(f"a number of more than {BITS} bits")
        left -= 1 + len(inner)
        if left < 0:
            raise ValueError(f"more than {MOST:,} values, aliases included")
        todo += [item for item in inner if isinstance(item, dict | list | int)]
    return content
