"""Questions: images match, answers are correct, and held-out problems are in no other set."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from descant.datamodules.corpora.emoji_pack import PACK, SEALED, VENDORS
from descant.datamodules.tasks.descriptions import Descriptions
from descant.datamodules.tasks.question_pool import QuestionRollouts
from descant.datamodules.tasks.questions import COUNTS, KINDS, LETTERS, MORE, QuestionPairs, Questions, QuestionSet
from descant.modules.core.batch import Batch
from descant.modules.tokenizers.text import BOS, EOS, PAD
from descant.modules.transforms.image import BASIC_COLOURS
from tests.datamodules.batches import whole


@pytest.fixture(scope="module")
def data() -> Questions:
    return Questions(tiny=True, batch_size=64)


def worded(data: Questions, batch: Batch, row: int) -> tuple[str, str]:
    ids = batch.inputs["text"][row].tolist()
    front, back = ids[: ids.index(data.answer_token)], ids[ids.index(data.answer_token) + 1 :]
    assert front[:2] == [BOS, data.image_token]
    decode = data.tokenizer.tokenizer.decode  # type: ignore[attr-defined]
    return decode(front[2:]).strip(), decode(back[: back.index(EOS)]).strip()


def test_the_loss_mask_is_the_answer_and_its_end(data: Questions) -> None:
    batch = whole(data.training_set())
    for ids, said, answer in zip(
        batch.inputs["text"].tolist(), batch.inputs["loss_mask"].tolist(), batch.targets["answer"].tolist(), strict=True
    ):
        learned = [i for i, is_said in zip(ids, said, strict=True) if is_said]
        assert learned == [*(i for i in answer if i != PAD), EOS]
        assert ids.count(EOS) == ids.count(data.answer_token) == ids.count(data.image_token) == 1
        assert not any(ids[ids.index(EOS) + 1 :])


@pytest.mark.parametrize("by_letter", [True, False])
def test_answers_are_correct_and_letters_uniform(by_letter: bool) -> None:
    data = Questions(tiny=True, batch_size=64, letters=by_letter)
    rows = data.training_set()
    batch = whole(rows)
    letters: Counter[str] = Counter()
    for row, (kind, concept) in enumerate(zip(batch.targets["kind"], batch.targets["concept"], strict=True)):
        question, answer = worded(data, batch, row)
        of = data.pack.rows[int(concept)]
        if KINDS[kind] in ("name", "group"):
            options = dict(part.split(") ", 1) for part in _options(question))
            assert len(set(options.values())) == 4 and set(options) == set(LETTERS)
            right = of["names"]["en"] if KINDS[kind] == "name" else of["group"].replace("-", " ")
            there = {option.strip().casefold(): letter for letter, option in options.items()}
            assert right.casefold() == (options[answer].strip() if by_letter else answer).casefold()
            letters[there[right.casefold()]] += 1
        elif KINDS[kind] == "count":
            assert int(answer) in COUNTS and question.casefold() == f"how many: {of['names']['en'].casefold()}?"
        else:
            assert answer in BASIC_COLOURS
    assert min(letters.values()) > 0.8 * max(letters.values())


def _options(question: str) -> list[str]:
    places = [question.index(f"{letter}) ") for letter in LETTERS]
    return [question[a:b] for a, b in zip(places, [*places[1:], len(question)], strict=True)]


def test_scenes_have_the_counted_number_of_objects(data: Questions) -> None:
    rows = data._set("train", False, ["noto"], kinds=["count"])
    batch, cell = whole(rows), data.size // 3
    for image, concept, answer in zip(
        batch.inputs["image"], batch.targets["concept"], batch.targets["answer"][:, 0], strict=True
    ):
        wanted = data.drawing(VENDORS.index("noto"), int(concept), cell)
        cells = image.unfold(1, cell, cell).unfold(2, cell, cell).permute(1, 2, 0, 3, 4).flatten(0, 1)
        shown = sum(torch.equal(x, wanted) for x in cells)
        assert shown == int(data.tokenizer.tokenizer.id_to_token(int(answer)).strip("Ġ▁ "))  # type: ignore[attr-defined]
        assert 0 <= sum(bool(x.any()) for x in cells) - shown <= 2


def test_held_out_problems_are_in_no_other_set(data: Questions) -> None:
    train = data.training_set()
    sets = data.evaluation_sets("test") | data.evaluation_sets("validate")
    keys = {name: set(rows.problems.key_N.tolist()) for name, rows in sets.items() if isinstance(rows, QuestionSet)}
    own = set(train.problems.key_N.tolist())
    assert len(own) == len(train) and all(not own & other for other in keys.values())
    assert (
        not keys["val"] & (keys["problems"] | keys["concept"]) and keys["counts"] <= keys["problems"] | keys["vendor"]
    )
    seen = set(train.problems.concept_N.tolist())
    concept = sets["concept"]
    assert isinstance(concept, QuestionSet)
    assert not seen & set(concept.problems.concept_N.tolist()) and not seen & set(concept.pool.tolist())
    assert set(train.vendors.tolist()) == {0, 1, 2} and sets["vendor"].vendors.tolist() == [3]  # type: ignore[attr-defined]
    counts = whole(sets["counts"])
    assert {int(worded(data, counts, row)[1]) for row in range(len(counts))} == set(MORE)


@pytest.mark.parametrize("kind", [Questions, QuestionPairs, QuestionRollouts, Descriptions])
def test_the_lock_box_is_in_no_training_set(data: Questions, kind: type[Questions]) -> None:
    options: dict[str, Any] = {"items": 8, "group": 2} if kind is QuestionRollouts else {}
    sealed = kind(tiny=True, batch_size=16, sealed=True, **options)
    box = {row["hexcode"] for row in pq.read_table(PACK / SEALED).to_pylist() if row["sealed"]}
    sets = sealed.evaluation_sets("test")
    concept, vendor, bank = sets["concept"], sets["vendor"], sealed.bank_set()
    assert isinstance(concept, QuestionSet) and isinstance(vendor, QuestionSet) and isinstance(bank, QuestionSet)
    rows = sealed.pack.rows
    assert {rows[c]["hexcode"] for c in (*concept.problems.concept_N, *concept.pool)} <= box
    assert not {rows[c]["hexcode"] for c in (*bank.problems.concept_N, *bank.pool)} & box
    assert sealed.pack.drawings("fluent")[1][vendor.pool].all()  # as wrong options and beside counted ones, too
    known = {row["hexcode"]: row for row in data.pack.rows}
    assert not any(row["fluent"] == known[row["hexcode"]]["fluent"] for row in rows if row["hexcode"] in known)


@pytest.mark.parametrize("kind", [Questions, QuestionPairs, QuestionRollouts, Descriptions])
def test_training_may_ask_about_a_share_of_its_concepts(data: Questions, kind: type[Questions]) -> None:
    some, more, all_ = (kind(tiny=True, batch_size=8, share=share) for share in (0.2, 0.5, 1.0))

    def concepts(module: Questions) -> set[int]:
        return {int(c) for c in module.bank_set().problems.concept_N}

    assert 0 < len(concepts(some)) < len(concepts(more)) < len(concepts(all_))
    assert concepts(some) < concepts(more), "a larger share has the smaller one"
    for stage in ("validate", "test"):
        for name, questions in some.evaluation_sets(stage).items():
            assert len(questions) == len(all_.evaluation_sets(stage)[name]), (stage, name)
    assert (
        some._set("train", False, some.vendors).pool.tolist() == all_._set("train", False, all_.vendors).pool.tolist()
    )


def test_shuffled_captions_are_those_of_other_training_concepts(data: Questions) -> None:
    own, shuffled = (Descriptions(tiny=True, batch_size=8, shuffle_captions=on) for on in (False, True))
    other_C, seen = shuffled.other_C, np.flatnonzero(~shuffled.unseen_C)
    assert sorted(other_C[seen]) == seen.tolist() and (other_C[seen] != seen).all()
    batches = [whole(module.training_set()) for module in (own, shuffled)]
    for name in ("image", "text", "loss_mask"):
        assert torch.equal(batches[0].inputs[name], batches[1].inputs[name]) == (name == "image")
    for row, concept in enumerate(shuffled.training_set().problems.concept_N[:50].tolist()):
        said = worded(shuffled, batches[1], row)[1].replace(" ", "")
        assert said.startswith(shuffled.pack.names[other_C[concept]].replace(" ", ""))
    assert torch.equal(whole(own.bank_set()).inputs["text"], whole(shuffled.bank_set()).inputs["text"])


def test_a_share_of_the_captions_are_wrong_and_flagged(data: Questions) -> None:
    own, wrong = (Descriptions(tiny=True, batch_size=8, wrong=share) for share in (0.0, 0.4))
    sets = wrong.training_set(), wrong.bank_set()
    batches = [whole(of) for of in (own.training_set(), *sets, own.bank_set())]
    assert torch.equal(batches[0].inputs["image"], batches[1].inputs["image"])
    matched = batches[1].targets["matched"]
    assert torch.equal(matched, batches[2].targets["matched"]) and "matched" not in batches[0].targets
    assert torch.equal(whole(sets[0], epoch=1).targets["matched"], matched), "the same captions at every visit"
    seen = np.flatnonzero(~wrong.unseen_C)
    away = seen[wrong.captioned_C[seen] != seen]
    assert abs(len(away) / len(seen) - 0.4) < 4 * (0.24 / len(seen)) ** 0.5
    assert not wrong.unseen_C[wrong.captioned_C[away]].any() and len({*wrong.captioned_C[away]}) > len(away) / 2
    assert torch.equal(matched, torch.from_numpy(~np.isin(sets[0].problems.concept_N, away)).long())
    same = (batches[2].inputs["text"] == batches[3].inputs["text"]).all(dim=1)
    assert torch.equal(same, matched.bool())
    assert torch.equal(*(whole(d.evaluation_sets("validate")["val"]).inputs["text"] for d in (own, wrong)))
    cases: tuple[tuple[dict[str, Any], str], ...]
    cases = ({"wrong": 1.0}, "wrong 1: a share"), ({"wrong": 0.1, "shuffle_captions": True}, "all are")
    for given, line in cases:
        with pytest.raises(ValueError, match=line):
            Descriptions(tiny=True, batch_size=8, **given)


def test_a_caption_has_the_parts_that_are_asked_for(data: Questions) -> None:
    every, some = (Descriptions(tiny=True, batch_size=8, parts=parts) for parts in (None, ["group", "colour"]))
    for concept in every.training_set().problems.concept_N[:50].tolist():
        asked = ("name", concept, 0, np.arange(1, 4), 0, 7)
        group, *colour = caption = some.wording(*asked)[1].split(", ")
        assert group == every.correct_answer("group", concept, 0, 0)
        assert len(colour) == (every.colour_VC[0, concept] >= 0)
        assert every.wording(*asked)[1].removeprefix(f"{every.pack.names[concept]}, ").startswith(", ".join(caption))
    cases = ((["colour"], r"parts \['colour'\]: name or group"), (["grop"], "parts: 'grop' is not one of name, "))
    for parts, line in cases:
        with pytest.raises(ValueError, match=line):
            Descriptions(tiny=True, batch_size=8, parts=parts)


def test_vendors_and_places_vary_between_visits_and_problems_do_not(data: Questions) -> None:
    rows = data.training_set()
    one, two = whole(rows), whole(rows, epoch=1)
    assert torch.equal(one.inputs["text"], two.inputs["text"])
    changed = (one.inputs["image"] != two.inputs["image"]).flatten(1).any(dim=1)
    assert changed.float().mean() > 0.5
    fixed = data._set("train", False, data.vendors)
    assert torch.equal(whole(fixed).inputs["image"], whole(fixed, epoch=1).inputs["image"])


def test_a_problem_is_independent_of_the_other_kinds(data: Questions) -> None:
    rows = data.training_set()
    every = whole(rows)
    part = rows.rows(np.array([7, 3]), every.rng_seed.numpy()[[7, 3]])
    assert torch.equal(part.inputs["text"], every.inputs["text"][[7, 3]])
    assert torch.equal(part.inputs["image"], every.inputs["image"][[7, 3]])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"kinds": ["nmae"]}, "kinds.*nmae.* is not one of name, group, colour, count"),
        ({"vendors": ["fluent"]}, "vendors.*fluent"),
        ({"kinds": []}, "kinds: none; such as name"),
        ({"size": 50}, "size 50: a multiple of 3 from 24 to 63"),
    ],
)
def test_options_out_of_range_raise_one_line(options: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Questions(tiny=True, **options)  # type: ignore[arg-type]


def test_a_question_that_is_too_long_is_named() -> None:
    with pytest.raises(ValueError, match=r"^length 12: 'wh.* and its answer are \d+ tokens$"):
        whole(Questions(tiny=True, length=12).training_set())


def test_an_answer_after_reasoning_is_scored_by_its_last_part() -> None:
    data = Questions(tiny=True, batch_size=32, size=24, length=96, kinds=["name"], letters=True, think=True)
    batch = next(iter(data.train_dataloader()))
    said = [row[mask].tolist()[:-1] for row, mask in zip(batch.inputs["text"], batch.inputs["loss_mask"], strict=True)]
    right = [[t for t in row if t] for row in batch.targets["answer"].tolist()]
    for b, words in enumerate(map(data.spell, said)):
        of = data.pack.rows[int(batch.targets["concept"][b])]
        assert words.startswith(f"think {of['group'].replace('-', ' ')}") and data.spell(right[b]) in "abcd"
        assert data.is_right(said[b], right[b]) and data.is_right(data.ids(f"answer {data.spell(right[b])}"), right[b])
        other = data.ids("answer " + "abcd"[("abcd".index(data.spell(right[b])) + 1) % 4])
        assert not data.is_right(other, right[b]) and not data.is_right([], right[b])
    assert len({len(row) for row in said}) > 1 and max(map(len, said)) <= data.answer_length
    plain = Questions(tiny=True, batch_size=8, size=24)
    assert plain.is_right([5, 6], [5, 6]) and not plain.is_right([5, 6, 7], [5, 6])
