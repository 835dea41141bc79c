"""A plan of one command: its recipe built, its layouts searched, and what was found as text, overlays and a picture."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from descant.callbacks.plots.rank_times import rank_times
from descant.cli.arguments import Request
from descant.cli.errors import fail, say
from descant.cli.main import run
from descant.modules.core.batch import Batch
from descant.modules.io.files import write_json, write_text
from descant.modules.training_setup.compile_and_shard import Compile
from descant.plan.hardware import Hardware
from descant.plan.plan import Given
from descant.plan.planner import Building
from descant.plan.roofline import BOUNDS, time_of_collective
from descant.plan.search import Planned, Search, best
from descant.plan.trace import Collective
from descant.recipes.base.recipe import Recipe
from descant.recipes.staged import Staged

_UNITS = {"TB": 1e12, "GB": 1e9, "MB": 1e6, "kB": 1e3}


def planned(request: Request, given: Given, hardware: Hardware) -> int:
    """Plan a command; returns the exit code."""

    def plan(recipe: Recipe, batch: Batch, rows: int, steps: float, parts: list[Any]) -> None:
        _plan(recipe, batch, given.batch or rows, steps, parts, given, hardware)

    native = "bf16-mixed" if "bfloat16" in hardware.card.peak else "32-true"
    return run(request, Building(plan, native))


def _plan(
    recipe: Recipe, batch: Batch, rows: int, steps: float, parts: list[Any], given: Given, hardware: Hardware
) -> None:
    search = Search(recipe, batch, rows, hardware, (given.nodes, given.gpus_per_node), parts)
    total = sum(p.numel() for p in recipe.parameters())
    ranks = f"{search.world:,} ranks ({given.nodes} x {given.gpus_per_node})"
    print(f"plan       {type(recipe).__name__}, {total:,} parameters, {recipe.trainer.precision}")
    print(f"on         {ranks} of {hardware.card.name}, {_size(hardware.card.memory)} each")
    length = f", {steps:,.0f} steps" if math.isfinite(steps) else ""
    print(f"step       {rows:,} samples, {search.rows:,} a rank{length}")
    if isinstance(recipe, Staged):
        print(f"stage      {recipe.stage}, the first; steps of the others are not planned")
    if any(isinstance(part, Compile) for part in parts):
        print("compile    is not simulated: times are those of separate kernels")
    report = Report(search, steps)
    print("\n" + report.head())
    for line in search.lines():
        report.add(line)
        print(report.row(line))
    chosen = report.chosen
    if not chosen:
        fail(f"no layout of {rows:,} samples fits in {_size(hardware.card.memory)}; the most rows are in the table")
    for line in list(search.exchanges(chosen[0])):
        report.add(line)
        print(report.row(line))
    chosen = report.chosen
    print("\n" + "\n".join(report.details(chosen[0])))
    for n, one in enumerate(chosen, 1):
        text = yaml.safe_dump(overlay(one, given, type(getattr(recipe, "loss", None)).__name__), sort_keys=False)
        print(f"{'best' if n == 1 else '':10s} {n}. {one.name}" + (f": {given.save}-{n}.yaml" if given.save else ""))
        if given.save:
            write_text(Path(f"{given.save}-{n}.yaml"), f"# {report.summary(one)}\n{text}")
    if given.picture:
        _draw(Path(given.picture), report, f"{chosen[0].name}, {rows:,} samples a step, {hardware.card.name}")
        say(f"{given.picture}: time of a step by number of ranks")
    if given.json:
        write_json(Path(given.json), {"lines": [report.plain(line) for line in report.lines]})


def _draw(file: Path, report: Report, title: str) -> None:
    """Milliseconds of the same step on fewer and more ranks, by what bounds them."""
    names, parts = list[str](), {name: list[float]() for name in BOUNDS}
    for world, line in report.search.by_number(report.chosen[0]):
        names.append(f"{world:,} ranks, {report.samples(line):,.0f} samples/s")
        for name in BOUNDS:
            parts[name].append(1e3 * line.time.parts[name])
    rank_times(title, names, parts).savefig(file)


class Report:
    """Rows of the table, and the details of one of them."""

    def __init__(self, search: Search, steps: float) -> None:
        self.search, self.steps = search, steps
        self.lines: list[Planned] = []
        self.flops = 0

    @property
    def chosen(self) -> list[Planned]:
        return best(self.lines)

    def add(self, line: Planned) -> None:
        if not self.flops:  # of the first layout, which recomputes nothing
            self.flops = line.trace.flops
        self.lines.append(line)

    def head(self) -> str:
        shares = " ".join(f"{name:>8s}" for name in BOUNDS)
        left = f"{'layout':32s} {'memory':>8s} {'most':>7s} {'step':>9s} {shares}"
        return f"{left} {'MFU':>6s} {'samples/s':>10s} {'hours':>7s} {'GPU-hours':>9s}"

    def row(self, line: Planned) -> str:
        time, total = line.time, line.time.total
        shares = " ".join(f"{time.parts[name] / total:8.0%}" for name in BOUNDS)
        hours = self.steps * total / 3600
        known = math.isfinite(hours)
        return (
            f"{line.name:32s} {_size(line.trace.memory.peak):>8s} {line.most:>7,d} "
            f"{_time(total):>9s} {shares} {self.mfu(line):6.1%} {_number(self.samples(line)):>10s} "
            f"{_number(hours) if known else '-':>7s} {_number(hours * self.search.world) if known else '-':>9s}"
            f"{'' if line.fits else '  does not fit'}"
        )

    def mfu(self, line: Planned) -> float:
        """Arithmetic of the model, without what is recomputed, over the card's peak in the type of most of it."""
        by_type: Counter[str] = Counter()
        for operation in line.trace.operations:
            by_type[operation.dtype] += operation.flops
        peak = self.search.hardware.card.peak
        return self.flops / (line.time.total * peak.get(by_type.most_common(1)[0][0], peak["float32"]))

    def samples(self, line: Planned) -> float:
        return line.trace.rows * line.layout.world / line.time.total

    def details(self, line: Planned) -> list[str]:
        memory, card = line.trace.memory, self.search.hardware.card
        parts = ("weights", "gradients", "optimizer", "buckets", "activations")
        held = ", ".join(f"{name} {_size(getattr(memory, name))}" for name in parts)
        lines = [f"memory     {held}; the largest tensor {_size(memory.largest)}"]
        kinds: dict[tuple[str, int, int, bool], list[Collective]] = {}
        for m in line.trace.collectives:
            kinds.setdefault((m.name, m.ranks, m.stride, m.overlapped), []).append(m)
        for (name, group, stride, beside), some in kinds.items():
            seconds = sum(time_of_collective(m, self.search.hardware) for m in some)
            where = "within a node" if (group - 1) * stride < self.search.per_node else "between nodes"
            lines.append(
                f"messages   {name} of {group:,} ranks {where}: {len(some)} x, {_size(sum(m.bytes for m in some))}, "
                f"{_time(seconds)}{' beside the computation' if beside else ''}"
            )
        state, hardware = self.state(), self.search.hardware
        alone, together = _time(state / hardware.store), _time(state / (hardware.store * self.search.nodes))
        lines.append(f"checkpoint {_size(state)}: {alone} by one rank, {together} in parts by all nodes")
        if line.trace.tokens:
            tokens = line.trace.tokens * self.search.world / line.time.total
            lines.append(f"tokens     {tokens:,.0f} a second, {tokens / self.search.world:,.0f} a rank")
        lines.append(f"compute    {line.trace.flops / 1e12:.4g} TFLOP a rank and step; {card.name}: {card.source}")
        time = line.time
        lines.append(
            f"time       forward {_time(time.forward)}, backward {_time(time.backward)}, "
            f"optimizer {_time(time.optimizer)}, messages {_time(time.communication)}, of which "
            f"{_time(time.exposed)} are waited for; most of it {time.bound}"
        )
        return lines

    def state(self) -> int:
        """Bytes of a checkpoint: weights and states of the optimizer, whole."""
        whole = next(line for line in self.lines if line.layout.strategy == "ddp")
        return whole.trace.memory.weights + whole.trace.memory.optimizer

    def summary(self, line: Planned) -> str:
        hours = f", {_number(self.steps * line.time.total / 3600)} hours" if math.isfinite(self.steps) else ""
        return f"{line.name}: {_size(line.trace.memory.peak)} a rank, {_time(line.time.total)} a step{hours}"

    def plain(self, line: Planned) -> dict[str, Any]:
        """Of one layout, for ``--json``."""
        return {
            "layout": line.name,
            "ranks": line.layout.world,
            "rows": line.trace.rows,
            "tokens": line.trace.tokens,
            "fits": line.fits,
            "most_rows": line.most,
            "memory": {**asdict(line.trace.memory), "peak": line.trace.memory.peak},
            "flops": line.trace.flops,
            "bytes": dict(line.trace.moved()),
            "seconds": {**asdict(line.time), "total": line.time.total},
            "mfu": self.mfu(line),
            "samples_per_second": self.samples(line),
            "hours": self.steps * line.time.total / 3600 if math.isfinite(self.steps) else None,
        }


def overlay(line: Planned, given: Given, loss: str) -> dict[str, Any]:
    """Configuration of a layout, to be laid over the experiment; ``loss``: the class of its loss."""
    layout = line.layout
    trainer: dict[str, Any] = {"num_nodes": given.nodes, "devices": given.gpus_per_node}
    arguments: dict[str, Any] = {}
    if layout.world > 1:
        trainer["strategy"] = {"class_path": "descant.run.sharded.Sharded"} if layout.sharding is not None else "ddp"
    if layout.sharding is not None:
        arguments["shard"] = {"class_path": "Shard"}
        if layout.strategy == "hsdp":
            arguments["shard"]["init_args"] = {"shard": "node"}
    if layout.checkpointing is not None:
        arguments["checkpointing"] = {"class_path": "Checkpointing"}
    if layout.chunks > 1:
        arguments["chunks"] = layout.chunks
    if layout.micro > 1:
        trainer["accumulate_grad_batches"] = layout.micro
    if layout.exchange is not None:
        exchange = {"class_path": type(layout.exchange).__name__}
        arguments["loss"] = {"class_path": loss, "init_args": {"exchange": exchange}}
    made: dict[str, Any] = {"trainer": trainer}
    if arguments:
        made["model"] = {"init_args": arguments}
    if given.batch is not None or layout.micro > 1:
        rows = line.trace.rows * layout.world // layout.micro
        made["data"] = {"init_args": {"batch_size": rows}}
    return made


def _size(count: float) -> str:
    """
    >>> _size(123), _size(45_600_000), _size(16_800_000_000)
    ('123 B', '45.6 MB', '16.8 GB')
    """
    for unit, size in _UNITS.items():
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} B"


def _time(seconds: float) -> str:
    """
    >>> _time(0.0000123), _time(0.25), _time(75)
    ('12.3 us', '250 ms', '75 s')
    """
    for unit, size in {"s": 1.0, "ms": 1e-3, "us": 1e-6}.items():
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.1g} s"


def _number(value: float) -> str:
    """
    >>> _number(0.1234), _number(12345.6)
    ('0.123', '12,346')
    """
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
