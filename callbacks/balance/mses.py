"""Modality-specific early stopping (MSES). Letters: M modalities."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from descant.callbacks.balance.tower_rates import TowerRates
from descant.modules.core.errors import require_value


class MSES(TowerRates):
    """Modality-specific early stopping: a tower stops when its modality's own validation loss no longer improves.

        u_t = smoothing v_{t-1} + (1 - smoothing) v_t,       v_t: cross-entropy of the modality alone, u_1 = v_1
        rate_m = 0 for good once more than ``patience`` validations have passed since the least u

    The rest continues to train. See :class:`descant.callbacks.balance.tower_rates.TowerRates` for the parameters that
    have a rate, and for the cost (validation runs the towers once more). Source: Fujimori 2019 (Modality-specific
    learning rate control for multimodal classification, ACPR), of which we had only the abstract. The rule is that of
    the baseline in AGM's public code (lihong2303/AGM_ICCV2023), which also restores the whole network of its best
    epoch; here weights stay (our reading). The paper's network has unimodal losses (``model.init_args.unimodal``).

    Args:
        patience: validations without an improvement. smoothing: weight of the validation before, in [0, 1).
        sham: as in TowerRates.

    >>> import torch
    >>> rule = MSES(patience=1, smoothing=0.5)
    >>> losses = [3.0, 3.0], [1.0, 4.0], [1.0, 4.0], [9.0, 0.0]  # of the second modality, u is 3, 3.5, 4 and 2
    >>> [rule.rates(torch.tensor(loss), torch.zeros(2)) for loss in losses]
    [[1.0, 1.0], [1.0, 1.0], [1.0, 0.0], [1.0, 0.0]]
    """

    def __init__(self, patience: int = 10, smoothing: float = 0.6, sham: Literal["permute"] | None = None) -> None:
        super().__init__(sham)
        require_value(patience >= 1, f"MSES: patience {patience}: 1 is the least")
        require_value(0 <= smoothing < 1, f"MSES: smoothing {smoothing:g}: at least 0 and below 1, such as 0.6")
        self.patience, self.smoothing = patience, smoothing
        self.before: list[float] = []  # of the validation before, one number per modality
        self.best: list[float] = []
        self.since: list[int] = []  # validations since the best one; above patience: stopped

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "before": [*self.before], "best": [*self.best], "since": [*self.since]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.before, self.best, self.since = (list(state_dict[name]) for name in ("before", "best", "since"))

    def rates(self, loss_M: Tensor, accuracy_M: Tensor) -> list[float]:
        loss = loss_M.tolist()
        smooth = [self.smoothing * v + (1 - self.smoothing) * w for v, w in zip(self.before or loss, loss, strict=True)]
        best, since = self.best or smooth, self.since or [-1] * len(loss)
        stopped = [n > self.patience for n in since]
        better = [n < 0 or u < b for u, b, n in zip(smooth, best, since, strict=True)]
        self.since = [n if s else 0 if b else n + 1 for n, s, b in zip(since, stopped, better, strict=True)]
        self.best = [min(u, b) for u, b in zip(smooth, best, strict=True)]
        self.before = loss
        return [0.0 if n > self.patience else 1.0 for n in self.since]
