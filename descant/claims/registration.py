"""Register a claim before it runs: commit, time, digest of its YAML, and digests of the code that its runs import."""

from __future__ import annotations

import ast
import hashlib
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from descant.claims.claim import ARMS, BEFORE, Arm, Claim, texts
from descant.claims.digest import RULE, sha
from descant.cli.catalogue import find, layers
from descant.cli.errors import fail
from descant.cli.untrusted import yaml_of
from descant.modules.io.names import PACKAGE, full

#: A configuration of a claim, read once.
_content = cache(yaml_of)


def register(claim: Claim) -> dict[str, Any]:
    """What a claim was when it was registered.

    Returns:
        ``digests`` of its arms and rule, ``commit`` of the checkout that its YAML lies in (None outside of one),
        ``time`` (UTC, ISO 8601) and ``code``, the digest of each source file by its path below the package.
    """
    commit = _git(claim.file.parent, "rev-parse", "HEAD")
    if commit is not None and (files := find_uncommitted_files(claim)):
        fail(f"claims {claim.name}: not committed: {', '.join(files)}; a claim is registered by a commit")
    return {
        "digests": dict(claim.digests),
        "commit": commit.strip() if commit is not None else None,
        "time": now(),
        "code": code(claim),
    }


def find_uncommitted_files(claim: Claim) -> list[str]:
    """List the files of a claim that are changed and not committed: its YAML, what it composes, and imported code."""
    configs = [name for arm in (*claim.arms.values(), *filter(None, [claim.before])) for name in arm.configs]
    files = {claim.file, *layers(map(find, (claim.experiment, *configs))), *(PACKAGE / file for file in code(claim))}
    found = []
    for folder in {file.resolve().parent for file in files}:
        here = [file.resolve().name for file in files if file.resolve().parent == folder]
        found += (_git(folder, "status", "--porcelain", "--", *here) or "").splitlines()
    return sorted(line[3:] for line in found)


def exploratory(claim: Claim, registered: Mapping[str, Any] | None) -> str | None:
    """Why a result is no test of a claim that was fixed beforehand; None where it is one."""
    if claim.exploratory is not None:
        return claim.exploratory
    if not registered or "digests" not in registered:
        return "it was not registered before it ran"
    if registered.get("commit") is None:
        return "it was registered outside of a checkout"
    then = registered["digests"]
    other = [key for key in (RULE, *ARMS) if then.get(key) != claim.digests.get(key)]
    return f"registered with another {' and '.join(other)}" if other else None


def changed(registered: Mapping[str, Any], claim: Claim) -> list[str]:
    """Source files of a claim whose code is not what was registered, such as ``modules/losses/hinge.py``."""
    then, now = registered.get("code", {}), code(claim)
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
    """Digest of the runs of an arm, and of the code that they import.

    Arms of two claims with the same digest are the same runs, whatever their names are.
    """
    needs = claim.begins_from(arm) if arm != BEFORE else set()
    alone = replace(claim, arms={name: of for name, of in claim.arms.items() if name in {arm, *needs}})
    return sha([claim.digests[arm], claim.options(arm, budget), code(alone)])


def imported(modules: Iterable[str]) -> set[str]:
    """The modules and all modules of this package that they import, at any depth.

    >>> sorted(imported(["descant.claims.effect"]))
    ['descant.claims.effect', 'descant.claims.power', 'descant.report.statistics']
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


def _git(folder: Path, *words: str) -> str | None:
    """What git prints; None outside of a checkout, or without git."""
    command = ["git", "-C", str(folder.resolve()), *words]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
