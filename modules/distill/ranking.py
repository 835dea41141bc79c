"""DCD: ranking distillation from a cross-encoder that mines hard negatives, weighted by its confidence.

For each image the teacher scores F drawn texts. The own text and the wrong ones that it scores highest form a list, in
the same order for teacher and student:

    t_bk, s_bk = scores of teacher and student,  k = 0 the own text,  k = 1 ... K - 1 the hardest first
    truth      = mean over b of  v_b mean_k BCE(s_bk, k = 0)                 v: more if the teacher is unsure
    rank       = mean over b of  u_b mean_k (s_bk - t_bk)^2                  u: more if it is sure

Source: Rao 2022 (DCD, arXiv 2207.01426). In rank, its release averages before it applies the weights, so that u has no
effect, and regresses scores of other pairs if the teacher does not rank the own text first. Our variants: the softmax
cross-entropy in truth, and a KL divergence or centred scores in rank.
Letters: B samples on this rank, F drawn texts, K texts of a list.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Self, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from descant.modules.core.batch import Batch
from descant.modules.core.capabilities import has
from descant.modules.core.dtype import promote
from descant.modules.core.host import host_copy, to_device
from descant.modules.core.objective import Term
from descant.modules.core.output import Scorer
from descant.modules.core.protocols import Matches
from descant.modules.core.ranks import gather
from descant.modules.core.rng import mix_N
from descant.modules.core.sham import Sham
from descant.modules.distill.distill import DistillContext, Target, divergence


@dataclass(frozen=True)
class Lists:
    """Scores of teacher and student ``[B, K]``, the own text first, and the rows that count, bool ``[B]``."""

    t_BK: Tensor
    s_BK: Tensor
    valid_B: Tensor

    def entropy(self) -> Tensor:
        """Compute the entropy of ``softmax_k t_b`` over log K, ``[B]``: 0 for a sure teacher, 1 for a uniform one."""
        log_BK = self.t_BK.log_softmax(dim=1)
        return -(log_BK.exp() * log_BK).sum(dim=1) / torch.tensor(float(self.t_BK.shape[1])).log()


class Weighting(nn.Module):
    """Base of weightings: ``weighting(lists)`` -> weights ``[B]`` of samples, not below 0; their mean becomes 1."""

    def forward(self, lists: Lists) -> Tensor:
        raise NotImplementedError


class UniformWeighting(Weighting):
    """Weight 1 for all samples."""

    def forward(self, lists: Lists) -> Tensor:
        return torch.ones_like(lists.t_BK[:, 0])


class TeacherConfidence(Weighting):
    """Weight ``1 - H_b / log K``, H the entropy of the teacher's list: imitate a sure teacher (our reading of DCD).

    >>> lists = Lists(torch.tensor([[0.0, 0.0], [9.0, 0.0]]), torch.zeros(2, 2), torch.ones(2).bool())
    >>> sure = TeacherConfidence()(lists)
    >>> [round(x, 3) for x in sure.tolist()]
    [0.0, 0.998]
    """

    def forward(self, lists: Lists) -> Tensor:
        return (1 - lists.entropy()).clamp(0, 1)


class TeacherUncertainty(Weighting):
    """Weight ``H_b``: samples that the teacher doubts are learned from the labels (DCD).

    >>> lists = Lists(torch.tensor([[0.0, 0.0], [9.0, 0.0]]), torch.zeros(2, 2), torch.ones(2).bool())
    >>> unsure = TeacherUncertainty()(lists)
    >>> [round(x, 3) for x in unsure.tolist()]
    [1.0, 0.002]
    """

    def forward(self, lists: Lists) -> Tensor:
        return lists.entropy()


class AsReleased(Weighting):
    """Weight ``softmax_b((1 - h_b)^2)``, ``h_b = H_b / sum H``: DCD's own, which hardly differ between samples.

    >>> lists = Lists(torch.tensor([[0.0, 0.0], [9.0, 0.0]]), torch.zeros(2, 2), torch.ones(2).bool())
    >>> [round(x, 3) for x in AsReleased()(lists).tolist()]
    [0.27, 0.73]
    """

    def forward(self, lists: Lists) -> Tensor:
        entropy_B = torch.where(lists.valid_B, lists.entropy(), 0.0)
        square_B = (1 - entropy_B / gather(entropy_B).sum().clamp(min=1e-12)).square()
        all_G, valid_G = gather(square_B), gather(lists.valid_B)
        return (square_B - all_G.masked_fill(~valid_G, -torch.inf).logsumexp(dim=0)).exp()


class StudentLag(Weighting):
    """Weight ``1 - exp(- CE(s_b) / CE(t_b))``: more if the student is worse than the teacher (DCD's other weighting).

    >>> lists = Lists(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]), torch.ones(1).bool())
    >>> round(StudentLag()(lists).item(), 4)
    0.9849
    """

    def forward(self, lists: Lists) -> Tensor:
        s_B, t_B = (-x_BK.log_softmax(dim=1)[:, 0] for x_BK in (lists.s_BK.detach(), lists.t_BK))
        return 1 - (-s_B / t_B.clamp(min=1e-6)).exp()


class Imitation(nn.Module):
    """Base of imitation losses: ``imitation(lists)`` -> distance of the student's list from the teacher's, ``[B]``."""

    def forward(self, lists: Lists) -> Tensor:
        raise NotImplementedError


class ListKL(Imitation):
    """KL divergence of the lists, ``T^2 KL(softmax_k(t_b / T), softmax_k(s_b / T))``.

    Args:
        temperature: T.
    """

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"ListKL: temperature {temperature:g}: above 0, such as 1")
        self.temperature = temperature

    def forward(self, lists: Lists) -> Tensor:
        return divergence(lists.s_BK, lists.t_BK, self.temperature)


class ListMSE(Imitation):
    """Mean squared error of the lists, ``mean_k (s_bk - t_bk)^2`` (DCD; its temperature cancels).

    >>> t, s = torch.tensor([[5.0, 3.0]]), torch.tensor([[2.0, 1.0]])
    >>> ListMSE()(Lists(t, s, torch.ones(1).bool())).item()
    6.5
    """

    def forward(self, lists: Lists) -> Tensor:
        return (lists.s_BK - lists.t_BK).square().mean(dim=1)


class CentredListMSE(Imitation):
    """:class:`ListMSE` of scores minus their mean over the list, which a ranking does not fix (our variant).

    >>> t, s = torch.tensor([[5.0, 3.0]]), torch.tensor([[2.0, 1.0]])
    >>> CentredListMSE()(Lists(t, s, torch.ones(1).bool())).item()
    0.25
    """

    def forward(self, lists: Lists) -> Tensor:
        s_BK, t_BK = (x - x.mean(dim=1, keepdim=True) for x in (lists.s_BK, lists.t_BK))
        return (s_BK - t_BK).square().mean(dim=1)


def truth_loss(s_BK: Tensor, form: Literal["binary", "softmax"]) -> Tensor:
    """Compute the loss of choosing the own text, k = 0, for each list, ``[B]``.

    ``binary``: the mean over k of the cross-entropy of sigmoid s_k and whether k = 0 (DCD). ``softmax``:
    ``- log softmax_k s`` at 0 (our variant).

    >>> [round(truth_loss(torch.zeros(1, 4), form).item(), 4) for form in ("binary", "softmax")]  # log 2, log 4
    [0.6931, 1.3863]
    """
    if form == "softmax":
        return -s_BK.log_softmax(dim=1)[:, 0]
    return -F.logsigmoid(torch.cat([s_BK[:, :1], -s_BK[:, 1:]], dim=1)).mean(dim=1)


class RankTarget(Target):
    """DCD: a teacher mines hard negative texts, which the student classifies (``truth``) and ranks (``rank``).

    Texts come from the same rank's batch, never from a sample without the pair or with the same content. A sample with
    fewer than ``kept`` such texts has no list.

    Args:
        pair: the pair of modalities that both networks score.
        drawn: F, texts that the teacher scores for each image; if there are fewer, all of them.
        kept: K - 1, wrong texts of a list.
        mine: keep the texts with the teacher's highest scores, or, with ``random``, the first ones drawn.
        imitation: loss between the lists, by default :class:`ListMSE`. Its weight is ``rank``, and that of the truth
            ``truth`` (the release has 0.2 and 0.8).
        truth_form: form of :func:`truth_loss`: ``binary``, or ``softmax``.
        weigh: weights of samples in ``rank``. weigh_truth: weights of samples in ``truth``.
        sham: ``permute`` for the control: samples get each other's weights.
    """

    #: Warning at the start of a run on several ranks: otherwise the teacher would have to score pairs across them.
    by_rank = "draws its lists of the rows of a rank"

    def __init__(
        self,
        pair: str = "image-text",
        drawn: int = 31,
        kept: int = 7,
        mine: Literal["teacher", "random"] = "teacher",
        imitation: Imitation | None = None,
        rank: float = 1.0,
        truth: float = 1.0,
        truth_form: Literal["binary", "softmax"] = "binary",
        weigh: Weighting | None = None,
        weigh_truth: Weighting | None = None,
        sham: Literal["permute"] | None = None,
    ) -> None:
        super().__init__()
        if not 1 <= kept <= drawn:
            raise ValueError(f"RankTarget: kept {kept} of drawn {drawn}: at least 1, and no more than are drawn")
        self.pair, self.drawn, self.kept, self.mine = pair, drawn, kept, mine
        self.imitation, self.rank, self.truth, self.truth_form = imitation or ListMSE(), rank, truth, truth_form
        self.weigh, self.weigh_truth, self.sham = (
            weigh or UniformWeighting(),
            weigh_truth or UniformWeighting(),
            Sham(sham),
        )

    def build(self, student: nn.Module, teacher: nn.Module) -> Self:
        for who, network in (("the student", student), ("the teacher", teacher)):
            if not has(network, Matches):
                raise ValueError(f"distill: {who}, {type(network).__name__}, scores no pairs; Contrastive does")
            names = tuple(getattr(network, "pairs", ()))
            if self.pair not in names:
                raise ValueError(f"distill: {who} scores no pair {self.pair!r}, only {', '.join(names)}")
        return self

    def forward(self, context: DistillContext) -> dict[str, Term]:
        batch = context.batch
        with torch.no_grad():
            scorer = cast(Matches, context.teacher).scorers(batch)[self.pair]
            column_BK, t_BK, valid_B = self.mine_columns(batch, scorer)
        row_BK = torch.arange(len(batch), device=column_BK.device)[:, None].expand_as(column_BK)
        s_BK = promote(context.output.pairs[self.pair](row_BK.flatten(), column_BK.flatten()).view_as(row_BK))
        lists = Lists(t_BK.detach(), s_BK, valid_B)
        u_B = self.sham(self._weights(self.weigh, lists), batch.rng_seed, valid_B)
        v_B = self.sham(self._weights(self.weigh_truth, lists), batch.rng_seed, valid_B)
        truth_B = truth_loss(lists.s_BK, self.truth_form)
        return {
            "rank": Term(self.rank * self.imitation(lists), weight=u_B, valid=valid_B, norm=context.rows),
            "truth": Term(self.truth * truth_B, weight=v_B, valid=valid_B, norm=context.rows),
        }

    def mine_columns(self, batch: Batch, scorer: Scorer) -> tuple[Tensor, Tensor, Tensor]:
        """Return columns ``[B, K]``, the teacher's scores in the same order, and which samples have a whole list."""
        a, b = self.pair.split("-")
        here_B = batch.both(a, b)
        device, here_B, key_B = batch.device, host_copy(here_B), host_copy(batch.content_id)  # chosen on the CPU
        wrong_BB = here_B[:, None] & here_B & (key_B[:, None] != key_B)
        draw_B = host_copy(batch.rng_seed).numpy()
        turn_BB = torch.from_numpy(mix_N(draw_B[:, None], "list", draw_B[None].astype(np.uint64)))
        turn_BB = turn_BB.masked_fill(~wrong_BB, torch.iinfo(torch.int64).max)
        drawn = min(self.drawn, len(batch) - 1)
        drawn_BF = turn_BB.argsort(dim=1)[:, :drawn]
        real_BF = wrong_BB.gather(1, drawn_BF)
        own_B1 = torch.arange(len(batch))[:, None]
        column_BK = torch.cat([own_B1, drawn_BF], dim=1)
        valid_B = here_B & (real_BF.sum(dim=1) >= self.kept)
        if drawn < self.kept or not valid_B.any():
            column_BK = to_device(own_B1.expand(-1, self.kept + 1), device)
            nobody_B = to_device(torch.zeros_like(here_B), device)
            return column_BK, torch.zeros(column_BK.shape, device=device), nobody_B
        asked_BK = torch.cat([valid_B[:, None], real_BF & valid_B[:, None]], dim=1)
        row_N, k_N = asked_BK.nonzero(as_tuple=True)
        asked = [to_device(x_N, device) for x_N in (row_N, k_N, column_BK[row_N, k_N])]
        t_BK = torch.full(column_BK.shape, -torch.inf, device=device)
        t_BK[asked[0], asked[1]] = scorer(asked[0], asked[2]).to(t_BK)
        own_B1, column_BK, valid_B = (to_device(x, device) for x in (own_B1, column_BK, valid_B))
        if self.mine == "teacher":
            order_BF = t_BK[:, 1:].argsort(dim=1, descending=True, stable=True)
        else:
            order_BF = torch.arange(drawn, device=t_BK.device).expand(len(batch), -1)
        kept_BK = torch.cat([torch.zeros_like(own_B1), 1 + order_BF[:, : self.kept]], dim=1)
        t_BK = torch.where(valid_B[:, None], t_BK.gather(1, kept_BK), 0.0)
        return column_BK.gather(1, kept_BK), t_BK, valid_B

    def _weights(self, weighting: Weighting, lists: Lists) -> Tensor:
        """Scale the weights to mean 1 over the lists of all ranks."""
        w_B = torch.where(lists.valid_B, weighting(lists).detach(), 0.0)
        total, count = gather(w_B).sum(), gather(lists.valid_B).sum()
        return w_B * count / total.clamp(min=1e-12)
