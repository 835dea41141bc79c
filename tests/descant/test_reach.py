"""Every parameter and every module that a configuration reaches: is a process, a hub, code or a file elsewhere there?

``reach.yaml`` lists what is allowed and why; here the program is held to the list.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import schedulefree
import timm.optim
import yaml

import descant
from descant.cli import schema, trust
from descant.cli.errors import Refusal
from descant.modules.adaptation.quantize import bitsandbytes

LIST = yaml.safe_load((Path(__file__).parent / "reach.yaml").read_text())
#: Whether what is installed is what was listed: of another version arguments may be new, and are no fault of ours.
LISTED = all(version(name).partition("+")[0] == str(told) for name, told in LIST["versions"].items())
GUARDED = "a file may set it only with --trust (descant/cli/trust.py, guard)"
DATA = "a local file or folder that is read as data; tensors and texts, without code"


def open_ended(kind: schema.Type) -> bool:
    """Whether a text, or a value that the schema does not know, may stand there."""
    if not kind or any(part in ("str", "any") for part in kind):
        return True
    inner = [part for of in ("list", "map") for part in schema.parts(kind, of)]
    return any("other" in part for part in kind if isinstance(part, dict)) or any(map(open_ended, inner))


def touch_parameters(content: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(class, argument) of all that takes a text or anything; the command's own of no class.

    Left out is what is called, which test_permitted.py has.
    """
    for path, entry in content["classes"].items():
        if trust.is_allowed(path):
            for key, (kind, _, _) in entry["keys"].items():
                if open_ended(kind) and not schema.calls(kind):
                    yield path, key
    for key, (kind, _, _) in content["commands"]["fit"].items():
        if open_ended(kind) and not schema.calls(kind):
            yield "", key


def reasons(path: str, key: str) -> list[str]:
    """Those of the class, where it has some of its own, else those of the argument."""
    own = f"{path.rpartition('.')[2]}.{key}"
    found = [reason for reason, keys in LIST["arguments"].items() if own in keys]
    return found or [reason for reason, keys in LIST["arguments"].items() if key in keys]


def held(path: str) -> bool:
    return LISTED or path.startswith("descant.")


def test_every_argument_that_takes_a_text_has_a_reason(written_content: dict[str, Any]) -> None:
    every = list(touch_parameters(written_content))
    assert len(every) > 300
    assert [(path, key) for path, key in every if held(path) and not reasons(path, key)] == []


@pytest.mark.skipif(not LISTED, reason="of these versions of what Descant stands on not every argument is listed")
def test_every_reason_is_of_an_argument_that_is_there(written_content: dict[str, Any]) -> None:
    every = list(touch_parameters(written_content))
    there = {key for _, key in every} | {f"{path.rpartition('.')[2]}.{key}" for path, key in every}
    assert sorted({key for keys in LIST["arguments"].values() for key in keys} - there) == []


def test_what_is_listed_as_guarded_is(written_content: dict[str, Any]) -> None:
    """A path elsewhere, an address, a package's hash, an upload: each is refused where a file says it."""
    bad: dict[str, Any] = {
        "accept": ["aa"],
        "urls": ["https://example.org/a.tar"],
        "trainer.model_registry": "me/model",
    }
    tried = 0
    for path, key in touch_parameters(written_content):
        if GUARDED in reasons(path, key):
            for value in [bad[key]] if key in bad else ["/tmp/elsewhere", "../elsewhere", "~/elsewhere", "a/../../b"]:
                with pytest.raises(Refusal, match="--trust"):
                    trust.guard(key, value, of=path)
                tried += 1
    assert tried > 60


def test_what_is_of_a_class_that_needs_trust_is(written_content: dict[str, Any]) -> None:
    reason = "of a class that a file may name only with --trust, network or the class"
    owners = {path for path, key in touch_parameters(written_content) if reason in reasons(path, key) and held(path)}
    for path in owners:
        with pytest.raises(Refusal, match="--trust"):
            trust.require(path)
            trust.guard("class_path", path)


def test_only_our_own_readers_take_files(written_content: dict[str, Any]) -> None:
    readers = {path for path, key in touch_parameters(written_content) if DATA in reasons(path, key)}
    assert len(readers) > 30 and all(path.startswith("descant.") for path in readers)


# calls --------------------------------------------------------------------------------------------------------------

_BARE = {
    "open",
    "exec",
    "eval",
    "compile",
    "__import__",
    "import_module",
    "find_spec",
    "run_beside",
    "snapshot_download",
}
_ANY = {
    *(
        "system",
        "popen",
        "execv",
        "execve",
        "execvp",
        "spawnv",
        "import_module",
        "resolve_name",
        "find_spec",
        "exec_module",
    ),
    *("open", "write_text", "write_bytes", "urlopen", "urlretrieve", "Popen", "check_output", "check_call"),
    *(
        "from_pretrained",
        "load_state_dict_from_url",
        "hf_hub_download",
        "snapshot_download",
        "get_kernel",
        "create_model",
    ),
}
_OF = {
    *(("torch", name) for name in ("load", "save")),
    *(("os", name) for name in ("remove", "unlink", "replace", "rename", "symlink", "link")),
    *(("np", name) for name in ("load", "save", "savez")),
}
_MODULES = {"subprocess", "pickle", "shutil", "requests", "urllib", "ctypes", "socket", "webbrowser"}
#: Packages all of whose modules are walked: what a class of theirs calls may be a function of another.
_WHOLE = ("descant.callbacks", "descant.datamodules", "descant.modules", "descant.recipes")


def calls(name: str) -> set[str]:
    """What the source of a module calls that opens, writes, starts, imports or loads."""
    try:
        tree = ast.parse(inspect.getsource(importlib.import_module(name)))
    except (OSError, TypeError):  # written in C
        return set()
    found = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        if isinstance(node.func, ast.Name) and node.func.id in _BARE:
            found.add(node.func.id)
        elif isinstance(node.func, ast.Attribute):
            of = node.func.value.id if isinstance(node.func.value, ast.Name) else ""
            if node.func.attr in _ANY or of in _MODULES or (of, node.func.attr) in _OF:
                found.add(f"{of}.{node.func.attr}".lstrip("."))
    return found


def modules(content: dict[str, Any]) -> set[str]:
    """Where the classes that a configuration may name are defined, and their bases."""
    import torch
    from torchvision.transforms import v2

    classes = [getattr(importlib.import_module(path.rpartition(".")[0]), path.rpartition(".")[2]) for path in
               content["classes"] if trust.is_allowed(path)]  # fmt: skip
    for package in (torch.nn, torch.optim, v2, bitsandbytes().optim):
        named = {f"{package.__name__}.{name}": found for name, found in vars(package).items()}
        classes += [found for name, found in named.items() if isinstance(found, type) and trust.is_allowed(name)]
    classes += [timm.optim.Lion, *(found for found in vars(schedulefree).values() if isinstance(found, type))]
    found = {base.__module__ for cls in classes for base in cls.__mro__} - {"builtins", "typing", "abc", "torch"}
    for package in _WHOLE:
        paths = importlib.import_module(package).__path__
        found |= {package, *(one.name for one in pkgutil.walk_packages(paths, f"{package}."))}
    return found


def test_every_call_that_opens_writes_starts_or_loads_has_a_reason(written_content: dict[str, Any]) -> None:
    walked = modules(written_content)
    assert len(walked) > 300
    found = {name: sorted(told) for name in sorted(walked) if held(name) and (told := calls(name))}
    listed = {name: sorted(told) for name, told in LIST["calls"].items() if name in found or held(name)}
    assert found == listed


def test_the_walk_sees_such_calls() -> None:
    assert "subprocess.Popen" in calls("descant.run.processes") and "torch.save" in calls("descant.run.store")
    assert (
        calls("descant.modules.towers.vit") == set() and Path(descant.__file__).is_file() and "descant" in sys.modules
    )
