"""A calibration of small sizes: curves that rise, overheads that can be, a file that is read again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from descant.plan import calibrate as measuring
from descant.plan.contention import measured_ranks
from descant.plan.hardware import Hardware, Link, load, to_yaml
from descant.plan.kernels import kernels
from descant.plan.operators import CLASSES, size_of
from descant.plan.reference import references, trained_steps
from descant.plan.roofline import step_time
from descant.plan.trace import PHASES, Memory, Trace

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def here() -> Hardware:
    """Of one process, and of operators up to 16 kB."""
    return measuring.calibrate(processes=(1,), turns=1, most=1 << 14, device="cpu")


def test_every_class_has_a_curve_that_rises(here: Hardware) -> None:
    assert here.calibration is not None
    curves = here.calibration.curves
    assert {key.partition("/")[0] for key in curves if key.endswith("/float32")} == {*CLASSES, "elementwise"}
    assert {key.partition("/")[0] for key in curves if key.endswith("/bfloat16")} >= {"product", "convolution", "copy"}
    for curve in curves.values():
        assert all(0 < a <= b for a, b in zip(curve.seconds, curve.seconds[1:], strict=False))


def test_overheads_and_the_rest_can_be(here: Hardware) -> None:
    found = here.calibration
    assert found is not None
    assert set(found.overhead) == set(PHASES) and all(0 <= value < 1 for value in found.overhead.values())
    assert 0 < found.step < 1 and 0 <= found.fresh < 1 and here.contention == {1: 1.0} and here.overlap == 0.0
    assert here.card.memory > 1e9 and here.card.peak["float32"] > 0


def test_it_is_written_and_read_again(here: Hardware, tmp_path: Path) -> None:
    (tmp_path / "here.yaml").write_text(to_yaml(here))
    read = load(tmp_path / "here.yaml")
    assert to_yaml(read) == to_yaml(here)


def test_a_step_is_recorded_by_phase_and_predicted(here: Hardware) -> None:
    seen = []
    for fused, model, batch, optimizer in references(CPU):
        step = measuring.measured_step(model, batch, optimizer, 1, CPU)
        assert set(step.seconds) == set(PHASES) and all(step.operations)
        by_phase = [sum(one.phase == phase for one in step.operations) for phase in PHASES]
        assert min(by_phase[:2]) > 50 and (by_phase[2] < 10) == fused
        assert not any(one.name in ("t", "expand", "detach", "view") for one in step.operations), "views take nothing"
        flops = [sum(one.flops for one in step.operations if one.phase == phase) for phase in PHASES]
        assert flops[1] > flops[0] > 0 == flops[2]
        trace = Trace(len(batch), Memory(0, 0, 0, 0, 0), step.operations)
        times = [step_time(trace, here), step_time(replace(trace, operations=step.operations * 2), here)]
        assert 0 < times[0].total < times[1].total and min(times[0].forward, times[0].backward, times[0].host) > 0
        seen.append((type(model).__name__, fused))
    assert len(set(seen)) == len(seen) == 4


def test_products_are_counted() -> None:
    x, w = torch.ones(4, 8), torch.ones(8, 2)
    with measuring._Operations() as record:
        torch.mm(x, w).t().add_(1.0)
    assert [(one.name, one.flops, one.read, one.written) for one in record.made] == [
        ("mm", 128, 192, 32),
        ("add_", 0, 32, 32),
    ]


def test_kernels_count_as_the_traces_do() -> None:
    """What a kernel is measured at is what an operation of a step is looked up by."""
    checked = set()
    for kernel in kernels(torch.float32, CPU, 1 << 14):
        arguments = kernel.make()
        with measuring._Operations() as record, torch.no_grad():
            kernel.call(*arguments)
        sizes = {size_of(one) for one in record.made}
        same = [size for kind, size in sizes if kind == kernel.kind]
        assert same, f"{kernel.key}: {record.made}"
        assert any(0.4 * kernel.size <= size <= 2.5 * kernel.size for size in same), (kernel.key, kernel.size, same)
        checked.add(kernel.kind)
    assert checked == {*CLASSES, "elementwise"}


def test_what_goes_through_other_memory_is_not_counted_and_leaves_no_hook() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU())
    with measuring._Cold(model, CPU) as cold:
        model(torch.ones(2, 4)).sum().backward()
        assert cold.spent > 0
        assert len(cold.handles) == 2 and all(part._forward_hooks for part in model)
    assert not any(part._forward_hooks for part in model)


def test_a_trainer_is_timed_step_by_step() -> None:
    found = list(trained_steps(5))
    assert len(found) == 2
    for there, alone in found:
        assert len(there) == len(alone) == 5 and min(*there, *alone) > 0


@pytest.mark.ddp
def test_processes_and_messages() -> None:
    found = measured_ranks([1, 2], 1, sizes=(1 << 10, 1 << 12))
    assert found.contention[1] == 1.0 <= found.contention[2]
    names = ("all_gather", "all_reduce", "all_to_all", "broadcast", "recv", "reduce_scatter", "send")
    assert found.streams[1] == 1.0 <= found.streams[2] and found.link.seconds > 0
    for curves in (found.link.curves, found.link.apart):
        assert sorted(curves) == [f"{name}/2" for name in names]
        assert all(curve.sizes == (1024.0, 4096.0) for curve in curves.values())
    assert found.link.bandwidth > 0 and measured_ranks([1], 1).link == Link(1e9, 1e-4)
