"""Quantizers, from vectors to ids of codes and back: VQ, residual VQ and FSQ, with statistics over all ranks.

Letters: N tokens, L layers, K codes of a layer, C width of a code, D and E widths before and after, R candidates.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from descant.modules.core.dtype import promote
from descant.modules.core.ranks import gather, total_of_ranks

#: Key of a token that replaces no code.
NEVER = torch.iinfo(torch.int64).max


class Quantized(NamedTuple):
    """Quantised vectors.

    ``z_NC``: the code of each, with the gradient of the original vector (straight-through). ``id_NL``: int64, 0 to
    K - 1. ``commit_N``: how far vectors are from their codes; None if the method has no such loss. ``left_NLC``: the
    input that each layer quantised, without gradient; of width 0 if no codebook follows it.
    """

    z_NC: Tensor
    id_NL: Tensor
    commit_N: Tensor | None
    left_NLC: Tensor


def residual_vq(z_NC: Tensor, code_LKC: Tensor) -> Quantized:
    """Find nearest codes, each layer for the residual of the layers before; with one layer, this is VQ-VAE's VQ.

        i_l = argmin_k |r_l - e_lk|^2,   r_1 = z,   r_(l+1) = r_l - e_(l, i_l),   z' = sum_l e_(l, i_l) + z - sg(z)
        commit = sum_l mean_c (r_l - sg(e_(l, i_l)))_c^2

    Source: van den Oord 2017 (arXiv 1711.00937), Zeghidour 2021 (SoundStream, 2107.03312).

    >>> found = residual_vq(torch.tensor([[1.2]]), torch.tensor([[[1.0], [9.0]], [[0.0], [0.25]]]))
    >>> found.id_NL.tolist(), found.z_NC.tolist()
    ([[0, 1]], [[1.25]])
    """
    left_NC, total_NC, commit_N = z_NC, torch.zeros_like(z_NC), z_NC.new_zeros(len(z_NC))
    ids, lefts = list[Tensor](), list[Tensor]()
    for code_KC in code_LKC:
        lefts.append(left_NC.detach())
        ids.append((code_KC.square().sum(dim=1) - 2 * lefts[-1] @ code_KC.T).argmin(dim=1))
        found_NC = code_KC[ids[-1]]
        left_NC, total_NC = left_NC - found_NC, total_NC + found_NC
        commit_N = commit_N + left_NC.square().mean(dim=1)
    return Quantized(total_NC + (z_NC - z_NC.detach()), torch.stack(ids, 1), commit_N, torch.stack(lefts, 1))


def fsq(z_NC: Tensor, levels_C: Tensor) -> tuple[Tensor, Tensor]:
    """Round each coordinate to one of a few levels, finite scalar quantisation: ``z_NC`` in -1..1, and ``id_N``.

        b_c = h_c tanh(z_c + tan(o_c / h_c)) - o_c,   h = (levels - 1) (1 - 0.001) / 2,   o = 1/2 of even levels, else 0
        q_c = round(b_c),   z'_c = q_c / w_c,   id = sum_c (q_c + w_c) prod_(d<c) levels_d,   w = floor(levels / 2)

    Source: Mentzer 2023 (FSQ, arXiv 2309.15505), appendix A.

    >>> z_NC, id_N = fsq(torch.tensor([[0.0, 9.0]]), torch.tensor([3, 4]))
    >>> z_NC.tolist(), id_N.tolist()
    ([[0.0, 0.5]], [10])
    """
    half_C, offset_C, width_C = (levels_C.to(z_NC) - 1) * (1 - 1e-3) / 2, (levels_C % 2 == 0) * 0.5, levels_C // 2
    bound_NC = half_C * (z_NC + (offset_C / half_C).tan()).tanh() - offset_C
    q_NC = bound_NC.detach().round()
    id_N = ((q_NC.long() + width_C) * (levels_C.cumprod(dim=0) // levels_C)).sum(dim=1)
    return (q_NC + (bound_NC - bound_NC.detach())) / width_C, id_N


class Seen(NamedTuple):
    """Statistics of the real tokens of an optimizer step, and candidates that replace dead codes.

    ``count_LK``, ``sum_LKC``: number of tokens of each code, and the sum of their vectors. ``key_R``: int64, ascending;
    ``z_RLC``: the inputs that each layer quantised of the candidates.
    """

    count_LK: Tensor
    sum_LKC: Tensor
    key_R: Tensor
    z_RLC: Tensor

    @staticmethod
    def of(found: Quantized, real_N: Tensor, key_N: Tensor, codes: int, most: int) -> Seen:
        """Collect statistics. ``key_N``: one draw per token; tokens with the ``most`` smallest are candidates."""
        N, L, C = found.left_NLC.shape
        z_NLC = found.left_NLC.masked_fill(~real_N[:, None, None], 0.0)
        at_M = (found.id_NL + codes * torch.arange(L, device=real_N.device)).flatten()
        one_M = real_N[:, None].expand(N, L).to(z_NLC.dtype).flatten()
        count_LK = one_M.new_zeros(L * codes).index_add(0, at_M, one_M).view(L, codes)
        sum_LKC = one_M.new_zeros(L * codes, C).index_add(0, at_M, z_NLC.flatten(0, 1)).view(L, codes, C)
        return Seen(count_LK, sum_LKC, *smallest(key_N.masked_fill(~real_N, NEVER), z_NLC, most))

    def with_(self, other: Seen) -> Seen:
        """Combine the statistics of two micro-batches."""
        key_R, z_RLC = torch.cat([self.key_R, other.key_R]), torch.cat([self.z_RLC, other.z_RLC])
        candidates = smallest(key_R, z_RLC, len(self.key_R))
        return Seen(self.count_LK + other.count_LK, self.sum_LKC + other.sum_LKC, *candidates)

    def of_ranks(self) -> Seen:
        """Combine the statistics of all ranks, with the same result on each."""
        flat = total_of_ranks(torch.cat([self.count_LK.flatten(), self.sum_LKC.flatten()]))
        count, total = flat.split([self.count_LK.numel(), self.sum_LKC.numel()])
        candidates = smallest(gather(self.key_R), gather(self.z_RLC), len(self.key_R))
        return Seen(count.view_as(self.count_LK), total.view_as(self.sum_LKC), *candidates)


def smallest(key_N: Tensor, z_NLC: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Return the ``most`` tokens with the smallest keys, in order; after the last one, ``NEVER`` and zeros.

    >>> key_R, z_RLC = smallest(torch.tensor([7, 2, 5]), torch.tensor([[[0.5]], [[0.25]], [[1.0]]]), 2)
    >>> key_R.tolist(), z_RLC.flatten().tolist()
    ([2, 5], [0.25, 1.0])
    """
    key_R, at_R = torch.cat([key_N, key_N.new_full((most,), NEVER)]).topk(most, largest=False)
    return key_R, torch.cat([z_NLC, z_NLC.new_zeros(most, *z_NLC.shape[1:])])[at_R]


def update_averages(
    count_LK: Tensor, sum_LKC: Tensor, seen: Seen, decay: float, dead: float | None
) -> tuple[Tensor, Tensor]:
    """Update moving averages of use and of sums after a step; rarely used codes restart at tokens of the batch.

        n_k = decay n_k + (1 - decay) count_k,    m_k = decay m_k + (1 - decay) sum_k,    e_k = m_k / n_k
        n_k < dead mean(n):   n_k = mean(n),  m_k = n_k z     z: the first candidate that no code before it has taken

    A step without tokens changes nothing. Source: van den Oord 2017, appendix A.1; SoundStream for replacing dead codes
    by random vectors of the batch. There a code is dead if its use is below 2; here, below a share of even use,
    whatever the batch.
    """
    rate = (1 - decay) * (seen.count_LK.sum() > 0).to(count_LK.dtype)
    count_LK, sum_LKC = count_LK.lerp(seen.count_LK, rate), sum_LKC.lerp(seen.sum_LKC, rate)
    if dead is None:
        return count_LK, sum_LKC
    even_LK = count_LK.mean(dim=1, keepdim=True).expand_as(count_LK)
    dead_LK = count_LK < dead * even_LK
    taken_LK = (dead_LK.cumsum(dim=1) - 1).clamp(min=0)  # there are as many candidates as codes
    fresh_LK = dead_LK & (seen.key_R[taken_LK] < NEVER)
    z_LKC = seen.z_RLC.transpose(0, 1).gather(1, taken_LK[..., None].expand_as(sum_LKC))
    count_LK = torch.where(fresh_LK, even_LK, count_LK)
    return count_LK, torch.where(fresh_LK[..., None], even_LK[..., None] * z_LKC, sum_LKC)


def usage(count_LK: Tensor, dead: float = 0.1) -> tuple[Tensor, Tensor]:
    """Compute the codes' perplexity as a share of their number, mean over layers, and the number of dead codes.

        exp(-sum_k p_k log p_k) / K,    p_k = n_k / sum_j n_j;    dead: p_k < dead / K

    >>> share, dead = usage(torch.tensor([[1.0, 1.0, 0.0, 0.0]]))
    >>> round(float(share), 3), int(dead)
    (0.5, 2)
    """
    p_LK, codes = count_LK / count_LK.sum(dim=1, keepdim=True).clamp(min=1e-30), count_LK.shape[1]
    return (-torch.xlogy(p_LK, p_LK).sum(dim=1)).exp().mean() / codes, (p_LK < dead / codes).sum()


class Quantizer(nn.Module):
    """Base of quantizers: ``quantizer(h_ND) -> Quantized``, with linear maps from D to the width of a code and on to E.

    A subclass implements ``quantize`` and ``vectors``. Quantisation is in float32 or higher precision, also inside
    autocast. The use of codes is averaged over optimizer steps, for the real tokens of all ranks and micro-batches, and
    saved.

    Args:
        codes: K. layers: L. width: C. decay: of the averages, per step.
    """

    count_LK: Tensor
    #: Weight of the commitment loss, if the method has one.
    commitment = 0.0
    #: Number of candidates for dead codes that a step keeps.
    candidates = 0

    def __init__(self, codes: int, layers: int, width: int, decay: float = 0.99) -> None:
        super().__init__()
        if codes < 2:
            raise ValueError(f"codes {codes}: at least 2")
        self.codes, self.layers, self.width, self.decay = codes, layers, width, decay
        self.register_buffer("count_LK", torch.zeros(layers, codes))
        self._seen: Seen | None = None  # statistics of a step's micro-batches so far

    def build(self, width: int, out: int) -> Self:
        """Make the layers from D = ``width`` and to E = ``out``; return itself."""
        self.inward, self.outward = nn.Linear(width, self.width), nn.Linear(self.width, out)
        return self

    def forward(self, h_ND: Tensor) -> Quantized:
        z_NC = promote(self.inward(h_ND))
        with torch.autocast(z_NC.device.type, enabled=False):
            return self.quantize(z_NC)

    def quantize(self, z_NC: Tensor) -> Quantized:
        raise NotImplementedError

    def vectors(self, id_NL: Tensor) -> Tensor:
        """Return ``z_NC`` of ids."""
        raise NotImplementedError

    @torch.no_grad()
    def observe(self, found: Quantized, real_N: Tensor, key_N: Tensor, first: bool = True, last: bool = True) -> None:
        """Count the tokens of a micro-batch; after the last one of an optimizer step, update the codes. Collective.

        ``real_N``: bool, False for padding. ``key_N``: int64, one draw per token. ``first``, ``last``: whether the
        micro-batch is the first or last of the step.
        """
        finite_N = found.left_NLC.isfinite().flatten(1).all(dim=1)  # a step that is skipped leaves no nan
        seen = Seen.of(found, real_N & finite_N, key_N, self.codes, self.candidates)
        self._seen = seen if first or self._seen is None else self._seen.with_(seen)
        if last:
            self.learn(self._seen.of_ranks())
            self._seen = None

    def learn(self, seen: Seen) -> None:
        """Apply the changes of a step of all ranks."""
        none_LKC = self.count_LK.new_zeros(*self.count_LK.shape, seen.sum_LKC.shape[2])
        self.count_LK.copy_(update_averages(self.count_LK, none_LKC, seen, self.decay, None)[0])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move averages to a device, but never to half precision, in which they would soon stop moving."""
        kept = {name: x for name, x in self._buffers.items() if x is not None}
        super()._apply(fn, recurse)
        for name, x in kept.items():
            now = self._buffers[name]
            if now is not None and now.dtype in (torch.bfloat16, torch.float16):
                self._buffers[name] = x.to(now.device)
        return self


class RVQ(Quantizer):
    """Residual vector quantisation (SoundStream): each layer quantises the residual, by a codebook of moving averages.

    See :func:`residual_vq` and :func:`update_averages`. The first step of training replaces unused codes by vectors of
    its batch.

    Args:
        codes: K, of each layer. layers: L. width: C. decay: of the moving averages that are the codes.
        commitment: weight of the loss that keeps vectors near their codes.
        dead: codes used less than this share of even use are replaced by vectors of the batch; None for never.

    >>> RVQ(codes=8, layers=2, width=4).build(width=16, out=16)(torch.randn(5, 16)).id_NL.shape
    torch.Size([5, 2])
    """

    code_LKC: Tensor
    sum_LKC: Tensor

    def __init__(
        self,
        codes: int = 512,
        layers: int = 4,
        width: int = 16,
        decay: float = 0.99,
        commitment: float = 0.25,
        dead: float | None = 0.1,
    ) -> None:
        super().__init__(codes, layers, width, decay)
        self.commitment, self.dead, self.candidates = commitment, dead, 0 if dead is None else codes
        self.register_buffer("code_LKC", self.prepare_vectors(torch.randn(layers, codes, width)))
        self.register_buffer("sum_LKC", torch.zeros(layers, codes, width))

    def prepare_vectors(self, z: Tensor) -> Tensor:
        """Prepare vectors and codes for the comparison; unchanged here."""
        return z

    def quantize(self, z_NC: Tensor) -> Quantized:
        return residual_vq(self.prepare_vectors(z_NC), self.code_LKC.to(z_NC.dtype))

    def vectors(self, id_NL: Tensor) -> Tensor:
        z_NC = torch.zeros_like(self.code_LKC[0, :1])
        for code_KC, id_N in zip(self.code_LKC, id_NL.T, strict=True):
            z_NC = z_NC + code_KC[id_N]
        return z_NC

    def learn(self, seen: Seen) -> None:
        count_LK, sum_LKC = update_averages(self.count_LK, self.sum_LKC, seen, self.decay, self.dead)
        used_LK1 = count_LK[..., None] > 0
        code_LKC = self.prepare_vectors(sum_LKC / torch.where(used_LK1, count_LK[..., None], 1.0))
        self.code_LKC.copy_(torch.where(used_LK1, code_LKC, self.code_LKC))
        self.count_LK.copy_(count_LK)
        self.sum_LKC.copy_(sum_LKC)


class VQ(RVQ):
    """Vector quantisation (VQ-VAE) to the nearest code of one codebook; a code is a moving average of its vectors.

    Args:
        codes: K. width: C; a narrow one keeps more codes in use (ViT-VQGAN, arXiv 2110.04627).
        cosine: vectors and codes have unit length, as in ViT-VQGAN.
        decay, commitment, dead: as in :class:`RVQ`.

    >>> VQ(codes=8, width=4).build(width=16, out=16)(torch.randn(2, 16)).z_NC.norm(dim=1).round().tolist()
    [1.0, 1.0]
    """

    def __init__(
        self,
        codes: int = 512,
        width: int = 16,
        cosine: bool = True,
        decay: float = 0.99,
        commitment: float = 0.25,
        dead: float | None = 0.1,
    ) -> None:
        self._cosine = cosine
        super().__init__(codes, 1, width, decay, commitment, dead)

    def prepare_vectors(self, z: Tensor) -> Tensor:
        return F.normalize(z, dim=-1) if self._cosine else z


class FSQ(Quantizer):
    """Finite scalar quantisation (arXiv 2309.15505): a fixed grid of codes, no codebook and no commitment; :func:`fsq`.

    Args:
        levels: of each coordinate, such as [8, 5, 5, 5] for 1,000 codes; at least 2 each, 5 in the paper.

    >>> quantizer = FSQ([3, 4]).build(width=16, out=16)
    >>> quantizer.codes, quantizer.vectors(torch.tensor([[10]])).tolist()
    (12, [[0.0, 0.5]])
    """

    levels_C: Tensor

    def __init__(self, levels: list[int]) -> None:
        if not levels or min(levels) < 2:
            raise ValueError(
                f"levels {levels}: one coordinate or more, of at least 2 levels each; such as [8, 5, 5, 5]"
            )
        super().__init__(math.prod(levels), 1, len(levels))
        self.register_buffer("levels_C", torch.tensor(levels), persistent=False)

    def quantize(self, z_NC: Tensor) -> Quantized:
        found_NC, id_N = fsq(z_NC, self.levels_C)
        return Quantized(found_NC, id_N[:, None], None, z_NC.new_zeros(len(z_NC), 1, 0))

    def vectors(self, id_NL: Tensor) -> Tensor:
        levels_C, width_C = self.levels_C, self.levels_C // 2
        at_NC = id_NL // (levels_C.cumprod(dim=0) // levels_C) % levels_C
        return (at_NC - width_C).to(self.count_LK.dtype) / width_C
