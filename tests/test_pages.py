"""Every command of the README and the guides, in order, in an empty folder for each part of a page; one a commit."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as Picture

from tests.conftest import Result
from tests.forked import alone, fork_runs
from tests.pages import GUIDES, NOT_RUN, ROOT, WANTS, Section, sections, whole, words
from tests.rotation import turn

Cli = Callable[..., Result]
SECTIONS = [section for page in (ROOT / "README.md", *GUIDES) for section in sections(page)]
TYPED = [section for section in SECTIONS if any(whole(section))]


def photos(folder: Path) -> None:
    """What a reader has who begins with a page: pictures and a table, as the guide shows them."""
    (folder / "photos/beach").mkdir(parents=True)
    rows = ["file,caption"]
    for number in range(48):
        file = f"beach/{number:04d}.png" if number % 2 else f"{number:04d}.png"
        pixels = np.random.default_rng(number).integers(0, 255, (40, 48, 3), dtype=np.uint8)
        Picture.fromarray(pixels).save(folder / "photos" / file)
        rows.append(f"{file},picture number {number}")
    (folder / "photos/captions.csv").write_text("\n".join(rows) + "\n")


def flowers(folder: Path) -> None:
    """What load_dataset and save_to_disk leave, as the guide on the hub has it, of pictures like those."""
    from datasets import Dataset, DatasetDict, Features, Image, Value, disable_progress_bars

    disable_progress_bars()
    files = sorted((folder / "photos").rglob("*.png"))
    rows = [{"image": {"bytes": file.read_bytes(), "path": None}, "caption": f"flower {file.stem}"} for file in files]
    features = Features({"image": Image(), "caption": Value("string")})
    parts = {"train": rows[:32], "test": rows[32:]}
    saved = DatasetDict({split: Dataset.from_list(part, features=features) for split, part in parts.items()})
    saved.save_to_disk(str(folder / "flowers"))


@pytest.fixture
def own_modules() -> Iterator[None]:
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name in ("my_method", "shortest", "my_data"):
            del sys.modules[name]


@pytest.mark.slow
@pytest.mark.parametrize("section", turn(TYPED, len(TYPED)), ids=str)
def test_all_commands_of_a_section_in_order(
    section: Section, cli: Cli, workplace: Path, monkeypatch: pytest.MonkeyPatch, own_modules: None
) -> None:
    fork_runs(monkeypatch)
    (workplace / "toy.yaml").unlink()
    photos(workplace)
    if section.page == "hub.md":
        flowers(workplace)
    (workplace / "benchmarks").symlink_to(ROOT / "benchmarks")  # a plan's experiment is of a checkout
    if section.python:
        (workplace / "shortest.py").write_text(section.python)
    for name, text in section.files:
        (workplace / name).write_text(text)
    for command in dict.fromkeys(whole(section)):
        # a plan registers a device, which a process can do only before its first backward
        done = alone(words(command)) if command.startswith("descant plan ") else cli(*words(command))
        assert done.rc == 0, f"{command}\n{' '.join(words(command))}\n{done.err[-2000:]}"


def test_what_is_not_run_is_on_a_page_and_what_is_wanted_comes_before() -> None:
    every = [command for section in SECTIONS for command in section.commands]
    assert len(every) > 50 and {section.page for section in SECTIONS} | {"contracts.md"} == {
        "README.md",
        *(page.name for page in GUIDES),
    }
    for pattern in NOT_RUN:
        assert any(re.match(pattern, command) for command in every), pattern
    for (page, pattern), wanted in WANTS.items():
        of_page = [command for section in SECTIONS if section.page == page for command in section.commands]
        reading = next(at for at, command in enumerate(of_page) if re.match(pattern, command))
        assert any(wanted.removeprefix("descant ") in command for command in of_page[:reading]), (page, pattern)


#: Commands whose first line was left out -> the command that is named.
ALONE = {
    "descant fit --config contrastive/own --data.path shards": "`descant data make FOLDER --out shards`",
    "descant export contrastive-own/001 --out my-model": "`descant fit --config contrastive/own`",
    "descant fit --config my_method.yaml --trust my_method": "`descant new recipe my_method`",
    "descant validate --config runs/demo/001/config.yaml --ckpt_path best": "--name demo`",
    "descant predict --run demo/001": "--name demo`",
    "descant compare contrastive-emoji siglip": "`descant fit --config contrastive/emoji`",
    "descant report contrastive-emoji siglip --output siglip.html": "`descant fit --config contrastive/emoji`",
    "descant test --run contrastive-emoji/latest": "`descant fit --config contrastive/emoji`",
    "descant fit --config reinforce/emoji": "`descant fit --config chat/emoji --name answers`",
}


#: Those that are refused when the model or the data is built.
LATE = ("descant fit --config contrastive/own", "descant fit --config reinforce")


@pytest.mark.parametrize("command", [pytest.param(c, marks=[pytest.mark.slow] * c.startswith(LATE)) for c in ALONE])
def test_a_command_without_the_one_before_names_it_in_a_line(command: str, cli: Cli, workplace: Path) -> None:
    done = cli(*words(command))
    # what precision a processor chooses is said before data is looked for
    *before, told = done.err.splitlines()
    assert done.rc == 2 and all(line.startswith("descant: precision ") for line in before), done.err
    assert ALONE[command] in told and told.endswith(("makes it", "writes one of yours")), told


def test_the_examples_of_the_contracts_run() -> None:
    page = (ROOT / "docs/guides/contracts.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 9
    exec("\n".join(blocks), {})  # its lines assert what they state
