"""Experiments, overlays and data sets that ship: find a YAML or an arm of a claim by its name."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from descant.cli.errors import Refusal, hint, one_line
from descant.cli.untrusted import text_of, yaml_of
from descant.modules.io.cache import cache_folder
from descant.modules.io.checkpoints import follow_latest
from descant.modules.io.files import write_text

ROOT = Path(__file__).resolve().parents[1] / "experiments"
BASE = ROOT / "base.yaml"
#: The list of papers, which is not a configuration.
PAPERS = ROOT / "papers/index.yaml"
#: Folders of pieces that complete an experiment; everything else is an experiment.
OVERLAYS = ("data", "on", "with")


def list_shipped() -> dict[str, Path]:
    """Return name -> file of everything that ships, such as ``contrastive/emoji`` or ``on/tiny``."""
    files = (file for file in sorted(ROOT.rglob("*.yaml")) if file not in (BASE, PAPERS))
    return {file.relative_to(ROOT).with_suffix("").as_posix(): file for file in files}


def experiments() -> dict[str, Path]:
    """Return name -> file of the experiments, which can be run by themselves."""
    return {name: file for name, file in list_shipped().items() if name.split("/")[0] not in (*OVERLAYS, "claims")}


def overlays() -> dict[str, Path]:
    """Return name -> file of the overlays, which complete an experiment."""
    return {name: file for name, file in list_shipped().items() if name.split("/")[0] in OVERLAYS}


def run_name(file: Path) -> str:
    """Return the name for runs of a file: ``family-name`` if it ships, since file names are not unique there.

    >>> run_name(ROOT / "masked/emoji.yaml"), run_name(Path("mine.yaml"))
    ('masked-emoji', 'mine')
    """
    if file.resolve().is_relative_to(ROOT.resolve()):
        return "-".join(file.resolve().relative_to(ROOT.resolve()).with_suffix("").parts)
    return file.stem


def made_by(run: str) -> str:
    """Return ``; COMMAND makes it`` for a missing run: from an experiment's line `Before`, else from the run's name.

    >>> made_by("runs/contrastive-emoji/001/config.yaml"), made_by("whole")[:50]
    ('; `descant fit --config contrastive/emoji` makes it', '; `descant fit --config fusion/emoji --config with')
    >>> made_by("mine/latest")
    '; `descant fit --config EXPERIMENT --name mine` makes it'
    """
    name = re.sub(r"^runs/|/(\d{3,}|latest)(/.*)?$", "", run)
    if not re.fullmatch(r"[\w.-]+", name):  # a pattern, a path, or a text that no user would type
        return ""
    commands = (f"fit --config {full}" for full, file in experiments().items() if run_name(file) == name)
    before = (
        line[1]
        for file in list_shipped().values()
        for line in re.finditer(r"^# Before: +descant (fit .*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
        if line[1].endswith(f"--name {name}")
    )
    command = next(commands, None) or next(before, None) or f"fit --config EXPERIMENT --name {name}"
    return f"; `descant {command}` makes it"


def with_maker(line: str) -> str:
    """Append the command that makes a missing run or folder to the error line that reports it.

    >>> with_maker("runs/whole: no such run, checkpoint or export").partition("; ")[2][:36]
    '`descant fit --config fusion/emoji -'
    >>> with_maker("shards: no such file or folder")
    'shards: no such file or folder; yours, or of shards: `descant data make FOLDER --out shards` makes it'
    """
    if run := re.search(r"([^\s:]+): no such run, checkpoint or export$", line):
        return line + made_by(run[1])
    if folder := re.search(r"^([\w/-]+): no such file or folder$", line):
        return f"{line}; yours, or of shards: `descant data make FOLDER --out {folder[1]}` makes it"
    return line


def header(file: Path) -> str:
    """Return the first line of a YAML's leading comment, without its mark."""
    first = file.read_text(encoding="utf-8").partition("\n")[0]
    return first.lstrip("# ").rstrip() if first.startswith("#") else ""


@cache
def papers() -> tuple[dict[str, Any], ...]:
    """Return the rows of the list of papers, in their order."""
    return tuple(_yaml(PAPERS))


def _yaml(file: Path) -> Any:
    try:
        return yaml_of(file)
    except (OSError, ValueError) as error:
        raise Refusal(f"{file.name}: {one_line(error)}") from None


def find(name: str) -> Path:
    """Find the file that ``--config NAME`` means: an existing file first, else what ships under that name.

    ``claims/dcd:sham`` means the configuration that this arm of the claim adds.
    """
    try:
        file = follow_latest(Path(name).expanduser())
        if file.is_file():
            return file.resolve()
    except (OSError, RuntimeError):  # too long for a name, or the home of an unknown user
        pass
    plain = name.removesuffix(".yaml").removeprefix("experiments/")
    if (there := _find_shipped(plain)) is not None:
        return there
    if arm := re.fullmatch(r"(.+?):([\w.-]+)", name):
        return _arm(name, find(arm[1]), arm[2])
    known = list_shipped()
    # a bare name is enough if only one experiment has it
    same = [full for full in experiments() if full.split("/")[-1] == plain]
    if len(same) == 1:
        return known[same[0]]
    near = hint(plain, known)
    if not near and (run := re.fullmatch(r"(runs/.+/(?:\d{3,}|latest))/config\.yaml", name)):
        near = made_by(run[1])
    elif not near and (new_recipe := re.fullmatch(r"(\w+)\.yaml", name)):
        near = f"; `descant new recipe {new_recipe[1]}` writes one of yours"
    raise Refusal(f"--config {name}: no such file, and nothing of that name ships{near}")


def _find_shipped(name: str) -> Path | None:
    file = ROOT / f"{name}.yaml"
    try:
        there = re.fullmatch(r"[\w/-]+", name) and file.is_file()
    except OSError:  # too long for a name
        return None
    return file if there and file not in (BASE, PAPERS) else None


def _arm(name: str, claim: Path, arm: str) -> Path:
    """Write the ``config`` of an arm of a claim to a file in the cache."""
    import yaml

    content = _yaml(claim)
    given = content.get("arms") if isinstance(content, dict) else None
    arms = {**given, "before": content.get("before")} if isinstance(given, dict) else {}
    configs = {key: value["config"] for key, value in arms.items() if isinstance(value, dict) and value.get("config")}
    if arm not in configs:
        raise Refusal(f"--config {name}: {claim.name} has no arm {arm!r} with a `config`{hint(arm, configs, most=0)}")
    text = f"# {name}\n{yaml.safe_dump(configs[arm], sort_keys=False)}"
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    file = cache_folder() / "arms" / f"{claim.stem}-{arm}-{digest}.yaml"
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, text)
    return file


def layers(files: Iterable[Path]) -> list[Path]:
    """Put the configurations that each one extends before it, in the order in which they apply."""
    ordered: list[Path] = []
    for file in files:
        ordered += [first for first in list_bases(file) if first not in ordered]
        ordered.append(file)
    return ordered


def list_bases(file: Path, seen: tuple[Path, ...] = ()) -> list[Path]:
    """List the files that ``extends: NAME`` or ``extends: [NAME, ...]`` of a configuration means, at any depth."""
    try:
        content = yaml_of(file) if "extends" in text_of(file) else None
    except (OSError, ValueError):
        return []  # reported when it is loaded
    value = content.get("extends") if isinstance(content, dict) else None
    names = [value] if isinstance(value, str) else value or []
    if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise Refusal(f"{file.name}: extends: the name of a configuration is expected, or a list of names")
    if file in seen:
        raise Refusal(f"{file.name}: extends: it extends itself")
    ordered: list[Path] = []
    for name in names:
        beside = file.parent / name
        one = beside.resolve() if beside.is_file() else find(name)
        ordered += [part for part in (*list_bases(one, (*seen, file)), one) if part not in ordered]
    return ordered


def shipped_data(name: str | None) -> Path | None:
    """Find the file of a data set that ships, for ``--data shards`` or ``--data data/shards``; None otherwise."""
    plain = f"data/{(name or '').removesuffix('.yaml').removeprefix('data/')}"
    return None if Path(name or "").is_file() else list_shipped().get(plain)
