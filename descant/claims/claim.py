"""Claim, Arm, Metric, Condition: the compared runs, their budget, and the rule that judges them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from descant.cli.arguments import pass_on

#: Arms of every claim; a claim may have more, such as an oracle.
ARMS = ("baseline", "method", "sham")
BUDGETS = ("pilot", "full")
#: Name of the one-seed runs of other arms.
ABLATIONS = "ablations"
#: Name of the runs that choose settings.
TUNE = "tune"
#: Budget that is equal for all arms of a claim -> key of ``metrics.json``.
EQUAL = {"steps": "steps", "samples": "samples", "seconds": "train_seconds", "flops": "train_flops"}
#: Largest relative difference of an arm's FLOPs from those of the reference arm.
WITHIN = 0.01
#: Least share of the method's training time that every other arm needs if arms are equal in seconds.
LEAST_TIME = 0.8
#: Name of the run from which all arms of a seed begin, and the placeholder of its folder in options.
BEFORE, BEFORE_FOLDER = "before", "BEFORE"
#: Placeholders in options: ``ARM/name`` is the folder of that arm's run with the same seed, ``SETTING`` a setting.
OF_ARM, SETTING = "ARM", "SETTING"


@dataclass(frozen=True)
class Metric:
    """A number in ``metrics.json``, its better direction, and the smallest difference that counts.

    Attributes:
        name: such as ``vendor/i2t_r1``. higher: whether more is better. margin: smallest gain of the method over the
            baseline that counts, in units of the metric. unit: of the metric, such as "share of the queries". reason:
            why a gain of one margin matters to a user.
    """

    name: str
    higher: bool
    margin: float
    unit: str = ""
    reason: str = ""

    def gain(self, value: float, against: float) -> float:
        """Return how much better ``value`` is; positive is better for either direction of the metric."""
        return value - against if self.higher else against - value


@dataclass(frozen=True)
class Condition:
    """``low <= metric(arm) - times * minus(against) <= high`` as means over seeds; without ``minus`` only metric(arm).

    Attributes:
        minus: another metric, or the same metric of another arm. against: the arm of ``minus``. above: an arm whose
            values are subtracted from both terms, such as the arm from which a recovered gap is measured.
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
    def required_metrics(self) -> list[tuple[str, str]]:
        """List the (arm, metric) pairs that the condition reads."""
        pairs = [(self.arm, self.metric), *([(self.against, self.minus)] if self.minus is not None else [])]
        return [*pairs, *((self.above, metric) for _, metric in pairs if self.above is not None)]

    @property
    def arms(self) -> tuple[str, ...]:
        """Return the arms that the condition reads."""
        return tuple(dict.fromkeys(arm for arm, _ in self.required_metrics))

    def __str__(self) -> str:
        text = f"{self.metric} of {self.arm}"
        if self.minus is not None:
            other = [self.minus] if self.minus != self.metric else []
            other += [("of " if other else "") + self.against] if self.against != self.arm else []
            text += f" less {self.times:g} x " if self.times != 1 else " less "
            text += " ".join(other)
        if self.above is not None:
            text += f", {'both' if self.minus is not None else 'counted'} above {self.above}"
        bounds = ((">=", self.low), ("<=", self.high))
        return f"{text} {' and '.join(f'{sign} {bound:g}' for sign, bound in bounds if bound is not None)}"


@dataclass(frozen=True)
class Arm:
    """The overlays (by name) and options that an arm adds to the experiment.

    Attributes:
        configs: names of overlays, and ``claims/NAME:ARM`` for a ``config`` inside an arm.
        settings: candidate values for every ``SETTING`` in its options; validation chooses one.
        predict, lockbox: only for the run ``before``. Options of `descant predict --sets train` after it, or None for
            no predictions; and options that replace the claim's lock-box, or None to keep it.
    """

    configs: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    settings: tuple[Any, ...] = ()
    predict: Mapping[str, Any] | None = None
    lockbox: Mapping[str, Any] | None = None

    def needs(self) -> set[str]:
        """Return the arms whose run folders its options name."""
        return {text.split("/")[1] for text in texts(self.options) if _of_arm(text)}

    def set(self, value: Any) -> Arm:
        """Return the arm with this setting."""
        options = _replace_texts(self.options, lambda text: value if text == SETTING else text)
        return replace(self, options=options, settings=())


@dataclass(frozen=True)
class Tuning:
    """How one of several settings is chosen: each is trained with these seeds, and the best mean metric wins.

    The metric is that of the last validation. ``options``: further options of these runs, such as data whose validation
    set is not the test set.
    """

    seeds: tuple[int, ...]
    metric: Metric
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Claim:
    """One claim, as ``spec.load`` reads it.

    Attributes:
        seed: number of its paper. before: a run trained once per seed, from which all arms of the seed begin.
            before_seed: the seed of a single such run for all seeds, such as one teacher; intervals then hold given
            that run.
        also: further conditions, which decide no word. secondary: further metrics that are reported. calls: a counter
            that must be equal in the method and in the placebo. seeds: of the pilot, and of the claim in their order;
            the pilot determines how many of them are run.
        equal: key of the budget in ``metrics.json``. reference: the arm whose FLOPs the others spend, if arms are equal
            in FLOPs. apart: arms with another budget, such as an oracle with a larger one. in_stages: whether data come
            in stages with their own budgets.
        oracle: the arm that shows how much can be gained. simple: the arm that a sensible practitioner would try first
            for the same compute. no_simple: why there is none. removes: the one component that the placebo lacks.
        signal: a condition that must hold before the effect is measured. lockbox: options with which the effect is
            measured on samples that no other run has read.
        digests: of each arm, and of the rule that judges them. exploratory: why its row does not test a claim that was
            fixed beforehand. note: what a reader of its numbers has to know. file: its YAML.
    """

    name: str
    title: str
    seed: int
    source: str
    experiment: str
    arms: Mapping[str, Arm]
    before: Arm | None
    metric: Metric
    also: tuple[Condition, ...]
    secondary: tuple[str, ...]
    calls: str | None
    seeds: Mapping[str, tuple[int, ...]]
    equal: str
    budgets: Mapping[str, Mapping[str, Any]]
    baseline_tuning: str | None
    digests: Mapping[str, str]
    file: Path
    tuning: Tuning | None = None
    note: str | None = None
    oracle: str | None = None
    simple: str | None = None
    no_simple: str | None = None
    removes: str | None = None
    exploratory: str | None = None
    signal: Condition | None = None
    lockbox: Mapping[str, Any] = field(default_factory=dict)
    before_seed: int | None = None
    reference: str = "method"
    apart: tuple[str, ...] = ()
    in_stages: bool = False

    def metrics(self) -> list[str]:
        """List all metrics that are reported, the main one first."""
        read = [metric for condition in self.also for _, metric in condition.required_metrics]
        return list(dict.fromkeys([self.metric.name, *read, *self.secondary]))

    @property
    def judged_arms(self) -> tuple[str, ...]:
        """Return the arms that the word and the conditions need; others are ablations."""
        read = {arm for condition in self.also for arm in condition.arms}
        return tuple(arm for arm in self.arms if arm in (*ARMS, self.oracle, self.simple) or arm in read)

    @property
    def pilot_arms(self) -> tuple[str, ...]:
        """Return the arms of the pilot, which determines seeds and room."""
        return tuple(arm for arm in self.arms if arm in (*ARMS, self.oracle))

    @property
    def first(self) -> set[str]:
        """Return names of the runs from which others begin."""
        return {BEFORE, *(other for arm in self.arms.values() for other in arm.needs())}

    @property
    def beyond(self) -> set[str]:
        """Return names of the arms that continue the method, the baseline or the sham."""
        return {name for name, arm in self.arms.items() if name not in ARMS and arm.needs() & set(ARMS)}

    def is_limited(self, arm: str) -> bool:
        """Whether an arm trains until it has spent the FLOPs of the reference arm's run.

        The options of other arms give their length: the reference, its sham, runs from which others begin, arms that
        continue one of these, arms apart, and all arms whose data come in stages.
        """
        alike = {self.reference, *self.apart} | ({"sham"} if self.reference == "method" else set())
        own = alike | (self.first - set(ARMS)) | self.beyond
        return self.equal == EQUAL["flops"] and not self.in_stages and arm not in own

    @property
    def runs_without_budget(self) -> set[str]:
        """Return names of the runs whose budget is not compared: arms apart, and runs from which others begin."""
        return {*self.apart, *(self.first - set(ARMS))}

    def begins_from(self, arm: str) -> set[str]:
        """Return names of the runs that an arm needs before it starts."""
        if arm == BEFORE:
            return set()
        before = {BEFORE} if self.before is not None else set()
        return before | self.arms[arm].needs() | ({self.reference} if self.is_limited(arm) else set())

    def options(self, arm: str, budget: str) -> dict[str, Any]:
        """Return the options of a run: ``before`` takes its own and those of the lock-box, arms also the budget's."""
        added = self.before if arm == BEFORE else self.arms[arm]
        assert added is not None
        sealed = {} if budget != "full" else self.lockbox if added.lockbox is None else added.lockbox
        return {**(sealed if arm == BEFORE else self.budgets[budget]), **added.options}

    def steps(self, arm: str, budget: str) -> int | None:
        """Return the optimizer steps of a run if the claim gives them."""
        return None if self.is_limited(arm) else self.options(arm, budget).get("trainer.max_steps")

    def required_metrics(self, arm: str) -> list[str]:
        """List the metrics that a run of an arm must have; others are optional.

        An arm beside baseline, method and sham needs those that a condition reads from it: a model of one modality has
        no metrics of the others. A run from which others begin may need none.
        """
        read = [metric for condition in self.also for of, metric in condition.required_metrics if of == arm]
        needed = [self.metric.name, *read] if arm in ARMS or not (read or arm in self.first) else read
        return list(dict.fromkeys([*needed, *([self.calls] if self.calls and arm in ("method", "sham") else [])]))

    def command(self, arm: str, seed: int, budget: str, place: Callable[[str], str] | None = None) -> list[str]:
        """Return the arguments of ``descant fit`` for one run, without its name and its folder.

        ``place``: name of another run with this seed -> its folder.
        """
        if arm == BEFORE:
            assert self.before is not None
            configs = list(self.before.configs)
        else:
            configs = [self.experiment, *self.arms[arm].configs]
        options = list(self.options(arm, budget).items())
        if self.is_limited(arm):
            limit = {"class_path": "Budget", "init_args": {"like": f"{OF_ARM}/{self.reference}"}}
            options.append(("trainer.callbacks+", limit))
        if place is not None:
            options = [(key, _replace_texts(value, lambda text: _resolve_run(text, place))) for key, value in options]
        words = [word for config in configs for word in ("--config", config)]
        return [*words, *(pass_on(key, _text(value)) for key, value in options), f"--seed_everything={seed}"]

    def predicting(self) -> list[str]:
        """Return arguments of ``descant predict`` after the run ``before``, without its folder; may be empty."""
        if self.before is None or self.before.predict is None:
            return []
        return ["--sets=train", *(pass_on(key, _text(value)) for key, value in self.before.predict.items())]

    # settings -----------------------------------------------------------------------------------------------------

    @property
    def is_tuned(self) -> bool:
        """Whether any arm has settings to choose from."""
        return any(arm.settings for arm in self.arms.values())

    def candidates(self) -> Claim:
        """Return a claim whose arms are this claim's settings, ``ogm.0``, ``ogm.1`` ..., and the runs they need."""
        assert self.tuning is not None
        arms = {f"{name}.{i}": arm.set(x) for name, arm in self.arms.items() for i, x in enumerate(arm.settings)}
        needed = {name for arm in arms.values() for name in arm.needs()}
        return replace(
            self,
            arms={name: self.arms[name] for name in self.arms if name in needed} | arms,
            metric=self.tuning.metric,
            also=(),
            secondary=(),
            calls=None,
            seeds={TUNE: self.tuning.seeds},
            budgets={TUNE: {**self.budgets["full"], **self.tuning.options}},
            digests={**self.digests, **{name: self.digests.get(name.rpartition(".")[0], "") for name in arms}},
        )

    def choose_settings(self, runs: Mapping[str, Mapping[int, Mapping[str, float]]]) -> dict[str, int]:
        """Map each arm to the index of its best setting in the runs of its candidates; the first of equal ones."""
        assert self.tuning is not None
        best = max if self.tuning.metric.higher else min
        return {name: values.index(best(values)) for name, values in self.tuned_metrics(runs).items()}

    def tuned_metrics(self, runs: Mapping[str, Mapping[int, Mapping[str, float]]]) -> dict[str, list[float]]:
        """Map each arm to the metric of each of its settings in the runs of its candidates, averaged over seeds."""
        assert self.tuning is not None
        seeds, metric = self.tuning.seeds, self.tuning.metric.name
        tuned = {name: len(arm.settings) for name, arm in self.arms.items() if arm.settings}
        return {
            name: [math.fsum(runs[f"{name}.{i}"][seed][metric] for seed in seeds) / len(seeds) for i in range(n)]
            for name, n in tuned.items()
        }

    def with_settings(self, chosen: Mapping[str, int]) -> Claim:
        """Return the claim with these settings."""
        arms = {name: arm.set(arm.settings[chosen[name]]) if arm.settings else arm for name, arm in self.arms.items()}
        return replace(self, arms=arms)


def _text(value: object) -> str:
    """Format a value for the command line."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    if not isinstance(value, dict | list):
        return str(value)
    return str(yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=math.inf)).strip()


def _replace_texts(value: Any, of: Callable[[str], Any]) -> Any:
    """Return the value with every text in it replaced by ``of(text)``."""
    if isinstance(value, Mapping):
        return {key: _replace_texts(item, of) for key, item in value.items()}
    if isinstance(value, list):
        return [_replace_texts(item, of) for item in value]
    return of(value) if isinstance(value, str) else value


def texts(value: Any) -> list[str]:
    """List all texts in a value, at any depth."""
    found: list[str] = []
    _replace_texts(value, found.append)
    return found


def _of_arm(text: str) -> bool:
    return text.startswith(f"{OF_ARM}/")


def _resolve_run(text: str, place: Callable[[str], str]) -> str:
    """Resolve a text that begins with ``BEFORE``, or with ``ARM/`` and a name, to a path in that run's folder."""
    if text.split("/")[0] == BEFORE_FOLDER:
        return place(BEFORE) + text[len(BEFORE_FOLDER) :]
    if _of_arm(text):
        _, arm, *rest = text.split("/")
        return "/".join([place(arm), *rest])
    return text
