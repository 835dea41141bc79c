"""The command line of data preparation; nothing here touches the network."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from descant.datamodules.prepare import emoji, npm
from descant.datamodules.prepare.__main__ import CORPORA, PACKS, main
from descant.datamodules.prepare.grouping import connected_groups


def test_all_names_are_listed_and_have_a_module(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--list"])
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [*PACKS, *CORPORA]
    for name in (*PACKS, *CORPORA):
        module = importlib.import_module(f"descant.datamodules.prepare.{name}")
        assert hasattr(module, "build") if name in PACKS else hasattr(module, "DEB") or hasattr(module, "WHEEL")


def test_a_failure_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    for name, line in (
        ("emoji", f"prepare emoji: npm is needed once to fetch {emoji.PACKAGES['noto'].name}"),
        ("fashion", "prepare fashion: dataset-fashion-mnist: there is no apt-get here"),
    ):
        with pytest.raises(SystemExit, match=line) as caught:
            main([name, "--cache", str(tmp_path)])
        assert "\n" not in str(caught.value)
    for words in (["fashion", "--out", "x"], ["fashoin"]):
        with pytest.raises(SystemExit, match="2"):
            main(words)
    assert "--out: fashion goes into the cache" in capsys.readouterr().err
    assert npm.Package("@a/b", "1.0", "0").tarball == "a-b-1.0.tgz"


def test_groups_are_connected_through_others() -> None:
    assert connected_groups([["a"], ["b"], ["c", "a"], ["c"], []]) == [[0, 2, 3], [1], [4]]
