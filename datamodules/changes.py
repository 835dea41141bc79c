"""Detect data that changed between a stop and a resume, by digests of names, sizes, texts and contents.

For each property of a corpus (sample names, file sizes, captions), a resume point holds a digest of all values, and
CRC-32s of up to ``PARTS`` runs of consecutive values, which locate a difference.
Letters: N values of a property, K runs of them.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from descant.datamodules.prepare.package import sha256_of
from descant.modules.core.errors import say

#: The most runs of values with their own CRC: 32 KiB of a resume point for each property.
PARTS = 4096
#: The content of a pack of at most this many bytes is always hashed, which takes a tenth of a second.
SMALL = 1 << 26
#: How many names a message lists.
_FEW = 3

Values = Sequence[str | None] | np.ndarray


@dataclass(frozen=True)
class DataPolicy:
    """Options of a command. ``allow``: resume with changed data. ``verify``: read and hash the content of all files.

    The command line puts it on its trainer as ``data_policy``; :attr:`DataModule.policy` reads it there.
    """

    allow: bool = False
    verify: bool = False


@dataclass
class Property:
    """One property of a corpus: N values, and ``name(n)``, the name of the sample or file that has the n-th value."""

    values: Values
    name: Callable[[int], str]

    def state(self, step: int | None = None) -> dict[str, Any]:
        """Return ``n``, ``step`` (values per run), ``digest`` of all values, and ``crc``, int64 ``[K]``.

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
        """Return the number of the first value in each run that differs from an earlier ``state``."""
        step = int(then["step"])
        now = self.state(step)
        if now["digest"] == then["digest"] and now["n"] == then["n"]:
            return []
        a, b = then["crc"].tolist(), now["crc"].tolist()
        runs = [k for k in range(len(b)) if k >= len(a) or a[k] != b[k]]
        return [k * step for k in runs] or [max(len(self.values) - 1, 0)]  # values are missing after the last


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
    """Properties of a source's samples and files.

    Args:
        place: place of the source, for messages.
        parts: property name, as in messages -> its values; ``samples`` are the sample names, in order.
        files: paths of the M files of the data, below ``root``.
        size_M, time_M: bytes and modification time of each file; -1 and 0 if it is missing.
        known: SHA-256 of some files, from a manifest.
        root: folder of ``files``.
        content: SHA-256 of all files, once they have been hashed.
    """

    place: str
    parts: dict[str, Property]
    files: Sequence[str]
    size_M: np.ndarray
    time_M: np.ndarray
    known: Mapping[str, str] = field(default_factory=dict)
    root: str = ""
    content: list[str] | None = None

    def hash_files(self, numbers: Sequence[int] | None = None) -> dict[int, str]:
        """Compute the SHA-256 of the content of some files, or of all; empty for a file that cannot be read."""
        chosen = range(len(self.files)) if numbers is None else numbers
        with ThreadPoolExecutor(8) as pool:
            return dict(zip(chosen, pool.map(_content, (Path(self.root, self.files[k]) for k in chosen)), strict=True))

    def verify(self) -> str | None:
        """Hash all files; return a message on the first whose SHA-256 differs from its manifest, or None."""
        if self.content is None:
            self.content = list(self.hash_files().values())
        for file, digest in zip(self.files, self.content, strict=True):
            if self.known.get(file, digest) != digest:
                return f"{Path(self.root, file)}: its content differs from its manifest (SHA-256)"
        return None

    def _contents(self) -> Property | None:
        """Return the SHA-256 of all files, as hashed, otherwise from manifests; None if some are unknown."""
        if self.content is not None:
            return Property(self.content, self._file)
        if self.files and all(file in self.known for file in self.files):
            return Property([self.known[file] for file in self.files], self._file)
        return None

    def _file(self, number: int) -> str:
        return Path(self.files[number]).name

    def state(self, verify: bool = False) -> dict[str, Any]:
        """Return plain values and tensors for a resume point; with ``verify``, hash the content of all files."""
        if verify and self.content is None:
            self.content = list(self.hash_files().values())
        contents = self._contents()
        return {
            "parts": {name: part.state() for name, part in self.parts.items()},
            "sizes": Property(self.size_M, self._file).state(),
            "times": Property(self.time_M, self._file).state(),
            "content": None if contents is None else contents.state(),
        }

    def changes(self, then: Mapping[str, Any], verify: bool = False) -> list[str]:
        """List the differences from an earlier ``state``, in a few words each.

        Modification times are only a hint, since copies have new ones. If times differ and the hashes of the content
        are known, the content decides. Otherwise, if only some files have new times, they were changed in place. If all
        files have new times, they were copied, which is reported but is no difference.
        """
        known = {name: part for name, part in self.parts.items() if name in then["parts"]}
        for name, part in known.items():
            was, now = then["parts"][name]["n"], len(part.values)
            if was != now:
                at = f", the first difference at {part.name(part.differing(then['parts'][name])[0])}" if now else ""
                return [f"{was:,} {name} then and {now:,} now{at}"]
        differences = [
            _change_text(name, part, rows, then["parts"][name])
            for name, part in known.items()
            if (rows := part.differing(then["parts"][name]))
        ]
        if then["sizes"]["n"] != len(self.files):
            return [*differences, f"{then['sizes']['n']:,} files then and {len(self.files):,} now"]
        sizes = Property(self.size_M, self._file)
        if rows := sizes.differing(then["sizes"]):
            differences.append(_change_text("sizes", sizes, rows, then["sizes"]))
        return differences or self._rewritten(then, verify)

    def _rewritten(self, then: Mapping[str, Any], verify: bool) -> list[str]:
        """List the differences in the content of files that have the same names and sizes."""
        old, times = then["content"], Property(self.time_M, self._file)
        newer = times.differing(then["times"])
        if old is not None and (verify or newer):
            step = int(old["step"])
            chosen = sorted({n for first in newer for n in range(first, min(first + step, len(self.files)))})
            digests = self.hash_files(None if verify else chosen)
            expected = old["crc"].tolist()
            rows = [
                first
                for first in range(0, len(self.files), step)
                if first in digests
                and zlib.crc32(_bytes([digests[n] for n in range(first, min(first + step, len(self.files)))]))
                != expected[first // step]
            ]
            return [_change_text("contents", times, rows, old)] if rows else []
        if verify:
            say(f"{self.place}: the run began without --verify, so changes of the content cannot be detected")
        if newer and len(newer) < len(then["times"]["crc"]):
            return [_change_text("modification times", times, newer, then["times"])]
        if newer:
            say(f"{self.place}: all files have new modification times, as copies have; all else is as before")
        return []


def corpus_of(
    place: str, parts: dict[str, Property], files: Sequence[Path], known: Mapping[str, str] | None = None
) -> Corpus:
    """Build the corpus of existing files, with their sizes and modification times."""
    stats = [file.stat() for file in files]
    size_M = np.array([status.st_size for status in stats], dtype=np.int64)
    time_M = np.array([status.st_mtime_ns for status in stats], dtype=np.int64)
    return Corpus(place, parts, [str(file) for file in files], size_M, time_M, known or {})


def pack(folder: Path) -> Corpus:
    """Build the corpus of a folder that ships with its data module: names and sizes of its files.

    For a small folder, it includes the files' contents. It omits notices, licences, and modification times, which are
    those of the installation.
    Modification times are those of the installation and left out; so are notices and licences.
    """
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.suffix not in (".md", ".pyc"))
    names = [file.relative_to(folder).as_posix() for file in files]
    size_M = np.array([file.stat().st_size for file in files], dtype=np.int64)
    parts = {"files": Property(names, lambda n: names[n])}
    corpus = Corpus(str(folder), parts, names, size_M, np.zeros_like(size_M), root=str(folder))
    if size_M.sum() <= SMALL:
        corpus.parts["contents"] = Property(list(corpus.hash_files().values()), lambda n: names[n])
    return corpus


def _change_text(what: str, part: Property, rows: Sequence[int], then: Mapping[str, Any]) -> str:
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


def require(corpora: Mapping[str, Corpus], then: Mapping[str, Any], policy: DataPolicy) -> None:
    """Compare the corpora with the states in a resume point."""
    for name, corpus in corpora.items():
        differences = corpus.changes(then[name], policy.verify) if name in then else []
        if not differences:
            continue
        line = f"{corpus.place}: the data has changed since the run was saved: {'; '.join(differences)}"
        if not policy.allow:
            raise ValueError(f"{line}; --changed allow goes on with it")
        say(line)
