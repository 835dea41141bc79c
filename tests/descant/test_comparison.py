"""Comparisons of claims: what their file may be, the word of each rule, the pages, and real runs."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from descant.claims import comparison, spec, store, table
from descant.claims.effect import HELPS, HURTS, NO_ROOM, NONE, SIMPLER, UNCLEAR, WORSE, effect
from descant.cli.errors import Refusal
from tests.conftest import Result
from tests.descant.test_claims import CONTENT, RATE, ROOT, STAGES
from tests.forked import fork_runs
from tests.tolerance import F64, ulps

RULES: dict[str, Any] = {
    "random": {"options": {RATE: 1e-9}},
    "learns": {"config": {"model": {"optimizer": {"init_args": {"lr": 0.05}}}}},
    "sits": {"options": {RATE: 0.0}},
}
TUNED: dict[str, Any] = {"tuned": {"options": {RATE: "SETTING"}, "settings": [0.0, 0.05]}}
BEGUN: dict[str, Any] = {"options": {"model.paths": {"a": "ARM/learn"}}}
OF: dict[str, Any] = {"title": "rates", "claims": ["toy-claim.yaml"], "placebo": "random", "arms": RULES}
OF |= {"answer": "Take the one that learns."}
Written = Callable[..., comparison.Comparison]
Cli = Callable[..., Result]
Patch = pytest.MonkeyPatch
SEEDS = range(5)


@pytest.fixture
def results(workplace: Path) -> Path:
    folder = workplace / "results"
    folder.mkdir()
    return folder


@pytest.fixture
def written(workplace: Path, monkeypatch: Patch) -> Written:
    """``written(claims=[...])``: the comparison ``rates`` with some keys replaced; None takes a key away."""
    monkeypatch.setattr(comparison, "folder", lambda: workplace / "comparisons")
    (workplace / "comparisons").mkdir()
    (workplace / "toy-claim.yaml").write_text(yaml.safe_dump(CONTENT | STAGES))

    def write(**changes: Any) -> comparison.Comparison:
        content = {key: value for key, value in (OF | changes).items() if value is not None}
        (workplace / "comparisons" / "rates.yaml").write_text(yaml.safe_dump(content))
        return comparison.load("rates")

    return write


def runs_of(**gain: float | list[float]) -> dict[str, dict[int, dict[str, float]]]:
    """Of five seeds whose ``test/gap`` (lower is better) has these gains over a baseline of 1, by seed or nearly so."""
    made: dict[str, dict[int, dict[str, float]]] = {}
    for arm, x in ({"baseline": 0.0} | gain).items():
        gain_S = x if isinstance(x, list) else [x + 1e-4 * seed * bool(x) for seed in SEEDS]
        made[arm] = {s: {"test/gap": 1 - gain_S[s], "steps": 8, "train_seconds": 2 + s * len(arm)} for s in SEEDS}
    return made


def put(of: comparison.Comparison, results: Path, **gain: float | list[float]) -> dict[str, Any]:
    """Results of the claim and of the comparison, as if they had been run; returns those of the comparison."""
    store.write(results, of.claims[0], "full", runs_of(method=0.3, sham=0.0, best=0.4), 60.0)
    store.write(results, of.settings[0], of.name, runs_of(best=0.4, **gain), 90.0, (), {"items": {}})
    return store.read(results, of.claims[0].name, of.name) or {}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *(({key: None}, f"rates.yaml: {key} is missing") for key in ("claims", "placebo", "answer", "title")),
        *(({key: ["x"]}, f"rates.yaml: {key}: no such key") for key in ("rules", "ranks", "extension")),
        ({"placebo": "randon"}, "rates.yaml: placebo randon: one of its arms; nearest: random"),
        ({"simple": "sit"}, "rates.yaml: simple sit: no arm of the comparison or of claims toy-claim; nearest: sits"),
        ({"claims": ["toy"]}, "claims toy: no such claim"),
        ({"own": ["mor"]}, "rates.yaml: own mor: claims toy-claim has no such arm; nearest: more"),
        ({"arms": RULES | {"best": None}}, r"rates.yaml: arms.best: claims toy-claim has an arm of that name"),
        ({"arms": RULES | {"random": {"optionz": {}}}}, "rates.yaml: arms.random: optionz: no such key"),
        ({"arms": RULES | TUNED}, "rates.yaml: arms.tuned: settings need `tuning`, which chooses one of them"),
        ({"tuning": {"seeds": [50]}}, "rates.yaml: tuning: no arm has settings"),
        ({"arms": RULES | TUNED, "tuning": {"seeds": 50}}, "rates.yaml: tuning.seeds 50: a list of seeds is expected"),
        ({"arms": RULES | {"sits": BEGUN}}, "rates.yaml: arms.sits: no arm 'learn' whose run .*; nearest: learns"),
    ],
)
def test_what_is_wrong_in_a_comparison_is_named(written: Written, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(Refusal, match=message):
        written(**changes)


def test_a_rule_is_judged_as_a_method_is(written: Written, results: Path, workplace: Path) -> None:
    of = written()
    file = put(of, results, random=0.001, learns=0.15, sits=-0.12)
    found = comparison.effects(of, of.settings[0], file)
    gains = [0.15 + 1e-4 * seed for seed in SEEDS], [0.001 + 1e-4 * seed for seed in SEEDS]
    mean = effect(*gains, 0.1).over_placebo.mean
    assert found["learns"].over_placebo.mean == pytest.approx(mean, abs=ulps(16, F64))
    assert (found["learns"].word, found["sits"].word) == (HELPS, HURTS)
    table.write([*of.claims], results, workplace / "CLAIMS.md", [of])
    short, page = (workplace / file for file in ("CLAIMS.md", "docs/claims/rates.md"))
    assert (
        "| word | toy-claim |\n|---|---|\n| placebo | random +0.001 |\n| helps | learns +0.150 |" in short.read_text()
    )
    assert "rates: [the whole table](docs/claims/rates.md).\n\nTake the one that learns.\n" in short.read_text()
    assert "| learns | **helps** +0.150 [" in page.read_text() and "| random | **placebo** +0.001" in page.read_text()
    assert "learns, over placebo" in (workplace / "docs/claims/rates.svg").read_text()
    file = put(of, results, random=0.1, learns=0.15, sits=0.0)
    assert {one.word for one in comparison.effects(of, of.settings[0], file).values()} == {"placebo invalid"}
    assert "so every row is placebo invalid" in comparison.section(of, results)


#: A mean of 0.1 whose p is 0.026: above 0 alone, and not among four or more.
WEAK = [0.02, 0.06, 0.1, 0.14, 0.18]


def test_words_are_corrected_for_the_number_of_rules_that_differ(written: Written, results: Path) -> None:
    def words(**gain: float | list[float]) -> dict[str, str]:
        of = written(arms={name: {"options": {RATE: n * 1e-9}} for n, name in enumerate(gain)})
        found = comparison.effects(of, of.settings[0], put(of, results, **gain))
        return {rule: one.word for rule, one in found.items() if rule != "random"}

    nulls = {f"null-{n}": [n * 1e-4, -1e-4, 1e-4, -n * 1e-4, 0.0] for n in range(1, 4)}
    assert words(random=0.0, weak=WEAK) == {"weak": HELPS}
    assert words(random=0.0, weak=WEAK, **nulls) == dict.fromkeys(nulls, NONE) | {"weak": UNCLEAR}
    assert words(random=0.0, weak=WEAK, sure=0.2, **nulls)["sure"] == HELPS
    assert words(random=0.0, weak=WEAK, twin=WEAK) == {"weak": HELPS, "twin": HELPS}, "two that are one are one"
    of = written(arms=RULES | {"twin": {"options": {RATE: 0.051}}})
    put(of, results, random=0.0, learns=0.15, twin=0.15, sits=-0.12)
    assert "| learns, twin | **helps** +0.150" in comparison.section(of, results)
    assert "| helps | learns = twin +0.150 |" in comparison.summary(of, results)
    near = [0.001, -0.002, 0.0, 0.002, -0.001]
    assert words(random=0.05, near=near, **nulls)["near"] == WORSE, "by its difference from the placebo"


def test_a_stored_rule_stands_and_one_without_runs_is_named(written: Written, results: Path) -> None:
    of = written()
    put(of, results, random=0.0, learns=0.2, sits=0.0)
    assert comparison.lacking_arms(of, of.settings[0], results) == ()
    of = written(own=["more"], simple="more", arms=RULES | {"sits": {"options": {RATE: 1e-12}}})
    assert of.rules[-1] == "more" and comparison.lacking_arms(of, of.settings[0], results) == ("more", "sits")
    stored = comparison.read_stored(of, of.settings[0], results)
    assert stored is not None
    assert comparison.effects(of, of.settings[0], stored)["learns"].word == UNCLEAR, "until the simple way has run"
    assert "toy-claim: not run yet: sits, more." in comparison.section(of, results)


def test_the_simple_alternative_is_a_rule_or_an_arm_of_the_claim(written: Written, results: Path) -> None:
    for simple, gain in (("sits", {"sits": 0.2}), ("more", {"more": 0.2, "sits": 0.0})):
        of = written(simple=simple)
        found = comparison.effects(of, of.settings[0], put(of, results, random=0.001, learns=0.15, **gain))
        assert found["learns"].word == SIMPLER and "more" not in found
    assert found["learns"].over_simple is not None and found["random"].over_simple is None


def test_without_room_no_rule_is_run(written: Written, results: Path, workplace: Path, cli: Cli) -> None:
    of = written()
    store.write(results, of.claims[0], "full", {}, 60.0, (), {"effect": NO_ROOM})
    shown = cli("claims", "run", "rates", "--results", results)
    assert (
        shown.rc == 0
        and "toy-claim: no room, so its rules are not run" in shown.err
        and not (workplace / "runs").exists()
    )
    assert "toy-claim: no room, so its rules were not run." in shown.out


def test_it_is_registered_before_its_first_run(written: Written, results: Path, workplace: Path) -> None:
    of = written()
    assert comparison.execute(of, results, workplace / "runs", trust=["tests.toys"], slurm="--time 9 --dry-run") == 0
    registered = store.registration_in(results / "toy-claim.rates-registered.json")
    assert registered["digests"] == of.settings[0].digests and not (results / "toy-claim.rates.json").exists()


def test_a_changed_arm_overwrites_nothing(written: Written, results: Path, workplace: Path) -> None:
    put(written(), results, random=0.0, learns=0.15, sits=0.0)
    changed = comparison.section(written(arms=RULES | {"sits": {"options": {RATE: 1e-8}}}), results)
    assert "| learns | **helps**" in changed and "| sits |" not in changed
    other = written(arms=RULES | {"random": {"options": {RATE: 1e-8}}})
    with pytest.raises(Refusal, match="of another design of the claim"):
        comparison.execute(other, results, workplace / "runs")
    assert "toy-claim: not run yet." in comparison.section(other, results)


def test_earlier_tables_are_linked(written: Written, results: Path, workplace: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr(spec, "folder", lambda: workplace)
    of = written(claims=["toy-claim"])
    put(of, results, random=0.0, learns=0.15, sits=0.0)
    (results / "toy-claim.rates.json").rename(results / "toy-claim.rates-superseded.json")
    table.write([*of.claims], results, workplace / "CLAIMS.md", [of])
    link = "another setting: [test/gap of toy-claim](rates-toy-claim.md)."
    assert link in (workplace / "docs/claims/rates.md").read_text()
    assert "| learns | +0.150 [+0.150, +0.150] |" in (workplace / "docs/claims/rates-toy-claim.md").read_text()


@pytest.mark.parametrize("words", [["--redesign"], ["--ablations"], ["--budget", "pilot"]])
def test_a_comparison_has_no_stages(cli: Cli, words: list[str]) -> None:
    refused = cli("claims", "run", "harmonizers", *words).refusal
    assert f"{' '.join(words)}: claims harmonizers is a comparison" in refused


@pytest.mark.parametrize("name", comparison.names())
def test_what_ships_has_a_neutral_placebo_an_answer_and_a_row_a_rule(name: str) -> None:
    of, folder = comparison.load(name), spec.folder() / "results"
    page = (ROOT / f"docs/claims/{name}.md").read_text(encoding="utf-8")
    for claim, setting in zip(of.claims, of.settings, strict=True):
        kept = comparison.read_stored(of, setting, folder)
        if kept is None:
            assert re.search(rf"^{claim.name}: (not run yet|{NO_ROOM}, so its rules were not run)\.$", page, re.M)
            continue
        assert comparison.effects(of, setting, kept)[of.placebo].placebo_valid, f"{name}: {claim.name}"
        lacking = re.search(rf"^{claim.name}: not run yet: (.+)\.$", page, re.M)
        left = lacking[1].split(", ") if lacking else []
        assert all(rule in left or re.search(rf"^\| (.+, )?{rule}(, .+)? \| \*\*", page, re.M) for rule in of.rules)
    assert of.answer in page and of.answer in (ROOT / "CLAIMS.md").read_text(encoding="utf-8")
    superseded = {file.name.split(".")[0] for file in folder.glob(f"*.{name}-superseded.json")}
    assert all(
        f"({name}-{claim}.md)" in page and (ROOT / f"docs/claims/{name}-{claim}.md").exists() for claim in superseded
    )


def test_it_is_planned_and_listed(written: Written, results: Path, cli: Cli) -> None:
    of = written(arms=RULES | TUNED, tuning={"seeds": [50, 51]})
    unknown = cli("claims", "plan", "rates", "--results", results)
    assert unknown.rc == 0 and "rates: 34 runs to train, unknown: none of its runs is stored" in unknown.out
    store.write(results, of.claims[0], "full", runs_of(method=0.3, sham=0.0, best=0.4), 600.0)
    planned = cli("claims", "plan", "rates", "--results", results).out
    assert "toy-claim, tuning   4 of   4 runs" in planned and "toy-claim          30 of  30 runs" in planned
    assert "core-minutes" in planned.splitlines()[-1]
    assert "rates                comparison           4 arms in toy-claim" in cli("claims", "list").out


@pytest.mark.slow
def test_its_rules_are_run_in_the_setting_of_a_claim(
    written: Written, results: Path, cli: Cli, monkeypatch: Patch
) -> None:
    fork_runs(monkeypatch)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    written(arms=RULES | TUNED, tuning={"seeds": [50, 51]})
    asked = ("claims", "run", "rates", "--results", results, "--trust", "tests.toys")
    whole = cli(*asked)
    assert whole.rc == 0 and "| random, sits | **placebo** +0.000" in whole.out, (whole.out, whole.err)
    assert "| learns, tuned | **helps** +" in whole.out
    begun = re.findall(r"toy-claim: (\d+) runs, 0 done", whole.err)
    assert begun == ["15", "5", "5", "4", "5"], "what all need, then two rules, four settings and their rule"
    assert "- tuned: 0.05, by val/gap (0.0: " in whole.out, "validation chooses the one that learns"
    again = cli(*asked)
    assert again.out == whole.out and "runs," not in again.err, "nothing is trained again"
    (results / "toy-claim.rates-registered.json").unlink()
    shutil.rmtree("runs")
    written(arms=RULES | TUNED | {"late": {"options": {RATE: 1e-12}}}, tuning={"seeds": [50, 51]})
    more = cli(*asked)
    assert "5 runs, 0 done" in more.err and more.err.count("runs,") == 1, "the new arm alone, on another machine too"
    assert re.search(r"^\| .*\blate\b", more.out, re.M) and "Exploratory: it was not registered" in more.out
