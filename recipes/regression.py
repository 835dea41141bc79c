"""Prediction of a number from samples with several modalities, any of which may be absent.

Claim: towers trained together predict a number in its own unit, from whichever modalities a sample has.

    z_m = head_m(pool(tower_m(x_m)))                     for every modality m that is present
    y   = mean + scale * fusion({z_m})                   mean and scale of the training samples
    loss = l(fusion({z_m}), (y* - mean) / scale)         "fused": squared, absolute, Huber or a likelihood
           + sum over m: l(own_m(z_m), (y* - mean) / scale)   named by the modality, where asked for

A loss is divided by the rows of the whole optimizer step that have a modality, as in Fusion; a row without a number
adds zero.
Source: the fusion as in Fusion; the losses as in modules/losses/numbers.py.
Letters: B samples, D width, K outputs.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from descant.modules.core.batch import Batch
from descant.modules.core.objective import Term
from descant.modules.core.output import Output
from descant.modules.fusion.classifiers import FusionHead, LateFusion
from descant.modules.losses.numbers import NumberLoss, NumberScale, SquaredError
from descant.modules.towers import Towers
from descant.modules.towers.heads import Pool, Pools
from descant.modules.training_setup.trainer import datamodule_of
from descant.recipes.base.fused_space import FUSED, FusedSpace, OwnHeads


class Regression(OwnHeads, FusedSpace):
    """Regression on several modalities: late, mid or attention fusion to one number.

    Args:
        towers: one tower per modality.
        target: name of the data's target that holds the number, float ``[B]`` in its own unit; nan means none.
        loss: loss of the number, on the scale of its training samples; SquaredError by default.
        width: D of each modality's latents.
        pool: pools tokens to one vector, copied for each modality; or one pool per modality.
        fusion: fusion of the latents; LateFusion by default.
        unimodal: add a linear head and a loss for each modality alone.
    """

    def __init__(
        self,
        towers: Towers,
        target: str,
        loss: NumberLoss | None = None,
        width: int = 128,
        pool: Pool | Pools | None = None,
        fusion: FusionHead | None = None,
        unimodal: bool = False,
        **kwargs: Any,
    ) -> None:
        loss = loss or SquaredError()
        super().__init__(towers, loss.outputs, width, pool, fusion or LateFusion(), **kwargs)
        self.make_own(loss.outputs, unimodal)
        self.number = NumberScale(target, loss)

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "fit":  # a resumed or evaluated run loads mean and scale from its checkpoint later
            self.number.read(datamodule_of(self.trainer))

    def forward(self, batch: Batch) -> Output:
        z = self.latents(batch)
        fused_BK, own = self.outputs(z, batch, batch.present)
        terms = {FUSED: self._term(fused_BK, batch, self.some(batch.present), self.some(batch.step))}
        terms |= {m: self._term(own[m], batch, batch.present[m], batch.step[m]) for m in own}
        return Output(terms, z)

    def _term(self, raw_BK: Tensor, batch: Batch, here_B: Tensor, step_G: Tensor) -> Term:
        return self.number.term(raw_BK, batch.targets, here_B, step_G.sum().clamp(min=1))

    # evaluation -----------------------------------------------------------------------------------------------

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        """Return embeddings, scores and numbers, from one forward pass of the towers."""
        z = self.latents(batch)
        return self.evaluate(batch, z) | {"numbers": self.numbers(batch, z)}

    def scores(self, batch: Batch, z: dict[str, Tensor] | None = None) -> dict[str, Term]:
        """Return ``loss`` of the rows with a number and a modality, on the scale of training."""
        raw_BK = self.fuse(self.latents(batch) if z is None else z, batch.present)
        return {"loss": self.number.term(raw_BK, batch.targets, self.some(batch.present), "valid")}

    def numbers(self, batch: Batch, z: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Predict the target ``[B]`` in its own unit; nan for rows without a modality."""
        y_B = self.number.predictions(self.fuse(self.latents(batch) if z is None else z, batch.present))
        return {self.number.target: y_B.masked_fill(~self.some(batch.present), float("nan"))}

    def answers(self, outputs_BC: Tensor) -> dict[str, Any]:
        return {"numbers": {self.number.target: self.number.predictions(outputs_BC)}}
