"""``descant new``: names, what is written, and that it works as it stands."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from descant.cli.new import KINDS, camel, fault, render, suggestion
from tests.conftest import Result
from tests.rotation import by_turns, quick

Cli = Callable[..., Result]
ROOT = Path(__file__).parents[3]
#: A name for each kind; their lengths differ, since lines and imports must stay in order whatever is written in them.
NAMES = {
    "recipe": "a_pair",
    "callback": "zz",
    "datamodule": "corpus_of_many_coloured_squares",
    "tower": "patches_with_an_mlp",
    "field": "a_cell_of_numbers",
}
each_kind = pytest.mark.parametrize("kind", list(KINDS))


@pytest.fixture(autouse=True)
def forget() -> None:
    for name in NAMES.values():
        sys.modules.pop(name, None)


def files(name: str) -> list[str]:
    return sorted([f"{name}.py", f"{name}.yaml", f"test_{name}.py"])


# what is written ------------------------------------------------------------------------------------------------


@each_kind
def test_three_files_and_what_to_type_next(cli: Cli, workplace: Path, kind: str) -> None:
    name, before = NAMES[kind], {path.name for path in workplace.iterdir()}
    result = cli("new", kind, name)
    assert result.rc == 0, result.err
    assert sorted(path.name for path in workplace.iterdir() if path.name not in before) == files(name)
    wrote, following, test, train = result.out.splitlines()
    assert wrote == f"wrote {name}.py, {name}.yaml and test_{name}.py"
    assert following == "next:"
    assert test == f"  python -m pytest test_{name}.py"
    assert train.startswith("  descant fit --config ") and train.endswith(f"--config {name}.yaml --trust {name}")


@each_kind
def test_nothing_of_the_template_is_left_but_its_content(kind: str) -> None:
    name, stem = NAMES[kind], KINDS[kind]
    for file, text in render(kind, name).items():
        for rest in (stem, camel(stem), "descant.templates", "TODO"):
            assert rest not in text, f"{file}: {rest}"
    same = {file: (ROOT / "descant/templates" / kind / file).read_text() for file in files(stem)}
    assert render(kind, stem) == {f: text.replace(f"descant.templates.{kind}.", "") for f, text in same.items()}


@each_kind
def test_its_class_is_named_after_it(kind: str) -> None:
    name = NAMES[kind]
    module = render(kind, name)[f"{name}.py"]
    assert f"\nclass {camel(name)}(" in module
    assert f"class_path: {name}.{camel(name)}" in render(kind, name)[f"{name}.yaml"]


def test_into_another_folder(cli: Cli, workplace: Path) -> None:
    result = cli("new", "callback", "zz", "--into", "some/where")
    assert sorted(path.name for path in (workplace / "some/where").iterdir()) == files("zz")
    assert result.out.splitlines()[0] == "wrote some/where/zz.py, some/where/zz.yaml and some/where/test_zz.py"
    assert result.out.splitlines()[1] == "next, in some/where:"


@pytest.mark.parametrize("there", ["zz.py", "zz.yaml", "test_zz.py", "zz"])
def test_nothing_is_written_where_one_is_there(cli: Cli, workplace: Path, there: str) -> None:
    if there == "zz":
        (workplace / there).mkdir()
    else:
        (workplace / there).write_text("mine")
    before = {path: path.is_file() and path.read_bytes() for path in workplace.iterdir()}
    line = cli("new", "recipe", "zz").refusal
    assert line == f"{there}: it is there already, and nothing is overwritten; another NAME, or --into DIR"
    assert {path: path.is_file() and path.read_bytes() for path in workplace.iterdir()} == before


def test_a_folder_that_cannot_be_is_one_line(cli: Cli, workplace: Path) -> None:
    assert cli("new", "recipe", "zz", "--into", "toy.yaml").refusal.startswith("toy.yaml: cannot be written to: ")
    assert [path.name for path in workplace.iterdir()] == ["toy.yaml"]


def test_what_was_begun_is_taken_back(cli: Cli, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Path.open

    def full(self: Path, mode: str = "r", **options: str) -> object:
        if self.name == "test_zz.py":
            raise OSError(28, "No space left on device")
        return opened(self, mode, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(Path, "open", full)
    assert cli("new", "recipe", "zz").refusal == ".: cannot be written to: No space left on device"
    assert [path.name for path in workplace.iterdir()] == ["toy.yaml"]


# names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "name", "why", "nearest"),
    [
        ("recipe", "MyMethod", "not a name in snake_case", "my_method"),
        ("recipe", "my-method", "not a name in snake_case", "my_method"),
        ("recipe", "my_method.py", "not a name in snake_case", "my_method"),
        ("recipe", "src/my_method", "not a name in snake_case", "my_method"),
        ("recipe", "VICReg2", "not a name in snake_case", "vic_reg2"),
        ("recipe", "2d_conv", "not a name in snake_case", "my_2d_conv"),
        ("recipe", "été", "not a name in snake_case", "ete"),
        ("callback", "方法", "not a name in snake_case", "my_callback"),
        ("callback", "", "not a name in snake_case", "my_callback"),
        ("recipe", "_x__y", "not a name in snake_case", "x_y"),
        ("recipe", "class", "a Python keyword", "my_class"),
        ("recipe", "torch", "a module of that name is installed", "my_torch"),
        ("recipe", "json", "a module of that name is installed", "my_json"),
        ("recipe", "descant", "a module of that name is installed", "my_descant"),
        ("recipe", "test_method", "pytest takes such a module for its own", "method"),
        ("recipe", "conftest", "pytest takes such a module for its own", "my_conftest"),
        (
            "recipe",
            "contrastive",
            "Descant has a class of that name, descant.recipes.contrastive.Contrastive",
            "my_contrastive",
        ),
        ("recipe", "tensor", "its class would hide the Tensor that the files use", "my_tensor"),
        ("recipe", "line", "its class would hide the Line that the files use", "my_line"),
        ("callback", "value_error", "its class would hide the ValueError that the files use", "my_value_error"),
    ],
)
def test_a_name_that_cannot_be_gets_one_that_can(
    cli: Cli, workplace: Path, kind: str, name: str, why: str, nearest: str
) -> None:
    assert cli("new", kind, name).refusal == f"new {kind} {name}: {why}; nearest: {nearest}"
    assert [path.name for path in workplace.iterdir()] == ["toy.yaml"]
    assert cli("new", kind, nearest).rc == 0


@each_kind
def test_the_name_in_the_help_can_be(kind: str) -> None:
    assert fault(kind, KINDS[kind]) is None
    assert fault(kind, f"{KINDS[kind]}_set") is None
    assert suggestion(kind, camel(KINDS[kind])) == KINDS[kind]


def test_a_module_of_the_users_own_folder_is_not_an_installed_one(
    cli: Cli, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(workplace))
    assert cli("new", "callback", "zz").rc == 0
    assert "it is there already" in cli("new", "callback", "zz").refusal
    assert cli("new", "callback", "zz", "--into", "other").rc == 0
    monkeypatch.chdir(workplace / "other")
    assert "a module of that name is installed" in cli("new", "callback", "zz", "--into", "third").refusal


# the command ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "line"),
    [
        ([], "new: of which kind? descant new recipe|callback|datamodule|tower|field NAME"),
        (["recip", "x"], "new recip: no such kind; nearest: recipe"),
        (["data", "x"], "new data: no such kind; nearest: datamodule"),
        (["zzz", "x"], "new zzz: no such kind; known: callback, datamodule, field, recipe, tower"),
        (["recipe"], "new recipe: its name is missing, such as my_recipe"),
        (["recipe", "a_b", "--in", "x"], "new: --in: unexpected; nearest: --into"),
        (["recipe", "a_b", "--into"], "new: argument --into: expected one argument"),
    ],
)
def test_wrong_arguments_are_one_line(cli: Cli, workplace: Path, args: list[str], line: str) -> None:
    assert cli("new", *args).refusal == line
    assert [path.name for path in workplace.iterdir()] == ["toy.yaml"]


@pytest.mark.parametrize("args", [["--help"], ["-h"], ["recipe", "--help"]])
def test_help_fits_half_a_screen(cli: Cli, args: list[str]) -> None:
    result = cli("new", *args)
    assert result.rc == 0
    assert 3 <= len(result.out.splitlines()) <= 25
    assert max(map(len, result.out.splitlines())) <= 110
    assert all(f"\n  {kind}" in result.out for kind in KINDS)


@pytest.mark.parametrize("args", [["new", "--help"], ["new", "recipe", "a_b"]])
def test_neither_help_nor_writing_imports_torch(tmp_path: Path, args: list[str]) -> None:
    code = f"import sys; from descant.__main__ import main; assert not main({args!r}); sys.exit('torch' in sys.modules)"
    path = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# it works as it stands ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "metric"),
    quick([("recipe", "train/align"), ("callback", "share/image"), ("datamodule", "train/image-text")], 3),
)
def test_its_yaml_trains(cli: Cli, workplace: Path, kind: str, metric: str) -> None:
    name = NAMES[kind]
    written = cli("new", kind, name)
    command = written.out.splitlines()[-1].split()
    assert command[:2] == ["descant", "fit"]
    result = cli(*command[1:], "--config", "on/tiny", "--name", "x")
    assert result.rc == 0, result.err
    metrics = json.loads((workplace / "runs/x/metrics.json").read_text())
    assert metrics["steps"] == 2
    assert metrics[metric] == metrics[metric] and metrics[metric] > 0


def test_its_callback_refuses_a_recipe_without_the_protocol(cli: Cli, workplace: Path) -> None:
    assert cli("new", "callback", "zz").rc == 0
    (workplace / "bare.py").write_text(
        "from tests.toys import ToyRecipe\n\n\nclass Bare(ToyRecipe):\n"
        "    def __init__(self, image: object = None) -> None:\n        super(ToyRecipe, self).__init__()\n"
    )
    (workplace / "bare.yaml").write_text((workplace / "toy.yaml").read_text().split("model:")[0] + _bare())
    trust = ("--trust", "zz", "--trust", "bare", "--trust", "tests.toys")
    line = cli("fit", "--config", "bare.yaml", "--config", "zz.yaml", *trust).refusal
    sys.modules.pop("bare", None)
    assert line == "Zz needs the protocol HasTowers (towers); Bare lacks it"


def _bare() -> str:
    return (
        "model: {class_path: bare.Bare}\ndata: {class_path: tests.toys.ToyData}\n"
        "trainer: {accelerator: cpu, max_steps: 1}\n"
    )


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds one of each kind."""
    folder = tmp_path_factory.mktemp("new")
    for kind, name in NAMES.items():
        for file, text in render(kind, name).items():
            (folder / file).write_text(text)
    return folder


def python(folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *args], cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("name", ["a1", "my_own", "zz", "a_name_of_thirty_letters_or_so"])
def test_the_linter_accepts_it(tmp_path: Path, name: str) -> None:
    """Whatever the name: lines do not grow too long, and imports stay in order."""
    for kind in KINDS:
        (tmp_path / kind).mkdir()
        for file, text in render(kind, name).items():
            (tmp_path / kind / file).write_text(text)
    settings = ["--no-cache", "--config", str(ROOT / "pyproject.toml"), "--config", f"src = {[*KINDS]}"]
    for command in (["check"], ["format", "--check"]):
        done = python(tmp_path, "-m", "ruff", *command, *settings, ".")
        assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_the_types_are_strict(written: Path) -> None:
    # by what `make lint` has learned of torch, where it was run before
    cache = ("--cache-dir", str(ROOT / ".mypy_cache"))
    done = python(written, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), *cache, ".")
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_the_tests_pass(written: Path) -> None:
    done = python(written, "-m", "pytest", "-q", "--doctest-modules", ".")
    assert done.returncode == 0, done.stdout
    assert "failed" not in done.stdout and "skipped" not in done.stdout


#: Kind -> (what stands in the module, what breaks it): the tests must see each.
FAULTS = [
    ("recipe", "value_B.detach() / 4", "value_B / 4"),
    ("recipe", "weight=weight_B, ", ""),
    ("recipe", "batch.both(*MODALITIES)", 'batch.present["image"]'),
    ("callback", "norm / total", "norm"),
    ("callback", "if (trainer.global_step + 1) % log_interval(trainer):", "if False:"),
    ("callback", "require(self, pl_module, HasTowers)", "pass"),
    ("datamodule", "self._set((0,))", "self._set((0, 2))"),
    ("datamodule", 'uniform_N(draw_B, "text")', "torch.rand(len(draw_B))"),
    ("datamodule", "self.corpus.texts_N[self.row_N[index_N]]", "self.corpus.texts_N[index_N]"),
    ("datamodule", "self.corpus.texts_N[row_B]", "np.full(len(row_B), self.corpus.text.shape[1])"),
    ("datamodule", "drop=self.drop", "drop=None"),
    ("datamodule", "len(key_N) + np.arange(len(key_N))", "0"),
]


@pytest.mark.slow
@by_turns(3, 4)
def test_every_fault_fails_its_test(tmp_path: Path) -> None:
    for number, (kind, whole, broken) in enumerate(FAULTS):
        name = f"broken_{number}"
        for file, text in render(kind, name).items():
            if file == f"{name}.py":
                assert text.count(whole) == 1, whole
                text = text.replace(whole, broken)
            (tmp_path / file).write_text(text)
    done = python(tmp_path, "-m", "pytest", "-q", "-rf", "--tb=no", ".")
    failed = {line.split("::")[0] for line in done.stdout.splitlines() if line.startswith("FAILED ")}
    unseen = [fault for number, fault in enumerate(FAULTS) if f"FAILED test_broken_{number}.py" not in failed]
    assert not unseen, done.stdout
