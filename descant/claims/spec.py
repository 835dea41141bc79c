"""What a claim is: arms, seeds, budget and the rule that decides, in one YAML that is fixed before it is counted."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from descant.cli.catalogue import ROOT, find
from descant.cli.errors import Refusal, fail, hint, one_line

#: What every claim compares; it may have more arms, such as an oracle.
ARMS = ("baseline", "method", "sham")
BUDGETS = ("pilot", "full")
#: What the runs are called that choose settings.
TUNE = "tune"
#: What the arms of a claim may be equal in, and where a run's metrics say so.
EQUAL = {"steps": "steps", "samples": "samples", "seconds": "train_seconds"}
#: Clocks are not steps: no arm may have had less than this share of the method's time; more is to its own good.
LEAST_TIME = 0.8
#: The keys of a claim, of its arms, and of what else in it has keys; the first so many are needed.
KEYS = (
    *("title", "seed", "source", "experiment", "arms", "metric", "seeds"),
    *("options", "before", "sham_margin", "also", "secondary", "calls", "budget", "status", "baseline_tuning"),
    *("alone", "tuning", "note"),
)
NEEDED = KEYS[:7]
ARM_KEYS = ("configs", "options", "settings")
METRIC_KEYS = ("name", "better", "margin")
CONDITION_KEYS = ("metric", "arm", "minus", "against", "times", "above", "at_least", "at_most")
TUNING_KEYS = ("seed", "metric", "better", "options")
WAYS, STATUS = ("higher", "lower"), ("gate", "report")
#: What only says how a claim is shown.
_LOOKS = ("alone", "note")


@dataclass(frozen=True)
class Metric:
    """A number in ``metrics.json``, which way is better, and what difference counts.

    Attributes:
        name: such as ``vendor/i2t_r1``. higher: whether more is better. margin: of method over baseline, in its units.
    """

    name: str
    higher: bool
    margin: float

    def gain(self, value: float, against: float) -> float:
        """How much better ``value`` is: positive is better, whichever way the metric goes."""
        return value - against if self.higher else against - value


@dataclass(frozen=True)
class Condition:
    """``low <= metric(arm) - times * minus(against) <= high`` as means over seeds; without ``minus`` metric(arm).

    Attributes:
        minus: another metric, or the same of another arm. against: whose, where not the arm's own.
        above: the arm from whose values both are counted, such as the one that a share of a gap is won back from.
    """

    metric: str
    arm: str
    minus: str | None
    against: str
    times: float
    low: float | None
    high: float | None
    above: str | None = None

    @property
    def reads(self) -> list[tuple[str, str]]:
        """The (arm, metric) that it looks at."""
        found = [(self.arm, self.metric), *([(self.against, self.minus)] if self.minus is not None else [])]
        return [*found, *((self.above, metric) for _, metric in found if self.above is not None)]

    def __str__(self) -> str:
        what = f"{self.metric} of {self.arm}"
        if self.minus is not None:
            other = [self.minus] if self.minus != self.metric else []
            other += [("of " if other else "") + self.against] if self.against != self.arm else []
            what += f" less {self.times:g} x " if self.times != 1 else " less "
            what += " ".join(other)
        if self.above is not None:
            what += f", {'both' if self.minus is not None else 'counted'} above {self.above}"
        bounds = ((">=", self.low), ("<=", self.high))
        return f"{what} {' and '.join(f'{sign} {bound:g}' for sign, bound in bounds if bound is not None)}"


@dataclass(frozen=True)
class Arm:
    """What an arm adds to the experiment: overlays by name, then options.

    ``settings``: values, one of which stands in its options for every ``SETTING``; validation chooses it.
    """

    configs: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    settings: tuple[Any, ...] = ()

    def needs(self) -> set[str]:
        """The arms whose runs its options name."""
        return {text.split("/")[1] for text in _texts(self.options) if _of_arm(text)}

    def set(self, value: Any) -> Arm:
        """With this setting."""
        options = _filled(self.options, lambda text: value if text == SETTING else text)
        return replace(self, options=options, settings=())


@dataclass(frozen=True)
class Tuning:
    """How settings are chosen: one run each with this seed, at the full budget, by a metric of its last validation.

    ``options``: what these runs have beside, such as data whose validation is not the test.
    """

    seed: int
    metric: Metric
    options: Mapping[str, Any] = field(default_factory=dict)


#: The name of what comes before the arms, among runs; and what stands for its run's folder in the options of arms.
BEFORE, ITS_RUN = "before", "BEFORE"
#: ``ARM/name`` stands for the folder of that arm's run with the same seed; ``SETTING`` for a setting.
OF_ARM, SETTING = "ARM", "SETTING"


@dataclass(frozen=True)
class Claim:
    """One claim. ``digest`` is of what its file says, and all configurations that its runs are made of.

    ``before``: what is trained once a seed, that all arms of the seed begin from; an experiment, and what it adds.
    ``note``: what a reader of its numbers has to know. ``alone``: arms that are shown by what conditions ask of them
    and nothing else, since what they call the mean, say, is not what the others call so.
    """

    name: str
    title: str
    seed: int
    source: str
    experiment: str
    arms: Mapping[str, Arm]
    before: Arm | None
    metric: Metric
    sham_margin: float
    also: tuple[Condition, ...]
    secondary: tuple[str, ...]
    calls: str | None
    seeds: Mapping[str, tuple[int, ...]]
    equal: str
    budgets: Mapping[str, Mapping[str, Any]]
    status: str
    baseline_tuning: str | None
    digest: str
    alone: tuple[str, ...] = ()
    tuning: Tuning | None = None
    note: str | None = None

    def metrics(self) -> list[str]:
        """All metrics that it looks at, the first one first."""
        read = [metric for condition in self.also for _, metric in condition.reads]
        return list(dict.fromkeys([self.metric.name, *read, *self.secondary]))

    @property
    def first(self) -> set[str]:
        """What others begin from."""
        return {BEFORE, *(other for arm in self.arms.values() for other in arm.needs())}

    @property
    def beyond(self) -> set[str]:
        """What goes on from the method, the baseline or the sham."""
        return {name for name, arm in self.arms.items() if name not in ARMS and arm.needs() & set(ARMS)}

    def steps(self, arm: str, budget: str) -> int | None:
        """The optimizer steps that a run takes, where the claim says so."""
        options = {} if arm == BEFORE else self.budgets[budget]
        own = self.before if arm == BEFORE else self.arms[arm]
        assert own is not None
        return {**options, **own.options}.get("trainer.max_steps")

    def needed(self, arm: str) -> list[str]:
        """The metrics that a run of an arm has to have; others it may have.

        What an arm beside the three is asked for is what a condition reads of it: a model of one modality alone has
        nothing of the others. What others begin from may be asked for nothing.
        """
        own = [metric for condition in self.also for of, metric in condition.reads if of == arm]
        own = [self.metric.name, *own] if arm in ARMS or not (own or arm in self.first) else own
        return list(dict.fromkeys([*own, *([self.calls] if self.calls and arm in ("method", "sham") else [])]))

    def command(self, arm: str, seed: int, budget: str, place: Callable[[str], str] | None = None) -> list[str]:
        """The arguments of ``descant fit`` of one run, without its name and place.

        ``place``: the folder of the run of another arm, or of what comes before the arms, with this seed.
        """
        if arm == BEFORE:
            assert self.before is not None
            configs, options = list(self.before.configs), dict(self.before.options)
        else:
            configs = [self.experiment, *self.arms[arm].configs]
            options = {**self.budgets[budget], **self.arms[arm].options}
        if place is not None:
            options = _filled(options, lambda text: _placed(text, place))
        told = [f"--{key}={_text(value)}" for key, value in options.items()]
        return [word for config in configs for word in ("--config", config)] + [*told, f"--seed_everything={seed}"]

    # settings -----------------------------------------------------------------------------------------------------

    @property
    def is_tuned(self) -> bool:
        """Whether some arm has settings to choose from."""
        return any(arm.settings for arm in self.arms.values())

    def candidates(self) -> Claim:
        """The claim whose arms are the settings of this one's, ``ogm.0``, ``ogm.1`` ..., and what these need."""
        assert self.tuning is not None
        arms = {f"{name}.{i}": arm.set(x) for name, arm in self.arms.items() for i, x in enumerate(arm.settings)}
        needed = {name for arm in arms.values() for name in arm.needs()}
        arms = {name: self.arms[name] for name in self.arms if name in needed} | arms
        budgets = {TUNE: {**self.budgets["full"], **self.tuning.options}}
        seeds = {TUNE: (self.tuning.seed,)}
        return replace(
            self, arms=arms, metric=self.tuning.metric, also=(), secondary=(), calls=None, seeds=seeds, budgets=budgets
        )

    def chosen(self, runs: Mapping[str, Mapping[int, Mapping[str, float]]]) -> dict[str, int]:
        """Arm -> which of its settings was best in the runs of its candidates; of equals the first one."""
        assert self.tuning is not None
        found = {}
        for name, arm in self.arms.items():
            values = [runs[f"{name}.{i}"][self.tuning.seed][self.tuning.metric.name] for i in range(len(arm.settings))]
            if values:
                best = max(values) if self.tuning.metric.higher else min(values)
                found[name] = values.index(best)
        return found

    def settled(self, chosen: Mapping[str, int]) -> Claim:
        """The claim with these settings."""
        arms = {name: arm.set(arm.settings[chosen[name]]) if arm.settings else arm for name, arm in self.arms.items()}
        return replace(self, arms=arms)


def folder() -> Path:
    return ROOT / "claims"


def names() -> list[str]:
    """Of all claims that ship."""
    return sorted(file.stem for file in folder().glob("*.yaml"))


def load(name: str) -> Claim:
    """The claim of that name, or of a file.

    Raises:
        Refusal: naming the key, for what is missing, unknown or makes no sense.
    """
    file = Path(name) if name.endswith(".yaml") and Path(name).is_file() else folder() / f"{name}.yaml"
    if not file.is_file():
        fail(f"claims {name}: no such claim{hint(name, names())}")
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        fail(f"{file.name}: {one_line(error)}")
    if not isinstance(content, dict):
        fail(f"{file.name}: a claim is an object with arms, seeds and a metric")
    try:
        return _read(file, content)
    except (ValueError, TypeError, AttributeError) as error:  # a value of another kind than all that is asked above
        fail(f"{file.name}: {one_line(error)}")


def _read(file: Path, content: Mapping[str, Any]) -> Claim:
    where = file.name
    _known(where, content, KEYS)
    _need(where, content, NEEDED)
    arms = {name: _arm(f"{where}: arms.{name}", arm or {}) for name, arm in _mapping(where, content, "arms").items()}
    for name in ARMS:
        if name not in arms:
            fail(f"{where}: arms: no {name!r}; every claim has {', '.join(ARMS)}")
    before = None
    if content.get("before") is not None:
        told = dict(_mapping(where, content, "before"))
        _need(f"{where}: before", told, ("experiment",))
        first = _arm(f"{where}: before", {key: value for key, value in told.items() if key != "experiment"})
        before = Arm((str(told["experiment"]), *first.configs), first.options)
        if BEFORE in arms:
            fail(f"{where}: arms.{BEFORE}: the name of what comes before the arms")
    metric = _metric(where, _mapping(where, content, "metric"))
    known = [*arms, *([BEFORE] if before is not None else [])]
    also = tuple(_condition(f"{where}: also[{n}]", c, known) for n, c in enumerate(content.get("also") or []))
    secondary = tuple(content.get("secondary") or ())
    for name in (metric.name, *(metric for condition in also for _, metric in condition.reads), *secondary):
        if name.split("/")[0] in ("val", "train"):  # there before the run is over, and other data chose by it
            fail(f"{where}: {name}: a claim is judged by the test that ends a run")
    tuning = _tuning(where, content, arms, metric)
    seeds = {key: _seeds(f"{where}: seeds.{key}", value) for key, value in _mapping(where, content, "seeds").items()}
    _known(f"{where}: seeds", seeds, BUDGETS)
    _need(f"{where}: seeds", seeds, BUDGETS)
    both = set(seeds["pilot"]) & set(seeds["full"])
    if both:
        fail(f"{where}: seeds: {min(both)} is in pilot and in full: what chose the margin cannot count")
    if tuning is not None and tuning.seed in {*seeds["pilot"], *seeds["full"]}:
        fail(f"{where}: tuning.seed {tuning.seed}: in pilot or full too: what chose a setting cannot count")
    if len(seeds["full"]) < 3 or not seeds["pilot"]:
        fail(f"{where}: seeds: at least 3 in full (5 are the rule) and 1 in pilot")
    budget = dict(content.get("budget") or {})
    _known(f"{where}: budget", budget, ("equal", *BUDGETS))
    equal = budget.get("equal", "steps")
    if equal not in EQUAL:
        fail(f"{where}: budget.equal {equal}{hint(str(equal), EQUAL)}")
    status = content.get("status", "report")
    if status not in STATUS:
        fail(f"{where}: status {status}: gate (must pass) or report")
    configs = [content["experiment"], *(config for arm in arms.values() for config in arm.configs)]
    configs += before.configs if before is not None else ()
    try:
        files = [find(config) for config in configs]
    except Refusal as refusal:
        fail(f"{where}: {str(refusal).removeprefix('--config ')}")
    options = dict(content.get("options") or {})
    return Claim(
        name=file.stem,
        title=str(content["title"]),
        seed=_whole(f"{where}: seed", content["seed"]),
        source=str(content["source"]),
        experiment=str(content["experiment"]),
        arms=arms,
        before=before,
        metric=metric,
        sham_margin=float(content.get("sham_margin", metric.margin / 2)),
        also=also,
        secondary=secondary,
        calls=content.get("calls"),
        seeds=seeds,
        equal=EQUAL[equal],
        budgets={key: {**options, **dict(budget.get(key) or {})} for key in BUDGETS},
        status=status,
        baseline_tuning=content.get("baseline_tuning"),
        digest=_digest([file, *files]),
        alone=_alone(where, content, arms),
        tuning=tuning,
        note=content.get("note"),
    )


def _tuning(where: str, content: Mapping[str, Any], arms: Mapping[str, Arm], metric: Metric) -> Tuning | None:
    tuned = [name for name, arm in arms.items() if arm.settings]
    for name, arm in arms.items():
        for other in sorted(arm.needs()):
            if other not in arms:
                fail(f"{where}: arms.{name}: no arm {other!r} whose run it could begin from{hint(other, arms)}")
            if other == name or arms[other].needs() or arms[other].settings:
                fail(f"{where}: arms.{name}: {OF_ARM}/{other}: an arm that needs no other and has no settings")
    if content.get("tuning") is None:
        if tuned:
            fail(f"{where}: arms.{tuned[0]}: settings: chosen by what? tuning is missing")
        return None
    told = _mapping(where, content, "tuning")
    _known(f"{where}: tuning", told, TUNING_KEYS)
    _need(f"{where}: tuning", told, ("seed",))
    if not tuned:
        fail(f"{where}: tuning: no arm has settings")
    if told.get("better", "higher") not in WAYS:
        fail(f"{where}: tuning.better {told['better']}: higher or lower")
    higher = metric.higher if "better" not in told else told["better"] == "higher"
    by = Metric(str(told.get("metric", metric.name)), higher, 0.0)
    return Tuning(_whole(f"{where}: tuning.seed", told["seed"]), by, dict(told.get("options") or {}))


def _alone(where: str, content: Mapping[str, Any], arms: Iterable[str]) -> tuple[str, ...]:
    alone = tuple(content.get("alone") or ())
    for name in alone:
        if name in ARMS or name not in arms:
            others = [arm for arm in arms if arm not in ARMS]
            fail(f"{where}: alone: no arm {name!r} beside {', '.join(ARMS)}{hint(name, others)}")
    return alone


def _arm(where: str, content: Mapping[str, Any]) -> Arm:
    _known(where, content, ARM_KEYS)
    settings = content.get("settings") or ()
    if not isinstance(settings, list | tuple):
        fail(f"{where}: settings: a list of values is expected, such as [0.1, 0.3, 1.0]")
    arm = Arm(tuple(content.get("configs") or ()), dict(content.get("options") or {}), tuple(settings))
    if bool(settings) != (SETTING in _texts(arm.options)):
        what = f"none of its options is {SETTING}" if settings else f"{SETTING} in its options, and no values for it"
        fail(f"{where}: settings: {what}")
    return arm


def _metric(where: str, content: Mapping[str, Any]) -> Metric:
    _known(f"{where}: metric", content, METRIC_KEYS)
    _need(f"{where}: metric", content, METRIC_KEYS)
    if content["better"] not in WAYS:
        fail(f"{where}: metric.better {content['better']}: higher or lower")
    if not float(content["margin"]) >= 0:
        fail(f"{where}: metric.margin {content['margin']}: not below 0; its direction is in `better`")
    return Metric(str(content["name"]), content["better"] == "higher", float(content["margin"]))


def _condition(where: str, content: Mapping[str, Any], arms: Iterable[str]) -> Condition:
    _known(where, content, CONDITION_KEYS)
    _need(where, content, ("metric", "arm"))
    for key in ("arm", "against", "above"):
        if content.get(key) is not None and content[key] not in arms:
            fail(f"{where}: no arm {content[key]!r}{hint(content[key], arms)}")
    low, high = content.get("at_least"), content.get("at_most")
    if low is None and high is None:
        fail(f"{where}: at_least or at_most: without either it says nothing")
    metric, arm, against = content["metric"], content["arm"], content.get("against")
    minus = content.get("minus", metric if against is not None else None)
    if minus is None and "times" in content:
        fail(f"{where}: times: of what? Of `minus`, another metric, or of that of `against`, another arm")
    if (minus, against or arm) == (metric, arm):
        fail(f"{where}: {metric} of {arm} less itself says nothing")
    if content.get("above") in (arm, against or arm):
        fail(f"{where}: above: {content['above']} above itself says nothing")
    times, above = float(content.get("times", 1.0)), content.get("above")
    return Condition(metric, arm, minus, against or arm, times, low, high, above)


def _whole(where: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        fail(f"{where} {value!r}: a whole number is expected")
    return value


def _seeds(where: str, value: Any) -> tuple[int, ...]:
    if not isinstance(value, list):
        fail(f"{where} {value!r}: a list of seeds is expected, such as [0, 1, 2]")
    return tuple(_whole(where, seed) for seed in value)


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


def _text(value: object) -> str:
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    if not isinstance(value, dict | list):
        return str(value)
    return str(yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=math.inf)).strip()


def _filled(value: Any, of: Callable[[str], Any]) -> Any:
    """The same with every text replaced by what it stands for."""
    if isinstance(value, Mapping):
        return {key: _filled(item, of) for key, item in value.items()}
    if isinstance(value, list):
        return [_filled(item, of) for item in value]
    return of(value) if isinstance(value, str) else value


def _texts(value: Any) -> list[str]:
    found: list[str] = []
    _filled(value, found.append)
    return found


def _of_arm(text: str) -> bool:
    return text.startswith(f"{OF_ARM}/")


def _placed(text: str, place: Callable[[str], str]) -> str:
    """A text that begins with ``BEFORE``, or with ``ARM/`` and a name, as a path in that run's folder."""
    if text.split("/")[0] == ITS_RUN:
        return place(BEFORE) + text[len(ITS_RUN) :]
    if _of_arm(text):
        _, arm, *rest = text.split("/")
        return "/".join([place(arm), *rest])
    return text


def _unwarned(said: Any) -> Any:
    """The same without the callback that warns, which changes no number."""
    if isinstance(said, dict):
        return {key: _unwarned(value) for key, value in said.items()}
    if isinstance(said, list):
        return [_unwarned(item) for item in said if not (isinstance(item, dict) and item.get("class_path") == "Sanity")]
    return said


def _digest(files: Iterable[Path]) -> str:
    """SHA-256 of what the YAML files say, in their order; the first 16 digits.

    Comments, layout and which warnings are meant say nothing. ``trainer.precision: auto`` counts as bf16-mixed, what it
    is on machines that compute bfloat16: what it was in a result is stored with the result.
    """
    said = [_unwarned(yaml.safe_load(file.read_text(encoding="utf-8"))) for file in files]
    for trainer in (content.get("trainer") or {} for content in said):
        if trainer.get("precision") == "auto":
            trainer["precision"] = "bf16-mixed"
    said[0] = {key: value for key, value in said[0].items() if key not in _LOOKS}
    return hashlib.sha256(json.dumps(said, default=str).encode()).hexdigest()[:16]
