"""A tokenizer of patches that needs no training: centres of k-means.

Letters: B samples, T tokens, P numbers of a patch, N patches, K codes, L layers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from descant.modules.balance.purity import kmeans
from descant.modules.core.host import derived
from descant.modules.masking.adapters import PatchAdapter
from descant.modules.tokenizers.codes import CodeTokenizer
from descant.modules.tokenizers.quantizers import residual_vq


class KMeansPatches(CodeTokenizer):
    """Patches of a picture, spectrogram, volume or video as the nearest centres of k-means, layer by layer.

        code_tl = argmin_k |r_tl - c_lk|^2,   r_(l+1) = r_l - c_(l, code_l),   x_t = sum_l c_(l, code_tl)   of patch t

    The centres are fitted once, before the first step, on patches of some training samples, and saved with the model:
    a resumed run, an export and every rank have the same. It is what a trained tokenizer has to beat; with patches of
    few pixels its pictures are recognisable. Distances as of :func:`residual_vq`.

    Args:
        size, patch, channels, padded: as of PatchAdapter.
        codes: K of each layer.
        layers: of residual quantisation.
        samples: of training that it is fitted on.

    Raises:
        ValueError: as of PatchAdapter; for fewer than two codes, no layer, or no sample; where it is fitted, for fewer
            patches than codes; in ``encode``, before it is fitted.

    >>> tokenizer = KMeansPatches(size=[4, 4], patch=2, channels=1, codes=2)
    >>> x_BCHW = torch.zeros(1, 1, 4, 4)
    >>> x_BCHW[..., 2:] = 1
    >>> tokenizer.fit(x_BCHW)
    >>> code_BT = tokenizer.encode(x_BCHW)
    >>> code_BT[0].unique().tolist(), torch.equal(tokenizer.decode(code_BT), x_BCHW)
    ([0, 1], True)
    """

    centre_LKP: Tensor

    def __init__(
        self,
        size: list[int],
        patch: list[int] | int,
        channels: int = 3,
        codes: int = 256,
        layers: int = 1,
        samples: int = 400,
        padded: bool = False,
    ) -> None:
        if codes < 2 or layers < 1 or samples < 1:
            raise ValueError(f"codes {codes}, layers {layers}, samples {samples}: at least 2, 1 and 1")
        cut = PatchAdapter(size, patch, channels, padded=padded)
        super().__init__(cut.grid, codes, layers)
        self.cut, self.samples = cut, samples
        self.register_buffer("centre_LKP", torch.zeros(layers, codes, self.cut.numbers))
        self.fitted = False

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.fitted = bool(self.centre_LKP.any())

    @torch.no_grad()
    def fit(self, x: Tensor) -> None:
        x_BTP, real_BT = self.cut.raw(x)
        r_NP = x_BTP[real_BT].to(self.centre_LKP.dtype)
        if len(r_NP) < self.codes:
            raise ValueError(f"{len(r_NP)} patches for {self.codes} codes: more samples, or fewer codes")
        for layer in range(self.layers):
            at_NK = F.one_hot(kmeans(r_NP, self.codes, seed=layer, restarts=1, rounds=30), self.codes).to(r_NP)
            # in float64 and on the CPU: the same sums on every device
            sum_KP = at_NK.cpu().double().T @ r_NP.cpu().double()
            centre_KP = (sum_KP / at_NK.cpu().double().sum(dim=0).clamp(min=1)[:, None]).to(self.centre_LKP)
            self.centre_LKP[layer] = centre_KP
            r_NP = r_NP - centre_KP[residual_vq(r_NP, centre_KP[None]).id_NL[:, 0]]
        self.fitted = True

    def real(self, x: Tensor) -> Tensor:
        real_BT = self.cut.raw(x)[1]
        return real_BT if self.layers == 1 else derived(lambda mask_BT: mask_BT.repeat(1, self.layers), real_BT)

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        if not self.fitted:
            raise ValueError("KMeansPatches: not fitted; a fit with Masked does it, or `fit(x)`")
        x_BTP, _ = self.cut.raw(x)
        with torch.autocast(x.device.type, enabled=False):  # distances in bfloat16 would choose other centres
            id_NL = residual_vq(x_BTP.flatten(0, 1).to(self.centre_LKP.dtype), self.centre_LKP).id_NL
        return self.joined(id_NL.unflatten(0, x_BTP.shape[:2]))

    def decode(self, code_BT: Tensor) -> Tensor:
        id_BTL = self.split(code_BT)
        each = zip(self.centre_LKP, id_BTL.unbind(dim=2), strict=True)
        return self.cut.whole(torch.stack([centre_KP[id_BT] for centre_KP, id_BT in each]).sum(dim=0))

    def cover(self, x_BT: Tensor) -> Tensor:
        first_BT = x_BT[:, : self.length // self.layers]
        return self.cut.whole(first_BT[..., None].expand(-1, -1, self.cut.numbers))
