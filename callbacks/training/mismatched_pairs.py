"""Planted label noise: mismatched pairs in training, for testing noise detection. Letters: B samples."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from descant.modules.core.batch import Batch
from descant.modules.core.host import derive, to_device
from descant.modules.core.rng import global_seed, uniform_N
from descant.modules.core.sham import Sham


class Misalign(Callback):
    """Label noise: a fixed share of the training samples gets a modality of another sample, and a target marks them.

        noise_i = uniform(seed, i) < share          the same samples in all epochs

    The noisy samples of all ranks' batches pass the modality on in a circle, so that its source changes every epoch.
    Evaluation is unchanged, and the recipe does not read the target.

    Args:
        modality: the modality to exchange.
        share: share of the samples that have the modality.
        target: name of the mask in the batch, bool ``[B]``.
    """

    def __init__(self, modality: str, share: float = 0.4, target: str = "misaligned") -> None:
        super().__init__()
        if not 0 <= share <= 1:
            raise ValueError(f"Misalign: share {share:g} of the samples; nearest: {min(max(share, 0.0), 1.0):g}")
        self.modality, self.share, self.target = modality, share, target

    @property
    def state_key(self) -> str:
        return self._generate_state_key(modality=self.modality)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, *_: Any) -> None:
        assert isinstance(batch, Batch)
        if self.modality not in batch.inputs:
            raise ValueError(f"Misalign: the data has no modality {self.modality!r}, only {', '.join(batch.inputs)}")
        x_B, there_B = batch.inputs[self.modality], batch.present[self.modality]
        sampled_B = uniform_N(batch.index, "misalign", self.modality, global_seed())
        noise_B = derive(torch.logical_and, there_B, to_device(sampled_B < self.share, x_B.device))
        batch.inputs[self.modality] = Sham.permute(x_B, batch.rng_seed, noise_B)
        batch.targets[self.target] = noise_B
