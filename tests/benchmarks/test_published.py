"""Published runs beside their plans: settings are those of the file, and rows say what they are held against."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import __main__, published
from descant.plan.hardware import load
from tests.tolerance import F64, ulps

RUNS = published.runs()


def test_registered() -> None:
    assert __main__.load("plan/published") is published.published_rates
    assert published.OTHERS.keys() <= RUNS.keys()


@pytest.mark.parametrize("name", RUNS)
def test_settings_parse(name: str) -> None:
    run, card = RUNS[name], load(published.CARDS[RUNS[name].facts["gpu"]]).card
    nodes, per_node = run.ranks
    assert nodes * per_node == run.facts["gpus"] and run.rate > 0
    assert (published.FOLDER / f"{run.facts['plan']}.yaml").is_file()
    assert card.memory == 1e9 * float((run.facts["gpu"] + " 40").split()[1])
    assert run.tf32 == (name == "clip-l14-laion2b")
    assert run.checkpointing in ((True,) if run.tokens else (True, False, None))


def test_the_card_of_the_tables() -> None:
    card, whole = (load(name).card for name in (published.CARDS["H100 96 GB HBM2e, 500 W"], "h100"))
    assert (card.bandwidth, card.memory, card.peak) == (2.4e12, 96e9, whole.peak)


def test_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Held against 25 %, unless what a plan leaves out is named."""

    def planned(run: published.Published, way: Any = "") -> float:
        return run.rate * (1.3 if way == "" else 2.0)

    monkeypatch.setattr(published, "plan_rate", planned)
    rows = {row.name.removeprefix("plan/published "): row for row in published.published_rates()}
    assert len(rows) == len(RUNS) + sum(map(len, published.OTHERS.values()))
    for name, run in RUNS.items():
        row = rows[name]
        assert row.value == pytest.approx(1.3, rel=ulps(2, F64))
        assert (row.bar, row.ok) == ((None, True) if run.reason else ((0.75, 1.25), False))
        assert run.reason in row.rule
        for way in published.OTHERS.get(name, ()):
            assert rows[f"{name} {way}"].value == pytest.approx(2.0, rel=ulps(2, F64)) and rows[f"{name} {way}"].ok
