"""Every harmonizer with every recipe: two steps, or one line at once. `make slow` tries a sixth of them at a commit."""

from __future__ import annotations

from typing import Any

import pytest

from descant.cli.catalogue import find
from tests._suites.discovery import concrete
from tests.built import Built, Store
from tests.conftest import Result
from tests.rotation import turn
from tests.test_experiments import begin

RULES = concrete("Rule")
#: MMPareto is of towers: test_balance_everywhere. Rules across micro-batches need two of them: test_terms.
PARAMETERS = tuple(
    name for name, rule in RULES.items() if not rule.whole_gradients and not rule.across_batches and name != "MMPareto"
)
FEATURES = tuple(name for name, rule in RULES.items() if rule.per_sample)
#: An experiment of each recipe, and of each way of having terms: what refuses both, and what each says.
WHERE: dict[str, tuple[str | None, str | None]] = {
    "contrastive/stamps": (None, None),
    "contrastive/emoji-slip": (None, "is shared by two terms"),
    "contrastive/emoji": ("there is nothing to harmonize it with", "is shared by two terms"),
    "masked/emoji": (None, "needs the protocol Forks"),
    "masked/volumes": (None, "needs the protocol Forks"),
    "fusion/emoji": (None, None),
}
#: Recipes whose terms are made as those of others above: a rule of each kind will do.
ALSO: dict[str, tuple[str | None, str | None]] = {
    "missing/emoji": (None, None),
    "distill/emoji-rank": (None, "is shared by two terms"),
    "multitask/emoji": (None, "is shared by two terms"),
    "chat/emoji": ("there is nothing to harmonize it with", "needs the protocol Forks"),
}
QUICK = {("masked/emoji", "PCGrad"), ("contrastive/stamps", "CMGH"), ("contrastive/emoji", "PCGrad")}
BOTH = "rule: {class_path: %s}, curriculum: {class_path: Curriculum, init_args: {warmup: 0.0}}"


#: Two steps of few samples: what is looked at is whether they run.
FEW = ("--data.batch_size", "16")
#: Each callback of each base is parsed together with all others, and of each fit only one is left.
CALLBACKS = {
    **{
        f"Harmonize-{rule}": f"{{class_path: Harmonize, init_args: {{rule: {{class_path: {rule}}}}}}}"
        for rule in PARAMETERS
    },
    **{
        f"HarmonizeFeatures-{rule}": f"{{class_path: HarmonizeFeatures, init_args: {{{BOTH % rule}}}}}"
        for rule in FEATURES
    },
}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp)


def two_steps(cli: Any, store: Store, base: str, callback: str) -> tuple[Result, dict[str, Any]]:
    def build() -> Built:
        begin(find(base), cli)
        return Built(cli, [base], CALLBACKS, *FEW)

    return store(base, build).fit(cli, callback)


def holds(done: tuple[Result, dict[str, Any]], refusal: str | None) -> None:
    result, metrics = done
    if refusal is not None:
        assert result.rc == 2 and refusal in result.refusal, result.err
        return
    assert result.rc == 0, result.err
    assert metrics["steps"] == 2 and any(name.startswith("harmony/") for name in metrics)
    assert all(value == value for value in metrics.values() if isinstance(value, float))


def cases(rules: tuple[str, ...]) -> list[Any]:
    each = [(base, rule) for base in WHERE for rule in rules]
    rest = [case for case in turn(each, 6) if case not in QUICK]
    later = [pytest.param(*case, marks=pytest.mark.slow, id="-".join(case)) for case in rest]
    return [pytest.param(*case, id="-".join(case)) for case in each if case in QUICK] + later


@pytest.mark.parametrize(("base", "rule"), cases(PARAMETERS))
def test_at_the_parameters(base: str, rule: str, cli: Any, store: Store) -> None:
    holds(two_steps(cli, store, base, f"Harmonize-{rule}"), WHERE[base][0])


@pytest.mark.parametrize(("base", "rule"), cases(FEATURES))
def test_at_the_features(base: str, rule: str, cli: Any, store: Store) -> None:
    holds(two_steps(cli, store, base, f"HarmonizeFeatures-{rule}"), WHERE[base][1])


@pytest.mark.slow
@pytest.mark.parametrize("base", ALSO)
def test_of_other_recipes(base: str, cli: Any, store: Store) -> None:
    holds(two_steps(cli, store, base, "Harmonize-PCGrad"), ALSO[base][0])
    holds(two_steps(cli, store, base, "HarmonizeFeatures-CMGH"), ALSO[base][1])
