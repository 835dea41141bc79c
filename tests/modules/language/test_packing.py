"""Packing: few rows, hardly any padding, and nothing lost. Letters: B rows, T tokens."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
import torch

from descant.datamodules.corpora.emoji import Emoji
from descant.modules.language.packing import first_fit_decreasing, pack, places


def by_hand(lengths: list[int], size: int) -> list[list[int]]:
    rows: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        for row in rows:
            if sum(lengths[j] for j in row) + lengths[i] <= size:
                row.append(i)
                break
        else:
            rows.append([i])
    return rows


@pytest.mark.parametrize("seed", range(5))
def test_first_fit_decreasing_equals_a_loop(seed: int) -> None:
    generator = random.Random(seed)
    lengths = [generator.randint(1, 40) for _ in range(300)]
    found = first_fit_decreasing(lengths, 64)
    assert found == by_hand(lengths, 64)
    assert sorted(i for row in found for i in row) == list(range(300))


@pytest.mark.parametrize("size", [1, 2, 7, 30, 64])
def test_documents_of_equal_length_go_where_one_after_the_other_would(size: int) -> None:
    generator = random.Random(size)
    for number in range(60):
        kinds = [generator.randint(1, size) for _ in range(generator.randint(1, 6))]
        lengths = [generator.choice(kinds) for _ in range(number)]
        assert first_fit_decreasing(lengths, size) == by_hand(lengths, size)


def test_real_documents_leave_little_padding() -> None:
    """Names of the pack in each of their languages, as its own tokens."""
    data = Emoji(tiny=True)
    lengths = [len(data.tokenizer.encode(name)) for row in data.pack.rows for name in row["names"].values()]
    assert max(lengths) > 3 * min(lengths)
    packed = first_fit_decreasing(lengths, 128)
    assert 1 - sum(lengths) / (len(packed) * 128) <= 0.03


@pytest.mark.parametrize("seed", range(5))
def test_rows_are_as_few_and_as_short_as_they_get(seed: int) -> None:
    generator = random.Random(seed)
    lengths = [generator.randint(1, 40) for _ in range(100)]
    found, rows = places(lengths, 64), first_fit_decreasing(lengths, 64)
    assert found.rows == len(rows)
    fewest = next(c for c in range(max(lengths), 65) if len(first_fit_decreasing(lengths, c)) <= len(rows))
    assert fewest <= found.width <= 64 and found.width * found.rows < 1.03 * sum(lengths)
    ends = found.first_N + torch.tensor(lengths)
    for b in range(found.rows):
        here = (found.row_N == b).nonzero().flatten().tolist()
        spans = sorted((int(found.first_N[i]), int(ends[i])) for i in here)
        assert spans[0][0] == 0 and spans[-1][1] <= found.width
        assert all(a[1] == b[0] for a, b in pairwise(spans))


def test_packing_is_lossless() -> None:
    generator = torch.Generator().manual_seed(0)
    documents = [torch.randint(1, 99, (n,), generator=generator) for n in (3, 9, 1, 4, 7, 2)]
    learned = [torch.rand(len(x), generator=generator) < 0.5 for x in documents]
    packed = pack(documents, learned, 12)
    assert (packed.document_BT < 0).eq(packed.segment_BT == 0).all() and not packed.ids_BT[packed.document_BT < 0].any()
    for i, (ids, marks) in enumerate(zip(documents, learned, strict=True)):
        here = packed.document_BT == i
        assert torch.equal(packed.ids_BT[here], ids)
        assert torch.equal(packed.loss_mask_BT[here][1:], marks[1:]) and not packed.loss_mask_BT[here][0]
        assert len(packed.segment_BT[here].unique()) == 1


@pytest.mark.parametrize("lengths", [[3, 65], [3, 0]])
def test_what_fits_no_row_is_named(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match=f"^document 1: {lengths[1]} tokens, where a row takes 1 to 64$"):
        first_fit_decreasing(lengths, 64)
