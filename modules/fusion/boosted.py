"""ReconBoost's fusion: an ensemble of modalities that share a classifier. Letters: B samples, D width, C classes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from descant.modules.fusion.classifiers import FusionHead


class BoostedSum(FusionHead):
    """Sum of a shared classifier's logits: ``logits_b = rate sum_m f(z_bm)`` over the modalities of sample b.

    f is a linear layer, a ReLU and another linear layer, the same for all modalities. The rate is a trained number, 1
    at first. The terms are the Shapley values. Source: Hua 2024 (ReconBoost), arXiv 2405.09321, the common space of its
    release.

    Args:
        hidden: width inside f.

    >>> fusion = BoostedSum(hidden=8).build({"image": 4, "text": 4}, classes=2)
    >>> z = {"image": torch.ones(5, 4), "text": torch.zeros(5, 4)}
    >>> torch.allclose(fusion(z), fusion.parts(z)["image"] + fusion.parts(z)["text"])
    True
    """

    def __init__(self, hidden: int = 256) -> None:
        super().__init__()
        self.hidden = hidden

    def made(self, widths: dict[str, int], classes: int) -> None:
        if len(set(widths.values())) > 1:
            each = ", ".join(f"{m} {width}" for m, width in widths.items())
            raise ValueError(f"fusion: BoostedSum needs latents of one width; here {each}")
        width = next(iter(widths.values()))
        self.head = nn.Sequential(nn.Linear(width, self.hidden), nn.ReLU(), nn.Linear(self.hidden, classes))
        self.rate = nn.Parameter(torch.ones(()))

    def total(self, z: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> Tensor:
        """Compute the logits of these learners alone; zeros where a sample has none of them."""
        each = [torch.where(present[m][:, None], self._part(m, self.head(z_BD)), 0.0) for m, z_BD in z.items()]
        return self.rate * torch.stack(each).sum(dim=0)

    def logits(self, z: dict[str, Tensor], present: dict[str, Tensor]) -> Tensor:
        return self.total(z, present)

    def parts(self, z: Mapping[str, Tensor], present: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        z, present = self.check_latents(z, present)
        return {m: self.total({m: z_BD}, present) for m, z_BD in z.items()}
