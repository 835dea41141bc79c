"""Text of a SLURM job script: sbatch options, ranks started by srun, and requeueing."""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from descant.cli.errors import fail

_START = r"""
trap : TERM USR1 INT  # the ranks handle signals and save; this script waits for them
unset ${!MASTER_@} ${!TORCHELASTIC_@} RANK LOCAL_RANK WORLD_SIZE DESCANT_RUN_DIR
export MASTER_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK  # srun does not inherit it
export ended="$folder/.ended-$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}"
# made when a rank hangs (Watch), or has no more data as a store does not answer
export DESCANT_HUNG="$folder/.hung-$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}"

# One rank. The first to end records its exit code: srun reports the highest, which may be of a rank that srun killed.
# A rank that saved (75, 130, 143) exits with 0, or srun would kill the others while they save; not where one stands
# still, which srun has to kill.
rank() {
  trap : TERM USR1 INT
  "$@"
  local code=$?
  [ $code -eq 0 ] || (set -o noclobber; echo $code > "$ended") 2> /dev/null || [ -e "$ended" ] || exit $code
  [ ! -e "$DESCANT_HUNG" ] || exit $code
  case $code in 75 | 130 | 143) exit 0 ;; *) exit $code ;; esac
}
export -f rank
"""
_END = r"""
code=$?
if [ -s "$ended" ]; then code=$(cat "$ended"); elif [ $code -ne 0 ]; then code=137; fi  # no rank could record a code
[ ! -e "$DESCANT_HUNG" ] || code=75  # also where another rank was the first to end, as it lost that one
rm -f "$ended" "$DESCANT_HUNG"
# A rank may end with 1 because the node of another is gone: do all nodes answer?
[ $code -ne 1 ] || timeout 60 srun --overlap --ntasks-per-node=1 true || code=137

job=$(scontrol show job --oneliner "$SLURM_JOB_ID")
if [ $code -eq 0 ]; then
  [ -z "$mark" ] || : > "$mark"
  exit 0
elif [ $code -ne 75 ] && { [ $code -le 128 ] || [ $code -eq 130 ]; }; then
  echo "descant: ended with $code: not requeued"  # an error, a wrong request, or stopped by the user
elif [[ " $job " != *" JobState=RUNNING "* && " $job " != *" Reason=TimeLimit "* ]]; then
  echo "descant: ended with $code: left to SLURM"  # cancelled, or SLURM requeues it itself: preempted, a lost node
elif [ "${SLURM_RESTART_COUNT:-0}" -ge "$requeues" ]; then
  echo "descant: ended with $code: not requeued after $requeues restarts"
elif scontrol requeue "$SLURM_JOB_ID"; then
  echo "descant: ended with $code: requeued"
else
  echo "descant: ended with $code: not requeued, as scontrol cannot"
fi
exit $code
"""


def script(
    given: argparse.Namespace,
    stage: Sequence[str],
    folder: Path,
    grid: Sequence[Mapping[str, str]] = (),
    head: str = "",
    marks: Sequence[Path] = (),
) -> str:
    """Return the text of a job script.

    Args:
        given: the options of ``descant submit``.
        stage: the command and its arguments.
        folder: for its runs, the script and the log.
        grid: for an array, the options of each task.
        head: a comment, such as the submitting command.
        marks: for an array, the file that each task creates on success.
    """
    parts = ["#!/bin/bash", f"# {head}".replace("\n", " "), *_options(given, folder, len(grid)), ""]
    parts += [f"folder={shlex.quote(str(folder))} requeues={given.requeues} mark=", *given.setup, _START.strip(), ""]
    if grid:
        words = [shlex.join(part for key, value in task.items() for part in (f"--{key}", value)) for task in grid]
        ends = [f"; mark={shlex.quote(str(mark))}" for mark in marks] or [""] * len(words)
        cases = (f"  {n}) set -- {text}{end} ;;" for n, (text, end) in enumerate(zip(words, ends, strict=True)))
        parts += ['case "$SLURM_ARRAY_TASK_ID" in', *cases]
        parts += ["esac", ""]
    return "\n".join([*parts, _step(given, *stage), _END.strip(), ""])


def _options(given: argparse.Namespace, folder: Path, tasks: int) -> list[str]:
    span = f"0-{tasks - 1}" + (f"%{given.at_once}" if given.at_once else "") if tasks else ""
    options = {
        "job-name": folder.name,
        "chdir": str(Path.cwd()),
        "output": f"{str(folder).replace('%', '%%')}/slurm-{'%A_%a' if tasks else '%j'}.log",
        "open-mode": "append",
        "nodes": given.nodes,
        "ntasks-per-node": given.tasks_per_node,
        "signal": f"USR1@{given.signal_before}",
        "array": span,
        **{key: getattr(given, key.replace("-", "_")) for key in ("gpus-per-node", "cpus-per-task", "mem", "time")},
        **{key: getattr(given, key) for key in ("partition", "account", "qos")},
    }
    lines = [f"#SBATCH --{key}={_quote(str(value))}" for key, value in options.items() if value]
    lines += ["#SBATCH --requeue", "#SBATCH --kill-on-invalid-dep=yes"]
    return lines + [f"#SBATCH --{option.removeprefix('--')}" for option in given.sbatch]


def _quote(text: str) -> str:
    if not text.isprintable() or '"' in text:  # a second line would be run
        fail(f"submit: {text!r}: printable characters only, without quotation marks")
    return f'"{text}"' if re.search(r"\s", text) else text


def _step(given: argparse.Namespace, command: str, *args: str) -> str:
    """Return the srun command, one option per line."""
    rest = list(args)
    if command == "fit":  # after the experiment, which names the run, and before overlays
        first = next((n for n, arg in enumerate(rest) if arg.partition("=")[0] in ("--config", "-c")), len(rest))
        after = first + (1 if "=" in "".join(rest[first : first + 1]) else 2)
        rest[after:after] = ["--config", "on/slurm"]
    rest += ["--trainer.num_nodes", str(given.nodes), "--trainer.devices", str(given.tasks_per_node)]
    lines = [f"{shlex.quote(sys.executable)} -P -m descant {command}"]
    for arg in rest:
        if arg.startswith("--") or arg == "-c":
            lines.append(shlex.quote(arg))
        else:
            lines[-1] += f" {shlex.quote(arg)}"
    return " \\\n  ".join(["srun --kill-on-bad-exit=1 bash -c 'rank \"$@\"' rank", *lines, '"$@"'])
