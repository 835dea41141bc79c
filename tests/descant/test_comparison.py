"""Comparisons of claims: what their file may be, the effect of each rule, the page, and real runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from descant.claims import comparison, spec, store, table
from descant.claims.claim import Claim
from descant.claims.effect import HELPS, HURTS, NO_ROOM, PLACEBO, effect
from descant.claims.ranks import mean_ranks
from descant.cli.errors import Refusal
from tests.conftest import Result
from tests.descant.test_claims import CONTENT, STAGES
from tests.forked import fork_runs

RATE = "model.optimizer.init_args.lr"
RULES: dict[str, Any] = {
    "random": {"options": {RATE: 1e-9}},
    "learns": {"config": {"model": {"optimizer": {"init_args": {"lr": 0.05}}}}},
    "sits": {"options": {RATE: 0.0}},
}
TUNED: dict[str, Any] = {"tuned": {"options": {RATE: "SETTING"}, "settings": [0.0, 0.05]}}
BEGUN: dict[str, Any] = {"options": {"model.paths": {"a": "ARM/learn"}}}
OF: dict[str, Any] = {"title": "rates", "claims": ["toy-claim.yaml"], "placebo": "random", "arms": RULES}


@pytest.fixture
def results(workplace: Path) -> Path:
    folder = workplace / "results"
    folder.mkdir()
    return folder


@pytest.fixture
def written(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., comparison.Comparison]:
    """``written(claims=[...])``: the comparison ``rates`` with some keys replaced; None takes a key away."""
    monkeypatch.setattr(comparison, "folder", lambda: workplace / "comparisons")
    (workplace / "comparisons").mkdir()
    (workplace / "toy-claim.yaml").write_text(yaml.safe_dump(CONTENT | STAGES))

    def write(**changes: Any) -> comparison.Comparison:
        content = {key: value for key, value in (OF | changes).items() if value is not None}
        (workplace / "comparisons" / "rates.yaml").write_text(yaml.safe_dump(content))
        return comparison.load("rates")

    return write


def runs_of(**gain: float) -> dict[str, dict[int, dict[str, float]]]:
    """Of five seeds whose ``test/gap`` (lower is better) has these gains over a baseline of 1."""
    return {
        arm: {
            seed: {"test/gap": 1 - x - 1e-4 * seed * bool(x), "steps": 8, "train_seconds": 2 + x} for seed in range(5)
        }
        for arm, x in ({"baseline": 0.0} | gain).items()
    }


def stored(of: comparison.Comparison, results: Path, **gain: float) -> None:
    """Results of the claim and of the comparison, as if they had been run."""
    known = {"verdict": "passed", "effect": HELPS, "margin": 0.05, "headroom": 0.2}
    claim = runs_of(method=0.1, sham=0.0, best=0.2)
    store.write(results, of.claims[0], "full", claim, 60.0, (), known)
    outcome = {"margin": 0.05, "headroom": 0.2, "items": {}}
    store.write(results, of.settings[0], of.name, runs_of(best=0.2, **gain), 90.0, (), outcome)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"claims": None}, "rates.yaml: claims is missing"),
        ({"rules": {}}, "rates.yaml: rules: no such key"),
        ({"placebo": "randon"}, "rates.yaml: placebo randon: one of its arms; nearest: random"),
        ({"claims": ["toy"]}, "claims toy: no such claim"),
        ({"arms": RULES | {"best": None}}, r"rates.yaml: arms.best: claims toy-claim has an arm of that name"),
        ({"arms": RULES | {"random": {"optionz": {}}}}, "rates.yaml: arms.random: optionz: no such key"),
        ({"claims": ["plain.yaml"]}, "rates.yaml: claims plain: it has no stages"),
        ({"arms": RULES | TUNED}, "rates.yaml: arms.tuned: settings need `tuning`, which chooses one of them"),
        ({"tuning": {"seed": 50}}, "rates.yaml: tuning: no arm has settings"),
        ({"arms": RULES | TUNED, "tuning": {"seed": 0.5}}, "rates.yaml: tuning.seed 0.5: a whole number is expected"),
        ({"ranks": ["test/gaps"]}, "rates.yaml: ranks: test/gaps: no metric of claims toy-claim; nearest: test/gap"),
        ({"arms": RULES | {"sits": BEGUN}}, "rates.yaml: arms.sits: no arm 'learn' whose run .*; nearest: learns"),
    ],
)
def test_what_is_wrong_in_a_comparison_is_named(
    written: Callable[..., comparison.Comparison], workplace: Path, changes: dict[str, Any], message: str
) -> None:
    (workplace / "plain.yaml").write_text(yaml.safe_dump(CONTENT))
    with pytest.raises(Refusal, match=message):
        written(**changes)


def test_a_rule_is_judged_as_a_method_is_and_the_placebo_as_such(
    written: Callable[..., comparison.Comparison], results: Path, workplace: Path
) -> None:
    of = written()
    stored(of, results, random=0.001, learns=0.15, sits=-0.1)
    file = store.read(results, "toy-claim", "rates")
    assert file is not None
    found = comparison.effects(of, of.settings[0], file)
    gains = [0.15 + 1e-4 * seed for seed in range(5)], [0.001 + 1e-4 * seed for seed in range(5)]
    alone = effect(*gains, 0.05, 0.2)
    # sums of five numbers, which differences of ones have rounded
    assert found["learns"].over_placebo.mean == pytest.approx(alone.over_placebo.mean, abs=1e-12)
    assert {rule: one.word for rule, one in found.items()} == {"random": PLACEBO, "learns": HELPS, "sits": HURTS}
    table.write([*of.claims], results, workplace / "CLAIMS.md", [of])
    page = (workplace / "CLAIMS.md").read_text()
    assert "| learns | **helps** +0.150" in page and "| random | **placebo** +0.001" in page
    assert "of 2 that do nothing" in page and "| 1.07 |" in page and "(docs/claims/rates.svg)" in page
    assert "learns, over placebo" in (workplace / "docs/claims/rates.svg").read_text()


def test_rules_are_ranked_by_several_metrics_with_intervals_and_without_a_winner(
    written: Callable[..., comparison.Comparison], results: Path, workplace: Path
) -> None:
    of = written(ranks=["test/gap"])
    stored(of, results, random=0.5, learns=0.15, sits=0.15)
    table.write([*of.claims], results, workplace / "CLAIMS.md", [of])
    page = (workplace / "CLAIMS.md").read_text()
    assert "| arm | test/gap | mean rank |" in page and "| baseline | 1.000 ± 0.000 |  |" in page
    assert page.count("| 1.5 [1.5, 1.5] |") == 2 and "Ranks among 2 rules" in page, "equal ones share a rank"
    assert "learns, all: rank 1.5" in (workplace / "docs/claims/rates-toy-claim.svg").read_text()
    runs = {a: {s: {"m": x} for s, x in enumerate(values)} for a, values in {"a": (3, 3, 1), "b": (2, 2, 2)}.items()}
    found = mean_ranks(runs, ["a", "b"], ["m"], range(3))["b"]["m"]
    # of three seeds, b is first in one: ranks 2, 2, 1, whose interval is Student's, 5/3 -+ 4.303 sd / sqrt(3)
    assert found.mean == pytest.approx(5 / 3, abs=1e-12) and found.high - found.mean == pytest.approx(1.434, abs=1e-3)


def test_without_room_no_rule_is_run(
    written: Callable[..., comparison.Comparison],
    results: Path,
    workplace: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    of = written()
    with pytest.raises(Refusal, match="claims toy-claim has no margin yet: first descant claims run toy-claim"):
        comparison.execute(of, results, workplace / "runs")
    ended = {"verdict": NO_ROOM, "effect": NO_ROOM, "stage": 2, "margin": 0.05, "headroom": 0.01}
    store.write(results, of.claims[0], "full", {}, 60.0, (), ended)
    assert comparison.execute(of, results, workplace / "runs") == 0
    assert "| learns | no room |  |" in capsys.readouterr().out and not (workplace / "runs").exists()


def test_a_changed_comparison_overwrites_nothing(
    written: Callable[..., comparison.Comparison], results: Path, workplace: Path
) -> None:
    of = written()
    stored(of, results, random=0.0, learns=0.1, sits=0.0)
    other = written(arms=RULES | {"sits": {"options": {RATE: 1e-8}}})
    assert other.settings[0].digest != of.settings[0].digest
    with pytest.raises(Refusal, match="of configuration"):
        comparison.execute(other, results, workplace / "runs")
    assert "| sits | not run yet |" in comparison.section(other, results)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--arms", "learns"], "--arms: claims harmonizers is a comparison"),
        (["--ablations"], "--ablations: claims harmonizers is a comparison"),
        (["--budget", "pilot"], "--budget pilot: claims harmonizers is a comparison"),
        (["--jobs", "0"], "--jobs 0: at least 1"),
    ],
)
def test_wrong_requests(cli: Callable[..., Result], words: list[str], message: str) -> None:
    assert message in cli("claims", "run", "harmonizers", *words).refusal


@pytest.mark.parametrize("name", comparison.names())
def test_what_ships_is_judged_by_what_is_stored(name: str) -> None:
    of = comparison.load(name)
    for claim, setting in zip(of.claims, of.settings, strict=True):
        kept = store.of_design(spec.folder() / "results", setting, name)
        assert kept is not None, f"{name}: {claim.name} is not run"
        known = store.of_design(spec.folder() / "results", claim, "full")
        assert known is not None and (kept["margin"], kept["headroom"]) == (known["margin"], known["headroom"])
    page = (Path(__file__).parents[2] / "CLAIMS.md").read_text(encoding="utf-8")
    assert all(f"\n| {rule} | " in page for rule in of.rules)


def test_the_seeds_of_the_extension_may_be_judged_too(written: Callable[..., comparison.Comparison]) -> None:
    plain, longer = written(), written(extension=True)
    assert plain.settings[0].seeds["full"] == (0, 1, 2, 3, 4) and longer.settings[0].seeds["full"] == tuple(range(10))
    assert longer.settings[0].digest != plain.settings[0].digest


def test_it_is_planned_and_listed(
    written: Callable[..., comparison.Comparison], results: Path, cli: Callable[..., Result]
) -> None:
    of = written(arms=RULES | TUNED, tuning={"seed": 50})
    unknown = cli("claims", "plan", "rates", "--results", results)
    assert unknown.rc == 0 and "rates: 32 runs to train, unknown: none of its runs is stored" in unknown.out
    known = {"verdict": "passed", "effect": HELPS, "margin": 0.001, "headroom": 0.2}
    store.write(results, of.claims[0], "full", runs_of(method=0.1, sham=0.0, best=0.2), 600.0, (), known)
    planned = cli("claims", "plan", "rates", "--results", results).out
    assert "toy-claim, tuning   2 of   2 runs" in planned and "toy-claim          30 of  30 runs" in planned
    assert "core-minutes" in planned.splitlines()[-1]
    assert "rates                comparison           4 arms in toy-claim" in cli("claims", "list").out


@pytest.mark.slow
def test_its_rules_are_run_in_the_setting_of_a_claim(
    written: Callable[..., comparison.Comparison],
    results: Path,
    cli: Callable[..., Result],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fork_runs(monkeypatch)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    of: Claim = written(arms=RULES | TUNED, tuning={"seed": 50}).claims[0]
    asked = ("claims", "run", "rates", "--results", results, "--trust", "tests.toys")
    assert "first descant claims run toy-claim" in cli(*asked).refusal
    known = {"verdict": "passed", "effect": HELPS, "margin": 0.001, "headroom": 0.2}
    store.write(results, of, "full", runs_of(method=0.1, sham=0.0, best=0.2), 60.0, (), known)
    whole = cli(*asked)
    assert whole.rc == 0 and "| sits | **no effect** +0.000" in whole.out, (whole.out, whole.err)
    assert "| learns | **helps** +" in whole.out and "30 runs, 0 done" in whole.err
    assert "| tuned | **helps** +" in whole.out and "2 runs, 0 done" in whole.err
    assert "- tuned: 0.05, by val/gap of one run each (0.0: " in whole.out, "validation chooses the one that learns"
    again = cli(*asked)
    assert again.out == whole.out and "runs," not in again.err, "nothing is trained again"
