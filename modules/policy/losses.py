"""Policy losses: what makes answers likelier that were better than others of their prompt.

    w_n  = exp(l_n - l_n at the draw)                 how much likelier a token has become; or its answer as a whole
    L_n  = - min(w A, clip(w, 1 - low, 1 + high) A)   token by token, A of its answer
    loss = an aggregation of L over the answers of the whole step

Four names are one loss under four aggregations: GRPO is SequenceMean, Dr. GRPO SequenceSum, DAPO TokenMean, BNPO
LocalTokenMean. GSPO is SequenceMean of the AnswerRatio. Counts are of the whole step, over ranks and micro-batches, so
gradients are the same however a step is cut; BNPO's are not, on purpose.
Letters: N tokens of answers, B answers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from descant.modules.core.batch import chosen
from descant.modules.core.objective import Term, counted, means

#: Of log-ratios: beyond it an exponential says nothing more (as in verl).
FAR = 20.0


class PolicyBatch(NamedTuple):
    """Answers as they were drawn, and what the policy thinks of them now.

    Attributes:
        log_N: log-probability of each token, with its gradient. old_N: the same when it was drawn.
        sample_N: int64, whose token it is. advantage_B: of each answer.
        live_B: which answers count: those that are left out, such as of flat groups or cut off, are in no count.
        reference_N: log-probabilities under a policy to stay near to, if there is one.
    """

    log_N: Tensor
    old_N: Tensor
    sample_N: Tensor
    advantage_B: Tensor
    valid_B: Tensor
    reference_N: Tensor | None = None

    @property
    def advantage_N(self) -> Tensor:
        return self.advantage_B.to(self.log_N.dtype)[self.sample_N]

    @property
    def valid_N(self) -> Tensor:
        return chosen(self.valid_B, self.sample_N)

    @property
    def length_B(self) -> Tensor:
        return counted(self.sample_N, len(self.valid_B))


class Counts(NamedTuple):
    """Live answers with a token and their tokens, in the whole step, over ranks and micro-batches."""

    answers: Tensor
    tokens: Tensor

    @classmethod
    def of(cls, length_B: Tensor, valid_B: Tensor) -> Counts:
        """Of these alone; those of ranks and micro-batches are added up by whoever knows them.

        >>> [int(x) for x in Counts.of(torch.tensor([3, 0, 2]), torch.tensor([True, True, False]))]
        [1, 3]
        """
        return cls((valid_B & (length_B > 0)).sum(), (length_B * valid_B).sum())


# how much likelier ----------------------------------------------------------------------------------------------------


class Ratio:
    """``ratio(drawn)`` -> ``log w_N``, with its gradient."""

    def __call__(self, drawn: PolicyBatch) -> Tensor:
        raise NotImplementedError


class TokenRatio(Ratio):
    """``log w_n = l_n - l_n at the draw``, at most 20 either way."""

    def __call__(self, drawn: PolicyBatch) -> Tensor:
        return (drawn.log_N - drawn.old_N).clamp(-FAR, FAR)


class AnswerRatio(Ratio):
    """``log w_n = mean over the tokens of its answer of (l - l at the draw)``: an answer is clipped as a whole (GSPO).

    Source: Zheng 2025, arXiv 2507.18071, whose bounds are 3e-4 and 4e-4.
    """

    def __call__(self, drawn: PolicyBatch) -> Tensor:
        mean_B, _ = means(drawn.log_N - drawn.old_N, drawn.sample_N, len(drawn.valid_B))
        return mean_B.clamp(-FAR, FAR)[drawn.sample_N]


# what each token costs ------------------------------------------------------------------------------------------------


class Surrogate:
    """``surrogate(drawn)`` -> ``L_N``, and named float ``[N]`` to look at, such as which tokens were clipped."""

    def __init__(self, ratio: Ratio | None = None) -> None:
        self.ratio = ratio or TokenRatio()

    def __call__(self, drawn: PolicyBatch) -> tuple[Tensor, dict[str, Tensor]]:
        raise NotImplementedError


class Clipped(Surrogate):
    """``L = - min(min(w, cap) A, clip(w, 1 - low, 1 + high) A)``, and for A < 0 at most ``- dual A``.

    Source: PPO (Schulman 2017, arXiv 1707.06347); a higher ``high`` is DAPO's (Yu 2025, arXiv 2503.14476: 0.28),
    ``cap`` the two-sided clip (INTELLECT-2, arXiv 2505.07291), ``dual`` that of Ye 2020, arXiv 1912.09729 (there 3).

    Args:
        low, high: how far w may go below and above 1.
        ratio: of tokens where not given; AnswerRatio is GSPO.
        cap: of the w that is not clipped. dual: a bound of what bad answers cost.

    Raises:
        ValueError: for a bound that leaves nothing.

    >>> drawn = PolicyBatch(torch.tensor([1.5, 1.5]).log(), torch.zeros(2), torch.tensor([0, 1]),
    ...     torch.tensor([1.0, -1.0]), torch.tensor([True, True]))
    >>> [round(x, 2) for x in Clipped()(drawn)[0].tolist()]
    [-1.2, 1.5]
    """

    def __init__(
        self,
        low: float = 0.2,
        high: float = 0.2,
        ratio: Ratio | None = None,
        cap: float | None = None,
        dual: float | None = None,
    ) -> None:
        super().__init__(ratio)
        if not 0 <= low <= 1 or not high >= 0:
            raise ValueError(
                f"Clipped: low {low:g} and high {high:g}: from 0 to 1, and 0 or more, such as 0.2 and 0.28"
            )
        if cap is not None and not cap > 1 + high:
            raise ValueError(f"Clipped: cap {cap:g}: above 1 + high, which is {1 + high:g}")
        if dual is not None and not dual > 1:
            raise ValueError(f"Clipped: dual {dual:g}: above 1, such as 3")
        self.low, self.high, self.cap, self.dual = low, high, cap, dual

    def __call__(self, drawn: PolicyBatch) -> tuple[Tensor, dict[str, Tensor]]:
        w_N, a_N = self.ratio(drawn).exp(), drawn.advantage_N
        free_N = w_N if self.cap is None else w_N.clamp(max=self.cap)
        value_N = -torch.minimum(free_N * a_N, w_N.clamp(1 - self.low, 1 + self.high) * a_N)
        if self.dual is not None:
            value_N = torch.where(a_N < 0, torch.minimum(value_N, -self.dual * a_N), value_N)
        w_N = w_N.detach()
        low_N, high_N = (w_N < 1 - self.low) & (a_N < 0), (w_N > 1 + self.high) & (a_N > 0)
        return value_N, {"clipped_low": low_N.to(w_N), "clipped_high": high_N.to(w_N)}


class CISPO(Surrogate):
    """``L = - min(w, high) A l`` with no gradient through w: no token is left out, and none counts for too much.

    Source: MiniMax-M1, arXiv 2506.13585; the bound of public trainers, about 5.

    Args:
        high: bound of w. ratio: of tokens where not given.

    Raises:
        ValueError: for a bound not above 0.
    """

    def __init__(self, high: float = 5.0, ratio: Ratio | None = None) -> None:
        super().__init__(ratio)
        if not high > 0:
            raise ValueError(f"CISPO: high {high:g}: above 0, such as 5")
        self.high = high

    def __call__(self, drawn: PolicyBatch) -> tuple[Tensor, dict[str, Tensor]]:
        w_N, a_N = self.ratio(drawn).exp().detach(), drawn.advantage_N
        value_N = -w_N.clamp(max=self.high) * a_N * drawn.log_N
        return value_N, {"clipped_high": ((w_N > self.high) & (a_N > 0)).to(w_N)}


class KL:
    """``beta (exp(d) - d - 1)``, ``d = l of the reference - l``: an estimate that is never below zero (k3).

    With ``corrected`` times w, so that its gradient is that of the divergence, on policy too: w is 1 there, and its
    gradient is not 0. Public trainers differ in it. Source: Schulman 2020, "Approximating KL divergence"; the
    correction as in DeepSeek-V3.2.

    Args:
        beta: its weight. corrected: by w. ratio: of tokens where not given.

    Raises:
        ValueError: for a beta not above 0.
    """

    def __init__(self, beta: float, corrected: bool = True, ratio: Ratio | None = None) -> None:
        if not beta > 0:
            raise ValueError(f"KL: beta {beta:g}: above 0; without a KL a reference is not needed at all")
        self.beta, self.corrected, self.ratio = beta, corrected, ratio or TokenRatio()

    def __call__(self, drawn: PolicyBatch) -> Tensor:
        if drawn.reference_N is None:
            raise ValueError("KL: no log-probabilities of a reference")
        d_N = (drawn.reference_N - drawn.log_N).clamp(-FAR, FAR)
        value_N = d_N.exp() - d_N - 1
        return self.beta * (value_N * self.ratio(drawn).exp() if self.corrected else value_N)


# what tokens are divided by -------------------------------------------------------------------------------------------


class Aggregation:
    """``aggregation(value_N, drawn, counts)``: from what each token costs to a term."""

    def __call__(self, value_N: Tensor, drawn: PolicyBatch, counts: Counts) -> Term:
        raise NotImplementedError


class SequenceMean(Aggregation):
    """Every answer counts alike (GRPO): ``mean_b mean_t L``; a token of a long one counts less."""

    def __call__(self, value_N: Tensor, drawn: PolicyBatch, counts: Counts) -> Term:
        value_B, some_B = means(value_N, drawn.sample_N, len(drawn.valid_B))
        return Term(value_B, valid=drawn.valid_B & some_B, norm=counts.answers.clamp(min=1))


class SequenceSum(Aggregation):
    """``sum_n L / (answers length)``, with a constant length (Dr. GRPO: Liu 2025, arXiv 2503.20783).

    Args:
        length: usually the most tokens that an answer may have.

    Raises:
        ValueError: for a length below 1.
    """

    def __init__(self, length: int) -> None:
        if length < 1:
            raise ValueError(f"SequenceSum: length {length}: 1 is the least; usually the most tokens of an answer")
        self.length = length

    def __call__(self, value_N: Tensor, drawn: PolicyBatch, counts: Counts) -> Term:
        value_B = added(value_N, drawn) / self.length
        return Term(value_B, valid=drawn.valid_B, norm=counts.answers.clamp(min=1))


class TokenMean(Aggregation):
    """Every token of the step counts alike (DAPO): ``sum_n L / tokens``."""

    def __call__(self, value_N: Tensor, drawn: PolicyBatch, counts: Counts) -> Term:
        return Term(added(value_N, drawn), valid=drawn.valid_B, norm=counts.tokens.clamp(min=1))


class LocalTokenMean(Aggregation):
    """Every token of a micro-batch counts alike, and every micro-batch (BNPO): it depends on how a step is cut."""

    def __call__(self, value_N: Tensor, drawn: PolicyBatch, counts: Counts) -> Term:
        return Term(value_N, valid=drawn.valid_N, norm="local")


def added(value_N: Tensor, drawn: PolicyBatch) -> Tensor:
    """``[B]``: what the tokens of each answer cost."""
    return value_N.new_zeros(len(drawn.valid_B)).index_add(0, drawn.sample_N, value_N)


class PolicyLoss(nn.Module):
    """Terms "policy" and, with a reference, "kl"; and what to look at, per token.

    Args:
        surrogate: what each token costs; Clipped where not given.
        aggregation: what is divided by what; TokenMean where not given.
        kl: stay near to a reference.
    """

    def __init__(
        self, surrogate: Surrogate | None = None, aggregation: Aggregation | None = None, kl: KL | None = None
    ) -> None:
        super().__init__()
        self.surrogate, self.aggregation, self.kl = surrogate or Clipped(), aggregation or TokenMean(), kl

    def forward(self, drawn: PolicyBatch, counts: Counts) -> tuple[dict[str, Term], dict[str, Tensor]]:
        value_N, seen = self.surrogate(drawn)
        terms = {"policy": self.aggregation(value_N, drawn, counts)}
        if self.kl is not None:
            kl_N = self.kl(drawn)
            terms["kl"] = self.aggregation(kl_N, drawn, counts)
            seen["kl"] = kl_N.detach() / self.kl.beta
        return terms, seen
