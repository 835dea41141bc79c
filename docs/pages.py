"""Pages of the site that are written elsewhere: the README and its kin, experiments by their heads, and docstrings."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path

import mkdocs_gen_files

from descant.catalogue import ROOT as EXPERIMENTS
from descant.catalogue import experiments, overlays

ROOT = Path(__file__).resolve().parent.parent
#: Files of the repository -> pages of the site.
TEXTS = {
    "README.md": "index.md",
    "CLAIMS.md": "claims.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
}
PARTS = {"recipes": "Recipes", "modules": "Modules", "datamodules": "Data", "callbacks": "Callbacks"}
#: Pages that are written where they stand, below docs/.
GROUPS = {
    "Guides": ("guides", ("own-data", "devices", "slurm", "survive", "recipe")),
    "Mechanisms": ("mechanisms", ("contrastive", "masked", "harmony", "balance", "answers")),
}
_LINK = re.compile(r"\]\((?!https?:|#)([^)#\s]*)(#[^)\s]*)?\)")


def main() -> None:
    nav = ["* [Descant](index.md)"]
    for group, (folder, names) in GROUPS.items():
        pages = [f"{folder}/{name}.md" for name in names]
        nav += [f"* {group}", *(f"    * [{_own(page)}]({page})" for page in pages)]
    for name, page in TEXTS.items():
        _write(page, _linked((ROOT / name).read_text(encoding="utf-8"), ROOT / name))
    nav += ["* Experiments", *_gallery(), "* [Claims](claims.md)", "* Reference", *_reference()]
    for page in ("measured.md", "gpu.md"):
        if (ROOT / "docs" / page).exists():  # the second once a run on a GPU is published
            nav.append(f"* [{_own(page)}]({page})")
    nav += ["* [Contributing](contributing.md)", "* [Security](security.md)"]
    _write("SUMMARY.md", "\n".join(nav) + "\n")


def _own(page: str) -> str:
    """A page of docs/ with links to pages in place of files; returns its title."""
    file = ROOT / "docs" / page
    text = file.read_text(encoding="utf-8")
    _write(page, _linked(text, file, depth=page.count("/")))
    return text.splitlines()[0].removeprefix("# ")


def _gallery() -> Iterator[str]:
    """One page a family of experiments, and one of overlays: each file's head in words, and the whole of it."""
    named = sorted(experiments().items())
    for family, some in groupby(named, key=lambda of: of[0].partition("/")[0]):
        yield _gallery_page(family, f"experiments/{family}.md", some)
    yield _gallery_page("overlays", "experiments/overlays.md", sorted(overlays().items()))


def _gallery_page(title: str, page: str, some: Iterable[tuple[str, Path]]) -> str:
    parts = [f"# {title.capitalize()}"]
    for name, file in some:
        text = file.read_text(encoding="utf-8")
        head = [line.removeprefix("#").strip() for line in _head(text)]
        parts.append(f"## {name.removeprefix(f'{title}/')} {{ #{_anchor(name)} }}\n\n{_sentences(head)}")
        parts.append(f'??? example "{name}.yaml"\n\n' + _indented(f"```yaml\n{text[len(''.join(_lines(text))) :]}```"))
    _write(page, "\n\n".join(parts) + "\n")
    return f"    * [{title.capitalize()}]({page})"


def _lines(text: str) -> list[str]:
    lines = text.splitlines(keepends=True)
    return lines[: next(n for n, line in enumerate(lines) if not line.startswith("#"))]


def _head(text: str) -> list[str]:
    return [line.rstrip("\n") for line in _lines(text)]


def _sentences(head: list[str]) -> str:
    """``Claim: ...`` and its kin as a list; commands as code."""
    first, told = [], list[str]()
    for line in head:
        if match := re.match(r"(Claim|Source|Command|Before|Expect|Base): +(.*)", line):
            told.append(f"- **{match[1]}**: {match[2]}")
        elif told:
            told[-1] += " " + line
        else:
            first.append(line)
    lines = [re.sub(r"(descant (?:fit|check|test)[^()]*[^() ])", r"`\1`", line) for line in told]
    return " ".join(first) + "\n\n" + "\n".join(lines)


def _reference() -> Iterator[str]:
    """One page a file, under the folders of the repository."""
    for part, title in PARTS.items():
        yield f"    * {title}"
        for file in sorted((ROOT / part).rglob("*.py")):
            inner = file.relative_to(ROOT).with_suffix("")
            if any(name.startswith("_") and name != "__init__" for name in inner.parts) or not _documented(file):
                continue
            names = inner.parts[:-1] if inner.name == "__init__" else inner.parts
            if len(names) == 1:
                continue
            page = f"reference/{'/'.join(inner.parts).replace('__init__', 'index')}.md"
            _write(page, f"# {'.'.join(names[1:])}\n\n::: descant.{'.'.join(names)}\n")
            yield f"        * [{'.'.join(names[1:])}]({page})"


def _documented(file: Path) -> bool:
    """Whether it holds more than other files' names."""
    return bool(re.search(r"^(class|def|[A-Z_]+ = )", file.read_text(encoding="utf-8"), re.MULTILINE))


def _linked(text: str, file: Path, depth: int = 0) -> str:
    """The same text with its links to files as links to pages; of what has no page, the words alone."""
    up = "../" * depth

    def moved(match: re.Match[str]) -> str:
        target, anchor = match[1], match[2] or ""
        place = (file.parent / target).resolve()
        inner = place.relative_to(ROOT).as_posix() if place.is_relative_to(ROOT) else target
        found = _page(inner)
        return f"]({up}{found}{anchor})" if found else f"](<{target}>)"

    text = _LINK.sub(moved, text)
    return re.sub(r"(?<!!)\[([^\]]*)\]\(<[^>]*>\)", r"\1", text)


def _page(inner: str) -> str:
    if inner in TEXTS:
        return TEXTS[inner]
    if inner.startswith("docs/"):
        return inner.removeprefix("docs/")
    if inner.startswith("experiments/") and inner.endswith(".yaml"):
        name = inner.removeprefix("experiments/").removesuffix(".yaml")
        page = "overlays" if name.split("/")[0] in ("with", "on", "data") else name.split("/")[0]
        return f"experiments/{page}.md#{_anchor(name)}"
    if inner.split("/")[0] in PARTS and inner.endswith(".py"):
        return f"reference/{inner.removesuffix('.py').replace('__init__', 'index')}.md"
    return ""


def _anchor(name: str) -> str:
    return name.replace("/", "-")


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" if line else "" for line in text.splitlines())


def _write(page: str, text: str) -> None:
    with mkdocs_gen_files.open(page, "w") as out:
        out.write(text)


assert EXPERIMENTS.is_dir()
main()
