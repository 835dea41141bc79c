"""Whether the data of a run is still what it was: digests of names, sizes, texts and contents, kept in resume points.

Of each property of a corpus (the names of its samples, the sizes of its files, its captions) two things are kept: a
digest of all, and CRC-32s of up to ``PARTS`` runs of consecutive values, by which a difference is found and named.
Letters: N values of a property, K runs of them.
"""

from __future__ import annotations

import hashlib
import sys
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from descant.datamodules.prepare.package import sha256_of

#: Runs of values that have a CRC of their own at most: 16 KiB of a resume point for each property.
PARTS = 4096
#: Bytes of a pack whose content is always read: a tenth of a second.
SMALL = 1 << 26
#: Names that a line says.
_FEW = 3

Values = Sequence[str | None] | np.ndarray


@dataclass
class Rules:
    """What the call said. ``allow``: go on with changed data. ``verify``: read and hash the content of all files."""

    allow: bool = False
    verify: bool = False


#: Of this process; the command line sets it before anything is read.
rules = Rules()


@dataclass
class Property:
    """One property of a corpus: N values, and ``name(n)`` of what has the n-th."""

    values: Values
    name: Callable[[int], str]

    def state(self, step: int | None = None) -> dict[str, Any]:
        """``n``, ``step`` values a run, ``digest`` of all, ``crc`` int64 ``[K]``.

        >>> state = Property(["a", "b"], str).state()
        >>> state["n"], state["step"], state["crc"].tolist() == [zlib.crc32(b"a"), zlib.crc32(b"b")]
        (2, 1, True)
        """
        n = len(self.values)
        step = step or max(-(-n // PARTS), 1)
        runs = [_bytes(self.values[low : low + step]) for low in range(0, n, step)]
        digest = hashlib.blake2b(digest_size=16)
        for run in runs:
            digest.update(run)
        crc = torch.tensor([zlib.crc32(run) for run in runs], dtype=torch.int64)
        return {"n": n, "step": step, "digest": digest.hexdigest(), "crc": crc}

    def differing(self, then: Mapping[str, Any]) -> list[int]:
        """The first value of each run that is not as it was."""
        step = int(then["step"])
        now = self.state(step)
        if now["digest"] == then["digest"] and now["n"] == then["n"]:
            return []
        a, b = then["crc"].tolist(), now["crc"].tolist()
        runs = [k for k in range(len(b)) if k >= len(a) or a[k] != b[k]]
        return [k * step for k in runs] or [max(len(self.values) - 1, 0)]  # what is gone stood behind the last


def _bytes(values: Values) -> bytes:
    if isinstance(values, np.ndarray):
        return values.tobytes()
    marks = ""
    if None in values:
        marks = "".join("01"[value is None] for value in values) + "\1"
        values = [value for value in values if value is not None]
    return (marks + "\0".join(values)).encode("utf-8", "surrogatepass")  # type: ignore[arg-type]  # none is None now


@dataclass
class Corpus:
    """What a source was made of.

    Args:
        place: of the source, for messages.
        parts: property, as a message calls it -> its values; ``samples`` are their names, in order.
        files: paths of the M files that the data lies in, below ``root``.
        size_M, time_M: of each file, bytes and time of change; -1 and 0 where it is missing.
        known: SHA-256 of some, as a manifest tells.
    """

    place: str
    parts: dict[str, Property]
    files: Sequence[str]
    size_M: np.ndarray
    time_M: np.ndarray
    known: Mapping[str, str] = field(default_factory=dict)
    root: str = ""
    content: list[str] | None = None

    def hashed(self, numbers: Sequence[int] | None = None) -> dict[int, str]:
        """SHA-256 of the content of some files, or of all; empty for one that cannot be read."""
        chosen = range(len(self.files)) if numbers is None else numbers
        with ThreadPoolExecutor(8) as pool:
            return dict(zip(chosen, pool.map(_content, (Path(self.root, self.files[k]) for k in chosen)), strict=True))

    def verify(self) -> str | None:
        """Hash all files, and say what is wrong with the first that is not what a manifest tells."""
        if self.content is None:
            self.content = list(self.hashed().values())
        for file, digest in zip(self.files, self.content, strict=True):
            if self.known.get(file, digest) != digest:
                return f"{Path(self.root, file)}: its content is not what its manifest tells (SHA-256)"
        return None

    def _contents(self) -> Property | None:
        """What is known of the content of all files: hashed, else by manifests; None where some are not known."""
        if self.content is not None:
            return Property(self.content, self._file)
        if self.files and all(file in self.known for file in self.files):
            return Property([self.known[file] for file in self.files], self._file)
        return None

    def _file(self, number: int) -> str:
        return Path(self.files[number]).name

    def _sizes(self) -> Property:
        return Property(self.size_M, self._file)

    def _times(self) -> Property:
        return Property(self.time_M, self._file)

    def state(self) -> dict[str, Any]:
        """Of plain values and tensors, for a resume point."""
        if rules.verify and self.content is None:
            self.content = list(self.hashed().values())
        contents = self._contents()
        return {
            "parts": {name: part.state() for name, part in self.parts.items()},
            "sizes": self._sizes().state(),
            "times": self._times().state(),
            "content": None if contents is None else contents.state(),
        }

    def changes(self, then: Mapping[str, Any]) -> list[str]:
        """What is not as it was, in a few words each; empty where nothing is.

        Times of change are a hint only, as copies have new ones. Where they differ the content decides, if it is
        known. If it is not, files of which some have new times and others have not were changed in their place; if all
        have new times, they were copied, which is told and nothing more.
        """
        known = {name: part for name, part in self.parts.items() if name in then["parts"]}
        for name, part in known.items():
            was, now = then["parts"][name]["n"], len(part.values)
            if was != now:
                at = f", the first difference at {part.name(part.differing(then['parts'][name])[0])}" if now else ""
                return [f"{was:,} {name} then and {now:,} now{at}"]
        found = [
            _told(name, part, rows, then["parts"][name])
            for name, part in known.items()
            if (rows := part.differing(then["parts"][name]))
        ]
        if then["sizes"]["n"] != len(self.files):
            return [*found, f"{then['sizes']['n']:,} files then and {len(self.files):,} now"]
        if rows := self._sizes().differing(then["sizes"]):
            found.append(_told("sizes", self._sizes(), rows, then["sizes"]))
        return found or self._rewritten(then)

    def _rewritten(self, then: Mapping[str, Any]) -> list[str]:
        """Of files that have the same names and sizes: whether their content is what it was."""
        old, times = then["content"], self._times()
        newer = times.differing(then["times"])
        if old is not None and (rules.verify or newer):
            step = int(old["step"])
            chosen = sorted({n for first in newer for n in range(first, min(first + step, len(self.files)))})
            digests = self.hashed(None if rules.verify else chosen)
            expected = old["crc"].tolist()
            rows = [
                first
                for first in range(0, len(self.files), step)
                if first in digests
                and zlib.crc32(_bytes([digests[n] for n in range(first, min(first + step, len(self.files)))]))
                != expected[first // step]
            ]
            return [_told("contents", times, rows, old)] if rows else []
        if rules.verify:
            tell(f"{self.place}: the run began without --verify, so nothing tells whether the content is what it was")
        if newer and len(newer) < len(then["times"]["crc"]):
            return [_told("times of change", times, newer, then["times"])]
        if newer:
            tell(f"{self.place}: all files have new times of change, as copies have; all else is as before")
        return []


def pack(folder: Path) -> Corpus:
    """Of a folder that ships with its data module: names, sizes and, where they are few, contents of its files.

    Their times of change are those of an installation, and say nothing; notices and licences are no data.
    """
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.suffix not in (".md", ".pyc"))
    names = [file.relative_to(folder).as_posix() for file in files]
    size_M = np.array([file.stat().st_size for file in files], dtype=np.int64)
    parts = {"files": Property(names, lambda n: names[n])}
    found = Corpus(str(folder), parts, names, size_M, np.zeros_like(size_M), root=str(folder))
    if size_M.sum() <= SMALL:
        found.parts["contents"] = Property(list(found.hashed().values()), lambda n: names[n])
    return found


def _told(what: str, part: Property, rows: Sequence[int], then: Mapping[str, Any]) -> str:
    if sorted(part.state(int(then["step"]))["crc"].tolist()) == sorted(then["crc"].tolist()) and then["step"] == 1:
        what = f"the same {what} in another order"
    else:
        what = f"other {what}"
    few = ", ".join(part.name(row) for row in rows[:_FEW])
    near = "" if then["step"] == 1 else f" or in the {then['step'] - 1} after each"
    more = f" and {len(rows) - _FEW:,} more" if len(rows) > _FEW else ""
    return f"{what}: {few}{more}{near}"


def _content(file: Path) -> str:
    try:
        return sha256_of(file)
    except (OSError, ValueError):
        return ""


def require(corpora: Mapping[str, Corpus], then: Mapping[str, Any]) -> None:
    """Compare with what a resume point says.

    Raises:
        ValueError: in one line, where the data is not what it was, unless the call allows that.
    """
    for name, corpus in corpora.items():
        lines = corpus.changes(then[name]) if name in then else []
        if not lines:
            continue
        line = f"{corpus.place}: the data is not what it was when the run was saved: {'; '.join(lines)}"
        if not rules.allow:
            raise ValueError(f"{line}; --changed allow goes on with it")
        tell(line)


def tell(line: str) -> None:
    """One line to the user, beside the output of the program."""
    print(f"descant: {line}", file=sys.stderr, flush=True)
