"""Exceptions to one line: what the parser says at length, and what the parts say when they are built."""

from __future__ import annotations

import csv
import pickle
import re
import struct
import tarfile
import traceback
import zipfile
import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import yaml

from descant.cli.errors import one_line

if TYPE_CHECKING:
    from torch import nn

#: What the parts raise for a wrong request; anything else is a fault of the program and keeps its traceback.
_REQUESTS = (ValueError, OSError, FloatingPointError, ImportError)
#: What a file or the machine brings about, wherever it is met, and whose words are of no help without a place.
_OUTSIDE = (
    *(OSError, UnicodeError, RecursionError, MemoryError, EOFError, csv.Error, struct.error, zlib.error),
    *(pickle.UnpicklingError, tarfile.TarError, yaml.YAMLError, zipfile.BadZipFile, zipfile.LargeZipFile),
)
#: Of torch.distributed, by name, so that this file imports without it.
_NETWORK = ("DistNetworkError", "DistStoreError")
#: Where Lightning judges arguments: what it raises there itself is about one of them.
_LIGHTNING = ("lightning.pytorch", "lightning.fabric")
#: Modules whose frames are in every traceback, so they say nothing of whose fault it is.
_ENTRY = ("descant.cli.main", "descant.__main__", "descant.cli.check")


def parse_fault(message: str, error: BaseException | None = None) -> str:
    """The true cause of a parser's error, which stands in the middle of a long union of attempts."""
    return _shorten(message)


def explain(error: BaseException, building: bool, trust: Sequence[str] = ()) -> str | None:
    """The line for an exception, or None if it is a fault of the program.

    ``building``: while objects are made from the configuration, a ValueError of any library is about a
    setting; later only those of our own parts (and of trusted modules and optimizers) are.
    """
    error = _root(error)
    if building and "jsonargparse" in _raiser(error) and "\n" in str(error).strip():
        return parse_fault(str(error), error)  # an account of many lines
    denied = re.match(r"Importing '([\w.]+)' is not allowed", str(error))
    if denied is not None:
        return f"class_path {denied[1]} is not one that a configuration may name: --trust {denied[1]} if you trust it"
    if type(error).__name__ == "MisconfigurationException":
        return _without_gpu(str(error)) or one_line(error)
    if type(error).__name__ in _NETWORK:
        return _network(str(error))
    if building and isinstance(error, TypeError) and "unexpected keyword argument" in str(error):
        return one_line(error)  # of dict_kwargs
    if (line := _unlike(error)) is not None:
        return line
    if isinstance(error, OSError):
        return one_line(error)
    names = [str(frame.f_globals.get("__name__", "")) for frame, _ in traceback.walk_tb(error.__traceback__)]
    last = names[-1] if names else ""
    if isinstance(error, (ValueError, TypeError) if building else ValueError) and _within(last, _LIGHTNING):
        return one_line(error)
    if not isinstance(error, _REQUESTS):
        return outside(error)
    if building:
        return one_line(error)
    return one_line(error) if _within(last, ("descant", "torch.optim", *trust)) else outside(error)


def _without_gpu(message: str) -> str | None:
    """What to do where a GPU is asked for and there is none.

    >>> _without_gpu("No supported gpu backend found!")
    'trainer.accelerator: no GPU that torch can use on this machine; --config on/cpu trains on the CPU'
    """
    if not re.search(r"No supported gpu backend found|cannot run on your system since the accelerator", message):
        return None
    return "trainer.accelerator: no GPU that torch can use on this machine; --config on/cpu trains on the CPU"


def unbuilt(cls: type, error: Exception, trust: Sequence[str] = ()) -> str | None:
    """The line for a class of the configuration that could not be built, where :func:`explain` has none or loses it.

    A package that is missing is named with the command that installs it; what a library says of a size or a type gets
    the name of the class that passed it on. None for what the parts say themselves, and for the user's own classes.
    """
    if isinstance(error, ImportError):
        asked = re.search(r"Requirement '([\w.-]+)([^']*)' not met", str(error))
        name, of = (asked[1], asked[2]) if asked else (str(error.name or "").partition(".")[0], "")
        if name:
            wanted = f"'{name}{of}'" if of else name
            return f"{cls.__name__}: the package {name} is not installed: pip install {wanted}"
    if isinstance(error, (*_REQUESTS, *_OUTSIDE)) or _within(cls.__module__, trust):
        return None
    if not isinstance(error, (RuntimeError, TypeError, ArithmeticError, IndexError, AssertionError)):
        return None
    return f"{cls.__name__}: it cannot be built: {_worded(error)}; --debug shows more"


def outside_ours(error: BaseException, trust: Sequence[str] = ()) -> str | None:
    """The line for what a library raised before the first step, which a setting has brought about, with who called it.

    None where our own code or the user's raised it: that is a fault of the program, and keeps its traceback.
    """
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    names = [str(frame.f_globals.get("__name__", "")) for frame in frames]
    if not names or any(_within(name, trust) for name in names) or not isinstance(error, Exception):
        return None
    if _within(names[-1], ("descant",)) and not isinstance(error, ArithmeticError):
        return None
    if not isinstance(error, (ValueError, RuntimeError, TypeError, ArithmeticError, IndexError)):
        return None
    for frame, name in reversed(list(zip(frames, names, strict=True))):
        if _within(name, ("descant",)) and not _within(name, _ENTRY):
            owner = type(frame.f_locals["self"]).__name__ if "self" in frame.f_locals else name
            return f"{owner} ({name}.{frame.f_code.co_name}): {_worded(error)}; --debug shows more"
    return None


def _worded(error: BaseException) -> str:
    """What a library says, with its type where the words alone say little."""
    text = one_line(error)
    return text[:200] if len(text) > 40 else f"{type(error).__name__}: {text}"


def outside(error: BaseException) -> str | None:
    """The line for what a file or the machine brought about, with the line of ours that met it; None for other errors.

    >>> outside(zipfile.BadZipFile("File is not a zip file")), outside(KeyError("x"))
    ('BadZipFile: File is not a zip file; --debug shows more', None)
    """
    if not isinstance(error, _OUTSIDE):
        return None
    if isinstance(error, OSError) and error.filename is not None:
        return one_line(error)
    met = ""
    for frame, number in traceback.walk_tb(error.__traceback__):
        name = str(frame.f_globals.get("__name__", ""))
        if _within(name, ("descant",)) and not _within(name, _ENTRY):
            met = f" (met by {name}:{number})"
    said = one_line(error)
    said = said if isinstance(error, OSError | RecursionError | MemoryError) else f"{type(error).__name__}: {said}"
    return f"{said}{met}; --debug shows more"


def _network(message: str) -> str:
    """Of many lines of C++.

    >>> _network("The server socket has failed to listen. port: 29500, name: EADDRINUSE, message: address in use")
    'MASTER_PORT 29500: in use on this machine; another one, or none, by which a free one is taken'
    """
    port = re.search(r"port: (\d+)", message)
    if "EADDRINUSE" in message and port is not None:
        return f"MASTER_PORT {port[1]}: in use on this machine; another one, or none, by which a free one is taken"
    first = message.strip().partition("\n")[0]
    return f"the ranks do not find each other (MASTER_ADDR, MASTER_PORT): {' '.join(first.split())}"


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
    return causes[-1] if causes else _account(message, lines)


#: How lines of the parser's account of a union begin that say nothing of the fault.
_ACCOUNT = (
    *("Parser key", "Does not validate", "Subtypes:", "Errors:", "Given value", "Expected a <class 'NoneType'>"),
    *("Expected a path but", "Subclass types expect", "a class path (str)", "a dict with"),
)


def _account(message: str, lines: Sequence[str]) -> str:
    """Key, fault and value out of many lines, whichever of them are there.

    >>> _account("", ['Parser key "model":', "Given value: NestedArg(key='towers', val='Linear')"])
    "model.towers: not accepted, got 'Linear'"
    >>> _account("", ['Parser key "data":']), _account("", ["Unexpected config:"])
    ('data: not accepted', 'Unexpected config: the parser says no more; --debug shows where')
    """
    text = "\n".join(lines)
    keys = re.search(r'Parser key "([^"]+)"', text)
    nested = re.search(r"NestedArg\(key='([^']+)', val=(.*)\)", text)
    key = ".".join(part for part in (keys and keys[1], nested and nested[1]) if part)
    faults = [line for line in lines if not line.startswith(_ACCOUNT) and "Namespace(" not in line]
    given = nested[2] if nested else next((line[13:] for line in lines if line.startswith("Given value: ")), "")
    named = re.search(r"class_path='([^']+)'", given)
    if "Namespace(" in given:  # a whole configuration
        given = f"{named[1]} with arguments" if named else "keys"
    if nested:
        faults = [line.removeprefix(f"{nested[1].rpartition('.')[2]}: ") for line in faults]
    fault = "not accepted"
    if faults and not (nested and faults[0] in given):
        fault = " ".join(faults[: 2 if faults[0].endswith(":") else 1])
    got = f", got {given[:80]}" if given and given not in fault else ""
    if key:
        return f"{key}: {fault}{got}"
    told = faults or [*lines, message]
    text = " ".join(told)[:200] if told[0].endswith(":") else told[0]
    return f"{text.rstrip(':')}: the parser says no more; --debug shows where" if text.endswith(":") else text
