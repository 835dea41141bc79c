"""Greedy: re-balancing steps, in which the modality that learns mainly from the others has to learn alone.

Letters: B samples, D width of a modality's latents, M modalities.
"""

from __future__ import annotations

from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from descant.callbacks.balance.balance import require_multimodal
from descant.callbacks.callback_order import Ordered
from descant.modules.balance.conditional_speed import ConditionalSpeed
from descant.modules.core.dtensor import total_norm
from descant.modules.core.host import read_together
from descant.modules.core.ranks import total_of_ranks
from descant.modules.core.sham import Sham
from descant.modules.fusion.mmtm import MMTMFusion
from descant.modules.training_setup.trainer import log_interval, share_of_run


class GreedyRebalancing(Ordered):
    """Balanced multimodal learning (greedy): re-balancing steps by conditional learning speed.

        max_m speed_m - min_m speed_m > epsilon:    for ``window`` steps the gates of the fastest m are their mean

    With fixed gates the logits of m no longer depend on the others, and its tower has to learn. Speeds are those of
    :class:`descant.modules.balance.conditional_speed.ConditionalSpeed`, gates those of
    :class:`descant.modules.fusion.mmtm.MMTMFusion`: m sees the others through its excitation and the squeeze that all
    share; its tower, head and map are its own. The mean of the gates is over all samples so far that have m, of all
    ranks and micro-batches. A step whose gradients are not finite does not count. Source: Wu 2022, arXiv 2202.05306,
    and nyukat/greedy_multimodal_learning, which averages the gates of the first modality for both, also in evaluation,
    unlike this callback. A ``start`` instead of the release's two epochs is our reading.

    It logs ``balance/speed/{modality}`` and ``balance/alone/{modality}``, 1 while it learns alone. A step costs a pass
    of the gates, and norms of all gradients and parameters.

    Args:
        epsilon: difference of the speeds. window: steps of a re-balancing. start: share of the run before the first.
        sham: ``permute`` for the control: the modality after the fastest one learns alone.
    """

    once = True
    #: It measures the gradients that the optimizer gets.
    after = ("Harmonize", "HarmonizeFeatures", "HarmonizeTowers", "Balance")

    def __init__(
        self, epsilon: float = 0.01, window: int = 5, start: float = 0.0, sham: Literal["permute"] | None = None
    ) -> None:
        super().__init__()
        if not (epsilon >= 0 and window >= 1 and 0 <= start <= 1):
            raise ValueError(
                f"GreedyRebalancing: epsilon {epsilon:g}, window {window}, start {start:g}: at least 0, at least 1, "
                "and a share of the run"
            )
        self.rule, self.start, self.sham = ConditionalSpeed(epsilon, window), start, Sham(sham)
        self._step: Tensor | None = None  # [D of all modalities + M] of this step: sums of gates, and samples
        self._total: Tensor | None = None  # the same over all earlier steps

    def state_dict(self) -> dict[str, Any]:
        return {"rule": self.rule.state_dict(), "total": self._total}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rule.load_state_dict(state_dict["rule"])
        self._total = state_dict["total"]

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        require_multimodal(self, pl_module)
        fusion = getattr(pl_module, "fusion", None)
        if not isinstance(fusion, MMTMFusion):
            raise ValueError(f"GreedyRebalancing: model.fusion MMTMFusion has gates; {type(fusion).__name__} not")
        super().setup(trainer, pl_module, stage)

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._step = None  # drop an incomplete step, such as after a loss that was not finite
        self._leave_alone(pl_module.fusion, self.rule.alone if self.rule.left else None)

    def on_before_backward(self, trainer: L.Trainer, pl_module: Any, loss: Tensor) -> None:
        z, present, _ = pl_module.output.fusion
        with torch.no_grad():
            gates = pl_module.fusion.gates(z, present)
            sums = [torch.where(present[m][:, None], g_BD, 0.0).double().sum(dim=0) for m, g_BD in gates.items()]
            step = torch.cat([*sums, torch.stack([present[m].sum() for m in gates]).double()])
        self._step = step if self._step is None else self._step + step

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Optimizer) -> None:
        assert self._step is not None
        step, self._step = total_of_ranks(self._step), None
        fusion, ratios = pl_module.fusion, []
        for m in fusion.widths:
            ratios.append(_ratio([*fusion.excite[m].parameters(), *fusion.squeeze.parameters(), fusion.squeeze_S]))
            ratios.append(_ratio([*pl_module.of_modality(m), *fusion.maps[m].parameters()]))
        (ratio,) = read_together(torch.stack(ratios))  # once a step
        if not ratio.isfinite().all():
            return
        self._total = step if self._total is None else self._total.to(step) + step
        *sums, count_M = self._total.split([*fusion.widths.values(), len(fusion.widths)])
        means = [sum_D / count.clamp(min=1) for sum_D, count in zip(sums, count_M, strict=True)]
        fusion.mean_gates.copy_(torch.cat(means))
        alone = self.rule.decide(ratio.view(-1, 2).T, free=share_of_run(trainer) >= self.start)
        if (trainer.global_step + 1) % log_interval(trainer) == 0:
            values = {f"balance/speed/{m}": s for m, s in zip(fusion.widths, self.rule.speed_M.tolist(), strict=True)}
            values |= {f"balance/alone/{m}": float(m == fusion.averaged) for m in fusion.widths}
            pl_module.log_dict(values, batch_size=1)
        self._leave_alone(fusion, alone)

    def _leave_alone(self, fusion: MMTMFusion, number: int | None) -> None:
        given_M = torch.arange(len(fusion.widths)) == (-1 if number is None else number)
        given_M = self.sham.handed_on(given_M)
        fusion.averaged = next((m for m, given in zip(fusion.widths, given_M.tolist(), strict=True) if given), None)


def _ratio(parameters: list[nn.Parameter]) -> Tensor:
    """Compute ``|g|^2 / |theta|^2`` in float64, over ranks if they are sharded."""
    trained = [p for p in parameters if p.grad is not None]
    gradients = [p.grad for p in trained if p.grad is not None]
    gradient, size = (total_norm(part).double() for part in (gradients, [p.detach() for p in trained]))
    return (gradient / size).square()
