"""Gradient harmonization at shared parameters (PCGrad, CAGrad, MGDA, ...), for any module whose terms a Step mixes.

Letters: K terms, P numbers of a parameter.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import combinations
from typing import Any, Literal, cast

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from descant.callbacks.plots.curves import Track, cosine_map
from descant.callbacks.plots.output import save_figure
from descant.modules.core.capabilities import has, require
from descant.modules.core.hooks import GradientHooks
from descant.modules.core.host import read_together, to_device
from descant.modules.core.objects import require_objects
from descant.modules.core.protocols import HasObjective
from descant.modules.core.ranks import mean_of_ranks
from descant.modules.core.rng import global_seed, mix
from descant.modules.core.sham import Sham
from descant.modules.moe.active import expert_layers
from descant.modules.multitask import Rule
from descant.modules.multitask.mix import gramian, gramians, mix_gradients, mix_of, stack_gradients, term_gradients
from descant.modules.training_setup.trainer import log_interval


class Harmonize(L.Callback):
    """Gradient harmonization: mix the terms of a loss by a rule of their gradients at the shared parameters.

        loss = sum_k mix_k term_k,      mix = rule(G) * base,      G_kl = <g_k, g_l>,  g_k = base_k d term_k / d shared

    ``base`` is the recipe's mix, and gradients are averaged over ranks. They are computed term by term before
    Lightning's backward, which then uses the new mix: schedules, clipping, precision and strategies are unchanged.
    If G is not finite, the step uses the plain sum and counts as a fallback. A rule ``across_batches`` (MoDo) gets the
    mean of ``<g_mk, g_nl>`` over all pairs of micro-batches m and n that share a mix, of all ranks.

    It logs ``harmony/mix/{term}``, ``harmony/norm/{term}``, ``harmony/cos/{term}~{term}``, and over the run so far
    ``harmony/conflict``, the share of pairs whose gradients had an angle above 90 degrees, and ``harmony/fallbacks``.
    The cosines over the run are plotted: to TensorBoard as ``harmony/cosines``, and in ``{run folder}/pictures/``.

    Args:
        rule: computes the mix from gradients, or values.
        every: compute the gradients in one of every ``every`` optimizer steps; the mix stays in between.
        window: use the gradients of each micro-batch; or with ``step`` those of all micro-batches of the optimizer
            step together, as for one large batch, which stores K gradients.
        sham: ``permute`` for the control: each term gets the mix of the one before it.
    """

    once = True
    writes_at_end = True

    def __init__(
        self,
        rule: Rule,
        every: int = 1,
        window: Literal["micro", "step"] = "micro",
        sham: Literal["permute"] | None = None,
    ) -> None:
        super().__init__()
        require_objects(self, rule=(rule, Rule))
        if rule.whole_gradients:
            raise ValueError(f"Harmonize: {type(rule).__name__} is a rule for HarmonizeFeatures; here such as PCGrad")
        if every < 1:
            raise ValueError(f"Harmonize: every {every}: 1 is the least")
        if every > 1 and not rule.reads_gradients:
            raise ValueError(f"Harmonize: every {every}: {type(rule).__name__} uses no gradients; leave it out")
        self.rule, self.every, self.window, self.sham = rule, every, window, Sham(sham)
        self.names: tuple[str, ...] = ()
        self.mix_K: Tensor | None = None
        self.looks = self.conflicts = self.fallbacks = 0
        self.track = Track()
        self._sums: list[Tensor] = []  # ``[K, ...]`` per parameter, over the micro-batches of this step so far
        self._base_K = self._value_K = self._own_KK = torch.zeros(0)  # own: each micro-batch with itself, summed

    def state_dict(self) -> dict[str, Any]:
        counts = {"looks": self.looks, "conflicts": self.conflicts, "fallbacks": self.fallbacks}
        seen = {"rule": self.rule.state_dict(), "track": self.track.state_dict()}
        return {**counts, **seen, "names": self.names, "mix": self.mix_K}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.looks, self.conflicts, self.fallbacks = (state_dict[n] for n in ("looks", "conflicts", "fallbacks"))
        self.names, self.mix_K = tuple(state_dict["names"]), state_dict["mix"]
        self.rule.load_state_dict(state_dict["rule"])
        self.track.load_state_dict(state_dict["track"])

    # the hooks -------------------------------------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        require(self, pl_module, HasObjective)
        if hooks_of(pl_module).rule is not None:
            raise ValueError("Harmonize: a rule acts at the features already; one of the two")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._sums = []  # drop an incomplete step, such as after a loss that was not finite

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        assert has(pl_module, HasObjective) and pl_module.step.objective is not None
        objective = pl_module.step.objective
        self._require_same_terms(tuple(objective.terms))
        if trainer.global_step % self.every == 0 or self.mix_K is None:
            self._base_K = objective.mix.detach().double()
            value_K = mean_of_ranks(torch.stack([term.detach().double() for term in objective.terms.values()]))
            if self.window == "step" and self.rule.reads_gradients and trainer.accumulate_grad_batches > 1:
                grads = gradients(pl_module, _trainable_parameters(pl_module))
                own_KK = self._gram_of_batch(_select_shared(pl_module, grads))
                first = not self._sums
                self._value_K = value_K if first else self._value_K + value_K
                self._own_KK = own_KK if first else self._own_KK + own_KK
                self._sums = grads if first else [a + b for a, b in zip(self._sums, grads, strict=True)]
                return
            both = torch.zeros(0), torch.zeros(0)
            if self.rule.reads_gradients:
                grads = gradients(pl_module, list(pl_module.shared_parameters()))
                own_KK = self._gram_of_batch(grads)
                both = self._gramians([mean_of_ranks(g) for g in grads], own_KK, pl_module.step.world)
            self._decide(trainer, pl_module, *both, value_K)
        assert self.mix_K is not None
        objective.mix.mul_(to_device(self.mix_K.to(objective.mix.dtype), objective.mix.device))

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        if self._sums:
            assert has(pl_module, HasObjective)
            micros = trainer.accumulate_grad_batches
            # divided as Lightning divides a loss, and averaged over ranks as DDP does
            sums = [mean_of_ranks(g) / micros for g in self._sums]
            both = self._gramians(_select_shared(pl_module, sums), self._own_KK / micros, pl_module.step.world * micros)
            self._decide(trainer, pl_module, *both, self._value_K / micros)
            assert self.mix_K is not None
            mix_K = to_device(self.mix_K, self._base_K.device) * self._base_K
            for p, g in zip(_trainable_parameters(pl_module), sums, strict=True):
                if p.grad is not None:
                    g_mixed = mix_gradients(mix_K, g)
                    if isinstance(p.grad, DTensor):
                        g_mixed = distribute_tensor(g_mixed, p.grad.device_mesh, p.grad.placements)
                    p.grad.copy_(g_mixed)
            self._sums = []
        if trainer.global_step % self.every == 0:
            self.rule.learn(lambda seen: seen)  # the Gram matrix is of all ranks already

    # the mix ---------------------------------------------------------------------------------------------------------

    def _gram_of_batch(self, grads: Sequence[Tensor]) -> Tensor:
        return gramian(grads) if self.rule.across_batches else torch.zeros(0)

    def _gramians(self, grads: Sequence[Tensor], own_KK: Tensor, batches: int) -> tuple[Tensor, Tensor]:
        """Compute the Gram matrices of ``batches``: see :func:`descant.modules.multitask.mix.gramians`."""
        if self.rule.across_batches and batches < 2:
            raise ValueError(
                f"Harmonize: {type(self.rule).__name__} compares the micro-batches of a step, and has one: window step "
                "with trainer.accumulate_grad_batches 2, or 2 ranks"
            )
        own_KK = mean_of_ranks(own_KK) if self.rule.across_batches else own_KK
        return gramians(self.rule, grads, own_KK, batches)

    def _require_same_terms(self, names: tuple[str, ...]) -> None:
        if len(names) < 2:
            raise ValueError(f"Harmonize: one term, {names[0]}: there is nothing to harmonize it with")
        if self.names not in ((), names):
            raise ValueError(
                f"Harmonize: terms {', '.join(names)}, before {', '.join(self.names)}: always the same ones"
            )
        self.names = names

    def _decide(
        self, trainer: L.Trainer, pl_module: L.LightningModule, gramian_KK: Tensor, of_rule_KK: Tensor, value_K: Tensor
    ) -> None:
        """Compute the mix from Gram matrices of unmixed gradients, on the CPU: an accelerator is read only once."""
        gramian_KK, of_rule_KK, value_K, base_K = read_together(gramian_KK, of_rule_KK, value_K, self._base_K)
        read, draw = self.rule.reads_gradients, mix(global_seed(), "harmony", trainer.global_step)
        if read:
            gramian_KK, of_rule_KK = (x_KK * base_K[:, None] * base_K for x_KK in (gramian_KK, of_rule_KK))
        mix_K = mix_of(self.rule, of_rule_KK, value_K, draw) if bool(gramian_KK.isfinite().all()) else None
        finite = mix_K is not None
        if mix_K is not None:
            self.mix_K = self.sham.handed_on(mix_K)
        else:
            self.mix_K = torch.ones(len(self.names), dtype=torch.float64)
            self.fallbacks += 1
        if read and finite:
            cos_Q = _cosines(gramian_KK)
            self.looks += len(cos_Q)
            self.conflicts += int((cos_Q < 0).sum())
            self.track.add(trainer.global_step, cos_Q.tolist())
        # this mix applies until it is computed again; log it if one of these steps is logged
        now, each = trainer.global_step, log_interval(trainer)
        if (now + self.every) // each > now // each:
            self._log(pl_module, gramian_KK if read and finite else None)

    def _log(self, pl_module: L.LightningModule, gramian_KK: Tensor | None) -> None:
        assert self.mix_K is not None
        values = {f"harmony/mix/{name}": value for name, value in zip(self.names, self.mix_K, strict=True)}
        values["harmony/fallbacks"] = torch.tensor(float(self.fallbacks))
        if gramian_KK is not None:
            norm_K = gramian_KK.diagonal().clamp(min=0).sqrt()
            values |= {f"harmony/norm/{name}": value for name, value in zip(self.names, norm_K, strict=True)}
            cosines = zip(combinations(self.names, 2), _cosines(gramian_KK), strict=True)
            values |= {f"harmony/cos/{a}~{b}": cos for (a, b), cos in cosines}
            values["harmony/conflict"] = torch.tensor(self.conflicts / max(self.looks, 1))
        pl_module.log_dict({name: value.float() for name, value in values.items()}, batch_size=1)

    # the plot ---------------------------------------------------------------------------------------------------------

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking and trainer.state.fn == TrainerFn.FITTING:
            self._draw(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._draw(trainer)

    def _draw(self, trainer: L.Trainer) -> None:
        if not trainer.is_global_zero or not self.track.steps or trainer.fast_dev_run or not trainer.loggers:  # type: ignore[attr-defined]
            return
        title = f"harmony by {type(self.rule).__name__}, step {trainer.global_step}"
        figure = cosine_map(title, list(combinations(self.names, 2)), *self.track.points())
        save_figure(trainer, figure, "harmony", "harmony/cosines")


@contextmanager
def _keeping_gathered(pl_module: nn.Module) -> Iterator[None]:
    """Keep gathered parameters (FSDP2) after backward passes within the block: the step's own backward needs them."""
    shared = next((name for name, layer in expert_layers(pl_module).items() if layer.group is not None), None)
    if shared is not None:
        raise ValueError(
            f"Harmonize: ranks share the experts of {shared}, and each has gradients of other ones; leave "
            "model.shard.init_args.expert_ranks (parallelize) out"
        )
    split = next((name for name, p in pl_module.named_parameters() if isinstance(p, DTensor)), None)
    if split is not None:
        raise ValueError(
            f"Harmonize: {split} is freed between forward and backward, and no gradient of one term is whole anywhere; "
            "model.shard.init_args.reshard_after_forward false"
        )
    if not isinstance(pl_module, FSDPModule):
        yield
        return
    pl_module.set_reshard_after_backward(False)
    try:
        yield
    finally:
        pl_module.set_reshard_after_backward(True)


def _cosines(gramian_KK: Tensor) -> Tensor:
    """Compute the cosines ``[Q]`` of the pairs of terms; 0 where one has no gradient."""
    norm_K = gramian_KK.diagonal().clamp(min=0).sqrt().clamp(min=torch.finfo(gramian_KK.dtype).tiny)
    i_Q, j_Q = torch.triu_indices(len(norm_K), len(norm_K), offset=1, device=norm_K.device)
    return gramian_KK[i_Q, j_Q] / norm_K[i_Q] / norm_K[j_Q]


def hooks_of(pl_module: object) -> GradientHooks:
    """Return the gradient hooks of a module, or new ones if it has none."""
    hooks = getattr(pl_module, "hooks", None)
    return hooks if isinstance(hooks, GradientHooks) else GradientHooks()


def gradients(
    pl_module: HasObjective, parameters: Sequence[nn.Parameter], names: Sequence[str] | None = None
) -> list[Tensor]:
    """Compute ``[K, ...]`` for each parameter: the unmixed gradient of each term of the step's objective on this rank.

    It covers all terms if no names are given, with zeros where a term does not depend on the parameter. The graph is
    retained, and rules at forked features are not applied.
    """
    hooks, objective = hooks_of(pl_module), pl_module.step.objective
    assert objective is not None
    hooks.probing = True
    try:
        with _keeping_gathered(cast(nn.Module, pl_module)):
            by_term = term_gradients([objective.terms[name] for name in names or objective.terms], parameters)
    finally:
        hooks.probing = False
    return [stack_gradients(of_terms, p) for p, *of_terms in zip(parameters, *by_term, strict=True)]


def _trainable_parameters(pl_module: nn.Module) -> list[nn.Parameter]:
    return [p for p in pl_module.parameters() if p.requires_grad]


def _select_shared(pl_module: HasObjective, grads: Sequence[Tensor]) -> list[Tensor]:
    """Select the gradients of the shared parameters."""
    shared = set(pl_module.shared_parameters())
    return [g for g, p in zip(grads, _trainable_parameters(cast(nn.Module, pl_module)), strict=True) if p in shared]
