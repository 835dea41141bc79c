"""Entry point of ``descant``: answers what it can without importing torch, and passes on the rest."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

from descant.cli.errors import INTERRUPTED, WRONG, Refusal, fail, hint, say

COMMANDS = {
    "fit": "train, and validate on the way",
    "validate": "evaluate a run on its validation sets",
    "test": "evaluate a run on its test sets",
    "predict": "embed the test sets with a run",
    "check": "validate a configuration: build everything, train nothing",
    "plan": "what a run needs on N accelerators: memory, messages, time and cost",
    "list": "the experiments and overlays that ship with Descant",
    "data": "make shards from your own files, or view a data set",
    "sweep": "run an experiment over a grid of settings and seeds, then compare",
    "compare": "a table of runs, a row a configuration, paired by seed",
    "claims": "judge what a mechanism's paper claims: paired runs, placebos, a word",
    "report": "curves, table, images and configurations of runs in one HTML file",
    "export": "a run's weights, configuration and card in one folder",
    "new": "write a recipe, callback or data module of your own to begin from",
    "completion": "tab completion for bash, zsh or fish",
    "schema": "a JSON schema of configurations, for completion and checks in editors",
    "submit": "run one of these on a SLURM cluster, requeued and resumed until it is done",
}
#: Commands with their own parser -> the module that has ``main(args) -> exit code``.
TOOLS = {
    "data": "descant.data",
    "plan": "descant.plan.plan",
    "claims": "descant.claims",
    "sweep": "descant.slurm.sweep",
    "submit": "descant.slurm.submit",
    "compare": "descant.report.compare",
    "report": "descant.report.report",
    "export": "descant.export.export",
    "new": "descant.cli.new",
    "completion": "descant.cli.completion",
    "schema": "descant.cli.editor",
}


def main(args: list[str] | None = None) -> int:
    """Run one command and return the exit code.

    0: done. 1: a bug. 2: a wrong request, or a file or disk that prevents it. 75: saved for USR1, a rank that hangs, or
    a store that does not answer: run it again. 130: interrupted.
    """
    # for transformers, timm and kernels, which download what a configuration names; read where they are first imported
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    words = sys.argv[1:] if args is None else args
    try:
        for word in words:
            if "\0" in word:
                fail(f"{word}: holds a NUL character, which no name and no text may")
        return _dispatch(words)
    except Refusal as refusal:
        say(str(refusal))
        return refusal.code
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # the reader (head, less) has closed; the interpreter must not flush again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        from descant.run.faults import outside

        line = None if "--debug" in words else outside(error)
        if line is None:
            raise
        say(f"{words[0]}: {line}")
        return WRONG


def _dispatch(args: Sequence[str]) -> int:
    if args and args[0] == "__complete":
        from descant.cli.completion import complete_words

        print("\n".join(complete_words(args[1:], COMMANDS)))
        return 0
    from descant.cli import helptext

    if not args or (args[0] in ("--help", "-h", "help") and len(args) != 2):
        print(helptext.top(COMMANDS))
        return 0
    if args[0] in ("--help", "-h", "help"):
        if args[1] in COMMANDS:
            return _dispatch([args[1], "--help"])
        print(helptext.about(args[1]))
        return 0
    command, *rest = args
    if command == "--version":
        print(helptext.version())
        return 0
    if command in ("--config", "-c") or command.startswith("--config="):
        fail(f"{command}: the command comes first: descant fit {' '.join(args)}")
    if command not in COMMANDS:
        fail(f"{command}: no such command{hint(command, COMMANDS)}")
    if command == "list":
        print(helptext.listing(rest))
        return 0
    if command in TOOLS:
        if "--debug" in rest and command != "export":  # only main() reads it
            rest.remove("--debug")
        return int(importlib.import_module(TOOLS[command]).main(rest))
    if len(rest) > 1 and rest[-2] in ("--help", "-h") and rest[-1] != "all" and not rest[-1].startswith("-"):
        print(helptext.about(rest[-1]))
        return 0
    if rest and rest[-1] in ("--help", "-h"):
        print(helptext.command(command, COMMANDS[command]))
        return 0
    return _run(command, rest)


def _run(command: str, rest: Sequence[str]) -> int:
    from descant.cli.arguments import Request, read, with_run_config

    if list(rest[-2:]) in (["--help", "all"], ["-h", "all"]):
        request = Request(command, options=[("help", None)])
    else:
        request = with_run_config(read(command, rest))
    from descant.cli import dump, helptext
    from descant.cli.precheck import needs_check, precheck
    from descant.run import runs

    known = dump.read(command)
    if known is not None and not needs_check(request):
        text = helptext.of_class(known, request)
        if text is not None:
            print(text)
            return 0
    elif known is not None:
        precheck(known, request.files, request.options, request.trust)
    runs.require_ranks()
    from descant.run import ranks

    ranks.end_with_parent()
    from descant.cli.main import run  # torch and Lightning are imported here, and not before

    try:
        code = run(request)
    except Refusal as refusal:
        if not ranks.hand_over(str(refusal)):
            say(str(refusal))
        code = refusal.code
    if known is None and (command == "check" or code == WRONG):
        dump.write()  # once: the next mistake is found without torch
    return code


if __name__ == "__main__":
    sys.exit(main())
