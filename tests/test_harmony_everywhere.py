"""Every harmonizer with every recipe: two steps, or one line at once. `make slow` tries all of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.test_experiments import EXPERIMENTS, begin

PARAMETERS = (
    *("PCGrad", "Realign", "GradVac", "CAGrad", "MGDA", "UPGrad"),
    *("NashMTL", "IMTLG", "AlignedMTL", "GradNorm", "Uncertainty", "DWA"),
)
FEATURES = ("PCGrad", "Realign", "GradVac", "CAGrad", "MGDA")
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
    "chat/emoji": ("there is nothing to harmonize it with", "needs the protocol Forks"),
}
QUICK = {("masked/emoji", "PCGrad"), ("contrastive/stamps", "Realign"), ("contrastive/emoji", "PCGrad")}
BOTH = "rule: {class_path: %s}, curriculum: {class_path: Curriculum, init_args: {warmup: 0.0}}"


def two_steps(cli: Any, base: str, callback: str, arguments: str) -> Any:
    text = f"trainer:\n  callbacks+:\n    - {{class_path: {callback}, init_args: {{{arguments}}}}}\n"
    Path("harmony.yaml").write_text(text)
    configs = [part for name in (base, "harmony.yaml", "on/tiny") for part in ("--config", name)]
    return cli("fit", *configs, "--name", "x", "--test", "false", "--trainer.limit_val_batches", "0")


def holds(result: Any, refusal: str | None) -> None:
    if refusal is not None:
        assert result.rc == 2 and refusal in result.refusal, result.err
        return
    assert result.rc == 0, result.err
    metrics = json.loads(Path("runs/x/metrics.json").read_text())
    assert metrics["steps"] == 2 and any(name.startswith("harmony/") for name in metrics)
    assert all(value == value for value in metrics.values() if isinstance(value, float))


def cases(rules: tuple[str, ...]) -> list[Any]:
    return [
        pytest.param(base, rule, marks=[] if (base, rule) in QUICK else [pytest.mark.slow], id=f"{base}-{rule}")
        for base in WHERE
        for rule in rules
    ]


@pytest.mark.parametrize(("base", "rule"), cases(PARAMETERS))
def test_at_the_parameters(base: str, rule: str, cli: Any) -> None:
    holds(two_steps(cli, base, "Harmonize", f"rule: {{class_path: {rule}}}"), WHERE[base][0])


@pytest.mark.parametrize(("base", "rule"), cases(FEATURES))
def test_at_the_features(base: str, rule: str, cli: Any) -> None:
    holds(two_steps(cli, base, "HarmonizeFeatures", BOTH % rule), WHERE[base][1])


@pytest.mark.slow
@pytest.mark.parametrize("base", ALSO)
def test_of_other_recipes(base: str, cli: Any) -> None:
    begin(EXPERIMENTS / f"{base}.yaml", cli)
    holds(two_steps(cli, base, "Harmonize", "rule: {class_path: PCGrad}"), ALSO[base][0])
    holds(two_steps(cli, base, "HarmonizeFeatures", BOTH % "Realign"), ALSO[base][1])


def test_all_rules_are_tried() -> None:
    from descant.modules import mixing

    rules = {
        name for name, kind in vars(mixing).items() if isinstance(kind, type) and kind.__module__ == mixing.__name__
    }
    assert rules == {"Rule", "Solved", "Pareto", *PARAMETERS}  # Pareto is for towers: test_balance_everywhere
    assert {name for name in PARAMETERS if getattr(mixing, name).per_sample} == set(FEATURES)
