"""Tokenizers for patches and vectors that need no training: their codes are centres of k-means.

Letters: B samples, T tokens, P numbers of a patch, N patches, K codes, L layers, G groups of a vector, W its width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from descant.modules.balance.purity import kmeans
from descant.modules.core.host import derive
from descant.modules.masking.adapters import PatchAdapter
from descant.modules.tokenizers.codes import CodeTokenizer
from descant.modules.tokenizers.quantizers import residual_vq
from descant.modules.towers.image import require_divisor


def centres(x_NP: Tensor, codes: int, seed: int) -> Tensor:
    """Compute the cluster means of k-means, ``[K, P]``, in float64 on the CPU, so that all devices get the same sums.

    >>> centres(torch.tensor([[0.0], [1.0], [8.0]]), 2, seed=0).sort(dim=0).values.tolist()
    [[0.5], [8.0]]
    """
    if len(x_NP) < codes:
        raise ValueError(f"{len(x_NP)} vectors for {codes} codes: more samples, or fewer codes")
    at_NK = F.one_hot(kmeans(x_NP, codes, seed=seed, restarts=1, rounds=30), codes).cpu().double()
    return (at_NK.T @ x_NP.cpu().double() / at_NK.sum(dim=0).clamp(min=1)[:, None]).to(x_NP)


class KMeansPatches(CodeTokenizer):
    """Tokenizer for patches of a picture, spectrogram, volume or video: nearest centres of k-means, layer by layer.

        code_tl = argmin_k |r_tl - c_lk|^2,   r_(l+1) = r_l - c_(l, code_l),   x_t = sum_l c_(l, code_tl)   of patch t

    The centres are fitted once, before the first step, on patches of some training samples. The model saves them, so a
    resumed run, an export and every rank have the same centres. A trained tokenizer has to beat this baseline; with
    patches of few pixels its pictures are recognisable. Distances are those of :func:`residual_vq`.

    Args:
        size, patch, channels, padded: as in PatchAdapter.
        codes: K, number of codes of each layer.
        layers: number of layers of residual quantisation.
        samples: number of training samples to fit on.

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
        for layer in range(self.layers):
            self.centre_LKP[layer] = centre_KP = centres(r_NP, self.codes, seed=layer)
            r_NP = r_NP - centre_KP[residual_vq(r_NP, centre_KP[None]).id_NL[:, 0]]
        self.fitted = True

    def real(self, x: Tensor) -> Tensor:
        real_BT = self.cut.raw(x)[1]
        return real_BT if self.layers == 1 else derive(lambda mask_BT: mask_BT.repeat(1, self.layers), real_BT)

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        if not self.fitted:
            raise ValueError("KMeansPatches: not fitted; a fit with Masked does it, or `fit(x)`")
        x_BTP, _ = self.cut.raw(x)
        with torch.autocast(x.device.type, enabled=False):  # bfloat16 distances would select other centres
            id_NL = residual_vq(x_BTP.flatten(0, 1).to(self.centre_LKP.dtype), self.centre_LKP).id_NL
        return self.join_layers(id_NL.unflatten(0, x_BTP.shape[:2]))

    def decode(self, code_BT: Tensor) -> Tensor:
        id_BTL = self.split(code_BT)
        each = zip(self.centre_LKP, id_BTL.unbind(dim=2), strict=True)
        return self.cut.to_input_shape(torch.stack([centre_KP[id_BT] for centre_KP, id_BT in each]).sum(dim=0))

    def cover(self, x_BT: Tensor) -> Tensor:
        first_BT = x_BT[:, : self.length // self.layers]
        return self.cut.to_input_shape(first_BT[..., None].expand(-1, -1, self.cut.numbers))


class VectorTokens(CodeTokenizer):
    """Tokenizer for vectors, one id per codebook: product quantisation by k-means (global features of 4M-21).

        id_g = g codes + argmin_k |x_g - c_gk|^2,   x'_g = c_(g, id_g)   of the g-th of equal parts x_g of x

    It is fitted once, before the first step, and saved with the model. 4M-21 trains an MLP with memory codes of 8
    books; this class needs no training. For residual layers of whole vectors, use KMeansPatches with one patch.
    Source: Jegou 2011 (product quantisation), Bachmann 2024 (4M-21, arXiv 2406.09406).

    Args:
        width: W, numbers per vector.
        books: G, number of codebooks; it must divide ``width``.
        codes: K, number of codes of each book.
        cosine: whether vectors are first divided by their length, so that codes describe directions only.
        samples: number of training samples to fit on.

    >>> tokenizer = VectorTokens(width=4, books=2, codes=2)
    >>> x_BW = torch.tensor([[0.0, 0.0, 9.0, 9.0], [5.0, 5.0, 0.0, 0.0]])
    >>> tokenizer.fit(x_BW)
    >>> torch.equal(tokenizer.decode(tokenizer.encode(x_BW)), x_BW), tokenizer.vocabulary
    (True, 4)
    """

    centre_GKP: Tensor

    def __init__(self, width: int, books: int = 8, codes: int = 64, cosine: bool = False, samples: int = 400) -> None:
        if books < 2 or codes < 2 or samples < 1:
            raise ValueError(f"books {books}, codes {codes}, samples {samples}: at least 2, 2 and 1")
        require_divisor("books", books, "width", width)
        super().__init__([1], codes, books)
        self.width, self.cosine, self.samples = width, cosine, samples
        self.register_buffer("centre_GKP", torch.zeros(books, codes, width // books))
        self.fitted = False

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.fitted = bool(self.centre_GKP.any())

    def _parts(self, x: Tensor) -> Tensor:
        if x.shape[1:] != (self.width,):
            raise ValueError(f"input {list(x.shape[1:])}: this tokenizer takes vectors of {self.width}")
        x_BW = x.to(self.centre_GKP.dtype)
        return (F.normalize(x_BW, dim=1) if self.cosine else x_BW).unflatten(1, (self.layers, -1))

    @torch.no_grad()
    def fit(self, x: Tensor) -> None:
        for g, x_NP in enumerate(self._parts(x).unbind(dim=1)):
            self.centre_GKP[g] = centres(x_NP, self.codes, seed=g)
        self.fitted = True

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        if not self.fitted:
            raise ValueError("VectorTokens: not fitted; a fit with Masked does it, or `fit(x)`")
        with torch.autocast(x.device.type, enabled=False):
            each = zip(self._parts(x).unbind(dim=1), self.centre_GKP, strict=True)
            id_BG = torch.cat([residual_vq(x_BP, centre_KP[None]).id_NL for x_BP, centre_KP in each], dim=1)
        return self.join_layers(id_BG[:, None])

    def decode(self, code_BT: Tensor) -> Tensor:
        each = zip(self.split(code_BT).squeeze(1).unbind(dim=1), self.centre_GKP, strict=True)
        return torch.cat([centre_KP[id_B] for id_B, centre_KP in each], dim=1)

    def cover(self, x_BT: Tensor) -> Tensor:
        return x_BT.repeat_interleave(self.width // self.layers, dim=1)
