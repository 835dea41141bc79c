"""``descant claims table``: write CLAIMS.md, a page per claim and their figures from stored results; runs nothing."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from descant.claims import comparison, plots, store
from descant.claims.claim import ABLATIONS, EQUAL, WITHIN, Claim
from descant.claims.digest import RULE
from descant.claims.effect import Effect, Interval
from descant.claims.judge import Judgement, Runs
from descant.claims.registration import exploratory
from descant.cli.catalogue import papers
from descant.run.runs import write_text

#: Largest number of arms that a table shows as columns.
_MAX_COLUMNS = 8
_HEAD = """\
# Claims

Mechanisms tested against the claims of their papers, at the scale of two cores, by `descant claims run NAME`. Every arm
has the same initial weights and the same batches. [Judge a method of your own](docs/guides/claims.md) has the rules.

- **effect** is the gain over the baseline, in units of the metric; above zero is better. Its 95 % interval is Student's
  over seeds, joined to a bootstrap over test items where the metric is a mean over items.
- *helps*: over baseline, placebo and simple alternative above 0, and at least a margin. *helps a little*: the same
  below a margin. *a simpler way does as well*: over the simple alternative not above 0. *placebo does as well*: over
  the placebo not above 0. *worse than placebo*: over the placebo below 0. *placebo invalid*: the placebo is a margin or
  more away from the baseline, so the row has no other word. *hurts*: below 0. *no effect*: within a margin around 0.
  *no room*: the oracle gains less than a margin (upper end, 90 %). *not testable here*: a gain of one margin would need
  more seeds than the claim has. *cannot tell*: the rest.
- **margin** is the smallest gain that counts. That of a row which was registered before 2 December 2026 is a quarter of
  what the oracle gained on two pilot seeds, as the rules were then.
- **simple** is the method's gain over what one would try first for the same compute; its page names it, or gives the
  reason for none. **placebo** is its gain over the baseline.
- **seeds**: how many, and how many a gain of one margin needs by these runs. **FLOPs** are of a run of the method;
  **cost** is in core-minutes, of all runs and both cores.

![Gains of all claims over baseline and over placebo, in margins](docs/claims/overview.svg)

"""
_COLUMNS = "| claim | effect | margin | simple | placebo | seeds | FLOPs | cost |\n" + "|---" * 8 + "|\n"


@dataclass(frozen=True)
class Verdict:
    """The stored result of a claim with its word; its row and page are written from this.

    Attributes:
        judgement: None if it ended before its effect was measured. exploratory: why it does not test a claim that was
            fixed beforehand, or None if it does. registered: its registration; empty if it was not registered.
    """

    claim: Claim
    stored: Mapping[str, Any]
    judgement: Judgement | None
    exploratory: str | None
    registered: Mapping[str, Any]

    @property
    def word(self) -> str:
        return str(self.stored["effect"]) if self.judgement is None else self.judgement.word


def verdict(claim: Claim, results: Path) -> Verdict | None:
    """Return the result of a claim in its current design; None if there is none."""
    stored = store.of_design(results, claim, "full")
    if stored is None:
        return None
    registered = store.registration_of(results, claim.name)
    version = stored.get("version", 0)
    why = exploratory(claim, registered) if version == store.VERSION else "its result is of an earlier version"
    return Verdict(claim, stored, store.judge_stored(results, claim, stored), why, registered)


def write(
    claims: Sequence[Claim], results: Path, page: Path, compared: Sequence[comparison.Comparison] = ()
) -> list[str]:
    """Write the page, and beside it ``docs/claims``: an overview, and a page and a figure per claim and comparison.

    Returns a line for each claim without a result: it was never run, or its result was deleted.
    """
    folder = page.parent / "docs" / "claims"
    folder.mkdir(parents=True, exist_ok=True)
    found = {claim.name: verdict(claim, results) for claim in claims}
    lacking = [_lacks(claim, results) for claim in claims if found[claim.name] is None]
    tested, explored = (
        sorted((one for one in found.values() if one and (one.exploratory is None) is sure), key=_order)
        for sure in (True, False)
    )
    for one in (*tested, *explored):
        write_text(folder / f"{one.claim.name}.md", _page(one, results))
        if one.judgement is not None:
            write_text(folder / f"{one.claim.name}.svg", plots.svg(one.claim, one.stored["runs"]))
    drawn: dict[str, list[tuple[str, Effect]]] = {}
    for one in tested:
        if one.judgement is not None:
            drawn.setdefault(family(one.claim), []).append((one.claim.name, one.judgement.effect))
    if drawn:
        write_text(folder / "overview.svg", plots.overview(drawn))
    parts = [_HEAD]
    for title, rows in (
        ("Registered before they ran", [_row(one) for one in tested]),
        ("Exploratory: not registered, or designed after gains had been seen", [_row(one) for one in explored]),
    ):
        parts += [f"## {title}\n\n", _COLUMNS, *(f"{row}\n" for row in rows), "\n"] if rows else []
    earlier = [claim.name for claim in claims if list(_superseded_lines(claim, results))]
    if earlier:
        parts.append(f"Earlier designs, superseded, are on the pages of {', '.join(earlier)}.\n")
    parts += [f"Without a result: {'; '.join(lacking)}.\n"] if lacking else []
    for of in compared:
        parts.append(comparison.summary(of, results))
        write_text(folder / f"{of.name}.md", comparison.section(of, results, folder))
    write_text(page, "".join(parts).rstrip("\n") + "\n")
    return lacking


def _lacks(claim: Claim, results: Path) -> str:
    registered = store.registration_of(results, claim.name)
    if store.read(results, claim.name, "full") is not None:
        return f"{claim.name} (its result is of another design)"
    if "digests" in registered:
        return f"{claim.name} (registered {registered.get('time', '')[:10]}; its result is missing)"
    return f"{claim.name} (not run yet)"


def _order(one: Verdict) -> tuple[str, str]:
    return family(one.claim), one.claim.name


def paper_of(claim: Claim) -> Mapping[str, Any] | None:
    """Return the paper in the list to which the claim belongs."""
    return next((paper for paper in papers() if paper.get("claim") == claim.name), None)


def family(claim: Claim) -> str:
    """Return the family of its paper, by which claims are sorted; ``others`` if it has no paper."""
    paper = paper_of(claim)
    return "others" if paper is None else str(paper["family"])


def exact(claim: Claim) -> str | None:
    """Whether a test covers the equation of its paper: yes, our reading, or None for a claim without a paper."""
    paper = paper_of(claim)
    return None if paper is None else ("yes" if paper["exact"] else "our reading")


def _paper(claim: Claim) -> str:
    """Link to the first paper that the source names."""
    number = re.search(r"arXiv (\d{4}\.\d{5})", claim.source)
    return f"[{number[1]}](https://arxiv.org/abs/{number[1]})" if number else claim.source.split(";")[0]


# rows ---------------------------------------------------------------------------------------------------------------


def _row(one: Verdict) -> str:
    claim, stored = one.claim, one.stored
    name = f"[{claim.name}](docs/claims/{claim.name}.md), {_paper(claim)}"
    needed = stored.get("needed") if one.judgement is None else one.judgement.needed
    of = one.judgement.effect if one.judgement is not None else None
    cells = [
        f"**{one.word}**" + (f" {of.over_baseline}" if of is not None else ""),
        f"{claim.metric.margin:.3g}",
        "" if of is None or of.over_simple is None else f"{of.over_simple}",
        "" if of is None else f"{of.placebo.mean:+.3f}",
        f"{of.seeds if of is not None else 0} of {needed or '?'}",
        _flops(stored["runs"]),
        _cost(stored),
    ]
    return f"| {name} | {' | '.join(cells)} |"


def _flops(runs: Runs) -> str:
    spent = [metrics[EQUAL["flops"]] for metrics in runs.get("method", {}).values() if EQUAL["flops"] in metrics]
    return f"{max(spent):.1e}" if spent else ""


def _cost(stored: Mapping[str, Any]) -> str:
    return f"{stored['seconds'] / 60 * (stored['machine'].get('cores') or 1):.0f}"


def _superseded_lines(claim: Claim, results: Path) -> Iterator[str]:
    """Yield lines on the earlier designs of a claim: set aside by a redesign, or different from its current design."""
    for kind in ("superseded", "full"):
        stored = store.read(results, claim.name, kind)
        if stored is None or (kind == "full" and store.is_of_design(stored, claim)):
            continue
        gain = f" {Interval.from_json(stored['gain'])}" if "gain" in stored else ""
        placebo = f", placebo {stored['placebo']:+.3f}" if "placebo" in stored else ""
        seeds = len(next(iter(stored["runs"].values()), ()))
        effect = f"{stored.get('effect') or stored.get('verdict', '')}{gain}"
        yield f"- An earlier design, superseded: {effect}{placebo}; {seeds} seeds, {_cost(stored)} core-minutes."


# the page of a claim ------------------------------------------------------------------------------------------------


def _page(one: Verdict, results: Path) -> str:
    claim, stored, metric, registered = one.claim, one.stored, one.claim.metric, one.registered
    looks = len(registered.get("looks", {}))
    simple = f"the arm `{claim.simple}`" if claim.simple is not None else f"none: {claim.no_simple}"
    if claim.simple is not None and (one.judgement is None or one.judgement.effect.over_simple is None):
        simple += ", which has not been trained yet"
    lines = [
        f"# {claim.name}\n",
        f"{claim.title} ({claim.source})\n",
        f"**{one.word}**: {one.stored.get('ended', '')}.\n",
        f"- The metric is {metric.name}, {'more' if metric.higher else 'less'} is better.",
        f"- A margin is {metric.margin:.3g} {metric.unit}: {metric.reason}.",
        f"- The placebo lacks one component: {claim.removes}.",
        f"- The simplest alternative: {simple}.",
        f"- Exact: {exact(claim) or 'no equation of a paper'}.",
    ]
    if one.exploratory is not None:
        lines.append(f"- Exploratory: {one.exploratory}.")
    elif registered:
        at = f"{registered['time'][:10]}, commit {str(registered.get('commit'))[:12]}"
        lines.append(f"- Registered {at}" + (f"; its pilot was looked at {looks} times." if looks > 1 else "."))
    lines += _superseded_lines(claim, results)
    if one.judgement is not None:
        lines += _numbers(one, results, one.judgement)
    elif (pilot := store.of_design(results, claim, "pilot")) is not None and pilot["runs"]:
        lines += ["\nThe runs of its pilot:\n", *_means(claim, pilot["runs"])]
    if claim.note is not None:
        lines.append(f"\n{claim.note}")
    versions = ", ".join(f"{name} {number}" for name, number in stored["versions"].items())
    lines.append(f"\n{stored['machine']['cores']} cores of {stored['machine']['processor']}; {versions}.")
    return "\n".join(lines) + "\n"


def _numbers(one: Verdict, results: Path, judgement: Judgement) -> list[str]:
    claim, effect, runs = one.claim, judgement.effect, one.stored["runs"]
    oracle = f"; the oracle's: {effect.oracle} (90 %)" if effect.oracle is not None else ""
    share = f", of which it is {effect.share_of_headroom:.0%}" if effect.share_of_headroom is not None else ""
    lines = [
        f"- Gain over the baseline: {effect.over_baseline}{oracle}{share}.",
        f"- Over the placebo: {effect.over_placebo}. The placebo over the baseline: {effect.placebo}.",
    ]
    if effect.over_simple is not None:
        lines.append(f"- Over the simple alternative: {effect.over_simple}.")
    if judgement.items is not None:
        of = judgement.items
        lines.append(f"- Over {of.number:,} test items alone: {of.over_baseline}; over the placebo {of.over_placebo}.")
    lines += [f"\n![{claim.metric.name} of each seed]({claim.name}.svg)\n", *_means(claim, runs), _budget(claim, runs)]
    if judgement.asked:
        lines.append("\n| asked as well | it is | |\n|---|---|---|")
        lines += [
            f"| {what} | {value:.4g} | {'met' if met else '**not met**'} |" for what, value, met in judgement.asked
        ]
    ablations = store.of_design(results, claim, ABLATIONS, (RULE, "baseline"))
    tuned = store.read_tuned(results, claim)
    if ablations is not None:
        lines += _ablations(claim, ablations)
    if claim.tuning is not None and tuned is not None:
        best = claim.choose_settings(tuned["runs"])
        each = (f"{arm} {claim.arms[arm].settings[i]} of {list(claim.arms[arm].settings)}" for arm, i in best.items())
        what = f"by {claim.tuning.metric.name} of validation, seeds {list(claim.tuning.seeds)}"
        lines.append(f"\nSettings, chosen {what}: {'; '.join(each)}.")
    how = claim.baseline_tuning or ("as above" if claim.is_tuned else "**none**, it is untuned")
    return [*lines, f"\nTuning of the baseline: {how}."]


def _budget(claim: Claim, runs: Runs) -> str:
    """Describe how much the arms were trained."""
    clock = claim.equal == EQUAL["seconds"]
    timed = "seconds of training, or nearly as many, or more," if clock else claim.equal
    spent = f"{max(metrics[claim.equal] for metrics in runs['method'].values()):,.0f} {timed}"
    if claim.equal == EQUAL["flops"]:
        spent = f"FLOPs of training within {WITHIN:.0%} ({_cost_lines(claim, runs)})"
    where = "in every arm but the placebo, which takes the method's steps" if clock else "in every arm"
    if not clock and claim.beyond:
        where += f" but {' and '.join(sorted(claim.beyond))}, which go on from one of them"
    where += f"; {' and '.join(claim.apart)} not compared, with a budget apart" if claim.apart else ""
    return f"\nMean and standard deviation over seeds {sorted(runs['method'])}; {spent} {where}."


def _ablations(claim: Claim, stored: Mapping[str, Any]) -> list[str]:
    """Return a table of the arms that no word needs, with one seed each."""
    runs: Runs = stored["runs"]
    seed = next(iter(next(iter(runs.values()))))
    metrics = [m for m in claim.metrics() if any(m in of[seed] for of in runs.values())]
    rows = ["| arm | " + " | ".join(metrics) + " |\n|---|" + "---|" * len(metrics)]
    for arm, of in runs.items():
        rows.append(f"| {arm} | " + " | ".join(_number(of[seed][m]) if m in of[seed] else "" for m in metrics) + " |")
    return [f"\nOther arms, seed {seed} alone, no part of the word:\n", *rows]


def _cost_lines(claim: Claim, runs: Runs) -> str:
    """Return mean FLOPs and steps of each arm."""
    means = {arm: {key: _mean(of, key) for key in (claim.equal, EQUAL["steps"])} for arm, of in runs.items()}
    return ", ".join(f"{arm} {of[claim.equal]:.3g} in {of[EQUAL['steps']]:,.0f} steps" for arm, of in means.items())


def _mean(seeds: Mapping[int, Mapping[str, float]], metric: str) -> float:
    return math.fsum(metrics.get(metric, math.nan) for metrics in seeds.values()) / len(seeds)


def _means(claim: Claim, runs: Runs) -> list[str]:
    """Return a table of mean and standard deviation of each arm: a column per arm, or a row if there are many."""
    cells = {arm: {metric: _cell(runs[arm], metric) for metric in claim.metrics()} for arm in runs}
    metrics = claim.metrics()
    if len(runs) > _MAX_COLUMNS:
        rows = [f"| {arm} | " + " | ".join(values.get(m, "") for m in metrics) + " |" for arm, values in cells.items()]
        return ["| arm | " + " | ".join(metrics) + " |\n|---|" + "---|" * len(metrics), *rows]
    rows = [f"| {metric} | " + " | ".join(cells[arm].get(metric, "") for arm in runs) + " |" for metric in metrics]
    return ["| metric | " + " | ".join(runs) + " |\n|---|" + "---|" * len(runs), *rows]


def _cell(seeds: Mapping[int, Mapping[str, float]], metric: str) -> str:
    """Return mean and standard deviation over seeds; empty if a seed lacks the metric."""
    values = [metrics[metric] for metrics in seeds.values() if metric in metrics]
    if len(values) < len(seeds):
        return ""
    mean = math.fsum(values) / len(values)
    spread = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / max(len(values) - 1, 1))
    return f"{_number(mean)} ± {_number(spread)}"


def _number(value: float) -> str:
    """Format with three digits after the point, or three in all for a large count such as FLOPs.

    >>> _number(0.25), _number(1293689893081.6)
    ('0.250', '1.29e+12')
    """
    return f"{value:.3f}" if abs(value) < 1e6 else f"{value:.3g}"
