"""ReconBoost: classification of several modalities by boosting, one modality at a time against the others' errors.

Claim: a modality that is trained alone, on the errors of the others, competes with none of them.

    stage s: ``boost`` steps of the modality m = modalities[s mod M] alone, then ``rectify`` steps of all that have had
    a stage:
    boost    value = - sum_c (w y_c - r q_c y_c) log softmax(f(z_m))_c / C,     q = softmax(rate sum_{n != m} f(z_n))
    rectify  value = cross_entropy(rate sum_n f(z_n), label)

Here y is the one-hot label. q has no gradient and covers the other modalities that have had a stage; without any, q is
1, as in the first stage of the release. ``over: classes`` uses q_c instead of q_c y_c, which gives the whole
Kullback-Leibler divergence, and q = 1 / C without others. With w = r = 1, the gradient at the logits is then
(q - y) / C, the residual of gradient boosting (our reading of the paper; the release is the default). Other parameters
are frozen until their stage: no gradient, no weight decay.

What differs from the release: its stages are epochs (4 and 4), here they are optimizer steps. It begins a new optimizer
each stage; here one optimizer continues. It begins from trained modalities. Its memory term has no gradient (both sides
are detached); here ``memory_weight`` is 0 by default, and above 0 the term has a gradient.
Source: Hua 2024, arXiv 2405.09321, github.com/huacong/ReconBoost.
Letters: B samples, D width, C classes, M modalities.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from descant.modules.core.batch import Batch, some
from descant.modules.core.dtype import promote
from descant.modules.core.objective import Term
from descant.modules.core.output import Output
from descant.modules.fusion.boosted import BoostedSum
from descant.modules.missing_modalities.modulation import touch_parameters
from descant.modules.towers import Towers
from descant.modules.towers.heads import Pool, Pools
from descant.recipes.base.classifier import Classifier


class ReconBoost(Classifier):
    """Alternating boosting of modalities that share a classifier (ReconBoost).

    A boosting step also runs the other towers forward, without gradient. The stage follows from the step number, so
    there is no state except weights and optimizer.

    Args:
        towers, target, classes, width, pool, smoothing: as in Classifier; smoothing applies to rectifying only.
        hidden: width inside the shared classifier.
        boost, rectify: optimizer steps of each half of a stage.
        label_weight, reconcile: w and r.
        over: which entries of q count: that of the ``label``, as in the release, or those of all ``classes``.
        memory_weight: weight of the squared difference between the probabilities and those of the previous learner.
    """

    fusion: BoostedSum

    def __init__(
        self,
        towers: Towers,
        target: str,
        classes: int,
        width: int = 128,
        pool: Pool | Pools | None = None,
        hidden: int = 256,
        smoothing: float = 0.0,
        boost: int = 400,
        rectify: int = 400,
        label_weight: float = 5.0,
        reconcile: float = 1.0,
        over: Literal["label", "classes"] = "label",
        memory_weight: float = 0.0,
        **kwargs: Any,
    ) -> None:
        if boost < 1 or rectify < 0:
            raise ValueError(f"boost {boost}, rectify {rectify}: at least 1 and 0 steps, such as 400")
        if min(label_weight, reconcile, memory_weight) < 0:
            raise ValueError(
                f"label_weight {label_weight:g}, reconcile {reconcile:g}, memory_weight {memory_weight:g}: 0 or more"
            )
        super().__init__(towers, target, classes, width, pool, BoostedSum(hidden), smoothing, **kwargs)
        self.boost, self.rectify, self.over = boost, rectify, over
        self.memory_weight = memory_weight
        self.label_weight, self.reconcile = label_weight, reconcile

    @property
    def stage(self) -> tuple[int, bool]:
        """Return the number of this step's stage, and whether the step is a rectifying one."""
        stage, place = divmod(self.global_step, self.boost + self.rectify)
        return stage, place >= self.boost

    @property
    def active(self) -> tuple[str, ...]:
        """Return the modalities that learn in this step."""
        stage, rectifying = self.stage
        return self.modalities[: stage + 1] if rectifying else (self.modalities[stage % len(self.modalities)],)

    def forward(self, batch: Batch) -> Output:
        _, rectifying = self.stage
        term = self._rectify(batch) if rectifying else self._boost(batch)
        name = "fused" if rectifying else self.active[0]
        # every rank's backward reaches all parameters, in every step
        return Output({name: Term(touch_parameters(term.value, self._idle()), valid=term.valid, norm=term.norm)})

    def _rectify(self, batch: Batch) -> Term:
        z = self.latents(batch, *self.active)
        logits_BC = promote(self.fusion.total(z, batch.present))
        here_B, step_G = (some(*(present[m] for m in z)) for present in (batch.present, batch.step))
        return self.term(logits_BC, self.labels(batch), here_B, step_G)

    def _boost(self, batch: Batch) -> Term:
        (stage, _), (m,), label_B = self.stage, self.active, self.labels(batch)
        before = [n for n in self.modalities[:stage] if n != m]
        log_BC = promote(self.fusion.head(self.latents(batch, m)[m])).log_softmax(dim=1)
        y_BC = F.one_hot(label_B.clamp(min=0), self.classes).to(log_BC)
        with torch.no_grad():
            z = self.latents(batch, *before) if before else {}
            q_BC = self._others(z, batch, log_BC)
            target_BC = self.label_weight * y_BC - self.reconcile * q_BC * (y_BC if self.over == "label" else 1.0)
        value_B = -(target_BC * log_BC).mean(dim=1)
        if self.memory_weight and before:
            last = self.modalities[(stage - 1) % len(self.modalities)]
            old_BC = promote(self.fusion.head(z[last])).softmax(dim=1).detach()
            off_B = (log_BC.exp() - old_BC).square().mean(dim=1)
            value_B = value_B + self.memory_weight * torch.where(batch.present[last], off_B, 0.0)
        valid_B = batch.present[m] & (label_B >= 0)
        return Term(value_B, valid=valid_B, norm=batch.step[m].sum().clamp(min=1))

    def _others(self, z: dict[str, Tensor], batch: Batch, like_BC: Tensor) -> Tensor:
        """Compute ``q_BC`` of the other learners; a constant for samples that have none of them."""
        alone = 1.0 if self.over == "label" else 1.0 / self.classes
        if not z:
            return torch.full_like(like_BC, alone)
        q_BC = promote(self.fusion.total(z, batch.present)).softmax(dim=1)
        return torch.where(some(*(batch.present[n] for n in z))[:, None], q_BC, alone)

    def _idle(self) -> list[nn.Parameter]:
        active = {p for m in self.active for p in self.of_modality(m)} | set(self.fusion.head.parameters())
        active |= {self.fusion.rate} if self.stage[1] else set()
        return [p for p in self.parameters() if p.requires_grad and p not in active]

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        super().on_before_optimizer_step(optimizer)
        for p in self._idle():
            p.grad = None
