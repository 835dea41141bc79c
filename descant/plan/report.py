"""Report a plan's layouts: rows of a table, the details of one, numbers for programs, and overlays."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from descant.modules.training_setup.activation_checkpointing import Checkpointing
from descant.modules.training_setup.compile_and_shard import Shard
from descant.plan.roofline import BOUNDS, time_of_collective
from descant.plan.search import Planned, Search, best
from descant.plan.trace import Collective


class Report:
    """The layouts of one search, in the order found; ``steps`` is the length of the run, or infinity."""

    def __init__(self, search: Search, steps: float) -> None:
        self.search, self.steps = search, steps
        self.lines: list[Planned] = []

    @property
    def best_layouts(self) -> list[Planned]:
        """Return the best layouts."""
        return best(self.lines)

    def add(self, line: Planned) -> str:
        """Keep a layout and return its table row."""
        self.lines.append(line)
        return self.row(line)

    def head(self) -> str:
        shares = " ".join(f"{name:>8s}" for name in BOUNDS)
        left = f"{'layout':32s} {'memory':>8s} {'most':>7s} {'step':>9s} {shares}"
        return f"{left} {'MFU':>6s} {'samples/s':>10s} {'hours':>7s} {'GPU-hours':>9s}"

    def row(self, line: Planned) -> str:
        time, total, hours = line.time, line.time.total, self.hours(line)
        shares = " ".join(f"{time.parts[name] / total:8.0%}" for name in BOUNDS)
        times = ["-", "-"] if hours is None else [number_text(hours), number_text(hours * line.layout.world)]
        return (
            f"{line.name:32s} {size_text(line.trace.memory.peak):>8s} {line.most:>7,d} {time_text(total):>9s} {shares} "
            f"{self.mfu(line):6.1%} {number_text(self.samples(line)):>10s} {times[0]:>7s} {times[1]:>9s}"
            f"{'' if line.fits else '  does not fit'}"
        )

    def hours(self, line: Planned) -> float | None:
        """Return the hours of the run, or None if it has no end."""
        return self.steps * line.time.total / 3600 if math.isfinite(self.steps) else None

    def mfu(self, line: Planned) -> float:
        """Return the model FLOPs over those that the card could do in the same time: ``flops / (seconds x peak)``.

        The FLOPs are those of the first layout, without FLOPs that backward repeats (``Trace.model_flops``). Causal
        attention counts in full. The peak is that of the dtype with the most FLOPs.

        Source: PaLM, Chowdhery 2022, appendix B (model FLOPs utilisation).
        """
        by_type: Counter[str] = Counter()
        for operation in line.trace.operations:
            by_type[operation.dtype] += operation.flops
        peak = self.search.hardware.card.peak
        dtype = by_type.most_common(1)[0][0]
        return self.lines[0].trace.model_flops / (line.time.total * peak.get(dtype, peak["float32"]))

    def samples(self, line: Planned) -> float:
        """Return samples per second over all ranks."""
        return line.trace.rows * line.layout.world / line.time.total

    def details(self, line: Planned) -> Iterator[str]:
        """Yield lines on memory, messages, checkpoint, tokens, arithmetic and time of a layout."""
        hardware, memory, time, world = self.search.hardware, line.trace.memory, line.time, line.layout.world
        parts = ("weights", "gradients", "optimizer", "buckets", "activations")
        held = ", ".join(f"{name} {size_text(getattr(memory, name))}" for name in parts)
        yield f"memory     {held}; the largest tensor {size_text(memory.largest)}"
        yield from self.messages(line)
        state = self.state()
        alone, together = time_text(state / hardware.store), time_text(state / (hardware.store * self.search.nodes))
        yield f"checkpoint {size_text(state)}: {alone} by one rank, {together} in parts by all nodes"
        if line.trace.tokens:
            tokens = line.trace.tokens * world / time.total
            yield f"tokens     {tokens:,.0f} a second, {tokens / world:,.0f} a rank"
        card = hardware.card
        done, model = line.trace.flops / 1e12, self.lines[0].trace.model_flops / 1e12
        yield f"compute    {model:.4g} TFLOP of the model a rank and step, {done:.4g} done; {card.name}: {card.source}"
        yield (
            f"time       forward {time_text(time.forward)}, backward {time_text(time.backward)}, optimizer "
            f"{time_text(time.optimizer)}, messages {time_text(time.communication)}, of which "
            f"{time_text(time.exposed)} are waited for; most of it {time.bottleneck}"
        )

    def messages(self, line: Planned) -> Iterator[str]:
        """Yield the number, bytes and time of messages by kind, group, and whether they overlap the computation."""
        kinds: dict[tuple[str, int, int, bool], list[Collective]] = {}
        for one in line.trace.collectives:
            kinds.setdefault((one.name, one.ranks, one.stride, one.overlapped), []).append(one)
        for (name, group, stride, beside), some in kinds.items():
            seconds = sum(time_of_collective(one, self.search.hardware) for one in some)
            where = "within a node" if (group - 1) * stride < self.search.per_node else "between nodes"
            size = size_text(sum(one.bytes for one in some))
            yield (
                f"messages   {name} of {group:,} ranks {where}: {len(some)} x, {size}, {time_text(seconds)}"
                f"{' beside the computation' if beside else ''}"
            )

    def state(self) -> int:
        """Return the bytes of an unsharded checkpoint: weights and optimizer states."""
        whole = next(line for line in self.lines if line.layout.strategy == "ddp")
        return whole.trace.memory.weights + whole.trace.memory.optimizer

    def summary(self, line: Planned) -> str:
        hours = self.hours(line)
        length = "" if hours is None else f", {number_text(hours)} hours"
        return f"{line.name}: {size_text(line.trace.memory.peak)} a rank, {time_text(line.time.total)} a step{length}"

    def plain(self, line: Planned) -> dict[str, Any]:
        """Return the numbers of one layout for ``--json``: bytes, seconds, and shares of 1."""
        return {
            "layout": line.name,
            "ranks": line.layout.world,
            "rows": line.trace.rows,
            "tokens": line.trace.tokens,
            "fits": line.fits,
            "most_rows": line.most,
            "memory": {**asdict(line.trace.memory), "peak": line.trace.memory.peak},
            "flops": line.trace.flops,
            "model_flops": self.lines[0].trace.model_flops,
            "bytes": dict(line.trace.bytes_by_collective()),
            "seconds": {**asdict(line.time), "total": line.time.total},
            "mfu": self.mfu(line),
            "samples_per_second": self.samples(line),
            "hours": self.hours(line),
        }


def overlay(line: Planned, recipe: Any, rows: int, parts: list[Any], nodes: int) -> dict[str, Any]:
    """Return a layout as a configuration to lay over the experiment.

    Args:
        recipe: of the experiment. rows: samples of its whole step. parts: its Shard and Checkpointing, if it has them.
        nodes: number of nodes with ranks.
    """
    accumulate = recipe.trainer.accumulate_grad_batches
    layout = line.layout
    trainer: dict[str, Any] = {"num_nodes": nodes, "devices": layout.world // nodes, "strategy": "auto"}
    if layout.world > 1:
        trainer["strategy"] = {"class_path": "descant.run.sharded.Sharded"} if layout.sharding is not None else "ddp"
    if layout.micro != accumulate:
        trainer["accumulate_grad_batches"] = layout.micro
    arguments: dict[str, Any] = {}
    if layout.sharding is not None:
        arguments["shard"] = {"class_path": "Shard"}
        if layout.strategy == "hsdp":
            arguments["shard"]["init_args"] = {"shard": "node"}
        elif any(isinstance(part, Shard) for part in parts):  # which may configure groups: reset them
            arguments["shard"]["init_args"] = {"replicate": None, "shard": None}
    elif any(isinstance(part, Shard) for part in parts):
        arguments["shard"] = None
    configured = any(isinstance(part, Checkpointing) for part in parts)
    if layout.checkpointing is not None and not configured:
        arguments["checkpointing"] = {"class_path": "Checkpointing"}
    elif layout.checkpointing is None and configured:
        arguments["checkpointing"] = None
    if layout.chunks > 1:
        arguments["chunks"] = layout.chunks
    if layout.exchange is not None:
        exchange = {"exchange": {"class_path": type(layout.exchange).__name__}}
        loss = next(iter(recipe.losses.values()))
        arguments["loss"] = {"class_path": type(loss).__name__, "init_args": exchange}
    made: dict[str, Any] = {"trainer": trainer}
    if arguments:
        made["model"] = {"init_args": arguments}
    size = line.trace.rows * layout.world // layout.micro
    if size != rows // accumulate:
        made["data"] = {"init_args": {"batch_size": size}}
    return made


#: Units of bytes, largest first.
_UNITS = {"TB": 1e12, "GB": 1e9, "MB": 1e6, "kB": 1e3}


def size_text(count: float) -> str:
    """Format bytes to three digits, with a unit.

    >>> size_text(123), size_text(45_600_000), size_text(16_800_000_000)
    ('123 B', '45.6 MB', '16.8 GB')
    """
    for unit, size in _UNITS.items():
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} B"


def time_text(seconds: float) -> str:
    """Format seconds to three digits, with a unit.

    >>> time_text(0.0000123), time_text(0.25), time_text(75)
    ('12.3 us', '250 ms', '75 s')
    """
    for unit, size in {"s": 1.0, "ms": 1e-3, "us": 1e-6}.items():
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.1g} s"


def number_text(value: float) -> str:
    """Format a number to three digits, or to an integer from 100 on.

    >>> number_text(0.1234), number_text(12345.6)
    ('0.123', '12,346')
    """
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
