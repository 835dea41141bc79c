"""Sampling from a masked model of token ids: in parallel, in random order or in order, one modality after the other.

Letters: B samples, T tokens of a modality, n hidden tokens, P ids of a token, C classes, N tokens of all samples, S
samples that are still decoded.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from descant.modules.core.batch import Batch
from descant.modules.core.errors import no_such, require_value
from descant.modules.core.host import host_copy
from descant.modules.core.objects import require_objects
from descant.modules.evaluation.metrics import wide
from descant.modules.masking.adapters import Adapter
from descant.modules.masking.corruptions import noise, ranks
from descant.modules.masking.decoders import At, Encoded

#: Finished texts leave the computation together, once they are this share of the texts in it.
LEAVE = 0.25


def cosine_counts(tokens: int, steps: int) -> list[int]:
    """Count the tokens to decode in each step, at least one.

        hidden after step k = floor(tokens cos(pi/2 k/steps))

    Source: MaskGIT (Chang 2022, arXiv 2202.04200).

    >>> cosine_counts(36, 8)
    [1, 2, 4, 4, 5, 7, 6, 7]
    """
    hidden = [tokens]
    for k in range(1, steps + 1):
        after = math.floor(tokens * math.cos(math.pi / 2 * k / steps) + 1e-9)
        hidden.append(min(hidden[-1] - 1, max(after, steps - k)) if k < steps else 0)
    return [before - after for before, after in itertools.pairwise(hidden)]


def sample_ids(
    score_NPC: Tensor, u_NP: Tensor, temperature: float, allowed_C: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Sample ids ``[N, P]`` from ``softmax(score / temperature)`` over allowed ids; also return their log-probability.

    Args:
        u_NP: draws in [0, 1), used to invert the cumulative distribution. allowed_C: bool.

    >>> sample_ids(torch.tensor([[[0.0, 0.0, 9.0]]]), torch.tensor([[0.75]]), 1.0, torch.tensor([True, True, False]))[0]
    tensor([[1]])
    """
    score_NPC = score_NPC.to(wide(score_NPC.device)) / temperature
    if allowed_C is not None:
        score_NPC = score_NPC.masked_fill(~allowed_C, -torch.inf)
    p_NPC = score_NPC.softmax(dim=-1)
    through_NPC = p_NPC.cumsum(dim=-1)
    id_NP = (through_NPC <= u_NP.to(p_NPC)[..., None] * through_NPC[..., -1:]).sum(dim=-1)
    return id_NP, p_NPC.gather(-1, id_NP[..., None]).squeeze(-1).log()


class DecodingOrder:
    """Base of decoding orders: tokens with the highest ``key(logp_BT, u_BT)`` are decoded first."""

    def key(self, logp_BT: Tensor, u_BT: Tensor) -> Tensor:
        """Return float ``[B, T]`` from the log-probability of each token's sampled id and one random draw per token."""
        raise NotImplementedError


class ConfidentFirst(DecodingOrder):
    """Order by probability, highest first (MaskGIT, arXiv 2202.04200; without its noise, as in 4M's release).

    >>> ConfidentFirst().key(torch.tensor([[-0.1, -2.0]]), torch.tensor([[0.3, 0.8]])).tolist()[0][1]
    -2.0
    """

    def key(self, logp_BT: Tensor, u_BT: Tensor) -> Tensor:
        return logp_BT


class RandomFirst(DecodingOrder):
    """Random order (ROAR of 4M, arXiv 2312.06647).

    >>> RandomFirst().key(torch.tensor([[-0.1, -2.0]]), torch.tensor([[0.25, 0.75]])).tolist()
    [[0.25, 0.75]]
    """

    def key(self, logp_BT: Tensor, u_BT: Tensor) -> Tensor:
        return u_BT


class Sampler:
    """Sampler that generates modalities of token ids from others with a masked model, one by one.

        score = free + guidance (score of all inputs - free),   free: without any input but the modality's own tokens

    Each generated modality is an input of the next. A modality with ids at fixed places is decoded in ``steps``;
    :func:`cosine_counts` gives the number of tokens per step. A text (SequenceAdapter) is decoded token by token. Draws
    depend only on a sample's ``rng_seed``. Source: 4M (arXiv 2312.06647).

    Args:
        steps: number of steps for a modality that is decoded in parallel.
        order: decoding order; ConfidentFirst by default.
        temperature: modality -> temperature; 1 by default.
        guidance: scale of classifier-free guidance; with 1, no guidance and one model run per step.
        allowed: modality -> ids that may be sampled; all by default.
    """

    def __init__(
        self,
        steps: int = 8,
        order: DecodingOrder | None = None,
        temperature: dict[str, float] | None = None,
        guidance: float = 1.0,
        allowed: dict[str, list[int]] | None = None,
    ) -> None:
        require_objects(self, order=(order, DecodingOrder))
        require_value(steps >= 1, f"Sampler: steps {steps}: at least 1")
        self.steps, self.order, self.guidance = steps, order or ConfidentFirst(), guidance
        self.temperature, self.allowed = temperature or {}, allowed or {}

    @torch.no_grad()
    def __call__(self, model: Any, batch: Batch, given: Sequence[str], targets: Sequence[str]) -> dict[str, Tensor]:
        """Generate target modalities of all samples: modality -> ids or decoded ids, in the shape of its input.

        Args:
            model: a recipe with the protocol DecodesTokens. given, targets: modalities; targets are generated in
                this order.
        """
        adapters: dict[str, Adapter] = model.adapters.each()
        self.check(model, given, targets)
        raw, real = model.raw(batch)
        for m in given:
            lacking_B = ~host_copy(real[m]).any(dim=1)
            if bool(lacking_B.any()):
                raise ValueError(f"Sampler: given {m}: sample {int(lacking_B.nonzero()[0])} of the batch lacks it")
        seen = {m: mask_BT if m in given else torch.zeros_like(mask_BT) for m, mask_BT in real.items()}
        for m in targets:
            how = self._in_order if adapters[m].ordered else self._in_parallel
            raw[m] = how(model, raw, seen, m, batch.rng_seed)
            seen[m] = adapters[m].raw(adapters[m].input(raw[m]))[1]
        return {m: adapters[m].input(raw[m]) for m in targets}

    def check(self, model: Any, given: Sequence[str], targets: Sequence[str]) -> None:
        """Raise ValueError for a request that no batch can satisfy."""
        adapters: dict[str, Adapter] = model.adapters.each()
        for m in (*given, *targets, *self.temperature, *self.allowed):
            if m not in adapters:
                raise ValueError(f"Sampler: modality {m!r}: {no_such(m, adapters)}")
        for m in targets:
            adapter = adapters[m]
            if m in given:
                raise ValueError(f"Sampler: {m} is given, and a target; leave it out of one")
            if m not in model.targets:
                raise ValueError(f"Sampler: target {m}: the model predicts {', '.join(model.targets)} alone")
            if type(adapter).scores is Adapter.scores:
                raise ValueError(f"Sampler: target {m}: {type(adapter).__name__} has no ids that could be sampled")
            if not adapter.ordered and self.steps > adapter.tokens:
                raise ValueError(f"Sampler: steps {self.steps}: {m} has {adapter.tokens} tokens; at most as many steps")
            if m in self.allowed and not bool(self._allowed_ids(adapter, m).view(adapter.layers, -1).any(dim=1).all()):
                raise ValueError(
                    f"Sampler: allowed {self.allowed[m]}: no id of {m}, which has 0 to {_ids(adapter) - 1}"
                )

    def _allowed_ids(self, adapter: Adapter, m: str) -> Tensor:
        """Mark the ids that content may have, bool ``[C]``."""
        id_C = torch.arange(adapter.output_size // adapter.numbers)
        content_C = id_C < _ids(adapter)
        if (pad := getattr(adapter, "pad", None)) is not None:
            content_C = content_C & (id_C != pad)
        return (
            content_C if m not in self.allowed else content_C & torch.isin(id_C, torch.tensor(self.allowed[m]).long())
        )

    def _encode(self, model: Any, raw: dict[str, Tensor], seen: dict[str, Tensor], m: str) -> list[Encoded]:
        """Encode all inputs; with guidance, also encode the modality's own tokens alone."""
        own = {name: x if name == m else torch.zeros_like(x) for name, x in seen.items()}
        return [model.encode(raw, of) for of in ([seen] if self.guidance == 1 else [seen, own])]

    def _scores(self, model: Any, encoded: list[Encoded], m: str, asked_BT: Tensor, given: Tensor | None) -> Tensor:
        """Compute guided scores ``[N, P, C]`` of the requested tokens of a modality."""
        adapter, at, scores = model.adapters.each()[m], At.of(asked_BT), list[Tensor]()
        for part in encoded:
            part.given = {} if given is None else {m: adapter.embed_previous(given)}
            scores.append(adapter.scores(model.decoder(part, {m: at})[m], at.place_N))
        if self.guidance == 1:
            return scores[0]
        score_NPC, free_NPC = scores
        guided_NPC = free_NPC + self.guidance * (score_NPC - free_NPC)
        return torch.where(score_NPC == -torch.inf, score_NPC, guided_NPC)

    def _in_parallel(
        self, model: Any, raw: dict[str, Tensor], seen: dict[str, Tensor], m: str, seed_B: Tensor
    ) -> Tensor:
        adapter: Adapter = model.adapters.each()[m]
        B, T, P, device = len(seed_B), adapter.tokens, adapter.numbers, seed_B.device
        x_BTP = torch.zeros(B, T, P, dtype=torch.long, device=device)
        done_BT = torch.zeros(B, T, dtype=torch.bool, device=device)
        allowed_C = self._allowed_ids(adapter, m).to(device)
        random_BT = noise(seed_B, f"sample/{m}/order", T).to(device)
        for step, count in enumerate(cosine_counts(T, self.steps)):
            encoded = self._encode(model, raw | {m: x_BTP}, seen | {m: done_BT}, m)
            score_NPC = self._scores(model, encoded, m, ~done_BT, None)
            u_NP = noise(seed_B, f"sample/{m}/{step}", T * P).to(device).view(B, T, P)[~done_BT]
            id_NP, logp_NP = sample_ids(score_NPC, u_NP, self.temperature.get(m, 1.0), allowed_C)
            logp_BT = torch.zeros(B, T, dtype=logp_NP.dtype, device=device)
            logp_BT[~done_BT] = logp_NP.mean(dim=1)
            key_BT = self.order.key(logp_BT, random_BT).masked_fill(done_BT, -torch.inf)
            now_BT = ranks(key_BT, descending=True) < count
            new_BTP = x_BTP.clone()
            new_BTP[~done_BT] = id_NP
            x_BTP, done_BT = torch.where(now_BT[..., None], new_BTP, x_BTP), done_BT | now_BT
        return x_BTP

    def _in_order(self, model: Any, raw: dict[str, Tensor], seen: dict[str, Tensor], m: str, seed_B: Tensor) -> Tensor:
        adapter: Any = model.adapters.each()[m]
        B, T, device = len(seed_B), adapter.tokens, seed_B.device
        content_C, end = self._allowed_ids(adapter, m).to(device), adapter.vocab + 1  # the sentinel after the only span
        s_BT = torch.full((B, T + 1), adapter.pad, device=device)
        s_BT[:, 0] = adapter.vocab
        row_S = torch.arange(B, device=device)  # samples still in the computation
        encoded, open_S = list[Encoded](), torch.ones(B, dtype=torch.bool, device=device)
        for step in range(T - 1):
            if not encoded:  # earlier targets are not encoder inputs, so encoding once suffices
                raw_S, seen_S = ({name: x[row_S] for name, x in of.items()} for of in (raw, seen))
                encoded = self._encode(model, raw_S, seen_S, m)
            asked_ST = (torch.arange(T, device=device) <= step).expand(len(row_S), T)
            score_NPC = self._scores(model, encoded, m, asked_ST, s_BT[row_S, : step + 1].reshape(-1, 1))
            allowed_C = content_C.clone()
            allowed_C[end] = step > 0
            u_S1 = noise(seed_B[row_S], f"sample/{m}/{step}", 1).to(device)
            last_S1C = score_NPC.view(len(row_S), step + 1, -1)[:, -1:]
            id_S = sample_ids(last_S1C, u_S1, self.temperature.get(m, 1.0), allowed_C)[0].squeeze(1)
            open_S = open_S & (id_S != end)
            s_BT[row_S, step + 1] = torch.where(open_S, id_S, adapter.pad)
            share = float(open_S.float().mean())
            if not share:
                break
            if share <= 1 - LEAVE:
                row_S, open_S, encoded = row_S[open_S], open_S[open_S], []
        return torch.cat([s_BT[:, 1:T], torch.full((B, 1), adapter.pad, device=device)], dim=1)[..., None]


def _ids(adapter: Adapter) -> int:
    """Return the number of ids that content may have, without sentinels."""
    return adapter.vocabulary or adapter.output_size // adapter.numbers
