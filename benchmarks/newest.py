"""``make newest``: run the comparisons with other packages on their newest releases (or the lowest allowed ones).

Bounds are read from pyproject.toml: the dependencies, and the extra ``owners`` with all packages that tests compare
with. The releases are installed for the interpreter that runs this (``make`` gives it its own environment over that of
the checks). A table lists the installed, newest and tried release and the bound. Then every test file that imports such
a package runs; on the lowest releases, all quick tests run. torch and torchvision stay as they are: their builds belong
to the machine.
"""

from __future__ import annotations

import argparse
import ast
import json
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from benchmarks.wheels import parse_releases

#: The extra with all packages that tests compare with, and the dependencies that they compare with too.
EXTRA = "owners"
COMPARED = ("bitsandbytes", "gguf", "peft", "timm", "tokenizers", "torchmetrics", "transformers", "webdataset")
#: Packages whose builds belong to the machine, and are kept.
HELD = ("torch", "torchvision")
#: Tests that need processes of their own, as in ``make test``.
DEVICE = "tests/device"
#: Package -> name of its module, if it differs.
MODULES = {"open-clip-torch": "open_clip", "scikit-image": "skimage"}


def requirements(project: Mapping[str, Any], extras: Iterable[str] = ()) -> dict[str, Requirement]:
    """Return name -> requirement of a project's dependencies and extras, and of the extras that these name in turn.

    Args:
        project: the table ``project`` of a pyproject.toml. extras: of its ``optional-dependencies``.

    Raises:
        ValueError: for an extra that does not exist.

    >>> extras = {"all": ["Own[few]", "trl<2"], "few": ["onnx>=1.2"]}
    >>> found = requirements({"name": "own", "dependencies": ["trl>=1"], "optional-dependencies": extras}, ["all"])
    >>> {name: str(one.specifier) for name, one in found.items()}
    {'trl': '<2,>=1', 'onnx': '>=1.2'}
    """
    known = project.get("optional-dependencies", {})
    found: dict[str, Requirement] = {}
    waiting, done = list(project.get("dependencies", ())), list[str]()
    wanted = list(extras)
    while waiting or wanted:
        if not waiting:
            extra = wanted.pop(0)
            if extra not in known:
                raise ValueError(f"pyproject.toml: no extra {extra!r}; there are {', '.join(known)}")
            waiting, done = list(known[extra]), [*done, extra]
            continue
        one = Requirement(waiting.pop(0))
        name = str(canonicalize_name(one.name))
        if name == canonicalize_name(project["name"]):
            wanted += sorted(one.extras - set(done) - set(wanted))
        elif name in found:
            found[name].specifier &= one.specifier
            found[name].extras |= one.extras
        else:
            found[name] = one
    return found


def compares(file: Path, modules: Iterable[str]) -> bool:
    """Whether a Python file imports one of these modules, also by ``pytest.importorskip``."""
    roots = set(modules)
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module or ""]
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", None) == "importorskip" and node.args:
            names = [str(getattr(node.args[0], "value", ""))]
        if any(name.partition(".")[0] in roots for name in names):
            return True
    return False


def comparisons(tests: Path, found: Mapping[str, Requirement], dependencies: Iterable[str]) -> list[Path]:
    """List the test files that import, or are named after, a package that is no dependency or one of ``COMPARED``."""
    names = {*COMPARED} & set(found) | set(found) - set(dependencies)
    modules = {MODULES.get(name, name.replace("-", "_")) for name in names}
    files = sorted(tests.rglob("test_*.py"))
    return [file for file in files if file.stem.removeprefix("test_") in modules or compares(file, modules)]


def table(
    found: Mapping[str, Requirement], here: Mapping[str, str], newest: Mapping[str, str], tried: Mapping[str, str]
) -> str:
    """Return a Markdown table with a row per package, ``here`` before and ``tried`` now; it marks what a bound forbids.

    >>> print(table({"trl": Requirement("trl>=1,<2")}, {"trl": "1.3"}, {"trl": "2.0"}, {}))
    | package | installed | newest | tried | bound |
    |---|---|---|---|---|
    | trl | 1.3 | 2.0, above the bound | - | >=1,<2 |
    """
    rows = ["| package | installed | newest | tried | bound |", "|---|---|---|---|---|"]
    for name, one in sorted(found.items()):
        ends = ",".join(sorted((str(end) for end in one.specifier), reverse=True))
        new = newest.get(name, "-")
        inside = new == "-" or one.specifier.contains(new, prereleases=True)
        new = new if inside else f"{new}, above the bound"
        rows.append(f"| {name} | {here.get(name, '-')} | {new} | {tried.get(name, '-')} | {ends or 'any'} |")
    return "\n".join(rows)


def _pip(*words: str) -> list[str]:
    return [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *words]


def installed_releases() -> dict[str, str]:
    """Return name -> release of all packages that this interpreter sees; of two with a name, the imported one."""
    found: dict[str, str] = {}
    for one in metadata.distributions():
        found.setdefault(str(canonicalize_name(one.metadata["Name"])), one.version)
    return found


def available(names: Iterable[str]) -> dict[str, str]:
    """Return name -> the newest release that this interpreter could install, each by itself."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        options = ("--dry-run", "--no-deps", "--ignore-installed", "--report", str(report))
        subprocess.run(_pip("install", *options, *names), check=True)
        items = json.loads(report.read_text(encoding="utf-8"))["install"]
    return {str(canonicalize_name(item["metadata"]["name"])): str(item["metadata"]["version"]) for item in items}


def lowest(found: Mapping[str, Requirement], here: Mapping[str, str]) -> dict[str, str]:
    """Return name -> the lowest release that its bound and the other bounds allow, as uv resolves them in seconds.

    The lower ends themselves conflict (those of datasets, pyarrow, rich and tokenizers are too low for others), and
    with them pip tries one release after another for minutes.
    """
    with tempfile.TemporaryDirectory() as folder:
        bounds, held, lock = (Path(folder) / name for name in ("bounds.txt", "held.txt", "lock.txt"))
        bounds.write_text("".join(f"{one}\n" for name, one in found.items() if name not in HELD), encoding="utf-8")
        kept = {name: Version(here[name]).public for name in HELD if name in here}  # the index lacks local builds
        held.write_text("".join(f"{name}=={release}\n" for name, release in kept.items()), encoding="utf-8")
        how = ("--resolution", "lowest-direct", "--python", sys.executable, "--no-annotate", "--no-header")
        files = ("--constraint", str(held), "--output-file", str(lock), str(bounds))
        subprocess.run([sys.executable, "-m", "uv", "--quiet", "pip", "compile", *how, *files], check=True)
        lines = [line.partition("==") for line in lock.read_text(encoding="utf-8").splitlines()]
    releases = {str(canonicalize_name(name.partition("[")[0])): release for name, _, release in lines}
    return {name: releases[name] for name in found if name not in HELD}


def install(found: Mapping[str, Requirement], low: bool) -> None:
    """Install the newest releases, or the lowest allowed ones, as far as they are compatible."""
    here = installed_releases()
    least = lowest(found, here) if low else {}
    wanted = []
    for name, one in found.items():
        extras = f"[{','.join(sorted(one.extras))}]" if one.extras else ""
        if name not in HELD:
            wanted.append(f"{name}{extras}" + (f"=={least[name]}" if low else ""))
    with tempfile.TemporaryDirectory() as folder:
        held = Path(folder) / "held.txt"
        held.write_text("".join(f"{name}=={here[name]}\n" for name in HELD if name in here), encoding="utf-8")
        subprocess.run(_pip("install", "--upgrade", "--constraint", str(held), *wanted), check=True)


def main(args: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.newest", description=__doc__, allow_abbrev=False)
    parser.add_argument("--have", type=Path, help="what was installed before, as pip list --format=freeze printed it")
    least = "the lowest releases that the bounds allow together, instead; uv resolves them"
    parser.add_argument("--lowest", action="store_true", help=least)
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="these packages alone are changed")
    parser.add_argument("--table", action="store_true", help="the table alone: nothing is installed, no test is run")
    parser.add_argument("pytest", nargs="*", help="behind --: options of pytest")
    asked = parser.parse_args(args)
    root = Path(__file__).resolve().parent.parent
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found = requirements(project, [EXTRA])
    if unknown := set(asked.only) - set(found):
        parser.error(f"--only {min(unknown)}: not in pyproject.toml; there are {', '.join(sorted(found))}")
    here = (
        installed_releases()
        if asked.have is None
        else parse_releases(asked.have.read_text(encoding="utf-8").splitlines())
    )
    new = available(found)
    if asked.table:
        print(table(found, here, new, {}))
        return 0
    install({name: one for name, one in found.items() if not asked.only or name in asked.only}, asked.lowest)
    print(table(found, here, new, installed_releases()), flush=True)
    files = comparisons(root / "tests", found, requirements({**project, "optional-dependencies": {}}))
    runs = [[str(file.relative_to(root)) for file in files]]
    if asked.lowest:  # a release that is too old may fail anywhere, not only in comparisons
        runs = [["--doctest-modules", "--ignore", DEVICE, "tests", "descant"], [DEVICE]]
        runs = [["-m", "not slow and not gpu", *words] for words in runs]
    codes = [
        subprocess.run([sys.executable, "-m", "pytest", *asked.pytest, *words], cwd=root).returncode for words in runs
    ]
    return max(codes)


if __name__ == "__main__":
    sys.exit(main())
