"""Benchmarks on a GPU, or on any device: our steps beside the owners' steps and beside variants of our own.

Results are shares, and ratios of steps that alternate in one process on the same card. Letters: R rounds, N runs.
"""

from __future__ import annotations

import copy
import gc
import importlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from functools import partial
from io import StringIO
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import nn

from benchmarks import contrastive, masked
from benchmarks.budget import Benchmark, Figure, LeftOut, Share
from benchmarks.timing import Laps, median, time_interleaved, wait
from descant.__main__ import main as descant
from descant.callbacks.logs.throughput import matmul_peak
from descant.cli import check, estimate
from descant.modules.training_setup.compile_and_shard import Compile
from descant.modules.training_setup.flops import FlopCount

#: Dense bfloat16 FLOP/s in the maker's data sheet, by the name that the driver reports.
STATED = {
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA L4": 121e12,
}


def llama(width: int, hidden: int, layers: int, heads: int, key_heads: int) -> dict[str, int]:
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    return dict(zip(names, (width, hidden, layers, heads, key_heads), strict=True))


CLIP = contrastive.Size(224, 16, 768, 12, 512, 12, 77, 49408, 512, batch=128)
MAE = masked.Size(224, 16, 384, 12, 6, 192, 4, batch=128)


@dataclass(frozen=True)
class Sizes:
    """Model sizes: CLIP ViT-B/16, MAE ViT-S, Llamas of 1 and 135 M parameters; experiments of ``check``."""

    clip: contrastive.Size = CLIP
    mae: masked.Size = MAE
    llamas: Mapping[str, Mapping[str, int]] = field(
        default_factory=lambda: {"1M": {}, "135M": {"vocab_size": 49152, **llama(576, 1536, 30, 9, 3)}}
    )
    reinforced: Mapping[str, int] = field(default_factory=lambda: llama(512, 1376, 12, 8, 4))
    new: int = 64
    experiments: tuple[str, ...] = ("contrastive/emoji-vit", "masked/emoji", "chat/emoji")
    options: tuple[str, ...] = ("--trainer.devices=1", "--trainer.precision=bf16-mixed")
    compiled: Callable[[nn.Module], None] = Compile().apply
    matmul: float = 1.0
    #: Most rounds of a comparison, fewest rounds for a figure, and seconds of one timed run.
    rounds: int = 30
    least: int = 8
    block: float = 0.05


def toy() -> Sizes:
    """Return sizes that take seconds on a CPU."""

    def compiled(recipe: nn.Module) -> None:  # traced, but not compiled
        for tower in recipe.towers.values():  # type: ignore[operator]
            tower.compile(backend="eager")

    return Sizes(
        clip=contrastive.Size(16, 8, 32, 1, 32, 1, 8, 50, 16, batch=4),
        mae=masked.Size(16, 4, 24, 1, 3, 12, 1, batch=4),
        llamas={"toy": llama(32, 64, 1, 2, 1)},
        reinforced=llama(32, 64, 1, 2, 1),
        new=4,
        experiments=("contrastive/emoji",),
        options=("--config=on/tiny",),
        compiled=compiled,
        matmul=0.01,
        rounds=2,
        least=2,
        block=0.0,
    )


class Suite:
    """The benchmarks on one device; each gets a :class:`Share` of the time and yields figures and what it left out."""

    def __init__(self, device: str, sizes: Sizes) -> None:
        self.device, self.sizes = device, sizes

    def benchmarks(self) -> dict[str, tuple[float, Benchmark]]:
        """Map names to the weight of their share and to the benchmark; those that are hard to interrupt come last."""
        weights = {"precision": 30, "optimizers": 10, "breakdown": 10, "open_clip": 45, "lightly": 30, "generate": 80}
        weights |= {"memory": 40, "reinforce": 60, "compile": 85}
        return {name: (weight, partial(self._clean, getattr(self, name))) for name, weight in weights.items()}

    def _clean(self, benchmark: Benchmark, share: Share) -> Iterator[Figure | LeftOut]:
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()
        with full_float32():
            yield from benchmark(share)

    def compare(
        self, share: Share, runs: Mapping[str, Callable[[], object]], asked: Mapping[str, tuple[str, str, str]]
    ) -> Iterator[Figure | LeftOut]:
        """Yield ratios of times. ``asked``: name of a figure -> (numerator run, denominator run, description)."""
        times_RN = self.times(share, list(runs.values()))
        column = dict(zip(runs, times_RN.T, strict=True))
        for name, (over, under, what) in asked.items():
            yield self.median(name, what, column[over] / column[under])

    def median(self, name: str, what: str, value_R: np.ndarray) -> Figure | LeftOut:
        if len(value_R) < self.sizes.least:
            return LeftOut(name, f"{len(value_R)} rounds fitted into its share, {self.sizes.least} are asked for")
        found = median(value_R.tolist())
        return Figure(name, what, found.value, found.interval, len(value_R))

    def times(self, share: Share, runs: Sequence[Callable[[], object]]) -> np.ndarray:
        """Measure seconds ``[R, runs]``; a short step is called several times in a row."""
        warm = time_interleaved(runs, 1, 2, self.device, until=share.until, clock=share.clock)
        block = min(max(int(self.sizes.block / max(float(warm.min(initial=1.0)), 1e-6)), 1), 20)
        return time_interleaved(runs, self.sizes.rounds, 0, self.device, block, share.until, share.clock)

    def own_step(self, bf16: bool, model: nn.Module | None = None) -> Callable[[], None]:
        """Return a training step of ours, on our own transformers or on ``model``."""
        recipe: Any = model if model is not None else self.recipe()
        data = contrastive.batches(self.sizes.clip, 4, self.device)
        return contrastive.step_of(partial(contrastive.our_loss, recipe), data, contrastive.adamw(recipe), bf16)

    def recipe(self) -> Any:
        torch.manual_seed(0)
        return contrastive.own_recipe(self.sizes.clip, heads=8).to(self.device)

    def precision(self, share: Share) -> Iterator[Figure | LeftOut]:
        fp32, half = self.own_step(bf16=False), self.own_step(bf16=True)

        def tf32() -> None:
            torch.set_float32_matmul_precision("high")
            fp32()
            torch.set_float32_matmul_precision("highest")

        asked = {
            "precision/tf32": ("fp32", "tf32", "our contrastive step in float32 / with TF32 matrix products"),
            "precision/bf16": ("fp32", "bf16", "our contrastive step in float32 / under bfloat16 autocast"),
            "precision/bf16-tf32": ("tf32", "bf16", "the step with TF32 / under bfloat16 autocast"),
        }
        yield from self.compare(share, {"fp32": fp32, "tf32": tf32, "bf16": half}, asked)

    def optimizers(self, share: Share) -> Iterator[Figure | LeftOut]:
        recipe = self.recipe()
        for p in recipe.parameters():
            p.grad = torch.randn_like(p)
        adamw: Any = partial(torch.optim.AdamW, list(recipe.parameters()), lr=1e-6)
        optimizers = {"loop": adamw(foreach=False), "foreach": adamw(foreach=True), "fused": adamw(fused=True)}
        runs = {name: optimizer.step for name, optimizer in optimizers.items()}
        asked = {f"optimizers/{of}": (of, "fused", f"AdamW's update, {of} / fused") for of in ("loop", "foreach")}
        yield from self.compare(share, runs, asked)

    def breakdown(self, share: Share) -> Iterator[Figure | LeftOut]:
        recipe = self.recipe()
        optimizer, (batch,) = contrastive.adamw(recipe), contrastive.batches(self.sizes.clip, 1, self.device)

        def step() -> list[float]:
            optimizer.zero_grad()
            laps = Laps(self.device)
            with torch.autocast(self.device, torch.bfloat16):
                terms = recipe.terms(batch)
                laps.mark()
                loss = recipe.step(terms, batch).total
            torch.autograd.backward(loss)
            laps.mark()
            optimizer.step()
            laps.mark()
            return laps.seconds()

        rows: list[list[float]] = []
        for k in range(-3, self.sizes.rounds):
            if not share.remaining_seconds():
                break
            seconds = step()
            if k >= 0:
                rows.append(seconds)
        seconds_R3 = np.array(rows).reshape(-1, 3)
        parts = {"forward": "the forward pass", "backward": "loss and backward pass", "optimizer": "the optimizer"}
        for (name, words), part_R in zip(parts.items(), seconds_R3.T, strict=True):
            what = f"share of {words} in our contrastive step under bfloat16 autocast"
            yield self.median(f"breakdown/{name}", what, part_R / seconds_R3.sum(axis=1))
        if self.device == "cuda":
            step_alone = self.own_step(True, recipe)
            yield Figure("breakdown/waits", "times the CPU waits for the GPU in that step", waits(step_alone))

    def open_clip(self, share: Share) -> Iterator[Figure | LeftOut]:
        for parts, bf16 in ((2, False), (1, True)):
            precision = "bf16" if bf16 else "fp32"
            what = f"open_clip's training step / ours, its towers on both sides, {precision}"
            asked = {f"open_clip/{precision}": ("owner", "ours", what)}
            yield from self.compare(share.part(parts), self.beside_open_clip(bf16), asked)

    def beside_open_clip(self, bf16: bool) -> dict[str, Callable[[], None]]:
        ours, owner = contrastive.step_pair(self.sizes.clip, bf16, self.device)
        return {"ours": ours, "owner": owner}

    def lightly(self, share: Share) -> Iterator[Figure | LeftOut]:
        for parts, bf16 in ((2, False), (1, True)):
            precision = "bf16" if bf16 else "fp32"
            asked = {
                f"lightly/{precision}": ("lightly", "ours", f"lightly's MAE step / ours, {precision}"),
                f"lightly/loop-{precision}": ("timm_loop", "ours", f"a plain loop over timm's ViT / ours, {precision}"),
            }
            yield from self.compare(share.part(parts), masked.steps(self.sizes.mae, self.device, bf16), asked)

    def generate(self, share: Share) -> Iterator[Figure | LeftOut]:
        from benchmarks import generate as language

        cases = [(name, group) for name in self.sizes.llamas for group in (1, 8)]
        for k, (name, group) in enumerate(cases):
            part = share.part(len(cases) - k)
            theirs, ours = language.models(self.device, **self.sizes.llamas[name])
            ids_PT = torch.randint(3, ours.embedding.num_embeddings, (16, 64)).to(self.device)
            mine, owner = language.decoders(ours, theirs, ids_PT, group, self.sizes.new)
            same = float((mine() == owner()).float().mean())
            case = f"{name}-{group}"
            yield Figure(f"generate/same-{case}", f"tokens that both say, Llama {name}, {group} rows a prompt", same)
            what = f"transformers' generate / ours, Llama {name}, 16 rows, {group} a prompt, float32"
            asked = {f"generate/{case}": ("owner", "ours", what)}
            yield from self.compare(part, {"ours": mine, "owner": owner}, asked)

    def reinforce(self, share: Share) -> Iterator[Figure | LeftOut]:
        from benchmarks import reinforce

        importlib.import_module("trl")
        warnings.simplefilter("ignore")
        made = reinforce.model(self.device, **self.sizes.reinforced)
        ours, theirs = reinforce.Ours(self.device), reinforce.Theirs(self.device)
        gates: list[reinforce.Gate] = []
        try:
            gates.append(reinforce.Gate(lambda gate: ours.run(gate, made)))
            gates.append(reinforce.Gate(lambda gate: theirs.run(gate, made)))
            what = "a step of TRL's GRPO / ours, same Llama, prompts, rewards and lengths"
            runs = {"ours": gates[0], "owner": gates[1]}
            found = list(self.compare(share, runs, {"reinforce/step": ("owner", "ours", what)}))
        finally:
            for gate in gates:
                gate.end(timeout=5)
        lengths = [float(np.mean(side.lengths)) if side.lengths else np.nan for side in (ours, theirs)]
        if abs(lengths[0] / lengths[1] - 1) > reinforce.LENGTHS:
            why = f"answers of {lengths[0]:.1f} tokens, of TRL's {lengths[1]:.1f}: not the same work"
            found = [LeftOut("reinforce/step", why)]
        yield from found
        if ours.whole:
            yield Figure("reinforce/generation", "generation's share of our step", ours.generating / ours.whole)

    def memory(self, share: Share) -> Iterator[Figure | LeftOut]:
        for name in self.sizes.experiments:
            if not share.remaining_seconds():
                yield LeftOut(f"memory/{name}", "its share was over")
                continue
            what = f"what descant check says {name} needs / what was allocated at most in a step"
            yield Figure(f"memory/{name}", what, self.estimate_ratio(name))

    def estimate_ratio(self, experiment: str) -> float:
        told: list[float] = []
        # memory of earlier benchmarks is in both numbers, and would make their ratio closer to 1
        before = torch.cuda.memory_allocated() if self.device == "cuda" else 0

        def both(trainer: Any, model: Any, batch: Any) -> estimate.Need:
            need = estimate.estimate(trainer, model, batch)
            told.append((need.peak - before) / (self.peak(trainer, model, batch, need) - before))
            return need

        words = ["check", "--config", experiment, f"--trainer.accelerator={self.device}", *self.sizes.options]
        err = StringIO()
        with patch.object(check, "estimate", both), redirect_stdout(StringIO()), redirect_stderr(err):
            code = descant(words)
        if code or not told:
            raise RuntimeError(f"descant {' '.join(words)}: {err.getvalue().strip().splitlines()[-1:]}")
        return told[0]

    def peak(self, trainer: Any, model: Any, batch: Any, need: estimate.Need) -> float:
        """Return the peak memory of the second of two steps on the whole batch, in bytes."""
        if self.device != "cuda":
            return need.resident + estimate._measure_step(trainer, model, batch, need.rows)[0]
        estimate._step(trainer, batch, need.rows)
        torch.cuda.reset_peak_memory_stats()
        estimate._step(trainer, batch, need.rows)
        return float(torch.cuda.max_memory_allocated())

    def compile(self, share: Share) -> Iterator[Figure | LeftOut]:
        """Measure ``torch.compile`` of the towers, and how much of the card both steps use: FLOPs / (time * peak)."""
        plain = self.recipe()
        compiled = copy.deepcopy(plain)
        self.sizes.compiled(compiled)
        runs = {"eager": self.own_step(True, plain), "compiled": self.own_step(True, compiled)}
        runs["eager"]()
        with FlopCount() as count:
            runs["eager"]()
        peak = matmul_peak(torch.device(self.device), torch.bfloat16, self.sizes.matmul)
        yield Figure("mfu/peak", "largest rate of a bfloat16 matrix product", peak / 1e12, unit="TFLOP/s")
        begin = share.clock()
        runs["compiled"]()
        wait(self.device)
        compiling = share.clock() - begin
        times_R2 = self.times(share, list(runs.values()))
        what = "our contrastive step under bfloat16 autocast, eager / compiled"
        yield self.median("compile/step", what, times_R2[:, 0] / times_R2[:, 1])
        if len(times_R2) and (saved := float(np.median(times_R2[:, 0] - times_R2[:, 1]))) > 0:
            yield Figure("compile/pays", "steps after which compiling has paid", compiling / saved, unit="steps")
        of = {"": peak}
        if self.device == "cuda" and (stated := STATED.get(torch.cuda.get_device_name())):
            of["-stated"] = stated
        for (name, time_R), (end, rate) in ((a, b) for a in zip(runs, times_R2.T, strict=True) for b in of.items()):
            over = "what the maker states" if end else "that rate"
            what = f"FLOPs of the model in the {name} step / its time, over {over}"
            yield self.median(f"mfu/{name}{end}", what, count.model_flops / (time_R * rate))


@contextmanager
def full_float32() -> Iterator[None]:
    """Compute float32 products and convolutions in full float32, whatever was allowed before."""
    before, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
        torch.backends.cudnn.allow_tf32 = convolutions


def waits(step: Callable[[], object]) -> int:
    """Count how often the CPU waits for the GPU in a step, from torch's warnings."""
    step()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in seen)
