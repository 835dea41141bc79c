"""Generate pages of the site: README and its kin, a gallery of experiments, a page a paper, and the reference."""

from __future__ import annotations

import ast
import json
import re
import sys
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import mkdocs_gen_files
import yaml

from descant.claims.effect import WORDS
from descant.cli.catalogue import ROOT as EXPERIMENTS
from descant.cli.catalogue import experiments, overlays, papers
from descant.modules.io.names import full

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "docs"))  # this file is run by its path
from notebook import page as page_of_notebook  # noqa: E402

#: Notebooks in docs/tutorials, in the order in which they are read.
TUTORIALS = ("own-pictures", "own-sensor", "own-table", "compare-methods", "add-a-method")
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
    "Guides": (
        "guides",
        (
            "which",
            "recipes",
            "optimizers",
            "python",
            "plain-lightning",
            "own-data",
            "other-data",
            "hub",
            "exchange",
            "devices",
            "scale",
            "slurm",
            "docker",
            "watching",
            "survive",
            "recipe",
            "paper",
            "claims",
            "faq",
        ),
    ),
    "Mechanisms": (
        "mechanisms",
        ("contrastive", "masked", "objectives", "tokens", "experts", "harmony", "balance", "answers", "stages"),
    ),
}
#: Pictures in docs/ of what experiments came to; of others the figure of their claim is shown.
PICTURES = {
    "chat/emoji": "answers.png",
    "contrastive/emoji": "retrieval.png",
    "contrastive/own": "look.png",
    "contrastive/stamps": "stamps.png",
    "fusion/emoji": "drowned.png",
    "masked/emoji": "reconstruction.png",
    "staged/emoji_vqa": "stages.png",
}
#: Family -> the experiment whose image is shown for those that have none of their own.
STAND_IN = {
    **{family: f"{family}/emoji" for family in ("chat", "contrastive", "fusion", "masked", "missing")},
    "distill": "distill/emoji-rank-dual",
    "multitask": "contrastive/emoji",
    "papers": "contrastive/emoji",
    "reinforce": "staged/emoji_vqa",
    "staged": "staged/emoji_vqa",
}
#: Words that begin a part of a YAML's head.
_WORDS = r"(Claim|Source|Differs|Command|Before|Expect|Base|Needs):"
_LINK = re.compile(r"\]\((?!https?:|#)([^)#\s]*)(#[^)\s]*)?\)")


def main() -> None:
    nav = ["* [Descant](index.md)", "* Tutorials", *map(_tutorial, TUTORIALS)]
    for group, (folder, names) in GROUPS.items():
        pages = [f"{folder}/{name}.md" for name in names]
        nav += [f"* {group}", *(f"    * [{_own(page)}]({page})" for page in pages)]
    for name, page in TEXTS.items():
        text = _linked((ROOT / name).read_text(encoding="utf-8"), ROOT / name)
        _write(page, _coloured(text) if name == "CLAIMS.md" else text)
    nav += ["* Papers", *_papers(), "* Experiments", *_gallery(), "* Claims", *_claims(), "* Reference", *_reference()]
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


def _tutorial(name: str) -> str:
    """Write a page of a notebook with its stored outputs. Returns its line of the navigation."""
    file = ROOT / "docs/tutorials" / f"{name}.ipynb"
    page = page_of_notebook(file)
    for picture, content in page.pictures.items():
        with mkdocs_gen_files.open(f"tutorials/{picture}", "wb") as out:
            out.write(content)
    _write(
        f"tutorials/{name}.md", f"# {page.title}\n\n[The notebook]({file.name})\n{_linked(page.text, file, depth=1)}"
    )
    return f"    * [{page.title}](tutorials/{name}.md)"


def _gallery() -> Iterator[str]:
    """A page of all experiments by their pictures, one page a family of experiments, and one of overlays."""
    named = sorted(experiments().items())
    families = [(family, list(some)) for family, some in groupby(named, key=lambda of: of[0].partition("/")[0])]
    shown = _pictures()
    cards = ["# Experiments", "Click one for its command, what to expect of it, and the whole of its file."]
    for family, some in families:
        cards.append(f"## {family.capitalize()}\n")
        cards.append('<div class="gallery" markdown>')
        for name, file in some:
            of, picture = _shown(name, shown)
            told = _told(file.read_text(encoding="utf-8"))
            of = "" if of == name else f"<br><small>picture: {of}</small>"
            cards.append(
                f"[![{name}]({_up(picture, 1)}){{ loading=lazy }} **{name}**<br>{told}{of}]"
                f"({family}.md#{_anchor(name)}){{ .card }}"
            )
        cards.append("</div>")
    _write("experiments/index.md", "\n\n".join(cards) + "\n")
    yield "    * [All experiments](experiments/index.md)"
    for family, some in families:
        yield _gallery_page(family, f"experiments/{family}.md", some, shown)
    yield _gallery_page("overlays", "experiments/overlays.md", sorted(overlays().items()), shown)


def _pictures() -> dict[str, str]:
    """Experiment -> its picture, by its place below docs/: of what it came to, else the figure of the first claim."""
    found: dict[str, str] = {}
    contents = [(yaml.safe_load(f.read_text(encoding="utf-8")), f.stem) for f in _claim_files()]
    claims = [(content["experiment"], name) for content, name in contents if "like" not in content]
    claims += [(paper["experiment"], paper["claim"]) for paper in papers() if "claim" in paper]
    for name, claim in claims:
        if (ROOT / "docs" / "claims" / f"{claim}.svg").is_file():
            found.setdefault(name, f"claims/{claim}.svg")
    return found | PICTURES


def _claims() -> Iterator[str]:
    """The table of claims, and the page of each claim and comparison."""
    yield "    * [All claims](claims.md)"
    for file in sorted((ROOT / "docs" / "claims").glob("*.md")):
        yield f"    * [{_own(f'claims/{file.name}')}](claims/{file.name})"


def _claim_files() -> list[Path]:
    return sorted((EXPERIMENTS / "claims").glob("*.yaml"))


def _papers() -> Iterator[str]:
    """A table of all papers, and of each that is built a page: its head, its pieces, its claim and its file."""
    rows = ["# Papers", "One row a paper: `descant list papers`. Those that are built run as they are: `papers/NAME`."]
    rows.append("| | paper | family | arXiv | equation | effect |\n|---|---|---|---|---|---|")
    nav = []
    for paper in papers():
        arxiv = f"[{paper['arxiv']}](https://arxiv.org/abs/{paper['arxiv']})"
        title, last = paper["title"], "planned |"
        if paper["status"] == "built":
            effect = _coloured(f"**{_result(paper.get('claim'))['effect']}**")
            last = f"{'exact' if paper['exact'] else 'our reading'} | {effect} |"
            title = f"[{title}]({paper['name']}.md)"
            _write(f"papers/{paper['name']}.md", _paper_page(paper, arxiv))
            nav.append(f"    * [{paper['name']}](papers/{paper['name']}.md)")
        rows[-1] += f"\n| {paper['number']} | {title} | {paper['family']} | {arxiv} | {last}"
    _write("papers/index.md", "\n\n".join(rows) + "\n")
    yield "    * [All papers](papers/index.md)"
    yield from nav


def _coloured(text: str) -> str:
    """With the words for effects in their colours (site.css)."""
    words = "|".join(map(re.escape, WORDS))
    return re.sub(rf"\*\*({words})\*\*", lambda m: f"**{m[1]}**{{ .effect .{m[1].replace(' ', '-')} }}", text)


def _result(claim: str | None) -> dict[str, Any]:
    """The stored result of a claim; without runs if a paper has no claim, or one that was not run yet."""
    file = EXPERIMENTS / f"claims/results/{claim}.json"
    if not file.is_file():
        return {"effect": "not run yet", "seconds": 0, "runs": {}}
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def _paper_page(paper: dict[str, Any], arxiv: str) -> str:
    name, claim = paper["experiment"], paper.get("claim")
    text = experiments()[name].read_text(encoding="utf-8")
    stored = _result(claim)
    spec: dict[str, Any] = {"metric": {"name": ""}}
    if claim:
        spec = yaml.safe_load((EXPERIMENTS / f"claims/{claim}.yaml").read_text(encoding="utf-8"))
    metrics = list(dict.fromkeys([spec["metric"]["name"], *(of["metric"] for of in spec.get("also") or ())]))
    table = [f"| arm | {' | '.join(metrics)} |", "|---|" + "---|" * len(metrics)]
    for arm, runs in stored["runs"].items():
        cells = [[run[metric] for run in runs.values() if metric in run] for metric in metrics]
        table.append(f"| {arm} | {' | '.join(f'{sum(c) / len(c):.3f}' if c else '' for c in cells)} |")
    equation = "our reading: nothing was released to compare with"
    if paper["exact"]:
        equation = "equal to an explicit loop or closed form in its test"
    pieces = ", ".join(f"[`{piece}`](../{_page_of(piece)})" for piece in paper["pieces"])
    effect = _coloured(f"**{stored['effect']}**")
    seconds = f"{stored['seconds'] / 60:.0f} minutes for {sum(len(runs) for runs in stored['runs'].values())} runs"
    where = f"claim {claim} is designed" if claim else "no claim"
    if stored["seconds"]:
        where = f"[claim {claim}](../claims/{claim}.md), {seconds}"
    measured = [f"Means over seeds {', '.join(sorted(next(iter(stored['runs'].values()), {})))}:", "\n".join(table)]
    parts = [
        f"# {paper['title']}",
        _sentences([line.removeprefix("#").strip() for line in _head(text)]),
        f"- **Paper**: {paper['number']}, {paper['family']}, arXiv {arxiv}\n- **Pieces**: {pieces}\n"
        f"- **Equation**: {equation} (`{paper['test']}`)\n"
        f"- **Effect**: {effect} ({where})",
        *([f"![{spec['metric']['name']} of each seed](../claims/{claim}.svg)"] if "method" in stored["runs"] else []),
        *(measured if stored["runs"] else []),
        f'??? example "{name}.yaml"\n\n' + _indented(f"```yaml\n{text[len(''.join(_lines(text))) :]}```"),
    ]
    return "\n\n".join(parts) + "\n"


def _page_of(piece: str) -> str:
    """The reference page of a class."""
    path = full(piece)
    assert path is not None, piece
    return f"reference/{'/'.join(path.split('.')[1:-1])}.md"


def _shown(name: str, shown: dict[str, str]) -> tuple[str, str]:
    """The picture of an experiment, and of which experiment it is."""
    of = name if name in shown else STAND_IN[name.partition("/")[0]]
    return of, shown[of]


def _up(place: str, folders: int) -> str:
    return "../" * folders + place


def _told(text: str) -> str:
    """The first sentence of a file's head."""
    first = []
    for line in (line.removeprefix("#").strip() for line in _head(text)):
        if re.match(_WORDS, line):
            break
        first.append(line)
    return re.split(r"(?<=[.:])\s", " ".join(first))[0].rstrip(".:")


def _gallery_page(title: str, page: str, some: Iterable[tuple[str, Path]], shown: dict[str, str]) -> str:
    """Of each file a picture, its head in words, its commands, and the whole of it."""
    parts = [f"# {title.capitalize()}"]
    for name, file in some:
        text = file.read_text(encoding="utf-8")
        head = [line.removeprefix("#").strip() for line in _head(text)]
        parts.append(f"## {name.removeprefix(f'{title}/')} {{ #{_anchor(name)} }}")
        if name in shown:
            parts.append(f"![{name}]({_up(shown[name], 1)}){{ .thumbnail loading=lazy }}")
        parts.append(_sentences(head))
        if title == "papers":
            parts.append(f"[The paper, its claim and its numbers](../{name}.md)")
        parts.append(f'??? example "{name}.yaml"\n\n' + _indented(f"```yaml\n{text[len(''.join(_lines(text))) :]}```"))
    _write(page, "\n\n".join(parts) + "\n")
    return f"    * [{title.capitalize()}]({page})"


def _lines(text: str) -> list[str]:
    lines = text.splitlines(keepends=True)
    return lines[: next(n for n, line in enumerate(lines) if not line.startswith("#"))]


def _head(text: str) -> list[str]:
    return [line.rstrip("\n") for line in _lines(text)]


def _sentences(head: list[str]) -> str:
    """``Claim: ...`` and its kin as a list; commands as a block that can be pasted."""
    first, told, commands, notes = [], list[str](), list[str](), list[str]()
    kind = ""
    for line in head:
        text = line
        if match := re.match(rf"{_WORDS} +(.*)", line):
            kind, text = match[1], match[2]
        if kind in ("Command", "Before"):
            command, note = _command(text)
            (commands if command else notes).append(command or note)
            if command and note:
                commands[-1] += f"  # {note}"
        elif match:
            told.append(f"- **{kind}**: {text}")
        elif told:
            told[-1] += " " + text
        else:
            first.append(text)
    block = ["```text", *commands, "```"] if commands else []
    return "\n\n".join(part for part in (" ".join(first), "\n".join(block), " ".join(notes), "\n".join(told)) if part)


def _command(line: str) -> tuple[str, str]:
    """What of a line can be typed, and what is said of it: behind two spaces, or in brackets."""
    if not line.startswith(("descant ", "make ", "python ", "pip ")):
        return "", line
    found = re.match(r"(.*?)(?:\s{2,}(.*)|\s+\((.*)\))?$", line)
    assert found is not None
    return found[1], found[2] or found[3] or ""


def _reference() -> Iterator[str]:
    """A page of all, one a folder, and one page a file, under the folders of the repository."""
    root = ["# Reference", "What a configuration can name, and what it is made of, by the folders of the repository."]
    nav = []
    for part, title in PARTS.items():
        nav.append(f"    * {title}")
        nav.append(f"        * [{title}](reference/{part}/index.md)")
        listed = [f"# {title}", _first_line(ROOT / part / "__init__.py"), "| file | what it is |\n|---|---|"]
        for file in sorted((ROOT / part).rglob("*.py")):
            inner = file.relative_to(ROOT).with_suffix("")
            if any(name.startswith("_") and name != "__init__" for name in inner.parts) or not _documented(file):
                continue
            names = inner.parts[:-1] if inner.name == "__init__" else inner.parts
            if len(names) == 1:
                continue
            place = "/".join(inner.parts[1:]).replace("__init__", "index")
            page = f"reference/{part}/{place}.md"
            _write(page, f"# {'.'.join(names[1:])}\n\n::: descant.{'.'.join(names)}\n")
            nav.append(f"        * [{'.'.join(names[1:])}]({page})")
            listed[-1] += f"\n| [{'.'.join(names[1:])}]({place}.md) | {_first_line(file)} |"
        _write(f"reference/{part}/index.md", "\n\n".join(listed) + "\n")
        root.append(f"- [{title}]({part}/index.md): {_first_line(ROOT / part / '__init__.py')}")
    _write("reference/index.md", "\n\n".join([*root[:2], "\n".join(root[2:])]) + "\n")
    yield "    * [All of it](reference/index.md)"
    yield from nav


def _first_line(file: Path) -> str:
    """The first sentence of a file's docstring, for a cell of a table."""
    text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return " ".join(text.split("\n\n")[0].split()).replace("|", "\\|")


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
    if inner.removeprefix("docs/tutorials/").removesuffix(".ipynb") in TUTORIALS:
        return inner.removeprefix("docs/").replace(".ipynb", ".md")
    if inner.startswith("docs/"):
        return inner.removeprefix("docs/")
    if inner.startswith("experiments/") and inner.endswith(".yaml"):
        name = inner.removeprefix("experiments/").removesuffix(".yaml")
        if "/" not in name:  # the defaults of every run have no page
            return ""
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
