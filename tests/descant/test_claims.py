"""Claims: the word for planted runs, what a claim's file may have, what is compared with what, and real runs."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from descant.claims import comparison, plots, registration, run, spec, store, summary, table
from descant.claims.claim import BUDGETS, Claim
from descant.claims.effect import HELPS, NO_ROOM, NOT_TESTABLE, SIMPLER, UNCLEAR, WORDS
from descant.claims.judge import judge, require_flops
from descant.cli.catalogue import find, list_bases
from descant.cli.errors import Refusal
from descant.datamodules.corpora.emoji_pack import VENDORS
from tests.conftest import Result
from tests.descant.test_predict import EMOJI
from tests.forked import fork_runs
from tests.rotation import by_turns
from tests.tolerance import F64, ulps

Made = Callable[..., Claim]
Cli = Callable[..., Result]
Git = Callable[..., str]
Patch = pytest.MonkeyPatch
RATE = "model.optimizer.init_args.lr"
CONTENT: dict[str, Any] = {
    "title": "a tower that learns is nearer", "seed": 99, "source": "a planted effect", "experiment": "toy.yaml",
    "arms": {"baseline": {"options": {RATE: 0.0}}, "method": None, "sham": {"options": {RATE: 1e-9}}},
    "metric": {"name": "test/gap", "better": "lower", "margin": 0.1, "unit": "of the gap", "reason": "a toy"},
    "seeds": {"pilot": [100, 101, 102], "full": [0, 1, 2, 3, 4]}, "budget": {"equal": "steps"},
    "removes": "that the towers learn", "no_simple": "nothing is simpler than a rate",
}  # fmt: skip
ARMS: dict[str, Any] = CONTENT["arms"]
METRIC: dict[str, Any] = CONTENT["metric"]
FLOPS = {"equal": "flops"}
BEGIN = {"model.adapt": [{"class_path": "Begin", "init_args": {"path": "ARM/method"}}]}
ROOT = Path(__file__).parents[2]


@pytest.fixture
def results(workplace: Path) -> Path:
    folder = workplace / "results"
    folder.mkdir()
    return folder


@pytest.fixture
def made(workplace: Path) -> Made:
    """``made(metric={...})``: a claim of the toy with some keys replaced; None takes a key away."""

    def make(**changes: Any) -> Claim:
        content = {key: value for key, value in (CONTENT | changes).items() if value is not None}
        (workplace / "toy-claim.yaml").write_text(yaml.safe_dump(content))
        return spec.load("toy-claim.yaml")

    return make


GAINS, SHAMS = [0.5, 0.6, 0.7, 0.55, 0.65], [0.0, 0.01, -0.01, 0.004, -0.004]


def runs_of(gains: list[float] = GAINS, shams: list[float] = SHAMS) -> dict[str, dict[int, dict[str, float]]]:
    """Runs whose ``test/gap`` (lower is better) has these gains over a baseline of 1."""
    arms = {"baseline": [0.0] * len(gains), "method": gains, "sham": shams}
    return {arm: {seed: {"test/gap": 1 - gain, "steps": 8} for seed, gain in enumerate(of)} for arm, of in arms.items()}


def write_page(claims: list[Claim], results: Path, workplace: Path) -> tuple[str, str]:
    """CLAIMS.md, and the page of the first claim ("" where there is none)."""
    table.write(claims, results, workplace / "CLAIMS.md")
    page = workplace / "docs/claims" / f"{claims[0].name}.md"
    return (workplace / "CLAIMS.md").read_text(), page.read_text() if page.exists() else ""


def test_a_claim_that_needs_more_seeds_than_it_has_is_not_testable(made: Made) -> None:
    metric, unclear = METRIC | {"margin": 1.0}, runs_of([0.5, -0.1, -0.2, 1.4, 0.6], [0.0] * 5)
    found = judge(made(metric=metric), unclear)
    assert (found.word, found.needed > 5) == (NOT_TESTABLE, True)
    more = judge(made(metric=metric, seeds=CONTENT["seeds"] | {"full": [*range(20)]}), unclear)
    assert (more.word, more.needed) == (UNCLEAR, found.needed)
    assert judge(made(metric=metric | {"margin": 0.001}), runs_of()).word == HELPS, "it told, with fewer than needed"


def test_the_simple_alternative_is_an_arm_or_the_run_before(made: Made) -> None:
    keys: dict[str, Any] = {"arms": ARMS | {"small": None}, "before": {"experiment": "toy.yaml"}, "no_simple": None}
    runs = runs_of()
    for arm, gain in (("small", 0.7), ("before", 0.1)):
        runs[arm] = {seed: {"test/gap": 1 - gain, "steps": 8, "train_flops": 3e12} for seed in range(5)}
    for metrics in runs["method"].values():
        metrics["train_flops"] = 2.98e12
    small, before = (made(**keys, simple=simple) for simple in ("small", "before"))
    assert set(small.judged_arms) == {*ARMS, "small"} and "small" not in small.pilot_arms
    assert judge(small, runs).word == SIMPLER and judge(before, runs).word == HELPS
    for metrics in runs["method"].values():
        metrics["train_flops"] = 2e12
    assert judge(before, runs).word == HELPS, "the method begins from it, and has paid for it as well"
    with pytest.raises(Refusal, match=r"simple small, seed 0: 3e\+12 FLOPs of training, and the method had 2e\+12"):
        judge(small, runs)


def test_the_pilot_counts_towards_the_room(made: Made) -> None:
    claim, runs, pilot = made(arms=ARMS | {"best": None}, oracle="best"), runs_of(), runs_of([0.6] * 3, [0.0] * 3)
    assert set(claim.pilot_arms) == {*ARMS, "best"}
    for of, gain in ((runs, 0.05), (pilot, 0.8)):
        of["best"] = {seed: {"test/gap": 1 - gain - 0.001 * seed, "steps": 8} for seed in of["method"]}
    assert judge(claim, runs).word == NO_ROOM
    found = judge(claim, runs, pilot=pilot).effect
    assert found.word == HELPS and found.oracle is not None
    assert found.oracle.mean == pytest.approx((5 * 0.052 + 3 * 0.801) / 8, abs=ulps(16, F64))


def test_further_conditions_are_measured_and_decide_no_word(made: Made) -> None:
    runs = runs_of()
    for of in runs.values():
        for metrics in of.values():
            metrics["test/other"] = metrics["test/gap"] / 2

    def ask(**condition: Any) -> tuple[str, float, bool]:
        found = judge(made(also=[{"metric": "test/other", "arm": "method"} | condition]), runs)
        ((what, value, met),) = found.asked
        assert found.word == HELPS
        return str(what), round(value, 6), met

    less = "test/other of method less baseline >= "
    assert ask(against="baseline", at_least=-0.2) == (f"{less}-0.2", -0.3, False)
    assert ask(against="baseline", at_least=-0.31) == (f"{less}-0.31", -0.3, False), "the lower end is -0.35"
    assert ask(against="baseline", at_least=-0.36) == (f"{less}-0.36", -0.3, True)
    # a multiple of another metric of the same arm: 0.2 - 0.3 * 0.4, and 0.3 times the baseline's 1
    assert ask(minus="test/gap", times=0.3, at_least=0.06, at_most=0.1)[1:] == (0.08, True)
    what, value, met = ask(minus="test/gap", times=0.3, against="baseline", at_least=0)
    assert (what, value, met) == ("test/other of method less 0.3 x test/gap of baseline >= 0", -0.1, False)
    for metrics in runs["sham"].values():
        metrics["test/other"] = 0.8
    # a share of a gap, (0.2 - 0.5) - 0.4 * (0.8 - 0.5)
    what, value, met = ask(against="sham", times=0.4, above="baseline", at_least=0)
    assert (what, value) == ("test/other of method less 0.4 x sham, both above baseline >= 0", -0.42)


def test_other_runs_need_what_a_condition_reads_of_them_and_no_equal_budget(made: Made) -> None:
    arms = ARMS | {"alone": {"options": {RATE: 1e-3}}}
    same = {"metric": "old/gap", "arm": "method", "against": "before", "at_least": 0, "at_most": 0}
    less = {"metric": "test/other", "arm": "method", "against": "alone", "at_most": 0}
    claim = made(arms=arms, before={"experiment": "toy.yaml"}, also=[same, less])
    needed = {arm: claim.required_metrics(arm) for arm in ("before", "sham", "alone", "method")}
    assert [*needed.values()] == [["old/gap"], ["test/gap"], ["test/other"], ["test/gap", "old/gap", "test/other"]]
    assert made(arms=arms).required_metrics("alone") == ["test/gap"]
    runs = runs_of()
    runs["before"] = {seed: {"old/gap": 0.25, "steps": 99.0} for seed in range(5)}
    runs["alone"] = {seed: {"test/other": 2.0, "steps": 8} for seed in range(5)}
    for metrics in runs["method"].values():
        metrics |= {"old/gap": 0.25, "test/other": 1.0}
    assert [met for _, _, met in judge(claim, runs).asked] == [True, True]
    runs["method"][1]["old/gap"] += 1e-9
    assert [met for _, _, met in judge(claim, runs).asked] == [False, True]
    assert ">method<" in plots.svg(claim, runs) and "alone" not in plots.svg(claim, runs), "it has no such metric"


def test_arms_of_other_budgets_are_not_compared(made: Made) -> None:
    runs = runs_of()
    runs["sham"][1]["steps"] = 9
    with pytest.raises(Refusal, match="sham, seed 1: 9 steps, and baseline had 8: arms are compared at an equal"):
        judge(made(), runs)
    del runs["sham"][1]
    with pytest.raises(Refusal, match="sham: no runs, or of other seeds than the method's"):
        judge(made(), runs)
    # arms that go on from one of the three are compared with each other
    runs, claim = runs_of(), made(arms=ARMS | {"more": {"options": BEGIN}, "most": {"options": BEGIN}})
    for arm in ("more", "most"):
        runs[arm] = {seed: {"test/gap": 1.0, "steps": 3} for seed in range(5)}
    judge(claim, runs)
    runs["most"][2]["steps"] = 4
    with pytest.raises(Refusal, match="most, seed 2: 4 steps, and more had 3: arms are compared at an equal budget"):
        judge(claim, runs)


def test_arms_are_equal_in_flops_where_nothing_else_is_said(made: Made, results: Path, workplace: Path) -> None:
    claim = made(arms=ARMS | {"more": {"options": BEGIN}}, budget=None, options={"trainer.max_steps": 8})
    place = run.Place(claim, "full", workplace / "runs")
    like = f"--of-file=trainer.callbacks+={{class_path: Budget, init_args: {{like: {place.home('method')}/method-1}}}}"
    # the sham runs the method's code, step by step, and the last goes on where the method ended
    assert [arm for arm in claim.arms if like in run.command(place, arm, 1)] == ["baseline"]
    assert claim.steps("baseline", "full") is None and claim.steps("sham", "full") == 8
    assert place.missing(["baseline"], [0]) == [("method", 0), ("baseline", 0)], "with the arm whose FLOPs it spends"
    assert place.waits("baseline", 0, [("method", 0)]) and not place.waits("sham", 0, [("method", 0)])

    runs = runs_of()
    for arm, flops in {"baseline": 1.009e12, "method": 1e12, "sham": 0.991e12}.items():
        for seed in range(5):
            runs[arm][seed] |= {"train_flops": flops * (1 + seed), "steps": 12 if arm == "baseline" else 8}
    judge(claim, runs)
    store.require_free(results, claim, "full")
    store.write(results, claim, "full", runs, 61.0)
    spent = "baseline 3.03e+12 in 12 steps, method 3e+12 in 8 steps, sham 2.97e+12 in 8 steps"
    whole, page = write_page([claim], results, workplace)
    assert f"FLOPs of training within 1% ({spent}) in every arm" in page and "| 5.0e+12 |" in whole
    runs["baseline"][2]["train_flops"] *= 1.01
    with pytest.raises(Refusal, match=r"baseline, seed 2: 3\.057e\+12 FLOPs of training, \+1\.9% from method"):
        judge(claim, runs)
    del runs["sham"][0]["train_flops"]
    with pytest.raises(Refusal, match="sham, seed 0: no train_flops in it or in method"):
        require_flops(claim, {arm: runs[arm] for arm in ("method", "sham")})


def test_arms_apart_have_another_budget_and_stages_their_own(made: Made, workplace: Path) -> None:
    arms, budget = ARMS | {"more": {"options": {"trainer.max_steps": 99}}}, FLOPS | {"apart": ["more"]}
    claim = made(arms=arms, budget=budget, options={"trainer.max_steps": 8})
    assert [arm for arm in claim.arms if claim.is_limited(arm)] == ["baseline"]
    runs = runs_of() | {"more": {seed: {"test/gap": 0.1, "steps": 99} for seed in range(5)}}
    for arm, of in runs.items():
        for metrics in of.values():
            metrics["train_flops"] = 7e12 if arm == "more" else 1e12
    judge(claim, runs)
    with pytest.raises(Refusal, match=r"more, seed 0: 7e\+12 FLOPs of training, \+600\.0% from method"):
        judge(made(arms=arms, budget=FLOPS), runs)
    staged = made(arms=arms, budget=FLOPS, experiment="staged/emoji-grow")
    place = run.Place(staged, "full", workplace / "runs")
    assert not any("Budget" in word for arm in staged.arms for word in run.command(place, arm, 1))


def test_arms_that_are_equal_in_time_have_had_no_less_of_it(made: Made) -> None:
    runs = runs_of()
    for arm, seconds in {"baseline": 140.0, "method": 100.0, "sham": 60.0}.items():
        for metrics in runs[arm].values():
            metrics["train_seconds"] = seconds
    claim = made(budget={"equal": "seconds"})
    judge(claim, runs)
    runs["baseline"][2]["train_seconds"] = 79.0
    with pytest.raises(Refusal, match="baseline, seed 2: 79 seconds of training, and at least 80 are as much time"):
        judge(claim, runs)
    runs["baseline"][2]["train_seconds"] = 99.0
    runs["sham"][1]["steps"] = 7
    with pytest.raises(Refusal, match=r"sham, seed 1: 7 steps, and the method had 8: as many count"):
        judge(claim, runs)


def test_scored_code_must_run_as_often_in_the_sham(made: Made) -> None:
    runs = runs_of()
    for arm in ("method", "sham"):
        for metrics in runs[arm].values():
            metrics["sham/calls"] = 8.0
    claim = made(calls="sham/calls")
    assert judge(claim, runs).word == HELPS
    runs["sham"][2]["sham/calls"] = 0.0
    with pytest.raises(Refusal, match=r"seed 2: sham/calls is 8.0 in the method and 0.0 in the sham"):
        judge(claim, runs)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"arms": {"baseline": {}, "method": {}}}, "arms: no 'sham'; every claim has baseline, method, sham"),
        *(({key: 3}, f"{key}: no such key") for key in ("sead", "status", "setting", "alone", "sham_margin")),
        *(({key: None}, f"{key} is missing") for key in ("title", "metric", "seeds", "removes")),
        *(({"metric": METRIC | {key: None}}, f"metric: {key} is missing") for key in ("unit", "reason", "margin")),
        ({"metric": METRIC | {"better": "more"}}, "metric.better more: higher or lower"),
        *(({"metric": METRIC | {"margin": x}}, "metric.margin .*: above 0") for x in (0, -0.5, float("inf"))),
        ({"metric": METRIC | {"name": "val/y"}}, "val/y: a claim is judged by the test"),
        ({"no_simple": None}, "simple: the arm that one would try first .*, or no_simple: why there is none"),
        ({"simple": "small", "arms": ARMS | {"small": None}}, "simple: the arm that one would try first"),
        ({"simple": "smal", "arms": ARMS | {"small": None}, "no_simple": None}, "simple: no arm 'smal'.*: small"),
        ({"seeds": {"pilot": [8, 9], "full": [*range(5)]}}, "seeds.pilot: 2 seeds; 3 show how much"),
        *(({"seeds": {"pilot": [7, 8, 9], "full": [*range(n)]}}, f"seeds.full: {n} seeds; 5 to 20") for n in (4, 21)),
        ({"seeds": {"pilot": [7, 8, 4], "full": [*range(5)]}}, "seeds: 4 is in pilot and in full"),
        ({"seeds": {"pilot": [7, 8, 8], "full": [*range(5)]}}, "seeds: 8 is there twice"),
        ({"experiment": "contrastive/emojy"}, "contrastive/emojy: no such file.*nearest: contrastive/emoji"),
        ({"also": [{"metric": "a", "arm": "metod", "at_least": 0}]}, r"also\[0\]: no arm 'metod'; nearest: method"),
        ({"also": [{"metric": "a", "arm": "method", "against": "method", "at_least": 0}]}, "a of method less itself"),
        ({"also": [{"metric": "a", "arm": "method", "times": 2, "at_least": 0}]}, r"also\[0\]: times needs `minus`"),
        ({"also": [{"metric": "a", "arm": "method", "above": "method", "at_least": 0}]}, "method above itself is"),
        ({"also": [{"metric": "a", "arm": "before", "at_least": 0}]}, r"also\[0\]: no arm 'before'"),
        ({"also": [{"metric": "a", "arm": "method", "minus": "val/b", "at_least": 0}]}, "val/b: a claim is judged by"),
        ({"also": [{"metric": "a", "arm": "method"}]}, "at_least or at_most"),
        ({"before": {"configs": []}}, "before: experiment is missing"),
        ({"before": {"experiment": "toy.yml"}}, "toy.yml: no such file"),
        ({"before": {"experiment": "toy.yaml", "seed": "one"}}, "before.seed 'one': a whole number is expected"),
        ({"before": {"experiment": "toy.yaml", "predict": "train"}}, "before: predict: an object is expected"),
        ({"before": {"experiment": "toy.yaml", "lockbox": {}}}, "before.lockbox: the claim has no lockbox"),
        ({"budget": {"equal": "hours"}}, "budget.equal hours; known: flops, samples, seconds, steps"),
        ({"budget": {"pilot": {}}}, "budget: pilot: no such key"),
        ({"budget": {"equal": "steps", "reference": "sham"}}, "budget.reference: of arms that are equal in flops, not"),
        ({"budget": FLOPS | {"reference": "sam"}}, "budget.reference: no arm 'sam'; nearest: sham"),
        ({"budget": {"apart": ["mor"]}, "arms": ARMS | {"more": None}}, r"budget\.apart: no arm 'mor'.*nearest: more"),
        ({"oracle": "sham"}, "oracle: no arm 'sham' beside baseline, method, sham"),
        ({"arms": ARMS | {"sham": {"config": [1]}}}, "arms.sham: config: a configuration is expected"),
        ({"arms": ARMS | {"sham": {"options": {"data.init_args.seed": 3}}}}, "arms.sham: it trains on other data"),
        ({"like": "dcdd"}, "like dcdd: no such claim; nearest: dcd"),
        ({"like": "dcd", "arms": {"sham": {"config": {}}}}, "arms.sham: config: of a claim that is like another one"),
    ],
)
def test_what_is_wrong_in_a_claim_is_named(made: Made, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(Refusal, match=f"toy-claim.yaml: .*{says}"):
        made(**changes)


def test_a_placebo_lacks_one_component(made: Made) -> None:
    sham = {"options": {RATE: 1e-9, "data.init_args.sham": "permute"}}
    with pytest.raises(Refusal, match=r"differs from the method in data\.init_args\.sham and model.*; remove one"):
        made(arms=ARMS | {"sham": sham})
    assert made(arms=ARMS | {"sham": sham}, exploratory="its placebo is two").exploratory == "its placebo is two"
    for one in ({"data.init_args.sham": "permute"}, {"trainer.limit_val_batches": 3, RATE: 1e-9}):
        made(arms=ARMS | {"sham": {"options": one}})


def test_a_claim_like_another_one_has_its_keys_but_for_its_own(workplace: Path) -> None:
    own = {"like": "dcd", "title": "on fresh seeds", "exploratory": "its gains had been seen", "also": None}
    seeds = {"pilot": [200, 201, 202], "full": [*range(20, 30)]}
    arms = {"longer": {"options": {"trainer.max_steps": 600}}}
    (workplace / "again.yaml").write_text(yaml.safe_dump(own | {"seeds": seeds, "arms": arms}))
    again, first = spec.load("again.yaml"), spec.load("dcd")
    assert (again.title, again.also, again.seeds["pilot"]) == ("on fresh seeds", (), (200, 201, 202))
    assert again.metric == first.metric and [*again.arms] == [*first.arms, "longer"]
    differ = {key for key in first.digests if again.digests[key] != first.digests[key]}
    assert differ == {"rule"} and again.command("sham", 0, "full") == first.command("sham", 0, "full")


def test_the_claim_of_the_guide_is_one(workplace: Path) -> None:
    (text,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs/guides/claims.md").read_text(), re.DOTALL)
    (workplace / "mine.yaml").write_text(text)
    claim = spec.load("mine.yaml")
    assert claim.lockbox and claim.judged_arms == ("baseline", "method", "sham", "oracle", "warm")


def test_each_arm_has_a_digest_and_the_rule_one(made: Made, workplace: Path) -> None:
    def changed(**changes: Any) -> set[str]:
        now = made(**changes).digests
        return {key for key in {*now, *first} if now.get(key) != first.get(key)}

    first = made().digests
    assert set(first) == {"baseline", "method", "sham", "rule"}
    words = {"title": "in other words", "source": "elsewhere", "note": "seconds are of a busy machine", "seed": 98}
    assert changed(**words, removes="the rate", exploratory="the gains had been seen") == set()
    assert changed(metric=METRIC | {"margin": 0.2}) == changed(seeds=CONTENT["seeds"] | {"full": [*range(9)]})
    assert changed(metric=METRIC | {"margin": 0.2}) == {"rule"}
    assert changed(metric=METRIC | {"unit": "of another", "reason": "of a user"}) == set()
    more = ARMS | {"more": {"options": {RATE: 0.5}}}
    assert changed(arms=more) == changed(arms=more, simple="more", no_simple=None) == {"more"}
    assert changed(arms=more, oracle="more") == {"more", "rule"}
    assert changed(arms=ARMS | {"baseline": {"options": {RATE: 0.5}}}) == {"baseline"}
    assert changed(options={"trainer.max_steps": 3}) == {"baseline", "method", "sham"}
    assert changed(before={"experiment": "toy.yaml"}) == {"baseline", "method", "sham", "before"}
    over: dict[str, Any] = {"model": {"scale": 2.0}, "trainer": {"callbacks+": [{"class_path": "CMGH"}]}}
    (workplace / "over.yaml").write_text(yaml.safe_dump(over))
    (workplace / "both.yaml").write_text("extends: [toy.yaml, over.yaml]\n")
    assert changed(arms=ARMS | {"method": {"config": over}}) == {"method"}
    ways: list[dict[str, Any]] = [
        {"configs": ["over.yaml"]},
        {"configs": ["both.yaml"]},
        {"config": {"extends": "over.yaml"}},
    ]
    alike = {made(arms=ARMS | {"method": arm}).digests["method"] for arm in [*ways, {"config": over}]}
    assert len(alike) == 1, "whatever files and names it is composed of"
    begun = ARMS | {"first": {"options": {RATE: 0.5}}, "begun": {"options": {"model.path": "ARM/first"}}}
    first = made(arms=begun).digests
    assert changed(arms=begun | {"first": {"options": {RATE: 0.4}}}) == {"first", "begun"}
    toy, first = (workplace / "toy.yaml").read_text(), made().digests
    (workplace / "toy.yaml").write_text(f"# what a header has is no part of a run\n{toy}\n")
    assert changed() == set()
    (workplace / "toy.yaml").write_text(f"{toy}\nname: other\n")
    assert changed() == {"baseline", "method", "sham"}


def test_the_config_inside_an_arm_is_a_configuration_with_a_name(made: Made, workplace: Path) -> None:
    own = {"extends": "toy.yaml", "model": {"scale": 2.0}}
    claim = made(arms=ARMS | {"method": {"config": own}})
    assert claim.command("method", 0, "full")[:4] == ["--config", "toy.yaml", "--config", "toy-claim.yaml:method"]
    file = find("toy-claim.yaml:method")
    assert yaml.safe_load(file.read_text()) == own and find("toy-claim.yaml:method") == file
    assert list_bases(file) == [(workplace / "toy.yaml").resolve()]
    with pytest.raises(Refusal, match="has no arm 'metod' with a `config`; nearest: method"):
        find("toy-claim.yaml:metod")


def test_auto_has_the_digest_of_what_it_was(made: Made, workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    toy, digests = (workplace / "toy.yaml").read_text(), []
    for precision in ("bf16-mixed", "auto", "32-true"):
        (workplace / "toy.yaml").write_text(f"{toy}  precision: {precision}\n")
        digests.append(made().digests)
    assert digests[0] == digests[1] != digests[2]
    place = run.Place(made(), "full", workplace / "runs")
    for number, precision in enumerate(("32-true", "32-true", "auto", "bf16-mixed"), start=1):
        folder = place.home("method") / f"method-{number}" / "001"
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(f"trainer: {{precision: {precision}}}\n")
    (place.home("method") / "method-1" / "latest").symlink_to("001")
    assert place.precisions() == ["32-true", "bf16-mixed"]
    assert "its runs were trained in 32-true and bf16-mixed" in capsys.readouterr().err


def test_options_reach_the_command_in_their_order(made: Made) -> None:
    claim = made(options={"trainer.max_steps": 5, "model.scale": 2.0}, lockbox={"model.scale": 3.0})
    options = ["--of-file=model.scale=2.0", "--of-file=trainer.max_steps=5", f"--of-file={RATE}=0.0"]
    assert claim.command("baseline", 7, "pilot") == ["--config", "toy.yaml", *options, "--seed_everything=7"]
    assert "--of-file=model.scale=3.0" in claim.command("baseline", 7, "full")


def put_run(folder: Path, metrics: dict[str, float] | None = None, seed: int | None = None) -> Path:
    """A run's folder with its metrics, and with the seed of its configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.json").write_text(json.dumps(metrics or {"test/gap": 1, "steps": 8}))
    if seed is not None:
        (folder / "config.yaml").write_text(f"seed_everything: {seed}\n")
    return folder


def test_arms_begin_from_the_run_of_their_seed(made: Made, workplace: Path) -> None:
    saved = {"class_path": "SavedTower", "init_args": {"path": "BEFORE", "note": "BEFOREHAND"}}
    arms = ARMS | {"method": {"options": {"model.image": saved, "data.folder": "BEFORE/checkpoints"}}}
    before = {"experiment": "toy.yaml", "options": {"model.scale": 3.0}}
    claim = made(before=before, arms=arms, exploratory="its placebo has other data")
    place = run.Place(claim, "full", workplace / "runs")
    home = place.home("before")
    assert place.missing(["method"], [0, 1]) == [("before", 0), ("method", 0), ("before", 1), ("method", 1)]
    words = run.command(place, "method", 1)
    assert f"--of-file=data.folder={home}/run-1/checkpoints" in words
    assert any(f"{{note: BEFOREHAND, path: {home}/run-1}}" in w for w in words if "model.image" in w)
    assert run.command(place, "before", 1)[1:4] == ["--config", "toy.yaml", "--of-file=model.scale=3.0"]
    # of an array on a cluster, the run with its seed
    folder = put_run(home / "run/001", {"val/gap": 1, "sham/calls": 2, "steps": 8}, seed=1)
    assert (place.of("before", 0), place.of("before", 1)) == (home / "run-0", folder)
    assert place.read_metrics("before", 1) is None  # not tested yet
    put_run(folder)
    assert place.missing(["method"], [1]) == [("method", 1)]


def test_one_run_before_serves_all_seeds(made: Made, workplace: Path) -> None:
    options, before = {"model.image.path": "BEFORE"}, {"experiment": "toy.yaml"}
    claim = made(before=before | {"seed": 7}, options=options)
    assert claim.digests["method"] != made(before=before, options=options).digests["method"]
    place = run.Place(claim, "full", workplace / "runs")
    runs, home = [("before", 7), ("method", 0), ("method", 1)], place.home("before")
    assert place.missing(["method"], [0, 1]) == place.every(["method"], [0, 1]) == runs
    assert place.waits("method", 1, [("before", 7)]) and not place.waits("method", 1, [("method", 0)])
    assert f"--of-file=model.image.path={home}/run-7" in run.command(place, "method", 1)
    put_run(home / "run-7/001")
    assert place.missing(["method"], [0, 1]) == runs[1:] and place.read_metrics("before", 1) == {
        "test/gap": 1,
        "steps": 8,
    }


def test_predictions_follow_the_run_before(made: Made, workplace: Path) -> None:
    plain, wanted = ({"experiment": "toy.yaml"} | more for more in ({}, {"predict": {"data.wrong": 0.4}}))
    claim = made(before=wanted)
    assert claim.digests["before"] != made(before=plain).digests["before"]
    place = run.Place(claim, "full", workplace / "runs", ("tests.toys",))
    home = place.home("before")
    predict = ["--sets=train", "--of-file=data.wrong=0.4", "--trust=tests.toys", f"--runs={home}"]
    assert run.predicting(place, "before", 1) == ["predict", "--run=run-1/latest", *predict]
    assert run.predicting(place, "method", 1) == []
    folder = put_run(home / "run-1/001")
    assert place.missing(["method"], [1]) == [("before", 1), ("method", 1)], "it has no predictions"
    assert run.predicting(place, "before", 1)[:2] == ["predict", "--run=run-1/001"]
    (folder / "predict-001").mkdir()
    assert place.read_metrics("before", 1) is None, "killed while it wrote them"
    (folder / "predict-001/embeddings-train.parquet").touch()
    assert place.missing(["method"], [1]) == [("method", 1)]
    with pytest.raises(Refusal, match=r"before\.predict is a process of this command; run it without --slurm"):
        run.submit(place, ["method"], [0], "")


def test_the_run_before_has_the_lock_box_or_that_of_its_own_data(made: Made, workplace: Path) -> None:
    box = {"lockbox": {"data.batches": 5}}
    same, own = (
        made(**box, before={"experiment": "toy.yaml"} | more) for more in ({}, {"lockbox": {"data.sealed": True}})
    )
    assert own.options("before", "full") == {"data.sealed": True}
    assert own.options("before", "pilot") == {} and "data.sealed" not in own.options("method", "full")
    for arm in ("before", "baseline"):
        pilot, full = (run.command(run.Place(same, of, workplace), arm, 1) for of in ("pilot", "full"))
        assert ("--of-file=data.batches=5" in full, "--of-file=data.batches=5" in pilot) == (True, False)


def test_arms_begin_from_the_runs_of_others(made: Made, workplace: Path) -> None:
    arms = ARMS | {"method": {"options": {"model.paths": {"a": "ARM/alone/checkpoints/x", "b": "ARM/sham"}}}}
    claim = made(arms={**arms, "alone": {"options": {"model.scale": 2.0}}})
    place = run.Place(claim, "full", workplace / "runs")
    wanted = [("alone", 0), ("sham", 0), ("baseline", 0), ("method", 0)]
    assert place.missing(list(claim.arms), [0]) == wanted
    assert place.missing(["method"], [0]) == [("alone", 0), ("sham", 0), ("method", 0)], "with what it needs"
    assert [one for one in wanted if place.waits(*one, wanted)] == [("method", 0)]
    assert not place.waits("method", 0, [("sham", 1), ("baseline", 0)]), "of its own seed, and no more than it needs"
    paths = f"{{a: {place.home('alone')}/alone-0/checkpoints/x, b: {place.home('sham')}/sham-0}}"
    assert f"--of-file=model.paths={paths}" in run.command(place, "method", 0)


def test_equal_baselines_have_one_folder_and_changed_arms_another(made: Made, workplace: Path) -> None:
    def home(arm: str, **changes: Any) -> Path:
        arms = ARMS | {"best": {"options": {RATE: 0.1}}} | changes.pop("arms", {})
        return run.Place(made(oracle="best", arms=arms, **changes), "full", workplace / "runs").home(arm)

    other = {"baseline": {"options": {RATE: 0.5}}}
    assert home("baseline") == home("baseline", title="another claim", also=[]) != home("best")
    assert home("baseline") != home("baseline", arms=other) and home("best") == home("best", arms=other)
    assert home("method") == home("method", metric=METRIC | {"margin": 0.2}) != home("sham")
    assert home("method") != home("method", arms={"method": {"options": {RATE: 0.5}}})


def test_runs_of_an_array_are_found_by_their_seed(made: Made, workplace: Path) -> None:
    place = run.Place(made(), "full", workplace / "runs")
    for number, seed in enumerate((2, 0), 1):
        put_run(place.home("method") / f"method/{number:03d}", {"test/gap": seed / 10, "steps": 8}, seed)
    assert place.missing(["method"], [0, 1, 2]) == [("method", 1)]
    assert place.collect(["method"], [0, 2])["method"][2] == {"test/gap": 0.2, "steps": 8.0}
    with pytest.raises(Refusal, match="method, seed 1: it has no metric test/gap"):
        place.collect(["method"], [1])


def test_the_time_of_a_killed_command_counts(made: Made, workplace: Path) -> None:
    place = run.Place(made(), "pilot", workplace / "runs")
    place.folder.mkdir(parents=True)
    (place.folder / "began").write_text("1000.0\n")
    log = place.folder / "method-100.log"
    log.touch()
    os.utime(log, (1090, 1090))
    assert run.run(place, (), (), 1) == 0
    assert 90 <= place.seconds < 100 and not (place.folder / "began").exists()


TUNED: dict[str, Any] = {
    "arms": {
        "baseline": {"options": {RATE: "SETTING"}, "settings": [0.0, 1e-9]}, "alone": {},
        "method": {"options": {RATE: "SETTING"}, "settings": [1e-9, 0.01, 1e-8]},
        "sham": {"options": {RATE: 1e-9, "model.note": "ARM/alone"}},
    },
    "tuning": {"seeds": [200, 201], "options": {"model.scale": 1.0}},
}  # fmt: skip


def test_settings_are_chosen_by_runs_of_their_own(made: Made, results: Path) -> None:
    claim = made(**TUNED)
    candidates = claim.candidates()
    assert list(candidates.arms) == ["baseline.0", "baseline.1", "method.0", "method.1", "method.2"]
    words = candidates.command("method.1", 200, "tune")
    assert {f"--of-file={RATE}=0.01", "--of-file=model.scale=1.0", "--seed_everything=200"} <= set(words)
    assert "--test=false" in run.command(run.Place(candidates, "tune", results), "method.1", 200)
    gaps = {"baseline.0": 0.5, "baseline.1": 0.5, "method.0": 0.4, "method.1": 0.1, "method.2": 0.3}
    runs = {name: {200: {"val/gap": gap + 0.1}, 201: {"val/gap": gap - 0.1}} for name, gap in gaps.items()}
    runs["method.0"][200]["val/gap"] = 0.05
    chosen = claim.choose_settings(runs)
    assert chosen == {"baseline": 0, "method": 1}, "less is better here, by the mean of seeds, and of equals the first"
    settled = claim.with_settings(chosen)
    assert f"--of-file={RATE}=0.01" in settled.command("method", 0, "full")
    assert not settled.is_tuned and settled.digests == claim.digests and settled.arms["sham"] == claim.arms["sham"]


def test_a_validation_is_not_the_end_where_settings_are_chosen(made: Made, workplace: Path) -> None:
    begun = {"options": {RATE: "SETTING", "model.note": "ARM/alone"}, "settings": [0.1, 1.0]}
    arms = TUNED["arms"] | {"method": begun}
    candidates = made(**(TUNED | {"arms": arms, "options": {"trainer.max_steps": 5}})).candidates()
    assert candidates.required_metrics("alone") == [] and candidates.required_metrics("method.0") == ["val/gap"]
    place = run.Place(candidates, "tune", workplace / "runs")
    for arm, metrics in (("alone", {"val/loss": 1.0}), ("method.0", {"val/gap": 1.0})):
        for reached, ended in ((4, False), (5, True)):
            put_run(place.home(arm) / f"{arm}-200" / "001", metrics | {"steps": reached})
            assert (place.read_metrics(arm, 200) is not None) == ended


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"tuning": None}, "arms.baseline: settings need `tuning`"),
        ({"tuning": {"seeds": [0, 9]}}, "tuning.seeds 0: in pilot or full too"),
        ({"tuning": {"seeds": [9], "better": "more"}}, "tuning: better: no such key"),
        ({"tuning": {"seed": 9}}, "tuning: seed: no such key; nearest: seeds"),
        ({"budget": None}, "tuning: settings are chosen before the reference arm is trained"),
        ({"arms": TUNED["arms"] | {"alone": {"settings": [1]}}}, "alone: settings: none of its options is SETTING"),
        ({"arms": TUNED["arms"] | {"alone": {"options": {"a": "SETTING"}}}}, "SETTING in its options, and no values"),
        ({"arms": TUNED["arms"] | {"alone": {"settings": 3}}}, "settings: a list of values is expected"),
        ({"arms": ARMS}, "tuning: no arm has settings"),
        ({"arms": TUNED["arms"] | {"alone": {"options": {"a": "ARM/alonne"}}}}, "no arm 'alonne'.*nearest: alone"),
        ({"arms": TUNED["arms"] | {"alone": {"options": {"a": "ARM/sham"}}}}, "ARM/sham: an arm that needs no other"),
    ],
)
def test_what_is_wrong_with_settings_is_named(made: Made, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(Refusal, match=f"toy-claim.yaml: .*{says}"):
        made(**(TUNED | changes))


def alter_stored(results: Path, change: Callable[[dict[str, Any]], Any], budget: str = "full") -> None:
    file = store.path(results, "toy-claim", budget)
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def test_a_result_that_was_edited_by_hand_is_refused(made: Made, cli: Cli, results: Path) -> None:
    store.write(results, made(), "full", runs_of(), 61.0, ["32-true"])
    file = store.path(results, "toy-claim", "full")
    file.write_text(json.dumps(json.loads(file.read_text()), indent=7, sort_keys=True))
    stored = store.read(results, "toy-claim", "full")
    assert stored is not None and (stored["version"], stored["precision"]) == (3, ["32-true"]), "however it is laid out"
    alter_stored(results, lambda content: content["runs"]["method"]["2"].update({"test/gap": 0.1}))
    refused = cli("claims", "run", "toy-claim.yaml", "--results", results).refusal
    assert "toy-claim.json: edited by hand" in refused and "\n" not in refused
    file.write_text("{")
    with pytest.raises(Refusal, match="no result of a claim"):
        store.require_free(results, made(), "full")


def test_a_result_of_an_earlier_version_is_read_and_exploratory(made: Made, results: Path, workplace: Path) -> None:
    claim = made()
    store.write(results, claim, "full", runs_of(), 61.0)
    store.write_registered(results, claim, registration.register(claim) | {"commit": "0123456789ab"})
    assert "## Registered before they ran" in write_page([claim], results, workplace)[0]
    alter_stored(results, lambda content: [content.pop(key) for key in ("version", "checksum")])
    whole, page = write_page([claim], results, workplace)
    assert "## Registered" not in whole and "- Exploratory: its result is of an earlier version." in page
    alter_stored(results, lambda content: content.pop("digests"))
    assert store.read(results, claim.name, "full") and store.of_design(results, claim, "full") is None


def test_an_arm_of_another_digest_is_left_out(made: Made, results: Path, workplace: Path) -> None:
    arms, runs = ARMS | {"more": {"options": {RATE: 0.5}}, "gone": None}, runs_of()
    runs |= {"more": runs["method"], "gone": runs["method"]}
    store.write(results, made(arms=arms), "full", runs, 61.0)

    def read_arms(**changes: Any) -> set[str] | None:
        stored = store.of_design(results, made(**changes), "full")
        return None if stored is None else set(stored["runs"])

    assert read_arms(arms=arms) == {*arms}
    assert read_arms(arms=arms | {"more": {"options": {RATE: 0.4}}}) == {*ARMS, "gone"} and read_arms() == {*ARMS}
    claim = made(arms=arms | {"new": None}, simple="new", no_simple=None)
    assert "the arm `new`, which has not been trained yet." in write_page([claim], results, workplace)[1]
    assert read_arms(arms=arms | {"sham": {"options": {RATE: 1e-8}}}) is None
    assert read_arms(arms=arms, metric=METRIC | {"margin": 0.2}) is None


def test_an_earlier_design_is_set_aside_once(made: Made, cli: Cli, results: Path, workplace: Path) -> None:
    store.write(results, made(), "full", runs_of(), 61.0, outcome={"effect": HELPS, "gain": [0.6, 0.5, 0.7]})
    store.write_registered(results, made(), registration.register(made()) | {"looks": {"a b": "then"}})
    before = store.path(results, "toy-claim", "full").read_text()
    plain = ("claims", "run", "toy-claim.yaml", "--results", results, "--trust", "tests.toys")
    again = (*plain, "--redesign", "--slurm", "--time 9 --dry-run")
    assert "no result of an earlier design is stored" in cli(*again).refusal
    changed = made(metric=METRIC | {"margin": 0.2})
    refused = cli(*plain).refusal
    assert "of another design of the claim; --redesign sets it aside, and its row stays" in refused
    assert store.path(results, "toy-claim", "full").read_text() == before
    assert "--jobs 0" in cli(*again, "--jobs", "0").refusal and store.path(results, "toy-claim", "full").exists()
    for _ in range(2):  # set aside, and its pilot is submitted; the same command goes on
        assert cli(*again).rc == 0
        registered = store.registration_of(results, "toy-claim")
        assert registered["digests"] == changed.digests and registered["looks"] == {"a b": "then"}
    assert store.path(results, "toy-claim", "superseded").read_text() == before
    store.write(results, changed, "full", runs_of(), 61.0)
    whole, page = write_page([changed], results, workplace)
    assert "Earlier designs, superseded, are on the pages of toy-claim." in whole
    assert "- An earlier design, superseded: helps +0.600 [+0.500, +0.700]; 5 seeds, " in page
    made(metric=METRIC | {"margin": 0.3})
    assert "it was redesigned before (toy-claim.superseded.json), and a claim is once" in cli(*again).refusal


def test_a_claim_whose_pilot_alone_ran_is_registered_again(made: Made, cli: Cli, results: Path) -> None:
    store.write_registered(results, made(), registration.register(made()) | {"looks": {"a b": "then"}})
    changed = made(metric=METRIC | {"margin": 0.2})
    plain = ("claims", "run", "toy-claim.yaml", "--results", results, "--trust", "tests.toys")
    assert "registered with another rule; --redesign registers the claim again" in cli(*plain).err
    assert cli(*plain, "--redesign", "--slurm", "--time 9 --dry-run").rc == 0
    registered = store.registration_of(results, changed.name)
    assert registered["digests"] == changed.digests and registered["looks"] == {"a b": "then"}
    store.write_registered(results, made(), registered | {"opened": "then"})
    with pytest.raises(Refusal, match="it opened the lock-box, which a claim does once: its row is final"):
        store.supersede(results, made())
    assert store.openings(results) == 1


@pytest.fixture
def git(workplace: Path) -> Git:
    """``git("commit", ...)`` in the working folder, which is a checkout of its own."""

    def call(*words: str) -> str:
        who = ("-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false")
        command = ["git", *who, *words]
        return subprocess.run(command, cwd=workplace, capture_output=True, text=True, check=True).stdout.strip()

    call("init", "--quiet")
    call("commit", "--quiet", "--allow-empty", "-m", "the first")
    return call


def test_a_claim_is_registered_by_a_commit(
    made: Made, cli: Cli, git: Git, results: Path, workplace: Path, monkeypatch: Patch
) -> None:
    def command() -> Result:
        asked = ("--slurm", "--time 9 --dry-run", "--results", results, "--trust", "tests.toys")
        return cli("claims", "run", "toy-claim.yaml", *asked)

    made()
    (workplace / "aside.txt").write_text("no part of the claim")
    assert "not committed: toy-claim.yaml, toy.yaml; a claim is registered by a commit" in command().err
    git("add", "toy-claim.yaml", "toy.yaml")
    git("commit", "--quiet", "-m", "a claim")
    toy = (workplace / "toy.yaml").read_text()
    (workplace / "toy.yaml").write_text(f"{toy}  max_steps: 3\n")
    refused = command()
    assert refused.rc == 2 and "claims toy-claim: not committed: toy.yaml; " in refused.err
    assert not list(results.iterdir()) and not (workplace / "runs").exists()
    (workplace / "toy.yaml").write_text(toy)
    claim = made(note="another line")
    assert "not committed: toy-claim.yaml; " in command().err
    git("commit", "--quiet", "-a", "-m", "a note")
    assert command().rc == 0
    registered = store.registration_of(results, claim.name)
    assert (registered["commit"], registered["digests"]) == (git("rev-parse", "HEAD"), claim.digests)
    assert registration.exploratory(claim, registered) is None
    assert registration.exploratory(made(metric=METRIC | {"margin": 0.2}), registered) == "registered with another rule"
    assert registration.exploratory(made(exploratory="seen"), registered) == "seen"
    monkeypatch.setattr(registration, "PACKAGE", workplace)
    monkeypatch.setattr(registration, "code", lambda _: {"hinge.py": "the digest of what a class imports"})
    (workplace / "hinge.py").touch()
    assert "hinge.py" in registration.find_uncommitted_files(claim)


def test_outside_of_a_checkout_a_claim_is_exploratory(made: Made) -> None:
    claim = made()
    registered = registration.register(claim)
    assert registered["commit"] is None and set(registered) == {"digests", "commit", "time", "code"}
    assert registration.exploratory(claim, registered) == "it was registered outside of a checkout"
    assert registration.exploratory(claim, {}) == "it was not registered before it ran"


def test_the_code_of_a_claim_is_what_its_classes_import() -> None:
    claim = spec.load("structure-clip")
    registered = {"code": registration.code(claim)}
    assert "modules/losses/hinge.py" in registered["code"]
    registered["code"] |= {"modules/losses/hinge.py": "another", "modules/gone.py": "one that is not there now"}
    assert registration.list_changed_files(registered, claim) == ["modules/gone.py", "modules/losses/hinge.py"]


def test_a_deleted_result_is_missed(made: Made, cli: Cli, results: Path, workplace: Path, monkeypatch: Patch) -> None:
    claim = made()
    store.write_registered(results, claim, registration.register(claim) | {"time": "2026-12-01T10:00:00+00:00"})
    monkeypatch.setattr(spec, "names", lambda: ["toy-claim.yaml"])
    monkeypatch.setattr(comparison, "names", list)
    missing = "toy-claim (registered 2026-12-01; its result is missing)"
    assert f"without a result: {missing}" in cli("claims", "table", "--results", results).err
    assert f"Without a result: {missing}." in (workplace / "CLAIMS.md").read_text()
    store.write(results, claim, "full", runs_of(), 61.0)
    assert "result" not in cli("claims", "table", "--results", results).err
    assert "Without a result" not in (workplace / "CLAIMS.md").read_text()
    store.write(results, made(metric=METRIC | {"margin": 0.2}), "full", runs_of(), 61.0)
    made()
    assert "toy-claim (its result is of another design)" in cli("claims", "table", "--results", results).err


def test_the_row_the_page_and_the_list_have_what_is_stored(made: Made, results: Path, workplace: Path) -> None:
    also = [{"metric": "test/gap", "arm": "method", "at_most": 0.01}]
    claim = made(arms=ARMS | {"small": None, "best": None}, simple="small", no_simple=None, oracle="best", also=also)
    assert summary(claim, results)["effect"] is None
    assert table.write([claim], results, workplace / "CLAIMS.md") == ["toy-claim (not run yet)"]
    runs = runs_of()
    for arm, gain in (("small", 0.1), ("best", 0.8)):
        runs[arm] = {seed: {"test/gap": 1 - gain, "steps": 8, "train_flops": 1e9} for seed in range(5)}
    store.write(results, claim, "full", runs, 60.0, outcome={"ended": "5 needed by the pilot"})
    looks = {"looks": {"a b": "then", "c d": "now"}, "commit": "0123456789abcdef"}
    store.write_registered(results, claim, registration.register(claim) | looks)
    found = summary(claim, results)
    assert (found["effect"], found["seed"], found["seconds"], found["seeds"]) == (HELPS, 99, 60.0, 5)
    assert found["over_simple"][0] == pytest.approx(0.5, abs=ulps(8, F64)) and found["exploratory"] is None
    whole, page = write_page([claim], results, workplace)
    cores = store.machine()["cores"]
    cells = f"**helps** +0.600 [+0.502, +0.698] | 0.1 | +0.500 [+0.402, +0.598] | +0.000 | 5 of 9 |  | {cores} |"
    assert f"| [toy-claim](docs/claims/toy-claim.md), a planted effect | {cells}" in whole
    for line in (
        "**helps**: 5 needed by the pilot.",
        "- The placebo lacks one component: that the towers learn.",
        "commit 0123456789ab; its pilot was looked at 2 times.",
        "- Over the placebo: +0.600 [+0.496, +0.704]. The placebo over the baseline: +0.000 [-0.009, +0.009].",
        "of which it is 75%.",
        "| test/gap | 1.000 ± 0.000 | 0.400 ± 0.079 | 1.000 ± 0.008 | 0.900 ± 0.000 | 0.200 ± 0.000 |",
        "| test/gap of method <= 0.01 | 0.4 | **not met** |",
    ):
        assert line in page, line
    figure, overview = ((workplace / f"docs/claims/{name}.svg").read_text() for name in ("toy-claim", "overview"))
    assert "<title>toy-claim, over placebo: +0.600 [+0.496, +0.704]</title>" in overview
    assert figure.count("<title>") == 25 and "<title>sham, seed 2: 1.01</title>" in figure


RESULTS = spec.folder() / "results"


@pytest.fixture(scope="module")
def found() -> dict[str, table.Verdict]:
    """The verdict of each claim that ships with one."""
    return {c.name: one for c in map(spec.load, spec.names()) if (one := table.verdict(c, RESULTS)) is not None}


def test_what_ships_is_what_is_stored(found: dict[str, table.Verdict], workplace: Path) -> None:
    """A claim has a result of the very arms and rule that ship, or none at all, and the pages are made of these."""
    claims = [spec.load(name) for name in spec.names()]
    for claim in claims:
        pilot, full = (store.read(RESULTS, claim.name, budget) for budget in BUDGETS)
        assert full is None or claim.name in found, f"{claim.name}: its result is of another design"
        assert pilot is None or not pilot["runs"] or store.is_of_design(pilot, claim), claim.name
    for name, one in found.items():
        assert one.stored["effect"] == one.word and (one.judgement is not None) == bool(one.stored["runs"]), name
    without = table.write(claims, RESULTS, workplace / "CLAIMS.md", [comparison.load(n) for n in comparison.names()])
    assert all("not run yet" in line for line in without), without
    pages = sorted(file.relative_to(workplace) for file in workplace.glob("docs/claims/*.md"))
    for file in (Path("CLAIMS.md"), *pages):
        assert (workplace / file).read_text() == (ROOT / file).read_text(), f"{file}: descant claims table"
    assert pages == sorted(file.relative_to(ROOT) for file in ROOT.glob("docs/claims/*.md")), "pages without a result"
    # the layout of a figure depends on the version of matplotlib, its points do not
    for name in (name for name, one in found.items() if one.judgement is not None):
        figures = [(folder / f"docs/claims/{name}.svg").read_text() for folder in (workplace, ROOT)]
        points, stored_points = (re.findall("<title>(.*)</title>", figure) for figure in figures)
        assert points == stored_points and len(points) >= 6, f"{name}: descant claims table"


def test_a_row_and_its_page_have_one_word_and_whatever_belongs_to_it(found: dict[str, table.Verdict]) -> None:
    whole = (ROOT / "CLAIMS.md").read_text(encoding="utf-8")
    assert len(whole.splitlines()) <= 150
    rows = re.findall(r"^\| \[(.+?)\]\(docs/claims/\1\.md\).*? \| \*\*(.+?)\*\*.*\| (\d+) of (\d+|\?) \|", whole, re.M)
    assert sorted(name for name, *_ in rows) == sorted(found)
    for name, word, seeds, needed in rows:
        page = (ROOT / f"docs/claims/{name}.md").read_text(encoding="utf-8")
        bold = re.findall(r"\*\*(.+?)\*\*", page)
        assert word in WORDS and set(bold) - {"not met", "none"} == {word}, name
        assert re.search(rf"^\*\*{word}\*\*: \S.+\.$", page, re.M), f"{name}: it has no reason why it ended"
        assert (int(seeds) > 0) == (found[name].judgement is not None) and (needed != "?" or seeds == "0"), name
        for line in (r"The placebo lacks one component: \S.+\.", r"A margin is \S+ \S.+: \S.+\."):
            assert re.search(rf"^- {line}$", page, re.M), f"{name}: {line}"
        assert re.search(r"^- The simplest alternative: (the arm `[\w.+=-]+`|none: \S).*\.$", page, re.M), name


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["ron"], "claims ron: list, plan, tune, run, table or verify; nearest: run"),
        (["tune", "toy-claim.yaml"], "no arm has settings to choose from"),
        (["run", "nothing-such"], "claims nothing-such: no such claim"),
        (["run", "toy-claim.yaml", "--ablations"], "no arm beside baseline, method, sham"),
        (["run"], "claims run: the following arguments are required: name"),
    ],
)
def test_wrong_requests(cli: Cli, made: Made, workplace: Path, args: list[str], says: str) -> None:
    made()
    assert says in cli("claims", *args, "--results", workplace / "results").refusal
    assert not (workplace / "runs").exists()


def test_an_array_an_arm_is_submitted_after_what_comes_before(cli: Cli, made: Made, workplace: Path) -> None:
    before = {"before": {"experiment": "toy.yaml"}, "budget": {"equal": "steps"}}
    asked = ("--budget", "pilot", "--slurm", "--time 9 --dry-run", "--trust", "tests.toys")

    def submitted(name: str, **changes: Any) -> list[str]:
        made(**changes)
        result = cli("claims", "run", "toy-claim.yaml", *asked, "--results", workplace / name)
        assert result.rc == 0, result.err
        return [line for line in result.out.splitlines() if line.startswith("#SBATCH --array")]

    assert submitted("a") == ["#SBATCH --array=0-2"] * 3  # an arm each, a task a seed
    assert submitted("b", **before) == ["#SBATCH --array=0-2"]
    home = run.Place(spec.load("toy-claim.yaml"), "pilot", workplace / "runs").home("before")
    for number, seed in enumerate((100, 101, 102), 1):
        put_run(home / f"run/{number:03d}", seed=seed)
    assert submitted("b", **before) == ["#SBATCH --array=0-0"] * 9


def test_a_plan_counts_what_is_missing_and_what_it_takes(made: Made, cli: Cli, results: Path, workplace: Path) -> None:
    def plan() -> list[str]:
        out = cli("claims", "plan", "toy-claim.yaml", "--results", results).out
        return [" ".join(line.split()) for line in out.splitlines()]

    claim = made(**STAGES, signal=SIGNAL)
    unknown = "unknown: none of its runs is stored"
    parts = [f"{name} {n} of {n} runs {unknown}" for name, n in (("signal", 2), ("pilot", 12), ("effect", 20))]
    total = "total: at least 0 core-minutes, 0.0 core-hours"
    assert plan() == [f"toy-claim: 34 runs to train, {unknown}", *parts, total]
    runs = {arm: {seed: {"test/gap": 1.0, "steps": 8.0} for seed in (100, 101)} for arm in ("baseline", "best")}
    store.write(results, claim, "pilot", runs, 60.0)
    cores = store.machine()["cores"]
    assert plan()[3] == f"effect 20 of 20 runs {20 * cores / 4:.1f} core-minutes"
    put_run(run.Place(claim, "full", workplace / "runs").home("method") / "method-0/001")
    assert plan()[3].startswith("effect 19 of 20 runs")
    store.write(results, claim, "full", {**runs_of(), "best": runs_of()["method"]}, 60.0)
    assert plan() == ["toy-claim: 0 runs to train, 0.0 core-minutes", "total: 0 core-minutes, 0.0 core-hours"]
    claim = made(**STAGES | {"arms": STAGES["arms"] | {"small": None}}, signal=SIGNAL, simple="small", no_simple=None)
    assert plan()[1].startswith("new arms 5 of 5 runs"), "it has its result, and lacks an arm"
    results.joinpath("toy-claim.json").unlink()
    made(**STAGES, before={"experiment": "toy.yaml"}, signal=SIGNAL | {"arm": "before"})
    assert plan()[1].startswith("signal 2 of 2 runs"), "what comes before, and the baseline"


#: The oracle of the toy learns at the method's rate; the sham is as far from the baseline as its rate is from 0.
STAGES: dict[str, Any] = {
    "arms": ARMS | {"best": {"options": {"model.optimizer.init_args.weight_decay": 0.0}}, "more": None},
    "oracle": "best",
}
SIGNAL = {"metric": "test/gap", "arm": "best", "against": "baseline", "at_most": -0.001}


@pytest.fixture
def planted(made: Made, results: Path, cli: Cli, monkeypatch: Patch) -> Iterator[Cli]:
    """``planted("run", NAME)``: a claim's command; its runs are processes of their own, and find the toys."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    fork_runs(monkeypatch)
    made()
    yield lambda *args: cli("claims", *args, "--results", results, "--trust", "tests.toys")


@pytest.mark.slow
def test_the_embeddings_of_the_run_before_are_written_once(made: Made, workplace: Path, monkeypatch: Patch) -> None:
    fork_runs(monkeypatch)
    tiny = {word.removeprefix("--"): x for word, x in zip(EMOJI[4::2], EMOJI[5::2], strict=True) if word != "--test"}
    before = {"experiment": "contrastive/emoji", "configs": ["on/tiny"], "options": tiny}
    place = run.Place(made(before={**before, "predict": {"data.vendors": ["openmoji"]}}), "full", workplace / "runs")
    assert run.run(place, ["before"], [0], 1) == 0
    home = place.home("before")
    (embeddings,) = home.glob("run-0/001/predict-*/embeddings-train.parquet")
    rows = pq.read_table(embeddings)
    assert {"group", "subgroup", "z_image", "z_text"} < {*rows.schema.names}
    assert {n % len(VENDORS) for n in rows["index"].to_pylist()} == {VENDORS.index("openmoji")}
    stamp = (home / "run-0/001/metrics.json").stat().st_mtime_ns
    embeddings.unlink()  # as a killed command leaves it
    assert run.run(place, ["before"], [0], 1) == 0
    assert len([*home.glob("run-0/001/predict-*/embeddings-train.parquet")]) == 1
    assert (home / "run-0/001/metrics.json").stat().st_mtime_ns == stamp, "trained once"
    other = made(before={**before, "predict": {"data.vendors": ["none"]}})
    with pytest.raises(Refusal, match=r"before, seed 0: .*'none' is not one of"):
        run.run(run.Place(other, "full", workplace / "runs"), ["before"], [0], 1)


@pytest.mark.slow
@by_turns(0, 3)
def test_a_planted_effect_helps_with_the_seeds_it_needs(
    planted: Cli, made: Made, results: Path, workplace: Path
) -> None:
    claim = made(**STAGES, signal=SIGNAL)
    pilot = planted("run", "toy-claim.yaml", "--budget", "pilot")
    assert (pilot.rc, pilot.out) == (0, "") and "pilot: the oracle gains +" in pilot.err, pilot.err
    whole = planted("run", "toy-claim.yaml")
    stored = store.read(results, "toy-claim", "full")
    assert whole.rc == 0 and stored is not None, whole.err
    assert stored["needed"] >= 5 and f"pilot: {stored['needed']} seeds show a gain of 0.1 of the gap" in whole.err
    seeds = set(range(stored["needed"]))
    assert (stored["effect"], stored["ended"]) == (HELPS, f"{stored['needed']} needed by the pilot")
    assert {arm: set(of) for arm, of in stored["runs"].items()} == dict.fromkeys(claim.judged_arms, seeds)
    assert stored["runs"]["method"][2]["steps"] == 8 and stored["seconds"] > 1
    again = planted("run", "toy-claim.yaml")
    assert again.out == whole.out and "runs," not in again.err, "nothing is trained again"
    verified = planted("verify", "toy-claim.yaml")
    assert (verified.rc, verified.out) == (0, "verified\n"), verified.err
    ablations = planted("run", "toy-claim.yaml", "--ablations")
    assert ablations.rc == 0 and ablations.out.startswith("baseline: test/gap"), ablations.err
    # a simple alternative is added to the result, and no other arm is trained again
    simple = {"arms": STAGES["arms"] | {"small": {"options": {RATE: 0.003}}}, "simple": "small", "no_simple": None}
    claim = made(**STAGES | simple, signal=SIGNAL)
    added = planted("run", "toy-claim.yaml")
    assert f"{len(seeds)} runs, 0 done" in added.err and "over small, which is simpler: +" in added.out, added.err
    assert set(store.registration_of(results, "toy-claim")["added"]) == {"small"}
    _, page = write_page([claim], results, workplace)
    assert "- Over the simple alternative: +" in page and "Other arms, seed 0 alone" in page
    # another rule is another design, whose pilot is looked at again
    claim = made(**STAGES | simple, signal=SIGNAL, metric=METRIC | {"margin": 0.15})
    assert "of another design" in planted("run", "toy-claim.yaml").refusal
    redesigned = planted("run", "toy-claim.yaml", "--redesign")
    assert redesigned.rc == 0 and HELPS in redesigned.out, redesigned.err
    _, page = write_page([claim], results, workplace)
    assert len(store.registration_of(results, "toy-claim")["looks"]) == 2 and "An earlier design, superseded" in page
    edit = {"method": {"100": {"test/gap": 0.5}}}
    alter_stored(results, lambda content: (content.pop("checksum"), content["runs"].update(edit)), "pilot")
    differ = planted("verify", "toy-claim.yaml")
    assert differ.rc == 1 and ": method, seed 100: test/gap 0.2126, stored 0.5" in differ.out


@pytest.mark.slow
@by_turns(1, 3)
def test_a_claim_ends_without_room_signal_or_seeds(planted: Cli, made: Made, results: Path, workplace: Path) -> None:
    def ends(word: str, why: str, **changes: Any) -> str:
        for file in results.glob("toy-claim*"):
            file.unlink()
        claim = made(**STAGES | changes)
        done = planted("run", "toy-claim.yaml")
        assert done.rc == 0 and re.fullmatch(rf"toy-claim: {word}: {why}\n", done.out), (done.out, done.err)
        whole, page = write_page([claim], results, workplace)
        found = summary(claim, results)
        assert (found["effect"], found["ended"]) == (word, done.out.strip().split(": ", 2)[2])
        assert f"| **{word}** |" in whole and f"\n**{word}**: {found['ended']}.\n" in page
        assert planted("run", "toy-claim.yaml").out == done.out
        return done.err

    frozen = STAGES["arms"] | {"best": {"options": {RATE: 0.0, "model.optimizer.init_args.weight_decay": 0.0}}}
    ends(NO_ROOM, "by 3 seeds of the oracle", arms=frozen)
    place = run.Place(spec.load("toy-claim.yaml"), "full", workplace / "runs")
    assert len(place.missing(list(place.claim.judged_arms), range(5))) == 20, "nothing is trained after the pilot"
    err = ends(NOT_TESTABLE, r"it needs \d+ seeds, and the most is 20", metric=METRIC | {"margin": 0.001})
    assert "9 done" in err, "only the other oracle is trained"
    narrow = ends(NOT_TESTABLE, r"it needs \d+ seeds, and its YAML asks for 5", metric=METRIC | {"margin": 0.03})
    assert "pilot: the oracle gains +" in narrow and not list(place.home("method").glob("method-*"))
    missed = ends(NOT_TESTABLE, r"its signal is -0\.\d+", signal=SIGNAL | {"at_most": -100})
    assert "signal: test/gap of best less baseline <= -100" in missed and "pilot: " not in missed


@pytest.mark.slow
@by_turns(2, 3)
def test_settings_are_tuned_then_tried(planted: Cli, made: Made, results: Path, workplace: Path) -> None:
    arms = {name: arm for name, arm in TUNED["arms"].items() if name != "alone"}
    claim = made(arms=arms | {"sham": ARMS["sham"]}, tuning=TUNED["tuning"])
    assert "no settings were chosen" in planted("run", "toy-claim.yaml", "--budget", "pilot").refusal
    tuned = planted("tune", "toy-claim.yaml")
    assert tuned.rc == 0 and "method: 0.01 (val/gap: 1e-09 " in tuned.out, (tuned.out, tuned.err)
    found = planted("run", "toy-claim.yaml")
    assert found.rc == 0 and "toy-claim: helps (5 seeds: " in found.out, found.err
    _, page = write_page([claim], results, workplace)
    assert "\nSettings, chosen by val/gap of validation, seeds [200, 201]: baseline " in page
    assert "method 0.01 of [" in page


@pytest.mark.slow
def test_a_run_that_fails_is_named_with_its_last_line(planted: Cli, made: Made) -> None:
    made(arms=ARMS | {"sham": {"options": {"model.explode": "value"}}})
    line = planted("run", "toy-claim.yaml", "--budget", "pilot").err.splitlines()[-1]
    assert all(part in line for part in ("claims toy-claim: sham, seed 100: ", "no modality 'sound'", "log: ")), line
