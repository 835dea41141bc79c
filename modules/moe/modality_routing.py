"""Routers by a token's kind or task: the visible experts of its kind, one expert per kind, the skills of its task.

Letters: N tokens, D width, E experts, K slots of a token, M kinds of tokens, T tasks.
"""

from __future__ import annotations

from typing import Literal, Self

import torch
from torch import Tensor

from descant.modules.core.dtype import promote
from descant.modules.core.host import derive, has_host_copy, host_copy
from descant.modules.moe.routing import Marks, Router, Routing, TokenSham, logits, of_valid, top_k


def require_rows(name: str, rows: list[list[int]], of: str, what: str = "expert") -> None:
    """Raise ValueError for a table without rows, a row without an expert, or a row that names an expert twice."""
    if not rows:
        raise ValueError(f"{name}: no row; one {of}, such as [[0, 1], [1, 2]]")
    for n, row in enumerate(rows):
        if not row or len(set(row)) < len(row) or min(row) < 0:
            fault = f"has no {what}" if not row else "names an expert twice, or one below 0"
            raise ValueError(f"{name}: row {n} {fault}: {row}")


def require_experts(name: str, rows: list[list[int]], experts: int) -> None:
    """Raise ValueError for a row that names an expert that does not exist."""
    for n, row in enumerate(rows):
        if max(row) >= experts:
            raise ValueError(f"{name}: row {n} names expert {max(row)}; there are 0 to {experts - 1}")


class Tables(Router):
    """Base of routers that look up table rows by a mark: on the device, and on the host if shapes depend on them."""

    def route(self, h_ND: Tensor, marks: Marks) -> Routing:
        raise NotImplementedError

    def keep(self, **tables: Tensor) -> None:
        """Register tables as buffers that checkpoints leave out, and keep their host copies."""
        self._host = tables
        for name, table in tables.items():
            self.register_buffer(name, table.clone(), persistent=False)

    def rows(self, name: str, mark_N: Tensor) -> Tensor:
        """Return ``table[mark]``, with a host copy if the mark has one. Raise ValueError for a mark without a row."""
        host, device = self._host[name], self.get_buffer(name)
        if has_host_copy(mark_N) and mark_N.numel() and int(host_copy(mark_N).max()) >= len(host):
            worst = int(host_copy(mark_N).max())
            raise ValueError(f"{type(self).__name__}: a token of number {worst}; the rows are 0 to {len(host) - 1}")
        return derive(lambda at_N: (host if at_N.is_cpu else device)[at_N], mark_N)


def pad_rows(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Pad rows to the same length: int64 ``[M, K]``, and bool ``[M, K]``, true for real entries.

    >>> pad_rows([[2], [0, 1]])[0].tolist()
    [[2, 0], [0, 1]]
    """
    K = max(len(row) for row in rows)
    real_MK = torch.tensor([[k < len(row) for k in range(K)] for row in rows])
    return torch.tensor([row + [0] * (K - len(row)) for row in rows]), real_MK


class ModalityTopK(Tables):
    """Router to the k best experts visible to a token's kind, with one gate per kind (MoIIE): intra-, inter-modality.

        s = W_kind h over visible[kind],   chosen = top-k,   w = softmax of the chosen s

    Kinds share an expert that is in several rows. The balance loss is computed for each kind over its visible experts.
    Source: MoIIE (Wang 2025, arXiv 2508.09779): of N experts, the kinds see the first and the last 3 N / 4. Its
    release uses 1 as the offset of language, which is right only for N = 4.

    Args:
        visible: a row of experts for each kind, in the order of the kinds' numbers.
        k: experts per token.
        sham: ``permute``: each token gets the kind of another token of the batch.

    >>> router = ModalityTopK(visible=[[1, 2, 3], [0, 1, 2]], k=2).build(width=8, experts=4)
    >>> index_NK = router(torch.randn(9, 8), Marks(kind=torch.zeros(9).long())).expert
    >>> bool((index_NK > 0).all())
    True
    """

    sums_to_one = True

    def __init__(self, visible: list[list[int]], k: int = 2, sham: Literal["permute"] | None = None) -> None:
        super().__init__()
        require_rows("visible", visible, "a kind of token")
        for n, row in enumerate(visible):
            if not 1 <= k <= len(row):
                raise ValueError(f"k {k}: row {n} of visible has {len(row)} experts; 1 to {len(row)}")
        self.visible, self.k, self.kinds = visible, k, len(visible)
        self.sham, self.permuted = sham, TokenSham(sham)

    @property
    def meets(self) -> int:
        return self.k

    def build(self, width: int, experts: int, shared: int = 0) -> Self:
        require_experts("visible", self.visible, experts)
        self.gate_MED = self._gate(self.kinds, experts, width)
        self.keep(hidden_ME=torch.tensor([[e not in row for e in range(experts)] for row in self.visible]))
        return super().build(width, experts, shared)

    def route(self, h_ND: Tensor, marks: Marks) -> Routing:
        kind_N = self.permuted(marks.need("kind", self), marks, self)
        marks = marks._replace(kind=kind_N)
        hidden_NE = self.rows("hidden_ME", kind_N)
        logit_NME = logits(h_ND, self.gate_MED.flatten(0, 1)).unflatten(1, (self.kinds, self.experts))
        logit_NE = logit_NME.gather(1, kind_N[:, None, None].expand(-1, 1, self.experts))[:, 0]
        logit_NE = logit_NE.masked_fill(hidden_NE, -torch.inf)
        index_NK, weight_NK, probability_NE = top_k(logit_NE, self.k)
        used_NK = of_valid(index_NK, marks)
        return Routing(index_NK, weight_NK, used_NK, marks, probability_NE, logit_NE)


class HardModality(Tables):
    """Router to the expert of the token's kind, with weight 1 and no parameters (Mono-InternVL): ``y = FFN_kind(h)``.

    Source: Mono-InternVL (Luo 2024, arXiv 2410.08202) and 1.5 (2507.12566); the release applies all experts to all
    tokens and blends the results by masks, which is the same function.

    Args:
        expert: the expert of each kind, in the order of the kinds' numbers.

    >>> router = HardModality(expert=[1, 0]).build(width=8, experts=2)
    >>> router(torch.zeros(3, 8), Marks(kind=torch.tensor([0, 1, 1]))).expert.flatten().tolist()
    [1, 0, 0]
    """

    sums_to_one = True
    meets = 1

    def __init__(self, expert: list[int]) -> None:
        super().__init__()
        require_rows("expert", [[e] for e in expert], "a kind of token")
        self.expert = expert

    def build(self, width: int, experts: int, shared: int = 0) -> Self:
        require_experts("expert", [[e] for e in self.expert], experts)
        self.keep(expert_M1=torch.tensor(self.expert)[:, None])
        return super().build(width, experts, shared)

    def route(self, h_ND: Tensor, marks: Marks) -> Routing:
        index_N1 = self.rows("expert_M1", marks.need("kind", self))
        return Routing(index_N1, promote(h_ND.new_ones(index_N1.shape)), of_valid(index_N1, marks), marks)


class StaticSkill(Tables):
    """Router to all experts that the token's task declares, with equal weights and no gate (SkillNet):

        y = 1 / |K(task)| sum over s in K(task) of FFN_s(h)

    so that the scale does not depend on the number of skills. An expert that no task of the step declares has no
    gradient at all, not even zeros: the optimizer leaves its weights and moments unchanged, without weight decay.
    Therefore each expert has its own parameters. It takes part in a forward if one of ``marks.tasks`` declares it, with
    zero rows if this rank has none. Without ``marks.tasks``, the tasks of the rank's own batch decide: DDP then needs
    find_unused_parameters, and FSDP2 needs steps of one task. Source: SkillNet (Dai 2022, arXiv 2205.06126); no code
    was released, so the mean is our reading.

    Args:
        table: a row of experts (skills) for each task, in the order of the tasks' numbers.

    >>> router = StaticSkill(table=[[0, 2], [1]]).build(width=8, experts=3)
    >>> routing = router(torch.zeros(2, 8), Marks(task=torch.tensor([0, 1])))
    >>> routing.weight.tolist(), router.declared_experts(Marks(tasks=(0,)))
    ([[0.5, 0.5], [1.0, 0.0]], [0, 2])
    """

    separate = True
    sums_to_one = True

    def __init__(self, table: list[list[int]]) -> None:
        super().__init__()
        require_rows("table", table, "a task", "skill")
        self.table = table

    def build(self, width: int, experts: int, shared: int = 0) -> Self:
        require_experts("table", self.table, experts)
        index_TK, real_TK = pad_rows(self.table)
        self.keep(index_TK=index_TK, real_TK=real_TK)
        return super().build(width, experts, shared)

    def route(self, h_ND: Tensor, marks: Marks) -> Routing:
        task_N = marks.need("task", self)
        index_NK, used_NK = self.rows("index_TK", task_N), self.rows("real_TK", task_N)
        weight_NK = promote(used_NK.to(h_ND.dtype))
        weight_NK = weight_NK / weight_NK.sum(dim=1, keepdim=True)
        used_NK = derive(torch.logical_and, used_NK, of_valid(index_NK, marks))
        return Routing(index_NK, weight_NK, used_NK, marks)

    def declared_experts(self, marks: Marks) -> list[int]:
        tasks = marks.tasks
        if tasks is None:
            task_N = host_copy(marks.need("task", self))
            tasks = tuple((task_N if marks.valid is None else task_N[host_copy(marks.valid)]).unique().tolist())
        for task in tasks:
            if not 0 <= task < len(self.table):
                raise ValueError(f"StaticSkill: task {task} has no row; the table has 0 to {len(self.table) - 1}")
        return sorted({skill for task in tasks for skill in self.table[task]})
