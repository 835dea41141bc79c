from __future__ import annotations

from collections import Counter

import pytest

from descant.datamodules.sampling.resumable_sampler import Order, Slot


def epoch(order: Order) -> list[Slot]:
    return [slot for window in order for slot in window.slots]


def test_every_sample_once_an_epoch_and_shapes_never_change() -> None:
    order = Order(n=23, batch_size=8, seed=1)
    windows = list(order)
    assert len(windows) == len(order) == 3
    assert {len(w.slots) for w in windows} == {8}
    assert Counter(s.sample for w in windows for s in w.slots if s.real) == Counter(range(23))


@pytest.mark.parametrize(("world", "accumulate"), [(1, 1), (2, 1), (1, 2), (2, 2), (4, 1)])
def test_the_global_order_does_not_depend_on_the_cut(world: int, accumulate: int) -> None:
    whole = [w.step for w in Order(n=23, batch_size=8, seed=1)]
    ranks = [list(Order(23, 8, 1, rank=r, world=world, accumulate=accumulate)) for r in range(world)]
    for batch, step in enumerate(whole):
        micro = range(batch * accumulate, (batch + 1) * accumulate)
        assert all(windows[m].step == step for windows in ranks for m in micro)
        parts = [slot for windows in ranks for m in micro for slot in windows[m].slots]
        assert Counter(parts) == Counter(step)


def test_epochs_differ_and_repeat_exactly() -> None:
    order = Order(n=23, batch_size=8, seed=1)
    first = [s.sample for s in epoch(order)]
    order.set_epoch(1)
    assert [s.sample for s in epoch(order)] != first
    order.set_epoch(0)
    assert [s.sample for s in epoch(order)] == first
    assert [s.sample for s in epoch(Order(n=23, batch_size=8, seed=2))] != first


def test_starting_in_the_middle_gives_the_rest() -> None:
    whole = list(Order(n=23, batch_size=8, seed=1, epoch=3))
    order = Order(n=23, batch_size=8, seed=1, epoch=3, first=2)
    assert list(order) == whole[2:]
    assert len(order) == 3
    order.set_epoch(3)  # repeated on resume: nothing moves
    assert list(order) == whole[2:]
    order.set_epoch(4)
    assert len(list(order)) == 3


def test_a_cut_that_does_not_divide_names_one_that_does() -> None:
    with pytest.raises(
        ValueError, match=r"batch_size 9 .* 2 rank\(s\) x 1 micro-batch\(es\) do not divide it; 8 works"
    ):
        Order(n=23, batch_size=9, seed=1, world=2)


def test_an_empty_set_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        Order(n=0, batch_size=8, seed=1)
