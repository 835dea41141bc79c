"""Diagnosing and Re-learning: soft re-initialisation of each tower, by how much it has overfitted.

Letters: B rows of a batch, N rows of a set, D width of latents, M modalities.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from descant.callbacks.balance.balance import require_multimodal
from descant.callbacks.evaluate.embeddings import Rows, Store
from descant.modules.balance.purity import separability
from descant.modules.core.batch import Batch
from descant.modules.core.capabilities import has, require
from descant.modules.core.modes import eval_mode
from descant.modules.core.protocols import BankData, Fuses, MultimodalClassifier
from descant.modules.core.rng import global_seed, mix
from descant.modules.core.sham import Sham
from descant.modules.training_setup.trainer import data_now, log_interval, plain_batches


class Relearning(L.Callback):
    """Diagnosing and Re-learning: move each tower back to its initial weights by its gap of separability.

        theta_m <- (1 - a_m) theta_m + a_m theta_m(0),      a_m = tanh(strength |P_m(train) - P_m(validation)|)

    P is the purity of k-means clusters of the modality's latents, as many clusters as classes
    (:func:`descant.modules.balance.purity.separability`), over the rows of a set that have the modality and a label.
    All of a modality's own parameters move: tower, pool and head. Fusion, buffers and the optimizer's state do not.

    The sets are the training samples without augmentation and the first validation set, each encoded in eval mode. It
    acts before the first micro-batch of a step. A re-learning that is due when a run ends is done when the run is
    resumed. The initial weights are in the checkpoint. It costs ``times`` passes without gradient over both sets, and a
    copy of the towers. Source: Wei 2024, arXiv 2407.09705. Its release counts epochs (every 20 of 50) instead of steps,
    encodes its training samples with augmentation, and uses scikit-learn's k-means.

    It logs ``balance/gap/{modality}`` and ``balance/relearned/{modality}``, a.

    Args:
        every: optimizer steps from one re-learning to the next.
        times: maximum number of re-learnings.
        strength: lambda of the paper.
        sham: ``permute`` for the control: each modality gets the a of the one before it.
    """

    once = True

    def __init__(
        self, every: int, times: int = 3, strength: float = 3.0, sham: Literal["permute"] | None = None
    ) -> None:
        super().__init__()
        if every < 1 or times < 1 or not strength >= 0:
            raise ValueError(
                f"Relearning: every {every}, times {times}, strength {strength:g}: at least 1, 1 and 0 (nothing moves)"
            )
        self.every, self.times, self.strength, self.sham = every, times, strength, Sham(sham)
        self.gap: dict[str, float] = {}
        self.moved: dict[str, float] = {}
        self.last = self.done = 0  # the step of the last re-learning, and how many there were
        self._initial: dict[str, Tensor] = {}

    def state_dict(self) -> dict[str, Any]:
        names = ("gap", "moved", "last", "done", "_initial")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name, value in state_dict.items():
            setattr(self, name, value)

    # the hooks -------------------------------------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        require_multimodal(self, pl_module)
        require(self, pl_module, Fuses)
        if stage == "fit":
            require(self, data_now(trainer), BankData)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        named = {name: p for of in _parameters(pl_module).values() for name, p in of.items()}
        split = next((name for name, p in named.items() if isinstance(p, DTensor)), None)
        if split is not None:
            raise ValueError(f"Relearning: {split} is split over ranks; it needs whole parameters")
        if not self._initial:  # a resumed run keeps those of its start
            self._initial = {name: p.detach().cpu().clone() for name, p in named.items()}

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        now = trainer.global_step
        if now > self.last and now % self.every == 0 and self.done < self.times:
            self.last, self.done = now, self.done + 1
            self._relearn(trainer, pl_module)
        if self.moved and (now + 1) % log_interval(trainer) == 0:
            values = {f"balance/gap/{m}": gap for m, gap in self.gap.items()}
            values |= {f"balance/relearned/{m}": a for m, a in self.moved.items()}
            pl_module.log_dict(values, batch_size=1)

    # diagnosing and re-learning ---------------------------------------------------------------------------------------

    def _relearn(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert has(pl_module, MultimodalClassifier)
        data, modalities = data_now(trainer), pl_module.modalities
        validation = data.val_dataloader()
        validation = validation[0] if isinstance(validation, list) else validation
        with eval_mode(pl_module), torch.no_grad():
            sets = [_encode_set(trainer, pl_module, loader) for loader in (data.bank_dataloader(), validation)]
        self.gap = {m: abs(_purity(sets[0], m) - _purity(sets[1], m)) for m in modalities}
        a_M = torch.tensor([self.gap[m] for m in modalities], dtype=torch.float64).mul(self.strength).tanh()
        self.moved = dict(zip(modalities, self.sham.handed_on(a_M).tolist(), strict=True))
        with torch.no_grad():
            for m, named in _parameters(pl_module).items():
                for name, p in named.items():
                    p.lerp_(self._initial[name].to(p), self.moved[m])


def _parameters(pl_module: Any) -> dict[str, dict[str, nn.Parameter]]:
    """Return modality -> name -> parameter, for the parameters that only this modality uses."""
    names = {p: name for name, p in pl_module.named_parameters()}
    return {m: {names[p]: p for p in pl_module.of_modality(m)} for m in pl_module.modalities}


def _encode_set(trainer: L.Trainer, pl_module: Any, loader: Iterable[Batch]) -> Rows:
    """Compute latents and labels of all rows of a set, of all ranks, in the order of sample ids."""
    store = Store().to(pl_module.device)
    for batch in plain_batches(trainer, loader):
        with trainer.precision_plugin.val_step_context():
            z = pl_module.latents(batch)
        labelled = Batch({}, batch.present, {"label": pl_module.labels(batch)}, batch.index, batch.content_id)
        store.update(z, labelled)
    return store.compute()


def _purity(rows: Rows, m: str) -> float:
    label_N = rows.targets["label"]
    here_N = rows.present[m] & (label_N >= 0)
    if not here_N.any():
        return 0.0
    z_ND, label_N = rows.z[m][here_N], label_N[here_N]
    return separability(z_ND, label_N, len(label_N.unique()), mix(global_seed(), "relearning", m))
