"""Tab completion: shell scripts that call ``descant __complete WORDS``.

Answers come from the cached schema and the configurations on the line. After ``--config contrastive/emoji``, the keys
offered below ``--model.`` are those of its recipe.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path

from descant.cli import dump, schema
from descant.cli.catalogue import BASE, experiments, find, layers, list_shipped
from descant.cli.document import load
from descant.cli.errors import Refusal, fail, hint
from descant.cli.precheck import Walk
from descant.cli.schema import Entry, Key, Schema

#: Words that no shell expands; others, such as odd folder names, are not offered.
_PLAIN = re.compile(r"[\w@%+=:,./-]+", re.ASCII)
#: Words of two plain types.
_WORDS = {"bool": ("true", "false"), "null": ("null",)}
#: Options that are not configuration keys.
_CALL = ("config", "trust", "print_config", "help", "debug")
#: No offered word is expanded (compgen -W would run $(...)). Bash 3, as on macOS, has no mapfile.
_BASH = """\
_descant() {
    local word last="${COMP_WORDS[COMP_CWORD]}"
    COMPREPLY=()
    while IFS= read -r word; do
        [[ $word == "$last"* ]] && COMPREPLY+=("$(printf %q "$word")")
    done < <(descant __complete "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null)
    [[ ${#COMPREPLY[@]} == 1 && ${COMPREPLY[0]} == *[./] ]] && compopt -o nospace
}
complete -o default -F _descant descant
"""
_ZSH = """\
#compdef descant
_descant() {
    local -a found
    found=("${(@f)$(descant __complete "${(@)words[2,CURRENT]}" 2>/dev/null)}")
    [[ -n "$found" ]] && compadd -S '' -- $found || _files
}
compdef _descant descant
"""
_FISH = """\
complete -c descant -a '(descant __complete (commandline -opc)[2..] (commandline -ct) 2>/dev/null)'
"""
SHELLS = {"bash": _BASH, "zsh": _ZSH, "fish": _FISH}
_HELP = """\
descant completion: a script that lets a shell complete commands, experiments, keys and class names

usage: descant completion bash|zsh|fish

  source <(descant completion bash)              in ~/.bashrc
  source <(descant completion zsh)               in ~/.zshrc, after compinit
  descant completion fish | source               in config.fish"""


def main(args: Sequence[str]) -> int:
    """Run ``descant completion SHELL``."""
    if not args or args[0] in ("--help", "-h"):
        print(_HELP)
        return 0
    if args[0] not in SHELLS:
        fail(f"completion {args[0]}: no such shell{hint(args[0], SHELLS)}")
    print(SHELLS[args[0]], end="")
    if dump.read("fit") is None:
        dump.write()
    return 0


def complete_words(words: Sequence[str], commands: Mapping[str, str]) -> list[str]:
    """Return the sorted completions of the last of ``words``; none for files, which the shell completes."""
    *before, last = words or [""]
    if not before:
        return sorted(name for name in [*commands, "--help", "--version"] if name.startswith(last))
    command = before[0]
    if command == "completion":
        return sorted(SHELLS)
    known = dump.read(command) if command in (*dump.COMMANDS, "check") else None
    if known is None:
        return []
    candidates: Iterator[str]
    if before[-1].startswith("--") and "=" not in before[-1] and not last.startswith("--"):
        candidates = _values(before[-1][2:], known, before)
    else:
        candidates = (f"--{name}" for name in _keys(last.removeprefix("--"), known, before))
    return sorted({text for text in candidates if text.startswith(last) and _PLAIN.fullmatch(text)})


def _keys(start: str, known: Schema, words: Sequence[str]) -> Iterator[str]:
    *path, _ = start.split(".")
    if not path:
        yield from _CALL
        for name in known.command:
            group, dot, _ = name.partition(".")
            yield group + dot
        yield from ("model.", "data.")
        return
    for name, key in below(path, known, words).items():
        full = ".".join((*path, name))
        yield full
        if schema.has_classes(key.type):
            yield f"{full}."
        if schema.items(key.type) is not None and schema.has_classes(key.type):
            yield f"{full}+"


def _values(option: str, known: Schema, words: Sequence[str]) -> Iterator[str]:
    *path, last = option.removesuffix("+").split(".")
    if not path and last == "config":
        yield from list_shipped()
        yield from experiments()
        return
    if not path and last == "run":
        yield from (file.parent.relative_to("runs").as_posix() for file in Path("runs").glob("*/*/config.yaml"))
        return
    if (key := below(path, known, words).get(last)) is not None:
        kinds = [*key.type, *(schema.items(key.type) or [])]
        yield from map(str, chain(*schema.parts(kinds, "choice")))
        yield from known.names(schema.classes(kinds))
        yield from (word for part in ("bool", "null") if part in kinds for word in _WORDS[part])


def below(path: Sequence[str], known: Schema, words: Sequence[str]) -> Mapping[str, Key]:
    """Return the keys under a dotted path: of the class chosen there, or of all valid ones; all keys without a path."""
    keys = known.command
    group = {name.partition(".")[2]: key for name, key in keys.items() if [*path] == name.split(".")[:-1]}
    if group and path:
        return group
    steps = [step for step in path if step != "init_args"]
    classes = _chosen_classes(known, words) if steps else {}
    for depth, step in enumerate(steps, 1):
        if step not in keys:
            return {}
        chosen = classes.get(tuple(steps[:depth]))
        entries = [chosen] if chosen is not None else _all(known, keys[step])
        keys = {name: key for entry in entries for name, key in entry.keys.items()}
    return keys


def _chosen_classes(known: Schema, words: Sequence[str]) -> Mapping[tuple[str, ...], Entry]:
    """Return the classes that the configurations on the line choose."""
    walk = Walk(known, [])
    names = [words[n + 1] for n, word in enumerate(words[:-1]) if word in ("--config", "-c")]
    try:
        for file in (BASE, *layers(map(find, names))):
            walk.source(load(file))
    except Refusal:  # reported when the line is run
        pass
    return walk.classes


def _all(known: Schema, key: Key) -> list[Entry]:
    kinds = schema.classes(key.type)
    return [known.find(path, kinds) for path in known.names(kinds).values()]
