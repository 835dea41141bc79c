"""A slice of ``make fuzz``: no reader fails on a damaged file in another way than by a line."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import fuzz
from tests.rotation import rotation


@pytest.mark.slow
@pytest.mark.parametrize("kind", fuzz.KINDS)
def test_the_files_are_valid_before_they_are_damaged(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fuzz, "mutated", lambda data, rng: data)
    monkeypatch.setenv("DESCANT_CACHE", str(tmp_path / "cache"))
    assert fuzz.case(kind, 0, tmp_path / "case") == "read"


@pytest.mark.slow
def test_twenty_seconds_find_nothing() -> None:
    tally = fuzz.fuzz(20.0, seed=int(rotation()[:6], 16) if rotation() != "none" else 0)
    assert not tally.findings, tally.findings[:3]
    assert {kind for kind, _ in tally.cases} == set(fuzz.KINDS)


def crash(folder: Path) -> None:
    os.abort()


def hang(folder: Path) -> None:
    while True:
        pass


def fill(folder: Path) -> None:
    held = bytearray(b"a") * (2 * fuzz.MEMORY)
    assert held


def elsewhere(folder: Path) -> None:
    (folder.parent.parent / "fuzz-wrote-this").write_text("")


def process(folder: Path) -> None:
    os.system("true")


def wrong(folder: Path) -> None:
    raise KeyError("a")


def lines(folder: Path) -> None:
    raise ValueError("a\nb" * 2000)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("read", "what"),
    [
        (crash, "the process ended with status"),
        (hang, "more than 1 s"),
        (fill, "GB of memory"),
        (elsewhere, "outside the folder: ["),
        (process, "os.system"),
        (wrong, "KeyError: 'a'"),
        (lines, "AssertionError"),
    ],
)
def test_all_findings_are_detected(read: Callable[[Path], object], what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if read is hang:  # the others may need more on a machine that is busy
        monkeypatch.setattr(fuzz, "SECONDS", 1.0)
    monkeypatch.setattr(fuzz, "MEMORY", 1 << 27)
    monkeypatch.setitem(fuzz.KINDS, "odd", fuzz.Kind(lambda: {"a": b"a"}, ("a",), read))
    fuzz.valid.cache_clear()
    tally = fuzz.fuzz(60.0, seed=3, only="odd", cases=1)
    assert [(kind, seed) for kind, seed, _ in tally.findings] == [("odd", 3)] and what in tally.findings[0][2]
