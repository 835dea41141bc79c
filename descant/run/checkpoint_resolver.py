"""Choose the run folder that a command writes to, and the checkpoint it starts from (--run, --resume, --ckpt_path)."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from descant.cli.document import load, path_to_show
from descant.cli.errors import Refusal, fail, say
from descant.modules.io import manifest
from descant.modules.io.checkpoints import best_checkpoints, due, follow_latest, of_run
from descant.modules.io.files import real_path
from descant.report.curves import scalars
from descant.run import elastic, lock, runs
from descant.run.runs import Run
from descant.run.versions import code


def for_fit(root: Path, name: str, run: str | None, resume: str, trust: Sequence[str] = ()) -> Run:
    """Open a new run folder or, with ``resume="auto"``, the existing one at its newest valid resume point."""
    runs.require_below(root, root / name, trust)
    if resume not in ("never", "auto"):
        start = _point(root, resume).resolve()
        _compare_versions(start.parent.parent)
        return _lock_run(runs.allocate(root / name, checkpoint=str(start)))
    before = elastic.find_run_before_restart(root / name)
    folder = runs.existing(root, run, trust) if run else before or runs.latest(root, name)
    if resume == "never":
        if run:
            fail(f"--run {run}: the run exists: --resume auto continues it, and without --run a new one starts")
        return _lock_run(runs.allocate(root / name))
    if folder is not None:
        runs.require_below(root, folder, trust)
        require_contained(folder, trust)
    if folder is not None and runs.rank() == 0 and os.access(folder, os.W_OK):
        lock.take(folder)  # before reading it, because another writer would add to it
    newest, skipped = runs.newest_point(folder) if folder else (None, [])
    if folder is not None and newest is not None:
        if not os.access(folder, os.W_OK):
            fail(f"{path_to_show(folder)}: the run cannot be continued: no permission to write")
        _report(skipped)
        for part in ("checkpoints", "resume", "stages"):
            manifest.sweep(folder / part)
        say(f"resuming {path_to_show(folder)} from {newest.name}")
        _compare_versions(folder)
        return Run(folder, fresh=False, checkpoint=str(newest))
    if run:
        fail(f"--run {run}: it has no {_none(skipped)}")
    _report(skipped)
    # a restart by a cluster or torchrun keeps its folder, even if the run ended before its first save
    again = before is not None or runs.identity() is not None
    if folder is not None and not again:
        lock.release(folder)
    new = Run(folder, fresh=False) if folder is not None and again else _lock_run(runs.allocate(root / name))
    what = "valid resume point" if skipped else "resume point yet"
    say(f"--resume auto: {name} has no {what}; starting {path_to_show(new.folder)}")
    if folder is not None and not skipped and (lost := _lost_text(folder)) is not None:
        say(lost)
    return new


def _lost_text(folder: Path) -> str | None:
    """Describe the loss of a run that ended before its first resume point, and when that was due; None if unknown."""
    try:
        trainer = load(folder / "config.yaml").plain.get("trainer")
        callbacks = trainer.get("callbacks") if isinstance(trainer, dict) else None
        trained = [step for curve in scalars(folder).values() for step in curve]
    except (Refusal, OSError, ValueError, csv.Error):  # not readable, or barely started
        return None
    steps = f"at least {max(trained) + 1} steps" if trained else "no step was logged"
    listed = {str(one.get("class_path")).rpartition(".")[2]: one for one in callbacks or [] if isinstance(one, dict)}
    if "Resume" not in listed:
        return f"{path_to_show(folder)} saves no resume points (no callback Resume): its training is lost ({steps})"
    given = listed["Resume"].get("init_args")
    types = {"every": int, "minutes": float | int | None}
    options = {key: given[key] for key in types if isinstance(given, dict) and key in given}
    if not all(isinstance(value, types[key]) for key, value in options.items()):
        return None
    when = due(**options)
    return f"{path_to_show(folder)} ended before its first resume point ({when}): its training is lost ({steps})"


def require_contained(folder: Path, trust: Sequence[str] = ()) -> None:
    """Refuse links out of a run's folder, through which a resumed run would write elsewhere."""
    if "writes" in trust:
        return
    root = folder.resolve()
    for place, folders, files in os.walk(root):
        for name in (*folders, *files):
            path = Path(place, name)
            if path.is_symlink() and not real_path(path).is_relative_to(root):
                fail(f"{path_to_show(path)}: a link out of the run's folder; --trust writes lets a run write there")


def _lock_run(run: Run) -> Run:
    if runs.rank() == 0:
        lock.take(run.folder)
    return run


def _point(root: Path, resume: str) -> Path:
    """Find the resume point of ``--resume PATH``: a file, or the newest valid one of a run."""
    for folder in (follow_latest(root / resume), follow_latest(Path(resume))):
        if runs.is_run(folder):
            newest, skipped = runs.newest_point(folder)
            if newest is None:
                fail(f"--resume {resume}: it has no {_none(skipped)}")
            _report(skipped)
            say(f"starting from {path_to_show(newest)}")
            return newest
    path = follow_latest(Path(resume))
    if not path.exists():
        fail(f"--resume {resume}: no such checkpoint; never, auto or a path of a resume point or run")
    entry = manifest.account(path)
    if isinstance(entry, str):
        fail(f"--resume {resume}: {entry}{_nearest(path)}")
    if entry["facts"].get("safe") is not True:
        fail(f"--resume {resume}: saved within a step or epoch, not a resume point{_nearest(path)}")
    return path


def for_evaluation(
    command: str,
    root: Path,
    name: str,
    source: Path | None,
    wanted: str | None,
    trust: Sequence[str] = (),
    report: Callable[[str], None] = say,
) -> Run:
    """Create a folder ``validate-001`` inside the evaluated run; find its checkpoint ``best``, ``last`` or a path.

    ``report`` gets one line about the weights that the command uses.
    """
    wanted = str(follow_latest(Path(wanted))) if wanted not in (None, "best", "last") else wanted
    if source is None and wanted is not None and Path(wanted).resolve().parent.name in ("checkpoints", "resume"):
        source = Path(wanted).resolve().parent.parent
    checkpoint = _checkpoint(source, wanted)
    if source is not None:
        from descant.modules.io.saved import edit_warning

        if (line := edit_warning(source)) is not None:
            report(f"warning: {line}")
    if checkpoint is None:
        report(f"no --ckpt_path: {command} uses untrained weights")
    elif wanted is None:
        report(f"{command} uses the best checkpoint of {path_to_show(source or checkpoint)}: {checkpoint.name}")
    parent = source if source is not None else root / name
    runs.require_below(root, parent, trust)
    return runs.allocate(parent, f"{command}-", str(checkpoint) if checkpoint else None)


def source_of(root: Path, run: str | None, configs: Sequence[Path], trust: Sequence[str] = ()) -> Path | None:
    """Find the run to evaluate: that of --run, or the folder of a run's own config.yaml."""
    if run:
        return runs.existing(root, run, trust)
    of_runs = (f.parent for f in configs if f.name == "config.yaml" and (f.parent / "versions.json").is_file())
    return next(of_runs, None)


def _checkpoint(source: Path | None, wanted: str | None) -> Path | None:
    if wanted not in (None, "best", "last"):
        path = Path(str(wanted))
        if not path.exists():
            fail(f"--ckpt_path {wanted}: no such checkpoint; best, last or a path")
        if path.is_dir():  # a distributed checkpoint, whose index is a pickle
            fail(f"--ckpt_path {wanted}: a folder; a checkpoint is one file")
        why = manifest.fault(path)
        if why not in (None, manifest.NONE):
            fail(f"--ckpt_path {wanted}: {why}{_nearest(path, safe=False)}")
        return path.resolve()
    if source is None:
        if wanted is not None:
            fail(f"--ckpt_path {wanted}: needs a run: --run NAME/001, or --config of a run folder")
        return None
    last = _last(source)
    return last if wanted == "last" else _best(source, last)


def _last(source: Path) -> Path:
    """Find the last checkpoint with a valid manifest; one without a manifest if there is no other."""
    newest, skipped = manifest.first(of_run(source))
    if newest is None:
        newest = next((path for path, why in skipped if why == manifest.NONE), None)
        skipped = [(path, why) for path, why in skipped if why != manifest.NONE]
    if newest is None:
        fail(
            f"{path_to_show(source)} has no " + (f"whole checkpoint ({_first(skipped)})" if skipped else "checkpoints")
        )
    _report(skipped)
    return newest


def _best(source: Path, last: Path) -> Path:
    """Find the best checkpoint by the run's ModelCheckpoint, read from its last checkpoint; runs may have moved."""
    from descant.modules.io.plain import load_values

    content: dict[str, Any] = load_values(last)
    for name, monitors in sorted(best_checkpoints(content), key=lambda pair: not pair[1]):  # those with a monitor first
        best = source / "checkpoints" / name
        if best.exists():
            why = manifest.fault(best)
            if why in (None, manifest.NONE):
                return best
            if monitors:
                fail(f"{path_to_show(best)}: {why}; it was the best: --ckpt_path last uses {last.name}")
            _report([(best, str(why))])
    return last


def _nearest(path: Path, safe: bool = True) -> str:
    """Return ``; nearest: PATH``, a valid checkpoint of the same run; if ``safe``, a resume point."""
    folder = path.absolute().parent.parent
    other = runs.newest_point(folder)[0] if safe else manifest.first(of_run(folder))[0]
    return f"; nearest: {path_to_show(other)}" if other else ""


def _report(skipped: Sequence[tuple[Path, str]]) -> None:
    for path, why in skipped:
        say(f"skipped {path.parent.name}/{path.name}: {why}")


def _compare_versions(folder: Path) -> None:
    """Print a line if another version or revision of Descant wrote the run last."""
    saved, here = runs.versions_of(folder), code()
    if not saved:
        return
    packages = saved.get("packages")
    version = packages.get("descant") if isinstance(packages, Mapping) else None
    if version is not None and version != here["descant"]:
        line = f"saved by descant {version}, resumed with {here['descant']}"
    elif saved.get("revision") is None:
        return  # an installed package of the same version
    elif saved["revision"] != here["revision"]:
        other = str(here["revision"] or "an installed package")[:12]
        line = f"saved by revision {str(saved['revision'])[:12]}, resumed with {other}"
    elif here["dirty"] and not saved.get("dirty"):
        line = "saved by a committed revision, resumed with uncommitted changes"
    else:
        return
    say(f"{line}: numbers may differ from there on")


def _none(skipped: Sequence[tuple[Path, str]]) -> str:
    return f"valid resume point ({_first(skipped)})" if skipped else "resume point"


def _first(skipped: Sequence[tuple[Path, str]]) -> str:
    """Describe the first fault, with the number of others."""
    (path, why), more = skipped[0], len(skipped) - 1
    return f"{path.name}: {why}" + (f", and {more} more" if more else "")
