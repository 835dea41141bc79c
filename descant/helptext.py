"""The short help: what a user types most, and what can be typed. The long help is the parser's own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from descant import __version__
from descant.catalogue import experiments, header, overlays

_OPTIONS = {
    "--config NAME": "a file, or the name of what ships; later ones win, options win over all",
    "--name NAME": "of the run; default: the first configuration's",
    "--runs DIR": "where run folders live (runs)",
    "--run NAME/002": "an existing run",
    "--resume never|auto|PATH": "continue from a checkpoint (never)",
    "--test true": "test the final weights after training (false)",
    "--ckpt_path best|last|PATH": "the weights to evaluate (the run's best)",
    "--trust MODULE": "allow class paths of another package, such as yours",
    "--seed_everything N": "seed of weights, order and augmentation (0)",
    "--trainer.max_steps N": "length of training; trainer.* are Lightning's own options",
    "--model.KEY, --data.KEY": "any argument of the recipe or of the data",
    "--trainer.callbacks+=NAME": "add a callback",
    "--print_config": "the composed configuration, and no run",
}
_NOT_FIT = ("--ckpt_path best|last|PATH",)
_FIT_ONLY = ("--resume never|auto|PATH", "--test true", "--run NAME/002")


def version() -> str:
    return f"descant {__version__}"


def top(commands: Mapping[str, str]) -> str:
    """Help of the program itself."""
    lines = [f"descant {__version__}: multimodal pre-training and adaptation on PyTorch Lightning", ""]
    lines += ["usage: descant COMMAND [--config NAME ...] [--key value ...]", ""]
    lines += _table(commands)
    lines += [
        "",
        "descant COMMAND --help tells more of one command; descant COMMAND --help all tells everything.",
    ]
    return "\n".join(lines)


def listing() -> str:
    """Experiments and overlays, one line each."""
    lines = ["Experiments (descant fit --config NAME):", *_files(experiments(), 110)]
    return "\n".join([*lines, "", "Overlays (one more --config NAME each):", *_files(overlays(), 110)])


def command(name: str, about: str, most: int = 50) -> str:
    """Help of one command in at most ``most`` lines."""
    skip = _NOT_FIT if name in ("fit", "check") else _FIT_ONLY[:2]
    options = {key: text for key, text in _OPTIONS.items() if key not in skip}
    lines = [f"descant {name}: {about}", ""]
    lines += [f"usage: descant {name} --config EXPERIMENT [--config OVERLAY ...] [--key value ...]", ""]
    if name in ("fit", "check"):
        lines += [f"  descant {name} --config contrastive/emoji --config on/tiny --model.width 64", ""]
    else:
        lines += [f"  descant {name} --run emoji/001 --ckpt_path best", ""]
    lines += ["Options:", *_table(options), ""]
    tail = ["", f"descant {name} --help all lists every option; --model.help NAME those of one class."]
    ours, theirs = _files(experiments(), 100), _grouped(overlays())
    room = most - len(lines) - len(theirs) - len(tail) - 4
    if len(ours) > room:
        ours = [*ours[: room - 1], f"  ... and {len(ours) - room + 1} more: descant list"]
    return "\n".join([*lines, "Experiments:", *ours, "", "Overlays:", *theirs, *tail])


def _table(rows: Mapping[str, str]) -> list[str]:
    width = max(map(len, rows), default=0)
    return [f"  {key:<{width}}  {text}" for key, text in rows.items()]


def _files(files: Mapping[str, Path], width: int) -> list[str]:
    return [line if len(line) <= width else line[: width - 3] + "..." for line in _table(_headed(files))]


def _headed(files: Mapping[str, Path]) -> dict[str, str]:
    return {name: header(file) for name, file in files.items()}


def _grouped(files: Mapping[str, Path]) -> list[str]:
    """One line a folder: ``on/  cpu, ddp, gpu, tiny``."""
    groups: dict[str, list[str]] = {}
    for name in files:
        folder, _, rest = name.partition("/")
        groups.setdefault(f"{folder}/", []).append(rest)
    return _table({folder: ", ".join(names) for folder, names in groups.items()})
