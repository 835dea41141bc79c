"""What a claim is: arms, seeds, budget and the rule that decides, in one YAML that is fixed before it is counted."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from descant.catalogue import ROOT, find
from descant.errors import Refusal, fail, hint, one_line

#: What every claim compares; it may have more arms, such as an oracle.
ARMS = ("baseline", "method", "sham")
BUDGETS = ("pilot", "full")
#: What the arms of a claim may be equal in, and where a run's metrics say so.
EQUAL = {"steps": "steps", "samples": "samples"}
_KEYS = {
    *(
        "title",
        "seed",
        "source",
        "experiment",
        "options",
        "arms",
        "metric",
        "sham_margin",
        "also",
        "secondary",
        "calls",
    ),
    *("seeds", "budget", "status", "baseline_tuning"),
}


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
    """``low <= metric(arm) - metric(against) <= high``, as means over seeds; without ``against`` the metric itself."""

    metric: str
    arm: str
    against: str | None
    low: float | None
    high: float | None

    def __str__(self) -> str:
        what = f"{self.metric} of {self.arm}" + (f" less {self.against}" if self.against else "")
        bounds = ((">=", self.low), ("<=", self.high))
        return f"{what} {' and '.join(f'{sign} {bound:g}' for sign, bound in bounds if bound is not None)}"


@dataclass(frozen=True)
class Arm:
    """What an arm adds to the experiment: overlays by name, then options."""

    configs: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Claim:
    """One claim. ``digest`` is of its file and of all configurations that its arms are made of."""

    name: str
    title: str
    seed: int
    source: str
    experiment: str
    arms: Mapping[str, Arm]
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

    def metrics(self) -> list[str]:
        """All metrics that it looks at, the first one first."""
        return list(dict.fromkeys([self.metric.name, *(c.metric for c in self.also), *self.secondary]))

    def command(self, arm: str, seed: int, budget: str) -> list[str]:
        """The arguments of ``descant fit`` of one run, without its name and place."""
        configs = [self.experiment, *self.arms[arm].configs]
        options = {**self.budgets[budget], **self.arms[arm].options, "seed_everything": seed}
        told = [f"--{key}={_text(value)}" for key, value in options.items()]
        return [word for config in configs for word in ("--config", config)] + told


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
    return _read(file, content)


def _read(file: Path, content: Mapping[str, Any]) -> Claim:
    where = file.name
    _known(where, content, _KEYS)
    _need(where, content, ("title", "seed", "source", "experiment", "arms", "metric", "seeds"))
    arms = {name: _arm(f"{where}: arms.{name}", arm or {}) for name, arm in _mapping(where, content, "arms").items()}
    for name in ARMS:
        if name not in arms:
            fail(f"{where}: arms: no {name!r}; every claim has {', '.join(ARMS)}")
    metric = _metric(where, _mapping(where, content, "metric"))
    also = tuple(_condition(f"{where}: also[{n}]", c, arms) for n, c in enumerate(content.get("also") or []))
    secondary = tuple(content.get("secondary") or ())
    for name in (metric.name, *(condition.metric for condition in also), *secondary):
        if name.split("/")[0] in ("val", "train"):  # there before the run is over, and other data chose by it
            fail(f"{where}: {name}: a claim is judged by the test that ends a run")
    seeds = {key: tuple(value) for key, value in _mapping(where, content, "seeds").items()}
    _known(f"{where}: seeds", seeds, BUDGETS)
    _need(f"{where}: seeds", seeds, BUDGETS)
    both = set(seeds["pilot"]) & set(seeds["full"])
    if both:
        fail(f"{where}: seeds: {min(both)} is in pilot and in full: what chose the margin cannot count")
    if len(seeds["full"]) < 3 or not seeds["pilot"]:
        fail(f"{where}: seeds: at least 3 in full (5 are the rule) and 1 in pilot")
    budget = dict(content.get("budget") or {})
    _known(f"{where}: budget", budget, ("equal", *BUDGETS))
    equal = budget.get("equal", "steps")
    if equal not in EQUAL:
        fail(f"{where}: budget.equal {equal}{hint(str(equal), EQUAL)}")
    status = content.get("status", "report")
    if status not in ("gate", "report"):
        fail(f"{where}: status {status}: gate (must pass) or report")
    configs = [content["experiment"], *(config for arm in arms.values() for config in arm.configs)]
    try:
        files = [find(config) for config in configs]
    except Refusal as refusal:
        fail(f"{where}: {str(refusal).removeprefix('--config ')}")
    options = dict(content.get("options") or {})
    return Claim(
        name=file.stem,
        title=str(content["title"]),
        seed=int(content["seed"]),
        source=str(content["source"]),
        experiment=str(content["experiment"]),
        arms=arms,
        metric=metric,
        sham_margin=float(content.get("sham_margin", metric.margin / 2)),
        also=also,
        secondary=secondary,
        calls=content.get("calls"),
        seeds=seeds,
        equal=equal,
        budgets={key: {**options, **dict(budget.get(key) or {})} for key in BUDGETS},
        status=status,
        baseline_tuning=content.get("baseline_tuning"),
        digest=_digest([file, *files]),
    )


def _arm(where: str, content: Mapping[str, Any]) -> Arm:
    _known(where, content, ("configs", "options"))
    return Arm(tuple(content.get("configs") or ()), dict(content.get("options") or {}))


def _metric(where: str, content: Mapping[str, Any]) -> Metric:
    _known(f"{where}: metric", content, ("name", "better", "margin"))
    _need(f"{where}: metric", content, ("name", "better", "margin"))
    if content["better"] not in ("higher", "lower"):
        fail(f"{where}: metric.better {content['better']}: higher or lower")
    if not float(content["margin"]) >= 0:
        fail(f"{where}: metric.margin {content['margin']}: not below 0; its direction is in `better`")
    return Metric(str(content["name"]), content["better"] == "higher", float(content["margin"]))


def _condition(where: str, content: Mapping[str, Any], arms: Iterable[str]) -> Condition:
    _known(where, content, ("metric", "arm", "against", "at_least", "at_most"))
    _need(where, content, ("metric", "arm"))
    for key in ("arm", "against"):
        if content.get(key) is not None and content[key] not in arms:
            fail(f"{where}: no arm {content[key]!r}{hint(content[key], arms)}")
    low, high = content.get("at_least"), content.get("at_most")
    if low is None and high is None:
        fail(f"{where}: at_least or at_most: without either it says nothing")
    return Condition(content["metric"], content["arm"], content.get("against"), low, high)


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
    return yaml.safe_dump(value, default_flow_style=True).strip() if isinstance(value, dict | list) else str(value)


def _digest(files: Iterable[Path]) -> str:
    """SHA-256 of the files in their order; the first 16 digits."""
    whole = hashlib.sha256()
    for file in files:
        content = file.read_bytes()
        whole.update(len(content).to_bytes(8, "little") + content)
    return whole.hexdigest()[:16]
