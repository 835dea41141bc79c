"""Modality-specific learning rates (MSLR). Letters: M modalities."""

from __future__ import annotations

from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor

from descant.callbacks.balance.balance import require_several
from descant.callbacks.balance.tower_rates import TowerRates
from descant.modules.core.errors import require_value


class MSLR(TowerRates):
    """Modality-specific learning rates: each modality's tower learns at the rate that suits it alone.

        rate_m = r_m^(1 - smooth) a_m / mean of a_m over the ``window`` validations before

    r_m is the best learning rate of modality m alone divided by that of the run, and a_m its validation accuracy alone.
    The ratio is 1 until ``window`` validations have run, and with a window of 0. The paper's strategies: keep (the
    default), ``smooth`` between 0 and 1, and dynamic (a ``window`` such as 5). See
    :class:`descant.callbacks.balance.tower_rates.TowerRates` for the parameters that have a rate, and for the cost.
    Source: Yao 2022 (Findings of ACL, 2022.findings-acl.143), without public code. The dynamic ratio is that of the
    baseline in AGM's code (lihong2303/AGM_ICCV2023), which scales gradients instead; the geometric mean with the run's
    rate as ``smooth`` is our reading.

    Args:
        rates: modality -> r_m; 1 if not given.
        smooth: 0 for the given rates, 1 for the run's own.
        window: validations of the mean; 0 for none.
        sham: as in TowerRates; each modality also gets the r of the one before it.
    """

    def __init__(
        self,
        rates: dict[str, float] | None = None,
        smooth: float = 0.0,
        window: int = 0,
        sham: Literal["permute"] | None = None,
    ) -> None:
        super().__init__(sham)
        low = next((m for m, rate in (rates or {}).items() if not rate >= 0), None)
        if low is not None:
            raise ValueError(f"MSLR: rates of {low} {rates[low]:g}: 0 (frozen) or more")  # type: ignore[index]
        require_value(0 <= smooth <= 1, f"MSLR: smooth {smooth:g}: from 0 (its own rates) to 1 (the run's)")
        require_value(window >= 0, f"MSLR: window {window}: validations, 0 for none")
        self.given, self.smooth, self.window = dict(rates or {}), smooth, window
        self.accuracies: list[list[float]] = []  # of the last validations, one number per modality
        self._own: list[float] = []

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "accuracies": [list(a) for a in self.accuracies]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.accuracies = [list(a) for a in state_dict["accuracies"]]

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        modalities = require_several(self, pl_module)
        unknown = next((m for m in self.given if m not in modalities), None)
        if unknown is not None:
            raise ValueError(f"MSLR: rates of {unknown!r}: no such modality, only {', '.join(modalities)}")
        own_M = torch.tensor([self.given.get(m, 1.0) ** (1 - self.smooth) for m in modalities], dtype=torch.float64)
        self._own = self.sham.handed_on(own_M).tolist()
        self.rate = self.rate or dict(zip(modalities, self._own, strict=True))

    def rates(self, loss_M: Tensor, accuracy_M: Tensor) -> list[float]:
        """Compute the factors after a validation; the ratio is left out where the mean is 0."""
        past, accuracy = self.accuracies, accuracy_M.tolist()
        ratio = [1.0] * len(accuracy)
        if self.window and len(past) == self.window:
            mean = [sum(a) / self.window for a in zip(*past, strict=True)]
            ratio = [a / b if b > 0 else 1.0 for a, b in zip(accuracy, mean, strict=True)]
        self.accuracies = [*past, accuracy][-self.window :] if self.window else []
        return [own * k for own, k in zip(self._own, ratio, strict=True)]
