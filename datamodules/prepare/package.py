"""Download a package of data once: fetch by name or take a file, check its SHA-256, unpack it into the cache.

The order of this file is the order of the method: look in the cache, fetch, check the hash, unpack within bounds into a
temporary folder, rename it.
"""

from __future__ import annotations

import contextlib
import errno
import shutil
import sys
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, ClassVar

from descant.modules.io.cache import cache_folder
from descant.modules.io.files import sha256_of as sha256_of

# Far above any package of data (tuxpaint-stamps-default: 10,800 members, 142 MB decoded), far below a full disk.
MAX_MEMBERS = 200_000
MAX_DECODED_BYTES = 2 * 2**30
PIECE = 1 << 20


@dataclass(frozen=True)
class DataPackage(ABC):
    """A package by name, and its known versions.

    Attributes:
        name: name for the tool that fetches it.
        known: SHA-256 of the whole file -> its version.
        under: only the content of this folder of the package is unpacked, without the folder's own path.
        option: a data module's argument that gives the package as a file.
    """

    name: str
    known: Mapping[str, str]
    under: str = ""
    option: ClassVar[str] = "file"

    @abstractmethod
    def fetch(self, folder: Path) -> Path:
        """Fetch the package as a file in ``folder``. Raise ValueError in one line with the remedy."""

    @abstractmethod
    def check(self, file: Path) -> None:
        """Raise ValueError if the file is truncated or no such package."""

    @abstractmethod
    def unpack(self, file: Path, folder: Path) -> None:
        """Write the content of ``under`` into ``folder``. Raise ValueError for a broken or hostile file."""


def fetch_and_unpack(
    package: DataPackage, file: Path | str | None = None, accept: Sequence[str] = (), cache: Path | str | None = None
) -> Path:
    """Return the folder with the package's content, named by its SHA-256: from the cache, otherwise fetched.

    Args:
        file: used instead of fetching one.
        accept: SHA-256 to accept besides the known ones.
        cache: folder of all packages; :func:`cache_folder` by default.
    """
    home = Path(cache or cache_folder()) / package.name
    for sha in accept:
        if len(sha) != 64 or set(sha) - set("0123456789abcdef"):
            raise ValueError(f"accept: {sha!r} is not a SHA-256 (64 hexadecimal digits, lower case)")
    if file is None:
        for sha in (*accept, *package.known):
            if (home / sha).is_dir():
                return home / sha
    elif not Path(file).is_file():
        raise ValueError(f"{package.option}: {file}: no such file")
    with contextlib.ExitStack() as stack:
        source = package.fetch(Path(stack.enter_context(scratch(home)))) if file is None else Path(file)
        sha = sha256_of(source)
        if sha not in {*package.known, *accept}:
            package.check(source)  # reports a truncated file as such
            known = ", ".join(f"{s[:12]}... ({version})" for s, version in package.known.items())
            fault = f"SHA-256 {sha} is not a known {package.name} ({known})"
            raise ValueError(f"{source.name}: {fault}; to use it all the same: accept: [{sha}]")
        target = home / sha
        if not target.is_dir():
            folder = Path(stack.enter_context(scratch(home))) / "content"
            folder.mkdir()
            package.unpack(source, folder)
            move_into_place(folder, target)
        return target


@contextlib.contextmanager
def scratch(home: Path) -> Iterator[str]:
    """Make a temporary folder in ``home``, removed at the end: :func:`move_into_place` moves its content out."""
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
    """Rename a finished folder. If another process was first, its identical copy stays."""
    try:
        folder.rename(target)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.EACCES) or not target.is_dir():
            raise


def build_beside(source: Path, name: str, build: Callable[[Path], None], message: str) -> Path:
    """Return the folder ``name`` beside ``source``; if it is missing, print ``message`` and let ``build`` fill it."""
    target = source.with_name(name)
    if not target.is_dir():
        print(f"descant: {message}", file=sys.stderr, flush=True)
        with scratch(source.parent) as part:
            folder = Path(part) / "arrays"
            folder.mkdir()
            build(folder)
            move_into_place(folder, target)
    return target


def write_member(source: IO[bytes], target: Path) -> int:
    """Write a member of an archive to a new file (a duplicate name is an error); return its size."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with source, target.open("xb") as out:
        shutil.copyfileobj(source, out, PIECE)
        return out.tell()


def place_of(file: Path, member: str, under: str) -> tuple[str, ...] | None:
    """Return the target of an archive member: the parts of its name below ``under``; None if it lies elsewhere.

    >>> place_of(Path("x.whl"), "pack/data/a/b.txt", "pack/data"), place_of(Path("x.whl"), "other/b.txt", "pack")
    (('a', 'b.txt'), None)
    """
    path, prefix = PurePosixPath(member), PurePosixPath(under).parts
    if path.is_absolute() or ".." in path.parts or "\\" in member or ":" in member:
        raise ValueError(f"{file.name}: member {member!r} climbs out of the package")
    return path.parts[len(prefix) :] if path.parts[: len(prefix)] == prefix else None


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its class.

    >>> first_line(ValueError("a\\nb")), first_line(EOFError())
    ('a', 'EOFError')
    """
    return (str(error).splitlines() or [type(error).__name__])[0]
