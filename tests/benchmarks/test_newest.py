"""What `make newest` reads and prints; nothing here asks an index."""

from __future__ import annotations

import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from packaging.requirements import Requirement

from benchmarks import newest

ROOT = Path(__file__).resolve().parents[2]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_bounds_are_those_of_pyproject_through_extras_of_extras() -> None:
    found = newest.requirements(PROJECT, [newest.EXTRA])
    written = [Requirement(line) for line in PROJECT["dependencies"]]
    assert {one.name for one in written} <= set(found)
    for name, extra in {"trl": "bench", "open-clip-torch": "exchange", "datasets": "datasets", "onnx": "onnx"}.items():
        (line,) = (line for line in PROJECT["optional-dependencies"][extra] if Requirement(line).name == name)
        assert found[name].specifier == Requirement(line).specifier, name
    assert found["torchjd"].extras == {"quadprog-projector"} and "descant" not in found
    assert set(newest.COMPARED) | set(newest.HELD) | set(newest.MODULES) <= set(found)
    with pytest.raises(ValueError, match="no extra 'owner'; there are prepare"):
        newest.requirements(PROJECT, ["owner"])


def test_every_bound_has_a_lower_end_which_lowest_can_install() -> None:
    for one in newest.requirements(PROJECT, [newest.EXTRA]).values():
        assert any(end.operator in (">=", "==", "~=") for end in one.specifier), one


def test_files_that_compare_are_found_by_their_imports(tmp_path: Path) -> None:
    found = newest.requirements(PROJECT, [newest.EXTRA])
    own = newest.requirements({**PROJECT, "optional-dependencies": {}})
    for name, text in {
        "test_a.py": "def test():\n    import open_clip.model\n",
        "test_b.py": "from transformers import CLIPModel\n",
        "test_c.py": 'import pytest\npytest.importorskip("trl.trainer")\n',
        "test_d.py": "import torch\nfrom descant.modules.towers import timm\nfrom . import onnx\n",
        "test_timm.py": "",
        "folders.py": "import timm\n",
    }.items():
        (tmp_path / name).write_text(text)
    names = [file.name for file in newest.comparisons(tmp_path, found, own)]
    assert names == ["test_a.py", "test_b.py", "test_c.py", "test_timm.py"]
    here = {file.relative_to(ROOT).as_posix() for file in newest.comparisons(ROOT / "tests", found, own)}
    assert {"tests/descant/export/test_formats.py", "tests/modules/policy/test_trl.py"} <= here


def test_what_is_asked_of_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, held, resolved = list[list[str]](), list[str](), list[str]()

    def run(command: list[str], check: bool) -> None:
        held.append(Path(command[command.index("--constraint") + 1]).read_text())
        if "uv" in command:
            resolved.append(Path(command[-1]).read_text())
            assert command[command.index("--resolution") + 1] == "lowest-direct"
            Path(command[command.index("--output-file") + 1]).write_text("anyio==4.0\ntrl[x]==1.2.1\n")
        else:
            asked.append(command[command.index("install") + 1 :])

    monkeypatch.setattr("benchmarks.newest.subprocess.run", run)
    monkeypatch.setattr(newest, "installed_releases", lambda: {"torch": "2.13.0+cpu", "trl": "1.0"})
    found = {name: Requirement(name + rest) for name, rest in {"torch": ">=2", "trl": "[x]>=1.2,<2"}.items()}
    newest.install(found, low=False)
    newest.install(found, low=True)
    assert [words[-1] for words in asked] == ["trl[x]", "trl[x]==1.2.1"] and "--upgrade" in asked[0]
    assert held == ["torch==2.13.0+cpu\n", "torch==2.13.0\n", "torch==2.13.0+cpu\n"]
    assert resolved == ["trl[x]<2,>=1.2\n"] and not any("torch" in words[3:] for words in asked)


def test_all_quick_tests_are_run_on_the_lowest_releases(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, codes = list[list[str]](), iter([0, 1])

    def run(command: list[str], cwd: Path) -> SimpleNamespace:
        asked.append(command[3:])
        return SimpleNamespace(returncode=next(codes))

    monkeypatch.setattr("benchmarks.newest.subprocess.run", run)
    monkeypatch.setattr(newest, "available", lambda found: {})
    monkeypatch.setattr(newest, "install", lambda found, low: None)
    assert newest.main(["--lowest", "--", "-m", "not gpu"]) == 1
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8").replace("$(DEVICE)", "tests/device")
    for words, where in zip(
        asked, ("--doctest-modules --ignore tests/device tests descant", "tests/device"), strict=True
    ):
        assert words == ["-m", "not gpu", "-m", "not slow and not gpu", *where.split()]
        assert f"-m 'not slow and not gpu' $(MANY) {where}\n" in makefile  # what `make test` runs
