"""Recipes whose networks have experts: ranks, missing modalities, and a run that is stopped and resumed."""

from __future__ import annotations

from typing import Any

import torch

from descant.modules.core.batch import Batch
from descant.modules.language import CausalLM
from descant.modules.masking.adapters import Adapters, PatchAdapter
from descant.modules.masking.decoders import JointDecoder
from descant.modules.masking.discrete_adapters import TableAdapter, TokenAdapter
from descant.modules.moe import ExpertLayers, ModalityTopK, Routing, TopKRouter
from descant.modules.towers import Towers
from descant.modules.towers.vit import Trunk
from descant.recipes import Masked, VisionLanguage
from tests._suites import MissingModalities, Ranks, Resume
from tests._suites.data import SampleData
from tests.recipes.test_masked import batch as some_of_four
from tests.recipes.test_vision_language import Patches, batch, sees


def masked(adapters: Adapters) -> Masked:
    torch.manual_seed(0)
    experts = ExpertLayers(4, TopKRouter(2, bias_rate=0.01), hidden=8, every=2, z=0.001)
    return Masked(adapters, Trunk(16, 2, 2, experts=experts), JointDecoder(8, 1, 2))


class TestMaskedWithExperts(MissingModalities, Ranks):
    def recipe(self) -> Masked:
        return masked(Adapters(image=PatchAdapter([8, 8], 4), text=TokenAdapter(9, 6)))

    def batch(self) -> Batch:
        some = some_of_four().only("image", "text")
        some.inputs["image"] = some.inputs["image"].double()
        return some

    def test_no_auxiliary_term_where_nothing_trains(self) -> None:
        made: Any = self.made()
        names = set(made(self.batch()).aux)
        assert names == {"experts/balance", "experts/z"} and not made.eval()(self.batch()).aux


class TestResumedExperts(Resume):
    """Biases move before a resume point is written, and not after."""

    def recipe(self) -> Masked:
        return masked(Adapters(others={"image": TableAdapter([0] * 6), "text": TableAdapter([0] * 5)}))

    def data(self) -> SampleData:
        return SampleData(modalities=("image", "text"))


class TestLanguageWithExperts(MissingModalities, Ranks):
    def recipe(self) -> VisionLanguage:
        torch.manual_seed(0)
        experts = ExpertLayers(4, ModalityTopK([[0, 1, 2], [1, 2, 3]]), hidden=8, every=2)
        lm = CausalLM(20, 12, 2, 2, length=64, experts=experts)
        return VisionLanguage(**sees(lm, Towers(image=Patches())))

    def batch(self) -> Batch:
        return batch()

    def test_images_and_words_see_their_experts(self) -> None:
        recipe: Any = self.made()
        routings: list[Routing] = []
        recipe.read(self.batch(), routings)
        kind_N, used_NK, index_NK = routings[0].marks.kind, routings[0].used, routings[0].expert
        assert kind_N is not None and set(kind_N.tolist()) == {0, 1}
        assert not (index_NK[kind_N == 0] == 3).any() and not ((index_NK == 0) & used_NK)[kind_N == 1].any()
        assert set(recipe(self.batch()).aux) == {"experts/balance"}
        assert recipe.eval().generate(self.batch(), new=3).shape == (7, 3)
