"""Stamps: splits, missingness, languages, and sampling by a sample's seed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from descant.datamodules.corpora.base import name_hash
from descant.datamodules.corpora.stamps import Stamps, StampsSet, synthetic
from descant.datamodules.prepare.package import sha256_of
from descant.datamodules.prepare.stamps import DEB, Corpus, families
from descant.datamodules.sampling.resumable_sampler import Order
from descant.modules.core.batch import Batch
from descant.modules.tokenizers.text import BOS, NgramTokenizer
from tests.datamodules.prepare.test_deb import deb_of, tar_of
from tests.datamodules.prepare.test_stamps import CONTENT
from tests.tolerance import printed, statistical


def stamps(**options: Any) -> Stamps:
    return Stamps(**{"tiny": True, "batch_size": 16, "seconds": 1.0, **options})


def first_batch(rows: StampsSet, size: int = 16, epoch: int = 0) -> Batch:
    return rows[next(iter(Order(len(rows), size, seed=0, epoch=epoch)))]


@pytest.fixture(scope="module")
def data() -> Stamps:
    return stamps()


def caption(data: Stamps, stamp: int, language: str) -> list[int]:
    return data.tokenizer.row([data.tokenizer.ids(data.corpus.texts[stamp][language])])


# splits ----------------------------------------------------------------------------------------------------------


def test_no_family_is_in_two_splits(data: Stamps) -> None:
    family = np.array(families(data.corpus))
    split = {name: set(family[data.split_M == name]) for name in ("train", "val", "test")}
    assert all(split.values())
    assert not split["train"] & split["val"] and not (split["train"] | split["val"]) & split["test"]


def test_the_split_depends_on_the_family_only(data: Stamps) -> None:
    other = stamps(symbols=True)
    corpus = synthetic()
    keep = [i for i in range(len(corpus)) if i % 3]
    other.corpus = Corpus(
        [corpus.names[i] for i in keep],
        [corpus.texts[i] for i in keep],
        corpus.images[keep],
        corpus.pictured[keep],
        corpus.wave,
        corpus.languages,
        corpus.clips[:, keep],
        [],
    )
    assert other.split_M.tolist() == data.split_M[keep].tolist()


def test_shares_are_about_70_10_20() -> None:
    share = np.array([name_hash(f"stamps/word {i}") / 2**64 for i in range(4000)])
    assert (share < 0.7).mean() == pytest.approx(0.7, abs=statistical(0.458, 4000, errors=3))
    assert (share < 0.8).mean() == pytest.approx(0.8, abs=statistical(0.4, 4000, errors=3))
    assert name_hash("stamps/word ant") / 2**64 == pytest.approx(0.7613, abs=printed(4)), "the same in every version"


def test_contents_of_the_sets(data: Stamps) -> None:
    ids = {s: set(np.flatnonzero(data.split_M == s).tolist()) for s in ("train", "val", "test")}
    sets = {**data.evaluation_sets("validate"), **data.evaluation_sets("test")}
    assert list(sets) == ["val", "stamps", "language", "both"]
    expect = {"val": ("val", "fr"), "stamps": ("test", "fr"), "language": ("train", "es"), "both": ("test", "es")}
    for name, (split, language) in expect.items():
        rows = sets[name]
        assert isinstance(rows, StampsSet)
        assert set(rows.identity(np.arange(len(rows))).tolist()) == ids[split]
        assert rows.spoken == (language,) and not rows.random
    train, bank = data.training_set(), data.bank_set()
    assert set(train.id_N.tolist()) == set(bank.id_N.tolist()) == ids["train"]
    assert "es" not in train.spoken and "sound" not in train.spoken and set(train.spoken) == {"fr", "ru", "en"}
    assert bank.spoken == ("fr",) and not bank.random


def test_symbols_are_left_out_by_default() -> None:
    few, all_of_them = stamps(), stamps(symbols=True)
    corpus = synthetic()
    corpus.names = [name.replace("line/", "symbols/") for name in corpus.names]
    few.corpus = all_of_them.corpus = corpus
    symbols = np.array([name.startswith("symbols/") for name in corpus.names])
    assert set(few.split_M[symbols]) == {""} and "" not in all_of_them.split_M
    assert few.split_M[~symbols].tolist() == all_of_them.split_M[~symbols].tolist()
    assert few.classes == {"category": ["plane"]}
    assert all_of_them.classes == {"category": ["plane", "symbols"]}
    assert few.label["category"][symbols].tolist() == [-1] * int(symbols.sum())
    used = few.training_set().id_N
    assert not symbols[used].any()


# what a batch holds ----------------------------------------------------------------------------------------------


def test_shapes_and_presence(data: Stamps) -> None:
    batch = first_batch(data.training_set(), 24)
    assert batch.inputs["image"].shape == (24, 4, 32, 32) and batch.inputs["image"].dtype == torch.uint8
    assert batch.inputs["audio"].shape == (24, 16000) and batch.inputs["audio"].dtype == torch.int16
    spoken = data.training_set().has[:, batch.index.numpy()].any(axis=0)
    assert torch.equal(batch.present["audio"], torch.from_numpy(spoken) & batch.present["image"])
    length = batch.inputs["audio_length"]
    assert ((length > 0) == torch.from_numpy(spoken)).all() and (length <= 16000).all()
    silent = batch.inputs["audio"][length == 0]
    assert not silent.any()
    seen = data.on_after_batch_transfer(batch, 0)
    assert seen.inputs["image"].shape == (24, 3, 32, 32) and seen.inputs["audio"].shape == (24, 64, 100)
    assert "audio_length" not in seen.inputs
    frames = (seen.inputs["audio"] > -torch.inf).all(dim=1).sum(dim=1)
    assert torch.equal(frames, -(-length // 160)), "frames past the end are no sound"


def test_missing_speech_is_missing_for_the_fixed_language_too(data: Stamps) -> None:
    rows = data.evaluation_sets("test")["language"]
    assert isinstance(rows, StampsSet)
    present = rows.present(np.arange(len(rows)))["audio"].numpy()
    has = data.corpus.clips[data.corpus.languages.index("es"), rows.id_N, 1] > 0
    assert (present == has).all() and 0 < has.sum() < len(has)


def test_audio_is_the_recording(data: Stamps) -> None:
    rows = data.bank_set()
    batch = first_batch(rows, 12)
    fr = data.corpus.languages.index("fr")
    for stamp, heard, length in zip(batch.index, batch.inputs["audio"], batch.inputs["audio_length"], strict=True):
        first, whole = data.corpus.clips[fr, stamp]
        assert length == min(whole, 16000)
        np.testing.assert_array_equal(heard[:length].numpy(), data.corpus.wave[first : first + length])
        assert not heard[length:].any()


def test_each_visit_samples_a_language_that_the_stamp_has(data: Stamps) -> None:
    rows = data.training_set()
    stamp = int(np.flatnonzero(rows.has[:, rows.id_N].sum(axis=0) == 2)[0])
    spoken = [k for k in range(len(rows.spoken)) if rows.has[k, rows.id_N[stamp]]]
    draws = np.arange(400) * 7919
    found = rows.rows(np.full(400, stamp), draws).inputs
    counts = []
    for k in spoken:
        first, length = rows.clips[k, rows.id_N[stamp]]
        length = min(length, 16000)
        clip = torch.from_numpy(np.array(data.corpus.wave[first : first + length]))
        counts.append(int((found["audio"][:, :length] == clip).all(dim=1).sum()))
    assert sum(counts) == 400 and min(counts) > 140, counts


def test_a_sample_is_a_function_of_seed_epoch_and_index() -> None:
    rows = stamps(text_languages=["en", "same", "fr"], token_dropout=0.3).training_set()
    small, large = first_batch(rows, 8), first_batch(rows, 32)
    where = {int(i): k for k, i in enumerate(large.index)}
    shared = [(k, where[int(i)]) for k, i in enumerate(small.index) if int(i) in where]
    assert shared
    for a, b in shared:
        for name in small.inputs:
            assert torch.equal(small.inputs[name][a], large.inputs[name][b]), name
    again, other = first_batch(rows, 8), first_batch(rows, 8, epoch=1)
    assert all(torch.equal(small.inputs[name], again.inputs[name]) for name in small.inputs)
    assert not torch.equal(small.rng_seed, other.rng_seed)


def test_drop_makes_present_samples_absent() -> None:
    data = stamps(drop={"audio": 0.5})
    rows = data.training_set()
    full = stamps().training_set()
    a, b = first_batch(rows, 64).present["audio"], first_batch(full, 64).present["audio"]
    assert 0.3 < float(a.sum() / b.sum()) < 0.7 and not (a & ~b).any()
    assert torch.equal(first_batch(rows, 64).present["text"], first_batch(full, 64).present["text"])
    assert data.bank_set().drop == {}


def test_stamps_of_one_caption_share_a_key() -> None:
    data = stamps()
    data.corpus = synthetic()
    data.corpus.texts[3]["en"] = data.corpus.texts[1]["en"].upper()
    data.corpus.texts[5] = {}
    data.corpus.texts[6] = {}
    assert data.key_M[3] == data.key_M[1] == 1
    assert data.key_M[5] == 5 and data.key_M[6] == 6
    assert not StampsSet.present(StampsSet(data, "train", ["fr"]), np.arange(3))["text"].logical_not().all()


# texts -----------------------------------------------------------------------------------------------------------


def test_captions_are_english_by_default(data: Stamps) -> None:
    batch = first_batch(data.training_set())
    for stamp, ids in zip(batch.index.tolist(), batch.inputs["text"].tolist(), strict=True):
        assert ids == caption(data, stamp, "en")


def test_same_is_the_caption_in_the_language_of_the_recording() -> None:
    data = stamps(text_languages=["same"])
    rows = data.training_set()
    batch = first_batch(rows)
    told = set()
    for stamp, ids, heard, length in zip(
        batch.index.tolist(),
        batch.inputs["text"].tolist(),
        batch.inputs["audio"].numpy(),
        batch.inputs["audio_length"].tolist(),
        strict=True,
    ):
        if not length:
            assert ids == caption(data, stamp, "en"), "nothing is said: English"
            continue
        first = rows.clips[:, stamp, 0]
        said = [k for k in range(len(rows.spoken)) if rows.has[k, stamp]]
        language = next(
            rows.spoken[k] for k in said if (data.corpus.wave[first[k] : first[k] + length] == heard[:length]).all()
        )
        assert ids == caption(data, stamp, language)
        told.add(language)
    assert len(told) > 1
    # evaluation: the first that there is, for the language that is spoken there
    for name, language in (("stamps", "fr"), ("language", "es")):
        held = data.evaluation_sets("test")[name]
        assert isinstance(held, StampsSet)
        batch = first_batch(held, len(held))
        for stamp, ids, there in zip(
            batch.index.tolist(), batch.inputs["text"].tolist(), batch.present["audio"].tolist(), strict=True
        ):
            assert ids == caption(data, stamp, language if there else "en")


def test_text_languages_are_sampled_in_training_and_the_first_in_evaluation() -> None:
    data = stamps(text_languages=["ru", "en"])
    rows = data.training_set()
    found = rows.rows(np.zeros(300, int), np.arange(300) * 7919).inputs["text"].tolist()
    stamp = int(rows.id_N[0])
    ru, en = caption(data, stamp, "ru"), caption(data, stamp, "en")
    assert all(ids in (ru, en) for ids in found) and 110 < found.count(ru) < 190
    held = data.evaluation_sets("validate")["val"]
    assert isinstance(held, StampsSet)
    batch = first_batch(held)
    assert batch.inputs["text"][0].tolist() == caption(data, int(batch.index[0]), "ru")


def test_token_dropout_keeps_the_first_token() -> None:
    rows = stamps(token_dropout=0.5).training_set()
    full = stamps().training_set()
    a, b = first_batch(rows).inputs["text"], first_batch(full).inputs["text"]
    assert (a[:, 0] == BOS).all() and ((a == b) | (a == 0)).all()
    assert 0.35 < float((a[b != 0] != 0).float().mean()) < 0.7


# what evaluation asks --------------------------------------------------------------------------------------------


def test_prompts_names_and_images(data: Stamps) -> None:
    ids_CPT, names = data.prompts("category")
    assert names == ["line", "plane"] and ids_CPT.shape == (2, 3, 80)
    assert ids_CPT[0, 1].tolist() == NgramTokenizer()(["a picture of line"])[0].tolist()
    with pytest.raises(ValueError, match="target: 'colour' is not one of category"):
        data.prompts("colour")
    assert data.describe(2) == "en bar ac." and data.sample_name(2) == "line/ac_bar"
    picture = data.picture(2)
    assert picture is not None and picture.shape == (3, 64, 64) and picture.dtype == torch.uint8
    assert (picture[:, 0, 0] == 255).all(), "over white"
    labels = first_batch(data.training_set()).targets["category"]
    assert set(labels.tolist()) == {0, 1}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"size": 65}, "size 65: the images have 64 pixels"),
        ({"seconds": 5.0}, "seconds 5: recordings are 4 seconds long"),
        ({"spoken": ["es", "fr"]}, "spoken: es is held out of training"),
        ({"drop": {"sound": 0.1}}, "drop: no modality 'sound'"),
    ],
)
def test_options_out_of_range_raise_one_line(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        stamps(**options)


@pytest.mark.parametrize("option", ["spoken", "speech", "held_out", "text_languages"])
def test_an_unknown_language_is_named_with_the_known_ones(option: str) -> None:
    value: Any = ["xx"] if option in ("spoken", "text_languages") else "xx"
    with pytest.raises(ValueError, match=rf"{option}: 'xx' is not one of .*fr"):
        _ = stamps(**{option: value}).corpus


# from a package on disk ------------------------------------------------------------------------------------------


def test_from_a_package_to_a_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = {f"./{DEB.under}/{name}": data for name, data in CONTENT.items()}
    file = deb_of(tmp_path / "x.deb", tar_of(content))
    options: dict[str, Any] = {"deb": str(file), "cache": str(tmp_path / "cache"), "held_out": "en", "batch_size": 4}
    with pytest.raises(ValueError, match=r"accept: \[[0-9a-f]{64}\]"):
        Stamps(**options).prepare_data()
    options["accept"] = [sha256_of(file)]
    Stamps(**options).prepare_data()
    data = Stamps(**options)
    run = tmp_path / "run"
    data.trainer = SimpleNamespace(default_root_dir=str(run), training=False)  # type: ignore[assignment]
    monkeypatch.setenv("PATH", os.devnull)  # nothing is asked of apt
    assert len(data.corpus) == 4 and len(data.key_M) == 4
    assert data.key_M[2] == data.key_M[3], "one caption, two stamps"
    noted = [json.loads(line)["sample"] for line in (run / "ledger.jsonl").read_text().splitlines()]
    assert "food/cake_desc_fr.ogg" in noted and "food/bread.png" in noted, "each run says what it lacks"
    data.split_M = np.array(["train"] * 4)
    rows = data.bank_set()
    batch = rows[next(iter(Order(4, 4, seed=0, shuffle=False)))]
    assert batch.present["image"].tolist() == [True, True, False, pictured_cake(data)]
    assert batch.present["audio"].tolist() == [True, True, True, False], "no sound could be read of the cake"
    assert batch.inputs["audio_length"].tolist()[::3] == [16000, 0]
    assert batch.targets["category"].tolist() == [0, 0, 1, 1]


def pictured_cake(data: Stamps) -> bool:
    """An svg alone: there with resvg, absent without."""
    return bool(data.corpus.pictured[data.corpus.names.index("food/cake")])


@pytest.mark.slow
def test_the_real_package() -> None:
    """The real corpus, from the user's cache or a file named by DESCANT_STAMPS_DEB."""
    try:
        data = Stamps(deb=os.environ.get("DESCANT_STAMPS_DEB"))
        data.prepare_data()
    except ValueError as error:
        pytest.skip(str(error))
    assert len(data.corpus) == 951 and data.corpus.pictured.all() and not data.corpus.skipped
    assert len({texts["en"] for texts in data.corpus.texts}) == 805
    assert len({name.split("/")[0] for name in data.corpus.names}) == 16
    sizes = {split: int((data.split_M == split).sum()) for split in ("train", "val", "test", "")}
    assert sizes == {"train": 478, "val": 64, "test": 160, "": 249}
    assert data.corpus.languages[:5] == ["fr", "ro", "ru", "bg", "ca"]
    batch = first_batch(data.training_set(), 128)
    assert 0.9 < float(batch.present["audio"].sum() / batch.present["image"].sum()) <= 1
