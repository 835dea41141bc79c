"""``CLAIMS.md`` and its figures, from the stored results alone."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from descant.claims import store
from descant.claims.judge import Judgement, Runs, column, judge
from descant.claims.spec import BEFORE, EQUAL, TUNE, Claim
from descant.run.runs import write_text

#: Arms that a table has as columns, and whose names stand side by side.
MOST_COLUMNS = 8

_HEAD = """\
# Claims

Each mechanism against the claim of its paper, at the scale of two cores, by `descant claims run NAME`. A row is made of
paired runs: the same initial weights and the same batches in every arm. The *sham* runs the same code with its signal
permuted; a method that does not beat its sham has shown nothing. *gain* is the method's over the baseline, above zero
is better, with the 90 % interval of its mean over seeds; *passed* asks for the margin, a gain in all seeds but one, an
interval above zero, half the margin over the sham where the claim says nothing else, and all that is asked as well: a
claim may gain more than is needed and not pass, and *what it lacks* is the first of its reasons. Rule and margins were
fixed on other seeds than those that count.

| claim | paper | verdict | gain | needed | better in | sham's gain | time | what it lacks |
|---|---|---|---|---|---|---|---|---|
"""


def write(claims: Sequence[Claim], results: Path, page: Path) -> list[str]:
    """Write the page and one figure a claim beside it; returns the names of claims that have no full result."""
    rows, parts, without = [], [], []
    for claim in claims:
        stored = store.read(results, claim.name, "full")
        if stored is None:
            without.append(claim.name)
            rows.append(f"| {claim.name} | {_paper(claim)} | not run yet | | | | | | |")
            continue
        found = judge(claim, stored["runs"])
        rows.append(_row(claim, found, stored))
        figure = page.parent / "docs" / "claims" / f"{claim.name}.svg"
        figure.parent.mkdir(parents=True, exist_ok=True)
        write_text(figure, svg(claim, stored["runs"]))
        tuned = store.read(results, claim.name, TUNE)
        parts.append(_part(claim, found, stored, figure.relative_to(page.parent).as_posix(), tuned))
    write_text(page, _HEAD + "\n".join(rows) + "\n" + "".join(parts))
    return without


def _paper(claim: Claim) -> str:
    """The paper whose claim it is, as its source names it first."""
    found = re.search(r"arXiv (\d{4}\.\d{5})", claim.source)
    return f"[{found[1]}](https://arxiv.org/abs/{found[1]})" if found else claim.source.split(";")[0]


def _row(claim: Claim, found: Judgement, stored: Mapping[str, Any]) -> str:
    stale = "" if stored["digest"] == claim.digest else " (of an earlier configuration)"
    gain = f"{found.method.mean:+.3f} [{found.method.low:+.3f}, {found.method.high:+.3f}]"
    wins = f"{claim.metric.margin:g} | {found.method.wins} of {found.method.n}"
    return (
        f"| [{claim.name}](#{claim.name}) | {_paper(claim)} | {found.verdict}{stale} | {gain} | "
        f"{wins} | {found.sham.mean:+.3f} | {stored['seconds'] / 60:.1f} min | {lacking(found)} |"
    )


def lacking(found: Judgement) -> str:
    """The first reason why a claim does not pass, and how many others there are; empty where it passes."""
    more = f", and {len(found.reasons) - 1} more" if len(found.reasons) > 1 else ""
    return f"{found.reasons[0]}{more}" if found.reasons else ""


def _part(
    claim: Claim, found: Judgement, stored: Mapping[str, Any], figure: str, tuned: Mapping[str, Any] | None = None
) -> str:
    runs: Runs = stored["runs"]
    lines = [
        f"\n## {claim.name}\n",
        f"{claim.title} ({claim.source})\n",
        f"![{claim.metric.name} of each seed]({figure})\n",
    ]
    cells = {arm: {metric: _cell(runs[arm], metric) for metric in _asked(claim, arm)} for arm in runs}
    if len(runs) > MOST_COLUMNS:  # a row an arm, then
        metrics = claim.metrics()
        lines.append("| arm | " + " | ".join(metrics) + " |\n|---|" + "---|" * len(metrics))
        lines += [f"| {arm} | " + " | ".join(found.get(m, "") for m in metrics) + " |" for arm, found in cells.items()]
    else:
        lines.append("| metric | " + " | ".join(runs) + " |\n|---|" + "---|" * len(runs))
        for metric in claim.metrics():
            lines.append(f"| {metric} | " + " | ".join(cells[arm].get(metric, "") for arm in runs) + " |")
    spent = max(found[claim.equal] for found in runs["method"].values())
    clock = claim.equal == EQUAL["seconds"]
    timed = "seconds of training, or nearly as many, or more," if clock else claim.equal
    where = "in every arm but the sham, which takes the method's steps" if clock else "in every arm"
    if not clock and claim.beyond:
        where += f" but {' and '.join(sorted(claim.beyond))}, which go on from one of them"
    lines.append(
        f"\nMean and standard deviation over seeds {', '.join(map(str, sorted(runs['method'])))}; "
        f"{spent:,.0f} {timed} {where}."
    )
    if claim.note is not None:
        lines.append(f"\n{claim.note}")
    if found.asked:
        lines.append("\n| asked as well | it is | |\n|---|---|---|")
        lines += [f"| {what} | {value:.4g} | {'met' if met else '**not met**'} |" for what, value, met in found.asked]
    if found.lacks:
        lines += ["", *(f"- Not met: {reason}." for reason in found.lacks)]
    if claim.tuning is not None and tuned is not None:
        best = claim.chosen(tuned["runs"])
        each = (f"{arm} {claim.arms[arm].settings[i]} of {list(claim.arms[arm].settings)}" for arm, i in best.items())
        what = f"by {claim.tuning.metric.name} of validation, seed {claim.tuning.seed}"
        lines.append(f"\nSettings, chosen {what}: {'; '.join(each)}.")
    how = claim.baseline_tuning or ("as above" if claim.is_tuned else "**none**, it is untuned")
    versions = ", ".join(f"{name} {number}" for name, number in stored["versions"].items())
    lines.append(f"\nTuning of the baseline: {how}.")
    lines.append(f"{stored['machine']['cores']} cores of {stored['machine']['processor']}; {versions}.")
    return "\n".join(lines) + "\n"


def _asked(claim: Claim, arm: str) -> list[str]:
    return claim.needed(arm) if arm in claim.alone else claim.metrics()


def _cell(found: Mapping[int, Mapping[str, float]], metric: str) -> str:
    values = [of[metric] for of in found.values() if metric in of]
    if len(values) < len(found):
        return ""
    mean = math.fsum(values) / len(values)
    spread = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / max(len(values) - 1, 1))
    return f"{mean:.3f} ± {spread:.3f}"


def svg(claim: Claim, runs: Runs) -> str:
    """Arms side by side, a point a seed; the points of one seed are joined, since they are paired. 640 x 300 pixels,
    or as high as long names need."""
    name = claim.metric.name
    arms = [a for a in runs if a != BEFORE and name in _asked(claim, a) and all(name in m for m in runs[a].values())]
    seeds = sorted(runs[arms[0]])
    values = {arm: dict(zip(seeds, column(claim, runs, arm, name, seeds), strict=True)) for arm in arms}
    every = [v for of in values.values() for v in of.values()]
    ticks = _ticks(min(every), max(every))
    left, right, top, bottom = 70, 620, 30, 250
    better = "more" if claim.metric.higher else "less"
    longest = max(map(len, arms))
    turned = 6.2 * longest > (right - left) / len(arms)  # names would run into each other
    height = max(300, bottom + 20 + round(3.2 * longest)) if turned else 300

    def x(arm: int) -> float:
        return left + (right - left) * (arm + 0.5) / len(arms)

    def y(value: float) -> float:
        return bottom - (bottom - top) * (value - ticks[0]) / (ticks[-1] - ticks[0])

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 640 {height}" font-family="sans-serif" font-size="12" '
        f'role="img" aria-label="{escape(name)} by arm">',
        f'<rect width="640" height="{height}" fill="#fff"/>',
        f'<text x="{left}" y="18" fill="#222">{escape(name)}, {better} is better</text>',
    ]
    for tick in ticks:
        parts.append(f'<line x1="{left}" x2="{right}" y1="{y(tick):.1f}" y2="{y(tick):.1f}" stroke="#e4e4e4"/>')
        parts.append(f'<text x="{left - 8}" y="{y(tick) + 4:.1f}" text-anchor="end" fill="#555">{tick:g}</text>')
    for seed in seeds:
        points = " ".join(f"{x(n):.1f},{y(values[arm][seed]):.1f}" for n, arm in enumerate(arms))
        parts.append(f'<polyline points="{points}" fill="none" stroke="#c4ccd8"/>')
    for n, arm in enumerate(arms):
        mean = math.fsum(values[arm].values()) / len(seeds)
        color = {"baseline": "#6b7280", "method": "#1d5fbf", "sham": "#b4541e"}.get(arm, "#3f7d3a")
        half = min(22.0, 0.4 * (right - left) / len(arms))
        parts.append(f'<path d="M{x(n) - half:.1f} {y(mean):.1f}h{2 * half:g}" stroke="{color}" stroke-width="2"/>')
        parts += [
            f'<circle cx="{x(n):.1f}" cy="{y(v):.1f}" r="4" fill="{color}" fill-opacity="0.75">'
            f"<title>{escape(arm)}, seed {seed}: {v:.4g}</title></circle>"
            for seed, v in values[arm].items()
        ]
        place = f'x="{x(n):.1f}" y="{bottom + 22}" text-anchor="middle"'
        if turned:
            place = f'transform="translate({x(n) + 8:.1f} {bottom + 14}) rotate(-35)" text-anchor="end" font-size="10"'
        parts.append(f'<text {place} fill="#222">{escape(arm)}</text>')
    parts.append(f'<text x="{right}" y="18" text-anchor="end" fill="#555">a point a seed; the bar is their mean</text>')
    return "\n".join([*parts, "</svg>\n"])


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers from below ``low`` to above ``high``, about five of them.

    >>> _ticks(0.12, 0.43)
    [0.1, 0.2, 0.3, 0.4, 0.5]
    """
    span = high - low or abs(high) or 1.0
    rough = span / 4
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(size * k for k in (1, 2, 5, 10) if size * k >= rough)
    first, last = math.floor(low / step), math.ceil(high / step)
    last = max(last, first + 1)
    return [round(n * step, 12) for n in range(first, last + 1)]
