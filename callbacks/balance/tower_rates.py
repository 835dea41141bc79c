"""Learning rates of each modality's own parameters, set after each validation by how well each modality does alone.

Letters: B samples, M modalities.
"""

from __future__ import annotations

from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from descant.callbacks.balance.balance import require_multimodal
from descant.callbacks.callback_order import Ordered
from descant.modules.core.capabilities import has, require
from descant.modules.core.protocols import Fuses, MultimodalClassifier, Unimodal
from descant.modules.core.ranks import total_of_ranks
from descant.modules.core.sham import Sham
from descant.modules.fusion.classifiers import cross_entropy
from descant.modules.training_setup.trainer import log_interval


class TowerRates(Ordered):
    """Base: multiplies the learning rates of each modality's own parameters by ``rate``, after each validation.

    A subclass implements ``rates(loss_M, accuracy_M)``, from the scores of each modality alone over the validation sets
    and all ranks. In the optimizer's step each group is split by modality, with ``lr * rate``. This is exact for any
    optimizer, while scaled gradients would change nothing for Adam. A rate of 0 leaves parameters unchanged. The fusion
    and the modalities' own heads keep their rate. A validation in which a modality has no labelled sample, or a loss is
    not finite, changes nothing.

    It logs ``balance/rate/{modality}``. Validation runs the towers once more; a step costs nothing.

    Args:
        sham: ``permute`` for the control: each modality gets the scores of the one before it.
    """

    once = True
    #: Two of them would undo each other's groups.
    excludes = ("TowerRates",)

    def __init__(self, sham: Literal["permute"] | None = None) -> None:
        super().__init__()
        self.sham = Sham(sham)
        self.rate: dict[str, float] = {}  # modality -> factor; 1 if missing
        self._sums_3M: Tensor | None = None  # of this validation: losses, correct answers, samples
        self._hooks: dict[Optimizer, list[RemovableHandle]] = {}
        self._whole: dict[Optimizer, list[dict[str, Any]]] = {}  # the original groups during a step

    def rates(self, loss_M: Tensor, accuracy_M: Tensor) -> list[float]:
        """Compute the factors of all modalities from float64 validation scores on the CPU; updates the state."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        return {"rate": dict(self.rate)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rate = dict(state_dict["rate"])

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        require_multimodal(self, pl_module)
        require(self, pl_module, Fuses, Unimodal)
        super().setup(trainer, pl_module, stage)

    # scores of a validation -------------------------------------------------------------------------------------------

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, *_: Any, **__: Any
    ) -> None:
        if trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
            return
        assert has(pl_module, MultimodalClassifier) and has(pl_module, Fuses) and has(pl_module, Unimodal)
        with torch.no_grad(), trainer.precision_plugin.val_step_context():
            logits = pl_module.unimodal(pl_module.latents(batch), batch.present)
        label_B, sums = pl_module.labels(batch), []
        for m in pl_module.modalities:
            valid_B = batch.present[m] & (label_B >= 0)
            value_B = cross_entropy(logits[m], label_B).double()
            correct_B = valid_B & (logits[m].argmax(dim=1) == label_B)
            loss = torch.where(valid_B, value_B, 0.0).sum()
            sums.append(torch.stack([loss, correct_B.sum().double(), valid_B.sum().double()]))
        sums_3M = torch.stack(sums, dim=1)
        self._sums_3M = sums_3M if self._sums_3M is None else self._sums_3M + sums_3M

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._sums_3M is None:
            return
        assert has(pl_module, MultimodalClassifier)
        (loss_M, correct_M, count_M), self._sums_3M = total_of_ranks(self._sums_3M).cpu(), None
        score_2M = torch.stack([loss_M, correct_M]) / count_M
        if score_2M.isfinite().all():
            loss_M, accuracy_M = self.sham.handed_on(score_2M.T).T
            self.rate = dict(zip(pl_module.modalities, self.rates(loss_M, accuracy_M), strict=True))

    # learning rates ---------------------------------------------------------------------------------------------------

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        for group in trainer.optimizers:
            for optimizer in getattr(group, "members", [group]):
                if optimizer not in self._hooks:
                    split = optimizer.register_step_pre_hook(lambda o, *_: self._split(o, pl_module))
                    self._hooks[optimizer] = [split, optimizer.register_step_post_hook(lambda o, *_: self._join(o))]

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        if self.rate and (trainer.global_step + 1) % log_interval(trainer) == 0:
            pl_module.log_dict({f"balance/rate/{m}": rate for m, rate in self.rate.items()}, batch_size=1)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        for optimizer in list(self._whole):
            self._join(optimizer)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        for hook in (hook for hooks in self._hooks.values() for hook in hooks):
            hook.remove()
        self._hooks = {}

    def _split(self, optimizer: Optimizer, pl_module: L.LightningModule) -> None:
        assert has(pl_module, MultimodalClassifier)
        rate_of: dict[nn.Parameter, float] = {
            p: rate for m, rate in self.rate.items() if rate != 1 for p in pl_module.of_modality(m)
        }
        self._whole[optimizer], split = optimizer.param_groups, []
        for group in optimizer.param_groups:
            parts: dict[float, list[nn.Parameter]] = {}
            for p in group["params"]:
                parts.setdefault(rate_of.get(p, 1.0), []).append(p)
            if parts.keys() <= {1.0}:
                split.append(group)
            else:
                split += [{**group, "params": part, "lr": group["lr"] * rate} for rate, part in parts.items()]
        optimizer.param_groups = split

    def _join(self, optimizer: Optimizer) -> None:
        optimizer.param_groups = self._whole.pop(optimizer)
