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

from descant.claims import plots, run, spec, store
from descant.claims.claim import TUNE, Claim, Metric, Tuning
from descant.claims.digest import digest
from descant.claims.effect import NO_ROOM, Effect, effect
from descant.claims.items import gains as items_of
from descant.claims.items import of_stored
from descant.claims.judge import gains
from descant.claims.ranks import mean_ranks, rank_lines
from descant.claims.registration import register
from descant.claims.run import Place
from descant.cli.catalogue import ROOT
from descant.cli.errors import fail, hint, one_line, say
from descant.cli.untrusted import yaml_of
from descant.modules.io.renamed import CLASSES
from descant.run.runs import write_text

KEYS = ("title", "claims", "placebo", "arms", "tuning", "extension", "ranks")
_NEEDED = KEYS[:4]


@dataclass(frozen=True)
class Comparison:
    """Rules that are run by their defaults in the settings of some claims, and judged as their methods are.

    Attributes:
        claims: by stages; each gives baseline, oracle, metric, margin, seeds, budget and lock-box. settings: the same
            with the arms of the comparison, some of which may be tuned by the claim's metric on its validation set, as
            a strong baseline is. placebo: one of these arms, which none of the others needs to beat by
            chance alone, such as random weights.
    """

    name: str
    title: str
    claims: tuple[Claim, ...]
    settings: tuple[Claim, ...]
    rules: tuple[str, ...]
    placebo: str
    ranks: tuple[str, ...] = ()


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
        content = yaml_of(file)
    except (OSError, ValueError) as error:
        fail(f"{where}: {one_line(error)}")
    for key in content:
        if key not in KEYS:
            fail(f"{where}: {key}: no such key{hint(str(key), KEYS)}")
    for key in _NEEDED:
        if not content.get(key):
            fail(f"{where}: {key} is missing")
    own = f"claims/comparisons/{name}" if file.is_relative_to(ROOT) else str(file)
    rules = spec.read_arms(where, content["arms"], own)
    if content["placebo"] not in rules:
        fail(f"{where}: placebo {content['placebo']}: one of its arms{hint(str(content['placebo']), rules)}")
    seed = spec.tuning_seed(where, content, rules)
    claims = tuple(map(spec.load, content["claims"]))
    ranked, settings = tuple(content.get("ranks") or ()), []
    for claim in claims:
        for metric in ranked:
            if metric not in claim.metrics():
                fail(f"{where}: ranks: {metric}: no metric of claims {claim.name}{hint(metric, claim.metrics())}")
        if not claim.staged or claim.oracle is None:
            fail(f"{where}: claims {claim.name}: it has no stages, whose pilot gives margin and room")
        needed = {"baseline", claim.oracle}
        needed |= {other for arm in needed for other in claim.arms[arm].needs()}
        if both := needed & set(rules):
            fail(
                f"{where}: arms.{min(both)}: claims {claim.name} has an arm of that name, which they are compared with"
            )
        kept = {arm: of for arm, of in claim.arms.items() if arm in needed}
        spec.check_needs(where, {**kept, **rules})
        marked = {"experiment": claim.experiment, "arms": content["arms"], "claim": claim.digest}
        marked |= {key: content[key] for key in ("tuning", "extension") if key in content}
        what = digest(marked, spec.contents(), CLASSES)
        tuning = None if seed is None else Tuning(seed, _on_validation(claim.metric))
        seeds = claim.seeds
        if content.get("extension", False):
            seeds = {**seeds, "full": (*seeds["full"], *seeds["extension"])}
        own_arms = {**kept, **rules}
        settings.append(replace(claim, arms=own_arms, also=(), calls=None, digest=what, tuning=tuning, seeds=seeds))
    return Comparison(
        name, str(content["title"]), claims, tuple(settings), tuple(rules), str(content["placebo"]), ranked
    )


def _on_validation(metric: Metric) -> Metric:
    """The metric of a claim on the validation set, which chooses settings."""
    return replace(metric, name=f"val/{metric.name.partition('/')[2]}")


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
        if setting.is_tuned:
            candidates = setting.candidates()
            place, arms = Place(candidates, TUNE, runs.absolute(), tuple(trust)), tuple(candidates.arms)
            code = _train(place, arms, candidates.seeds[TUNE], jobs, slurm)
            if code is not None:
                return code
            tuned = place.collect(arms, candidates.seeds[TUNE])
            store.write(results, candidates, tuning(of.name), tuned, place.seconds, place.precisions())
            setting = setting.settled(setting.chosen(tuned))
        place, arms, seeds = Place(setting, "full", runs.absolute(), tuple(trust)), tuple(setting.arms), _seeds(setting)
        code = _train(place, arms, seeds, jobs, slurm)
        if code is not None:
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


def tuning(name: str) -> str:
    """Under which the runs that chose settings are stored."""
    return f"{name}-{TUNE}"


def _train(place: Place, arms: Sequence[str], seeds: Sequence[int], jobs: int, slurm: str | None) -> int | None:
    """Train what is missing; an exit code where it ends there, or goes on in jobs of SLURM."""
    if not place.missing(arms, seeds):
        return None
    if slurm is not None:
        return run.submit(place, arms, seeds, slurm)
    return run.run(place, arms, seeds, jobs) or None


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
    counts = sorted({len(_seeds(setting)) for setting in of.settings})
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
    for claim, setting in zip(of.claims, of.settings, strict=True):
        lines += [_setting(claim, results), *_tuned(of, setting, results)]
    if figure is not None and page is not None and found:
        drawn = {claim: list(rules.items()) for claim, rules in found.items()}
        write_text(figure, plots.overview(drawn))
        lines.append(f"\n![Gains of all rules in margins]({figure.relative_to(page.parent).as_posix()})")
    lines += ["", f"| rule | {' | '.join(head)} |", "|---" * (1 + len(head)) + "|"]
    lines += [f"| {' | '.join(row)} |" for row in rows.values()]
    if of.ranks:
        lines += _ranks(of, results, figure, page)
    judged = sum(len(rules) - 1 for rules in found.values())
    lines.append(
        f"\nGains over the baseline of the claim, {' or '.join(map(str, counts))} seeds, 95 % intervals of each rule "
        f"alone: of {judged} that do nothing, {0.025 * judged:.1f} would seem to help by chance. The placebo is "
        f"{of.placebo}. Time is the median of the training's over the baseline's, with other runs beside it."
    )
    return "\n".join(lines) + "\n"


def _ranks(of: Comparison, results: Path, figure: Path | None, page: Path | None) -> list[str]:
    """Metrics of each rule and its mean rank over them: a table and a figure a setting."""
    lines = []
    for setting in of.settings:
        stored = store.of_design(results, setting, of.name)
        if stored is None:
            continue
        ranked = [rule for rule in of.rules if rule != of.placebo]
        ranks = mean_ranks(stored["runs"], ranked, of.ranks, _seeds(setting))
        lines += ["", *rank_lines(stored["runs"], ranks, ["baseline", setting.oracle or "", of.placebo])]
        lines.append(
            f"\n{setting.name}: mean and deviation over seeds. Ranks among {len(ranked)} rules, 1 is best: "
            "their mean over all metrics, with its 95 % interval. Rules whose intervals overlap have no order."
        )
        if figure is not None and page is not None:
            drawn = figure.with_name(f"{of.name}-{setting.name}.svg")
            write_text(drawn, plots.rank_table(ranks))
            lines.append(f"\n![Mean ranks and their intervals]({drawn.relative_to(page.parent).as_posix()})")
    return lines


def _tuned(of: Comparison, setting: Claim, results: Path) -> list[str]:
    """What validation chose, a line an arm."""
    tuned = store.of_design(results, setting, tuning(of.name)) if setting.is_tuned else None
    if tuned is None or setting.tuning is None:
        return []
    lines, by, got = [], setting.tuning.metric.name, setting.tried(tuned["runs"])
    for rule, k in setting.chosen(tuned["runs"]).items():
        values = setting.arms[rule].settings
        tried = ", ".join(f"{x}: {y:.3f}" for x, y in zip(values, got[rule], strict=True))
        lines.append(f"    - {rule}: {values[k]}, by {by} of one run each ({tried}).")
    return lines


def _setting(claim: Claim, results: Path) -> str:
    known = store.of_design(results, claim, "full")
    if known is None or "margin" not in known:
        return f"- [{claim.name}](#{claim.name}): not run yet."
    what = f"{claim.metric.name} of {claim.experiment}"
    return f"- [{claim.name}](#{claim.name}): {what}; oracle {known['headroom']:+.3f}, margin {known['margin']:.3g}."
