"""Provenance of a run: git revision, package versions, machine."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from descant.run.runs import identity

PACKAGES = (
    *("descant", "torch", "lightning", "jsonargparse", "torchmetrics", "timm", "transformers", "tokenizers"),
    *("peft", "bitsandbytes", "numpy", "pyarrow"),
)


def versions() -> dict[str, object]:
    """Return git revision and state of the checkout, package versions, Python, machine, threads."""
    import torch

    here = code()
    return {
        "revision": here["revision"],
        "dirty": here["dirty"],
        "packages": {name: _version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "cpus": os.cpu_count(),
        "gpus": [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())],
        "job": identity(),
        "command": sys.argv[1:],
    }


def code() -> dict[str, object]:
    """Return Descant's own version, git revision and state: ``descant``, ``revision``, ``dirty``."""
    revision, dirty = _git()
    return {"descant": _version("descant"), "revision": revision, "dirty": dirty}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git() -> tuple[str | None, bool | None]:
    """Return the revision of the checkout and whether it has changes; None, None for an installed package."""
    folder = Path(__file__).resolve().parents[1]
    if not (folder.parent / ".git").exists():
        return None, None
    try:
        changes = _ask(folder, "status", "--porcelain", "--untracked-files=no")
        return _ask(folder, "rev-parse", "HEAD"), bool(changes)
    except (OSError, subprocess.SubprocessError):
        return None, None


def _ask(folder: Path, *words: str) -> str:
    command = ["git", "-C", str(folder), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
