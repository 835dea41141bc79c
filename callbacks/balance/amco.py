"""Adaptive mask co-optimization (AMCo): mask a growing share of the input of a modality that decisions depend on.

Letters: B samples, D numbers that can be masked, M modalities, C classes.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from descant.callbacks.balance.balance import require_multimodal
from descant.modules.core.capabilities import has
from descant.modules.core.errors import require_value
from descant.modules.core.host import read_together, to_device
from descant.modules.core.protocols import MultimodalClassifier
from descant.modules.core.ranks import total_of_ranks
from descant.modules.core.rng import global_seed, mix
from descant.modules.core.sham import Sham
from descant.modules.fusion.classifiers import LateFusion
from descant.modules.training_setup.trainer import log_interval


def dependence(share_BMC: Tensor, present_BM: Tensor) -> Tensor:
    """Sum over the samples with several modalities how much they depend on each, and 1: float64 ``[M + 1]``.

        d_bm = sum_c softmax(s_b)_mc             over all classes and present modalities together

    >>> dependence(torch.tensor([[[0.0, 0.0], [math.log(3), 0.0]]]), torch.ones(1, 2).bool()).round(decimals=4).tolist()
    [0.3333, 0.6667, 1.0]
    """
    several_B = present_BM.sum(dim=1) > 1
    share_BMC = share_BMC.double().masked_fill((~present_BM & several_B[:, None])[..., None], -torch.inf)
    mass_BM = share_BMC.flatten(1).softmax(dim=1).view_as(share_BMC).sum(dim=2)
    sum_M = torch.where(several_B[:, None], mass_BM, 0.0).sum(dim=0)
    return torch.cat([sum_M, several_B.sum().double()[None]])


def masked_share(grown: float, ramp: float) -> float:
    """Compute ``sin(pi / 2 min(grown / ramp, 1))``.

    >>> round(masked_share(0.1, 0.3), 4)
    0.5
    """
    return math.sin(math.pi / 2 * min(grown / ramp, 1.0))


class AMCo(L.Callback):
    """Adaptive mask co-optimization (AMCo): masks a modality's input to the fusion while decisions depend on it.

        d_m = mean over samples of  sum_c softmax(s)_mc          s: the modalities' shares of the logits, side by side
        masked where d_m > sigma in the step before              p = sin(pi / 2 min(l / ramp, 1))

    floor(p D) of D numbers are zero, drawn by (seed, step), the same for all samples. l is 0 at the start of an epoch,
    and grows at each step by ``growth`` times the number of the epoch. d averages over the samples with several
    modalities, of all ranks and micro-batches. ``over: scores`` masks class scores W_m z_m (D = C), as does
    BalanceBenchmark, the only public code. ``latents`` masks z_m, the input of W_m (our reading of the abstract).
    Co-optimization adds the modalities' own losses (``model.init_args.unimodal``), here by separate heads, which are
    never masked. Source: Zhou 2023 (ICASSP, 10.1109/ICASSP49357.2023.10096641), of which we had only the abstract.

    It logs ``balance/dependence/{modality}`` and ``balance/masked/{modality}``, the share. A step costs the shares of
    the logits, as in :class:`descant.callbacks.balance.balance.Balance`.

    Args:
        sigma: dependence above which a modality is masked. ramp, growth: how fast the masks grow.
        over: what is masked.
        sham: ``permute`` for the control: each modality is masked if decisions depend on the one before it.
    """

    once = True

    def __init__(
        self,
        sigma: float = 0.5,
        ramp: float = 0.3,
        growth: float = 0.1,
        over: Literal["scores", "latents"] = "scores",
        sham: Literal["permute"] | None = None,
    ) -> None:
        super().__init__()
        require_value(0 < sigma < 1, f"AMCo: sigma {sigma:g}: a share of the decision, between 0 and 1")
        require_value(ramp > 0 and growth >= 0, f"AMCo: ramp {ramp:g} and growth {growth:g}: above 0, and 0 or more")
        self.sigma, self.ramp, self.growth, self.over, self.sham = sigma, ramp, growth, over, Sham(sham)
        self.masked: dict[str, bool] = {}
        self.epoch, self.steps = -1, 0  # optimizer steps of this epoch so far
        self._mask: dict[str, Tensor] = {}
        self._sums: Tensor | None = None  # [M + 1] of this step: dependence, and samples
        self._hooks: list[RemovableHandle] = []

    def state_dict(self) -> dict[str, Any]:
        return {"masked": dict(self.masked), "epoch": self.epoch, "steps": self.steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.masked, self.epoch, self.steps = (state_dict[name] for name in ("masked", "epoch", "steps"))

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        require_multimodal(self, pl_module)
        fusion = getattr(pl_module, "fusion", None)
        if not isinstance(fusion, LateFusion):
            raise ValueError(f"AMCo: model.fusion LateFusion has class scores to mask; {type(fusion).__name__} not")
        for m, layer in fusion.maps.items() if stage == "fit" else ():
            if self.over == "scores":
                hook = layer.register_forward_hook(lambda layer, _, y_BC, m=m: self._apply(m, y_BC, layer.training))
            else:
                hook = layer.register_forward_pre_hook(lambda layer, z, m=m: self._apply(m, z[0], layer.training))
            self._hooks.append(hook)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._mask = [], {}

    def _apply(self, modality: str, x_BD: Tensor, training: bool) -> Tensor:
        mask_D = self._mask.get(modality) if training else None
        return x_BD if mask_D is None else x_BD * to_device(mask_D, x_BD.device).to(x_BD.dtype)

    @property
    def share(self) -> float:
        """``p`` of the current step."""
        return masked_share(self.growth * max(self.epoch, 0) * self.steps, self.ramp)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._sums = None  # drop an incomplete step, such as after a loss that was not finite

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        if trainer.current_epoch != self.epoch:
            self.masked, self.epoch, self.steps = {}, trainer.current_epoch, 0
        self._mask = {}
        for m in (m for m, masked in self.masked.items() if masked):
            layer = pl_module.fusion.maps[m]
            size = layer.out_features if self.over == "scores" else layer.in_features
            generator = torch.Generator().manual_seed(mix(global_seed(), "amco", trainer.global_step))
            self._mask[m] = (torch.randperm(size, generator=generator) >= int(self.share * size)).float()

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        assert has(pl_module, MultimodalClassifier) and pl_module.output is not None and pl_module.output.fusion
        z, present, _ = pl_module.output.fusion
        with torch.no_grad():
            shares = pl_module.shares({m: z_BD.detach() for m, z_BD in z.items()}, present)
            share_BMC, present_BM = (
                torch.stack([x[m] for m in pl_module.modalities], dim=1) for x in (shares, present)
            )
            sums = dependence(share_BMC, present_BM)
        self._sums = sums if self._sums is None else self._sums + sums

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        assert has(pl_module, MultimodalClassifier) and self._sums is not None
        (sums,), self._sums = read_together(total_of_ranks(self._sums)), None  # once a step
        modalities, dependence_M = pl_module.modalities, sums[:-1] / sums[-1]
        if (trainer.global_step + 1) % log_interval(trainer) == 0:
            values = {f"balance/dependence/{m}": d for m, d in zip(modalities, dependence_M, strict=True)}
            values |= {f"balance/masked/{m}": torch.tensor(self.share * (m in self._mask)) for m in modalities}
            pl_module.log_dict({name: value.float() for name, value in values.items()}, batch_size=1)
        if dependence_M.isfinite().all():  # otherwise no sample had several modalities: keep the masks
            masked = self.sham.handed_on(dependence_M > self.sigma)
            self.masked = dict(zip(modalities, masked.tolist(), strict=True))
        self.steps += 1
