"""Answers that were better than others to the same question are made likelier (GRPO, Dr. GRPO, DAPO, GSPO, CISPO).

Claim: a model that has learned to answer learns more of a verifier that only says right or wrong.

    o_1 ... o_G ~ policy(question)                    Rollouts draws, rewards and judges them, beside the steps
    l_n   = log p(token n | all before it) / temperature               of all answers of the batch, in packed rows
    loss  = PolicyLoss(l, l when drawn, advantage)    "policy", and "kl" to a reference where asked for

Log-probabilities when drawn are those of generation itself: no pass of its own, and none of a reference without a KL.
What the loss divides by is of the whole step and known beforehand, so micro-batches and ranks change nothing.
Source: Shao 2024 (GRPO, arXiv 2402.03300); the losses' own in descant.modules.policy.
Letters: B answers, R of them drawn, N tokens, M tokens of an answer, W width.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from descant.modules.core.batch import Batch
from descant.modules.core.host import derived, host_copy, to_device
from descant.modules.core.objective import Term, counted
from descant.modules.language import Generated, Sampling, log_probabilities
from descant.modules.policy import Counts, PolicyBatch, PolicyLoss
from descant.modules.policy.losses import FAR
from descant.modules.tokenizers.text import EOS, PAD
from descant.recipes.chat import Chat


class Reinforced(Chat):
    """A model that learns of its own answers.

    Args:
        loss: PolicyLoss of Clipped tokens and TokenMean where not given. With a KL ``distill`` names the policy to stay
            near to, with no targets.
        sampling: how answers are drawn; by their probabilities where not given.
        new: most tokens of an answer.

    Raises:
        ValueError: for a temperature of 0, no token, or a KL to nobody; what Chat raises.
    """

    def __init__(
        self, loss: PolicyLoss | None = None, sampling: Sampling | None = None, new: int = 12, **kwargs: object
    ) -> None:
        super().__init__(**kwargs)  # type: ignore[arg-type]  # Chat's own typed arguments
        self.loss, self.sampling, self.new = loss or PolicyLoss(), sampling or Sampling(), new
        if not self.sampling.temperature > 0:
            raise ValueError("sampling.temperature 0: all answers to a question would be the same; such as 1")
        if new < 1:
            raise ValueError(f"new {new}: 1 is the least")
        if self.needs_reference and self.distill is None:
            raise ValueError("loss.kl: to whom? model.distill, with a TeacherRun and no targets, is to stay near to")
        self.train()

    @property
    def needs_reference(self) -> bool:
        return self.loss.kl is not None

    def train(self, mode: bool = True) -> Reinforced:
        super().train(mode)
        self.disable_dropout()
        return self

    # beside the steps ---------------------------------------------------------------------------------------------

    def roll_out(self, batch: Batch, group: int, seed_R: Tensor) -> Generated:
        """``group`` answers to each question; what is no token of an answer ends one, and is not of it."""
        said = self.roll(batch, self.new, group, self.sampling, seed_R, (EOS, PAD, *self.marks.values()))
        last_R1 = (said.length_R - 1).clamp(min=0)[:, None]
        ended_R = said.ended_R & (said.length_R > 0) & (said.token_RN.gather(1, last_R1)[:, 0] == EOS)
        length_R = said.length_R - (said.ended_R & ~ended_R & (said.length_R > 0)).long()
        return said.cut(length_R, ended_R)

    def reference(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities of the answers' tokens under the reference, ``[N]``; whose, and at which place."""
        assert self.distill is not None
        return self.log_of(cast(Chat, self.distill.network.to(self.device)), batch)

    def log_of(self, network: Chat, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        before_NW, token_N, sample_N = network.answered(batch)
        log_N = log_probabilities(before_NW, network.lm.head.weight, token_N, self.sampling.temperature)
        count_B = counted(sample_N, len(batch))
        first_B = count_B.cumsum(dim=0) - count_B
        return log_N, sample_N, torch.arange(len(sample_N), device=sample_N.device) - first_B[sample_N]

    # training -----------------------------------------------------------------------------------------------------

    def terms(self, batch: Batch) -> dict[str, Term]:
        log_N, sample_N, place_N = self.log_of(self, batch)
        its = batch.targets
        old_N, near_N = (its[name][sample_N, place_N].to(log_N) for name in ("old", "reference"))
        valid_B = derived(torch.logical_and, its["live"], batch.present["text"])
        drawn = PolicyBatch(log_N, old_N, sample_N, its["advantage"], valid_B, near_N if self.needs_reference else None)
        terms, seen = self.loss(drawn, Counts(*its["step"][0]))
        self.watch(drawn, seen)
        return terms

    def watch(self, drawn: PolicyBatch, seen: dict[str, Tensor]) -> None:
        """Shares of clipped tokens, and ``moved``: the k3 estimate of KL(when it answered || now)."""
        if self._trainer is None:
            return
        off_N = drawn.log_N.detach() - drawn.old_N
        live_n = to_device(host_copy(drawn.valid_N).nonzero()[:, 0], off_N.device)
        for name, x_N in {**seen, "moved": off_N.clamp(-FAR, FAR).exp() - off_N - 1}.items():
            x_N = x_N[live_n]
            self.log(f"policy/{name}", x_N.mean() if len(x_N) else x_N.new_zeros(()), batch_size=len(drawn.valid_B))
