"""Run folders: ``runs/NAME/001``, ``002``, ...; a re-run never destroys one and never refuses.

Rank 0 decides. Ranks that it launches inherit its decision by environment; ranks that a cluster launches
beside it read a note that rank 0 leaves next to the runs.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from descant.cli.catalogue import made_by
from descant.cli.errors import Refusal, fail, hint, printable
from descant.cli.untrusted import json_of, text_of
from descant.modules.io import manifest
from descant.modules.io.checkpoints import LATEST, followed, of_run
from descant.modules.io.jsonl import loads

#: What rank 0 decided (folder, checkpoint and precision), for the ranks that it launches.
INHERITED = "DESCANT_RUN_DIR"
_NUMBER = re.compile(r"\d{3,}")
#: Bytes of a part of a run's name: files of 255 may be called after it.
_LONGEST = 200


@dataclass(frozen=True)
class Run:
    """One folder, the checkpoint that this call starts from, and the Trainer's precision.

    ``fresh``: made by this very call, so that a start that never trained may take it away again.
    """

    folder: Path
    fresh: bool
    checkpoint: str | None = None
    precision: str | None = None

    def discard(self) -> None:
        """Remove a fresh folder, and its parent if then empty: for starts that came to nothing."""
        if self.fresh and not any(self.folder.glob("checkpoints/*")) and not any(self.folder.glob("resume/*")):
            shutil.rmtree(self.folder, ignore_errors=True)
            parent = self.folder.parent
            if parent.is_dir() and not any(path for path in parent.iterdir() if not path.name.startswith(".")):
                shutil.rmtree(parent, ignore_errors=True)


def require_name(name: str) -> None:
    """A run's name is one that stays below the folder of all runs, prints on one line and is no run's number.

    Raises:
        Refusal: for any other, with the nearest that is allowed.
    """
    parts = name.split("/")
    why = (
        "a name has letters that print"
        if not name.isprintable()
        else "a run stays below --runs DIR, which says where"
        if Path(name).is_absolute() or any(part in ("", ".", "..") for part in parts)
        else "a name has at most 200 bytes"
        if any(len(part.encode(errors="replace")) > _LONGEST for part in parts)
        else "Descant's own name for another thing"
        if parts[-1] in (LATEST, "metrics.json") or _NUMBER.fullmatch(parts[-1])
        else None
    )
    if why is not None:
        near = re.sub(r"[^\w.,=+-]+", "-", Path(name).name).strip("-.")[:_LONGEST]
        near = f"run-{near}" if near.isdecimal() or near in ("", LATEST, "metrics.json") else near
        fail(f"--name {printable(name)[:_LONGEST]}: {why}; nearest: {near}")


def rank(environment: Mapping[str, str] = os.environ) -> int:
    """This process's global rank, before any process group exists.

    Raises:
        Refusal: if the environment holds something else.
    """
    for key in ("RANK", "SLURM_PROCID", "LOCAL_RANK"):
        if key in environment:
            interactive = environment.get("SLURM_JOB_NAME") in ("bash", "interactive")
            if key == "SLURM_PROCID" and interactive:
                continue
            return whole(key, environment)
    return 0


def whole(key: str, environment: Mapping[str, str] = os.environ, default: int = 0) -> int:
    """A number that a launcher left in the environment.

    Raises:
        Refusal: if it is none.
    """
    text = environment.get(key, str(default))
    if not re.fullmatch(r"[0-9]{1,9}", text):
        fail(f"{key}={text} in the environment: expected a whole number, as a launcher leaves it")
    return int(text)


def require_ranks(environment: Mapping[str, str] = os.environ) -> None:
    """Raises Refusal where a launcher's numbers are none: Lightning reads them when it is imported."""
    for key in ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        if key in environment:
            whole(key, environment)


def launched() -> bool:
    """Whether another rank started this process."""
    return rank() > 0 and INHERITED in os.environ


def identity(environment: Mapping[str, str] = os.environ) -> str | None:
    """What a requeued job is known by: its SLURM job id (and array task); None outside SLURM."""
    if "SLURM_ARRAY_JOB_ID" in environment:
        return f"{environment['SLURM_ARRAY_JOB_ID']}_{environment.get('SLURM_ARRAY_TASK_ID', '0')}"
    return environment.get("SLURM_JOB_ID")


def runs_of(root: Path, name: str) -> list[Path]:
    """The run folders of a name, oldest first."""
    folder = root / name
    try:
        found = [path for path in folder.glob("*") if path.is_dir() and _NUMBER.fullmatch(path.name)]
    except OSError:  # a name that is too long is none of a run
        return []
    return sorted(found, key=lambda path: int(path.name))


def agree(parent: Path, decide: Callable[[], Run]) -> Run:
    """The run that rank 0 decides on, on every rank. ``parent`` is a folder that all ranks name alike.

    Raises:
        TimeoutError: on another rank, if rank 0 does not say within five minutes.
    """
    note = _note(parent)
    if rank() > 0:
        text = os.environ.get(INHERITED)
        if text is None and note is not None:
            text = _read_note(note)
        if text is not None:
            try:
                folder, checkpoint, precision = loads(text)
            except (ValueError, TypeError):
                fail(f"{INHERITED} in the environment is not what another rank leaves there")
            return Run(Path(folder), fresh=False, checkpoint=checkpoint, precision=precision)
    run = decide()
    text = json.dumps([str(run.folder), run.checkpoint, run.precision])
    os.environ[INHERITED] = text  # for the ranks that this process launches
    if note is not None:
        note.parent.mkdir(parents=True, exist_ok=True)
        scratch = note.with_name(f"{note.name}.tmp")
        scratch.write_text(text, encoding="utf-8")
        os.replace(scratch, note)
    return run


def forget() -> None:
    """End what :func:`agree` left in the environment: the next run of this process is another one."""
    os.environ.pop(INHERITED, None)


def allocate(parent: Path, prefix: str = "", checkpoint: str | None = None) -> Run:
    """A new numbered folder in ``parent``, made atomically: two processes never get the same one.

    Raises:
        Refusal: if nothing can be written there.
    """
    try:
        return _allocate(parent, prefix, checkpoint)
    except OSError as error:
        fail(f"{parent}: a run cannot be written there: {error.strerror}")


def _allocate(parent: Path, prefix: str, checkpoint: str | None) -> Run:
    parent.mkdir(parents=True, exist_ok=True)
    taken = [p.name.removeprefix(prefix) for p in parent.iterdir() if p.name.startswith(prefix)]
    number = max((int(n) for n in taken if _NUMBER.fullmatch(n)), default=0) + 1
    while True:  # another process may take the number between the look and the mkdir: the mkdir decides
        folder = parent / f"{prefix}{number:03d}"
        try:
            folder.mkdir()
        except FileExistsError:
            number += 1
        else:
            return Run(folder.resolve(), fresh=True, checkpoint=checkpoint)


def latest(root: Path, name: str) -> Path | None:
    """The newest run of a name that is this job's own: under SLURM the one with the same job id."""
    mine = identity()
    found = runs_of(root, name)
    if mine is not None:
        found = [path for path in found if versions_of(path).get("job") == mine]
    return found[-1] if found else None


def existing(root: Path, run: str) -> Path:
    """The folder that ``--run NAME/002`` means: under ``root``, or a path.

    Raises:
        Refusal: if there is none.
    """
    for folder in (followed(root / run), followed(Path(run))):
        if is_run(folder):
            return folder.resolve()
    if run in ("", "."):
        fail("--run: of which run? NAME/001, or NAME/latest")
    known = [path.relative_to(root).as_posix() for path in root.glob("*/*") if _NUMBER.fullmatch(path.name)]
    raise Refusal(f"--run {run}: no such run under {root}{hint(run, known) or made_by(run)}")


def is_run(folder: Path) -> bool:
    """Whether a folder is that of one run: it has a configuration, or a number for a name."""
    try:
        numbered = bool(_NUMBER.fullmatch(folder.resolve().name))
        return folder.is_dir() and ((folder / "config.yaml").is_file() or numbered)
    except (OSError, RuntimeError):  # longer than a name may be, or links in a circle
        return False


def precision_of(folder: Path) -> str | None:
    """``trainer.precision`` that a run was trained in, as its configuration has it; None where that is not known."""
    try:
        content = yaml.safe_load(text_of(folder / "config.yaml"))
        precision = content["trainer"]["precision"]
    except (OSError, ValueError, RecursionError, yaml.YAMLError, KeyError, TypeError):
        return None
    return None if precision in (None, "auto") else str(precision)


def newest_point(folder: Path) -> tuple[Path | None, list[tuple[Path, str]]]:
    """The newest valid resume point of a run, and what was skipped and why."""
    return manifest.newest(folder / "resume", "step-*.ckpt")


def checkpoints(folder: Path) -> list[Path]:
    """What a run can be evaluated from, resume points included: unknown steps first, then the last."""
    return of_run(folder)


def point(folder: Path) -> None:
    """Make ``latest`` beside a run name it and ``metrics.json`` link to its own, each in one atomic step."""
    write_text(folder.parent / LATEST, f"{folder.name}\n")  # no link: see followed
    _link(folder.parent / "metrics.json", f"{folder.name}/metrics.json")


def write_json(file: Path, content: Mapping[str, object]) -> None:
    """Write a small JSON file in one atomic step."""
    write_text(file, json.dumps(content, indent=1) + "\n")


def write_text(file: Path, text: str) -> None:
    """Write a file in one atomic step: who reads it sees all of the old one or all of the new, also after a crash."""
    scratch = file.with_name(f".{file.name}.{os.getpid()}")
    with scratch.open("w", encoding="utf-8") as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())  # a name may reach the disk before what it names
    os.replace(scratch, file)


def _link(link: Path, target: str) -> None:
    scratch = link.with_name(f".{link.name}.{os.getpid()}")
    scratch.unlink(missing_ok=True)
    scratch.symlink_to(target)
    os.replace(scratch, link)


def versions_of(folder: Path) -> dict[str, object]:
    """What versions.json says; nothing where there is none, or none that can be read."""
    try:
        content = json_of(folder / "versions.json")
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _note(parent: Path) -> Path | None:
    """Where ranks launched by a cluster or by torchrun meet: one file a launch; None for one process."""
    env = os.environ
    if "SLURM_PROCID" in env and whole("SLURM_NTASKS", default=1) > 1:
        keys = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
        return parent / (".slurm-" + "-".join(word(env.get(key, "0")) for key in keys))
    if "TORCHELASTIC_RUN_ID" in env and whole("WORLD_SIZE", default=1) > 1:
        # one agent starts all ranks of a node: its process id tells this launch from an earlier one
        alone = env.get("GROUP_WORLD_SIZE", "1") == "1"
        keys = ("TORCHELASTIC_RUN_ID", "MASTER_PORT", "TORCHELASTIC_RESTART_COUNT")
        parts = [word(env.get(key, "0")) for key in keys] + ([str(os.getppid())] if alone else [])
        return parent / (".torchrun-" + "-".join(parts))
    return None


def word(text: str) -> str:
    """A part of a file's name, of a text that may hold anything.

    >>> word("1234"), word("../a")
    ('1234', '.._a')
    """
    return re.sub(r"[^\w.-]", "_", text)[:100]


def _read_note(note: Path, seconds: float = 300.0) -> str:
    end = time.monotonic() + seconds
    while not note.is_file():
        if time.monotonic() > end:
            raise TimeoutError(f"rank {rank()} found no run folder in {note} within {seconds:g} s")
        time.sleep(0.1)
    return note.read_text(encoding="utf-8")
