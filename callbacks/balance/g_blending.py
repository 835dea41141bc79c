"""Gradient blending (G-Blending): weigh loss terms by generalization gain over overfitting.

Letters: K terms.
"""

from __future__ import annotations

from typing import Any, Literal, cast

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from descant.modules.core.capabilities import has, require
from descant.modules.core.protocols import HasTerms
from descant.modules.core.ranks import rank, total_of_ranks
from descant.modules.core.sham import Sham


class GradientBlending(L.Callback):
    """Gradient blending (G-Blending): weigh loss terms after each validation by generalization over overfitting.

        w_k = K v_k / sum v,    v_k = max(dG_k, 0) / dO_k^2
        dG_k = V_k' - V_k,      dO_k = (V_k - T_k) - (V_k' - T_k')

    V_k is the mean of the term over the validation sets, and T_k its mean over the training steps since the weighing
    before; ' marks the values of the weighing before. All weights are 1 until the second weighing, and if no term
    improved. Training values are those of the training steps, not of another pass over the data: our reading. Source:
    Wang 2020, arXiv 1905.12681.

    It logs ``blend/weight/{term}``. Validation runs the recipe's forward once more.

    Args:
        every: validations from one weighing to the next.
        sham: ``permute`` for the control: each term gets the weight of the one before it.
    """

    once = True

    def __init__(self, every: int = 1, sham: Literal["permute"] | None = None) -> None:
        super().__init__()
        if every < 1:
            raise ValueError(f"GradientBlending: every {every}: 1 is the least")
        self.every, self.sham = every, Sham(sham)
        self.names: tuple[str, ...] = ()
        self.weight_K: Tensor | None = None
        self.before_2K: Tensor | None = None  # V and T of the weighing before
        self.validations = 0
        self._train_2K: Tensor | None = None  # sums of values and micro-batches since the weighing before
        self._val_2K: Tensor | None = None  # sums of values and rows

    def state_dict(self) -> dict[str, Any]:
        names = ("names", "weight_K", "before_2K", "validations", "_train_2K")
        saved = {name: getattr(self, name) for name in names}
        if self._train_2K is not None:  # called on every rank; one writes
            saved["_train_2K"] = total_of_ranks(self._train_2K.clone())
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name, value in state_dict.items():
            setattr(self, name, value)
        if rank() > 0 and self._train_2K is not None:  # the saved sums are of all ranks
            self._train_2K = torch.zeros_like(self._train_2K)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        require(self, pl_module, HasTerms)

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        objective = cast(HasTerms, pl_module).step.objective
        assert objective is not None
        names = tuple(objective.terms)
        if len(names) < 2:
            raise ValueError(f"GradientBlending: one term, {names[0]}: there is nothing to weigh it against")
        if self.names not in ((), names):
            raise ValueError(
                f"GradientBlending: terms {', '.join(names)}, before {', '.join(self.names)}: always the same ones"
            )
        self.names = names
        value_K = torch.stack([term.detach().double() for term in objective.terms.values()])
        sums_2K = torch.stack([value_K, torch.ones_like(value_K)])
        sums_2K = torch.where(value_K.isfinite(), sums_2K, 0.0)  # a skipped step does not count
        self._train_2K = sums_2K if self._train_2K is None else self._train_2K.to(sums_2K) + sums_2K
        if self.weight_K is not None:
            objective.mix.mul_(self.weight_K.to(objective.mix))

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, *_: Any, **__: Any
    ) -> None:
        if trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING or not self.names:
            return
        assert has(pl_module, HasTerms)
        with torch.no_grad(), trainer.precision_plugin.val_step_context():
            terms = pl_module.forward(batch).all_terms()
        sums = [torch.stack([terms[n].sum().double(), terms[n].count().double()]) for n in self.names]
        sums_2K = torch.stack(sums, dim=1)
        self._val_2K = sums_2K if self._val_2K is None else self._val_2K + sums_2K

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._val_2K is None or self._train_2K is None:
            return
        val_2K, self._val_2K = total_of_ranks(self._val_2K), None
        self.validations += 1
        if self.validations % self.every:
            return
        train_2K, self._train_2K = total_of_ranks(self._train_2K.clone()), None
        now_2K = torch.stack([val_2K[0] / val_2K[1], train_2K[0] / train_2K[1]])
        if self.before_2K is not None:
            self.weight_K = self.sham.handed_on(self.compute_weights(self.before_2K.to(now_2K), now_2K))
        self.before_2K = now_2K

    @staticmethod
    def compute_weights(before_2K: Tensor, now_2K: Tensor) -> Tensor:
        """Compute ``w_K`` from validation and training means, before and now.

        >>> before, now = torch.tensor([[2.0, 2.0], [2.0, 2.0]]), torch.tensor([[1.0, 1.5], [0.5, 1.0]])
        >>> GradientBlending.compute_weights(before, now).tolist()  # gains 1 and 1/2, gaps opened by 1/2 and 1/2
        [1.3333333333333333, 0.6666666666666666]
        """
        (val_K, train_K), (old_val_K, old_train_K) = now_2K.double(), before_2K.double()
        gain_K = (old_val_K - val_K).clamp(min=0)
        over_K = ((val_K - train_K) - (old_val_K - old_train_K)).abs()
        # bound the weight of a term without any overfitting
        over_K = over_K.clamp(min=1e-3 * float(over_K.max()))
        value_K = torch.where(over_K > 0, gain_K / over_K.square(), gain_K)
        total = value_K.sum()
        return torch.where(total > 0, len(value_K) * value_K / total, 1.0)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.weight_K is not None:
            weights = zip(self.names, self.weight_K, strict=True)
            pl_module.log_dict({f"blend/weight/{name}": w.float() for name, w in weights}, batch_size=1)
