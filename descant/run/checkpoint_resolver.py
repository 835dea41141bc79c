"""Where a command works: which run folder it writes to and which checkpoint it starts from."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from descant.cli.document import load
from descant.cli.errors import Refusal, fail, say
from descant.modules.io import manifest
from descant.modules.io.checkpoints import due, followed, judged
from descant.report.curves import scalars
from descant.run import elastic, lock, runs
from descant.run.runs import Run
from descant.run.versions import code


def for_fit(root: Path, name: str, run: str | None, resume: str, trust: Sequence[str] = ()) -> Run:
    """A new folder, or with ``resume="auto"`` the one to go on in, from its newest valid resume point.

    Raises:
        Refusal: if the named run or resume point does not exist or is damaged, a run is there and nothing says resume,
            another process writes it, or nothing can be written there.
    """
    if resume not in ("never", "auto"):
        start = _point(root, resume).resolve()
        _tell_version(start.parent.parent)
        return _locked(runs.allocate(root / name, checkpoint=str(start)))
    before = elastic.begun(root / name)
    folder = runs.existing(root, run) if run else before or runs.latest(root, name)
    if resume == "never":
        if run:
            fail(f"--run {run}: a run is there; --resume auto continues it, and without --run a new one starts")
        return _locked(runs.allocate(root / name))
    if folder is not None:
        require_contained(folder, trust)
    if folder is not None and runs.rank() == 0 and os.access(folder, os.W_OK):
        lock.take(folder)  # before a look at what is there: who writes it would add to that
    newest, skipped = runs.newest_point(folder) if folder else (None, [])
    if folder is not None and newest is not None:
        if not os.access(folder, os.W_OK):
            fail(f"{_shown(folder)}: a run cannot be continued there: no permission to write")
        _tell(skipped)
        for part in ("checkpoints", "resume"):
            manifest.sweep(folder / part)
        say(f"resuming {_shown(folder)} from {newest.name}")
        _tell_version(folder)
        return Run(folder, fresh=False, checkpoint=str(newest))
    if run:
        fail(f"--run {run}: it has no {_none(skipped)}")
    _tell(skipped)
    # what is started again by a cluster or torchrun has one folder, also where it ended before it saved anything
    again = before is not None or runs.identity() is not None
    if folder is not None and not again:
        lock.release(folder)
    new = Run(folder, fresh=False) if folder is not None and again else _locked(runs.allocate(root / name))
    what = "valid resume point" if skipped else "resume point yet"
    say(f"--resume auto: {name} has no {what}; starting {_shown(new.folder)}")
    if folder is not None and not skipped and (lost := _lost(folder)) is not None:
        say(lost)
    return new


def _lost(folder: Path) -> str | None:
    """Of a run that ended before its first resume point: what is lost, and when that was due; None of no run."""
    try:
        trainer = load(folder / "config.yaml").plain.get("trainer")
        callbacks = trainer.get("callbacks") if isinstance(trainer, dict) else None
        trained = [step for curve in scalars(folder).values() for step in curve]
    except (Refusal, OSError, ValueError, csv.Error):  # it had hardly begun, or was not ours
        return None
    steps = f"at least {max(trained) + 1} steps" if trained else "no step was logged"
    said = {str(one.get("class_path")).rpartition(".")[2]: one for one in callbacks or [] if isinstance(one, dict)}
    if "Resume" not in said:
        return f"{_shown(folder)} saves no resume points (no callback Resume): what it trained is lost ({steps})"
    given = said["Resume"].get("init_args")
    kinds = {"every": int, "minutes": float | int | None}
    known = {key: given[key] for key in kinds if isinstance(given, dict) and key in given}
    if not all(isinstance(value, kinds[key]) for key, value in known.items()):
        return None
    when = due(**known)
    return f"{_shown(folder)} ended before its first resume point ({when}): what it trained is lost ({steps})"


def require_contained(folder: Path, trust: Sequence[str] = ()) -> None:
    """Nothing in a run's folder leads out of it, by a link: what goes on in it would write there.

    Raises:
        Refusal: for the first link that does, unless the user trusts configurations to write elsewhere.
    """
    if "writes" in trust:
        return
    root = folder.resolve()
    for place, folders, files in os.walk(root):
        for name in (*folders, *files):
            path = Path(place, name)
            if path.is_symlink() and not path.resolve().is_relative_to(root):
                fail(f"{_shown(path)}: a link out of the run's folder; --trust writes lets a run write there")


def _locked(run: Run) -> Run:
    if runs.rank() == 0:
        lock.take(run.folder)
    return run


def _point(root: Path, resume: str) -> Path:
    """The resume point that ``--resume PATH`` means: a file, or the newest valid one of a run."""
    for folder in (followed(root / resume), followed(Path(resume))):
        if runs.is_run(folder):
            newest, skipped = runs.newest_point(folder)
            if newest is None:
                fail(f"--resume {resume}: it has no {_none(skipped)}")
            _tell(skipped)
            say(f"starting from {_shown(newest)}")
            return newest
    path = followed(Path(resume))
    if not path.exists():
        fail(f"--resume {resume}: no such checkpoint; never, auto or a path of a resume point or run")
    found = manifest.confirmed(path)
    if isinstance(found, str):
        fail(f"--resume {resume}: {found}{_nearest(path)}")
    found[0].close()
    if found[1].get("safe") is not True:
        fail(f"--resume {resume}: saved in the middle of a step or epoch, no resume point{_nearest(path)}")
    return path


def for_evaluation(command: str, root: Path, name: str, source: Path | None, wanted: str | None) -> Run:
    """A folder ``validate-001`` inside the evaluated run, and its checkpoint ``best``, ``last`` or a path.

    Raises:
        Refusal: if the checkpoint does not exist, or is said relative to a run and none is given.
    """
    wanted = str(followed(Path(wanted))) if wanted not in (None, "best", "last") else wanted
    if source is None and wanted is not None and Path(wanted).resolve().parent.name in ("checkpoints", "resume"):
        source = Path(wanted).resolve().parent.parent
    checkpoint = _checkpoint(source, wanted)
    if source is not None:
        from descant.modules.io.saved import changed

        if (told := changed(source)) is not None:
            say(f"warning: {told}")
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
        if path.is_dir():  # of torch.distributed, whose index is a pickle
            fail(f"--ckpt_path {wanted}: a folder; a checkpoint is one file")
        why = manifest.fault(path)
        if why not in (None, manifest.NONE):
            fail(f"--ckpt_path {wanted}: {why}{_nearest(path, safe=False)}")
        return path.resolve()
    if source is None:
        if wanted is not None:
            fail(f"--ckpt_path {wanted}: of which run? --run NAME/001, or --config of a run folder")
        return None
    last = _last(source)
    return last if wanted == "last" else _best(source, last)


def _last(source: Path) -> Path:
    """The last checkpoint that its manifest confirms; only where there is none, one without a manifest."""
    newest, skipped = manifest.first(runs.checkpoints(source))
    if newest is None:
        newest = next((path for path, why in skipped if why == manifest.NONE), None)
        skipped = [(path, why) for path, why in skipped if why != manifest.NONE]
    if newest is None:
        fail(f"{_shown(source)} has no " + (f"whole checkpoint ({_first(skipped)})" if skipped else "checkpoints"))
    _tell(skipped)
    return newest


def _best(source: Path, last: Path) -> Path:
    """What the run's ModelCheckpoint judged best, as its last checkpoint tells; runs may have moved."""
    from descant.modules.io.plain import load_plain

    content: dict[str, Any] = load_plain(last, map_location="cpu", mmap=True)
    for name, monitors in sorted(judged(content), key=lambda pair: not pair[1]):  # stable: one that monitors first
        best = source / "checkpoints" / name
        if best.exists():
            why = manifest.fault(best)
            if why in (None, manifest.NONE):
                return best
            if monitors:
                fail(f"{_shown(best)}: {why}; it was the best, --ckpt_path last takes {last.name}")
            _tell([(best, str(why))])
    return last


def _nearest(path: Path, safe: bool = True) -> str:
    """``; nearest: PATH`` of the same run, which is a resume point if it has to be ``safe``."""
    folder = path.absolute().parent.parent
    found = runs.newest_point(folder)[0] if safe else manifest.first(runs.checkpoints(folder))[0]
    return f"; nearest: {_shown(found)}" if found else ""


def _tell(skipped: Sequence[tuple[Path, str]]) -> None:
    for path, why in skipped:
        say(f"skipped {path.parent.name}/{path.name}: {why}")


def _tell_version(folder: Path) -> None:
    """Say so if another version of Descant, or another revision of it, began the run or went on with it last."""
    then = runs.versions_of(folder)
    if not then:
        return
    now = code()
    packages = then.get("packages")
    before = packages.get("descant") if isinstance(packages, Mapping) else None
    if before is not None and before != now["descant"]:
        say(f"saved by descant {before}, resumed with {now['descant']}: numbers may differ from there on")
    elif then.get("revision") is None:
        return  # an installed package, of the same version
    elif then["revision"] != now["revision"]:
        others = str(now["revision"] or "an installed package")[:12]
        say(f"saved by revision {str(then['revision'])[:12]}, resumed with {others}: numbers may differ from there on")
    elif now["dirty"] and not then.get("dirty"):
        say("saved by a committed revision, resumed with uncommitted changes: numbers may differ from there on")


def _none(skipped: Sequence[tuple[Path, str]]) -> str:
    return f"valid resume point ({_first(skipped)})" if skipped else "resume point"


def _first(skipped: Sequence[tuple[Path, str]]) -> str:
    """The first fault, where one line has to do."""
    (path, why), more = skipped[0], len(skipped) - 1
    return f"{path.name}: {why}" + (f", and {more} more" if more else "")


def _shown(path: Path) -> str:
    """Relative to the working folder where that is shorter."""
    try:
        return path.relative_to(Path.cwd()).as_posix()
    except ValueError:
        return str(path)
