"""Mixture of depths: against an explicit loop, causality, padding, the auxiliary router, FLOPs and generation.

Letters: B rows, T tokens, D width.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from descant.modules.core.batch import Batch
from descant.modules.language import CausalLM, Sampling, generate
from descant.modules.language.axis_rope import AxisRoPE
from descant.modules.language.depths import DepthLayer, DepthRouting, MixtureOfDepths, depth_terms, some_pass
from descant.modules.language.model import Layer
from descant.modules.language.positions import VisualAxes
from descant.modules.moe import CausalAux, ExpertChoice, ExpertLayers, Routing
from descant.modules.towers import Towers
from descant.recipes import VisionLanguage
from tests._suites import MissingModalities, Ranks
from tests.recipes.test_vision_language import Patches, batch, sees
from tests.tolerance import F32, F64, rounding


def small(depths: MixtureOfDepths | None, depth: int = 2, length: int = 64) -> CausalLM:
    torch.manual_seed(0)
    lm = CausalLM(17, 16, depth, 2, length=length, depths=depths)
    with torch.no_grad():  # as made, attention looks everywhere alike, and scores hardly differ
        for layer in lm.modules():
            if isinstance(layer, Layer):
                layer.qkv.weight.mul_(20)
                layer.out.weight.mul_(20)
            if isinstance(layer, DepthLayer):
                layer.gate_1D.mul_(50)
            if isinstance(layer, CausalAux):
                layer.outward_EF.mul_(50)
    return lm


def ids(B: int = 3, T: int = 13) -> Tensor:
    return torch.randint(1, 17, (B, T), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("linear", [False, True])
def test_a_layer_is_the_loop_over_its_tokens(linear: bool) -> None:
    lm = small(MixtureOfDepths(0.4, linear=linear), depth=1).double()
    whole, layer = lm.layers[0], lm.blocks()[0]
    assert isinstance(whole, DepthLayer)
    h_BTD, segment_BT = torch.randn(2, 11, 16, dtype=F64), torch.tensor([11 * [1], [1, 1, 1, 2, 2, 2, 2, 0, 0, 0, 0]])
    routings: list[Routing] = []
    found_BTD = lm(h_BTD, segment_BT, routings=routings)
    taken_BT = routings[0].used.view(2, 11)
    position_BT = torch.tensor([list(range(11)), [0, 1, 2, 0, 1, 2, 3, 0, 0, 0, 0]])
    expected_BTD = h_BTD.clone()
    for b, document in ((0, 1), (1, 1), (1, 2)):
        tokens = [t for t in range(11) if segment_BT[b, t] == document]
        score = (h_BTD[b] @ whole.gate_1D[0]).tolist()
        best = sorted(sorted(tokens, key=lambda t: -score[t])[: math.ceil(0.4 * len(tokens))])
        assert best == [t for t in tokens if taken_BT[b, t]]
        for t in best:
            seen = [s for s in best if s <= t]
            y_1TD, _ = layer(h_BTD[b, seen][None], lm.rope(position_BT[b, seen][None]), None)
            weight = score[t] if linear else 1 / (1 + math.exp(-score[t]))
            expected_BTD[b, t] += weight * (y_1TD[0, -1] - h_BTD[b, t])
    torch.testing.assert_close(found_BTD, lm.norm(expected_BTD), **rounding(512, F64))  # sums of 16 and 48, and norms
    skipped_BT = ~taken_BT
    assert torch.equal(found_BTD[skipped_BT], lm.norm(h_BTD)[skipped_BT])


def test_all_tokens_at_weight_one_are_the_layer() -> None:
    lm = small(None)
    h_BTD, layer = lm.embed(ids()), lm.blocks()[0]
    index_BK, one_BT = torch.arange(13).expand(3, 13), torch.ones(3, 13)
    rope = lm.rope(index_BK)
    found_BTD = some_pass(lambda x: layer(x, rope, None)[0], h_BTD, one_BT, index_BK, one_BT.bool())
    torch.testing.assert_close(found_BTD, layer(h_BTD, rope, None)[0], **rounding(4, F32))  # h + (y - h)


@pytest.mark.parametrize("causal", [False, True])
def test_a_later_token_moves_earlier_ones_unless_the_router_is_causal(causal: bool) -> None:
    lm = small(MixtureOfDepths(0.3, auxiliary=CausalAux(8) if causal else None)).eval()
    ids_BT = ids(8)
    other_BT = ids_BT.clone()
    other_BT[:, -1] = 1 + ids_BT[:, -1] % 16
    before, after = (lm.logits(lm(lm.embed(x)))[:, :-1] for x in (ids_BT, other_BT))
    moved = (before - after).abs().amax().item()
    assert moved <= 1e-6 if causal else moved > 1e-3  # 1e-6: what the issue allows


def test_padding_takes_no_capacity_and_moves_nothing() -> None:
    lm = small(MixtureOfDepths(0.3))
    alone_BT = ids(1, 10)
    padded_BT = torch.nn.functional.pad(alone_BT, (0, 7))
    alone, padded = list[Routing](), list[Routing]()
    short_BTD = lm(lm.embed(alone_BT), torch.ones_like(alone_BT), routings=alone)
    long_BTD = lm(lm.embed(padded_BT), (padded_BT > 0).long(), routings=padded)
    torch.testing.assert_close(long_BTD[:, :10], short_BTD, **rounding(256, F32))  # two layers of sums of 16 and 48
    assert [int(routing.used.sum()) for routing in (*alone, *padded)] == [3, 3]
    assert torch.equal(padded[0].used[:10], alone[0].used) and not padded[0].used[10:].any()


def test_the_auxiliary_router_learns_what_is_taken_and_moves_nothing_else() -> None:
    lm = small(MixtureOfDepths(0.5, auxiliary=CausalAux(8)))
    h_BTD, routings = lm.embed(ids(16)), list[Routing]()
    lm(h_BTD, routings=routings)
    depths = [routing for routing in routings if isinstance(routing, DepthRouting)]
    loss = depth_terms(depths)["depths/causal"].value.sum()
    whole = lm.layers[0]
    assert isinstance(whole, DepthLayer) and whole.auxiliary is not None
    guess_BT, used_BT = whole.auxiliary(h_BTD)[..., 0], routings[0].used.view(16, 13)
    expected = torch.where(used_BT, -guess_BT.sigmoid().log(), -(1 - guess_BT.sigmoid()).log()).mean()
    torch.testing.assert_close(loss, expected, **rounding(16, F32))
    loss.backward()
    reached = {name for name, p in lm.named_parameters() if p.grad is not None}
    assert reached == {"layers.0.auxiliary.inward_FD", "layers.0.auxiliary.outward_EF"}


def test_flops_are_those_of_the_share() -> None:
    B, T, D, K = 2, 32, 16, 8
    hidden = -(-8 * D // 3 // 8) * 8

    def layer(tokens: int) -> int:  # products of the weights, and two of attention
        return 2 * B * tokens * (4 * D * D + 3 * D * hidden) + 4 * B * tokens**2 * D

    counted = []
    for depths in (None, MixtureOfDepths(0.25, every=2)):
        lm = small(depths)
        with FlopCounterMode(display=False) as flops, torch.no_grad(), torch.nn.attention.sdpa_kernel(
            torch.nn.attention.SDPBackend.MATH
        ):  # fmt: skip
            lm(lm.embed(ids(B, T)))
        counted.append(flops.get_total_flops())
    assert counted == [2 * layer(T), layer(K) + layer(T) + 2 * B * T * D]  # and a score a token


@pytest.mark.parametrize(("group", "prefix"), [(1, False), (3, False), (3, True)])
def test_generation_is_what_full_passes_give(group: int, prefix: bool) -> None:
    torch.manual_seed(0)
    lm = small(MixtureOfDepths(0.5, every=2, auxiliary=CausalAux(8)), depth=3).eval()
    prompt_PT, length = ids(4, 6), torch.tensor([6, 4, 5, 2])
    mask_PT = torch.arange(6) < length[:, None]
    made = generate(lm, prompt_PT, mask_PT, new=5, group=group, stop=(3,), sampling=Sampling(1.0), prefix=prefix)
    taken = []
    for r, n in enumerate(made.length_R.tolist()):
        prompt = prompt_PT[r // group, : length[r // group]]
        row_BT, routings = torch.cat([prompt, made.token_RN[r, :n]])[None], list[Routing]()
        prefix_BT = (torch.arange(row_BT.shape[1]) < len(prompt))[None] if prefix else None
        log_TV = lm.logits(lm(lm.embed(row_BT), prefix_BT=prefix_BT, routings=routings)).log_softmax(2)[0]
        expected_N = log_TV[len(prompt) - 1 : -1].gather(1, made.token_RN[r, :n, None])[:, 0]
        # sums of 16 and 48 in three layers, of weights twenty times as large
        torch.testing.assert_close(made.log_RN[r, :n], expected_N, **rounding(2048, F32))
        taken.append(torch.stack([routing.used[:, 0].float().mean() for routing in routings]))
    assert 0.05 < torch.stack(taken).mean() < 0.95, "some are taken, and some not"


def test_experts_in_a_layer_see_what_it_takes() -> None:
    experts = ExpertLayers(2, ExpertChoice(), hidden=8, balance=None)
    lm = CausalLM(17, 16, 2, 2, experts=experts, depths=MixtureOfDepths(0.4, every=2))
    routings: list[Routing] = []
    padded_BT = torch.nn.functional.pad(ids(3, 10), (0, 5))
    padded_BT[2, 5:] = 0
    lm(lm.embed(padded_BT), (padded_BT > 0).long(), routings=routings)
    some, all_of, depth = routings
    assert [len(some.used), len(all_of.used), int(depth.used.sum())] == [3 * 4, 3 * 15, 4 + 4 + 2]
    assert some.marks.valid is not None and int(some.marks.valid.sum()) == 4 + 4 + 2


def test_a_document_gives_the_same_tokens_alone_and_packed() -> None:
    lm, documents = small(MixtureOfDepths(0.3)), [ids(1, 9), ids(2, 5)[1:]]
    segment_BT = torch.tensor([9 * [1] + 5 * [2]])
    packed_BTD = lm(lm.embed(torch.cat(documents, dim=1)), segment_BT)
    alone = [lm(lm.embed(x)) for x in documents]
    torch.testing.assert_close(packed_BTD, torch.cat(alone, dim=1), **rounding(256, F32))  # as of padding


class TestLanguageWithDepths(MissingModalities, Ranks):
    def recipe(self) -> VisionLanguage:
        torch.manual_seed(0)
        depths = MixtureOfDepths(0.5, auxiliary=CausalAux(4))
        lm = CausalLM(20, 12, 2, 2, length=64, depths=depths, positions=AxisRoPE())
        return VisionLanguage(**sees(lm, Towers(image=Patches())), visual=VisualAxes())

    def batch(self) -> Batch:
        return batch()

    @pytest.mark.slow
    def test_two_ranks_equal_one(self) -> None:
        super().test_two_ranks_equal_one()

    def test_the_causal_router_has_a_term_and_answers_are_generated(self) -> None:
        recipe = self.recipe().double()
        aux = recipe(self.batch()).aux
        assert set(aux) == {"depths/causal"} and 0 < float(aux["depths/causal"].value.sum()) < 5
        assert not recipe.eval()(self.batch()).aux and recipe.generate(self.batch(), new=3).shape == (7, 3)


def test_it_stands_beside_axes_and_is_refused_where_it_cannot() -> None:
    with pytest.raises(ValueError, match="generation: MixtureOfDepths takes tokens by those that come later"):
        generate(small(MixtureOfDepths()).eval(), ids())
    with pytest.raises(ValueError, match=r"capacity 1\.5: a share"):
        MixtureOfDepths(1.5)
    with pytest.raises(ValueError, match=r"depths\.first 4: of 2 layers the last is 1"):
        small(MixtureOfDepths(first=4))
    lm = CausalLM(17, 16, 2, 2, positions=AxisRoPE(), depths=MixtureOfDepths())
    position_BT3 = torch.arange(13)[None, :, None].expand(1, 13, 3)
    assert torch.equal(lm(lm.embed(ids(1)), position_BT=position_BT3), lm(lm.embed(ids(1))))
