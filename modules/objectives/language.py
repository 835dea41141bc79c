"""Training objectives of a vision-language model: supervised fine-tuning (SFT), GRPO and DPO.

Letters: B samples, N answer tokens, W width.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from descant.modules.core.batch import Batch
from descant.modules.core.host import derive, host_copy, to_device
from descant.modules.core.objective import Term, count_rows_by_sample, means
from descant.modules.core.output import Output
from descant.modules.language import CausalLM, Sampling, log_probabilities
from descant.modules.moe import Routing
from descant.modules.policy import Counts, DPOLoss, PolicyBatch, PolicyLoss
from descant.modules.policy.losses import FAR


class AnswerModel(Protocol):
    """Model interface that objectives need: hidden states before answer tokens, and the language model's head."""

    lm: CausalLM
    sampling: Sampling

    @property
    def active_distillation(self) -> Any: ...

    def hidden_before_answers(
        self, batch: Batch, routings: list[Routing] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]: ...

    def expert_terms(self, routings: list[Routing]) -> dict[str, Term]: ...

    def decisions(self, before_NW: Tensor, sample_N: Tensor) -> Any: ...

    def record(self, name: str, value: Tensor, rows: int) -> None: ...


class LanguageObjective:
    """Training objective of a vision-language model on a batch of token rows: ``objective(model, batch) -> Output``."""

    #: Whether the model runs without dropout, so that log-probabilities are comparable between forward passes.
    deterministic = False

    @property
    def needs_reference(self) -> bool:
        """Whether it compares the model with a reference, set by ``model.distill``."""
        return False

    def require(self, model: AnswerModel) -> None:
        """Raise ValueError for a model that it cannot train."""

    def __call__(self, model: AnswerModel, batch: Batch) -> Output:
        raise NotImplementedError


class SFT(LanguageObjective):
    """Supervised fine-tuning: mean negative log-likelihood of each sample's answer tokens; one term, "answer".

        loss_b = - mean_t log p(token_bt | all before it)

    Every answer has the same weight, whatever its length, so gradients do not depend on how a step is divided. If the
    language model has experts, their load balancing is an auxiliary term.
    """

    def __call__(self, model: AnswerModel, batch: Batch) -> Output:
        routings: list[Routing] = []
        before_NW, token_N, sample_N = model.hidden_before_answers(batch, routings)
        log_N = log_probabilities(before_NW, model.lm.head.weight, token_N)
        value_B, valid_B = means(-log_N, sample_N, len(batch))
        term = Term(value_B, valid=valid_B, norm=batch.step["text"].sum().clamp(min=1))
        aux = model.expert_terms(routings)
        return Output({"answer": term}, decisions=lambda: model.decisions(before_NW, sample_N), aux=aux)


class GRPO(LanguageObjective):
    """Policy-gradient objective of sampled answers (GRPO, Dr. GRPO, DAPO, GSPO, CISPO); terms "policy" and "kl".

        l_n  = log p(token n | all before it) / temperature
        loss = PolicyLoss(l, l at sampling time, advantage)

    Generation provides the log-probabilities at sampling time, so they need no further pass. A reference runs only for
    a KL term. The divisors of the loss belong to the whole step and are known before it, so micro-batches and ranks
    change nothing. The callback Rollouts samples, rewards and scores the answers. Source: Shao 2024 (GRPO, arXiv
    2402.03300); for the others see descant.modules.policy.

    Args:
        loss: by default a PolicyLoss with Clipped tokens and TokenMean.
    """

    deterministic = True

    def __init__(self, loss: PolicyLoss | None = None) -> None:
        self.loss = loss or PolicyLoss()

    @property
    def needs_reference(self) -> bool:
        return self.loss.kl is not None

    def require(self, model: AnswerModel) -> None:
        if not model.sampling.temperature > 0:
            raise ValueError("sampling.temperature 0: all answers to a question would be the same; such as 1")
        if self.needs_reference and model.active_distillation is None:
            raise ValueError(
                "GRPO: loss.kl needs a reference policy: set model.distill to a TeacherRun without targets"
            )

    def __call__(self, model: AnswerModel, batch: Batch) -> Output:
        log_N, sample_N, place_N = answer_log_probabilities(model, batch, model.sampling.temperature)
        targets = batch.targets
        old_N, reference_N = (targets[name][sample_N, place_N].to(log_N) for name in ("old", "reference"))
        valid_B = derive(torch.logical_and, targets["live"], batch.present["text"])
        reference = reference_N if self.needs_reference else None
        answers = PolicyBatch(log_N, old_N, sample_N, targets["advantage"], valid_B, reference)
        terms, shares = self.loss(answers, Counts(*targets["step"][0]))
        self._record(model, answers, shares)
        return Output(terms)

    def _record(self, model: AnswerModel, answers: PolicyBatch, shares: dict[str, Tensor]) -> None:
        """Log shares of clipped tokens, and ``moved``: the k3 estimate of KL(policy at sampling time || now)."""
        off_N = answers.log_N.detach() - answers.old_N
        valid_n = to_device(host_copy(answers.valid_N).nonzero()[:, 0], off_N.device)
        for name, x_N in {**shares, "moved": off_N.clamp(-FAR, FAR).exp() - off_N - 1}.items():
            x_n = x_N[valid_n]
            model.record(f"policy/{name}", x_n.mean() if len(x_n) else x_n.new_zeros(()), len(answers.valid_B))


class DPO(LanguageObjective):
    """Direct preference optimization of pairs of answers against a reference policy; one term, "preference".

        gain = l(chosen) - l_ref(chosen) - (l(rejected) - l_ref(rejected)),    l(o) = sum_t log p(t | all before it)
        loss = - log sigmoid(beta gain)

    Data: QuestionPairs. Source: Rafailov 2023, arXiv 2305.18290.

    Args:
        beta: a smaller value lets the policy move farther from its reference.
        by_length: whether to divide each answer's gain by its number of tokens.
    """

    deterministic = True
    needs_reference = True

    def __init__(self, beta: float = 0.1, by_length: bool = False) -> None:
        self.loss = DPOLoss(beta, by_length)

    def require(self, model: AnswerModel) -> None:
        if model.active_distillation is None:
            raise ValueError("DPO needs a reference policy: set model.distill to a TeacherRun without targets")

    def __call__(self, model: AnswerModel, batch: Batch) -> Output:
        if "text_neg" not in batch.inputs:
            raise ValueError("DPO: the data has no pairs of answers; QuestionPairs has")
        inputs = {**batch.inputs, "text": batch.inputs["text_neg"], "loss_mask": batch.inputs["loss_mask_neg"]}
        rejected = replace(batch, inputs=inputs)
        reference = model.active_distillation.network.to(batch.device)
        with torch.no_grad():
            good_reference_B, bad_reference_B = (_score_answers(reference, view)[0] for view in (batch, rejected))
        (good_B, length_B), (bad_B, other_B) = _score_answers(model, batch), _score_answers(model, rejected)
        lengths_B2 = torch.stack([length_B, other_B], dim=1) if self.loss.by_length else None
        value_B = self.loss(good_B, bad_B, good_reference_B, bad_reference_B, lengths_B2)
        here_b = to_device(host_copy(batch.present["text"]).nonzero()[:, 0], batch.device)
        gain_b = (good_B - good_reference_B - bad_B + bad_reference_B).detach()[here_b]
        correct = (gain_b > 0).double().mean() if len(gain_b) else gain_b.new_zeros(())
        model.record("preference/right", correct, len(batch))
        norm = batch.step["text"].sum().clamp(min=1)
        return Output({"preference": Term(value_B, valid=batch.present["text"], norm=norm)})


def answer_log_probabilities(
    model: AnswerModel | nn.Module, batch: Batch, temperature: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute log-probabilities ``[N]`` of answer tokens; also return each token's sample and place in its answer."""
    network: Any = model
    before_NW, token_N, sample_N = network.hidden_before_answers(batch)
    log_N = log_probabilities(before_NW, network.lm.head.weight, token_N, temperature)
    count_B = count_rows_by_sample(sample_N, len(batch))
    first_B = count_B.cumsum(dim=0) - count_B
    return log_N, sample_N, torch.arange(len(sample_N), device=sample_N.device) - first_B[sample_N]


def _score_answers(network: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the log-probability of each answer, including its end, and its number of tokens, ``[B]`` each."""
    before_NW, token_N, sample_N = network.hidden_before_answers(batch)
    log_N = log_probabilities(before_NW, network.lm.head.weight, token_N)
    log_B = log_N.new_zeros(len(batch)).index_add(0, sample_N, log_N)
    return log_B, count_rows_by_sample(sample_N, len(batch))
