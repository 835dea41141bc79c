"""The YAML that ships with Descant: found by name from any folder, listed with its first line."""

from __future__ import annotations

import re
from pathlib import Path

from descant.cli.errors import Refusal, hint
from descant.modules.io.checkpoints import followed

ROOT = Path(__file__).resolve().parents[1] / "experiments"
BASE = ROOT / "base.yaml"
#: Folders of pieces that complete an experiment; everything else is an experiment.
OVERLAYS = ("data", "on", "with")


def shipped() -> dict[str, Path]:
    """Name -> file of all that ships, such as ``contrastive/emoji`` or ``on/tiny``."""
    files = sorted(ROOT.rglob("*.yaml"))
    return {file.relative_to(ROOT).with_suffix("").as_posix(): file for file in files if file != BASE}


def experiments() -> dict[str, Path]:
    """Name -> file of what can be run by itself."""
    return {name: file for name, file in shipped().items() if name.split("/")[0] not in (*OVERLAYS, "claims")}


def overlays() -> dict[str, Path]:
    """Name -> file of what is laid over an experiment."""
    return {name: file for name, file in shipped().items() if name.split("/")[0] in OVERLAYS}


def run_name(file: Path) -> str:
    """How runs of a file are called: ``family-name`` where it ships, since names of files are not unique there.

    >>> run_name(ROOT / "masked/emoji.yaml"), run_name(Path("mine.yaml"))
    ('masked-emoji', 'mine')
    """
    if file.resolve().is_relative_to(ROOT.resolve()):
        return "-".join(file.resolve().relative_to(ROOT.resolve()).with_suffix("").parts)
    return file.stem


def made_by(run: str) -> str:
    """``; COMMAND makes it`` for a run that is not there: what the experiments say comes before, else of its name.

    >>> made_by("runs/contrastive-emoji/001/config.yaml"), made_by("whole")[:50]
    ('; `descant fit --config contrastive/emoji` makes it', '; `descant fit --config fusion/emoji --config with')
    >>> made_by("mine/latest")
    '; `descant fit --config EXPERIMENT --name mine` makes it'
    """
    name = re.sub(r"^runs/|/(\d{3,}|latest)(/.*)?$", "", run)
    if not re.fullmatch(r"[\w.-]+", name):  # a pattern, a path, or nothing that one would type
        return ""
    said = (f"fit --config {full}" for full, file in experiments().items() if run_name(file) == name)
    before = (
        line[1]
        for file in shipped().values()
        for line in re.finditer(r"^# Before: +descant (fit .*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
        if line[1].endswith(f"--name {name}")
    )
    command = next(said, None) or next(before, None) or f"fit --config EXPERIMENT --name {name}"
    return f"; `descant {command}` makes it"


def with_maker(line: str) -> str:
    """A line that ends by what is not there, and the command that makes it.

    >>> with_maker("runs/whole: no such run, checkpoint or export").partition("; ")[2][:36]
    '`descant fit --config fusion/emoji -'
    >>> with_maker("shards: no such file or folder")
    'shards: no such file or folder; yours, or of shards: `descant data make FOLDER --out shards` makes it'
    """
    if found := re.search(r"([^\s:]+): no such run, checkpoint or export$", line):
        return line + made_by(found[1])
    if found := re.search(r"^([\w/-]+): no such file or folder$", line):
        return f"{line}; yours, or of shards: `descant data make FOLDER --out {found[1]}` makes it"
    return line


def header(file: Path) -> str:
    """The first line of a YAML's leading comment, without its mark."""
    first = file.read_text(encoding="utf-8").partition("\n")[0]
    return first.lstrip("# ").rstrip() if first.startswith("#") else ""


def find(name: str) -> Path:
    """The file that ``--config NAME`` means: an existing file first, else what ships under that name.

    Raises:
        Refusal: if there is neither.
    """
    try:
        file = followed(Path(name).expanduser())
        if file.is_file():
            return file.resolve()
    except (OSError, RuntimeError):  # longer than any name may be, or the home of nobody
        pass
    known = shipped()
    plain = name.removesuffix(".yaml").removeprefix("experiments/")
    if plain in known:
        return known[plain]
    # a bare name is enough where only one experiment carries it
    same = [full for full in experiments() if full.split("/")[-1] == plain]
    if len(same) == 1:
        return known[same[0]]
    near = hint(plain, known)
    if not near and (run := re.fullmatch(r"(runs/.+/(?:\d{3,}|latest))/config\.yaml", name)):
        near = made_by(run[1])
    elif not near and (own := re.fullmatch(r"(\w+)\.yaml", name)):
        near = f"; `descant new recipe {own[1]}` writes one of yours"
    raise Refusal(f"--config {name}: no such file, and nothing of that name ships{near}")


def shipped_data(name: str | None) -> Path | None:
    """The file of a data set that ships, for ``--data shards`` or ``--data data/shards``; None where none is meant."""
    plain = f"data/{(name or '').removesuffix('.yaml').removeprefix('data/')}"
    return None if Path(name or "").is_file() else shipped().get(plain)
