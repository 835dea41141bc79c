"""Read a claim's YAML: its keys, what may stand under them, and one line for whatever is wrong."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from descant.claims.claim import ARMS as ARMS
from descant.claims.claim import BEFORE as BEFORE
from descant.claims.claim import BUDGETS as BUDGETS
from descant.claims.claim import EQUAL as EQUAL
from descant.claims.claim import EXTENSION as EXTENSION
from descant.claims.claim import OF_ARM, SETTING, Arm, Condition, Metric, Tuning, texts
from descant.claims.claim import TUNE as TUNE
from descant.claims.claim import Claim as Claim
from descant.claims.digest import Contents, composed, digest
from descant.claims.effect import FIRST, LAST, PILOT
from descant.cli.catalogue import ROOT, find, layers
from descant.cli.errors import Refusal, fail, hint, one_line, printable
from descant.cli.untrusted import yaml_of
from descant.modules.io.renamed import CLASSES

#: The keys of a claim, of its arms, and of all else in it that has keys; the first seven are needed.
KEYS = (
    *("title", "seed", "source", "experiment", "arms", "metric", "seeds"),
    *("options", "before", "sham_margin", "also", "secondary", "calls", "budget", "status", "baseline_tuning"),
    *("alone", "tuning", "note", "oracle", "setting", "signal", "lockbox"),
)
NEEDED = KEYS[:7]
#: What an arm may be called: its runs' folders and logs are called after it.
ARM = re.compile(r"\w[\w.+=-]{0,99}")
ARM_KEYS = ("configs", "config", "options", "settings")
#: Keys of ``before`` beside ``experiment``, ``seed`` and those of an arm.
BEFORE_KEYS = ("predict", "lockbox")
METRIC_KEYS = ("name", "better", "margin", "least")
CONDITION_KEYS = ("metric", "arm", "minus", "against", "times", "above", "at_least", "at_most")
BUDGET_KEYS = ("equal", "reference", "apart", *BUDGETS)
TUNING_KEYS = ("seed", "metric", "better", "options")
WAYS, STATUS = ("higher", "lower"), ("gate", "report")


def folder() -> Path:
    return ROOT / "claims"


def names() -> list[str]:
    """Of all claims that ship."""
    return sorted(file.stem for file in folder().glob("*.yaml"))


def load(name: str) -> Claim:
    """The claim of that name, or of a file.

    Raises:
        Refusal: naming the key, for what is missing, unknown or impossible.
    """
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
    except (ValueError, TypeError, AttributeError, LookupError, ArithmeticError) as error:
        # a value of another type than the checks below expect
        fail(f"{file.name}: {one_line(error)}")


def _read(file: Path, content: Mapping[str, Any]) -> Claim:
    where = file.name
    _known(where, content, KEYS)
    _need(where, content, NEEDED)
    own = f"claims/{file.stem}" if file.parent == folder() else str(file)
    arms = read_arms(where, _mapping(where, content, "arms"), own)
    for name in ARMS:
        if name not in arms:
            fail(f"{where}: arms: no {name!r}; every claim has {', '.join(ARMS)}")
    before, before_seed = _before(where, content, own, arms)
    metric = _metric(where, _mapping(where, content, "metric"))
    known = [*arms, *([BEFORE] if before is not None else [])]
    also = tuple(_condition(f"{where}: also[{n}]", c, known) for n, c in enumerate(content.get("also") or []))
    secondary = tuple(content.get("secondary") or ())
    for name in (metric.name, *(metric for condition in also for _, metric in condition.reads), *secondary):
        if name.split("/")[0] in ("val", "train"):  # known before the run is over, and other data chose by it
            fail(f"{where}: {name}: a claim is judged by the test that ends a run")
    tuning = _tuning(where, content, arms, metric)
    composing = contents()
    least = metric.margin if "least" in content["metric"] else None
    signal = content.get("signal")
    if least is not None:
        _staged(where, content, also, composing)
    elif signal is not None or content.get("lockbox"):
        key = "lockbox" if signal is None else "signal"
        fail(f"{where}: {key}: a claim by stages has one: metric.least in place of metric.margin")
    lockbox = dict(content.get("lockbox") or {})
    budget = dict(content.get("budget") or {})
    _known(f"{where}: budget", budget, BUDGET_KEYS)
    equal = _choice(f"{where}: budget.equal", budget.get("equal", "steps"), EQUAL)
    reference = _reference(where, budget, equal, arms, least is not None, tuning is not None)
    apart = _named(where, "budget.apart", budget.get("apart"), arms)
    status = content.get("status", "report")
    if status not in STATUS:
        fail(f"{where}: status {status}: gate (must pass) or report")
    options = dict(content.get("options") or {})
    seeds = _all_seeds(where, content, tuning)
    try:
        marked = digest(content, composing, CLASSES)
    except Refusal as refusal:
        fail(f"{where}: {str(refusal).removeprefix('--config ')}")
    return Claim(
        name=file.stem,
        title=str(content["title"]),
        seed=_whole(f"{where}: seed", content["seed"]),
        source=str(content["source"]),
        experiment=str(content["experiment"]),
        arms=arms,
        before=before,
        before_seed=before_seed,
        metric=metric,
        sham_margin=float(content.get("sham_margin", metric.margin / 2)),
        also=also,
        secondary=secondary,
        calls=content.get("calls"),
        seeds=seeds,
        equal=EQUAL[equal],
        budgets=_budgets(options, budget, lockbox, least is not None),
        lockbox=lockbox,
        status=status,
        baseline_tuning=content.get("baseline_tuning"),
        digest=marked,
        alone=_named(where, "alone", content.get("alone"), arms),
        tuning=tuning,
        note=content.get("note"),
        oracle=_oracle(where, content, arms),
        setting=bool(content.get("setting", False)),
        least=least,
        signal=None if signal is None else _condition(f"{where}: signal", signal, known),
        reference=reference,
        apart=apart,
        in_stages=_in_stages(content, composing),
    )


def contents() -> Contents:
    """Names of configurations -> what their files contain, in the order in which they count; each is read once."""
    found, read = cache(find), cache(yaml_of)
    return lambda configs: [read(file) for file in layers(map(found, configs))]


def read_arms(where: str, content: Mapping[str, Any], own: str) -> dict[str, Arm]:
    """Arms by name; ``own``: the name under which the ``config`` of one is found."""
    for name in content:
        if not isinstance(name, str) or not ARM.fullmatch(name):
            fail(f"{where}: arms: {printable(name)[:40]!r}: a name of letters, digits and . + = - is expected")
    return {name: _arm(f"{where}: arms.{name}", arm or {}, f"{own}:{name}") for name, arm in content.items()}


def _arm(where: str, content: Mapping[str, Any], config: str) -> Arm:
    """``config``: the name under which its own ``config`` is found."""
    _known(where, content, ARM_KEYS)
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
    """Check that the arms from whose runs others begin are there.

    Raises:
        Refusal: for one that is not, that begins from another itself, or that is tuned.
    """
    for name, arm in arms.items():
        for other in sorted(arm.needs()):
            if other not in arms:
                fail(f"{where}: arms.{name}: no arm {other!r} whose run it could begin from{hint(other, arms)}")
            if other == name or arms[other].needs() or arms[other].settings:
                fail(f"{where}: arms.{name}: {OF_ARM}/{other}: an arm that needs no other and has no settings")


def tuning_seed(
    where: str, content: Mapping[str, Any], arms: Mapping[str, Arm], keys: Iterable[str] = ("seed",)
) -> int | None:
    """The seed of the runs that choose settings, which stands beside other ``keys``; None where no arm has any."""
    tuned = [name for name, arm in arms.items() if arm.settings]
    if content.get("tuning") is None:
        if tuned:
            fail(f"{where}: arms.{tuned[0]}: settings need `tuning`, which chooses one of them")
        return None
    given = _mapping(where, content, "tuning")
    _known(f"{where}: tuning", given, keys)
    _need(f"{where}: tuning", given, ("seed",))
    if not tuned:
        fail(f"{where}: tuning: no arm has settings")
    return _whole(f"{where}: tuning.seed", given["seed"])


def _before(where: str, content: Mapping[str, Any], own: str, arms: Iterable[str]) -> tuple[Arm | None, int | None]:
    """The run from which arms begin, and its seed where it has one for all."""
    if content.get("before") is None:
        return None, None
    if BEFORE in arms:
        fail(f"{where}: arms.{BEFORE}: the name of the run before the arms")
    given = dict(_mapping(where, content, "before"))
    _need(f"{where}: before", given, ("experiment",))
    experiment, seed = str(given.pop("experiment")), given.pop("seed", None)
    seed = None if seed is None else _whole(f"{where}: before.seed", seed)
    more = {key: dict(_mapping(f"{where}: before", given, key)) for key in BEFORE_KEYS if key in given}
    if "lockbox" in more and not content.get("lockbox"):
        fail(f"{where}: before.lockbox: the claim has no lockbox, whose options these replace")
    given = {key: value for key, value in given.items() if key not in more}
    arm = _arm(f"{where}: before", given, f"{own}:{BEFORE}")
    added = Arm((experiment, *arm.configs), arm.options, predict=more.get("predict"), lockbox=more.get("lockbox"))
    return added, seed


def _tuning(where: str, content: Mapping[str, Any], arms: Mapping[str, Arm], metric: Metric) -> Tuning | None:
    check_needs(where, arms)
    seed = tuning_seed(where, content, arms, TUNING_KEYS)
    if seed is None:
        return None
    given = content["tuning"]
    way = given.get("better", "higher" if metric.higher else "lower")
    if way not in WAYS:
        fail(f"{where}: tuning.better {way}: higher or lower")
    by = Metric(str(given.get("metric", metric.name)), way == "higher", 0.0)
    return Tuning(seed, by, dict(given.get("options") or {}))


def _reference(
    where: str, budget: Mapping[str, Any], equal: str, arms: Mapping[str, Arm], staged: bool, tuned: bool
) -> str:
    """The arm whose FLOPs the others spend."""
    name = str(budget.get("reference", "method"))
    if "reference" in budget and equal != "flops":
        fail(f"{where}: budget.reference: of arms that are equal in flops, not in {equal}")
    if name not in arms:
        fail(f"{where}: budget.reference: no arm {name!r}{hint(name, arms)}")
    if equal == "flops" and arms[name].needs():
        fail(f"{where}: budget.reference {name}: it begins from another arm; one that needs no other has a length")
    if equal == "flops" and staged and name != "baseline":
        fail(f"{where}: budget.reference {name}: a claim by stages trains its baseline first: reference: baseline")
    if equal == "flops" and tuned:
        fail(f"{where}: tuning: settings are chosen before the reference arm is trained; not with budget.equal flops")
    return name


def _named(where: str, key: str, names: Sequence[str] | None, arms: Iterable[str]) -> tuple[str, ...]:
    """Arms beside the three that every claim has."""
    for name in names or ():
        if name in ARMS or name not in arms:
            others = [arm for arm in arms if arm not in ARMS]
            fail(f"{where}: {key}: no arm {name!r} beside {', '.join(ARMS)}{hint(name, others)}")
    return tuple(names or ())


def _in_stages(content: Mapping[str, Any], contents: Contents) -> bool:
    data = composed(content["experiment"], {}, contents)["config"].get("data") or {}
    return str(data.get("class_path")).rpartition(".")[2] in _STAGED


def _budgets(
    options: Mapping[str, Any], budget: Mapping[str, Any], lockbox: Mapping[str, Any], staged: bool
) -> dict[str, dict[str, Any]]:
    """Options of each budget; the pilot of a claim by stages has the full budget, outside of the lock-box."""
    own = {key: dict(budget.get("full" if staged else key) or {}) for key in BUDGETS}
    return {key: {**options, **own[key], **(lockbox if key == "full" else {})} for key in BUDGETS}


#: Options of data that permute a signal, by which a placebo may differ from the method.
_CONTROLS = (".sham", ".shuffle_captions")
#: Data modules whose stages have budgets of their own.
_STAGED = ("StagedData", "TaskStream")
#: Most side conditions of a claim by stages.
_SIDE = 2


def _staged(where: str, content: Mapping[str, Any], also: Sequence[Condition], contents: Contents) -> None:
    """What a claim by stages needs besides."""
    if content.get("oracle") is None:
        fail(f"{where}: metric.least: a margin from headroom needs `oracle`, the arm that shows how much can be gained")
    if len(also) > _SIDE:
        fail(f"{where}: also: {len(also)} side conditions, and a claim by stages has at most {_SIDE}")
    if dict(content.get("budget") or {}).get("pilot"):
        fail(f"{where}: budget.pilot: the pilot of a claim by stages has the full budget")
    method, sham = (_data(content, arm, contents) for arm in ("method", "sham"))
    other = sorted(key for key in {*method, *sham} if method.get(key) != sham.get(key))
    if other:
        fail(f"{where}: arms.sham: it trains on other data than the method: {other[0]}; a placebo permutes a signal")


def _data(content: Mapping[str, Any], arm: str, contents: Contents) -> dict[str, Any]:
    """Key -> value of the data that an arm trains on, without those that permute a signal of it."""
    made = composed(content["experiment"], content["arms"][arm] or {}, contents)
    values = dict(_leaves("data", made["config"].get("data")))
    values |= {key: value for key, value in (made.get("options") or {}).items() if key.startswith("data.")}
    return {key: value for key, value in values.items() if not key.endswith(_CONTROLS)}


def _leaves(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for name, item in value.items():
            yield from _leaves(f"{key}.{name}", item)
    else:
        yield key, value


def _oracle(where: str, content: Mapping[str, Any], arms: Iterable[str]) -> str | None:
    name = content.get("oracle")
    if name is not None and (name in ARMS or name not in arms):
        others = [arm for arm in arms if arm not in ARMS]
        fail(f"{where}: oracle: no arm {name!r} beside {', '.join(ARMS)}{hint(str(name), others)}")
    return name


def _metric(where: str, content: Mapping[str, Any]) -> Metric:
    _known(f"{where}: metric", content, METRIC_KEYS)
    _need(f"{where}: metric", content, ("name", "better", "least" if "least" in content else "margin"))
    if "least" in content and "margin" in content:
        fail(f"{where}: metric: margin, or least: the margin is then a quarter of what the oracle gains, at least that")
    if content["better"] not in WAYS:
        fail(f"{where}: metric.better {content['better']}: higher or lower")
    key = "least" if "least" in content else "margin"
    if not float(content[key]) >= 0 or (key == "least" and not float(content[key]) > 0):
        fail(f"{where}: metric.{key} {content[key]}: not below 0; its direction is in `better`")
    return Metric(str(content["name"]), content["better"] == "higher", float(content[key]))


def _condition(where: str, content: Mapping[str, Any], arms: Iterable[str]) -> Condition:
    _known(where, content, CONDITION_KEYS)
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
    """Budget -> seeds, of which no two budgets share one."""
    given, staged = _mapping(where, content, "seeds"), "least" in content["metric"]
    keys = (*BUDGETS, EXTENSION) if staged else BUDGETS
    _known(f"{where}: seeds", given, keys)
    _need(f"{where}: seeds", given, keys)
    seeds = {key: _seeds(f"{where}: seeds.{key}", given[key]) for key in keys}
    every = [seed for some in seeds.values() for seed in some]
    if staged and tuple(map(len, seeds.values())) != (numbers := (PILOT, FIRST, LAST - FIRST)):
        needed = ", ".join(f"{number} in {key}" for key, number in zip(seeds, numbers, strict=True))
        fail(f"{where}: seeds: a claim by stages has {needed}")
    if staged and len(set(every)) < len(every):
        fail(f"{where}: seeds: {max(every, key=every.count)} is there twice")
    both = set(seeds["pilot"]) & set(seeds["full"])
    if both:
        fail(f"{where}: seeds: {min(both)} is in pilot and in full: a seed that chose the margin cannot count")
    if tuning is not None and tuning.seed in {*seeds["pilot"], *seeds["full"]}:
        fail(f"{where}: tuning.seed {tuning.seed}: in pilot or full too: a seed that chose a setting cannot count")
    if len(seeds["full"]) < 3 or not seeds["pilot"]:
        fail(f"{where}: seeds: at least 3 in full (5 are the rule) and 1 in pilot")
    return seeds


def _seeds(where: str, value: Any) -> tuple[int, ...]:
    if not isinstance(value, list):
        fail(f"{where} {value!r}: a list of seeds is expected, such as [0, 1, 2]")
    return tuple(_whole(where, seed) for seed in value)


def _whole(where: str, value: Any) -> int:
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


def _known(where: str, content: Mapping[str, Any], known: Iterable[str]) -> None:
    for key in content:
        if key not in known:
            fail(f"{where}: {key}: no such key{hint(str(key), known)}")


def _need(where: str, content: Mapping[str, Any], keys: Iterable[str]) -> None:
    for key in keys:
        if content.get(key) is None:
            fail(f"{where}: {key} is missing")
