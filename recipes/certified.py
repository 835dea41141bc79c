"""CRMT, second phase: weights of modalities and classes trained for the certified radius.

Claim: a decision that weights each modality by how far it can be trusted is harder to attack through one modality.

    h_bk   = bias_k + sum_m a_mk s_bmk                    a trained OrthogonalFusion; of it all, a alone is trained
    tau_mk = max over training samples of |d s_bmk / d x_bm|
    loss   = - mean over b of  min over k != y of  (h_by - h_bk) / sqrt( sum_m (a_my tau_my + a_mk tau_mk)^2 )

Slopes are measured on some training samples in evaluation mode, so the radius is an estimate; for linear towers it is
proved. The first phase is Fusion with an OrthogonalFusion and the regularizer UnimodalMargin.
What differs from the release: slopes are those of s, without the factor a, so that a counts once. They are taken sample
by sample and class by class, and a stays above zero. Source: Yang 2024, arXiv 2402.06244.
Letters: B samples, M modalities, C classes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor

from descant.modules.core.batch import Batch
from descant.modules.core.capabilities import has
from descant.modules.core.objective import Term
from descant.modules.core.output import Output
from descant.modules.core.protocols import BankData
from descant.modules.core.sham import Sham
from descant.modules.evaluation.attacks import certified_radius, steepest
from descant.modules.fusion.classifiers import OrthogonalFusion
from descant.modules.io import saved
from descant.modules.towers import Tower, Towers
from descant.modules.training_setup.trainer import datamodule_of, plain_batches
from descant.recipes.base.classifier import Classifier
from descant.recipes.base.rebuild import rebuild


class Certified(Classifier):
    """Train the modality weights of a trained fusion for its certified radius (CRMT).

    This recipe reads the run at ``path`` each time it is built (to resume, validate or load).

    Args:
        path: a run folder, a checkpoint in one, or an export, of a classifier with an OrthogonalFusion.
        checkpoint: in a run folder: best, last or a file in it.
        rows: number of training samples whose slopes are measured, by one backward pass per class, modality and batch.
        sham: ``permute`` hands slopes on: each modality trains with those of the previous one.
    """

    slope_MC: Tensor
    fusion: OrthogonalFusion

    def __init__(
        self,
        path: Path | str,
        checkpoint: str = "best",
        rows: int = 512,
        sham: Literal["permute"] | None = None,
        **kwargs: Any,
    ) -> None:
        if rows < 1:
            raise ValueError(f"rows {rows}: 1 is the least")
        found = saved.find(path, checkpoint)
        inner = rebuild(found)
        fusion = getattr(inner, "fusion", None)
        if not isinstance(inner, Classifier) or not isinstance(fusion, OrthogonalFusion):
            raise ValueError(f"{found.folder}: no classifier with a fusion OrthogonalFusion, so it has no such weights")
        width = next(iter(fusion.widths.values()))
        new = OrthogonalFusion()  # the trained fusion, pools and heads replace the new ones below
        super().__init__(
            Towers(others={m: cast(Tower, tower) for m, tower in inner.towers.items()}),
            inner.target,
            inner.classes,
            width,
            None,
            new,
            0.0,
            **kwargs,
        )
        self.path, self.rows_measured, self.sham = path, rows, Sham(sham)
        self.pools, self.heads, self.fusion = inner.pools, inner.heads, fusion
        self.requires_grad_(False)
        self.fusion.log_weights.requires_grad_(True)
        self.register_buffer("slope_MC", torch.full((len(self.modalities), self.classes), torch.nan))
        self.train()

    def train(self, mode: bool = True) -> Certified:
        super().train(mode)
        for part in (self.towers, self.pools, self.heads, self.fusion):  # unchanged, with running statistics
            part.eval()
        return self

    def configure_model(self) -> None:
        if self.sharding is not None:
            raise ValueError("shard: Certified measures slopes before training, on whole parameters; use on/ddp")
        super().configure_model()

    def on_fit_start(self) -> None:
        if self.slope_MC.isfinite().all():  # a resumed run has its slopes
            return
        data = datamodule_of(self.trainer)
        try:
            if not has(data, BankData):
                raise NotImplementedError
            loader = data.bank_dataloader()
        except NotImplementedError:
            raise ValueError("Certified needs bank_set() of the data module: training samples, to measure on") from None
        self.slope_MC.copy_(steepest(self, plain_batches(self.trainer, loader), self.rows_measured))

    def forward(self, batch: Batch) -> Output:
        with torch.no_grad():
            z = self.latents(batch)
        label_B, slope_MC = self.labels(batch), self.sham.handed_on(self.slope_MC)
        slope = dict(zip(self.modalities, slope_MC, strict=True))
        radius_B = certified_radius(self.fuse(z, batch.present), self.fusion.weights, slope, batch.present, label_B)
        some_B = self.some(batch.present) & (label_B >= 0)
        return Output({"radius": Term(-radius_B, valid=some_B, norm=self.some(batch.step).sum().clamp(min=1))})
