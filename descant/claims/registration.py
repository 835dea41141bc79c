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

#: Content of a configuration file, read once.
_content = cache(yaml_of)


def register(claim: Claim) -> dict[str, Any]:
    """Record the state of a claim, to be registered.

    Returns:
        ``digests`` of its arms and rule, ``commit`` of the checkout with its YAML (None outside a checkout), ``time``
            (UTC, ISO 8601) and ``code``, the digest of each source file by its path below the package.
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
    """List changed, uncommitted files of a claim: its YAML, configurations that it composes, and imported code."""
    configs = [name for arm in (*claim.arms.values(), *filter(None, [claim.before])) for name in arm.configs]
    files = {claim.file, *layers(map(find, (claim.experiment, *configs))), *(PACKAGE / file for file in code(claim))}
    found = []
    for folder in {file.resolve().parent for file in files}:
        here = [file.resolve().name for file in files if file.resolve().parent == folder]
        found += (_git(folder, "status", "--porcelain", "--", *here) or "").splitlines()
    return sorted(line[3:] for line in found)


def exploratory(claim: Claim, registered: Mapping[str, Any] | None) -> str | None:
    """Return why a result does not test a claim that was fixed beforehand, or None if it does."""
    if claim.exploratory is not None:
        return claim.exploratory
    if not registered or "digests" not in registered:
        return "it was not registered before it ran"
    if registered.get("commit") is None:
        return "it was registered outside of a checkout"
    then = registered["digests"]
    other = [key for key in (RULE, *ARMS) if then.get(key) != claim.digests.get(key)]
    return f"registered with another {' and '.join(other)}" if other else None


def list_changed_files(registered: Mapping[str, Any], claim: Claim) -> list[str]:
    """List source files of a claim whose code differs from the registered code, such as ``modules/losses/hinge.py``."""
    then, now = registered.get("code", {}), code(claim)
    return sorted(file for file in {*then, *now} if then.get(file) != now.get(file))


def code(claim: Claim) -> dict[str, str]:
    """Map files to digests, for the classes in a claim's configurations and all code of this package that they import.

    Comments, docstrings and layout do not count. Imports are read from the source, so nothing is imported.
    """
    arms = [*claim.arms.values(), *([claim.before] if claim.before is not None else [])]
    paths = (full(text.rpartition(".")[2]) for arm in arms for text in _list_texts(claim, arm))
    modules = find_imports(path.rpartition(".")[0] for path in paths if path is not None)
    files = {_file(module) for module in modules}
    return {file.relative_to(PACKAGE).as_posix(): _digest(file) for file in sorted(filter(None, files))}


def digest_of_runs(claim: Claim, arm: str, budget: str) -> str:
    """Return a digest of an arm's runs and of the code that they import.

    Arms of two claims with the same digest have the same runs, whatever their names are.
    """
    needs = claim.begins_from(arm) if arm != BEFORE else set()
    alone = replace(claim, arms={name: of for name, of in claim.arms.items() if name in {arm, *needs}})
    return sha([claim.digests[arm], claim.options(arm, budget), code(alone)])


def find_imports(modules: Iterable[str]) -> set[str]:
    """Return these modules and all modules of this package that they import, at any depth.

    >>> sorted(find_imports(["descant.claims.effect"]))
    ['descant.claims.effect', 'descant.claims.power', 'descant.report.statistics']
    """
    known, todo = set[str](), list(modules)
    while todo:
        module = todo.pop()
        if module not in known:
            known.add(module)
            todo += _imports(module)
    return known


def _list_texts(claim: Claim, arm: Arm) -> list[str]:
    """List all texts in the composed configuration of an arm's runs."""
    files = layers(map(find, (claim.experiment, *arm.configs)))
    return texts([[_content(file) for file in files], dict(arm.options), dict(arm.predict or {})])


@cache
def _imports(module: str) -> frozenset[str]:
    file = _file(module)
    names = set[str]()
    for node in ast.walk(_parse_file(file)) if file is not None else ():
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
def _parse_file(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


@cache
def _digest(file: Path) -> str:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    return hashlib.sha256(ast.unparse(tree).encode()).hexdigest()[:12]


def now() -> str:
    """Return the current time as it is stored: UTC, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _git(folder: Path, *words: str) -> str | None:
    """Return the output of git, or None outside a checkout or without git."""
    command = ["git", "-C", str(folder.resolve()), *words]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
