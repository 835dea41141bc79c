"""What each modality brings to a decision, beside what it could say alone.

Letters: B rows of a batch, N rows of a set, C classes, M modalities.
"""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor

from descant.callbacks.balance import require_several
from descant.callbacks.evaluate import Rows, Store
from descant.callbacks.subsets import OwnPass
from descant.modules.batch import Batch
from descant.modules.fusion import coalitions, only, shapley
from descant.modules.protocols import Classifies, Fuses, Unimodal
from descant.modules.sham import partners


class Contributions(OwnPass):
    """Of each evaluation set, over the rows that have all modalities and a label:

        {set}/alone/{m}       accuracy of the modality's own head, or of the decision were there no other modality
        {set}/shapley/{m}     sum over S without m of |S|! (M - |S| - 1)! / M! (accuracy(S and m) - accuracy(S))
        {set}/importance/{m}  accuracy less that with z_m of another row: the mean over a few random circles
        {set}/joint           accuracy of the decision; the Shapley values add up to it less what is guessed of nothing

    accuracy(S) is that of the decision with the modalities in S. A modality that says little alone was drowned, if a
    tower that is trained by itself says more; one that says much alone and brings little was made needless.
    Latents are computed once; neither batches nor ranks change a number. Rows of a set are held in memory on each rank.

    Args:
        circles: random orders of the importance.
        sets, limit, every, validate: as of other judges.

    Raises:
        ValueError: for a count below 1; at setup, for a recipe without the protocols Classifies, Fuses and Unimodal, or
            with one modality.
    """

    #: Said twice (by an experiment and an overlay), the last one counts.
    once = True

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
        self._held: dict[str, Store] = {}
        self._dtype = torch.float32

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if not all(isinstance(pl_module, protocol) for protocol in (Classifies, Fuses, Unimodal)):
            raise ValueError(
                "Contributions needs the protocols Classifies (labels), Fuses (latents, fuse) and Unimodal (unimodal); "
                f"{type(pl_module).__name__} lacks one"
            )
        require_several("Contributions", pl_module)

    def _forget(self) -> None:
        super()._forget()
        self._held = {}

    def run(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, keep_B: Tensor, name: str) -> None:
        assert isinstance(pl_module, Classifies) and isinstance(pl_module, Fuses)
        with torch.no_grad(), trainer.precision_plugin.val_step_context():
            z = pl_module.latents(batch)
        label_B, self._dtype = pl_module.labels(batch), next(iter(z.values())).dtype
        all_B = keep_B & (label_B >= 0) & torch.stack([batch.present[m] for m in pl_module.modalities]).all(dim=0)
        rows = Batch({}, dict.fromkeys(z, all_B), {"label": label_B}, batch.index, batch.key)
        self._held.setdefault(name, Store().to(pl_module.device)).update(z, rows)

    def results(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name, store in self._held.items():
            rows = store.compute()
            if len(rows.index):
                found |= {f"{name}/{key}": value for key, value in self._of_set(pl_module, rows).items()}
        self._held = {}
        return found

    @torch.no_grad()
    def _of_set(self, pl_module: Any, rows: Rows) -> dict[str, Tensor]:
        label_N, modalities = rows.targets["label"], pl_module.modalities
        z = {m: z_ND.to(self._dtype) for m, z_ND in rows.z.items()}
        every = {m: torch.ones_like(label_N, dtype=torch.bool) for m in modalities}

        def accuracy(logits_NC: Tensor) -> Tensor:
            return (logits_NC.argmax(dim=1) == label_N).double().mean()

        of = {subset: accuracy(pl_module.fuse(dict(z), only(every, *subset))) for subset in coalitions(modalities)}
        found = {"joint": of[modalities]}
        found |= {f"alone/{m}": accuracy(x_NC) for m, x_NC in pl_module.unimodal(dict(z), every).items()}
        found |= {f"shapley/{m}": value for m, value in shapley(of, modalities).items()}
        for m in modalities:
            others = []
            for s in range(self.circles):
                source_N = partners(rows.index, every[m], "importance", m, s)
                others.append(accuracy(pl_module.fuse({**z, m: z[m][source_N]}, every)))
            found[f"importance/{m}"] = found["joint"] - torch.stack(others).mean()
        return found
