"""Exceptions to one line: what the parser says at length, and what the parts say when they are built."""

from __future__ import annotations

import re
import traceback
from collections.abc import Sequence
from typing import TYPE_CHECKING

from descant.errors import one_line

if TYPE_CHECKING:
    from torch import nn

#: What the parts raise for a wrong request; anything else is a fault of the program and keeps its traceback.
_REQUESTS = (ValueError, OSError, FloatingPointError, ImportError)
#: Modules whose frames are in every traceback, so they say nothing of whose fault it is.
_ENTRY = ("descant.cli", "descant.__main__", "descant.check")


def parse_fault(message: str, error: BaseException | None = None) -> str:
    """The true cause of a parser's error, which stands in the middle of a long union of attempts."""
    return _shorten(message)


def explain(error: BaseException, building: bool, trust: Sequence[str] = ()) -> str | None:
    """The line for an exception, or None if it is a fault of the program.

    ``building``: while objects are made from the configuration, a ValueError of any library is about a
    setting; later only those of our own parts (and of trusted modules and optimizers) are.
    """
    error = _root(error)
    denied = re.match(r"Importing '([\w.]+)' is not allowed", str(error))
    if denied is not None:
        return f"class_path {denied[1]} is not one that a configuration may name: --trust {denied[1]} if you trust it"
    if type(error).__name__ == "MisconfigurationException":
        return one_line(error)
    if building and isinstance(error, TypeError) and "unexpected keyword argument" in str(error):
        return one_line(error)  # of dict_kwargs
    if (line := _unlike(error)) is not None:
        return line
    if not isinstance(error, _REQUESTS):
        return None
    names = [str(frame.f_globals.get("__name__", "")) for frame, _ in traceback.walk_tb(error.__traceback__)]
    ours = [name for name in names if _within(name, ("descant", *trust)) and not _within(name, _ENTRY)]
    if building or (isinstance(error, OSError) and ours):
        return one_line(error)
    last = names[-1] if names else ""
    return one_line(error) if _within(last, ("descant", "torch.optim", *trust)) else None


def misfit(error: BaseException, model: nn.Module, trust: Sequence[str] = ()) -> str | None:
    """The line for a part that the first batch does not fit, or None if it is a fault of the program.

    A class of the user's own keeps its traceback: it is being written.
    """
    parts = {id(part): (name, type(part).__name__) for name, part in model.named_modules() if name}
    found, frames = None, list(traceback.walk_tb(error.__traceback__))
    for frame, _ in frames:
        if _within(str(frame.f_globals.get("__name__", "")), trust):
            return None
        if frame.f_code.co_name == "forward":
            found = parts.get(id(frame.f_locals.get("self")), found)
    if found is None or type(error) not in (RuntimeError, IndexError, TypeError):
        return None
    return f"model.{found[0]} ({found[1]}): the first batch does not fit: {one_line(error)}; --debug shows more"


def _unlike(error: BaseException) -> str | None:
    """The first difference between a checkpoint and the model, of what torch tells a line each."""
    lines = [line.strip() for line in str(error).splitlines()]
    found = re.match(r"Error\(s\) in loading state_dict for (\w+)", lines[0]) if lines else None
    if found is None or type(error) is not RuntimeError:
        return None
    shapes, others = [], []
    for line in lines[1:]:
        sizes = re.match(r"size mismatch for (\S+): .*?torch\.Size\((.*?)\).*?torch\.Size\((.*?)\)", line)
        keys = re.findall(r'"([^"]+)"', line)
        if sizes is not None:
            shapes.append(f"{sizes[1]} is {sizes[2]} in the file and {sizes[3]} in the model")
        elif line.startswith("Missing key"):
            others += [f"{key} is not in the file" for key in keys]
        elif line.startswith("Unexpected key"):
            others += [f"{key} is in the file, and the model has no such key" for key in keys]
    told = shapes + others or lines[1:] or ["no key fits"]
    more = f" (and {len(told) - 1} more differ)" if len(told) > 1 else ""
    return f"the checkpoint has not the weights of this {found[1]}: {told[0]}{more}"


def _root(error: BaseException) -> BaseException:
    """What was raised first: the parser wraps what a constructor raises in its own account of a union."""
    while isinstance(error.__cause__, Exception) and "jsonargparse" in _raiser(error):
        error = error.__cause__
    return error


def _raiser(error: BaseException) -> str:
    frames = list(traceback.walk_tb(error.__traceback__))
    return str(frames[-1][0].f_globals.get("__name__", "")) if frames else ""


def _within(name: str, packages: Sequence[str]) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def _shorten(message: str) -> str:
    lines = [line.strip(" -") for line in message.splitlines() if line.strip()]
    # the parser takes no null for a part inside a part from the command line
    inner = re.search(r"Given value: NestedArg\(key='([^']+)', val=None\)", message)
    if inner is not None:
        outer = re.search(r'Parser key "([^"]+)"', message)
        key = f"{outer[1] + '.' if outer else ''}{inner[1]}"
        return f"{key}: null is understood here in a YAML file only, not as an option"
    causes = [line for line in lines if re.search(r"not accepted|required|does not accept|Importing '", line)]
    return (causes or lines or [message])[-1 if causes else 0]
