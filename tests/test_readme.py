"""Every command that the README and the experiments tell a reader to type means something."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from descant.__main__ import COMMANDS, TOOLS, main
from descant.claims import comparison, spec
from descant.cli.arguments import read
from descant.cli.catalogue import experiments
from descant.cli.dump import Written
from descant.cli.precheck import needs_check, precheck
from descant.plan import plan
from descant.slurm import submit, sweep
from tests.conftest import Result

Cli = Callable[..., Result]
ROOT = Path(__file__).parent.parent
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")),
    *(ROOT / "docs").rglob("*.md"),
    *(ROOT / "docs").rglob("*.ipynb"),
]
CONFIGURED = ("fit", "check", "validate", "test", "predict")


def told() -> Iterator[str]:
    """Commands in blocks of the pages, and in the heads of experiments; continued lines are one."""
    for page in PAGES:
        text = _text(page)
        blocks = re.findall(r"^ *```\w*\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL)
        for line in "".join(blocks).replace("\\\n", " ").splitlines():
            if line.strip().startswith("descant "):
                yield line.strip()
        yield from re.findall(r"`(descant [^`\n]+ --config [^`\n]+)`", text)
    for file in experiments().values():
        for line in file.read_text().splitlines():
            if match := re.match(r"# (?:Command|Before): +(descant [^(]+)", line):
                yield match[1]


def _text(page: Path) -> str:
    """What a page tells in words; the commands in a notebook's cells are run by tests/test_tutorials.py."""
    if page.suffix != ".ipynb":
        return page.read_text()
    cells = json.loads(page.read_text())["cells"]
    return "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")


@pytest.mark.parametrize("line", sorted(set(told())))
def test_a_command_means_something(
    line: str, cli: Cli, written_content: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    _, *words = shlex.split(line.replace("$seed", "0"), comments=True)
    _checked([word for word in words if word != "NAME" and "..." not in word], cli, written_content)


def _checked(words: list[str], cli: Cli, content: dict[str, Any]) -> None:
    command, *rest = words
    assert command in COMMANDS or command.startswith("--"), command
    if command in CONFIGURED:
        if any(word.startswith("runs/") or word in ("my_method.yaml", "clip.yaml", "siglip.yaml") for word in rest):
            return  # of a run, or of a file that the reader or `descant new` writes
        request = read(command, rest)
        if needs_check(request) and request.configs:
            known = Written(content, "fit" if command == "check" else command)
            precheck(known, request.files, request.options, request.trust)
    elif command == "sweep":
        mine, theirs = sweep._split(rest)
        assert all(word.partition("=")[0] in _help("sweep", "--help") for word in mine if word.startswith("--"))
        _checked(["fit", *theirs], cli, content)
        assert any(word.startswith("--vary") for word in mine)
    elif command == "plan":
        mine, theirs = plan._split(rest)
        if theirs:
            plan._read(mine, theirs)
            _checked(theirs, cli, content)
    elif command == "submit":
        *_, (name, *theirs) = submit._split(rest)
        _checked([name, *theirs], cli, content)
    elif command == "claims":
        for name in rest[1:2]:
            # that of the guide is loaded by tests/descant/test_claims.py
            shipped = name in comparison.names() or name.startswith("--") or name == "mine.yaml"
            assert shipped or spec.load(name)
    elif command in TOOLS:
        under = rest[:1] if command in ("data", "new") else []
        page = _help(command, "--help") + _help(command, *under, "--help")
        for word in rest:
            if word.startswith("--"):
                assert word.partition("=")[0] in page, f"{command} {word}"


def _help(*words: str) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):  # as argparse ends
        main(list(words))
    return out.getvalue()


def test_the_recipe_of_the_guide_trains(cli: Cli) -> None:
    blocks = re.findall(
        r"^```python\n(.*?)^```", (ROOT / "docs/guides/recipe.md").read_text(), re.MULTILINE | re.DOTALL
    )
    Path("shortest.py").write_text("\n".join(blocks))
    for name, more, terms in (
        ("Shortest", ("--model.mix", "{align: 0.5}"), ("contrast", "align")),
        ("Decorrelated", (), ("decorrelate",)),
    ):
        words = ("--model", f"shortest.{name}", *more, "--trust", "shortest", "--name", name)
        done = cli("fit", "--config", "contrastive/emoji", "--config", "on/tiny", *words)
        assert done.rc == 0, done.err
        header = (Path("runs") / name / "001" / "metrics.csv").read_text()
        assert all(term in header for term in terms)
