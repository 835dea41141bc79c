"""Prototypical modality rebalancing (PMR): pull latents of the slower modality to their class prototypes.

Letters: B samples, C classes, D width of latents.
"""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.optim import Optimizer

from descant.callbacks.balance.balance import TermsCallback
from descant.modules.balance.regularizer import FusionContext
from descant.modules.core.errors import require_value
from descant.modules.core.host import derive, host_copy, read_together, to_device
from descant.modules.core.objective import Term
from descant.modules.core.ranks import rank, total_of_ranks
from descant.modules.training_setup.trainer import log_interval


class PMR(TermsCallback):
    """Prototypical modality rebalancing (PMR): a prototype loss on the latents of the slower modality.

        loss_m,b = - alpha log softmax_c(- |z_mb - p_mc|)_label        for the m with the lowest s_m, else 0
        s_m = mean softmax(- |z_mb - p_m|)_label                       of the optimizer step before, all ranks
        p_mc <- beta p_mc + (1 - beta) mean of z_mb over label_b = c   of the last ``every`` steps, all ranks

    Each modality has one term, ``prototype-{modality}``, which is zero for the faster ones and until prototypes exist.
    Classes without a prototype are no candidates, and their samples have no such loss.

    The slower modality is that of the step before, so that it is the same in all micro-batches and ranks. The means are
    those of training latents, while the paper embeds a tenth of the data every epoch: our reading. Source: Fan 2023,
    arXiv 2211.07089, without its entropy term.

    It logs ``balance/score/{modality}``.

    Args:
        alpha: weight of the loss.
        beta: weight of the old prototypes in the new ones.
        every: optimizer steps between two updates of the prototypes.
    """

    once = True

    def __init__(self, alpha: float = 0.6, beta: float = 0.5, every: int = 20) -> None:
        super().__init__()
        require_value(alpha >= 0, f"PMR: alpha {alpha:g}: 0 or more")
        require_value(0 <= beta < 1, f"PMR: beta {beta:g}: at least 0 and below 1")
        require_value(every >= 1, f"PMR: every {every}: 1 is the least")
        self.alpha, self.beta, self.every = alpha, beta, every
        self.middle: dict[str, Tensor] = {}  # modality -> p_CD, nan where a class was never seen
        self.behind: str | None = None
        self._sums: dict[str, Tensor] = {}  # modality -> [C, D + 1]: latents, and how many, since the last prototypes
        self._score: dict[str, Tensor] = {}  # modality -> [2]: sum and count of this step

    def state_dict(self) -> dict[str, Any]:
        sums = {m: total_of_ranks(x.clone()) for m, x in self._sums.items()}  # called on every rank; one writes
        tensors = {"middle": self.middle, "sums": sums}
        copies = {name: {m: x.clone() for m, x in of.items()} for name, of in tensors.items()}
        return {**copies, "behind": self.behind}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.middle, self.behind, self._score = dict(state_dict["middle"]), state_dict["behind"], {}
        self._sums = {m: x if rank() == 0 else torch.zeros_like(x) for m, x in state_dict["sums"].items()}

    def terms(self, context: FusionContext, training: bool = True) -> dict[str, Term]:
        """Compute one term per modality; in training, also add latents to the sums of the next prototypes."""
        z, present, label_B = context.inputs
        C, terms = context.logits_BC.shape[1], {}
        for m, z_BD in z.items():
            here_B = derive(_has_label, present[m], label_B)
            here_r = to_device(host_copy(here_B).nonzero()[:, 0], z_BD.device)
            if training:
                self._add_latents(m, z_BD.detach()[here_r].double(), label_B[here_r], C)
            value_B = z_BD.new_zeros(len(z_BD)) * z_BD.sum(dim=1)  # reaches the tower on every rank
            if m in self.middle:
                p_CD = self.middle[m].to(z_BD)
                known_C = p_CD.isfinite().all(dim=1)
                here_B = here_B & known_C[label_B.clamp(min=0)]
                far_BC = torch.cdist(z_BD, torch.where(known_C[:, None], p_CD, 0.0))
                log_BC = torch.where(known_C, -far_BC, -torch.inf).log_softmax(dim=1)
                log_B = log_BC.gather(1, label_B.clamp(min=0)[:, None])[:, 0]
                log_B = torch.where(here_B, log_B, 0.0)
                if training:
                    score_B = log_B.detach().double().exp() * here_B
                    self._add(self._score, m, torch.stack([score_B.sum(), here_B.sum()]))
                value_B = value_B - self.alpha * log_B * float(m == self.behind)
            terms[f"prototype-{m}"] = Term(value_B, valid=here_B, norm=context.rows)
        return terms

    def _add_latents(self, m: str, z_RD: Tensor, label_R: Tensor, C: int) -> None:
        finite_R = z_RD.isfinite().all(dim=1)  # one row of a skipped step would spoil all classes
        z_RD = torch.where(finite_R[:, None], z_RD, 0.0)
        rows_RC = (label_R[:, None] == torch.arange(C, device=label_R.device)).to(z_RD)
        ones_R1 = finite_R[:, None].to(z_RD)
        self._add(self._sums, m, rows_RC.T @ torch.cat([z_RD, ones_R1], dim=1))

    @staticmethod
    def _add(to: dict[str, Tensor], m: str, x: Tensor) -> None:
        to[m] = to[m].to(x.device) + x if m in to else x

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        if self._score:
            score = {m: total_of_ranks(x.clone()) for m, x in self._score.items()}
            read = zip(score, read_together(*score.values()), strict=True)  # one device read a step
            mean = {m: float(s / n) for m, (s, n) in read if n > 0}
            # unchanged if a modality had no sample
            self.behind = min(mean, key=lambda m: mean[m]) if len(mean) == len(score) > 1 else self.behind
            if (trainer.global_step + 1) % log_interval(trainer) == 0:
                pl_module.log_dict({f"balance/score/{m}": s for m, s in mean.items()}, batch_size=1)
            self._score = {}
        if (trainer.global_step + 1) % self.every == 0:
            for m, x in self._sums.items():
                sum_CD = total_of_ranks(x.clone())
                count_C1 = sum_CD[:, -1:]
                new_CD = sum_CD[:, :-1] / count_C1  # nan for a class without a sample
                old_CD = self.middle.get(m, torch.full_like(new_CD, torch.nan)).to(new_CD)
                both_CD = torch.where(old_CD.isfinite(), self.beta * old_CD + (1 - self.beta) * new_CD, new_CD)
                self.middle[m] = torch.where(count_C1 > 0, both_CD, old_CD)
            self._sums = {}


def _has_label(present_B: Tensor, label_B: Tensor) -> Tensor:
    return present_B & (label_B >= 0)
