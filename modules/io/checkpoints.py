"""Checkpoints of a run in the order of their steps, and which of them is the best.

File times are ignored: a copy, a touch or a restored backup changes them. torch is imported only when needed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from descant.modules.io import manifest

#: Folders of a run with checkpoints for evaluation, and with resume points.
PLACES = ("checkpoints", "resume")
#: Folders whose checkpoints are used by name only: the weights at the end of each stage.
NAMED = ("stages",)
#: File beside the runs of one name that holds the newest run's number.
LATEST = "latest"
_NUMBER = re.compile(r"\d{3,}")


def follow_latest(path: Path) -> Path:
    """Replace ``NAME/latest`` in a path by the run that it names; return any other path unchanged.

    ``latest`` is a text file: TensorBoard follows links and would show the newest run twice.

    >>> follow_latest(Path("runs/demo/001/checkpoints"))
    PosixPath('runs/demo/001/checkpoints')
    """
    for above in (path, *path.parents):
        try:
            if above.name == LATEST and above.is_file():
                with above.open("rb") as stream:
                    name = stream.read(33).decode(errors="replace").strip()
                if _NUMBER.fullmatch(name) and len(name) <= 32:
                    return above.parent / name / path.relative_to(above)
        except OSError:  # the name is too long, or not readable
            return path
    return path


#: Defaults of Resume: optimizer steps, and minutes, between two resume points.
EVERY, MINUTES = 500, 5.0


def due(every: int = EVERY, minutes: float | None = MINUTES) -> str:
    """Describe in words when the next resume point is due.

    >>> due(), due(20, None)
    ('due after 500 steps or 5 minutes', 'due after 20 steps')
    """
    return f"due after {every} steps" + ("" if minutes is None else f" or {minutes:g} minutes")


def of_run(folder: Path) -> list[Path]:
    """List the checkpoints and resume points of a run, newest first, after those of unknown step."""
    files = [path for part in PLACES for path in folder.glob(f"{part}/*.ckpt")]

    def order(path: Path) -> tuple[bool, int, bool, str]:
        step = step_of(path)
        return step is None, step or 0, path.parent.name == "checkpoints", path.name

    return sorted((path for path in files if not path.name.startswith(".")), key=order, reverse=True)


def step_of(path: Path) -> int | None:
    """Return a checkpoint's step from its manifest, or without one from its content; None if neither has it."""
    why = manifest.fault_of_size(path)
    if why != manifest.NONE:
        step = manifest.last_facts(path).get("step")
    else:
        from descant.modules.io.plain import load_values

        try:
            content = load_values(path)
        except (ValueError, OSError):
            return None
        step = content.get("global_step") if isinstance(content, Mapping) else None
    return step if isinstance(step, int) else None


def best_checkpoints(content: Mapping[str, Any]) -> Iterator[tuple[str, bool]]:
    """Yield the file name of each ModelCheckpoint's best checkpoint, and whether it has a monitor."""
    callbacks = content.get("callbacks")
    for state in callbacks.values() if isinstance(callbacks, Mapping) else ():
        if isinstance(state, Mapping) and "best_model_path" in state:
            name = Path(str(state.get("best_model_path") or "")).name  # runs may have moved
            if name.endswith(".ckpt"):
                yield name, state.get("monitor") is not None


def nearest(path: Path) -> str:
    """Return ``; nearest: PATH``, the newest valid checkpoint of the same run; empty if there is none."""
    others = (other for other in of_run(path.absolute().parent.parent) if other.resolve() != path.resolve())
    newest, _ = manifest.first(others)
    if newest is None:
        return ""
    try:
        return f"; nearest: {newest.relative_to(Path.cwd())}"
    except ValueError:
        return f"; nearest: {newest}"
