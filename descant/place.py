"""Where a command works: which run folder it writes to and which checkpoint it starts from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from descant import runs
from descant.errors import Refusal, fail, say
from descant.runs import Run


def for_fit(root: Path, name: str, run: str | None, resume: str) -> Run:
    """A new folder, or with ``resume="auto"`` the one to go on in.

    Raises:
        Refusal: if the named run or checkpoint does not exist, or a run is there and nothing says resume.
    """
    if resume not in ("never", "auto"):
        checkpoint = Path(resume)
        if not checkpoint.exists():
            fail(f"--resume {resume}: no such checkpoint; never, auto or a path")
        return runs.allocate(root / name, checkpoint=str(checkpoint.resolve()))
    folder = runs.existing(root, run) if run else runs.latest(root, name)
    if resume == "never":
        if run:
            fail(f"--run {run}: a run is there; --resume auto continues it, and without --run a new one starts")
        return runs.allocate(root / name)
    newest = runs.newest_checkpoint(folder) if folder else None
    if folder is not None and newest is not None:
        say(f"resuming {_shown(folder)} from {newest.name}")
        return Run(folder, fresh=False, checkpoint=str(newest))
    if run:
        fail(f"--run {run}: it has no checkpoint to resume from")
    new = runs.allocate(root / name)
    say(f"--resume auto: {name} has no checkpoint yet; starting {_shown(new.folder)}")
    return new


def for_evaluation(command: str, root: Path, name: str, source: Path | None, wanted: str | None) -> Run:
    """A folder ``validate-001`` inside the evaluated run, and its checkpoint ``best``, ``last`` or a path.

    Raises:
        Refusal: if the checkpoint does not exist, or is said relative to a run and none is given.
    """
    if source is None and wanted is not None and Path(wanted).resolve().parent.name == "checkpoints":
        source = Path(wanted).resolve().parent.parent
    checkpoint = _checkpoint(source, wanted)
    if checkpoint is None:
        say(f"no --ckpt_path: {command} sees untrained weights")
    elif wanted is None:
        say(f"{command} uses the best checkpoint of {_shown(source or checkpoint)}: {checkpoint.name}")
    parent = source if source is not None else root / name
    return runs.allocate(parent, f"{command}-", str(checkpoint) if checkpoint else None)


def source_of(root: Path, run: str | None, configs: Sequence[Path]) -> Path | None:
    """The run that is evaluated: named by --run, or the folder whose own config.yaml was given."""
    if run:
        return runs.existing(root, run)
    own = [file.parent for file in configs if file.name == "config.yaml" and (file.parent / "versions.json").is_file()]
    return own[0] if own else None


def _checkpoint(source: Path | None, wanted: str | None) -> Path | None:
    if wanted not in (None, "best", "last"):
        path = Path(str(wanted))
        if not path.exists():
            fail(f"--ckpt_path {wanted}: no such checkpoint; best, last or a path")
        return path.resolve()
    if source is None:
        if wanted is not None:
            fail(f"--ckpt_path {wanted}: of which run? --run NAME/001, or --config of a run folder")
        return None
    newest = runs.newest_checkpoint(source)
    if newest is None:
        raise Refusal(f"{_shown(source)} has no checkpoints")
    if wanted == "last":
        return newest
    best = _best(newest)
    return best if best is not None else newest


def _best(newest: Path) -> Path | None:
    """What the run's ModelCheckpoint judged best, as its newest checkpoint tells; runs may have moved."""
    import torch

    content: dict[str, Any] = torch.load(newest, map_location="cpu", weights_only=True, mmap=True)
    states = [s for key, s in content.get("callbacks", {}).items() if key.startswith("ModelCheckpoint")]
    states.sort(key=lambda state: state.get("monitor") is None)  # stable: one that monitors comes first
    for state in states:
        best = newest.parent / Path(state.get("best_model_path") or "").name
        if best.suffix == ".ckpt" and best.exists():
            return best
    return None


def _shown(path: Path) -> str:
    """Relative to the working folder where that is shorter."""
    try:
        return path.relative_to(Path.cwd()).as_posix()
    except ValueError:
        return str(path)
