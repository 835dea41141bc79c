"""Sample-level modality valuation: train once more on each sample with only a modality that contributes little to it.

Letters: B samples, M modalities.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor
from torch.optim import Optimizer

from descant.callbacks.balance.balance import TermsCallback
from descant.modules.balance.regularizer import FusionContext
from descant.modules.core.batch import only
from descant.modules.core.capabilities import has
from descant.modules.core.host import read_together, to_device
from descant.modules.core.objective import Term
from descant.modules.core.protocols import MultimodalClassifier
from descant.modules.core.ranks import total_of_ranks
from descant.modules.core.rng import uniform_N
from descant.modules.core.sham import Sham
from descant.modules.fusion.classifiers import coalitions, cross_entropy, shapley
from descant.modules.training_setup.trainer import log_interval, share_of_run


@torch.no_grad()
def contributions(context: FusionContext) -> Tensor:
    """Compute Shapley values, float64 ``[B, M]``, of ``v(S) = |S|`` if the fusion of the modalities S is right, else 0.

    They sum to v of all modalities that a sample has: 1 for each modality is a fair share of a correct decision. It
    costs 2^M - 1 fusions without gradient; no tower runs again.
    """
    z, present, label_B = context.inputs
    names, zero_B = tuple(z), torch.zeros(len(label_B), dtype=torch.float64, device=label_B.device)
    f: dict[tuple[str, ...], Tensor] = {(): zero_B}
    for subset in coalitions(names)[1:]:
        here = only(present, *subset)
        right_B = context.fuse(dict(z), here).argmax(dim=1) == label_B
        f[subset] = torch.stack([here[m] for m in subset]).sum(dim=0) * right_B.double()
    return torch.stack(list(shapley(f, names).values()), dim=1)


class SampleResampling(TermsCallback):
    """Modality valuation at sample level: learn more from a modality alone if it contributes little to a sample.

        loss_b = sum_m n_bm cross_entropy(fusion(z_bm alone), y_b),      n_bm = number of thresholds above phi_bm

    This is one term, "resampled", in addition to the joint loss, over the samples with several modalities. phi is that
    of :func:`contributions`, in the same forward pass. With the thresholds of the authors' release, one of two
    modalities counts once with phi = 1/2, twice with 0, three times with -1/2, and never from 1 on.

    The release appends these copies to the next epoch, by phi of the epoch before, and runs the towers on each. Here
    they join the step of their sample, so that an epoch has the same sum of gradients in fewer steps: our reading. It
    has no state, and costs 2^M - 1 fusions without gradient and M with. Source: Wei 2024, arXiv 2309.06255.

    It logs ``balance/contribution/{modality}`` and ``balance/resampled/{modality}``, the mean n.

    Args:
        warmup: share of the run before which there is no such loss (5 of 60 epochs in the release).
        thresholds: thresholds of phi.
        sham: ``permute`` for the control: each sample gets the numbers of another one.
    """

    once = True

    def __init__(
        self,
        warmup: float = 0.1,
        thresholds: Sequence[float] = (0.9, 0.4, -0.1),
        sham: Literal["permute"] | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= warmup < 1:
            raise ValueError(f"{type(self).__name__}: warmup {warmup:g}: a share of the run, at least 0 and below 1")
        self.warmup, self.thresholds, self.sham = warmup, tuple(thresholds), Sham(sham)
        self.started = False
        self._sums_3M: Tensor | None = None  # of this step so far: contributions, copies, and samples

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        self.started = share_of_run(trainer) >= self.warmup

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._sums_3M = None  # drop an incomplete step, such as after a loss that was not finite

    def terms(self, context: FusionContext, training: bool) -> dict[str, Term]:
        z, present, label_B = context.inputs
        here_BM = torch.stack([present[m] for m in z], dim=1)
        several_B = (here_BM.sum(dim=1) > 1) & (label_B >= 0)
        value_B = 0.0 * context.logits_BC[:, 0]  # the term exists in all steps, for harmonizers
        if self.started:
            phi_BM = contributions(context)
            copies_BM = self.copies(phi_BM, context, several_B) * (here_BM & several_B[:, None])
            if training:
                sums_3M = torch.stack([phi_BM, copies_BM.double(), torch.ones_like(phi_BM)])
                sums_3M = (sums_3M * several_B[:, None]).sum(dim=1)
                self._sums_3M = sums_3M if self._sums_3M is None else self._sums_3M + sums_3M
            for n_B, m in zip(copies_BM.unbind(dim=1), z, strict=True):
                value_B = value_B + n_B * cross_entropy(context.fuse(dict(z), only(present, m)), label_B)
        return {"resampled": Term(value_B, valid=several_B, norm=context.rows)}

    def copies(self, phi_BM: Tensor, context: FusionContext, several_B: Tensor) -> Tensor:
        """Compute ``n_BM``, int64."""
        n_BM = (phi_BM[..., None] < phi_BM.new_tensor(self.thresholds)).sum(dim=2)
        return self.sham(n_BM, context.batch.rng_seed, several_B)

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        if (trainer.global_step + 1) % log_interval(trainer) == 0:
            self._read(trainer, pl_module)
        self._sums_3M = None

    def _read(self, trainer: L.Trainer, pl_module: L.LightningModule) -> Tensor | None:
        """Compute means ``[2, M]`` over the step's samples, and log them if due; None if it had no sample."""
        if self._sums_3M is None:
            return None
        (sums_3M,) = read_together(total_of_ranks(self._sums_3M))
        if not sums_3M[2].all():
            return None
        mean_2M = sums_3M[:2] / sums_3M[2]
        if (trainer.global_step + 1) % log_interval(trainer) == 0:
            names = zip(("contribution", "resampled"), mean_2M.float(), strict=True)
            assert has(pl_module, MultimodalClassifier)
            modalities = pl_module.modalities
            values = {f"balance/{name}/{m}": x for name, x_M in names for m, x in zip(modalities, x_M, strict=True)}
            pl_module.log_dict(values, batch_size=1)
        return mean_2M


class ModalityResampling(SampleResampling):
    """Modality valuation at modality level: learn at random from the least contributing modality alone.

        n_bm = 1 with probability  p = min(1, 2/3 alpha (mean_{n != m} Phi_n - Phi_m))  for the m with the least Phi

    Phi is the mean of phi over the samples of the optimizer step before, of all ranks and micro-batches. All else is as
    in :class:`SampleResampling`. The release takes Phi of a fifth of the samples after each epoch, and draws samples
    with replacement. The step before, and the mean over several other modalities, are our reading. Source: Wei 2024,
    arXiv 2309.06255. Its state, the probabilities, is in the checkpoint.

    Args:
        alpha: strength of the resampling.
        warmup: as in SampleResampling.
        sham: ``permute`` for the control: each modality gets the probability of the one before it.
    """

    def __init__(self, alpha: float = 1.0, warmup: float = 0.1, sham: Literal["permute"] | None = None) -> None:
        super().__init__(warmup, sham=sham)
        if not alpha >= 0:
            raise ValueError(f"ModalityResampling: alpha {alpha:g}: 0 (no copies) or more")
        self.alpha = alpha
        self.p_M: Tensor | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"p": self.p_M}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.p_M = state_dict["p"]

    def copies(self, phi_BM: Tensor, context: FusionContext, several_B: Tensor) -> Tensor:
        if self.p_M is None:
            return torch.zeros_like(phi_BM, dtype=torch.int64)
        seeds, names = context.batch.rng_seed, context.inputs.z
        drawn = [uniform_N(seeds, "resampled", m) < p for m, p in zip(names, self.p_M.tolist(), strict=True)]
        return to_device(torch.stack(drawn, dim=1).long(), phi_BM.device)

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        mean_2M, self._sums_3M = self._read(trainer, pl_module), None  # once a step, for the draws of the next
        if mean_2M is not None:
            self.p_M = self.sham.handed_on(self.chances(mean_2M[0], self.alpha))

    @staticmethod
    def chances(phi_M: Tensor, alpha: float) -> Tensor:
        """Compute ``p_M`` from the mean contributions.

        >>> [round(p, 4) for p in ModalityResampling.chances(torch.tensor([0.9, 0.3]), 1.0).tolist()]  # 2/3 of 0.6
        [0.0, 0.4]
        """
        lead_M = (phi_M.sum() - phi_M) / (len(phi_M) - 1) - phi_M
        least_M = torch.arange(len(phi_M), device=phi_M.device) == phi_M.argmin()
        return torch.where(least_M, (2 / 3 * alpha * lead_M).clamp(min=0, max=1), 0.0)
