"""Times by formulas, against numbers worked by hand on hardware of round numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest

from descant.plan.hardware import Calibration, Card, Hardware, Link
from descant.plan.operators import CLASSES, operator_class
from descant.plan.quantities import Curve
from descant.plan.roofline import BOUNDS, step_time, time_of, time_of_collective
from descant.plan.trace import Collective, Memory, Operation, Trace
from tests.tolerance import F64, ulps

#: 1 TFLOP/s of float32 and 2 of bfloat16, 100 GB/s, 10 us; 100 GB/s within nodes of 4, 10 GB/s between them.
CARD = Card("round", "none", 1e9, 100e9, {"float32": 1e12, "bfloat16": 2e12}, 1e-5, 1.0, 1.0)
ROUND = Hardware(CARD, Link(100e9, 1e-6), Link(10e9, 1e-5), node=4, store=1e9)
NOTHING = Memory(0, 0, 0, 0, 0)
GB = 1_000_000_000


def operation(
    flops: int = 0, moved: int = 0, dtype: str = "float32", phase: str = "forward", name: str = "mm"
) -> Operation:
    return Operation(name, phase, flops, moved, 0, dtype)


def exactly(seconds: float) -> object:
    return pytest.approx(seconds, rel=ulps(32, F64))


def test_an_operation_takes_the_largest_of_three() -> None:
    assert time_of(operation(10**10, 8), ROUND) == exactly(0.01)
    assert time_of(operation(10**10, 8, "bfloat16"), ROUND) == exactly(0.005)
    assert time_of(operation(10**10, 8, "float16"), ROUND) == exactly(0.01)  # without a peak of its own
    assert time_of(operation(8, 10**9), ROUND) == exactly(0.01)
    assert time_of(operation(8, 8), ROUND) == exactly(2.5e-6)  # of any kernel
    half = replace(ROUND, card=replace(CARD, product_share=0.5, bandwidth_share=0.25))
    assert time_of(operation(10**10, 8), half) == exactly(0.02) and time_of(operation(8, 10**9), half) == exactly(0.04)


MESSAGES = {
    # name, ranks, stride -> seconds of a GB
    ("all_reduce", 4, 1): 2 * (0.75 * 0.01 + 3e-6),
    ("all_gather", 4, 1): 0.75 * 0.01 + 3e-6,
    ("reduce_scatter", 2, 2): 0.5 * 0.01 + 1e-6,
    ("all_to_all", 4, 1): 0.75 * 0.01 + 3e-6,
    ("broadcast", 4, 1): 0.01 + 3e-6,
    ("send", 2, 1): 0.01 + 1e-6,
    ("recv", 2, 4): 0.1 + 1e-5,
    ("all_gather", 4, 4): 0.75 * 0.1 + 3e-5,  # each on another node
    ("all_reduce", 8, 8): 2 * (7 / 8 * 0.1 + 3e-5),  # trees: log2 8 latencies
    # 16 ranks on 4 nodes: a quarter of it between nodes
    ("all_gather", 16, 1): (0.75 * 0.01 + 3e-6) + (0.75 * 0.025 + 3e-5),
    ("reduce_scatter", 16, 1): (0.75 * 0.01 + 3e-6) + (0.75 * 0.025 + 3e-5),
    ("all_reduce", 16, 1): 2 * (0.75 * 0.01 + 3e-6) + 2 * (0.75 * 0.025 + 2e-5),
    ("all_to_all", 16, 1): 0.01 * 3 / 16 + 3e-6 + 0.1 * 12 / 16 + 12e-5,
    ("broadcast", 8, 1): 0.01 + 3e-6 + 0.1 + 1e-5,
    ("all_reduce", 4, 2): 2 * (0.5 * 0.01 + 1e-6) + 2 * (0.5 * 0.05 + 1e-5),  # two on a node
    ("all_reduce", 1, 1): 0.0,
}


@pytest.mark.parametrize("case", MESSAGES, ids=str)
def test_messages_by_hand(case: tuple[str, int, int]) -> None:
    name, ranks, stride = case
    assert time_of_collective(Collective(name, "backward", GB, ranks, stride), ROUND) == exactly(MESSAGES[case])


def test_what_was_measured_of_a_group_is_taken() -> None:
    link = replace(ROUND.within, curves={"all_reduce/4": Curve((1e3, 1e9), (1e-4, 1.0))})
    measured = replace(ROUND, within=link)
    assert time_of_collective(Collective("all_reduce", "backward", GB, 4), measured) == 1.0
    assert time_of_collective(Collective("all_reduce", "backward", GB, 2), measured) == exactly(0.01 + 2e-6)


def test_of_a_group_on_several_nodes_the_part_within_them_is_taken_as_measured() -> None:
    """4 nodes of 4; only the first level of a message comes after computation."""
    names = ("all_gather", "reduce_scatter", "broadcast")
    near, apart = ({f"{name}/4": Curve((1e9,), (seconds,)) for name in names} for seconds in (0.5, 0.75))
    measured = replace(ROUND, within=Link(100e9, 1e-6, 1.0, near, apart, seconds=1e-3))
    between = 0.75 * 0.025 + 3e-5
    for name, seconds in (
        ("all_reduce", 0.75 + 2 * (0.75 * 0.025 + 2e-5) + 0.5),
        ("reduce_scatter", 0.75 + between),
        ("all_gather", between + 0.5),
        ("broadcast", 0.1 + 3e-5 + 0.5),
    ):
        assert time_of_collective(Collective(name, "backward", GB, 16), measured, computed=1.0) == exactly(seconds)


def test_a_message_takes_longer_the_more_was_computed_since_the_one_before() -> None:
    near, apart = ({"all_reduce/2": Curve((8.0,), (seconds,))} for seconds in (0.001, 0.005))
    busy = {1: 1.0, 2: 2.0}
    hardware = replace(ROUND, within=Link(1e9, 1e-6, 1.0, near, apart, seconds=0.02), contention=busy, overlap=0.0)
    operations = [operation(10**10, 8), operation(5 * 10**9, 8), operation(10**10, 8, phase="optimizer")]
    messages = [Collective("all_reduce", "forward", 8, 2, after=after) for after in (1, 1, 2)]
    time = step_time(Trace(1, NOTHING, operations, messages), hardware, processes=2)
    assert time.compute == exactly(0.05)  # 25 ms of a rank alone
    # after 20 ms, 10 of them in the step before; after nothing; after 5 ms
    assert time.exposed == exactly(0.005 + 0.001 + 0.002)


def test_operations_that_stream_share_memory_and_not_only_cores() -> None:
    shared = replace(ROUND, contention={1: 1.0, 2: 1.5}, streams={1: 1.0, 2: 2.0})
    assert step_time(Trace(1, NOTHING, [operation(8, GB)]), shared, processes=2).total == exactly(0.02)
    assert step_time(Trace(1, NOTHING, [operation(10**10, 8)]), shared, processes=2).total == exactly(0.015)


def test_a_step_hides_what_is_beside_the_computation_of_its_phase() -> None:
    operations = [
        operation(10**10, 8),
        operation(10**10, 8, phase="backward"),
        operation(0, 8, phase="optimizer", name="add"),
    ]
    messages = [
        Collective("send", "forward", 100_000_000, 2),  # 1 ms and a latency, waited for
        Collective("send", "forward", 100_000_000, 2, overlapped=True),  # behind 10 ms
        Collective("send", "backward", 3 * GB, 2, overlapped=True),  # 30 ms, of which 10 are hidden
    ]
    time = step_time(Trace(1, NOTHING, operations, messages), ROUND)
    assert (time.forward, time.backward, time.optimizer) == (exactly(0.01), exactly(0.01), exactly(2.5e-6))
    assert time.communication == exactly(0.032 + 3e-6)
    assert time.exposed == exactly(0.032 + 3e-6 - 0.001 - 1e-6 - 0.01)
    assert time.total == exactly(time.compute + time.exposed) and time.host == 0.0
    assert time.bottleneck == "links" and sum(time.parts.values()) == exactly(time.total)
    assert set(time.parts) == set(BOUNDS)
    busy = step_time(Trace(1, NOTHING, operations, messages), replace(ROUND, overlap=0.0))
    assert busy.exposed == busy.communication == exactly(time.communication)


def test_processes_that_share_cores_compute_longer() -> None:
    shared = replace(ROUND, contention={1: 1.0, 2: 1.5})
    trace = Trace(1, NOTHING, [operation(10**10, 8)])
    assert step_time(trace, shared, processes=2).total == exactly(0.015)
    assert step_time(trace, shared).bottleneck == "compute"
    assert step_time(Trace(1, NOTHING, [operation(8, 10**9)]), shared).bottleneck == "memory"
    assert step_time(Trace(1, NOTHING, [operation(8, 8)]), shared).bottleneck == "launches"


def test_attention_has_a_share_of_its_own_and_skips_what_is_masked() -> None:
    card = replace(CARD, attention_share=0.5)
    attention = operation(10**10, 8, name="_scaled_dot_product_flash_attention_for_cpu_backward")
    assert time_of(attention, replace(ROUND, card=card)) == exactly(0.02)
    assert time_of(replace(attention, done=0.75), replace(ROUND, card=card)) == exactly(0.015)


def test_the_host_launches_ahead_of_what_computes() -> None:
    """Kernels of 2.5 us of which each takes the host 10 us, before and beside one that takes long."""
    small = [operation(0, 8), operation(0, 8, phase="backward"), operation(0, 8, phase="backward")]
    waits = step_time(Trace(1, NOTHING, small), ROUND)
    assert (waits.forward, waits.backward, waits.total) == (exactly(1e-5), exactly(2e-5), exactly(3e-5))
    assert waits.bottleneck == "launches" and sum(waits.parts.values()) == exactly(waits.total)
    hidden = step_time(Trace(1, NOTHING, [*small, operation(10**10, 8)]), ROUND)
    assert hidden.total == exactly(0.01 + 7.5e-6) and hidden.parts["launches"] == exactly(7.5e-6)


def test_a_calibrated_machine_goes_by_its_curves() -> None:
    curves = {
        "product/float32": Curve((100.0, 10_000.0), (1e-6, 1e-4)),
        "elementwise/float32": Curve((10.0, 1000.0), (1e-6, 1e-4)),
    }
    overhead = {"forward": 1e-5, "backward": 2e-5, "optimizer": 0.0}
    calibration = Calibration("here", curves, overhead, step=1e-3)
    measured = replace(ROUND, calibration=calibration)
    assert time_of(operation(1000, 8), measured) == exactly(1e-5 + 1e-5)
    assert time_of(operation(0, 100, name="add"), measured) == exactly(1e-5 + 1e-5)
    assert time_of(operation(0, 100, phase="backward", name="gelu"), measured) == exactly(
        2e-5 + 1e-5
    )  # of another class
    assert time_of(operation(1000, 8, "bfloat16"), measured) == exactly(2e-5)
    step = step_time(Trace(1, NOTHING, [operation(1000, 8)]), measured)
    assert step.host == 1e-3 and step.total == exactly(1e-3 + 2e-5)
    large = replace(measured, calibration=replace(calibration, fresh=1e-9, kept=64e6))
    some, more = (Trace(1, replace(NOTHING, activations=held), []) for held in (64_000_000, 100_000_000))
    assert step_time(some, large).host == 1e-3 and step_time(more, large).host == exactly(1e-3 + 0.036)


@pytest.mark.parametrize(
    ("name", "kind"),
    {
        "mm": "product", "addmm": "product", "bmm": "batched", "mul": "elementwise", "minimum": "elementwise",
        "convolution_backward": "convolution_backward", "_log_softmax_backward_data": "softmax",
        "native_batch_norm_backward": "normalisation_backward", "index_put_": "scatter", "index_select": "gather",
        "_fused_adamw_": "optimizer", "max": "reduction", "any": "reduction", "all": "reduction",
        "allclose": "elementwise",
        "_scaled_dot_product_flash_attention_for_cpu_backward": "attention_backward", "bernoulli_": "random",
        "_scaled_dot_product_flash_attention_for_cpu": "attention", "_to_copy": "copy", "exp": "transcendental",
        "expand_copy": "elementwise",
    }.items(),
)  # fmt: skip
def test_classes_of_operators(name: str, kind: str) -> None:
    assert operator_class(name) == kind
    assert kind in CLASSES or kind == "elementwise"
