"""A configuration parsed and built once, and fits of copies of it, each with some callbacks, as a command runs it.

Parsing and building take most of the time of a fit of two steps. What a copy trains is what ``descant fit`` has built,
and what the fit comes to, or its one line of refusal, is told the way ``descant fit`` tells it.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

from descant.cli.arguments import Request
from descant.cli.errors import Refusal
from descant.cli.main import DescantCLI
from descant.run.folder import Folder
from tests.conftest import Result

Cli = Callable[..., Result]


class Built:
    """A base with more callbacks, parsed and built in the working folder by ``descant fit --test false``.

    Args:
        cli: the command line in process. configs: a base and its overlays.
        callbacks: name -> what it adds to the callbacks of the base, as YAML.
        options: further options of the command.
    """

    def __init__(self, cli: Cli, configs: Iterable[str], callbacks: dict[str, str], *options: str) -> None:
        self.place, self.names = Path.cwd(), list(callbacks)
        lines = [f"    - {text}\n" for text in callbacks.values()]
        Path("more.yaml").write_text("trainer:\n  callbacks+:\n" + "".join(lines))
        self.words = [part for config in (*configs, "more.yaml", "on/tiny") for part in ("--config", config)]
        self.words += ["--name", "built", "--test", "false", "--trainer.limit_val_batches", "0", *options]
        caught: list[DescantCLI] = []

        def stop(built: DescantCLI) -> NoReturn:
            caught.append(built)
            raise Refusal("built")

        with mock.patch.object(DescantCLI, "instantiate_trainer", stop):
            result = cli("fit", *self.words)
        assert caught and result.refusal == "built", result.err
        self.parts = vars(caught[0])

    def fit(self, cli: Cli, *names: str) -> tuple[Result, dict[str, Any]]:
        """Fit a copy with these callbacks beside the base's own; what the command came to, and its metrics."""

        def begin(again: DescantCLI, request: Request, checking: object = None) -> None:
            data = self.parts["datamodule"]  # the samples are shared
            vars(again).update(self.parts, config_init=copy.deepcopy(self.parts["config_init"], {id(data): data}))
            trainer = again.config_init["fit"]["trainer"]
            given = trainer["callbacks"]
            own, more = given[: -len(self.names)], dict(zip(self.names, given[-len(self.names) :], strict=True))
            trainer["callbacks"] = [*own, *(more[name] for name in names)]
            shutil.rmtree(again.place.folder, ignore_errors=True)
            again.place.folder.mkdir(parents=True)
            again.folder = Folder(again.place, again._config_text())
            again._set_seed()
            again.model = again.config_init["fit"]["model"]
            again.trainer = again.instantiate_trainer()
            again._run_subcommand("fit")

        here = Path.cwd()
        os.chdir(self.place)
        try:
            with mock.patch.object(DescantCLI, "__init__", begin):
                result = cli("fit", *self.words)
            file = self.place / "runs/built/metrics.json"
            return result, json.loads(file.read_text()) if result.rc == 0 else {}
        finally:
            os.chdir(here)


class Store:
    """What was built, by a name of the caller's: each is built where it is first asked for."""

    def __init__(self, folder: Callable[[str], Path]) -> None:
        self.folder = folder
        self.built: dict[str, Built] = {}

    def __call__(self, name: str, build: Callable[[], Built]) -> Built:
        if name not in self.built:
            here = Path.cwd()
            os.chdir(self.folder(name.replace("/", "-")))
            try:
                self.built[name] = build()
            finally:
                os.chdir(here)
        return self.built[name]
