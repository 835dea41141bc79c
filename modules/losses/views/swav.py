"""SwAV: predict a view's cluster codes from another view, with balanced codes.

Letters: B samples, G samples on all ranks, N rows that codes are balanced over, K prototypes, D width, P width of
projections.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from descant.modules.core.dtype import promote
from descant.modules.core.ranks import first_row, gather
from descant.modules.losses.views.base import ViewObjective, Views, learning, require_positive, unit
from descant.modules.losses.views.queue import Queue


def sinkhorn_codes(score_NK: Tensor, valid_N: Tensor | None = None, epsilon: float = 0.05, rounds: int = 3) -> Tensor:
    """Compute balanced soft codes ``[N, K]`` by a few Sinkhorn rounds, in log space; each row sums to 1.

    Each round equalizes the masses of the prototypes, then those of the samples. With many rounds, the result is N
    times the plan of :func:`~descant.modules.selection.transport.sinkhorn` for the cost ``-score``. That function stops
    at a tolerance instead, so it has to read from the device. Invalid rows take no mass. Source: SwAV's release; Cuturi
    2013 (arXiv 1306.0895).

    >>> sinkhorn_codes(torch.tensor([[1.0, 0.0], [1.0, 0.0]])).tolist()  # both like the first: halves of each
    [[0.5, 0.5], [0.5, 0.5]]
    """
    log_NK = score_NK / epsilon
    out_N1 = None if valid_N is None else ~valid_N[:, None]
    for _ in range(rounds):
        counted_NK = log_NK if out_N1 is None else log_NK.masked_fill(out_N1, torch.finfo(log_NK.dtype).min)
        log_NK = log_NK - counted_NK.logsumexp(dim=0)
        log_NK = log_NK - log_NK.logsumexp(dim=1, keepdim=True)
    return log_NK.exp()


def swav(scores: Sequence[Tensor], codes: Sequence[Tensor], temperature: float = 0.1) -> Tensor:
    """Compute ``[B]``, the cross-entropy of each view's prediction against other views' codes, averaged over pairs.

        value_b = mean_{i != v} -code_i . log softmax(score_v / temperature)

    Source: Caron 2020, arXiv 2006.09882.

    Args:
        scores: ``[B, K]`` per view, cosines with the prototypes.
        codes: ``[B, K]`` per view, for the first of these views.

    >>> score, code = torch.tensor([[0.1, 0.0]]), torch.tensor([[1.0, 0.0]])
    >>> round(swav([score, score], [code, code]).item(), 4)  # log(1 + 1/e)
    0.3133
    """
    log_p = [(score_BK / temperature).log_softmax(dim=1) for score_BK in scores]
    total_B = torch.zeros_like(scores[0][:, 0])
    for i, code_BK in enumerate(codes):
        others = torch.stack([log_p_BK for v, log_p_BK in enumerate(log_p) if v != i])
        total_B = total_B - (code_BK * others.sum(dim=0)).sum(dim=1)
    return total_B / (len(codes) * (len(scores) - 1))


class SwAV(ViewObjective):
    """SwAV: predicts codes of two views over learned prototypes, balanced over the samples of all ranks (:func:`swav`).

    Source: Caron 2020, arXiv 2006.09882, and its release, which freezes the prototypes in the first epoch; this class
    does not.

    Args:
        hidden, out: widths of the two-layer projector. prototypes: K, prototypes have unit length.
        temperature: temperature of the predictions. epsilon, rounds: as for :func:`sinkhorn_codes`.
        queue: number of rows from earlier steps that help to balance the codes of small batches; used once the queue is
            full; 0 for no queue.
    """

    multi_crop, unit_length = True, True

    def __init__(
        self,
        hidden: int = 2048,
        out: int = 128,
        prototypes: int = 3000,
        temperature: float = 0.1,
        epsilon: float = 0.05,
        rounds: int = 3,
        queue: int = 0,
    ) -> None:
        super().__init__()
        require_positive(self, temperature=temperature, epsilon=epsilon)
        self.hidden, self.out, self.temperature, self.epsilon, self.rounds = hidden, out, temperature, epsilon, rounds
        self.prototypes = nn.Linear(out, prototypes, bias=False)
        # a queue row holds both views side by side
        self.queue = Queue(queue, 2 * out, empty=True) if queue else None

    def forward(self, views: Views) -> Tensor:
        if learning(self):
            with torch.no_grad():
                self.prototypes.weight.copy_(unit(self.prototypes.weight))
        z = [self.project(h_BD, views.valid_B) for h_BD in views.h]
        with torch.autocast(z[0].device.type, enabled=False):
            scores = [F.linear(z_BP, promote(self.prototypes.weight)) for z_BP in z]
            codes = [self._codes(scores[view].detach(), views.valid_B, view) for view in range(2)]
            value_B = swav(scores, codes, self.temperature)
        if self.queue is not None and learning(self):
            self.queue.push(torch.cat(z[:2], dim=1), views.valid_B)
        return value_B

    @torch.no_grad()
    def _codes(self, score_BK: Tensor, valid_B: Tensor, view: int) -> Tensor:
        score_NK, valid_N = gather(score_BK), gather(valid_B)
        if self.queue is not None:
            z_QP = promote(self.queue.rows_KP).chunk(2, dim=1)[view]
            score_NK = torch.cat([score_NK, F.linear(z_QP, promote(self.prototypes.weight))])
            valid_N = torch.cat([valid_N, self.queue.valid_K & self.queue.full])
        first = first_row(len(score_BK))
        return sinkhorn_codes(score_NK, valid_N, self.epsilon, self.rounds)[first : first + len(score_BK)]
