"""MMCosine: late fusion by cosines, in which no modality dominates by the norm of its features or weights.

Letters: B samples, D width of a modality's latents, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from descant.modules.fusion.classifiers import FusionHead


class MMCosine(FusionHead):
    """Multimodal cosine loss (MMCosine), a fusion head: sum of scaled cosines between latents and rows of weights.

        logits_bk = scale sum_m cos(w_mk, z_bm)                over the modalities of sample b

    The terms are the Shapley values; there is no bias. Trained with cross-entropy, this is the paper's loss. With M
    modalities, logits lie within M ``scale``, so a small scale bounds the probability of a class. It costs as much as
    LateFusion. Source: Xu 2023, arXiv 2303.05338, whose release has a scale of 10. Its contrastive term between
    modalities (``lam``) is another loss, not part of this head. Absent modalities add zero: our reading.

    Args:
        scale: factor of the cosines.

    >>> fusion = MMCosine(scale=10.0).build({"image": 2, "text": 2}, classes=2)
    >>> with torch.no_grad():
    ...     for m in ("image", "text"):
    ...         _ = fusion.maps[m].weight.copy_(torch.tensor([[2.0, 0.0], [0.0, 5.0]]))
    >>> fusion({"image": torch.tensor([[3.0, 4.0]]), "text": torch.tensor([[0.0, 7.0]])}).round(decimals=3).tolist()
    [[6.0, 18.0]]
    """

    def __init__(self, scale: float = 10.0) -> None:
        super().__init__()
        if not scale > 0:
            raise ValueError(f"MMCosine: scale {scale:g}: above 0, such as 10")
        self.scale = scale

    def made(self, widths: dict[str, int], classes: int) -> None:
        self.maps = nn.ModuleDict({m: nn.Linear(width, classes, bias=False) for m, width in widths.items()})

    def parts(self, z: Mapping[str, Tensor], present: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        return {m: self._cosines(m, z_BD) for m, z_BD in self.check_latents(z, present)[0].items()}

    def logits(self, z: dict[str, Tensor], present: dict[str, Tensor]) -> Tensor:
        return torch.stack([self._part(m, self._cosines(m, z_BD)) for m, z_BD in z.items()]).sum(dim=0)

    def _cosines(self, modality: str, z_BD: Tensor) -> Tensor:
        unit_CD = F.normalize(self.maps[modality].get_parameter("weight"), dim=1)
        return self.scale * F.linear(F.normalize(z_BD, dim=1), unit_CD)  # a row of zeros stays zero
