"""A Debian package as a source of data: fetched by name with the user's own apt, or given as a file; unpacked once.

No root and no dpkg: a ``.deb`` is an ``ar`` archive with a ``data.tar`` inside. The order of this file is the order of
the method: look in the cache, fetch, check the hash, unpack within bounds into a temporary folder, rename it.
"""

from __future__ import annotations

import contextlib
import errno
import gzip
import hashlib
import importlib
import io
import lzma
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

# Far above any package of data (tuxpaint-stamps-default: 10,800 members, 142 MB decoded), far below a full disk.
MAX_MEMBERS = 200_000
MAX_DECODED_BYTES = 2 * 2**30
PIECE = 1 << 20


@dataclass(frozen=True)
class Deb:
    """A package by name, and the content that is known.

    Attributes:
        name: as apt knows it.
        known: SHA-256 of the whole ``.deb`` -> its version.
        under: only what lies in this folder of the package is unpacked, and what leads there is left out.
    """

    name: str
    known: Mapping[str, str]
    under: str = ""


def cache_folder() -> Path:
    """Where fetched data is kept: ``$DESCANT_CACHE``, or ``descant`` in the platform's folder for caches."""
    if given := os.environ.get("DESCANT_CACHE"):
        return Path(given)
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local"))
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "descant"


def unpacked(deb: Deb, file: Path | None = None, accept: Sequence[str] = (), cache: Path | None = None) -> Path:
    """The folder with the package's content, named by its SHA-256: at once where it is there, else fetched.

    Args:
        deb: which package.
        file: a ``.deb`` to take instead of asking apt.
        accept: more SHA-256 to believe, beside the known ones.
        cache: of all packages; :func:`cache_folder` where not given.

    Raises:
        ValueError: where apt cannot fetch it, the hash is unknown, or the file is broken or hostile.
    """
    home = (cache or cache_folder()) / deb.name
    for sha in accept:
        if len(sha) != 64 or set(sha) - set("0123456789abcdef"):
            raise ValueError(f"accept: {sha!r} is not a SHA-256 (64 hexadecimal digits, lower case)")
    if file is None:
        for sha in (*accept, *deb.known):
            if (home / sha).is_dir():
                return home / sha
    elif not file.is_file():
        raise ValueError(f"deb: {file}: no such file")
    with contextlib.ExitStack() as stack:
        if file is None:
            file = apt_download(deb.name, Path(stack.enter_context(scratch(home))))
        sha = sha256_of(file)
        if sha not in {*deb.known, *accept}:
            with file.open("rb") as archive:
                _data_member(file, archive)  # where the file is cut short, that is the news
            known = ", ".join(f"{s[:12]}... ({version})" for s, version in deb.known.items())
            fault = f"SHA-256 {sha} is not a known {deb.name} ({known})"
            raise ValueError(f"{file.name}: {fault}; to use it all the same: accept: [{sha}]")
        target = home / sha
        if not target.is_dir():
            folder = Path(stack.enter_context(scratch(home))) / "content"
            folder.mkdir()
            unpack(file, folder, deb.under)
            move_into_place(folder, target)
        return target


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def scratch(home: Path) -> Iterator[str]:
    """A temporary folder beside what will be renamed out of it; gone at the end, whatever happens."""
    try:
        home.mkdir(parents=True, exist_ok=True)
        folder = tempfile.mkdtemp(prefix=".part-", dir=home)
    except OSError as error:
        raise ValueError(f"{home}: cannot write here ({error.strerror}); DESCANT_CACHE names another folder") from None
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def move_into_place(folder: Path, target: Path) -> None:
    """Rename a finished folder. Where another process was first, its copy stays: both hold the same."""
    try:
        folder.rename(target)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.EACCES) or not target.is_dir():
            raise


# fetch ---------------------------------------------------------------------------------------------------------


def apt_download(name: str, folder: Path) -> Path:
    """The ``.deb`` that ``apt-get download NAME`` puts into ``folder``.

    Raises:
        ValueError: one line that says to run ``apt-get update``, or to give a file.
    """
    apt = shutil.which("apt-get")
    if apt is None:
        raise ValueError(f"{name}: there is no apt-get here to fetch it with; give the package as a file: deb: PATH")
    print(f"descant: fetching {name} with apt-get download, once", file=sys.stderr, flush=True)
    result = subprocess.run([apt, "download", name], cwd=folder, capture_output=True, text=True, check=False)
    found = sorted(folder.glob("*.deb"))
    if result.returncode or not found:
        said = [line for line in result.stderr.splitlines() if line.startswith("E:")] or ["no .deb came"]
        raise ValueError(
            f"`apt-get download {name}` failed ({said[0].removeprefix('E:').strip()}): "
            "run `apt-get update` once, or give the package as a file: deb: PATH"
        )
    return found[0]


# unpack --------------------------------------------------------------------------------------------------------


def unpack(file: Path, folder: Path, under: str = "") -> None:
    """Write the regular files of a ``.deb`` into ``folder``, with ``under`` cut off their names.

    Raises:
        ValueError: naming the file and what is wrong with it: no ar archive, a name that climbs out, a link or device,
            too many members, too many decoded bytes, or an end too early.
    """
    prefix = PurePosixPath(under).parts
    members = 0
    with file.open("rb") as archive:
        name, start, size = _data_member(file, archive)
        with _decompressed(file, name, _Window(archive, start, size)) as stream:
            counted = _Counted(file, stream)
            try:
                with tarfile.open(fileobj=counted, mode="r|") as tar:
                    for member in tar:
                        members += 1
                        if members > MAX_MEMBERS:
                            raise ValueError(f"{file.name}: more than {MAX_MEMBERS:,} members")
                        _take(file, tar, member, prefix, folder)
                while counted.read(PIECE):  # to the end of the stream: what follows the last member may be cut off
                    pass
            except ValueError:
                raise
            except Exception as error:  # every decompressor has errors of its own
                raise ValueError(f"{file.name}: truncated or damaged ({error})") from None
    if not any(folder.iterdir()):
        raise ValueError(f"{file.name}: nothing in it lies under {under or '.'}")


def _take(file: Path, tar: tarfile.TarFile, member: tarfile.TarInfo, prefix: tuple[str, ...], folder: Path) -> None:
    path = PurePosixPath(member.name)
    if path.is_absolute() or ".." in path.parts or "\\" in member.name or ":" in member.name:
        raise ValueError(f"{file.name}: member {member.name!r} climbs out of the package")
    if path.parts[: len(prefix)] != prefix or member.isdir():
        return
    if not member.isfile():
        raise ValueError(f"{file.name}: member {member.name!r} is a link or a device, not a regular file")
    target = folder.joinpath(*path.parts[len(prefix) :])
    source = tar.extractfile(member)
    assert source is not None
    target.parent.mkdir(parents=True, exist_ok=True)
    with source, target.open("xb") as out:  # a name that comes twice is an error, not the last one
        shutil.copyfileobj(source, out, PIECE)
        if out.tell() != member.size:
            raise EOFError(f"member {member.name} ends early")


def _data_member(file: Path, archive: IO[bytes]) -> tuple[str, int, int]:
    """Name, first byte and size of ``data.tar*`` in an ar archive: after 8 magic bytes, entries of 60 and a body."""
    total = file.stat().st_size
    if archive.read(8) != b"!<arch>\n":
        raise ValueError(f"{file.name}: not a Debian package (no ar archive)")
    while header := archive.read(60):
        if len(header) < 60 or header[58:] != b"`\n" or not header[48:58].strip().isdigit():
            break
        name, size, start = (
            header[:16].decode("ascii", "replace").strip().rstrip("/"),
            int(header[48:58]),
            archive.tell(),
        )
        if start + size > total:
            raise ValueError(f"{file.name}: truncated: {name} needs {start + size:,} bytes, the file has {total:,}")
        if name.startswith("data.tar"):
            return name, start, size
        archive.seek(start + size + size % 2)  # bodies begin at even bytes
    raise ValueError(f"{file.name}: truncated or no Debian package: no data.tar in it")


def _decompressed(file: Path, name: str, raw: io.RawIOBase) -> Any:
    stream = io.BufferedReader(raw, PIECE)
    if name == "data.tar":
        return stream
    if name == "data.tar.xz":
        return lzma.open(stream)
    if name == "data.tar.gz":
        return gzip.open(stream)
    if name == "data.tar.zst":
        for module, function in (("compression.zstd", "open"), ("zstandard", "open")):
            with contextlib.suppress(ImportError):
                return getattr(importlib.import_module(module), function)(stream, "rb")
        raise ValueError(f"{file.name}: {name} needs Python 3.14 or the package zstandard: pip install zstandard")
    raise ValueError(f"{file.name}: no reader for {name}; xz, gz, zst and plain tar are known")


class _Window(io.RawIOBase):
    """``size`` bytes of an open file from ``start`` on, as a file of their own."""

    def __init__(self, file: IO[bytes], start: int, size: int) -> None:
        file.seek(start)
        self._file, self._left = file, size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._file.read(min(len(buffer), self._left))
        buffer[: len(data)] = data
        self._left -= len(data)
        return len(data)


class _Counted(io.RawIOBase):
    """A decompressed stream that ends with an error after ``MAX_DECODED_BYTES``: the bound against bombs."""

    def __init__(self, file: Path, stream: IO[bytes]) -> None:
        self._name, self._stream, self._count = file.name, stream, 0

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        data = self._stream.read(min(size, PIECE) if size >= 0 else PIECE)
        self._count += len(data)
        if self._count > MAX_DECODED_BYTES:
            raise ValueError(f"{self._name}: decodes to more than {MAX_DECODED_BYTES / 2**30:g} GiB")
        return data
