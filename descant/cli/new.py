"""``descant new``: write your own recipe, callback, data module, tower or field, with its YAML and its test."""

from __future__ import annotations

import ast
import builtins
import importlib.util
import keyword
import re
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from itertools import chain, count, groupby
from pathlib import Path

from descant.cli.errors import fail, hint
from descant.cli.options import Options
from descant.modules.io.names import table

TEMPLATES = Path(__file__).resolve().parents[1] / "templates"
#: Kind -> name of its template.
KINDS = {
    "recipe": "my_recipe",
    "callback": "my_callback",
    "datamodule": "my_data",
    "tower": "my_tower",
    "field": "my_field",
}

_HELP = """\
descant new: a recipe, callback, data module, tower or field of your own to begin from

usage: descant new recipe|callback|datamodule|tower|field NAME [--into DIR]

  descant new recipe my_recipe

Writes NAME.py, NAME.yaml and test_NAME.py, which work as they stand: the test passes, and the YAML trains
on data that ships with Descant. The class is NAME in CamelCase. Nothing is ever overwritten.

  recipe      two towers, two terms that stay per sample, and what proves both; trains on the emoji pack
  callback    measures a recipe through a protocol, refuses one that lacks it; an overlay of experiments
  datamodule  images and texts from a file, with real missingness, splits and evaluation sets
  tower       from the inputs of one modality to tokens; an overlay of experiments
  field       from a file or a cell of your own data to the inputs of one modality

Options:
  NAME        in snake_case, such as my_recipe
  --into DIR  the folder to write into; it is made if need be (the current one)

A class outside Descant needs --trust NAME, from the folder that holds NAME.py."""


def main(args: Sequence[str]) -> int:
    """Write the three files and print what to type next."""
    if "--help" in args or "-h" in args:
        print(_HELP)
        return 0
    kind, name, folder = _read(args)
    why = fault(kind, name)
    if why:
        fail(f"new {kind} {name}: {why}; nearest: {suggestion(kind, name)}")
    files = render(kind, name)
    _write(folder, name, files)
    print(_next_steps(name, folder, files))
    return 0


def _read(args: Sequence[str]) -> tuple[str, str, Path]:
    parser = Options(prog="descant new", add_help=False)
    parser.add_argument("kind", nargs="?")
    parser.add_argument("name", nargs="?")
    parser.add_argument("--into", type=Path, default=Path())
    given, rest = parser.parse_known_args(args)
    if rest:
        fail(f"new: {rest[0]}: unexpected{hint(rest[0], ['--into'])}")
    if given.kind is None:
        fail(f"new: of which kind? descant new {'|'.join(KINDS)} NAME")
    if given.kind not in KINDS:
        fail(f"new {given.kind}: no such kind{hint(given.kind, KINDS)}")
    if given.name is None:
        fail(f"new {given.kind}: its name is missing, such as {KINDS[given.kind]}")
    return given.kind, given.name, given.into


# names ----------------------------------------------------------------------------------------------------------


def fault(kind: str, name: str) -> str | None:
    """Return why a new module of this kind cannot have this name; None if it can.

    >>> fault("recipe", "my_method"), fault("recipe", "class")
    (None, 'a Python keyword')
    """
    if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", name):
        return "not a name in snake_case"
    if keyword.iskeyword(name):
        return "a Python keyword"
    if name == "conftest" or name.startswith("test_"):
        return "pytest takes such a module for its own"
    if _is_installed(name):
        return "a module of that name is installed"
    title = camel(name)
    if title in table():
        return f"Descant has a class of that name, {table()[title][0]}"
    if title in dir(builtins) or title in _template_names(kind):
        return f"its class would hide the {title} that the files use"
    return None


def suggestion(kind: str, name: str) -> str:
    """Suggest a valid name, as near to ``name`` as possible.

    >>> suggestion("recipe", "MyMethod"), suggestion("recipe", "contrastive"), suggestion("callback", "2nd try")
    ('my_method', 'my_contrastive', 'my_2nd_try')
    """
    last = name.removesuffix(".py").rpartition("/")[2]
    plain = unicodedata.normalize("NFKD", last).encode("ascii", "ignore").decode()  # drops accents
    words = re.findall(r"[A-Z]+(?![a-z])[0-9]*|[A-Z]?[a-z]+[0-9]*[a-z]*|[0-9]+[a-z]*", plain)
    snake = "_".join(words).lower().removeprefix("test_") or KINDS[kind]
    near = (snake, f"my_{snake}", f"my_{snake}_{kind}")
    return next(c for c in chain(near, (f"my_{snake}_{n}" for n in count(2))) if fault(kind, c) is None)


def camel(name: str) -> str:
    """
    >>> camel("my_method")
    'MyMethod'
    """
    return "".join(word[:1].upper() + word[1:] for word in name.split("_"))


def _template_names(kind: str) -> set[str]:
    """Return the names in a kind's template that are not derived from the module's own."""
    stem, names = KINDS[kind], set()
    for file, text in _sources(kind).items():
        for node in ast.walk(ast.parse(text)) if file.endswith(".py") else ():
            if isinstance(node, ast.Name):
                names.add(node.id)
            elif isinstance(node, ast.ClassDef | ast.alias):
                names.add(node.name)
    return {name for name in names if not name.startswith(camel(stem))}


def _is_installed(name: str) -> bool:
    """Whether an import of ``name`` would find something other than a module in the user's current folder."""
    if name in sys.stdlib_module_names:
        return True
    spec = importlib.util.find_spec(name)
    if spec is None:
        return False
    homes = list(spec.submodule_search_locations or [spec.origin or ""])
    return all(Path(home).resolve().parent != Path.cwd() for home in homes)


# files ----------------------------------------------------------------------------------------------------------


def _sources(kind: str) -> dict[str, str]:
    """Return file name -> text of a kind's template, the module first."""
    stem = KINDS[kind]
    names = (f"{stem}.py", f"{stem}.yaml", f"test_{stem}.py")
    return {name: (TEMPLATES / kind / name).read_text(encoding="utf-8") for name in names}


def render(kind: str, name: str) -> dict[str, str]:
    """Return file name -> text of a new module of this kind."""
    stem = KINDS[kind]

    def named(text: str) -> str:
        return text.replace(f"descant.templates.{kind}.", "").replace(stem, name).replace(camel(stem), camel(name))

    return {named(file): "".join(_sort_imports(named(text))) for file, text in _sources(kind).items()}


def _sort_imports(text: str) -> Iterator[str]:
    """Yield the lines with each block of ``from`` imports sorted, since a replaced name may sort differently."""
    for is_import, lines in groupby(text.splitlines(keepends=True), lambda line: line.startswith("from ")):
        block = list(lines)
        yield from sorted(block) if is_import else block


def _write(folder: Path, name: str, files: dict[str, str]) -> None:
    # a folder of that name would be imported instead of the module
    there = [path for path in (folder / name, *(folder / file for file in files)) if path.exists()]
    if there:
        fail(f"{there[0]}: it is there already, and nothing is overwritten; another NAME, or --into DIR")
    written: list[Path] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file, text in files.items():
            with (folder / file).open("x", encoding="utf-8") as out:
                written.append(folder / file)
                out.write(text)
    except OSError as error:
        for path in written:
            path.unlink()
        fail(f"{folder}: cannot be written to: {error.strerror or error}")


def _next_steps(name: str, folder: Path, files: dict[str, str]) -> str:
    *first, last = [str(folder / file) for file in files]
    command = re.findall(r"^# Command: (.*)$", files[f"{name}.yaml"], re.MULTILINE)[0]
    lines = [f"wrote {', '.join(first)} and {last}", "next:" if folder == Path() else f"next, in {folder}:"]
    if importlib.util.find_spec("pytest") is None:
        lines.append("  pip install pytest")
    return "\n".join([*lines, f"  python -m pytest test_{name}.py", f"  {command}"])
