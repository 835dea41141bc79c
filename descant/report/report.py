"""``descant report``: what runs came to in one HTML file that stands alone: table, curves, pictures, configurations."""

from __future__ import annotations

import csv
import math
from argparse import Namespace
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path

from descant import __version__
from descant.cli.errors import fail, one_line, say
from descant.cli.errors import printable as clean
from descant.cli.untrusted import json_of, opened, text_of
from descant.report.compare import Cell, Table, by_chance, counted, difference, every, number, options, read
from descant.report.curves import BOTTOM, HEIGHT, LEFT, WIDTH, Curve, colour, figure, scalars
from descant.report.page import page
from descant.run.events import Picture, pictures
from descant.run.groups import Group, Run
from descant.run.runs import write_text

_HELP = """\
descant report: table, curves, pictures and configurations of runs in one HTML file

usage: descant report RUN ... [--output FILE] [--metrics A,B] [--baseline NAME]

  descant report contrastive-emoji siglip --output siglip.html

The file needs nothing else and asks no network: send it, or open it from a disk. Runs are grouped as descant
compare does it; a curve is the mean of a group, with its seeds as thin lines. Pictures are those that
TensorBoard has. What would make the file larger than 3 MB is made smaller or left out, older pictures first,
and the page says so.

Options:
  RUN                  a run such as demo/001, its folder, NAME (all its runs), or a pattern of these
  --output FILE        the file to write (report.html); an earlier report is replaced, nothing else is
  --metrics A,B        of the table, as descant compare takes them
  --baseline NAME      a row by its name, or by the name of a run in it (the first)
  --runs DIR           where run folders live (runs)"""
#: Bytes of the file, and of its curves, its table of all metrics and a configuration in it.
LIMIT = 3_000_000
_CURVES, _METRICS, _TEXT = 1_000_000, 300_000, 100_000
#: Points of a line, and bytes of one: `123.4,56.78L`.
_POINTS, _BYTES = (24, 300), 13
_VALUE = 300
_MARK = 'name="generator" content="descant"'


def main(args: Sequence[str]) -> int:
    """Write the report.

    Raises:
        Refusal: as ``descant compare`` does, and if the file cannot be written or is something else.
    """
    if not args or "--help" in args or "-h" in args:
        print(_HELP)
        return 0
    parser = options("report")
    parser.add_argument("--output", type=Path, default=Path("report.html"))
    given = parser.parse_args(list(args))
    _require_ours(given.output)
    table, _ = read("report", given)
    text, left = render(table)
    size = len(text.encode())
    if size > LIMIT:
        fail(f"report: {size / 1e6:.1f} MB without a picture, and {LIMIT / 1e6:.0f} MB is the most: name fewer runs")
    _write(given, text)
    for line in left:
        say(line)
    runs = sum(len(one.runs) for one in table.groups)
    print(f"wrote {given.output}: {runs} runs in {len(table.groups)} groups, {size / 1e6:.2f} MB")
    return 0


def _require_ours(file: Path) -> None:
    try:
        there = file.exists()
    except OSError as error:  # such as a name that is too long
        fail(f"report: --output {file}: cannot be written: {error.strerror}")
    if there:
        try:
            with opened(file, file.resolve().parent) as stream:
                ours = _MARK.encode() in stream.read(2000)
        except (OSError, ValueError):
            ours = False
        if not ours:
            fail(f"report: --output {file}: it is there already, and is no report; another FILE")


def _write(given: Namespace, text: str) -> None:
    try:
        given.output.parent.mkdir(parents=True, exist_ok=True)
        write_text(given.output, text)
    except OSError as error:
        fail(f"report: --output {given.output}: cannot be written: {error.strerror or error}")


def render(table: Table) -> tuple[str, list[str]]:
    """The page, and lines that say what is not in it. Pictures take what room the rest leaves."""
    groups = table.groups
    left: list[str] = []
    total = sum(len(one.runs) for one in groups)
    head = [
        f"<header><h1>{escape(_title(groups))}</h1>",
        f"<p>{total} runs in {len(groups)} groups; written by Descant {escape(__version__)}</p></header>",
        "<h2>Comparison</h2>",
        _comparison(table),
        _everything(every(table), left),
        "<h2>Curves</h2>",
        _legend(groups),
        _curves(groups, left),
    ]
    tail = ["<h2>Configurations</h2>", *_configurations(table), "<h2>Runs</h2>", _runs(groups), _versions(groups)]
    room = LIMIT - sum(map(len, map(str.encode, [*head, *tail]))) - 40_000
    shown, lines = pictures(groups, max(0, room))
    left += lines
    body = [*head, *_pictures(groups, shown, lines), *tail]
    return page(_title(groups), "\n".join(body), WIDTH, LEFT, HEIGHT - BOTTOM), left


def _title(groups: Sequence[Group]) -> str:
    names = dict.fromkeys(run.name.rpartition("/")[0] for one in groups for run in one.runs.values())
    return ", ".join(list(names)[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


# tables ---------------------------------------------------------------------------------------------------------


def _table(rows: Iterable[Sequence[str]], kind: str = "") -> str:
    """Rows of HTML cells, the first of them as the head."""
    first, *others = rows
    lines = ["".join(f"<th>{cell}</th>" for cell in first)]
    lines += ["".join(f"<td>{cell}</td>" for cell in row) for row in others]
    return f'<div class="wide"><table class="{kind}"><tr>{"</tr><tr>".join(lines)}</tr></table></div>'


def _key(number: int, text: str) -> str:
    key = f'<svg class="key {colour(number).partition(" ")[0]}" viewBox="0 0 22 10">'
    return f'{key}<path class="{colour(number).partition(" ")[2]}" d="M0,5H22"/></svg>{escape(text)}'


def _metric(table: Table, metric: str) -> str:
    return escape(metric) + ("<br><small>lower is better</small>" if metric in table.lower else "")


def _cell(cell: Cell, baseline: bool) -> str:
    told, _, count = ("baseline", "", "") if baseline else difference(cell).partition("; ")
    told = f"<b>{told}</b>" if cell.decided else told
    return f"{number(cell.mean)}<br><small>{told}{f'<br>{count} better' if count else ''}</small>"


def _comparison(table: Table) -> str:
    rows = [["configuration", "seeds", *(_metric(table, metric) for metric in table.metrics), "seconds"]]
    for n, one in enumerate(table.groups):
        cells = [_cell(table.cells[n][metric], one is table.baseline) for metric in table.metrics]
        rows.append([_key(n, one.name), counted(one), *cells, number(table.seconds[n], ",.0f")])
    if any(chance := by_chance(table)):
        rows.append(["by chance", "-", *(escape(told or "-") for told in chance), "-"])
    note = (
        "Means over seeds; below them the difference to the baseline at the same seeds, its interval of 95 % "
        "(Student's, paired), and how many seeds are better. Bold: of three seeds or more, "
        "and the interval leaves out zero; of those that nothing is behind, one in twenty does."
    )
    return _table(rows) + (f'<p class="note">{note}</p>' if len(table.groups) > 1 else "")


def _everything(table: Table, left: list[str]) -> str:
    """All metrics, a row each."""
    rows = [["metric", *(_key(n, one.name) for n, one in enumerate(table.groups))]]
    for metric in table.metrics:
        cells = [_cell(table.cells[n][metric], one is table.baseline) for n, one in enumerate(table.groups)]
        rows.append([_metric(table, metric), *cells])
    text = _table(rows)
    if len(text) > _METRICS:
        left.append(f"The table of all {len(table.metrics)} metrics is left out: --metrics chooses some.")
        return f'<p class="note">{escape(left[-1])}</p>'
    return f"<details><summary>All {len(table.metrics)} metrics</summary>{text}</details>"


# curves ---------------------------------------------------------------------------------------------------------


def _legend(groups: Sequence[Group]) -> str:
    keys = (f'<button data-g="{n}" type="button">{_key(n, one.name)}</button>' for n, one in enumerate(groups))
    return f'<div id="legend">{"".join(keys)}</div>'


def _curves(groups: Sequence[Group], left: list[str]) -> str:
    """A chart a scalar that any run logged at two steps or more, by set; speed is folded."""
    logged = [{run.name: _scalars(run) for run in one.runs.values()} for one in groups]
    names = {name for some in logged for curves in some.values() for name, curve in curves.items() if len(curve) > 1}
    order = sorted(names, key=lambda name: (name.startswith("speed/"), not name.startswith("train/"), name))
    lines = sum(name in curves for some in logged for curves in some.values() for name in order)
    points = min(max(_CURVES // _BYTES // max(1, lines), _POINTS[0]), _POINTS[1])
    sections: dict[str, list[str]] = {}
    size, dropped = 0, []
    for name in order:
        of_group = [{run: curves[name] for run, curves in some.items() if name in curves} for some in logged]
        chart = figure(name, groups, of_group, points)
        size += len(chart)
        if size > _CURVES:
            dropped.append(name)
            continue
        sections.setdefault(name.partition("/")[0] if "/" in name else "", []).append(chart)
    parts = []
    for title, charts in sections.items():
        grid = f'<div class="charts">{"".join(charts)}</div>'
        folded = f"<details><summary>{escape(title)}</summary>{grid}</details>"
        parts.append(folded if title == "speed" else f"<h3>{escape(title)}</h3>{grid}")
    if dropped:
        left.append(f"Curves left out, as the page would be too large: {', '.join(dropped)[:500]}.")
        parts.append(f'<p class="note">{escape(left[-1])}</p>')
    if not names:
        parts.append('<p class="note">None of these runs logged a scalar at two steps.</p>')
    return "\n".join(parts)


def _scalars(run: Run) -> Mapping[str, Curve]:
    try:
        return scalars(run.folder)
    except (OSError, ValueError, csv.Error) as error:
        fail(f"report {run.name}: its curves cannot be read: {clean(one_line(error))}")


# pictures -------------------------------------------------------------------------------------------------------


def _pictures(groups: Sequence[Group], shown: Sequence[Picture], lines: Sequence[str]) -> list[str]:
    if not shown and not lines:
        return []
    parts = ["<h2>Pictures</h2>", *(f'<p class="note">{escape(line)}</p>' for line in lines)]
    for tag in dict.fromkeys(picture.tag for picture in shown):
        mine = [picture for picture in shown if picture.tag == tag]
        newest, older = ([p for p in mine if bool(p.age) == old] for old in (False, True))
        parts.append(f"<h3>{escape(tag)}</h3>{_frames(groups, newest)}")
        if older:
            parts.append(f"<details><summary>{len(older)} of earlier steps</summary>{_frames(groups, older)}</details>")
    return parts


def _frames(groups: Sequence[Group], some: Sequence[Picture]) -> str:
    frames = []
    for picture in sorted(some, key=lambda p: (p.number, p.run.name, -p.step)):
        told = f"{_key(picture.number, groups[picture.number].name)}, {escape(picture.run.name)}, step {picture.step:,}"
        width, height = picture.size
        image = f'<img alt="{escape(picture.tag)}" width="{width}" height="{height}" src="{picture.uri}">'
        frames.append(f"<figure><figcaption>{told}</figcaption>{image}</figure>")
    return f'<div class="pictures">{"".join(frames)}</div>'


# configurations and versions ------------------------------------------------------------------------------------


def _configurations(table: Table) -> list[str]:
    """The baseline's configuration, and of each other group what differs from it."""
    base = table.baseline
    parts = []
    for n, one in enumerate(table.groups):
        if one is base:
            continue
        ours, theirs = one.first.settings, base.first.settings
        keys = sorted(key for key in {*ours, *theirs} if ours.get(key) != theirs.get(key))
        rows = [["setting", f"{escape(base.name)} (baseline)", _key(n, one.name)]]
        rows += [[escape(key), *(_value(some.get(key)) for some in (theirs, ours))] for key in keys]
        parts.append(_table(rows, "left"))
    try:
        text = text_of(base.first.folder / "config.yaml", base.first.folder)
    except (OSError, ValueError) as error:
        text = one_line(error)
    cut = text if len(text) <= _TEXT else f"{text[:_TEXT]}\n... and {len(text) - _TEXT:,} more characters"
    name = f"Configuration of {escape(base.name)}, {escape(base.first.name)}"
    return [*parts, f"<details><summary>{name}</summary><pre>{escape(cut)}</pre></details>"]


def _value(value: object) -> str:
    text = "not set" if value is None else clean(value)
    return escape(text if len(text) <= _VALUE else f"{text[:_VALUE]} ...")


def _runs(groups: Sequence[Group]) -> str:
    course = ("steps", "epochs", "samples", "seconds", "samples_per_second")
    rows = [["run", "group", "seed", *(name.replace("_", " ") for name in course)]]
    for n, one in enumerate(groups):
        for run in one.runs.values():
            figures = [number(run.metrics.get(name, math.nan), ",.0f") for name in course]
            figures[0] += f"<br><small>stopped: {escape(run.stopped)}</small>" if run.stopped else ""
            rows.append([escape(run.name), _key(n, one.name), str(run.seed), *figures])
    return _table(rows, "runs")


def _versions(groups: Sequence[Group]) -> str:
    """Of ``versions.json``, each value with the runs that have it, where they differ."""
    found: dict[str, dict[str, list[str]]] = {}
    total = 0
    for run in (run for one in groups for run in one.runs.values()):
        try:
            content = json_of(run.folder / "versions.json", run.folder)
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            say(f"report {run.name}: versions.json is left out: {one_line(error)}")
            continue
        total += 1
        for key, value in content.items() if isinstance(content, dict) else ():
            if key == "command":  # a run's own; its configuration says what it came to
                continue
            for name, inner in value.items() if isinstance(value, dict) else [(key, value)]:
                found.setdefault(clean(name), {}).setdefault(_value(inner), []).append(run.name)
    rows = [["what", "version"]]
    for name, values in list(found.items())[:100]:
        told = [
            text if len(some) == total else f"{text} <small>({_several(some)})</small>" for text, some in values.items()
        ]
        rows.append([escape(name[:_VALUE]), "<br>".join(told)])
    return f"<details><summary>Versions</summary>{_table(rows, 'left')}</details>" if found else ""


def _several(names: Sequence[str]) -> str:
    return escape(", ".join(names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
