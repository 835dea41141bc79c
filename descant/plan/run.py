"""Plan one command: build its recipe, search its layouts, and write the results as text, overlays and a picture."""

from __future__ import annotations

import math
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
from descant.plan.planner import Building
from descant.plan.report import Report, overlay, size_text
from descant.plan.request import PlanRequest
from descant.plan.roofline import BOUNDS
from descant.plan.search import Search
from descant.recipes.base.recipe import Recipe
from descant.recipes.staged import Staged


def plan_command(request: Request, given: PlanRequest, hardware: Hardware) -> int:
    """Plan a command and return the exit code."""

    def plan(recipe: Recipe, batch: Batch, rows: int, steps: float, parts: list[Any]) -> None:
        search = Search(recipe, batch, given.batch or rows, hardware, (given.nodes, given.gpus_per_node), parts)
        report = Report(search, steps)
        _show(report, parts)
        _write(report, given, rows, parts)

    native = "bf16-mixed" if "bfloat16" in hardware.card.peak else "32-true"
    return run(request, Building(plan, native))


def _show(report: Report, parts: list[Any]) -> None:
    """Print the table, each row as soon as it is found, and the details of the best layout."""
    search, steps = report.search, report.steps
    recipe, card, rows = search.recipe, search.hardware.card, search.rows * search.world
    total = sum(p.numel() for p in recipe.parameters())
    print(f"plan       {type(recipe).__name__}, {total:,} parameters, {recipe.trainer.precision}")
    on = f"{search.world:,} ranks ({search.nodes} x {search.per_node}) of {card.name}"
    print(f"on         {on}, {size_text(card.memory)} each")
    length = f", {steps:,.0f} steps" if math.isfinite(steps) else ""
    print(f"step       {rows:,} samples, {search.rows:,} a rank{length}")
    if isinstance(recipe, Staged):
        print(f"stage      {recipe.stage}, the first; steps of the others are not planned")
    if any(isinstance(part, Compile) for part in parts):
        print("compile    is not simulated: times are those of separate kernels")
    print("\n" + report.head(), flush=True)
    for line in search.lines():
        print(report.add(line), flush=True)
    if not report.best_layouts:
        fail(f"no layout of {rows:,} samples fits in {size_text(card.memory)}; the most rows are in the table")
    for line in list(search.exchanges(report.best_layouts[0])):
        print(report.add(line), flush=True)
    print("\n" + "\n".join(report.details(report.best_layouts[0])))
    for n, one in enumerate(report.best_layouts, 1):
        print(f"{'best' if n == 1 else '':10s} {n}. {one.name}")


def _write(report: Report, given: PlanRequest, rows: int, parts: list[Any]) -> None:
    """Write the requested files; ``rows`` are those of a step of the experiment."""
    for n, one in enumerate(report.best_layouts, 1):
        if given.save:
            content = overlay(one, report.search.recipe, rows, parts, given.nodes)
            text = yaml.safe_dump(content, sort_keys=False)
            write_text(Path(f"{given.save}-{n}.yaml"), f"# {report.summary(one)}\n{text}")
            say(f"{given.save}-{n}.yaml: {one.name}, to be laid over the experiment")
    if given.picture:
        _draw(Path(given.picture), report)
        say(f"{given.picture}: time of a step by number of ranks")
    if given.json:
        write_json(Path(given.json), {"lines": [report.plain(line) for line in report.lines]})


def _draw(file: Path, report: Report) -> None:
    """Plot the best layout's step on fewer ranks and on all: milliseconds summed over ranks, by what bounds them.

    With ideal scaling, all bars would be equally long; a longer bar shows the price of a faster step.
    """
    search, best = report.search, report.best_layouts[0]
    names, parts = list[str](), {name: list[float]() for name in BOUNDS}
    for world, line in search.by_number(best):
        names.append(f"{world:,} ranks, {1e3 * line.time.total:,.3g} ms")
        for name in BOUNDS:
            parts[name].append(1e3 * line.time.parts[name] * world)
    title = f"{best.name}, {search.rows * search.world:,} samples a step, {search.hardware.card.name}"
    rank_times(title, names, parts, "milliseconds a step, of all ranks together").savefig(file)
