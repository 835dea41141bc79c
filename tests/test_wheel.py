"""The built wheel, installed somewhere else, trains a shipped experiment from an empty folder without a network."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from benchmarks.start import install_wheel

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with nothing but the wheel's content."""
    return install_wheel(tmp_path_factory.mktemp("wheel"))


def run(installed: Path, folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(installed), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "descant", *args]
    # without a network where the system lets us have none
    isolate = shutil.which("unshare")
    if isolate and subprocess.run([isolate, "-rn", "true"], capture_output=True).returncode == 0:
        command = [isolate, "-rn", *command]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_the_wheel_holds_real_files_packs_and_experiments(installed: Path) -> None:
    for part in (
        "recipes/contrastive.py",
        "modules/core/loss_reduction.py",
        "experiments/base.yaml",
        "experiments/contrastive/emoji.yaml",
        "templates/html/report.html",
        "templates/recipe/my_recipe.py",
        "templates/recipe/my_recipe.yaml",
        "templates/recipe/test_my_recipe.py",
        "plan/hardware/h100.yaml",
    ):
        assert (installed / "descant" / part).is_file()
        assert not (installed / "descant" / part).is_symlink()
    assert (installed / "descant/datamodules/packs/emoji/emoji-0.parquet").is_file()
    assert (installed / "descant/datamodules/packs/emoji/NOTICE.md").is_file()
    assert (installed / "descant/experiments/claims/results/structure-clip.json").is_file()
    (wheel,) = installed.parent.glob("descant-*.whl")
    assert not [n for n in zipfile.ZipFile(wheel).namelist() if n.startswith(("recipes/", "modules/", "tests/"))]


def test_it_trains_from_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    where = run(installed, tmp_path, "fit", "--config", "contrastive/emoji", "--config", "on/tiny")
    assert where.returncode == 0, where.stderr
    metrics = json.loads((tmp_path / "runs/contrastive-emoji/metrics.json").read_text())
    assert metrics["steps"] == 2
    source = subprocess.run(
        [sys.executable, "-c", "import descant; print(descant.__file__)"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert source.stdout.startswith(str(installed))


@pytest.mark.parametrize("kind", ["recipe", "callback", "datamodule"])
def test_what_it_writes_for_a_user_trains(installed: Path, tmp_path: Path, kind: str) -> None:
    written = run(installed, tmp_path, "new", kind, "my_own")
    assert written.returncode == 0, written.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"my_own.py", "my_own.yaml", "test_my_own.py"}
    command = written.stdout.splitlines()[-1].split()[1:]
    trained = run(installed, tmp_path, *command, "--config", "on/tiny", "--name", "mine")
    assert trained.returncode == 0, trained.stderr
    assert json.loads((tmp_path / "runs/mine/metrics.json").read_text())["steps"] == 2


def test_it_lists_what_it_ships(installed: Path, tmp_path: Path) -> None:
    listed = run(installed, tmp_path, "list")
    assert listed.returncode == 0
    assert "contrastive/emoji" in listed.stdout
