"""Samples of a masked model: functions of seeds and of what is given, schedules, pictures, refusals."""

from __future__ import annotations

import math
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from descant.callbacks import GenerationPictures
from descant.callbacks.plots.reconstruction import GAP, LABEL, TILE
from descant.callbacks.plots.style import pixels
from descant.modules.core.batch import Batch
from descant.modules.masking.corruptions import UniformMask
from descant.modules.masking.decoders import At
from descant.modules.masking.sampler import RandomFirst, Sampler, cosine_counts
from tests.papers.test_4m import batch, recipe


def whole(rows: int = 4) -> Batch:
    b = batch(17)
    return b.select(torch.stack([*b.present.values()]).all(0).nonzero().flatten()[:rows])


@pytest.mark.parametrize("options", [{}, {"order": RandomFirst()}, {"guidance": 2.5}])
def test_samples_are_functions_of_a_rows_seed_and_of_what_is_given(options: dict[str, Any]) -> None:
    model, b = recipe().double().eval(), whole()
    allowed = {"palette": [0, 2], "text": [3, 5, 6]}
    sampler = Sampler(steps=5, allowed=allowed, temperature={"text": 0.7}, **options)
    made = sampler(model, b, ["image"], ["palette", "text", "codes"])
    assert {m: x.shape for m, x in made.items()} == {m: b.inputs[m].shape for m in made}
    assert set(made["palette"].unique().tolist()) == {0, 2} and set(made["text"].unique().tolist()) <= {0, 3, 5, 6}
    flipped = sampler(model, b.select(torch.arange(len(b)).flip(0)), ["image"], ["palette", "text", "codes"])
    assert all(torch.equal(flipped[m].flip(0), x) for m, x in made.items())
    changed = whole()
    for m in made:
        changed.inputs[m] = torch.ones_like(changed.inputs[m])  # what is generated is not seen
    again = sampler(model, changed, ["image"], ["palette", "text", "codes"])
    assert all(torch.equal(again[m], x) for m, x in made.items())


def test_with_little_temperature_each_token_is_the_most_probable_and_a_chain_goes_on_from_it() -> None:
    model: Any = recipe().double().eval()
    b = whole()
    cold = Sampler(steps=1, temperature=dict.fromkeys(("palette", "text"), 1e-9))
    made = cold(model, b, ["image"], ["palette", "text"])
    b.inputs["palette"] = made["palette"]
    raw, real = model.raw(b)
    seen = {m: x & (m == "image") for m, x in real.items()}
    h_NE = model.decoder(model.encode(raw, seen), {"palette": At.of(real["palette"])})["palette"]
    assert torch.equal(model.adapters["palette"].predict(h_NE, torch.zeros(0)), raw["palette"].flatten(0, 1))
    assert torch.equal(cold(model, b, ["image", "palette"], ["text"])["text"], made["text"])
    text_BT = made["text"]
    assert bool(((text_BT != 0).int().diff(dim=1) <= 0).all()) and bool((text_BT[:, 0] != 0).all())


class Codes:
    def decode(self, code_BT: Tensor) -> Tensor:
        return code_BT.view(-1, 1, 3, 3).expand(-1, 3, 3, 3) / 3.5 - 1


def test_pictures_have_a_row_a_given_modality_and_a_column_a_generated_one() -> None:
    model, b = recipe().double().eval(), batch(17).select(torch.tensor([3, 5]))  # one lacks its text
    data = SimpleNamespace(code_tokenizers={"codes": Codes()})
    plugin = SimpleNamespace(val_step_context=nullcontext)
    trainer: Any = SimpleNamespace(datamodule=data, precision_plugin=plugin, sanity_checking=False, is_global_zero=True)
    callback = GenerationPictures(["image", "text"], ["palette", "codes"], Sampler(3))
    figure = callback.draw(trainer, model, b, ["first", "second"], "title")[""]
    assert figure is not None
    texts, drawn = [text.get_text() for text in figure.axes[0].texts], pixels(figure)
    assert [t for t in texts if t.startswith("from")] == ["from image", "from text"] * 2 and "first" in texts
    step, top = TILE + 4, drawn.shape[0] - 6 * (TILE + 4) - 2 * GAP
    lack = int((~b.present["text"]).nonzero())
    for k in range(2):
        for r in range(3):
            y = top + (3 * k + r) * step + k * GAP
            tiles = [drawn[y : y + TILE, GAP + LABEL + c * step :][:, :TILE] for c in range(3)]
            empty = [bool((tile == 255).all()) for tile in tiles]
            assert empty == {0: [True, False, False], 1: [False] * 3, 2: [k == lack] * 3}[r]
    trainer.is_global_zero = False
    assert callback.draw(trainer, model, b, ["first", "second"], "title") == {}


@pytest.mark.parametrize(("tokens", "steps"), [(36, 8), (36, 36), (9, 1), (256, 12), (5, 4)])
def test_a_schedule_decodes_every_token_and_one_at_least_a_step(tokens: int, steps: int) -> None:
    counts = cosine_counts(tokens, steps)
    assert len(counts) == steps and sum(counts) == tokens and min(counts) >= 1
    hidden = tokens - np.cumsum(counts)
    ideal = np.floor(tokens * np.cos(math.pi / 2 * np.arange(1, steps + 1) / steps) + 1e-9)
    assert (np.abs(hidden - ideal) <= (0 if steps <= tokens / 4 else tokens)).all()


@pytest.mark.parametrize(
    ("options", "given", "targets", "message"),
    [
        ({"steps": 10}, ["image"], ["codes"], "steps 10: codes has 9 tokens; at most as many steps"),
        ({"allowed": {"text": [0, 9]}}, ["image"], ["text"], r"allowed \[0, 9\]: no id of text, which has 0 to 8"),
        ({}, ["image"], ["colour"], "modality 'colour': no such name"),
        ({}, ["image"], ["image"], "image is given, and a target"),
        ({}, ["text"], ["image"], "target image: the model predicts palette, text, codes alone"),
        ({"temperature": {"txt": 1.0}}, ["image"], ["text"], "modality 'txt': no such name; did you mean text?"),
    ],
)
def test_what_cannot_be_sampled_is_one_line(options: Any, given: list[str], targets: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampler(**options)(recipe().double(), whole(), given, targets)


def test_a_source_that_a_sample_lacks_and_one_without_ids_are_named() -> None:
    with pytest.raises(ValueError, match="given palette: sample 1 of the batch lacks it"):
        Sampler()(recipe().double(), batch(), ["palette"], ["text"])
    patches = recipe(corruption=UniformMask(0.5)).double()
    with pytest.raises(ValueError, match="target image: PatchAdapter has no ids that could be sampled"):
        Sampler()(patches, whole(), ["text"], ["image"])
