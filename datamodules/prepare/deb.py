"""Read a Debian package as data: fetched by name with the user's own apt-get, or given as a file.

Neither root nor dpkg is needed: a ``.deb`` is an ``ar`` archive with a ``data.tar`` inside.
"""

from __future__ import annotations

import contextlib
import gzip
import importlib
import io
import lzma
import shutil
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, ClassVar

from descant.datamodules.prepare.package import (
    MAX_DECODED_BYTES,
    MAX_MEMBERS,
    PIECE,
    DataPackage,
    place_of,
    write_member,
)


@dataclass(frozen=True)
class Deb(DataPackage):
    """A Debian package: see :class:`DataPackage`."""

    option: ClassVar[str] = "deb"

    def fetch(self, folder: Path) -> Path:
        return apt_download(self.name, folder)

    def check(self, file: Path) -> None:
        with file.open("rb") as archive:
            _data_member(file, archive)

    def unpack(self, file: Path, folder: Path) -> None:
        unpack(file, folder, self.under)


# fetch ---------------------------------------------------------------------------------------------------------


def apt_download(name: str, folder: Path) -> Path:
    """Download the ``.deb`` of a package into ``folder`` by ``apt-get download NAME``."""
    apt = shutil.which("apt-get")
    if apt is None:
        raise ValueError(f"{name}: there is no apt-get here to fetch it with; give the package as a file: deb: PATH")
    print(f"descant: fetching {name} with apt-get download, once", file=sys.stderr, flush=True)
    result = subprocess.run([apt, "download", name], cwd=folder, capture_output=True, text=True, check=False)
    files = sorted(folder.glob("*.deb"))
    if result.returncode or not files:
        errors = [line for line in result.stderr.splitlines() if line.startswith("E:")] or ["no .deb came"]
        raise ValueError(
            f"`apt-get download {name}` failed ({errors[0].removeprefix('E:').strip()}): "
            "run `apt-get update` once, or give the package as a file: deb: PATH"
        )
    return files[0]


# unpack --------------------------------------------------------------------------------------------------------


def unpack(file: Path, folder: Path, under: str = "") -> None:
    """Write the regular files of a ``.deb`` into ``folder``, and remove ``under`` from their names."""
    members = 0
    with file.open("rb") as archive:
        name, start, size = _data_member(file, archive)
        with _decompress(file, name, _Window(archive, start, size)) as stream:
            counted = _Counted(file, stream)
            try:
                with tarfile.open(fileobj=counted, mode="r|") as tar:
                    for member in tar:
                        members += 1
                        if members > MAX_MEMBERS:
                            raise ValueError(f"{file.name}: more than {MAX_MEMBERS:,} members")
                        _take(file, tar, member, under, folder)
                while counted.read(PIECE):  # to the end of the stream, which may be cut off after the last member
                    pass
            except ValueError:
                raise
            except Exception as error:  # every decompressor has errors of its own
                raise ValueError(f"{file.name}: truncated or damaged ({error})") from None
    if not any(folder.iterdir()):
        raise ValueError(f"{file.name}: nothing in it lies under {under or '.'}")


def _take(file: Path, tar: tarfile.TarFile, member: tarfile.TarInfo, under: str, folder: Path) -> None:
    place = place_of(file, member.name, under)
    if place is None or member.isdir():
        return
    if not member.isfile():
        raise ValueError(f"{file.name}: member {member.name!r} is a link or a device, not a regular file")
    if member.issparse():  # a small package could write huge files
        raise ValueError(f"{file.name}: member {member.name!r} is a sparse file")
    source = tar.extractfile(member)
    assert source is not None
    if write_member(source, folder.joinpath(*place)) != member.size:
        raise EOFError(f"member {member.name} ends early")


def _data_member(file: Path, archive: IO[bytes]) -> tuple[str, int, int]:
    """Find name, first byte and size of ``data.tar*`` in an ar archive: 8 magic bytes, entries of 60 and a body."""
    total = file.stat().st_size
    if archive.read(8) != b"!<arch>\n":
        raise ValueError(f"{file.name}: not a Debian package (no ar archive)")
    while header := archive.read(60):
        if len(header) < 60 or header[58:] != b"`\n" or not header[48:58].strip().isdigit():
            break
        name, size = header[:16].decode("ascii", "replace").strip().rstrip("/"), int(header[48:58])
        start = archive.tell()
        if start + size > total:
            raise ValueError(f"{file.name}: truncated: {name} needs {start + size:,} bytes, the file has {total:,}")
        if name.startswith("data.tar"):
            return name, start, size
        archive.seek(start + size + size % 2)  # bodies begin at even bytes
    raise ValueError(f"{file.name}: truncated or no Debian package: no data.tar in it")


def _decompress(file: Path, name: str, raw: io.RawIOBase) -> Any:
    stream = io.BufferedReader(raw, PIECE)
    if name == "data.tar":
        return stream
    if name == "data.tar.xz":
        return lzma.open(stream)
    if name == "data.tar.gz":
        return gzip.open(stream)
    if name == "data.tar.zst":
        for module in ("compression.zstd", "zstandard"):
            with contextlib.suppress(ImportError):
                return importlib.import_module(module).open(stream, "rb")
        raise ValueError(f"{file.name}: {name} needs Python 3.14 or the package zstandard: pip install zstandard")
    raise ValueError(f"{file.name}: no reader for {name}; xz, gz, zst and plain tar are known")


class _Window(io.RawIOBase):
    """A file object over ``size`` bytes of an open file from ``start`` on."""

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
    """A decompressed stream that fails after ``MAX_DECODED_BYTES``: the bound against decompression bombs."""

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
