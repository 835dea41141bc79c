"""Learning speed of each modality, from gradient norms."""

from __future__ import annotations

import math
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.optim import Optimizer

from descant.callbacks.balance.balance import require_multimodal
from descant.modules.core.capabilities import has
from descant.modules.core.dtensor import total_norm
from descant.modules.core.faults import UNREAD
from descant.modules.core.protocols import MultimodalClassifier
from descant.modules.training_setup.trainer import log_interval


class LearningSpeed(L.Callback):
    """Conditional learning speed of each modality, from the gradients that the optimizer gets:

        speed/{m}       log( sum over steps so far of |g_m|^2 / |theta_m|^2 )
        speed/ahead     the largest of these less the smallest

    over the parameters of modality m alone. A modality that lags far behind is under-trained: a balancer may help.
    Listed after a balancer, this measures the balanced gradients. Source: Wu 2022 (arXiv 2202.05306), whose conditional
    speed compares a network's parts by this measure.

    Args:
        every: optimizer steps between two measurements, each of which counts for all steps up to the next.
    """

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
        """Sum so far by modality."""
        self._read()
        return self._sums

    def _read(self) -> None:
        """Add the norms measured since the last call, in one transfer from the device."""
        unread, self._unread = self._unread, []
        if unread:
            norms = torch.stack([torch.stack(pair).double() for _, *pair in unread]).tolist()
            for (m, _, _), (gradient, size) in zip(unread, norms, strict=True):
                if math.isfinite(gradient**2):  # skipped steps change no parameter
                    self._sums[m] = self._sums.get(m, 0.0) + self.every * gradient**2 / max(size**2, 1e-300)

    def measure(self, pl_module: L.LightningModule) -> None:
        """Add the norms of the current gradients and parameters; on an accelerator they are read later."""
        assert has(pl_module, MultimodalClassifier)
        for m in pl_module.modalities:
            trained = [p for p in pl_module.of_modality(m) if p.grad is not None]
            gradient = _norm([p.grad for p in trained if p.grad is not None], pl_module.device)
            self._unread.append((m, gradient, _norm([p.detach() for p in trained], pl_module.device)))
        if pl_module.device.type == "cpu" or len(self._unread) > UNREAD:
            self._read()

    def state_dict(self) -> dict[str, Any]:
        return {"sums": dict(self.sums)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._sums, self._unread = dict(state_dict["sums"]), []

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        require_multimodal(self, pl_module)

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        if trainer.global_step % self.every == 0:
            self.measure(pl_module)
        if (trainer.global_step + 1) % log_interval(trainer) == 0 and self.sums:
            speed = {m: math.log(max(total, 1e-300)) for m, total in self.sums.items()}
            values = {f"speed/{m}": value for m, value in speed.items()}
            values["speed/ahead"] = max(speed.values()) - min(speed.values())
            pl_module.log_dict(values, batch_size=1)


def _norm(tensors: list[Tensor], device: torch.device) -> Tensor:
    """Compute the norm of all tensors together, over ranks if they are sharded."""
    return total_norm(tensors) if tensors else torch.zeros((), device=device)
