"""Trust has one gate: what a file says is judged, whoever's option it becomes. Each way in is listed here."""

from __future__ import annotations

import ast
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import descant
from descant.claims import run, spec
from descant.cli.arguments import read
from descant.cli.errors import Refusal
from descant.cli.precheck import precheck
from descant.cli.trust import guard
from descant.datamodules.sources.stream import Stream
from descant.modules.io.addresses import expand
from descant.modules.towers import PretrainedTower, TransformersTower
from descant.run import processes
from tests import hostile
from tests.conftest import TRUST, Result, settings_kept
from tests.modules.towers import folders
from tests.rotation import turn

Cli = Callable[..., Result]
PACKAGE = Path(descant.__file__).parent

# the list -----------------------------------------------------------------------------------------------------------

#: Kind of call -> file -> why nothing that a file says passes the gate there.
LISTED: dict[str, dict[str, str]] = {
    "an option by its key": {
        "cli/arguments.py": "pass_on marks what a file says; the rest are the parser's own words, after the check",
        "cli/completion.py": "what a Tab offers",
        "cli/document.py": "the place of an option in an error",
        "cli/helptext.py": "help",
        "claims/__init__.py": "lines of errors",
        "data/__init__.py": "keys that the user typed",
        "slurm/sbatch.py": "keys and values of --array, which the user typed",
        "slurm/submit.py": "the same, and lines of errors",
        "slurm/sweep.py": "keys and values of --vary, which the user typed",
    },
    "a request": {
        "__main__.py": "what the user typed",
        "claims/run.py": "the words of a run, checked before any run begins",
        "plan/plan.py": "what the user typed",
        "slurm/submit.py": "what the user typed, or claims and sweep for the user; the script has these words",
        "slurm/sweep.py": "what the user typed",
    },
    "YAML": {
        "modules/io/plain_yaml.py": "the reader of all others, within bounds",
        "cli/schema.py": "an option's text",
        "cli/main.py": "the configuration after the check",
        "cli/python.py": "the configuration after the check",
        "run/changes.py": "the configuration after the check",
        "run/folder.py": "the configuration after the check",
        "slurm/submit.py": "the configuration after the check",
        "run/groups.py": "settings for a table, in bounds of their own",
    },
    "a process": {
        "claims/registration.py": "git, of this checkout",
        "claims/run.py": "runs of a claim, whose options are marked",
        "claims/stages.py": "pytest, of this checkout",
        "cli/dump.py": "the schema",
        "run/processes.py": "descant, by words that its callers are listed for",
        "run/versions.py": "git and pip, of this checkout",
        "slurm/submit.py": "sbatch and squeue",
        "slurm/sweep.py": "runs of typed options",
        "datamodules/prepare/deb.py": "dpkg, on a package whose hash is known",
        "datamodules/prepare/npm.py": "npm, for a package whose hash is known",
        "datamodules/prepare/voices.py": "a voice's program, from a package whose hash is known",
        "datamodules/prepare/wheel.py": "pip, for a package whose hash is known",
        "datamodules/sources/addresses.py": "a pipe, where allow_pipes is set, which is guarded",
        "modules/policy/rewards.py": "a judge of programs, which no configuration may name",
    },
    "an address": {
        "datamodules/sources/addresses.py": "of Stream alone, each judged by the guard after its braces",
        "datamodules/sources/stream.py": "each judged by the guard after its braces",
        "datamodules/sources/object_store.py": "of Stream alone",
        "datamodules/sources/hub.py": "a class that no configuration may name",
        "modules/io/hub.py": "with --trust hub",
        "run/mirror.py": "checkpoint_mirror, which only the user may set elsewhere",
    },
}


def ways_in(tree: ast.AST) -> Iterator[str]:
    """Kinds of calls in a source by which the content of a file could become more than a value."""
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr) and len(node.values) > 1 and getattr(node.values[0], "value", "") == "--":
            yield "an option by its key"
        if isinstance(node, ast.ImportFrom) and node.module == "descant.cli.arguments":
            yield from ("a request" for name in node.names if name.name == "read")
        if not isinstance(node, ast.Call):
            continue
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        of = getattr(getattr(node.func, "value", None), "id", "")
        if (of == "yaml" and name == "load") or name in ("safe_load", "full_load", "unsafe_load", "load_all"):
            yield "YAML"
        if of == "subprocess" or (of, name) in (("os", "system"), ("os", "popen")) or name in (
            *("Popen", "execv", "execve", "posix_spawn", "run_beside", "gopen_pipe"),
        ):  # fmt: skip
            yield "a process"
        if of in ("fsspec", "requests", "urllib") or name in (
            *("urlopen", "urlretrieve", "open_object", "url_to_fs", "open_address", "snapshot_download"),
            *("create_connection", "StoreObject"),
        ):  # fmt: skip
            yield "an address"


def test_each_way_in_is_listed() -> None:
    """A file that begins a process, reads YAML, opens an address or makes an option has its reason above."""
    found: dict[str, set[str]] = {kind: set() for kind in LISTED}
    for file in _sources():
        for kind in ways_in(ast.parse(file.read_text(encoding="utf-8"))):
            found[kind].add(file.relative_to(PACKAGE).as_posix())
    for kind, files in found.items():
        assert sorted(files - set(LISTED[kind])) == [], f"{kind}: say why it cannot pass what a file says"
        assert sorted(set(LISTED[kind]) - files) == [], f"{kind}: no longer there"


def _sources() -> Iterator[Path]:
    for place, names, files in os.walk(PACKAGE, followlinks=True):
        names[:] = [name for name in names if name not in ("templates", "__pycache__")]
        yield from (Path(place, name) for name in files if name.endswith(".py"))


# options of a file --------------------------------------------------------------------------------------------------


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No process begins: what a claim or sweep would start is refused before."""

    def begun(*_: object, **__: object) -> None:
        raise AssertionError("a process began")

    monkeypatch.setattr(run, "run_beside", begun)
    monkeypatch.setattr(processes, "_process", begun)


PIPE = hostile.stream("pipe:touch ran", allow_pipes=True)


@pytest.mark.usefixtures("written_content", "alone")
@pytest.mark.parametrize(
    ("options", "line"),
    [
        (PIPE, "option data: a file may not set that: --trust shell lets"),
        ({"data.stream.allow_pipes": True}, "option data.stream.allow_pipes: a file may not set that: --trust shell"),
        ({"trust": "evilmod"}, "--of-file trust: only a user may type that; a file cannot trust itself"),
        ({"model.text.help": "evilmod.Tower"}, "--of-file model.text.help: only a user may type that"),
        (
            {"checkpoint_mirror": "/tmp/elsewhere"},
            "option checkpoint_mirror: /tmp/elsewhere is outside the run's folder",
        ),
        ({"trainer.callbacks+": {"class_path": "Resume", "init_args": {"folder": "/tmp/elsewhere"}}}, "--trust writes"),
        (
            {"trainer.callbacks+": {"class_path": "EarlyStopping", "dict_kwargs": {"x": 1}}},
            "option trainer.callbacks+: a file may not set them: --trust lightning",
        ),
    ],
)
@pytest.mark.parametrize("place", ["options", "arms", "lockbox"])
def test_options_of_a_claim_are_those_of_a_file(
    cli: Cli, workplace: Path, options: dict[str, Any], line: str, place: str
) -> None:
    content = hostile.replaced(hostile.CLAIM, ("arms", "method", "options") if place == "arms" else (place,), options)
    (workplace / "evil.yaml").write_text(yaml.safe_dump(content))
    before = sorted(workplace.rglob("*"))
    for words in ((), ("--slurm", "--time 60 --dry-run")):
        told = cli("claims", "run", "./evil.yaml", "--budget", "pilot", "--results", "results", *TRUST, *words).refusal
        assert line in told and not (workplace / "ran").exists()
        assert {path for path in workplace.rglob("*") if path.name != "results"} == set(before)
    word = next(word for word in spec.load("evil.yaml").command("method", 0, "full") if next(iter(options)) in word)
    assert word.startswith("--of-file=")


def test_the_user_may_trust_what_a_claim_says(cli: Cli, workplace: Path) -> None:
    (workplace / "mine.yaml").write_text(yaml.safe_dump(hostile.replaced(hostile.CLAIM, ("options",), PIPE)))
    words = spec.load("mine.yaml").command("method", 0, "pilot")
    request = read("fit", [*words, *TRUST, "--trust=shell"])
    with pytest.raises(Refusal, match="--trust shell"):
        checked(words, [])
    checked(words, ["shell"])
    assert not request.typed_options[:-1] and request.typed_options[-1] == ("seed_everything", "0")


def checked(words: list[str], trust: list[str]) -> None:
    from descant.cli import dump

    dump.write()
    known = dump.read("fit")
    assert known is not None
    request = read("fit", words)
    precheck(known, request.files, request.options, ["tests.toys", *trust])


@pytest.mark.usefixtures("written_content")
def test_a_job_keeps_the_trust_that_was_typed_and_no_more(cli: Cli, workplace: Path) -> None:
    """The script has the typed words; a saved configuration says nothing about trust."""
    words = ("submit", "--time", "60", "--dry-run", "--", "fit", "--config", "toy.yaml", *TRUST, "--trust", "writes")
    script = cli(*words).out
    assert "--trust tests.toys" in script and "--trust writes" in script
    assert cli("fit", "--config", "toy.yaml", "--name", "a", *TRUST, "--trust", "network").rc == 0
    file = workplace / "runs/a/001/config.yaml"
    assert "trust" not in file.read_text()
    file.write_text(file.read_text() + "trust: [os, shell]\n")
    for command in (("fit", "--resume", "auto"), ("validate",)):
        line = cli(*command, "--run", "a/001", *TRUST).refusal
        assert line.startswith("runs/a/001/config.yaml:") and "trust: a configuration cannot trust itself" in line


# addresses ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("address", hostile.ADDRESSES, ids=str)
def test_addresses_are_expanded_first_and_judged_then(address: Any) -> None:
    with pytest.raises(Refusal, match="--trust network"):
        guard("urls", address)
    with pytest.raises(Refusal, match="--trust network"):
        guard("anything", [[address]])


@pytest.mark.parametrize(
    "text", ["a photo of {}", "question: {q}", "file:///a.tar", "{a,b}/{0..9}.tar", "C:/a", "a: b"]
)
def test_other_texts_are_none(text: str) -> None:
    guard("urls", text)


@pytest.mark.parametrize("bomb", [*hostile.BOMBS, r"\{{1..1000},{1..1000}\}", "{0..99999}{,}", "\0{0..9}", "{a,b"])
def test_an_expansion_is_bounded_before_it_begins(bomb: str) -> None:
    with pytest.raises(ValueError, match=r"more than 100,000 addresses|Unbalanced"):
        expand(bomb)
    with pytest.raises(ValueError):
        Stream([bomb], samples=1)


def test_an_address_names_its_host() -> None:
    with pytest.raises(ValueError, match="no plain address"):
        Stream("http:/127.0.0.1/a.tar", samples=1)
    assert Stream("http://a/{{0..1},{5..9}}.tar", samples=1).urls[-1] == "http://a/9.tar"


# links --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("link", ["runs/a", "runs/a/001"])
def test_a_run_that_is_a_link_out_is_not_written_through(toy: Cli, cli: Cli, workplace: Path, link: str) -> None:
    assert toy("fit", "--name", "a").rc == 0
    outside = workplace / "outside"
    shutil.move(workplace / link, outside)
    (workplace / link).symlink_to(outside)
    before = {path: path.stat().st_mtime_ns for path in outside.rglob("*")}
    cases: list[tuple[str, ...]] = [
        ("fit", "--name", "a", "--resume", "auto"),
        ("fit", "--run", "a/001", "--resume", "auto"),
    ]
    cases += [("validate", "--run", "a/001"), ("validate", "--run", "runs/a/001")]
    cases += [("fit", "--name", "a")] if link == "runs/a" else []
    for command, *words in cases:
        line = toy(command, *words).refusal
        assert "a link out of runs; --trust writes lets a run write there" in line, line
    assert {path: path.stat().st_mtime_ns for path in outside.rglob("*")} == before
    assert toy("validate", "--run", "a/001", "--trust", "writes").rc == 0
    assert toy("validate", "--run", str(outside if link == "runs/a/001" else outside / "001")).rc == 0, (
        "the user typed it"
    )


def test_runs_may_be_a_link_themselves(toy: Cli, workplace: Path) -> None:
    (workplace / "scratch").mkdir()
    (workplace / "runs").symlink_to(workplace / "scratch")
    assert toy("fit", "--name", "a").rc == 0
    assert toy("fit", "--name", "a", "--resume", "auto").rc == 0 and toy("validate", "--run", "a/001").rc == 0


def test_a_log_is_not_written_through_a_link(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (workplace / "kept").write_text("mine")
    (workplace / "x.log").symlink_to(workplace / "kept")
    monkeypatch.setattr(processes, "_process", lambda *_: None)
    processes._start(processes.Task("x", (), workplace / "x.log"), 1).log.close()
    assert (workplace / "kept").read_text() == "mine" and not (workplace / "x.log").is_symlink()


def test_a_folder_of_a_model_that_is_a_link_out_is_not_read(tmp_path: Path) -> None:
    folders.sentence(tmp_path / "model")
    PretrainedTower(tmp_path / "model")
    shutil.move(tmp_path / "model/1_Pooling", tmp_path / "outside")
    (tmp_path / "model/1_Pooling").symlink_to(tmp_path / "outside")
    with pytest.raises(ValueError, match="'1_Pooling' is a link out of the folder"):
        PretrainedTower(tmp_path / "model")


# values of another type ---------------------------------------------------------------------------------------------

HUGE = f"0x{'f' * 400}"


@pytest.mark.parametrize("text", [f"seed_everything: {HUGE}", f"seed_everything: {HUGE * 1}{'f' * 5000}"])
def test_a_number_that_nothing_can_hold(toy: Cli, workplace: Path, text: str) -> None:
    (workplace / "x.yaml").write_text(text)
    assert toy("check", "--config", "x.yaml").refusal.startswith("x.yaml:1: ")
    assert toy("check", "--seed_everything", HUGE).rc == 2


@pytest.mark.parametrize("text", ["arms: {1: {}}", "metric: {name: a, better: lower, margin: 0xHUGE}", "a: 0x_",
                                  "title: 2026-99-99", "a: !!timestamp x", "{a: *b}", "{a: &a [*a]}"])  # fmt: skip
def test_a_claim_of_other_types_is_one_line(cli: Cli, workplace: Path, text: str) -> None:
    content = yaml.safe_dump({key: value for key, value in hostile.CLAIM.items() if f"{key}:" not in text})
    (workplace / "evil.yaml").write_text(f"{content}\n{text.replace('HUGE', 'f' * 400)}\n")
    assert cli("claims", "plan", "./evil.yaml").refusal.startswith("evil.yaml: ")


@pytest.mark.parametrize("name", ["../../x", "/tmp/x", "a/b", "..", "", "--trust", "a\nb"])
def test_an_arm_has_a_name_that_stays_where_it_is(cli: Cli, workplace: Path, name: str) -> None:
    (workplace / "evil.yaml").write_text(yaml.safe_dump(hostile.replaced(hostile.CLAIM, ("arms", name), {})))
    assert "arms: " in cli("claims", "plan", "./evil.yaml").refusal


@pytest.mark.parametrize("text", ["card: 2026-01-02", "extends: 2026-01-02", "node: 0xHUGE", "2026-01-02: 1", "a: 0x_"])
def test_a_card_of_other_types_is_one_line(cli: Cli, workplace: Path, text: str) -> None:
    (workplace / "card.yaml").write_text(text.replace("HUGE", "f" * 400))
    assert cli("plan", "--gpu", "card.yaml", "--", "fit", "--config", "toy.yaml").refusal.startswith("card.yaml: ")


BERT: dict[str, Any] = {
    "model_type": "bert",
    "vocab_size": 9,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


@pytest.mark.parametrize("index", ["[1]", '{"weight_map": [1]}', "3", None])
def test_a_model_whose_files_are_something_else(tmp_path: Path, index: str | None) -> None:
    TransformersTower(config=dict(BERT)).model.save_pretrained(tmp_path)
    if index is None:
        config = tmp_path / "config.json"
        config.write_text(config.read_text().replace('"gelu"', '"gelo"'))
    else:
        (tmp_path / "model.safetensors").rename(tmp_path / "model-1.safetensors")
        (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ValueError, match=r"cannot be read|index"):
        PretrainedTower(tmp_path, output="tokens", weights=index is not None)


def test_an_export_onto_a_full_disk_is_one_line(toy: Cli, cli: Cli, workplace: Path) -> None:
    assert toy("fit", "--name", "a").rc == 0
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (600, hard))
    try:
        line = cli("export", "a/001", "--out", "out", *TRUST).refusal
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "not written: File too large" in line and not (workplace / "out").exists()
    assert not list(workplace.glob(".out*"))


# the table ----------------------------------------------------------------------------------------------------------

#: Kind -> one of how many of its cases has its turn at a commit; ``DESCANT_ROTATION=all`` runs all, an hour.
TURNS = {"options": 100, "claims": 20, "hardware": 20, "configurations": 30, "links": 12, "data": 10,
         "exports": 60, "models": 300, "runs": 60}  # fmt: skip


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    top, before = tmp_path_factory.mktemp("hostile"), Path.cwd()
    with settings_kept():
        hostile.prepare(top)
    os.chdir(before)
    yield top


@pytest.mark.usefixtures("written_content")
@pytest.mark.parametrize(("kind", "of"), TURNS.items())
def test_nothing_hostile_has_an_effect(
    cli: Cli, prepared: Path, monkeypatch: pytest.MonkeyPatch, kind: str, of: int
) -> None:
    """Each of these cases runs nothing, connects to nothing, writes nowhere else, and is one line."""
    monkeypatch.chdir(prepared / "work")
    hostile.begin_here(monkeypatch)
    found = {case.name: why for case in turn(list(hostile.KINDS[kind]()), of) if (why := hostile.outcome(case))}
    assert found == {}


@pytest.mark.parametrize("file", ["config.yaml", "resume"])
def test_links_in_a_circle_are_one_line(toy: Cli, workplace: Path, file: str) -> None:
    assert toy("fit", "--name", "a").rc == 0
    at = workplace / "runs/a/001" / file
    at.rename(workplace / "away")
    at.symlink_to(at.name)
    for words in (("fit", "--name", "a", "--resume", "auto"), ("validate", "--run", "a/001")):
        done = toy(*words)
        assert done.rc in (0, 2) and "Traceback" not in done.err, done.err
