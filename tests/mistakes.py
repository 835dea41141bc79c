"""Mistakes drawn by lot from the schema: what people do to a command line, over every command and experiment."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from descant.cli import schema
from descant.cli.catalogue import BASE, experiments, layers
from descant.cli.document import load
from descant.cli.dump import Written
from descant.cli.errors import Refusal
from descant.cli.precheck import Walk
from descant.cli.schema import Entry, Key

COMMANDS = ("fit", "check", "validate", "test", "predict")


@dataclass(frozen=True)
class Mistake:
    """A command line, and what its answer should name."""

    kind: str
    args: tuple[str, ...]
    names: tuple[str, ...]


def drawn(known: Callable[[str], Written], seed: int) -> Iterator[Mistake]:
    """Without end, each kind in its turn."""
    lot = random.Random(seed)
    kinds = (
        *(_letter_dropped, _letters_swapped, _wrong_type, _wrong_class, _wrong_nesting),
        *(_list_for_class, _missing_file, _config_dropped, _command_swapped),
    )
    while True:
        for kind in kinds:
            while True:  # until the lot falls on a place where this mistake can be made
                command = lot.choice(COMMANDS)
                name = lot.choice(sorted(experiments()))
                walk = Walk(written := known("fit" if command == "check" else command), [])
                for file in (BASE, *layers([experiments()[name]])):
                    walk.source(load(file))
                try:
                    args, names = kind(lot, written, walk, command, name)
                except (IndexError, Refusal):
                    continue
                yield Mistake(kind.__name__.lstrip("_"), args, names)
                break


Made = tuple[tuple[str, ...], tuple[str, ...]]


def _places(walk: Walk, known: Written) -> list[tuple[str, str, Key, Entry | None]]:
    """Dotted prefix, key, what it is, and of whom, of all that can be said of an experiment; of lists nothing."""
    found: list[tuple[str, str, Key, Entry | None]]
    found = [("", name, key, None) for name, key in known.command.items()]
    for path, entry in walk.classes.items():
        if not any("@" in step for step in path):
            found += [(".".join(path) + ".", name, key, entry) for name, key in entry.keys.items()]
    return found


def _place(lot: random.Random, walk: Walk, known: Written, least: int = 4) -> tuple[str, str, Key, Entry | None]:
    return lot.choice([p for p in _places(walk, known) if len(p[1].rpartition(".")[2]) >= least])


def _told(
    lot: random.Random, walk: Walk, known: Written, command: str, name: str, change: Callable[[str], str]
) -> Made:
    prefix, key, _, _ = _place(lot, walk, known)
    group, dot, last = key.rpartition(".")
    wrong = change(last)
    if f"{group}{dot}{wrong}" == key or any(wrong == p[1].rpartition(".")[2] for p in _places(walk, known)):
        raise IndexError
    return (command, "--config", name, f"--{prefix}{group}{dot}{wrong}", "1"), (last,)


def _letter_dropped(lot: random.Random, known: Written, walk: Walk, command: str, name: str) -> Made:
    def drop(word: str) -> str:
        at = lot.randrange(len(word))
        return word[:at] + word[at + 1 :]

    return _told(lot, walk, known, command, name, drop)


def _letters_swapped(lot: random.Random, known: Written, walk: Walk, command: str, name: str) -> Made:
    def swap(word: str) -> str:
        at = lot.randrange(len(word) - 1)
        return word[:at] + word[at + 1] + word[at] + word[at + 2 :]

    return _told(lot, walk, known, command, name, swap)


def _wrong_type(lot: random.Random, known: Written, walk: Walk, command: str, name: str) -> Made:
    prefix, key, what, _ = lot.choice(
        [p for p in _places(walk, known) if set(map(str, p[2].type)) <= {"int", "float", "bool", "null"}]
    )
    return (command, "--config", name, f"--{prefix}{key}", "many"), (f"{prefix}{key}", schema.in_words(what.type))


def _wrong_class(lot: random.Random, known: Written, walk: Walk, command: str, name: str) -> Made:
    prefix, key, what, _ = lot.choice([p for p in _places(walk, known) if schema.classes(p[2].type)])
    right = lot.choice(sorted(known.names(schema.classes(what.type))))
    at = lot.randrange(1, len(right))
    wrong = right[:at] + right[at + 1 :]
    if schema.takes_text(what.type) or wrong in known.names(schema.classes(what.type)) or len(right) < 4:
        raise IndexError
    return (command, "--config", name, f"--{prefix}{key}", wrong), (right,)


def _wrong_nesting(lot: random.Random, known: Written, walk: Walk, command: str, name: str) -> Made:
    prefix, key, _, entry = _place(lot, walk, known)
    other, _, _, another = _place(lot, walk, known)
    last = key.rpartition(".")[2]
    if entry is None or another is None or last in another.keys or other == prefix:
        raise IndexError
    return (command, "--config", name, f"--{other}{last}", "1"), (last,)


def _list_for_class(lot: random.Random, known: Written, walk: Walk, command: str, name: str) -> Made:
    prefix, key, what, _ = lot.choice([p for p in _places(walk, known) if schema.classes(p[2].type)])
    if schema.items(what.type) or schema.takes_text(what.type):
        raise IndexError
    return (command, "--config", name, f"--{prefix}{key}", "[1, 2]"), (f"{prefix}{key}",)


def _missing_file(lot: random.Random, known: Written, walk: Walk, command: str, name: str) -> Made:
    prefix, key, _, _ = lot.choice([p for p in _places(walk, known) if schema.classes(p[2].type)])
    if key == "data" or schema.takes_text(known.command.get(key, Key([])).type):
        raise IndexError
    return (command, "--config", name, f"--{prefix}{key}", "nope.yaml"), ("nope.yaml",)


def _config_dropped(lot: random.Random, known: Written, walk: Walk, command: str, name: str) -> Made:
    at = lot.randrange(len(name) - 1)
    return (command, "--config", name[:at] + name[at + 1 :]), (name.rpartition("/")[2],)


def _command_swapped(lot: random.Random, known: Written, walk: Walk, command: str, name: str) -> Made:
    at = lot.randrange(len(command) - 1)
    wrong = command[:at] + command[at + 1] + command[at] + command[at + 2 :]
    if wrong == command:
        raise IndexError
    return (wrong, "--config", name), (command,)
