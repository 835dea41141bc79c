"""Claims: the rule on planted effects, what a claim's file may say, what is compared with what, and real runs."""

from __future__ import annotations

import json
import os
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from descant.claims import comparison, plots, registration, run, spec, store, summary, table
from descant.claims.claim import Claim
from descant.claims.effect import NO_ROOM, NOT_TESTABLE
from descant.claims.judge import FAILED, NOT, PASSED, decide, judge, require_flops
from descant.cli.catalogue import extended, find
from descant.cli.errors import Refusal
from descant.datamodules.corpora.emoji_pack import VENDORS
from descant.report.statistics import paired
from tests.conftest import Result
from tests.descant.test_predict import EMOJI
from tests.forked import fork_runs
from tests.tolerance import F64, ulps

CONTENT: dict[str, Any] = {
    "title": "a tower that learns is nearer than one that does not",
    "seed": 99,
    "source": "a planted effect",
    "experiment": "toy.yaml",
    "arms": {
        "baseline": {"options": {"model.optimizer.init_args.lr": 0.0}},
        "method": None,
        "sham": {"options": {"model.optimizer.init_args.lr": 1e-9}},
    },
    "metric": {"name": "test/gap", "better": "lower", "margin": 0.01},
    "seeds": {"pilot": [100], "full": [0, 1, 2]},
}


OWN_BOX = {"lockbox": {"data.sealed": True}}


@pytest.fixture
def results(workplace: Path) -> Path:
    return workplace / "results"


@pytest.fixture
def made(workplace: Path) -> Callable[..., Claim]:
    """``made(metric={...})``: a claim of the toy with some keys replaced; None takes a key away."""

    def make(**changes: Any) -> Claim:
        content = {key: value for key, value in (CONTENT | changes).items() if value is not None}
        (workplace / "toy-claim.yaml").write_text(yaml.safe_dump(content))
        return spec.load("toy-claim.yaml")

    return make


def runs_of(gains: list[float], shams: list[float], budget: float = 8) -> dict[str, dict[int, dict[str, float]]]:
    """Runs whose ``test/gap`` (lower is better) has these gains over a baseline of 1."""
    arms = {"baseline": [0.0] * len(gains), "method": gains, "sham": shams}
    return {
        arm: {seed: {"test/gap": 1 - gain, "steps": budget} for seed, gain in enumerate(of)} for arm, of in arms.items()
    }


# the rule -------------------------------------------------------------------------------------------------------


def _passes(effect: float, number: int, margin: float, arm_noise: bool = False) -> float:
    """Share of simulated claims of 5 seeds that pass; noise 1 is that of a paired difference (or of each arm)."""
    generator = random.Random(number)
    passed = 0
    for _ in range(number):
        spread = 2**-0.5 if not arm_noise else 1.0
        base, method, sham = ([generator.gauss(0, spread) for _ in range(5)] for _ in range(3))
        gain = paired([m + effect - b for m, b in zip(method, base, strict=True)], [0.0] * 5, 0.9)
        over = gain.mean - sum(s - b for s, b in zip(sham, base, strict=True)) / 5
        passed += not decide(gain, over, margin, margin / 2)
    return passed / number


def test_a_method_that_does_nothing_seldom_passes() -> None:
    """Without any margin, which is the easiest claim there is; with one it is rarer still."""
    assert _passes(0.0, 4000, margin=0.0) <= 0.05
    assert _passes(0.0, 2000, margin=0.5) <= 0.03


def test_an_effect_of_twice_the_noise_passes() -> None:
    assert _passes(2.0, 2000, margin=1.0) >= 0.9
    assert _passes(2.0, 2000, margin=1.0, arm_noise=True) >= 0.75


@pytest.mark.parametrize(
    ("gains", "shams", "says"),
    [
        ([0.5, 0.6, 0.7, 0.5, 0.6], [0.0, 0.1, -0.1, 0.0, 0.0], None),
        ([0.05, 0.06, 0.07, 0.05, 0.06], [0.0] * 5, "the gain of 0.058 is below the margin of 0.1"),
        ([0.5, -0.1, -0.2, 0.9, 0.6], [0.0] * 5, "better in 3 of 5 seeds only"),
        ([0.5, 0.6, 0.7, 0.5, 0.6], [0.5, 0.6, 0.7, 0.5, 0.6], "only 0 better than its sham (asked: 0.05)"),
        ([0.1, 0.0, 0.0, 0.1, 2.0], [0.0] * 5, "the interval of the gain reaches down to"),
    ],
)
def test_each_part_of_the_rule_can_fail_a_claim(
    made: Callable[..., Claim], gains: list[float], shams: list[float], says: str | None
) -> None:
    metric = CONTENT["metric"] | {"margin": 0.1}
    for status, verdict in (("gate", FAILED), ("report", NOT)):
        found = judge(made(metric=metric, status=status), runs_of(gains, shams))
        assert found.verdict == (PASSED if says is None else verdict)
        assert says is None or any(says in reason for reason in found.reasons), found.reasons
        assert found.method.mean == pytest.approx(sum(gains) / 5, rel=ulps(8, F64))


def test_further_conditions_count(made: Callable[..., Claim]) -> None:
    runs = runs_of([0.5, 0.6, 0.7], [0.0, 0.1, -0.1])
    for of in runs.values():
        for metrics in of.values():
            metrics["test/other"] = metrics["test/gap"] / 2
    condition = {"metric": "test/other", "arm": "method", "against": "baseline", "at_least": -0.2}
    assert judge(made(also=[condition]), runs).reasons == ("test/other of method less baseline >= -0.2: it is -0.3",)
    assert judge(made(also=[condition | {"at_least": -0.4}]), runs).verdict == PASSED
    assert judge(made(also=[{"metric": "test/other", "arm": "baseline", "at_most": 0.4}]), runs).verdict == NOT
    # a multiple of another metric of the same arm: 0.2 - 0.3 * 0.4, and 0.3 times the baseline's 1
    half = {"metric": "test/other", "arm": "method", "minus": "test/gap", "times": 0.3}
    assert judge(made(also=[half | {"at_least": 0.079, "at_most": 0.081}]), runs).verdict == PASSED
    other = half | {"against": "baseline", "at_least": 0}
    (reason,) = judge(made(also=[other]), runs).reasons
    assert reason == "test/other of method less 0.3 x test/gap of baseline >= 0: it is -0.1"
    # a share of a gap, (0.2 - 0.5) - 0.4 * (0.8 - 0.5)
    for metrics in runs["sham"].values():
        metrics["test/other"] = 0.8
    share = {"metric": "test/other", "arm": "method", "against": "sham", "times": 0.4, "above": "baseline"}
    (reason,) = judge(made(also=[share | {"at_least": 0}]), runs).reasons
    assert reason == "test/other of method less 0.4 x sham, both above baseline >= 0: it is -0.42"


def test_what_comes_before_is_read_and_needs_no_equal_budget(made: Callable[..., Claim]) -> None:
    runs = runs_of([0.5, 0.6, 0.7], [0.0, 0.1, -0.1])
    runs["before"] = {seed: {"old/gap": 0.25, "steps": 99.0} for seed in range(3)}
    for metrics in runs["method"].values():
        metrics["old/gap"] = 0.25
    same = {"metric": "old/gap", "arm": "method", "against": "before", "at_least": 0, "at_most": 0}
    claim = made(before={"experiment": "toy.yaml"}, also=[same])
    assert claim.needed("before") == ["old/gap"] and claim.needed("sham") == ["test/gap"]
    assert judge(claim, runs).verdict == PASSED
    runs["method"][1]["old/gap"] += 1e-9
    assert judge(claim, runs).verdict == NOT


def test_an_arm_beside_the_three_is_asked_for_what_a_condition_reads_of_it(made: Callable[..., Claim]) -> None:
    of_its_own = {"metric": "test/other", "arm": "method", "against": "alone", "at_most": 0}
    arms = CONTENT["arms"] | {"alone": {"options": {"model.optimizer.init_args.lr": 1e-3}}}
    claim = made(arms=arms, also=[of_its_own])
    assert claim.needed("alone") == ["test/other"] and claim.needed("method") == ["test/gap", "test/other"]
    assert made(arms=arms).needed("alone") == ["test/gap"]
    runs = runs_of([0.5, 0.6, 0.7], [0.0, 0.1, -0.1])
    runs["alone"] = {seed: {"test/other": 2.0, "steps": 8} for seed in range(3)}
    for metrics in runs["method"].values():
        metrics["test/other"] = 1.0
    assert judge(claim, runs).verdict == PASSED
    figure = plots.svg(claim, runs)
    assert ">method<" in figure and "alone" not in figure  # it has no point of this metric
    for metrics in runs["alone"].values():
        metrics["test/gap"] = 7.0
    assert "alone" in plots.svg(claim, runs)
    shown = made(arms=arms, also=[of_its_own], alone=["alone"])
    assert "alone" not in plots.svg(shown, runs), "what it calls so is something else"
    assert shown.digest == claim.digest, "how it is shown changes no run"
    with pytest.raises(Refusal, match="alone: no arm 'alon' beside baseline, method, sham; nearest: alone"):
        made(arms=arms, alone=["alon"])


def test_arms_of_other_budgets_are_not_compared(made: Callable[..., Claim]) -> None:
    runs = runs_of([0.5, 0.6, 0.7], [0.0, 0.1, -0.1])
    runs["sham"][1]["steps"] = 9
    with pytest.raises(
        Refusal, match="sham, seed 1: 9 steps, and baseline had 8: arms are compared at an equal budget"
    ):
        judge(made(), runs)


def test_arms_that_go_on_from_one_of_the_three_are_compared_with_each_other(made: Callable[..., Claim]) -> None:
    def on(arm: str) -> dict[str, Any]:
        return {"options": {"model.adapt": [{"class_path": "Begin", "init_args": {"path": f"ARM/{arm}"}}]}}

    runs = runs_of([0.5, 0.6, 0.7], [0.0, 0.1, -0.1])
    claim = made(arms=CONTENT["arms"] | {"more": on("method"), "most": on("baseline")})
    for arm in ("more", "most"):
        runs[arm] = {seed: {"test/gap": 1.0, "steps": 3} for seed in range(3)}
    judge(claim, runs)
    runs["most"][2]["steps"] = 4
    with pytest.raises(Refusal, match="most, seed 2: 4 steps, and more had 3: arms are compared at an equal budget"):
        judge(claim, runs)


def test_arms_that_are_equal_in_flops_spend_those_of_the_reference(
    made: Callable[..., Claim], results: Path, workplace: Path
) -> None:
    arms = CONTENT["arms"] | {"more": {"options": {"model.path": "ARM/method"}}}
    claim = made(arms=arms, budget={"equal": "flops"}, options={"trainer.max_steps": 8})
    place = run.Place(claim, "full", workplace / "runs")
    like = f"--of-file=trainer.callbacks+={{class_path: Budget, init_args: {{like: {place.folder}/method-1}}}}"
    assert {arm: like in run.command(place, arm, 1) for arm in claim.arms} == {
        "baseline": True,
        "method": False,
        "sham": False,  # the sham runs the method's code, step by step
        "more": False,  # it goes on where the method ended
    }
    assert claim.steps("baseline", "full") is None and claim.steps("sham", "full") == 8
    assert place.missing(["baseline"], [0]) == [("method", 0), ("baseline", 0)], "with the arm whose FLOPs it spends"
    assert place.waits("baseline", 0, [("method", 0)]) and not place.waits("sham", 0, [("method", 0)])

    runs = runs_of([0.5, 0.6, 0.7], [0.0, 0.1, -0.1])
    for arm, flops in {"baseline": 1.009e12, "method": 1e12, "sham": 0.991e12}.items():
        for seed in range(3):
            runs[arm][seed] |= {"train_flops": flops * (1 + seed), "steps": 12 if arm == "baseline" else 8}
    judge(claim, runs)
    results.mkdir()
    store.write(results, claim, "full", runs, 61.0)
    table.write([claim], results, workplace / "CLAIMS.md")
    spent = "baseline 2.02e+12 in 12 steps, method 2e+12 in 8 steps, sham 1.98e+12 in 8 steps"
    assert f"FLOPs of training within 1% ({spent}) in every arm" in (workplace / "CLAIMS.md").read_text()
    runs["baseline"][2]["train_flops"] *= 1.01
    with pytest.raises(Refusal, match=r"baseline, seed 2: 3\.057e\+12 FLOPs of training, \+1\.9% from method"):
        judge(claim, runs)
    del runs["sham"][0]["train_flops"]
    with pytest.raises(Refusal, match="sham, seed 0: no train_flops in it or in method"):
        require_flops(claim, {arm: runs[arm] for arm in ("method", "sham")})


def test_arms_apart_have_another_budget_and_stages_their_own(made: Callable[..., Claim], workplace: Path) -> None:
    arms = CONTENT["arms"] | {"more": {"options": {"trainer.max_steps": 99}}}
    budget = {"equal": "flops", "apart": ["more"]}
    claim = made(arms=arms, budget=budget, options={"trainer.max_steps": 8})
    assert {arm: claim.limited(arm) for arm in claim.arms} == {
        "baseline": True,
        "method": False,
        "sham": False,
        "more": False,
    }
    runs = runs_of([0.5, 0.6, 0.7], [0.0, 0.1, -0.1]) | {"more": {}}
    for seed in range(3):
        runs["more"][seed] = {"test/gap": 0.1, "steps": 99}
        for arm in runs:
            runs[arm][seed]["train_flops"] = 7e12 if arm == "more" else 1e12
    judge(claim, runs)
    with pytest.raises(Refusal, match=r"more, seed 0: 7e\+12 FLOPs of training, \+600\.0% from method"):
        judge(made(arms=arms, budget={"equal": "flops"}), runs)
    staged = made(arms=arms, budget={"equal": "flops"}, experiment="staged/emoji-grow")
    place = run.Place(staged, "full", workplace / "runs")
    assert not any("Budget" in word for arm in staged.arms for word in run.command(place, arm, 1))
    with pytest.raises(Refusal, match=r"budget\.apart: no arm 'mor' beside baseline, method, sham; nearest: more"):
        made(arms=arms, budget=budget | {"apart": ["mor"]})


def test_arms_that_are_equal_in_time_have_had_no_less_of_it(
    made: Callable[..., Claim], results: Path, workplace: Path
) -> None:
    runs = runs_of([0.5, 0.6, 0.7], [0.0, 0.1, -0.1])
    for arm, seconds in {"baseline": 140.0, "method": 100.0, "sham": 60.0}.items():
        for metrics in runs[arm].values():
            metrics["train_seconds"] = seconds
    claim = made(budget={"equal": "seconds"})
    judge(claim, runs)
    results.mkdir()
    store.write(results, claim, "full", runs, 61.0)
    table.write([claim], results, workplace / "CLAIMS.md")
    assert (
        "100 seconds of training, or nearly as many, or more, in every arm but the sham"
        in (workplace / "CLAIMS.md").read_text()
    )
    runs["baseline"][2]["train_seconds"] = 79.0
    with pytest.raises(Refusal, match="baseline, seed 2: 79 seconds of training, and at least 80 are as much time"):
        judge(claim, runs)
    runs["baseline"][2]["train_seconds"] = 99.0
    runs["sham"][1]["steps"] = 7
    with pytest.raises(Refusal, match=r"sham, seed 1: 7 steps, and the method had 8: as many count"):
        judge(claim, runs)


def test_scored_code_must_run_as_often_in_the_sham(made: Callable[..., Claim]) -> None:
    runs = runs_of([0.5, 0.6, 0.7], [0.0, 0.1, -0.1])
    for arm, calls in (("method", 8.0), ("sham", 8.0)):
        for metrics in runs[arm].values():
            metrics["sham/calls"] = calls
    claim = made(calls="sham/calls")
    assert judge(claim, runs).verdict == PASSED
    runs["sham"][2]["sham/calls"] = 0.0
    with pytest.raises(Refusal, match=r"seed 2: sham/calls is 8.0 in the method and 0.0 in the sham"):
        judge(claim, runs)


# the file -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"arms": {"baseline": {}, "method": {}}}, "arms: no 'sham'; every claim has baseline, method, sham"),
        ({"sead": 3}, "sead: no such key; nearest: seed"),
        ({"metric": None}, "metric is missing"),
        ({"metric": {"name": "x/y", "better": "more", "margin": 1}}, "metric.better more: higher or lower"),
        ({"metric": {"name": "x/y", "better": "lower", "margin": -1}}, "metric.margin -1: not below 0"),
        ({"metric": {"name": "val/y", "better": "lower", "margin": 1}}, "val/y: a claim is judged by the test"),
        ({"seeds": {"pilot": [1], "full": [0, 1, 2]}}, "seeds: 1 is in pilot and in full"),
        ({"seeds": {"pilot": [9], "full": [0, 1]}}, "seeds: at least 3 in full"),
        ({"experiment": "contrastive/emojy"}, "contrastive/emojy: no such file.*nearest: contrastive/emoji"),
        ({"also": [{"metric": "a", "arm": "metod", "at_least": 0}]}, r"also\[0\]: no arm 'metod'; nearest: method"),
        ({"also": [{"metric": "a", "arm": "method"}]}, "at_least or at_most"),
        ({"also": [{"metric": "a", "arm": "method", "against": "method", "at_least": 0}]}, "a of method less itself"),
        ({"also": [{"metric": "a", "arm": "method", "times": 2, "at_least": 0}]}, r"also\[0\]: times needs `minus`"),
        (
            {"also": [{"metric": "a", "arm": "method", "above": "method", "at_least": 0}]},
            r"also\[0\]: above: method above itself",
        ),
        ({"also": [{"metric": "a", "arm": "method", "above": "sam", "at_least": 0}]}, "no arm 'sam'; nearest: sham"),
        ({"also": [{"metric": "a", "arm": "before", "at_least": 0}]}, r"also\[0\]: no arm 'before'"),
        ({"also": [{"metric": "a", "arm": "sham", "minus": "val/b", "at_least": 0}]}, "val/b: a claim is judged by"),
        ({"before": {"configs": []}}, "before: experiment is missing"),
        ({"before": {"experiment": "toy.yml"}}, "toy.yml: no such file"),
        ({"before": {"experiment": "toy.yaml", "seed": "one"}}, "before.seed 'one': a whole number is expected"),
        ({"before": {"experiment": "toy.yaml", "predict": "train"}}, "before: predict: an object is expected"),
        ({"before": {"experiment": "toy.yaml", "lockbox": {}}}, "before.lockbox: the claim has no lockbox"),
        ({"budget": {"equal": "hours"}}, "budget.equal hours; known: flops, samples, seconds, steps"),
        ({"budget": {"reference": "sham"}}, "budget.reference: of arms that are equal in flops, not in steps"),
        ({"budget": {"equal": "flops", "reference": "sam"}}, "budget.reference: no arm 'sam'; nearest: sham"),
        ({"oracle": "sham"}, "oracle: no arm 'sham' beside baseline, method, sham"),
        ({"status": "maybe"}, r"status maybe: gate \(must pass\) or report"),
        ({"arms": CONTENT["arms"] | {"sham": {"config": [1]}}}, "arms.sham: config: a configuration is expected"),
    ],
)
def test_what_is_wrong_in_a_claim_is_named(made: Callable[..., Claim], changes: dict[str, Any], says: str) -> None:
    with pytest.raises(Refusal, match=f"toy-claim.yaml: .*{says}"):
        made(**changes)


def test_its_digest_is_of_all_that_it_is_made_of(made: Callable[..., Claim], workplace: Path) -> None:
    first = made().digest
    assert made(note="seconds are of a busy machine").digest == first
    assert made().digest == first and made(seed=98).digest != first
    toy = (workplace / "toy.yaml").read_text()
    (workplace / "toy.yaml").write_text(f"# what a header says is no part of a run\n{toy}\n")
    assert made().digest == first
    (workplace / "toy.yaml").write_text(f"{toy}\nname: other\n")
    assert made().digest != first


def test_a_digest_is_of_what_a_run_composes_to_and_not_of_files_or_names(
    made: Callable[..., Claim], workplace: Path
) -> None:
    over: dict[str, Any] = {"model": {"scale": 2.0}, "trainer": {"callbacks+": [{"class_path": "CMGH"}]}}
    (workplace / "over.yaml").write_text(yaml.safe_dump(over))
    (workplace / "both.yaml").write_text("extends: [toy.yaml, over.yaml]\n")
    by_name = made(arms=CONTENT["arms"] | {"method": {"configs": ["over.yaml"]}})
    inside = made(arms=CONTENT["arms"] | {"method": {"config": over}})
    assert made(arms=CONTENT["arms"] | {"method": {"config": {"extends": "over.yaml"}}}).digest == inside.digest
    assert made(arms=CONTENT["arms"] | {"method": {"configs": ["both.yaml"]}}).digest == inside.digest
    over["trainer"]["callbacks+"][0]["class_path"] = "Realign"  # the old name of CMGH
    renamed = made(arms=CONTENT["arms"] | {"method": {"config": over}})
    assert by_name.digest == inside.digest == renamed.digest != made().digest
    assert made(title="in other words", source="elsewhere").digest == made().digest
    over["model"]["scale"] = 3.0
    assert made(arms=CONTENT["arms"] | {"method": {"config": over}}).digest != inside.digest


def test_the_config_inside_an_arm_is_a_configuration_with_a_name(made: Callable[..., Claim], workplace: Path) -> None:
    own = {"extends": "toy.yaml", "model": {"scale": 2.0}}
    claim = made(arms=CONTENT["arms"] | {"method": {"config": own}})
    assert claim.command("method", 0, "full")[:4] == ["--config", "toy.yaml", "--config", "toy-claim.yaml:method"]
    file = find("toy-claim.yaml:method")
    assert yaml.safe_load(file.read_text()) == own and find("toy-claim.yaml:method") == file
    assert extended(file) == [(workplace / "toy.yaml").resolve()]
    with pytest.raises(Refusal, match="has no arm 'metod' with a `config`; nearest: method"):
        find("toy-claim.yaml:metod")


def test_auto_has_the_digest_of_what_it_replaced_and_results_say_what_it_was(
    made: Callable[..., Claim], workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    toy, digests = (workplace / "toy.yaml").read_text(), []
    for precision in ("bf16-mixed", "auto", "32-true"):
        (workplace / "toy.yaml").write_text(f"{toy}  precision: {precision}\n")
        digests.append(made().digest)
    assert digests[0] == digests[1] != digests[2]
    place = run.Place(made(), "full", workplace / "runs")
    for number, precision in enumerate(("32-true", "32-true", "auto", "bf16-mixed"), start=1):
        folder = place.folder / f"method-{number}" / "001"
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(f"trainer: {{precision: {precision}}}\n")
    (place.folder / "method-1" / "latest").symlink_to("001")
    assert place.precisions() == ["32-true", "bf16-mixed"]
    assert "its runs were trained in 32-true and bf16-mixed" in capsys.readouterr().err
    store.write(workplace, place.claim, "full", runs_of([0.5] * 3, [0.0] * 3), 1.0, ["32-true"])
    stored = store.read(workplace, place.claim.name, "full")
    assert stored is not None and stored["precision"] == ["32-true"]


def test_options_reach_the_command_in_their_order(made: Callable[..., Claim]) -> None:
    claim = made(options={"trainer.max_steps": 5}, budget={"pilot": {"trainer.max_steps": 2, "model.scale": 2.0}})
    lr = "--of-file=model.optimizer.init_args.lr=0.0"
    assert claim.command("baseline", 7, "pilot") == [
        *(
            "--config",
            "toy.yaml",
            "--of-file=trainer.max_steps=2",
            "--of-file=model.scale=2.0",
            lr,
            "--seed_everything=7",
        )
    ]


def test_arms_begin_from_the_run_of_their_seed(made: Callable[..., Claim], workplace: Path) -> None:
    saved = {"class_path": "SavedTower", "init_args": {"path": "BEFORE", "note": "BEFOREHAND"}}
    arms = CONTENT["arms"] | {"method": {"options": {"model.image": saved, "data.folder": "BEFORE/checkpoints"}}}
    claim = made(before={"experiment": "toy.yaml", "options": {"model.scale": 3.0}}, arms=arms)
    place = run.Place(claim, "full", workplace / "runs")
    assert place.missing(["method"], [0, 1]) == [("before", 0), ("method", 0), ("before", 1), ("method", 1)]
    words = run.command(place, "method", 1)
    assert f"--of-file=data.folder={place.folder}/before-1/checkpoints" in words
    assert f"{{note: BEFOREHAND, path: {place.folder}/before-1}}" in next(
        w for w in words if w.startswith("--of-file=model.image")
    )
    assert run.command(place, "before", 1)[1:4] == ["--config", "toy.yaml", "--of-file=model.scale=3.0"]
    # of an array on a cluster, the run with its seed
    folder = place.folder / "before/001"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("seed_everything: 1\n")
    assert (place.of("before", 0), place.of("before", 1)) == (place.folder / "before-0", folder)
    assert place.finished("before", 1) is None
    (folder / "metrics.json").write_text('{"val/gap": 1, "sham/calls": 2, "steps": 8}')
    assert place.finished("before", 1) is None  # not tested yet
    (folder / "metrics.json").write_text('{"test/gap": 1, "steps": 8}')
    assert place.missing(["method"], [1]) == [("method", 1)]


def test_one_run_before_serves_all_seeds(made: Callable[..., Claim], workplace: Path) -> None:
    saved = {"class_path": "SavedTower", "init_args": {"path": "BEFORE"}}
    arms = CONTENT["arms"] | {"method": {"options": {"model.image": saved}}}
    claim = made(before={"experiment": "toy.yaml", "seed": 7}, arms=arms)
    assert claim.digest != made(before={"experiment": "toy.yaml"}, arms=arms).digest
    place = run.Place(claim, "full", workplace / "runs")
    runs = [("before", 7), ("method", 0), ("method", 1)]
    assert place.missing(["method"], [0, 1]) == place.every(["method"], [0, 1]) == runs
    assert place.waits("method", 1, [("before", 7)]) and not place.waits("method", 1, [("method", 0)])
    assert f"{place.folder}/before-7" in next(
        w for w in run.command(place, "method", 1) if w.startswith("--of-file=model.image")
    )
    folder = place.folder / "before-7/001"
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text('{"test/gap": 1, "steps": 8}')
    assert place.missing(["method"], [0, 1]) == runs[1:] and place.finished("before", 1) == {"test/gap": 1, "steps": 8}


def test_predictions_follow_the_run_before(made: Callable[..., Claim], workplace: Path) -> None:
    arms = CONTENT["arms"] | {"method": {"options": {"data.table": "BEFORE"}}}
    plain, wanted = ({"experiment": "toy.yaml"} | more for more in ({}, {"predict": {"data.wrong": 0.4}}))
    claim = made(before=wanted, arms=arms)
    assert claim.digest != made(before=plain, arms=arms).digest
    place = run.Place(claim, "full", workplace / "runs", ("tests.toys",))
    predict = ["--sets=train", "--of-file=data.wrong=0.4", "--trust=tests.toys", f"--runs={place.folder}"]
    assert run.predicting(place, "before", 1) == ["predict", "--run=before-1/latest", *predict]
    assert run.predicting(place, "method", 1) == []
    folder = place.folder / "before-1/001"
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text('{"test/gap": 1, "steps": 8}')
    assert place.missing(["method"], [1]) == [("before", 1), ("method", 1)], "it has no predictions"
    assert run.predicting(place, "before", 1)[:2] == ["predict", "--run=before-1/001"]
    (folder / "predict-001").mkdir()
    assert place.finished("before", 1) is None, "killed while it wrote them"
    (folder / "predict-001/embeddings-train.parquet").touch()
    assert place.missing(["method"], [1]) == [("method", 1)]
    with pytest.raises(Refusal, match=r"before\.predict is a process of this command; run it without --slurm"):
        run.submit(place, ["method"], [0], "")


def test_the_run_before_has_the_lock_box_of_its_own_data(made: Callable[..., Claim]) -> None:
    box = {"lockbox": {"data.stages.a.sealed": True}}
    same, own = (made(**STAGES | box, before={"experiment": "toy.yaml"} | more) for more in ({}, OWN_BOX))
    assert same.options("before", "full") == box["lockbox"] and own.options("before", "full") == {"data.sealed": True}
    assert own.options("before", "pilot") == {} and "data.sealed" not in own.options("method", "full")


def test_arms_begin_from_the_runs_of_others(made: Callable[..., Claim], workplace: Path) -> None:
    arms = CONTENT["arms"] | {"method": {"options": {"model.paths": {"a": "ARM/alone/checkpoints/x", "b": "ARM/sham"}}}}
    claim = made(arms={**arms, "alone": {"options": {"model.scale": 2.0}}})
    place = run.Place(claim, "full", workplace / "runs")
    wanted = [("alone", 0), ("sham", 0), ("baseline", 0), ("method", 0)]
    assert place.missing(list(claim.arms), [0]) == wanted
    assert place.missing(["method"], [0]) == [("alone", 0), ("sham", 0), ("method", 0)], "with what it needs"
    assert [one for one in wanted if place.waits(*one, wanted)] == [("method", 0)]
    assert not place.waits("method", 0, [("sham", 1), ("baseline", 0)]), "of its own seed, and no more than it needs"
    paths = f"{{a: {place.folder}/alone-0/checkpoints/x, b: {place.folder}/sham-0}}"
    assert f"--of-file=model.paths={paths}" in run.command(place, "method", 0)


TUNED: dict[str, Any] = {
    "arms": {
        "baseline": {"options": {"model.optimizer.init_args.lr": "SETTING"}, "settings": [0.0, 1e-9]},
        "method": {"options": {"model.optimizer.init_args.lr": "SETTING"}, "settings": [1e-9, 0.1, 1e-8]},
        "sham": {"options": {"model.optimizer.init_args.lr": 1e-9, "model.note": "ARM/alone"}},
        "alone": {},
    },
    "tuning": {"seed": 200, "metric": "val/gap", "options": {"model.scale": 1.0}},
}


def test_settings_are_chosen_by_runs_of_their_own(made: Callable[..., Claim], results: Path) -> None:
    claim = made(**TUNED)
    candidates = claim.candidates()
    assert list(candidates.arms) == ["baseline.0", "baseline.1", "method.0", "method.1", "method.2"]
    words = candidates.command("method.1", 200, spec.TUNE)
    assert {"--of-file=model.optimizer.init_args.lr=0.1", "--of-file=model.scale=1.0", "--seed_everything=200"} <= set(
        words
    )
    assert "--test=false" in run.command(run.Place(candidates, spec.TUNE, results), "method.1", 200)
    gaps = {"baseline.0": 0.5, "baseline.1": 0.5, "method.0": 0.4, "method.1": 0.1, "method.2": 0.3}
    runs = {name: {200: {"val/gap": gap}} for name, gap in gaps.items()}
    chosen = claim.chosen(runs)
    assert chosen == {"baseline": 0, "method": 1}, "less is better here, and of equals the first"
    settled = claim.settled(chosen)
    assert "--of-file=model.optimizer.init_args.lr=0.1" in settled.command("method", 0, "full")
    assert not settled.is_tuned and settled.digest == claim.digest and settled.arms["sham"] == claim.arms["sham"]


def test_a_validation_is_not_the_end_where_settings_are_chosen(made: Callable[..., Claim], workplace: Path) -> None:
    begun = {"options": {**TUNED["arms"]["method"]["options"], "model.note": "ARM/alone"}, "settings": [0.1, 1.0]}
    arms = TUNED["arms"] | {"method": begun}
    candidates = made(**(TUNED | {"arms": arms, "options": {"trainer.max_steps": 5}})).candidates()
    assert candidates.needed("alone") == [] and candidates.needed("method.0") == ["val/gap"]
    place = run.Place(candidates, spec.TUNE, workplace / "runs")
    for arm, metrics in (("alone", {"val/loss": 1.0}), ("method.0", {"val/gap": 1.0})):
        folder = place.folder / f"{arm}-200" / "001"
        folder.mkdir(parents=True)
        steps = candidates.steps(arm, spec.TUNE)
        assert steps is not None
        for reached, ended in ((steps - 1, False), (steps, True)):
            (folder / "metrics.json").write_text(json.dumps(metrics | {"steps": reached}))
            assert (place.finished(arm, 200) is not None) == ended


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"tuning": None}, "arms.baseline: settings need `tuning`"),
        ({"tuning": {"seed": 0}}, "tuning.seed 0: in pilot or full too"),
        ({"tuning": {"seed": 9, "better": "more"}}, "tuning.better more: higher or lower"),
        ({"arms": CONTENT["arms"]}, "tuning: no arm has settings"),
        (
            {"arms": TUNED["arms"] | {"alone": {"settings": [1]}}},
            "arms.alone: settings: none of its options is SETTING",
        ),
        ({"arms": TUNED["arms"] | {"alone": {"options": {"a": "SETTING"}}}}, "SETTING in its options, and no values"),
        ({"arms": TUNED["arms"] | {"alone": {"settings": 3}}}, "settings: a list of values is expected"),
        ({"arms": TUNED["arms"] | {"alone": {"options": {"a": "ARM/alonne"}}}}, "no arm 'alonne'.*nearest: alone"),
        ({"arms": TUNED["arms"] | {"alone": {"options": {"a": "ARM/sham"}}}}, "ARM/sham: an arm that needs no other"),
        ({"arms": TUNED["arms"] | {"alone": {"options": {"a": "ARM/method"}}}}, "ARM/method: an arm that needs no"),
    ],
)
def test_what_is_wrong_with_settings_is_named(made: Callable[..., Claim], changes: dict[str, Any], says: str) -> None:
    with pytest.raises(Refusal, match=f"toy-claim.yaml: .*{says}"):
        made(**(TUNED | changes))


# what is stored -------------------------------------------------------------------------------------------------


def test_a_result_of_another_configuration_is_never_overwritten(made: Callable[..., Claim], results: Path) -> None:
    claim = made()
    store.require_free(results, claim, "full")
    store.write(results, claim, "full", runs_of([0.5, 0.6, 0.7], [0.0, 0.1, -0.1]), 61.0)
    store.require_free(results, claim, "full")
    before = store.path(results, claim.name, "full").read_text()
    with pytest.raises(Refusal, match=r"move the file away to run the claim again"):
        store.require_free(results, made(seed=98), "full")
    assert store.path(results, claim.name, "full").read_text() == before
    store.path(results, claim.name, "full").write_text("{")
    with pytest.raises(Refusal, match="no result of a claim"):
        store.require_free(results, claim, "full")


def test_the_page_and_the_list_say_what_is_stored(made: Callable[..., Claim], results: Path, workplace: Path) -> None:
    claim = made()
    assert summary(claim, results)["verdict"] is None
    assert table.write([claim], results, workplace / "CLAIMS.md") == ["toy-claim"]
    results.mkdir()
    store.write(results, claim, "full", runs_of([0.5, 0.6, 0.7], [0.0, 0.1, -0.04]), 61.0)
    found = summary(claim, results)
    assert (found["verdict"], found["seed"], found["seconds"]) == (PASSED, 99, 61.0)
    assert found["difference"] == pytest.approx(0.6, abs=ulps(8, F64)) and found["sham_difference"] == pytest.approx(
        0.02, abs=ulps(8, F64)
    )
    assert table.write([claim], results, workplace / "CLAIMS.md") == []
    page = (workplace / "CLAIMS.md").read_text()
    cells = "| a planted effect |  | **placebo invalid** +0.600 [+0.352, +0.848] | 0.01 | ? | +0.020 | 1 of 1 | 1 min |"
    assert cells.replace("| a", "| others | [toy-claim](#toy-claim), a", 1) in page
    assert "All conditions: **passed**; over the placebo +0.580 [+0.236, +0.924]." in page
    overview = (workplace / "docs/claims/overview.svg").read_text()
    assert "<title>toy-claim, over baseline: +0.600 [+0.352, +0.848]</title>" in overview
    assert "<title>toy-claim, over placebo: +0.580 [+0.236, +0.924], placebo not neutral</title>" in overview
    assert "| test/gap | 1.000 ± 0.000 | 0.400 ± 0.100 | 0.980 ± 0.072 |" in page
    figure = (workplace / "docs/claims/toy-claim.svg").read_text()
    assert figure.count("<title>") == 9 and "<title>sham, seed 2: 1.04</title>" in figure
    # of another configuration, by a claim that was changed or by an older version: it is shown, and judges nothing
    claim = made(metric=CONTENT["metric"] | {"margin": 0.2})
    assert summary(claim, results)["effect"] is None
    assert table.write([claim], results, workplace / "CLAIMS.md") == ["toy-claim"]
    page = (workplace / "CLAIMS.md").read_text()
    assert "superseded by a new design" in page and "**placebo invalid** +0.600 [+0.352, +0.848]" in page


def test_the_page_says_first_what_a_claim_lacks(made: Callable[..., Claim], results: Path, workplace: Path) -> None:
    claim = made()
    results.mkdir()
    store.write(results, claim, "full", runs_of([0.5, 0.6, 0.7], [0.5, 0.7, 0.8]), 61.0)
    reasons = judge(claim, runs_of([0.5, 0.6, 0.7], [0.5, 0.7, 0.8])).reasons
    assert reasons[0].startswith("only ") and len(reasons) == 1
    table.write([claim], results, workplace / "CLAIMS.md")
    page = (workplace / "CLAIMS.md").read_text()
    assert "**placebo does as well**" in page and f"- Not met: {reasons[0]}." in page


def test_an_oracle_shows_what_is_possible_and_a_setting_has_no_word(
    made: Callable[..., Claim], results: Path, workplace: Path
) -> None:
    arms = CONTENT["arms"] | {"best": None}
    runs = runs_of([0.5, 0.6, 0.7], [0.0, 0.004, -0.004])
    runs["best"] = {seed: {"test/gap": 0.2, "steps": 8} for seed in range(3)}
    claim = made(arms=arms, oracle="best")
    effect = judge(claim, runs).effect
    assert (effect.word, effect.placebo_valid) == ("helps", True)
    assert effect.share_of_headroom == pytest.approx(0.75, abs=ulps(8, F64))
    assert made(arms=arms, oracle="best").digest != made(arms=arms).digest == made(arms=arms, setting=True).digest
    results.mkdir()
    store.write(results, claim, "full", runs, 61.0)
    table.write([claim], results, workplace / "CLAIMS.md")
    assert "| **helps** +0.600 [+0.352, +0.848] | 0.01 | 75% |" in (workplace / "CLAIMS.md").read_text()
    assert store.read(results, claim.name, "full")["effect"] == "helps"  # type: ignore[index]
    table.write([made(arms=arms, oracle="best", setting=True)], results, workplace / "CLAIMS.md")
    page = (workplace / "CLAIMS.md").read_text()
    assert "helps**" not in page.split("overview.svg)")[1] and "| what a setting leaves to gain |" in page


def test_what_ships_is_judged_by_what_is_stored_and_shown_as_it_is(workplace: Path) -> None:
    """A claim has a full result of the very configuration that ships, or none at all, and the page is made of these."""
    claims = [spec.load(name) for name in spec.names()]
    folder, ended = spec.folder() / "results", set[str]()
    assert {claim.seed for claim in claims} >= {11, 43, 45, 48, 49}
    for claim in claims:
        if not any(store.path(folder, claim.name, budget).exists() for budget in spec.BUDGETS):
            ended.add(claim.name)  # a design that ships before its runs
            continue
        for budget in spec.BUDGETS:
            stored = store.read(folder, claim.name, budget)
            assert stored is not None and stored["digest"] == claim.digest, f"{claim.name}, {budget}"
            arms = (claim.judged if budget == "full" else ("baseline", claim.oracle)) if claim.staged else claim.arms
            assert stored.get("stage", 3) < 3 or set(arms) <= set(stored["runs"])
        full = store.read(folder, claim.name, "full")
        assert full is not None
        judgement = store.judged(claim, full)
        if judgement is None:  # it ended before its effect was measured
            ended.add(claim.name)
            assert full["effect"] in (NO_ROOM, NOT_TESTABLE) and full["stage"] in (1, 2)
            continue
        assert full["effect"] == judgement.effect.word
        seeds = sorted((*claim.seeds["full"], *claim.seeds.get("extension", ())))
        measured = sorted(full["runs"]["method"])
        assert measured == seeds[: len(measured)] and len(measured) in ((3, 5, 10) if claim.staged else (len(seeds),))
    table.write(claims, folder, workplace / "CLAIMS.md", [comparison.load(name) for name in comparison.names()])
    root = Path(__file__).parents[2]
    assert (workplace / "CLAIMS.md").read_text() == (root / "CLAIMS.md").read_text(), "descant claims table"
    # the layout of a figure depends on the version of matplotlib, its points do not
    for claim in (claim for claim in claims if claim.name not in ended):
        figures = [(folder / f"docs/claims/{claim.name}.svg").read_text() for folder in (workplace, root)]
        points, stored_points = (re.findall("<title>(.*)</title>", figure) for figure in figures)
        assert points == stored_points and len(points) >= 6, f"{claim.name}: descant claims table"


def test_runs_of_an_array_are_found_by_their_seed(made: Callable[..., Claim], workplace: Path) -> None:
    place = run.Place(made(), "full", workplace / "runs")
    for number, seed in enumerate((2, 0), 1):
        folder = place.folder / f"method/{number:03d}"
        folder.mkdir(parents=True)
        (folder / "metrics.json").write_text(json.dumps({"test/gap": seed / 10, "steps": 8}))
        (folder / "config.yaml").write_text(f"seed_everything: {seed}\n")
    assert place.missing(["method"], [0, 1, 2]) == [("method", 1)]
    assert place.collect(["method"], [0, 2]) == {
        "method": {0: {"test/gap": 0.0, "steps": 8.0}, 2: {"test/gap": 0.2, "steps": 8.0}}
    }
    with pytest.raises(Refusal, match="method, seed 1: it has no metric test/gap"):
        place.collect(["method"], [1])


# the command ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["ron"], "claims ron: list, plan, tune, run, table or verify; nearest: run"),
        (["tune", "toy-claim.yaml"], "no arm has settings to choose from"),
        (["run", "nothing-such"], "claims nothing-such: no such claim"),
        (
            ["run", "toy-claim.yaml", "--arms", "shame"],
            "--arms shame: the claim has baseline, method, sham; nearest: sham",
        ),
        (["run", "toy-claim.yaml", "--seeds", "7"], "--seeds 7: the claim has 0, 1, 2"),
        (["run", "toy-claim.yaml", "--jobs", "0"], "--jobs 0: at least 1"),
        (["run", "toy-claim.yaml"], "there is no pilot, and the claim is now"),
        (["run"], "claims run: the following arguments are required: name"),
    ],
)
def test_wrong_requests(
    cli: Callable[..., Result], made: Callable[..., Claim], workplace: Path, args: list[str], says: str
) -> None:
    made()
    assert says in cli("claims", *args, "--results", workplace / "results").refusal
    assert not (workplace / "runs").exists()


def test_an_array_an_arm_is_submitted_after_what_comes_before(
    cli: Callable[..., Result], made: Callable[..., Claim], workplace: Path
) -> None:
    arms = CONTENT["arms"] | {"method": {"options": {"data.folder": "BEFORE"}}}
    seeds = {"pilot": [100, 101], "full": [0, 1, 2]}

    def submitted(**changes: Any) -> list[str]:
        made(seeds=seeds, **changes)
        asked = ("--budget", "pilot", "--slurm", "--time 9 --dry-run", "--trust", "tests.toys")
        result = cli("claims", "run", "toy-claim.yaml", *asked, "--results", workplace / "results")
        assert result.rc == 0, result.err
        return [line for line in result.out.splitlines() if line.startswith("#SBATCH --array")]

    assert submitted() == ["#SBATCH --array=0-1"] * 3  # an arm each, a task a seed
    assert submitted(arms=arms, before={"experiment": "toy.yaml"}) == ["#SBATCH --array=0-1"]
    place = run.Place(spec.load("toy-claim.yaml"), "pilot", workplace / "runs")
    for number, seed in enumerate((100, 101), 1):
        folder = place.folder / f"before/{number:03d}"
        folder.mkdir(parents=True)
        (folder / "metrics.json").write_text('{"test/gap": 1, "steps": 8}')
        (folder / "config.yaml").write_text(f"seed_everything: {seed}\n")
    assert submitted(arms=arms, before={"experiment": "toy.yaml"}) == ["#SBATCH --array=0-0"] * 6


@pytest.fixture
def planted(
    made: Callable[..., Claim], results: Path, cli: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Result]]:
    """``planted("run", NAME)``: a claim's command; its runs are processes of their own, and find the toys."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    made()
    yield lambda *args: cli("claims", *args, "--results", results, "--trust", "tests.toys")


@pytest.mark.slow
def test_the_embeddings_of_the_run_before_are_written_once(
    made: Callable[..., Claim], workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fork_runs(monkeypatch)
    tiny = {word.removeprefix("--"): x for word, x in zip(EMOJI[4::2], EMOJI[5::2], strict=True) if word != "--test"}
    before = {"experiment": "contrastive/emoji", "configs": ["on/tiny"], "options": tiny}
    claim = made(before={**before, "predict": {"data.vendors": ["openmoji"]}})
    place = run.Place(claim, "full", workplace / "runs")
    assert run.run(place, ["before"], [0], 1) == 0
    (table,) = place.folder.glob("before-0/001/predict-*/embeddings-train.parquet")
    rows = pq.read_table(table)
    assert {"group", "subgroup", "z_image", "z_text"} < {*rows.schema.names}
    assert {n % len(VENDORS) for n in rows["index"].to_pylist()} == {VENDORS.index("openmoji")}
    fitted = place.folder / "before-0/001/metrics.json"
    stamp = fitted.stat().st_mtime_ns
    table.unlink()  # as a killed command leaves it
    assert run.run(place, ["before"], [0], 1) == 0
    assert len([*place.folder.glob("before-0/001/predict-*/embeddings-train.parquet")]) == 1
    assert fitted.stat().st_mtime_ns == stamp, "trained once"
    other = made(before={**before, "predict": {"data.vendors": ["none"]}})
    with pytest.raises(Refusal, match=r"before, seed 0: .*'none' is not one of"):
        run.run(run.Place(other, "full", workplace / "runs"), ["before"], [0], 1)


@pytest.mark.slow
def test_a_planted_effect_passes_and_a_planted_nothing_does_not(
    planted: Callable[..., Result], made: Callable[..., Claim], results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fork_runs(monkeypatch)
    pilot = planted("run", "toy-claim.yaml", "--budget", "pilot")
    assert pilot.rc == 0 and "toy-claim: a pilot" in pilot.out, pilot.err
    part = planted("run", "toy-claim.yaml", "--seeds", "0")
    assert part.rc == 0 and not store.path(results, "toy-claim", "full").exists()
    whole = planted("run", "toy-claim.yaml")
    assert "9 runs, 3 done" in whole.err and "toy-claim: passed" in whole.out, (whole.out, whole.err)
    stored = store.read(results, "toy-claim", "full")
    assert stored is not None and stored["runs"]["method"][2]["steps"] == 8
    # the same again costs nothing and says the same
    assert stored["seconds"] > 1
    again = planted("run", "toy-claim.yaml")
    assert "9 runs, 9 done" in again.err and again.out == whole.out
    seconds = store.read(results, "toy-claim", "full")
    assert seconds is not None and seconds["seconds"] == stored["seconds"]
    assert planted("verify", "toy-claim.yaml").rc == 0
    # a changed claim needs a new pilot, and leaves what is stored alone
    arms = CONTENT["arms"] | {"method": {"options": {"model.optimizer.init_args.lr": 0.0}}}
    made(arms=arms)
    assert "of configuration" in planted("run", "toy-claim.yaml").refusal
    for budget in ("pilot", "full"):
        store.path(results, "toy-claim", budget).rename(results / f"old-{budget}.json")
    assert "there is no pilot" in planted("run", "toy-claim.yaml").refusal
    assert planted("run", "toy-claim.yaml", "--budget", "pilot").rc == 0
    null = planted("run", "toy-claim.yaml")
    assert "toy-claim: not reproduced at this scale" in null.out, null.err


@pytest.mark.slow
def test_settings_are_tuned_then_tried(
    planted: Callable[..., Result],
    made: Callable[..., Claim],
    results: Path,
    workplace: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fork_runs(monkeypatch)
    arms = {name: arm for name, arm in TUNED["arms"].items() if name != "alone"}
    made(arms=arms | {"sham": CONTENT["arms"]["sham"]}, tuning=TUNED["tuning"])
    assert "no settings were chosen" in planted("run", "toy-claim.yaml", "--budget", "pilot").refusal
    tuned = planted("tune", "toy-claim.yaml")
    assert tuned.rc == 0 and "method: 0.1 (val/gap: 1e-09 " in tuned.out, (tuned.out, tuned.err)
    for budget in ("pilot", "full"):
        found = planted("run", "toy-claim.yaml", "--budget", budget)
        assert found.rc == 0, found.err
    assert "toy-claim: passed" in found.out
    table.write([spec.load("toy-claim.yaml")], results, workplace / "CLAIMS.md")
    page = (workplace / "CLAIMS.md").read_text()
    assert "Settings, chosen by val/gap of validation, seed 200: baseline " in page and "method 0.1 of [" in page


@pytest.mark.slow
def test_a_run_that_fails_is_named_with_its_last_line(
    planted: Callable[..., Result], made: Callable[..., Claim]
) -> None:
    made(arms=CONTENT["arms"] | {"sham": {"options": {"model.image.init_args.widht": 3}}})
    result = planted("run", "toy-claim.yaml", "--budget", "pilot", "--arms", "sham")
    line = result.err.splitlines()[-1]  # the one before it says how many runs there are
    assert result.rc == 2 and "claims toy-claim: sham, seed 100: " in line and "widht" in line and "log: " in line


def test_an_earlier_design_stays_as_a_row_and_there_is_one_redesign(
    made: Callable[..., Claim], cli: Callable[..., Result], results: Path, workplace: Path
) -> None:
    results.mkdir()
    store.write(results, made(), "full", runs_of([0.5, 0.6, 0.7], [0.0, 0.004, -0.004]), 61.0)
    again = ("claims", "run", "toy-claim.yaml", "--redesign", "--results", results)
    assert "no result of an earlier design is stored" in cli(*again).refusal
    changed = made(metric=CONTENT["metric"] | {"margin": 0.2})
    assert "--jobs 0" in cli(*again, "--jobs", "0").refusal and store.path(results, "toy-claim", "full").exists()
    for _ in range(2):  # set aside; its pilot comes first, as that of any claim; and the same command goes on
        assert "there is no pilot" in cli(*again).refusal
    assert table.write([changed], results, workplace / "CLAIMS.md") == ["toy-claim"]
    page = (workplace / "CLAIMS.md").read_text()
    row = "| others | toy-claim, a planted effect |  | **helps** +0.600 [+0.352, +0.848] |  |  | +0.000 |  | 1 min |"
    assert "superseded by a new design" in page and row in page
    store.write(results, changed, "full", runs_of([0.5, 0.6, 0.7], [0.0, 0.1, -0.04]), 61.0)
    made(metric=CONTENT["metric"] | {"margin": 0.3})
    assert "it was redesigned before (toy-claim.superseded.json), and a claim is once" in cli(*again).refusal


def test_the_time_of_a_killed_command_counts(made: Callable[..., Claim], workplace: Path) -> None:
    place = run.Place(made(), "pilot", workplace / "runs")
    place.folder.mkdir(parents=True)
    (place.folder / "began").write_text("1000.0\n")
    log = place.folder / "method-100.log"
    log.touch()
    os.utime(log, (1090, 1090))
    assert run.run(place, (), (), 1) == 0
    assert 90 <= place.seconds < 100 and not (place.folder / "began").exists()


# by stages ------------------------------------------------------------------------------------------------------

#: The oracle of the toy learns at the method's rate; the sham is as far from the baseline as its rate is from 0.
STAGES: dict[str, Any] = {
    "arms": CONTENT["arms"] | {"best": {"options": {"model.optimizer.init_args.weight_decay": 0.0}}, "more": None},
    "oracle": "best",
    "metric": {"name": "test/gap", "better": "lower", "least": 0.001},
    "seeds": {"pilot": [100, 101], "full": [0, 1, 2, 3, 4], "extension": [5, 6, 7, 8, 9]},
}
SIGNAL = {"metric": "test/gap", "arm": "best", "against": "baseline", "at_most": -0.001}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"oracle": None}, "a margin from headroom needs `oracle`"),
        ({"metric": STAGES["metric"] | {"margin": 1}}, "metric: margin, or least"),
        ({"metric": STAGES["metric"] | {"least": 0}}, "metric.least 0: not below 0"),
        ({"also": [{"metric": "a", "arm": "method", "at_least": 0}] * 3}, "also: 3 side conditions.*at most 2"),
        (
            {"seeds": STAGES["seeds"] | {"full": [0, 1, 2]}},
            "seeds: a claim by stages has 2 in pilot, 5 in full, 5 in extension",
        ),
        ({"seeds": STAGES["seeds"] | {"extension": [4, 6, 7, 8, 9]}}, "seeds: 4 is there twice"),
        (
            {"arms": STAGES["arms"] | {"sham": {"options": {"data.init_args.seed": 3}}}},
            "arms.sham: it trains on other data than the method: data.init_args.seed",
        ),
        ({"budget": {"pilot": {"trainer.max_steps": 1}}}, "budget.pilot: the pilot of a claim by stages has the full"),
        (
            {"metric": CONTENT["metric"], "seeds": CONTENT["seeds"], "signal": SIGNAL},
            "signal: a claim by stages has one",
        ),
    ],
)
def test_what_is_wrong_in_a_claim_by_stages_is_named(
    made: Callable[..., Claim], changes: dict[str, Any], says: str
) -> None:
    with pytest.raises(Refusal, match=says):
        made(**(STAGES | changes))


def test_the_claim_of_the_guide_is_one(workplace: Path) -> None:
    guide = (Path(__file__).parents[2] / "docs/guides/claims.md").read_text()
    (text,) = re.findall(r"```yaml\n(.*?)```", guide, re.DOTALL)
    (workplace / "mine.yaml").write_text(text)
    claim = spec.load("mine.yaml")
    assert claim.staged and claim.lockbox and claim.judged == ("baseline", "method", "sham", "oracle")


def test_the_code_of_a_claim_is_what_its_classes_import(made: Callable[..., Claim]) -> None:
    claim = spec.load("structure-clip")
    registered = registration.register(claim)
    assert "modules/losses/hinge.py" in registered["code"] and len(registered["digest"]) == 16
    assert not any(file.startswith("claims/") for file in registered["code"])
    assert registration.changed(registered, claim) == []
    registered["code"] |= {"modules/losses/hinge.py": "another", "modules/gone.py": "one that is not there now"}
    assert registration.changed(registered, claim) == ["modules/gone.py", "modules/losses/hinge.py"]


def test_what_comes_before_is_kept_from_the_lock_box_too(made: Callable[..., Claim], workplace: Path) -> None:
    claim = made(**STAGES, before={"experiment": "toy.yaml"}, lockbox={"data.batches": 5})
    for arm in ("before", "baseline"):
        pilot, full = (run.command(run.Place(claim, of, workplace), arm, 1) for of in ("pilot", "full"))
        assert ("--of-file=data.batches=5" in full, "--of-file=data.batches=5" in pilot) == (True, False)


def test_equal_baselines_have_one_folder(made: Callable[..., Claim], workplace: Path) -> None:
    def home(arm: str, **changes: Any) -> Path:
        return run.Place(made(**(STAGES | changes)), "full", workplace / "runs").home(arm)

    other = {"baseline": {"options": {"model.optimizer.init_args.lr": 0.5}}}
    assert home("baseline") == home("baseline", title="another claim", also=[]) != home("best")
    assert home("baseline") != home("baseline", arms=STAGES["arms"] | other)
    assert home("method") == home("sham") != home("method", metric=STAGES["metric"] | {"least": 0.1})


def test_side_conditions_of_a_claim_by_stages_hold_by_interval(made: Callable[..., Claim]) -> None:
    also = [{"metric": "test/gap", "arm": "method", "against": "baseline", "at_most": -0.45}]
    runs = runs_of([0.5, 0.6, 0.7, 0.4, 0.6], [0.0, 0.001, -0.001, 0.0, 0.0])
    runs["best"] = runs["method"]
    claim = made(**STAGES, also=also).with_margin(0.1)
    ((_, value, met),) = judge(claim, runs).asked
    assert value == pytest.approx(-0.56, abs=ulps(8, F64)) and not met  # the upper end is -0.42
    assert judge(made(arms=STAGES["arms"], also=also), runs).asked[0][2]  # by the mean


def test_a_plan_counts_what_is_missing_and_what_it_takes(
    made: Callable[..., Claim], cli: Callable[..., Result], results: Path, workplace: Path
) -> None:
    def planned() -> list[str]:
        return [
            " ".join(line.split())
            for line in cli("claims", "plan", "toy-claim.yaml", "--results", results).out.splitlines()
        ]

    claim = made(**STAGES, signal=SIGNAL)
    unknown = "unknown: none of its runs is stored"
    assert planned() == [
        f"toy-claim: 46 runs to train, {unknown}",
        f"signal 2 of 2 runs {unknown}",
        f"room 4 of 4 runs {unknown}",
        f"effect 20 of 20 runs {unknown}",
        f"extension 20 of 20 runs {unknown}",
        "total: at least 0 core-minutes, 0.0 core-hours",
    ]
    results.mkdir()
    runs = {arm: {seed: {"test/gap": 1.0, "steps": 8.0} for seed in (100, 101)} for arm in ("baseline", "best")}
    store.write(results, claim, "pilot", runs, 60.0)
    cores = store.machine()["cores"]
    assert planned()[3] == f"effect 20 of 20 runs {20 * cores / 4:.1f} core-minutes"  # type: ignore[operator]
    folder = run.Place(claim, "full", workplace / "runs").home("method") / "method-0/001"
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text('{"test/gap": 1, "steps": 8}')
    assert planned()[3].startswith("effect 19 of 20 runs")
    made(**STAGES, before={"experiment": "toy.yaml"}, signal=SIGNAL | {"arm": "before"})
    assert planned()[1].startswith("signal 2 of 2 runs"), "what comes before, and the baseline"


@pytest.mark.slow
def test_a_claim_goes_through_its_stages_and_stops_where_one_decides(
    planted: Callable[..., Result],
    made: Callable[..., Claim],
    results: Path,
    workplace: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fork_runs(monkeypatch)
    made(**STAGES, signal=SIGNAL, lockbox={"data.batches": 5})
    refused = planted("run", "toy-claim.yaml", "--arms", "method").refusal
    assert "--arms: claims toy-claim goes by stages" in refused
    whole = planted("run", "toy-claim.yaml")
    assert whole.rc == 0 and "stage 2, room: the oracle gains +" in whole.err, (whole.out, whole.err)
    stored = store.read(results, "toy-claim", "full")
    assert stored is not None and (stored["effect"], stored["stage"]) == ("helps", 3), stored
    assert set(stored["runs"]) == {"baseline", "method", "sham", "best"} and set(stored["runs"]["best"]) == set(
        range(5)
    )
    assert set(stored["registered"]) == {"digest", "commit", "time", "code", "opened"}
    assert "opens the lock-box; 1 claims have so far" in whole.err
    made(**STAGES, signal=SIGNAL)
    assert "it opened the lock-box" in planted("run", "toy-claim.yaml", "--redesign").refusal
    made(**STAGES, signal=SIGNAL, lockbox={"data.batches": 5})
    assert planted("run", "toy-claim.yaml").out == whole.out  # nothing is trained again
    ablations = planted("run", "toy-claim.yaml", "--ablations")
    assert ablations.rc == 0 and ablations.out.startswith("baseline: test/gap"), ablations.err
    table.write([spec.load("toy-claim.yaml")], results, workplace / "CLAIMS.md")
    page = (workplace / "CLAIMS.md").read_text()
    assert "| **helps** " in page and "Other arms, seed 0 alone" in page
    assert summary(spec.load("toy-claim.yaml"), results)["placebo_valid"]
    # an oracle that is the baseline leaves no room; the baseline's runs are those of the claim before
    for file in results.glob("toy-claim*"):
        file.unlink()
    made(**(STAGES | {"arms": STAGES["arms"] | {"best": CONTENT["arms"]["baseline"]}}))
    without = planted("run", "toy-claim.yaml")
    assert without.out == "toy-claim: no room (stage 2, room)\n" and "runs," not in without.err, without.err
    # and without a signal nothing more is trained
    for file in results.glob("toy-claim*"):
        file.unlink()
    made(**STAGES, signal=SIGNAL | {"at_most": -100})
    assert planted("run", "toy-claim.yaml").out == "toy-claim: not testable here (stage 1, signal)\n"
    table.write([spec.load("toy-claim.yaml")], results, workplace / "CLAIMS.md")
    assert "**not testable here**" in (workplace / "CLAIMS.md").read_text()
    assert summary(spec.load("toy-claim.yaml"), results)["stage"] == 1
