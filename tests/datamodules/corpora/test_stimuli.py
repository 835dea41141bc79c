"""Measurements of drawings and texts, on known drawings and on the pack."""

from __future__ import annotations

import math
import random
import shutil
from pathlib import Path

import pytest
import torch

from descant.datamodules.corpora.emoji import Emoji
from descant.datamodules.corpora.emoji_pack import PACK
from descant.datamodules.corpora.stimuli import (
    noise_facts,
    product_facts,
    semantic_facts,
    text_facts,
    valence_facts,
    visual_facts,
)
from descant.datamodules.sampling.resumable_sampler import Order
from descant.modules.core.batch import Batch
from tests.datamodules.batches import whole
from tests.tolerance import F32, conditioned, ulps


def drawing(width: int, height: int, colour: tuple[int, int, int], side: int = 8) -> torch.Tensor:
    x_4HW = torch.zeros(4, side, side, dtype=torch.uint8)
    x_4HW[:3] = 77  # colour under full transparency is nothing
    x_4HW[:3, 1 : 1 + height, 2 : 2 + width] = torch.tensor(colour, dtype=torch.uint8)[:, None, None]
    x_4HW[3, 1 : 1 + height, 2 : 2 + width] = 255
    return x_4HW


def test_visual_facts_of_a_box() -> None:
    facts_NF = visual_facts(torch.stack([drawing(4, 2, (255, 0, 0)), drawing(2, 4, (0, 0, 0))]))
    share = 8 / 64
    red, green, blue, saturation, spread, edges, area, shape = facts_NF[0].tolist()
    assert red == pytest.approx(1.0, rel=ulps(8, F32)) and green == blue == pytest.approx(1 - share, rel=ulps(8, F32))
    assert saturation == pytest.approx(share, rel=ulps(8, F32)) and area == pytest.approx(share, rel=ulps(8, F32))
    assert spread == pytest.approx(2 / 3 * (share * (1 - share)) ** 0.5, rel=ulps(8, F32))
    assert edges == pytest.approx(
        2 / 3 * (2 * 4 + 2 * 2) / 2 / 56, rel=ulps(8, F32)
    )  # steps down: 2 rows of 4; right: 2 columns of 2
    assert shape == pytest.approx(torch.tensor(2.0).log().item(), rel=ulps(4, F32)) == -facts_NF[1, 7].item()
    assert facts_NF[1, 3] == 0  # black has no saturation
    blank = visual_facts(torch.zeros(1, 4, 8, 8, dtype=torch.uint8))[0]
    assert blank.tolist() == pytest.approx([1, 1, 1, 0, 0, 0, 0, 0], abs=ulps(8, F32))


def test_text_facts_are_independent_of_order() -> None:
    a, b, c = text_facts([["red apple", "fruit", "sweet"], ["apple red", "sweet", "fruit"], ["red apple", "fruit"]])
    assert torch.equal(a, b)
    assert a[:4].tolist() == pytest.approx([8, 2, 2, (3 + 5 + 5 + 5) / 4], rel=ulps(8, F32))
    assert not torch.equal(a, c)


def test_noise_is_fixed_and_normal() -> None:
    noise_NF = noise_facts([str(k) for k in range(4000)])
    assert torch.equal(noise_NF[5], noise_facts(["5"])[0])
    # 32,000 numbers: four standard errors are 0.022 of a mean and 0.016 of a deviation
    assert noise_NF.mean().abs() < 0.02 and float(noise_NF.std()) == pytest.approx(1, abs=0.02)
    assert torch.corrcoef(noise_NF.T).triu(1).abs().max() < 0.06


def test_products_depend_on_both_and_are_linear_in_neither() -> None:
    generator = torch.Generator().manual_seed(0)
    a_NF, b_NF = torch.randn(2, 4000, 8, generator=generator).unbind()
    y_NF = product_facts(3 * a_NF + 2, b_NF)
    # products of up to 10, standardised by sums over 4000 that are added pairwise
    torch.testing.assert_close(y_NF, product_facts(a_NF, b_NF), rtol=0, atol=conditioned(10, F32, terms=64))
    both_NP = torch.cat([a_NF, b_NF], 1)
    correlation = torch.corrcoef(torch.cat([y_NF, both_NP], 1).T)[:8, 8:]
    assert correlation.abs().max() < 0.08
    pairs_NP = torch.cat([(a_NF[:, :, None] * b_NF[:, None]).flatten(1), torch.ones(4000, 1)], dim=1)
    rest = y_NF - pairs_NP @ torch.linalg.lstsq(pairs_NP, y_NF).solution
    assert rest.square().mean() < 0.02


def sampled_texts(number: int) -> list[list[str]]:
    """A name and two keywords each, of thirteen words, the first the most frequent; and a word that no other has."""
    words, rng = [chr(97 + k) * 3 for k in range(13)], random.Random(0)
    some = [rng.choices(words, weights=range(13, 0, -1), k=3) for _ in range(number)]
    return [[f"{a} only{chr(97 + n // 26)}{chr(97 + n % 26)}", b, c] for n, (a, b, c) in enumerate(some)]


def tf_idf(texts: list[list[str]]) -> torch.Tensor:
    """Centred rows of unit length, by loops over texts and words."""
    words = [set(" ".join(text).split()) for text in texts]
    count = {word: sum(word in other for other in words) for word in set().union(*words)}
    kept = [word for word in count if count[word] > 1]
    rows = [[math.log(len(texts) / count[word]) * (word in text) for word in kept] for text in words]
    lengths = [math.hypot(*row) or 1.0 for row in rows]
    x_NV = torch.tensor([[v / length for v in row] for row, length in zip(rows, lengths, strict=True)]).double()
    return x_NV - x_NV.mean(0)


def test_semantic_facts_are_the_principal_components_of_tf_idf() -> None:
    texts = sampled_texts(60)
    x_NV, y_NF = tf_idf(texts), semantic_facts(texts).double()
    left_NV, s_V, _ = torch.linalg.svd(x_NV, full_matrices=False)
    assert float((s_V[:8] - s_V[1:9]).min()) > 0.01  # no two directions of the same variance
    zero_F = torch.zeros(8, dtype=torch.float64)
    torch.testing.assert_close(y_NF.mean(0), zero_F, rtol=0, atol=ulps(4, F32))
    torch.testing.assert_close(y_NF.square().mean(0), zero_F + 1, rtol=0, atol=ulps(8, F32))
    # largest variance first; the sign of a direction is free
    cosine_FF = left_NV[:, :8].T @ y_NF / math.sqrt(60)
    torch.testing.assert_close(cosine_FF.abs(), torch.eye(8, dtype=torch.float64), rtol=0, atol=conditioned(100, F32))
    torch.testing.assert_close((x_NV.T @ y_NF).norm(dim=0) / math.sqrt(60), s_V[:8], rtol=ulps(16, F32), atol=0)
    # no eight numbers a text give back more of it: the rest is the variance of the other directions
    rest_NV = x_NV - y_NF @ (y_NF.T @ x_NV) / 60
    assert float(rest_NV.square().sum()) == pytest.approx(float(s_V[8:].square().sum()), rel=conditioned(100, F32))


def test_semantic_facts_of_known_themes() -> None:
    """Of two themes that share no word, n and m texts, the first component is one number a theme: +- sqrt(m / n)."""
    texts = [["sun", "warm"]] * 4 + [["moon", "cold"]] * 12
    y_N = semantic_facts(texts)[:, 0]
    wanted_N = torch.tensor([math.sqrt(12 / 4)] * 4 + [-math.sqrt(4 / 12)] * 12)
    torch.testing.assert_close(y_N * y_N[0].sign(), wanted_N, rtol=ulps(16, F32), atol=0)


def test_texts_without_a_word_of_another_are_one_point() -> None:
    texts = sampled_texts(40)
    alone = [["lonely"], ["word"], [""]]
    y_NF = semantic_facts([*texts, *alone])
    assert bool(y_NF.isfinite().all())
    torch.testing.assert_close(y_NF[-3:], y_NF[-1:].expand(3, 8), rtol=0, atol=conditioned(100, F32))
    assert float((y_NF[:-3] - y_NF[-1]).norm(dim=1).min()) > 0.1
    swapped = semantic_facts([text[::-1] for text in [*texts, *alone]])
    torch.testing.assert_close(swapped, y_NF, rtol=0, atol=0)  # a bag of words


# the pack ------------------------------------------------------------------------------------------------------


def rows(data: Emoji, name: str = "vendor") -> Batch:
    return whole(data.evaluation_sets("test")[name])


def test_targets_are_optional() -> None:
    plain, asked = Emoji(tiny=True), Emoji(tiny=True, readout=True)
    assert set(rows(plain).targets) == {"group", "subgroup"}
    batch = rows(asked)
    assert {name: x.shape[1:] for name, x in batch.targets.items() if x.is_floating_point()} == {
        "visual": (8,),
        "valence": (),
        "product": (8,),
        "noise": (8,),
        "semantic": (8,),
    }
    training = asked.training_set()
    window = next(iter(Order(len(training), 16, 0)))
    assert set(training[window].targets) == {"group", "subgroup"}
    assert torch.equal(training[window].inputs["text"], plain.training_set()[window].inputs["text"])


def test_targets_belong_to_their_drawings() -> None:
    data = Emoji(tiny=True, readout=True)
    fluent, batch = data.pack.drawings("fluent")[0], rows(data)
    concept = (batch.index // 4).tolist()
    torch.testing.assert_close(batch.targets["visual"], visual_facts(fluent)[concept], rtol=0, atol=0)
    wanted = valence_facts([data.pack.rows[c]["hexcode"] for c in concept], data_valence())
    torch.testing.assert_close(batch.targets["valence"], wanted, equal_nan=True, rtol=0, atol=0)
    assert 10 < int(wanted.isfinite().sum()) < len(wanted)
    other = rows(
        data, "concept"
    )  # as three vendors draw them: noise is the concept's own, what is seen is the drawing's
    same = other.index // 4 == other.index[0] // 4
    assert len(other.targets["noise"][same].unique(dim=0)) == 1 < len(other.targets["visual"][same].unique(dim=0))


def data_valence() -> dict[str, list[float]]:
    import json

    return json.loads((PACK / "valence.json").read_text(encoding="utf-8"))


def test_a_pack_without_valences_is_named(tmp_path: Path) -> None:
    shutil.copytree(PACK, tmp_path / "pack")
    (tmp_path / "pack" / "valence.json").unlink()
    with pytest.raises(
        ValueError, match=r"^readout: .*valence\.json is missing; descant\.datamodules\.prepare\.valence"
    ):
        Emoji(tiny=True, readout=True, folder=str(tmp_path / "pack")).evaluation_sets("test")
