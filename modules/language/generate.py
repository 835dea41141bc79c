"""Generation with a key-value cache: completions share their encoded prompt, and finished rows are dropped.

Letters: P prompts, G completions of each, R = P G rows, S rows still computed, T tokens of a prompt, N new tokens, D
width, H heads, K key heads, Q = H / K, E width of a head, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from descant.modules.core.errors import require_value
from descant.modules.core.host import host_copy
from descant.modules.core.rng import uniform_N
from descant.modules.language.decode_layers import SMALL, DecodeHead, DecodeLayer, require_causal
from descant.modules.language.depths import DepthLayer
from descant.modules.language.model import CausalLM
from descant.modules.moe import Marks
from descant.modules.moe.routing import UNMARKED

#: Finished rows are dropped together, once they are this share of the computed rows.
LEAVE = 0.25


class Generated(NamedTuple):
    """Completions of prompts.

    Attributes:
        token_RN: int64, 0 after the end.
        log_RN: float32, log-probability of each token at the temperature, over the whole vocabulary.
        length_R: number of tokens, including a stop token.
        ended_R: whether there was a stop token.
    """

    token_RN: Tensor
    log_RN: Tensor
    length_R: Tensor
    ended_R: Tensor

    def truncate(self, length_R: Tensor, ended_R: Tensor) -> Generated:
        """Keep the first ``length_R`` tokens of each completion."""
        real_RN = torch.arange(self.token_RN.shape[1], device=length_R.device) < length_R[:, None]
        return Generated(self.token_RN.where(real_RN, 0), self.log_RN.where(real_RN, 0.0), length_R, ended_R)


@dataclass(frozen=True)
class Sampling:
    """Sampling of the next token from ``softmax(logits / temperature)``, with top-k and nucleus (top-p) truncation.

    It is a pure function of the row's seed and the token's position, independent of the other rows.

    Args:
        temperature: 0 is greedy decoding.
        top_k: sample among the k most probable tokens.
        top_p: sample among the fewest most probable tokens that reach this probability.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0

    def __post_init__(self) -> None:
        require_value(self.temperature >= 0, f"temperature {self.temperature:g}: 0 (greedy) or more")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k {self.top_k}: at least 1")
        require_value(0 < self.top_p <= 1, f"top_p {self.top_p:g}: above 0, at most 1")

    def allowed_ids(self, token_RN: Tensor, row_S: Tensor, place: int) -> Tensor | None:
        """Return the ids allowed at ``place`` of some rows, by their earlier tokens: bool ``[S, V]``; None: all."""
        return None

    def draw(
        self, logits_RV: Tensor, seed_R: Tensor, place: int, allowed_RV: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Draw tokens ``[R]`` from the allowed ones; return their log-probabilities ``[R]`` over the whole vocabulary.

        >>> logits_RV = torch.tensor([[1.0, 3.0, 2.0]]).repeat(40000, 1)
        >>> token_R, log_R = Sampling(top_k=2).draw(logits_RV, torch.arange(40000), 0)
        >>> sorted(set(token_R.tolist())), round(float((token_R == 1).float().mean()), 2)  # e / (e + 1) = 0.73
        ([1, 2], 0.73)
        """
        x_RV = logits_RV.float()
        if self.temperature == 0:
            log_RV, token_R = x_RV.log_softmax(dim=1), _within(x_RV, allowed_RV).argmax(dim=1)
            return token_R, log_RV.gather(1, token_R[:, None])[:, 0]
        log_RV = (x_RV / self.temperature).log_softmax(dim=1)
        candidates, order = _within(log_RV, allowed_RV), None
        if self.top_k is not None and self.top_k < log_RV.shape[1]:
            candidates, order = candidates.topk(self.top_k, dim=1)
        if self.top_p < 1:
            if order is None:
                candidates, order = candidates.sort(dim=1, descending=True)
            p = candidates.softmax(dim=1)
            candidates = candidates.masked_fill(p.cumsum(dim=1) - p >= self.top_p, -torch.inf)  # the first always stays
        below_RV = candidates.softmax(dim=1).double().cumsum(dim=1)
        u_R1 = uniform_N(seed_R, "generate", place).to(below_RV)[:, None] * below_RV[:, -1:]
        at_R1 = torch.searchsorted(below_RV, u_R1, right=True).clamp(max=candidates.shape[1] - 1)
        token_R1 = at_R1 if order is None else order.gather(1, at_R1)
        return token_R1[:, 0], log_RV.gather(1, token_R1)[:, 0]


def _within(x_RV: Tensor, allowed_RV: Tensor | None) -> Tensor:
    return x_RV if allowed_RV is None else x_RV.masked_fill(~allowed_RV, -torch.inf)


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
    position_PT: Tensor | None = None,
    prefix: bool = False,
    marks: Marks = UNMARKED,
) -> Generated:
    """Generate completions of each prompt, ``group`` of them in consecutive rows.

    Args:
        lm: in eval mode, if it has dropout.
        prompt: token ids ``[P, T]``, or embeddings ``[P, T, D]``, such as of text and images.
        mask_PT: real tokens, left-aligned; all by default.
        new: maximum number of tokens in a completion. group: G.
        stop: ids that end a completion.
        sampling: how tokens are sampled; plain sampling at temperature 1 by default.
        seed_R: int64, one seed per row; 0, 1, ... by default.
        position_PT: positions of the tokens and of the first new one, ``[P, T + 1]``; or ``[P, T + 1, 3]`` on three
            axes, where new tokens count on from the greatest. By default they are counted.
        prefix: tokens of a prompt see one another in both directions.
        marks: marks of the tokens for routers of experts, ``[P, T + 1]`` each; the last column is for all new tokens.
            If the model has kinds by id, the kinds of new tokens are those of their ids.
    """
    sampling = sampling or Sampling()
    require_causal(lm)
    h_PTD = prompt if prompt.is_floating_point() else lm.embed(prompt)
    (P, T, _), device = h_PTD.shape, h_PTD.device
    if mask_PT is None:
        mask_PT = torch.ones(P, T, dtype=torch.bool, device=device)
    length_P = mask_PT.sum(dim=1)
    if not (length_P > 0).all() or not torch.equal(mask_PT, torch.arange(T, device=device) < length_P[:, None]):
        raise ValueError("mask: the tokens of a prompt are left-aligned, at least one of them")
    if position_PT is None:
        position_PT = torch.arange(T + 1, device=device).expand(P, T + 1)
    first_P = position_PT[torch.arange(P, device=device), length_P]
    if first_P.ndim == 2:
        first_P = first_P.amax(dim=1)
    longest = int(first_P.max())
    if longest + new > lm.length:
        raise ValueError(f"a prompt of {longest} tokens and {new} new ones do not fit into length {lm.length}")
    R = P * group
    seed_R = torch.arange(R, device=device) if seed_R is None else seed_R
    token_RN = torch.zeros(R, new, dtype=torch.long, device=device)
    log_RN = torch.zeros(R, new, dtype=torch.float32, device=device)
    length_R, ended_R = torch.full((R,), new, device=device), torch.zeros(R, dtype=torch.bool, device=device)
    stops = torch.tensor(list(stop), device=device, dtype=torch.long)

    marks = marks._replace(valid=None)
    prompts = lm.add_kind_order(marks.map(lambda x: x[:, :T])._replace(valid=mask_PT))
    state, h_PD = _read(lm, h_PTD, mask_PT, lm.rope(position_PT[:, :T]), new, group, prefix, prompts)
    of_new = marks.map(lambda x: x[:, T].repeat_interleave(group))
    logits = lm.logits(h_PD).repeat_interleave(group, dim=0)
    text = of_new.kind is None or not host_copy(of_new.kind).any()
    layers, head = [DecodeLayer(layer, bool(text)) for layer in lm.blocks()], DecodeHead(lm)
    rope_RNE = lm.rope(first_P.repeat_interleave(group)[:, None] + torch.arange(new, device=device))[:, 0]
    row_S = torch.arange(R, device=device)  # the row of each computed slot
    for n in range(new):
        token_S, log_S = sampling.draw(logits, seed_R[row_S], n, sampling.allowed_ids(token_RN, row_S, n))
        ended_S = ended_R[row_S]  # finished, but not dropped yet
        token_S = token_S.masked_fill(ended_S, 0)
        token_RN[row_S, n], log_RN[row_S, n] = token_S, log_S.masked_fill(ended_S, 0.0)
        if len(stops):
            ends_S = torch.isin(token_S, stops) & ~ended_S
            length_R[row_S[ends_S]] = n + 1
            ended_R[row_S[ends_S]] = True
            finished = float(ended_R[row_S].float().mean())
            if finished == 1:
                break
            if finished >= LEAVE and n + 1 < new:
                slots, state = state.without(ended_R[row_S])
                row_S, token_S = row_S[slots], token_S[slots]
        if n + 1 < new:
            marks_S = of_new if lm.experts is None and lm.visual is None else of_new.map(_rows, row_S)
            if lm.kinds is not None:
                marks_S = marks_S._replace(kind=lm.kind_of(token_S))
            logits = head(state.step(layers, lm.embed(token_S), rope_RNE[row_S, n, None], marks_S))
    return Generated(token_RN, log_RN, length_R, ended_R)


def generate_some(
    lm: CausalLM,
    h_PTD: Tensor,
    mask_PT: Tensor,
    new: int,
    group: int,
    stop: Sequence[int],
    sampling: Sampling,
    seed_R: Tensor,
    position_PT: Tensor | None = None,
    prefix: bool = False,
    marks: Marks = UNMARKED,
) -> Generated:
    """Run :func:`generate` on the prompts that have tokens, cut to the longest; empty ones give empty completions.

    Empty completions count as ended.
    """
    some_P = mask_PT.any(dim=1)
    some_R = some_P.repeat_interleave(group)
    zeros, R = h_PTD.new_zeros, len(some_R)
    tokens, logs = zeros(R, new, dtype=torch.long), zeros(R, new, dtype=torch.float32)
    result = Generated(tokens, logs, zeros(R, dtype=torch.long), ~some_R)
    if some_P.any():
        longest = int(mask_PT.sum(dim=1).max())
        prompt, mask = h_PTD[some_P, :longest], mask_PT[some_P, :longest]
        position = None if position_PT is None else position_PT[some_P, : longest + 1]
        some_marks = marks.map(lambda x, at_P: torch.cat([x[at_P, :longest], x[at_P, -1:]], dim=1), some_P)
        some = generate(lm, prompt, mask, new, group, stop, sampling, seed_R[some_R], position, prefix, some_marks)
        for all_R, part_R in zip(result, some, strict=True):
            all_R[some_R] = part_R
    return result


def _rows(x_R: Tensor, row_S: Tensor) -> Tensor:
    return x_R[row_S]


@dataclass
class _State:
    """Key-value cache on a grid of slots: p prompts, and g completions of each.

    Shared prompts are stored once, in ``prompt``. If no prompt is shared, ``prompt`` is None and ``by_row`` holds
    prompt and completion. The last axis of keys is their tokens, as the product with queries reads them.
    """

    prompt: list[tuple[Tensor, Tensor]] | None  # per layer: keys [p K, E, T], values [p K, T, E]
    by_row: list[tuple[Tensor, Tensor]]  # per layer: keys [p K g, E, N], values [p K g, N, E]; with prompts N is T + N
    hide: list[Tensor | None]  # per layer: 0, or -inf for tokens it lacks: [p, T], or [p, T + N]; None if it has all
    depths: list[DepthLayer | None]  # per layer: set if it takes a share of the tokens; then no prompt is shared
    length_S: Tensor
    group: int
    filled: int  # tokens in the cache

    def step(self, layers: Sequence[DecodeLayer], h_SD: Tensor, rope: Tensor, marks: Marks) -> Tensor:
        """Compute one more token: ``[S, D] -> [S, D]``, before the last norm."""
        at, g = self.filled, self.group
        self.filled += 1
        S = len(h_SD)
        for i, layer in enumerate(layers):
            before_SD, depth, hide = h_SD, self.depths[i], self.hide[i]
            if depth is not None and hide is not None:
                weight_S1, taken_S1, _ = depth.choose(h_SD[:, None], h_SD.new_ones(S, 1, dtype=torch.long))
                hide[:, at].masked_fill_(~taken_S1[:, 0], -torch.inf)
                if not taken_S1.any():
                    self.by_row[i][0][:, :, at], self.by_row[i][1][:, at] = 0, 0
                    continue
            q, k, v = layer.split_qkv(h_SD, rope, marks)
            K, E = k.shape[1:]
            if g > 1:  # the order of the cache: prompts, key heads, completions
                q, k, v = (x.view(S // g, g, K, -1, E).transpose(1, 2) for x in (q, k, v))
            keys, values = self.by_row[i]
            keys.view(*k.shape, -1)[..., at], values.view(*k.shape[:-1], -1, E)[..., at, :] = k, v
            h_SD = layer.residual_mlp(h_SD, self._attend(q.reshape(S * K, -1, E), i), marks)
            if depth is not None:
                h_SD = torch.where(taken_S1, before_SD + weight_S1 * (h_SD - before_SD), before_SD)
        return h_SD

    def _attend(self, q: Tensor, i: int) -> Tensor:
        """Compute attention of queries ``[p K g, Q, E]`` over prompt and completion: ``[S, D]``."""
        (n, Q, E), g, S, hide = q.shape, self.group, len(self.length_S), self.hide[i]
        K = n // S
        keys, values = self.by_row[i][0][:, :, : self.filled], self.by_row[i][1][:, : self.filled]
        zero = q.new_zeros(1)
        row_scores = torch.baddbmm(zero, q, keys, beta=0, alpha=E**-0.5)
        if self.prompt is None:
            if hide is not None:
                row_scores.view(S, K, Q, -1).add_(hide[:, None, None, : self.filled])
            return torch.bmm(row_scores.softmax(dim=2), values).view(S, -1)
        of_prompt = self.prompt[i]
        T = of_prompt[0].shape[2]
        prompt_scores = torch.baddbmm(zero, q.reshape(-1, g * Q, E), of_prompt[0], beta=0, alpha=E**-0.5)
        if hide is not None:
            prompt_scores.view(S // g, -1, T).add_(hide[:, None])
        a = torch.cat([prompt_scores.view(n, Q, T), row_scores], dim=2).softmax(dim=2)
        x = torch.bmm(a[:, :, :T].reshape(-1, g * Q, T), of_prompt[1]).view(n, Q, E)
        x = torch.baddbmm(x, a[:, :, T:], values)
        return x.view(S // g, K, g, Q * E).transpose(1, 2).reshape(S, -1)

    def without(self, ended_S: Tensor) -> tuple[Tensor, _State]:
        """Drop finished slots: return the slots that stay, and their state.

        The state has fewer prompts, or fewer completions of each, as far as the grid allows.
        """
        g = self.group
        active_pg = ~ended_S.view(-1, g)
        count_p = active_pg.sum(dim=1)
        keep_p, most = (count_p > 0).nonzero().flatten(), int(count_p.max())
        if len(keep_p) * most == len(ended_S):
            return torch.arange(len(ended_S), device=ended_S.device), self
        first = active_pg[keep_p].int().argsort(dim=1, descending=True, stable=True)[:, :most]  # active ones first
        slots = (keep_p[:, None] * g + first).flatten()
        K = len(self.by_row[0][0]) // len(ended_S)
        head_K1 = torch.arange(K, device=ended_S.device)[:, None]
        place = ((keep_p[:, None, None] * K + head_K1) * g + first[:, None]).flatten()
        by_row = []
        for keys, values in self.by_row:
            cache = keys.new_empty(len(place), *keys.shape[1:]), values.new_empty(len(place), *values.shape[1:])
            cache[0][:, :, : self.filled] = keys[place, :, : self.filled]
            cache[1][:, : self.filled] = values[place, : self.filled]
            by_row.append(cache)
        prompt = self.prompt
        if prompt is not None and len(keep_p) < len(count_p):
            prompt = [
                (k.unflatten(0, (-1, K))[keep_p].flatten(0, 1), v.unflatten(0, (-1, K))[keep_p].flatten(0, 1))
                for k, v in prompt
            ]
        hide = [None if x is None else x[keep_p] for x in self.hide]
        return slots, _State(prompt, by_row, hide, self.depths, self.length_S[slots], most, self.filled)


def _read(
    lm: CausalLM,
    h_PTD: Tensor,
    mask_PT: Tensor,
    rope: Tensor,
    new: int,
    group: int,
    prefix: bool = False,
    marks: Marks = UNMARKED,
) -> tuple[_State, Tensor]:
    """Encode the prompts: return their cache, and what the head reads at the last token of each, ``[P, D]``."""
    P, T, D = h_PTD.shape
    length_P = mask_PT.sum(dim=1)
    # small prompts are copied to their completions: fewer operations per step
    small, depths = P * group * (T + new) * D <= SMALL, [x if isinstance(x, DepthLayer) else None for x in lm.layers]
    copies = group if small or any(depths) else 1
    group //= copies
    prompt, by_row, before = [], [], 0 if group > 1 else T
    padding = None if mask_PT.all() else ~mask_PT
    hides = list[Tensor | None]()

    def hidden(absent_PT: Tensor) -> Tensor:
        zero = torch.zeros(P * copies, T if group > 1 else T + new, device=h_PTD.device, dtype=h_PTD.dtype)
        zero[:, :T].masked_fill_(absent_PT.repeat_interleave(copies, dim=0), -torch.inf)
        return zero

    of_padding = None if padding is None else hidden(padding)
    for layer, depth in zip(lm.blocks(), depths, strict=True):
        q, k, v = layer.split_qkv(h_PTD, rope, marks)
        # padding is on the right, so causal attention never reads it
        seen = mask_PT[:, None, None] if prefix else None
        if depth is None:
            grouped = k.shape[1] != q.shape[1]
            a_BHTE = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, is_causal=not prefix, enable_gqa=grouped)
            h_PTD, _ = layer.residual_mlp(h_PTD, a_BHTE.transpose(1, 2).reshape(P, T, D), marks)
            hides.append(of_padding)
        else:
            hides.append(hidden(~depth.choose(h_PTD, mask_PT.long())[1]))
            h_PTD, *_ = depth(h_PTD, rope, seen, marks)
        if copies > 1:
            k, v = k.repeat_interleave(copies, dim=0), v.repeat_interleave(copies, dim=0)
        keys, values = k.flatten(0, 1).transpose(1, 2), v.flatten(0, 1)
        rows, E = len(keys) * group, k.shape[3]
        cache = keys.new_empty(rows, E, before + new), values.new_empty(rows, before + new, E)
        if group > 1:
            prompt.append((keys.contiguous(), values.contiguous()))
        else:
            cache[0][:, :, :T], cache[1][:, :T] = keys, values
        by_row.append(cache)
    last_PD = h_PTD[torch.arange(P, device=h_PTD.device), length_P - 1]
    length_R = length_P.repeat_interleave(copies * group)
    return _State(prompt if group > 1 else None, by_row, hides, depths, length_R, group, before), lm.norm(last_PD)
