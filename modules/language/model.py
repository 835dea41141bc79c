"""A causal language model of the Llama family, small enough to train here and open to pretrained weights.

Letters: B rows, T tokens, D width, H heads, K key heads, E width of a head, F width inside an MLP, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from descant.modules.core.host import derived, host_copy

#: The segment of padding.
NOWHERE = 0


class Layer(nn.Module):
    """``h + W_o attention(norm_1(h))``, then ``h + W_d (silu(W_g x) * W_u x)`` with ``x = norm_2(h)``.

    In two parts, so that whoever keeps keys and values decides what is attended to.
    """

    def __init__(self, width: int, heads: int, key_heads: int, hidden: int, eps: float) -> None:
        super().__init__()
        self.heads, self.key_heads, self.head_width = heads, key_heads, width // heads
        self.norm_1, self.norm_2 = nn.RMSNorm(width, eps), nn.RMSNorm(width, eps)
        self.qkv = nn.Linear(width, (heads + 2 * key_heads) * self.head_width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.gate_up = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def split_qkv(self, h_BTD: Tensor, turn: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``q_BHTE``, ``k_BKTE`` and ``v_BKTE``, turned by their positions."""
        B, T, _ = h_BTD.shape
        x = self.qkv(self.norm_1(h_BTD)).view(B, T, -1, self.head_width).transpose(1, 2)
        qk, v = x.split([self.heads + self.key_heads, self.key_heads], dim=1)
        q, k = apply_rope(qk, turn).split([self.heads, self.key_heads], dim=1)
        return q, k, v

    def forward(self, h_BTD: Tensor, turn: Tensor, see: Tensor | None) -> Tensor:
        """``see``: bool, broadcastable to ``[B, H, T, T]``; every token and what is left of it where not given."""
        q, k, v = self.split_qkv(h_BTD, turn)
        a_BHTE = F.scaled_dot_product_attention(
            q, k, v, attn_mask=see, is_causal=see is None, enable_gqa=k.shape[1] != q.shape[1]
        )
        return self.residual_mlp(h_BTD, a_BHTE.transpose(1, 2).reshape(h_BTD.shape))

    def residual_mlp(self, h_BTD: Tensor, attended_BTD: Tensor) -> Tensor:
        h_BTD = h_BTD + self.out(attended_BTD)
        gate, up = self.gate_up(self.norm_2(h_BTD)).chunk(2, dim=-1)
        return h_BTD + self.down(F.silu(gate) * up)


class CausalLM(nn.Module):
    """``h = norm(layer_n(... layer_1(embed(ids))))``, ``logits = h W^T`` with the embeddings as W, or its own.

    Rows may hold several documents: tokens of one segment see each other, from left to right, and count positions from
    its beginning. Segment 0 is padding.

    Args:
        vocab: V. width: D. depth: layers. heads: H. key_heads: K, H where not given. hidden: F, the multiple of 8 next
            to 8 / 3 D where not given.
        length: most tokens of a document.
        theta: of the positions (RoPE). tie: the head has the embeddings' weights. eps: of the norms.

    Raises:
        ValueError: if ``heads`` does not divide ``width``, ``key_heads`` not ``heads``, or a head is of odd width; in
            forward, for a document longer than ``length``.

    >>> lm = CausalLM(vocab=11, width=8, depth=1, heads=2)
    >>> h_BTD = lm(lm.embed(torch.tensor([[3, 4, 5]])))
    >>> lm.logits(h_BTD).shape
    torch.Size([1, 3, 11])
    """

    #: Layers whose weights others read as they are: neither adapted nor quantised.
    bare = ("head",)

    def __init__(
        self,
        vocab: int,
        width: int,
        depth: int,
        heads: int,
        key_heads: int | None = None,
        hidden: int | None = None,
        length: int = 2048,
        theta: float = 10000.0,
        tie: bool = True,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        key_heads = heads if key_heads is None else key_heads
        if width % heads or width // heads % 2:
            raise ValueError(f"heads {heads}: each needs an even share of width {width}")
        if heads % key_heads:
            raise ValueError(f"key_heads {key_heads}: as many of the {heads} heads share each")
        self.width, self.length, self.vocabulary, self.head_width = width, length, vocab, width // heads
        hidden = -(-8 * width // 3 // 8) * 8 if hidden is None else hidden
        self.embedding = nn.Embedding(vocab, width)
        self.layers = nn.ModuleList(Layer(width, heads, key_heads, hidden, eps) for _ in range(depth))
        self.norm = nn.RMSNorm(width, eps)
        self.head = nn.Linear(width, vocab, bias=False)
        for module in reversed(list(self.modules())):  # parts before the layers that they are of
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, Layer):  # what layers add up to stays of one size (Radford 2019)
                for part in (module.out, module.down):
                    part.weight.data.div_((2 * depth) ** 0.5)
        if tie:
            self.head.weight = self.embedding.weight
        E = width // heads
        self.theta = theta
        angle = torch.outer(torch.arange(length).float(), turn_frequencies(theta, E))
        self.register_buffer("turn_T", torch.polar(torch.ones_like(angle), angle), persistent=False)

    def blocks(self) -> list[Layer]:
        return list(self.layers)  # type: ignore[arg-type]

    def embed(self, ids_BT: Tensor) -> Tensor:
        return self.embedding(ids_BT)

    def logits(self, h_BTD: Tensor) -> Tensor:
        return self.head(h_BTD)

    def turn(self, position_BT: Tensor) -> Tensor:
        """Complex ``[B, 1, T, E / 2]``: what pairs of numbers of a head are multiplied by at these positions, whole
        ones or float32 between them."""
        turn_T = self.get_buffer("turn_T")
        if not position_BT.is_floating_point():
            return turn_T[position_BT][:, None]
        angle = position_BT[..., None] * turn_frequencies(self.theta, 2 * turn_T.shape[1], position_BT.device)
        return torch.polar(torch.ones_like(angle), angle)[:, None]

    def forward(self, h_BTD: Tensor, segment_BT: Tensor | None = None, position_BT: Tensor | None = None) -> Tensor:
        """Embeddings -> what the head reads, ``[B, T, D]``; ``segment_BT``: one document a row where not given;
        ``position_BT``: counted token by token where not given."""
        B, T, _ = h_BTD.shape
        see = None if segment_BT is None else visible(segment_BT)[:, None]
        counted = segment_BT is None and position_BT is None  # one document a row
        if position_BT is not None:
            pass
        elif segment_BT is None:
            position_BT = torch.arange(T, device=h_BTD.device).expand(B, T)
        else:
            position_BT = derived(positions, segment_BT)
        longest = T if counted else int(host_copy(position_BT).max()) + 1
        if longest > self.length:
            raise ValueError(
                f"length {self.length}: a document of {longest} tokens does not fit; cut it or raise length"
            )
        turn = self.turn(position_BT)
        for layer in self.layers:
            h_BTD = layer(h_BTD, turn, see)
        return self.norm(h_BTD)

    def load_llama(self, state: Mapping[str, Tensor]) -> None:
        """Weights under the names of transformers' LlamaForCausalLM. Raises ValueError for what does not fit."""
        find = _Finder(state)
        mine = {"embedding.weight": find("model.embed_tokens.weight"), "norm.weight": find("model.norm.weight")}
        for i in range(len(self.layers)):
            old, new = f"model.layers.{i}", f"layers.{i}"
            mine[f"{new}.norm_1.weight"] = find(f"{old}.input_layernorm.weight")
            mine[f"{new}.norm_2.weight"] = find(f"{old}.post_attention_layernorm.weight")
            q, k, v = (find(f"{old}.self_attn.{x}_proj.weight") for x in "qkv")
            mine[f"{new}.qkv.weight"] = torch.cat([paired(q, self.head_width), paired(k, self.head_width), v])
            mine[f"{new}.out.weight"] = find(f"{old}.self_attn.o_proj.weight")
            mine[f"{new}.gate_up.weight"] = torch.cat([find(f"{old}.mlp.{x}_proj.weight") for x in ("gate", "up")])
            mine[f"{new}.down.weight"] = find(f"{old}.mlp.down_proj.weight")
        tied = self.head.weight is self.embedding.weight
        mine["head.weight"] = mine["embedding.weight"] if tied else find("lm_head.weight")
        wrong = next((n for n, x in self.state_dict().items() if x.shape != mine[n].shape), None)
        if wrong is not None:
            have, want = tuple(mine[wrong].shape), tuple(self.state_dict()[wrong].shape)
            raise ValueError(f"{wrong}: weights of {have}, where the model has {want}")
        left = find.left() - {"lm_head.weight"}
        if left:
            raise ValueError(f"{min(left)}: in the weights, and the model has no such part")
        self.load_state_dict(mine)


class _Finder:
    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self.state, self.seen = state, set[str]()

    def __call__(self, name: str) -> Tensor:
        if name not in self.state:
            raise ValueError(f"{name}: not in the weights")
        self.seen.add(name)
        return self.state[name]

    def left(self) -> set[str]:
        return {name for name in self.state if name not in self.seen and not name.endswith("inv_freq")}


def turn_frequencies(theta: float, head_width: int, device: torch.device | None = None) -> Tensor:
    """float32 ``[E / 2]``: by how much a step of one position turns each pair of numbers."""
    return theta ** (-torch.arange(0, head_width, 2, device=device).float() / head_width)


def apply_rope(x_BHTE: Tensor, turn: Tensor) -> Tensor:
    """Rotary positions (Su 2021, arXiv 2104.09864): numbers 2 i and 2 i + 1 of a head as one complex number."""
    pairs = torch.view_as_complex(x_BHTE.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turn).flatten(-2).to(x_BHTE.dtype)


def paired(w_ND: Tensor, head_width: int) -> Tensor:
    """The rows of a projection to heads whose pairs are half a head apart, side by side, as :func:`turned` has them.

    >>> paired(torch.arange(4.0)[:, None], 4).flatten().tolist()
    [0.0, 2.0, 1.0, 3.0]
    """
    return w_ND.unflatten(0, (-1, 2, head_width // 2)).transpose(1, 2).reshape(w_ND.shape)


def positions(segment_BT: Tensor) -> Tensor:
    """How many tokens of its document stand before each.

    >>> positions(torch.tensor([[1, 1, 2, 2, 2, 0]])).tolist()
    [[0, 1, 0, 1, 2, 0]]
    """
    T = segment_BT.shape[1]
    place_T = torch.arange(T, device=segment_BT.device)
    first_BT = torch.ones_like(segment_BT, dtype=torch.bool)
    first_BT[:, 1:] = segment_BT[:, 1:] != segment_BT[:, :-1]
    return place_T - torch.where(first_BT, place_T, 0).cummax(dim=1).values


def visible(segment_BT: Tensor) -> Tensor:
    """Bool ``[B, T, S]``: token s is of the same document and not later; each token sees itself, padding too."""
    T = segment_BT.shape[1]
    earlier_TS = torch.ones(T, T, dtype=torch.bool, device=segment_BT.device).tril()
    same_BTS = segment_BT[:, :, None] == segment_BT[:, None]
    own_TS = torch.eye(T, dtype=torch.bool, device=segment_BT.device)
    return (same_BTS & earlier_TS & (segment_BT != NOWHERE)[:, :, None]) | own_TS
