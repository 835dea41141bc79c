"""Scripts of ``descant submit``, and refusals before submitting. No SLURM here."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from descant.callbacks import Watch
from descant.slurm.submit import grid
from tests.conftest import Result
from tests.rotation import quick

Cli = Callable[..., Result]
FIT = ("fit", "--config", "toy.yaml", "--trust", "tests.toys")


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An sbatch that numbers its jobs, and keeps what it was given; without it there is none on PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    body = f'#!/bin/bash\necho "$@" >> {tmp_path}/calls\nenv > {tmp_path}/env\nwc -l < {tmp_path}/calls\n'
    for name, text in (("sbatch", body), ("scontrol", "#!/bin/bash\n")):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    return tmp_path


def test_dry_run_prints_the_script_and_writes_nothing(cli: Cli, workplace: Path) -> None:
    options = (
        "--nodes",
        "2",
        "--gpus-per-node",
        "a100:4",
        "--time",
        "24:00:00",
        "--cpus-per-task",
        "6",
        "--mem",
        "64G",
    )
    more = ("--partition", "long", "--setup", "module load cuda", "--sbatch", "exclusive", "--sbatch=--nice=5")
    before = sorted(workplace.rglob("*"))
    result = cli("submit", *options, *more, "--dry-run", "--", *FIT, "--name", "my run", "--model.scale", "-1.5")
    assert result.rc == 0, result.err
    assert sorted(workplace.rglob("*")) == before
    said = re.findall(r"^#SBATCH --(.+)$", result.out, re.MULTILINE)
    assert said == [
        'job-name="my run"',
        f"chdir={workplace}",
        'output="runs/my run/slurm-%j.log"',
        "open-mode=append",
        "nodes=2",
        "ntasks-per-node=4",
        "signal=USR1@120",
        "gpus-per-node=a100:4",
        "cpus-per-task=6",
        "mem=64G",
        "time=24:00:00",
        "partition=long",
        "requeue",
        "kill-on-invalid-dep=yes",
        "exclusive",
        "nice=5",
    ]
    assert "\nmodule load cuda\n" in result.out
    (command,) = re.findall(r"^srun (?:.|\n)+?\n(?=code)", result.out, re.MULTILINE)
    assert [line.removesuffix(" \\") for line in command.splitlines()[2:]] == [
        "  --config toy.yaml",
        "  --config on/slurm",
        "  --trust tests.toys",
        "  --name 'my run'",
        "  --model.scale -1.5",
        "  --trainer.num_nodes 2",
        "  --trainer.devices 4",
        '  "$@"',
    ]
    assert subprocess.run(["bash", "-n"], input=result.out, text=True).returncode == 0
    make = result.err.splitlines()[-1].partition(" before sbatch: ")[2]
    assert subprocess.run(["bash", "-c", make]).returncode == 0 and (workplace / "runs/my run").is_dir()


@pytest.mark.parametrize(
    ("options", "stage", "threads", "asked"),
    [
        ((), (), None, "1"),
        ((), ("--data.num_workers", "3"), None, "4"),
        ((), ("--data.num_workers", "3"), "2", "5"),
        (("--array", "data.num_workers=0,2"), (), "many", "3"),
        (("--cpus-per-task", "6"), ("--data.num_workers", "3"), "2", "6"),
        (("--gpus-per-node", "2"), ("--data.num_workers", "3"), None, None),
        (("--sbatch", "exclusive"), ("--data.num_workers", "3"), None, None),
    ],
)
def test_a_rank_on_processors_asks_for_its_threads_and_workers(
    cli: Cli,
    workplace: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: tuple[str, ...],
    stage: tuple[str, ...],
    threads: str | None,
    asked: str | None,
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if threads is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
    text = cli("submit", *options, "--dry-run", "--", "fit", "--config", "contrastive/emoji", *stage).out
    assert re.findall(r"^#SBATCH --cpus-per-task=(.+)$", text, re.MULTILINE) == ([asked] if asked else [])


def test_scripts_and_job_files_are_written_and_jobs_chained(
    cli: Cli, tools: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("SLURM_NTASKS", "SLURM_CONF", "MASTER_PORT", "PYTEST_XDIST", "LOCAL_RANK"):
        monkeypatch.setenv(name, "7")
    axes = ("--array", "seed_everything=0..1", "--array", "model.scale=1,2", "--at-once", "2")
    evaluation = ("test", "--run", "toy/latest", "--trust", "tests.toys")
    result = cli("submit", *axes, "--after", "99", "--", *FIT, "--", *evaluation)
    assert result.rc == 0, result.err
    assert (tools / "calls").read_text().splitlines() == [
        "--parsable --dependency=afterok:99 runs/toy/submit-001.sh",
        "--parsable --dependency=afterok:1 runs/toy/submit-002.sh",
    ]
    assert json.loads((tools / "runs/toy/submit-001.json").read_text())["tasks"]["1"] == {
        "seed_everything": "0",
        "model.scale": "2",
    }
    first, second = ((tools / f"runs/toy/submit-00{n}.sh").read_text() for n in (1, 2))
    assert "#SBATCH --array=0-3%2\n" in first and "  1) set -- --seed_everything 0 --model.scale 2 ;;\n" in first
    assert "--array=" not in second and "on/slurm" not in second and " -m descant test \\\n" in second
    for word in ("submitted 1, 4 tasks", "after 1: runs", "squeue -j 1", "slurm-1_0.log", "--logdir runs/toy"):
        assert word in result.out, word
    names = {line.partition("=")[0] for line in (tools / "env").read_text().splitlines()}
    assert "SLURM_CONF" in names
    assert not names & {"SLURM_NTASKS", "MASTER_PORT", "PYTEST_XDIST", "LOCAL_RANK", "PYTEST_CURRENT_TEST"}


NO_WATCH = ("--trainer.callbacks+=Watch", "--trainer.callbacks.hang_after=null")


@pytest.mark.parametrize(
    ("options", "hang_after"),
    [((), 300.0), (("--config", "on/slurm"), 300.0), (("--config", "mine.yaml"), 60.0), (NO_WATCH, None)],
)
def test_every_run_has_one_watch_whose_numbers_an_overlay_sets(
    toy: Cli, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], hang_after: float | None
) -> None:
    seen: list[float | None] = []
    real = Watch.setup

    def setup(self: Watch, *args: Any, **of: Any) -> None:
        seen.append(self.hang_after)
        real(self, *args, **of)

    monkeypatch.setattr(Watch, "setup", setup)
    Path("mine.yaml").write_text(
        "trainer: {callbacks+: [{class_path: descant.callbacks.Watch, init_args: {hang_after: 60, long_after: 600}}]}\n"
    )
    result = toy("fit", *options, "--test", "false", "--trainer.max_steps", "1", "--trainer.limit_val_batches", "0")
    assert result.rc == 0 and seen == [hang_after], result.err


def test_a_job_that_is_queued_again_has_the_trust_that_was_typed_and_no_more(cli: Cli, workplace: Path) -> None:
    """The script is all that a requeued job reads, and it has the typed words of each command, as typed."""
    for text in ("trust: tests.others\n", "trust: [tests.others]\n"):  # a file cannot give any
        (workplace / "gives.yaml").write_text(text)
        assert cli("submit", "--dry-run", "--", *FIT, "--config", "gives.yaml").rc == 2
    words = ("--trust", "tests.toys", "--trust=tests.fuzz", "--array", "model.scale=1,2")
    fit, again = ("fit", "--config", "toy.yaml", *words[:3]), ("test", "--run", "toy/latest")
    result = cli("submit", *words[3:], "--dry-run", "--", *fit, "--", *again)
    assert result.rc == 0, result.err
    first, second = (text.split("srun --kill", 1)[1] for text in result.out.split("#!/bin/bash")[1:])
    assert re.findall(r"--trust[ =](\S+)", first) == ["tests.toys", "tests.fuzz"] and "trust" not in second
    assert result.out.count("scontrol requeue") == 2 and not re.findall(r"^sbatch", result.out, re.MULTILINE)


def test_a_grid_is_all_combinations() -> None:
    tasks = grid(["seed_everything=0..4", "model.optimizer.lr=0.1,0.2,1e-3"])
    assert len(tasks) == 15 == len({tuple(task.items()) for task in tasks})
    assert tasks[0] == {"seed_everything": "0", "model.optimizer.lr": "0.1"} and grid([]) == []


# how a job ends, without SLURM: srun runs the ranks here, and scontrol keeps what it is told ---------------------


@pytest.mark.parametrize(
    ("codes", "answer", "ended", "again"),
    [
        ((0, 0), True, 0, False),
        ((1, 0), True, 1, False),
        ((1, 0), False, 137, True),  # a node is gone, and the first noticed
        ((2, 137), True, 2, False),  # the second was killed because of the first
        ((137, 1), True, 137, True),  # the second lost the first
        ((75, 75), True, 75, True),
        ((1075, 1075), True, 75, True),  # a rank hangs, and these say so
        ((1, 1075), True, 75, True),  # a store does not answer the second, and the first lost it
        ((143, 0), True, 143, True),
        ((138, 138), True, 138, True),
        ((130, 130), True, 130, False),
    ],
)
@pytest.mark.parametrize(("state", "restarts"), quick([("RUNNING", 0), ("RUNNING", 3), ("COMPLETING", 0)], 3))
def test_requeueing_by_exit_code(
    cli: Cli, workplace: Path, codes: tuple[int, int], answer: bool, ended: int, again: bool, state: str, restarts: int
) -> None:
    text = cli("submit", "--dry-run", "--requeues", "3", "--", *FIT).out
    command = re.search(r"/\S+ -P -m descant fit", text)
    assert command is not None
    job = text.replace(command[0], f"{workplace}/rank")
    programs = {
        "rank": '[ $CODE -lt 1000 ] || touch "$DESCANT_HUNG"; exit $((CODE % 1000))',
        # the second begins when the first has ended
        "srun": f'[ "$1" != --overlap ] || exit {int(not answer)}\nshift; worst=0\n'
        + "".join(f'CODE={code} "$@"; r=$?; [ $r -gt $worst ] && worst=$r\n' for code in codes)
        + 'echo $worst > "$HOME/worst"; exit $worst',
        "scontrol": f'case "$*" in *hostnames*) echo n1 ;; *show*) echo "JobState={state} x=1" ;;'
        ' requeue*) touch "$HOME/requeued" ;; esac',
    }
    for name, body in programs.items():
        (workplace / name).write_text(f"#!/bin/bash\n{body}\n")
        (workplace / name).chmod(0o755)
    (workplace / "runs/toy").mkdir(parents=True)
    environment = {"PATH": f"{workplace}:{os.environ['PATH']}", "HOME": str(workplace), "SLURM_JOB_ID": "5"}
    environment |= {"SLURM_JOB_NODELIST": "n1", "SLURM_RESTART_COUNT": str(restarts)}
    done = subprocess.run(["bash", "-s"], input=job, text=True, capture_output=True, env=environment, cwd=workplace)
    assert done.returncode == ended, done
    assert (workplace / "requeued").exists() == (again and state == "RUNNING" and restarts < 3)
    assert len(done.stdout.splitlines()) == (0 if ended == 0 else 1)
    assert not list((workplace / "runs/toy").iterdir())
    if ended == 75:  # else srun would wait for the rank that hangs
        assert int((workplace / "worst").read_text()) == (75 if max(codes) > 1000 else 0)


# what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (("--nodse", "2", "--", *FIT), "submit: --nodse: no such option; nearest: --nodes"),
        (("--nodes", "0", "--", *FIT), "submit: --nodes 0: at least 1"),
        (("--time", "soon", "--", *FIT), "submit: --time soon: MINUTES, HOURS:MINUTES:SECONDS or "),
        (("--time", "2", "--", *FIT), "submit: --time 2: shorter than --signal-before 120 seconds"),
        (("--gpus-per-node", "all", "--", *FIT), "submit: --gpus-per-node all: a number, or TYPE:NUMBER"),
        (("--after", "last", "--", *FIT), "submit: --after last: expected a job number"),
        (("--array", "seed", "--", *FIT), "submit: --array seed: KEY=0..4 or KEY=a,b,c"),
        (("--array", "a=1,2", "--array", "a=3", "--", *FIT), "submit: --array a=3: a is given twice"),
        (("--sbatch", "nodes=3", "--", *FIT), "submit: --sbatch nodes=3: use --nodes"),
        (("--sbatch", "output=x", "--", *FIT), "submit: --sbatch output=x: the script sets it itself"),
        (("--nodes", "2"), "submit: no command: it comes after --"),
        (("--dry-run", "--", "fti"), "submit: fti: only fit, validate, test, predict can be submitted; nearest: fit"),
        (("--dry-run", "--", *FIT, "--trainer.devices", "3"), "submit: --trainer.devices: submit sets it itself"),
        (("--dry-run", "--", *FIT, "--resume", "never"), "submit: --resume: submit sets it itself"),
        (("--dry-run", "--", *FIT, "--model.scael", "2"), "--model.scael: ToyRecipe has no such key; nearest: scale"),
        (("--dry-run", "--array", "model.scale=1,big", "--", *FIT), "--model.scale: expected a number, got 'big'"),
        (
            ("--dry-run", "--nodes", "3", "--", "fit", "--config", "contrastive/emoji"),
            "data.batch_size: batch_size 256 is the whole step's, and 3 rank(s) x 1 micro-batch(es) do not divide it",
        ),
    ],
)
def test_wrong_requests_are_refused_before_submitting(cli: Cli, tools: Path, args: tuple[str, ...], line: str) -> None:
    assert cli("submit", *args).refusal.startswith(line)
    assert not (tools / "calls").exists() and not (tools / "runs").exists()


def test_without_slurm(cli: Cli, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert cli("submit", "--", *FIT).refusal.startswith("submit: sbatch is not on PATH")
    assert not (workplace / "runs").exists()


def test_a_refusal_of_sbatch_is_passed_on_and_leaves_no_script(cli: Cli, tools: Path) -> None:
    (tools / "bin/sbatch").write_text("#!/bin/bash\necho 'sbatch: error: invalid partition' >&2\nexit 1\n")
    assert cli("submit", "--partition", "nope", "--", *FIT).refusal == "sbatch: error: invalid partition"
    assert not list(tools.glob("runs/toy/*"))
