"""Command-line arguments as a Request: configurations and options in the order in which they apply."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from descant.cli.catalogue import find, layers, shipped_data
from descant.cli.document import FileKey, option
from descant.cli.errors import Refusal, fail, nearest
from descant.modules.io.names import full
from descant.run import runs

#: Options of LightningCLI that are arguments of the recipe here.
OWNED = {"optimizer": "--model.optimizer", "lr_scheduler": "--model.schedule"}
#: Options that take no value, or an optional one.
_FLAGS = ("print_config", "help", "explain", "debug")
#: Options that only fit takes; check takes what fit takes.
OF_FIT = ("resume", "changed", "test", "checkpoint_mirror")
#: Option ``--of-file KEY=VALUE``, which passes on an option from a file; it may not set the keys in ``_TYPED``.
OF_FILE = "of-file"
#: Options that choose each set of the run's own data module.
_OWN_SETS = ("data.source", "data.stream", "data.validate", "data.test")
_TYPED = ("config", "extends", "trust", OF_FILE, *_FLAGS)


@dataclass
class Request:
    """One command. Configurations apply in order, then options in order: options win.

    Attributes:
        command: fit, validate, test, predict or check.
        explain: whether check shows the origin of each value.
        configs: the files of ``--config``.
        options: (key, value) pairs as typed, keys without dashes; value None for a flag.
        trust: modules that this call allows in class paths in addition to the allow-list.
        debug: whether errors show their tracebacks.
        judged: path and split of other data to evaluate a run on, from ``--data.path`` and ``--data.split``.
    """

    command: str
    configs: list[Path] = field(default_factory=list)
    options: list[tuple[str, str | None]] = field(default_factory=list)
    trust: list[str] = field(default_factory=list)
    explain: bool = False
    debug: bool = False
    judged: tuple[str, str | None] | None = None

    @property
    def typed_options(self) -> list[tuple[str, str | None]]:
        """Return the options that the user typed."""
        return [option for option in self.options if not isinstance(option[0], FileKey)]

    def option(self, key: str) -> str | None:
        """Return the last value of an option, or None."""
        return next((value for name, value in reversed(self.options) if name == key), None)

    @property
    def files(self) -> list[Path]:
        """Return the configurations, each after those that it extends."""
        return layers(self.configs)

    def arguments(self, classes: Sequence[tuple[str, ...]] = ()) -> list[str]:
        """Return the arguments for the parser; ``classes``: the places of classes that the configurations name."""
        configs = [f"--config={file}" for file in self.files]
        return configs + [_argument(key, value, classes) for key, value in self.options]


def _argument(key: str, value: str | None, classes: Sequence[tuple[str, ...]]) -> str:
    """Format one option for the parser: as a configuration if the parser accepts it only there.

    It accepts no null from an option for an argument of a part, and no key along two mappings by name.

    >>> _argument("model.init_args.width", "3", ()), _argument("model.init_args.schedule", "null", ())
    ('--model.init_args.width=3', '--config={"model": {"init_args": {"schedule": null}}}')
    """
    if value is None:
        return f"--{key}"
    if key.endswith(".help"):  # the parser finds no short name in a module not yet imported
        return f"--{key}={full(value) or value}"
    parts = key.split(".")
    mappings = [i for i in range(2, len(parts)) if parts[i - 2] == "init_args" != parts[i]]
    plain = option(key, value).plain if ".init_args." in key else {}
    if (len(mappings) > 1 or _has_null(plain)) and _with_others(plain, parts, mappings, classes):
        return f"--config={json.dumps(plain)}"
    return f"--{key}={value}"


def _has_null(plain: Any) -> bool:
    children = plain.values() if isinstance(plain, dict) else plain if isinstance(plain, list) else ()
    return plain is None or any(map(_has_null, children))


def _with_others(plain: Any, parts: Sequence[str], mappings: Sequence[int], classes: Sequence[tuple[str, ...]]) -> bool:
    """Name the other classes of each mapping that a key passes, in order; return False for a mapping of other values.

    The parser drops the classes that a configuration does not name.
    """
    node = plain
    for i, part in enumerate(parts):
        if i in mappings:
            path = tuple(step for step in parts[:i] if step != "init_args")
            names, inner = [place[-1] for place in classes if place[:-1] == path], node[part]
            if part not in names:
                return False
            node.clear()
            node.update({name: inner if name == part else {"init_args": {}} for name in names})
        node = node[part]
    return True


def pass_on(key: str, text: str) -> str:
    """Return the word for an option from a file: the only way from the content of a file into a command line."""
    return f"--{OF_FILE}={key}={text}"


def read(command: str, args: Sequence[str]) -> Request:
    """Split the arguments that follow the command word."""
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
    """Add the configuration of the run that ``--run`` names, if no ``--config`` is given."""
    if request.command != "check" and request.option("run") and not request.configs:
        folder = runs.existing(Path(request.option("runs") or "runs"), str(request.option("run")))
        request.configs.append(folder / "config.yaml")
        typed = dict(request.typed_options)
        own = "data" in typed or any(key.startswith(_OWN_SETS) for key in typed)
        if request.command != "fit" and not own and typed.get("data.path"):
            request.judged = str(typed["data.path"]), typed.get("data.split")
            taken = ("data.path", "data.split")
            request.options = [option for option in request.options if option[0] not in taken]
    return request


def _take(request: Request, key: str, value: str | None) -> None:
    root = key.split(".")[0]
    if root in OWNED:
        fail(f"--{key}: the recipe owns it; use {OWNED[root]}{key[len(root) :]}")
    if key == "config":
        request.configs.append(find(value or ""))
    elif key == "extends":
        fail("--extends: a key of files; on the command line it is one more --config before the others")
    elif key == OF_FILE:
        name, _, text = (value or "").partition("=")
        if name.partition(".")[0] in _TYPED or name.endswith(_FLAGS):
            fail(f"--{OF_FILE} {name}: only a user may type that; a file cannot trust itself")
        _take(request, FileKey(name), text)
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
    elif key in OF_FIT and request.command not in ("fit", "check"):
        fail(f"--{key}: only fit takes it")
    elif key == "weights_only":
        fail("--weights_only: checkpoints are always loaded as plain tensors")
    else:
        shipped = shipped_data(value) if key == "data" else None
        request.options.append((key, str(shipped) if shipped else value))
