"""The house rules that a reader of one file cannot see: links, who imports whom, names in YAML."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from descant.cli.catalogue import ROOT
from descant.cli.trust import is_allowed
from descant.modules.io.names import table

TOP = Path(__file__).resolve().parent.parent
PARTS = ("recipes", "modules", "datamodules", "callbacks")

#: part -> the prefixes of descant that it may import.
MAY = {
    "modules": ("descant.modules",),
    "recipes": ("descant.recipes", "descant.modules"),
    "callbacks": ("descant.callbacks", "descant.modules"),
    "datamodules": (
        "descant.datamodules",
        *(
            f"descant.modules.{part}"
            for part in (
                "core",
                "selection",
                "tokenizers",
                "transforms",
                "io.addresses",
                "io.cache",
                "io.files",
                "io.jsonl",
                "io.names",
            )
        ),
    ),
}


@pytest.mark.parametrize("name", [*PARTS, "experiments"])
def test_links_resolve(name: str) -> None:
    link = TOP / "descant" / name
    assert link.is_symlink() and not Path(link.readlink()).is_absolute()
    assert link.resolve() == TOP / name


def imports(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import"
            module = node.module or ""
            yield from (f"{module}.{alias.name}" for alias in node.names) if module == "descant" else [module]


@pytest.mark.parametrize("part", PARTS)
def test_who_may_import_whom(part: str) -> None:
    for file in sorted((TOP / part).rglob("*.py")):
        for name in imports(file):
            assert name.split(".")[0] not in (*PARTS, "experiments"), f"{file}: import descant.{name}"
            if name.split(".")[0] == "descant":
                assert any(name == p or name.startswith(f"{p}.") for p in MAY[part]), f"{file}: {name}"


def test_what_one_rank_prepares_sets_nothing_that_the_others_lack() -> None:
    preparing = 0
    for file in sorted((TOP / "datamodules").rglob("*.py")):
        for method in ast.walk(ast.parse(file.read_text())):
            if isinstance(method, ast.FunctionDef) and method.name in ("prepare", "prepare_data"):
                preparing += 1
                names = [ast.unparse(n) for n in ast.walk(method) if isinstance(getattr(n, "ctx", None), ast.Store)]
                assert not [name for name in names if name.startswith("self.")], f"{file}: {method.name}: {names}"
    assert preparing >= 9


def test_recipes_do_not_import_each_other() -> None:
    for file in sorted((TOP / "recipes").glob("*.py")):
        if file.name != "__init__.py":
            others = [n for n in imports(file) if n.startswith("descant.recipes") and ".base." not in n]
            assert not others, f"{file}: {others}"


def test_a_recipe_is_at_most_150_lines_and_a_file_450() -> None:
    for part in (*PARTS, "descant"):
        for file in (TOP / part).rglob("*.py"):
            most = 150 if file.parent == TOP / "recipes" else 450
            assert len(file.read_text().splitlines()) <= most, f"{file}: more than {most} lines"


def test_short_names_in_yaml_are_unique() -> None:
    used = {p for file in ROOT.rglob("*.yaml") for p in class_paths(yaml.safe_load(file.read_text()))}
    assert not {name: paths for name, paths in table().items() if len(paths) > 1 and name in used}


def class_paths(value: object) -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            if key == "class_path":
                yield inner
            yield from class_paths(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from class_paths(inner)


@pytest.mark.parametrize("file", sorted(ROOT.rglob("*.yaml")), ids=lambda file: file.relative_to(ROOT).as_posix())
def test_classes_in_yaml_exist(file: Path) -> None:
    assert file.read_text().startswith("# "), "the first line says what it is"
    for path in class_paths(yaml.safe_load(file.read_text())):
        if "." in path:
            assert is_allowed(path)
            module, _, name = path.rpartition(".")
            assert hasattr(importlib.import_module(module), name), path
        elif path not in table():
            homes = ["torch.optim", "torch.nn", "torch.optim.lr_scheduler", "lightning.pytorch.callbacks"]
            assert any(hasattr(importlib.import_module(home), path) for home in homes), path


def graph() -> dict[str, set[str]]:
    """File -> the files that it imports when it is imported, of the whole package."""
    files = {file: file for part in PARTS for file in (TOP / part).rglob("*.py")}
    ours = [file for file in (TOP / "descant").glob("**/*.py") if "templates" not in file.parts]
    files |= {file: file for file in ours if not any(p.is_symlink() for p in file.parents)}

    def name(file: Path) -> str:
        parts = file.relative_to(TOP).with_suffix("").parts
        return ".".join(parts if parts[0] == "descant" else ("descant", *parts)).removesuffix(".__init__")

    known = {name(file): file for file in files}
    found: dict[str, set[str]] = {}
    for own, file in known.items():
        found[own] = set()
        for node in toplevel(ast.parse(file.read_text()).body):
            if isinstance(node, ast.ImportFrom) and node.module:
                both = [f"{node.module}.{alias.name}" for alias in node.names]
                found[own] |= {one if one in known else node.module for one in both} & known.keys()
            elif isinstance(node, ast.Import):
                found[own] |= {alias.name for alias in node.names} & known.keys()
    return found


def toplevel(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """What runs when a file is imported, without what only type checkers read."""
    for node in body:
        if isinstance(node, ast.If) and "TYPE_CHECKING" not in ast.unparse(node.test):
            yield from toplevel(node.body + node.orelse)
        elif isinstance(node, ast.Try):
            yield from toplevel(node.body)
        else:
            yield node


def circle(edges: dict[str, set[str]]) -> list[str]:
    """Names on a circle of the graph; empty where there is none."""
    left = {name: set(to) for name, to in edges.items()}
    while ends := [name for name, to in left.items() if not to]:
        left = {name: to - set(ends) for name, to in left.items() if name not in ends}
    return sorted(left)


def test_files_import_one_another_in_no_circle() -> None:
    edges = graph()
    assert len(edges) > 250
    assert not circle(edges)


def test_folders_of_modules_import_one_another_in_no_circle() -> None:
    rooms: dict[str, set[str]] = {}
    for own, others in graph().items():
        if own.startswith("descant.modules.") and own.count(".") > 2:
            room = own.split(".")[2]
            rooms.setdefault(room, set())
            rooms[room] |= {o.split(".")[2] for o in others if o.startswith("descant.modules.")} - {room}
    assert rooms["core"] == set(), f"core is below all others: {rooms['core']}"
    assert not circle(rooms), rooms


#: Libraries whose private API only the folder ``modules/core/compat`` may use.
LIBRARIES = ("torch", "lightning", "jsonargparse")


def private_names(text: str) -> Iterator[str]:
    """Dotted names of LIBRARIES with a part that begins with one underscore, in imports and after imported names.

    Operators (``torch.ops.aten._softmax``) are names of torch's schema.
    """
    nodes = [*ast.walk(ast.parse(text))]
    full: dict[str, str] = {}
    for node in nodes:
        if isinstance(node, ast.Import | ast.ImportFrom):
            before = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            for alias in node.names:
                yield f"{before}{alias.name}"
                own = alias.asname or (alias.name if before else alias.name.partition(".")[0])
                full[own] = f"{before}{alias.name}" if before or alias.asname else own
    for node in nodes:
        if isinstance(node, ast.Attribute):
            root, _, rest = ast.unparse(node).partition(".")
            if root in full:
                yield f"{full[root]}.{rest}"


def is_private(name: str) -> bool:
    parts = name.split(".")
    if parts[0] not in LIBRARIES or name.startswith("torch.ops.") or not all(part.isidentifier() for part in parts):
        return False
    return any(part.startswith("_") and not part.startswith("__") for part in parts)


def test_private_api_of_libraries_is_used_in_one_folder() -> None:
    found = []
    for part in (*PARTS, "descant", "benchmarks"):
        for file in sorted((TOP / part).rglob("*.py")):
            if not any(p.is_symlink() for p in file.parents) and file.parent != TOP / "modules" / "core" / "compat":
                names = filter(is_private, private_names(file.read_text()))
                found += [f"{file.relative_to(TOP)}: {name}: import it in modules/core/compat" for name in names]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("from torch.utils._pytree import tree_map", "torch.utils._pytree.tree_map"),
        ("def f():\n    from jsonargparse import _common", "jsonargparse._common"),
        ("import torch._C as c", "torch._C"),
        ("import torch.distributed as dist\ndist.distributed_c10d._world", "torch.distributed.distributed_c10d._world"),
        ("import torch\ntorch._C._current_graph_task_id()", "torch._C._current_graph_task_id"),
        ("import torch\ntorch.ops.aten._softmax\ntorch.__version__\nself._x = torch.ones(self._n).sum()", ""),
    ],
)
def test_private_names_are_found(text: str, name: str) -> None:
    found = [*filter(is_private, private_names(text))]
    assert name in found if name else not found
