"""Experts in a language model and in a trunk: nothing moves without them, what is causal, generation, resume."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from descant.modules.language import CausalLM, Sampling, generate
from descant.modules.language.packing import through
from descant.modules.moe import (
    CausalAux,
    ExpertChoice,
    ExpertLayers,
    HardModality,
    Marks,
    ModalityTopK,
    Router,
    Routing,
    StaticSkill,
    TopKRouter,
    TopPRouter,
    expert_terms,
    move_biases,
)
from descant.modules.towers.vit import Layout, Trunk
from descant.modules.training_setup.activation_checkpointing import recompute
from tests.tolerance import F32, rounding

V, D = 20, 16
#: Two layers of sums of 16 to 48 numbers.
CHAIN = rounding(2 * 128, F32)
ROUTERS: dict[str, Callable[[], Router]] = {
    "top-k": lambda: TopKRouter(2),
    "top-p": lambda: TopPRouter(0.6, null_experts=1),
    "modality": lambda: ModalityTopK([[0, 1], [1, 2, 3]]),
    "hard": lambda: HardModality([2, 1]),
    "skills": lambda: StaticSkill([[0, 1], [1, 2, 3]]),
    "causal": lambda: ExpertChoice(auxiliary=CausalAux(4)),
}


def model(router: Router, shared: int | None = None, every: int = 1) -> CausalLM:
    torch.manual_seed(0)
    lm = CausalLM(V, D, 2, 2, hidden=24, length=32, experts=ExpertLayers(4, router, 12, shared, every=every))
    for name, p in lm.named_parameters():
        if "moe" in name:
            p.data.mul_(10)
    return lm


def ids(rows: int = 3, tokens: int = 9) -> tuple[Tensor, Any]:
    id_BT = torch.randint(1, V, (rows, tokens), generator=torch.Generator().manual_seed(1))
    return id_BT, Marks(id_BT % 2, torch.arange(rows)[:, None].expand(rows, tokens) % 2)


def test_dense_layers_keep_their_names() -> None:
    torch.manual_seed(0)
    names = list(CausalLM(V, D, 2, 2).state_dict())
    assert not any("moe" in name for name in names)
    mixed = set(model(TopKRouter(), every=2).state_dict())
    assert {name for name in names if name.startswith("layers.0.")} <= mixed
    moe = {"moe.router.gate_ED", "moe.experts.gate_up", "moe.experts.down"}
    assert {f"layers.1.{name}" for name in moe} <= mixed and "layers.1.gate_up.weight" not in mixed


@pytest.mark.parametrize("name", [*ROUTERS, "choice"])
def test_what_a_last_token_moves(name: str) -> None:
    lm = model(ROUTERS[name]() if name in ROUTERS else ExpertChoice()).eval()
    id_BT, marks = ids()
    other = id_BT.clone()
    other[:, -1] = (other[:, -1] + 1) % (V - 1) + 1
    a, b = (lm(lm.embed(x), marks=marks)[:, :-1] for x in (id_BT, other))
    far = float((a - b).detach().abs().max())
    assert far < 1e-6 if name != "choice" else far > 1e-3  # as asked; a choice that moves is a layer's output


@pytest.mark.parametrize("name", ROUTERS)
def test_generated_with_a_cache_as_without(name: str) -> None:
    lm = model(ROUTERS[name](), shared=1 if name == "top-p" else None).eval()
    id_PT, marks = ids()
    length_P = torch.tensor([9, 5, 7])
    mask_PT = torch.arange(9) < length_P[:, None]
    kind_PT, task_PT = (torch.cat([x, torch.full((3, 1), k)], dim=1) for k, x in ((1, marks.kind), (0, marks.task)))
    wide = Marks(kind_PT, task_PT)
    made = generate(lm, id_PT, mask_PT, new=6, sampling=Sampling(temperature=0), marks=wide).token_RN
    for p in range(3):
        n, row = int(length_P[p]), id_PT[p, : length_P[p]]
        for _ in range(6):
            kind = torch.cat([marks.kind[p, :n], torch.ones(len(row) - n).long()])
            task = torch.cat([marks.task[p, :n], torch.zeros(len(row) - n).long()])
            h_BTD = lm(lm.embed(row[None]), marks=Marks(kind[None], task[None]))
            row = torch.cat([row, lm.logits(h_BTD)[0, -1].argmax()[None]])
        assert torch.equal(row[n:], made[p]), p


def test_expert_choice_does_not_generate() -> None:
    with pytest.raises(ValueError, match="ExpertChoice routes by tokens that come later; give it auxiliary: CausalAux"):
        generate(model(ExpertChoice()).eval(), ids()[0], new=2)


def test_packed_documents_are_routed_as_alone() -> None:
    lm = model(ModalityTopK([[0, 1], [1, 2, 3]]))
    id_BS, marks = ids(4)
    real_BS, routings = torch.arange(9) < torch.tensor([9, 3, 0, 5])[:, None], list[Routing]()
    h_BSD = through(lm, lm.embed(id_BS), real_BS, 12, marks=marks, routings=routings)
    for b, n in enumerate([9, 3, 0, 5]):
        own = Marks(marks.kind[b : b + 1, :n], marks.task[b : b + 1, :n])
        alone = lm(lm.embed(id_BS[b : b + 1, :n]), marks=own) if n else h_BSD[b : b + 1, :0]
        torch.testing.assert_close(h_BSD[b, :n], alone[0], **CHAIN)
    assert len(routings) == 2 and int(routings[0].used.sum()) == 2 * 17, "padding of rows is not routed"


def test_a_trunk_routes_tokens_by_group() -> None:
    torch.manual_seed(0)
    experts = ExpertLayers(3, HardModality([0, 1, 2]), every=2)
    trunk, routings = Trunk(8, 2, 2, experts=experts), list[Routing]()
    one_B, a_B, b_B = torch.ones(3).long(), torch.tensor([2, 0, 3]), torch.tensor([1, 2, 1])
    a, b = torch.randn(5, 8), torch.randn(4, 8)
    h_MD = trunk(torch.cat([a, b]), Layout([one_B, a_B, b_B]), None, routings).h_BTD
    assert routings[0].expert.flatten().bincount().tolist() == [3, 5, 4]
    first_a, first_b = a_B.cumsum(0) - a_B, b_B.cumsum(0) - b_B
    for s in range(3):
        own = [a[first_a[s] :][: a_B[s]], b[first_b[s] :][: b_B[s]]]
        alone = trunk(torch.cat(own), Layout([one_B[:1], a_B[s : s + 1], b_B[s : s + 1]])).h_BTD
        whole = torch.cat([h_MD[s : s + 1], h_MD[3:8][first_a[s] :][: a_B[s]], h_MD[8:][first_b[s] :][: b_B[s]]])
        torch.testing.assert_close(alone, whole, **CHAIN)
    assert {n for n, p in trunk.named_parameters() if "layers.0.mlp" in n or "layers.1.moe" in n}


def trained(lm: CausalLM, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        id_BT = torch.randint(1, V, (2, 12), generator=torch.Generator().manual_seed(step))
        routings: list[Routing] = []
        score_BTV = lm.logits(lm(lm.embed(id_BT), routings=routings))
        loss = torch.nn.functional.cross_entropy(score_BTV[:, :-1].flatten(0, 1), id_BT[:, 1:].flatten())
        terms = expert_terms(lm.experts, routings)
        optimizer.zero_grad()
        (loss + sum(term.value.sum() for term in terms.values())).backward()
        move_biases(lm)
        optimizer.step()


def test_biases_are_resumed_to_the_bit_and_recomputing_counts_once() -> None:
    ends = []
    for cut, recomputed in ((0, False), (2, False), (0, True)):
        lm = model(TopKRouter(2, bias_rate=0.01)).train()
        if recomputed:
            for block in lm.blocks():
                recompute(block, preserve_rng=True)
        optimizer = torch.optim.AdamW(lm.parameters(), 0.01)
        trained(lm, optimizer, range(cut or 4))
        if cut:
            saved = copy.deepcopy((lm.state_dict(), optimizer.state_dict()))
            lm = model(TopKRouter(2, bias_rate=0.01)).train()
            optimizer = torch.optim.AdamW(lm.parameters(), 0.01)
            lm.load_state_dict(saved[0]), optimizer.load_state_dict(saved[1])
            trained(lm, optimizer, range(cut, 4))
        ends.append(lm.state_dict())
    assert ends[0]["layers.0.moe.router.bias_E"].abs().max() > 0
    for other in ends[1:]:
        assert all(torch.equal(x, other[name]) for name, x in ends[0].items())


def test_auxiliary_terms() -> None:
    lm = CausalLM(V, D, 2, 2, experts=ExpertLayers(4, ExpertChoice(auxiliary=CausalAux()), z=0.1)).train()
    routings: list[Routing] = []
    lm(lm.embed(ids()[0]), routings=routings)
    assert set(expert_terms(lm.experts, routings)) == {"experts/causal"}  # a choice of experts is even
    lm = CausalLM(V, D, 2, 2, experts=ExpertLayers(4, TopKRouter(), z=0.1)).train()
    lm(lm.embed(ids()[0]), routings=(routings := []))
    terms = expert_terms(lm.experts, routings)
    assert set(terms) == {"experts/balance", "experts/z"} and all(term.whole for term in terms.values())
    assert 0.01 * 2 <= float(terms["experts/balance"].value.detach()) < 0.02 * 2  # k at even use
    assert expert_terms(None, []) == {}
