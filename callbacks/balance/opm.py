"""On-the-fly prediction modulation (OPM): drop the leading modality from the fusion input at random.

Letters: B samples, M modalities.
"""

from __future__ import annotations

from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor
from torch.optim import Optimizer

from descant.callbacks.balance.balance import modality_scores, require_multimodal
from descant.modules.balance.ogm import OGM
from descant.modules.core.batch import Batch, some
from descant.modules.core.capabilities import has
from descant.modules.core.host import derive, read_together, to_device
from descant.modules.core.protocols import MultimodalClassifier
from descant.modules.core.ranks import total_of_ranks
from descant.modules.core.rng import uniform_N
from descant.modules.core.sham import Sham
from descant.modules.training_setup.trainer import log_interval


class OPM(L.Callback):
    """On-the-fly prediction modulation (OPM): drop a leading modality from the fusion input at random, by sample.

        q_m = q (1 + alpha tanh(rho_m - 1)) where rho_m > 1, else 0        rho_m = s_m / mean_{n != m} s_n

    s is as in :class:`descant.modules.balance.ogm.OGM`, from the optimizer step before and all ranks. A dropped
    modality is absent only for the joint decision, not for the losses of single modalities. No sample loses all of its
    modalities. Source: Wei 2024, arXiv 2410.11582; the step before, and the mean over several other modalities, are our
    reading.

    It logs ``balance/score/{modality}`` and ``balance/dropped/{modality}``, the probability.

    Args:
        q: drop probability of a modality that is barely ahead. alpha: how it grows with the lead, up to q (1 + alpha).
        sham: ``permute`` for the control: each modality gets the probability of the one before it.
    """

    once = True

    def __init__(self, q: float = 0.4, alpha: float = 0.5, sham: Literal["permute"] | None = None) -> None:
        super().__init__()
        if not 0 <= q <= q * (1 + alpha) < 1:
            raise ValueError(f"OPM: q {q:g} and alpha {alpha:g}: q (1 + alpha) is a probability, below 1")
        self.q, self.alpha, self.sham = q, alpha, Sham(sham)
        self.probability: dict[str, float] = {}
        self._sums_2M: Tensor | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"probability": dict(self.probability)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.probability = dict(state_dict["probability"])

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._sums_2M = None  # drop an incomplete step, such as after a loss that was not finite

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        require_multimodal(self, pl_module)
        assert has(pl_module, MultimodalClassifier)
        pl_module.modality_mask = self.modality_mask if stage == "fit" else None

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if has(pl_module, MultimodalClassifier):
            pl_module.modality_mask = None

    def modality_mask(self, batch: Batch) -> dict[str, Tensor]:
        """Compute the fusion's presence masks: without dropped modalities, or unchanged where none would be left."""
        left = dict(batch.present)
        for m, q in self.probability.items():
            if q > 0:
                stays_B = to_device(uniform_N(batch.rng_seed, "drop-ahead", m) >= q, left[m].device)
                left[m] = derive(torch.logical_and, left[m], stays_B)
        some_B = some(*(left[m] for m in self.probability or left))
        return {m: derive(torch.where, some_B, mask_B, batch.present[m]) for m, mask_B in left.items()}

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        assert has(pl_module, MultimodalClassifier)
        sums_2M = modality_scores(pl_module, OGM().score)
        self._sums_2M = sums_2M if self._sums_2M is None else self._sums_2M + sums_2M

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        assert has(pl_module, MultimodalClassifier) and self._sums_2M is not None
        (read_2M,) = read_together(total_of_ranks(self._sums_2M))  # once a step, for the masks of the next
        (sum_M, count_M), self._sums_2M = read_2M, None
        score_M, modalities = sum_M / count_M, pl_module.modalities
        if not score_M.isfinite().all():  # a modality had no sample: keep the probabilities
            return
        lead_M = OGM.lead(score_M)
        q_M = torch.where(lead_M > 1, self.q * (1 + self.alpha * (lead_M - 1).tanh()), 0.0)
        q_M = self.sham.handed_on(q_M)
        self.probability = dict(zip(modalities, q_M.tolist(), strict=True))
        if (trainer.global_step + 1) % log_interval(trainer) == 0:
            values = {f"balance/score/{m}": s for m, s in zip(modalities, score_M, strict=True)}
            values |= {f"balance/dropped/{m}": q for m, q in zip(modalities, q_M, strict=True)}
            pl_module.log_dict({name: value.float() for name, value in values.items()}, batch_size=1)
