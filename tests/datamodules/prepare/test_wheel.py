from __future__ import annotations

import io
import os
import stat
import struct
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from descant.datamodules.prepare import wheel as module
from descant.datamodules.prepare.package import fetch_and_unpack, sha256_of
from descant.datamodules.prepare.wheel import Wheel, unpack

CONTENT = {
    "pack/__init__.py": b"raise RuntimeError('code of the package was run')",
    "pack/data/a/one.txt": b"one",
    "pack/data/two.bin": bytes(range(256)) * 999,
    "pack-1.0.dist-info/RECORD": b"",
}


def wheel_of(path: Path, content: dict[str, bytes], *extra: tuple[zipfile.ZipInfo, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in content.items():
            archive.writestr(name, data)
        for info, data in extra:
            archive.writestr(info, data)
    return path


def member(name: str, mode: int = stat.S_IFREG | 0o644) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.external_attr = mode << 16
    return info


@pytest.fixture
def package(tmp_path: Path) -> tuple[Wheel, Path]:
    file = wheel_of(tmp_path / "pack-1.0-py3-none-any.whl", CONTENT)
    return Wheel("pack", {sha256_of(file): "1.0"}, under="pack/data"), file


def test_data_is_unpacked_once_under_its_hash_and_code_is_left(package: tuple[Wheel, Path], tmp_path: Path) -> None:
    wheel, file = package
    folder = fetch_and_unpack(wheel, file, cache=tmp_path / "cache")
    assert folder == tmp_path / "cache" / "pack" / sha256_of(file)
    assert sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*")) == ["a", "a/one.txt", "two.bin"]
    assert (folder / "two.bin").read_bytes() == CONTENT["pack/data/two.bin"]
    (folder / "a" / "one.txt").write_bytes(b"kept")
    assert fetch_and_unpack(wheel, cache=tmp_path / "cache") == folder, "by name: found in the cache, no pip asked"
    assert (folder / "a" / "one.txt").read_bytes() == b"kept"
    assert [p.name for p in folder.parent.iterdir()] == [folder.name], "no temporary folder is left"


def test_an_unknown_hash_is_named_and_can_be_accepted(package: tuple[Wheel, Path], tmp_path: Path) -> None:
    _, file = package
    other = Wheel("pack", {"0" * 64: "0.9"}, under="pack/data")
    sha = sha256_of(file)
    with pytest.raises(ValueError, match=rf"{sha} is not a known pack .*0\.9.*accept: \[{sha}\]$"):
        fetch_and_unpack(other, file, cache=tmp_path / "cache")
    assert fetch_and_unpack(other, file, [sha], tmp_path / "cache").is_dir()
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"^pack-1\.0.*whl: truncated or no wheel"):
        fetch_and_unpack(other, file, cache=tmp_path / "cache")
    with pytest.raises(ValueError, match=r"^wheel: .*none\.whl: no such file"):
        fetch_and_unpack(other, tmp_path / "none.whl")


def fake_pip(monkeypatch: pytest.MonkeyPatch, file: Path | None, output: str = "") -> list[Sequence[str]]:
    """Each command that would have been run; ``file`` is what it brings, or it fails with what it says."""
    asked: list[Sequence[str]] = []

    def run(command: Sequence[str], cwd: Path, **options: Any) -> Any:
        asked.append(command)
        if file is not None:
            (cwd / file.name).write_bytes(file.read_bytes())
        return SimpleNamespace(returncode=int(file is None), stderr=output)

    monkeypatch.setattr(subprocess, "run", run)
    return asked


def test_pip_downloads_the_known_version_and_never_builds(
    package: tuple[Wheel, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel, file = package
    asked = fake_pip(monkeypatch, file)
    monkeypatch.setenv("DESCANT_CACHE", str(tmp_path / "cache"))
    first, second = fetch_and_unpack(wheel), fetch_and_unpack(wheel)
    assert first == second == tmp_path / "cache" / "pack" / sha256_of(file)
    (command,) = asked
    assert command[:5] == [sys.executable, "-P", "-m", "pip", "download"] and command[-1] == "pack==1.0"
    assert {"--no-deps", "--only-binary=:all:"} <= set(command)
    assert [p.name for p in first.parent.iterdir()] == [first.name], "the .whl is not kept twice"


@pytest.mark.parametrize(
    ("output", "why"),
    [
        ("WARNING: retry\nERROR: Could not find\nERROR: No matching distribution\n", "No matching distribution"),
        ("/bin/python: No module named pip\n", "No module named pip"),
        ("", "no wheel came"),
    ],
)
def test_a_failure_of_pip_is_one_line_with_a_remedy(
    output: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_pip(monkeypatch, None, output)
    with pytest.raises(ValueError, match=rf"`pip download --no-deps pack` failed \(.*{why}\).*wheel: PATH$") as error:
        fetch_and_unpack(Wheel("pack", {}), cache=tmp_path / "cache")
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "cache" / "pack").iterdir())


def test_the_options_are_those_of_a_real_pip(tmp_path: Path) -> None:
    """Asked for a package that no index can have, with no index: it fails for that and for no unknown option."""
    if subprocess.run([sys.executable, "-m", "pip", "--version"], capture_output=True, check=False).returncode:
        pytest.skip("this Python has no pip")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PIP_NO_INDEX", "1")
        with pytest.raises(ValueError, match="No matching distribution found for descant-no-such-package==0"):
            module.pip_download("descant-no-such-package==0", tmp_path)


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        (member("pack/data/../../../evil"), "climbs out"),
        (member("/etc/evil"), "climbs out"),
        (member("C:/evil"), "climbs out"),
        (member("pack\\data\\evil"), "climbs out"),
        (member("pack/data/link", stat.S_IFLNK | 0o777), "link or a device"),
        (member("pack/data/dev", stat.S_IFCHR | 0o644), "link or a device"),
        (member("pack/data/a/one.txt"), "File exists"),
    ],
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_hostile_member_stops_everything(extra: zipfile.ZipInfo, says: str, tmp_path: Path) -> None:
    file = wheel_of(tmp_path / "bad.whl", CONTENT, (extra, b"/etc/passwd"))
    wheel = Wheel("pack", {sha256_of(file): "1"}, under="pack/data")
    with pytest.raises(ValueError, match=rf"^bad\.whl: .*{says}"):
        fetch_and_unpack(wheel, file, cache=tmp_path / "cache")
    assert not list((tmp_path / "cache" / "pack").iterdir()), "nothing half unpacked is left"
    assert not (tmp_path / "evil").exists()


def test_bounds_on_members_and_decoded_bytes(
    package: tuple[Wheel, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, file = package
    monkeypatch.setattr(module, "MAX_MEMBERS", 3)
    with pytest.raises(ValueError, match="more than 3 members"):
        unpack(file, tmp_path / "out")
    monkeypatch.undo()
    monkeypatch.setattr(module, "MAX_DECODED_BYTES", 100_000)
    with pytest.raises(ValueError, match="decodes to more than"):
        unpack(file, tmp_path / "out")
    assert not (tmp_path / "out").exists(), "reported before the first byte is written"


def test_a_bomb_that_announces_less_is_cut_and_refused(tmp_path: Path) -> None:
    """A member of a megabyte that claims a kilobyte: no more than a kilobyte is decoded, and its checksum tells."""
    file = wheel_of(tmp_path / "bomb.whl", {"pack/data/zeros": bytes(2**20)})
    data = bytearray(file.read_bytes())
    for mark, at in ((b"PK\3\4", 22), (b"PK\1\2", 24)):  # where each of its two headers says how long it is
        place = data.index(mark) + at
        assert struct.unpack_from("<I", data, place) == (2**20,)
        struct.pack_into("<I", data, place, 1024)
    file.write_bytes(data)
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match=r"^bomb\.whl: truncated or damaged"):
        unpack(file, tmp_path / "out")
    assert sum(p.stat().st_size for p in (tmp_path / "out").rglob("*") if p.is_file()) <= 1024


@pytest.mark.parametrize("keep", [0, 4, 40, 0.3, 0.9, 0.999])
def test_a_truncated_file_is_reported(keep: float, tmp_path: Path) -> None:
    whole = wheel_of(tmp_path / "cut.whl", {"pack/x": os.urandom(9_999)}).read_bytes()
    (tmp_path / "cut.whl").write_bytes(whole[: keep if isinstance(keep, int) else int(keep * len(whole))])
    with pytest.raises(ValueError, match=r"^cut\.whl: truncated or damaged"):
        unpack(tmp_path / "cut.whl", tmp_path / "out")


def test_damage_inside_a_member_is_reported(tmp_path: Path) -> None:
    file = wheel_of(tmp_path / "bad.whl", {"pack/x": os.urandom(9_999)})
    data = bytearray(file.read_bytes())
    data[5000] ^= 255
    file.write_bytes(data)
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match=r"^bad\.whl: truncated or damaged"):
        unpack(file, tmp_path / "out")


def test_a_package_without_the_folder_is_refused(package: tuple[Wheel, Path], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match="nothing in it lies under pack/other"):
        unpack(package[1], tmp_path / "out", "pack/other")
    buffer = io.BytesIO()
    zipfile.ZipFile(buffer, "w").close()
    (tmp_path / "empty.whl").write_bytes(buffer.getvalue())
    with pytest.raises(ValueError, match=r"^empty\.whl: nothing in it"):
        unpack(tmp_path / "empty.whl", tmp_path / "out")
