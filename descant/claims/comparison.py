"""Comparisons: many rules in the settings of several claims; in each, all rules share baseline, placebo and oracle.

Letters: S paired seeds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from descant.claims import plots, run, spec, store
from descant.claims.claim import TUNE, Claim
from descant.claims.digest import digests
from descant.claims.effect import (
    HELPS,
    HURTS,
    INVALID,
    LITTLE,
    NO_ROOM,
    PLACEBO,
    SIMPLER,
    UNCLEAR,
    WORDS,
    WORSE,
    Effect,
    effect,
    over_seeds,
    room,
)
from descant.claims.items import gains as items_of
from descant.claims.items import read_gains
from descant.claims.judge import Runs, gains
from descant.claims.registration import register
from descant.claims.run import Place
from descant.cli.catalogue import ROOT
from descant.cli.errors import fail, hint, one_line, say
from descant.cli.untrusted import yaml_of
from descant.report.statistics import holm, p_value
from descant.run.runs import write_text

KEYS = ("title", "claims", "placebo", "arms", "answer", "simple", "tuning", "own")
_NEEDED = KEYS[:5]


@dataclass(frozen=True)
class Comparison:
    """Rules that are run with their defaults in the settings of some claims, and judged as the claims' methods are.

    Attributes:
        claims: each gives baseline, oracle, metric, margin, seeds, budget and lock-box. settings: the claims with the
            arms of the comparison. Some arms, such as a strong baseline, may be tuned by the claim's metric on its
            validation set. rules: these arms, and arms of each claim's own, such as a plain run with equal FLOPs.
            placebo: a neutral arm, such as random weights. simple: an arm of the comparison or of the claims that one
            would try first. answer: what a reader should do, in at most three lines.
    """

    name: str
    title: str
    claims: tuple[Claim, ...]
    settings: tuple[Claim, ...]
    rules: tuple[str, ...]
    placebo: str
    answer: str
    simple: str | None = None


def folder() -> Path:
    return spec.folder() / "comparisons"


def names() -> list[str]:
    """List the names of all comparisons that ship."""
    return sorted(file.stem for file in folder().glob("*.yaml"))


def load(name: str) -> Comparison:
    """Load a comparison by its name."""
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
    simple = content.get("simple")
    claims, own_arms = tuple(map(spec.load, content["claims"])), [str(arm) for arm in content.get("own") or ()]
    settings = []
    for claim in claims:
        if lacking := [arm for arm in own_arms if arm not in claim.arms]:
            fail(f"{where}: own {lacking[0]}: claims {claim.name} has no such arm{hint(lacking[0], claim.arms)}")
        if simple is not None and simple not in {*rules, *claim.arms}:
            fail(f"{where}: simple {simple}: no arm of the comparison or of claims {claim.name}{hint(simple, rules)}")
        needed = {arm for arm in ("baseline", claim.oracle, simple) if arm is not None and arm not in rules}
        needed |= {other for arm in needed for other in claim.arms[arm].needs()}
        if both := {"baseline", claim.oracle} & set(rules):
            fail(
                f"{where}: arms.{min(map(str, both))}: claims {claim.name} has an arm of that name, which they are "
                "compared with"
            )
        kept = {arm: of for arm, of in claim.arms.items() if arm in {*needed, *own_arms}}
        spec.check_needs(where, {**kept, **rules})
        tuning = spec.read_tuning(where, content, rules, spec.on_validation(claim.metric))
        setting = replace(claim, arms={**kept, **rules}, also=(), calls=None, tuning=tuning, simple=simple)
        settings.append(replace(setting, digests=digests(setting, spec.contents())))
    answer = str(content["answer"])
    return Comparison(
        name,
        str(content["title"]),
        claims,
        tuple(settings),
        (*rules, *own_arms),
        str(content["placebo"]),
        answer,
        simple,
    )


def execute(
    of: Comparison, results: Path, runs: Path, jobs: int = 1, trust: Sequence[str] = (), slurm: str | None = None
) -> int:
    """Register and run what is missing in all settings, store each rule as it ends, and print the results.

    Returns an exit code.
    """
    for claim, setting in zip(of.claims, of.settings, strict=True):
        if _is_without_room(claim, results):
            say(f"claims {of.name}: {claim.name}: {NO_ROOM}, so its rules are not run")
            continue
        store.require_free(results, setting, of.name, _required_arms(of))
        lacking = lacking_arms(of, setting, results)
        rules = [arm for arm in lacking if arm in of.rules and arm != of.placebo]
        # the arms that every rule is compared with come first
        parts = [[arm for arm in lacking if arm not in rules], *([rule] for rule in rules)]
        for arms in filter(None, parts if slurm is None else [list(lacking)]):
            code = _run_arms(of, setting, arms, results, runs, jobs, trust, slurm)
            if code is not None:
                return code
    print(section(of, results))
    return 0


def _run_arms(
    of: Comparison,
    setting: Claim,
    arms: Sequence[str],
    results: Path,
    runs: Path,
    jobs: int,
    trust: Sequence[str],
    slurm: str | None,
) -> int | None:
    """Train some arms of a setting, after tuning any that have settings, and add them to the stored ones."""
    stored = read_stored(of, setting, results) or {"runs": {}, "items": {}, "seconds": 0.0, "precision": []}
    seeds, of_arm = setting.seeds["full"], stored["runs"]
    whole = [arm for arm in of_arm if arm not in arms and {*seeds} <= of_arm[arm].keys()]
    kept = {arm: {seed: of_arm[arm][seed] for seed in seeds} for arm in whole}
    file = store.path(results, setting.name, f"{of.name}-registered")
    if not kept:  # unregistered runs stay exploratory, whatever is added to them
        store.write_registration(file, store.registration_in(file) or register(setting))
    if is_tuned(setting, arms):
        candidates = setting.candidates()
        place, tried = Place(candidates, TUNE, runs.absolute(), tuple(trust)), tuple(candidates.arms)
        code = _train(place, tried, candidates.seeds[TUNE], jobs, slurm)
        if code is not None:
            return code
        tuned = place.collect(tried, candidates.seeds[TUNE])
        store.write(results, candidates, tuning(of.name), tuned, place.seconds, place.precisions())
        setting = setting.with_settings(setting.choose_settings(tuned))
    place = Place(setting, "full", runs.absolute(), tuple(trust))
    spent = place.seconds
    code = _train(place, arms, seeds, jobs, slurm)
    if code is not None:
        return code
    compared = [arm for arm in kept if arm in ("baseline", of.placebo, of.simple)]
    folders = place.folders([*compared, *arms], seeds)
    items = {rule: gains for rule, gains in stored["items"].items() if rule in kept}
    if {"baseline", of.placebo} <= folders.keys():  # otherwise their files are not here
        for rule in (rule for rule in of.rules if rule in arms):
            found = items_of(setting, {"method": folders[rule], "sham": folders[of.placebo], **folders}, seeds)
            items |= {rule: found.to_json()} if found is not None else {}
    made, seconds = {**kept, **place.collect(arms, seeds)}, stored["seconds"] + place.seconds - spent
    precisions = sorted({*stored["precision"], *place.precisions()})
    store.write(results, setting, of.name, made, seconds, precisions, {"items": items})
    return None


def _is_without_room(claim: Claim, results: Path) -> bool:
    """Whether the claim ended because its oracle gains too little, so its rules cannot be compared."""
    known = store.of_design(results, claim, "full")
    return known is not None and known.get("effect") == NO_ROOM


def _required_arms(of: Comparison) -> tuple[str, ...]:
    """Return the arms without which a stored result has another design."""
    return ("baseline", of.placebo)


def read_stored(of: Comparison, setting: Claim, results: Path) -> dict[str, Any] | None:
    """Read the runs of a comparison in one setting, except rules whose configuration has changed since."""
    return store.of_design(results, setting, of.name, _required_arms(of))


def lacking_arms(of: Comparison, setting: Claim, results: Path) -> tuple[str, ...]:
    """List the arms to train: a stored result lacks one of their seeds, or their configuration has changed."""
    stored = (read_stored(of, setting, results) or {"runs": {}})["runs"]
    return tuple(arm for arm in setting.arms if not {*setting.seeds["full"]} <= stored.get(arm, {}).keys())


def is_tuned(setting: Claim, arms: Iterable[str]) -> bool:
    """Whether any of these arms has settings to choose from."""
    return any(setting.arms[arm].settings for arm in arms)


def tuning(name: str) -> str:
    """Return the name under which the runs that chose settings are stored."""
    return f"{name}-{TUNE}"


def _train(place: Place, arms: Sequence[str], seeds: Sequence[int], jobs: int, slurm: str | None) -> int | None:
    """Train what is missing; return an exit code if it stops there, or continues in SLURM jobs."""
    if not place.missing(arms, seeds):
        return None
    if slurm is not None:
        return run.submit(place, arms, seeds, slurm)
    return run.run(place, arms, seeds, jobs) or None


def effects(of: Comparison, setting: Claim, stored: Mapping[str, Any]) -> dict[str, Effect]:
    """Map each rule to its effect in one setting, with words corrected for the number of rules (Holm).

    A word that claims a nonzero gain over baseline or placebo requires that Holm's method rejects their p values among
    those of all distinct rules; otherwise the word is "cannot tell". A rule that helps must pass the same test with its
    gain over the simple alternative; otherwise the word is "a simpler way does as well".
    """
    runs, found, p_values = stored["runs"], dict[str, Effect](), list[float]()
    seeds, margin = sorted(runs["baseline"]), setting.metric.margin
    oracle_S = gains(setting, runs, setting.oracle, seeds) if setting.oracle and setting.oracle in runs else []
    gain = {arm: gains(setting, runs, arm, seeds) for arm in (*of.rules, of.simple or "") if arm in runs}
    oracle, simple_S = room(oracle_S) if len(oracle_S) > 1 else None, gain.get(of.simple or "")
    for rule in (rule for rule in of.rules if rule in runs):
        items = read_gains({"items": stored["items"].get(rule)})
        rival_S = simple_S if rule not in (of.simple, of.placebo) else None
        both = items.intervals if items is not None else ()
        found[rule] = effect(gain[rule], gain[of.placebo], margin, rival_S, oracle, both)
    groups = group_identical(of, runs)
    distinct = [rules[0] for rules in groups if rules[0] != of.placebo]
    for rule in distinct:
        word = found[rule].word
        over = [p_value([a - b for a, b in zip(gain[rule], gain[of.placebo], strict=True)])]
        over = over if word in (HELPS, LITTLE, SIMPLER, WORSE) else []
        p_values.append(max([*([] if word == WORSE else [p_value(gain[rule])]), *over]))
    kept = {rule for rule, rejected in zip(distinct, holm(p_values), strict=True) if rejected}
    rivals = [rule for rule in distinct if simple_S is not None and rule != of.simple]
    over_simple = [p_value([a - b for a, b in zip(gain[rule], simple_S or (), strict=True)]) for rule in rivals]
    beaten = {rule for rule, rejected in zip(rivals, holm(over_simple), strict=True) if not rejected}
    for rules in groups:
        for rule in rules:
            if found[rule].word in (HELPS, LITTLE) and rules[0] in beaten:
                found[rule] = replace(found[rule], word=SIMPLER)
            if found[rule].word in (HELPS, LITTLE) and of.simple is not None and simple_S is None:
                found[rule] = replace(found[rule], word=UNCLEAR)  # open until the simple alternative has run
            if found[rule].word in (HELPS, LITTLE, SIMPLER, PLACEBO, WORSE, HURTS) and rules[0] not in kept:
                found[rule] = replace(found[rule], word=UNCLEAR)
    return found


def group_identical(of: Comparison, runs: Runs) -> list[list[str]]:
    """Group the rules whose runs have the same metrics in every seed; in this setting they are one rule."""
    groups: dict[str, list[str]] = {}
    for rule in (rule for rule in of.rules if rule in runs):
        same = {s: {k: v for k, v in m.items() if not _is_cost(k)} for s, m in sorted(runs[rule].items())}
        groups.setdefault(str({s: sorted(m.items()) for s, m in same.items()}), []).append(rule)
    return list(groups.values())


def _is_cost(metric: str) -> bool:
    """Whether a metric measures the computation, which may differ between equal models."""
    return "/" not in metric or metric.split("/")[0] in ("speed", "harmony", "train", "balance", "sham")


def summary(of: Comparison, results: Path) -> str:
    """Return a short Markdown section of a comparison: what to do, and a row for each word, with its rules."""
    rows: dict[str, dict[str, list[str]]] = {}
    for claim, setting in zip(of.claims, of.settings, strict=True):
        stored = read_stored(of, setting, results)
        found = effects(of, setting, stored) if stored is not None else {}
        for rules in group_identical(of, stored["runs"]) if stored is not None else ():
            one = found[rules[0]]
            word = "placebo" if of.placebo in rules else one.word
            rows.setdefault(word, {}).setdefault(claim.name, []).append(
                f"{' = '.join(rules)} {one.over_baseline.mean:+.3f}"
            )
    words = [word for word in ("placebo", *WORDS) if word in rows]
    lines = [f"\n## {of.name}\n", f"{of.title}: [the whole table](docs/claims/{of.name}.md).\n", of.answer.strip()]
    lines += ["", f"| word | {' | '.join(claim.name for claim in of.claims)} |", "|---" * (1 + len(of.claims)) + "|"]
    for word in words:
        cells = ["; ".join(rows[word].get(claim.name, ())) for claim in of.claims]
        lines.append(f"| {word} | {' | '.join(cells)} |")
    return "\n".join(lines if words else [*lines[:3], "\nNot run yet."]) + "\n"


def section(of: Comparison, results: Path, folder: Path | None = None) -> str:
    """Return the page of a comparison: what to do, its settings, and a row for each rule.

    ``folder``: where its figures and its earlier tables are written.
    """
    found: dict[str, dict[str, Effect]] = {}
    lines, tables = [f"# {of.name}\n", f"{of.title}.\n", f"{of.answer.strip()}\n"], list[str]()
    for claim, setting in zip(of.claims, of.settings, strict=True):
        metric = setting.metric
        what = f"{metric.name} of {setting.experiment}; a margin is {metric.margin:.3g} {metric.unit}"
        lines += [f"- [{claim.name}]({claim.name}.md): {what}.", *_tuning_lines(of, setting, results)]
        stored = read_stored(of, setting, results)
        if stored is None:
            without = f"{NO_ROOM}, so its rules were not run" if _is_without_room(claim, results) else "not run yet"
            tables.append(f"\n{claim.name}: {without}.")
            continue
        found[claim.name] = effects(of, setting, stored)
        tables += _table(of, setting, stored["runs"], found[claim.name])
        if lacking := [arm for arm in of.rules if arm not in stored["runs"]]:
            tables.append(f"\n{claim.name}: not run yet: {', '.join(lacking)}.")
        if not found[claim.name][of.placebo].placebo_valid:
            tables.append(f"\nThe placebo is a margin or more away from the baseline, so every row is {INVALID}.")
    if folder is not None and found:
        drawn = {claim: list(rules.items()) for claim, rules in found.items()}
        write_text(folder / f"{of.name}.svg", plots.overview(drawn))
        lines.append(f"\n![Gains of all rules in margins]({of.name}.svg)")
    lines += tables
    files = [store.path(results, name, f"{of.name}-registered") for name in found]
    if not all(map(store.registration_in, files)):
        lines.append("\nExploratory: it was not registered before it ran.")
    if folder is not None and (links := _write_superseded(of, results, folder)):
        lines.append(f"\nEarlier tables, by another metric or of another setting: {', '.join(links)}.")
    counts = sorted({effect.seeds for rules in found.values() for effect in rules.values()})
    lines.append(
        f"\nGains over the baseline, {' or '.join(map(str, counts))} seeds, 95 % intervals of each row alone; words "
        f"are corrected for the number of rows (Holm). The placebo is {of.placebo}. Benchmarks measure costs."
    )
    return "\n".join(lines) + "\n"


def _table(of: Comparison, setting: Claim, runs: Runs, found: Mapping[str, Effect]) -> list[str]:
    """Return a table with a row for each rule, or one for all identical rules."""
    others = [
        metric for metric in setting.secondary if "/" in metric and all(metric in m for m in runs["baseline"].values())
    ]
    others = [metric for metric in others if not _is_cost(metric)][:2]
    seeds = sorted(runs["baseline"])
    lines = [f"\n| {setting.name} | {' | '.join([setting.metric.name, *others])} |", "|---" * (2 + len(others)) + "|"]
    for rules in group_identical(of, runs):
        one = found[rules[0]]
        word = "placebo" if of.placebo in rules else one.word
        cells = [f"**{word}** {one.over_baseline}"]
        for metric in others:
            other = replace(setting, metric=replace(setting.metric, name=metric))
            there = all(metric in m for m in runs[rules[0]].values())
            cells.append(f"{_mean(gains(other, runs, rules[0], seeds)):+.3f}" if there else "")
        lines.append(f"| {', '.join(rules)} | {' | '.join(cells)} |")
    return lines


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _write_superseded(of: Comparison, results: Path, folder: Path) -> list[str]:
    """Write a page for each earlier table, which had another setting or metric. Returns links to the pages."""
    links = []
    for file in sorted(results.glob(f"*.{of.name}-superseded.json")):
        claim = spec.load(file.name.split(".")[0])
        stored = store.read(results, claim.name, f"{of.name}-superseded")
        assert stored is not None
        runs, metric = stored["runs"], claim.metric.name
        seeds = sorted(runs["baseline"])
        rows = [
            f"| {rule} | {over_seeds(gains(claim, runs, rule, seeds))} |"
            for rule in runs
            if rule != "baseline" and all(metric in m for m in runs[rule].values())
        ]
        page = folder / f"{of.name}-{claim.name}.md"
        text = f"# {of.name} in {claim.name}, superseded\n\nGains in {metric} over the baseline, {len(seeds)} seeds.\n"
        write_text(page, "\n".join([text, "| rule | gain |", "|---|---|", *rows]) + "\n")
        links.append(f"[{metric} of {claim.name}]({page.name})")
    return links


def _tuning_lines(of: Comparison, setting: Claim, results: Path) -> list[str]:
    """Return a line for each arm with the setting that validation chose."""
    tuned = store.read_tuned(results, setting, tuning(of.name))
    if setting.tuning is None or tuned is None:
        return []
    lines, by, got = [], setting.tuning.metric.name, setting.tuned_metrics(tuned["runs"])
    for rule, k in setting.choose_settings(tuned["runs"]).items():
        values = setting.arms[rule].settings
        tried = ", ".join(f"{x}: {y:.3f}" for x, y in zip(values, got[rule], strict=True))
        lines.append(f"    - {rule}: {values[k]}, by {by} ({tried}).")
    return lines
