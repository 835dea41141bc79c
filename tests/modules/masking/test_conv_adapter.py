"""Images through a convolutional network, and exact matches of what is generated. Letters: B samples, T tokens."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from descant.callbacks import GenerationAccuracy
from descant.modules.core.batch import Batch
from descant.modules.masking.adapters import Adapters
from descant.modules.masking.any_to_any import AnyToAnyDecoder
from descant.modules.masking.conv_adapter import ConvAdapter
from descant.modules.masking.decoders import At
from descant.modules.masking.sequence_adapter import SequenceAdapter
from descant.modules.masking.two_budgets import DirichletPair, TwoBudgets
from descant.modules.towers.image import ConvTower
from descant.modules.towers.vit import Trunk
from descant.recipes import Masked
from tests._suites import MissingModalities, Ranks
from tests.papers.test_4m import batch
from tests.tolerance import F64, rounding


def adapter(width: int = 16) -> ConvAdapter:
    torch.manual_seed(0)
    conv = ConvAdapter(ConvTower(widths=[8, 8], stem=2, norm="group"), size=[8, 8], patch=4)
    conv.build(width, 0)
    return conv.double()


def recipe() -> Masked:
    adapters = Adapters(image=adapter(24), text=SequenceAdapter(9, 8))
    pair = DirichletPair({"image": 1.0}, {"text": 1.0})
    corruption = TwoBudgets(2, 2, [pair], sequences=["text"])
    return Masked(adapters, Trunk(24, 1, 3), AnyToAnyDecoder(12, 1, 2), corruption)


class TestConvAdapter(MissingModalities, Ranks):
    def recipe(self) -> Masked:
        return recipe()

    def batch(self) -> Batch:
        b = batch()
        return Batch(
            {m: b.inputs[m] for m in ("image", "text")},
            {m: b.present[m] for m in ("image", "text")},
            index=b.index,
            rng_seed=b.rng_seed,
        )


def test_a_token_is_of_visible_pixels_alone_and_as_of_the_whole_net_where_all_are_visible() -> None:
    conv, x = adapter(), torch.randn(3, 3, 8, 8, dtype=F64)
    x_BTP, _ = conv.raw(x)
    seen_BT = torch.tensor([[True, False, True, True], [False] * 4, [True] * 4])
    at = At.of(seen_BT)
    h_ND = conv.visible(x_BTP, at)
    hidden = torch.where(seen_BT[..., None], x_BTP, torch.randn_like(x_BTP))
    assert torch.equal(conv.visible(hidden, at), h_ND)
    other = x_BTP.clone()
    other[0, 0] += 1.0
    assert not torch.equal(conv.visible(other, at)[1], h_ND[1])  # its neighbour saw it
    whole_TD = conv.inward(conv.tower(x).h_BTD[2]) + conv.place_TD + conv.modality_D
    torch.testing.assert_close(h_ND[3:], whole_TD, **rounding(256, F64))


def test_samples_that_show_nothing_pass_no_convolution() -> None:
    conv, sizes = adapter(), list[int]()
    conv.tower.register_forward_hook(lambda _, args, __: sizes.append(len(args[0])))
    x_BTP, _ = conv.raw(torch.randn(5, 3, 8, 8, dtype=F64))
    shown = torch.zeros(5, 4, dtype=torch.bool)
    shown[1, 2] = shown[4, 0] = True
    assert conv.visible(x_BTP, At.of(shown)).shape == (2, 16) and sizes == [2]
    none = conv.visible(x_BTP, At.of(torch.zeros(5, 4, dtype=torch.bool)))
    none.sum().backward()
    grads = [p.grad for p in conv.tower.parameters()]
    assert none.shape == (0, 16) and all(g is not None and not g.any() for g in grads)


def test_another_stride_is_refused() -> None:
    with pytest.raises(ValueError, match=r"patch \[2, 2\]: 16 tokens, and the tower has 4"):
        ConvAdapter(ConvTower(widths=[8, 8], stem=2, norm="group"), size=[8, 8], patch=2)


class Known:
    """Generates the text of each sample but the last token of some."""

    def __init__(self, wrong: list[int]) -> None:
        self.wrong, self.rows = wrong, list[int]()

    def __call__(self, model: Any, some: Batch, given: list[str], targets: list[str]) -> dict[str, Tensor]:
        assert given == ["image"] and targets == ["text"] and not torch.is_grad_enabled()
        self.rows += some.index.tolist()
        text_BT = some.inputs["text"].clone()
        text_BT[torch.isin(some.index, torch.tensor(self.wrong)), 1] += 1
        return {"text": text_BT}


def test_only_whole_matches_of_samples_that_have_both_count() -> None:
    b, plugin = batch(), SimpleNamespace(val_step_context=nullcontext)
    trainer, model = SimpleNamespace(precision_plugin=plugin), recipe()
    callback = GenerationAccuracy(["image"], "text")
    callback.sampler = known = Known(wrong=[2, 5, 6])  # type: ignore[assignment]
    keep_B = torch.arange(16) != 9
    both = (b.present["image"] & b.present["text"] & keep_B).nonzero().flatten().tolist()
    for part in (torch.arange(5), torch.arange(5, 16), torch.tensor([15])):  # the last has no modality
        callback.run(trainer, model, b.select(part), keep_B[part], "one")  # type: ignore[arg-type]
    found: Any = callback.results(trainer, model)  # type: ignore[arg-type]
    right = sum(k not in (2, 5, 6) for k in both) / len(both)
    assert known.rows == both and {k: float(x) for k, x in found.items()} == {"one/exact_text_from_image": right}
    with pytest.raises(ValueError, match="modality 'names'"):
        GenerationAccuracy(["names"], "text").run(trainer, model, b, keep_B, "one")  # type: ignore[arg-type]
