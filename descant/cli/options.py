"""ArgumentParser whose errors are one line with the nearest option, for commands with their own parser."""

from __future__ import annotations

import argparse
import re
from typing import Any, NoReturn

from descant.cli.errors import fail, hint


class Options(argparse.ArgumentParser):
    """Parser of ``descant COMMAND`` (``prog``); errors are Refusals that begin with the command. No abbreviations."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **(kwargs | {"allow_abbrev": False}))

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        self._words = list(args or [])
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        known = {option for action in self._actions for option in action.option_strings}
        options = {word.partition("=")[0] for word in self._words if word.startswith("--")} - known
        if "arguments are required" in message and options:  # an unknown option may be a misspelt required one
            message = f"unrecognized arguments: {min(options)}"
        choice = re.match(r"argument (\S+): invalid choice: '(.*)' \(choose from (.*)\)", message)
        if choice is not None:
            choices = [word.strip("' ") for word in choice[3].split(",")]
            near = hint(choice[2], choices, most=0)
            message = f"{choice[1]} {choice[2]}: one of {', '.join(choices)}{near}"
        stray = message.removeprefix("unrecognized arguments: ")
        if stray != message:
            name = stray.split()[0].partition("=")[0]
            message = f"{name}: {f'no such option{hint(name, known, most=0)}' if name[0] == '-' else 'unexpected'}"
        fail(f"{self.prog.removeprefix('descant ')}: {message}")
