"""Command-line arguments as a Request: configurations and options in the order in which they apply."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from descant.cli.catalogue import find, layers, shipped_data
from descant.cli.document import rename
from descant.cli.errors import Refusal, fail, nearest
from descant.modules.io.names import full
from descant.run import runs

#: Options of LightningCLI that are arguments of the recipe here.
OWNED = {"optimizer": "--model.optimizer", "lr_scheduler": "--model.schedule"}
#: Options that take no value, or an optional one.
_FLAGS = ("print_config", "help", "explain", "debug")


@dataclass
class Request:
    """One command. Configurations apply in order, then options in order: options win.

    Attributes:
        command: fit, validate, test, predict or check.
        explain: whether check shows the origin of each value.
        configs: the files of ``--config``.
        options: (key, value) pairs as typed, keys without dashes; value None for a flag.
        trust: modules that this call allows in class paths beside the allow-list.
        debug: whether errors show their tracebacks.
    """

    command: str
    configs: list[Path] = field(default_factory=list)
    options: list[tuple[str, str | None]] = field(default_factory=list)
    trust: list[str] = field(default_factory=list)
    explain: bool = False
    debug: bool = False

    def option(self, key: str) -> str | None:
        """The last value of an option, or None."""
        return next((value for name, value in reversed(self.options) if name == key), None)

    @property
    def files(self) -> list[Path]:
        """The configurations, each after those that it extends."""
        return layers(self.configs)

    def arguments(self) -> list[str]:
        """The arguments for the parser."""
        configs = [f"--config={file}" for file in self.files]
        options = ((key, value if value is None else _full(key, value)) for key, value in self.options)
        return configs + [f"--{key}" if value is None else f"--{key}={value}" for key, value in options]


def _full(key: str, value: str) -> str:
    """For help of a class its import path: the parser finds no short name in a module that is not imported yet."""
    return full(value) or value if key.endswith(".help") else value


def read(command: str, args: Sequence[str]) -> Request:
    """Split the arguments that follow the command word.

    Raises:
        Refusal: for a missing configuration or value, a stray word or an option that has moved.
    """
    request, rest = Request(command), list(args)
    while rest:
        token = rest.pop(0)
        token = {"-c": "--config", "-h": "--help"}.get(token, token)
        if not token.startswith("--") or token == "--":
            raise Refusal(f"{token}: unexpected; options begin with --, and an experiment is --config {token}")
        key, equals, text = token[2:].partition("=")
        value: str | None = text if equals else None
        if value is None and key.removesuffix("+") not in _FLAGS and not key.endswith(".help"):
            if not rest or rest[0].startswith("--"):
                near = nearest(key, _FLAGS, cutoff=0.75)
                fail(f"--{key}: its value is missing{f'; nearest: --{near}' if near else ''}")
            value = rest.pop(0)
        elif value is None and key.endswith(".help") and rest and not rest[0].startswith("-"):
            value = rest.pop(0)
        _take(request, key, value)
    return request


def with_run_config(request: Request) -> Request:
    """Add the configuration of the run that ``--run`` names, where no ``--config`` is given."""
    if request.command != "check" and request.option("run") and not request.configs:
        folder = runs.existing(Path(request.option("runs") or "runs"), str(request.option("run")))
        request.configs.append(folder / "config.yaml")
    return request


def _take(request: Request, key: str, value: str | None) -> None:
    root = key.split(".")[0]
    if root in OWNED:
        fail(f"--{key}: the recipe owns it; use {OWNED[root]}{key[len(root) :]}")
    if key == "config":
        request.configs.append(find(value or ""))
    elif key == "extends":
        fail("--extends: a key of files; on the command line it is one more --config before the others")
    elif key == "trust":
        if not all(part.isidentifier() for part in (value or "").split(".")):
            fail(f"--trust {value}: not the name of a module")
        request.trust.append(value or "")
    elif key == "explain":
        if request.command != "check" or value is not None:
            fail("--explain: a word of check, without a value")
        request.explain = True
    elif key == "debug":
        if value is not None:
            fail("--debug: it takes no value")
        request.debug = True
    elif key == "ckpt_path" and request.command == "fit":
        fail("--ckpt_path: fit resumes by --resume PATH")
    elif key in ("resume", "changed", "test") and request.command not in ("fit", "check"):
        fail(f"--{key}: only fit takes it")
    elif key == "weights_only":
        fail("--weights_only: checkpoints are always loaded as plain tensors")
    else:
        if value is not None and key.endswith(".help"):
            value = rename(value, f"--{key}")
        shipped = shipped_data(value) if key == "data" else None
        request.options.append((key, str(shipped) if shipped else value))
