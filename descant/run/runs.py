"""Run folders ``runs/NAME/001``, ``002``, ...: a new run never overwrites an earlier one.

Rank 0 decides. Ranks that it launches inherit the decision by an environment variable; ranks that a cluster launches
read a note that rank 0 leaves beside the runs.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from descant.cli.catalogue import made_by
from descant.cli.errors import Refusal, fail, hint, printable
from descant.cli.untrusted import json_of, text_of
from descant.modules.io import manifest, plain_yaml
from descant.modules.io.checkpoints import LATEST, follow_latest
from descant.modules.io.files import write_text as write_text
from descant.modules.io.jsonl import loads

#: Environment variable with the folder, checkpoint and precision that rank 0 chose, for the ranks that it launches.
INHERITED = "DESCANT_RUN_DIR"
_NUMBER = re.compile(r"\d{3,}")
#: Maximum bytes of a part of a run's name; file names of at most 255 bytes are derived from it.
_LONGEST = 200


@dataclass(frozen=True)
class Run:
    """A run's folder, the checkpoint that this call starts from, and the Trainer's precision.

    ``fresh``: created by this call, and removed again if training never starts.
    """

    folder: Path
    fresh: bool
    checkpoint: str | None = None
    precision: str | None = None

    def discard(self) -> None:
        """Remove a fresh folder without checkpoints, and its parent if then empty."""
        if self.fresh and not any(self.folder.glob("checkpoints/*")) and not any(self.folder.glob("resume/*")):
            shutil.rmtree(self.folder, ignore_errors=True)
            parent = self.folder.parent
            if parent.is_dir() and not any(path for path in parent.iterdir() if not path.name.startswith(".")):
                shutil.rmtree(parent, ignore_errors=True)


def require_name(name: str) -> None:
    """Check a run's name: a printable relative path without ``..`` that is neither a number nor reserved."""
    parts = name.split("/")
    faults = {
        "not printable": not name.isprintable(),
        "not a relative path below --runs DIR": Path(name).is_absolute() or not {"", ".", ".."}.isdisjoint(parts),
        "longer than 200 bytes": any(len(part.encode(errors="replace")) > _LONGEST for part in parts),
        "reserved": parts[-1] in (LATEST, "metrics.json") or _NUMBER.fullmatch(parts[-1]),
    }
    if (why := next((line for line, holds in faults.items() if holds), None)) is not None:
        valid = re.sub(r"[^\w.,=+-]+", "-", Path(name).name).strip("-.")[:_LONGEST]
        valid = f"run-{valid}" if valid.isdecimal() or valid in ("", LATEST, "metrics.json") else valid
        fail(f"--name {printable(name)[:_LONGEST]}: {why}; nearest: {valid}")


def rank(environment: Mapping[str, str] = os.environ) -> int:
    """Read this process's global rank from environment variables, before a process group exists."""
    interactive = environment.get("SLURM_JOB_NAME") in ("bash", "interactive")
    for key in ("RANK", "SLURM_PROCID", "LOCAL_RANK"):
        if key in environment and not (key == "SLURM_PROCID" and interactive):
            return read_integer(key, environment)
    return 0


def read_integer(key: str, environment: Mapping[str, str] = os.environ, default: int = 0) -> int:
    """Read an environment variable that a launcher sets as a whole number."""
    text = environment.get(key, str(default))
    if not re.fullmatch(r"[0-9]{1,9}", text):
        fail(f"{key}={text} in the environment: expected a whole number, as launchers set it")
    return int(text)


def require_ranks(environment: Mapping[str, str] = os.environ) -> None:
    """Raise Refusal if a launcher's variables are not numbers, because Lightning reads them when it is imported."""
    for key in ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        if key in environment:
            read_integer(key, environment)


def is_launched() -> bool:
    """Whether another rank started this process."""
    return rank() > 0 and INHERITED in os.environ


def identity(environment: Mapping[str, str] = os.environ) -> str | None:
    """Return the SLURM job id (and array task), which a requeued job keeps; None outside SLURM."""
    if "SLURM_ARRAY_JOB_ID" in environment:
        return f"{environment['SLURM_ARRAY_JOB_ID']}_{environment.get('SLURM_ARRAY_TASK_ID', '0')}"
    return environment.get("SLURM_JOB_ID")


def runs_of(root: Path, name: str) -> list[Path]:
    """List the run folders of a name, oldest first."""
    folder = root / name
    try:
        folders = [path for path in folder.glob("*") if path.is_dir() and _NUMBER.fullmatch(path.name)]
    except OSError:  # the name is too long
        return []
    return sorted(folders, key=lambda path: int(path.name))


def runs_below(folder: Path, depth: int = 4) -> list[Path]:
    """Find the runs of a folder that is a run, has the runs of one name, or has names below it, such as a sweep."""
    if is_run(folder):
        return [folder]
    if several := runs_of(folder.parent, folder.name):
        return several
    inner = sorted(folder.glob("[!.]*")) if depth else []
    return [run for path in inner if not path.is_symlink() for run in runs_below(path, depth - 1)]


def agree(parent: Path, decide: Callable[[], Run]) -> Run:
    """Return the run that rank 0 chooses, on every rank. ``parent`` is the same folder on all ranks.

    Raises:
        TimeoutError: on another rank, if rank 0 does not decide within five minutes.
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
                fail(f"{INHERITED} in the environment: not what another rank sets")
            return Run(Path(folder), fresh=False, checkpoint=checkpoint, precision=precision)
    run = decide()
    text = json.dumps([str(run.folder), run.checkpoint, run.precision])
    os.environ[INHERITED] = text  # for the ranks that this process launches
    if note is not None:
        note.parent.mkdir(parents=True, exist_ok=True)
        write_text(note, text)
    return run


def forget() -> None:
    """Remove the decision of :func:`agree` from the environment, before the next run of this process."""
    os.environ.pop(INHERITED, None)


def allocate(parent: Path, prefix: str = "", checkpoint: str | None = None) -> Run:
    """Create a new numbered folder in ``parent``, atomically: two processes never get the same one."""
    try:
        parent.mkdir(parents=True, exist_ok=True)
        taken = [p.name.removeprefix(prefix) for p in parent.iterdir() if p.name.startswith(prefix)]
        first = max((int(n) for n in taken if _NUMBER.fullmatch(n)), default=0) + 1
        for number in count(first):  # another process may have taken the number: mkdir decides
            folder = parent / f"{prefix}{number:03d}"
            with contextlib.suppress(FileExistsError):
                folder.mkdir()
                break
    except OSError as error:
        fail(f"{parent}: a run cannot be written there: {error.strerror}")
    return Run(folder.resolve(), fresh=True, checkpoint=checkpoint)


def latest(root: Path, name: str) -> Path | None:
    """Return the newest run of a name; under SLURM, the newest with this job's id."""
    job = identity()
    folders = [path for path in runs_of(root, name) if job is None or versions_of(path).get("job") == job]
    return folders[-1] if folders else None


def require_below(root: Path, folder: Path, trust: Sequence[str] = ()) -> None:
    """Refuse a folder of ``root`` that is, or lies behind, a link out of it. The user may type a path elsewhere."""
    below = Path(os.path.abspath(folder)).is_relative_to(os.path.abspath(root))
    if below and "writes" not in trust and not folder.resolve().is_relative_to(root.resolve()):
        fail(f"{printable(folder)}: a link out of {root}; --trust writes lets a run write there")


def existing(root: Path, run: str, trust: Sequence[str] = ("writes",)) -> Path:
    """Find the folder of ``--run NAME/002``, under ``root`` or by its path. A writing command passes ``trust``."""
    for folder in (follow_latest(root / run), follow_latest(Path(run))):
        if is_run(folder):
            require_below(root, folder, trust)
            return folder.resolve()
    if run in ("", "."):
        fail("--run: a run is missing: NAME/001, or NAME/latest")
    known = [path.relative_to(root).as_posix() for path in root.glob("*/*") if _NUMBER.fullmatch(path.name)]
    raise Refusal(f"--run {run}: no such run under {root}{hint(run, known) or made_by(run)}")


def model_path(root: Path, name: Path | str) -> Path:
    """Find a run, checkpoint or export by its path, or by its name below ``root``; as given if neither exists."""
    given = follow_latest(Path(name).expanduser())
    return next((path for path in (given, follow_latest(root / name)) if path.exists()), given)


def is_run(folder: Path) -> bool:
    """Whether a folder is one run's: it has a configuration, or its name is a number."""
    try:
        numbered = bool(_NUMBER.fullmatch(folder.resolve().name))
        return folder.is_dir() and ((folder / "config.yaml").is_file() or numbered)
    except (OSError, RuntimeError):  # the name is too long, or links form a circle
        return False


def precision_of(folder: Path) -> str | None:
    """Read ``trainer.precision`` from a run's configuration; None if it is unknown."""
    try:
        precision = plain_yaml.loads(text_of(folder / "config.yaml"))["trainer"]["precision"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return None if precision in (None, "auto") else str(precision)


def newest_point(folder: Path) -> tuple[Path | None, list[tuple[Path, str]]]:
    """Find the newest valid resume point of a run, and newer ones that are damaged, with their faults."""
    return manifest.newest(folder / "resume", "step-*.ckpt")


def point(folder: Path) -> None:
    """Update ``latest`` and the link ``metrics.json`` beside a run, each atomically."""
    write_text(folder.parent / LATEST, f"{folder.name}\n")  # not a link: see followed
    link = folder.parent / "metrics.json"
    scratch = link.with_name(f".{link.name}.{os.getpid()}")
    scratch.unlink(missing_ok=True)
    scratch.symlink_to(f"{folder.name}/metrics.json")
    os.replace(scratch, link)


def versions_of(folder: Path) -> dict[str, object]:
    """Read versions.json; empty if it is missing or not readable."""
    try:
        content = json_of(folder / "versions.json")
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _note(parent: Path) -> Path | None:
    """Return the file by which ranks of a cluster or of torchrun agree, one per launch; None for a single process."""
    env = os.environ
    if "SLURM_PROCID" in env and read_integer("SLURM_NTASKS", default=1) > 1:
        keys = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
        return parent / (".slurm-" + "-".join(word(env.get(key, "0")) for key in keys))
    if "TORCHELASTIC_RUN_ID" in env and read_integer("WORLD_SIZE", default=1) > 1:
        # one agent starts all ranks of a node: its pid distinguishes this launch from an earlier one
        alone = env.get("GROUP_WORLD_SIZE", "1") == "1"
        keys = ("TORCHELASTIC_RUN_ID", "MASTER_PORT", "TORCHELASTIC_RESTART_COUNT")
        parts = [word(env.get(key, "0")) for key in keys] + ([str(os.getppid())] if alone else [])
        return parent / (".torchrun-" + "-".join(parts))
    return None


def word(text: str) -> str:
    """Make a text safe as a part of a file name.

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
