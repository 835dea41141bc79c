"""``make wheels``: packages that tests and benchmarks need, as wheels for another Python on a machine without network.

The releases are those installed here, so that both machines run the same. torch, torchvision, Triton and CUDA's
packages are excluded: they belong to the machine that the wheels are for. Packages that it has in a suitable release
(``--have``, as ``pip list --format=freeze`` prints them there) are left out.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

#: Requested packages: this package's requirements, the owners it is measured against, and what tests run with.
ASKED = ("descant[bench]", "pytest", "pytest-xdist", "mpmath")
#: Packages that belong to the other machine.
THERE = ("torch", "torchvision", "triton")
THERE_BEGIN = ("nvidia-", "cuda-")
#: C library versions that a wheel may require, the newest first: pip matches each literally.
PLATFORMS = tuple(f"manylinux_2_{n}_{{machine}}" for n in (35, 34, 31, 28, 27, 24, 17, 12, 5))
PLATFORMS += ("manylinux2014_{machine}", "manylinux2010_{machine}", "manylinux1_{machine}")


def list_requirements(asked: Iterable[str], environment: Mapping[str, str], have: Mapping[str, str]) -> list[str]:
    """List all packages that ``asked`` requires, by the metadata installed here, and that are not there already.

    ``have``: name -> release, empty if it is not known; the requirements of a suitable package are assumed to be there
    too.

    >>> found = list_requirements(["lightly"], {"python_version": "3.12"}, {"tqdm": "4.67.1"})
    >>> [name in found for name in ("lightly", "hydra-core", "torch", "tqdm")]
    [True, True, False, False]
    >>> list_requirements(["numpy>=2"], {}, {"numpy": "1.26.4"})
    ['numpy']
    """
    found: set[str] = set()
    done: set[tuple[str, str]] = set()
    waiting = [Requirement(word) for word in asked]
    while waiting:
        want = waiting.pop()
        name = canonicalize_name(want.name)
        if name in THERE or name.startswith(THERE_BEGIN):
            continue
        if name in have and (not have[name] or want.specifier.contains(have[name], prereleases=True)):
            continue
        found.add(name)
        for extra in ({""} | want.extras) - {extra for of, extra in done if of == name}:
            done.add((name, extra))
            inner = (Requirement(line) for line in metadata.requires(name) or ())
            waiting += [r for r in inner if r.marker is None or r.marker.evaluate({**environment, "extra": extra})]
    return sorted(found)


def parse_releases(lines: Iterable[str]) -> dict[str, str]:
    """Return name -> release from lines as pip prints them; a bare name means any release.

    >>> parse_releases(["PyYAML==6.0.2", "torch_geometric", "# a remark"])
    {'pyyaml': '6.0.2', 'torch-geometric': ''}
    """
    told = (line.split("#")[0].partition("==") for line in lines)
    return {str(canonicalize_name(name.strip())): release.strip() for name, _, release in told if name.strip()}


def fetch(name: str, release: str, python: str, machine: str, into: Path) -> bool:
    """Download one wheel; if a package has none, build one here, which must be pure Python."""
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    platforms = [word for of in PLATFORMS for word in ("--platform", of.format(machine=machine))]
    target = ["--python-version", python, "--implementation", "cp", *platforms]
    what = [f"{name}=={release}", "--no-deps"]
    command = [*pip, "download", *what, "--only-binary=:all:", *target, "--dest", str(into)]
    if subprocess.run(command, stderr=subprocess.DEVNULL).returncode == 0:
        return True
    made = subprocess.run([*pip, "wheel", *what, "--wheel-dir", str(into)]).returncode == 0
    other = [wheel for wheel in into.glob(f"{name.replace('-', '_')}-*.whl") if not wheel.name.endswith("-any.whl")]
    for wheel in other:  # built for this Python, not for the other one
        wheel.unlink()
    return made and not other


def main(args: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.wheels", description=__doc__)
    parser.add_argument("--python", default="3.12", metavar="3.N", help="of the other machine (3.12)")
    parser.add_argument("--machine", default="x86_64", help="its processor, as `uname -m` says it (x86_64)")
    parser.add_argument("--have", type=Path, metavar="FILE", help="what is installed there")
    parser.add_argument("--without", nargs="*", default=[], metavar="NAME", help="packages to leave out")
    parser.add_argument("--into", type=Path, default=Path("build/wheels"), metavar="FOLDER")
    options = parser.parse_args(args)
    environment = {"python_version": options.python, "python_full_version": f"{options.python}.0"}
    environment |= {"platform_machine": options.machine, "sys_platform": "linux", "platform_system": "Linux"}
    have = options.have.read_text(encoding="utf-8").splitlines() if options.have else []
    names = [
        name
        for name in list_requirements(ASKED, environment, parse_releases([*have, *options.without]))
        if name != "descant"
    ]
    options.into.mkdir(parents=True, exist_ok=True)
    failed = [n for n in names if not fetch(n, metadata.version(n), options.python, options.machine, options.into)]
    size = sum(wheel.stat().st_size for wheel in options.into.glob("*.whl"))
    print(f"{options.into}: {len(names) - len(failed)} packages, {size / 1e6:.0f} MB in all")
    if failed:
        print(f"benchmarks.wheels: no wheel of {', '.join(failed)} for Python {options.python}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
