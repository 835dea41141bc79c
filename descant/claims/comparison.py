"""Comparisons: many rules on the settings of several claims, each with one baseline, placebo and oracle for all.

Letters: S paired seeds.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from descant.claims import plots, run, spec, store
from descant.claims.claim import Claim
from descant.claims.digest import digest
from descant.claims.effect import NO_ROOM, Effect, effect
from descant.claims.items import gains as items_of
from descant.claims.items import of_stored
from descant.claims.judge import gains
from descant.claims.registration import register
from descant.claims.run import Place
from descant.cli.catalogue import ROOT
from descant.cli.errors import fail, hint, one_line, say
from descant.modules.io.renamed import CLASSES
from descant.run.runs import write_text

KEYS = ("title", "claims", "placebo", "arms")


@dataclass(frozen=True)
class Comparison:
    """Rules that are run by their defaults in the settings of some claims, and judged as their methods are.

    Attributes:
        claims: by stages; each gives baseline, oracle, metric, margin, seeds, budget and lock-box. settings: the same
            with the arms of the comparison. placebo: one of these arms, which none of the others needs to beat by
            chance alone, such as random weights.
    """

    name: str
    title: str
    claims: tuple[Claim, ...]
    settings: tuple[Claim, ...]
    rules: tuple[str, ...]
    placebo: str


def folder() -> Path:
    return spec.folder() / "comparisons"


def names() -> list[str]:
    """Of all comparisons that ship."""
    return sorted(file.stem for file in folder().glob("*.yaml"))


def load(name: str) -> Comparison:
    """The comparison of that name.

    Raises:
        Refusal: naming the key, for what is missing, unknown or impossible.
    """
    file = folder() / f"{name}.yaml"
    if not file.is_file():
        fail(f"claims {name}: no such comparison{hint(name, names())}")
    where = file.name
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        fail(f"{where}: {one_line(error)}")
    for key in content:
        if key not in KEYS:
            fail(f"{where}: {key}: no such key{hint(str(key), KEYS)}")
    for key in KEYS:
        if not content.get(key):
            fail(f"{where}: {key} is missing")
    own = f"claims/comparisons/{name}" if file.is_relative_to(ROOT) else str(file)
    rules = spec.read_arms(where, content["arms"], own)
    if content["placebo"] not in rules:
        fail(f"{where}: placebo {content['placebo']}: one of its arms{hint(str(content['placebo']), rules)}")
    claims = tuple(map(spec.load, content["claims"]))
    settings = []
    for claim in claims:
        if not claim.staged or claim.oracle is None:
            fail(f"{where}: claims {claim.name}: it has no stages, whose pilot gives margin and room")
        needed = {"baseline", claim.oracle}
        needed |= {other for arm in needed for other in claim.arms[arm].needs()}
        if both := needed & set(rules):
            fail(
                f"{where}: arms.{min(both)}: claims {claim.name} has an arm of that name, which they are compared with"
            )
        kept = {arm: of for arm, of in claim.arms.items() if arm in needed}
        marked = {"experiment": claim.experiment, "arms": content["arms"], "claim": claim.digest}
        what = digest(marked, spec.contents(), CLASSES)
        settings.append(replace(claim, arms={**kept, **rules}, also=(), calls=None, digest=what))
    return Comparison(name, str(content["title"]), claims, tuple(settings), tuple(rules), str(content["placebo"]))


def execute(
    of: Comparison, results: Path, runs: Path, jobs: int = 1, trust: Sequence[str] = (), slurm: str | None = None
) -> int:
    """Run what is missing of all settings, store and print what it comes to. Returns an exit code.

    Raises:
        Refusal: for a claim that has no result of its own yet, whose pilot shows how much there is to gain.
    """
    for claim, setting in zip(of.claims, of.settings, strict=True):
        known = _known(of, claim, results)
        if known["effect"] == NO_ROOM:
            say(f"claims {of.name}: {claim.name}: {NO_ROOM}, so its rules are not run")
            continue
        store.require_free(results, setting, of.name)
        place, arms, seeds = Place(setting, "full", runs.absolute(), tuple(trust)), tuple(setting.arms), _seeds(setting)
        if slurm is not None and place.missing(arms, seeds):
            return run.submit(place, arms, seeds, slurm)
        if place.missing(arms, seeds) and (code := run.run(place, arms, seeds, jobs)):
            return code
        made = place.collect(arms, seeds)
        folders = {arm: {seed: place.run_of(arm, seed) for seed in seeds} for arm in arms}
        items = dict[str, Any]()
        for rule in of.rules:
            found = items_of(setting, {"method": folders[rule], "sham": folders[of.placebo], **folders}, seeds)
            items |= {rule: found.stored()} if found is not None else {}
        outcome = {"margin": known["margin"], "headroom": known["headroom"], "items": items}
        outcome["registered"] = register(setting)
        store.write(results, setting, of.name, made, place.seconds, place.precisions(), outcome)
    print(section(of, results))
    return 0


def _known(of: Comparison, claim: Claim, results: Path) -> Mapping[str, Any]:
    known = store.of_design(results, claim, "full")
    if known is None or "margin" not in known:
        fail(f"claims {of.name}: claims {claim.name} has no margin yet: first descant claims run {claim.name}")
    return known


def _seeds(setting: Claim) -> tuple[int, ...]:
    return setting.seeds["full"]


def effects(of: Comparison, setting: Claim, stored: Mapping[str, Any]) -> dict[str, Effect]:
    """Rule -> its effect in one setting, against baseline and placebo; the oracle is that of the pilot."""
    runs, seeds, found = stored["runs"], _seeds(setting), {}
    placebo_S = gains(setting, runs, of.placebo, seeds)
    for rule in of.rules:
        items = of_stored({"items": stored["items"].get(rule)})
        both = None if items is None else items.intervals
        found[rule] = effect(gains(setting, runs, rule, seeds), placebo_S, stored["margin"], stored["headroom"], both)
    return found


def cost(stored: Mapping[str, Any], rule: str) -> float:
    """Median over seeds of the seconds of training, over those of the baseline."""
    seconds = {arm: {s: m.get("train_seconds", math.nan) for s, m in stored["runs"][arm].items()} for arm in
               (rule, "baseline")}  # fmt: skip
    return statistics.median(seconds[rule][seed] / seconds["baseline"][seed] for seed in seconds["baseline"])


def section(of: Comparison, results: Path, figure: Path | None = None, page: Path | None = None) -> str:
    """Markdown of a comparison: a row a rule, and two columns a setting, its effect and its cost.

    ``figure``: where its gains are drawn; the text shows it relative to the folder of ``page``.
    """
    found: dict[str, dict[str, Effect]] = {}
    head, rows = [], {rule: [rule] for rule in of.rules}
    for claim, setting in zip(of.claims, of.settings, strict=True):
        stored, known = store.of_design(results, setting, of.name), store.of_design(results, claim, "full")
        head += [f"{claim.name}: effect", "time"]
        if stored is None:
            word = known["effect"] if known is not None and known["effect"] == NO_ROOM else "not run yet"
            for row in rows.values():
                row += [word, ""]
            continue
        found[claim.name] = effects(of, setting, stored)
        for rule, one in found[claim.name].items():
            word = "placebo" if rule == of.placebo else one.word
            rows[rule] += [f"**{word}** {one.over_baseline}", f"{cost(stored, rule):.2f}"]
    lines = [f"\n## {of.name}\n", f"{of.title}.\n"]
    lines += [_setting(claim, results) for claim in of.claims]
    if figure is not None and page is not None and found:
        drawn = {claim: list(rules.items()) for claim, rules in found.items()}
        write_text(figure, plots.overview(drawn))
        lines.append(f"![Gains of all rules in margins]({figure.relative_to(page.parent).as_posix()})\n")
    lines += ["", f"| rule | {' | '.join(head)} |", "|---" * (1 + len(head)) + "|"]
    lines += [f"| {' | '.join(row)} |" for row in rows.values()]
    judged = sum(len(rules) - 1 for rules in found.values())
    lines.append(
        f"\nGains over the baseline of the claim, five seeds, 95 % intervals of each rule alone: of {judged} that do "
        f"nothing, {0.025 * judged:.1f} would seem to help by chance. The placebo is {of.placebo}. Time is the median "
        "of the training's over the baseline's, with other runs beside it."
    )
    return "\n".join(lines) + "\n"


def _setting(claim: Claim, results: Path) -> str:
    known = store.of_design(results, claim, "full")
    if known is None or "margin" not in known:
        return f"- [{claim.name}](#{claim.name}): not run yet."
    what = f"{claim.metric.name} of {claim.experiment}"
    return f"- [{claim.name}](#{claim.name}): {what}; oracle {known['headroom']:+.3f}, margin {known['margin']:.3g}."
