"""JSON Lines files with a truncated line."""

from __future__ import annotations

from pathlib import Path

import pytest

from descant.datamodules.sources.ledger import Ledger
from descant.modules.io import jsonl as lines


@pytest.mark.parametrize("cut", [b"", b'{"a": 1', b'{"a": 1}', b'\xff{"', b"[", b'{"b": "\xc3'])
def test_a_truncated_line_is_skipped(tmp_path: Path, cut: bytes) -> None:
    file = tmp_path / "x.jsonl"
    file.write_bytes(b'{"a": 0}\n' + cut)
    with file.open("ab+") as out:
        lines.append(out, b'{"a": 2}')
    whole = [{"a": 1}] if cut.endswith(b"}") else []
    assert lines.objects(file) == [{"a": 0}, *whole, {"a": 2}]
    assert file.read_bytes().endswith(b'\n{"a": 2}\n') and lines.objects(tmp_path / "none") == []


def test_a_ledger_continues_after_a_truncated_line(tmp_path: Path) -> None:
    Ledger(tmp_path).skip("a.tar", "one", "why")
    file = tmp_path / "ledger.jsonl"
    file.write_bytes(file.read_bytes() + b'{"file": "a.t')
    for _ in range(2):
        ledger = Ledger(tmp_path)
        ledger.skip("a.tar", "one", "why")
        ledger.skip("a.tar", "two", "why")
    assert [found["sample"] for found in lines.objects(file)] == ["one", "two"]
