"""One error line for an exception of the parser, of building the parts, of a file or of the machine."""

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
from types import FrameType
from typing import TYPE_CHECKING

import yaml

from descant.cli.errors import one_line
from descant.cli.trust import within

if TYPE_CHECKING:
    from torch import nn

#: Raised by the parts for a wrong request; anything else is a bug and keeps its traceback.
_REQUESTS = (ValueError, OSError, FloatingPointError, ImportError)
#: Errors that a file or the machine causes, whose messages need a place.
_OUTSIDE = (
    *(OSError, UnicodeError, RecursionError, MemoryError, EOFError, csv.Error, struct.error, zlib.error),
    *(pickle.UnpicklingError, tarfile.TarError, yaml.YAMLError, zipfile.BadZipFile, zipfile.LargeZipFile),
)
#: Errors of torch.distributed, by name, so that this file imports without torch.
_NETWORK = ("DistNetworkError", "DistStoreError")
#: Where Lightning checks arguments; its own errors there are about one of them.
_LIGHTNING = ("lightning.pytorch", "lightning.fabric")
#: Where the loggers for other packages are, whose own errors name the package or the store.
_TRACKERS = "descant.modules.training_setup.trackers"
#: Lightning's messages if a GPU is requested and there is none.
_NO_GPU = re.compile(r"No supported gpu backend found|cannot run on your system since the accelerator")
_NO_GPU_LINE = "trainer.accelerator: no GPU that torch can use on this machine; --config on/cpu trains on the CPU"
#: Modules whose frames are in every traceback.
_ENTRY = ("descant.cli.main", "descant.__main__", "descant.cli.check")


def explain(error: BaseException, building: bool, trust: Sequence[str] = ()) -> str | None:
    """Return the line for an exception, or None if it is a bug.

    ``building``: while objects are built from the configuration, a ValueError of any library is about a setting. Later,
    only those of Descant's own parts, trusted modules and optimizers are.
    """
    error = _root(error)
    if building and "jsonargparse" in _raiser(error) and "\n" in str(error).strip():
        return parse_fault(str(error))
    denied = re.match(r"Importing '([\w.]+)' is not allowed", str(error))
    if denied is not None:
        return f"class_path {denied[1]} is not allowed in a configuration: --trust {denied[1]} if you trust it"
    if type(error).__name__ == "MisconfigurationException":
        return _NO_GPU_LINE if _NO_GPU.search(str(error)) else one_line(error)
    if type(error).__name__ in _NETWORK:
        return _network(str(error))
    if building and isinstance(error, TypeError) and "unexpected keyword argument" in str(error):
        return one_line(error)  # from dict_kwargs
    if (line := _unlike(error)) is not None:
        return line
    if isinstance(error, OSError):
        return one_line(error)
    raiser = _raiser(error)
    if isinstance(error, (ValueError, TypeError) if building else ValueError) and within(raiser, _LIGHTNING):
        return one_line(error)
    if isinstance(error, _REQUESTS) and (building or within(raiser, ("descant", "torch.optim", *trust))):
        return one_line(error)
    return outside(error)


def unbuilt(cls: type, error: Exception, trust: Sequence[str] = ()) -> str | None:
    """Return the line for a class of the configuration that could not be built.

    It names a missing package with the command that installs it, or the class that passed a wrong size or type to a
    library. It is None for errors of Descant's own parts, and for the user's own classes.
    """
    if within(cls.__module__, [_TRACKERS]) and isinstance(error, _REQUESTS):
        return one_line(error)  # the parser would name all loggers of a list
    if isinstance(error, ImportError):
        needed = re.search(r"Requirement '([\w.-]+)([^']*)' not met", str(error))
        name, version = (needed[1], needed[2]) if needed else (str(error.name or "").partition(".")[0], "")
        if name:
            wanted = f"'{name}{version}'" if version else name
            return f"{cls.__name__}: the package {name} is not installed: pip install {wanted}"
    if isinstance(error, (*_REQUESTS, *_OUTSIDE)) or within(cls.__module__, trust):
        return None
    ours = within(_raiser(error), ("descant",))  # other errors there are bugs and keep their traceback
    if ours and not isinstance(error, (RuntimeError, TypeError, ArithmeticError, IndexError, AssertionError)):
        return None
    return f"{cls.__name__}: it cannot be built: {_error_text(error)}; --debug shows more"


def outside_ours(error: BaseException, trust: Sequence[str] = ()) -> str | None:
    """Return the line for an error that a library raised before the first step, with the part that called it.

    It is None if Descant's or the user's own code raised the error: that is a bug and keeps its traceback.
    """
    frames = _frames(error)
    if any(within(name, trust) for name, *_ in frames):
        return None
    if within(_raiser(error), ("descant",)) and not isinstance(error, ArithmeticError):
        return None
    if not isinstance(error, (ValueError, RuntimeError, TypeError, ArithmeticError, IndexError)):
        return None
    for name, frame, _ in reversed(frames):
        if _is_part(name):
            owner = type(frame.f_locals["self"]).__name__ if "self" in frame.f_locals else name
            return f"{owner} ({name}.{frame.f_code.co_name}): {_error_text(error)}; --debug shows more"
    return None


def _error_text(error: BaseException) -> str:
    """Return a library's message, with the error's type if the message is short."""
    text = one_line(error)
    return text[:200] if len(text) > 40 else f"{type(error).__name__}: {text}"


def outside(error: BaseException) -> str | None:
    """Return the line for an error of a file or the machine, with Descant's line that met it; None for other errors.

    >>> outside(zipfile.BadZipFile("File is not a zip file")), outside(KeyError("x"))
    ('BadZipFile: File is not a zip file; --debug shows more', None)
    """
    if not isinstance(error, _OUTSIDE):
        return None
    if isinstance(error, OSError) and error.filename is not None:
        return one_line(error)
    places = [f" (met by {name}:{number})" for name, _, number in _frames(error) if _is_part(name)]
    line = one_line(error)
    line = line if isinstance(error, OSError | RecursionError | MemoryError) else f"{type(error).__name__}: {line}"
    return f"{line}{places[-1] if places else ''}; --debug shows more"


def _network(message: str) -> str:
    """Extract one line from a C++ message of torch.distributed.

    >>> _network("The server socket has failed to listen. port: 29500, name: EADDRINUSE, message: address in use")
    'MASTER_PORT 29500: in use on this machine; set another one, or none for a free one'
    """
    port = re.search(r"port: (\d+)", message)
    if "EADDRINUSE" in message and port is not None:
        return f"MASTER_PORT {port[1]}: in use on this machine; set another one, or none for a free one"
    first = message.strip().partition("\n")[0]
    return f"the ranks do not find each other (MASTER_ADDR, MASTER_PORT): {' '.join(first.split())}"


def misfit(error: BaseException, model: nn.Module, trust: Sequence[str] = ()) -> str | None:
    """Return the line for a part that the first batch does not fit, or None if it is a bug.

    The user's own classes keep their traceback.
    """
    parts = {id(module): (name, type(module).__name__) for name, module in model.named_modules() if name}
    part = None
    for name, frame, _ in _frames(error):
        if within(name, trust):
            return None
        if frame.f_code.co_name == "forward":
            part = parts.get(id(frame.f_locals.get("self")), part)
    if part is None or type(error) not in (RuntimeError, IndexError, TypeError):
        return None
    return f"model.{part[0]} ({part[1]}): the first batch does not fit: {one_line(error)}; --debug shows more"


def _unlike(error: BaseException) -> str | None:
    """Extract the first difference between a checkpoint and the model from torch's message."""
    lines = [line.strip() for line in str(error).splitlines()]
    recipe = re.match(r"Error\(s\) in loading state_dict for (\w+)", lines[0]) if lines else None
    if recipe is None or type(error) is not RuntimeError:
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
    differing = shapes + others or lines[1:] or ["no key fits"]
    more = f" (and {len(differing) - 1} more differ)" if len(differing) > 1 else ""
    return f"the checkpoint does not have the weights of this {recipe[1]}: {differing[0]}{more}"


def _root(error: BaseException) -> BaseException:
    """Return the original error, since the parser wraps a constructor's error in its own."""
    while isinstance(error.__cause__, Exception) and "jsonargparse" in _raiser(error):
        error = error.__cause__
    return error


def _raiser(error: BaseException) -> str:
    """Return the module that raised an error."""
    return _frames(error)[-1][0] if error.__traceback__ else ""


def _frames(error: BaseException) -> list[tuple[str, FrameType, int]]:
    """Return module, frame and line of each call in the traceback, the innermost last."""
    calls = traceback.walk_tb(error.__traceback__)
    return [(str(frame.f_globals.get("__name__", "")), frame, number) for frame, number in calls]


def _is_part(module: str) -> bool:
    """Whether a module is one of Descant's parts, which an error line may name."""
    return within(module, ("descant",)) and not within(module, _ENTRY)


def parse_fault(message: str) -> str:
    """Extract the cause from a parser's long message about a union."""
    lines = [line.strip(" -") for line in message.splitlines() if line.strip()]
    # on the command line, the parser accepts no null for a nested part
    inner = re.search(r"Given value: NestedArg\(key='([^']+)', val=None\)", message)
    if inner is not None:
        outer = re.search(r'Parser key "([^"]+)"', message)
        key = f"{outer[1] + '.' if outer else ''}{inner[1]}"
        return f"{key}: null works here in a YAML file only, not as an option"
    causes = [line for line in lines if re.search(r"not accepted|required|does not accept|Importing '", line)]
    return causes[-1] if causes else _account(message, lines)


#: Beginnings of lines of the parser's message that do not name the fault.
_ACCOUNT = (
    *("Parser key", "Does not validate", "Subtypes:", "Errors:", "Given value", "Expected a <class 'NoneType'>"),
    *("Expected a path but", "Subclass types expect", "a class path (str)", "a dict with"),
)


def _account(message: str, lines: Sequence[str]) -> str:
    """Extract key, fault and value from many lines, as far as they are there.

    >>> _account("", ['Parser key "model":', "Given value: NestedArg(key='towers', val='Linear')"])
    "model.towers: not accepted, got 'Linear'"
    >>> _account("", ['Parser key "data":']), _account("", ["Unexpected config:"])
    ('data: not accepted', 'Unexpected config: the parser gives no details; --debug shows where')
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
    parts = faults or [*lines, message]
    text = " ".join(parts)[:200] if parts[0].endswith(":") else parts[0]
    return f"{text.rstrip(':')}: the parser gives no details; --debug shows where" if text.endswith(":") else text
