"""How fast each modality's own parameters learn. Letters: M modalities."""

from __future__ import annotations

import math
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from descant.callbacks.balance.balance import require_multimodal
from descant.modules.core.capabilities import has
from descant.modules.core.faults import UNREAD
from descant.modules.core.protocols import MultimodalClassifier
from descant.modules.engine.trainer import log_interval


class LearningSpeed(L.Callback):
    """Of the gradients that the optimizer gets:

        speed/{m}       log( sum over steps so far of |g_m|^2 / |theta_m|^2 )
        speed/ahead     the largest of these less the smallest

    with the parameters that are of modality m alone. A modality that lags far behind learns what the others leave over:
    balancing has something to do. Named behind a balancer it sees what that has made of gradients. Source: Wu 2022
    (arXiv 2202.05306), whose conditional speed compares a network's parts by this measure.

    Args:
        every: optimizer steps from one look to the next; the sum is over looks, so it stands for all steps.

    Raises:
        ValueError: for a number below 1; at setup, for a recipe without the protocol MultimodalClassifier or with one
            modality.
    """

    #: Said twice (by an experiment and an overlay), the last one counts.
    once = True

    def __init__(self, every: int = 1) -> None:
        super().__init__()
        if every < 1:
            raise ValueError(f"LearningSpeed: every {every}: 1 is the least")
        self.every = every
        self._sums: dict[str, float] = {}
        self._unread: list[tuple[str, Tensor, Tensor]] = []  # modality, and norms of its gradients and parameters

    @property
    def sums(self) -> dict[str, float]:
        """Modality -> its sum so far."""
        self._read()
        return self._sums

    def _read(self) -> None:
        """What a device has found since the last time, all at once."""
        unread, self._unread = self._unread, []
        if unread:
            norms = torch.stack([torch.stack([moved, size]).double() for _, moved, size in unread]).tolist()
            for (m, _, _), (moved, size) in zip(unread, norms, strict=True):
                if math.isfinite(moved**2):  # what is skipped moves nothing
                    self._sums[m] = self._sums.get(m, 0.0) + self.every * moved**2 / max(size**2, 1e-300)

    def state_dict(self) -> dict[str, Any]:
        return {"sums": dict(self.sums)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._sums, self._unread = dict(state_dict["sums"]), []

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        require_multimodal(self, pl_module)

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        assert has(pl_module, MultimodalClassifier)
        if trainer.global_step % self.every == 0:
            for m in pl_module.modalities:
                own = [p for p in pl_module.of_modality(m) if p.grad is not None]
                moved = _norm([p.grad for p in own if p.grad is not None], pl_module.device)
                self._unread.append((m, moved, _norm([p.detach() for p in own], pl_module.device)))
            if pl_module.device.type == "cpu" or len(self._unread) > UNREAD:
                self._read()
        if (trainer.global_step + 1) % log_interval(trainer) == 0 and self.sums:
            speed = {m: math.log(max(total, 1e-300)) for m, total in self.sums.items()}
            values = {f"speed/{m}": value for m, value in speed.items()}
            values["speed/ahead"] = max(speed.values()) - min(speed.values())
            pl_module.log_dict(values, batch_size=1)


def _norm(tensors: list[Tensor], device: torch.device) -> Tensor:
    """Of all of them, whole where they are split over ranks."""
    if not tensors:
        return torch.zeros((), device=device)
    norm = torch.nn.utils.get_total_norm(tensors)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
