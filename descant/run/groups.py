"""Finished runs, read from their folders and grouped by configuration: the seeds of one configuration are a group.

Run folders are untrusted: names lose characters that do not print, and oversized content is refused.
"""

from __future__ import annotations

import glob
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from descant.cli.catalogue import made_by
from descant.cli.errors import fail, hint, one_line, say
from descant.cli.errors import printable as clean
from descant.cli.schema import names_class
from descant.cli.trust import within
from descant.cli.untrusted import json_of, text_of
from descant.modules.io.checkpoints import follow_latest
from descant.run import runs
from descant.run.changes import FREE

#: Callbacks that change neither training nor metrics.
_WATCHERS = (
    *("Report", "Progress", "Sanity", "Resume", "ModelCheckpoint", "LeanCheckpoint", "Throughput"),
    *("TrainFlops", "RetrievalPictures", "Projector", "Watch"),
)
_CALLBACKS = "trainer.callbacks"
_NO_SETTINGS = (*(key.replace(".init_args", "") for key in FREE), *(f"{_CALLBACKS}.{name}" for name in _WATCHERS))
#: Lines of a configuration (with continuation lines) that differ between equal runs.
_OWN = re.compile(r"^(?:seed_everything|name):.*\n?(?:[ \t].*\n?)*", re.MULTILINE)
_SEED = re.compile(r"^seed_everything: *(\d{1,18}) *$", re.MULTILINE)
_MOST_SETTINGS = 20_000
#: Number of settings that are read at a glance, and maximum number in the name of a group.
_READ = 3
MOST_TOLD = 6
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml is ten times as fast


class Class(str):
    """Class name as the value of a setting."""


@dataclass(frozen=True)
class Run:
    """One run folder.

    Attributes:
        folder: folder of the run. name: ``NAME/001``. seed: ``seed_everything``; None if none was set.
        settings: dotted key -> value, of all settings that affect training; null counts as missing.
        metrics: finite metrics of ``metrics.json``. monitored: metric -> min or max, of its ModelCheckpoints.
        stopped: ``400 of 1,000 steps``, for a run that ended before its Trainer's limit; else empty.
    """

    folder: Path
    name: str
    seed: int | None
    settings: Mapping[str, object]
    metrics: Mapping[str, float]
    monitored: Mapping[str, str]
    stopped: str = ""


@dataclass
class Group:
    """Runs that differ only in their seed, by seed; a run without one is listed by name.

    Attributes:
        name: the settings that differ from the other groups. parts: the same, by dotted key.
    """

    runs: dict[int | str, Run]
    name: str = ""
    parts: dict[str, object] = field(default_factory=dict)

    @property
    def first(self) -> Run:
        return next(iter(self.runs.values()))

    @property
    def stopped_runs(self) -> list[Run]:
        """Return the runs that ended before their limit."""
        return [run for run in self.runs.values() if run.stopped]

    @property
    def seeds(self) -> list[int]:
        return [seed for seed in self.runs if isinstance(seed, int)]


def load(command: str, words: Sequence[str], root: Path) -> list[Run]:
    """Find the runs of ``words``: a run's folder, NAME (all its runs), NAME/001, a folder of names, or a pattern."""
    explicit: dict[Path, bool] = {}
    for word in words:
        folders, named = _find(command, word, root)
        for folder in folders:
            explicit[folder.resolve()] = explicit.get(folder.resolve(), False) or named
    read, without = [], []
    for folder, named in explicit.items():
        if _has_metrics(folder):
            read.append(_read(command, folder))
        elif named:
            there = [path for path in runs.runs_of(folder.parent.parent, folder.parent.name) if _has_metrics(path)]
            name = _name(folder)
            fail(f"{command} {name}: no metrics.json: nothing was evaluated yet{hint(name, map(_name, there))}")
        else:
            without.append(_name(folder))
    if not read:
        fail(f"{command} {' '.join(words)}: none of these runs has a metrics.json: nothing was evaluated yet")
    if without:
        say(f"skipped, as nothing was evaluated yet: {', '.join(without)}")
    return read


def _find(command: str, word: str, root: Path) -> tuple[list[Path], bool]:
    """Return the run folders of a word, and whether it names a single run."""
    for path in (follow_latest(root / word), follow_latest(Path(word))):
        if runs.is_run(path):
            return [path], True
        if several := runs.runs_of(path.parent, path.name):
            return several, False
    matches = [root / match for match in glob.glob(word, root_dir=root)] or [Path(match) for match in glob.glob(word)]
    folders: list[Path] = []
    for path in sorted(map(follow_latest, matches)):
        folders += runs.runs_below(path)
    if not folders:
        known = [path for path in root.glob("*/*") if runs.is_run(path) and not path.is_symlink()]
        names = {path.parent.name for path in known} | {_name(path) for path in known}
        fail(f"{command} {word}: no such run under {root}{hint(word, names) or made_by(word)}")
    return folders, False


def _has_metrics(folder: Path) -> bool:
    return (folder / "metrics.json").exists()  # even if it cannot be read, which is reported later


def _name(folder: Path) -> str:
    return clean(f"{folder.parent.name}/{folder.name}")


def _read(command: str, folder: Path) -> Run:
    file = folder / "config.yaml"
    try:
        text = text_of(file, folder)
        settings, monitored = _configuration(_OWN.sub("", text))
        file = folder / "metrics.json"
        metrics = numbers(json_of(file, folder))
    except (OSError, ValueError, TypeError, AttributeError, ArithmeticError, RecursionError, yaml.YAMLError) as error:
        fail(f"{command} {_name(folder)}: {file.name} cannot be read: {clean(one_line(error))}")
    return Run(folder, _name(folder), seed_of(text), settings, metrics, monitored, describe_stop(settings, metrics))


def describe_stop(settings: Mapping[str, object], metrics: Mapping[str, float]) -> str:
    """Describe how far a run came, if it ended before its Trainer's limit; empty otherwise, or if that is unknown.

    A run with EarlyStopping, ``max_time`` or the callback Budget, which replace that limit, counts as finished.

    >>> describe_stop({"trainer.max_steps": 1000, "trainer.max_epochs": -1}, {"steps": 400, "epochs": 3})
    '400 of 1,000 steps'
    >>> describe_stop({"trainer.max_steps": 1000, "trainer.max_epochs": 3}, {"steps": 400, "epochs": 3})
    ''
    >>> describe_stop({"trainer.max_steps": 1000, "trainer.callbacks.Budget": "Budget"}, {"steps": 400})
    ''
    """
    ending = ("trainer.max_time", f"{_CALLBACKS}.EarlyStopping", f"{_CALLBACKS}.Budget")
    if any(key in settings for key in ending):
        return ""
    progress = []
    for unit in ("steps", "epochs"):
        most, done = settings.get(f"trainer.max_{unit}"), metrics.get(unit)
        if isinstance(most, int) and most > 0 and done is not None:
            if done >= most:
                return ""
            progress.append(f"{done:,.0f} of {most:,} {unit}")
    return progress[0] if progress else ""


def seed_of(text: str) -> int | None:
    """Return ``seed_everything`` of a configuration; None if it is not a number.

    >>> seed_of("seed_everything: 3\\n")
    3
    """
    match = _SEED.search(text)
    return int(match[1]) if match else None


def numbers(content: object) -> dict[str, float]:
    """Return the finite numbers of an object by name.

    >>> numbers({"val/r1": 0.5, "val/loss": None, "note": "x"})
    {'val/r1': 0.5}
    """
    items = content.items() if isinstance(content, dict) else ()
    values = {clean(k): v for k, v in items if isinstance(v, int | float) and not isinstance(v, bool)}
    return {key: float(value) for key, value in values.items() if math.isfinite(value)}


@cache  # the seeds of a group share a text, and parsing YAML takes most of the time
def _configuration(text: str) -> tuple[dict[str, object], dict[str, str]]:
    """Return the settings, and the metrics that ModelCheckpoints monitor."""
    config = yaml.load(text, Loader=_LOADER)
    every = list(islice(_flat(config), _MOST_SETTINGS + 1))
    if len(every) > _MOST_SETTINGS:  # a few lines of YAML can expand to billions of values
        raise ValueError(f"more than {_MOST_SETTINGS:,} settings")
    flat = {key: value for key, value in every if value is not None}
    checkpoints = [key for key, value in flat.items() if value == "ModelCheckpoint" and key.startswith(_CALLBACKS)]
    monitored = {str(flat[f"{k}.monitor"]): str(flat.get(f"{k}.mode")) for k in checkpoints if f"{k}.monitor" in flat}
    return {k: value for k, value in flat.items() if not within(re.sub(r"#\d+", "", k), _NO_SETTINGS)}, monitored


def _flat(value: object, path: str = "") -> Iterator[tuple[str, object]]:
    """Yield every setting by its dotted path; a class is the value of its path, and its arguments follow below it.

    Empty nodes are yielded as None, so that a limit on the number of settings also limits time.

    >>> dict(_flat({"model": {"class_path": "a.B", "init_args": {"n": 1, "k": None}}, "at": [1, 5]}))
    {'model': 'B', 'model.n': 1, 'model.k': None, 'at': '[1, 5]'}
    """
    if isinstance(value, tuple | set):  # YAML's !!pairs, !!omap and !!set
        value = list(value)
    if isinstance(value, dict):
        if names_class(value):
            yield path, Class(_class(value))
            value = value.get("init_args")
            if not isinstance(value, dict):
                return
        elif not value:
            yield path, None
        for key, inner in value.items():
            yield from _flat(inner, clean(f"{path}.{key}" if path else key))
    elif isinstance(value, list) and value and all(map(names_class, value)):
        names = [_class(item) for item in value]
        if path != _CALLBACKS:  # the order of callbacks does not matter
            yield path, clean(", ".join(names))
        for n, (name, item) in enumerate(zip(names, value, strict=True)):
            before = names[:n].count(name)
            yield from _flat(item, f"{path}.{name}{f'#{before + 1}' if before else ''}")
    elif isinstance(value, list) and any(isinstance(item, dict | list | tuple | set) for item in value):
        for n, item in enumerate(value):
            yield from _flat(item, f"{path}.{n}")
    else:
        yield path, value if value is None or isinstance(value, bool | int | float) else clean(value)


def _class(node: Mapping[str, object]) -> str:
    return clean(node["class_path"]).rpartition(".")[2]


def group(runs_: Iterable[Run]) -> list[Group]:
    """Group runs, in the order of their first run; of two runs with one seed, the later counts, with a notice."""
    groups: dict[frozenset[tuple[str, object]], Group] = {}
    duplicates = []
    for run in runs_:
        members = groups.setdefault(frozenset(run.settings.items()), Group({})).runs
        seed = run.name if run.seed is None else run.seed
        if seed in members:
            duplicates.append(f"{run.name} and not {members[seed].name}")
        members[seed] = run
    for one in groups.values():
        one.runs = dict(sorted(one.runs.items(), key=lambda item: (isinstance(item[0], str), item[0])))
        steps = [run.metrics.get("steps", 0) for run in one.runs.values()]
        if min(steps) < max(steps):
            say(f"{one.first.name} and its other seeds have {min(steps):,.0f} to {max(steps):,.0f} steps")
    if duplicates:
        more = f" ({len(duplicates) - 1} more)" if len(duplicates) > 1 else ""
        say(f"runs of the same configuration and seed: {duplicates[0]} counts{more}")
    _label(list(groups.values()))
    return list(groups.values())


def _label(groups: Sequence[Group]) -> None:
    """Name each group by at most three differing settings or, if there are more, by the name of its runs.

    If two groups have runs of one name, use as many settings as distinguish them, up to six, and then a run.
    """
    if len(groups) == 1:
        groups[0].name = clean(groups[0].first.folder.parent.name)
        return
    _part(groups)
    keys = {key for one in groups for key in one.parts}
    often = Counter(end for key in keys for end in _ends(key))
    short = {key: next((end for end in _ends(key) if often[end] == 1), key) for key in keys}
    most = max(len(one.parts) for one in groups)
    names = [{clean(run.folder.parent.name) for run in one.runs.values()} for one in groups]
    if most > _READ and all(len(of) == 1 for of in names) and len(set().union(*names)) == len(groups):
        for one, of in zip(groups, names, strict=True):
            (one.name,) = of
        return
    for width in range(min(_READ, most), min(most, MOST_TOLD) + 1):
        for one in groups:
            parts = [_setting(short[key], value) for key, value in one.parts.items()]
            one.name = " ".join(parts[:width]) + (f" +{len(parts) - width}" if len(parts) > width else "")
        if len({one.name for one in groups}) == len(groups):
            return
    alike = Counter(one.name for one in groups)  # a later setting differs, or values print alike: 1 and "1"
    for number, one in enumerate(groups, 1):
        if alike[one.name] > 1:
            unique = len({g.first.name for g in groups}) == len(groups)
            one.name += f" ({one.first.name})" if unique else f" #{number}"


def _part(groups: Sequence[Group]) -> None:
    """Fill ``parts`` with the outermost settings that differ, recursively within groups that share these.

    A class that differs hides its arguments.
    """
    settings = [one.first.settings for one in groups]
    differ = {key for key in set().union(*settings) if any(s.get(key) != settings[0].get(key) for s in settings)}
    outer = [key for key in differ if not any(key.startswith(f"{above}.") for above in differ)]
    outer.sort(key=lambda key: (not any(isinstance(s.get(key), Class) for s in settings), key))
    alike: dict[tuple[object, ...], list[Group]] = {}
    for one in groups:
        one.parts |= {key: one.first.settings.get(key) for key in outer}
        alike.setdefault(tuple(one.first.settings.get(key) for key in outer), []).append(one)
    for some in alike.values():
        if len(some) > 1:
            _part(some)


def _ends(key: str) -> list[str]:
    """
    >>> _ends("model.optimizer.lr")
    ['lr', 'optimizer.lr', 'model.optimizer.lr']
    """
    parts = key.split(".")
    return [".".join(parts[-n:]) for n in range(1, len(parts) + 1)]


def _setting(key: str, value: object) -> str:
    if value is None:
        return f"no {key}"
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if isinstance(value, Class) else f"{key}={text if len(text) <= 40 else f'{text[:37]}...'}"
