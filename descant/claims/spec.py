"""Read a claim's YAML: check its keys and their values, and report each error in one line."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from descant.claims.claim import (
    ARMS,
    BEFORE,
    BUDGETS,
    EQUAL,
    OF_ARM,
    SETTING,
    Arm,
    Claim,
    Condition,
    Metric,
    Tuning,
    texts,
)
from descant.claims.digest import Contents, compose, digests
from descant.claims.power import ASKED, LEAST, PILOT
from descant.cli.catalogue import ROOT, find, layers
from descant.cli.errors import Refusal, fail, hint, one_line, printable
from descant.cli.untrusted import yaml_of

#: Keys of a claim, of its arms, and of its other objects; the first eight are required.
KEYS = (
    *("title", "seed", "source", "experiment", "arms", "metric", "seeds", "removes"),
    *("simple", "no_simple", "oracle", "options", "before", "also", "secondary", "calls", "budget", "baseline_tuning"),
    *("tuning", "note", "signal", "lockbox", "exploratory", "like"),
)
NEEDED = KEYS[:8]
#: Valid names of arms; the folders and logs of an arm's runs are named after it.
ARM = re.compile(r"\w[\w.+=-]{0,99}")
ARM_KEYS = ("configs", "config", "options", "settings")
#: Keys of ``before`` beside ``experiment``, ``seed`` and those of an arm.
BEFORE_KEYS = ("predict", "lockbox")
METRIC_KEYS = ("name", "better", "margin", "unit", "reason")
CONDITION_KEYS = ("metric", "arm", "minus", "against", "times", "above", "at_least", "at_most")
BUDGET_KEYS = ("equal", "reference", "apart")
TUNING_KEYS = ("seeds", "options")
WAYS = ("higher", "lower")


def folder() -> Path:
    return ROOT / "claims"


def names() -> list[str]:
    """List the names of all claims that ship."""
    return sorted(file.stem for file in folder().glob("*.yaml"))


def load(name: str) -> Claim:
    """Read a claim that ships, by its name, or a claim in a YAML file, by its path."""
    file = Path(name) if name.endswith(".yaml") and Path(name).is_file() else folder() / f"{name}.yaml"
    if not file.is_file():
        fail(f"claims {name}: no such claim{hint(name, names())}")
    try:
        content = yaml_of(file)
    except (OSError, ValueError) as error:
        fail(f"{file.name}: {one_line(error)}")
    if not isinstance(content, dict):
        fail(f"{file.name}: a claim is an object with arms, seeds and a metric")
    try:
        return _read(file, content)
    except Refusal as refusal:
        fail(f"{file.name}: {str(refusal).removeprefix(f'{file.name}: ').removeprefix('--config ')}")
    except (ValueError, TypeError, AttributeError, LookupError, ArithmeticError) as error:
        # a value has another type than the checks below expect
        fail(f"{file.name}: {one_line(error)}")


def _read(file: Path, content: Mapping[str, Any]) -> Claim:
    where = file.name
    _require_known(where, content, KEYS)
    own = f"claims/{file.stem}" if file.parent == folder() else str(file)
    if "like" in content:  # keys that it lacks come from another claim
        content, own = _like(where, content), f"claims/{content['like']}"
    _need(where, content, NEEDED)
    arms = read_arms(where, _mapping(where, content, "arms"), own)
    for name in ARMS:
        if name not in arms:
            fail(f"{where}: arms: no {name!r}; every claim has {', '.join(ARMS)}")
    before, before_seed = _before(where, content, own, arms)
    metric = _metric(where, _mapping(where, content, "metric"))
    known = [*arms, *([BEFORE] if before is not None else [])]
    also = tuple(_condition(f"{where}: also[{n}]", c, known) for n, c in enumerate(content.get("also") or []))
    secondary = tuple(content.get("secondary") or ())
    for name in (metric.name, *(metric for condition in also for _, metric in condition.required_metrics), *secondary):
        if name.split("/")[0] in ("val", "train"):  # known before the run ends, and used for choices
            fail(f"{where}: {name}: a claim is judged by the test that ends a run")
    tuning = _tuning(where, content, arms, metric)
    composing = contents()
    simple = _read_extra_arm(where, content, "simple", known)
    if (simple is None) == (content.get("no_simple") is None):
        fail(f"{where}: simple: the arm that one would try first for the same compute, or no_simple: why there is none")
    lockbox = dict(content.get("lockbox") or {})
    budget = dict(content.get("budget") or {})
    _require_known(f"{where}: budget", budget, BUDGET_KEYS)
    equal = _choice(f"{where}: budget.equal", budget.get("equal", "flops"), EQUAL)
    reference = _reference(where, budget, equal, arms, tuning is not None)
    options, signal = dict(content.get("options") or {}), content.get("signal")
    if content.get("exploratory") is None:
        _require_one_component(where, content, composing)
    data = compose(composing([content["experiment"]])).get("data") or {}
    claim = Claim(
        name=file.stem,
        title=str(content["title"]),
        seed=_require_integer(f"{where}: seed", content["seed"]),
        source=str(content["source"]),
        experiment=str(content["experiment"]),
        arms=arms,
        before=before,
        before_seed=before_seed,
        metric=metric,
        also=also,
        secondary=secondary,
        calls=content.get("calls"),
        seeds=_all_seeds(where, content, tuning),
        equal=EQUAL[equal],
        budgets={"pilot": options, "full": {**options, **lockbox}},
        lockbox=lockbox,
        baseline_tuning=content.get("baseline_tuning"),
        digests={},
        file=file,
        tuning=tuning,
        note=content.get("note"),
        oracle=_read_extra_arm(where, content, "oracle", arms),
        simple=simple,
        no_simple=content.get("no_simple"),
        removes=str(content["removes"]),
        exploratory=content.get("exploratory"),
        signal=None if signal is None else _condition(f"{where}: signal", signal, known),
        reference=reference,
        apart=_read_arm_names(where, "budget.apart", budget.get("apart"), arms),
        in_stages=str(data.get("class_path")).rpartition(".")[2] in _STAGED,
    )
    return replace(claim, digests=digests(claim, composing))


def _like(where: str, content: Mapping[str, Any]) -> dict[str, Any]:
    """Return a claim with the keys of another one that ships, and its own keys, such as seeds, budget or metric."""
    name, arms = str(content["like"]), dict(content.get("arms") or {})
    if name not in names():
        fail(f"{where}: like {name}: no such claim{hint(name, names())}")
    for arm, of in arms.items():
        if "config" in (of or {}):
            fail(
                f"{where}: arms.{arm}: config: of a claim that is like another one, arms have configs and options alone"
            )
    base: dict[str, Any] = yaml_of(folder() / f"{name}.yaml")
    base = {key: value for key, value in base.items() if key not in ("note", "exploratory")}
    return {**base, **content, "arms": {**base["arms"], **arms}}


def contents() -> Contents:
    """Return a function: names of configurations -> contents of their files, in order of precedence, each read once."""
    found, read = cache(find), cache(yaml_of)
    return lambda configs: [read(file) for file in layers(map(found, configs))]


def read_arms(where: str, content: Mapping[str, Any], own: str) -> dict[str, Arm]:
    """Read arms by name; ``own``: the name under which the ``config`` of an arm is found."""
    for name in content:
        if not isinstance(name, str) or not ARM.fullmatch(name):
            fail(f"{where}: arms: {printable(name)[:40]!r}: a name of letters, digits and . + = - is expected")
    return {name: _arm(f"{where}: arms.{name}", arm or {}, f"{own}:{name}") for name, arm in content.items()}


def _arm(where: str, content: Mapping[str, Any], config: str) -> Arm:
    """Read an arm; ``config``: the name under which its own ``config`` is found."""
    _require_known(where, content, ARM_KEYS)
    settings = content.get("settings") or ()
    if not isinstance(settings, list | tuple):
        fail(f"{where}: settings: a list of values is expected, such as [0.1, 0.3, 1.0]")
    if not isinstance(content.get("config") or {}, dict):
        fail(f"{where}: config: a configuration is expected, such as {{model: {{init_args: {{width: 64}}}}}}")
    configs = (*(content.get("configs") or ()), *([config] if content.get("config") else []))
    arm = Arm(configs, dict(content.get("options") or {}), tuple(settings))
    if bool(settings) != (SETTING in texts(arm.options)):
        what = f"none of its options is {SETTING}" if settings else f"{SETTING} in its options, and no values for it"
        fail(f"{where}: settings: {what}")
    return arm


def check_needs(where: str, arms: Mapping[str, Arm]) -> None:
    """Check that the arms from whose runs others begin exist."""
    for name, arm in arms.items():
        for other in sorted(arm.needs()):
            if other not in arms:
                fail(f"{where}: arms.{name}: no arm {other!r} whose run it could begin from{hint(other, arms)}")
            if other == name or arms[other].needs() or arms[other].settings:
                fail(f"{where}: arms.{name}: {OF_ARM}/{other}: an arm that needs no other and has no settings")


def read_tuning(where: str, content: Mapping[str, Any], arms: Mapping[str, Arm], metric: Metric) -> Tuning | None:
    """Read how runs choose settings, by ``metric``; None if no arm has settings."""
    tuned = [name for name, arm in arms.items() if arm.settings]
    if content.get("tuning") is None:
        if tuned:
            fail(f"{where}: arms.{tuned[0]}: settings need `tuning`, which chooses one of them")
        return None
    given = _mapping(where, content, "tuning")
    _require_known(f"{where}: tuning", given, TUNING_KEYS)
    _need(f"{where}: tuning", given, ("seeds",))
    if not tuned:
        fail(f"{where}: tuning: no arm has settings")
    return Tuning(_seeds(f"{where}: tuning.seeds", given["seeds"]), metric, dict(given.get("options") or {}))


def _before(where: str, content: Mapping[str, Any], own: str, arms: Iterable[str]) -> tuple[Arm | None, int | None]:
    """Read the run from which arms begin, and its seed if it has one for all."""
    if content.get("before") is None:
        return None, None
    if BEFORE in arms:
        fail(f"{where}: arms.{BEFORE}: the name of the run before the arms")
    given = dict(_mapping(where, content, "before"))
    _need(f"{where}: before", given, ("experiment",))
    experiment, seed = str(given.pop("experiment")), given.pop("seed", None)
    seed = None if seed is None else _require_integer(f"{where}: before.seed", seed)
    more = {key: dict(_mapping(f"{where}: before", given, key)) for key in BEFORE_KEYS if key in given}
    if "lockbox" in more and not content.get("lockbox"):
        fail(f"{where}: before.lockbox: the claim has no lockbox, whose options these replace")
    given = {key: value for key, value in given.items() if key not in more}
    arm = _arm(f"{where}: before", given, f"{own}:{BEFORE}")
    added = Arm((experiment, *arm.configs), arm.options, predict=more.get("predict"), lockbox=more.get("lockbox"))
    return added, seed


def _tuning(where: str, content: Mapping[str, Any], arms: Mapping[str, Arm], metric: Metric) -> Tuning | None:
    check_needs(where, arms)
    by = on_validation(metric) if metric.name.startswith("test/") else metric  # others read development sets
    return read_tuning(where, content, arms, by)


def on_validation(metric: Metric) -> Metric:
    """Return the same metric of the validation set, by which settings are chosen."""
    return replace(metric, name=f"val/{metric.name.partition('/')[2]}")


def _reference(where: str, budget: Mapping[str, Any], equal: str, arms: Mapping[str, Arm], tuned: bool) -> str:
    """Read the arm whose FLOPs the others spend."""
    name = str(budget.get("reference", "method"))
    if "reference" in budget and equal != "flops":
        fail(f"{where}: budget.reference: of arms that are equal in flops, not in {equal}")
    if name not in arms:
        fail(f"{where}: budget.reference: no arm {name!r}{hint(name, arms)}")
    if equal == "flops" and arms[name].needs():
        fail(f"{where}: budget.reference {name}: it begins from another arm; one that needs no other has a length")
    if equal == "flops" and tuned:
        fail(f"{where}: tuning: settings are chosen before the reference arm is trained; not with budget.equal flops")
    return name


def _read_arm_names(where: str, key: str, names: Sequence[str] | None, arms: Iterable[str]) -> tuple[str, ...]:
    """Read names of arms beside the three that every claim has."""
    for name in names or ():
        if name in ARMS or name not in arms:
            others = [arm for arm in arms if arm not in ARMS]
            fail(f"{where}: {key}: no arm {name!r} beside {', '.join(ARMS)}{hint(name, others)}")
    return tuple(names or ())


#: Options that permute a signal; a placebo's data may differ from the method's in these.
_CONTROLS = (".sham", ".shuffle_captions")
#: Data modules with a budget for each stage.
_STAGED = ("StagedData", "TaskStream")


def _require_one_component(where: str, content: Mapping[str, Any], contents: Contents) -> None:
    """Check that the placebo lacks one component of the method, and is trained on the same data."""
    method, sham = (_settings(content, arm, contents) for arm in ("method", "sham"))
    differ = sorted(key for key in {*method, *sham} if method.get(key) != sham.get(key))
    other = [key for key in differ if key.startswith("data.") and not key.endswith(_CONTROLS)]
    if other:
        fail(f"{where}: arms.sham: it trains on other data than the method: {other[0]}; a placebo permutes a signal")
    # callbacks that only evaluate may differ
    parts = {key.split(".")[0]: key for key in differ if not key.startswith("trainer.") or key.endswith(_CONTROLS)}
    if len(parts) > 1:
        fail(f"{where}: arms.sham: it differs from the method in {' and '.join(parts.values())}; remove one component")


def _settings(content: Mapping[str, Any], arm: str, contents: Contents) -> dict[str, Any]:
    """Return key -> value of an arm's composed configuration."""
    given = content["arms"][arm] or {}
    own = dict(given.get("config") or {})
    below = own.pop("extends", ())
    parts = contents([content["experiment"], *(given.get("configs") or ())])
    parts += [*contents([below] if isinstance(below, str) else below), own]
    values = dict(_leaves("", compose(parts)))
    for key, value in (given.get("options") or {}).items():
        values |= dict(_leaves(str(key), value))
    return values


def _leaves(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for name, item in value.items():
            yield from _leaves(f"{key}.{name}".removeprefix("."), item)
    elif isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
        for number, item in enumerate(value):
            yield from _leaves(f"{key}[{number}]", item)
    else:
        yield key, value


def _read_extra_arm(where: str, content: Mapping[str, Any], key: str, arms: Iterable[str]) -> str | None:
    """Read the name of an arm beside the three that every claim has."""
    name = content.get(key)
    if name is not None and (name in ARMS or name not in arms):
        others = [arm for arm in arms if arm not in ARMS]
        fail(f"{where}: {key}: no arm {name!r} beside {', '.join(ARMS)}{hint(str(name), others)}")
    return name


def _metric(where: str, content: Mapping[str, Any]) -> Metric:
    _require_known(f"{where}: metric", content, METRIC_KEYS)
    _need(f"{where}: metric", content, METRIC_KEYS)
    if content["better"] not in WAYS:
        fail(f"{where}: metric.better {content['better']}: higher or lower")
    margin = float(content["margin"])
    if not 0 < margin < math.inf:
        fail(f"{where}: metric.margin {content['margin']}: above 0; its direction is in `better`")
    higher = content["better"] == "higher"
    return Metric(str(content["name"]), higher, margin, str(content["unit"]), str(content["reason"]))


def _condition(where: str, content: Mapping[str, Any], arms: Iterable[str]) -> Condition:
    _require_known(where, content, CONDITION_KEYS)
    _need(where, content, ("metric", "arm"))
    for key in ("arm", "against", "above"):
        if content.get(key) is not None and content[key] not in arms:
            fail(f"{where}: no arm {content[key]!r}{hint(content[key], arms)}")
    low, high = content.get("at_least"), content.get("at_most")
    if low is None and high is None:
        fail(f"{where}: at_least or at_most: a condition needs one")
    metric, arm, against = content["metric"], content["arm"], content.get("against")
    minus = content.get("minus", metric if against is not None else None)
    if minus is None and "times" in content:
        fail(f"{where}: times needs `minus`, another metric, or `against`, another arm")
    if (minus, against or arm) == (metric, arm):
        fail(f"{where}: {metric} of {arm} less itself is always 0")
    times, above = float(content.get("times", 1.0)), content.get("above")
    if above in (arm, against or arm):
        fail(f"{where}: above: {above} above itself is always 0")
    return Condition(metric, arm, minus, against or arm, times, low, high, above)


def _all_seeds(where: str, content: Mapping[str, Any], tuning: Tuning | None) -> dict[str, tuple[int, ...]]:
    """Read budget -> seeds; no two budgets share a seed."""
    given = _mapping(where, content, "seeds")
    _require_known(f"{where}: seeds", given, BUDGETS)
    _need(f"{where}: seeds", given, BUDGETS)
    seeds = {key: _seeds(f"{where}: seeds.{key}", given[key]) for key in BUDGETS}
    if len(seeds["pilot"]) != PILOT:
        fail(f"{where}: seeds.pilot: {len(seeds['pilot'])} seeds; {PILOT} show how much a difference varies")
    if not LEAST <= len(seeds["full"]) <= ASKED:
        fail(f"{where}: seeds.full: {len(seeds['full'])} seeds; {LEAST} to {ASKED}, of which the pilot takes the first")
    every = [seed for some in seeds.values() for seed in some]
    both = set(seeds["pilot"]) & set(seeds["full"])
    if both:
        fail(f"{where}: seeds: {min(both)} is in pilot and in full: a seed that chose the number cannot count")
    if len(set(every)) < len(every):
        fail(f"{where}: seeds: {max(every, key=every.count)} is there twice")
    for seed in tuning.seeds if tuning is not None else ():
        if seed in every:
            fail(f"{where}: tuning.seeds {seed}: in pilot or full too: a seed that chose a setting cannot count")
    return seeds


def _seeds(where: str, value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or not value:
        fail(f"{where} {value!r}: a list of seeds is expected, such as [0, 1, 2]")
    return tuple(_require_integer(where, seed) for seed in value)


def _require_integer(where: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        fail(f"{where} {value!r}: a whole number is expected")
    return value


def _choice(where: str, value: Any, known: Iterable[str]) -> str:
    if value not in known:
        fail(f"{where} {value}{hint(str(value), known)}")
    return str(value)


def _mapping(where: str, content: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = content[key]
    if not isinstance(value, dict):
        fail(f"{where}: {key}: an object is expected")
    return value


def _require_known(where: str, content: Mapping[str, Any], known: Iterable[str]) -> None:
    for key in content:
        if key not in known:
            fail(f"{where}: {key}: no such key{hint(str(key), known)}")


def _need(where: str, content: Mapping[str, Any], keys: Iterable[str]) -> None:
    for key in keys:
        if content.get(key) is None:
            fail(f"{where}: {key} is missing")
