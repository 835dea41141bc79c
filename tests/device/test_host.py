"""Copies on the CPU of what lies on a device: known where they can be, never of what a tensor was before."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from descant.modules.core import host
from descant.modules.core.batch import Batch
from descant.modules.moe.routing import Marks


@pytest.fixture(autouse=True)
def emulated(device: Any) -> None:
    if not device.emulated:
        pytest.skip("counted on the emulated accelerator")


def reads(look: Any) -> tuple[Any, int]:
    from tests.device.emulated import counting

    with counting() as counts:
        found = look()
    return found, counts.host_reads


def test_a_batch_on_a_device_is_known_on_the_cpu(device: Any) -> None:
    present = {"image": torch.tensor([True, True, False]), "text": torch.tensor([True, False, True])}
    batch = Batch({"image": torch.randn(3, 2), "text": torch.arange(6).view(3, 2)}, present).to(device.device)
    assert batch.index is batch.content_id and all(
        x.device == device.device for x in (batch.index, *batch.inputs.values())
    )

    def look() -> list[Any]:
        some = batch.select(torch.tensor([0, 2]))
        masks = [batch.both("image", "text"), some.present["text"], batch.only("text").present["image"]]
        numbers = [batch.count("image"), some.index, some.inputs["text"]]
        return [host.host_copy(x).tolist() for x in (*masks, *numbers)]

    expected = [[True, False, False], [True, True], [False] * 3, 2, [0, 2], [[0, 1], [4, 5]]]
    assert reads(look) == (expected, 0)


def test_what_is_not_known_is_read_once(device: Any) -> None:
    x = torch.arange(3).to(device.device) + 1
    assert not host.has_host_copy(x)
    assert reads(lambda: host.host_copy(x).tolist()) == ([1, 2, 3], 1)


def test_what_is_written_since_is_read_again(device: Any) -> None:
    x = host.to_device(torch.arange(3), device.device)
    assert host.has_host_copy(x)
    x += 1
    assert not host.has_host_copy(x)
    assert reads(lambda: host.host_copy(x).tolist()) == ([1, 2, 3], 1)


def test_in_inference_mode_it_is_the_same(device: Any) -> None:
    with torch.inference_mode():
        x = host.to_device(torch.arange(3), device.device)
        y = host.derive(lambda a: a > 0, x)
        assert reads(lambda: host.host_copy(y).tolist()) == ([False, True, True], 0)


def test_of_what_is_not_known_nothing_derived_is_known(device: Any) -> None:
    x, known = torch.arange(3).to(device.device), host.to_device(torch.arange(3), device.device)
    assert not host.has_host_copy(host.derive(torch.eq, x, known))


def test_marks_of_chosen_tokens_are_on_one_device(device: Any) -> None:
    """Of a choice that is known on the CPU without a read; of one that was made on the device, read when asked for."""
    kind_B, at = torch.tensor([3, 1, 2]), torch.tensor([2, 0])
    marks = Marks(kind=host.to_device(kind_B, device.device))
    for known in (True, False):
        chosen = host.to_device(at, device.device) if known else at.to(device.device)
        kind = marks.map(lambda x_B, at: x_B[at], chosen).kind
        assert kind is not None and host.has_host_copy(kind) == known
        assert host.host_copy(kind).tolist() == [2, 3]


def test_finite_numbers_may_be_known_where_the_numbers_are_not(device: Any) -> None:
    x = torch.tensor([1.0, 2.0, float("inf")]).to(device.device)
    assert host.known_finite(x) is None
    host.with_finite(x, lambda: torch.tensor([True, True, False]))
    assert reads(lambda: host.host_copy(host.finite(x)).tolist()) == ([True, True, False], 0)
    x.zero_()
    assert reads(lambda: host.host_copy(host.finite(x)).tolist()) == ([True, True, True], 1)
