"""A planned step against counts by hand: messages, memory and FLOPs of a tiny recipe whose parameters are known.

Plans run in a process that is forked for them: a process can register one device from Python, and never takes it back.
Letters: W ranks, N samples of a step on each.
"""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from functools import cache, partial
from math import prod
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn

from descant.cli.errors import Refusal
from descant.modules.core.batch import Batch
from descant.modules.core.output import Output
from descant.modules.training_setup.activation_checkpointing import Checkpointing
from descant.plan import fake_device
from descant.plan.fake_device import ranks
from descant.plan.layout import Layout
from descant.plan.simulate import Simulation
from descant.plan.trace import PHASES, Trace
from tests.ranks import run_ranks
from tests.step_toy import QUIET, D, N, ToyData, ToyRecipe

#: Numbers of a hidden layer; shapes of a block's parameters and of those of the heads, in the recipe's order.
HIDDEN = 24
BLOCK = [(HIDDEN, D), (HIDDEN,), (D, HIDDEN), (D,)]
HEADS = [(2, D), (2,)] * 2
WHOLE = 4 * sum(prod(shape) for shape in (*BLOCK, *BLOCK, *HEADS))  # bytes in float32


class Wide(ToyRecipe):
    """Two blocks ``Linear, GELU, Linear`` and two heads, trained by AdamW."""

    def __init__(self, fused: bool = False) -> None:
        super().__init__(harmonize=False)
        blocks = (nn.Sequential(nn.Linear(D, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, D)) for _ in range(2))
        trunk: Any = self.towers["trunk"]
        trunk.layers = nn.ModuleList(blocks)
        self.optimization.optimizer = partial(torch.optim.AdamW, fused=True) if fused else torch.optim.AdamW


class FusedStep(Wide):
    def __init__(self) -> None:
        super().__init__(fused=True)


class HalfFrozen(Wide):
    def __init__(self) -> None:
        super().__init__()
        self.towers.requires_grad_(False)


class Reads(Wide):
    """Looks at a value of its device, which costs a run a wait, and is not there in a plan."""

    def forward(self, batch: Batch) -> Output:
        output = super().forward(batch)
        if next(iter(output.terms.values())).value.max().item() > 1e9:
            raise ValueError("large")
        return output


class Plan(L.Callback):
    """Plans at the first batch of a run, as the command does."""

    def __init__(self, layouts: dict[str, Layout]) -> None:
        self.layouts, self.traces = layouts, dict[str, Trace | str]()

    def on_train_batch_start(  # type: ignore[override]  # Lightning ends an epoch at -1
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, index: int
    ) -> int:
        for name, layout in self.layouts.items():
            with ranks(layout.world) if layout.world > 1 else nullcontext():
                try:
                    self.traces[name] = Simulation(pl_module, batch, layout).step(N)
                except Refusal as refusal:
                    self.traces[name] = str(refusal)
        return -1


LAYOUTS: dict[type[Wide], dict[str, Layout]] = {
    Wide: {
        "one": Layout(),
        "checkpointing": Layout(checkpointing=Checkpointing()),
        "ddp": Layout("ddp", 4),
        "fsdp": Layout("fsdp", 4),
        "hsdp": Layout("hsdp", 4, 2),
        "micro": Layout("fsdp", 4, micro=3),
        "thousand": Layout("fsdp", 1024),
    },
    FusedStep: {"fused": Layout()},
    HalfFrozen: {"frozen": Layout("ddp", 4), "frozen, fsdp": Layout("fsdp", 4)},
    Reads: {"reads": Layout()},
}


def plans(rank: int) -> dict[str, Trace | str]:
    found: dict[str, Trace | str] = {}
    for make, layouts in LAYOUTS.items():
        plan = Plan(layouts)
        trainer = L.Trainer(**QUIET, devices=1, max_epochs=1, num_sanity_val_steps=0, callbacks=[plan])
        trainer.fit(make().float(), datamodule=ToyData(torch.float32))
        found |= plan.traces
    return found


@cache
def planned() -> dict[str, Any]:
    found: dict[str, Any] = run_ranks(1, plans)[0]
    return found


def gathered(shapes: list[tuple[int, ...]], group: int) -> int:
    """Bytes of parameters that are split by rows over a group, each rank's part filled up to the largest."""
    return 4 * sum(-(-shape[0] // group) * group * prod(shape[1:]) for shape in shapes)


def local(shapes: list[tuple[int, ...]], group: int) -> int:
    """Bytes of the first rank's part."""
    return 4 * sum(min(-(-shape[0] // group), shape[0]) * prod(shape[1:]) for shape in shapes)


def counts(trace: Trace) -> Counter[tuple[str, int]]:
    return Counter((message.name, message.ranks) for message in trace.collectives)


def test_ddp_sends_each_gradient_once_beside_the_computation() -> None:
    trace = planned()["ddp"]
    assert trace.bytes_by_collective() == {"all_reduce": WHOLE} and len(trace.collectives) == 1
    message = trace.collectives[0]
    assert (message.phase, message.ranks, message.stride, message.overlapped) == ("backward", 4, 1, True)
    phases = [operation.phase for operation in trace.operations]
    assert phases == sorted(phases, key=PHASES.index)  # in the order of the step
    assert message.after == phases.index("optimizer") - 2  # into the bucket and out of it


@pytest.mark.parametrize(("name", "world"), [("fsdp", 4), ("thousand", 1024)])
def test_fsdp_gathers_blocks_twice_and_the_rest_once(name: str, world: int) -> None:
    block, rest = gathered(BLOCK, world), gathered(HEADS, world)
    trace = planned()[name]
    assert counts(trace) == {("all_gather", world): 5, ("reduce_scatter", world): 3}
    assert trace.bytes_by_collective() == {"all_gather": 4 * block + rest, "reduce_scatter": 2 * block + rest}
    assert all(message.overlapped for message in trace.collectives)
    places = [message.after for message in trace.collectives]
    assert places == sorted(places) and len(set(places)) > 3 and places[-1] <= len(trace.operations)


def test_hsdp_gathers_in_a_group_and_reduces_parts_between_groups() -> None:
    block, rest = gathered(BLOCK, 2), gathered(HEADS, 2)
    trace = planned()["hsdp"]
    assert counts(trace) == {("all_gather", 2): 5, ("reduce_scatter", 2): 3, ("all_reduce", 2): 3}
    moved = {"all_gather": 4 * block + rest, "reduce_scatter": 2 * block + rest, "all_reduce": block + rest // 2}
    assert trace.bytes_by_collective() == moved
    strides = {message.name: message.stride for message in trace.collectives}
    assert strides == {"all_gather": 1, "reduce_scatter": 1, "all_reduce": 2}


def test_micro_batches_gather_again_and_reduce_once() -> None:
    trace = planned()["micro"]
    assert counts(trace) == {("all_gather", 4): 13, ("reduce_scatter", 4): 3}
    assert trace.rows == 3 * N  # 13 and 3 were counted of real ranks, docs/guides/devices.md


def test_a_frozen_tower_sends_no_gradients() -> None:
    assert planned()["frozen"].bytes_by_collective() == {"all_reduce": 4 * sum(map(prod, HEADS))}
    assert planned()["frozen, fsdp"].bytes_by_collective()["reduce_scatter"] == gathered(HEADS, 4)


def test_memory_of_weights_gradients_and_states() -> None:
    memory = planned()["one"].memory
    assert (memory.weights, memory.gradients, memory.optimizer, memory.buckets) == (WHOLE, WHOLE, 2 * WHOLE, 0)
    assert planned()["ddp"].memory.buckets == WHOLE
    part = local(BLOCK, 4) * 2 + local(HEADS, 4)
    memory = planned()["fsdp"].memory
    assert (memory.weights, memory.gradients, memory.optimizer, memory.buckets) == (part, part, 2 * part, 0)
    parameters = 2 * len(BLOCK) + len(HEADS)
    assert planned()["fused"].memory.optimizer == 2 * WHOLE + 4 * parameters  # its counts of steps are on the device


def test_the_fused_optimizer_reads_four_lists_and_writes_three() -> None:
    groups = [one for one in planned()["fused"].operations if one.name == "_fused_adamw_"]
    parameters = 2 * len(BLOCK) + len(HEADS)
    assert len(groups) == 2  # with weight decay, and without
    assert sum(one.read for one in groups) == 4 * WHOLE + 4 * parameters
    assert sum(one.written for one in groups) == 3 * WHOLE


def test_flops_are_those_of_products_forward_and_backward() -> None:
    trace = planned()["one"]
    layer, heads = 2 * N * D * HIDDEN, 2 * 2 * N * D * 2
    forward = 2 * 2 * layer + heads
    by_phase: Counter[str] = Counter()
    for operation in trace.operations:
        by_phase[operation.phase] += operation.flops
    assert +by_phase == {"forward": forward, "backward": 2 * forward - layer}  # no gradient of what goes in


def test_checkpointing_computes_blocks_again_and_keeps_less() -> None:
    plain, again = planned()["one"], planned()["checkpointing"]
    layer = 2 * N * D * HIDDEN
    assert again.flops == plain.flops + 2 * layer  # of each block the first product: the second is not asked for
    assert again.memory.activations < plain.memory.activations
    kept = plain.memory.activations - again.memory.activations
    assert kept >= 4 * N * HIDDEN  # a hidden layer of one block
    assert again.memory.weights == plain.memory.weights and not again.collectives


def test_a_read_of_a_value_is_refused_in_one_line_with_its_place() -> None:
    line = planned()["reads"]
    assert isinstance(line, str) and line.startswith("plan: Reads: forward (test_simulate.py:")
    assert "host copy" in line and "\n" not in line


def _seeded(rank: int) -> float:
    fake_device.register()
    with torch.random.fork_rng():
        torch.get_device_module(fake_device.NAME).manual_seed(1)
        return float(torch.manual_seed(0).initial_seed())


@pytest.mark.ddp
def test_a_process_that_has_planned_may_seed_and_train() -> None:
    assert run_ranks(1, _seeded) == [0.0]
