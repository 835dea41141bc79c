"""Scenes: captions are true and negatives false, splits are disjoint, and images match."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from functools import cache
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from descant.datamodules.corpora.emoji_pack import PACK, SEALED, SEALED_VENDOR, VENDORS
from descant.datamodules.corpora.scene_world import CONCEPTS
from descant.datamodules.corpora.scenes import HELD_OUT_VENDOR, SETS, SPLITS, TESTS, Scenes, SceneSet
from descant.datamodules.sampling.resumable_sampler import Order
from descant.modules.core.batch import Batch
from descant.modules.tokenizers.text import NgramTokenizer, WordTokenizer
from descant.modules.transforms.image import Augment
from tests.datamodules.batches import shuffled, whole

#: Kinds of worlds: two objects; sizes; chains of objects with a relation that has no negative.
WORLDS: dict[str, dict[str, Any]] = {
    "pairs": {},
    "sizes": {"sizes": True},
    "chains": {"objects": 3, "grid": 3, "sizes": True, "relations": ["left of", "above", "right of", "next to"]},
}
#: Whether a relation holds from a head at (row, column) to a tail: written down once more, as a reader understands it.
TRUE = {
    "left of": lambda a, b: a[0] == b[0] and a[1] < b[1],
    "right of": lambda a, b: a[0] == b[0] and a[1] > b[1],
    "above": lambda a, b: a[1] == b[1] and a[0] < b[0],
    "below": lambda a, b: a[1] == b[1] and a[0] > b[0],
    "next to": lambda a, b: a[0] == b[0] and a[1] != b[1],
}
CLAUSE = re.compile(
    r"the (?:(small|large) )?(\w+) is (left of|right of|above|below|next to) the (?:(small|large) )?(\w+)"
)


@cache
def world(name: str) -> Scenes:
    return Scenes(**WORLDS[name])


def every_set(data: Scenes) -> dict[str, SceneSet]:
    sets = {"train": data.training_set(), **data.evaluation_sets("validate"), **data.evaluation_sets("test")}
    return {name: rows for name, rows in sets.items() if isinstance(rows, SceneSet)}


def sentences(data: Scenes, ids_BT: torch.Tensor) -> list[str]:
    tokenizer = data.tokenizer
    assert isinstance(tokenizer, WordTokenizer)
    word = {number: text for text, number in tokenizer.known.items()}
    return [" ".join(word[i] for i in row if i in word) for row in ids_BT.tolist()]


def is_true(data: Scenes, sentence: str, concept_K: list[int], cell_K: list[int], large_K: list[int]) -> bool:
    """Read a sentence and look at the scene."""
    place = {data.concepts[c]: divmod(cell, data.grid) for c, cell in zip(concept_K, cell_K, strict=True)}
    size = {data.concepts[c]: ("small", "large")[s] for c, s in zip(concept_K, large_K, strict=True) if s >= 0}
    found = list(CLAUSE.finditer(sentence))
    assert " and ".join(m[0] for m in found) == sentence
    return all(
        TRUE[m[3]](place[m[2]], place[m[5]]) and m[1] in (None, size.get(m[2])) and m[4] in (None, size.get(m[5]))
        for m in found
    )


@pytest.mark.parametrize("name", WORLDS)
def test_captions_are_true_and_negatives_are_false_in_the_same_words(name: str) -> None:
    data = world(name)
    for rows in every_set(data).values():
        batch = whole(rows, most=400)
        told, swapped = (sentences(data, batch.inputs[m]) for m in ("text", "text_neg"))
        scenes = [batch.targets[m].tolist() for m in ("concept", "cell", "large")]
        for n, scene in enumerate(zip(*scenes, strict=True)):
            assert is_true(data, told[n], *scene), told[n]
            if batch.present["text_neg"][n]:
                assert not is_true(data, swapped[n], *scene), swapped[n]
                assert told[n] != swapped[n]
                assert Counter(told[n].split()) == Counter(swapped[n].split())


def test_a_relation_that_holds_both_ways_has_no_negative() -> None:
    batch = whole(world("chains").training_set(), most=2000)
    symmetric = torch.tensor(
        ["next to" in text.split(" and ")[0] for text in sentences(world("chains"), batch.inputs["text"])]
    )
    assert 0 < symmetric.sum() < len(symmetric)
    assert torch.equal(batch.present["text_neg"], ~symmetric)
    assert int(batch.count("text_neg")) == int((~symmetric).sum())


def test_sizes_are_exchanged_only_where_they_differ() -> None:
    data = world("sizes")
    batch = whole(data.training_set(), most=2000)
    kind, large = batch.targets["relation"], batch.targets["large"]
    sizes = kind == len(data.relations)
    assert data.classes["relation"][len(data.relations)] == "sizes"
    assert 0.15 < float(sizes.float().mean()) < 0.35  # half of the half that differ
    assert (large[sizes, 0] != large[sizes, 1]).all()
    for n in sizes.nonzero().flatten().tolist():
        told, swapped = (sentences(data, batch.inputs[m][n : n + 1])[0] for m in ("text", "text_neg"))
        names = [re.sub("small|large", "?", text) for text in (told, swapped)]
        assert names[0] == names[1]


@pytest.mark.parametrize("name", WORLDS)
def test_drawings_are_at_their_places(name: str) -> None:
    data = world(name)
    rows = data.training_set()
    index, draw = np.arange(40) * 31, np.arange(40)
    scene, image = rows.scene(index, draw), rows.rows(index, draw).inputs["image"]
    assert image.shape == (40, 4, 48, 48) and image.dtype == torch.uint8
    for n in range(40):
        left = image[n].clone()
        for k in range(data.objects):
            top, start, pixels = (int(x[n, k]) for x in (scene.top_BK, scene.left_BK, scene.pixels_BK))
            assert (top // data.world.cell, start // data.world.cell) == divmod(int(scene.cell_BK[n, k]), data.grid)
            assert pixels <= data.world.cell
            drawn = data.world.pack.downsample(VENDORS[scene.vendor_BK[n, k]], pixels)[scene.concept_BK[n, k]]
            patch = (slice(None), slice(top, top + pixels), slice(start, start + pixels))
            assert torch.equal(image[n][patch], drawn)
            left[patch] = 0
        assert not left.any()
    if data.sizes:
        smallest, largest = (scene.pixels_BK[scene.large_BK == k] for k in (1, 0))
        assert smallest.min() > largest.max()


# splits ---------------------------------------------------------------------------------------------------------


def pairs_in(batch: Batch) -> set[frozenset[int]]:
    """All pairs of concepts that stand in one scene."""
    return {frozenset((a, b)) for row in batch.targets["concept"].tolist() for a in row for b in row if a != b}


def drawings(data: Scenes, rows: SceneSet) -> set[str]:
    """Hashes of the bytes of every drawing that a set may use."""
    vendors = [VENDORS[v] for v in rows.vendors]
    concepts = np.unique(rows.fact_N3[:, [0, 2]])
    return {hashlib.sha256(data.world.pack.rows[c][v]).hexdigest() for c in concepts for v in vendors}


def test_shares_of_the_pairs() -> None:
    data = world("pairs")
    assert len(set(CONCEPTS)) == 48 and len(data.pair_P2) == 1128
    counts = Counter(data.split_P.tolist())
    assert counts == {"test": 226, "val": 112, "train": 790}
    trained = data.pair_P2[data.split_P == "train"]
    assert set(trained.ravel().tolist()) == set(range(48))


@pytest.mark.parametrize("name", WORLDS)
def test_held_out_pairs_never_appear_in_training(name: str) -> None:
    data = world(name)
    held = {frozenset(pair) for pair in data.pair_P2[data.split_P != "train"].tolist()}
    rows = data.training_set()
    met: set[frozenset[int]] = set()
    for epoch in range(2):
        for window in Order(len(rows), 2000, seed=0, epoch=epoch):
            met |= pairs_in(rows[window])
    assert not met & held
    assert len(met) == 790


@pytest.mark.parametrize("name", WORLDS)
def test_validation_pairs_and_vendor_are_in_no_other_set(name: str) -> None:
    """Neither a pair, nor a key, nor a drawing."""
    data = world(name)
    sets = every_set(data)
    batches = {name: whole(rows) for name, rows in sets.items()}
    val = {frozenset(pair) for pair in data.pair_P2[data.split_P == "val"].tolist()}
    first = {frozenset(row[:2]) for row in batches["val"].targets["concept"].tolist()}
    assert first <= val
    for name in ("train", "vendor", "pairs", "both"):
        assert not pairs_in(batches[name]) & val
        assert not set(batches[name].content_id.tolist()) & set(batches["val"].content_id.tolist())
        assert not drawings(data, sets[name]) & drawings(data, sets["val"])
    test = {frozenset(pair) for pair in data.pair_P2[data.split_P == "test"].tolist()}
    for name in ("pairs", "both"):
        assert {frozenset(row[:2]) for row in batches[name].targets["concept"].tolist()} <= test
        assert not set(batches[name].content_id.tolist()) & set(batches["train"].content_id.tolist())


def test_vendors_of_the_sets() -> None:
    sets = every_set(world("pairs"))
    drawn = {
        name: {VENDORS[v] for v in np.unique(rows.scene(np.arange(200), np.arange(200)).vendor_BK)}
        for name, rows in sets.items()
    }
    trained = {"noto", "openmoji"}
    assert drawn == {"train": trained, "val": {"twemoji"}, "vendor": {"fluent"}, "pairs": trained, "both": {"fluent"}}
    assert json.loads((PACK / "pack.json").read_text())["held_out_vendor"] == HELD_OUT_VENDOR
    assert [len(sets[name]) for name in SETS if name != "train"] == [600] * 4


def test_the_lock_box_replaces_test_scenes_only() -> None:
    data, sealed = world("chains"), Scenes(sealed=True, **WORLDS["chains"])
    sets, others = every_set(data), every_set(sealed)
    for name in ("train", "val"):
        a, b = (whole(of[name], 400) for of in (sets, others))
        assert torch.equal(a.index, b.index) and torch.equal(a.content_id, b.content_id)
        assert all(torch.equal(x, b.inputs[m]) for m, x in a.inputs.items())
    # the open test set is still that of the claims measured before there was a lock-box
    digest = hashlib.sha256()
    for name in TESTS:
        batch = whole(sets[name])
        for x in (batch.index, batch.content_id, *(batch.targets[m] for m in ("relation", "concept", "cell", "large"))):
            digest.update(x.numpy().tobytes())
    assert digest.hexdigest()[:16] == "642bf2745d1cd3d7"

    box = {row["hexcode"]: row[SEALED_VENDOR] for row in pq.read_table(PACK / SEALED).to_pylist()}
    drawn = {c for c, row in enumerate(sealed.world.pack.rows) if row["hexcode"] in box}
    assert 30 < len(drawn) < 48
    pairs = {split: {frozenset(p) for p in data.pair_P2[data.split_P == split].tolist()} for split in SPLITS}
    for name in TESTS:
        a, b = (whole(of[name]) for of in (sets, others))
        assert len(b) == 600 and not set(a.index.tolist()) & set(b.index.tolist())
        first = {frozenset(row[:2]) for row in b.targets["concept"].tolist()}
        assert first <= pairs["train" if name == "vendor" else "test"] and not pairs_in(b) & pairs["val"]
        vendors = {VENDORS[v] for v in others[name].vendors}
        assert vendors == ({"noto", "openmoji"} if name == "pairs" else {HELD_OUT_VENDOR})
        if name != "pairs":  # every object is drawn, by the sealed vendor
            assert {c for row in b.targets["concept"].tolist() for c in row} <= drawn
            for c in drawn:
                row = sealed.world.pack.rows[c]
                assert row[HELD_OUT_VENDOR] == box[row["hexcode"]] != data.world.pack.rows[c][HELD_OUT_VENDOR]
        index = int(b.index[0])
        assert sealed.describe(index) == sentences(sealed, b.inputs["text"][:1])[0]
    with pytest.raises(ValueError, match="sealed: emojione draws both concepts of no train pair; more concepts have"):
        Scenes(sealed=True, concepts=["panda", "lion", "zebra", "frog"]).evaluation_sets("test")


# keys -----------------------------------------------------------------------------------------------------------


def test_equal_content_has_equal_keys() -> None:
    data = world("pairs")
    batch = whole(data.training_set())
    same = {"right of": "left of", "below": "above"}
    meaning = []
    for text in sentences(data, batch.inputs["text"]):
        ((_, a, relation, _, b),) = CLAUSE.findall(text)
        meaning.append((b, same[relation], a) if relation in same else (a, relation, b))
    assert (
        len(set(zip(meaning, batch.content_id.tolist(), strict=True)))
        == len(set(meaning))
        == len(set(batch.content_id.tolist()))
    )
    assert len(set(meaning)) == 790 * 4  # of eight captions a pair


def test_the_key_of_a_chain_is_of_its_set_of_clauses() -> None:
    data = Scenes(objects=3, grid=3)
    rows = data.training_set()
    index = np.arange(len(rows))
    graph = rows.scene(index, index).graph
    said: dict[frozenset[tuple[int, ...]], set[int]] = {}
    turn = {data.relations.index(a): data.relations.index(b) for a, b in (("right of", "left of"), ("below", "above"))}
    for *row, key in zip(
        graph.head_BR.tolist(),
        graph.relation_BR.tolist(),
        graph.tail_BR.tolist(),
        data.world.key(graph).tolist(),
        strict=True,
    ):
        clauses = [(t, turn[r], h) if r in turn else (h, r, t) for h, r, t in zip(*row, strict=True)]
        said.setdefault(frozenset(clauses), set()).add(key)
    assert all(len(keys) == 1 for keys in said.values())
    assert len({key for keys in said.values() for key in keys}) == len(said)


def test_scenes_of_a_symmetric_relation() -> None:
    """ "Next to" is true of "left of": neither may be the other's negative."""
    data = Scenes(relations=["left of", "next to", "above"])
    batch = whole(data.training_set())
    keys: dict[tuple[frozenset[int], bool], set[int]] = {}
    for row, text, key in zip(
        batch.targets["concept"].tolist(), sentences(data, batch.inputs["text"]), batch.content_id.tolist(), strict=True
    ):
        keys.setdefault((frozenset(row), "above" in text), set()).add(key)
    assert {upright: {len(k) for (_, u), k in keys.items() if u == upright} for upright in (False, True)} == {
        False: {1},
        True: {2},
    }


# draws ----------------------------------------------------------------------------------------------------------


def test_a_sample_is_a_function_of_seed_epoch_and_index() -> None:
    rows = world("chains").training_set()
    small, large = (shuffled(rows, n) for n in (16, 64))
    place = {int(i): n for n, i in enumerate(large.index)}
    shared = [(n, place[int(i)]) for n, i in enumerate(small.index) if int(i) in place]
    assert len(shared) > 8
    for n, m in shared:
        for name, x in small.inputs.items():
            assert torch.equal(x[n], large.inputs[name][m])
    window = next(iter(Order(len(rows), 16, seed=0)))
    later = rows[window._replace(slots=[slot._replace(epoch=1) for slot in window.slots])]
    assert torch.equal(later.index, small.index)
    assert not torch.equal(later.inputs["image"], small.inputs["image"])


def test_evaluation_has_the_same_scenes_in_every_run(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for seed in ("0", "7"):
        monkeypatch.setenv("PL_GLOBAL_SEED", seed)
        data = Scenes()
        found.append((whole(data.evaluation_sets("test")["both"], 400), whole(data.training_set(), 400)))
    (both, train), (again, other) = found
    for name, x in both.inputs.items():
        assert torch.equal(x, again.inputs[name])
    assert not torch.equal(train.inputs["image"], other.inputs["image"])


def test_description_and_image_of_an_id() -> None:
    data = world("chains")
    rows = every_set(data)["both"]
    batch = whole(rows, most=20)
    told = sentences(data, batch.inputs["text"])
    for n, index in enumerate(batch.index.tolist()):
        assert data.describe(index) == told[n]
        rgb, alpha = batch.inputs["image"][n, :3].float(), batch.inputs["image"][n, 3:].float() / 255
        assert (data.picture(index).float() - (rgb * alpha + 255 * (1 - alpha))).abs().max() < 1
    ids = [set(whole(rows).index.tolist()) for rows in every_set(data).values()]
    assert sum(map(len, ids)) == len(set().union(*ids))


# triples --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WORLDS)
def test_triples_equal_the_caption(name: str) -> None:
    data = world(name)
    batch = whole(data.training_set(), most=100)
    for end in ("", "_neg"):
        x_BK3W = batch.inputs[f"triples{end}"]
        assert x_BK3W.shape == (100, 6, 3, 5)
        texts = sentences(data, batch.inputs[f"text{end}"])
        for text, x_K3W in zip(texts, x_BK3W, strict=True):
            wanted = [(m[2], m[3], m[5]) for m in CLAUSE.finditer(text)]
            (first, *_) = CLAUSE.finditer(text)
            wanted += [(first[2], "is", first[1]), (first[5], "is", first[4])] if data.sizes else []
            told = [tuple(sentences(data, x_3W)) for x_3W in x_K3W]
            assert told == wanted + [("", "", "")] * (6 - len(wanted))


def test_the_control_exchanges_heads_and_tails_only() -> None:
    data = Scenes(exchanged=True)
    sets = data.evaluation_sets("test")
    assert list(sets) == ["vendor", "pairs", "both", "exchanged"]
    both, control = (whole(sets[name], 400) for name in ("both", "exchanged"))
    for name, x in both.inputs.items():
        wanted = x.flip(2) if name.startswith("triples") else x
        assert torch.equal(control.inputs[name], wanted)
    # of one clause without sizes, that is the triple of the negative
    assert torch.equal(control.inputs["triples"], both.inputs["triples_neg"])


def test_longer_elements_are_truncated() -> None:
    data = Scenes(text=NgramTokenizer(buckets=4096), tiny=True)
    x_BK3W = whole(data.training_set(), most=8).inputs["triples"]
    assert x_BK3W.shape == (8, 6, 3, 5)
    assert (x_BK3W[:, 0] != 0).all(dim=2).any()


# what is refused, and the small stand-in ------------------------------------------------------------------------


def test_tiny_is_small_and_of_the_same_shapes() -> None:
    small, large = Scenes(tiny=True), world("pairs")
    a, b = (whole(data.training_set(), most=8) for data in (small, large))
    assert {name: (x.shape, x.dtype) for name, x in a.inputs.items()} == {
        n: (x.shape, x.dtype) for n, x in b.inputs.items()
    }
    assert len(small.concepts) == 12
    assert all(len(rows) <= 48 for name, rows in every_set(small).items() if name != "train")


def test_dropped_negatives_are_a_policy() -> None:
    data = Scenes(drop={"text_neg": 0.5})
    batch = whole(data.training_set(), most=1000)
    assert data.modalities == ("image", "text", "text_neg")
    assert batch.present["image"].all() and batch.present["text"].all()
    assert 0.4 < float(batch.present["text_neg"].float().mean()) < 0.6
    assert whole(data.evaluation_sets("validate")["val"], 400).present["text_neg"].all()


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"relations": ["left"]}, r"relations: 'left' is not one of left of, right of"),
    ({"vendors": ["fluent"]}, r"vendors: 'fluent' is not one of noto, openmoji"),
    ({"vendors": ["twemoji"]}, r"vendors: 'twemoji' is not one of noto, openmoji"),
    ({"size": 50, "grid": 3}, r"grid 3 cuts size 50 into no cells of 8 to 64 pixels; size 51 does"),
    ({"size": 224, "grid": 2}, r"grid 2 cuts size 224 into no cells of 8 to 64 pixels; size 128 does"),
    ({"size": 16, "grid": 3}, r"grid 3 cuts size 16 into no cells of 8 to 64 pixels; size 24 does"),
    ({"objects": 5}, r"objects 5: 2 to 4 have room"),
    ({"objects": 7, "grid": 3, "sizes": True}, r"objects 7: 2 to 5 have room"),
    ({"augment": Augment(32)}, r"augment\.size 32 is not the data's size 48"),
    ({"augment": Augment(48, mirror=0.5)}, r"augment\.mirror 0\.5 and rotate 15: captions say left and right"),
    ({"augment": Augment(48, rotate=90)}, r"augment\.mirror 0\.0 and rotate 90: captions say left and right"),
]


@pytest.mark.parametrize(("options", "line"), REFUSED, ids=lambda x: str(x)[:30])
def test_options_out_of_range_raise_one_line(options: dict[str, Any], line: str) -> None:
    with pytest.raises(ValueError, match=line):
        Scenes(**options)


def test_concepts_that_the_pack_lacks_are_refused() -> None:
    with pytest.raises(ValueError, match=r"concepts: 'foxx' is not one of"):
        Scenes(concepts=["foxx", "cat"]).training_set()
