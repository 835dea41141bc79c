"""Gradient harmonization at shared features, sample by sample (CMGH, PCGrad, GradVac, ...).

Letters: B samples, G samples of all ranks, D width, K terms, Q pairs of them, R counts.
"""

from __future__ import annotations

from itertools import combinations
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.optim import Optimizer
from torchmetrics.functional.classification import binary_auroc

from descant.callbacks.callback_order import Ordered
from descant.modules.core.batch import Batch
from descant.modules.core.capabilities import has, require
from descant.modules.core.dtype import promote
from descant.modules.core.errors import no_such
from descant.modules.core.hooks import GradientHooks
from descant.modules.core.host import read_together, to_device
from descant.modules.core.loss_reduction import Step
from descant.modules.core.objects import require_objects
from descant.modules.core.protocols import ForksFeatures
from descant.modules.core.ranks import gather, mean_of_ranks, total_of_ranks
from descant.modules.core.rng import global_seed, mix
from descant.modules.multitask import Rule
from descant.modules.objectives.curriculum import Curriculum
from descant.modules.training_setup.boards import boards
from descant.modules.training_setup.trainer import log_interval, share_of_run

#: Logged steps whose samples an audit pools: 2,048 with batches of 128, so that the AUC has a standard error of 0.01.
AUDITED = 16


class HarmonizeFeatures(Ordered):
    """Gradient harmonization sample by sample, at features that several terms share, in one backward.

        dL/dz_i = sum_k mix_ik g_ik,    mix_i = rule(G_i),    G_ikl = <g_ik, g_il>,    g_ik = d term_k / d z_i

    It acts at the features that the recipe forks (:meth:`GradientHooks.fork`). With in-batch negatives g_ik is the
    gradient of all samples' losses at the feature of sample i, not only of its own loss.

    It logs ``harmony/conflict`` (the share of samples with terms more than 90 degrees apart), ``harmony/cosine`` (the
    mean), ``harmony/kept`` and ``harmony/fallbacks``. With an ``audit`` it also logs ``harmony/auc``, how well conflict
    detects noise over the samples of the last 16 logged steps, and ``harmony/auc_tenth``, how well it did after a tenth
    of the run. The loss of a micro-batch is averaged over the samples that a curriculum keeps, of all ranks.

    Args:
        rule: the rule for each sample; the plain sum if not given.
        curriculum: selects the samples that count.
        feature: the modality of the feature; by default all that several terms share, and the first of them for a
            curriculum.
        audit: a target of the data that is true if a sample is noise; only for ``harmony/auc``.
    """

    once = True
    excludes = ("Harmonize", "HarmonizeTowers")

    def __init__(
        self,
        rule: Rule | None = None,
        curriculum: Curriculum | None = None,
        feature: str | None = None,
        audit: str | None = None,
    ) -> None:
        super().__init__()
        require_objects(self, rule=(rule, Rule), curriculum=(curriculum, Curriculum))
        if rule is None and curriculum is None:
            raise ValueError("HarmonizeFeatures: a rule, a curriculum or both; without either it does nothing")
        if rule is not None and not rule.per_sample:
            raise ValueError(f"HarmonizeFeatures: {type(rule).__name__} is a rule for Harmonize, at the parameters")
        self.rule, self.curriculum, self.feature, self.audit = rule, curriculum, feature, audit
        self.sham = curriculum.sham if curriculum is not None else None  # a run's report counts its calls
        self._few: int | Tensor = 0
        self._auc_tenth: float | None = None
        self._audited: list[Tensor] = []  # conflict and noise, [2, G], of the last logged steps: one batch is too few
        self._names: tuple[str, ...] = ()  # of the terms that share the feature
        self._batch: Batch | None = None
        self._step = 0

    def state_dict(self) -> dict[str, Any]:
        rule = self.rule.state_dict() if self.rule else {}
        audited = [seen_2G.cpu() for seen_2G in self._audited]
        return {"fallbacks": self.fallbacks, "auc_tenth": self._auc_tenth, "audited": audited, "rule": rule}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._few, self._auc_tenth = int(state_dict["fallbacks"]), state_dict["auc_tenth"]
        self._audited = list(state_dict.get("audited", ()))  # absent in older checkpoints
        if self.rule is not None:
            self.rule.load_state_dict(state_dict["rule"])

    @property
    def fallbacks(self) -> int:
        """Number of steps in which the curriculum would have kept too few samples, so that all counted."""
        return int(self._few)

    # the hooks -------------------------------------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        name = type(pl_module).__name__
        require(self, pl_module, ForksFeatures)
        assert has(pl_module, ForksFeatures)
        shared = {m: names for m, names in pl_module.forks.items() if len(names) > 1}
        if not shared:
            raise ValueError(f"HarmonizeFeatures: no feature of this {name} is shared by two terms")
        if self.feature is not None and self.feature not in shared:
            raise ValueError(f"HarmonizeFeatures: feature {self.feature!r}: {no_such(self.feature, shared)}")
        self._names = shared[self.feature or next(iter(shared))]
        if self.curriculum is not None:
            unknown = [term for term in self.curriculum.only or () if term not in self._names]
            if unknown:
                raise ValueError(f"Curriculum: only {unknown[0]!r}: {no_such(unknown[0], self._names)}")
        pl_module.hooks.watched = stage == "fit"
        pl_module.hooks.rule = self._apply_rule if self.rule is not None and stage == "fit" else None

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if has(pl_module, ForksFeatures):
            pl_module.hooks.watched, pl_module.hooks.rule, pl_module.hooks.forked = False, None, []
        self._batch = None

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        assert has(pl_module, ForksFeatures)
        pl_module.hooks.forked, self._batch = [], batch
        self._step = trainer.global_step

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        assert has(pl_module, ForksFeatures) and self._batch is not None
        hooks, logs = pl_module.hooks, (trainer.global_step + 1) % log_interval(trainer) == 0
        copies = next((z for names, z in hooks.forked if names == self._names), None)
        hooks.forked = []
        if copies is None or (self.curriculum is None and not logs):
            return
        g_KBD = self._gradients(pl_module.step, self._names, copies)
        gramian_BKK = torch.einsum("kbd,lbd->bkl", g_KBD, g_KBD)
        norm_BK = gramian_BKK.diagonal(dim1=1, dim2=2).clamp(min=0).sqrt()
        pairs = list(combinations(range(len(self._names)), 2))
        sizes_BQ = torch.stack([norm_BK[:, i] * norm_BK[:, j] for i, j in pairs], dim=1)
        dots_BQ = torch.stack([gramian_BKK[:, i, j] for i, j in pairs], dim=1)
        both_BQ = sizes_BQ > 0
        cos_BQ = torch.where(both_BQ, dots_BQ / sizes_BQ.clamp(min=torch.finfo(sizes_BQ.dtype).tiny), torch.inf)
        cos_B, valid_B = cos_BQ.amin(dim=1), both_BQ.any(dim=1)  # the worst of the pairs that a sample has
        cos_B = torch.where(valid_B, cos_B, 0.0)
        kept_B = torch.ones_like(valid_B)
        if self.curriculum is not None:
            cos_B = self.curriculum.deciding_cosines(cos_B, valid_B, self._batch)
            kept_B = self._drop(trainer, hooks, cos_B, valid_B)
        if logs:
            self._log(trainer, pl_module, cos_B, valid_B, kept_B)

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        if self.rule is not None:
            # the state of rules is on the CPU, but ranks may only communicate through their devices
            self.rule.learn(lambda seen: mean_of_ranks(seen.to(pl_module.device, copy=True)).to(seen.device))

    # rule and curriculum ---------------------------------------------------------------------------------------------

    def _apply_rule(self, g_KBD: Tensor, names: tuple[str, ...]) -> Tensor:
        if self.rule is None or (self.feature is not None and names != self._names):
            return g_KBD.sum(dim=0)
        draw = mix(global_seed(), "harmony", self._step, *names)
        wide_KBD = promote(g_KBD)
        if self.rule.whole_gradients:
            return self.rule.combine(wide_KBD, draw).to(g_KBD.dtype)
        gramian_BKK = torch.einsum("kbd,lbd->bkl", wide_KBD, wide_KBD).double()
        (gramian_BKK,) = read_together(gramian_BKK)  # rules run on the CPU: an accelerator is read only once
        finite_B = gramian_BKK.isfinite().all(dim=(1, 2))
        gramian_BKK = torch.where(finite_B[:, None, None], gramian_BKK, torch.zeros_like(gramian_BKK))
        mix_BK = self.rule.weights(gramian_BKK, torch.ones(len(names)), draw).to(wide_KBD.dtype)
        return torch.einsum("bk,kbd->bd", to_device(mix_BK, wide_KBD.device), wide_KBD).to(g_KBD.dtype)

    @staticmethod
    def _gradients(step: Step, names: tuple[str, ...], copies: tuple[Tensor, ...]) -> Tensor:
        """Compute gradients ``[K, B, D]`` at the copies, so that no tower is differentiated."""
        assert step.objective is not None
        terms, base = step.objective.terms, dict(zip(step.objective.terms, step.objective.mix, strict=True))
        grads = []
        for name, z_BD in zip(names, copies, strict=True):
            (g_BD,) = torch.autograd.grad(terms[name] * base[name], z_BD, retain_graph=True, allow_unused=True)
            grads.append(torch.zeros_like(z_BD) if g_BD is None else g_BD)
        return promote(torch.stack(grads))

    def _drop(self, trainer: L.Trainer, hooks: GradientHooks, cos_B: Tensor, valid_B: Tensor) -> Tensor:
        assert self.curriculum is not None and self._batch is not None
        kept_B = self.curriculum.select_samples(cos_B, valid_B, self._batch, share_of_run(trainer))
        dropping = [name for name in self._names if self.curriculum.only is None or name in self.curriculum.only]
        rows = [valid_B & kept_B, valid_B]
        for name in dropping:
            of = hooks.terms[name].valid
            of = torch.ones_like(valid_B) if of is None else of
            if of.shape != kept_B.shape:
                raise ValueError(f"HarmonizeFeatures: {name} has {len(of)} rows, and the batch {len(kept_B)} samples")
            rows += [of & kept_B, of]
        count_R = total_of_ranks(torch.stack([row.sum() for row in rows]).double())
        few = (count_R[0] < self.curriculum.floor * count_R[1]) | ~(count_R[2::2] > 0).all()
        self._few = self._few + few if isinstance(self._few, Tensor) else few.long() + self._few
        # chosen on the device, so that no step waits for the counts
        for n, name in enumerate(dropping):
            scaled_B = kept_B.double() * (count_R[3 + 2 * n] / count_R[2 + 2 * n])
            hooks.keep[name] = torch.where(few, 1.0, scaled_B)
        return kept_B | few

    def _log(
        self, trainer: L.Trainer, pl_module: L.LightningModule, cos_B: Tensor, valid_B: Tensor, kept_B: Tensor
    ) -> None:
        assert self._batch is not None
        rows = [valid_B, valid_B & (cos_B < 0), valid_B & kept_B, valid_B * cos_B]
        count, *sums = total_of_ranks(torch.stack([row.double().sum() for row in rows]))
        values = {n: x / count.clamp(min=1) for n, x in zip(("conflict", "kept", "cosine"), sums, strict=True)}
        values["fallbacks"] = torch.tensor(float(self.fallbacks))
        if self.audit is not None:
            noise_B = self._batch.targets[self.audit].bool()
            cos_G, noise_G, valid_G = (gather(x_B.double()) for x_B in (cos_B, noise_B, valid_B))
            seen_2G = torch.stack([(1 - cos_G) / 2, noise_G])[:, valid_G > 0]
            self._audited = [*(before.to(seen_2G.device) for before in self._audited), seen_2G][-AUDITED:]
            conflict_G, noise_G = torch.cat(self._audited, dim=1)
            if noise_G.any() and not noise_G.all():
                values["auc"] = binary_auroc(conflict_G, noise_G > 0)
                if self._auc_tenth is None and share_of_run(trainer) >= 0.1:
                    self._auc_tenth = float(values["auc"])
            if self._auc_tenth is not None:
                values["auc_tenth"] = torch.tensor(self._auc_tenth)
        pl_module.log_dict({f"harmony/{name}": value.float() for name, value in values.items()}, batch_size=1)
        if trainer.is_global_zero and valid_B.any():  # a batch may have no sample with two terms
            for board in boards(trainer.loggers):
                cos_N = cos_B[valid_B].float().cpu().numpy()
                board.show_histogram("harmony/cosine_of_samples", cos_N, trainer.global_step)
