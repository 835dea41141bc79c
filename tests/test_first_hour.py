"""What a stranger meets first: the citation, the image, and pages that choose; each agrees with the files it names."""

from __future__ import annotations

import fnmatch
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import yaml

import descant

ROOT = Path(__file__).parent.parent
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
#: Instructions of the Dockerfile, as (name, rest), continued lines joined.
DOCKER: list[tuple[str, str]] = [
    (line.split(maxsplit=1)[0], line.split(maxsplit=1)[1])
    for line in re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    .replace("\\\n", "")
    .splitlines()
    if line.strip()
]


def test_the_citation_is_of_this_version_and_licence() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["version"] == PROJECT["project"]["version"] == descant.__version__
    assert cited["license"] == PROJECT["project"]["license"]
    assert {"cff-version", "message", "title", "authors"} <= set(cited) and cited["authors"]
    assert PROJECT["project"]["description"].casefold() in cited["title"].casefold()


def sent(path: str) -> bool:
    """Whether .dockerignore lets a path through: the last pattern that matches it, or a folder above it, decides."""
    through = True
    for pattern in (ROOT / ".dockerignore").read_text().splitlines():
        bare = pattern.removeprefix("!").removeprefix("**/")
        parts = Path(path).parts
        above = parts if "**/" in pattern else ["/".join(parts[:n]) for n in range(1, len(parts) + 1)]
        if pattern and not pattern.startswith("#") and any(fnmatch.fnmatchcase(part, bare) for part in above):
            through = pattern.startswith("!")
    return through


def copied() -> set[str]:
    """Files and folders of the clone that the image is made of."""
    words = [shlex.split(rest) for name, rest in DOCKER if name == "COPY"]
    return {source for each in words if not each[0].startswith("--") for source in each[:-1]}


def test_the_image_copies_what_the_wheel_is_built_of() -> None:
    sources = copied()
    assert sources == {
        *("pyproject.toml", "LICENSE", "README.md", "descant", "callbacks", "datamodules", "experiments"),
        *("modules", "recipes"),
    }
    for source in sources:
        assert (ROOT / source).exists() and sent(source), source
    links = [link for link in (ROOT / "descant").iterdir() if link.is_symlink()]
    assert len(links) == 5 and {link.resolve().name for link in links} <= sources
    wanted = [PROJECT["project"]["readme"], *PROJECT["project"]["license-files"]]
    assert all((ROOT / file).is_file() and file.split("/")[0] in sources and sent(file) for file in wanted)
    assert sent("modules/core/batch.py") and sent("datamodules/packs/emoji/pack.json")
    for left in ("tests/conftest.py", "runs/demo/001", ".git/HEAD", "modules/core/__pycache__/batch.pyc", "shared/a"):
        assert not sent(left), left


def test_the_image_installs_every_dependency_before_the_source() -> None:
    order = [f"{name} {rest}" for name, rest in DOCKER]
    install = next(n for n, line in enumerate(order) if "requirements.txt" in line)
    assert order.index("COPY pyproject.toml /src/") < install < order.index("COPY descant /src/descant")
    (script,) = [re.search(r"python -c ('[^']*')", line) for line in order if "tomllib" in line]
    assert script is not None
    (code,) = shlex.split(script[1])
    code = code.replace("/src/pyproject.toml", str(ROOT / "pyproject.toml"))
    extras = PROJECT["project"]["optional-dependencies"]
    for given, more in (("", []), ("exchange,datasets", [*extras["exchange"], *extras["datasets"]])):
        done = subprocess.run([sys.executable, "-c", code, given], capture_output=True, text=True, check=True)
        wanted = [*PROJECT["build-system"]["requires"], *PROJECT["project"]["dependencies"], *more]
        assert done.stdout.splitlines() == wanted


def test_the_image_runs_descant_as_a_user_with_places_of_its_own() -> None:
    last = max(n for n, (name, _) in enumerate(DOCKER) if name == "FROM")
    final = DOCKER[last:]
    by_name = dict(final)
    assert by_name["USER"] == "${USER_ID}" and dict(DOCKER)["ARG"] == "USER_ID=10001"
    assert by_name["ENTRYPOINT"] == '["descant"]' and "descant" in PROJECT["project"]["scripts"]
    assert by_name["HEALTHCHECK"] == "NONE"
    (made,) = [rest for name, rest in final if name == "RUN" and "mkdir" in rest]
    for place in yaml.safe_load(by_name["VOLUME"]):
        assert place in made
    assert DOCKER[0] == ("ARG", "BASE=python:3.11-slim") and DOCKER[1] == ("FROM", "${BASE} AS base")
