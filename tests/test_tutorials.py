"""The notebooks of docs/tutorials hold outputs of their own code, use public classes, and are linked; and they run."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import os
import re
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType

import nbformat
import pytest
from nbclient import NotebookClient
from traitlets.config import Config

from descant.claims.effect import WORDS
from tests.rotation import turn

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "docs/tutorials"
NAMES = ("own-pictures", "own-sensor", "own-table", "compare-methods", "add-a-method")
each = pytest.mark.parametrize("name", NAMES)
#: Notebook -> what its outputs have to show.
SHOWN = {
    "own-pictures": r"^whole captions: 0\.\d+ of the drawings in val$",
    "own-sensor": r"^embeddings: [01]\.\d+ of val, [01]\.\d+ of the 370 in test$",
    "own-table": r"^mean absolute error 0\.\d+$",
    "compare-methods": rf"^({'|'.join(WORDS)})$",
    "add-a-method": r"^the test finds it$",
}


def read(name: str) -> nbformat.NotebookNode:
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def python(notebook: nbformat.NotebookNode) -> Iterator[ast.Module]:
    """The Python of each code cell, and of each file that one writes, without commands."""
    for cell in notebook.cells:
        writes = re.match(r"%%writefile \S+(\.\w+)", cell.source)  # a file of Python, or another one
        if cell.cell_type == "code" and not cell.source.startswith("%%bash\n") and (not writes or writes[1] == ".py"):
            yield ast.parse(re.sub(r"^%%writefile .*", "", cell.source))


@cache
def renderer() -> ModuleType:
    spec = importlib.util.spec_from_file_location("notebook_pages", ROOT / "docs/notebook.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_folder_holds_these_and_the_readme_names_them_in_order() -> None:
    assert {path.name for path in FOLDER.iterdir()} == {f"{name}.ipynb" for name in NAMES}
    assert tuple(re.findall(r"docs/tutorials/([\w-]+)\.ipynb", (ROOT / "README.md").read_text())) == NAMES


@each
def test_it_holds_the_outputs_of_its_code_and_nothing_of_the_machine(name: str) -> None:
    notebook = read(name)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    assert set(notebook.metadata) == {"kernelspec", "language_info", renderer().DIGEST}
    stored = notebook.metadata[renderer().DIGEST]
    assert stored == renderer().code_digest(notebook), f"make tutorials OF=docs/tutorials/{name}.ipynb"
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert any(re.search(SHOWN[name], output.get("text", ""), re.MULTILINE) for output in outputs)
    for output in outputs:
        for text in (
            output.get("text", ""),
            *(x for kind, x in output.get("data", {}).items() if "image/" not in kind),
        ):
            # neither a folder of the machine, nor an address beside its own, nor an error
            assert not re.search(r"(?<![\w.~:/-])/[\w.-]+/|\w+://(?!localhost)|Traceback", text), text
    assert (FOLDER / f"{name}.ipynb").stat().st_size < 500_000
    for cell in notebook.cells:
        assert not cell.metadata and cell.get("execution_count") is None, cell.id


@each
def test_it_reads_as_a_tutorial(name: str) -> None:
    first, *cells = read(name).cells
    assert first.cell_type == "markdown" and first.source.startswith("# ")
    assert all(cell.source.strip() for cell in cells)
    words = sum(len(cell.source.split()) for cell in cells if cell.cell_type == "markdown")
    assert words > 250
    for file in re.findall(r"\]\((?!https:)([^)#]+)", "\n".join(c.source for c in cells if c.cell_type == "markdown")):
        assert (FOLDER / file).resolve().is_file(), file


@each
def test_it_uses_what_is_public(name: str) -> None:
    found = 0
    for module in python(read(name)):
        for node in ast.walk(module):
            if isinstance(node, ast.Attribute):
                assert not re.match(r"_(?!_)", node.attr), node.attr
            if isinstance(node, ast.Import):
                assert not any(alias.name.startswith("descant.") for alias in node.names)
            if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] == "descant":
                assert not re.search(r"(^|\.)_", str(node.module)), node.module
                home = importlib.import_module(str(node.module))
                for alias in node.names:
                    found += 1
                    assert not alias.name.startswith("_") and hasattr(home, alias.name), alias.name
    assert found or any(cell.source.startswith("%%bash\n") for cell in read(name).cells)


# pages ----------------------------------------------------------------------------------------------------------


def test_a_page_shows_the_outputs_and_their_pictures() -> None:
    shown = renderer().page(FOLDER / "own-pictures.ipynb")
    assert shown.title == "Train on your own pictures" and "```bash\ndescant data look photos" in shown.text
    assert re.search(r"^    whole captions: 0\.\d+ of the drawings in val$", shown.text, re.MULTILINE)
    for picture, content in shown.pictures.items():
        assert f"]({picture})" in shown.text and picture.startswith("own-pictures")
        assert content.startswith(b"\x89PNG\r\n\x1a\n")
    assert len(shown.pictures) >= 3


# runs -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", turn(NAMES, len(NAMES)))
def test_it_runs_and_leaves_nothing(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]))
    notebook = read(name)
    # a kernel is reached by sockets in place of ports, and loaders pass tensors by sockets in TMPDIR: their paths have
    # to be short, else a batch is lost, and the loader waits for ever
    with tempfile.TemporaryDirectory(dir="/tmp") as short:
        temporary = Path(short) / "temporary"
        temporary.mkdir()
        monkeypatch.setenv("TMPDIR", str(temporary))
        client = NotebookClient(
            notebook,
            kernel_name="python3",
            startup_timeout=300,
            resources={"metadata": {"path": str(tmp_path)}},
            config=Config({"KernelManager": {"transport": "ipc", "ip": f"{short}/kernel"}}),
        )
        client.execute()
        assert not [path for path in temporary.iterdir() if path.is_dir() and any(path.rglob("*.yaml"))]
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert any(re.search(SHOWN[name], output.get("text", ""), re.MULTILINE) for output in outputs)
    if name != "add-a-method":
        assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not list(tmp_path.iterdir())
