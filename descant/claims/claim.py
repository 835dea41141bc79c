"""Claim, Arm, Metric, Condition: which runs are compared, at which budget, and the rule that judges them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from descant.cli.arguments import pass_on

#: Arms that every claim compares; it may have more, such as an oracle.
ARMS = ("baseline", "method", "sham")
BUDGETS = ("pilot", "full")
#: Runs of other arms with one seed.
ABLATIONS = "ablations"
#: Name of the runs that choose settings.
TUNE = "tune"
#: Budget in which the arms of a claim are equal -> key of ``metrics.json``.
EQUAL = {"steps": "steps", "samples": "samples", "seconds": "train_seconds", "flops": "train_flops"}
#: Largest difference of an arm's FLOPs from those of the reference arm, as a share of them.
WITHIN = 0.01
#: Least share of the method's training time in every other arm, where arms are equal in seconds.
LEAST_TIME = 0.8
#: Name of the run from which all arms of a seed begin; and the placeholder of its folder in options.
BEFORE, BEFORE_FOLDER = "before", "BEFORE"
#: Placeholders in options: ``ARM/name`` is the folder of that arm's run with the same seed, ``SETTING`` a setting.
OF_ARM, SETTING = "ARM", "SETTING"


@dataclass(frozen=True)
class Metric:
    """A number in ``metrics.json``, which way is better, and which difference counts.

    Attributes:
        name: such as ``vendor/i2t_r1``. higher: whether more is better. margin: smallest gain of the method over the
            baseline that counts, in units of the metric. unit: of the metric, such as "share of the queries". reason:
            why a user cares for a gain of one margin.
    """

    name: str
    higher: bool
    margin: float
    unit: str = ""
    reason: str = ""

    def gain(self, value: float, against: float) -> float:
        """How much better ``value`` is: positive is better, whichever way the metric goes."""
        return value - against if self.higher else against - value


@dataclass(frozen=True)
class Condition:
    """``low <= metric(arm) - times * minus(against) <= high`` as means over seeds; without ``minus`` metric(arm).

    Attributes:
        minus: another metric, or the same of another arm. against: the arm of ``minus``. above: an arm whose values
            are subtracted from both, such as the one from which a share of a gap is won back.
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
        """The (arm, metric) pairs of which it is computed."""
        pairs = [(self.arm, self.metric), *([(self.against, self.minus)] if self.minus is not None else [])]
        return [*pairs, *((self.above, metric) for _, metric in pairs if self.above is not None)]

    @property
    def arms(self) -> tuple[str, ...]:
        """The arms that it reads."""
        return tuple(dict.fromkeys(arm for arm, _ in self.reads))

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
    """What an arm adds to the experiment: overlays by name, then options.

    Attributes:
        configs: names of overlays, and ``claims/NAME:ARM`` for a ``config`` that stands inside an arm.
        settings: values, one of which replaces every ``SETTING`` in its options; validation chooses it.
        predict, lockbox: of the run ``before``: options of `descant predict --sets train` after it, None where that is
            not wanted; and its options in place of the claim's lock-box, None for the same.
    """

    configs: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    settings: tuple[Any, ...] = ()
    predict: Mapping[str, Any] | None = None
    lockbox: Mapping[str, Any] | None = None

    def needs(self) -> set[str]:
        """The arms whose run folders its options name."""
        return {text.split("/")[1] for text in texts(self.options) if _of_arm(text)}

    def set(self, value: Any) -> Arm:
        """The arm with this setting."""
        options = _filled(self.options, lambda text: value if text == SETTING else text)
        return replace(self, options=options, settings=())


@dataclass(frozen=True)
class Tuning:
    """How one of several settings is chosen. Each setting is trained with these seeds; the best mean metric wins.

    The metric is that of the last validation.

    ``options``: further options of these runs, such as data whose validation set is not the test set.
    """

    seeds: tuple[int, ...]
    metric: Metric
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Claim:
    """One claim, as ``spec.load`` reads it.

    Attributes:
        seed: number of its paper. before: a run that is trained once a seed, from which all arms of the seed begin.
            before_seed: of one such run for all seeds, such as one teacher; intervals are then given that run.
        also: further conditions, which decide no word. secondary: metrics that are reported. calls: a counter that has
            to be equal in the method and in the placebo. seeds: of the pilot, and of the claim in their order; how many
            of them are run is computed from the pilot.
        equal: key of the budget in ``metrics.json``. reference: the arm whose FLOPs the others spend, where arms are
            equal in FLOPs. apart: arms with another budget, such as an oracle that has more. in_stages: data come in
            stages, which have their budgets.
        oracle: the arm that shows how much can be gained. simple: the arm that a sensible practitioner would try first
            for the same compute. no_simple: why there is none. removes: the one component that the placebo lacks.
        signal: what has to be there before the effect is measured. lockbox: options under which its effect is measured
            on samples that nothing else has read.
        digests: of each arm, and of the rule that judges them. exploratory: why its row is no test of a claim that was
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
        """All metrics that are reported, the first one first."""
        read = [metric for condition in self.also for _, metric in condition.reads]
        return list(dict.fromkeys([self.metric.name, *read, *self.secondary]))

    @property
    def judged_arms(self) -> tuple[str, ...]:
        """The arms that the word and the conditions need; others are ablations."""
        read = {arm for condition in self.also for arm in condition.arms}
        return tuple(arm for arm in self.arms if arm in (*ARMS, self.oracle, self.simple) or arm in read)

    @property
    def pilot_arms(self) -> tuple[str, ...]:
        """The arms of the pilot, by which seeds and room are computed."""
        return tuple(arm for arm in self.arms if arm in (*ARMS, self.oracle))

    @property
    def first(self) -> set[str]:
        """Names of the runs from which others begin."""
        return {BEFORE, *(other for arm in self.arms.values() for other in arm.needs())}

    @property
    def beyond(self) -> set[str]:
        """Names of the arms that continue the method, the baseline or the sham."""
        return {name for name, arm in self.arms.items() if name not in ARMS and arm.needs() & set(ARMS)}

    def limited(self, arm: str) -> bool:
        """Whether an arm takes as many steps as spend the FLOPs of the reference arm's run.

        Others are as long as their options have it: the reference, its sham, runs from which others begin, arms that
        continue one of these, arms apart, and all whose data come in stages.
        """
        alike = {self.reference, *self.apart} | ({"sham"} if self.reference == "method" else set())
        own = alike | (self.first - set(ARMS)) | self.beyond
        return self.equal == EQUAL["flops"] and not self.in_stages and arm not in own

    @property
    def uncompared(self) -> set[str]:
        """Names of the runs whose budget is not compared: arms apart, and runs from which others begin."""
        return {*self.apart, *(self.first - set(ARMS))}

    def begins_from(self, arm: str) -> set[str]:
        """Names of the runs that an arm needs before it starts."""
        if arm == BEFORE:
            return set()
        before = {BEFORE} if self.before is not None else set()
        return before | self.arms[arm].needs() | ({self.reference} if self.limited(arm) else set())

    def options(self, arm: str, budget: str) -> dict[str, Any]:
        """The options of a run; what comes before the arms has its own, and is kept from the lock-box as they are."""
        added = self.before if arm == BEFORE else self.arms[arm]
        assert added is not None
        sealed = {} if budget != "full" else self.lockbox if added.lockbox is None else added.lockbox
        return {**(sealed if arm == BEFORE else self.budgets[budget]), **added.options}

    def steps(self, arm: str, budget: str) -> int | None:
        """The optimizer steps of a run, where the claim states them."""
        return None if self.limited(arm) else self.options(arm, budget).get("trainer.max_steps")

    def needed(self, arm: str) -> list[str]:
        """The metrics that a run of an arm has to have; others are optional.

        An arm beside baseline, method and sham needs those that a condition reads of it: a model of one modality has
        no metrics of the others. A run from which others begin may need none.
        """
        read = [metric for condition in self.also for of, metric in condition.reads if of == arm]
        needed = [self.metric.name, *read] if arm in ARMS or not (read or arm in self.first) else read
        return list(dict.fromkeys([*needed, *([self.calls] if self.calls and arm in ("method", "sham") else [])]))

    def command(self, arm: str, seed: int, budget: str, place: Callable[[str], str] | None = None) -> list[str]:
        """The arguments of ``descant fit`` of one run, without its name and its folder.

        ``place``: name of another run with this seed -> its folder.
        """
        if arm == BEFORE:
            assert self.before is not None
            configs = list(self.before.configs)
        else:
            configs = [self.experiment, *self.arms[arm].configs]
        options = list(self.options(arm, budget).items())
        if self.limited(arm):
            limit = {"class_path": "Budget", "init_args": {"like": f"{OF_ARM}/{self.reference}"}}
            options.append(("trainer.callbacks+", limit))
        if place is not None:
            options = [(key, _filled(value, lambda text: _placed(text, place))) for key, value in options]
        words = [word for config in configs for word in ("--config", config)]
        return [*words, *(pass_on(key, _text(value)) for key, value in options), f"--seed_everything={seed}"]

    def predicting(self) -> list[str]:
        """The arguments of ``descant predict`` after the run ``before``, without its folder; none where not wanted."""
        if self.before is None or self.before.predict is None:
            return []
        return ["--sets=train", *(pass_on(key, _text(value)) for key, value in self.before.predict.items())]

    # settings -----------------------------------------------------------------------------------------------------

    @property
    def is_tuned(self) -> bool:
        """Whether some arm has settings to choose from."""
        return any(arm.settings for arm in self.arms.values())

    def candidates(self) -> Claim:
        """The claim whose arms are the settings of this one's, ``ogm.0``, ``ogm.1`` ..., and the runs they need."""
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

    def chosen(self, runs: Mapping[str, Mapping[int, Mapping[str, float]]]) -> dict[str, int]:
        """Arm -> index of the best of its settings in the runs of its candidates; the first of equal ones."""
        assert self.tuning is not None
        best = max if self.tuning.metric.higher else min
        return {name: values.index(best(values)) for name, values in self.tried(runs).items()}

    def tried(self, runs: Mapping[str, Mapping[int, Mapping[str, float]]]) -> dict[str, list[float]]:
        """Arm -> the metric of each of its settings in the runs of its candidates, mean over seeds."""
        assert self.tuning is not None
        seeds, metric = self.tuning.seeds, self.tuning.metric.name
        tuned = {name: len(arm.settings) for name, arm in self.arms.items() if arm.settings}
        return {
            name: [math.fsum(runs[f"{name}.{i}"][seed][metric] for seed in seeds) / len(seeds) for i in range(n)]
            for name, n in tuned.items()
        }

    def settled(self, chosen: Mapping[str, int]) -> Claim:
        """The claim with these settings."""
        arms = {name: arm.set(arm.settings[chosen[name]]) if arm.settings else arm for name, arm in self.arms.items()}
        return replace(self, arms=arms)


def _text(value: object) -> str:
    """A value as the command line takes it."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    if not isinstance(value, dict | list):
        return str(value)
    return str(yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=math.inf)).strip()


def _filled(value: Any, of: Callable[[str], Any]) -> Any:
    """The value with ``of(text)`` in place of every text in it."""
    if isinstance(value, Mapping):
        return {key: _filled(item, of) for key, item in value.items()}
    if isinstance(value, list):
        return [_filled(item, of) for item in value]
    return of(value) if isinstance(value, str) else value


def texts(value: Any) -> list[str]:
    """All texts in a value, at any depth."""
    found: list[str] = []
    _filled(value, found.append)
    return found


def _of_arm(text: str) -> bool:
    return text.startswith(f"{OF_ARM}/")


def _placed(text: str, place: Callable[[str], str]) -> str:
    """A text that begins with ``BEFORE``, or with ``ARM/`` and a name, as a path in that run's folder."""
    if text.split("/")[0] == BEFORE_FOLDER:
        return place(BEFORE) + text[len(BEFORE_FOLDER) :]
    if _of_arm(text):
        _, arm, *rest = text.split("/")
        return "/".join([place(arm), *rest])
    return text
