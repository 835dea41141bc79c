"""Names and environment as attack: nothing of them is run, nothing is written elsewhere, and each is one line.

The names are those of runs, folders, files, metrics and settings; the environment is what launchers leave there.
"""

from __future__ import annotations

import csv
import io
import json
import os
import random
import stat
import subprocess
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from descant.cli.errors import Refusal
from descant.run import elastic, runs
from tests.conftest import TOY, TRUST, Result
from tests.descant.report.test_compare import make
from tests.rotation import quick

Cli = Callable[..., Result]
pytestmark = pytest.mark.usefixtures("written_content")
ESCAPES = "\x1b[31m\x1b]0;owned\x07\u202e\u2066\x9b2J\x08"


def _outside(workplace: Path) -> list[str]:
    """All that lies about the folder and in the one above it, but its runs."""
    found = [*workplace.iterdir(), *workplace.parent.iterdir()]
    return sorted(str(path) for path in found if path.name not in ("runs", workplace.name))


#: Names of a run -> what the line says.
NAMES = {
    "..": "not a relative path below --runs DIR",
    ".": "not a relative path below --runs DIR",
    "../up": "not a relative path below --runs DIR; nearest: up",
    "a/../../up": "not a relative path below --runs DIR",
    "a/./b": "not a relative path below --runs DIR",
    "a//b": "not a relative path below --runs DIR",
    "/tmp/descant-elsewhere": "not a relative path below --runs DIR",
    "a\nb": "not printable; nearest: a-b",
    "a\rb": "not printable",
    "a\tb": "not printable",
    "a\x1b[31mb": "not printable",
    "a\u202eb": "not printable",
    "a\u2028b": "not printable",
    "a\x7fb": "not printable",
    "x" * 300: "longer than 200 bytes",
    "é" * 120: "longer than 200 bytes",
    "latest": "reserved; nearest: run-latest",
    "metrics.json": "reserved",
    "a/latest": "reserved",
    "001": "reserved; nearest: run-001",
    "2024": "reserved",
}


@pytest.mark.parametrize("name", quick(NAMES, 3), ids=lambda name: name.encode("unicode_escape").decode()[:20])
@pytest.mark.parametrize("command", ["fit", "check"])
def test_a_run_has_a_name_that_stays_where_it_is(toy: Cli, workplace: Path, command: str, name: str) -> None:
    before = _outside(workplace)
    line = toy(command, "--name", name).refusal
    assert line.startswith("--name ") and NAMES[name] in line and line.isprintable() and len(line) < 500
    assert _outside(workplace) == before and not list(Path("runs").glob("**/config.yaml"))


#: What may stand in a name is nothing but a name.
FINE = [
    "a; touch ran",
    "$(touch ran)",
    "`touch ran`",
    "-rf",
    "--help",
    "a b'c\"d",
    "%s%n{0}{x.__class__}",
    "😀",
    "a/b",
    "_",
]


def test_whatever_prints_is_a_name_and_no_more(workplace: Path) -> None:
    for name in FINE:
        runs.require_name(name)
        folder = runs.allocate(Path("runs") / name).folder
        assert folder.is_relative_to(workplace / "runs") and folder.name == "001"
    assert not (workplace / "ran").exists()


# the script of a cluster ----------------------------------------------------------------------------------------------


@pytest.fixture
def cluster(workplace: Path) -> dict[str, str]:
    """An environment in which srun and scontrol note what they are given."""
    tools = workplace / "tools"
    tools.mkdir()
    for tool in ("srun", "scontrol", "timeout"):
        (tools / tool).write_text(f'#!/bin/bash\nprintf "%s\\n" {tool} "$@" >> "{workplace}/said"\n')
        (tools / tool).chmod(0o755)
    slurm = {"SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": "n1", "SLURM_ARRAY_TASK_ID": "0"}
    return {"PATH": f"{tools}:/usr/bin:/bin", **slurm}


IN_SCRIPTS = [
    "a; touch ran",
    "$(touch ran)",
    "`touch ran`",
    "a' ; touch ran ; '",
    "a\\",
    "a && touch ran #",
    "${IFS}touch",
]


@pytest.mark.parametrize("text", quick(IN_SCRIPTS, 3))
@pytest.mark.parametrize("where", ["name", "runs", "array", "value"])
def test_a_script_runs_nothing_of_a_name(
    cli: Cli, workplace: Path, cluster: dict[str, str], text: str, where: str
) -> None:
    head = ["submit", "--time", "60", "--dry-run"]
    head += ["--array", f"name={text},b"] if where == "array" else []
    words = {"name": ["--name", text], "runs": ["--runs", text], "value": ["--data.folder", text], "array": []}[where]
    done = cli(*head, "--", "fit", "--config", "toy.yaml", *TRUST, *words)
    assert done.rc == 0, done.err
    Path("job.sh").write_text(done.out)
    assert all(line.startswith("#") or "#SBATCH" not in line for line in done.out.splitlines())
    said = [line for line in done.out.splitlines() if line.startswith("#SBATCH")]
    subprocess.run(["bash", "job.sh"], env=cluster, check=False, capture_output=True, timeout=30)
    assert not (workplace / "ran").exists() and text in (workplace / "said").read_text().splitlines()
    assert len(said) == len({line.partition("=")[0] for line in said})  # no option is said twice, or by a name


@pytest.mark.parametrize(
    "words",
    [
        ("--partition", "a\ntouch ran"),
        ("--account", 'a"b'),
        ("--qos", "a\x1b[31m"),
        ("--mem", "1\n#SBATCH --wrap=touch ran"),
        ("--sbatch", "comment=a\ntouch ran"),
        ("--setup", "true\ntouch ran"),
        ("--gpus-per-node", "$(touch ran)"),
        ("--after", "1; touch ran"),
        ("--time", "$(touch ran)"),
    ],
    ids=lambda words: words[0],
)
def test_options_of_sbatch_are_one_line_each(cli: Cli, workplace: Path, words: tuple[str, str]) -> None:
    base = () if words[0] == "--time" else ("--time", "60")
    line = cli("submit", *base, "--dry-run", *words, "--", "fit", "--config", "toy.yaml", *TRUST).refusal
    assert line.startswith("submit: ") and line.isprintable() and not (workplace / "ran").exists()


@pytest.mark.parametrize("job", ["1; touch ran", "$(touch ran)", "--format=x", "../x", "\x1b[31m", 7, None, ["1"]])
def test_a_job_that_a_file_names_is_a_number(workplace: Path, job: object, monkeypatch: pytest.MonkeyPatch) -> None:
    from descant.slurm import submit

    monkeypatch.setattr("shutil.which", lambda _: "/bin/false")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("a program was started"))
    Path("submit-001.json").write_text(json.dumps({"job": job, "tasks": {}}))
    with pytest.raises(Refusal, match=r"submit-001\.json: not written by submit: "):
        submit.waiting(Path())


# the environment ------------------------------------------------------------------------------------------------------

ENVIRONMENT: list[tuple[dict[str, str], str]] = [
    ({"RANK": "$(touch ran)"}, "RANK=$(touch ran) in the environment: expected a whole number"),
    ({"RANK": "1\n2"}, "RANK=1 2 in the environment"),
    ({"RANK": "-1"}, "RANK=-1 in the environment"),
    ({"RANK": "9" * 5000}, "in the environment: expected a whole number"),
    ({"RANK": "٣"}, "RANK=٣ in the environment"),
    ({"LOCAL_RANK": "../../x"}, "LOCAL_RANK=../../x in the environment"),
    ({"SLURM_PROCID": "\x1b[31m"}, "SLURM_PROCID=?[31m in the environment"),
    ({"SLURM_PROCID": "0", "SLURM_NTASKS": "`touch ran`"}, "SLURM_NTASKS=`touch ran` in the environment"),
    ({"TORCHELASTIC_RUN_ID": "a", "WORLD_SIZE": "two"}, "WORLD_SIZE=two in the environment"),
    ({"RANK": "1", "DESCANT_RUN_DIR": "no json"}, "DESCANT_RUN_DIR in the environment: not what"),
    ({"RANK": "1", "DESCANT_RUN_DIR": "[" * 50_000}, "DESCANT_RUN_DIR in the environment: not what"),
    ({"RANK": "1", "DESCANT_RUN_DIR": '["a"]'}, "DESCANT_RUN_DIR in the environment: not what"),
    ({"TORCHELASTIC_RESTART_COUNT": "$(touch ran)"}, "TORCHELASTIC_RESTART_COUNT=$(touch ran) in the environment"),
]


@pytest.mark.parametrize(
    ("values", "line"), ENVIRONMENT, ids=[f"{n}-{'-'.join(e)}" for n, (e, _) in enumerate(ENVIRONMENT)]
)
def test_the_environment_holds_what_launchers_leave_there(
    toy: Cli, workplace: Path, monkeypatch: pytest.MonkeyPatch, values: dict[str, str], line: str
) -> None:
    for key, value in values.items():
        monkeypatch.setenv(key, value)
    before = _outside(workplace)
    assert line in toy("fit").refusal
    assert _outside(workplace) == before and not list(Path("runs").glob("**/config.yaml"))


@pytest.mark.parametrize("text", ["../../../up", "/tmp/x", "a\nb", "*", "$(touch ran)", "x" * 400, ""])
@pytest.mark.parametrize("launcher", ["slurm", "torchrun"])
def test_the_note_of_ranks_lies_beside_the_runs(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, launcher: str, text: str
) -> None:
    if launcher == "slurm":
        values = {"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_JOB_ID": text, "SLURM_STEP_ID": text}
    else:
        values = {"RANK": "0", "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": text, "MASTER_PORT": text}
        values |= {"TORCHELASTIC_RESTART_COUNT": "0"}
    for key, value in values.items():
        monkeypatch.setenv(key, value)
    before = _outside(workplace)
    made = runs.agree(Path("runs/a"), lambda: runs.allocate(Path("runs/a")))
    notes = [path for path in Path("runs").rglob(".*") if path.is_file()]
    assert len(notes) == 1 and notes[0].parent == Path("runs/a") and _outside(workplace) == before
    if launcher == "torchrun":
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
        assert elastic.find_run_before_restart(Path("runs/a")) == made.folder
    runs.forget()


# what a stranger's folder prints --------------------------------------------------------------------------------------


@pytest.fixture
def stranger(workplace: Path) -> Iterator[str]:
    """A run whose name, metrics, settings and versions hold sequences of a terminal."""
    name = f"a{ESCAPES}\nb"
    config = {f"k{ESCAPES}": f"v{ESCAPES}\n=1"}
    metrics = {f"val/{ESCAPES}\n": 1.0, "=HYPERLINK(1)/r1": 0.5, "\uff1dcmd/r1": 0.25, " @x/r1": 0.5}
    for seed in range(2):
        folder = make(f"{name}/00{seed + 1}", seed, metrics, model__loss=config)
        (folder / "versions.json").write_text(json.dumps({f"x{ESCAPES}": f"y{ESCAPES}{seed}"}))
        (folder / "metrics.csv").write_text(f'step,"val/{ESCAPES}",b\n0,1,2\n5,2,3\n')
    make("b/001", 0)
    yield name


def _clean(text: str) -> bool:
    return all(line.isprintable() for line in text.split("\n"))


@pytest.mark.parametrize("style", ["markdown", "csv", "json"])
def test_compare_prints_no_control_characters_and_no_formulas(cli: Cli, stranger: str, style: str) -> None:
    done = cli("compare", "*", "--metrics", "*", "--format", style)
    assert done.rc == 0 and _clean(done.out) and _clean(done.err), done
    if style == "csv":
        cells = [cell for row in csv.reader(io.StringIO(done.out)) for cell in row]
        texts = [cell for cell in cells if not cell.replace(".", "").replace("-", "").replace("e", "").isdigit()]
        assert not any(cell.strip()[:1] in ("=", "+", "@", "\uff1d") and cell for cell in texts), texts
        assert any(cell.startswith("'=HYPERLINK") for cell in texts)


def test_nor_do_hints_report_and_missing_runs(cli: Cli, stranger: str) -> None:
    for words in (("compare", "a?b/001"), ("validate", "--run", "a"), ("report", "nope"), ("compare", f"{stranger}x")):
        done = cli(*words)
        assert done.rc == 2 and _clean(done.err) and len(done.err.splitlines()) == 1, done
    done = cli("report", "*", "--output", "page.html")
    assert done.rc == 0 and _clean(done.out) and _clean(done.err)
    page = Path("page.html").read_text()
    assert not any(letter in page for letter in "\x1b\x07\u202e\u2066\x9b\x08")


def test_nor_does_explain(cli: Cli, workplace: Path) -> None:
    Path("toy.yaml").write_text(
        TOY.replace("lr: 0.01", "lr: 0.01").replace("max_epochs: 2", "max_epochs: 2\n  default_root_dir: RUN/x\u202e")
    )
    done = cli("check", "--explain", "--config", "toy.yaml", *TRUST, "--data.folder", "toy.yaml", "--name", "a b")
    assert done.rc == 0 and _clean(done.out) and "RUN/x?" in done.out, done.err


class _Tags(HTMLParser):
    """Tags with the names of their attributes, as a browser meets them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: set[tuple[str, ...]] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.add((tag, *sorted(name for name, _ in attrs)))


def test_a_page_has_the_same_tags_whatever_a_run_is_called(cli: Cli, workplace: Path) -> None:
    lot = random.Random(0)
    parts = [
        *"<>&\"'=/!-`{",
        "script",
        "<img src=x onerror=y>",
        "</title>",
        "</pre>",
        "--><b>",
        "&lt;",
        "]]>",
        "javascript:",
    ]
    plain: set[tuple[str, ...]] = set()
    fuzzed: set[tuple[str, ...]] = set()
    for n in range(25):
        text = "x" if n == 0 else "".join(lot.choice(parts) for _ in range(lot.randrange(1, 12)))
        name = text.replace("/", "|") or "x"
        for folder in (f"{n}-{name}"[:60], f"{n}-other"):
            made = make(f"{folder}/001", 0, {f"val/{text}": 1.0, f"{text}/r1": 0.5}, model__loss=f"{text}{folder}")
            (made / "versions.json").write_text(json.dumps({text: text, "packages": {text: folder}}))
            writer = io.StringIO()
            csv.writer(writer).writerows([["step", f"val/{text}"], [0, 1], [5, 2]])
            (made / "metrics.csv").write_text(writer.getvalue())
        done = cli("report", str(workplace / "runs" / f"{n}-{name}"[:60]), f"{n}-other", "--output", f"{n}.html")
        assert done.rc == 0, (text, done.err)
        (plain if n == 0 else fuzzed).update(_Tags(Path(f"{n}.html").read_text()).found)
    assert fuzzed <= plain, fuzzed - plain


def test_a_device_or_socket_in_a_run_folder_is_not_read(cli: Cli, workplace: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root makes devices")
    folder: Any = make("a/001", 0)
    (folder / "metrics.json").unlink()
    os.mknod(folder / "metrics.json", 0o600 | stat.S_IFCHR, os.makedev(1, 5))  # /dev/zero
    assert "metrics.json cannot be read: not a regular file" in cli("compare", "a/001").refusal
