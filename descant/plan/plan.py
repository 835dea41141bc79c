"""``descant plan``: memory, messages and time of a run on many accelerators, before it is paid for."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from descant.cli.arguments import read
from descant.cli.errors import fail, hint, say
from descant.plan.request import PlanRequest

_HELP = """\
descant plan: what a run needs on N accelerators, by a step of its real recipe on tensors without data

usage: descant plan [options] -- fit --config NAME ...
       descant plan --calibrate [FILE]

  descant plan --nodes 2 --gpus-per-node 8 --gpu h100 -- fit --config contrastive/emoji-vit
  descant plan --calibrate here.yaml
  descant plan --gpus-per-node 2 --gpu here.yaml -- fit --config contrastive/emoji --config on/cpu

For DDP, FSDP2 and hybrid shards, with and without activation checkpointing, and in chunks or micro-batches
where a step does not fit whole: memory of a rank, messages, time of a step (roofline of compute, memory,
launches and links; messages of parameters and gradients hide behind the computation of their phase), MFU,
hours of the run, the largest batch that fits, and the best three. Nothing is trained, and no accelerator
is needed. docs/guides/scale.md explains each column.

Options:
  --nodes N                    (1)
  --gpus-per-node N            ranks of a node (8)
  --gpu NAME|FILE              h100, a100-80gb, ... or a YAML file of your own (h100)
  --batch N                    samples of a whole step (data.batch_size)
  --save STEM                  write the best three as overlays: STEM-1.yaml, ...
  --picture FILE               time by number of ranks, with what bounds it (.png, .svg, .pdf)
  --json FILE                  all of it
  --calibrate [FILE]           measure this machine, and write hardware for --gpu"""
#: Options with a value -> whether it is a number of at least 1.
_OPTIONS = {
    "nodes": True,
    "gpus-per-node": True,
    "batch": True,
    "gpu": False,
    "save": False,
    "picture": False,
    "json": False,
}
_PICTURES = (".png", ".svg", ".pdf")


def main(args: Sequence[str]) -> int:
    """Plan a command, or measure this machine. Returns the exit code."""
    options, command = _split(args)
    if not args or "--help" in options or "-h" in options:
        print(_HELP)
        return 0
    if "--calibrate" in options:
        return _calibrate([word for word in options if word != "--calibrate"], command)
    given = _read(options, command)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # torch's fake process group warns at each message
    from descant.plan.hardware import load

    hardware = load(given.gpu)  # a wrong name fails before torch is imported
    request = read("fit", given.command[1:])
    request.command = "check"
    from descant.plan.run import plan_command

    return plan_command(request, given, hardware)


def _split(args: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split arguments at ``--`` into options and command.

    >>> _split(["--nodes", "2", "--", "fit", "--config", "x"])
    (['--nodes', '2'], ['fit', '--config', 'x'])
    """
    words = list(args)
    place = words.index("--") if "--" in words else len(words)
    return words[:place], words[place + 1 :]


def _read(options: Sequence[str], command: list[str]) -> PlanRequest:
    given, rest = PlanRequest(command=command), list(options)
    while rest:
        word, equals, value = rest.pop(0).partition("=")
        key = word.removeprefix("--")
        if not word.startswith("--") or key not in _OPTIONS:
            fail(f"plan: {word}: no such option{hint(key, _OPTIONS)}")
        if not equals:
            if not rest or rest[0].startswith("--"):
                fail(f"plan: {word}: its value is missing")
            value = rest.pop(0)
        if _OPTIONS[key]:
            if not (value.isascii() and value.isdecimal() and len(value) <= 9) or int(value) < 1:
                fail(f"plan: {word} {value[:20]}: a number of at least 1, and of nine digits at most")
            setattr(given, key.replace("-", "_"), int(value))
        else:
            setattr(given, key, value)
    if not command:
        fail("plan: no command: it comes after --: descant plan --gpu h100 -- fit --config NAME")
    if command[0] != "fit":
        fail(f"plan: {command[0]}: only fit is planned: descant plan ... -- fit {' '.join(command[1:])}".rstrip())
    for key in ("save", "picture", "json"):
        folder = Path(getattr(given, key) or "x").parent
        if not folder.is_dir():
            fail(f"plan: --{key} {getattr(given, key)}: no folder {folder}")
    if given.picture and Path(given.picture).suffix not in _PICTURES:
        fail(f"plan: --picture {given.picture}: its name ends in {', '.join(_PICTURES)}")
    return given


def _calibrate(rest: list[str], command: list[str]) -> int:
    if command or len(rest) > 1 or any(word.startswith("-") for word in rest):
        fail("plan: --calibrate takes a file for what it measures, and no command: descant plan --calibrate here.yaml")
    from descant.cli.quiet import quieten
    from descant.plan.calibrate import calibrate
    from descant.plan.hardware import to_yaml

    quieten()  # it trains a few steps
    text = to_yaml(calibrate())
    if not rest:
        print(text, end="")
        return 0
    from descant.modules.io.files import write_text

    write_text(Path(rest[0]), text)
    say(f"{rest[0]}: this machine, for descant plan --gpu {rest[0]} -- fit ...")
    return 0
