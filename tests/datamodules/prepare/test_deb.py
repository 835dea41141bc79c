from __future__ import annotations

import gzip
import importlib.util
import io
import lzma
import os
import stat
import sys
import tarfile
import threading
import types
from pathlib import Path

import pytest

from descant.datamodules.prepare import deb as module
from descant.datamodules.prepare.deb import Deb, unpack
from descant.datamodules.prepare.package import fetch_and_unpack, scratch, sha256_of
from descant.modules.io.cache import cache_folder

CONTENT = {"./usr/share/pack/a/one.txt": b"one", "./usr/share/pack/two.bin": bytes(range(256)) * 999}


def tar_of(content: dict[str, bytes], *extra: tarfile.TarInfo) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, data in content.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        for info in extra:
            tar.addfile(info)
    return out.getvalue()


def ar_of(members: dict[str, bytes]) -> bytes:
    out = b"!<arch>\n"
    for name, data in members.items():
        out += f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(data):<10}`\n".encode() + data + b"\n" * (len(data) % 2)
    return out


def deb_of(path: Path, tar: bytes, data: str = "data.tar.xz") -> Path:
    body = lzma.compress(tar) if data.endswith(".xz") else tar
    # an odd-sized member before it: bodies begin at even bytes
    path.write_bytes(ar_of({"debian-binary": b"2.0\n", "control.tar.xz": b"odd", data: body}))
    return path


@pytest.fixture
def package(tmp_path: Path) -> tuple[Deb, Path]:
    file = deb_of(tmp_path / "pack_1_all.deb", tar_of(CONTENT))
    return Deb("pack", {sha256_of(file): "1"}, under="usr/share/pack"), file


def test_a_file_is_unpacked_once_under_its_hash(package: tuple[Deb, Path], tmp_path: Path) -> None:
    deb, file = package
    folder = fetch_and_unpack(deb, file, cache=tmp_path / "cache")
    assert folder == tmp_path / "cache" / "pack" / sha256_of(file)
    assert (folder / "a" / "one.txt").read_bytes() == b"one"
    assert (folder / "two.bin").read_bytes() == CONTENT["./usr/share/pack/two.bin"]
    assert [p.name for p in folder.parent.iterdir()] == [folder.name], "no temporary folder is left"
    (folder / "a" / "one.txt").write_bytes(b"kept")
    assert fetch_and_unpack(deb, file, cache=tmp_path / "cache") == folder
    # by name: found in the cache, no apt asked
    assert fetch_and_unpack(deb, cache=tmp_path / "cache") == folder
    assert (folder / "a" / "one.txt").read_bytes() == b"kept"


def test_an_unknown_hash_is_named_and_can_be_accepted(package: tuple[Deb, Path], tmp_path: Path) -> None:
    _, file = package
    other = Deb("pack", {"0" * 64: "0.9", "1" * 64: "0.8"}, under="usr/share/pack")
    sha = sha256_of(file)
    with pytest.raises(ValueError, match=rf"{sha} is not a known pack .*0\.9.*0\.8.*accept: \[{sha}\]$"):
        fetch_and_unpack(other, file, cache=tmp_path / "cache")
    assert fetch_and_unpack(other, file, [sha], tmp_path / "cache").is_dir()
    assert fetch_and_unpack(other, None, [sha], tmp_path / "cache").is_dir()
    with pytest.raises(ValueError, match="accept: 'abc' is not a SHA-256"):
        fetch_and_unpack(other, file, ["abc"])
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"^pack_1_all\.deb: truncated: data\.tar\.xz needs"):
        fetch_and_unpack(other, file, cache=tmp_path / "cache")


def fake_apt(folder: Path, script: str) -> Path:
    folder.mkdir()
    apt = folder / "apt-get"
    apt.write_text(f"#!/bin/sh\n{script}\n")
    apt.chmod(apt.stat().st_mode | stat.S_IXUSR)
    return folder


def test_apt_downloads_by_name(package: tuple[Deb, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deb, file = package
    script = f'echo "$@" >> {tmp_path}/asked; cp {file} .'
    path = os.environ["PATH"]
    monkeypatch.setenv("PATH", f"{fake_apt(tmp_path / 'bin', script)}:{path}")
    monkeypatch.setenv("DESCANT_CACHE", str(tmp_path / "cache"))
    first, second = fetch_and_unpack(deb), fetch_and_unpack(deb)
    assert first == second == tmp_path / "cache" / "pack" / sha256_of(file)
    assert (tmp_path / "asked").read_text() == "download pack\n", "asked once"
    assert [p.name for p in first.parent.iterdir()] == [first.name], "the .deb is not kept twice"


def test_a_failure_of_apt_is_one_line_with_a_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deb = Deb("pack", {})
    monkeypatch.setenv("DESCANT_CACHE", str(tmp_path / "cache"))
    script = 'echo "E: Unable to locate package pack" >&2; exit 100'
    monkeypatch.setenv("PATH", f"{fake_apt(tmp_path / 'bin', script)}:{os.environ['PATH']}")
    with pytest.raises(ValueError, match=r"Unable to locate package pack.*apt-get update.*deb: PATH") as error:
        fetch_and_unpack(deb)
    assert "\n" not in str(error.value)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match=r"no apt-get here.*deb: PATH"):
        fetch_and_unpack(deb)
    with pytest.raises(ValueError, match=r"deb: .*none\.deb: no such file"):
        fetch_and_unpack(deb, tmp_path / "none.deb")
    assert not list((tmp_path / "cache" / "pack").iterdir())


def test_the_cache_is_where_the_platform_keeps_caches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.delenv("DESCANT_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "descant"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "descant"
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"cannot write here.*DESCANT_CACHE"), scratch(tmp_path / "file" / "x"):
        pass


def info(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        (info("./usr/share/pack/../../../../evil", tarfile.REGTYPE), "climbs out"),
        (info("/etc/evil", tarfile.REGTYPE), "climbs out"),
        (info("./usr/share/pack/link", tarfile.SYMTYPE, "/etc/passwd"), "link or a device"),
        (info("./usr/share/pack/hard", tarfile.LNKTYPE, "./usr/share/pack/two.bin"), "link or a device"),
        (info("./usr/share/pack/dev", tarfile.CHRTYPE), "link or a device"),
        (info("./usr/share/pack/two.bin", tarfile.REGTYPE), "File exists"),
    ],
)
def test_a_hostile_member_stops_everything(extra: tarfile.TarInfo, says: str, tmp_path: Path) -> None:
    file = deb_of(tmp_path / "bad.deb", tar_of(CONTENT, extra))
    deb = Deb("pack", {sha256_of(file): "1"}, under="usr/share/pack")
    with pytest.raises(ValueError, match=rf"^bad\.deb: .*{says}"):
        fetch_and_unpack(deb, file, cache=tmp_path / "cache")
    assert not list((tmp_path / "cache" / "pack").iterdir()), "nothing half unpacked is left"
    assert not (tmp_path / "evil").exists()


def test_a_link_outside_what_is_wanted_is_left_out(tmp_path: Path) -> None:
    file = deb_of(tmp_path / "good.deb", tar_of(CONTENT, info("./usr/share/doc/link", tarfile.SYMTYPE, "changelog")))
    (tmp_path / "out").mkdir()
    unpack(file, tmp_path / "out", "usr/share/pack")
    assert sorted(p.name for p in (tmp_path / "out").rglob("*")) == ["a", "one.txt", "two.bin"]
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="nothing in it lies under usr/share/other"):
        unpack(file, tmp_path / "none", "usr/share/other")


def test_bounds_on_members_and_decoded_bytes(
    package: tuple[Deb, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, file = package
    monkeypatch.setattr(module, "MAX_MEMBERS", 1)
    (tmp_path / "a").mkdir()
    with pytest.raises(ValueError, match="more than 1 members"):
        unpack(file, tmp_path / "a")
    monkeypatch.undo()
    monkeypatch.setattr(module, "MAX_DECODED_BYTES", 100_000)
    (tmp_path / "b").mkdir()
    with pytest.raises(ValueError, match="decodes to more than"):
        unpack(file, tmp_path / "b")


@pytest.mark.parametrize("data", ["data.tar.xz", "data.tar.gz", "data.tar"])
@pytest.mark.parametrize("keep", [0, 4, 40, 0.3, 0.9, 0.999])
def test_a_truncated_file_is_reported(data: str, keep: float, tmp_path: Path) -> None:
    tar = tar_of({"./x": os.urandom(9_999)})
    whole = deb_of(tmp_path / "cut.deb", gzip.compress(tar) if data.endswith("gz") else tar, data).read_bytes()
    (tmp_path / "whole").mkdir()
    unpack(tmp_path / "cut.deb", tmp_path / "whole")
    (tmp_path / "cut.deb").write_bytes(whole[: keep if isinstance(keep, int) else int(keep * len(whole))])
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match=r"^cut\.deb: (truncated|not a Debian package)"):
        unpack(tmp_path / "cut.deb", tmp_path / "out")


def test_a_truncated_stream_inside_a_whole_ar_is_reported(tmp_path: Path) -> None:
    body = lzma.compress(tar_of({"./x": os.urandom(99_999)}))
    (tmp_path / "cut.deb").write_bytes(ar_of({"debian-binary": b"2.0\n", "data.tar.xz": body[:-2000]}))
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match=r"^cut\.deb: truncated or damaged"):
        unpack(tmp_path / "cut.deb", tmp_path / "out")


def test_zstandard_is_read_where_it_can_be(tmp_path: Path) -> None:
    file = tmp_path / "new.deb"
    file.write_bytes(ar_of({"debian-binary": b"2.0\n", "data.tar.zst": b"..."}))
    (tmp_path / "out").mkdir()
    if any(importlib.util.find_spec(name) for name in ("compression", "zstandard")):
        says = r"^new\.deb: truncated or damaged"
    else:
        says = r"^new\.deb: data\.tar\.zst needs Python 3\.14 or .*pip install zstandard"
    with pytest.raises(ValueError, match=says):
        unpack(file, tmp_path / "out")
    file.write_bytes(ar_of({"debian-binary": b"2.0\n", "data.tar.lz4": b"..."}))
    with pytest.raises(ValueError, match=r"no reader for data\.tar\.lz4; xz, gz, zst"):
        unpack(file, tmp_path / "out")


def test_zstandard_is_imported_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # the module's own interface, ``open(stream, "rb")``, with another compression behind it
    monkeypatch.setitem(sys.modules, "compression", None)
    monkeypatch.setitem(sys.modules, "zstandard", types.SimpleNamespace(open=lzma.open))
    file = tmp_path / "new.deb"
    file.write_bytes(ar_of({"debian-binary": b"2.0\n", "data.tar.zst": lzma.compress(tar_of(CONTENT))}))
    (tmp_path / "out").mkdir()
    unpack(file, tmp_path / "out", "usr/share/pack")
    assert (tmp_path / "out" / "a" / "one.txt").read_bytes() == b"one"


def test_processes_that_unpack_at_once_agree(package: tuple[Deb, Path], tmp_path: Path) -> None:
    deb, file = package
    found: list[Path] = []
    threads = [
        threading.Thread(target=lambda: found.append(fetch_and_unpack(deb, file, cache=tmp_path / "cache")))
        for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 6 and len(set(found)) == 1
    assert [p.name for p in found[0].parent.iterdir()] == [found[0].name]
    assert (found[0] / "a" / "one.txt").read_bytes() == b"one"


def test_a_sparse_file_is_refused(tmp_path: Path) -> None:
    """64 GiB in 2 KB: GNU tar says where bytes are, and how long the file is."""
    head = tarfile.TarInfo("./usr/share/pack/big")
    head.size, head.type = 512, tarfile.GNUTYPE_SPARSE
    header = bytearray(head.tobuf(tarfile.GNU_FORMAT))
    whole = 64 << 30
    for start, number in ((386, whole - 512), (398, 512), (483, whole)):
        header[start : start + 12] = b"%011o\0" % number
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    file = deb_of(tmp_path / "bad.deb", bytes(header) + b"A" * 512 + bytes(1024))
    deb = Deb("pack", {sha256_of(file): "1"}, under="usr/share/pack")
    with pytest.raises(ValueError, match=r"^bad\.deb: member '\./usr/share/pack/big' is a sparse file"):
        fetch_and_unpack(deb, file, cache=tmp_path / "cache")
