"""``descant compare``: metrics of runs by configuration, with paired differences to a baseline over shared seeds."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import textwrap
import unicodedata
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from descant.cli.errors import Refusal, fail, hint, say
from descant.cli.options import Options
from descant.modules.core.metric_names import CHANCE, order
from descant.report.statistics import Paired, compare_pairs
from descant.run.groups import MOST_TOLD, Group, group, load

_HELP = """\
descant compare: metrics of finished runs, a row per configuration, paired by the seeds they share

usage: descant compare RUN ... [--metrics A,B] [--baseline NAME] [--format markdown|csv|json]

  descant compare contrastive-emoji siglip
  descant compare '*emoji*' --metrics '*/i2t_r10,vendor/*' --baseline siglip --format csv

Runs that differ only in their seed form one row, named by the settings that set it apart (names, devices and
callbacks that only watch do not count). For each metric the table shows the mean over seeds, the mean
difference to the baseline at the same seeds with its 95 % interval (Student's t, paired; a bootstrap of so
few seeds is too narrow), and how many seeds are better. Metrics of which lower values are better are marked,
and so are runs that stopped before their last step. The last row is chance level, where the runs measured it.

Options:
  RUN                  a run such as demo/001, its folder, NAME (all its runs), a folder of such names as
                       runs/sweeps/NAME-DIGEST, or a pattern of these
  --metrics A,B        names or patterns; '*' for all (default: what ModelCheckpoint monitors, on every set
                       that all runs have)
  --baseline NAME      name of a row, or of a run in it (default: the first row)
  --format FORMAT      markdown, csv or json (markdown)
  --runs DIR           folder of the runs (runs)"""
_FORMATS = ("markdown", "csv", "json")
#: Maximum number of metrics shown if --metrics names none.
_MAX_METRICS = 6
#: Maximum characters of a line of the Markdown table, of a row's name, and of a shortened metric name.
WIDTH, _NAME, _METRIC = 120, 40, 24
_BY_CHANCE = "by chance"
#: Words in a metric's name that mean lower is better, unless a ModelCheckpoint has a mode for it.
_LOWER = {
    *("loss", "error", "nll", "ppl", "perplexity", "mae", "mse", "rmse", "wer", "cer", "eer", "fid", "medr", "meanr"),
    *("gap", "align", "uniform", "seconds", "wait"),
}


@dataclass(frozen=True)
class Cell:
    """One metric of one group: mean over seeds, paired difference to the baseline, and number of better seeds."""

    mean: float
    paired: Paired | None = None
    better: int = 0

    @property
    def decided(self) -> bool:
        """Whether the interval of at least 3 seeds excludes zero; the differences of 2 seeds are often equal."""
        return self.paired is not None and self.paired.n > 2 and (self.paired.low > 0 or self.paired.high < 0)


@dataclass
class Table:
    """Rows (groups) and columns (metrics) of a comparison; ``lower``: the metrics for which lower is better."""

    groups: list[Group]
    baseline: Group
    metrics: list[str]
    lower: set[str]
    cells: list[dict[str, Cell]] = field(default_factory=list)

    @property
    def seconds(self) -> list[float]:
        """Return the mean wall time of the fits of each group; nan if none was fitted."""
        return [_mean(list(_values(one, "seconds").values())) for one in self.groups]


def main(args: Sequence[str]) -> int:
    """Print the table that compares the runs."""
    if not args or "--help" in args or "-h" in args:
        print(_HELP)
        return 0
    parser = options("compare")
    parser.add_argument("--format", default=_FORMATS[0])
    given = parser.parse_args(list(args))
    if given.format not in _FORMATS:
        fail(f"compare: --format {given.format}: no such format{hint(given.format, _FORMATS)}")
    table, more = read("compare", given)
    for one in table.groups:
        if one is not table.baseline and not set(one.seeds) & set(table.baseline.seeds):
            pair = f"{_seeds(one)} and the baseline {_seeds(table.baseline)}"
            fail(f"compare: {pair} have no seed in common{_advice(table.groups)}")
    if more:
        say(f"{more} more metrics: --metrics '*', or their names")
    if (differing := len({key for one in table.groups for key in one.parts})) > MOST_TOLD:
        say(f"{differing} settings differ, a row names at most {MOST_TOLD}: descant report and --format json show all")
    if unfinished := [f"{run.name} ({run.stopped})" for one in table.groups for run in one.stopped_runs]:
        rest = f", and {len(unfinished) - 1} others" if len(unfinished) > 1 else ""
        say(f"stopped before the last step: {unfinished[0]}{rest}")
    print({"markdown": markdown, "csv": as_csv, "json": as_json}[given.format](table))
    return 0


def options(command: str) -> Options:
    """Build the options that ``compare`` and ``report`` share."""
    parser = Options(prog=f"descant {command}", add_help=False)
    parser.add_argument("run", nargs="*")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--metrics", default="")
    parser.add_argument("--baseline", default="")
    return parser


def read(command: str, given: Namespace) -> tuple[Table, int]:
    """Return the requested table, and how many more metrics there are if ``--metrics`` names none."""
    if not given.run:
        fail(f"{command}: no run given: descant {command} NAME, or NAME/001 NAME/002 ...")
    groups = group(load(command, given.run, given.runs))
    baseline = _baseline(command, groups, given.baseline)
    known, modes = _list_metrics(groups), _modes(groups)
    lower = {name for name in known if lower_is_better(name, modes)}
    chosen = _choose_metrics(command, given.metrics, known) if given.metrics else _default(groups, known)
    return fill(groups, baseline, chosen, lower), 0 if given.metrics else len(known) - len(chosen)


def every(table: Table) -> Table:
    """Return the same rows with all metrics of any run."""
    return fill(table.groups, table.baseline, _list_metrics(table.groups), table.lower)


def fill(groups: list[Group], base: Group, metrics: list[str], lower: set[str]) -> Table:
    """Compute all cells; differences are over the seeds that a group shares with the baseline."""
    table = Table(groups, base, metrics, lower)
    for one in groups:
        cells = {}
        for metric in table.metrics:
            ours, theirs = _values(one, metric), _values(base, metric)
            shared = [seed for seed in ours if isinstance(seed, int) and seed in theirs]
            cells[metric] = Cell(_mean(list(ours.values())))
            if shared and one is not base and _same_meaning(metric, one, base):
                change = compare_pairs([ours[seed] for seed in shared], [theirs[seed] for seed in shared])
                better = change.losses if metric in table.lower else change.wins
                cells[metric] = Cell(cells[metric].mean, change, better)
        table.cells.append(cells)
    return table


def _same_meaning(metric: str, one: Group, other: Group) -> bool:
    """Whether values of a metric can be compared; a recipe's own loss only between runs of the same recipe and loss."""
    own = _last(metric) == "loss" or metric.startswith("train/")
    settings = [run.settings or {} for run in (one.first, other.first)]
    return not own or all(settings[0].get(key) == settings[1].get(key) for key in ("model", "model.loss"))


def _baseline(command: str, groups: Sequence[Group], name: str) -> Group:
    if not name:
        return groups[0]
    by_run = [one for one in groups if any(name in (run.name, run.folder.parent.name) for run in one.runs.values())]
    matches = [one for one in groups if one.name == name] or by_run
    if len(matches) == 1:
        return matches[0]
    if by_run:
        rows = ", ".join(one.name for one in by_run)
        fail(f"{command}: --baseline {name}: its runs are in {len(by_run)} rows; choose one of {rows}")
    known = {one.name for one in groups} | {run.folder.parent.name for one in groups for run in one.runs.values()}
    raise Refusal(f"{command}: --baseline {name}: no such row or run among those compared{hint(name, known)}")


def _seeds(one: Group) -> str:
    return f"{one.name} (seeds {', '.join(map(str, one.seeds)) or 'not set'})"


def _advice(groups: Sequence[Group]) -> str:
    """Return ``; nearest: --baseline NAME``, if some group shares a seed with every other."""
    for one in groups:
        if all(set(one.seeds) & set(other.seeds) for other in groups):
            return f"; nearest: --baseline '{one.name}'"
    return "; train one with a seed of the other: --seed_everything N"


# metrics --------------------------------------------------------------------------------------------------------


def _list_metrics(groups: Sequence[Group]) -> list[str]:
    """List the metrics of any run: evaluation first, then training, then counts and times."""
    names = {name for one in groups for run in one.runs.values() for name in run.metrics}
    return sorted(names, key=lambda name: ("/" not in name, name.startswith(("train/", "speed/")), order(name)))


def _common_metrics(groups: Sequence[Group], known: Sequence[str]) -> list[str]:
    """List the metrics that every run has, without chance levels, which have their own row."""
    runs = [run for one in groups for run in one.runs.values()]
    return [name for name in known if all(name in run.metrics for run in runs) and not is_chance(name)]


def is_chance(name: str) -> bool:
    """Whether a metric is the level that a guess reaches."""
    return CHANCE in name.split("/")[1:-1]


def chance_of(metric: str) -> str:
    """Return the name of the metric that has the chance level of this one.

    >>> chance_of("val/i2t_r1")
    'val/chance/i2t_r1'
    """
    of, _, last = metric.rpartition("/")
    return f"{of}/{CHANCE}/{last}"


def by_chance(table: Table) -> list[str]:
    """Return the chance level of each metric: a number, or the range over groups; empty if no run measured it."""
    levels = []
    for metric in table.metrics:
        values = [value for one in table.groups for value in _values(one, chance_of(metric)).values()]
        texts = dict.fromkeys(number(value) for value in sorted({min(values), max(values)} if values else ()))
        levels.append(" to ".join(texts))
    return levels


def _modes(groups: Sequence[Group]) -> dict[str, str]:
    """Return ``i2t_r1`` -> ``max``, from the metrics that ModelCheckpoints monitor."""
    runs = (run for one in groups for run in one.runs.values())
    return {_last(name): mode for run in runs for name, mode in run.monitored.items()}


def _last(name: str) -> str:
    return name.rpartition("/")[2]


def lower_is_better(name: str, modes: Mapping[str, str]) -> bool:
    """Whether lower values of a metric are better: by the mode of a ModelCheckpoint, else by its name.

    Everything logged in training is a loss, except the learning rate.

    >>> [lower_is_better(n, {"score": "min"}) for n in ("val/i2t_r1", "val/i2t_medr", "train/image-text", "val/score")]
    [False, True, True, True]
    """
    last = _last(name)
    if last in modes:
        return modes[last] == "min"
    inner = name.partition("/")[2] or name  # without the set; words may stand anywhere: val/loss/image+text
    return bool(_LOWER & set(re.split(r"[_\W]", inner))) or (name.startswith("train/") and last != "lr")


def _default(groups: Sequence[Group], known: Sequence[str]) -> list[str]:
    """Choose from the metrics that all runs have: the monitored ones on every set, else all of evaluation, else losses.

    Losses of different recipes are left out: InfoNCE, an error of pixels and a cross-entropy have no common scale.
    """
    modes, known = _modes(groups), _common_metrics(groups, known)
    known = [name for name in known if all(_same_meaning(name, one, groups[0]) for one in groups)] or known
    evaluated = [name for name in known if "/" in name and not name.startswith(("train/", "speed/"))]
    monitored = [name for name in evaluated if _last(name) in modes]
    losses = [name for name in known if _last(name) == "loss"]
    return (monitored or evaluated or losses or list(known))[:_MAX_METRICS]


def _choose_metrics(command: str, metrics: str, known: Sequence[str]) -> list[str]:
    chosen: dict[str, None] = {}
    for word in metrics.split(","):
        matches = [name for name in known if name == word] or [name for name in known if fnmatchcase(name, word)]
        if not matches:
            fail(f"{command}: --metrics {word}: no run has it{hint(word, known)}")
        chosen |= dict.fromkeys(matches)
    return list(chosen)


def _values(one: Group, metric: str) -> dict[int | str, float]:
    return {seed: run.metrics[metric] for seed, run in one.runs.items() if metric in run.metrics}


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan


# formats --------------------------------------------------------------------------------------------------------


def markdown(table: Table) -> str:
    """Format aligned Markdown, two columns per metric; metrics beyond ``WIDTH`` characters go into tables below."""
    seconds = ["seconds", *(f"{s:,.1f}" if s < 100 else number(s, ",.0f") for s in table.seconds)]
    chance = by_chance(table)
    guessed = any(chance)
    pairs = []
    for k, metric in enumerate(table.metrics):
        lower = " (lower is better)" if metric in table.lower else ""
        head = metric if len(metric + lower) <= 2 * _METRIC else _shorten(metric, _METRIC)
        of = [cells[metric] for cells in table.cells]
        column = [head + lower, *(number(cell.mean) for cell in of)] + [chance[k] or "-"] * guessed
        texts = [
            "baseline" if one is table.baseline else difference(c) for one, c in zip(table.groups, of, strict=True)
        ]
        pairs.append((column, ["difference [95 %]; better", *texts] + ["-"] * guessed))
    columns = [["seeds", *map(count_text, table.groups)] + ["-"] * guessed, *(c for pair in pairs for c in pair)]
    columns = [[cell.replace("|", "\\|") for cell in column] for column in columns]
    seconds += ["-"] * guessed
    seeds, pairs = columns[0], list(zip(columns[1::2], columns[2::2], strict=True))
    widest = max((_wide([seeds, *pair, seconds]) for pair in pairs), default=_wide([seeds, seconds]))
    names, legend = _names(table.groups, min(_NAME, WIDTH - 4 - widest))
    names = ["configuration", *names] + [_BY_CHANCE] * guessed
    blocks: list[list[list[str]]] = [[names, seeds]]
    for pair in pairs:
        if len(blocks[-1]) > 2 and _wide([*blocks[-1], *pair, seconds]) + 1 > WIDTH:
            blocks.append([names, seeds])
        blocks[-1] += pair
    blocks[0].append(seconds)
    return "\n\n".join([*map(_table_lines, blocks), *(["\n".join(legend)] if legend else [])])


def _wide(columns: Sequence[Sequence[str]]) -> int:
    """Return the width of columns in characters, with their separators."""
    return sum(3 + max(map(len, column)) for column in columns)


def _table_lines(columns: Sequence[Sequence[str]]) -> str:
    """Format columns as lines of Markdown, the first left-aligned and the others right-aligned."""
    widths = [max(map(len, column)) for column in columns]
    padded = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in zip(*columns, strict=True)]
    lines = [f"| {' | '.join(row)} |" for row in padded]
    rule = "|" + "|".join(f"{'-' * (w + 1)}{':' if k else '-'}" for k, w in enumerate(widths)) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def count_text(one: Group) -> str:
    """Format ``5``, or ``5, 1 stopped``: number of seeds, and of runs that stopped before their last step."""
    count, stopped = len(one.runs), len(one.stopped_runs)
    return str(count) if not stopped else f"{count} stopped" if stopped == count else f"{count}, {stopped} stopped"


def _names(groups: Sequence[Group], most: int) -> tuple[list[str], list[str]]:
    """Return row names of at most ``most`` characters, and a legend if they had to be shortened."""
    whole = [one.name.replace("|", "\\|") for one in groups]
    if max(map(len, whole)) <= most:
        return whole, []
    short = [_shorten(one.first.name.replace("|", "\\|"), most - 5) for one in groups]
    names = [f"{name} #{n}" if short.count(name) > 1 else name for n, name in enumerate(short, 1)]
    legend = []
    for name, one in zip(names, groups, strict=True):
        shown = one.name.removesuffix(f" ({one.first.name})")
        legend += textwrap.wrap(f"{name}: {shown}", WIDTH, subsequent_indent="    ", break_on_hyphens=False)
    return names, legend


def _shorten(text: str, most: int) -> str:
    """Shorten text in its middle.

    >>> _shorten("vendor/probe_subgroup_top1", 20)
    'vendor/p...roup_top1'
    """
    return text if len(text) <= most else f"{text[: (most - 3) // 2]}...{text[-(most - 2) // 2 :]}"


def number(value: float, style: str = ".4g") -> str:
    return "-" if math.isnan(value) else format(value, style)


def difference(cell: Cell) -> str:
    """Format ``+0.012 [+0.003, +0.021]; 4 of 5``: mean, interval, better seeds; a dash if no seed is shared."""
    change = cell.paired
    if change is None:
        return "-"
    interval = f" [{change.low:+.3g}, {change.high:+.3g}]" if change.n > 1 else ""
    return f"{change.mean:+.3g}{interval}; {cell.better} of {change.n}"


def _fields(cell: Cell) -> dict[str, float | int | None]:
    values: dict[str, float | int | None] = {"mean": cell.mean}
    if (change := cell.paired) is not None:
        values |= {"difference": change.mean, "low": change.low, "high": change.high}
        values |= {"better": cell.better, "equal": change.ties, "shared": change.n}
    return {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in values.items()}


def as_csv(table: Table) -> str:
    """Write CSV with columns ``METRIC`` (its mean), ``METRIC:difference``, ``METRIC:low`` and so on."""
    parts = ("difference", "low", "high", "better", "equal", "shared")
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    columns = [_inert(name) for m in table.metrics for name in (m, *(f"{m}:{part}" for part in parts))]
    writer.writerow(["configuration", "baseline", "runs", "seeds", *columns, "seconds"])
    for one, cells, seconds in zip(table.groups, table.cells, table.seconds, strict=True):
        runs = " ".join(run.name for run in one.runs.values())
        values = [_fields(cells[metric]).get(part) for metric in table.metrics for part in ("mean", *parts)]
        time = "" if math.isnan(seconds) else round(seconds, 3)
        writer.writerow([_inert(one.name), int(one is table.baseline), _inert(runs), len(one.runs), *values, time])
    return out.getvalue().rstrip("\n")


def _inert(text: str) -> str:
    """Return a CSV cell that no spreadsheet takes for a formula, even after spaces or in full-width characters.

    >>> _inert("=1+1"), _inert(" \uff1d1"), _inert("emoji")
    ("'=1+1", "' \uff1d1", 'emoji')
    """
    first = unicodedata.normalize("NFKC", text.strip())[:1]
    return f"'{text}" if first in ("=", "+", "-", "@") or text[:1] in ("\t", "\r") else text


def as_json(table: Table) -> str:
    """Write JSON with the runs, seeds and distinguishing settings of each group, and the statistics of each metric."""
    rows = [
        {
            "name": one.name,
            "runs": [run.name for run in one.runs.values()],
            "seeds": list(one.runs),
            "settings": one.parts,
            "stopped": {run.name: run.stopped for run in one.stopped_runs},
            "seconds": None if math.isnan(seconds) else round(seconds, 3),
            "metrics": {metric: _fields(cell) for metric, cell in cells.items()},
        }
        for one, cells, seconds in zip(table.groups, table.cells, table.seconds, strict=True)
    ]
    lower = [metric for metric in table.metrics if metric in table.lower]
    content = {"baseline": table.baseline.name, "level": 0.95, "lower_is_better": lower, "groups": rows}
    return json.dumps(content, indent=1)
