"""The page "A paper in three files": its blocks are files that ship, and lead from a tree without them to green."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.mutants import copy_tree

ROOT = Path(__file__).parent.parent
INDEX = "experiments/papers/index.yaml"
FILES = ("modules/multitask/cmgh.py", "experiments/papers/cmgh.yaml", "tests/papers/test_cmgh.py")
#: The row, its red lines, the three files and what comes of the last commands.
ROW, RED, *TEXTS, GREEN = re.findall(
    r"^```(?:yaml|python|text)\n(.*?)^```", (ROOT / "docs/guides/paper.md").read_text(), re.MULTILINE | re.DOTALL
)


def test_its_blocks_are_the_files_that_ship(cli: Any) -> None:
    assert f"\n{ROW}- " in (ROOT / INDEX).read_text()
    assert [(ROOT / file).read_text() for file in FILES] == TEXTS
    assert cli("list", "papers", "cmgh").out.splitlines()[1] == GREEN.splitlines()[1]


@pytest.mark.slow
def test_from_a_tree_without_the_paper_the_page_leads_to_green_tests(tmp_path: Path) -> None:
    copy_tree(tmp_path)
    for file in FILES:
        (tmp_path / file).unlink()
    home = tmp_path / "modules/multitask/__init__.py"
    home.write_text("".join(line for line in home.read_text().splitlines(keepends=True) if "CMGH" not in line))
    rows = (tmp_path / INDEX).read_text().replace(ROW, "")
    (tmp_path / INDEX).write_text(rows + ROW)

    def pytest_prints(*words: str) -> str:
        environment = {**os.environ, "PYTHONPATH": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")}
        command = [sys.executable, "-m", "pytest", *words]
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        ).stdout

    printed = pytest_prints("tests/papers/test_index.py", "-k", "whole")
    assert [line.removeprefix("E").strip() for line in printed.splitlines() if line.startswith("E    ")][:4] == [
        f"{'AssertionError: ' * (n == 0)}{line}" for n, line in enumerate(RED.splitlines())
    ]
    for file, text in zip(FILES, TEXTS, strict=True):
        (tmp_path / file).write_text(text)
    assert f"\n{GREEN.split(' in ')[0]} in " in pytest_prints(FILES[-1])
