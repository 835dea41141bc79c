"""``descant claims table``: writes CLAIMS.md and its SVG figures from stored results; runs nothing."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from descant.claims import store
from descant.claims.judge import Judgement, Runs, column, judge
from descant.claims.spec import BEFORE, EQUAL, TUNE, Claim
from descant.report import figures
from descant.run.runs import write_text

#: Most arms that a table shows as columns.
_MAX_COLUMNS = 8
_COLOURS = {"baseline": figures.FAINT, "method": figures.BLUE, "sham": figures.VERMILLION}

_HEAD = """\
# Claims

Each mechanism tested against the claim of its paper, at the scale of two cores, by `descant claims run NAME`. Each row
comes from paired runs: every arm has the same initial weights and the same batches. The *sham* runs the same code with
its signal permuted; a method that does not beat its sham has no demonstrated effect. *gain* is method less baseline
(above zero is better), with the 90 % interval of its mean over seeds. *passed* requires a gain of at least the margin
(*needed*), a gain in all seeds but one, an interval above zero, half the margin over the sham unless the claim sets
another, and all further conditions of the claim: a claim can exceed its margin and still not pass. *what it lacks* is
the first unmet requirement. Rule and margins were fixed on other seeds than those reported.

| claim | paper | verdict | gain | needed | better in | sham's gain | time | what it lacks |
|---|---|---|---|---|---|---|---|---|
"""


def write(claims: Sequence[Claim], results: Path, page: Path) -> list[str]:
    """Write the page, and a figure per claim in ``docs/claims`` beside it; returns the claims without a full result."""
    rows, sections, without = [], [], []
    for claim in claims:
        stored = store.read(results, claim.name, "full")
        if stored is None:
            without.append(claim.name)
            rows.append(f"| {claim.name} | {_paper(claim)} | not run yet | | | | | | |")
            continue
        judgement = judge(claim, stored["runs"])
        rows.append(_row(claim, judgement, stored))
        figure = page.parent / "docs" / "claims" / f"{claim.name}.svg"
        figure.parent.mkdir(parents=True, exist_ok=True)
        write_text(figure, svg(claim, stored["runs"]))
        tuned = store.read(results, claim.name, TUNE)
        sections.append(_section(claim, judgement, stored, figure.relative_to(page.parent).as_posix(), tuned))
    write_text(page, _HEAD + "\n".join(rows) + "\n" + "".join(sections))
    return without


def _paper(claim: Claim) -> str:
    """Link to the first paper that the source names."""
    number = re.search(r"arXiv (\d{4}\.\d{5})", claim.source)
    return f"[{number[1]}](https://arxiv.org/abs/{number[1]})" if number else claim.source.split(";")[0]


def _row(claim: Claim, judgement: Judgement, stored: Mapping[str, Any]) -> str:
    stale = "" if stored["digest"] == claim.digest else " (of an earlier configuration)"
    gain, reasons = judgement.method, judgement.reasons
    lacks = "".join(reasons[:1]) + (f", and {len(reasons) - 1} more" if len(reasons) > 1 else "")
    return (
        f"| [{claim.name}](#{claim.name}) | {_paper(claim)} | {judgement.verdict}{stale} | "
        f"{gain.mean:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}] | {claim.metric.margin:g} | {gain.wins} of {gain.n} | "
        f"{judgement.sham.mean:+.3f} | {stored['seconds'] / 60:.1f} min | {lacks} |"
    )


def _section(
    claim: Claim, judgement: Judgement, stored: Mapping[str, Any], figure: str, tuned: Mapping[str, Any] | None
) -> str:
    runs: Runs = stored["runs"]
    lines = [
        f"\n## {claim.name}\n",
        f"{claim.title} ({claim.source})\n",
        f"![{claim.metric.name} of each seed]({figure})\n",
    ]
    cells = {arm: {metric: _cell(runs[arm], metric) for metric in _measured(claim, arm)} for arm in runs}
    if len(runs) > _MAX_COLUMNS:  # one row per arm
        metrics = claim.metrics()
        lines.append("| arm | " + " | ".join(metrics) + " |\n|---|" + "---|" * len(metrics))
        lines += [
            f"| {arm} | " + " | ".join(values.get(m, "") for m in metrics) + " |" for arm, values in cells.items()
        ]
    else:
        lines.append("| metric | " + " | ".join(runs) + " |\n|---|" + "---|" * len(runs))
        for metric in claim.metrics():
            lines.append(f"| {metric} | " + " | ".join(cells[arm].get(metric, "") for arm in runs) + " |")
    spent = max(metrics[claim.equal] for metrics in runs["method"].values())
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
    if judgement.asked:
        lines.append("\n| asked as well | it is | |\n|---|---|---|")
        lines += [
            f"| {what} | {value:.4g} | {'met' if met else '**not met**'} |" for what, value, met in judgement.asked
        ]
    if judgement.lacks:
        lines += ["", *(f"- Not met: {reason}." for reason in judgement.lacks)]
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


def _measured(claim: Claim, arm: str) -> list[str]:
    """The metrics that an arm reports."""
    return claim.needed(arm) if arm in claim.alone else claim.metrics()


def _cell(seeds: Mapping[int, Mapping[str, float]], metric: str) -> str:
    """Mean and standard deviation over seeds; empty where a seed lacks the metric."""
    values = [metrics[metric] for metrics in seeds.values() if metric in metrics]
    if len(values) < len(seeds):
        return ""
    mean = math.fsum(values) / len(values)
    spread = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / max(len(values) - 1, 1))
    return f"{mean:.3f} ± {spread:.3f}"


def svg(claim: Claim, runs: Runs) -> str:
    """SVG figure of a claim's metric: a column an arm, a point a seed, a bar at the mean, and a line through each seed.

    It has 640 x 300 pixels, more in height where long names of arms are rotated; arms without the metric are left out.
    """
    name = claim.metric.name
    arms = [a for a in runs if a != BEFORE and name in _measured(claim, a) and all(name in m for m in runs[a].values())]
    seeds = sorted(runs[arms[0]])
    values = [column(claim, runs, arm, name, seeds) for arm in arms]
    longest = max(map(len, arms))
    rotated = 6.2 * longest > 560 / len(arms)  # names would overlap
    tooltips = {}
    bottom = 40 + round(3.6 * longest) * rotated
    with figures.style():
        made = figures.figure(640, 260 + bottom)
        axes = made.add_axes((60 / 640, bottom / (260 + bottom), 560 / 640, 230 / (260 + bottom)))
        axes.set_xlim(-0.5, len(arms) - 0.5)
        axes.grid(visible=False, axis="x")
        axes.set_title(f"{name}, {'more' if claim.metric.higher else 'less'} is better", loc="left", fontsize=12)
        axes.set_title("points are seeds, bars are means", loc="right", fontsize=11, color=figures.FAINT)
        turned = {"rotation": 35, "ha": "right", "rotation_mode": "anchor"} if rotated else {"fontsize": 12}
        axes.set_xticks(range(len(arms)), arms, color=figures.INK, **turned)
        for of_seed in zip(*values, strict=True):
            axes.plot(range(len(arms)), of_seed, color="#c4ccd8", linewidth=1, zorder=1)
        for n, arm in enumerate(arms):
            colour = _COLOURS.get(arm, figures.GREEN)
            half = min(0.4, 25 * len(arms) / 640)
            axes.hlines(math.fsum(values[n]) / len(seeds), n - half, n + half, color=colour, linewidth=2)
            for seed, value in zip(seeds, values[n], strict=True):
                gid = f"{n}-{seed}"
                axes.plot([n], [value], "o", color=colour, alpha=0.75, markersize=7, markeredgewidth=0, gid=gid)
                tooltips[gid] = {"title": f"{arm}, seed {seed}: {value:.4g}"}
        return figures.to_svg(made, tooltips)
