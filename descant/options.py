"""The parser of a command that has its own: one line for a fault, with the nearest option."""

from __future__ import annotations

import argparse
from typing import Any, NoReturn

from descant.errors import fail, hint


class Options(argparse.ArgumentParser):
    """``prog`` is ``descant COMMAND``; a fault is a Refusal that begins with the command. Nothing is abbreviated."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **(kwargs | {"allow_abbrev": False}))

    def error(self, message: str) -> NoReturn:
        stray = message.removeprefix("unrecognized arguments: ")
        if stray != message:
            name = stray.split()[0].partition("=")[0]
            known = [option for action in self._actions for option in action.option_strings]
            message = f"{name}: {f'no such option{hint(name, known, most=0)}' if name[0] == '-' else 'unexpected'}"
        fail(f"{self.prog.removeprefix('descant ')}: {message}")
