"""MMTM fusion: gates computed from all modalities scale each modality's latents, which are classified separately.

Letters: B samples, D width of a modality's latents, S width of the squeeze, C classes, M modalities.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from descant.modules.fusion.classifiers import FusionHead


class MMTMFusion(FusionHead):
    """Multimodal transfer module (MMTM) as a fusion head: latents are gated across modalities, logits are averaged.

        g_bm = sigmoid(E_m relu(sum_n S_n z_bn + s) + e_m)            squeeze by S, excitation by E
        logits_b = mean_m W_m (g_bm * z_bm) + w_m                     over the modalities of sample b

    Only E_m lets modality m see the others. In the paper, gates are between layers of convolutional networks; here (our
    reading) they gate latents, so towers may be of any kind. In training, the modality ``averaged`` has ``mean_gates``
    as its gates; :class:`descant.callbacks.balance.greedy.GreedyRebalancing` sets both. It costs two small maps per
    modality more than LateFusion. Source: Joze 2020, arXiv 1911.08670; averaged gates and logits as in Wu 2022, arXiv
    2202.05306.

    Args:
        ratio: ratio of the summed widths of all latents to half of S: ``S = 2 sum D / ratio``.

    >>> fusion = MMTMFusion(ratio=2).build({"image": 4, "text": 2}, classes=2)
    >>> fusion.squeeze["image"].weight.shape, fusion.excite["image"].weight.shape
    (torch.Size([6, 4]), torch.Size([4, 6]))
    """

    mean_gates: Tensor

    def __init__(self, ratio: float = 4.0) -> None:
        super().__init__()
        if not ratio >= 1:
            raise ValueError(f"MMTMFusion: ratio {ratio:g}: 1 is the least")
        self.ratio = ratio
        self.averaged: str | None = None

    def made(self, widths: dict[str, int], classes: int) -> None:
        total = sum(widths.values())
        S = int(2 * total / self.ratio)
        if S < 1:
            raise ValueError(f"MMTMFusion: ratio {self.ratio:g}: at most twice the width of all latents, {2 * total}")
        self.squeeze = nn.ModuleDict({m: nn.Linear(D, S, bias=False) for m, D in widths.items()})
        self.squeeze_S = nn.Parameter(torch.zeros(S))
        self.excite = nn.ModuleDict({m: nn.Linear(S, D) for m, D in widths.items()})
        self.maps = nn.ModuleDict({m: nn.Linear(D, classes) for m, D in widths.items()})
        self.register_buffer("mean_gates", torch.full((total,), 0.5))  # all modalities, concatenated

    def gates(self, z: Mapping[str, Tensor], present: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Compute the gates, modality -> ``g_BD`` in (0, 1)."""
        z, _ = self.check_latents(z, present)
        h_BS = torch.stack([self._linear(m, self.squeeze, self._part(m, z_BD)) for m, z_BD in z.items()]).sum(dim=0)
        return {m: self._linear(m, self.excite, (h_BS + self.squeeze_S).relu()).sigmoid() for m in z}

    def logits(self, z: dict[str, Tensor], present: dict[str, Tensor]) -> Tensor:
        g, mean = self.gates(z, present), dict(zip(z, self.mean_gates.split(list(self.widths.values())), strict=True))
        if self.training and self.averaged is not None:  # adds zero, so that DDP reaches the excitation
            g[self.averaged] = mean[self.averaged] + 0.0 * g[self.averaged]
        shares_MBC = torch.stack([self._linear(m, self.maps, g[m] * self._part(m, z[m])) for m in z])
        present_MB1 = torch.stack([present[m] for m in z])[..., None]
        # the biases of absent modalities do not count
        return torch.where(present_MB1, shares_MBC, 0.0).sum(dim=0) / present_MB1.sum(dim=0).clamp(min=1)

    def _linear(self, modality: str, maps: nn.ModuleDict, x: Tensor) -> Tensor:
        layer = maps[modality]
        assert isinstance(layer, nn.Linear)
        bias = None if layer.bias is None else self._part(modality, layer.bias)
        return F.linear(x, self._part(modality, layer.weight), bias)
