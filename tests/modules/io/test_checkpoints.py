"""Every reader of checkpoints: damage is reported, and the last step is the last checkpoint."""

from __future__ import annotations

import json
import os
import random
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

import descant
from descant.export import loading
from descant.modules.adaptation.inherit import Begin, Inherit
from descant.modules.adaptation.saved_tower import SavedTower
from descant.modules.io import manifest, saved
from descant.modules.io.checkpoints import follow_latest, of_run
from descant.modules.io.files import sha256_of
from descant.modules.io.plain import load_plain, require_sums
from descant.modules.towers.timm import read_weights as weights_of_a_tower
from descant.recipes import Contrastive
from descant.recipes.base.distillation import TeacherRun
from descant.recipes.base.teachers import Teachers
from descant.run.store import AtomicIO
from tests.conftest import Result

Cli = Callable[..., Result]
MODEL: dict[str, Any] = {
    "class_path": "descant.recipes.Contrastive",
    "init_args": {
        "towers": {
            "class_path": "descant.modules.towers.Towers",
            "init_args": {
                "image": {"class_path": "descant.modules.towers.ConvTower", "init_args": {"widths": [4, 8]}},
                "text": {"class_path": "descant.modules.towers.BagTower", "init_args": {"vocab": 16, "width": 8}},
            },
        },
        "width": 8,
    },
}
#: Places of a file that are damaged, one bit each.
PLACES = 200


def recipe(seed: int = 0) -> Contrastive:
    torch.manual_seed(seed)
    made = saved.build(Contrastive, MODEL, Path("."))
    made.configure_model()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made.eval()


def point(path: Path, step: int, **content: Any) -> Path:
    """A checkpoint whose weights are a function of the step."""
    AtomicIO().save_checkpoint({"state_dict": recipe(step).state_dict(), "global_step": step, **content}, path)
    return path


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Resume points of the steps 9, 10 and 110; the best is of step 10."""
    folder = tmp_path / "runs/toy/001"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({"model": MODEL}))
    for step in (110, 9, 10):
        point(folder / f"resume/step-{step:07d}.ckpt", step)
    return folder


def with_best(run: Path) -> Path:
    states = {"ModelCheckpoint{}": {"monitor": "val/x", "best_model_path": "/moved/checkpoints/best.ckpt"}}
    point(run / "resume/step-0000110.ckpt", 110, callbacks=states)
    return point(run / "checkpoints/best.ckpt", 10)


def is_of(state: dict[str, Tensor], step: int) -> bool:
    wanted = recipe(step).state_dict()
    return all(torch.equal(state[key], value) for key, value in wanted.items())


def begun(path: Path) -> dict[str, Tensor]:
    model = recipe(1)
    Begin(path).apply(model)
    return model.state_dict()


def inherited(path: Path) -> dict[str, Tensor]:
    model = recipe(1)
    Inherit(path, ["image", "text"]).apply(model)
    found = {f"towers.{m}.": getattr(part, "tower", part) for m, part in model.towers.items()}  # inside of Frozen
    return {f"{name}{key}": value for name, part in found.items() for key, value in part.state_dict().items()}


def of_towers(path: Path) -> dict[str, Tensor]:
    found = {m: SavedTower(path, m).tower.state_dict() for m in ("image", "text")}
    return {f"towers.{m}.{key}": value for m, state in found.items() for key, value in state.items()}


def taught(path: Path) -> dict[str, Tensor]:
    return TeacherRun(str(path)).network(recipe()).state_dict()


def embedded(path: Path) -> dict[str, Tensor]:
    return descant.Embedder(path).recipe.state_dict()


def loaded(path: Path) -> dict[str, Tensor]:
    return descant.load(path).state_dict()


#: All that open a run to read weights, and give what they read.
READERS: dict[str, Callable[[Path], dict[str, Tensor]]] = {
    "load": loaded,
    "Embedder": embedded,
    "Begin": begun,
    "Inherit": inherited,
    "SavedTower": of_towers,
    "TeacherRun": taught,
}


@pytest.mark.parametrize("reader", READERS)
def test_the_last_checkpoint_is_by_step_and_not_by_time(run: Path, reader: str) -> None:
    os.utime(run / "resume/step-0000010.ckpt", (2e9, 2e9))
    state = READERS[reader](run)
    wanted = recipe(110).state_dict()
    assert state and all(torch.equal(value, wanted[key]) for key, value in state.items())


@pytest.mark.parametrize("reader", READERS)
def test_every_reader_refuses_a_flipped_bit_with_the_nearest(run: Path, reader: str) -> None:
    flip(run / "resume/step-0000110.ckpt", 0.5)
    line = r"resume/step-0000110\.ckpt: not the bytes that were written; nearest: .*resume/step-0000010\.ckpt$"
    with pytest.raises(ValueError, match=line):
        READERS[reader](run)


def test_the_best_is_read_and_its_damage_reported(run: Path) -> None:
    best = with_best(run)
    assert is_of(loaded(run), 10) and is_of(descant.load(run, "last").state_dict(), 110)
    flip(best, 0.6)
    with pytest.raises(ValueError, match=r"best\.ckpt: not the bytes .*; nearest: .*resume/step-0000110\.ckpt$"):
        descant.load(run)
    teachers = Teachers({"image": str(run)})
    with pytest.raises(ValueError, match=r"best\.ckpt: not the bytes"):
        teachers._teacher("image", {"image": torch.zeros(1)})


def test_a_missing_best_is_reported(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest.remove(with_best(run))
    assert is_of(loaded(run), 110)
    assert "best.ckpt: the best checkpoint is missing: step-0000110.ckpt is used" in capsys.readouterr().err


def flip(file: Path, where: float, bit: int = 6) -> None:
    content = bytearray(file.read_bytes())
    content[int(where * len(content))] ^= 1 << bit
    file.write_bytes(content)


def told_or_equal(file: Path, read: Callable[[], dict[str, Tensor]], capsys: pytest.CaptureFixture[str]) -> int:
    """Flip a bit at many places, one at a time: each is refused in one line, or changes no weight."""
    whole, draw, right = file.read_bytes(), random.Random(0), read()
    capsys.readouterr()
    refused = 0
    places = [draw.randrange(len(whole)) for _ in range(PLACES)]
    for place in places:
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << draw.randrange(8)]) + whole[place + 1 :])
        try:
            state = read()
        except ValueError as error:
            assert "\n" not in str(error), place
            refused += 1
            continue
        assert state.keys() == right.keys() and all(torch.equal(state[key], right[key]) for key in right), place
    file.write_bytes(whole)
    return refused


def plainly(path: Path) -> Callable[[], dict[str, Tensor]]:
    return lambda: saved.read_weights(saved.find(path))


@pytest.mark.slow
def test_flips_anywhere_in_a_checkpoint_are_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert told_or_equal(run / "resume/step-0000110.ckpt", plainly(run), capsys) == PLACES


@pytest.mark.slow
def test_flips_anywhere_in_a_manifest_are_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of an older point, too: it says which step it is, and may not become the newest."""
    for step in (110, 10):
        file = run / f"resume/step-{step:07d}.ckpt{manifest.SUFFIX}"
        assert told_or_equal(file, plainly(run), capsys) == PLACES


@pytest.mark.slow
def test_flips_in_a_file_without_a_manifest_change_no_weight(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of another program: its own checksums have to do."""
    file = run / "theirs.ckpt"
    torch.save({"state_dict": recipe(3).state_dict()}, file)
    assert is_of(loaded(file), 3)
    told = capsys.readouterr().err.splitlines()
    assert told == [f"descant: warning: {file}: no manifest confirms its content"]
    assert PLACES / 2 < told_or_equal(file, plainly(file), capsys) < PLACES  # not where the archive is padded
    weights = recipe(3).state_dict()["towers.image.stem.0.weight"].numpy().tobytes()
    flip(file, (file.read_bytes().index(weights) + 2) / file.stat().st_size)
    with pytest.raises(ValueError, match=r"theirs\.ckpt: damaged: Bad CRC-32"):
        loaded(file)
    with pytest.raises(ValueError, match=r"theirs\.ckpt: damaged"), pytest.warns(UserWarning):
        AtomicIO().load_checkpoint(file)
    with pytest.raises(ValueError, match=r"theirs\.ckpt: cannot be read \(.*damaged"):
        weights_of_a_tower(file)


def test_a_file_without_a_manifest_is_never_the_newest(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"state_dict": recipe(3).state_dict(), "global_step": 999}, run / "resume/step-0000999.ckpt")
    assert is_of(loaded(run), 110)
    assert "step-0000999.ckpt: no manifest confirms its content: " in capsys.readouterr().err
    (run / f"resume/step-0000110.ckpt{manifest.SUFFIX}").unlink()
    assert is_of(loaded(run), 10)
    assert "step-0000110.ckpt: no manifest confirms its content: " in capsys.readouterr().err


def test_steps_of_files_without_manifests_are_read_from_the_files(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    for step in (9, 110, 10):
        torch.save({"state_dict": {}, "global_step": step}, tmp_path / f"checkpoints/{step}.ckpt")
    os.utime(tmp_path / "checkpoints/10.ckpt", (2e9, 2e9))
    assert [path.stem for path in of_run(tmp_path)] == ["110", "10", "9"]


@pytest.mark.slow
def test_an_edited_configuration_is_reported(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = run / "config.yaml"
    (run / "versions.json").write_text(json.dumps({saved.CONFIG_SUM: sha256_of(file)}))
    whole = file.read_bytes()
    loaded(run)
    assert capsys.readouterr().err == ""
    for draw in range(PLACES):
        place = draw * len(whole) // PLACES
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << draw % 7]) + whole[place + 1 :])
        try:
            saved.find(run)
        except ValueError as error:
            assert "\n" not in str(error)
        assert "config.yaml: edited since the run wrote it\n" in capsys.readouterr().err
    file.write_bytes(whole)
    (run / "versions.json").write_text("{")
    loaded(run)
    assert "versions.json: cannot be read, so config.yaml cannot be checked" in capsys.readouterr().err


@pytest.fixture
def exported(cli: Cli, run: Path) -> Path:
    with_best(run)
    os.utime(run / "resume/step-0000009.ckpt", (2e9, 2e9))
    (run / "metrics.json").write_text('{"steps": 110, "val/x": 0.75}\n')
    (run / "metrics.csv").write_text("step,val/x\n9,0.5\n109,0.75\n")
    assert cli("export", "runs/toy/001", "--ckpt", "last", "--out", "model").rc == 0
    return Path("model")


def test_the_card_has_digest_and_step(exported: Path, run: Path) -> None:
    card = (exported / "README.md").read_text()
    digest = sha256_of(run / "resume/step-0000110.ckpt")
    assert f"from `resume/step-0000110.ckpt`, SHA-256 `{digest}`; the numbers below are of its step 110." in card
    assert f"`model.safetensors` has SHA-256 `{sha256_of(exported / 'model.safetensors')}`" in card
    assert is_of(loaded(exported), 110) and "0.75" in card


@pytest.mark.slow
def test_flips_anywhere_in_an_export_are_refused(exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("model.safetensors", "config.yaml", "preprocess.yaml", f"model.safetensors{manifest.SUFFIX}"):
        assert told_or_equal(exported / name, plainly(exported), capsys) == PLACES, name
    (exported / "preprocess.yaml").unlink()
    with pytest.raises(ValueError, match=r"preprocess\.yaml: missing; it was part of the export"):
        loaded(exported)


def test_an_export_of_damage_is_refused_and_leaves_nothing(cli: Cli, run: Path) -> None:
    flip(run / "resume/step-0000110.ckpt", 0.5)
    line = cli("export", "runs/toy/001", "--out", "model").refusal
    assert line.startswith("runs/toy/001/resume/step-0000110.ckpt: not the bytes that were written; nearest: runs/")
    assert not Path("model").exists()


def test_other_files_are_refused_in_one_line(tmp_path: Path) -> None:
    file = tmp_path / "bad.ckpt"
    torch.save({"state_dict": {}}, file)
    whole = file.read_bytes()
    for content in (b"", b"hello\n", whole[: len(whole) // 2], b"PK\x03\x04" + b"\0" * 99, b"\x80\x02]q\x00."):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"bad\.ckpt: (cannot be read as a checkpoint|it holds|damaged)") as caught:
            require_sums(file)
            load_plain(file)
        assert "\n" not in str(caught.value)


def test_a_fork_verifies_by_itself(run: Path) -> None:
    found = saved.find(run)
    assert found.verified is not None
    found.verified._account, found.verified._pid = None, -1
    assert saved.account(found)["facts"]["step"] == 110
    shutil.rmtree(run)
    with loading.trusting(()), pytest.raises(ValueError, match=r"no such run"):
        saved.find(run)


def test_manifests_outside_the_export_and_zip_bombs_are_refused(exported: Path, tmp_path: Path) -> None:
    weights = exported / "model.safetensors"
    for name in ("../toy.yaml", "/etc/hostname"):
        manifest.confirm(weights, {saved.FILES: {name: "0" * 64}})
        with pytest.raises(ValueError, match=r"its manifest lists .*, which is outside the export"):
            loaded(exported)
    with zipfile.ZipFile(tmp_path / "bomb.ckpt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb/data.pkl", b"0" * 1_000_000)
    with pytest.raises(ValueError, match=r"bomb\.ckpt: damaged: bomb/data\.pkl is compressed"):
        require_sums(tmp_path / "bomb.ckpt")


@pytest.mark.parametrize(
    "content, path, wanted",
    [
        ("002\n", "demo/latest", "demo/002"),
        ("002\n", "demo/latest/checkpoints/best.ckpt", "demo/002/checkpoints/best.ckpt"),
        ("../../secret\n", "demo/latest", "demo/latest"),
        ("", "demo/latest/config.yaml", "demo/latest/config.yaml"),
        ("002" * 50, "demo/latest", "demo/latest"),
        ("002\n", "demo/001/config.yaml", "demo/001/config.yaml"),
    ],
)
def test_latest_is_a_text_file_that_names_a_run(tmp_path: Path, content: str, path: str, wanted: str) -> None:
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo/latest").write_text(content)
    assert follow_latest(tmp_path / path) == tmp_path / wanted
