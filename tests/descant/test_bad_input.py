"""Bad words, files and folders, over all commands: each is one line that names the place, exit code 2, nothing written.

The counterpart of ``test_mistakes.py``, which draws slips of the pen by lot: here are inputs of the kinds that reach
parsers of other libraries, file systems or threads.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import socket
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import descant
from descant.cli.errors import Refusal, disk_fault, one_line, say
from descant.cli.trainer_parts import require_port
from descant.run import faults
from descant.run.changes import require_unchanged
from tests.conftest import TOY, TRUST, Result, captured, settings_kept
from tests.descant.report.test_compare import make
from tests.rotation import quick

DEEP = "[" * 50_000 + "]" * 50_000
DEEP_KEYS = '{"a":' * 50_000 + "1" + "}" * 50_000
#: Nine times nine ... values in ten lines.
ALIASES = "a: &a [1,2,3,4,5,6,7,8,9]\n" + "".join(
    f"{chr(98 + n)}: &{chr(98 + n)} [{','.join(['*' + chr(97 + n)] * 9)}]\n" for n in range(8)
)
#: A file that has a name and a content; a number is that of a pipe, and a text that begins with -> a link.
FILES: dict[str, bytes | str] = {
    "binary.yaml": bytes(range(256)),
    "deep.yaml": DEEP,
    "deep-keys.yaml": DEEP_KEYS,
    "aliases.yaml": ALIASES,
    "itself.yaml": "model: &a [*a]\n",
    "nul.yaml": "model: \0",
    "tab.yaml": "model:\n\t- x",
    "python.yaml": "model: !!python/object/apply:os.system [touch ran]",
    "large.yaml": "a: " + "x" * 11_000_000,
    "list.yaml": "[1, 2]",
    "no-zip.ckpt": "this is no archive",
    "empty.ckpt": "",
    "runs/deep/001/metrics.json": DEEP,
    "runs/deep-keys/001/metrics.json": DEEP_KEYS,
    "runs/digits/001/metrics.json": '{"val/r1": ' + "9" * 5000 + "}",
    "runs/digit/001/metrics.json": '{"val/r1": ' + "9" * 400 + "}",
    "runs/config-deep/001/config.yaml": DEEP[48_000:52_000],
    "runs/config-itself/001/config.yaml": "a: &a {b: *a}",
    "runs/config-aliases/001/config.yaml": ALIASES,
    "runs/config-binary/001/config.yaml": bytes(range(256)),
    "runs/config-python/001/config.yaml": "!!python/object/apply:os.system [touch ran]",
    "runs/config-pipe/001/config.yaml": "|",
    "runs/metrics-pipe/001/metrics.json": "|",
    "runs/curves-pipe/001/metrics.csv": "|",
    "runs/curves-binary/001/metrics.csv": bytes(range(256)) * 4,
    "runs/curves-quote/001/metrics.csv": 'step,a\n0,"' + "x\n" * 100_000,
    "runs/config-link/001/config.yaml": "->secret.yaml",
    "runs/metrics-link/001/metrics.json": "->secret.yaml",
    "runs/curves-link/001/metrics.csv": "->secret.yaml",
    "runs/good/001/metrics.csv": "step,val/r1\n0,1\n5,2\n",
    "secret.yaml": "password: hunter2\n",
    "page.html": "somebody's own page",
    "results/deep/balance-names.json": DEEP,
    "results/list/balance-names.json": "[1]",
    "results/words/balance-names.json": '{"digest": "x", "seconds": 1, "runs": {"method": {"0": {"steps": "x"}}}}',
    "results/pipe/balance-names.json": "|",
    "own/a.png": "no picture",
}
E = ("--config", "contrastive/emoji")
T = ("--config", "toy.yaml", *TRUST)
LATE = ("submit", "--time", "60", "--dry-run")
NUMBER = "9" * 5000

#: Words of a command, and what its line says.
CASES: list[tuple[tuple[str, ...], str]] = [
    # configurations
    (("check", "--config", "binary.yaml"), "binary.yaml: cannot be read: 'utf-8'"),
    (("check", "--config", "deep.yaml"), "deep.yaml:1: not valid YAML: "),
    (("check", "--config", "deep-keys.yaml"), "deep-keys.yaml:1: not valid YAML: "),
    (("fit", "--config", "aliases.yaml"), "aliases.yaml: more than 100,000 values"),
    (("fit", "--config", "itself.yaml"), "itself.yaml: nested too deeply"),
    (("fit", "--config", "nul.yaml"), "nul.yaml: not valid YAML"),
    (("predict", "--config", "tab.yaml"), "tab.yaml:2: not valid YAML"),
    (("check", "--config", "python.yaml"), "python.yaml:1: !!python/object/apply:os.system"),
    (("check", "--config", "large.yaml"), "large.yaml: cannot be read: larger than 10 MB"),
    (("check", "--config", "list.yaml"), "list.yaml: a configuration is a mapping"),
    (("check", "--config", "runs"), "--config runs: no such file"),
    (("check", "--config", "/dev/zero"), "--config /dev/zero: no such file"),
    (("check", "--explain", "--config", "deep.yaml"), "deep.yaml:1: not valid YAML"),
    # options of an experiment
    (("check", *T, "--seed_everything", NUMBER), "--seed_everything: expected"),
    (("check", *T, "--model.scale", "[" * 5000), "--model.scale: expected a number"),
    (("check", *T, "--model.scale", "inf"), "--model.scale: expected a number"),
    (("check", *T, "--=1"), "--: no such key"),
    (("check", *E, "--data.tokenizer", "x"), "--data.tokenizer: Emoji has no such key; nearest: text, a Tokenizer"),
    (("check", *E, "--data.token_dropuot", "1"), "Emoji has no such key; nearest: token_dropout"),
    (("check", *T, "--name", "a\0b"), "holds a NUL character"),
    (("check", *T, "--name", "a\udc80b"), "--name a?b: not printable"),
    (("check", *E, "--data", "3"), "--data: expected a class of kind LightningDataModule"),
    (("check", *E, "--data", "[1]"), "--data: expected a class of kind LightningDataModule"),
    (("check", *E, "--data", "null"), "no data: --config NAME"),
    (("check", *E, "--model.towers", "TimmTower"), "--model.towers: TimmTower is not of kind Towers; nearest: Towers"),
    (("check", *E, "--model.towers", "InfoNCE"), "--model.towers: "),
    (("check", *E, "--model.towers", "{image: {class_path: ViT}}"), "--model.towers: no class ViT of kind Tower"),
    (("check", *E, "--model.towers.image", "[]"), "--model.towers.image: expected a class of kind Tower"),
    (("fit", *T, "--trainer.devices", "-3"), "should be an int > 0"),
    (("fit", *T, "--trainer.devices", "0"), "devices='0'"),
    (("fit", *T, "--trainer.accelerator", "qpu"), "qpu"),
    (("fit", *T, "--trainer.strategy", "ddpx"), "ddpx"),
    (("fit", *T, "--trainer.val_check_interval", "999"), "val_check_interval"),
    (("fit", *T, "--trainer.accumulate_grad_batches", "0"), "accumulate_grad_batches 0: at least 1"),
    (("fit", *T, "--trainer.limit_train_batches", "-2"), "limit_train_batches"),
    (("fit", *T, "--trainer.max_time", "abc"), "abc"),
    (("check", *T, "--trainer.callbacks+", "LearningRateFinder"), "LearningRateFinder: recipes have no rate that it"),
    (("fit", *T, "--trainer.callbacks+", "BatchSizeFinder"), "BatchSizeFinder: it trains and goes back within a run"),
    # places
    (("fit", *T, "--runs", "toy.yaml"), "toy.yaml/toy: a run cannot be written there: Not a directory"),
    (("fit", *T, "--runs", "/proc/x"), "/proc/x"),
    (("fit", *T, "--runs", "x" * 300), "a run cannot be written there: File name too long"),
    (("validate", "--run", "x" * 5000), "no such run under runs"),
    (("validate", "--run", "a\nb"), "--run a b: no such run"),
    (("validate", "--run", "config-pipe/001", *TRUST), "cannot be read: not a regular file"),
    (("validate", "--run", "config-deep/001", *TRUST), "config.yaml:1: not valid YAML"),
    # checkpoints
    (("fit", *T, "--resume", "no-zip.ckpt"), "--resume no-zip.ckpt: no manifest"),
    (("fit", *T, "--resume", "empty.ckpt"), "--resume empty.ckpt: no manifest"),
    (("fit", *T, "--resume", "cut"), "--resume cut: no such checkpoint"),
    (("fit", *T, "--resume", "cut/001"), "it has no valid resume point (step-0000004.ckpt: 100 of "),
    (("validate", "--run", "cut/001", *TRUST), "runs/cut/001 has no whole checkpoint (0000004.ckpt: 100 of "),
    (("test", *T, "--ckpt_path", "runs"), "--ckpt_path runs: a folder"),
    (("predict", *T, "--ckpt_path", "last"), "--ckpt_path last: needs a run"),
    (("export", "toy/001", "--out", "toy.yaml", *TRUST), "it exists"),
    (("export", "toy/001", "--out", "x" * 300, *TRUST), "File name too long"),
    (("export", "toy/001", "--out", "out", "--ckpt", "nope", *TRUST), "nope: no such checkpoint"),
    (("export", "toy/001", "--out", "out", "--towers", "nope", *TRUST), "--towers nope: no such tower"),
    (("export", "config-deep/001", "--out", "out", *TRUST), "config.yaml: nested too deeply"),
    (("export", "secret.yaml", "--out", "out"), "secret.yaml: no config.yaml in "),
    # tables and pages of runs
    *(((c, "deep"), f"{c} deep/001: metrics.json cannot be read: nested too deeply") for c in ("compare", "report")),
    (("compare", "deep-keys"), "metrics.json cannot be read: nested too deeply"),
    (("compare", "digits"), "metrics.json cannot be read: Exceeds the limit"),
    (("compare", "digit"), "metrics.json cannot be read: int too large"),
    (("compare", "config-itself"), "config.yaml cannot be read: nested too deeply"),
    (("compare", "config-aliases"), "config.yaml cannot be read: more than 20,000 settings"),
    (("compare", "config-binary"), "config.yaml cannot be read: 'utf-8'"),
    (("compare", "config-python"), "config.yaml cannot be read: could not determine a constructor"),
    (("compare", "config-pipe"), "config.yaml cannot be read: not a regular file"),
    (("compare", "metrics-pipe"), "metrics.json cannot be read: not a regular file"),
    *(((c, "config-link"), "config.yaml cannot be read: a link out of its folder") for c in ("compare", "report")),
    (("compare", "metrics-link"), "metrics.json cannot be read: a link out of its folder"),
    (("report", "curves-link"), "its curves cannot be read: a link out of its folder"),
    (("report", "curves-pipe"), "its curves cannot be read: not a regular file"),
    (("report", "curves-binary"), "its curves cannot be read: 'utf-8'"),
    (("report", "curves-quote"), "its curves cannot be read: field larger"),
    (("report", "good", "--output", "page.html"), "--output page.html: exists and is not a report"),
    (("report", "good", "--output", "pipe.html"), "--output pipe.html: exists and is not a report"),
    (("report", "good", "--output", "/dev/full"), "--output /dev/full: exists and is not a report"),
    (("report", "good", "--output", "x" * 300), "cannot be written: File name too long"),
    (("compare", "x" * 5000), "no such run under runs"),
    (("compare", "["), "compare [: no such run under runs"),
    (("compare", "good", "--baseline", "a\nb\x1b[31m"), "--baseline a b?[31m: no such row or run"),
    (("compare", "good", "--metrics", "\x1b[31m\n"), "--metrics ?[31m : no run has it"),
    (("compare", "good", "--format", "tsv"), "--format tsv: no such format; nearest: csv"),
    (("list", "a\nb\x1b[31m"), "list a b?[31m: nothing that ships"),
    (("list", "--x\ny"), "--x y: list takes a group and words"),
    # claims
    *(
        (("claims", "list", "--results", f"results/{kind}"), f"results/{kind}/balance-names.json: no result of a claim")
        for kind in ("deep", "list", "words", "pipe")
    ),
    (("claims", "run", "../../etc/passwd"), "claims ../../etc/passwd: no such claim"),
    (("claims", "run", "bm-mae", "--jobs", "x"), "claims run: argument --jobs"),
    (("claims", "table", "--page", "/proc/x/y.md"), "no such file: /proc/x"),
    (("claims", "run", "bm-mae", "--budget", "pilot", "--results", "toy.yaml"), "toy.yaml"),
    # clusters and sweeps
    ((*LATE, "--", "export", "x"), "submit: export: only fit"),
    (("submit", "--time", NUMBER, "--dry-run", "--", "fit", *T), "MINUTES, HOURS:MINUTES:SECONDS"),
    ((*LATE, "--nodes", NUMBER, "--", "fit", *T), "argument --nodes: invalid int value"),
    ((*LATE, "--array", "seed_everything=0..99999999999", "--", "fit", *T), "more than 10,000 values"),
    ((*LATE, "--array", "a=0..999", "--array", "b=0..999", "--", "fit", *T), "1,000,000 combinations"),
    ((*LATE, "--gpus-per-node", "$(x)", "--", "fit", *T), "--gpus-per-node $(x): a number"),
    (("plan", "--gpu", "h1oo", "--", "fit", *T), "did you mean h100?"),
    (("plan", "--gpu", "pipe.html", "--", "fit", *T), "pipe.html"),
    (("plan", "--nodes", NUMBER, "--", "fit", *T), "--nodes"),
    (("sweep", *T, "--vary", "model.scale=0..99999999999"), "more than 10,000 values"),
    (("sweep", *T, "--vary", "model.scale=1", "--seeds", NUMBER), "at least 1, and at most 9999"),
    (("sweep", *T, "--vary", "model.scale=1", "--runs", "toy.yaml"), "--runs toy.yaml: runs cannot be written there"),
    (("sweep", *T, "--vary", "model.scale=1", "--slurm", "'"), "No closing quotation"),
    # data, templates, completion, schema
    (("data", "look", "nope"), "nope: no such"),
    (("data", "make", "own", "--out", "/proc/x/y"), "/proc/x"),
    (("data", "look", "x" * 300), "x" * 100),
    (("new", "recipe", "../x"), "not a name in snake_case"),
    (("new", "recipe", "a\nb"), "not a name in snake_case"),
    (("new", "callback", "a\u202eb"), "not a name in snake_case"),
    (("completion", "csh\x1b[31m"), "csh?[31m: no such shell"),
    (("schema", "x\ny"), "x y"),
    (("x\x1b[31m\ny",), "x?[31m y: no such command"),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, written_content: dict[str, Any]) -> Iterator[Path]:
    """A folder with a run of the toy, one that was cut, and all of FILES."""
    folder = tmp_path_factory.mktemp("bad")
    before = Path.cwd()
    os.chdir(folder)
    (folder / "toy.yaml").write_text(TOY)
    with settings_kept():
        assert captured("fit", *T, "--trainer.max_epochs", "1").rc == 0
    shutil.copytree("runs/toy/001", "runs/cut/001")
    for file in Path("runs/cut/001").rglob("*.ckpt"):
        file.write_bytes(file.read_bytes()[:100])
    for name, content in FILES.items():
        file = folder / name
        if name.startswith("runs/") and not file.parent.is_dir():
            make("/".join(name.split("/")[1:3]))
        file.parent.mkdir(parents=True, exist_ok=True)
        file.unlink(missing_ok=True)
        if content == "|":
            os.mkfifo(file)
        elif isinstance(content, str) and content.startswith("->"):
            file.symlink_to(folder / content[2:])
        else:
            file.write_bytes(content if isinstance(content, bytes) else content.encode())
    os.mkfifo(folder / "pipe.html")
    os.chdir(before)
    yield folder


@pytest.fixture
def typed(place: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Result]]:
    """``typed("fit", ...)`` in that folder; what waits for longer than half a minute is interrupted."""
    monkeypatch.chdir(place)

    def late(*_: object) -> None:
        raise AssertionError("it waits")

    handler = signal.signal(signal.SIGALRM, late)

    def call(*args: str) -> Result:
        signal.alarm(30)
        done = captured(*args)
        signal.alarm(0)
        return done

    with settings_kept():
        yield call
    signal.alarm(0)
    signal.signal(signal.SIGALRM, handler)


def _tree(folder: Path) -> list[str]:
    return sorted(str(path) for path in folder.rglob("*"))


def _shown(words: tuple[str, ...]) -> str:
    return " ".join(word if len(word) < 40 else f"{word[:20]}..." for word in words).encode("unicode_escape").decode()


@pytest.mark.parametrize(("words", "line"), quick(CASES, 3, ids=[_shown(words) for words, _ in CASES]))
def test_bad_input_is_one_line(typed: Callable[..., Result], place: Path, words: tuple[str, ...], line: str) -> None:
    before = _tree(place)
    result = typed(*words)
    assert line in result.refusal, result.err
    assert (
        result.err.startswith("descant: ") and "Traceback" not in result.err and result.err.rstrip("\n").isprintable()
    )
    assert len(result.err) < 1000 and not result.out.strip()
    assert _tree(place) == before


def test_the_table_is_of_all_commands() -> None:
    from descant.__main__ import COMMANDS

    assert {words[0] for words, _ in CASES} >= set(COMMANDS) and len(CASES) >= 60


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("nope", "nope: no such run"),
        ("runs/config-deep/001", "nested too deeply"),
        ("runs/config-binary/001", "not readable as YAML"),
        ("runs/config-python/001", "not readable as YAML"),
        ("secret.yaml", "no config.yaml in"),
        ("runs/good/001", "neither model.safetensors nor a checkpoint"),
    ],
)
def test_load_and_embedder_raise_one_line(typed: object, path: str, line: str) -> None:
    for read in (descant.load, descant.Embedder):
        with pytest.raises(ValueError) as caught:
            read(path, trust=["tests.toys"])
        assert line in str(caught.value) and "\n" not in str(caught.value)


def test_what_a_linked_configuration_holds_is_in_no_page(typed: Callable[..., Result], place: Path) -> None:
    shutil.copytree(place / "runs/good", place / "runs/versions", symlinks=True)
    try:
        for name in ("versions.json", "events.out.tfevents.1"):
            (place / "runs/versions/001" / name).symlink_to(place / "secret.yaml")
        os.mkfifo(place / "runs/versions/001/events.out.tfevents.2")
        done = typed("report", "versions", "--output", "told.html")
        assert done.rc == 0 and "hunter2" not in (place / "told.html").read_text()
        told = done.err.splitlines()
        assert any("versions.json is left out: a link out of its folder" in line for line in told)
        assert any("events.out.tfevents.1: a link out of its folder" in line for line in told)
        assert any("events.out.tfevents.2: not a regular file" in line for line in told)
    finally:
        shutil.rmtree(place / "runs/versions")
        (place / "told.html").unlink(missing_ok=True)


# a full disk ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EFBIG, errno.EIO])
def test_a_disk_that_takes_nothing_is_one_line_with_what_is_free(tmp_path: Path, code: int) -> None:
    error = RuntimeError("of a library")
    error.__context__ = OSError(code, os.strerror(code), b"/somewhere")
    line = disk_fault(error, tmp_path)
    assert line is not None and line.startswith(f"{tmp_path}: not written: {os.strerror(code)} (") and "free" in line
    assert disk_fault(OSError(errno.ENOENT, "no"), tmp_path) is None and disk_fault(ValueError("x"), tmp_path) is None


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_a_full_disk_under_tensorboard(
    toy: Callable[..., Result], workplace: Path, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its writer fails in a thread, which prints a traceback of its own, and again whenever it is closed."""
    from tensorboard.summary.writer.record_writer import RecordWriter

    write, left = RecordWriter.write, [6]

    def full(self: Any, data: bytes) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(code, os.strerror(code), b"events.out.tfevents.1")
        write(self, data)

    monkeypatch.setattr(RecordWriter, "write", full)
    options = ("--trainer.callbacks+", "Resume", "--trainer.callbacks.every", "1", "--trainer.max_epochs", "3")
    before, hook = threading.active_count(), threading.excepthook
    done = toy("fit", *options)
    monkeypatch.undo()
    os.chdir(workplace)
    (line,) = (line for line in done.err.splitlines() if "warning" not in line)
    assert done.rc == 2 and f"runs/toy/001: not written: {os.strerror(code)} (" in line and "GB free there" in line, (
        line
    )
    assert "; --resume auto goes on from step-" in line and threading.excepthook is hook
    assert threading.active_count() <= before + 1
    again = toy("fit", *options, "--resume", "auto")
    assert again.rc == 0, again.err


def test_a_port_that_is_taken_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(Refusal, match=rf"^MASTER_PORT {port}: in use on this machine; set another one, or none"):
            require_port(str(port))
    for text in ("$(touch ran)", "70000", "-1", "", "1\n2", "٣"):
        with pytest.raises(Refusal, match="not the number of a port"):
            require_port(text)
    require_port(None)


def test_ranks_refuse_a_taken_port_before_they_start(
    toy: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        monkeypatch.setenv("MASTER_PORT", str(taken.getsockname()[1]))
        line = toy("fit", "--trainer.devices", "2", "--trainer.strategy", "ddp").refusal
    assert line.startswith("MASTER_PORT ") and "in use on this machine" in line and not list(Path("runs").glob("*/0*"))


def test_torch_errors_about_a_port_are_one_line() -> None:
    class DistNetworkError(RuntimeError):
        pass

    text = "The server socket has failed to listen. port: 29511, useIpv6: false, code: -98, name: EADDRINUSE\n"
    line = faults.explain(DistNetworkError(text + "frame #1: c10d\n" * 58), building=False)
    assert line == "MASTER_PORT 29511: in use on this machine; set another one, or none for a free one"
    line = faults.explain(DistNetworkError("connect timed out\nframe #1"), building=False)
    assert line is not None and "connect timed out" in line and "\n" not in line


# the parser's own account ---------------------------------------------------------------------------------------------

ACCOUNTS = {
    'Parser key "data":\n\n  - Expected a path but 3 either not accessible or invalid\n  - Does not validate against '
    "any of the Union subtypes\n  Subtypes: [<class 'X'>]\n  Errors:\n    - Expected a dot import path string: 3\n"
    "  Given value type: <class 'str'>\n  Given value: 3": "data: Expected a dot import path string: 3",
    'Parser key "model":\n  Does not validate\n  Errors:\n    - Parser key "towers":\n    - Expected a <class '
    "'NoneType'>\n  Given value: NestedArg(key='towers', val='TimmTower')": (
        "model.towers: not accepted, got 'TimmTower'"
    ),
    "Parser key \"model\":\n  Does not validate\n  Errors:\n    - Expected a <class 'NoneType'>\n  Given value: "
    "Namespace(class_path='a.B', init_args=Namespace(" + "x=1, " * 400 + "))": (
        "model: not accepted, got a.B with arguments"
    ),
}


@pytest.mark.parametrize("text", ACCOUNTS, ids=["alone", "nested", "namespace"])
def test_the_account_of_a_parser_is_key_fault_and_value(text: str) -> None:
    assert faults.parse_fault(text) == ACCOUNTS[text]


def test_errors_of_files_are_one_line_with_their_place_and_others_keep_their_traceback() -> None:
    assert one_line(PermissionError(13, "Permission denied", "a.yaml")) == "a.yaml: Permission denied"
    assert one_line(RecursionError("maximum recursion depth exceeded")) == "nested too deeply"
    assert one_line(MemoryError()) == "out of memory"
    for error in (zipfile.BadZipFile("x"), EOFError("x"), MemoryError(), RecursionError(), UnicodeError("x")):
        line = faults.outside(error)
        assert line is not None and "--debug" in line
    assert all(faults.outside(error) is None for error in (KeyError("x"), TypeError("x"), AssertionError("x")))


def test_debug_keeps_the_traceback(typed: Callable[..., Result]) -> None:
    with pytest.raises(OSError):
        typed("claims", "table", "--page", "/proc/x/y.md", "--debug")


def test_a_line_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    say("a\nb\x1b[2J\u202e" + "x" * 5000)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("descant: a b?[2J?xxx") and line.isprintable() and len(line) < 500


# what differs in a resume ---------------------------------------------------------------------------------------------


def _callback(name: str, **args: object) -> dict[str, object]:
    return {"class_path": f"descant.callbacks.{name}", "init_args": args}


def test_callbacks_that_differ_are_one_line_whatever_their_places(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = [_callback(name, **{f"k{n}": n for n in range(12)}) for name in ("Report", "Progress", "Sanity", "Resume")]
    then = {"trainer": {"callbacks": common}, "data": {"init_args": {"size": 1}}}
    now = {"trainer": {"callbacks": [_callback("KNN", k=3), *common[:-1], _callback("EMA")]}, "data": {"size": 1}}
    (tmp_path / "run/resume").mkdir(parents=True)
    (tmp_path / "run/config.yaml").write_text(json.dumps(then))
    with pytest.raises(Refusal, match=r"^--resume: 5 setting\(s\) differ from the run's own; --changed allow"):
        require_unchanged(tmp_path / "run/resume/step-0000001.ckpt", json.dumps(now), False)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert "trainer.callbacks: without Resume here, KNN only here, EMA only here; the run's own: --config " in lines[-1]
    require_unchanged(tmp_path / "run/resume/step-0000001.ckpt", json.dumps(now), True)


def test_many_settings_are_a_line_a_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def config(value: object, callbacks: list[object]) -> dict[str, object]:
        keys = {f"k{n}": value for n in range(30)}
        trainer = {**keys, "callbacks": callbacks}
        return {"model": {"init_args": dict(keys)}, "data": dict(keys), "trainer": trainer, "seed_everything": value}

    (tmp_path / "config.yaml").write_text(json.dumps(config(1, [_callback("A")])))
    with pytest.raises(Refusal, match=r"93 setting\(s\) differ"):
        require_unchanged(tmp_path / "resume/a.ckpt", json.dumps(config("\x1b[31m", [_callback("B")])), False)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4 and all(line.isprintable() and len(line) < 400 for line in lines)  # the refusal is the fifth
    assert [line.split()[1] for line in lines] == ["model:", "data:", "trainer:", "trainer.callbacks:"]
    assert all("the run's own: --config" in line for line in lines) and "and 26 more" in lines[0]


# near misses ----------------------------------------------------------------------------------------------------------

NEAR = {
    "ftt": "fit",
    "chek": "check",
    "repport": "report",
    "comprae": "compare",
    "lst": "list",
    "exprot": "export",
    **{f"fit {' '.join(E)} --{word} 1": "config" for word in ("confg", "confgi", "conf", "cofnig")},
    f"fit {' '.join(E)} --resum auto": "resume",
    f"fit {' '.join(E)} --naem x": "name",
    f"fit {' '.join(E)} --runss x": "runs",
    f"fit {' '.join(E)} --debugg": "--debug",
    f"check {' '.join(E)} --explan": "--explain",
    f"check {' '.join(E)} --trus x": "trust",
    f"fit {' '.join(E)} --trian.max_steps 1": "trainer",
    f"fit {' '.join(E)} --trainer.max_stpes 1": "max_steps",
    f"fit {' '.join(E)} --trainer.devics 1": "devices",
    f"fit {' '.join(E)} --seed 1": "seed_everything",
    f"fit {' '.join(E)} --epochs 1": "trainer.max_epochs",
    f"fit {' '.join(E)} --max_steps 1": "trainer.max_steps",
    f"fit {' '.join(E)} --batch_size 8": "data.batch_size",
    f"fit {' '.join(E)} --lr 1": "model.optimizer.lr",
    f"fit {' '.join(E)} --devices 1": "trainer.devices",
    f"fit {' '.join(E)} --precision 16": "trainer.precision",
    "fit --config contrastiv/emoji": "contrastive/emoji",
    "fit --config contrastive-emoji": "contrastive/emoji",
    f"fit {' '.join(E)} --config on/tny": "on/tiny",
    f"fit {' '.join(E)} --config with/train/siglp": "with/train/siglip",
    f"fit {' '.join(E)} --data emojis": "Emoji",
    f"fit {' '.join(E)} --model Contrastiv": "Contrastive",
    f"fit {' '.join(E)} --model.optimizer AdmW": "AdamW",
    f"fit {' '.join(E)} --model.loss InfoNCEE": "InfoNCE",
    f"fit {' '.join(E)} --model.towers.image ConvTwer": "ConvTower",
    f"fit {' '.join(E)} --trainer.callbacks+ retrieval": "Retrieval",
    f"fit {' '.join(E)} --trainer.logger TensorbordLogger": "TensorBoardLogger",
    "test --ckpt best": "ckpt_path",
    "compare x --metric a": "--metrics",
    "compare x --basline a": "--baseline",
    "report x --ouput y": "--output",
    "export x --ot y": "--out",
    f"sweep {' '.join(E)} --vry a=1": "--vary",
    f"sweep {' '.join(E)} --vary a=1 --seds 1": "--seeds",
    "submit --tme 9 -- fit": "--time",
    "submit --dry-run --time 9 -- fti": "fit",
    "claims rn": "run",
    "claims run harmony-fuson": "harmony-fusion",
    "claims run bm-mae --budgt pilot": "--budget",
    "claims run bm-mae --budget pilto": "pilot",
    "claims run headroom-naems": "headroom-names",
    "new recip x": "recipe",
    "data mke x": "make",
    "data make x --outt y": "--out",
    "completion bsah": "bash",
    "list recipies": "recipes",
}


@pytest.mark.parametrize("words", quick(NEAR, 3))
def test_a_near_miss_names_the_nearest(typed: Callable[..., Result], words: str) -> None:
    assert typed(*words.split()).refusal.endswith(f"; nearest: {NEAR[words]}")
