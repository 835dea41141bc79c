"""Register a claim before it runs: commit, time, digest of its YAML, and digests of the code that its runs import."""

from __future__ import annotations

import ast
import hashlib
import json
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from descant.claims.claim import BEFORE, Arm, Claim, texts
from descant.cli.catalogue import find, layers
from descant.cli.untrusted import yaml_of
from descant.modules.io.names import PACKAGE, full

#: A configuration of a claim, read once.
_content = cache(yaml_of)


def register(claim: Claim) -> dict[str, Any]:
    """What a claim was when it was registered.

    Returns:
        ``digest`` of its YAML, ``commit`` of the checkout (None outside of one), ``time`` (UTC, ISO 8601) and ``code``,
        the digest of each source file by its path below the package.
    """
    return {
        "digest": claim.digest,
        "commit": _commit(),
        "time": now(),
        "code": code(claim),
    }


def changed(registered: Mapping[str, Any], claim: Claim) -> list[str]:
    """Source files of a claim whose code is not what was registered, such as ``modules/losses/hinge.py``."""
    then, now = registered["code"], code(claim)
    return sorted(file for file in {*then, *now} if then.get(file) != now.get(file))


def code(claim: Claim) -> dict[str, str]:
    """File -> digest, for the classes that the configurations of a claim name and all of ours that these import.

    Comments, docstrings and layout do not count. What a class imports is read from its source, so nothing is imported.
    """
    arms = [*claim.arms.values(), *([claim.before] if claim.before is not None else [])]
    paths = (full(text.rpartition(".")[2]) for arm in arms for text in _named(claim, arm))
    modules = imported(path.rpartition(".")[0] for path in paths if path is not None)
    files = {_file(module) for module in modules}
    return {file.relative_to(PACKAGE).as_posix(): _digest(file) for file in sorted(filter(None, files))}


def shared(claim: Claim, arm: str, budget: str) -> str:
    """Digest of the runs of an arm: what they compose to, their options, and the code that they import.

    Arms of two claims with the same digest are the same runs, whatever their names are.
    """
    added = claim.before if arm == BEFORE else claim.arms[arm]
    assert added is not None
    experiment = () if arm == BEFORE else (claim.experiment,)
    files = layers(map(find, (*experiment, *added.configs)))
    options = claim.options(arm, budget)
    needs = sorted(added.needs()) if arm != BEFORE else []
    begins = [shared(claim, other, budget) for other in needs]
    if claim.before is not None and arm != BEFORE:
        begins.append(shared(claim, BEFORE, budget))
    alone = replace(claim, arms={arm: added}, before=None)
    what: list[Any] = [[_content(file) for file in files], options, begins, code(alone)]
    what += [] if added.predict is None else [added.predict]  # runs without it keep their digests
    return hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()[:16]


def imported(modules: Iterable[str]) -> set[str]:
    """The modules and all modules of this package that they import, at any depth.

    >>> sorted(imported(["descant.claims.effect"]))
    ['descant.claims.effect', 'descant.report.statistics']
    """
    known, todo = set[str](), list(modules)
    while todo:
        module = todo.pop()
        if module not in known:
            known.add(module)
            todo += _imports(module)
    return known


def _named(claim: Claim, arm: Arm) -> list[str]:
    """All texts in what the runs of an arm compose to."""
    files = layers(map(find, (claim.experiment, *arm.configs)))
    return texts([[_content(file) for file in files], dict(arm.options), dict(arm.predict or {})])


@cache
def _imports(module: str) -> frozenset[str]:
    file = _file(module)
    names = set[str]()
    for node in ast.walk(_parsed(file)) if file is not None else ():
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return frozenset(name for name in names if name.startswith("descant.") and _file(name) is not None)


@cache
def _file(module: str) -> Path | None:
    base = PACKAGE.joinpath(*module.split(".")[1:])
    return next((file for file in (base.with_suffix(".py"), base / "__init__.py") if file.is_file()), None)


@cache
def _parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


@cache
def _digest(file: Path) -> str:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    return hashlib.sha256(ast.unparse(tree).encode()).hexdigest()[:12]


def now() -> str:
    """The time as it is stored: UTC, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _commit() -> str | None:
    """Commit of the checkout that the package lies in."""
    command = ["git", "-C", str(PACKAGE), "rev-parse", "HEAD"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()
