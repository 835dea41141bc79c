"""Universal layers: transformer layers above the towers, shared by modalities; images pass through learned latents.

    text     h_n = layer_n(h_{n-1})                                                 u = norm(h_N)
    image    q_0 = latents,   q_n = layer_n(q_{n-1} given h)   for n < N
             y = layer_N(h given q_{N-1}):  in the last one roles are swapped       u = norm_v(h + norm(y))

    layer(h)           f(a),                  a = h + self(norm(h)),   f(a) = a + mlp(norm(a))
    layer(h given c)   f(a + cross(a, c)),    cross: queries of norm(a), keys and values of norm(c)

Self-attention and MLP of a layer have the same weights for all inputs.
Source: Xu 2023 (mPLUG-2, arXiv 2302.00402) and its release (X-PLUG/mPLUG-2, modeling_mplug2.py: 2 layers, 50 latents,
normally distributed; its vision MLPs are built but not called). The release has BERT's norms after each branch; here
they are before it, as in all blocks. Only the release swaps the roles. By a reading note on the paper, of which we had
no copy, latents query in all layers and are the output (``output: latents``).
Letters: B samples, T tokens, S tokens that are attended to, L latents, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from descant.modules.core.host import derive, has_host_copy, host_copy
from descant.modules.core.sham import Sham
from descant.modules.moe import ExpertLayers, Marks, MoELayer, Routing, observe
from descant.modules.towers.base import Tokens
from descant.modules.towers.image import Block, all_real, checked_heads, cross_attention, key_mask, xavier
from descant.modules.towers.text import columns

#: ``layer(h, context)`` -> ``[B, T, D]``: tokens after attention to themselves and to the context.
Reads = Callable[[Tokens, Tokens], Tensor]


def role_swap(
    h: Tokens, latents_LD: Tensor, layers: Sequence[Reads], handed_on: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """Compute ``y_BTD``: latents query the tokens in all layers but the last, where tokens query the latents.

        q_0 = latents,   q_n = layer_n(q_{n-1}, h)  for n < N,   y = layer_N(h, q_{N-1})

    Args:
        h: tokens of each sample. latents_LD: the same for all samples. layers: N of them.
        handed_on: maps the latents to those that the last layer reads; unchanged if not given.

    >>> h = Tokens(torch.tensor([[[2.0], [4.0]]]), torch.ones(1, 2, dtype=torch.bool))
    >>> layers = [lambda q, c: q.h_BTD + c.h_BTD.mean(dim=1, keepdim=True)] * 2
    >>> role_swap(h, torch.tensor([[1.0], [3.0]]), layers).flatten().tolist()  # latents 4 and 6, of mean 5
    [7.0, 9.0]
    """
    q = latent_queries(h, latents_LD, layers[:-1])
    return layers[-1](h, q if handed_on is None else q._replace(h_BTD=handed_on(q.h_BTD)))


def latent_queries(h: Tokens, latents_LD: Tensor, layers: Sequence[Reads]) -> Tokens:
    """Let the latents query the tokens of each sample, layer by layer: ``q_BLD``."""
    q_BLD = latents_LD.to(h.h_BTD).expand(len(h.h_BTD), -1, -1)
    for layer in layers:
        q_BLD = layer(Tokens(q_BLD, all_real(q_BLD)), h)
    return Tokens(q_BLD, all_real(q_BLD))


class UniversalBlock(Block):
    """Transformer block over tokens that can also read a context, by cross-attention between its two branches.

    Args:
        width, heads, mlp_ratio, dropout: as in the patch tower. crosses: whether it has cross-attention.

    >>> block, all_4 = UniversalBlock(8, 2), torch.ones(3, 4, dtype=torch.bool)
    >>> context = Tokens(torch.randn(3, 5, 8), torch.ones(3, 5).bool())
    >>> block.attend_context(Tokens(torch.randn(3, 4, 8), all_4), context).shape
    torch.Size([3, 4, 8])
    """

    def __init__(
        self, width: int, heads: int, mlp_ratio: float = 4.0, dropout: float = 0.0, crosses: bool = True
    ) -> None:
        super().__init__(width, heads, mlp_ratio, dropout)
        self.cross = nn.ModuleDict()
        if crosses:
            linear = {
                "query": nn.Linear(width, width),
                "kv": nn.Linear(width, 2 * width),
                "out": nn.Linear(width, width),
            }
            xavier(*linear.values())
            self.cross.update({**linear, "norm": nn.LayerNorm(width), "norm_given": nn.LayerNorm(width)})

    def attend_context(self, h: Tokens, context: Tokens) -> Tensor:
        """Let tokens attend to themselves, then to the context: ``[B, T, D]``."""
        h_BTD = h.h_BTD + self._drop(self.attention(self.norm_1(h.h_BTD), key_mask(h.mask_BT), False))
        h_BTD = h_BTD + self._drop(self._cross_attention(h_BTD, context))
        return h_BTD + self._drop(self.mlp(self.norm_2(h_BTD)))

    def _cross_attention(self, h_BTD: Tensor, context: Tokens) -> Tensor:
        q_BTD = self.cross["query"](self.cross["norm"](h_BTD))
        kv_BTC = self.cross["kv"](self.cross["norm_given"](context.h_BTD))
        p = self.dropout if self.training else 0.0
        return self.cross["out"](cross_attention(q_BTD, kv_BTC, self.heads, key_mask(context.mask_BT), p))


class ExpertBlock(Block):
    """Transformer block on dense tokens with sparse experts instead of its MLP; it also returns their routing.

    >>> from descant.modules.moe import TopKRouter
    >>> block = ExpertBlock(8, 2, ExpertLayers(experts=4, router=TopKRouter()).build(8, 32, "gelu"))
    >>> h_BTD, routing = block(torch.randn(2, 3, 8))
    >>> h_BTD.shape, routing.expert.shape
    (torch.Size([2, 3, 8]), torch.Size([6, 2]))
    """

    def __init__(self, width: int, heads: int, moe: MoELayer, dropout: float = 0.0) -> None:
        super().__init__(width, heads, 1.0, dropout)
        del self.mlp
        self.moe = moe

    def forward(  # type: ignore[override]  # also takes marks and returns the routing
        self, h_BTD: Tensor, mask: Tensor | None = None, marks: Marks | None = None
    ) -> tuple[Tensor, Routing]:
        h_BTD = h_BTD + self._drop(self.attention(self.norm_1(h_BTD), mask, False))
        y_BTD, routing = self.moe(self.norm_2(h_BTD), marks or Marks())
        return h_BTD + self._drop(y_BTD), routing


class UniversalLayers(nn.Module):
    """Universal layers of mPLUG-2: tokens of ``direct`` modalities pass them directly, others by learned latents.

        direct: u = norm(layers(h)),     others: u = norm_v(h + norm(role_swap(h, latents, layers)))

    Args:
        width: D, of all towers below. depth: N. heads, mlp_ratio, dropout: of the blocks.
        latents: L; none: plain layers that the tokens of all modalities pass directly, as one trunk.
        direct: modalities whose tokens pass the layers directly; [text] if not given.
        output: output of the other modalities: their ``tokens``, after reading the latents (the release), or the
            ``latents``.
        sham: ``permute``: the latents that the last layer reads, or that are the output, are another sample's.
        experts: which layers have sparse experts instead of their MLP, only without latents; none if not given. The
            kind of a token is its modality, in their order; its task is the source of its sample.

    >>> layers = UniversalLayers(width=8, depth=2, heads=2, latents=3).build({"image": 8, "text": 8})
    >>> h = Tokens(torch.randn(4, 5, 8), torch.ones(4, 5, dtype=torch.bool))
    >>> layers(h, "image").h_BTD.shape, layers(h, "text").h_BTD.shape
    (torch.Size([4, 5, 8]), torch.Size([4, 5, 8]))
    """

    def __init__(
        self,
        width: int = 128,
        depth: int = 2,
        heads: int = 4,
        latents: int | None = 50,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
        direct: list[str] | None = None,
        output: Literal["tokens", "latents"] = "tokens",
        sham: Literal["permute"] | None = None,
        experts: ExpertLayers | None = None,
    ) -> None:
        super().__init__()
        if depth < 1 or (latents is not None and latents < 1):
            raise ValueError(f"depth {depth}, latents {latents}: at least 1 each; no latents: null")
        self.width, self.direct, self.output = width, ("text",) if direct is None else tuple(direct), output
        crosses = latents is not None
        self.experts = experts
        if experts is not None:
            experts.require(depth)
            if crosses:
                raise ValueError("experts: of layers that all modalities pass as they are; give latents: null")

        def block(layer: int) -> Block:
            if experts is None or not experts.at(layer):
                return UniversalBlock(width, checked_heads(width, heads), mlp_ratio, dropout, crosses)
            return ExpertBlock(width, heads, experts.build(width, int(width * mlp_ratio), "gelu"), dropout)

        self.layers = nn.ModuleList(block(layer) for layer in range(depth))
        self.norm = nn.LayerNorm(width)
        self.latents_LD = None if latents is None else nn.Parameter(torch.randn(latents, width))
        self.norm_v = nn.LayerNorm(width) if crosses and output == "tokens" else None
        self.sham, self.modalities = Sham(sham), tuple[str, ...]()

    def build(self, widths: Mapping[str, int]) -> Self:
        """Build for modalities whose towers have these widths; return itself. Freeze parts that no modality uses."""
        for m in (m for m in widths if widths[m] != self.width):
            raise ValueError(
                f"universal: tower {m} has the width {widths[m]}, and these layers {self.width}: one for all"
            )
        self.modalities, queried = tuple(widths), any(self.uses_latents(m) for m in widths)
        for name, p in self.named_parameters():
            of_latents = any(part in name for part in ("latents", "norm_v", "cross"))
            p.requires_grad_(bool(widths) and (queried or not of_latents))
        return self

    def uses_latents(self, modality: str) -> bool:
        """Whether learned latents query the tokens of this modality."""
        return self.latents_LD is not None and modality not in self.direct

    def forward(
        self,
        tokens: Tokens,
        modality: str,
        draw_B: Tensor | None = None,
        present_B: Tensor | None = None,
        source_B: Tensor | None = None,
        routings: list[list[Routing]] | None = None,
    ) -> Tokens:
        """Return a modality's tokens after the layers, or unchanged if it passes none; absent samples have none.

        ``draw_B``, ``present_B``: keys of the samples and whether they are present, for the sham. ``source_B``: their
        tasks, for routers of experts. ``routings``: a list to which a call appends the routings of its layers.
        """
        if modality not in self.modalities:
            return tokens
        h_BTD, mask_BT = tokens
        given = [layer.attend_context for layer in self.layers if isinstance(layer, UniversalBlock)]

        def handed_on(q_BLD: Tensor) -> Tensor:
            return q_BLD if draw_B is None else self.sham(q_BLD, draw_B, present_B)

        if self.latents_LD is None or modality in self.direct:
            T = mask_BT.shape[1]
            longest = columns(mask_BT) if has_host_copy(mask_BT) else T  # columns of only padding are not computed
            h_BTD = self._run_layers(h_BTD[:, :longest], mask_BT[:, :longest], modality, source_B, routings)
            h_BTD = F.pad(self.norm(h_BTD), (0, 0, 0, T - longest))
        elif self.norm_v is not None:
            h_BTD = self.norm_v(h_BTD + self.norm(role_swap(tokens, self.latents_LD, given, handed_on)))
        else:
            q_BLD, real_BL = latent_queries(tokens, self.latents_LD, given)
            h_BTD, mask_BT = handed_on(self.norm(q_BLD)), real_BL & mask_BT.any(dim=1, keepdim=True)
        return Tokens(h_BTD.masked_fill(~mask_BT[..., None], 0.0), mask_BT)

    def _run_layers(
        self,
        h_BTD: Tensor,
        mask_BT: Tensor,
        modality: str,
        source_B: Tensor | None,
        routings: list[list[Routing]] | None,
    ) -> Tensor:
        marks, routed = self._marks(mask_BT, modality, source_B), list[tuple[nn.Module, Routing]]()
        for layer in self.layers:
            if isinstance(layer, ExpertBlock):
                h_BTD, routing = layer(h_BTD, key_mask(mask_BT), marks)
                routed.append((layer.moe.router, routing))
            else:
                h_BTD = layer(h_BTD, key_mask(mask_BT))
        if self.training and torch.is_grad_enabled():
            observe(routed)
        if routed and routings is not None:
            routings.append([routing for _, routing in routed])
        return h_BTD

    def _marks(self, mask_BT: Tensor, modality: str, source_B: Tensor | None) -> Marks:
        """Return the marks of each token; the tasks are those of the whole batch, whatever modalities samples have."""
        if self.experts is None:
            return Marks()
        number = self.modalities.index(modality)
        kind_BT = derive(lambda mask: torch.full(mask.shape, number, device=mask.device), mask_BT)
        if source_B is None:
            return Marks(kind_BT, None, mask_BT)
        task_BT = derive(lambda source, mask: source[:, None].expand(mask.shape), source_B, mask_BT)
        return Marks(kind_BT, task_BT, mask_BT, tuple(host_copy(source_B).unique().tolist()))
