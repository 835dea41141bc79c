"""The source is written in the field's words: no literary register for masks, logits, logging and imputation."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

TOP = Path(__file__).resolve().parent.parent
#: Word or phrase -> what to write. Keys of files that earlier versions wrote are allowed: "told", "said".
BANNED = {
    r"told": "reported, listed, given",
    r"tells?": "reports, prints, explains",
    r"said": "given, predicted, answered",
    r"says": "has, reports, means",
    r"hears?|heard": "receives, sees, is masked from",
    r"nobody|anybody|whoever": "no user, any caller, who",
    r"likeliest": "greedy, most probable",
    r"in the same bits": "bit-identical",
    r"learns? of": "learn from",
    r"stands? still": "is frozen, is unchanged",
    r"stands? in for": "replaces, is imputed for",
    r"drowns?": "dominates",
    r"whose turn": "the one of this step",
    r"in the eyes of": "by",
}
#: Most lines have none of the words, which one search shows.
ANY = re.compile("|".join(BANNED), re.IGNORECASE)
#: Names of keys in files of runs, and of functions.
KEPT = re.compile(r"""cannot tell|["'`](said|told)["'`]|(archive|out)\.tell|tell:|_tell\(|\btell=|\btell\(""")


@pytest.mark.parametrize("part", ["recipes", "modules", "callbacks", "datamodules", "descant"])
def test_no_banned_word_is_in_the_source(part: str) -> None:
    found = []
    for file in sorted((TOP / part).rglob("*.py")):
        if any(p.is_symlink() for p in file.parents):
            continue
        for number, line in enumerate(file.read_text().splitlines(), 1):
            text = KEPT.sub("", line)
            for pattern, better in BANNED.items() if ANY.search(text) else ():
                if word := re.search(rf"\b({pattern})\b", text, re.IGNORECASE):
                    found.append(f"{file.relative_to(TOP)}:{number}: {word[0]!r}; better: {better}")
    assert not found, "\n".join(found)
