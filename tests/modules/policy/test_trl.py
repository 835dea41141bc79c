"""The same tensors through TRL's own loss. Letters: N tokens, B answers, T places of a padded row."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from descant.modules.policy import (
    CISPO,
    KL,
    AnswerRatio,
    Clipped,
    Counts,
    LocalTokenMean,
    PolicyBatch,
    PolicyLoss,
    SequenceMean,
    SequenceSum,
    TokenMean,
)
from tests.tolerance import F64, ulps

LENGTHS, LONGEST = (4, 1, 6, 3, 5, 2), 8

CASES: dict[str, tuple[Callable[[], PolicyLoss], dict[str, Any]]] = {
    "grpo": (lambda: PolicyLoss(Clipped(), SequenceMean()), {}),
    "dr_grpo": (lambda: PolicyLoss(Clipped(), SequenceSum(LONGEST)), {"loss_type": "dr_grpo"}),
    "bnpo": (lambda: PolicyLoss(Clipped(), LocalTokenMean()), {"loss_type": "bnpo"}),
    "dapo": (lambda: PolicyLoss(Clipped(0.2, 0.28), TokenMean()), {"loss_type": "dapo", "epsilon_high": 0.28}),
    "two-sided": (lambda: PolicyLoss(Clipped(cap=1.4), SequenceMean()), {"delta": 1.4}),
    "gspo": (
        lambda: PolicyLoss(Clipped(0.03, 0.04, AnswerRatio()), SequenceMean()),
        {"level": "sequence", "epsilon_low": 0.03, "epsilon_high": 0.04},
    ),
    "cispo": (lambda: PolicyLoss(CISPO(1.3), TokenMean()), {"loss_type": "cispo", "epsilon_high": 1.3}),
    "kl": (
        lambda: PolicyLoss(Clipped(), SequenceMean(), KL(0.04, corrected=False)),
        {"beta": 0.04, "corrected": False},
    ),
    "kl-corrected": (lambda: PolicyLoss(Clipped(), TokenMean(), KL(0.04)), {"loss_type": "dapo", "beta": 0.04}),
    "gspo-kl": (
        lambda: PolicyLoss(Clipped(ratio=AnswerRatio()), SequenceMean(), KL(0.1, ratio=AnswerRatio())),
        {"level": "sequence", "beta": 0.1},
    ),
}


def theirs(
    log_BT: Tensor, old_BT: Tensor, reference_BT: Tensor, mask_BT: Tensor, a_B: Tensor, options: dict[str, Any]
) -> Tensor:
    trainer = pytest.importorskip("trl.trainer.grpo_trainer")
    self = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *a, **k: (log_BT, torch.zeros_like(log_BT), None),
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level=options.get("level", "token"),
        beta=options.get("beta", 0.0),
        loss_type=options.get("loss_type", "grpo"),
        epsilon_low=options.get("epsilon_low", 0.2),
        epsilon_high=options.get("epsilon_high", 0.2),
        max_completion_length=LONGEST,
        use_vllm=False,
        _entropy_bonus_enabled=False,
        model=SimpleNamespace(training=True),
        current_gradient_accumulation_steps=1,
        accelerator=SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x),
        args=SimpleNamespace(
            delta=options.get("delta"), use_bias_correction_kl=options.get("corrected", True), steps_per_generation=1
        ),
        _metrics={"train": defaultdict(list)},
    )
    ids = torch.zeros_like(mask_BT)
    inputs = {
        "prompt_ids": ids,
        "prompt_mask": ids,
        "completion_ids": ids,
        "completion_mask": mask_BT,
        "advantages": a_B,
    }
    inputs |= {"old_per_token_logps": old_BT, "ref_per_token_logps": reference_BT, "num_items_in_batch": mask_BT.sum()}
    loss: Tensor = trainer.GRPOTrainer._compute_loss(self, None, inputs)
    return loss


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_value_and_gradient_are_those_of_trl(case: str) -> None:
    make, options = CASES[case]
    for seed in range(5):
        g = torch.Generator().manual_seed(seed)
        B = len(LENGTHS)
        mask_BT = (torch.arange(LONGEST) < torch.tensor(LENGTHS)[:, None]).long()
        shape = (B, LONGEST)
        log_BT = (-3 * torch.rand(shape, generator=g, dtype=torch.float64)).requires_grad_()
        old_BT = log_BT.detach() + 0.3 * torch.randn(shape, generator=g, dtype=torch.float64)
        reference_BT = log_BT.detach() + 0.5 * torch.randn(shape, generator=g, dtype=torch.float64)
        a_B = torch.randn(B, generator=g, dtype=torch.float64)
        wanted = theirs(log_BT, old_BT, reference_BT, mask_BT, a_B, options)
        here = mask_BT.bool()
        drawn = PolicyBatch(
            log_BT[here],
            old_BT[here],
            torch.repeat_interleave(torch.arange(B), torch.tensor(LENGTHS)),
            a_B,
            torch.ones(B, dtype=torch.bool),
            reference_BT[here],
        )
        terms, _ = make()(drawn, Counts.of(drawn.length_B, drawn.valid_B))
        norms = {n: t.count() if isinstance(t.norm, str) else t.norm for n, t in terms.items()}
        found = sum((t.sum() / norms[n] for n, t in terms.items()), torch.zeros((), dtype=torch.float64))
        torch.testing.assert_close(found, wanted, rtol=0, atol=ulps(1000, F64))
        ours, its = (torch.autograd.grad(x, log_BT, retain_graph=True)[0] for x in (found, wanted))
        torch.testing.assert_close(ours, its, rtol=0, atol=ulps(1000, F64))
