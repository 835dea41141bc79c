"""The short help: the most used options, and the names that can be typed. The parser writes the long help."""

from __future__ import annotations

import importlib
import inspect
import json
import textwrap
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from descant import __version__
from descant.cli import dump
from descant.cli.arguments import OF_FIT, Request
from descant.cli.catalogue import ROOT, experiments, header, list_shipped, overlays, papers
from descant.cli.completion import below
from descant.cli.errors import fail, hint
from descant.cli.schema import Schema, Unknown, classes, in_words, items
from descant.modules.io.names import full, of_kind, table

#: Commands that train, or would.
_FITTING = ("fit", "check")
_OPTIONS = {
    "--config NAME": "a file, or the name of what ships; later ones win, options win over all",
    "--name NAME": "of the run; default: the first configuration's",
    "--runs DIR": "where run folders live (runs)",
    "--run NAME/002": "an existing run",
    "--resume never|auto|PATH": "continue from a resume point: this run's newest, or a given one (never)",
    "--changed refuse|allow": "resume with other settings or data (refuse); --verify true hashes all data",
    "--checkpoint_mirror PATH": "a second place for the newest resume point: a folder, or s3://... and the like",
    "--test true": "test the final weights after training (false)",
    "--ckpt_path best|last|PATH": "the weights to evaluate (the run's best)",
    "--sets val,train,NAME": "which sets to embed (all test sets)",
    "--trust MODULE": "allow a package of yours; or shell, packages, writes, reads, hub (SECURITY.md)",
    "--seed_everything N": "seed of weights, order and augmentation (0)",
    "--threads auto|measure|N": "threads on the CPU: those that others leave free, the fastest, or N",
    "--trainer.max_steps N": "length of training; trainer.* are Lightning's own options",
    "--model.KEY, --data.KEY": "any argument of the recipe or of the data",
    "--trainer.callbacks+=NAME": "add a callback",
    "--explain": "where each value comes from: file and line, option or default",
    "--print_config, --debug": "the composed configuration and no run; tracebacks in place of lines",
}
#: Option -> the commands that have it, if not all do; OF_FIT are those of fit.
_ONLY = {"ckpt_path": dump.COMMANDS[1:], "sets": ("predict",), "explain": ("check",)} | dict.fromkeys(OF_FIT, _FITTING)
_LIST = """\
descant list: what ships with Descant, one line each

usage: descant list [GROUP] [WORD ...]

  descant list              experiments, overlays and data sets
  descant list GROUP        of recipes, towers, fusions, objectives, losses, adapters, corruptions, callbacks,
                            metrics, datamodules, fields, experiments, overlays, data, claims, papers
  descant list emoji        of all groups those with "emoji" in their name or line; of several words, with all"""
#: Width of the printed text in columns.
_WIDTH = 110
#: The recipes that a user looks for first.
_FIVE = ("Contrastive", "Masked", "CompetitiveDistillation", "Staged", "MissingModality")
#: How the first lines of base classes begin.
_BASES = ("Base of", "Stands before")


def version() -> str:
    return f"descant {__version__}"


def top(commands: Mapping[str, str]) -> str:
    """Write the help of the program itself."""
    lines = [f"descant {__version__}: multimodal pre-training and adaptation on PyTorch Lightning", ""]
    lines += ["usage: descant COMMAND [--config NAME ...] [--key value ...]", ""]
    of_experiments = {name: commands[name] for name in (*dump.COMMANDS, "check")}
    lines += [*_table(of_experiments), "", "beside them:"]
    lines += _table({name: about for name, about in commands.items() if name not in of_experiments})
    last = "descant COMMAND --help explains one command; with --config, --help all lists everything."
    return "\n".join([*lines, "", last])


#: Group -> what it is, and how one is chosen.
_GROUPS = {
    "experiments": "Experiments (descant fit --config NAME):",
    "overlays": "Overlays (one more --config NAME each):",
    "data": "Data sets (--data NAME in place of an experiment's own):",
    "recipes": "Recipes (--model NAME):",
    "datamodules": "Data modules (--data NAME):",
    "callbacks": "Callbacks (--trainer.callbacks+ NAME):",
    "metrics": "Callbacks that measure (--trainer.callbacks+ NAME):",
    "towers": "Towers (--model.towers.MODALITY NAME):",
    "fields": "Fields of your own data (--data.fields.MODALITY NAME, --data.fields.labels.TARGET NAME):",
    "fusions": "Fusions (--model.fusion NAME):",
    "objectives": "Objectives (--model.objectives.ANY NAME):",
    "losses": "Losses (--model.loss NAME and such):",
    "adapters": "Adapters of modalities and of weights (--model.adapters.MODALITY NAME, --model.adapt+ NAME):",
    "corruptions": "Corruptions (--model.corruption NAME):",
    "claims": "Claims (descant claims run NAME):",
    "papers": "Papers (descant fit --config papers/NAME): number, name, family, arXiv, equation, effect, time of claim",
}
#: Group of classes -> their base classes and their folder.
_KINDS = {
    "recipes": (("Recipe",), "recipes"),
    "datamodules": (("LightningDataModule",), "datamodules"),
    "fields": (("Field", "TargetField"), "datamodules"),
    "callbacks": (("Callback",), "callbacks"),
    "metrics": (("EmbeddingEvaluator",), "callbacks"),
    "towers": (("Tower",), "modules"),
    "fusions": (("FusionHead", "FusionLayers"), "modules"),
    "objectives": (("TaskObjective",), "modules"),
    "losses": (("ContrastiveLoss", "NumberLoss", "PixelLoss", "ViewObjective", "Regularizer", "Surrogate"), "modules"),
    "adapters": (("Adapter", "Adapt"), "modules"),
    "corruptions": (("Corruption",), "modules.masking"),
}
#: Everyday words -> the word that docstrings use.
_MEANS = {
    **dict.fromkeys(("sensor", "signal", "sequence", "spectrum", "spectra", "ecg", "eeg"), "series"),
    **dict.fromkeys(("regression", "continuous"), "a number"),
    **dict.fromkeys(("photo", "picture"), "image"),
    **dict.fromkeys(("sound", "speech", "voice"), "audio"),
    **dict.fromkeys(("tabular", "csv", "columns"), "table"),
}
#: Groups of a listing without arguments.
_FIRST = ("experiments", "overlays", "data")


def listing(args: Sequence[str] = ()) -> str:
    """List what ships, one line each: a group, or the entries of all groups that contain all given words."""
    if "--help" in args or "-h" in args:
        return _LIST
    for word in args:
        if word.startswith("-"):
            fail(f"{word}: list takes a group and words to look for, and no options")
    chosen, words = ([args[0]], args[1:]) if args and args[0] in _GROUPS else ([], args)
    blocks = []
    searched = [group for group in _GROUPS if group != "metrics"]  # metrics are callbacks, too
    for group in chosen or (searched if words else _FIRST):
        rows = {
            name: about
            for name, about in _rows(group).items()
            if all(_is_about(word.lower(), f"{name} {about}".lower()) for word in words)
        }
        if rows:
            lines = _table(rows) if group == "papers" else _format_rows(rows, _WIDTH)
            blocks.append("\n".join([_GROUPS[group], *lines]))
    if not blocks:
        near = hint(args[0], _GROUPS, most=0)
        fail(f"list {' '.join(args)}: nothing that ships has that in its name or its line{near}")
    if not args:
        blocks.append(f"More: descant list {', '.join(name for name in _GROUPS if name not in _FIRST)}.")
    return "\n\n".join(blocks)


def _is_about(word: str, line: str) -> bool:
    """Whether a line contains a word, or the word that means the same here."""
    return word in line or _MEANS.get(word, word) in line


def _rows(group: str) -> dict[str, str]:
    """Return the name and the line of each entry of a group."""
    if group in _KINDS:
        roots, part = _KINDS[group]
        rows = {name: about for root in roots for name, about in of_kind(root, part).items()}
        names = [name for name in rows if ".recipes.base." not in (full(name) or "")]
        names = [*(name for name in _FIVE if name in names), *(name for name in names if name not in _FIVE)]
        return {name: rows[name] for name in names if not rows[name].startswith(_BASES)}
    if group == "papers":
        return {f"{paper['number']:>2}  {paper['name']}": _paper(paper) for paper in papers()}
    if group == "claims":
        titles = {file.stem: _title(file) for name, file in list_shipped().items() if name.startswith("claims/")}
        return dict(sorted(titles.items()))
    files = experiments()
    if group != "experiments":  # a data set is the value of ``data``; other overlays are whole configurations
        files = {name: file for name, file in overlays().items() if name.startswith("data/") == (group == "data")}
    return {name: header(files[name]) for name in sorted(files)}


def _paper(paper: Mapping[str, Any]) -> str:
    """Format family, arXiv number, whether its equation is exact, the effect of its claim and the time it took."""
    line = f"{paper['family']:<20}  {paper['arxiv']}  "
    if paper["status"] != "built":
        return line + "planned"
    try:
        result = json.loads((ROOT / f"claims/results/{paper['claim']}.json").read_text(encoding="utf-8"))
        effect, time = result["effect"], f"{result['seconds'] / 60:.0f} min"
    except (OSError, ValueError, KeyError):
        effect, time = "not run yet", ""
    return f"{line}{'exact' if paper['exact'] else 'ours':<5}  {effect:<20}  {time:>6}".rstrip()


def _title(claim: Path) -> str:
    """Read the title of a claim, without parsing the rest of it."""
    lines = claim.read_text(encoding="utf-8").splitlines()
    return next(line.removeprefix("title:").strip(" \"'") for line in lines if line.startswith("title:"))


def command(name: str, about: str, most: int = 60) -> str:
    """Write the help of one command in at most ``most`` lines."""
    options = {key: text for key, text in _OPTIONS.items() if name in _ONLY.get(key[2:].split()[0], (name,))}
    lines = [f"descant {name}: {about}", ""]
    if name in _FITTING:
        lines += [f"usage: descant {name} --config contrastive/emoji --config on/tiny --model.width 64", ""]
    else:
        lines += [f"usage: descant {name} --run demo/001 --ckpt_path best", ""]
    lines += [*_table(options)]
    tail = [
        f"One more --config adds an overlay (descant list: all {len(_rows('overlays'))}); papers: descant list papers.",
        f"descant {name} --help all lists every option; --help CLASS explains any class.",
    ]
    rows = _format_rows(
        {name: text for name, text in _rows("experiments").items() if not name.startswith("papers/")}, _WIDTH
    )
    room = most - len(lines) - len(tail) - 1
    if len(rows) > room:
        rows = [*rows[: room - 1], f"  ... and {len(rows) - room + 1} more: descant list"]
    return "\n".join([*lines, "Experiments:", *rows, *tail])


def of_class(known: Schema, request: Request) -> str | None:
    """Write the help of one class, for ``--model.optimizer.help AdamW``; None if only the parser resolves it."""
    helps = [(key, value) for key, value in request.options if key.endswith(".help")]
    if len(helps) != 1:
        return None
    (option, name), configs = helps[0], [word for file in request.files for word in ("--config", str(file))]
    *path, last = option.removesuffix(".help").split(".")
    keys = below(path, known, configs)
    kinds = classes(keys[last].type) + classes(items(keys[last].type) or []) if last in keys else []
    if not kinds:
        return None
    if name is None:
        names = sorted(known.names(kinds))
        return f"--{option} NAME explains one of:\n" + "\n".join(textwrap.wrap(", ".join(names), _WIDTH))
    try:
        entry = known.find(name, kinds)
    except LookupError as error:
        fail(f"--{option}: {error}")
    except Unknown:
        return None
    lines = [*textwrap.wrap(f"{entry.name}: {entry.about}", _WIDTH), f"class_path: {entry.path}", ""]
    for key, what in entry.keys.items():
        default = "needed" if key in entry.required else what.default
        head = f"  {key}: {in_words(what.type)} ({default})"
        lines += textwrap.wrap(head, _WIDTH, subsequent_indent="    ")
        lines += textwrap.wrap(what.about, _WIDTH, initial_indent="      ", subsequent_indent="      ")
    return "\n".join(lines)


def about(name: str) -> str:
    """Write the signature, path and docstring of a class, for ``descant fit --help SeriesTower``."""
    path = full(name.rpartition(".")[2])
    if path is None or ("." in name and not path.endswith(name)):
        same = " and ".join(table().get(name, ()))
        why = f"{same}: give the path of one" if same else f"no such class{hint(name, table())}"
        fail(f"--help {name}: {why}")
    cls = getattr(importlib.import_module(path.rpartition(".")[0]), path.rpartition(".")[2])
    keys = inspect.signature(cls.__init__).parameters
    given = ", ".join(str(key) for name, key in keys.items() if name not in ("self", "args", "kwargs"))
    given = given.replace("'", "").replace('"', "")
    head = textwrap.fill(f"{cls.__name__}({given})", _WIDTH, subsequent_indent="    ")
    return f"{head}\n\nclass_path: {path}\n\n{inspect.getdoc(cls) or ''}".rstrip()


def _table(rows: Mapping[str, str]) -> list[str]:
    width = max(map(len, rows), default=0)
    return [f"  {key:<{width}}  {text}" for key, text in rows.items()]


def _format_rows(rows: Mapping[str, str], width: int) -> list[str]:
    """Format the name and the line of each row, cut after a word."""
    room = width - max(map(len, rows), default=0) - 4
    cut = partial(textwrap.shorten, width=room, break_on_hyphens=False, placeholder=" ...")
    return _table({name: cut(about) for name, about in rows.items()})
