"""Of two answers to one question the better one is made likelier, beside a model that stands still (DPO).

Claim: preferences alone, without a reward, teach an answering model which of two answers is right.

    l(o)  = sum over tokens t of answer o of  log p(t | all before it)
    gain  = l(better) - l_ref(better)  -  (l(worse) - l_ref(worse))
    loss  = - log sigmoid(beta gain)                                          "preference"

Data: QuestionPairs. Source: Rafailov 2023 (arXiv 2305.18290). Letters: B samples, N tokens of answers, W width.
"""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from descant.modules.core.batch import Batch
from descant.modules.core.host import host_copy, to_device
from descant.modules.core.objective import Term, counted
from descant.modules.language import log_probabilities
from descant.modules.policy import DPO
from descant.recipes.chat import Chat


class Preferred(Chat):
    """A model that learns of pairs of answers.

    Args:
        loss: DPO(beta=0.1) where not given. ``distill`` names the policy to measure by, with no targets.

    Raises:
        ValueError: without a policy to measure by; what Chat raises.
    """

    def __init__(self, loss: DPO | None = None, **kwargs: object) -> None:
        super().__init__(**kwargs)  # type: ignore[arg-type]  # Chat's own typed arguments
        if self.distill is None:
            raise ValueError("Preferred: gains over whom? model.distill, with a TeacherRun and no targets, says it")
        self.loss = loss or DPO()

    def train(self, mode: bool = True) -> Preferred:
        super().train(mode)
        self.disable_dropout()  # as the policy that it is measured by does
        return self

    def terms(self, batch: Batch) -> dict[str, Term]:
        return preference(self, batch, self.loss)


def preference(model: Chat, batch: Batch, loss: DPO) -> dict[str, Term]:
    """The term, and in the log how often the better answer gained more than the worse one.

    Raises:
        ValueError: for data without pairs.
    """
    if "text_neg" not in batch.inputs:
        raise ValueError("pairs of answers are needed, such as those of QuestionPairs")
    worse = replace(
        batch,
        inputs={**batch.inputs, "text": batch.inputs["text_neg"], "loss_mask": batch.inputs["loss_mask_neg"]},
    )
    assert model.distill is not None
    reference = cast(Chat, model.distill.network.to(batch.device))
    with torch.no_grad():
        good_reference_B, bad_reference_B = (whole(reference, view)[0] for view in (batch, worse))
    (good_B, length_B), (bad_B, other_B) = whole(model, batch), whole(model, worse)
    lengths_B2 = torch.stack([length_B, other_B], dim=1) if loss.by_length else None
    value_B = loss(good_B, bad_B, good_reference_B, bad_reference_B, lengths_B2)
    if model._trainer is not None:
        here_b = to_device(host_copy(batch.present["text"]).nonzero()[:, 0], batch.device)
        gain_B = (good_B - good_reference_B - bad_B + bad_reference_B).detach()[here_b]
        right = (gain_B > 0).double().mean() if len(gain_B) else gain_B.new_zeros(())
        model.log("preference/right", right, batch_size=len(batch))
    return {"preference": Term(value_B, valid=batch.present["text"], norm=batch.step["text"].sum().clamp(min=1))}


def whole(network: Chat, batch: Batch) -> tuple[Tensor, Tensor]:
    """``[B]``: the log-probability of each answer, its end included, and of how many tokens it is."""
    before_NW, token_N, sample_N = network.answered(batch)
    log_N = log_probabilities(before_NW, network.lm.head.weight, token_N)
    log_B = log_N.new_zeros(len(batch)).index_add(0, sample_N, log_N)
    return log_B, counted(sample_N, len(batch))
