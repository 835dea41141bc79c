"""Adversarial training of a classifier (Madry 2018): one modality of each sample is perturbed.

Letters: B samples, N numbers in all perturbed inputs, M modalities.
"""

from __future__ import annotations

from typing import Any, ClassVar

import lightning as L
import torch
from torch import Tensor

from descant.callbacks.callback_order import Ordered
from descant.modules.core.batch import Batch
from descant.modules.core.capabilities import has, require
from descant.modules.core.errors import no_such, require_value
from descant.modules.core.host import known_finite, to_device, with_finite
from descant.modules.core.modes import eval_mode
from descant.modules.core.protocols import Classifies, Fuses
from descant.modules.core.rng import uniform_NK
from descant.modules.evaluation.attacks import Nudge, worst


class AdversarialTraining(Ordered):
    """Adversarial training: before each step, the input of one modality of each sample is replaced by a perturbed one.

        x_bm <- x_bm + delta_b,   delta_b by projected gradient ascent on cross_entropy(fuse(z), label)
        |delta_b| <= radius_m |x_bm - mean x_bm|

    The ascent starts from zero and runs in eval mode, as in :class:`descant.callbacks.evaluate.attacks.Attacks`. The
    modality is drawn by (seed, epoch, sample) from the modalities in ``radius`` that the sample has. Samples without a
    label are unchanged. A step costs ``steps`` additional forward and backward passes. Source: Madry 2018, arXiv
    1706.06083, in the l2 norm; perturbing one modality of each sample is our reading.

    Args:
        radius: modality -> radius relative to the size of its input; other modalities are never perturbed.
        steps: steps of the ascent.
    """

    once = True
    after: ClassVar = ("Misalign", "ProgressiveResizing", "TrainFlops")

    def __init__(self, radius: dict[str, float], steps: int = 5) -> None:
        super().__init__()
        if not radius or not all(value > 0 for value in radius.values()):
            raise ValueError(f"AdversarialTraining: radius {radius}: modalities, each with one above 0, such as 0.3")
        require_value(steps >= 1, f"AdversarialTraining: steps {steps}: 1 is the least")
        self.radius, self.steps = radius, steps

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        require(self, pl_module, Classifies, Fuses)
        assert has(pl_module, Classifies)
        for m in self.radius:
            if m not in pl_module.modalities:
                raise ValueError(f"AdversarialTraining: radius {m!r}: {no_such(m, pl_module.modalities)}")

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, *_: Any) -> None:
        assert isinstance(batch, Batch) and has(pl_module, Classifies)
        for m in self.radius:
            if m not in batch.inputs:
                raise ValueError(f"AdversarialTraining: radius {m!r}: in the data {no_such(m, batch.inputs)}")
            if not batch.inputs[m].is_floating_point():
                raise ValueError(f"AdversarialTraining: {m}: ids; inputs that are floats can be perturbed")
        label_B = pl_module.labels(batch)
        rows = {m: chosen_B & (label_B >= 0) for m, chosen_B in self.draw_samples(batch).items()}
        nudge = Nudge(pl_module, batch, tuple(self.radius), rows)
        sizes = nudge.sizes_B()
        radius_B = torch.stack([torch.where(rows[m], r * sizes[m], 0.0) for m, r in self.radius.items()]).sum(dim=0)
        # no dropout, no batch-norm statistics
        with eval_mode(pl_module), trainer.precision_plugin.train_step_context():
            delta_BN = worst(nudge, radius_B, label_B.clamp(min=0), self.steps)
        for m, x in nudge.perturb(delta_BN).items():
            finite = known_finite(batch.inputs[m])
            batch.inputs[m] = x if finite is None else with_finite(x, finite)

    def draw_samples(self, batch: Batch) -> dict[str, Tensor]:
        """Draw the samples to perturb by (seed, epoch, sample); returns modality -> bool ``[B]``."""
        u_BM = to_device(uniform_NK(batch.rng_seed, [f"adversarial/{m}" for m in self.radius]), batch.device)
        there_BM = torch.stack([batch.present[m] for m in self.radius], dim=1)
        first_B = torch.where(there_BM, u_BM, -1.0).argmax(dim=1)
        return {m: batch.present[m] & (first_B == i) for i, m in enumerate(self.radius)}
