"""Feed-forward layer of sparse experts: sorts tokens by expert, computes them in segments, and adds the results back.

Letters: N tokens, D width, F hidden width, E experts, K slots of a token, M computed rows.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from descant.modules.core.dtensor import local
from descant.modules.core.host import derive
from descant.modules.core.objective import count_rows_by_sample
from descant.modules.moe.capacity import Capacity
from descant.modules.moe.grouped import GELU, Segments, SwiGLU, Weights, expert_mlp, fusible
from descant.modules.moe.routing import UNMARKED, Marks, Router, Routing

#: ``(experts, x_MD, counts) -> y_MD``: computes rows sorted by expert with the experts that ranks share.
SharedExperts = Callable[["Experts", Tensor, Sequence[int]], Tensor]


class Experts(nn.Module):
    """Base of the weights of E experts: ``experts(x_MD, segments) -> y_MD`` for rows sorted by expert.

    Matrices are stacked, ``[E, out, in]``. With ``separate`` each expert has its own parameters, so that an expert may
    have no gradient. Biases are one-dimensional parameters, so that they get no weight decay, like other biases.
    """

    activation: type[SwiGLU | GELU]

    def __init__(self, width: int, hidden: int, experts: int, separate: bool = False) -> None:
        super().__init__()
        self.width, self.hidden, self.experts, self.separate = width, hidden, experts, separate

    def forward(self, x_MD: Tensor, segments: Segments, only: Sequence[int] | None = None) -> Tensor:
        """Compute the experts' outputs; ``only`` lists the experts of the segments in order, by default all."""

        def chosen(weights: Tensor | Sequence[Tensor]) -> list[Tensor]:
            if isinstance(weights, Tensor):
                return [local(weights).to(x_MD.dtype)]
            return [weights[e].to(x_MD.dtype) for e in (range(len(weights)) if only is None else only)]

        return expert_mlp(x_MD, self.weights(chosen), self.activation, segments)

    def weights(self, chosen: Callable[[Any], list[Tensor]]) -> Weights:
        """Collect the weights; ``chosen`` maps a stacked parameter, or one parameter per expert, to tensors in use."""
        raise NotImplementedError

    def matrices(self, weight_EOI: Tensor) -> nn.Parameter | nn.ParameterList:
        return nn.ParameterList(w_OI.clone() for w_OI in weight_EOI) if self.separate else nn.Parameter(weight_EOI)


class SwiGLUExperts(Experts):
    """Experts of the Llama family: ``y = W_down (silu(W_gate x) * W_up x)``, with gate above up in one matrix.

    >>> experts = SwiGLUExperts(width=4, hidden=8, experts=2)
    >>> experts(torch.randn(3, 4), Segments(torch.tensor([1, 2]), fused=False)).shape
    torch.Size([3, 4])
    """

    activation = SwiGLU

    def __init__(self, width: int, hidden: int, experts: int, separate: bool = False) -> None:
        super().__init__(width, hidden, experts, separate)
        self.gate_up = self.matrices(torch.randn(experts, 2 * hidden, width) * 0.02)
        self.down = self.matrices(torch.randn(experts, width, hidden) * 0.02)

    def weights(self, chosen: Callable[[Any], list[Tensor]]) -> Weights:
        return Weights(chosen(self.gate_up), chosen(self.down))

    def scale_output(self, factor: float) -> None:
        for down in [self.down] if isinstance(self.down, Tensor) else self.down:
            down.data.mul_(factor)


class GELUExperts(Experts):
    """Experts of a vision transformer: ``y = W_2 gelu(W_1 x + b_1) + b_2``.

    >>> experts = GELUExperts(width=4, hidden=8, experts=2)
    >>> experts(torch.randn(3, 4), Segments(torch.tensor([1, 2]), fused=False)).shape
    torch.Size([3, 4])
    """

    activation = GELU

    def __init__(self, width: int, hidden: int, experts: int, separate: bool = False) -> None:
        super().__init__(width, hidden, experts, separate)
        inward_EFD, outward_EDF = torch.empty(experts, hidden, width), torch.empty(experts, width, hidden)
        for weight in (*inward_EFD, *outward_EDF):
            nn.init.xavier_uniform_(weight)
        self.inward, self.outward = self.matrices(inward_EFD), self.matrices(outward_EDF)
        self.inward_bias, self.outward_bias = (self.biases(size) for size in (hidden, width))

    def biases(self, size: int) -> nn.Parameter | nn.ParameterList:
        if self.separate:
            return nn.ParameterList(torch.zeros(size) for _ in range(self.experts))
        return nn.Parameter(torch.zeros(self.experts * size))

    def weights(self, chosen: Callable[[Any], list[Tensor]]) -> Weights:
        rows = (torch.stack(chosen(bias)) for bias in (self.inward_bias, self.outward_bias))
        bias_EF, bias_ED = rows if self.separate else (row.view(self.experts, -1) for row in rows)
        return Weights(chosen(self.inward), chosen(self.outward), bias_EF, bias_ED)


FORMS = {"swiglu": SwiGLUExperts, "gelu": GELUExperts}


class MoELayer(nn.Module):
    """Sparse mixture of experts instead of a feed-forward layer: ``y = sum over the slots k of w_k FFN_(i_k)(h)``.

    ``h [..., D], marks -> y [..., D], Routing``. Rows are gathered by expert and computed in segments. Experts that a
    token does not choose, null experts and padding cost nothing. Every parameter has a gradient in every backward,
    zeros if no token came, so that ranks agree. Only skills that a step does not declare have no gradient
    (:class:`StaticSkill`). On a device without a grouped kernel, each layer reads the experts' counts once.

    Args:
        width: D. hidden: F, of each expert. experts: E. router: chooses the experts of each token; it is copied.
        shared: number of experts that every token runs through, with weight 1 or the router's weight.
        shared_hidden: hidden width of each shared expert; by default F.
        capacity: drops choices beyond an expert's capacity; by default nothing is dropped.
        form: class of the experts, :class:`SwiGLUExperts` or :class:`GELUExperts`.

    >>> from descant.modules.moe import TopKRouter
    >>> layer = MoELayer(width=8, hidden=16, experts=4, router=TopKRouter(k=2))
    >>> y_BTD, routing = layer(torch.randn(2, 5, 8))
    >>> y_BTD.shape, routing.expert.shape
    (torch.Size([2, 5, 8]), torch.Size([10, 2]))
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        experts: int,
        router: Router,
        shared: int | None = None,
        shared_hidden: int | None = None,
        capacity: Capacity | None = None,
        form: Literal["swiglu", "gelu"] = "swiglu",
    ) -> None:
        super().__init__()
        sizes = {"experts": experts, "shared": shared, "hidden": hidden, "shared_hidden": shared_hidden}
        for name, count in sizes.items():
            if count is not None and count < 1:
                raise ValueError(f"{name} {count}: at least 1")
        self.router = copy.deepcopy(router).build(width, experts, shared or 0)
        self.capacity = capacity
        self.group: SharedExperts | None = None  # the ranks that share the experts; None: each has all
        make = FORMS[form]
        self.experts = make(width, hidden, experts, self.router.separate)
        self.shared = make(width, hidden if shared_hidden is None else shared_hidden, shared) if shared else None

    def forward(self, h: Tensor, marks: Marks = UNMARKED) -> tuple[Tensor, Routing]:
        h_ND = h.flatten(0, -2)
        routing = self.router(h_ND, marks.map(torch.flatten))
        if self.capacity is not None and self.training:
            routing = self.capacity(routing, self.router.experts)
        y_ND = self.dispatch(h_ND, routing)
        if self.shared is not None:
            y_ND = y_ND + self._run_shared_experts(h_ND, routing.shared)
        return y_ND.view(h.shape), routing

    def dispatch(self, h_ND: Tensor, routing: Routing) -> Tensor:
        """Sum the chosen experts' outputs: gather rows, compute them by expert, scatter them back."""
        dtype, only, group = _compute_dtype(h_ND), self.router.declared_experts(routing.marks), self.group
        segments, order_M, token_M = self.sort_slots(routing, group is None and fusible(h_ND, dtype), only)
        x_MD = h_ND.to(dtype).index_select(0, token_M)
        y_MD = self.experts(x_MD, segments, only) if group is None else group(self.experts, x_MD, segments.counts)
        y_MD = y_MD * routing.weight.flatten().index_select(0, order_M).to(dtype)[:, None]
        return y_MD.new_zeros(h_ND.shape).index_add(0, token_M, y_MD)

    def sort_slots(
        self, routing: Routing, fused: bool = False, only: Sequence[int] | None = None
    ) -> tuple[Segments, Tensor, Tensor]:
        """Return the experts' segments, the slots of their rows in order, and these slots' tokens, int64 ``[M]``."""
        K, E = routing.expert.shape[1], self.router.experts
        key_M = derive(lambda expert, runs: torch.where(runs, expert, E).flatten(), routing.expert, routing.runs(E))
        segments = Segments(_counts(key_M, E, only), fused)
        order_M = segments.rows(key_M.argsort(stable=True))
        return segments, order_M, order_M // K

    def _run_shared_experts(self, h_ND: Tensor, weight_NS: Tensor | None) -> Tensor:
        assert self.shared is not None
        S, dtype = self.shared.experts, _compute_dtype(h_ND)
        count_S = derive(lambda x: torch.full((S,), len(x), device=x.device), h_ND[:, 0])
        x_MD = h_ND.to(dtype).repeat(S, 1)
        y_SND = self.shared(x_MD, Segments(count_S, fusible(h_ND, dtype))).unflatten(0, (S, -1))
        if weight_NS is not None:
            y_SND = y_SND * weight_NS.T[..., None].to(dtype)
        return y_SND.sum(dim=0)


def _counts(key_M: Tensor, experts: int, only: Sequence[int] | None) -> Tensor:
    """Count the rows of each expert, or of the experts in ``only``."""

    def count(key: Tensor) -> Tensor:
        count_E = count_rows_by_sample(key, experts + 1)[:experts]
        return count_E if only is None else torch.stack([count_E[e] for e in only])  # indexing by a list uploads it

    return derive(count, key_M)


def _compute_dtype(h: Tensor) -> torch.dtype:
    """Return the dtype in which a linear layer would compute."""
    kind = h.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) and h.is_floating_point() else h.dtype


class ExpertLayers:
    """Choice of the layers of a network that get experts instead of a feed-forward layer, and of their router.

    Layers ``every - 1``, ``2 every - 1``, ... (from 0) have experts; the others keep their names and weights.

    Args:
        experts: number of experts in each such layer. router: copied for each layer.
        hidden: hidden width of an expert; by default that of the dense layers.
        shared, shared_hidden, capacity: as in :class:`MoELayer`.
        every: 1 for all layers, 2 for every second one (MoIIE).
        balance: weight of the balance loss, a mean over layers; None: no balance loss.
        z: weight of the z-loss, likewise.
        balance_over: P of the balance loss is the softmax over ``all`` experts (Switch), or over the ``chosen`` ones of
            each token, as in the release of Uni-MoE-2.0-Omni, whose ``balance`` is .025.
        answers: weight of an answer's tokens in the balance loss; other tokens have 1, and that release uses 10.

    >>> from descant.modules.moe import TopKRouter
    >>> experts = ExpertLayers(experts=4, router=TopKRouter(k=2), every=2)
    >>> [experts.at(i) for i in range(4)]
    [False, True, False, True]
    """

    def __init__(
        self,
        experts: int,
        router: Router,
        hidden: int | None = None,
        shared: int | None = None,
        shared_hidden: int | None = None,
        every: int = 1,
        capacity: Capacity | None = None,
        balance: float | None = 0.01,
        z: float | None = None,
        balance_over: Literal["all", "chosen"] = "all",
        answers: float = 1.0,
    ) -> None:
        if every < 1:
            raise ValueError(f"every {every}: at least 1")
        for name, weight in (("balance", balance), ("z", z), ("answers", answers)):
            if weight is not None and not weight > 0:
                raise ValueError(f"{name} {weight:g}: above 0, or none")
        self.experts, self.router, self.hidden, self.every = experts, router, hidden, every
        self.shared, self.shared_hidden, self.capacity = shared, shared_hidden, capacity
        self.balance, self.z, self.balance_over, self.answers = balance, z, balance_over, answers

    def at(self, layer: int) -> bool:
        """Whether a layer, counted from 0, has experts."""
        return (layer + 1) % self.every == 0

    def require(self, depth: int) -> None:
        """Raise ValueError if no layer of a network of this depth has experts."""
        if self.every > depth:
            raise ValueError(f"experts.every {self.every}: none of {depth} layers has experts; {depth} is the most")

    def build(self, width: int, hidden: int, form: Literal["swiglu", "gelu"], number: int = 0) -> MoELayer:
        """Build layer ``number``, which replaces a feed-forward layer of this hidden width."""
        own = hidden if self.hidden is None else self.hidden
        sizes = (self.experts, self.router, self.shared, self.shared_hidden, self.capacity)
        layer = MoELayer(width, own, *sizes, form)
        layer.router.layer = number
        return layer
