"""MoIIE (arXiv 2508.09779): experts of each kind of token in a language model that sees, and how they are brought.

Letters: N tokens, E experts, D width.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from descant.callbacks.evaluate.without_experts import silent
from descant.modules.adaptation.stage_changes import Boundary
from descant.modules.adaptation.upcycle import Upcycle
from descant.modules.core.batch import Batch
from descant.modules.language import CausalLM
from descant.modules.moe import ExpertLayers, Marks, ModalityTopK, Routing
from descant.modules.towers import Towers
from descant.recipes import VisionLanguage
from tests._suites import MissingModalities, Ranks
from tests.recipes.test_vision_language import Patches, batch, sees
from tests.tolerance import F64, rounding

#: Words see the last three quarters of the experts, images the first: kinds 0 and 1.
ROWS = {4: [[1, 2, 3], [0, 1, 2]], 8: [[2, 3, 4, 5, 6, 7], [0, 1, 2, 3, 4, 5]]}
#: Sums of 12 to 32 numbers in two layers; queries and keys are turned in float32.
CHAIN = rounding(2**10, F64)


def layers(experts: int = 4, **options: Any) -> ExpertLayers:
    return ExpertLayers(experts, ModalityTopK(ROWS[experts], k=2), **{"every": 2, "balance": 0.001, **options})


def recipe(experts: ExpertLayers | None = None) -> Any:
    torch.manual_seed(0)
    lm = CausalLM(20, 12, 4, 2, length=64, experts=experts)
    made = VisionLanguage(**sees(lm, Towers(image=Patches())))
    for p in made.parameters():
        p.data.mul_(3 if p.ndim > 1 else 1)
    return made.double()


def routed(made: Any, b: Batch) -> list[Routing]:
    routings: list[Routing] = []
    made.read(b, routings)
    return routings


class TestMoIIE(MissingModalities, Ranks):
    def recipe(self) -> VisionLanguage:
        return recipe(layers())

    def batch(self) -> Batch:
        return batch()


@pytest.mark.parametrize("experts", [4, 8])
@pytest.mark.parametrize("built", ["at once", "by surgery"])
def test_no_token_leaves_its_row(experts: int, built: str) -> None:
    """The release adds 1 to what a gate of words chooses, so that of eight experts they would meet those of images."""
    made = recipe(layers(experts) if built == "at once" else None)
    if built == "by surgery":
        Upcycle(layers(experts)).apply(made, Boundary("experts", {}, 3))
        made.double()
    met: dict[int, set[int]] = {0: set(), 1: set()}
    for seed in range(20):
        b = batch()
        b.inputs["text"] = torch.where(b.inputs["text"] > 5, (b.inputs["text"] * (seed + 1)) % 14 + 6, b.inputs["text"])
        for routing in routed(made, b):
            kind_N, used_NK = routing.marks.kind, routing.used
            assert kind_N is not None and len(kind_N) == len(used_NK)
            for kind in met:
                met[kind] |= set(routing.expert[kind_N == kind][used_NK[kind_N == kind]].tolist())
            torch.testing.assert_close(routing.weight.sum(dim=1), torch.ones(len(kind_N), dtype=F64), **CHAIN)
    for kind, seen in met.items():
        assert seen <= set(ROWS[experts][kind]) and len(seen) > 2, "more than two of them are met"


def explicit(made: Any, routings: list[Routing]) -> Tensor:
    """The mean over layers of ``sum over kinds of N_kind sum_e f_e P_e``, token by token."""
    total = torch.zeros((), dtype=F64)
    for layer, routing in zip([x.moe for x in made.lm.layers if x.moe is not None], routings, strict=True):
        kind_N, probability_NE = routing.marks.kind, routing.probability
        assert kind_N is not None and probability_NE is not None
        for kind, row in enumerate(ROWS[layer.experts.experts]):
            real = [n for n in range(len(kind_N)) if routing.used[n].any() and int(kind_N[n]) == kind]
            for e in row:
                f = sum(int(e in routing.expert[n].tolist()) for n in real) / max(len(real), 1)
                total = total + len(row) * f * sum((probability_NE[n, e] for n in real), torch.zeros(())) / max(
                    len(real), 1
                )
    return 0.001 * total / len(routings)


@pytest.mark.parametrize("experts", [4, 8])
def test_the_balance_loss_is_of_each_kind_and_of_no_padding(experts: int) -> None:
    made, b = recipe(layers(experts)), batch()
    term = made(b).aux["experts/balance"]
    wanted = explicit(made, routed(made, b))
    torch.testing.assert_close(term.value[0], wanted, **CHAIN)
    gates = [x.moe.router.gate_MED for x in made.lm.layers if x.moe is not None]
    for found, want in zip(torch.autograd.grad(term.value[0], gates), torch.autograd.grad(wanted, gates), strict=True):
        torch.testing.assert_close(found, want, **CHAIN)
    longer = replace(
        b, inputs={m: x if m == "image" else torch.nn.functional.pad(x, (0, 5)) for m, x in b.inputs.items()}
    )
    torch.testing.assert_close(made(longer).aux["experts/balance"].value, term.value, **CHAIN)  # more padding


def test_a_step_without_images_is_finite_and_of_words_alone() -> None:
    made, b = recipe(layers()), batch()
    none = b.only("text")
    term = made(none).aux["experts/balance"]
    kinds = [routing.marks.need("kind", made)[routing.used[:, 0]] for routing in routed(made, none)]
    assert all(bool((kind_N == 0).all()) for kind_N in kinds)
    torch.testing.assert_close(term.value[0], explicit(made, routed(made, none)), **CHAIN)
    made.step(made(none).all_terms(), none).total.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in made.parameters())
    for layer in (x.moe for x in made.lm.layers if x.moe is not None):
        assert not layer.router.gate_MED.grad[1].any() and layer.router.gate_MED.grad[0].any()
        assert not layer.experts.gate_up.grad[0].any(), "an expert of images alone"


@pytest.mark.parametrize("experts", [4, 8])
def test_surgery_leaves_outputs_as_they_are(experts: int) -> None:
    made, b = recipe(), batch()
    before, loss = made.read(b)[1], made(b).terms["answer"].value
    grown = Upcycle(layers(experts)).apply(made, Boundary("experts", {}, 3))
    made.double()
    assert list(grown) == ["lm"] and [layer.moe is not None for layer in made.lm.layers] == [False, True] * 2
    torch.testing.assert_close(made.read(b)[1], before, **CHAIN)
    torch.testing.assert_close(made(b).terms["answer"].value, loss, **CHAIN)
    made.step(made(b).all_terms(), b).total.backward()
    of_each = [grad for grad in made.lm.layers[1].moe.experts.gate_up.grad if grad.any()]
    assert len(of_each) > 2 and not torch.equal(of_each[0], of_each[-1]), "equal weights, gradients of other tokens"


def test_experts_of_images_alone_reach_words_by_attention_only() -> None:
    """Silent experts of images change no word of a dialogue without one."""
    made, b = recipe(layers(every=1)).eval(), batch()
    h_BSW, row = made.read(b)[1:]
    with silent([layer.moe for layer in made.lm.layers], [0]):
        silent_BSW = made.read(b)[1]
    for n in range(len(b)):
        sees_one = bool(((row.ids_BS[n] == 4) & row.real_BS[n]).any())
        assert torch.equal(h_BSW[n], silent_BSW[n]) != sees_one, n


def test_the_placebo_has_as_many_tokens_of_each_kind() -> None:
    router = ModalityTopK(ROWS[4], k=2, sham="permute").build(8, 4).double()
    kind_N = (torch.arange(40) % 4 == 0).long()
    routing = router(torch.randn(40, 8, dtype=F64), Marks(kind_N, key=torch.arange(40)))
    given_N = routing.marks.kind
    assert given_N is not None and int(given_N.sum()) == 10 and int((given_N != kind_N).sum()) > 6
    for kind, row in enumerate(ROWS[4]):
        assert set(routing.expert[given_N == kind].flatten().tolist()) <= set(row)
    assert router.permuted.calls == 1
