"""``descant claims table``: writes CLAIMS.md and its SVG figures from stored results; runs nothing."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from descant.claims import comparison, plots, store
from descant.claims.claim import ABLATIONS, WITHIN
from descant.claims.effect import Effect, Interval
from descant.claims.judge import Judgement, Runs
from descant.claims.plots import measured
from descant.claims.spec import EQUAL, TUNE, Claim
from descant.cli.catalogue import papers
from descant.run.runs import write_text

#: Most arms that a table shows as columns.
_MAX_COLUMNS = 8

_HEAD = """\
# Claims

Each mechanism tested against the claim of its paper, at the scale of two cores, by `descant claims run NAME`. A row
comes from paired runs: every arm has the same initial weights and the same batches. The *placebo* (the arm `sham`) runs
the same code with its signal permuted. Margins were fixed on other seeds than those reported.

- **exact?** *yes*: the equation equals an explicit loop or a closed form in a test; *our reading*: the paper leaves it
  open.
- **effect here** is the gain over the baseline (above zero is better) with its 95 % interval, in one word: Student's
  over seeds, joined to a bootstrap over test items where a claim's section has one.
  *helps*: over baseline and over placebo above 0, and at least the margin; *helps a little*: both above 0, below the
  margin; *placebo does as well*: over baseline above 0, over placebo not; *placebo invalid*: both above 0, but the
  placebo is a margin or more away from the baseline, so it shows nothing; *no effect*: within the margin around 0;
  *hurts*: below 0; *no room*: the oracle gains less than two margins; *cannot tell*: the rest.
- **possible** is the share of the oracle's gain over the baseline; *?* where no oracle was run.
- **placebo** is its gain over the baseline.
- **headline**: how many of the paper's conditions hold, the margin among them; each section lists them.

![Gains of all claims over baseline and over placebo, in margins](docs/claims/overview.svg)

"""
_COLUMNS = (
    "| family | {} | exact? | effect here | margin | possible | placebo | headline | cost |\n" + "|---" * 9 + "|\n"
)
#: Family of claims that only show a setting, and of those that belong to no paper in the list.
SETTINGS, OTHERS = "settings", "others"
_BESIDE = (SETTINGS, OTHERS)


def write(
    claims: Sequence[Claim], results: Path, page: Path, compared: Sequence[comparison.Comparison] = ()
) -> list[str]:
    """Write the page, and beside it ``docs/claims`` with an overview and a figure a claim and a comparison.

    Returns the names of the claims without a full result.
    """
    rows: dict[str, list[str]] = {}
    effects: dict[str, list[tuple[str, Effect]]] = {}
    sections, without = [], []
    folder = page.parent / "docs" / "claims"
    folder.mkdir(parents=True, exist_ok=True)
    for claim in sorted(claims, key=lambda claim: (family(claim) in _BESIDE, family(claim))):
        of_family = rows.setdefault(family(claim), [])
        stored = store.of_design(results, claim, "full")
        if stored is None:
            without.append(claim.name)
            of_family.append(f"| {family(claim)} | {claim.name}, {_paper(claim)} | | not run yet | | | | | |")
            continue
        judgement = store.judged(claim, stored)
        if judgement is None:
            of_family.append(_ended(claim, stored))
            sections.append(_ended_section(claim, stored))
            continue
        of_family.append(_row(claim, judgement, stored))
        effects.setdefault(family(claim), []).append((claim.name, judgement.effect))
        figure = folder / f"{claim.name}.svg"
        write_text(figure, plots.svg(claim, stored["runs"]))
        beside = {kind: store.of_design(results, claim, kind) for kind in (TUNE, ABLATIONS)}
        sections.append(_section(claim, judgement, stored, figure.relative_to(page.parent).as_posix(), beside))
    settings, drawn = rows.pop(SETTINGS, []), {name: of for name, of in effects.items() if name != SETTINGS}
    parts = [_HEAD, _COLUMNS.format("paper, mechanism"), *(f"{row}\n" for of in rows.values() for row in of)]
    if settings:
        parts += ["\n", _COLUMNS.format("what a setting leaves to gain"), *(f"{row}\n" for row in settings)]
    old = [row for claim in claims for row in _superseded(claim, results)]
    if old:
        parts += ["\n", _COLUMNS.format("superseded by a new design"), *(f"{row}\n" for row in old)]
    if drawn:
        write_text(folder / "overview.svg", plots.overview(drawn))
    parts += [comparison.section(of, results, folder / f"{of.name}.svg", page) for of in compared]
    write_text(page, "".join([*parts, *sections]))
    return without


def paper_of(claim: Claim) -> Mapping[str, Any] | None:
    """The paper in the list whose claim it is."""
    return next((paper for paper in papers() if paper.get("claim") == claim.name), None)


def family(claim: Claim) -> str:
    """Family of its paper, under which it is sorted."""
    paper = paper_of(claim)
    return SETTINGS if claim.setting else OTHERS if paper is None else str(paper["family"])


def exact(claim: Claim) -> str | None:
    """Whether the equation of its paper is held by a test: yes, our reading, or None for a claim of no paper."""
    paper = paper_of(claim)
    return None if paper is None else ("yes" if paper["exact"] else "our reading")


def _paper(claim: Claim) -> str:
    """Link to the first paper that the source names."""
    number = re.search(r"arXiv (\d{4}\.\d{5})", claim.source)
    return f"[{number[1]}](https://arxiv.org/abs/{number[1]})" if number else claim.source.split(";")[0]


def _row(claim: Claim, judgement: Judgement, stored: Mapping[str, Any]) -> str:
    found, (held, of) = judgement.effect, judgement.held
    share = found.share_of_headroom
    word = "" if claim.setting else f"**{found.word}** "  # a setting has no method that could help
    return _line(
        claim,
        f"{word}{found.over_baseline}",
        f"{found.margin:.3g}",
        "?" if share is None else f"{share:.0%}",
        f"{found.placebo.mean:+.3f}",
        f"{held} of {of}",
        stored=stored,
        name=f"[{claim.name}](#{claim.name})",
    )


def _line(claim: Claim, *cells: str, stored: Mapping[str, Any], name: str = "") -> str:
    """Row of the table: of ``cells``, the effect, margin, share, placebo and headline."""
    minutes = f"{stored['seconds'] / 60:.0f} min"
    first = (family(claim), f"{name or claim.name}, {_paper(claim)}", exact(claim) or "")
    return f"| {' | '.join((*first, *cells, minutes))} |"


def _ended(claim: Claim, stored: Mapping[str, Any]) -> str:
    """Row of a claim that stopped before its effect was measured."""
    headroom = f" (oracle {stored['headroom']:+.3f})" if "headroom" in stored else f" ({stored['signal']:.3g})"
    margin = f"{stored['margin']:.3g}" if "margin" in stored else ""
    word, name = f"**{stored['effect']}**{headroom}", f"[{claim.name}](#{claim.name})"
    return _line(claim, word, margin, "", "", "", stored=stored, name=name)


def _ended_section(claim: Claim, stored: Mapping[str, Any]) -> str:
    runs: Runs = stored["runs"]
    if "headroom" in stored:
        what = (
            f"on pilot seeds the oracle gains {stored['headroom']:+.3g}, and two margins are {2 * stored['margin']:.3g}"
        )
    else:
        what = f"{claim.signal}: it is {stored['signal']:.3g}"
    lines = [
        f"\n## {claim.name}\n",
        f"{claim.title} ({claim.source})\n",
        f"**{stored['effect']}**: {what}. So its effect was not measured, and the lock-box stays closed.\n",
        *(_means(claim, runs) if runs else ()),
    ]
    return "\n".join(lines) + "\n"


def _superseded(claim: Claim, results: Path) -> Iterator[str]:
    """Rows of the earlier designs of a claim: set aside by a redesign, or of another configuration than it has now."""
    for kind in ("superseded", "full"):
        stored = store.read(results, claim.name, kind)
        if stored is None or stored["digest"] == claim.digest:
            continue
        effect = stored.get("effect") or stored.get("verdict", "")
        if "gain" in stored:
            effect = f"**{effect}** {Interval.of_stored(stored['gain'])}"
        placebo = f"{stored['placebo']:+.3f}" if "placebo" in stored else ""
        yield _line(claim, effect, "", "", placebo, "", stored=stored)


def _ablations(claim: Claim, stored: Mapping[str, Any]) -> list[str]:
    """Table of the arms that no verdict needs, with one seed each."""
    runs: Runs = stored["runs"]
    seed = next(iter(next(iter(runs.values()))))
    metrics = [m for m in claim.metrics() if any(m in of[seed] for of in runs.values())]
    rows = ["| arm | " + " | ".join(metrics) + " |\n|---|" + "---|" * len(metrics)]
    for arm, of in runs.items():
        rows.append(f"| {arm} | " + " | ".join(_number(of[seed][m]) if m in of[seed] else "" for m in metrics) + " |")
    return [f"\nOther arms, seed {seed} alone, no part of the verdict:\n", *rows]


def _section(
    claim: Claim, judgement: Judgement, stored: Mapping[str, Any], figure: str, beside: Mapping[str, Any]
) -> str:
    runs: Runs = stored["runs"]
    by_item = ""
    if judgement.items is not None:
        of = judgement.items
        by_item = f" Over {of.number:,} test items alone {of.over_baseline}, over the placebo {of.over_placebo}."
    lines = [
        f"\n## {claim.name}\n",
        f"{claim.title} ({claim.source})\n",
        f"All conditions: **{judgement.verdict}**; over the placebo {judgement.effect.over_placebo}.{by_item}\n",
        f"![{claim.metric.name} of each seed]({figure})\n",
    ]
    lines += _means(claim, runs)
    clock = claim.equal == EQUAL["seconds"]
    timed = "seconds of training, or nearly as many, or more," if clock else claim.equal
    spent = f"{max(metrics[claim.equal] for metrics in runs['method'].values()):,.0f} {timed}"
    if claim.equal == EQUAL["flops"]:
        spent = f"FLOPs of training within {WITHIN:.0%} ({_spent(claim, runs)})"
    where = "in every arm but the sham, which takes the method's steps" if clock else "in every arm"
    if not clock and claim.beyond:
        where += f" but {' and '.join(sorted(claim.beyond))}, which go on from one of them"
    where += f"; {' and '.join(claim.apart)} not compared, with a budget apart" if claim.apart else ""
    lines.append(
        f"\nMean and standard deviation over seeds {', '.join(map(str, sorted(runs['method'])))}; {spent} {where}."
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
    ablations, tuned = beside[ABLATIONS], beside[TUNE]
    if ablations is not None:
        lines += _ablations(claim, ablations)
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


def _spent(claim: Claim, runs: Runs) -> str:
    """Mean FLOPs and steps of each arm."""
    means = {arm: {key: _mean(of, key) for key in (claim.equal, EQUAL["steps"])} for arm, of in runs.items()}
    return ", ".join(f"{arm} {of[claim.equal]:.3g} in {of[EQUAL['steps']]:,.0f} steps" for arm, of in means.items())


def _mean(seeds: Mapping[int, Mapping[str, float]], metric: str) -> float:
    return math.fsum(metrics.get(metric, math.nan) for metrics in seeds.values()) / len(seeds)


def _means(claim: Claim, runs: Runs) -> list[str]:
    """Table of mean and standard deviation of each arm: a column an arm, or a row where there are many."""
    cells = {arm: {metric: _cell(runs[arm], metric) for metric in measured(claim, arm)} for arm in runs}
    metrics = claim.metrics()
    if len(runs) > _MAX_COLUMNS:
        rows = [f"| {arm} | " + " | ".join(values.get(m, "") for m in metrics) + " |" for arm, values in cells.items()]
        return ["| arm | " + " | ".join(metrics) + " |\n|---|" + "---|" * len(metrics), *rows]
    rows = [f"| {metric} | " + " | ".join(cells[arm].get(metric, "") for arm in runs) + " |" for metric in metrics]
    return ["| metric | " + " | ".join(runs) + " |\n|---|" + "---|" * len(runs), *rows]


def _cell(seeds: Mapping[int, Mapping[str, float]], metric: str) -> str:
    """Mean and standard deviation over seeds; empty where a seed lacks the metric."""
    values = [metrics[metric] for metrics in seeds.values() if metric in metrics]
    if len(values) < len(seeds):
        return ""
    mean = math.fsum(values) / len(values)
    spread = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / max(len(values) - 1, 1))
    return f"{_number(mean)} ± {_number(spread)}"


def _number(value: float) -> str:
    """Three digits after the point, or three in all of a count such as FLOPs.

    >>> _number(0.25), _number(1293689893081.6)
    ('0.250', '1.29e+12')
    """
    return f"{value:.3f}" if abs(value) < 1e6 else f"{value:.3g}"
