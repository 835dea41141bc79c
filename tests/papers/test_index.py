"""The list of papers: a row each, and behind a built one its configuration, its pieces, its test, any claim."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from descant.cli.catalogue import ROOT, experiments, find, layers, list_shipped, papers
from descant.cli.errors import Refusal
from descant.modules.io.names import full
from tests.conftest import Result

TOP = Path(__file__).parents[2]
BUILT = [paper for paper in papers() if paper["status"] == "built"]
KEYS = {"number", "name", "family", "arxiv", "title", "status"}
TRIPLE = {"experiment", "pieces", "test", "exact"}


def faults(rows: Sequence[dict[str, Any]]) -> list[str]:
    """One line for each thing that is wrong in a list of papers."""
    lines = [
        f"index.yaml: two papers with the {key} {value}: {', '.join(row['name'] for row in rows if row[key] == value)}"
        for key in ("number", "name", "arxiv")
        for value, count in Counter(row[key] for row in rows).items()
        if count > 1
    ]
    for row in rows:
        needed = KEYS | (TRIPLE if row["status"] == "built" else set())
        wrong = (set(row) ^ needed) - ({"claim"} if row["status"] == "built" else set())
        if wrong:
            lines.append(f"{row['name']}: {', '.join(sorted(wrong))}: missing, or no such key")
        elif row["status"] == "built":
            lines += [f"{row['name']}: {what}" for what in _missing(row)]
    return lines


def _missing(row: dict[str, Any]) -> list[str]:
    """Which of its three parts a built paper lacks."""
    used = "".join(file.read_text() for file in (ROOT / "claims", ROOT / "with") for file in file.rglob("*.yaml"))
    if row["experiment"] in experiments():
        used += "".join(file.read_text() for file in layers([experiments()[row["experiment"]]]))
    checks = {
        f"no experiment {row['experiment']}": row["experiment"] in experiments(),
        f"no claim {row.get('claim')}": "claim" not in row or (ROOT / f"claims/{row['claim']}.yaml").is_file(),
        f"no test {row['test']}": (TOP / row["test"]).is_file(),
    }
    for test in row["exact"]:
        file, _, name = test.partition("::")
        text = (TOP / file).read_text() if (TOP / file).is_file() else ""
        checks[f"no test {test}"] = f"\ndef {name}(" in text or f"\nclass {name}(" in text
    checks |= {f"no class {piece}": full(piece) is not None for piece in row["pieces"]}
    checks |= {f"no YAML names {piece}": bool(re.search(rf"\b{piece}\b", used)) for piece in row["pieces"]}
    return [what for what, there in checks.items() if not there]


def _stored(paper: dict[str, Any]) -> dict[str, Any]:
    """The result of its claim; none of a paper without one, or of a design that ships before its runs."""
    file = ROOT / f"claims/results/{paper.get('claim')}.json"
    return json.loads(file.read_text()) if file.is_file() else {"effect": "not run yet", "runs": {}}


def test_the_list_is_whole() -> None:
    lacking = faults(papers())
    assert not lacking, "\n".join(lacking)
    assert [paper["number"] for paper in papers()] == list(range(1, len(papers()) + 1))
    # there may be more
    assert len(BUILT) >= 36 and sum(bool(paper["exact"]) for paper in BUILT) >= 28
    assert sum("claim" in paper for paper in BUILT) >= 36
    shipped = {name for name in experiments() if name.startswith("papers/")}
    assert shipped == {paper["experiment"] for paper in BUILT} == {f"papers/{paper['name']}" for paper in BUILT}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"number": 24}, ["index.yaml: two papers with the number 24: comd, dcd"]),
        ({"exact": ["tests/papers/test_index.py::test_none"]}, ["dcd: no test tests/papers/test_index.py::test_none"]),
        ({"test": "tests/papers/test_none.py"}, ["dcd: no test tests/papers/test_none.py"]),
        ({"experiment": "papers/none"}, ["dcd: no experiment papers/none"]),
        ({"claim": "none"}, ["dcd: no claim none"]),
        ({"source": "none"}, ["dcd: source: missing, or no such key"]),
        ({"pieces": ["RankTarget", "Nothing"]}, ["dcd: no class Nothing", "dcd: no YAML names Nothing"]),
    ],
)
def test_what_a_paper_lacks_is_one_line(change: dict[str, Any], says: list[str]) -> None:
    assert faults([row | (change if row["name"] == "dcd" else {}) for row in papers()]) == says


@pytest.mark.parametrize("paper", BUILT, ids=lambda paper: paper["name"])
def test_a_paper_is_a_short_file_that_says_what_to_expect(paper: dict[str, Any]) -> None:
    file = experiments()[paper["experiment"]]
    text = file.read_text()
    assert len(text.splitlines()) <= 25
    head = text.splitlines()[0]
    assert f"(arXiv {paper['arxiv']})" in head
    for word in ("Claim", "Source", "Differs", "Command", "Expect"):
        assert re.search(rf"^# {word}: +\S", text, re.MULTILINE), word
    assert f"descant fit --config {paper['experiment']}\n" in text
    expected = re.search(r"^# Expect:(.*?)^extends:", text, re.MULTILINE | re.DOTALL)
    assert expected is not None and (f"claim {paper['claim']}" if "claim" in paper else "no claim") in expected[1]
    stored = _stored(paper)
    if "method" in stored["runs"]:  # it ends before its effect is measured where there is no room
        metric = yaml.safe_load((ROOT / f"claims/{paper['claim']}.yaml").read_text())["metric"]["name"]
        values = [run[metric] for run in stored["runs"]["method"].values()]
        assert metric in expected[1] and f"{sum(values) / len(values):.3f}" in expected[1], "the number of the claim"
    assert f"Effect: {stored['effect']}" in re.sub(r"\s*\n#\s*", " ", expected[1])


def test_the_list_of_papers_fits_a_line_each_and_needs_no_torch(cli: Any) -> None:
    result: Result = cli("list", "papers")
    lines = result.out.splitlines()[1:]
    assert len(lines) == len(papers()) and max(map(len, lines)) <= 120
    (dcd,) = (line for line in lines if " dcd " in line)
    assert " ".join(dcd.split()) == "33 dcd distillation 2207.01426 exact hurts 10 min"
    assert sum(line.endswith("planned") for line in lines) == len(papers()) - len(BUILT)
    listed = [line.split()[1] for line in cli("list", "papers", "helps").out.splitlines()[1:]]
    effects = {paper["name"]: _stored(paper)["effect"] for paper in BUILT}
    assert sorted(listed) == sorted(name for name, effect in effects.items() if effect.startswith("helps"))
    assert {"structure-clip", "crmt"} <= set(listed)


def test_a_configuration_extends_others(tmp_path: Path) -> None:
    first, second, third = (tmp_path / f"{name}.yaml" for name in ("first", "second", "third"))
    first.write_text("extends: contrastive/scenes\nmodel: {init_args: {width: 8}}\n")
    second.write_text("# mine\nextends: [first.yaml, with/train/ema]  # in this order\n")
    below = [list_shipped()["contrastive/scenes"], first, list_shipped()["with/train/ema"], second]
    assert layers([second]) == below and layers([first, second]) == [*below[:2], *below[2:]]
    third.write_text("extends:\n- first.yaml\n- second.yaml\n")
    assert layers([third]) == [*below, third] and layers([find("claims/crmt:method")])[1] == find("fusion/certified")
    third.write_text("extends: {a: b}\n")
    with pytest.raises(
        Refusal, match=r"third.yaml: extends: the name of a configuration is expected, or a list of names"
    ):
        layers([third])
    third.write_text("extends: third.yaml\n")
    with pytest.raises(Refusal, match=r"third.yaml: extends: it extends itself"):
        layers([third])
    third.write_text("extends: contrastive/scene\n")
    with pytest.raises(Refusal, match=r"--config contrastive/scene: no such file.*nearest: contrastive/scenes"):
        layers([third])
