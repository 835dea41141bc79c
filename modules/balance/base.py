"""Per-modality gradient modulation: from how well each modality does alone to a factor of its gradients.

    s_m = mean over samples of score(logits_m, label)        factor = pace(s)

Rules get the same numbers on every rank and give the same factors; their state is in the checkpoint.
Letters: B samples, C classes, M modalities.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


class Pacing:
    """``score`` of one modality's part of the logits, sample by sample, and ``pace`` of their means, once a step."""

    def __init__(self) -> None:
        self.state: dict[str, Tensor] = {}

    def score(self, logits_BC: Tensor, label_B: Tensor) -> Tensor:
        raise NotImplementedError

    def pace(self, score_M: Tensor) -> Tensor:
        """Float64 factors ``[M]``, 1 for an unchanged modality; updates the state."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in self.state.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.state = {name: value.clone() for name, value in state.items()}
