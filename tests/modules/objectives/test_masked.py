"""Masked tokens as one of several objectives: against a loop, and that hidden content reaches nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from descant.modules.core.batch import Batch
from descant.modules.masking.adapters import L1, MSE, PatchAdapter
from descant.modules.masking.corruptions import UniformMask, corrupt_on_host
from descant.modules.masking.discrete_adapters import CategoryAdapter
from descant.modules.objectives.masked import MaskedTokens
from descant.modules.objectives.streams import Streams
from tests.recipes.test_multitask import multitask, samples, without, words
from tests.tolerance import F32, F64, rounding


@pytest.mark.parametrize("given", [None, "image"])
def test_words_by_hand(given: str | None) -> None:
    model, b = multitask("kind", more={"words": words(given=given)}).double(), without(samples(), image=[2], text=[5])
    b.inputs["text"][0, 4:] = 0
    term = model(b).terms["words"]
    objective, tower = model.objectives["words"], model.towers["text"]
    real = (b.inputs["text"] != 0) & b.present["text"][:, None]
    hidden = corrupt_on_host(UniformMask(0.5), {"text": real}, {"text": (6,)}, b.rng_seed).target["text"]
    counted = b.present["text"] & (b.present["image"] if given else True)
    assert torch.equal(term.valid, counted) and float(term.norm) == int(counted.sum())
    for i in counted.nonzero().flatten().tolist():
        T = int(real[i].sum())
        h = tower.embedding(b.inputs["text"][i : i + 1, :T])
        h[0, hidden[i, :T]] = model.mask_tokens["text"]
        h = tower.encode(h + tower.positions_TD[:T])
        if given:
            image = model.fusion.maps["image"](model.towers["image"](b.inputs["image"][i : i + 1]).h_BTD)
            h = torch.cat([model.fusion.first_D.expand(1, 1, -1), model.fusion.maps["text"](h), image], dim=1)
            for layer in model.fusion.layers:
                h = layer(h)
            h = model.fusion.norm(h)[:, 1 : 1 + T]
        logits = objective.adapter.outward(h[0, hidden[i, :T]])
        wanted = F.cross_entropy(logits, b.inputs["text"][i, :T][hidden[i, :T]])
        torch.testing.assert_close(term.value[i], wanted, **rounding(512, F64))


def streams(model: Any, b: Batch, name: str) -> Any:
    view = Streams(model, b)
    return view.of(lambda part: name, model.objectives[name].hides(b))


def test_what_is_hidden_reaches_nothing_and_keeps_its_place() -> None:
    model, b = multitask("words", "patches").double(), samples(4)
    for name, m in (("words", "text"), ("patches", "image")):
        view = streams(model, b, name)
        hidden, before = view.masks.target[m], view.tokens(m, view.masks).h_BTD
        other = samples(4)
        if m == "text":
            other.inputs[m] = torch.where(hidden, 7, other.inputs[m])
        else:
            pixels = hidden.view(4, 1, 2, 2).repeat_interleave(4, 2).repeat_interleave(4, 3)
            other.inputs[m] = torch.where(pixels, 1e3, other.inputs[m])
        assert not torch.equal(other.inputs[m], b.inputs[m])
        again = streams(model, other, name)
        assert torch.equal(again.tokens(m, again.masks).h_BTD, before)
        row = int((hidden.sum(dim=1) > 1).nonzero()[0])
        assert len(before[row][hidden[row]].unique(dim=0)) == int(hidden[row].sum())


def test_classes_of_another_input_are_predicted() -> None:
    classes = MaskedTokens("image", CategoryAdapter(3, [8, 8], 4), corruption=UniformMask(0.5), target="palette")
    model, b = multitask("kind", more={"palette": classes}), samples()
    b.inputs["image"] = b.inputs["image"].float()
    with pytest.raises(ValueError, match="target: the data has no 'palette'"):
        model(b)
    b.inputs["palette"] = torch.zeros(8, 8, 8, dtype=torch.long)
    before = model(b).terms["palette"].value
    for p in model.objectives["palette"].adapter.outward.parameters():  # as likely each
        p.data.zero_()
    after = model(b).terms["palette"].value
    torch.testing.assert_close(after, torch.full((8,), 3.0).log(), **rounding(16, F32))
    assert not torch.equal(before, after)


def test_losses_of_several_parts_are_named() -> None:
    both = MaskedTokens("image", PatchAdapter([8, 8], 4, losses=[MSE(), L1()]))
    model, b = multitask("kind", more={"patches": both}), samples()
    b.inputs["image"] = b.inputs["image"].float()
    assert list(model(b).terms) == ["kind", "patches/mse", "patches/l1"]
    assert {"loss_mse_patches", "loss_l1_patches"} <= model.scores(b).keys()
