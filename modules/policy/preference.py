"""DPO: direct preference optimization on pairs of answers. Letters: B pairs."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


class DPOLoss:
    """DPO loss, ``- logsigmoid(beta (gain_good - gain_bad))``, ``gain = log p - log p_reference`` of whole answers.

    Source: Rafailov 2023, arXiv 2305.18290. With lengths, each gain is divided by its answer's length, so that a longer
    answer is not better by itself.

    Args:
        beta: strength of the pull to the reference; smaller allows larger changes.
        by_length: whether recipes pass lengths.

    >>> good_B, bad_B, zero_B = torch.tensor([2.0]), torch.tensor([1.0]), torch.zeros(1)
    >>> round(DPOLoss(beta=1.0)(good_B, bad_B, zero_B, zero_B).item(), 4)  # - log sigmoid(1)
    0.3133
    """

    def __init__(self, beta: float = 0.1, by_length: bool = False) -> None:
        if not beta > 0:
            raise ValueError(f"DPO: beta {beta:g}: above 0, such as 0.1")
        self.beta, self.by_length = beta, by_length

    def __call__(
        self,
        good_B: Tensor,
        bad_B: Tensor,
        good_reference_B: Tensor,
        bad_reference_B: Tensor,
        length_B2: Tensor | None = None,
    ) -> Tensor:
        """Compute ``[B]`` from log-probabilities of whole answers; ``length_B2``: tokens of the good and bad ones."""
        gain_B2 = torch.stack([good_B - good_reference_B, bad_B - bad_reference_B], dim=1)
        if length_B2 is not None:
            gain_B2 = gain_B2 / length_B2.clamp(min=1)
        return -F.logsigmoid(self.beta * (gain_B2[:, 0] - gain_B2[:, 1]))
