"""Each router against an explicit loop in float64; balance, capacity and padding; one line for what does not fit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from descant.modules.moe import (
    Capacity,
    CausalAux,
    ExpertChoice,
    ExpertLayers,
    HardModality,
    Marks,
    ModalityTopK,
    MoELayer,
    Routing,
    StaticSkill,
    TaskGate,
    TopKRouter,
    TopPRouter,
)
from descant.modules.moe.balance import balance_loss, usage
from descant.modules.moe.routing import moved_bias, top_k
from tests.tolerance import F32, F64, rounding

N, D, E = 40, 8, 6
#: Sums of at most 8 numbers, a few of them in a row.
CLOSE = rounding(64, F64)


def setting(router: Any, experts: int = E, shared: int = 0, seed: int = 0) -> tuple[Any, Tensor, Any]:
    """A router in float64 with wide logits, tokens, and marks of which a third are padding."""
    torch.manual_seed(seed)
    router = router.build(D, experts, shared).double()
    for p in router.parameters():
        p.data.mul_(50)
    h_ND, kind_N, task_N = torch.randn(N, D).double(), torch.arange(N) % 2, torch.arange(N) // 3 % 3
    return router, h_ND, Marks(kind_N, task_N, torch.arange(N) % 3 < 2)


def dense(routing: Routing, experts: int) -> Tensor:
    """``[N, experts]``: the weights of used slots by expert."""
    weight_NK = torch.where(routing.used, routing.weight, 0.0)
    return weight_NK.new_zeros(len(weight_NK), experts).scatter_add(1, routing.expert, weight_NK)


@pytest.mark.parametrize("norm", ["before", "after"])
def test_top_k(norm: str) -> None:
    router, h_ND, marks = setting(TopKRouter(k=3, norm=norm))  # type: ignore[arg-type]
    got_NE = dense(router(h_ND, marks), E)
    for n in range(N):
        e_E = (h_ND[n] @ router.gate_ED.T).exp().detach()
        chosen = sorted(range(E), key=lambda e: -float(e_E[e]))[:3]
        total = e_E.sum() if norm == "before" else e_E[chosen].sum()
        expected = [float(e_E[e] / total) if e in chosen and n % 3 < 2 else 0.0 for e in range(E)]
        torch.testing.assert_close(got_NE[n].detach(), torch.tensor(expected, dtype=torch.float64), **CLOSE)


def test_a_bias_moves_the_choice_and_no_weight() -> None:
    logit_NE, bias_E = torch.randn(50, 4).double(), torch.tensor([0.0, 9.0, 0.0, 0.0]).double()
    index_NK, weight_NK, p_NE = top_k(logit_NE, 2, "before", bias_E)
    assert (index_NK == 1).any(dim=1).all() and torch.equal(weight_NK, p_NE.gather(1, index_NK))
    count_E, b_E = torch.zeros(4), torch.zeros(4)
    for _ in range(400):  # even after some steps: scores are of one distribution
        count_E = (
            top_k(logit_NE + torch.tensor([2.0, 0.0, 0.0, -2.0]), 2, "before", b_E)[0].flatten().bincount(minlength=4)
        )
        b_E = moved_bias(b_E, count_E.float(), 0.01)
    assert count_E.max() < 1.3 * 25 and torch.equal(moved_bias(b_E, torch.zeros(4), 0.01), b_E)


@pytest.mark.parametrize("weigh", ["softmax", "band"])
@pytest.mark.parametrize("shared", [0, 2])
def test_top_p_with_null_and_shared_experts(weigh: str, shared: int) -> None:
    router, h_ND, marks = setting(TopPRouter(0.7, null_experts=2, weigh=weigh, jitter=0.2), shared=shared)  # type: ignore[arg-type]
    for p in router.parameters():
        p.data.div_(20)
    routing, R = router(h_ND, marks), E + 2
    got_NE = dense(routing._replace(used=routing.used | ~marks.valid[:, None]), R)
    assert bool((routing.used & ~marks.valid[:, None]).any()) is False
    some = 0
    for n in [n for n in range(N) if n % 3 < 2]:
        s_E = (h_ND[n] @ router.gate_ED.T).detach()
        routed, fixed = s_E.split([R, shared])
        p_E = routed.softmax(0).sort(descending=True).values
        k = int((p_E.cumsum(0) < 0.7).sum()) + 1
        chosen, left, weight_E = [], routed.clone(), torch.zeros(R).double()
        for _ in range(k):  # the release, choice by choice
            top = int(left.argmax())
            scale = torch.maximum(routed.abs(), routed[top].abs())
            near = (left[top] - routed) / scale <= 2 * 0.2
            weight_E[top] = (
                left.masked_fill(~near, -torch.inf).softmax(0)[top] if weigh == "band" else routed[top].exp()
            )
            left[top] = -torch.inf
            chosen.append(top)
        weight_E /= weight_E.sum()
        mass = torch.cat([routed[chosen].logsumexp(0)[None], fixed]).softmax(0)
        torch.testing.assert_close(got_NE[n].detach(), weight_E * mass[0], **CLOSE)
        assert int(routing.used[n].sum()) == k
        whole = got_NE[n].sum() + (0 if routing.shared is None else routing.shared[n].sum())
        torch.testing.assert_close(float(whole.detach()), 1.0, **CLOSE)
        some += sum(e >= E for e in chosen)
    assert some > 0


@pytest.mark.parametrize("experts", [4, 8])
def test_no_token_leaves_the_row_of_its_kind(experts: int) -> None:
    cut = 3 * experts // 4
    rows = [list(range(experts - cut, experts)), list(range(cut))]
    router, h_ND, marks = setting(ModalityTopK(rows, k=2), experts)
    got_NE = dense(router(h_ND, marks), experts)
    for n in [n for n in range(N) if n % 3 < 2]:
        s_E = (h_ND[n] @ router.gate_MED[n % 2].T).detach()
        best = sorted(rows[n % 2], key=lambda e: -float(s_E[e]))[:2]
        assert sorted(got_NE[n].nonzero().flatten().tolist()) == sorted(best)
        torch.testing.assert_close(got_NE[n][best].detach(), s_E[best].softmax(0), **CLOSE)


def test_what_is_known_of_a_token_decides_alone() -> None:
    hard, h_ND, marks = setting(HardModality([4, 1]))
    assert hard(h_ND, marks).expert.flatten().tolist() == [4, 1] * (N // 2) and not list(hard.parameters())
    skill, _, _ = setting(StaticSkill([[0], [1, 5], [2, 3, 4]]))
    got_NE = dense(skill(h_ND, marks._replace(valid=None)), E)
    for n in range(N):
        assert got_NE[n].nonzero().flatten().tolist() == [[0], [1, 5], [2, 3, 4]][n // 3 % 3]
    torch.testing.assert_close(got_NE.sum(dim=1), torch.ones(N).double(), **CLOSE)
    assert skill.declared_experts(marks) == [0, 1, 2, 3, 4, 5]
    padding = Marks(task=torch.tensor([1, 0]), valid=torch.tensor([True, False]))
    assert skill.declared_experts(padding) == [1, 5] and skill.declared_experts(Marks(tasks=(0, 1))) == [0, 1, 5]
    gate, _, _ = setting(TaskGate(3))
    both_NE = (
        torch.cat([h_ND, torch.eye(3).double()[marks.task]], dim=1) @ torch.cat([gate.gate_ED, gate.task_TE.T], 1).T
    )
    torch.testing.assert_close(gate(h_ND, marks).logit, both_NE, **CLOSE)


@pytest.mark.parametrize("groups", [None, [[0, 1], [2, 3, 4, 5]]])
def test_each_expert_takes_its_share_and_padding_none(groups: list[list[int]] | None) -> None:
    router, h_ND, marks = setting(ExpertChoice(groups, auxiliary=CausalAux(4)))
    routing = router(h_ND, marks)
    got_NE = dense(routing, E)
    a_NE = (h_ND @ router.gate_ED.T).sigmoid().detach()
    for e in range(E):
        may = [n for n in range(N) if n % 3 < 2 and (groups is None or e in groups[n % 2])]
        share = E if groups is None else next(len(row) for row in groups if e in row)
        take = sorted(may, key=lambda n: -float(a_NE[n, e]))[: -(-len(may) // share)]
        expected_N = torch.zeros(N).double().index_put((torch.tensor(take),), a_NE[take, e])
        torch.testing.assert_close(got_NE[:, e].detach(), expected_N, **CLOSE)
    assert routing.causal is not None and not router.causal
    routing.causal.sum().backward()
    assert router.gate_ED.grad is None and router.auxiliary.inward_FD.grad.abs().sum() > 0
    other = h_ND.clone()
    other[0] = 100.0
    router.eval()
    assert router.causal and torch.equal(router(h_ND, marks).used[1:], router(other, marks).used[1:])


def test_capacity_drops_the_least_and_counts_no_padding() -> None:
    torch.manual_seed(0)
    index_NK, weight_NK, valid_N = torch.randint(3, (N, 2)), torch.rand(N, 2), torch.arange(N) < 30
    used_NK = valid_N[:, None].expand(N, 2)
    for by in ("weight", "position"):
        routing = Capacity(0.5, by)(Routing(index_NK, weight_NK, used_NK, Marks(valid=valid_N)), 3)
        assert routing.dropped is not None
        for e in range(3):
            slots = [(n, k) for n in range(30) for k in range(2) if index_NK[n, k] == e]
            order = sorted(slots, key=lambda at: -float(weight_NK[at]) if by == "weight" else at[0])
            assert {at for at in slots if not routing.dropped[at]} == set(order[:5])  # .5 30 / 3
        assert not routing.dropped[30:].any()


def test_balance_loss() -> None:
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    router, h_ND, marks = setting(ModalityTopK([[0, 1, 2, 3], [2, 3, 4, 5]], k=2))
    routing = router(h_ND, marks)
    total = torch.zeros(()).double()
    for m, row in enumerate(router.visible):
        here = [n for n in range(N) if n % 3 < 2 and n % 2 == m]
        for e in row:
            share = sum(int((routing.expert[n] == e).sum()) for n in here) / len(here)
            total = total + len(row) * share * routing.probability[here, e].mean()
    sizes_M = torch.tensor([4, 4])
    torch.testing.assert_close(balance_loss(*usage(routing, 2), sizes_M), total, **CLOSE)
    one = router(h_ND, marks._replace(kind=torch.zeros(N).long()))  # no token of the other kind
    assert balance_loss(*usage(one, 2), sizes_M).isfinite()
    plain, _, _ = setting(TopKRouter(2))
    routing = plain(h_ND.float().double(), marks)
    theirs = load_balancing_loss_func((routing.logit.float(),), E, 2, marks.valid[None])
    torch.testing.assert_close(balance_loss(*usage(routing)).float(), theirs, **rounding(N, F32))


def test_scores_are_not_in_half_precision() -> None:
    router = TopKRouter(k=1, norm="before").build(2, 2)
    router.gate_ED.data = torch.tensor([[1.0, 0.0], [1.0, 0.004]])  # bfloat16 adds up to 1 for both
    with torch.autocast("cpu", dtype=torch.bfloat16):
        routing = router(torch.ones(1, 2))
    assert routing.expert.item() == 1 and routing.weight.dtype == torch.float32
    biased = TopKRouter(bias_rate=0.001).build(D, E).bfloat16()
    assert biased.bias_E.dtype == torch.float32 and biased.gate_ED.dtype == torch.bfloat16


BAD: dict[str, tuple[Callable[[], object], str]] = {
    "chosen": (lambda: TopKRouter(k=5).build(D, 4), "TopKRouter: k 5: there are 4 experts to choose from"),
    "constant": (lambda: TopKRouter(k=1), "k 1, norm after: the weight is 1"),
    "row": (lambda: ModalityTopK([[0, 1], []]), r"visible: row 1 has no expert: \[\]"),
    "narrow": (lambda: ModalityTopK([[0, 1], [2]]), "k 2: row 1 of visible has 1 experts; 1 to 1"),
    "unknown": (lambda: HardModality([0, 4]).build(D, 4), "expert: row 1 names expert 4; there are 0 to 3"),
    "skill": (lambda: StaticSkill([[0], []]), "table: row 1 has no skill"),
    "task": (
        lambda: MoELayer(D, 4, 2, StaticSkill([[0], [1]]))(torch.zeros(1, D), Marks(task=torch.tensor([2]))),
        "StaticSkill: a token of number 2; the rows are 0 to 1",
    ),
    "unmarked": (lambda: MoELayer(D, 4, 2, HardModality([0, 1]))(torch.zeros(1, D)), "HardModality routes by kind"),
    "capacity": (lambda: Capacity(0.0), "factor 0: a capacity of zero tokens"),
    "share": (lambda: ExpertChoice(capacity=0.0), "capacity 0: a share of the tokens, above 0"),
    "p": (lambda: TopPRouter(1.5), "p 1.5: above 0, at most 1"),
    "none": (
        lambda: ExpertLayers(4, TopKRouter(), every=3).require(2),
        "every 3: none of 2 layers has experts; 2 is the most",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_one_line_of_what_does_not_fit(name: str) -> None:
    call, line = BAD[name]
    with pytest.raises(ValueError, match=line):
        call()
