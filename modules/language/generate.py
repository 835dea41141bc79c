"""Generation: prompts are read once, whoever shares one shares its keys, and who has finished leaves.

Letters: P prompts, G completions of each, R = P G rows, T tokens of a prompt, N new tokens, D width, H heads, K key
heads, Q = H / K, E width of a head, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from descant.modules.language.model import CausalLM
from descant.modules.random import uniform_N

#: Rows leave together, when this share of those that are computed has finished.
LEAVE = 0.25


class Generated(NamedTuple):
    """What was said.

    Attributes:
        token_RN: int64, 0 behind the end. log_RN: float32, of each under the temperature, no candidate left out.
        length_R: tokens, a stop token counted. ended_R: whether there was one.
    """

    token_RN: Tensor
    log_RN: Tensor
    length_R: Tensor
    ended_R: Tensor


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn of ``softmax(logits / temperature)``.

    A row takes one number of its seed and the place of the token: which other rows there are changes nothing.

    Args:
        temperature: 0 takes the likeliest one.
        top_k: of the likeliest k alone.
        top_p: of the likeliest ones alone that together reach this probability.

    Raises:
        ValueError: for a temperature below 0, no candidate, or a share outside (0, 1].
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ValueError(f"temperature {self.temperature:g}: 0 (the likeliest token) or more")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k {self.top_k}: 1 is the least")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p {self.top_p:g}: above 0, at most 1")

    def draw(self, logits_RV: Tensor, seed_R: Tensor, place: int) -> tuple[Tensor, Tensor]:
        """Tokens ``[R]`` and their log-probabilities ``[R]`` among all.

        >>> logits_RV = torch.tensor([[1.0, 3.0, 2.0]]).repeat(40000, 1)
        >>> token_R, log_R = Sampling(top_k=2).draw(logits_RV, torch.arange(40000), 0)
        >>> sorted(set(token_R.tolist())), round(float((token_R == 1).float().mean()), 2)  # e / (e + 1) = 0.73
        ([1, 2], 0.73)
        """
        x_RV = logits_RV.float()
        if self.temperature == 0:
            log_RV, token_R = x_RV.log_softmax(dim=1), x_RV.argmax(dim=1)
            return token_R, log_RV.gather(1, token_R[:, None])[:, 0]
        log_RV = (x_RV / self.temperature).log_softmax(dim=1)
        kept, order = log_RV, None
        if self.top_k is not None and self.top_k < log_RV.shape[1]:
            kept, order = log_RV.topk(self.top_k, dim=1)
        if self.top_p < 1:
            if order is None:
                kept, order = log_RV.sort(dim=1, descending=True)
            p = kept.softmax(dim=1)
            kept = kept.masked_fill(p.cumsum(dim=1) - p >= self.top_p, -torch.inf)  # the first one always stays
        below_RV = kept.softmax(dim=1).double().cumsum(dim=1)
        u_R1 = uniform_N(seed_R, "generate", place).to(below_RV)[:, None] * below_RV[:, -1:]
        at_R1 = torch.searchsorted(below_RV, u_R1, right=True).clamp(max=kept.shape[1] - 1)
        token_R1 = at_R1 if order is None else order.gather(1, at_R1)
        return token_R1[:, 0], log_RV.gather(1, token_R1)[:, 0]


@torch.no_grad()
def generate(
    lm: CausalLM,
    prompt: Tensor,
    mask_PT: Tensor | None = None,
    new: int = 64,
    group: int = 1,
    stop: Sequence[int] = (),
    sampling: Sampling | None = None,
    seed_R: Tensor | None = None,
) -> Generated:
    """``group`` completions of each prompt, the rows of one behind each other.

    Args:
        lm: in eval mode, if it has dropout.
        prompt: token ids ``[P, T]``, or embeddings ``[P, T, D]``, such as of text and pictures.
        mask_PT: which tokens are real, from the left; all where not given.
        new: most tokens of a completion. group: G.
        stop: ids, any of which ends a completion.
        sampling: how tokens are drawn; by their probability where not given.
        seed_R: int64, a seed a row; 0, 1, ... where not given.

    Raises:
        ValueError: for a prompt without a token or with a gap, or that does not fit into the model's length with
            what is asked for.
    """
    sampling = sampling or Sampling()
    h_PTD = prompt if prompt.is_floating_point() else lm.embed(prompt)
    (P, T, _), device = h_PTD.shape, h_PTD.device
    if mask_PT is None:
        mask_PT = torch.ones(P, T, dtype=torch.bool, device=device)
    length_P = mask_PT.sum(dim=1)
    if not (length_P > 0).all() or not torch.equal(mask_PT, torch.arange(T, device=device) < length_P[:, None]):
        raise ValueError("mask: the tokens of a prompt stand at its left, at least one of them")
    if int(length_P.max()) + new > lm.length:
        longest = int(length_P.max())
        raise ValueError(f"a prompt of {longest} tokens and {new} new ones do not fit into length {lm.length}")
    R = P * group
    seed_R = torch.arange(R, device=device) if seed_R is None else seed_R
    token_RN = torch.zeros(R, new, dtype=torch.long, device=device)
    log_RN = torch.zeros(R, new, device=device)
    length_R, ended_R = torch.full((R,), new, device=device), torch.zeros(R, dtype=torch.bool, device=device)
    stops = torch.tensor(list(stop), device=device, dtype=torch.long)

    state, h_PD = _read(lm, h_PTD, mask_PT, length_P, new, group)
    logits = lm.logits(h_PD).repeat_interleave(group, dim=0)
    row_S = torch.arange(R, device=device)  # the row that each computed slot is of
    for n in range(new):
        token_S, log_S = sampling.draw(logits, seed_R[row_S], n)
        done_S = ended_R[row_S]  # finished, and not left yet
        token_S = token_S.masked_fill(done_S, 0)
        token_RN[row_S, n], log_RN[row_S, n] = token_S, log_S.masked_fill(done_S, 0.0)
        if len(stops):
            ends_S = torch.isin(token_S, stops) & ~done_S
            length_R[row_S[ends_S]] = n + 1
            ended_R[row_S[ends_S]] = True
            finished = float(ended_R[row_S].float().mean())
            if finished == 1:
                break
            if finished >= LEAVE and n + 1 < new:
                slots, state = state.without(ended_R[row_S])
                row_S, token_S = row_S[slots], token_S[slots]
        if n + 1 < new:
            logits = lm.logits(state.step(lm, lm.embed(token_S), n))
    return Generated(token_RN, log_RN, length_R, ended_R)


@dataclass
class _State:
    """Keys and values: of prompts, once each, and of what was said since, in a grid of slots: p prompts, g of each.

    Where nobody shares a prompt, both stand in one cache, ``own``, and ``prompt`` is None.
    """

    prompt: list[tuple[Tensor, Tensor]] | None  # a layer: k, v  [p, K, T, E]
    own: list[tuple[Tensor, Tensor]]  # a layer: k, v  [p g, K, N, E], or [p, K, T + N, E]
    hide: Tensor | None  # 0, or -inf for padding of a prompt: [p, 1, 1, T], or [p, 1, 1, T + N]; None without
    length_S: Tensor
    group: int
    said: int  # of the cache, how much is filled

    def step(self, lm: CausalLM, h_SD: Tensor, n: int) -> Tensor:
        """One token more: ``[S, D] -> [S, D]``."""
        h_S1D, turn, at = h_SD[:, None], lm.turn((self.length_S + n)[:, None]), self.said
        self.said += 1
        for i, layer in enumerate(lm.blocks()):
            q, k, v = layer.heads_of(h_S1D, turn)
            self.own[i][0][:, :, at], self.own[i][1][:, :, at] = k[:, :, 0], v[:, :, 0]
            attended = self._alone(q, i) if self.prompt is None else self._shared(q, i, self.prompt[i])
            h_S1D = layer.close(h_S1D, attended)
        return lm.norm(h_S1D)[:, 0]

    def _alone(self, q_SH1E: Tensor, i: int) -> Tensor:
        """``[S, 1, D]``: the heads that share keys stand as if they were queries behind each other."""
        k, v = (x[:, :, : self.said] for x in self.own[i])
        q_SKQE = q_SH1E.reshape(len(k), k.shape[1], -1, k.shape[3])
        hide = None if self.hide is None else self.hide[..., : self.said]
        return F.scaled_dot_product_attention(q_SKQE, k, v, attn_mask=hide).reshape(len(k), 1, -1)

    def _shared(self, q_SH1E: Tensor, i: int, prompt: tuple[Tensor, Tensor]) -> Tensor:
        """``[S, 1, D]``: over the prompt, whose keys a group shares, and over what each row has said."""
        k_pKTE, v_pKTE = prompt
        k_SKNE, v_SKNE = (x[:, :, : self.said] for x in self.own[i])
        (p, K, T, E), g, S = k_pKTE.shape, self.group, len(q_SH1E)
        q_SKQE = (q_SH1E * E**-0.5).reshape(S, K, -1, E)
        Q = q_SKQE.shape[2]
        q_pKgQE = q_SKQE.view(p, g, K, Q, E).transpose(1, 2)
        to_prompt = (q_pKgQE.reshape(p, K, g * Q, E) @ k_pKTE.transpose(2, 3)).view(p, K, g, Q, T)
        if self.hide is not None:
            to_prompt = to_prompt + self.hide[:, :, None]
        to_own = (q_SKQE @ k_SKNE.transpose(2, 3)).reshape(p, g, K, Q, -1).transpose(1, 2)
        a = torch.cat([to_prompt, to_own], dim=4).softmax(dim=4, dtype=torch.float32).to(q_SKQE)
        of_prompt = (a[..., :T].reshape(p, K, g * Q, T) @ v_pKTE).view(p, K, g, Q, E).transpose(1, 2)
        of_own = a[..., T:].transpose(1, 2).reshape(S, K, Q, -1) @ v_SKNE
        return (of_prompt.reshape(S, K, Q, E) + of_own).reshape(S, 1, -1)

    def without(self, done_S: Tensor) -> tuple[Tensor, _State]:
        """The slots that stay, and the state of them: fewer prompts, or fewer of each, as far as that goes."""
        g = self.group
        going_pg = ~done_S.view(-1, g)
        count_p = going_pg.sum(dim=1)
        keep_p, most = (count_p > 0).nonzero().flatten(), int(count_p.max())
        if len(keep_p) * most == len(done_S):
            return torch.arange(len(done_S), device=done_S.device), self
        first = going_pg[keep_p].int().argsort(dim=1, descending=True, stable=True)[:, :most]  # who goes on comes first
        slots = (keep_p[:, None] * g + first).flatten()
        own = [(_kept(k, slots, self.said), _kept(v, slots, self.said)) for k, v in self.own]
        prompt = self.prompt
        if prompt is not None and len(keep_p) < len(count_p):
            prompt = [(k[keep_p], v[keep_p]) for k, v in prompt]
        hide = None if self.hide is None else self.hide[keep_p]
        return slots, _State(prompt, own, hide, self.length_S[slots], most, self.said)


def _kept(x: Tensor, slots: Tensor, said: int) -> Tensor:
    """Rows of a cache; what is not filled yet is not copied."""
    fresh = x.new_empty(len(slots), *x.shape[1:])
    fresh[:, :, :said] = x[slots, :, :said]
    return fresh


def _read(
    lm: CausalLM, h_PTD: Tensor, mask_PT: Tensor, length_P: Tensor, new: int, group: int
) -> tuple[_State, Tensor]:
    """The state behind the prompts, and what the head reads at the last token of each, ``[P, D]``."""
    P, T, D = h_PTD.shape
    turn = lm.turn(torch.arange(T, device=h_PTD.device).expand(P, T))
    prompt, own = [], []
    for layer in lm.blocks():
        q, k, v = layer.heads_of(h_PTD, turn)
        # padding stands behind all that is real, so what is causal never looks at it
        a_BHTE = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=k.shape[1] != q.shape[1])
        h_PTD = layer.close(h_PTD, a_BHTE.transpose(1, 2).reshape(P, T, D))
        before = 0 if group > 1 else T
        fresh = k.new_empty(2, P * group, k.shape[1], before + new, k.shape[3])
        if group > 1:
            prompt.append((k.contiguous(), v.contiguous()))
        else:
            fresh[0, :, :, :T], fresh[1, :, :, :T] = k, v
        own.append((fresh[0], fresh[1]))
    hide = None
    if not mask_PT.all():
        hide = torch.zeros(P, 1, 1, T if group > 1 else T + new, device=h_PTD.device, dtype=h_PTD.dtype)
        hide[..., :T].masked_fill_(~mask_PT[:, None, None], -torch.inf)
    last_PD = h_PTD[torch.arange(P, device=h_PTD.device), length_P - 1]
    length_S = length_P.repeat_interleave(group)
    state = _State(prompt if group > 1 else None, own, hide, length_S, group, 0 if group > 1 else T)
    return state, lm.norm(last_PD)
