"""Models of a hub: refused, downloaded once, recorded by revision and digest, and held to both afterwards."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants

import descant
from descant.modules.io import hub
from descant.modules.tokenizers.text import PretrainedTokenizer
from descant.modules.towers import PretrainedTower
from tests.conftest import Result
from tests.modules.towers import folders

COMMIT, NEWER = "a" * 40, "b" * 40


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """A hub with two commits of one model, of which ``main`` is the newer; what it was asked for."""
    asked: list[Any] = []
    for commit in (COMMIT, NEWER):
        folders.timm(tmp_path / "hub" / commit)
    with torch.no_grad():
        state = tmp_path / "hub" / NEWER / "config.json"
        state.write_text(state.read_text() + "\n")

    def snapshot_download(repository: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((repository, revision))
        assert not constants.HF_HUB_OFFLINE and not any(pattern in ("*.py", "*.bin", "*") for pattern in allow_patterns)
        if repository != "own/vit":
            raise ConnectionError("no route\nto the hub")
        return str(tmp_path / "hub" / (revision if revision in (COMMIT, NEWER) else NEWER))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.forget()
    yield asked
    hub.forget()


def test_a_name_of_a_hub_is_refused_unless_it_is_allowed(calls: list[Any]) -> None:
    for make in (
        lambda: PretrainedTower(Path("hub:own/vit")),
        lambda: PretrainedTokenizer(folder=Path("hub:own/vit")),
        lambda: hub.resolve_folder("hub:own/vit"),
    ):
        with pytest.raises(ValueError, match="folder hub:own/vit: of a hub; --trust hub lets it be downloaded"):
            make()
    with hub.allowing_downloads(), hub.allowing_downloads(False), pytest.raises(ValueError, match="--trust hub"):
        hub.resolve_folder("hub:own/vit")
    assert not calls and not hub.record()


def test_it_is_downloaded_once_and_recorded(calls: list[Any], tmp_path: Path) -> None:
    with hub.allowing_downloads():
        tower = PretrainedTower(Path(f"hub:own/vit@{COMMIT}"))
        again = PretrainedTower(Path(f"hub:own/vit@{COMMIT}"))
        assert hub.resolve_folder("hub:own/vit") == tmp_path / "hub" / NEWER
    assert calls == [("own/vit", COMMIT), ("own/vit", None)] and constants.HF_HUB_OFFLINE
    local = PretrainedTower(tmp_path / "hub" / COMMIT)
    for a, b, c in zip(tower.parameters(), again.parameters(), local.parameters(), strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)
    record = hub.record()
    assert {name: one["revision"] for name, one in record.items()} == {
        "hub:own/vit": NEWER,
        f"hub:own/vit@{COMMIT}": COMMIT,
    }
    assert len({one["digest"] for one in record.values()}) == 2  # one file differs


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("hub:own", "no name of a hub's model, which is hub:OWNER/NAME or hub:OWNER/NAME@REVISION"),
        ("hub:../own/vit", "no name of a hub's model"),
        ("hub:own/vit@../x", "no name of a hub's model"),
        ("hub:own/vit@a b", "no name of a hub's model"),
        ("hub:own/bert", r"hub:own/bert: cannot be downloaded \(no route to the hub\)"),
    ],
)
def test_what_cannot_be_downloaded_is_one_line(name: str, line: str, calls: list[Any]) -> None:
    with hub.allowing_downloads(), pytest.raises(ValueError, match=line) as caught:
        hub.resolve_folder(name)
    assert "\n" not in str(caught.value) and constants.HF_HUB_OFFLINE


def test_weights_with_code_are_not_taken(calls: list[Any], tmp_path: Path) -> None:
    (tmp_path / "hub" / NEWER / "model.safetensors").rename(tmp_path / "hub" / NEWER / "pytorch_model.bin")
    with (
        hub.allowing_downloads(),
        pytest.raises(ValueError, match="no safetensors in it; other weights are not downloaded"),
    ):
        hub.resolve_folder("hub:own/vit")


def test_a_run_is_held_to_what_it_began_with(calls: list[Any], tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    with hub.allowing_downloads():
        hub.resolve_folder(f"hub:own/vit@{COMMIT}")
        old = hub.record()[f"hub:own/vit@{COMMIT}"]
        (run / hub.RECORD).write_text(json.dumps({"hub:own/vit": old}))
        with hub.pinning_revisions(run):
            assert hub.resolve_folder("hub:own/vit").name == COMMIT
        with hub.pinning_revisions(tmp_path / "none"):
            assert hub.resolve_folder("hub:own/vit").name == COMMIT  # taken already
        hub.forget()
        assert hub.resolve_folder("hub:own/vit").name == NEWER
        with hub.pinning_revisions(run / "config.yaml"):
            assert hub.resolve_folder("hub:own/vit").name == COMMIT
        hub.forget()
        (tmp_path / "hub" / COMMIT / "config.json").write_text("{}")
        with (
            hub.pinning_revisions(run),
            pytest.raises(ValueError, match=r"have digest [0-9a-f]{12}, and the run's hub.json has"),
        ):
            hub.resolve_folder("hub:own/vit")
        (run / hub.RECORD).write_text('{"hub:own/vit": 3}')
        with pytest.raises(ValueError, match=r"hub\.json: cannot be read"), hub.pinning_revisions(run):
            pass


MINE = """
model:
  init_args:
    width: 16
    towers: {class_path: Towers, init_args: {image: {class_path: PretrainedTower, init_args: {folder: "FOLDER"}}}}
"""
TINY = ("--config", "contrastive/emoji", "--config", "on/tiny", "--config", "mine.yaml", "--name", "small")


@pytest.mark.slow
def test_a_run_of_a_models_hub_says_which(cli: Callable[..., Result], calls: list[Any], tmp_path: Path) -> None:
    Path("mine.yaml").write_text(MINE.replace("FOLDER", "hub:own/vit"))
    assert "hub:own/vit: of a hub; --trust hub lets it be downloaded" in cli("fit", *TINY).refusal
    assert not Path("runs/small").exists() and not calls
    done = cli("fit", *TINY, "--trust", "hub")
    assert done.rc == 0, done.err
    record = json.loads(Path("runs/small/001/hub.json").read_text())
    assert record["hub:own/vit"]["revision"] == NEWER and len(record["hub:own/vit"]["digest"]) == 64
    assert "--trust hub" in cli("export", "small/001", "--out", "out").refusal
    done = cli("export", "small/001", "--out", "out", "--trust", "hub")
    assert done.rc == 0, done.err
    (tmp_path / "hub" / NEWER / "config.json").write_text("{}")
    hub.forget()
    (point,) = Path("runs/small/001/resume").glob("*.ckpt")
    line = cli("fit", *TINY, "--trust", "hub", "--resume", str(point)).refusal
    assert "and the run's hub.json has" in line
    shutil.rmtree(tmp_path / "hub")
    recipe: Any = descant.load("out")  # an export needs neither hub nor folder
    trained: Any = recipe.towers["image"]
    assert trained.encoder.kind == "vit_tiny_patch16_224" and trained.folder == Path("out/towers/image")
