"""Rated questions: an item asks for one capability in one style, and its grade is that of its flaw.

Letters: N items.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from descant.datamodules.corpora.emoji_pack import VENDORS
from descant.datamodules.selection.table_selection import TableSelection
from descant.datamodules.tasks.rated_questions import (
    ANSWER,
    ASKED,
    CAPABILITIES,
    FLAWS,
    IMAGE,
    OTHER,
    PLACES,
    STYLES,
    RatedQuestions,
    Traits,
)
from descant.modules.core.batch import Batch
from descant.modules.selection.selectors import Quota, RandomShare, ScoreFilter, Selector, entropy_share
from descant.modules.tokenizers.text import PAD
from tests.datamodules.batches import whole
from tests.tolerance import statistical

SCORES = [f"quality/{name}" for name in CAPABILITIES]


@pytest.fixture(scope="module")
def data() -> RatedQuestions:
    return RatedQuestions(tiny=True, batch_size=64, size=24, items=400)


@pytest.fixture(scope="module")
def clean() -> RatedQuestions:
    return RatedQuestions(tiny=True, batch_size=64, size=24, items=400, poor=0.0)


@pytest.fixture(scope="module")
def pool(data: RatedQuestions) -> Batch:
    return whole(data.training_set())


def worded(data: RatedQuestions, batch: Batch, row: int) -> tuple[str, str]:
    """Question and answer of a training row."""
    ids = [i for i in batch.inputs["text"][row].tolist() if i != PAD]
    at = ids.index(data.answer_token)
    return data.spell(ids[:at]).casefold(), data.spell(ids[at:]).casefold()


def flaws(data: RatedQuestions) -> np.ndarray:
    rows = data.training_set()
    return rows.flaw_N(rows.problems.key_N)


def test_items_are_of_all_capabilities_and_styles_and_of_known_quality(data: RatedQuestions, pool: Batch) -> None:
    kind_N, style_N, flaw_N = pool.targets["kind"].numpy(), pool.targets["style"].numpy(), flaws(data)
    assert np.bincount(kind_N).tolist() == [100] * 4 and min(np.bincount(style_N)) > 60
    grade_NK = torch.stack([pool.targets[name] for name in SCORES], dim=1).numpy()
    expected = np.array(list(FLAWS.values()))[flaw_N]
    assert (grade_NK[np.arange(400), kind_N] == expected).all() and (grade_NK.sum(axis=1) == expected).all()
    assert abs((flaw_N > 0).mean() - 0.6) < statistical(0.49, 400)
    assert min(np.bincount(flaw_N)[1:]) > 35
    assert torch.equal(pool.targets["tokens"], (pool.inputs["text"] != PAD).sum(dim=1))


def test_each_style_asks_for_the_same_answer(clean: RatedQuestions) -> None:
    batch = whole(clean.training_set())
    seen = set()
    for row, (kind, style, concept) in enumerate(
        zip(*(batch.targets[name].tolist() for name in ("kind", "style", "concept")), strict=True)
    ):
        question, answer = worded(clean, batch, row)
        assert answer == clean.spell([i for i in batch.targets["answer"][row].tolist() if i != PAD]).casefold()
        name, form = list(CAPABILITIES)[kind], list(CAPABILITIES.values())[kind][1].format("").strip()
        known = [word.casefold() for word in clean.words[name]]
        word = answer.removeprefix(form).strip() if list(STYLES)[style] == "sentence" else answer
        if list(STYLES)[style] == "yes-no":
            shown = question.removesuffix(", yes or no?")
            assert shown != question and answer in ("yes", "no")
            (word,) = [word for word in known if shown.endswith(f" {word}")][:1]
        assert word in known and question.startswith("in a sentence: ") == (list(STYLES)[style] == "sentence")
        if list(STYLES)[style] == "choice":
            assert f") {word}" in question and all(f" {letter}) " in question for letter in "abcd")
        if name == "group" and answer != "no":
            right = clean.pack.rows[concept]["group"].replace("-", " ")
            assert (word == right.casefold()) == (answer != "no")
        seen.add((kind, style))
    assert len(seen) == len(CAPABILITIES) * len(STYLES)


def test_each_flaw_changes_what_it_names_and_nothing_else(data: RatedQuestions, clean: RatedQuestions) -> None:
    rows, pool = clean.training_set(), whole(data.training_set())
    same = whole(rows)
    assert torch.equal(pool.index, same.index), "which items there are does not depend on their quality"
    flaw_N = flaws(data)
    image_N = (pool.inputs["image"] != same.inputs["image"]).flatten(1).any(dim=1).numpy()
    text = [(worded(data, pool, n), worded(clean, same, n)) for n in range(len(pool.index))]
    asked_N, answer_N = (np.array([a[part] != b[part] for a, b in text]) for part in (0, 1))
    assert (image_N == np.isin(flaw_N, [IMAGE, OTHER])).all() and (asked_N == (flaw_N == ASKED)).all()
    assert (answer_N[flaw_N == ANSWER]).all() and not answer_N[~np.isin(flaw_N, [ASKED, ANSWER])].any()
    assert not pool.inputs["image"][torch.from_numpy(flaw_N == IMAGE)].any()
    assert len({a[0] for (a, _), n in zip(text, flaw_N == ASKED, strict=True) if n}) < 40, "trivial ones are alike"
    # a wrong answer is one to the question: in the style of the item, and no other
    for row in np.flatnonzero(flaw_N == ANSWER):
        (_, wrong), (_, right) = text[row]
        if list(STYLES)[int(pool.targets["style"][row])] == "yes-no":
            assert {wrong, right} == {"yes", "no"}


def test_a_drawing_is_where_the_answer_is(clean: RatedQuestions) -> None:
    batch = whole(clean.training_set())
    place_N = Traits.of(clean.training_set().problems.key_N).place_N
    for row in np.flatnonzero(batch.targets["kind"].numpy() == list(CAPABILITIES).index("place")):
        seen = batch.inputs["image"][row, 3].unfold(0, 12, 12).unfold(1, 12, 12).flatten(2).any(dim=2).flatten()
        assert seen.nonzero().flatten().tolist() == [place_N[row]]
        if list(STYLES)[int(batch.targets["style"][row])] == "short":
            assert worded(clean, batch, int(row))[1] == PLACES[place_N[row]]


def test_evaluation_has_no_flaws_and_no_item_of_training(data: RatedQuestions) -> None:
    train = set(data.training_set().problems.key_N.tolist())
    sets: dict[str, Any] = data.evaluation_sets("test") | data.evaluation_sets("validate")
    assert list(sets) == ["problems", "vendor", "concept", "val"] and sets["vendor"].vendors.tolist() == [3]
    for name, rows in sets.items():
        assert not train & set(rows.problems.key_N.tolist()) and not rows.flaw_N(rows.problems.key_N).any(), name
        kinds = np.bincount(rows.problems.kind_N)
        assert len(kinds) == 4 and (kinds.max() <= 250), name
    assert VENDORS[3] not in data.vendors


def test_an_item_is_the_same_at_each_visit(data: RatedQuestions, pool: Batch) -> None:
    again = whole(data.training_set(), epoch=1)
    assert torch.equal(pool.inputs["image"], again.inputs["image"])
    assert torch.equal(pool.inputs["text"], again.inputs["text"])
    assert torch.equal(pool.index, whole(data.bank_set()).index)


def selected(folder: Path, pool: Batch, selector: Selector, seed: int = 0) -> np.ndarray:
    """Rows of the pool that a selector takes by the true grades, in equal shares of tokens for each style."""
    columns = {name: pool.targets[name].numpy() for name in ("style", "tokens", *SCORES)}
    pq.write_table(pa.table({"index": pool.index.numpy(), **columns}), folder / "pool.parquet")
    table = TableSelection(str(folder / "pool.parquet"), SCORES, selector, group="style", cost="tokens", seed=seed)
    return np.flatnonzero(np.isin(pool.index.numpy(), table.ids()))


def test_selections_match_tokens_and_quotas_keep_styles_and_capabilities(tmp_path: Path) -> None:
    pool = whole(RatedQuestions(tiny=True, batch_size=64, size=24, items=2000).training_set())
    cost_N = pool.targets["tokens"].numpy()
    rows = {
        name: selected(tmp_path, pool, selector)
        for name, selector in {
            "random": RandomShare(0.2),
            "quota": Quota(0.2),
            "permuted": Quota(0.2, sham="permute"),
            "scalar": ScoreFilter(0.2),
        }.items()
    }
    grade_N = torch.stack([pool.targets[name] for name in SCORES]).sum(dim=0).numpy()
    for name, index_S in rows.items():
        # a budget of tokens, of which the last row of a cell may leave a part
        assert 0.99 * 0.2 * cost_N.sum() < cost_N[index_S].sum() <= 0.2 * cost_N.sum(), name
        best = (grade_N[index_S] == 5).mean()
        assert (best == 1) if name in ("quota", "scalar") else 0.3 < best < 0.5, name
    for name in ("style", "kind"):
        assert entropy_share(pool.targets[name][rows["quota"]], 4) >= 0.95
    other = selected(tmp_path, pool, Quota(0.2), seed=1)
    assert set(rows["quota"]) != set(other) and (grade_N[other] == 5).all(), "equal grades are ordered by the seed"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"poor": 1.5}, "poor 1.5: a share of the items, 0 to 1, such as 0.6"),
        ({"items": 3}, "items 3: 4 is the least, one of each capability"),
        ({"kinds": ["name"]}, "kinds.*name.* is not one of group, colour, count, place"),
    ],
)
def test_options_out_of_range_raise_one_line(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        RatedQuestions(tiny=True, **options)
