"""Mutation tests: core lines are replaced by what a lazy author would write, one at a time, and the tests must fail.

    python -m tests.mutants                   all of them; exit code 1 if one survives, or no longer fits its file
    python -m tests.mutants --only NAME       one by its name; may be said again
    python -m tests.mutants --list            names, files and why each line matters
    python -m tests.mutants --jobs 2          so many at a time

The list is tests/mutants.yaml. Each job replaces lines in a copy of the tree in a temporary folder, so the working tree
is never written, however this process ends. In the end the tests that failed are run once more, without any
replacement, and must pass: a test that always fails catches nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

TOP = Path(__file__).resolve().parent.parent
LIST = Path(__file__).with_suffix(".yaml")
#: Which tests of a file are run, unless an entry says another expression, such as "ddp and not slow".
MARKS = "not slow and not gpu"
#: Seconds after which the tests of one entry are ended: a mutant that hangs is not caught, since nobody says where.
LONGEST = 1800.0
#: In the environment of pytest: the file that failed tests are written to.
_FAILED = "MUTANTS_FAILED"


@dataclass(frozen=True)
class Mutant:
    """One replacement.

    Attributes:
        name: of the entry. file: the real path below the top folder, no link. why: what would go wrong.
        old: text that is in the file exactly once. new: what takes its place.
        tests: files of tests, the nearest first; of a slow file one test. marks: which are run (pytest's -m).
    """

    name: str
    file: str
    why: str
    old: str
    new: str
    tests: tuple[str, ...]
    marks: str = MARKS

    def applied(self, text: str) -> str:
        """The file's text with the replacement. Raises ValueError unless ``old`` is in it exactly once."""
        count = text.count(self.old)
        if count != 1:
            raise ValueError(f"{self.name}: its text is {count} times in {self.file}; exactly once is needed")
        return text.replace(self.old, self.new)


@dataclass(frozen=True)
class Outcome:
    """What came of one mutant: ``caught``, or why not; the tests that failed; seconds; the end of pytest's output."""

    mutant: Mutant
    verdict: str
    failed: tuple[str, ...] = ()
    seconds: float = 0.0
    output: str = ""

    @property
    def caught(self) -> bool:
        return self.verdict == "caught"


def load(file: Path = LIST) -> list[Mutant]:
    """The entries of a list. Raises TypeError for one with an unknown key or without a needed one."""
    entries: list[dict[str, Any]] = yaml.safe_load(file.read_text(encoding="utf-8"))
    return [Mutant(**{**entry, "tests": tuple(entry["tests"])}) for entry in entries]


# running ------------------------------------------------------------------------------------------------------------


def copy_tree(to: Path) -> None:
    """All files that git tracks or would, links as links."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=TOP, capture_output=True, check=True).stdout.decode()
    for name in filter(None, listed.split("\0")):
        if os.path.lexists(TOP / name):  # else it is deleted here, and still in git
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(TOP / name, to / name, follow_symlinks=False)


@contextlib.contextmanager
def replaced(mutant: Mutant, tree: Path) -> Iterator[None]:
    """Inside, a copy of the tree has the replacement. Times of the file differ, so that no bytecode outlives it."""
    file = tree / mutant.file
    text, before = file.read_text(encoding="utf-8"), file.stat()
    try:
        file.write_text(mutant.applied(text), encoding="utf-8")
        os.utime(file, (before.st_atime, before.st_mtime + 10))
        yield
    finally:
        file.write_text(text, encoding="utf-8")
        os.utime(file, (before.st_atime, before.st_mtime))


class Runner:
    """Runs pytest in copies of the tree, each used by one job at a time, and ends what it started."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.ended = folder, False
        self._free: queue.SimpleQueue[Path] = queue.SimpleQueue()
        self._running: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()

    def add_tree(self, name: str) -> None:
        copy_tree(self.folder / name)
        self._free.put(self.folder / name)

    def mutated(self, mutant: Mutant) -> Outcome:
        """The nearest tests of one mutant, until the first that fails."""
        tree, begin = self._free.get(), time.monotonic()
        try:
            with replaced(mutant, tree):
                code, failed, output = self._pytest(tree, ["-x", "-m", mutant.marks, *mutant.tests])
        except ValueError as error:
            return Outcome(mutant, "no match", output=str(error))
        finally:
            self._free.put(tree)
        verdict = {0: "SURVIVED", 1: "caught", None: f"no end in {LONGEST:.0f} s"}.get(
            code, f"pytest exits with {code}"
        )
        return Outcome(mutant, verdict, failed, time.monotonic() - begin, output)

    def control(self, tests: Sequence[str]) -> str | None:
        """What is wrong with these tests in the tree as it is; None if they pass."""
        tree = self._free.get()
        code, _, output = self._pytest(tree, list(tests))
        self._free.put(tree)
        return None if code == 0 else f"no end in {LONGEST:.0f} s\n{output}" if code is None else output

    def _pytest(self, tree: Path, args: Sequence[str]) -> tuple[int | None, tuple[str, ...], str]:
        with tempfile.TemporaryDirectory(dir=self.folder, ignore_cleanup_errors=True) as scratch:
            failed, told = Path(scratch, "failed"), Path(scratch, "output")
            environment = {key: value for key, value in os.environ.items() if key != "DESCANT_CACHE"}
            # caches of its own: what is made of a mutated file must not be read by the next
            environment |= {"PYTHONPATH": str(tree), "XDG_CACHE_HOME": scratch, _FAILED: str(failed)}
            command = [sys.executable, "-m", "pytest", "-p", "tests.mutants", "--tb=short", *args]
            with told.open("w") as out:  # no pipe, which a process that outlives its test would keep open
                how: Mapping[str, Any] = {"stdout": out, "stderr": subprocess.STDOUT, "start_new_session": True}
                with self._lock:
                    if self.ended:
                        raise KeyboardInterrupt
                    process = subprocess.Popen(command, cwd=tree, env=environment, **how)
                    self._running.add(process)
            code: int | None = None
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = process.wait(LONGEST)
            with self._lock:
                _kill(process)
                self._running.discard(process)
            process.wait()
            found = failed.read_text(encoding="utf-8").splitlines() if failed.exists() else []
            output = told.read_text(encoding="utf-8", errors="replace")
        return code, tuple(dict.fromkeys(found)), output[-3000:]

    def end(self) -> None:
        """Kill what is running; nothing more is started."""
        with self._lock:
            self.ended = True
            for process in self._running:
                _kill(process)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """With all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def pytest_runtest_logreport(report: Any) -> None:
    """As a plugin of the pytest that runs a mutant: note the ids of failed tests, which its output cuts short."""
    if report.failed and _FAILED in os.environ:
        with Path(os.environ[_FAILED]).open("a", encoding="utf-8") as file:
            file.write(f"{report.nodeid}\n")


# the command line ---------------------------------------------------------------------------------------------------


def chosen(mutants: Sequence[Mutant], names: Sequence[str]) -> list[Mutant]:
    """Those with these names, all without any. Raises ValueError naming an unknown one and the nearest."""
    known = {mutant.name: mutant for mutant in mutants}
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise ValueError(f"--only {name}: no such mutant{f'; nearest: {near[0]}' if near else ''} (--list)")
    return [known[name] for name in dict.fromkeys(names)] or list(mutants)


def run(mutants: Sequence[Mutant], jobs: int, tell: Callable[[str], None] = print) -> int:
    """Run them all and tell what came of each. Returns the exit code."""
    begin, outcomes = time.monotonic(), list[Outcome]()
    with tempfile.TemporaryDirectory(prefix="descant-mutants-", ignore_cleanup_errors=True) as folder:
        runner = Runner(Path(folder))
        for number in range(min(jobs, len(mutants))):
            runner.add_tree(f"tree-{number}")
        with ThreadPoolExecutor(jobs) as pool:
            waiting = [pool.submit(runner.mutated, mutant) for mutant in mutants]
            try:
                for done in as_completed(waiting):
                    outcomes.append(found := done.result())
                    by = f"  by {found.failed[0]}" if found.failed else ""
                    tell(f"{found.verdict:9} {found.seconds:6.1f} s  {found.mutant.name}  {found.mutant.file}{by}")
                    if not found.caught:
                        tell(found.output)
                catchers = list(dict.fromkeys(test for found in outcomes for test in found.failed))
                fault = runner.control(catchers) if catchers else None
            except BaseException:
                runner.end()
                pool.shutdown(cancel_futures=True)
                raise
    caught = sum(found.caught for found in outcomes)
    if fault is not None:
        tell(f"without any replacement the tests that failed do not pass:\n{fault}")
    seconds = f"{time.monotonic() - begin:.0f} s, {jobs} at a time"
    passes = "" if fault is not None else ", and without a replacement the same tests pass"
    tell(f"{caught} of {len(mutants)} caught{passes}: {seconds}")
    missed = [found.mutant.name for found in outcomes if not found.caught]
    if missed:
        tell(f"not caught: {', '.join(missed)}")
    return int(bool(missed) or fault is not None)


def main(args: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description="Mutation tests of the core lines.")
    parser.add_argument(
        "--only", action="append", default=[], metavar="NAME", help="one by its name; may be said again"
    )
    parser.add_argument("--list", action="store_true", help="names, files and why each line matters")
    parser.add_argument("--jobs", type=int, default=1, help="how many at a time")
    given = parser.parse_args(args)
    if given.jobs < 1:
        parser.error(f"--jobs {given.jobs}: at least 1")
    try:
        mutants = chosen(load(), given.only)
    except ValueError as error:
        parser.error(str(error))
    if given.list:
        for mutant in mutants:
            print(f"{mutant.name}  {mutant.file}: {mutant.why}")
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that children are ended and copies removed
    return run(mutants, given.jobs, lambda line: print(line, flush=True))


if __name__ == "__main__":
    sys.exit(main())
