"""Which checkpoints a run has, in the order of their steps, and which of them was judged best.

Times of files are not looked at: a copy, a touch or a restored backup changes them. Nothing here imports torch before
it has to.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from descant.modules.io import manifest

#: Folders of a run that hold checkpoints: those to be judged, and those to go on from.
PLACES = ("checkpoints", "resume")
#: And those of which one is taken by its name only: what each stage left.
NAMED = ("stages",)
#: Beside the runs of a name: the file that names the newest of them.
LATEST = "latest"
_NUMBER = re.compile(r"\d{3,}")


def followed(path: Path) -> Path:
    """``path`` with ``NAME/latest`` replaced by the run that it names; any other path as it is.

    A text file and no link: TensorBoard follows links, and showed the newest run of every name twice. The links that
    earlier versions made are followed by the file system.

    >>> followed(Path("runs/demo/001/checkpoints"))
    PosixPath('runs/demo/001/checkpoints')
    """
    for above in (path, *path.parents):
        try:
            if above.name == LATEST and above.is_file():
                with above.open("rb") as stream:
                    name = stream.read(33).decode(errors="replace").strip()
                if _NUMBER.fullmatch(name) and len(name) <= 32:
                    return above.parent / name / path.relative_to(above)
        except OSError:  # longer than a name may be, or nobody may read it
            return path
    return path


#: When resume points are due where nothing else is said: optimizer steps between two, and minutes.
EVERY, MINUTES = 500, 5.0


def due(every: int = EVERY, minutes: float | None = MINUTES) -> str:
    """When the next resume point comes, in words.

    >>> due(), due(20, None)
    ('due after 500 steps or 5 minutes', 'due after 20 steps')
    """
    return f"due after {every} steps" + ("" if minutes is None else f" or {minutes:g} minutes")


def of_run(folder: Path) -> list[Path]:
    """What a run can be evaluated from, resume points included: unknown steps first, then the last."""
    found = [path for part in PLACES for path in folder.glob(f"{part}/*.ckpt")]

    def order(path: Path) -> tuple[bool, int, bool, str]:
        step = step_of(path)
        return step is None, step or 0, path.parent.name == "checkpoints", path.name

    return sorted((path for path in found if not path.name.startswith(".")), key=order, reverse=True)


def step_of(path: Path) -> int | None:
    """As its manifest tells; of a file without one as it says itself. None where neither does."""
    why = manifest.fault_of_size(path)
    if why != manifest.NONE:
        step = manifest.known(path).get("step")
    else:
        from descant.modules.io.plain import load_plain

        try:
            content = load_plain(path, map_location="cpu", mmap=True)
        except (ValueError, OSError):
            return None
        step = content.get("global_step") if isinstance(content, Mapping) else None
    return step if isinstance(step, int) else None


def judged(content: Mapping[str, Any]) -> Iterator[tuple[str, bool]]:
    """The names of the files that each ModelCheckpoint of a checkpoint holds best, and whether it monitors anything."""
    callbacks = content.get("callbacks")
    for state in callbacks.values() if isinstance(callbacks, Mapping) else ():
        if isinstance(state, Mapping) and "best_model_path" in state:
            name = Path(str(state.get("best_model_path") or "")).name  # runs may have moved
            if name.endswith(".ckpt"):
                yield name, state.get("monitor") is not None


def nearest(path: Path) -> str:
    """``; nearest: PATH``, the newest whole one of the same run beside ``path``; nothing if there is none."""
    others = (other for other in of_run(path.absolute().parent.parent) if other.resolve() != path.resolve())
    found, _ = manifest.first(others)
    if found is None:
        return ""
    try:
        return f"; nearest: {found.relative_to(Path.cwd())}"
    except ValueError:
        return f"; nearest: {found}"
