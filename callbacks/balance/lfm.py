"""LFM: weigh the alignment of modalities against classification, by a schedule or learned (NeurIPS 2024).

Letters: K terms.
"""

from __future__ import annotations

from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor
from torch.optim import Optimizer

from descant.callbacks.balance.balance import require_multimodal
from descant.callbacks.harmonize.terms import gradients
from descant.modules.balance.alignment import ALIGNMENT
from descant.modules.core.capabilities import has
from descant.modules.core.host import read_together, to_device
from descant.modules.core.protocols import HasObjective
from descant.modules.core.ranks import mean_of_ranks
from descant.modules.core.sham import Sham
from descant.modules.multitask.mix import gramian
from descant.modules.training_setup.trainer import log_interval, share_of_run

#: The release's polynomial in the epoch (of 200), fitted to the classification weight that it had learned.
FITTED = (2.04623704e-01, 3.35472727e-03, 1.22989557e-04, -2.92947416e-06, 2.23835486e-08, -5.39717505e-11)


class LFM(L.Callback):
    """Weigh the alignment of modalities against classification, less and less over the run (LFM).

        loss = 2 (1 - a) (all other terms) + 2 a alignment,       1 - a = polynomial of 200 (share of the run)

    a falls from 0.8 at first to 0.1 at the end, as in the release. The alignment is a regularizer: ``LogitAlignment``,
    the release's, or ``LatentAlignment``. It has no state and no cost. Source: Yang 2024, "Facilitating multimodal
    classification via dynamically learning modality gap", NeurIPS 2024; github.com/njustkmg/NeurIPS24-LFM. For a weight
    that is learned in this run see :class:`LearnedLFM`.

    It logs ``balance/alignment``, the weight a.

    Args:
        sham: ``permute`` for the control: the alignment gets the weight of the other terms, and they get its weight.
    """

    once = True

    def __init__(self, sham: Literal["permute"] | None = None) -> None:
        super().__init__()
        self.sham = Sham(sham)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        require_multimodal(self, pl_module)

    def weight(self, trainer: L.Trainer) -> float:
        """Return the weight a of the alignment at this step."""
        return 1 - classification_weight(share_of_run(trainer))

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        assert has(pl_module, HasObjective) and pl_module.step.objective is not None
        objective, a = pl_module.step.objective, self.weight(trainer)
        if ALIGNMENT not in objective.terms:
            raise ValueError(
                f"{type(self).__name__}: no term {ALIGNMENT!r}, only {', '.join(objective.terms)}; "
                "model.regularizers LogitAlignment"
            )
        other, aligned = self.sham.handed_on(torch.tensor([1 - a, a], dtype=torch.float64)).tolist()
        weights = [2 * (aligned if name == ALIGNMENT else other) for name in objective.terms]
        objective.mix.mul_(to_device(torch.tensor(weights, dtype=objective.mix.dtype), objective.mix.device))
        if (trainer.global_step + 1) % log_interval(trainer) == 0:
            pl_module.log("balance/alignment", aligned, batch_size=1)


def classification_weight(share: float) -> float:
    """Compute the release's weight of classification at this share of the run.

    >>> [round(classification_weight(share), 3) for share in (0.0, 0.5, 1.0)]
    [0.205, 0.539, 0.902]
    """
    return sum(c * (200 * share) ** n for n, c in enumerate(FITTED))


class LearnedLFM(LFM):
    """Learn the weight of the alignment by its effect on classification one step ahead (LFM).

        a <- clip(a - rate dL/da),   L(theta - (1 - a) g_c - a g_a)  to first order:  dL/da = <g_c, g_c - g_a>

    g_c is the gradient of all other terms together, and g_a that of the alignment, at the recipe's shared parameters,
    over the whole optimizer step and all ranks. The new weight applies from the next step on. The paper uses a held-out
    batch, and the release uses the mean of a second derivative at the first parameter instead of dL/da. Our reading is
    the derivative, on the step's own samples. The weight is in the checkpoint. It costs one more backward pass per
    term, in one of ``every`` steps, and the memory of two gradients.

    Args:
        rate: the rate of a, times the learning rate.
        every: compute the gradients in one of every ``every`` optimizer steps.
        start: the first a. least: the least distance of a from 0 and from 1.
        sham: as in LFM.
    """

    def __init__(
        self,
        rate: float = 0.01,
        every: int = 10,
        start: float = 0.95,
        least: float = 0.05,
        sham: Literal["permute"] | None = None,
    ) -> None:
        super().__init__(sham)
        if not rate >= 0 or every < 1:
            raise ValueError(f"LearnedLFM: rate {rate:g}, every {every}: 0 or more, and at least 1")
        if not 0 <= least <= start <= 1 - least:
            raise ValueError(f"LearnedLFM: start {start:g}: from least, {least:g}, to {1 - least:g}")
        self.rate, self.every, self.least, self.a = rate, every, least, start
        self._sums: list[Tensor] = []  # ``[2, ...]`` per parameter, over the micro-batches of this step so far

    def state_dict(self) -> dict[str, Any]:
        return {"a": self.a}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.a = float(state_dict["a"])

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._sums = []  # drop an incomplete step, such as after a loss that was not finite

    def weight(self, trainer: L.Trainer) -> float:
        return self.a

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        assert has(pl_module, HasObjective) and pl_module.step.objective is not None
        objective = pl_module.step.objective
        base_K, names = objective.mix.detach().double().clone(), list(objective.terms)  # before it is weighed
        super().on_before_backward(trainer, pl_module, loss)
        if trainer.global_step % self.every:
            return
        aligned_K = torch.tensor([float(name == ALIGNMENT) for name in names], dtype=torch.float64)
        of_2K = to_device(torch.stack([1 - aligned_K, aligned_K]), base_K.device) * base_K
        grads = gradients(pl_module, list(pl_module.shared_parameters()))
        both = [torch.tensordot(of_2K.to(g), g, dims=1) for g in grads]
        self._sums = [a + b for a, b in zip(self._sums, both, strict=True)] if self._sums else both

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        if not self._sums:
            return
        means, self._sums = [mean_of_ranks(g) / trainer.accumulate_grad_batches for g in self._sums], []
        (gramian_22,) = read_together(gramian(means))
        slope = float(gramian_22[0, 0] - gramian_22[0, 1])
        if slope == slope and abs(slope) != float("inf"):  # if not finite, keep a
            self.a = min(max(self.a - self.rate * slope, self.least), 1 - self.least)
