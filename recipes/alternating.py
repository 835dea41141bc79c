"""MLA: classification of several modalities by alternating unimodal training of one shared head.

Claim: modalities that take turns at one head learn what each would learn alone, and the confident ones decide.

    m    = modalities[(t + t // M) mod M]                 the modality of optimizer step t
    loss = cross_entropy(head(z_m), label)                one linear head for all modalities
    g_W  = g_W P_t,   P_t = (I + sum over s < t of r_s r_s^T / alpha)^-1       its matrix, W
    logits = sum_m w_m head(z_m)                          sure ones count more (SharedHead); in evaluation alone

r_s is the mean of the latents of step s, over all micro-batches and ranks. P keeps the head from unlearning in one turn
what it learned in another. P is scaled to the norm of the identity, so that updates do not shrink with it. Other towers
are frozen until their step: no gradient, no weight decay. One iteration of the paper corresponds to M steps here, each
on its own batch.

What differs from the release: P is the intended inverse (there, a scalar of the recursion is an outer product), and it
covers earlier steps only. Source: Zhang 2024, arXiv 2311.10707.
Letters: B samples, D width, C classes, M modalities.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from descant.modules.core.batch import Batch
from descant.modules.core.objective import Term
from descant.modules.core.output import Output
from descant.modules.core.ranks import gather
from descant.modules.fusion.classifiers import SharedHead
from descant.modules.missing_modalities.modulation import touch_parameters
from descant.modules.towers import Towers
from descant.modules.towers.heads import Pool, Pools
from descant.recipes.base.classifier import Classifier


class Alternating(Classifier):
    """Alternating unimodal training with a shared head (MLA).

    Args:
        towers, target, classes, width, pool, smoothing: as in Classifier.
        alpha: alpha of P; the smaller it is, the more of earlier turns is kept. None keeps nothing (P = I).
    """

    P_DD: Tensor

    def __init__(
        self,
        towers: Towers,
        target: str,
        classes: int,
        width: int = 128,
        pool: Pool | Pools | None = None,
        smoothing: float = 0.0,
        alpha: float | None = 0.1,
        **kwargs: Any,
    ) -> None:
        if alpha is not None and not alpha > 0:
            raise ValueError(f"alpha {alpha:g}: above 0, such as 0.1")
        super().__init__(towers, target, classes, width, pool, SharedHead(), smoothing, **kwargs)
        self.alpha = alpha
        self.register_buffer("P_DD", torch.eye(width))
        self._seen: list[Tensor] = []  # per micro-batch of this step: [D + 1], the sum of latents and their number

    @property
    def head(self) -> nn.Linear:
        assert isinstance(self.fusion, SharedHead)
        return self.fusion.head

    @property
    def turn(self) -> str:
        """Return this step's modality. Each round starts one later, so that every tenth step is not always the same."""
        rounds, place = divmod(self.global_step, len(self.modalities))
        return self.modalities[(rounds + place) % len(self.modalities)]

    def forward(self, batch: Batch) -> Output:
        m, label_B = self.turn, self.labels(batch)
        z_BD = self.latents(batch, m)[m]
        if self.training and self.alpha is not None:
            sum_D, count = z_BD.detach().sum(dim=0), batch.present[m].sum()
            self._seen.append(torch.cat([sum_D, count[None].to(sum_D)]))
        term = self.term(self.head(z_BD), label_B, batch.present[m], batch.step[m])
        # every rank's backward reaches all parameters, in every step
        return Output({m: Term(touch_parameters(term.value, self._idle(m)), valid=term.valid, norm=term.norm)})

    def _idle(self, turn: str) -> Iterator[nn.Parameter]:
        return (p for m in self.modalities if m != turn for p in self.of_modality(m) if p.requires_grad)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        super().on_before_optimizer_step(optimizer)
        for p in self._idle(self.turn):
            p.grad = None
        if self.alpha is None:
            return
        P_DD, grad_CD = self.P_DD, self.head.weight.grad
        if grad_CD is not None:
            whole_CD = grad_CD.to_local() if isinstance(grad_CD, DTensor) else grad_CD  # ranks split the classes
            whole_CD.copy_(whole_CD @ (P_DD * (len(P_DD) ** 0.5 / P_DD.norm())).to(whole_CD))
        total = gather(torch.stack(self._seen).sum(dim=0)[None]).sum(dim=0).to(P_DD)
        self._seen = []
        r_D = total[:-1] / total[-1].clamp(min=1)
        q_D = P_DD @ r_D  # Sherman and Morrison: the inverse with one more r r^T
        less_DD = P_DD - torch.outer(q_D, q_D) / (self.alpha + r_D @ q_D)
        # selected on the device, so that no step waits for the check of finiteness
        P_DD.copy_(torch.where(r_D.isfinite().all(), less_DD, P_DD))
