"""Robustness of a classifier: adversarial attacks on single modalities, missing modalities, certified radii.

Letters: B rows of a batch, M modalities, C classes.
"""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor

from descant.callbacks.evaluate.forward import ForwardEvaluator
from descant.modules.core.batch import Batch
from descant.modules.core.capabilities import has
from descant.modules.core.errors import no_such, require_value
from descant.modules.core.objective import Term
from descant.modules.core.protocols import Classifies, Fuses
from descant.modules.evaluation.attacks import Nudge, certified_radius, find_attacks, steepest
from descant.modules.fusion.classifiers import OrthogonalFusion


class Attacks(ForwardEvaluator):
    """Adversarial and missing-modality accuracy of each evaluation set, over the rows with all modalities and a label:

        {set}/attacked/{m}       accuracy under projected gradient ascent on the input of m (for ids: on the embeddings
                                 of its tokens), within an l2 ball of radius |x_m - mean x_m|
        {set}/attacked_worst     share of rows that are correct whichever single modality is attacked
        {set}/absent/{m}         accuracy without m
        {set}/absent_worst       share of rows that are correct whichever single modality is missing
        {set}/unharmed           clean accuracy of the same rows

    With ``certify``, for a recipe whose fusion has margins (OrthogonalFusion), also:

        {set}/certified/radius   mean over rows of the distance all inputs may move before another class can win; 0 for
                                 a row that is wrong
        {set}/certified/share    rows for which that is at least ``certify``, which is in the units of the inputs

    Radii rest on slopes estimated from some training samples, and are proved only for linear towers. A gradient attack
    is a lower bound of the worst case. Towers that run without gradients cannot be attacked. Each attack costs
    ``steps`` forward and backward passes; random starts depend on the sample alone.

    Args:
        radius: radius of attacks relative to the size of the input, or one per modality.
        steps, restarts: steps and starts of the ascent; the first start is the clean input.
        certify: a radius to certify, or none for no certificates.
        rows: training samples for the slopes, which are measured at every evaluation.
        sets, limit, every, validate: see :class:`ForwardEvaluator`.
    """

    once = True
    needs = (Classifies, Fuses)

    def __init__(
        self,
        radius: float | dict[str, float] = 0.3,
        steps: int = 20,
        restarts: int = 1,
        certify: float | None = None,
        rows: int = 512,
        sets: list[str] | None = None,
        limit: int | None = None,
        every: int = 1,
        validate: bool = False,
    ) -> None:
        super().__init__(sets, limit, every, validate)
        for name, count in (("steps", steps), ("restarts", restarts), ("rows", rows)):
            require_value(count >= 1, f"Attacks: {name} {count}: 1 is the least")
        for value in (*(radius.values() if isinstance(radius, dict) else (radius,)), certify):
            if value is not None and not value > 0:
                raise ValueError(f"Attacks: a radius of {value:g}: above 0, such as 0.3")
        self.radius, self.steps, self.restarts, self.certify, self.rows = radius, steps, restarts, certify, rows

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        assert has(pl_module, Classifies)
        for m in self.radius if isinstance(self.radius, dict) else ():
            if m not in pl_module.modalities:
                raise ValueError(f"Attacks: radius {m!r}: {no_such(m, pl_module.modalities)}")
        if self.certify is not None:
            if not isinstance(getattr(pl_module, "fusion", None), OrthogonalFusion):
                name = type(pl_module).__name__
                raise ValueError(f"Attacks: certify: {name} has no OrthogonalFusion, whose margins are certified")
            self._require(trainer, "bank_dataloader")

    def _forget(self) -> None:
        super()._forget()
        self._slope_MC: Tensor | None = None

    def run(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, keep_B: Tensor, name: str) -> None:
        assert has(pl_module, Classifies)
        label_B, modalities = pl_module.labels(batch), pl_module.modalities
        all_B = keep_B & (label_B >= 0) & batch.both(*modalities)
        # without a valid row, compute one and do not count it, so that all ranks have the same keys
        at_R = all_B.nonzero().flatten() if all_B.any() else torch.zeros(1, dtype=torch.long, device=batch.device)
        rows, all_B = batch.select(at_R), all_B[at_R]
        id_B = rows.content_id if trainer.testing else None
        for key, value_B in self._metrics(trainer, pl_module, rows).items():
            self._means.add(f"{name}/{key}", Term(value_B.to(torch.float32), valid=all_B), id_B)

    def _metrics(self, trainer: L.Trainer, pl_module: Any, rows: Batch) -> dict[str, Tensor]:
        label_B = pl_module.labels(rows).clamp(min=0)
        with torch.no_grad():
            logits_BC = pl_module.fuse(pl_module.latents(rows), rows.present)
        correct_B = logits_BC.argmax(dim=1) == label_B
        values: dict[str, Tensor] = {"unharmed": correct_B}
        attacked_B, absent_B = correct_B.clone(), torch.ones_like(correct_B)
        for m in pl_module.modalities:
            nudge = Nudge(pl_module, rows, [m])
            radius = self.radius[m] if isinstance(self.radius, dict) else self.radius
            wrong_B = find_attacks(nudge, radius * nudge.size_B(), label_B, self.steps, self.restarts)
            values[f"attacked/{m}"] = ~wrong_B
            attacked_B &= ~wrong_B
            if len(pl_module.modalities) > 1:
                others = [other for other in pl_module.modalities if other != m]
                with torch.no_grad():
                    rest = rows.only(*others)
                    without_BC = pl_module.fuse(pl_module.latents(rest), rest.present)
                values[f"absent/{m}"] = without_BC.argmax(dim=1) == label_B
                absent_B &= values[f"absent/{m}"]
        values["attacked_worst"] = attacked_B
        if len(pl_module.modalities) > 1:
            values["absent_worst"] = absent_B
        if self.certify is not None:
            if self._slope_MC is None:
                self._slope_MC = steepest(pl_module, self._bank_batches(trainer), self.rows)
            slope = dict(zip(pl_module.modalities, self._slope_MC, strict=True))
            with torch.no_grad():
                radius_B = certified_radius(logits_BC, pl_module.fusion.weights, slope, rows.present, label_B)
            values["certified/radius"] = radius_B.clamp(min=0)
            values["certified/share"] = radius_B >= self.certify
        return values
