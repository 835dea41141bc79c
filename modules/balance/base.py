"""Per-modality gradient modulation: a factor for each modality's gradients, from how well the modality does alone.

    s_m = mean over samples of score(logits_m, label)        factor = pace(s)

Rules get the same numbers on every rank and return the same factors; checkpoints contain their state.
Letters: B samples, C classes, M modalities.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


class Pacing:
    """Base of modulation rules: ``score`` a modality's logits by sample, and ``pace`` by the means, once per step."""

    def __init__(self) -> None:
        self.state: dict[str, Tensor] = {}

    def score(self, logits_BC: Tensor, label_B: Tensor) -> Tensor:
        raise NotImplementedError

    def pace(self, score_M: Tensor) -> Tensor:
        """Compute float64 factors ``[M]``, 1 for an unchanged modality; updates the state."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in self.state.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.state = {name: value.clone() for name, value in state.items()}
