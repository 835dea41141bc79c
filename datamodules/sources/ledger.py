"""Log of skipped samples (``ledger.jsonl``): too many failures in a row are an error."""

from __future__ import annotations

import json
import os
from pathlib import Path

from descant.modules.io.jsonl import append

try:
    import fcntl
except ImportError:  # not on Windows, where two processes might note one sample twice
    fcntl = None  # type: ignore[assignment]


class Ledger:
    """Counter of unreadable samples, which writes one JSON line each to ``ledger.jsonl`` in the run folder.

    Processes may share the file: each sample is noted once, whatever the processes and epochs.

    Args:
        folder: folder of the file; None only counts.
        in_a_row: this many failures without a success in between are an error: the data is broken, not a sample.

    >>> ledger = Ledger(None, in_a_row=2)
    >>> ledger.skip("a.tar", "cat.jpg", "truncated"); ledger.read(); ledger.skipped
    1
    """

    def __init__(self, folder: Path | None, in_a_row: int = 20) -> None:
        self.path = folder / "ledger.jsonl" if folder is not None else None
        self.in_a_row, self.skipped, self._streak = in_a_row, 0, 0
        self._noted: set[bytes] = set()  # the lines of the file up to _end
        self._end = 0

    def read(self) -> None:
        """Note a sample that could be read."""
        self._streak = 0

    def skip(self, file: str, sample: str, why: str) -> None:
        """Note a sample that could not be read. Raise ValueError after ``in_a_row`` of them."""
        self._streak += 1
        self.lose(file, sample, why)
        if self._streak >= self.in_a_row:
            raise ValueError(f"{file}: {self._streak} samples in a row cannot be read; the last is {sample}: {why}")

    def lose(self, file: str, sample: str, why: str) -> None:
        """Note a loss that is known before reading; it does not count towards ``in_a_row``."""
        self.skipped += 1
        self._note(json.dumps({"file": file, "sample": sample, "why": why}).encode())

    def read_lines(self) -> list[dict[str, str]]:
        """Return all lines of the file, by any process; empty if there is no file."""
        if self.path is None or not self.path.exists():
            return []
        return [json.loads(line) for line in self.path.read_bytes().splitlines()]

    def _note(self, line: bytes) -> None:
        if self.path is None or line in self._noted:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab+") as file:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(self._end)  # lines of other processes
            self._noted.update(file.read().splitlines())
            if line not in self._noted:
                append(file, line)
                self._noted.add(line)
            self._end = file.seek(0, os.SEEK_END)
