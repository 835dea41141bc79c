"""The short help: what a user types most, and what can be typed. The long help is the parser's own."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from descant import __version__
from descant.catalogue import experiments, header, overlays
from descant.errors import fail

_OPTIONS = {
    "--config NAME": "a file, or the name of what ships; later ones win, options win over all",
    "--name NAME": "of the run; default: the first configuration's",
    "--runs DIR": "where run folders live (runs)",
    "--run NAME/002": "an existing run",
    "--resume never|auto|PATH": "continue from a resume point: this run's newest, or a given one (never)",
    "--changed refuse|allow": "resume with other settings than the run's own (refuse)",
    "--test true": "test the final weights after training (false)",
    "--ckpt_path best|last|PATH": "the weights to evaluate (the run's best)",
    "--sets val,train,NAME": "which sets to embed (all test sets)",
    "--trust MODULE": "allow class paths of another package, such as yours",
    "--seed_everything N": "seed of weights, order and augmentation (0)",
    "--trainer.max_steps N": "length of training; trainer.* are Lightning's own options",
    "--model.KEY, --data.KEY": "any argument of the recipe or of the data",
    "--trainer.callbacks+=NAME": "add a callback",
    "--print_config": "the composed configuration, and no run",
}
_NOT_FIT = ("--ckpt_path best|last|PATH",)
#: Commands that run no experiment.
_BESIDE = ("list", "data", "compare", "claims", "report", "export", "new", "completion", "schema", "submit")
_LIST = """\
descant list: the experiments and overlays that ship with Descant

usage: descant list [WORD ...]

  descant list
  descant list emoji    those with "emoji" in their name or their line; of several words, with all of them"""
#: Columns of what is printed.
_WIDTH = 110
_PREDICT_ONLY = ("--sets val,train,NAME",)
_FIT_ONLY = ("--resume never|auto|PATH", "--changed refuse|allow", "--test true", "--run NAME/002")


def version() -> str:
    return f"descant {__version__}"


def top(commands: Mapping[str, str]) -> str:
    """Help of the program itself."""
    lines = [f"descant {__version__}: multimodal pre-training and adaptation on PyTorch Lightning", ""]
    lines += ["usage: descant COMMAND [--config NAME ...] [--key value ...]", ""]
    lines += _table({name: about for name, about in commands.items() if name not in _BESIDE})
    lines += ["", "beside them:"]
    lines += _table({name: about for name, about in commands.items() if name in _BESIDE})
    lines += [
        "",
        "descant COMMAND --help tells more of one command; of those that take --config, --help all tells everything.",
    ]
    return "\n".join(lines)


def listing(args: Sequence[str] = ()) -> str:
    """Experiments, overlays and data sets, one line each; with words, those that have them all.

    Raises:
        Refusal: if an argument is an option, or nothing has all the words.
    """
    if "--help" in args or "-h" in args:
        return _LIST
    for word in args:
        if word.startswith("-"):
            fail(f"{word}: list takes words to look for, and no options")
    groups = {
        "Experiments (descant fit --config NAME):": experiments(),
        "Overlays (one more --config NAME each):": _laid_over(),
        "Data sets (--data NAME in place of an experiment's own):": {
            name: file for name, file in overlays().items() if name.startswith("data/")
        },
    }
    blocks = []
    for title, files in groups.items():
        found = {name: file for name, file in files.items() if _has(f"{name} {header(file)}", args)}
        if found:
            blocks.append("\n".join([title, *_files(found, _WIDTH)]))
    if not blocks:
        fail(f"list {' '.join(args)}: nothing that ships has that in its name or its line")
    return "\n\n".join(blocks)


def _laid_over() -> dict[str, Path]:
    """Overlays that are whole configurations; the data sets are what stands under ``data`` in one."""
    return {name: file for name, file in overlays().items() if not name.startswith("data/")}


def _has(text: str, words: Sequence[str]) -> bool:
    return all(word.lower() in text.lower() for word in words)


def command(name: str, about: str, most: int = 50) -> str:
    """Help of one command in at most ``most`` lines."""
    skip = [*(_NOT_FIT if name in ("fit", "check") else _FIT_ONLY[:2]), *(() if name == "predict" else _PREDICT_ONLY)]
    options = {key: text for key, text in _OPTIONS.items() if key not in skip}
    lines = [f"descant {name}: {about}", ""]
    lines += [f"usage: descant {name} --config EXPERIMENT [--config OVERLAY ...] [--key value ...]", ""]
    if name in ("fit", "check"):
        lines += [f"  descant {name} --config contrastive/emoji --config on/tiny --model.width 64", ""]
    else:
        lines += [f"  descant {name} --run emoji/001 --ckpt_path best", ""]
    lines += ["Options:", *_table(options), ""]
    tail = ["", f"descant {name} --help all lists every option; --model.help NAME those of one class."]
    ours, theirs = _files(experiments(), 100), _grouped(_laid_over())
    room = most - len(lines) - len(theirs) - len(tail) - 4
    if len(ours) > room:
        ours = [*ours[: room - 1], f"  ... and {len(ours) - room + 1} more: descant list"]
    return "\n".join([*lines, "Experiments:", *ours, "", "Overlays:", *theirs, *tail])


def _table(rows: Mapping[str, str]) -> list[str]:
    width = max(map(len, rows), default=0)
    return [f"  {key:<{width}}  {text}" for key, text in rows.items()]


def _files(files: Mapping[str, Path], width: int) -> list[str]:
    """Name and first line of each, cut after a word."""
    room = width - max(map(len, files), default=0) - 4
    cut = partial(textwrap.shorten, width=room, break_on_hyphens=False, placeholder=" ...")
    return _table({name: cut(header(files[name])) for name in sorted(files)})


def _grouped(files: Mapping[str, Path]) -> list[str]:
    """A paragraph a folder: ``on/  cpu, ddp, gpu, tiny``."""
    groups: dict[str, list[str]] = {}
    for name in sorted(files):
        folder, _, rest = name.partition("/")
        groups.setdefault(f"{folder}/", []).append(rest)
    width, lines = max(map(len, groups), default=0), []
    for folder, names in groups.items():
        first, later = f"  {folder:<{width}}  ", " " * (width + 4)
        # a name is no place to break a line
        lines += textwrap.wrap(
            ", ".join(names), 100, initial_indent=first, subsequent_indent=later, break_on_hyphens=False
        )
    return lines
