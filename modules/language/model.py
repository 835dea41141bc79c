"""Causal language model of the Llama family, small enough to train here; loads pretrained Llama weights.

Letters: B rows, T tokens, D width, H heads, K key heads, E width of a head, F width inside an MLP, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from descant.modules.core.host import derive, host_copy
from descant.modules.core.loaded import Loadable
from descant.modules.core.objects import record_arguments
from descant.modules.language.axis_rope import AxisRoPE, axis_factors
from descant.modules.language.depths import DepthLayer, DepthRouting, MixtureOfDepths
from descant.modules.moe import ExpertLayers, Marks, ModalityLinear, MoELayer, Routing, SwiGLUExperts, observe
from descant.modules.moe.modality_linear import VisualExperts, by_kind, kind_order, project_by_kind, text_weight
from descant.modules.moe.routing import UNMARKED

#: Segment id of padding.
NOWHERE = 0


class Layer(nn.Module):
    """Llama layer: ``h + W_o attention(norm_1(h))``, then ``h + W_d (silu(W_g x) * W_u x)`` with ``x = norm_2(h)``.

    ``split_qkv`` and ``residual_mlp`` are separate, so that generation can attend to cached keys and values. With
    ``moe``, experts replace the weights W of the second part. With ``visual``, each kind of token has its own weights.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        key_heads: int,
        hidden: int,
        eps: float,
        moe: MoELayer | None = None,
        visual: VisualExperts | None = None,
    ) -> None:
        super().__init__()
        plain = partial(nn.Linear, bias=False)
        projection = ModalityLinear if visual is not None and visual.attention else plain
        self.heads, self.key_heads, self.head_width = heads, key_heads, width // heads
        self.norm_1, self.norm_2 = nn.RMSNorm(width, eps), nn.RMSNorm(width, eps)
        self.qkv = projection(width, (heads + 2 * key_heads) * self.head_width)
        self.out = projection(width, width)
        self.moe = moe
        if moe is None:
            mlp = plain if visual is None else ModalityLinear
            self.gate_up, self.down = mlp(width, 2 * hidden), mlp(hidden, width)

    def split_qkv(self, h_BTD: Tensor, rope: Tensor, marks: Marks = UNMARKED) -> tuple[Tensor, Tensor, Tensor]:
        """Project to ``q_BHTE``, ``k_BKTE`` and ``v_BKTE``, with rotary positions applied."""
        B, T, _ = h_BTD.shape
        x = project_by_kind(self.qkv, self.norm_1(h_BTD), marks).view(B, T, -1, self.head_width).transpose(1, 2)
        qk, v = x.split([self.heads + self.key_heads, self.key_heads], dim=1)
        q, k = apply_rope(qk, rope).split([self.heads, self.key_heads], dim=1)
        return q, k, v

    def forward(
        self, h_BTD: Tensor, rope: Tensor, mask: Tensor | None, marks: Marks = UNMARKED
    ) -> tuple[Tensor, Routing | None]:
        """Apply the layer; also return the routing of experts.

        ``mask``: bool, broadcastable to ``[B, H, T, T]``; causal by default.
        """
        q, k, v = self.split_qkv(h_BTD, rope, marks)
        a_BHTE = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=k.shape[1] != q.shape[1]
        )
        return self.residual_mlp(h_BTD, a_BHTE.transpose(1, 2).reshape(h_BTD.shape), marks)

    def residual_mlp(
        self, h_BTD: Tensor, attended_BTD: Tensor, marks: Marks = UNMARKED
    ) -> tuple[Tensor, Routing | None]:
        h_BTD = h_BTD + project_by_kind(self.out, attended_BTD, marks)
        if self.moe is not None:
            y_BTD, routing = self.moe(self.norm_2(h_BTD), marks)
            return h_BTD + y_BTD, routing
        if isinstance(self.gate_up, ModalityLinear):
            kinds = self.gate_up.kinds
            order = kind_order(marks, kinds)
            return h_BTD + by_kind([partial(self.mlp_of, k) for k in range(kinds)], self.norm_2(h_BTD), order), None
        gate, up = self.gate_up(self.norm_2(h_BTD)).chunk(2, dim=-1)
        return h_BTD + self.down(F.silu(gate) * up), None

    def mlp_of(self, kind: int, x_ND: Tensor) -> Tensor:
        """Apply the MLP with a kind's weights, if both of its layers have weights for each kind."""
        inward, outward = cast(ModalityLinear, self.gate_up).of(kind), cast(ModalityLinear, self.down).of(kind)
        gate, up = F.linear(x_ND, inward).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, outward)


class CausalLM(Loadable):
    """Causal language model (Llama): ``h = norm(layer_n(... layer_1(embed(ids))))``, ``logits = h W^T``.

    W are the embeddings, or separate weights. A row may pack several documents: tokens attend causally within their
    segment, and positions count from its start. Segment 0 is padding. Tokens of a prefix see one another both ways.

    Args:
        vocab: V. width: D. depth: number of layers. heads: H. key_heads: K, H by default. hidden: F, by default 8 / 3
            D, rounded up to a multiple of 8.
        length: maximum number of tokens in a document.
        theta: of the rotary positions (RoPE). tie: the head shares the embeddings' weights. eps: of the norms.
        experts: which layers have sparse experts instead of their MLP; none if not given.
        positions: positions on three axes (M-RoPE); on one by default.
        depths: layers that take only a share of the tokens; none if not given.
        visual: separate weights for the tokens of images; none if not given.
        kinds: the first ids of kinds 1, 2, ... of tokens, for routers of experts, if images are ids of the vocabulary,
            such as those of codes. By default image tokens are of kind 1 and all others of kind 0.

    >>> lm = CausalLM(vocab=11, width=8, depth=1, heads=2)
    >>> h_BTD = lm(lm.embed(torch.tensor([[3, 4, 5]])))
    >>> lm.logits(h_BTD).shape
    torch.Size([1, 3, 11])
    """

    #: Layers that are neither adapted nor quantised: their weights are read directly.
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
        experts: ExpertLayers | None = None,
        positions: AxisRoPE | None = None,
        depths: MixtureOfDepths | None = None,
        visual: VisualExperts | None = None,
        kinds: list[int] | None = None,
    ) -> None:
        self.arguments = record_arguments(locals())
        super().__init__()
        key_heads = heads if key_heads is None else key_heads
        if width % heads or width // heads % 2:
            raise ValueError(f"heads {heads}: width {width} over heads must be an even number")
        if heads % key_heads:
            raise ValueError(f"key_heads {key_heads} does not divide heads {heads}")
        bounds = [0, *(kinds or []), vocab]
        if any(first >= second for first, second in pairwise(bounds)):
            raise ValueError(f"kinds {kinds}: rising ids from 1 to {vocab - 1}, the first of each kind but that of 0")
        self.kinds = kinds
        self.width, self.length, self.vocabulary, self.head_width = width, length, vocab, width // heads
        hidden = -(-8 * width // 3 // 8) * 8 if hidden is None else hidden
        self.embedding = nn.Embedding(vocab, width)
        self.experts = experts
        if experts is not None:
            experts.require(depth)
        layers = [Layer(width, heads, key_heads, hidden, eps, self._moe(i, hidden), visual) for i in range(depth)]
        self.layers = nn.ModuleList(layers if depths is None else depths.wrap(layers, width))
        self.routes = experts is not None or depths is not None or visual is not None
        self.visual = visual
        self.norm = nn.RMSNorm(width, eps)
        self.head = nn.Linear(width, vocab, bias=False)
        for module in reversed(list(self.modules())):  # children before their parents
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, Layer):  # keeps the scale of the residual stream (Radford 2019)
                for part in (module.out, module.down) if module.moe is None else (module.out,):
                    part.weight.data.div_((2 * depth) ** 0.5)
            if isinstance(module, SwiGLUExperts):
                module.scale_output((2 * depth) ** -0.5)
        self.copy_to_experts()
        if tie:
            self.head.weight = self.embedding.weight
        E = width // heads
        self.theta = theta
        angle = torch.outer(torch.arange(length).float(), rope_frequencies(theta, E))
        self.register_buffer("rope_T", torch.polar(torch.ones_like(angle), angle), persistent=False)
        self.axis_F: Tensor | None
        self.register_buffer("axis_F", None if positions is None else positions.axes(E // 2), persistent=False)

    def _moe(self, layer: int, hidden: int) -> MoELayer | None:
        if self.experts is None or not self.experts.at(layer):
            return None
        return self.experts.build(self.width, hidden, "swiglu", layer)

    def blocks(self) -> list[Layer]:
        """List the layers, without the routers of those that take a share of the tokens."""
        return [layer.layer if isinstance(layer, DepthLayer) else layer for layer in self.layers]  # type: ignore[misc]

    def copy_to_experts(self) -> None:
        """Reset visual experts to the weights of words."""
        for module in self.modules():
            if isinstance(module, ModalityLinear):
                module.copy_to_experts()

    def add_kind_order(self, marks: Marks) -> Marks:
        """Add the tokens' order by kind to the marks, if layers need it."""
        return marks if self.visual is None else marks._replace(order=kind_order(marks, kinds=2))

    def kind_of(self, ids: Tensor) -> Tensor:
        """Return the kinds of tokens by their ids, int64.

        >>> CausalLM(vocab=11, width=8, depth=1, heads=2, kinds=[5, 8]).kind_of(torch.tensor([4, 5, 10])).tolist()
        [0, 1, 2]
        """
        return derive(lambda x: sum((x >= first).long() for first in self.kinds or ()) + torch.zeros_like(x), ids)

    def embed(self, ids_BT: Tensor) -> Tensor:
        return self.embedding(ids_BT)

    def logits(self, h_BTD: Tensor) -> Tensor:
        return self.head(h_BTD)

    def rope(self, position: Tensor) -> Tensor:
        """Compute rotary factors of positions ``[B, T]``, or of three axes ``[B, T, 3]``: complex ``[B, 1, T, E / 2]``.

        Positions are integers, or fractions in float32.
        """
        rope_T, whole = self.get_buffer("rope_T"), not position.is_floating_point()
        if position.ndim == 2 and whole:
            return rope_T[position][:, None]
        frequency_F = rope_frequencies(self.theta, self.head_width, position.device)
        if position.ndim == 2:
            angle = position[..., None] * frequency_F
            return torch.polar(torch.ones_like(angle), angle)[:, None]
        if self.axis_F is None:
            raise ValueError("positions of three axes, and the model reads one: set its positions, as to AxisRoPE()")
        return axis_factors(position, self.axis_F, frequency_F, rope_T if whole else None)[:, None]

    def forward(
        self,
        h_BTD: Tensor,
        segment_BT: Tensor | None = None,
        position_BT: Tensor | None = None,
        prefix_BT: Tensor | None = None,
        marks: Marks = UNMARKED,
        routings: list[Routing] | None = None,
    ) -> Tensor:
        """Compute the features that the head reads, ``[B, T, D]``, from embeddings.

        ``segment_BT``: one document per row by default. ``position_BT``: ``[B, T]``, or ``[B, T, 3]`` on three axes;
        counted within segments by default.
        ``prefix_BT``: bool, the first tokens of each document, which all of its tokens see; none by default.
        ``marks``: marks of the tokens for routers of experts, ``[B, T]`` each; segments show which are padding.
        ``routings``: a list to which layers with experts append their routings, and then layers of ``depths`` theirs.
        """
        B, T, _ = h_BTD.shape
        if segment_BT is None and prefix_BT is not None:
            segment_BT = derive(lambda x_BT: torch.ones_like(x_BT, dtype=torch.long), prefix_BT)
        mask = None if segment_BT is None else visible(segment_BT, prefix_BT)[:, None]
        if position_BT is None and segment_BT is not None:
            position_BT = derive(positions, segment_BT)
        longest = T if position_BT is None else int(host_copy(position_BT).max()) + 1
        if longest > self.length:
            raise ValueError(
                f"length {self.length}: a document of {longest} tokens does not fit; cut it, or raise length"
            )
        rope = self.rope(torch.arange(T, device=h_BTD.device).expand(B, T) if position_BT is None else position_BT)
        if self.routes and segment_BT is not None and marks.valid is None:
            marks = marks._replace(valid=derive(lambda x_BT: x_BT != NOWHERE, segment_BT))
        marks = self.add_kind_order(marks)
        routed, depths = [], list[DepthRouting]()
        for whole, layer in zip(self.layers, self.blocks(), strict=True):
            documents = (segment_BT,) if isinstance(whole, DepthLayer) else ()
            h_BTD, routing, *taken = whole(h_BTD, rope, mask, marks, *documents)
            depths += taken
            if layer.moe is not None and routing is not None:
                routed.append((layer.moe.router, routing))
        if self.training and torch.is_grad_enabled():
            observe(routed)
        if routings is not None:
            routings += [*(routing for _, routing in routed), *depths]
        return self.norm(h_BTD)

    def load_llama(self, state: Mapping[str, Tensor]) -> None:
        """Load weights named as in transformers' LlamaForCausalLM; raise ValueError unless all fit.

        For layers with top-k experts, names are those of MixtralForCausalLM.
        """
        find = _Reader(state)
        weights = {"embedding.weight": find("model.embed_tokens.weight"), "norm.weight": find("model.norm.weight")}
        for i in range(len(self.layers)):
            old, new = f"model.layers.{i}", f"layers.{i}"
            weights[f"{new}.norm_1.weight"] = find(f"{old}.input_layernorm.weight")
            weights[f"{new}.norm_2.weight"] = find(f"{old}.post_attention_layernorm.weight")
            q, k, v = (find(f"{old}.self_attn.{x}_proj.weight") for x in "qkv")
            weights[f"{new}.qkv.weight"] = torch.cat(
                [to_adjacent_pairs(q, self.head_width), to_adjacent_pairs(k, self.head_width), v]
            )
            weights[f"{new}.out.weight"] = find(f"{old}.self_attn.o_proj.weight")
            if self.blocks()[i].moe is not None:
                weights[f"{new}.moe.router.gate_ED"] = find(f"{old}.mlp.gate.weight")
                weights[f"{new}.moe.experts.gate_up"] = find(f"{old}.mlp.experts.gate_up_proj")
                weights[f"{new}.moe.experts.down"] = find(f"{old}.mlp.experts.down_proj")
                continue
            weights[f"{new}.gate_up.weight"] = torch.cat([find(f"{old}.mlp.{x}_proj.weight") for x in ("gate", "up")])
            weights[f"{new}.down.weight"] = find(f"{old}.mlp.down_proj.weight")
        tied = self.head.weight is self.embedding.weight
        weights["head.weight"] = weights["embedding.weight"] if tied else find("lm_head.weight")
        weights |= {name: weights[of] for name in self.state_dict() if (of := text_weight(name)) in weights}
        lacks = next((n for n in self.state_dict() if n not in weights), None)
        if lacks is not None:
            raise ValueError(f"{lacks}: not in the weights")
        wrong = next((n for n, x in self.state_dict().items() if x.shape != weights[n].shape), None)
        if wrong is not None:
            given, want = tuple(weights[wrong].shape), tuple(self.state_dict()[wrong].shape)
            raise ValueError(f"{wrong}: weights of {given}, where the model has {want}")
        extra = find.unread() - {"lm_head.weight"}
        if extra:
            raise ValueError(f"{min(extra)}: in the weights, and the model has no such part")
        self.load_state_dict(weights)


class _Reader:
    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self.state, self.read = state, set[str]()

    def __call__(self, name: str) -> Tensor:
        if name not in self.state:
            raise ValueError(f"{name}: not in the weights")
        self.read.add(name)
        return self.state[name]

    def unread(self) -> set[str]:
        return {name for name in self.state if name not in self.read and not name.endswith("inv_freq")}


def rope_frequencies(theta: float, head_width: int, device: torch.device | None = None) -> Tensor:
    """Return the angle of each pair of numbers per step of one position, float32 ``[E / 2]``."""
    return theta ** (-torch.arange(0, head_width, 2, device=device).float() / head_width)


def apply_rope(x_BHTE: Tensor, rope: Tensor) -> Tensor:
    """Apply rotary positions, RoPE (Su 2021, arXiv 2104.09864): numbers 2 i, 2 i + 1 of a head are one complex number.

    The product is in float32, or in float64 if ``x`` is.
    """
    exact = x_BHTE if x_BHTE.dtype == torch.float64 else x_BHTE.float()
    pairs = torch.view_as_complex(exact.unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rope).flatten(-2).to(x_BHTE.dtype)


def to_adjacent_pairs(w_ND: Tensor, head_width: int) -> Tensor:
    """Reorder rows of a head projection from Llama's order (pairs half a head apart) to adjacent pairs.

    :func:`apply_rope` needs adjacent pairs.

    >>> to_adjacent_pairs(torch.arange(4.0)[:, None], 4).flatten().tolist()
    [0.0, 2.0, 1.0, 3.0]
    """
    return w_ND.unflatten(0, (-1, 2, head_width // 2)).transpose(1, 2).reshape(w_ND.shape)


def positions(segment_BT: Tensor) -> Tensor:
    """Return the position of each token in its document.

    >>> positions(torch.tensor([[1, 1, 2, 2, 2, 0]])).tolist()
    [[0, 1, 0, 1, 2, 0]]
    """
    T = segment_BT.shape[1]
    place_T = torch.arange(T, device=segment_BT.device)
    first_BT = torch.ones_like(segment_BT, dtype=torch.bool)
    first_BT[:, 1:] = segment_BT[:, 1:] != segment_BT[:, :-1]
    return place_T - torch.where(first_BT, place_T, 0).cummax(dim=1).values


def visible(segment_BT: Tensor, prefix_BT: Tensor | None = None) -> Tensor:
    """Return the causal mask of packed documents, bool ``[B, T, S]``.

    Token t sees a token s of its document if s is not later, or is in the prefix. Every token sees itself, padding too.

    >>> visible(torch.tensor([[1, 1, 1]]), torch.tensor([[True, True, False]])).int().tolist()
    [[[1, 1, 0], [1, 1, 0], [1, 1, 1]]]
    """
    T = segment_BT.shape[1]
    earlier_TS = torch.ones(T, T, dtype=torch.bool, device=segment_BT.device).tril()
    same_BTS = segment_BT[:, :, None] == segment_BT[:, None]
    own_TS = torch.eye(T, dtype=torch.bool, device=segment_BT.device)
    seen = earlier_TS if prefix_BT is None else earlier_TS | prefix_BT[:, None]
    return (same_BTS & seen & (segment_BT != NOWHERE)[:, :, None]) | own_TS
