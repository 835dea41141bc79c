"""``descant report``: comparison table, training curves, images and configurations of runs in one HTML file."""

from __future__ import annotations

import csv
import math
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from descant import __version__
from descant.cli.errors import fail, one_line, say
from descant.cli.errors import printable as clean
from descant.cli.untrusted import json_of, open_below, text_of
from descant.modules.io.files import real_path
from descant.report.compare import Table, by_chance, chance_of, every, is_chance, options, read
from descant.report.curves import Curve, chart, scalars
from descant.report.page import render as render_template
from descant.run.events import pictures
from descant.run.groups import Group, Run
from descant.run.runs import write_text

_HELP = """\
descant report: comparison table, training curves, images and configurations of runs in one HTML file

usage: descant report RUN ... [--output FILE] [--metrics A,B] [--baseline NAME]

  descant report contrastive-emoji siglip --output siglip.html

The file is self-contained and makes no network requests. Runs are grouped as by descant compare; a thick line
is the mean of a group, thin lines are its seeds. Images are those logged to TensorBoard. The file has at most
3 MB: images are scaled down or left out, oldest first, and the page lists what is missing.

Options:
  RUN                  a run such as demo/001, its folder, NAME (all its runs), or a pattern of these
  --output FILE        the file to write (report.html); only an earlier report is overwritten
  --metrics A,B        metrics of the table, as for descant compare
  --baseline NAME      name of a row, or of a run in it (default: the first row)
  --runs DIR           folder of the runs (runs)"""
#: Largest size in bytes of the file, and of its curves, its table of all metrics and a configuration in it.
LIMIT = 3_000_000
_CURVES, _METRICS, _CONFIG = 1_000_000, 300_000, 100_000
#: Fewest and most points of a line, and bytes of a point: `123.45 56.78L`.
_POINTS, _BYTES = (24, 300), 13
#: Maximum characters of a setting or a version.
_VALUE = 300
#: Columns of the table of runs, from metrics.json.
_COURSE = ("steps", "epochs", "samples", "seconds", "samples_per_second")
_MARK = 'name="generator" content="descant"'


def main(args: Sequence[str]) -> int:
    """Write the report as one HTML file."""
    if not args or "--help" in args or "-h" in args:
        print(_HELP)
        return 0
    parser = options("report")
    parser.add_argument("--output", type=Path, default=Path("report.html"))
    given = parser.parse_args(list(args))
    _require_report(given.output)
    table, _ = read("report", given)
    text, notes = render(table)
    size = len(text.encode())
    if size > LIMIT:
        fail(f"report: {size / 1e6:.1f} MB without any image, the limit is {LIMIT / 1e6:.0f} MB: name fewer runs")
    _write(given, text)
    for note in notes:
        say(note)
    runs = sum(len(one.runs) for one in table.groups)
    print(f"wrote {given.output}: {runs} runs in {len(table.groups)} groups, {size / 1e6:.2f} MB")
    return 0


def _require_report(file: Path) -> None:
    try:
        if not file.exists():
            return
    except OSError as error:  # such as a name that is too long
        fail(f"report: --output {file}: cannot be written: {error.strerror}")
    try:
        with open_below(file, real_path(file).parent) as stream:
            if _MARK.encode() in stream.read(2000):
                return
    except (OSError, ValueError):
        pass
    fail(f"report: --output {file}: exists and is not a report; give another FILE")


def _write(given: Namespace, text: str) -> None:
    try:
        given.output.parent.mkdir(parents=True, exist_ok=True)
        write_text(given.output, text)
    except OSError as error:
        fail(f"report: --output {given.output}: cannot be written: {error.strerror or error}")


def render(table: Table) -> tuple[str, list[str]]:
    """Return the page, and notes about what was left out of it. Images get the space that everything else leaves."""
    groups = table.groups
    metrics = every(table)
    all_metrics, metric_notes = render_template("metrics.html", table=metrics, groups=groups), list[str]()
    if len(all_metrics) > _METRICS:
        metric_notes.append(f"The table of all {len(metrics.metrics)} metrics is left out: --metrics chooses some.")
        all_metrics = ""
    sections, curve_notes = _curves(groups)
    names = dict.fromkeys(run.name.rpartition("/")[0] for one in groups for run in one.runs.values())
    values: dict[str, Any] = {
        "title": ", ".join(list(names)[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else ""),
        "version": __version__,
        "table": table,
        "groups": groups,
        "runs": [(n, run) for n, one in enumerate(groups) for run in one.runs.values()],
        "chance": by_chance(table),
        "metrics": all_metrics,
        "metric_notes": metric_notes,
        "sections": sections,
        "curve_notes": curve_notes,
        "settings": _settings(table),
        "configuration": _configuration(table.baseline.first),
        "course": _COURSE,
        "nan": math.nan,
        "versions": _versions([run for one in groups for run in one.runs.values()]),
    }
    size = len(render_template("report.html", **values, images=[], image_notes=[]).encode())
    images, image_notes = pictures(groups, max(0, LIMIT - size - 10_000))
    images.sort(key=lambda image: (image.number, image.run.name, -image.step))
    page = render_template("report.html", **values, images=images, image_notes=image_notes)
    return page, [*metric_notes, *curve_notes, *image_notes]


def _curves(groups: Sequence[Group]) -> tuple[dict[str, list[tuple[str, str]]], list[str]]:
    """Return section -> (name, SVG chart) of each scalar that some run logged at two steps or more, and notes."""
    logged = [{run.name: _scalars(run) for run in one.runs.values()} for one in groups]
    names = {name for runs in logged for curves in runs.values() for name, curve in curves.items() if len(curve) > 1}
    names = {name for name in names if not is_chance(name)}
    order = sorted(names, key=lambda name: (name.startswith("speed/"), not name.startswith("train/"), name))
    lines = sum(name in curves for runs in logged for curves in runs.values() for name in order)
    points = min(max(_CURVES // _BYTES // max(1, lines), _POINTS[0]), _POINTS[1])
    sections: dict[str, list[tuple[str, str]]] = {}
    size, dropped = 0, []
    for name in order:
        if size < _CURVES:
            guessed = [c[level] for runs in logged for c in runs.values() if (level := chance_of(name)) in c]
            levels = sorted({value for curve in guessed for value in curve.values()})
            drawn = [{run: c[name] for run, c in runs.items() if name in c} for runs in logged]
            svg = chart(groups, drawn, points, levels[:1] + levels[1:][-1:])
            size += len(svg)
        if size >= _CURVES:
            dropped.append(name)
        else:
            sections.setdefault(name.partition("/")[0] if "/" in name else "", []).append((name, svg))
    notes = [f"Curves left out, as the page would be too large: {', '.join(dropped)[:500]}."] if dropped else []
    return sections, notes


def _scalars(run: Run) -> Mapping[str, Curve]:
    try:
        return scalars(run.folder)
    except (OSError, ValueError, csv.Error) as error:
        fail(f"report {run.name}: its curves cannot be read: {clean(one_line(error))}")


def _settings(table: Table) -> list[tuple[int, list[tuple[str, str, str]]]]:
    """Return, for each other group, its number and (setting, value of the baseline, its value) if they differ."""
    base = table.baseline.first.settings
    return [
        (
            n,
            [
                (key, _value(base.get(key)), _value(ours.get(key)))
                for key in sorted({*base, *ours})
                if base.get(key) != ours.get(key)
            ],
        )
        for n, one in enumerate(table.groups)
        if one is not table.baseline and (ours := one.first.settings) is not None
    ]


def _configuration(run: Run) -> str:
    try:
        text = text_of(run.folder / "config.yaml", run.folder)
    except (OSError, ValueError) as error:
        text = one_line(error)
    return text if len(text) <= _CONFIG else f"{text[:_CONFIG]}\n... and {len(text) - _CONFIG:,} more characters"


def _value(value: object) -> str:
    text = "not set" if value is None else clean(value)
    return text if len(text) <= _VALUE else f"{text[:_VALUE]} ..."


def _versions(runs: Sequence[Run]) -> list[tuple[str, list[tuple[str, list[str]]]]]:
    """Return entries of ``versions.json``: (name, [(value, the runs that have it; empty if all have)])."""
    entries: dict[str, dict[str, list[str]]] = {}
    total = 0
    for run in runs:
        try:
            content = json_of(run.folder / "versions.json", run.folder)
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            say(f"report {run.name}: versions.json is left out: {one_line(error)}")
            continue
        total += 1
        for key, value in content.items() if isinstance(content, dict) else ():
            if key == "command":  # differs in every run; the configurations are above
                continue
            for name, inner in value.items() if isinstance(value, dict) else [(key, value)]:
                entries.setdefault(clean(name), {}).setdefault(_value(inner), []).append(run.name)
    return [
        (name[:_VALUE], [(value, [] if len(names) == total else names) for value, names in values.items()])
        for name, values in list(entries.items())[:100]
    ]
