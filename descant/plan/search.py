"""Search all layouts of a run on a number of ranks, each with its memory and time, and select the best.

Letters: W ranks, B rows of a rank in a step, P pieces of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from descant.cli.errors import fail
from descant.cli.estimate import fit_curve, most_rows
from descant.modules.adaptation.base import LM, select_towers
from descant.modules.core.batch import Batch
from descant.modules.losses.exchange import Chunks, Exchange, Ring
from descant.modules.training_setup.activation_checkpointing import Checkpointing, blocks_of
from descant.modules.training_setup.compile_and_shard import Shard
from descant.plan.fake_device import ranks
from descant.plan.hardware import Hardware
from descant.plan.layout import Layout
from descant.plan.roofline import StepTime, step_time
from descant.plan.simulate import Simulation
from descant.plan.trace import Trace
from descant.recipes.contrastive import Contrastive

#: Share of a card's memory that a run may fill; the driver, libraries and fragmentation take the rest.
USABLE = 0.92
#: Numbers of pieces that are tried if a batch does not fit whole.
PIECES = (2, 4, 8, 16, 32)
#: Other exchanges are tried if logits fill this share of a card's memory, and up to this number of ranks.
WORTH, MOST = 0.02, 128


@dataclass(frozen=True)
class Planned:
    """One layout, with the trace and time of its step; ``most`` rows of a rank fit at once, over all micro-batches."""

    layout: Layout
    trace: Trace
    time: StepTime
    most: int
    fits: bool

    @property
    def name(self) -> str:
        layout = self.layout
        parts: list[str] = [layout.strategy if layout.world > 1 else "one"]
        parts += ["checkpointing"] * (layout.checkpointing is not None)
        parts += [f"chunks {layout.chunks}"] * (layout.chunks > 1)
        parts += [f"micro-batches {layout.micro}"] * (layout.micro > 1)
        if layout.exchange is not None:
            parts.append(f"exchange {type(layout.exchange).__name__}")
        return " ".join(parts)


class Search:
    """The layouts of one recipe on some hardware.

    Args:
        recipe: see :class:`~descant.plan.simulate.Simulation`; without sharding. batch: some real samples.
        rows: of a whole step, on all ranks. ranks: number of nodes, and ranks of each.
        parts: Shard and Checkpointing of the configuration; their dtype and towers are kept.
    """

    def __init__(
        self,
        recipe: Any,
        batch: Batch,
        rows: int,
        hardware: Hardware,
        ranks: tuple[int, int],
        parts: Sequence[object] = (),
    ) -> None:
        self.nodes, self.per_node = ranks
        self.recipe, self.batch, self.hardware = recipe, batch, replace(hardware, node=self.per_node)
        self.world = self.nodes * self.per_node
        self.shard = next((part for part in parts if isinstance(part, Shard)), None)
        given = next((part for part in parts if isinstance(part, Checkpointing)), Checkpointing())
        blocks = any(blocks_of(tower) for _, tower in select_towers(recipe, given.towers, LM))
        #: Choices of recomputed blocks: none, and those that the configuration names, or all.
        self.checkpointing = [None, given] if blocks else [None]
        if rows % self.world:
            low = rows // self.world * self.world
            near = " or ".join(f"{n:,}" for n in (low, low + self.world) if n)
            fail(f"data.batch_size {rows:,}: {self.world:,} ranks do not divide it; nearest: {near}")
        self.rows = rows // self.world
        self.on_cpu = len(hardware.contention) > 1

    @cached_property
    def strategies(self) -> list[str]:
        if self.world == 1:
            return ["ddp"]
        return ["ddp", "fsdp", *(["hsdp"] if self.nodes > 1 and self.per_node > 1 else [])]

    def room(self) -> float:
        return USABLE * self.hardware.card.memory

    @contextmanager
    def simulation(self, layout: Layout) -> Iterator[Simulation]:
        with ranks(layout.world) if layout.world > 1 else nullcontext():
            yield Simulation(self.recipe, self.batch, layout, gloo=self.on_cpu)

    def trace_step(self, layout: Layout, rows: int) -> Trace:
        """Trace a step of a layout with ``rows`` rows in a micro-batch."""
        with self.simulation(layout) as simulation:
            return simulation.step(rows)

    def lines(self) -> Iterator[Planned]:
        """Yield each layout: strategies, with and without checkpointing, then in pieces if it does not fit whole."""
        least: list[float] = []
        for again in self.checkpointing:
            curve: np.ndarray | None = None
            for strategy in self.strategies:
                layout = self.layout(strategy, again)
                with self.simulation(layout) as simulation:
                    trace = simulation.step(self.rows)
                    if curve is None:
                        sizes = self.sizes(trace)
                        traces = [trace if n == self.rows else simulation.step(n) for n in sizes]
                        curve = fit_curve(sizes, [float(one.memory.activations) for one in traces])
                one = self.plan_layout(layout, trace, curve)
                least.append(one.trace.memory.peak - self.rise(curve, self.rows) + self.rise(curve, 1))
                yield one
                if not one.fits and (smaller := self.pieces(one, curve)) is not None:
                    yield smaller
        if min(least) > self.room():
            fail(
                f"{self.hardware.card.name}: {self.hardware.card.memory / 1e9:.4g} GB, and a step of one sample "
                f"on each of {self.world:,} ranks needs at least {min(least) / USABLE / 1e9:.4g} GB"
            )

    def layout(self, strategy: Any, again: Checkpointing | None) -> Layout:
        dtype = None if self.shard is None else self.shard.dtype
        return Layout(strategy, self.world, self.per_node, again, dtype=dtype)

    def sizes(self, trace: Trace) -> list[int]:
        """Choose numbers of rows to measure activations at: near what fits, with activations as most of the memory.

        Losses over all pairs need the quadratic part.
        """
        powers = range(3 if self.recipe.in_batch_negatives else 2)
        if trace.memory.activations < self.room() / 4:
            times = max(int((self.room() / 4 / max(trace.memory.activations, 1)) ** (1 / len(powers))), 2)
            return [self.rows * times**power for power in powers]
        return sorted({max(self.rows >> power, 1) for power in powers})

    def rise(self, curve: np.ndarray, rows: int) -> float:
        return float(np.polyval(curve, rows))

    def plan_layout(self, layout: Layout, trace: Trace, curve: np.ndarray) -> Planned:
        processes = self.per_node if self.on_cpu else 1
        constant = trace.memory.peak - self.rise(curve, self.rows // layout.micro)
        most = most_rows(curve, self.room() - constant) * layout.micro
        fits = trace.memory.peak <= self.room()
        return Planned(layout, trace, step_time(trace, self.hardware, processes), most, fits)

    def pieces(self, one: Planned, curve: np.ndarray) -> Planned | None:
        """Return the layout in the fewest pieces that fit, or None."""
        rest = one.trace.memory.peak - self.rise(curve, self.rows)
        for pieces in PIECES:
            if self.rows % pieces == 0 and rest + self.rise(curve, self.rows // pieces) <= self.room():
                return self.split_layout(one.layout, pieces, curve)
        return None

    def split_layout(self, layout: Layout, pieces: int, curve: np.ndarray) -> Planned:
        """Split a layout into pieces: GradCache if samples are each other's negatives, otherwise micro-batches."""
        if self.recipe.in_batch_negatives:
            layout = replace(layout, chunks=pieces)
            return self.plan_layout(layout, self.trace_step(layout, self.rows), curve)
        layout = replace(layout, micro=pieces)
        return self.plan_layout(layout, self.trace_step(layout, self.rows // pieces), curve)

    def exchanges(self, best: Planned) -> Iterator[Planned]:
        """Yield the best layout with the other exchanges of samples between ranks.

        This applies if its losses offer a choice and the logits of all pairs take much of the memory. It is limited to
        :data:`MOST` ranks, because each hop is simulated.
        """
        losses = self.recipe.losses.values() if isinstance(self.recipe, Contrastive) else ()  # its argument ``loss``
        if self.world == 1 or not losses or not all(hasattr(loss, "exchange") for loss in losses):
            return
        logits = 2 * 4 * self.rows * self.rows * self.world  # float32, in both directions, without blocks
        if logits < WORTH * self.hardware.card.memory or self.world > MOST:
            return
        ways: list[Exchange] = [Chunks(), Ring()]
        for way in ways:
            layout = replace(best.layout, exchange=way)
            trace = self.trace_step(layout, self.rows)
            curve = np.array([0.0, float(trace.memory.activations)])
            yield replace(self.plan_layout(layout, trace, curve), most=best.most)

    def by_number(self, best: Planned) -> Iterator[tuple[int, Planned]]:
        """Yield the best layout for the same step on fewer ranks, with their number, down to one node."""
        nodes = self.nodes
        while nodes >= 1:
            world = nodes * self.per_node
            rows = self.rows * self.world // world
            strategy: Any = best.layout.strategy if nodes > 1 or best.layout.strategy != "hsdp" else "fsdp"
            layout = replace(best.layout, strategy=strategy, world=world)
            trace = self.trace_step(layout, rows // layout.micro)
            curve = np.array([float(trace.memory.activations)])
            yield world, self.plan_layout(layout, trace, curve)
            nodes //= 2


def best(lines: list[Planned], number: int = 3) -> list[Planned]:
    """Return the fastest layouts that fit; equally fast ones (to two digits) are ordered by memory."""
    fitting = [one for one in lines if one.fits]
    return sorted(fitting, key=lambda one: (float(f"{one.time.total:.2g}"), one.trace.memory.peak))[:number]
