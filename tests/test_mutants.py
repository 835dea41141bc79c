"""The list of mutation tests fits the tree; that each mutant is caught takes minutes: `make mutants`."""

from __future__ import annotations

import ast
import os
from collections import Counter
from pathlib import Path

import pytest

from tests.mutants import TOP, Mutant, Runner, chosen, load, main, replaced

MUTANTS = load()


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_it_fits_its_file_once_and_changes_what_python_reads(mutant: Mutant) -> None:
    file = TOP / mutant.file
    assert file.resolve() == file, "the real path, not one through a link"
    text = file.read_text(encoding="utf-8")
    before, after = ast.parse(text), ast.parse(mutant.applied(text))
    assert ast.dump(before) != ast.dump(after), "another line, and not another comment"
    for test in mutant.tests:
        where, _, name = test.partition("::")
        assert (TOP / where).is_file(), where
        assert not name or f"\ndef {name}(" in (TOP / where).read_text(encoding="utf-8"), test
    assert mutant.why


def test_there_are_forty_all_over_the_tree() -> None:
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) == 40
    assert max(Counter(mutant.file for mutant in MUTANTS).values()) <= 2
    folders = {str(Path(mutant.file).parent) for mutant in MUTANTS}
    assert folders >= {
        *("modules/core", "modules/losses", "modules/towers", "modules/language", "modules/policy", "recipes"),
        *(
            "callbacks/checkpoints",
            "callbacks/harmonize",
            "datamodules",
            "datamodules/sources",
            "descant/cli",
            "descant/claims",
        ),
    }


def test_a_replacement_is_of_a_copy_and_taken_back(tmp_path: Path) -> None:
    mutant = Mutant("half", "part.py", "why", "a + b", "a", ("tests/test_part.py",))
    (tmp_path / "part.py").write_text("total = a + b\n")
    before = os.stat(tmp_path / "part.py").st_mtime
    with pytest.raises(KeyError), replaced(mutant, tmp_path):
        assert (tmp_path / "part.py").read_text() == "total = a\n"
        assert os.stat(tmp_path / "part.py").st_mtime != before, "or bytecode of the one would be run for the other"
        raise KeyError
    assert (tmp_path / "part.py").read_text() == "total = a + b\n"
    assert os.stat(tmp_path / "part.py").st_mtime == before


def test_a_line_that_is_gone_or_there_twice_is_told_and_no_test_is_run(tmp_path: Path) -> None:
    mutant = Mutant("half", "part.py", "why", "a + b", "a", ("tests/test_part.py",))
    runner = Runner(tmp_path)
    runner._free.put(tmp_path)
    for text, times in (("total = a\n", 0), ("total = a + b\nmean = (a + b) / 2\n", 2)):
        (tmp_path / "part.py").write_text(text)
        found = runner.mutated(mutant)
        assert (found.verdict, found.caught) == ("no match", False)
        assert found.output == f"half: its text is {times} times in part.py; exactly once is needed"
        assert (tmp_path / "part.py").read_text() == text


def test_an_unknown_name_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert [mutant.name for mutant in chosen(MUTANTS, [MUTANTS[3].name])] == [MUTANTS[3].name]
    with pytest.raises(SystemExit) as ended:
        main(["--only", MUTANTS[0].name[:-1], "--list"])
    assert ended.value.code == 2
    assert f"no such mutant; nearest: {MUTANTS[0].name} (--list)" in capsys.readouterr().err
