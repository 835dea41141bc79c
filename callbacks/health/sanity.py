"""Warnings about settings without effect, one line each before the first step, and about runs that do not learn.

Letters: B samples, D width.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import lightning as L
import torch
from torch.optim.lr_scheduler import LambdaLR, LinearLR, SequentialLR

from descant.callbacks.health.worker_sockets import require_sockets, workers_of
from descant.modules.adaptation.base import LM, select_towers
from descant.modules.core.batch import NEGATIVE, Batch
from descant.modules.core.capabilities import has
from descant.modules.core.chunks import looks_at_the_batch
from descant.modules.core.dtensor import by_mesh
from descant.modules.core.errors import warn
from descant.modules.core.loaded import has_loaded_weights
from descant.modules.core.modes import eval_mode
from descant.modules.core.protocols import Embeds, HasObjective, HasTowers
from descant.modules.core.rng import by_rank, drawn_by_rank
from descant.modules.core.rollouts import RolloutData
from descant.modules.towers.base import Frozen
from descant.modules.training_setup.trainer import data_now, first_validation, log_interval, run_steps

#: Checks before the first step.
Before = Literal["rate", "interval", "batch", "frozen", "chunks", "validation", "logger", "mix", "modality", "ranks"]
#: Number of losses to average, and of consecutive rollouts with equal rewards.
_FEW, _FLAT = 10, 3
#: Learning rates above which no run trains: for optimizers that divide by the gradient's size, and for others.
_ADAPTIVE, _PLAIN = 1.0, 100.0


class Sanity(L.Callback):
    """Warns about settings that have no effect or cannot work, one line each on stderr.

    Before the first step: a warm-up longer than the run, a learning rate of zero or far too high, a modality without a
    tower or a tower without its modality, a run without a step, a log interval longer than the run, a batch larger than
    the data set, a model that is frozen or has trainable parameters in no optimizer, a tower that Freeze or Lora keeps
    at random weights, a validation that is never reached, batch norms that see a chunk of the batch, frozen parameters
    with a learning rate, a term that is multiplied by zero, no logger, dropout that depends on the number of ranks, and
    a first backward without gradients (with rollouts, only one without a graph: answers of equal rewards have zero
    gradients). Once, after ``late`` steps: a loss that has not fallen, embeddings of different samples that are all
    alike, and rewards that are all equal.

    Args:
        late: steps after which a run should have learned something.
        meant: checks to skip, since the experiment intends what they report.
    """

    once = True

    def __init__(self, late: int = 200, meant: list[Before] | None = None) -> None:
        super().__init__()
        self.late, self.meant = late, frozenset(meant or ())
        self._look = False
        self._first, self._last = list[torch.Tensor](), list[torch.Tensor]()
        self._flat = 0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit" and workers_of(getattr(trainer, "datamodule", None)):
            require_sockets()

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if workers_of(getattr(trainer, "datamodule", None)):  # after setup: mined negatives disable workers
            require_sockets()
        for name in ("max_steps", "max_epochs"):
            if getattr(trainer, name) == 0:  # then on_train_start is not called
                _warn(trainer, f"trainer.{name} 0: the run has no step to take, and nothing will change")
                return

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        loaders = trainer.fit_loop._combined_loader
        if loaders is not None and any(map(workers_of, loaders.flattened)):
            require_sockets()
        # findings() runs on every rank, since counting steps may load data
        for line in self.findings(trainer, pl_module):
            _warn(trainer, line)
        self._look = True
        self._first, self._last, self._flat = [], [], 0

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # under FSDP2 gradients are held back until the last micro-batch of a step
        if not self._look or trainer.fit_loop.epoch_loop._should_accumulate():
            return
        self._look = False
        if has(pl_module, HasObjective) and pl_module.step.objective is not None:
            terms = pl_module.step.objective.terms
            for name in (name for name in pl_module.step.mix if name not in terms):
                _warn(trainer, f"mix {name}: no such term in the first step; there is {', '.join(terms)}")
        trainable = [p for p in pl_module.parameters() if p.requires_grad]
        # sums, not maxima: a rank's part of a small sharded parameter may be empty
        norms = [p.grad.detach().abs().sum().float() for p in trainable if p.grad is not None and p.numel()]
        if norms and has(data_now(trainer), RolloutData):
            return  # equal rewards, as an untrained policy may get, give zero gradients: Rollouts warns of that
        # one device read for the whole model, two if ranks share experts; a NaN is not "no gradient"
        if trainable and all(float(torch.stack(part).max()) == 0 for part in by_mesh(norms)):
            _warn(trainer, "no parameter got a gradient from the first batch: its loss does not depend on the model")

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if step > self.late or not isinstance(loss, torch.Tensor):
            return
        seen = self._first if step <= _FEW else self._last if step > self.late - _FEW else None
        if seen is not None:
            seen.append(loss.detach().float())
        if step == self.late and not trainer.fit_loop.epoch_loop._should_accumulate():
            for line in (*_still(self._first, self._last, self.late), *_alike(trainer, pl_module, batch)):
                _warn(trainer, line)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        flat = trainer.callback_metrics.get("rollouts/flat")
        self._flat = self._flat + 1 if flat is not None and float(flat) == 1 else 0
        if self._flat == _FLAT:
            reward = float(trainer.callback_metrics["rollouts/reward"])
            line = f"all answers to each question had the same reward, {_FLAT} times (mean {reward:.3g})"
            _warn(trainer, f"{line}: nothing is learned")

    def findings(self, trainer: L.Trainer, pl_module: L.LightningModule) -> list[str]:
        """Return the warnings about a run before its first step."""
        total = run_steps(trainer)
        left = total - trainer.global_step
        if left <= 0:
            return []
        checks: dict[Before, list[str]] = {
            "rate": _learning_rate(trainer, total),
            "interval": [_log_interval(trainer, total)],
            "batch": [_batch_size(trainer)],
            "frozen": [*_check_frozen(trainer, pl_module), *_check_random_towers(pl_module)],
            "chunks": chunked_norms(pl_module),
            "validation": [_validation(trainer, total)],
            "logger": ["" if trainer.loggers else "nothing is logged: trainer.logger leaves no logger"],
            "mix": _unused_terms(pl_module),
            "modality": _unused_modalities(trainer, pl_module),
            "ranks": _by_rank(trainer, pl_module),
        }
        return [line for name, lines in checks.items() if name not in self.meant for line in lines if line]


def _warn(trainer: L.Trainer, line: str) -> None:
    if trainer.is_global_zero:
        warn(line)


def _learning_rate(trainer: L.Trainer, total: float) -> list[str]:
    lines = []
    for config in trainer.lr_scheduler_configs:
        ticks = total if config.interval == "step" else trainer.max_epochs or math.inf
        ticks = ticks / max(config.frequency, 1)
        if math.isfinite(ticks) and ticks > 1 and _only_rises(config.scheduler, int(ticks)):
            lines.append(
                f"the learning rate still warms up when the run ends after {total:,.0f} steps: shorten the warm-up"
            )
    rates = [group["lr"] for optimizer in trainer.optimizers for group in optimizer.param_groups]
    if rates and not trainer.lr_scheduler_configs and not any(float(rate) for rate in rates):
        lines.append("the learning rate is 0: nothing will change")
    return [*lines, *_too_fast(trainer)]


def _too_fast(trainer: L.Trainer) -> list[str]:
    """Warn about peak learning rates far above any that trains: a step of Adam moves a weight by about its rate."""
    limits = {}
    for optimizer in trainer.optimizers:
        for group in optimizer.param_groups:
            rate, most = float(group.get("initial_lr", group["lr"])), _ADAPTIVE if "betas" in group else _PLAIN
            if rate > most:
                limits[f"a learning rate of {rate:.4g} is far above what {type(optimizer).__name__} trains by"] = most
    return [f"{line} (more than {most:g}): the loss will not fall" for line, most in limits.items()]


def _only_rises(scheduler: Any, ticks: int) -> bool:
    if isinstance(scheduler, SequentialLR):
        first = scheduler._schedulers[0]
        return scheduler._milestones[0] >= ticks and _only_rises(first, ticks)
    if isinstance(scheduler, LinearLR):
        return scheduler.start_factor < scheduler.end_factor and scheduler.total_iters >= ticks
    if isinstance(scheduler, LambdaLR):
        factor = scheduler.lr_lambdas[0]
        at = sorted({round(k * (ticks - 1) / 32) for k in range(33)})
        factors = [float(factor(t)) for t in at]
        # it must rise after the end too: a warm-up that ends exactly with the run is accepted
        steps = zip(factors, [*factors[1:], float(factor(ticks))], strict=True)
        return all(a < b for a, b in steps)
    return False


def _log_interval(trainer: L.Trainer, total: float) -> str:
    every = log_interval(trainer)
    if not trainer.loggers or every <= total or math.isinf(every):
        return ""
    return (
        f"trainer.log_every_n_steps {every} is more than the {total:,.0f} steps of the run: "
        "no training metric is logged"
    )


def _batch_size(trainer: L.Trainer) -> str:
    loader = trainer.train_dataloader
    if getattr(trainer.datamodule, "batch_tokens", None) is not None:  # type: ignore[attr-defined]
        return ""  # the number of rows depends on their tokens
    size = getattr(trainer.datamodule, "batch_size", None)  # type: ignore[attr-defined]
    if not isinstance(size, int):
        size = getattr(loader, "batch_size", None)
        size = size * trainer.world_size if isinstance(size, int) else None
    try:
        rows = len(loader.dataset)  # type: ignore[union-attr]
    except (AttributeError, TypeError, NotImplementedError):  # a stream has no length
        return ""
    if size is None or size <= rows:
        return ""
    return f"the batch of {size:,} is larger than the data set of {rows:,}"


def _check_frozen(trainer: L.Trainer, pl_module: L.LightningModule) -> list[str]:
    trainable = {id(p): p.numel() for p in pl_module.parameters() if p.requires_grad}
    if not trainable:
        return [f"every parameter of {type(pl_module).__name__} is frozen: nothing will change"]
    optimized = {id(p) for optimizer in trainer.optimizers for g in optimizer.param_groups for p in g["params"]}
    if not optimized:  # Lightning adds an empty one if configure_optimizers returns None
        return [f"{type(pl_module).__name__} has no optimizer: nothing will change"]
    if getattr(trainer.strategy, "restore_checkpoint_after_setup", False):
        return []  # a sharded optimizer may have other tensors than the module
    lost = sum(n for i, n in trainable.items() if i not in optimized)
    idle: dict[float, int] = {}
    for group in (group for optimizer in trainer.optimizers for group in optimizer.param_groups):
        size = sum(p.numel() for p in group["params"] if not p.requires_grad)
        if size and float(group["lr"]):
            idle[float(group["lr"])] = idle.get(float(group["lr"]), 0) + size
    if idle:
        return [f"{size:,} parameters with a learning rate of {rate:.3g} are frozen" for rate, size in idle.items()]
    if lost:
        return [
            f"{lost:,} of {sum(trainable.values()):,} trainable parameters are in no optimizer: they will not change"
        ]
    return []


def _check_random_towers(pl_module: L.LightningModule) -> list[str]:
    """Find towers with random weights that the run does not train, since Freeze, Frozen or Lora keeps them."""
    lines = []
    for name, tower in select_towers(pl_module, None, LM) if has(pl_module, HasTowers) else ():
        own = [p for key, p in tower.named_parameters() if "lora_" not in key]
        adapted = name == LM or isinstance(tower, Frozen) or len(own) < len([*tower.parameters()])
        if adapted and own and not any(p.requires_grad for p in own) and not has_loaded_weights(tower):
            lines.append(f"tower {name} is frozen with random weights: nothing has trained them, and this run does not")
    return lines


def chunked_norms(pl_module: L.LightningModule) -> list[str]:
    """Find towers whose batch norms see a chunk of the batch, so that gradients differ from those of the whole."""
    if not has(pl_module, HasObjective) or not has(pl_module, HasTowers) or pl_module.step.chunks == 1:
        return []
    return [
        f"chunks {pl_module.step.chunks}: tower {name} has batch norms, whose statistics are then of a chunk, not "
        "of the batch; with group or layer norms gradients do not depend on chunks"
        for name, tower in pl_module.towers.items()
        if looks_at_the_batch(tower)
    ]


def _by_rank(trainer: L.Trainer, pl_module: L.LightningModule) -> list[str]:
    """Find parts of the model that make losses depend on the number of ranks."""
    if trainer.world_size == 1:
        return []
    differ = f"on {trainer.world_size} ranks losses differ from those on another number of ranks"
    lines = [f"{name} {does}: {differ}" for name, does in by_rank(pl_module).items()]
    names = list(drawn_by_rank(pl_module))
    more = f" and {len(names) - 1} more sample" if len(names) > 1 else " samples"
    return [*lines, f"{names[0]}{more} dropout by rank: {differ} by these masks"] if names else lines


def _unused_terms(pl_module: L.LightningModule) -> list[str]:
    if not has(pl_module, HasObjective):
        return []
    unused = [name for name, factor in pl_module.step.mix.items() if factor == 0]
    return [f"mix {name}: 0: the term is computed and thrown away" for name in unused]


def _unused_modalities(trainer: L.Trainer, pl_module: L.LightningModule) -> list[str]:
    """Find modalities that no tower reads and towers without input, if the recipe declares what it reads."""
    reads = getattr(pl_module, "required_modalities", None)
    available = getattr(data_now(trainer), "modalities", ()) if trainer.datamodule is not None else ()  # type: ignore[attr-defined]
    if not has(pl_module, HasTowers) or reads is None or not available:
        return []
    used = {*pl_module.towers, *reads}
    lines = [
        f"the data has {m}, and no tower reads it: it is loaded without use (model.towers.{m}, or other data)"
        for m in available
        if m not in used and not m.endswith(NEGATIVE)
    ]
    return lines + [
        f"tower {m} gets no input: the data has {', '.join(available)}" for m in pl_module.towers if m not in available
    ]


def _still(first: list[torch.Tensor], last: list[torch.Tensor], steps: int) -> list[str]:
    """Return a warning if the loss has not fallen by at least one percent."""
    if len(first) < _FEW or not last:
        return []
    began, now = (float(torch.stack(losses).mean()) for losses in (first, last))  # the only device read
    if not (began > 0 and now > 0.99 * began):  # losses below zero, such as those of rewards, are not judged
        return []
    return [f"after {steps} steps the loss is {now / began:.1%} of its start: nothing is learned so far"]


@torch.no_grad()
def _alike(trainer: L.Trainer, pl_module: L.LightningModule, batch: Any) -> list[str]:
    """Return warnings for modalities whose embeddings are all alike (collapsed)."""
    compiled = any(module._compiled_call_impl is not None for module in pl_module.modules())  # they would compile again
    if not has(pl_module, Embeds) or not isinstance(batch, Batch) or compiled:
        return []
    # no dropout, no batch-norm statistics
    with eval_mode(pl_module), trainer.precision_plugin.forward_context():
        z = pl_module.embed(batch.select(slice(0, 64)))
    lines = []
    for name, z_BD in z.items():
        if z_BD.ndim != 2:
            continue
        z_BD = z_BD[z_BD.norm(dim=1) > 0.5].float()  # zero where the modality is absent
        if len(z_BD) > 1:
            cosine = (z_BD.sum(0).square().sum() - len(z_BD)) / (len(z_BD) * (len(z_BD) - 1))
            if float(cosine) > 0.99:
                lines.append(
                    f"the embeddings of {name} are all alike (mean cosine {float(cosine):.3f}): they have collapsed"
                )
    return lines


def _validation(trainer: L.Trainer, total: float) -> str:
    by_clock = trainer._val_check_time_interval is not None  # type: ignore[attr-defined]
    if not trainer.enable_validation or by_clock:
        return ""
    first = first_validation(trainer)
    run = total * trainer.accumulate_grad_batches
    if first <= run or not math.isfinite(run):
        return ""
    steps = f"{math.ceil(first / trainer.accumulate_grad_batches):,}" if math.isfinite(first) else "more"
    return f"the first validation is due after {steps} steps and the run has {total:,.0f}: it never runs"
