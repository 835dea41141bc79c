"""Plans of published runs at their own settings, beside their throughput: ``python -m benchmarks plan/published``.

Facts and settings are in ``plans/published.yaml``. If a plan leaves out a part of a run, the row names it and only
informs.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import yaml

from benchmarks import Row

FOLDER = Path(__file__).parent / "plans"
#: Published card -> hardware that ships, or a file.
CARDS = {
    "A100 40 GB": "a100-40gb",
    "A100": "a100-40gb",  # JUWELS Booster, on which the scaling laws were measured (Cherti 2022)
    "A100 80 GB": "a100-80gb",
    "H100 96 GB HBM2e, 500 W": str(FOLDER / "hardware" / "h100-96gb-500w.yaml"),
}
BAR = (0.75, 1.25)
#: Other ways to plan some of the runs, to show the cost of a difference.
OTHERS: dict[str, tuple[Literal["today", "kept"], ...]] = {
    "clip-b32-laion400m": ("today",),
    "clip-l14-laion400m": ("today",),
    "llama3-8b-fsdp-8": ("today", "kept"),
}


@dataclass(frozen=True)
class Published:
    """One published run; keys are those of ``published.yaml``."""

    name: str
    facts: dict[str, Any]

    @property
    def rate(self) -> float:
        """Return samples, or tokens, per second and GPU."""
        return float(self.facts["tokens_per_second_per_gpu" if self.tokens else "samples_per_second_per_gpu"])

    @property
    def tokens(self) -> int:
        """Return the tokens of a row; 0 if rates are of samples."""
        return int(self.facts.get("tokens", 0))

    @property
    def ranks(self) -> tuple[int, int]:
        """Return the number of nodes, and of GPUs of each."""
        per_node = int(self.facts["gpus_per_node"])
        return int(self.facts["gpus"]) // per_node, per_node

    @property
    def tf32(self) -> bool:
        return "TF32" in str(self.facts.get("precision"))

    @property
    def checkpointing(self) -> bool | None:
        """Whether blocks are recomputed; None if it is not stated."""
        stated = self.facts.get("checkpointing")
        return None if stated is None else bool(stated)

    @property
    def in_parts(self) -> str:
        """Return what torch had no single kernel for at the time: ``attention``, ``norms`` or nothing."""
        return str(self.facts.get("in_parts", ""))

    @property
    def reason(self) -> str:
        """Return why the planned rate may differ from the published one by more than the bar, or an empty string."""
        return str(self.facts.get("beside_the_plan", ""))


@cache
def runs() -> dict[str, Published]:
    facts = yaml.safe_load((FOLDER / "published.yaml").read_text(encoding="utf-8"))["runs"]
    return {name: Published(name, content) for name, content in facts.items()}


def attention_of_2021(q: Any, k: Any, v: Any, attn_mask: Any = None, is_causal: bool = False, **_: Any) -> Any:
    """Compute attention as nn.MultiheadAttention did before torch 2.0: product, added mask, softmax, product.

    Under autocast, the softmax is of float32. Source: torch 1.10, torch/nn/functional.py,
    _scaled_dot_product_attention.
    """
    import torch

    w = (q / q.shape[-1] ** 0.5) @ k.transpose(-2, -1)
    if is_causal:
        attn_mask = torch.ones(w.shape[-2:], dtype=torch.bool, device=w.device).tril()
    if attn_mask is not None:
        w = w + torch.zeros_like(attn_mask, dtype=w.dtype).masked_fill(attn_mask.logical_not(), float("-inf"))
    return w.softmax(dim=-1) @ v


def _kernels(in_parts: str) -> AbstractContextManager[Any]:
    """Patch kernels to those of the time.

    ``attention``: :func:`attention_of_2021`. ``norms``: RMSNorm in several kernels, and keys copied for each query.
    """
    from descant.plan import fake_device, simulate

    of_parts = fake_device.patching_torch
    if in_parts == "attention":
        return mock.patch("torch.nn.functional.scaled_dot_product_attention", attention_of_2021)
    if in_parts == "norms":
        return mock.patch.object(simulate, "patching_torch", lambda cpu: of_parts(cpu=True))
    return nullcontext()


def plan_rate(run: Published, way: Literal["", "today", "kept"] = "") -> float:
    """Plan samples or tokens per second and GPU in the published layout: DDP for samples, FSDP2 for tokens.

    Blocks are recomputed as stated, otherwise if a step does not fit without it. Kernels are those of the time;
    ``today``: those of this torch. ``kept``: nothing is recomputed, whether it fits or not.
    """
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # torch's fake process group warns at each message
    from descant.cli.arguments import read
    from descant.cli.main import run as build
    from descant.plan.hardware import load
    from descant.plan.planner import Building
    from descant.plan.roofline import step_time
    from descant.plan.search import USABLE, Search

    hardware, rates = load(CARDS[run.facts["gpu"]]), list[float]()
    words = ["--config", str(FOLDER / f"{run.facts['plan']}.yaml")]
    if run.tf32:
        peak = hardware.card.peak
        hardware = replace(hardware, card=replace(hardware.card, peak=peak | {"float32": peak["tf32"]}))
        words += ["--trainer.precision", "32-true"]

    def plan(recipe: Any, batch: Any, rows: int, steps: float, parts: list[Any]) -> None:
        search = Search(recipe, batch, run.facts["batch"], hardware, run.ranks, parts)
        strategy, (without, again) = "fsdp" if run.tokens else "ddp", search.checkpointing
        recomputed = run.checkpointing if way != "kept" else False
        trace = search.trace_step(search.layout(strategy, again if recomputed else without), search.rows)
        if recomputed is None and trace.memory.peak > USABLE * hardware.card.memory:
            trace = search.trace_step(search.layout(strategy, again), search.rows)
        rates.append(search.rows * max(run.tokens, 1) / step_time(trace, search.hardware).total)

    request = read("fit", words)
    request.command = "check"
    with _kernels("" if way == "today" else run.in_parts):
        build(request, Building(plan, "bf16-mixed"))
    return rates[0]


def published_rates() -> Iterator[Row]:
    """Compare planned with published throughput, within 25 %; a row that informs names what the plan leaves out."""
    for name, run in runs().items():
        ratio = plan_rate(run) / run.rate
        row = Row.within(f"plan/published {name}", ratio, BAR)
        yield replace(row, bar=None, ok=True, rule=run.reason) if run.reason else row
        for way in OTHERS.get(name, ()):
            yield Row.informs(f"plan/published {name} {way}", plan_rate(run, way) / run.rate)
