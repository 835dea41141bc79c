"""Policy-gradient losses on sampled answers: GRPO, Dr. GRPO, DAPO, BNPO, GSPO, CISPO.

    w_n  = exp(l_n - l_n at sampling)                 probability ratio of a token, or of its whole answer
    L_n  = - min(w A, clip(w, 1 - low, 1 + high) A)   by token, A of its answer
    loss = an aggregation of L over the answers of the whole step

GRPO, Dr. GRPO, DAPO and BNPO are one loss with the aggregation SequenceMean, SequenceSum, TokenMean and LocalTokenMean.
GSPO is SequenceMean of the AnswerRatio, CISPO a surrogate. Counts cover the whole step, over ranks and micro-batches,
so that gradients do not depend on how it is split; BNPO's do, by design. Letters: N tokens of answers, B answers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from descant.modules.core.batch import select_rows
from descant.modules.core.errors import require_value
from descant.modules.core.objective import Term, count_rows_by_sample, means

#: Bound of log-ratios (as in verl).
FAR = 20.0


class PolicyBatch(NamedTuple):
    """Sampled answers and their log-probabilities under the policy.

    Attributes:
        log_N: log-probability of each token, with gradient. old_N: the same at sampling.
        sample_N: int64, the answer of each token. advantage_B: advantage of each answer.
        valid_B: answers that count; others, such as flat or truncated ones, are in no count.
        reference_N: log-probabilities under a reference policy, if there is one.
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
        return select_rows(self.valid_B, self.sample_N)

    @property
    def length_B(self) -> Tensor:
        return count_rows_by_sample(self.sample_N, len(self.valid_B))


class Counts(NamedTuple):
    """Valid answers with a token, and their tokens, in the whole step, over ranks and micro-batches."""

    answers: Tensor
    tokens: Tensor

    @classmethod
    def of(cls, length_B: Tensor, valid_B: Tensor) -> Counts:
        """Count only these answers; the caller sums over ranks and micro-batches.

        >>> [int(x) for x in Counts.of(torch.tensor([3, 0, 2]), torch.tensor([True, True, False]))]
        [1, 3]
        """
        return cls((valid_B & (length_B > 0)).sum(), (length_B * valid_B).sum())


class Ratio:
    """Base of probability ratios: ``ratio(batch)`` -> ``log w_N``, with gradient."""

    def __call__(self, batch: PolicyBatch) -> Tensor:
        raise NotImplementedError


class TokenRatio(Ratio):
    """Token-level ratio ``log w_n = l_n - l_n at sampling`` (PPO, GRPO), clamped to -20..20."""

    def __call__(self, batch: PolicyBatch) -> Tensor:
        return (batch.log_N - batch.old_N).clamp(-FAR, FAR)


class AnswerRatio(Ratio):
    """Sequence-level ratio of GSPO: ``log w_n = mean over the tokens of its answer of (l - l at sampling)``.

    Source: Zheng 2025, arXiv 2507.18071, whose clip bounds are 3e-4 and 4e-4.
    """

    def __call__(self, batch: PolicyBatch) -> Tensor:
        mean_B, _ = means(batch.log_N - batch.old_N, batch.sample_N, len(batch.valid_B))
        return mean_B.clamp(-FAR, FAR)[batch.sample_N]


class Surrogate:
    """Base of surrogate losses: ``surrogate(batch)`` -> ``L_N``, and named ``[N]`` to log, such as clipped tokens."""

    def __init__(self, ratio: Ratio | None = None) -> None:
        self.ratio = ratio or TokenRatio()

    def __call__(self, batch: PolicyBatch) -> tuple[Tensor, dict[str, Tensor]]:
        raise NotImplementedError


class Clipped(Surrogate):
    """PPO's clipped surrogate: ``L = - min(min(w, cap) A, clip(w, 1 - low, 1 + high) A)``, at most ``- dual A`` for A <
    0.

    Source: Schulman 2017, arXiv 1707.06347; a higher ``high`` is DAPO's clip-higher (Yu 2025, arXiv 2503.14476: 0.28),
    ``cap`` two-sided clipping (INTELLECT-2, arXiv 2505.07291), ``dual`` dual-clip PPO (Ye 2020, arXiv 1912.09729: 3).

    Args:
        low, high: clip range of w, below and above 1.
        ratio: TokenRatio by default; AnswerRatio is GSPO.
        cap: bound of the unclipped w. dual: bound of the loss of bad answers.

    >>> batch = PolicyBatch(torch.tensor([1.5, 1.5]).log(), torch.zeros(2), torch.tensor([0, 1]),
    ...     torch.tensor([1.0, -1.0]), torch.tensor([True, True]))
    >>> [round(x, 2) for x in Clipped()(batch)[0].tolist()]
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
            raise ValueError(f"Clipped: low {low:g} and high {high:g}: 0 to 1, and 0 or more, such as 0.2 and 0.28")
        if cap is not None and not cap > 1 + high:
            raise ValueError(f"Clipped: cap {cap:g}: above 1 + high, which is {1 + high:g}")
        if dual is not None and not dual > 1:
            raise ValueError(f"Clipped: dual {dual:g}: above 1, such as 3")
        self.low, self.high, self.cap, self.dual = low, high, cap, dual

    def __call__(self, batch: PolicyBatch) -> tuple[Tensor, dict[str, Tensor]]:
        w_N, a_N = self.ratio(batch).exp(), batch.advantage_N
        free_N = w_N if self.cap is None else w_N.clamp(max=self.cap)
        value_N = -torch.minimum(free_N * a_N, w_N.clamp(1 - self.low, 1 + self.high) * a_N)
        if self.dual is not None:
            value_N = torch.where(a_N < 0, torch.minimum(value_N, -self.dual * a_N), value_N)
        w_N = w_N.detach()
        low_N, high_N = (w_N < 1 - self.low) & (a_N < 0), (w_N > 1 + self.high) & (a_N > 0)
        return value_N, {"clipped_low": low_N.to(w_N), "clipped_high": high_N.to(w_N)}


class CISPO(Surrogate):
    """CISPO, ``L = - min(w, high) A l`` with a stopped gradient of w: no token is clipped away (MiniMax-M1, arXiv
    2506.13585).

    Args:
        high: bound of w, about 5 in public trainers. ratio: TokenRatio by default.
    """

    def __init__(self, high: float = 5.0, ratio: Ratio | None = None) -> None:
        super().__init__(ratio)
        require_value(high > 0, f"CISPO: high {high:g}: above 0, such as 5")
        self.high = high

    def __call__(self, batch: PolicyBatch) -> tuple[Tensor, dict[str, Tensor]]:
        w_N, a_N = self.ratio(batch).exp().detach(), batch.advantage_N
        value_N = -w_N.clamp(max=self.high) * a_N * batch.log_N
        return value_N, {"clipped_high": ((w_N > self.high) & (a_N > 0)).to(w_N)}


class KL:
    """KL penalty to a reference policy, the k3 estimator: ``beta (exp(d) - d - 1)``, ``d = l of the reference - l``.

    With ``corrected`` it is multiplied by w, so that its gradient is that of the divergence. This also matters on
    policy, where w is 1 but its gradient is not 0; public trainers differ. Source: Schulman 2020, "Approximating KL
    divergence"; correction as in DeepSeek-V3.2.

    Args:
        beta: weight. corrected: multiply by w. ratio: TokenRatio by default.
    """

    def __init__(self, beta: float, corrected: bool = True, ratio: Ratio | None = None) -> None:
        require_value(beta > 0, f"KL: beta {beta:g}: above 0; to train without a KL penalty leave kl out")
        self.beta, self.corrected, self.ratio = beta, corrected, ratio or TokenRatio()

    def __call__(self, batch: PolicyBatch) -> Tensor:
        if batch.reference_N is None:
            raise ValueError("KL: the batch has no log-probabilities of a reference")
        d_N = (batch.reference_N - batch.log_N).clamp(-FAR, FAR)
        value_N = d_N.exp() - d_N - 1
        return self.beta * (value_N * self.ratio(batch).exp() if self.corrected else value_N)


class Aggregation:
    """Base of aggregations, from token losses to a term: ``aggregation(value_N, batch, counts)``."""

    def __call__(self, value_N: Tensor, batch: PolicyBatch, counts: Counts) -> Term:
        raise NotImplementedError


class SequenceMean(Aggregation):
    """GRPO's aggregation, ``mean_b mean_t L``: every answer has equal weight, tokens of long ones less."""

    def __call__(self, value_N: Tensor, batch: PolicyBatch, counts: Counts) -> Term:
        value_B, some_B = means(value_N, batch.sample_N, len(batch.valid_B))
        return Term(value_B, valid=batch.valid_B & some_B, norm=counts.answers.clamp(min=1))


class SequenceSum(Aggregation):
    """Dr. GRPO's aggregation, ``sum_n L / (answers length)``, with a constant length (Liu 2025, arXiv 2503.20783).

    Args:
        length: usually the maximum tokens of an answer.
    """

    def __init__(self, length: int) -> None:
        require_value(length >= 1, f"SequenceSum: length {length}: at least 1; usually the maximum tokens of an answer")
        self.length = length

    def __call__(self, value_N: Tensor, batch: PolicyBatch, counts: Counts) -> Term:
        value_B = sum_by_answer(value_N, batch) / self.length
        return Term(value_B, valid=batch.valid_B, norm=counts.answers.clamp(min=1))


class TokenMean(Aggregation):
    """DAPO's aggregation, ``sum_n L / tokens``: every token of the step has equal weight."""

    def __call__(self, value_N: Tensor, batch: PolicyBatch, counts: Counts) -> Term:
        return Term(sum_by_answer(value_N, batch), valid=batch.valid_B, norm=counts.tokens.clamp(min=1))


class LocalTokenMean(Aggregation):
    """BNPO's aggregation: mean over the tokens of a micro-batch, so it depends on how a step is split."""

    def __call__(self, value_N: Tensor, batch: PolicyBatch, counts: Counts) -> Term:
        return Term(value_N, valid=batch.valid_N, norm="local")


def sum_by_answer(value_N: Tensor, batch: PolicyBatch) -> Tensor:
    """Sum over the tokens of each answer, ``[B]``."""
    return value_N.new_zeros(len(batch.valid_B)).index_add(0, batch.sample_N, value_N)


class PolicyLoss(nn.Module):
    """Policy loss: terms "policy" and, with a reference, "kl", and values to log by token.

    Args:
        surrogate: loss of each token; Clipped by default.
        aggregation: aggregation of token losses; TokenMean (DAPO) by default.
        kl: penalty on the distance to a reference policy.
    """

    def __init__(
        self, surrogate: Surrogate | None = None, aggregation: Aggregation | None = None, kl: KL | None = None
    ) -> None:
        super().__init__()
        self.surrogate, self.aggregation, self.kl = surrogate or Clipped(), aggregation or TokenMean(), kl

    def forward(self, batch: PolicyBatch, counts: Counts) -> tuple[dict[str, Term], dict[str, Tensor]]:
        value_N, logs = self.surrogate(batch)
        terms = {"policy": self.aggregation(value_N, batch, counts)}
        if self.kl is not None:
            kl_N = self.kl(batch)
            terms["kl"] = self.aggregation(kl_N, batch, counts)
            logs["kl"] = kl_N.detach() / self.kl.beta
        return terms, logs
