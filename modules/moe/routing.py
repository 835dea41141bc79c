"""Routers of sparse experts: they choose each token's experts and their weights.

A router is a module around pure functions of tensors, which also work in float64. Scores are computed in float32 or
finer, outside of autocast. Letters: N tokens, D width, E experts (null ones after the real ones), K slots of a token,
S shared experts, T tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from descant.modules.core.dtype import promote
from descant.modules.core.errors import require_value
from descant.modules.core.host import derive, everyone, host_copy
from descant.modules.core.part import StepPart
from descant.modules.core.ranks import total_of_ranks
from descant.modules.core.sham import Sham, partners


class KindOrder(NamedTuple):
    """Order of N tokens by kind.

    Attributes:
        counts: number of tokens of each kind, on the host.
        order_N, inverse_N: int64, the tokens sorted by kind, and each token's place there; None if all are of kind 0.
    """

    counts: tuple[int, ...]
    order_N: Tensor | None = None
    inverse_N: Tensor | None = None


class Marks(NamedTuple):
    """Properties of tokens that a router may use besides their hidden states; explicit, and packed with the tokens.

    Attributes:
        kind: int64 ``[N]``, such as 0 for text and 1 for images. task: int64 ``[N]``, the task of the token's sample.
        valid: bool ``[N]``, tokens that are not padding; None: all.
        tasks: tasks of the whole optimizer step (all ranks and micro-batches), on the host; those in ``task`` if None.
        order: the tokens sorted by kind, for all layers that need it; if None, each of them computes it.
        key: int64 ``[N]``, a random number per token, from which its draws are computed.
        weight: float ``[N]``, the weight of a token in the balance loss; 1 if None.
    """

    kind: Tensor | None = None
    task: Tensor | None = None
    valid: Tensor | None = None
    tasks: tuple[int, ...] | None = None
    order: KindOrder | None = None
    key: Tensor | None = None
    weight: Tensor | None = None

    def map(self, function: Callable[..., Tensor], *at: Tensor) -> Marks:
        """Return the marks with ``function(x, *at)`` applied to each tensor x, and to host copies if all have one."""
        every = (*self[:3], self.key, self.weight)
        kind, task, valid, key, weight = (None if x is None else derive(function, x, *at) for x in every)
        return Marks(kind, task, valid, self.tasks, key=key, weight=weight)

    def need(self, name: Literal["kind", "task", "key"], router: object) -> Tensor:
        """Return a mark. Raise ValueError naming the router if the caller did not give this mark."""
        mark = {"kind": self.kind, "task": self.task, "key": self.key}[name]
        if mark is None:
            raise ValueError(f"{type(router).__name__} routes by {name}: give the {name} of each token in marks")
        return mark


#: Marks of tokens without kinds, tasks or padding.
UNMARKED = Marks()


class Routing(NamedTuple):
    """Experts of each token, and their weights.

    Attributes:
        expert: int64 ``[N, K]``, the expert of each slot; numbers from the number of real experts on are null experts.
        weight: ``[N, K]``, float32 at least. used: bool ``[N, K]``, the chosen slots; false for padding.
        marks: marks of the tokens.
        probability: ``[N, E]`` over all experts, for the balance loss; None for routers without a choice to balance.
        logit: ``[N, E]``, for the z-loss.
        shared: ``[N, S]``, weights of shared experts; None: 1.
        dropped: bool ``[N, K]``, chosen slots beyond the capacity of their expert.
        causal: ``[N]``, the loss of an auxiliary causal router.
    """

    expert: Tensor
    weight: Tensor
    used: Tensor
    marks: Marks = UNMARKED
    probability: Tensor | None = None
    logit: Tensor | None = None
    shared: Tensor | None = None
    dropped: Tensor | None = None
    causal: Tensor | None = None

    def runs(self, experts: int) -> Tensor:
        """Return bool ``[N, K]``: the slots that compute something, given the number of real experts."""
        runs_NK = derive(lambda expert, used: used & (expert < experts), self.expert, self.used)
        return runs_NK if self.dropped is None else runs_NK & ~self.dropped

    def count_runs(self, experts: int, key_M: Tensor) -> Tensor:
        """Count the real experts that compute the tokens of these keys, float64 ``[M]``, on the CPU; 0 for unseen ones.

        >>> marks = Marks(key=torch.tensor([7, 5]))
        >>> routing = Routing(torch.tensor([[0, 3], [1, 0]]), torch.ones(2, 2), torch.ones(2, 2).bool(), marks)
        >>> routing.count_runs(2, torch.tensor([5, 7, 6]))  # expert 3 of token 7 is none of the two real ones
        tensor([2., 1., 0.], dtype=torch.float64)
        """
        assert self.marks.key is not None
        count_N, key_N = self.runs(experts).sum(dim=1).cpu(), self.marks.key.cpu()
        order_N = key_N.argsort()
        at_M = order_N[torch.searchsorted(key_N[order_N], key_M).clamp(max=len(key_N) - 1)]
        return torch.where(key_N[at_M] == key_M, count_N[at_M], 0).double()


def join_routings(routings: Sequence[Routing]) -> Routing:
    """Join one layer's routings from several calls, such as one call per modality.

    >>> one = Routing(torch.tensor([[0]]), torch.ones(1, 1), torch.ones(1, 1).bool(), Marks(task=torch.tensor([3])))
    >>> join_routings([one, one]).expert.tolist(), join_routings([one, one]).marks.task
    ([[0], [0]], tensor([3, 3]))
    """

    def cat(*parts: Tensor | None) -> Tensor | None:
        given = [part for part in parts if part is not None]
        return derive(lambda *x: torch.cat(x), *given) if len(given) == len(parts) else None

    each = [routing.marks for routing in routings]
    kind, task, valid, key, weight = (
        cat(*(getattr(marks, name) for marks in each)) for name in ("kind", "task", "valid", "key", "weight")
    )
    others = {
        name: cat(*(getattr(routing, name) for routing in routings)) for name in Routing._fields if name != "marks"
    }
    return Routing(**others, marks=Marks(kind, task, valid, each[0].tasks, key=key, weight=weight))  # type: ignore[arg-type]


def logits(h_ND: Tensor, gate_ED: Tensor) -> Tensor:
    """Compute ``h W^T`` in float32 or finer, outside of autocast: bfloat16 has three digits, which would cause ties.

    >>> logits(torch.ones(1, 2, dtype=torch.bfloat16), torch.ones(3, 2)).dtype
    torch.float32
    """
    if not torch.is_autocast_enabled(h_ND.device.type):
        return F.linear(promote(h_ND), promote(gate_ED))
    with torch.autocast(h_ND.device.type, enabled=False):
        return F.linear(promote(h_ND), promote(gate_ED))


def top_k(
    logit_NE: Tensor, k: int, norm: Literal["before", "after"] = "after", bias_E: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Choose the k experts with the highest scores: ``index_NK``, ``weight_NK`` and ``probability_NE``.

        p = softmax(s),   chosen = top-k of p + b,   w = p (before), or softmax of the chosen s = p / sum p (after)

    ``b`` changes only the choice. Weights sum to 1 with ``after`` and to less with ``before``: identical experts then
    give less than one of them alone. Source: ``before`` as in Switch (Fedus 2021, arXiv 2101.03961), ``after`` as in
    Mixtral (Jiang 2024, 2401.04088; its code divides the chosen p by their sum, which is equal) and Uni-MoE
    (2405.11273); b: Wang 2024 (2408.15664).

    >>> index_NK, weight_NK, _ = top_k(torch.tensor([[0.0, 2.0, 1.0]]), 2)
    >>> index_NK.tolist(), [round(w, 2) for w in weight_NK[0].tolist()]  # e / (e + 1)
    ([[1, 2]], [0.73, 0.27])
    """
    probability_NE = logit_NE.softmax(dim=1)
    index_NK = (probability_NE if bias_E is None else probability_NE + bias_E).detach().topk(k, dim=1).indices
    if norm == "before":
        return index_NK, probability_NE.gather(1, index_NK), probability_NE
    return index_NK, logit_NE.gather(1, index_NK).softmax(dim=1), probability_NE


def of_valid(index_NK: Tensor, marks: Marks) -> Tensor:
    """Return bool ``[N, K]``, true for all slots of valid tokens."""
    if marks.valid is None:
        return derive(lambda index: torch.ones_like(index, dtype=torch.bool), index_NK)
    return derive(lambda index, valid: valid[:, None].expand(index.shape), index_NK, marks.valid)


class TokenSham(Sham):
    """:class:`Sham` for tokens: in the mode ``permute`` each valid token gets the signal of another one of its batch.

    The tokens' keys decide the permutation, in training and evaluation. A token without others keeps its own signal.
    Only calls in training are counted.

    >>> marks = Marks(key=torch.arange(3), valid=torch.tensor([True, True, False]))
    >>> TokenSham("permute")(torch.tensor([5, 6, 7]), marks, "a router").tolist()
    [6, 5, 7]
    """

    @property
    def by_rank(self) -> str | None:
        return None if self.mode is None else "permutes the tokens of a rank's micro-batch"

    def forward(self, x_N: Tensor, marks: Marks, router: object) -> Tensor:  # type: ignore[override]
        self.calls += self.training  # the number of evaluations depends on where a run was resumed
        if self.mode is None:
            return x_N
        valid_N = everyone(len(x_N), x_N.device) if marks.valid is None else marks.valid
        source_N = partners(marks.need("key", router), valid_N, "sham")
        return derive(lambda x: x[source_N if x.device == source_N.device else host_copy(source_N)], x_N)


class Router(nn.Module):
    """Base of routers: ``router(h_ND, marks) -> Routing``.

    A subclass implements ``route``. Its configuration contains no sizes: ``build`` creates the parameters of a layer.
    """

    #: Number of null experts, which compute nothing.
    null_experts = 0
    #: Number of kinds of tokens whose use of experts is balanced separately.
    kinds = 1
    #: Whether each expert has its own parameters, so that experts not used in a step have no gradient at all.
    separate = False
    #: Choices beyond capacity and all choices of real experts, ``[2]`` on the device, in training since the last read.
    dropped: Tensor | None = None
    #: Number of the layer that it belongs to, for random draws.
    layer = 0
    experts: int

    @property
    def sums_to_one(self) -> bool:
        """Whether the weights of a token's real experts sum to 1, so that equal experts give the output of one."""
        return False

    @property
    def meets(self) -> int | None:
        """Return the number of real experts that every token goes to; None if it depends on the token."""
        return None

    @property
    def causal(self) -> bool:
        """Whether a token's route, in the module's current mode, depends on that token alone."""
        return True

    def build(self, width: int, experts: int, shared: int = 0) -> Self:
        """Create parameters for D = ``width``. Raise ValueError for settings that do not fit the number of experts."""
        self.experts = experts
        return self

    def forward(self, h_ND: Tensor, marks: Marks = UNMARKED) -> Routing:
        return self.route(h_ND, marks)

    def route(self, h_ND: Tensor, marks: Marks) -> Routing:
        raise NotImplementedError

    def declared_experts(self, marks: Marks) -> list[int] | None:
        """Return the experts that the step declares it uses, on the host; None: all."""
        return None

    def _gate(self, *shape: int) -> nn.Parameter:
        return nn.Parameter(torch.randn(shape) * 0.02)


class TopKRouter(Router, StepPart):
    """Router to the k experts with the highest scores of a linear gate (Mixtral, Switch, Uni-MoE): :func:`top_k`.

    Args:
        k: experts per token.
        norm: weights are a softmax over all experts (before the choice), or over the chosen ones (after).
        bias_rate: loss-free balancing: after each step ``b += rate sign(mean load - load)``, over all ranks. Only the
            choice adds b to the scores (DeepSeek-V3, arXiv 2412.19437, with .001; scores there are sigmoids). None: no
            bias.

    >>> router = TopKRouter(k=2).build(width=8, experts=4)
    >>> router(torch.randn(5, 8)).weight.sum(dim=1).round(decimals=4).tolist()
    [1.0, 1.0, 1.0, 1.0, 1.0]
    """

    bias_E: Tensor

    def __init__(self, k: int = 2, norm: Literal["before", "after"] = "after", bias_rate: float | None = None) -> None:
        super().__init__()
        require_value(k >= 1, f"k {k}: at least 1")
        if k == 1 and norm == "after":
            raise ValueError(
                "k 1, norm after: the weight is 1 whatever the gate, which learns nothing; use norm before"
            )
        if bias_rate is not None and not bias_rate > 0:
            raise ValueError(f"bias_rate {bias_rate:g}: above 0, such as 0.001, or none")
        self.k, self.norm, self.bias_rate = k, norm, bias_rate
        self.pending: Tensor | None = None  # this rank's choices of each expert since the last optimizer step

    @staticmethod
    def before_step(recipe: nn.Module) -> None:
        """Move the biases after the last backward, which may route again, and before a checkpoint of the step."""
        move_biases(recipe)

    @property
    def sums_to_one(self) -> bool:
        return self.norm == "after"

    def build(self, width: int, experts: int, shared: int = 0) -> Self:
        if self.k > experts:
            raise ValueError(f"{type(self).__name__}: k {self.k}: there are {experts} experts to choose from")
        self.gate_ED = self._gate(experts, width)
        if self.bias_rate is not None:
            self.register_buffer("bias_E", torch.zeros(experts))
        return super().build(width, experts, shared)

    @property
    def meets(self) -> int:
        return self.k

    def scores(self, h_ND: Tensor, marks: Marks) -> Tensor:
        return logits(h_ND, self.gate_ED)

    def route(self, h_ND: Tensor, marks: Marks) -> Routing:
        logit_NE = self.scores(h_ND, marks)
        bias_E = None if self.bias_rate is None else self.bias_E
        index_NK, weight_NK, probability_NE = top_k(logit_NE, self.k, self.norm, bias_E)
        used_NK = of_valid(index_NK, marks)
        return Routing(index_NK, weight_NK, used_NK, marks, probability_NE, logit_NE)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move the bias to a device, but never to half precision, in which it would soon stop changing."""
        kept = self._buffers.get("bias_E")
        super()._apply(fn, recurse)
        if kept is not None and self.bias_E.dtype in (torch.bfloat16, torch.float16):
            self._buffers["bias_E"] = kept.to(self.bias_E.device)
        return self


class TaskGate(TopKRouter):
    """:class:`TopKRouter` whose gate also reads the token's task, ``s = W h + V_task``; the experts do not read it.

    It equals a linear gate of ``[h; e(task)]``, whose product with e(task) is stored as a table. Source: JiuZhang 2.0
    (Zhao 2023, arXiv 2306.11027), in our reading, as no code was released.

    Args:
        tasks: T. k, norm, bias_rate: as in :class:`TopKRouter`.

    >>> router = TaskGate(tasks=3, k=2).build(width=8, experts=4)
    >>> router(torch.randn(2, 8), Marks(task=torch.tensor([0, 2]))).expert.shape
    torch.Size([2, 2])
    """

    def __init__(
        self, tasks: int, k: int = 2, norm: Literal["before", "after"] = "after", bias_rate: float | None = None
    ) -> None:
        super().__init__(k, norm, bias_rate)
        require_value(tasks >= 1, f"tasks {tasks}: at least 1")
        self.tasks = tasks

    def build(self, width: int, experts: int, shared: int = 0) -> Self:
        super().build(width, experts, shared)
        self.task_TE = self._gate(self.tasks, experts)
        return self

    def scores(self, h_ND: Tensor, marks: Marks) -> Tensor:
        logit_NE = super().scores(h_ND, marks)
        return logit_NE + self.task_TE.to(logit_NE.dtype)[marks.need("task", self)]


def moved_bias(bias_E: Tensor, count_E: Tensor, rate: float) -> Tensor:
    """Return ``b + rate sign(mean load - load)``: underused experts gain. Without tokens the bias stays unchanged.

    Source: Wang 2024 (arXiv 2408.15664), DeepSeek-V3 (2412.19437).

    >>> moved_bias(torch.zeros(3), torch.tensor([4.0, 2.0, 0.0]), 0.5).tolist()
    [-0.5, 0.0, 0.5]
    """
    return bias_E + rate * (count_E.mean() - count_E).sign()


@torch.no_grad()
def move_biases(network: nn.Module) -> None:
    """Move the biases of all routers by what they chose since the last optimizer step, on all ranks. Collective.

    After the last backward of a step and before the next forward: a recomputed layer routes as it did.
    """
    routers = [part for part in network.modules() if isinstance(part, TopKRouter) and part.pending is not None]
    if not routers:
        return
    counts = total_of_ranks(torch.cat([router.pending for router in routers if router.pending is not None]))
    for router, count_E in zip(routers, counts.split([router.experts for router in routers]), strict=True):
        router.bias_E.copy_(moved_bias(router.bias_E, count_E, router.bias_rate or 0.0))
        router.pending = None
