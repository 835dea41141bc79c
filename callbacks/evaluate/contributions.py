"""Contribution of each modality to a classifier: unimodal accuracy, Shapley values, permutation importance.

Letters: B rows of a batch, N rows of a set, C classes, M modalities.
"""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor

from descant.callbacks.balance.balance import require_several
from descant.callbacks.evaluate.embeddings import Rows, Store
from descant.callbacks.evaluate.forward import ForwardEvaluator
from descant.callbacks.plots.curves import Track, curves
from descant.callbacks.plots.output import save_figure
from descant.modules.core.batch import Batch
from descant.modules.core.capabilities import has
from descant.modules.core.protocols import Classifies, Fuses, Unimodal
from descant.modules.core.sham import partners
from descant.modules.fusion.classifiers import coalitions, only, shapley


class Contributions(ForwardEvaluator):
    """Modality contributions on each evaluation set, over the rows that have all modalities and a label:

        {set}/alone/{m}       accuracy of the modality's own head, or of the fused decision without other modalities
        {set}/shapley/{m}     sum over S without m of |S|! (M - |S| - 1)! / M! (accuracy(S and m) - accuracy(S))
        {set}/importance/{m}  accuracy less that with z_m of another row: the mean over a few random permutations
        {set}/utilization/{m} (accuracy of all - accuracy without m) / accuracy of all: conditional utilization rate
        {set}/joint           accuracy with all modalities: the sum of Shapley values plus the accuracy without any

    accuracy(S) is that of the fused decision with the modalities in S. A modality with low ``alone`` is under-trained
    if a tower trained by itself does better; one with high ``alone`` and low Shapley value is redundant. The accuracies
    alone and together are plotted over the steps of a fit, one panel per set, to every TensorBoard logger as
    ``contributions/accuracy`` and to ``{run folder}/pictures/``. Latents are computed once; results depend on neither
    batches nor ranks. Each rank holds the rows of a set in memory. Utilization: Wu 2022, arXiv 2202.05306, for the
    branch of one modality; for the fused decision it is our reading.

    Args:
        circles: random permutations for the importance.
        sets, limit, every, validate: see :class:`ForwardEvaluator`.
    """

    once = True
    writes_at_end = True
    needs = (Classifies, Fuses, Unimodal)

    def __init__(
        self,
        circles: int = 5,
        sets: list[str] | None = None,
        limit: int | None = None,
        every: int = 1,
        validate: bool = True,
    ) -> None:
        super().__init__(sets, limit, every, validate)
        if circles < 1:
            raise ValueError(f"Contributions: circles {circles}: 1 is the least")
        self.circles = circles
        self._dtype = torch.float32
        self.tracks: dict[str, Track] = {}  # set -> accuracies of each modality alone, and joint

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "tracks": {name: dict(x.state_dict()) for name, x in self.tracks.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        for name, state in state_dict["tracks"].items():
            self.tracks.setdefault(name, Track()).load_state_dict(state)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        require_several(self, pl_module)

    def _forget(self) -> None:
        super()._forget()
        self._stores_z: dict[str, Store] = {}

    def run(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, keep_B: Tensor, name: str) -> None:
        assert has(pl_module, Classifies) and has(pl_module, Fuses)
        with torch.no_grad(), trainer.precision_plugin.val_step_context():
            z = pl_module.latents(batch)
        label_B, self._dtype = pl_module.labels(batch), next(iter(z.values())).dtype
        all_B = keep_B & (label_B >= 0) & torch.stack([batch.present[m] for m in pl_module.modalities]).all(dim=0)
        rows = Batch({}, dict.fromkeys(z, all_B), {"label": label_B}, batch.index, batch.content_id)
        self._stores_z.setdefault(name, Store().to(pl_module.device)).update(z, rows)

    def results(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Tensor]:
        values: dict[str, Tensor] = {}
        for name, store in self._stores_z.items():
            rows = store.compute()
            if len(rows.index):
                metrics = self._metrics(pl_module, rows)
                values |= {f"{name}/{key}": value for key, value in metrics.items()}
                if trainer.validating or (trainer.training and not trainer.sanity_checking):
                    alone = [float(value) for key, value in metrics.items() if key.startswith("alone/")]
                    self.tracks.setdefault(name, Track()).add(trainer.global_step, [*alone, float(metrics["joint"])])
        self._stores_z = {}
        return values

    @torch.no_grad()
    def _metrics(self, pl_module: Any, rows: Rows) -> dict[str, Tensor]:
        label_N, modalities = rows.targets["label"], pl_module.modalities
        z = {m: z_ND.to(self._dtype) for m, z_ND in rows.z.items()}
        present = {m: torch.ones_like(label_N, dtype=torch.bool) for m in modalities}

        def accuracy(logits_NC: Tensor) -> Tensor:
            return (logits_NC.argmax(dim=1) == label_N).double().mean()

        by_subset = {
            subset: accuracy(pl_module.fuse(dict(z), only(present, *subset))) for subset in coalitions(modalities)
        }
        values = {"joint": by_subset[modalities]}
        values |= {f"alone/{m}": accuracy(x_NC) for m, x_NC in pl_module.unimodal(dict(z), present).items()}
        values |= {f"shapley/{m}": value for m, value in shapley(by_subset, modalities).items()}
        for m in modalities:
            without = by_subset[tuple(n for n in modalities if n != m)]
            values[f"utilization/{m}"] = (values["joint"] - without) / values["joint"].clamp(min=1e-300)
            permuted = []
            for s in range(self.circles):
                source_N = partners(rows.index, present[m], "importance", m, s)
                permuted.append(accuracy(pl_module.fuse({**z, m: z[m][source_N]}, present)))
            values[f"importance/{m}"] = values["joint"] - torch.stack(permuted).mean()
        return values

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.is_global_zero or not self.tracks or trainer.fast_dev_run or not trainer.loggers:  # type: ignore[attr-defined]
            return
        assert has(pl_module, Classifies)
        names = [*(f"{m} alone" for m in pl_module.modalities), "joint"]
        panels = {name: (names, *track.points()) for name, track in self.tracks.items()}
        figure = curves(f"accuracy, step {trainer.global_step}", panels)
        save_figure(trainer, figure, "accuracy", "contributions/accuracy")
