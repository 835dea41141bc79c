"""Experts by gather and scatter against computing all of them and blending; who has a gradient; what costs nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from descant.modules.moe import (
    Capacity,
    ExpertChoice,
    HardModality,
    Marks,
    ModalityTopK,
    MoELayer,
    Router,
    StaticSkill,
    SwiGLUExperts,
    TaskGate,
    TopKRouter,
    TopPRouter,
)
from descant.modules.moe.grouped import GELU, Segments, Weights, expert_mlp
from descant.modules.training_setup.flops import FlopCount
from tests.tolerance import F32, F64, rounding

N, D, F_, E = 30, 6, 10, 4
#: Sums of up to 30 rows, 10 hidden units and 6 numbers.
CLOSE = rounding(256, F64)
ROUTERS: dict[str, Callable[[], Router]] = {
    "top-k": lambda: TopKRouter(2),
    "before": lambda: TopKRouter(1, "before"),
    "task": lambda: TaskGate(2),
    "top-p": lambda: TopPRouter(0.6, null_experts=1),
    "modality": lambda: ModalityTopK([[0, 1, 2], [1, 2, 3]]),
    "hard": lambda: HardModality([3, 0]),
    "skills": lambda: StaticSkill([[0, 2], [1, 2, 3]]),
    "choice": lambda: ExpertChoice([[0, 1], [2, 3]]),
}


def marks() -> Any:
    return Marks(torch.arange(N) % 2, torch.arange(N) // 2 % 2, torch.arange(N) % 5 > 0)


def each(experts: Any, h_ND: Tensor) -> list[Tensor]:
    """The output of every expert for every token."""
    if type(experts) is SwiGLUExperts:
        halves = [(h_ND @ w.T).chunk(2, dim=1) for w in experts.gate_up]
        return [(F.silu(gate) * up) @ w.T for (gate, up), w in zip(halves, experts.down, strict=True)]
    b_1, b_2 = (
        b if experts.separate else b.view(experts.experts, -1) for b in (experts.inward_bias, experts.outward_bias)
    )
    hidden = [F.gelu(h_ND @ w.T + b) for w, b in zip(experts.inward, b_1, strict=True)]
    return [x @ w.T + b for x, w, b in zip(hidden, experts.outward, b_2, strict=True)]


@pytest.mark.parametrize("form", ["swiglu", "gelu"])
@pytest.mark.parametrize("name", ROUTERS)
def test_as_computing_all_and_blending(name: str, form: Any) -> None:
    torch.manual_seed(0)
    shared = 2 if name == "top-p" else None
    capacity = Capacity(0.5) if name == "top-k" else None
    layer: Any = MoELayer(D, F_, E, ROUTERS[name](), shared, 5, capacity, form).double()
    for p in layer.parameters():
        p.data.normal_()
    h_ND, params = torch.randn(N, D, dtype=F64, requires_grad=True), list(layer.parameters())
    y_ND, routing = layer(h_ND, marks())
    blend_ND, runs_NK = torch.zeros(N, D, dtype=F64), routing.runs(E)
    for e, out_ND in enumerate(each(layer.experts, h_ND)):
        blend_ND = blend_ND + torch.where(runs_NK & (routing.expert == e), routing.weight, 0.0).sum(1)[:, None] * out_ND
    if layer.shared is not None:
        assert routing.shared is not None
        blend_ND = blend_ND + sum(
            w[:, None] * x for w, x in zip(routing.shared.T, each(layer.shared, h_ND), strict=True)
        )
    torch.testing.assert_close(y_ND, blend_ND, **CLOSE)
    if layer.shared is None:
        assert not y_ND[~marks().valid].any(), "padding is not computed"
    toward = torch.randn(N, D, dtype=F64)
    got, want = (
        torch.autograd.grad((y * toward).sum(), [h_ND, *params], retain_graph=True, allow_unused=True)
        for y in (y_ND, blend_ND)
    )
    for a, b in zip(got, want, strict=True):
        assert a is not None or b is None
        torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b, **rounding(4096, F64))


def test_identical_experts_are_one_after_the_choice_and_less_before() -> None:
    torch.manual_seed(0)
    outputs = []
    for norm in ("after", "before"):
        layer: Any = MoELayer(D, F_, E, TopKRouter(2, norm))
        for stacked in (layer.experts.gate_up, layer.experts.down):
            stacked.data.copy_(torch.randn(stacked.shape[1:], generator=torch.Generator().manual_seed(1)))
        h_ND = torch.randn(N, D, generator=torch.Generator().manual_seed(2))
        outputs.append((layer(h_ND)[0], each(layer.experts, h_ND)[0]))
    torch.testing.assert_close(*outputs[0], rtol=1e-5, atol=1e-5)  # what is asked for; two products in float32
    assert (outputs[1][0].norm(dim=1) < 0.9 * outputs[1][1].norm(dim=1)).all()


def test_as_transformers_mixtral() -> None:
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_local_experts": E, "num_experts_per_tok": 2}
    ours: Any = MoELayer(32, 48, E, TopKRouter(2))
    theirs = MixtralSparseMoeBlock(MixtralConfig(**sizes))
    for name, p in theirs.named_parameters():
        mine = {"gate.weight": ours.router.gate_ED, "experts.gate_up_proj": ours.experts.gate_up}
        p.data.normal_(std=0.2)
        mine.get(name, ours.experts.down).data.copy_(p)
    h_BTD = torch.randn(3, 20, 32)
    torch.testing.assert_close(ours(h_BTD)[0], theirs(h_BTD), rtol=1e-5, atol=1e-5)  # as asked; float32


def test_a_grouped_kernel_and_the_loop_are_one() -> None:
    """torch's kernel, which CUDA takes without reading counts, also runs on a CPU; rows behind the last are not its."""
    torch.manual_seed(0)
    count_E, results = torch.tensor([3, 0, 5]), []
    start = [torch.randn(*size) for size in ((10, 16), (3, 8, 16), (3, 16, 8), (3, 8), (3, 16))]
    for fused in (False, True):
        segments = Segments(count_E, fused)
        x, w_1, w_2, b_1, b_2 = (t.clone().requires_grad_() for t in start)
        y = expert_mlp(x[segments.rows(torch.arange(10))], Weights([w_1], [w_2], b_1, b_2), GELU, segments)
        y.square().sum().backward()
        results.append((y[:8], x.grad, w_1.grad, w_2.grad, b_1.grad, b_2.grad))
    for loop, kernel in zip(*results, strict=True):
        torch.testing.assert_close(loop, kernel, **rounding(4096, F32))


def test_who_has_a_gradient() -> None:
    layer: Any = MoELayer(D, F_, E, HardModality([0, 3]))
    layer(torch.randn(4, D), Marks(torch.zeros(4).long()))[0].sum().backward()
    used_E = layer.experts.gate_up.grad.abs().sum(dim=(1, 2)) > 0  # all have one, of zeros without a token
    assert used_E.tolist() == [True, False, False, False]
    skills: Any = MoELayer(D, F_, E, StaticSkill([[0, 1], [2]]), form="gelu")
    optimizer = torch.optim.AdamW(skills.parameters(), weight_decay=0.5)
    for step, (task, tasks) in enumerate([(0, None), (1, None), (0, (0, 1))]):
        before = [p.detach().clone() for p in skills.parameters()]
        optimizer.zero_grad()
        y_ND, _ = skills(torch.randn(4, D), Marks(task=torch.full((4,), task), tasks=tasks))
        y_ND.sum().backward()
        has = {name.rpartition(".")[2] for name, p in skills.named_parameters() if p.grad is not None}
        assert has == [{"0", "1"}, {"2"}, {"0", "1", "2"}][step]
        optimizer.step()
        for (name, p), old in zip(skills.named_parameters(), before, strict=True):
            assert torch.equal(p, old) == (name.rpartition(".")[2] not in has), name
    scale = [skills(torch.ones(1, D), Marks(task=torch.tensor([t])))[1].weight.sum() for t in (0, 1)]
    assert scale == [1.0, 1.0]


def test_null_experts_cost_nothing() -> None:
    torch.manual_seed(0)
    counts = []
    for null in (0, 4):
        layer: Any = MoELayer(D, F_, E, TopPRouter(0.8, null_experts=null))
        h_ND = torch.randn(400, D)
        routing = layer.router(h_ND)
        with FlopCount() as count:
            layer.dispatch(h_ND, routing)
        counts.append(count.flops)
        assert count.flops == int(routing.runs(E).sum()) * 2 * 3 * D * F_
    assert counts[1] < 0.9 * counts[0]
