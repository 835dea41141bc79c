"""Pools of questions: training on a teacher's answers, and new problems of the training split."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from descant.datamodules.tasks.dialogues import in_split
from descant.datamodules.tasks.question_pool import QuestionPool
from descant.datamodules.tasks.questions import KINDS
from descant.modules.tokenizers.text import EOS, PAD
from tests.datamodules.batches import whole

N = 64


@pytest.fixture
def data() -> QuestionPool:
    return QuestionPool(tiny=True, batch_size=16, items=N, size=24)


def test_training_is_on_the_teachers_answers(data: QuestionPool) -> None:
    said = torch.arange(10, 10 + 3 * N).view(N, 3)
    said[5, 1:] = torch.tensor([EOS, 77])
    said[6] = PAD
    data.renew(data.pool, said, 0)
    batch = whole(data.training_set())
    for n in range(N):
        learned = batch.inputs["text"][n][batch.inputs["loss_mask"][n]].tolist()
        wanted = said[n].tolist() if n not in (5, 6) else said[n, :1].tolist() if n == 5 else []
        assert learned == [*wanted, EOS]
    plain = data.training_problems
    right = {int(key): row for key, row in zip(plain.problems.key_N, range(len(plain)), strict=True)}
    at = [right[int(key)] for key in batch.content_id]
    every = whole(plain)
    assert torch.equal(batch.targets["answer"], every.targets["answer"][at]), "what is right stays known"


def test_a_new_pool_is_used_at_once_and_one_without_answers_is_an_error(data: QuestionPool) -> None:
    rows = data.training_set()
    with pytest.raises(ValueError, match="no answers yet; the callback Rounds"):
        whole(rows)
    data.renew(data.pool, torch.full((N, 2), 9), 0)
    first = whole(rows)
    data.renew(data.fresh(1), torch.full((N, 2), 8), 1)
    second = whole(rows)
    assert not torch.equal(first.content_id, second.content_id) and not torch.equal(
        first.inputs["text"], second.inputs["text"]
    )
    again = QuestionPool(tiny=True, batch_size=16, items=N, size=24)
    again.load_state_dict(data.state_dict())
    assert again.version == 1 and torch.equal(
        whole(again.training_set()).inputs["text"], whole(data.training_set()).inputs["text"]
    )


def test_variants_are_other_training_problems_of_the_same_kind_and_concept(data: QuestionPool) -> None:
    index = torch.tensor([3, 3, 3, *range(N)])
    found = data.variants(index, 1)
    some = data.pool.where(index.numpy())
    assert np.array_equal(found.kind_N, some.kind_N) and np.array_equal(found.concept_N, some.concept_N)
    other = some.kind_N != KINDS.index("colour")
    assert (found.key_N != some.key_N)[other].all() and in_split(found.key_N, "train").all()
    assert len(set(found.key_N[other].tolist())) == int(other.sum())
    assert not set(found.key_N[other].tolist()) & set(data.training_problems.problems.key_N.tolist())
    for rows in (*data.evaluation_sets("test").values(), *data.evaluation_sets("validate").values()):
        assert not set(found.key_N.tolist()) & set(rows.problems.key_N.tolist())  # type: ignore[attr-defined]
    assert np.array_equal(data.variants(index, 1).key_N, found.key_N)
    assert not np.array_equal(data.variants(index, 2).key_N, found.key_N)


def test_asking_has_all_problems_once_without_augmentation(data: QuestionPool) -> None:
    seen: list[int] = []
    for batch in data.asking(data.pool):
        assert data.plain
        seen += batch.index[batch.present["text"]].tolist()
    assert seen == list(range(N)) and not data.plain


def test_bad_pools_raise_one_line(data: QuestionPool) -> None:
    for options, message in (
        ({"items": 8}, "items 8: at least 16, the rows of a step"),
        ({"items": 64, "num_workers": 2}, "num_workers 2: workers would not see"),
    ):
        with pytest.raises(ValueError, match=message):
            QuestionPool(tiny=True, batch_size=16, size=24, **options)
    with pytest.raises(ValueError, match=r"items \d+: there are \d+ training problems"):
        QuestionPool(tiny=True, batch_size=16, size=24, items=999999).fresh(0)
    with pytest.raises(ValueError, match="64 problems and 3 answers; it has 64"):
        data.renew(data.pool, torch.zeros(3, 2), 0)
    with pytest.raises(ValueError, match="items 32: the checkpoint's pool has 64"):
        QuestionPool(tiny=True, batch_size=16, size=24, items=32).load_state_dict(data.state_dict())
