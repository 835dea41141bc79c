"""InterBERT: segments and overlapping regions are hidden as they should be, and two streams do not meet.

Letters: B samples, T tokens, N pairs, D width.
"""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from descant.datamodules.base import BatchDataset, Rows
from descant.datamodules.corpora.emoji import Emoji
from descant.datamodules.corpora.emoji_pack import VENDORS
from descant.modules.core.batch import Batch
from descant.modules.core.rng import uniform_NK
from descant.modules.fusion.cross_encoder import FusionLayers
from descant.modules.fusion.single_then_two import SingleThenTwo
from descant.modules.masking.corruptions import corrupt_on_host
from descant.modules.masking.discrete_adapters import TokenAdapter
from descant.modules.masking.regions import RegionMask, pairwise_iou, region_mask
from descant.modules.masking.structured import SegmentMask, anchored_segments, one_segment
from descant.modules.objectives.masked import MaskedTokens
from descant.modules.objectives.match import Match, matching_negatives
from descant.modules.objectives.regions import MaskedRegions
from descant.modules.objectives.streams import Streams
from descant.modules.towers import RegionTower, TextTower, Tokens, Towers
from descant.modules.transforms.regions import Regions
from descant.recipes import MultiTask
from tests._suites import GradientExact, MissingModalities, Ranks, Resume, SampleData, Samples
from tests.tolerance import F32, rounding

P, T, K = 3, 5, 4


# what is hidden -------------------------------------------------------------------------------------------------------


def test_every_region_that_overlaps_a_seed_is_hidden_and_no_other() -> None:
    """By the release's loop, with its pixel more a side."""
    regions, draw_B = Regions(), torch.arange(200) * 7919
    box_BT4, real_BT = regions.boxes(draw_B), torch.ones(200, 24, dtype=torch.bool)
    u_BT = uniform_NK(draw_B, [f"mask/regions/{t}" for t in range(24)])
    together = 0
    for pixel in (0.0, 1 / 32):
        hidden_BT = RegionMask(0.1, 0.4, pixel).masks("regions", real_BT, box_BT4, draw_B).target["regions"]
        for box_T4, u_T, hidden_T in zip(box_BT4.double().tolist(), u_BT.tolist(), hidden_BT.tolist(), strict=True):
            wanted = [False] * 24
            for s in range(24):
                if u_T[s] < 0.1:
                    wanted = [wanted[t] or iou(box_T4[s], box_T4[t], pixel) >= 0.4 for t in range(24)]
            assert hidden_T == wanted
            together += sum(hidden_T) - sum(u < 0.1 for u in u_T)
    assert together > 50  # crops do overlap
    assert torch.equal(region_mask(pairwise_iou(box_BT4), u_BT, 0.1, threshold=2.0), torch.zeros_like(hidden_BT))


def iou(a: list[float], b: list[float], pixel: float) -> float:
    width = max(min(a[2], b[2]) - max(a[0], b[0]) + pixel, 0)
    height = max(min(a[3], b[3]) - max(a[1], b[1]) + pixel, 0)
    area = sum((x[2] - x[0] + pixel) * (x[3] - x[1] + pixel) for x in (a, b))
    return width * height / (area - width * height)


@pytest.mark.parametrize("n", [1, 3, 4, 10, 24])
def test_the_length_of_a_segment_has_its_exact_distribution(n: int) -> None:
    """Each start and each length once: counts are those of the closed form, and of the release's loop."""
    start, length = (torch.arange(k) for k in (n + 1, n))
    u_N2 = torch.cartesian_prod((start + 0.5) / (n + 1), (length + 0.5) / n).view(-1, 2)
    begin_N, count_N = one_segment(torch.full((len(u_N2),), n), *u_N2.unbind(1))
    counts = torch.bincount(count_N, minlength=n + 1).tolist()
    if n < 4:
        assert counts[0] == n * (n + 1)
        return
    assert counts == [n] + [2 * (n - k) + 1 for k in range(1, n + 1)]
    mean = Fraction(sum(k * count for k, count in enumerate(counts)), n * (n + 1))
    assert mean == Fraction(2 * n + 1, 6)
    released = [(s, min(L + 1, n - s)) for s in start.tolist() for L in length.tolist()]
    assert list(zip(begin_N.tolist(), count_N.tolist(), strict=True)) == released


def test_segments_at_anchors_have_their_exact_chance() -> None:
    """Of four tokens, each of 4 x 3 draws a token once: a quarter of the tokens are anchors."""
    length, most = 4, 3
    each = torch.cartesian_prod(*([torch.arange(4 * most)] * length))
    anchor_BT, length_BT = (each // most + 0.5) / 4, (each % most + 0.5) / most
    share_T = anchored_segments(anchor_BT, length_BT, 0.25, most).double().mean(dim=0)
    for t, share in enumerate(share_T.tolist()):
        free = math.prod(1 - Fraction(most - k, 4 * most) for k in range(min(t, most - 1) + 1))
        assert share == pytest.approx(float(1 - free), rel=1e-12)  # a sum of 12^4 ones


def test_a_segment_is_of_real_tokens() -> None:
    draw_B, real_BT = torch.arange(400), torch.ones(400, 12, dtype=torch.bool)
    real_BT[:, 8:] = False
    for mask in (SegmentMask(), SegmentMask(anchors=0.1)):
        hidden_BT = mask({"text": real_BT}, {"text": (12,)}, draw_B).target["text"]
        assert not hidden_BT[:, 8:].any() and hidden_BT[:, :8].any(dim=0).all()
        runs_B = (hidden_BT.int().diff(dim=1, prepend=torch.zeros(400, 1).int()) == 1).sum(dim=1)
        assert (runs_B.max() == 1) == (mask.anchors is None)


# two streams ----------------------------------------------------------------------------------------------------------


def layers(**options: Any) -> SingleThenTwo:
    torch.manual_seed(0)
    return SingleThenTwo(8, 1, 2, **options).build({"image": 8, "text": 8}).double()


def sides() -> list[Tokens]:
    g = torch.Generator().manual_seed(3)
    real = [torch.ones(4, T, dtype=torch.bool), torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 1]]).bool()]
    return [Tokens(torch.randn(*mask.shape, 8, generator=g, dtype=torch.float64), mask) for mask in real]


def test_no_cross_attention_above_the_single_stream() -> None:
    fusion: Any = layers().between("image", "text")
    (image, text), c_ND = sides(), torch.randn(4, 8, dtype=torch.float64)
    other = Tokens(image.h_BTD.flip(0) + 1, image.mask_BT)
    before, after = fusion.apart(c_ND, image, text), fusion.apart(c_ND, other, text)
    assert torch.equal(before.b.h_BTD, after.b.h_BTD)
    assert not torch.equal(before.a.h_BTD, after.a.h_BTD) and not torch.equal(before.first_ND, after.first_ND)
    mixed: Any = layers(sham="exchange").between("image", "text")  # as many parameters, and the sides do meet
    before, after = mixed.apart(c_ND, image, text), mixed.apart(c_ND, other, text)
    assert not torch.equal(before.b.h_BTD, after.b.h_BTD)
    row_N = torch.arange(4)  # below they meet
    assert not torch.equal(*(fusion.pairs(a, text, row_N, row_N).b.h_BTD for a in (image, other)))


@pytest.mark.parametrize("fusion", [FusionLayers(8, 1, 2, alone=True), SingleThenTwo(8, 1, 2, alone=True)])
def test_alone_a_modality_passes_the_layers_without_the_other(fusion: FusionLayers) -> None:
    fusion = fusion.build({"image": 8, "text": 8}).double()
    _, text = sides()
    found = fusion.tokens_to_pool("text", text).h_BTD
    first_B1D = fusion.first_D.expand(4, 1, -1)
    keys = torch.cat([torch.ones(4, 1, dtype=torch.bool), text.mask_BT], dim=1)[:, None, None]
    h = fusion.layers[0](torch.cat([first_B1D, fusion.map_tokens("text", text).h_BTD], dim=1), keys)
    for layer in fusion.streams["text"] if isinstance(fusion, SingleThenTwo) else ():  # type: ignore[union-attr]
        h = layer(h, keys)
    torch.testing.assert_close(found, fusion.norm(h)[:, 1:], **rounding(64, torch.float64))


# the recipe -----------------------------------------------------------------------------------------------------------


class RegionSamples(Samples):
    """Samples whose images are regions of boxes that overlap, and whose texts are of 4 to 6 tokens."""

    def rows(self, index_B: np.ndarray, draw_B: np.ndarray) -> Rows:
        rows = super().rows(index_B, draw_B)
        g = torch.Generator().manual_seed(7)
        corner = torch.rand(len(self), T, 2, generator=g, dtype=torch.float64) * 0.4
        box = torch.cat([corner, corner + 0.3 + 0.3 * torch.rand(len(self), T, 2, generator=g)], dim=2)[index_B]
        words = torch.randn(len(self), T, K, generator=g, dtype=torch.float64).softmax(dim=2)[index_B]
        feature = torch.stack([rows.inputs["image"].roll(t, dims=1)[:, :P] for t in range(T)], dim=1)
        text = (rows.inputs["text"].nan_to_num(0.0).abs() * 5).long() % 8 + 1
        text = torch.cat([text, torch.where(rows.targets["label"] > 0, 3, 0)[:, None]], dim=1)
        inputs = {"image": torch.cat([feature, box], dim=2), "text": text, "boxes": box, "words": words}
        return replace(rows, inputs=inputs)


class RegionData(SampleData):
    def training_set(self) -> BatchDataset:
        return RegionSamples(self.count, ("image", "text"))


class Masked(GradientExact, Ranks, MissingModalities, Resume):
    """The masked terms alone, so that a batch can be cut into micro-batches."""

    matches = False

    def recipe(self) -> Any:
        torch.manual_seed(0)
        towers = Towers(image=RegionTower(P, 8, depth=1, heads=2), text=TextTower(9, 8, 1, 2, 6))
        objectives: dict[str, Any] = {
            "words": MaskedTokens("text", TokenAdapter(9, 6), "image", SegmentMask()),
            "regions": MaskedRegions(K, T, "image", given="text", mask=RegionMask(0.3)),
        }
        if self.matches:
            objectives["match"] = Match(["image", "text"], negatives="random", within="label")
        return MultiTask(towers, objectives, 8, SingleThenTwo(8, 1, 2, upper=1))

    def batch(self) -> Batch:
        held, at = RegionSamples(16, ("image", "text")), np.arange(16)
        rows = held.rows(at, at)
        return Batch(rows.inputs, held.present(at), rows.targets, rng_seed=torch.arange(16) * 7919 + 13)

    def data(self) -> SampleData:
        return RegionData(modalities=("image", "text"))

    def explicit(self, recipe: Any, batch: Batch) -> dict[str, Tensor]:
        x, both = batch.inputs, batch.both("image", "text").nonzero().flatten().tolist()
        real = {"text": (x["text"] != 0) & batch.present["text"][:, None]}
        hidden = {"text": corrupt_on_host(SegmentMask(), real, {"text": (6,)}, batch.rng_seed).target["text"]}
        u = uniform_NK(batch.rng_seed, [f"mask/image/{t}" for t in range(T)])
        hidden["image"] = region_mask(pairwise_iou(x["boxes"].float()), u, 0.3, 0.4)
        fusion = recipe.fusion

        def tokens(m: str, i: int, hide: bool) -> Tensor:
            """``[1, T, D]`` of a sample, without its padding."""
            n, tower = (int(real["text"][i].sum()) if m == "text" else T), recipe.towers[m]
            x_1 = x[m][i : i + 1, :n]
            place = tower.positions_TD[:n] if m == "text" else tower.places(x_1)
            h = (
                torch.where(hidden[m][i, :n, None], recipe.mask_tokens[m] + place, tower.embed(x_1))
                if hide
                else tower.embed(x_1)
            )
            return fusion.maps[m](tower.encode(h))

        def fused(i: int, j: int, hide: str = "") -> tuple[Tensor, Tensor, Tensor]:
            a, b = tokens("image", i, hide == "image"), tokens("text", j, hide == "text")
            h = fusion.layers[0](torch.cat([fusion.first_D.expand(1, 1, -1), a, b], dim=1))
            a, b = (torch.cat([h[:, :1], side], dim=1) for side in (h[:, 1 : 1 + T], h[:, 1 + T :]))
            a, b = fusion.norm(fusion.streams["image"][0](a))[0], fusion.norm(fusion.streams["text"][0](b))[0]
            return fusion.poolers["image"](a[0]).relu() * fusion.poolers["text"](b[0]).relu(), a[1:], b[1:]

        terms = dict.fromkeys(self.recipe().tasks, torch.zeros((), dtype=torch.float64))
        objectives = recipe.objectives
        for i in both:  # mismatched pairs have no masked terms
            at = hidden["text"][i].nonzero().flatten()
            if len(at):
                logits = objectives["words"].adapter.outward(fused(i, i, "text")[2][at])
                terms["words"] = terms["words"] + F.cross_entropy(logits, x["text"][i, at]) / len(both)
            at = hidden["image"][i].nonzero().flatten()
            if len(at):
                log_q = objectives["regions"].adapter.outward(fused(i, i, "image")[1][at]).log_softmax(dim=1)
                p = x["words"][i, at]
                terms["regions"] = terms["regions"] + (p * (p.log() - log_q)).sum(dim=1).mean() / len(both)
        # what no term reads of the fusion layers has a gradient of zeros
        terms["words"] = terms["words"] + 0 * sum(p.sum() for p in fusion.poolers.parameters())
        if self.matches:
            match, draws = objectives["match"], uniform_NK(batch.rng_seed, ["match/text", "match/image"])
            order = batch.rng_seed.argsort().tolist()
            for i in both:
                fit = [
                    g for g in order if g in both and g != i and batch.targets["label"][g] == batch.targets["label"][i]
                ]
                j, k = (fit[int(draws[i, side] * len(fit))] for side in (0, 1))
                s = [match.score(fused(*pair)[0])[0] for pair in ((i, i), (i, j), (k, i))]
                terms["match"] = terms["match"] + (F.softplus(-s[0]) + F.softplus(s[1]) + F.softplus(s[2])) / 3 / len(
                    both
                )
        return terms


class TestMasked(Masked):
    pass


class TestInterBERT(Masked):
    matches = True


def test_mismatched_pairs_add_zero_to_masked_terms() -> None:
    """The release zeroes the masked loss of a pair whose text is another sample's; here such a pair has none."""
    model: Any = TestInterBERT().made()
    alone, batch = TestMasked().made(), TestInterBERT().batch()
    shared = {name: x for name, x in model.state_dict().items() if not name.startswith("objectives.match")}
    alone.load_state_dict(shared)
    with_pairs, without = model(batch).terms, alone(batch).terms
    assert all(torch.equal(with_pairs[name].value, without[name].value) for name in ("words", "regions"))
    label_B = batch.targets["label"]
    for row_B in model.objectives["match"].negative_rows(Streams(model, batch), batch, across=False):
        has = row_B >= 0
        assert has.any() and torch.equal(label_B[row_B[has]], label_B[has])
        assert (row_B != torch.arange(16))[has].all()


def test_hidden_regions_reach_nothing() -> None:
    """Not their features, nor those of another box on the same pixels; but where they are is known."""
    model: Any = TestMasked().made()
    batch = TestMasked().batch()
    hidden = model.objectives["regions"].hides(batch).target["image"]
    before = model(batch).terms["regions"].value
    other = TestMasked().batch()
    other.inputs["image"][..., :P] = torch.where(hidden[..., None], 9.0, other.inputs["image"][..., :P])
    assert hidden.any() and torch.equal(model(other).terms["regions"].value, before)
    other.inputs["image"][..., P:] = torch.where(hidden[..., None], 0.1, other.inputs["image"][..., P:])
    assert not torch.equal(model(other).terms["regions"].value, before)


# the data -------------------------------------------------------------------------------------------------------------


def emoji(**options: Any) -> Emoji:
    data = Emoji(16, regions=Regions(words=8, **options), tiny=True, batch_size=8)
    data.setup("fit")
    return data


def test_regions_of_emoji() -> None:
    data = emoji()
    batch = data.on_after_batch_transfer(next(iter(data.train_dataloader())), 0)
    x, box, words = (batch.inputs[name] for name in ("regions", "boxes", "words"))
    assert (
        x.shape == (8, 24, 52)
        and torch.equal(x[..., 48:], box)
        and torch.equal(batch.present["regions"], batch.present["image"])
    )
    assert (box >= 0).all() and (box <= 1).all() and (box[..., 2:] > box[..., :2]).all()
    assert torch.equal(box, data.regions.boxes(batch.rng_seed)) and (box[0] != box[1]).any()  # type: ignore[union-attr]
    cells = batch.inputs["image"].unfold(2, 4, 4).unfold(3, 4, 4).flatten(2, 3).transpose(1, 2).flatten(2)
    # a cell is its own pixels: the mean of four samples within each
    torch.testing.assert_close(x[:, :16, :48], cells, rtol=0, atol=1.0)
    far = torch.stack([(x[..., :48] - w).square().sum(dim=2) for w in data.visual_words], dim=2)
    assert torch.equal(words, F.one_hot(far.argmin(dim=2), 8).float())
    soft = emoji(temperature=5.0).regions.probabilities(x[..., :48], data.visual_words)  # type: ignore[union-attr]
    torch.testing.assert_close(soft, (-far / 5).softmax(dim=2), **rounding(4096, F32))


def test_words_are_of_training_images_alone() -> None:
    """Other drawings of what is held out change no word; other drawings of half the training concepts do."""
    words = emoji().visual_words
    for held in (True, False):
        data = Emoji(16, regions=Regions(words=8), tiny=True, batch_size=8)
        rows = [data.pack.rows[concept] for concept in np.flatnonzero(data.test_N == held)[:: 1 if held else 2]]
        # encoded ones, as packs of a process share what these decode to
        drawn = {vendor: rows[0][vendor] for vendor in VENDORS}
        for row in rows:
            row.update(drawn)
        data.setup("fit")
        assert torch.equal(data.visual_words, words) == held


def test_refusals() -> None:
    for make, line in (
        (lambda: RegionMask(0), "rate 0, iou 0.4"),
        (lambda: SegmentMask(anchors=1.0), "anchors 1.0, most 2"),
        (lambda: SingleThenTwo(8, 1, 2, upper=0), "one stream alone is FusionLayers"),
        (lambda: Regions(words=1), "words 1"),
        (lambda: SingleThenTwo(8, 1, 2, alone=True).build({"text": 4}), "tower text has the width 4"),
        (lambda: RegionTower(3, 8)(torch.zeros(1, 2, 9)), "features 3, and 4 of the box"),
        (
            lambda: corrupt_on_host(RegionMask(), {"a": torch.ones(1, 2).bool()}, {"a": (2,)}, torch.arange(1)),
            "MaskedRegions",
        ),
    ):
        with pytest.raises(ValueError, match=line):
            make()
    model, batch = TestMasked().made(), TestMasked().batch()
    del batch.inputs["boxes"]
    with pytest.raises(ValueError, match="regions: boxes: the data has no 'boxes'"):
        model(batch)
    with pytest.raises(ValueError, match="match: within: no such name; did you mean label"):
        within = Match(["image", "text"], within="lable")
        MultiTask(TestMasked().recipe().towers, {"match": within}, 8, FusionLayers(8, 1, 2)).double()(
            TestMasked().batch()
        )
    assert matching_negatives(*EVERY, kind_B=torch.tensor([1, 2, 1])).tolist() == [2, -1, 0]


EVERY = (torch.zeros(3, 3), torch.arange(3), torch.ones(3, dtype=torch.bool), torch.full((3,), 0.5))
