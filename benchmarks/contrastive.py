"""The contrastive recipe beside open_clip, a plain PyTorch loop and torchvision. All on the CPU, offline.

Letters: B samples, C channels, H and W pixels, T tokens, D width.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import json
import logging
import math
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.optim import AdamW
from torchvision.transforms import v2

from benchmarks import Row
from benchmarks.timing import AS_FAST, Ratio, median, ratio, time_interleaved
from descant.callbacks import Progress, Report, Sanity
from descant.cli.precision import cpu_bfloat16
from descant.datamodules.base import BatchDataset, DataModule, Rows
from descant.modules.core.batch import Batch
from descant.modules.losses import InfoNCE
from descant.modules.towers import PatchTower, TextTower, Tokens, Tower, Towers
from descant.modules.towers.heads import Projection
from descant.modules.training_setup.activation_checkpointing import Checkpointing
from descant.modules.training_setup.loggers import CSV
from descant.modules.training_setup.optim import parameter_groups
from descant.modules.transforms.image import Augment, over_white
from descant.recipes.contrastive import Contrastive

# the step beside open_clip ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Size:
    """Sizes of the model and batch that both sides train."""

    image: int = 64
    patch: int = 16
    width: int = 256
    layers: int = 6
    text_width: int = 256
    text_layers: int = 4
    length: int = 32
    vocab: int = 8192
    embed: int = 256
    batch: int = 64


class OpenClipImage(Tower):
    """open_clip's own vision transformer, copied with its weights but without its projection: one pooled token."""

    def __init__(self, clip: Any) -> None:
        super().__init__()
        self.visual = copy.deepcopy(clip.visual)
        self.width = int(clip.visual.proj.shape[0])
        self.visual.proj = None

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tokens:
        return _one_token(self.visual(x))


class OpenClipText(Tower):
    """open_clip's own text transformer, copied with its weights, up to its pooled token (``CLIP.encode_text``)."""

    attn_mask: Tensor

    def __init__(self, clip: Any) -> None:
        super().__init__()
        from open_clip.transformer import text_global_pool

        self.pool = partial(text_global_pool, pool_type=clip.text_pool_type, eos_token_id=clip.text_eos_id)
        self.token_embedding = copy.deepcopy(clip.token_embedding)
        self.positional_embedding = copy.deepcopy(clip.positional_embedding)
        self.transformer = copy.deepcopy(clip.transformer)
        self.ln_final = copy.deepcopy(clip.ln_final)
        self.register_buffer("attn_mask", clip.attn_mask.clone(), persistent=False)
        self.width = int(clip.text_projection.shape[0])

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tokens:
        dtype = self.transformer.get_cast_dtype()
        h_BTD = self.token_embedding(x).to(dtype) + self.positional_embedding.to(dtype)
        h_BTD = self.ln_final(self.transformer(h_BTD, attn_mask=self.attn_mask))
        return _one_token(self.pool(h_BTD, x))


def _one_token(h_BD: Tensor) -> Tokens:
    return Tokens(h_BD[:, None], torch.ones(len(h_BD), 1, dtype=torch.bool, device=h_BD.device))


def open_clip_model(size: Size) -> Any:
    """Build open_clip's CLIP with random weights; nothing is downloaded."""
    import open_clip

    vision = {
        "image_size": size.image,
        "patch_size": size.patch,
        "width": size.width,
        "layers": size.layers,
        "head_width": min(64, size.width),
    }
    text = {
        "context_length": size.length,
        "vocab_size": size.vocab,
        "width": size.text_width,
        "heads": max(1, size.text_width // 64),
        "layers": size.text_layers,
    }
    return open_clip.CLIP(size.embed, vision, text, output_dict=True).train()


def recipe_like(clip: Any) -> Contrastive:
    """Build our recipe from copies of open_clip's modules, projections and scale: the same function."""
    towers = Towers(image=OpenClipImage(clip), text=OpenClipText(clip))
    embed = int(clip.visual.proj.shape[1])
    loss = InfoNCE(temperature=math.exp(-float(clip.logit_scale.detach())))
    recipe = Contrastive(towers, width=embed, loss=loss)
    for modality, weight_DE in (("image", clip.visual.proj), ("text", clip.text_projection)):
        # without our LayerNorm: open_clip's towers already have one
        head = Projection(int(weight_DE.shape[0]), embed, norm=False)
        with torch.no_grad():
            next(head.parameters()).copy_(weight_DE.T)
        recipe.heads[modality] = head
    return recipe.train()


def batches(size: Size, number: int, device: str = "cpu") -> list[Batch]:
    """Make batches of noise as pictures and random ids as texts.

    A text ends in the largest id, where open_clip pools, followed by zeros.
    """
    made = []
    for _ in range(number):
        text_BT = torch.randint(1, size.vocab - 1, (size.batch, size.length))
        end_B = torch.randint(size.length // 4, size.length, (size.batch,))
        place_T = torch.arange(size.length)
        text_BT[place_T == end_B[:, None]] = size.vocab - 1
        text_BT[place_T > end_B[:, None]] = 0
        inputs = {"image": torch.randn(size.batch, 3, size.image, size.image), "text": text_BT}
        inputs = {modality: x.to(device) for modality, x in inputs.items()}
        present = {modality: torch.ones(size.batch, dtype=torch.bool, device=device) for modality in inputs}
        made.append(Batch(inputs, present))
    return made


def adamw(module: nn.Module) -> AdamW:
    """Make the optimizer of every side: one fused kernel, no decay of norms and biases (as open_clip groups them)."""
    return AdamW(parameter_groups(module), lr=1e-4, weight_decay=0.1, betas=(0.9, 0.98), fused=True)


def our_loss(recipe: Contrastive, batch: Batch) -> Tensor:
    return recipe.step(recipe.terms(batch), batch).total


def open_clip_loss(clip: Any, criterion: Any, batch: Batch) -> Tensor:
    """Compute the loss as ``open_clip_train.train`` does."""
    out = clip(batch.inputs["image"], batch.inputs["text"])
    losses = criterion(**out, output_dict=True)
    return sum(losses.values())


def disagreement(recipe: Contrastive, clip: Any, criterion: Any, batch: Batch) -> tuple[float, float]:
    """Return the relative difference of losses, and the largest one of a tower weight's gradient (over its maximum)."""
    recipe.zero_grad()
    clip.zero_grad()
    ours, owner = our_loss(recipe, batch), open_clip_loss(clip, criterion, batch)
    torch.autograd.backward([ours, owner])
    owned, worst, compared = dict(clip.named_parameters()), 0.0, 0
    for name, parameter in recipe.towers.named_parameters():
        _, _, own = name.partition(".")
        owner_grad = owned[own].grad
        assert parameter.grad is not None and owner_grad is not None, name
        worst = max(worst, relative(parameter.grad, owner_grad))
        compared += 1
    assert compared == len(owned) - 3, "all but two projections and the scale are tower weights"
    recipe.zero_grad()
    clip.zero_grad()
    return abs(float(ours.detach()) - float(owner.detach())) / abs(float(owner.detach())), worst


def relative(x: Tensor, reference: Tensor) -> float:
    """Compute ``max |x - reference| / max |reference|``."""
    return float((x - reference).abs().max() / reference.abs().max().clamp(min=torch.finfo(x.dtype).tiny))


def require_agreement(recipe: Contrastive, clip: Any, criterion: Any, batch: Batch) -> None:
    """Raise RuntimeError unless both sides compute the same; otherwise their times cannot be compared."""
    loss, gradient = disagreement(recipe, clip, criterion, batch)
    if not (loss <= 1e-5 and gradient <= 1e-4):
        raise RuntimeError(f"not the same step as open_clip's: loss off by {loss:.1e}, gradient by {gradient:.1e}")


def step_of(
    loss_of: Callable[[Batch], Tensor], data: list[Batch], optimizer: torch.optim.Optimizer, bf16: bool = False
) -> Callable[[], None]:
    """Return a training step on the next batch: loss (under bfloat16 autocast if ``bf16``), backward, optimizer."""
    turn = cycle(data)

    def step() -> None:
        batch = next(turn)
        optimizer.zero_grad()
        with torch.autocast(batch.device.type, torch.bfloat16, enabled=bf16):
            loss = loss_of(batch)
        torch.autograd.backward(loss)
        optimizer.step()

    return step


def step_pair(size: Size, bf16: bool = False, device: str = "cpu") -> tuple[Callable[[], None], Callable[[], None]]:
    """Return one training step of ours and one of open_clip's.

    Ours: ``terms -> step -> backward -> optimizer.step`` of :class:`Contrastive`. Theirs: ``open_clip.CLIP`` and
    ``ClipLoss`` as in ``open_clip_train.train``: forward, loss, backward, optimizer step, clamp of the scale. Both
    start from the same weights, run the same modules on the same batches, and use the same fused AdamW. Before that,
    both must compute the same loss and gradients.
    """
    import open_clip

    torch.manual_seed(0)
    clip, criterion = open_clip_model(size).to(device), open_clip.ClipLoss()
    data, recipe = batches(size, 4, device), recipe_like(clip).to(device)
    require_agreement(recipe, clip, criterion, data[0])
    ours = step_of(partial(our_loss, recipe), data, adamw(recipe), bf16)
    owner_step = step_of(partial(open_clip_loss, clip, criterion), data, adamw(clip), bf16)

    def owner() -> None:
        owner_step()
        with torch.no_grad():
            clip.logit_scale.clamp_(0, math.log(100))

    return ours, owner


def step_ratio(size: Size, bf16: bool = False, pairs: int = 60) -> Ratio:
    """Measure the speed of our step relative to open_clip's (see :func:`step_pair`): the owner's time / ours."""
    ours, owner = step_pair(size, bf16)
    return ratio(ours, owner, pairs)


def step() -> Iterator[Row]:
    """Measure our training step against open_clip's on the same towers: fp32 has the bar, bfloat16 autocast informs."""
    fp32 = step_ratio(Size())
    yield Row.at_least("contrastive/step_vs_open_clip_fp32", fp32.value, AS_FAST, fp32.interval)
    bf16 = step_ratio(Size(), bf16=True)
    yield Row.informs("contrastive/step_vs_open_clip_bf16", bf16.value, bf16.interval)


# bfloat16 beside float32 ------------------------------------------------------------------------------------


def has_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 natively; otherwise torch converts, and nothing is gained."""
    return cpu_bfloat16() is not None


def bf16(size: Size | None = None, rounds: int = 40) -> Iterator[Row]:
    """Measure the gain of bfloat16 autocast: our fp32 step / our bf16 step, and open_clip's in the same minute.

    A round runs all four steps (:func:`step_pair` in both precisions) in a rotating order. The last row divides our
    gain by the owner's, round by round.
    """
    if not has_bf16():
        print("contrastive/bf16: skipped, this CPU has no bfloat16 instructions", flush=True)
        return
    size = size or Size()
    runs = [*step_pair(size, bf16=False), *step_pair(size, bf16=True)]
    ours_32, owner_32, ours_16, owner_16 = time_interleaved(runs, rounds).T
    gain, owner_gain = median(list(ours_32 / ours_16)), median(list(owner_32 / owner_16))
    both = median(list((ours_32 / ours_16) / (owner_32 / owner_16)))
    yield Row.at_least("contrastive/bf16_vs_fp32", gain.value, 1.4, gain.interval)
    yield Row.informs("contrastive/bf16_vs_fp32_open_clip", owner_gain.value, owner_gain.interval)
    yield Row.at_least("contrastive/bf16_gain_vs_open_clip", both.value, AS_FAST, both.interval)


# Lightning beside a plain loop -----------------------------------------------------------------------------


class MemorySet(BatchDataset):
    """Random pictures and texts, in memory."""

    def __init__(self, n: int, vocab: int = 1000, length: int = 16) -> None:
        super().__init__(seed=0)
        generator = torch.Generator().manual_seed(0)
        self.image = torch.randint(0, 256, (n, 4, 32, 32), dtype=torch.uint8, generator=generator)
        self.text = torch.randint(1, vocab, (n, length), generator=generator)

    def __len__(self) -> int:
        return len(self.image)

    def present(self, index_N: np.ndarray) -> dict[str, Tensor]:
        return {modality: torch.ones(len(index_N), dtype=torch.bool) for modality in ("image", "text")}

    def rows(self, index_B: np.ndarray, draw_B: np.ndarray) -> Rows:
        rows = torch.from_numpy(index_B)
        return Rows({"image": self.image[rows], "text": self.text[rows]}, {}, rows)


class Memory(DataModule):
    """``steps`` batches per epoch, augmented batch by batch in the hook that Emoji uses."""

    def __init__(self, batch_size: int, steps: int) -> None:
        super().__init__(batch_size)
        self.augment, self.data = Augment(32), MemorySet(batch_size * steps)

    @property
    def modalities(self) -> tuple[str, ...]:
        return ("image", "text")

    def training_set(self) -> BatchDataset:
        return self.data

    def evaluation_sets(self, stage: str) -> dict[str, BatchDataset]:
        return {}

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        batch.inputs["image"] = self.augment(batch.inputs["image"], batch.rng_seed)
        return batch


class PlainLoop:
    """The same step without Lightning: fetch, augment, zero, terms, backward, optimizer step."""

    def __init__(self, recipe: Contrastive, data: Memory) -> None:
        self.recipe, self.data, self.optimizer = recipe.train(), data, adamw(recipe)
        self.batches = iter(data.train_dataloader())

    def __call__(self) -> None:
        batch = self.data.on_after_batch_transfer(next(self.batches), 0)
        self.optimizer.zero_grad()
        torch.autograd.backward(our_loss(self.recipe, batch))
        self.optimizer.step()


class Interleaved(L.Callback):
    """Runs one plain step after each batch of the trainer, and times both.

    Lightning's period runs from the end of a plain step to the end of the trainer's next batch. It includes fetching,
    every hook of callbacks and strategy, and logging, wherever in the loop they happen.
    """

    def __init__(self, plain: Callable[[], None]) -> None:
        self.plain = plain
        self.lightning_times: list[float] = []
        self.plain_times: list[float] = []
        self._begin: float | None = None

    def on_train_batch_end(self, *_: object) -> None:
        end = time.perf_counter()
        self.plain()
        now = time.perf_counter()
        if self._begin is not None:
            self.lightning_times.append(end - self._begin)
            self.plain_times.append(now - end)
        self._begin = now


def small_recipe() -> Contrastive:
    torch.manual_seed(0)
    image = PatchTower(size=32, patch=8, width=64, depth=2, heads=2)
    text = TextTower(vocab=1000, width=64, depth=1, heads=2, length=16)
    return Contrastive(Towers(image=image, text=text), width=64, optimizer=adamw_callable)


def adamw_callable(groups: Any) -> AdamW:
    """Make the optimizer of :func:`adamw` for :class:`Recipe`, which makes the parameter groups itself."""
    return AdamW(groups, lr=1e-4, weight_decay=0.1, betas=(0.9, 0.98), fused=True)


def batch_size_for(milliseconds: float) -> int:
    """Return the smallest batch (32, 48, 64, 96 ...) whose plain step takes at least this long on this machine."""
    for batch in (32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024):
        plain = PlainLoop(small_recipe(), Memory(batch, steps=12))
        times = []
        for _ in range(12):
            begin = time.perf_counter()
            plain()
            times.append(time.perf_counter() - begin)
        if min(times) * 1e3 >= milliseconds:  # the least disturbed time: noise does not make a step long
            return batch
    return 1024


def overhead_periods(batch_size: int, steps: int) -> tuple[list[float], list[float]]:
    """Measure the times of Lightning's periods and of the plain steps between them, in one fit of one epoch."""
    recipe, data = small_recipe(), Memory(batch_size, steps)
    interleaved = Interleaved(PlainLoop(copy.deepcopy(recipe), Memory(batch_size, steps)))
    quiet = [contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO())]
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        logger = logging.getLogger("lightning.pytorch")
        stack.callback(logger.setLevel, logger.level)
        logger.setLevel(logging.ERROR)
        stack.enter_context(warnings.catch_warnings(action="ignore"))
        # the settings that experiments/base.yaml gives every run
        trainer = L.Trainer(
            accelerator="cpu",
            devices=1,
            max_steps=steps,
            max_epochs=-1,
            logger=[TensorBoardLogger(folder, "", "", default_hp_metric=False), CSV(folder)],
            callbacks=[
                Report(),
                Progress(),
                Sanity(),
                ModelCheckpoint(f"{folder}/checkpoints", "{step:07d}", auto_insert_metric_name=False, save_last=True),
                interleaved,
            ],
            limit_val_batches=0,
            num_sanity_val_steps=0,
            log_every_n_steps=LOG_EVERY,
            enable_model_summary=False,
            use_distributed_sampler=False,
            default_root_dir=folder,
        )
        for context in quiet:
            stack.enter_context(context)
        trainer.fit(recipe, datamodule=data)
    return interleaved.lightning_times, interleaved.plain_times


#: As in ``experiments/base.yaml``.
LOG_EVERY = 10
#: Least time of a plain step. The bar applies to a step as long as in the smallest shipped experiment; the shorter step
#: shows the effect of the same milliseconds on toy steps.
MILLISECONDS, SHORT = 60.0, 28.0


def overhead() -> Iterator[Row]:
    """Measure what Lightning adds to a step of 60 ms: ``lightning / plain - 1``, the median over blocks of ten pairs.

    A pair is one period of :class:`Trainer` (with the loggers and callbacks of ``experiments/base.yaml``) and one
    :class:`PlainLoop` step on its own copy of model, optimizer and data, alternating within one fit. Times are summed
    over ten pairs before they are divided, because one step in ten is logged and a median of single pairs would never
    include it. Events of once per epoch (checkpoints) are not included.
    """
    result = overhead_at(MILLISECONDS, blocks=30)
    yield Row.at_most("contrastive/lightning_overhead", result.value, 0.03, result.interval)
    short = overhead_at(SHORT, blocks=30)
    yield Row.informs("contrastive/lightning_overhead_at_28_ms", short.value, short.interval)


def overhead_at(milliseconds: float, blocks: int) -> Ratio:
    """Measure the excess for a plain step of at least this many milliseconds."""
    torch.manual_seed(0)
    warmup = 21  # the first period follows the second batch
    lightning_times, plain_times = overhead_periods(batch_size_for(milliseconds), blocks * LOG_EVERY + warmup + 1)
    lightning_times, plain_times = lightning_times[warmup:], plain_times[warmup:]
    if statistics.median(plain_times) < 0.02:
        raise RuntimeError("the plain step takes less than 20 ms: the bar is for steps of 20 ms and more")
    return median(excess(lightning_times, plain_times))


def excess(lightning_times: list[float], plain_times: list[float], block: int = LOG_EVERY) -> list[float]:
    """Compute ``sum lightning / sum plain - 1`` for each block of pairs.

    >>> excess([2.0, 4.0, 1.0, 1.0], [1.0, 2.0, 1.0, 1.0], block=2)
    [1.0, 0.0]
    """
    starts = range(0, len(plain_times) - block + 1, block)
    return [sum(lightning_times[k : k + block]) / sum(plain_times[k : k + block]) - 1 for k in starts]


# checkpointing ---------------------------------------------------------------------------------------------


def activation_bytes(recipe: Contrastive, batch: Batch) -> int:
    """Count the bytes that autograd keeps between forward and backward: every storage once, without parameters."""
    parameters = {p.untyped_storage().data_ptr() for p in recipe.parameters()}
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in parameters:  # kept storages stay alive, so no address is reused
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = our_loss(recipe, batch)
    del loss
    return sum(kept.values())


def gradients(recipe: Contrastive, batch: Batch) -> dict[str, Tensor]:
    recipe.zero_grad()
    torch.autograd.backward(our_loss(recipe, batch))
    return {name: p.grad.clone() for name, p in recipe.named_parameters() if p.grad is not None}


def checkpointing(width: int = 128, batch_size: int = 64) -> Iterator[Row]:
    """Compare checkpointing with the same model without it: kept activation bytes (a share), and gradients.

    The model has a PatchTower of depth 6 and a TextTower of depth 4, with one batch and the same weights. The gradient
    row is the largest relative difference of any parameter's gradient.
    """
    torch.manual_seed(0)
    image = PatchTower(size=32, patch=4, width=width, depth=6, heads=4)
    text = TextTower(vocab=1000, width=width, depth=4, heads=4, length=24)
    plain = Contrastive(Towers(image=image, text=text), width=width).train()
    saving = copy.deepcopy(plain)
    Checkpointing().apply(saving)
    size = Size(image=32, length=24, vocab=1000, batch=batch_size)
    (batch,) = batches(size, 1)
    share = activation_bytes(saving, batch) / activation_bytes(plain, batch)
    yield Row.at_most("contrastive/checkpointing_memory", share, 0.6)
    reference, recomputed = gradients(plain, batch), gradients(saving, batch)
    if reference.keys() != recomputed.keys() or not reference:
        raise RuntimeError("checkpointing changed which parameters have a gradient")
    worst = max(relative(recomputed[name], g) for name, g in reference.items())
    yield Row.at_most("contrastive/checkpointing_gradients", worst, 1e-6)


# GradCache -------------------------------------------------------------------------------------------------


def peak_bytes(run: Callable[[], object]) -> int:
    """Return the most bytes of tensors alive at once while ``run`` ran, by torch's own allocator."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    memory = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    memory.sort(key=lambda event: event.start_ns())
    alive = np.cumsum([event.nbytes() for event in memory])
    return int(alive.max(initial=0))


def resident_bytes(size: Size, chunks: int) -> int:
    """Return the bytes that two steps add to a new process's peak resident memory, as the kernel counts it (Linux)."""
    call = f"from benchmarks.contrastive import Size, _resident; print(_resident({size!r}, {chunks}))"
    done = subprocess.run([sys.executable, "-c", call], capture_output=True, text=True, check=True)
    return int(done.stdout)


def _resident(size: Size, chunks: int) -> int:
    torch.set_num_threads(1)
    before = status("VmRSS")
    run = gradcache_step(size, chunks)
    run()
    run()
    return status("VmHWM") - before


def status(field: str) -> int:
    """Read a field of the kernel's status of this process in bytes, such as ``VmRSS`` (Linux)."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def gradcache_step(size: Size, chunks: int) -> Callable[[], None]:
    """Return a training step of ViT-like towers on its own batch, with its own weights and optimizer."""
    torch.manual_seed(0)
    recipe = own_recipe(size, heads=4, chunks=chunks)
    return step_of(partial(our_loss, recipe), batches(size, 1), adamw(recipe))


def own_recipe(size: Size, heads: int, chunks: int = 1) -> Contrastive:
    """Build our recipe on our own transformers."""
    image = PatchTower(size=size.image, patch=size.patch, width=size.width, depth=size.layers, heads=heads)
    text = TextTower(vocab=size.vocab, width=size.text_width, depth=size.text_layers, heads=heads, length=size.length)
    return Contrastive(Towers(image=image, text=text), width=size.embed, chunks=chunks).train()


def gradcache(batch: int = 16, times: int = 16, pairs: int = 30) -> Iterator[Row]:
    """Compare GradCache at 16 times the batch that fits with the small batch without it.

    Memory is the peak of two steps from scratch, including weights, optimizer states and inputs (16 times as many), in
    bytes that torch's allocator gave out. The kernel's count only informs: the C library's heap fragments between the
    passes (not with MALLOC_MMAP_THRESHOLD_=65536 in the environment). Time compares one step of the large batch with 16
    steps of the small one, for the same number of samples.
    """
    common = {"image": 32, "patch": 4, "width": 128, "layers": 4, "text_width": 128, "text_layers": 2}
    small = Size(**common, length=24, vocab=1000, embed=128, batch=batch)
    large = dataclasses.replace(small, batch=batch * times)

    def peak(size: Size, chunks: int) -> int:
        def two_steps() -> None:
            run = gradcache_step(size, chunks)
            run()
            run()

        return peak_bytes(two_steps)

    share = peak(large, times) / peak(small, 1)
    yield Row.at_most("contrastive/gradcache_memory", share, 1.3)
    yield Row.informs("contrastive/memory_without_gradcache", peak(large, 1) / peak(small, 1))
    if Path("/proc/self/status").is_file():
        resident = resident_bytes(large, times) / resident_bytes(small, 1)
        yield Row.informs("contrastive/gradcache_resident_memory", resident)
    cached, uncached = gradcache_step(large, times), gradcache_step(small, 1)

    def small_steps() -> None:
        for _ in range(times):
            uncached()

    slower = ratio(small_steps, cached, pairs, warmup=1)  # the cached step's time / that of the small ones
    yield Row.at_most("contrastive/gradcache_time", slower.value, 1.45, slower.interval)


# augmentation ----------------------------------------------------------------------------------------------


def torchvision_augment(x_BCHW: Tensor) -> Tensor:
    """Augment with v2 transforms of uint8: per sample if needed, and for the whole batch where possible.

    Affine map of RGBA and colour jitter of RGB for each sample; then white background and scaling to -1..1, batched.
    """
    samples = []
    for x_CHW in x_BCHW:
        x_CHW = _AFFINE(x_CHW)
        samples.append(torch.cat([_JITTER(x_CHW[:3]), x_CHW[3:]]))
    return over_white(torch.stack(samples).float() / 255) * 2 - 1


_AFFINE = v2.RandomAffine(
    15, translate=(0.1, 0.1), scale=(0.8, 1.25), shear=8, interpolation=v2.InterpolationMode.BILINEAR
)
_JITTER = v2.ColorJitter(brightness=0.2, contrast=0.3, saturation=0.3, hue=0.05)


def augment(rows: int = 256, pairs: int = 40) -> Iterator[Row]:
    """Compare our batched Augment with per-sample torchvision v2 of similar strength: the owner's time / ours.

    Both turn uint8 ``[256, 4, 32, 32]`` into float ``[256, 3, 32, 32]`` in -1..1, with separate random draws for every
    sample. Ours also stretches, drops colour at random and adds random background colours.
    """
    torch.manual_seed(0)
    x_BCHW = torch.randint(0, 256, (rows, 4, 32, 32), dtype=torch.uint8)
    ours, keys = Augment(32), torch.arange(rows)
    draw = iter(range(1 << 30))

    def run() -> Tensor:
        return ours(x_BCHW, keys + next(draw) * rows)

    assert run().shape == torchvision_augment(x_BCHW).shape
    result = ratio(run, lambda: torchvision_augment(x_BCHW), pairs)
    yield Row.at_least("contrastive/augment_vs_torchvision", result.value, 1.0, result.interval)


# the demo --------------------------------------------------------------------------------------------------

#: Scores that `make demo` promises; seconds are a budget.
DEMO = {"vendor/i2t_r1": 0.42, "vendor/i2t_r10": 0.80, "concept/i2t_r10": 0.55, "both/i2t_r10": 0.46}
SECONDS = 300.0


def demo(folder: Path = Path("runs/demo")) -> Iterator[Row]:
    """Compare the newest `make demo` of this checkout with its promise: its scores on the test sets, and its time."""
    file = folder / "metrics.json"
    if not file.is_file():
        print(f"contrastive/demo: skipped, no {file} (make demo writes it)", flush=True)
        return
    metrics: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    for key, bar in DEMO.items():
        yield Row.at_least(f"contrastive/demo_{key.replace('/', '_')}", _number(metrics, key), bar)
    name = "train_seconds" if "train_seconds" in metrics else "seconds"
    yield Row.at_most(f"contrastive/demo_{name}", _number(metrics, name), SECONDS)


def _number(metrics: dict[str, Any], key: str) -> float:
    """Return a metric; one that is missing or null becomes nan, which meets no bar."""
    value = metrics.get(key)
    return math.nan if value is None else float(value)
