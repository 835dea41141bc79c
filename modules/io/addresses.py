"""Expand braces in addresses, within bounds. The check of an address and its reader both expand it here, first."""

from __future__ import annotations

import math
import re

from braceexpand import braceexpand

#: The most addresses that one text may expand to, and the most braces in it.
MOST, BRACES = 100_000, 100
_INNERMOST, _COUNT = re.compile(r"\{([^{}]*)\}"), re.compile("\0(\\d+)\0")
_RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)(?:\.\.-?(\d+))?$")


def expand(text: str) -> list[str]:
    """Return the addresses that a text with braces stands for. A text without braces stands for itself.

    >>> expand("{h,H}ttp://a/{08..09}.tar")[:3], expand("a.tar")
    (['http://a/08.tar', 'http://a/09.tar', 'Http://a/08.tar'], ['a.tar'])
    """
    if "{" not in text:
        return [text]
    if "\0" in text or text.count("{") > BRACES or _count(text) > MOST:
        raise ValueError(f"{text[:60]!r}: more than {MOST:,} addresses, or more than {BRACES} braces")
    return list(braceexpand(text))


def _count(text: str) -> int:
    """Count the addresses before any is made: each group of braces becomes its number of choices, innermost first."""
    text = re.sub(r"\\.", "", text, flags=re.DOTALL)
    while group := _INNERMOST.search(text):
        span = _RANGE.match(group[1])
        if span:
            choices = abs(int(span[2]) - int(span[1])) // (int(span[3] or 1) or 1) + 1
        elif re.match(r"[A-Za-z]\.\.[A-Za-z]", group[1]):
            choices = 52
        else:
            choices = sum(_product(part) for part in group[1].split(","))
        text = f"{text[: group.start()]}\0{choices}\0{text[group.end() :]}"
    return _product(text)


def _product(text: str) -> int:
    return math.prod(map(int, _COUNT.findall(text)))
