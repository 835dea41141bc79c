from __future__ import annotations

import hashlib
import json
import shutil
from functools import cache
from pathlib import Path
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from descant.datamodules.base import BatchDataset
from descant.datamodules.corpora import emoji_pack
from descant.datamodules.corpora.emoji import Emoji
from descant.datamodules.corpora.emoji_pack import PACK, VENDORS, Pack
from descant.datamodules.corpora.emoji_set import EmojiSet
from descant.datamodules.sampling.resumable_sampler import Order
from descant.datamodules.sources.ledger import Ledger
from descant.modules.core.batch import Batch
from tests.datamodules.batches import shuffled, whole
from tests.tolerance import F32, conditioned, statistical, ulps


def first_batch(data: Emoji, epoch: int = 0, batch_size: int = 16) -> Batch:
    return shuffled(data.training_set(), batch_size, data.seed, epoch)


@pytest.fixture(scope="module")
def data() -> Emoji:
    return Emoji(batch_size=16)


def concepts(batch_index: np.ndarray) -> set[int]:
    return set((batch_index // len(VENDORS)).tolist())


def all_ids(rows: object, modality: str) -> np.ndarray:
    index = np.arange(len(rows))  # type: ignore[arg-type]
    return rows.identity(index[rows.present(index)[modality].numpy()])  # type: ignore[attr-defined]


def test_training_has_no_held_out_samples(data: Emoji) -> None:
    trained = all_ids(data.training_set(), "image")
    test = set(np.flatnonzero(data.test_N).tolist())
    assert len(test) == 200
    assert not concepts(trained) & test
    assert VENDORS.index("fluent") not in set(trained % len(VENDORS))
    val = all_ids(data.evaluation_sets("validate")["val"], "image")
    assert 150 < len(val) < 300
    assert not set(trained.tolist()) & set(val.tolist())
    assert not concepts(val) & test


def test_no_test_drawing_equals_a_training_drawing(data: Emoji) -> None:
    """Nor is a concept, a content key or a drawing of what settings are chosen on."""

    def drawings(rows: BatchDataset) -> set[str]:
        ids = all_ids(rows, "image")
        return {hashlib.sha256(data.pack.rows[i // 4][VENDORS[i % 4]]).hexdigest() for i in ids.tolist()}

    def keys(rows: BatchDataset) -> set[int]:
        return set(data.pack.key_N[sorted(concepts(all_ids(rows, "image")))].tolist())

    trained, tests = data.training_set(), data.evaluation_sets("test")
    for name, rows in [*tests.items(), *data.evaluation_sets("validate").items()]:
        assert not drawings(rows) & drawings(trained), name
    for name in ("concept", "both", "apart"):
        assert not keys(tests[name]) & keys(trained), name
        assert not concepts(all_ids(tests[name], "image")) & concepts(all_ids(trained, "image")), name
    chosen_on = Emoji(batch_size=16, development=True)
    seen = {**chosen_on.evaluation_sets("validate"), "train": chosen_on.training_set()}
    for name, rows in seen.items():
        for test in ("vendor", "concept", "both", "apart"):
            assert not drawings(rows) & drawings(tests[test]), (name, test)


def test_contents_of_the_test_sets(data: Emoji) -> None:
    sets = data.evaluation_sets("test")
    assert list(sets) == ["vendor", "concept", "both", "apart"]
    fluent, test = VENDORS.index("fluent"), set(np.flatnonzero(data.test_N).tolist())
    images = {name: all_ids(rows, "image") for name, rows in sets.items()}
    texts = {name: all_ids(rows, "text") for name, rows in sets.items()}
    assert set(images["vendor"] % 4) == set(images["both"] % 4) == {fluent}
    assert not concepts(images["vendor"]) & test
    assert concepts(texts["vendor"]) == set(range(len(data.pack)))
    assert concepts(images["concept"]) == concepts(images["both"]) == test
    assert len(texts["concept"]) == len(texts["both"]) == 200
    assert len(images["concept"]) == 600
    families = [row["family"] for row in data.pack.rows]
    trained = {families[i // 4] for i in all_ids(data.training_set(), "image")}
    assert 200 < len(images["apart"]) < 600
    assert not {families[i // 4] for i in images["apart"]} & trained
    assert len(texts["apart"]) == 200


def test_development_uses_no_test_samples() -> None:
    data, real = Emoji(development=True), Emoji()
    held = set(np.flatnonzero(real.test_N).tolist())
    for rows in (data.training_set(), *data.evaluation_sets("validate").values()):
        for modality in ("image", "text"):
            ids = all_ids(rows, modality)
            assert not concepts(ids) & held
        assert VENDORS.index("fluent") not in set(all_ids(rows, "image") % 4)
    development = concepts(all_ids(data.evaluation_sets("validate")["concept"], "image"))
    assert not development & concepts(all_ids(data.training_set(), "image"))


def test_the_lock_box_is_held_out_in_place_of_the_test_set(data: Emoji) -> None:
    sealed = Emoji(sealed=True)
    codes, known = ([row["hexcode"] for row in of.pack.rows] for of in (sealed, data))
    kept = {code for code, test in zip(known, data.test_N, strict=True) if not test}
    assert set(codes) == kept and int(sealed.test_N.sum()) == 100
    box = {code for code, test in zip(codes, sealed.test_N, strict=True) if test}
    assert not box & {codes[row[0]] for row in sealed.training_rows}  # nothing of it is trained on
    sets = sealed.evaluation_sets("test")
    assert set(sets) == {"vendor", "concept", "both", "apart"}
    for name in ("concept", "both"):
        assert {codes[c] for c in sets[name].concept_N} == box  # type: ignore[attr-defined]
    # the vendor draws all of the lock-box, and most of what is trained; what it does not draw has a name alone
    assert sets["both"].image_N.all() and 0.5 < sets["vendor"].image_N.mean() < 1  # type: ignore[attr-defined]
    drawn, by_fluent = sealed.pack.drawings("fluent"), data.pack.drawings("fluent")[0]
    shared = [(i, known.index(code)) for i, code in enumerate(codes) if drawn[1][i]]
    assert not any(torch.equal(drawn[0][i], by_fluent[j]) for i, j in shared)
    # what it does not draw has no fact of a drawing, and no part in the scale of the others
    facts = Emoji(sealed=True, readout=True).facts(["fluent"])
    for name in ("visual", "product"):
        x_NF = facts[name][VENDORS.index("fluent")]
        assert np.array_equal(x_NF.isnan().all(dim=1).numpy(), ~drawn[1])
        assert np.array_equal(x_NF.isnan().any(dim=1).numpy(), ~drawn[1])
    with pytest.raises(ValueError, match="sealed: settings are chosen in development"):
        Emoji(sealed=True, development=True)


def test_the_bank_has_the_vendors_of_training_or_its_own(data: Emoji) -> None:
    every = Emoji(vendors=["noto", "fluent"], bank_vendors=["noto"])
    number = VENDORS.index("noto")
    assert set(all_ids(every.bank_set(), "image") % len(VENDORS)) == {number}
    assert set(all_ids(every.training_set(), "image") % len(VENDORS)) == {number, VENDORS.index("fluent")}
    assert set(all_ids(data.bank_set(), "image") % len(VENDORS)) == {VENDORS.index(v) for v in data.vendors}


def test_paired_sets_have_every_image_with_its_text_only(data: Emoji) -> None:
    paired = Emoji(batch_size=16, paired=True)
    assert len(paired.training_set()) == len(data.training_set())
    sizes = {"validate": {"val": 184}, "test": {"vendor": 1386, "concept": 600, "both": 200, "apart": 378}}
    for stage, wanted in sizes.items():
        plain, sets = data.evaluation_sets(stage), paired.evaluation_sets(stage)
        assert {name: len(rows) for name, rows in sets.items()} == wanted
        for name, rows in sets.items():
            assert sorted(all_ids(rows, "image").tolist()) == sorted(all_ids(plain[name], "image").tolist())
            batch = whole(rows)
            assert batch.both("image", "text").all()
            some = batch.index[::50] // len(VENDORS)
            told = torch.tensor([data.captions.evaluation_caption(int(c), keywords=True) for c in some])
            assert torch.equal(batch.inputs["text"][::50], told)
            assert torch.equal(batch.targets["subgroup"][::50], torch.from_numpy(data.label["subgroup"])[some])


def test_a_sample_is_a_function_of_seed_epoch_and_index(data: Emoji) -> None:
    rows = data.training_set()
    small = {int(i): k for k, i in enumerate(first_batch(data, batch_size=16).index)}
    a, b = first_batch(data, batch_size=16), shuffled(rows, 64, data.seed)
    where = {int(i): k for k, i in enumerate(b.index)}
    shared = set(small) & set(where)
    assert shared
    for i in shared:
        k, j = small[i], where[i]
        assert torch.equal(a.inputs["text"][k], b.inputs["text"][j])
        one = data.augment(a.inputs["image"][k : k + 1], a.rng_seed[k : k + 1])
        many = data.augment(b.inputs["image"], b.rng_seed)[j : j + 1]
        # 16 places between pixels that are up to 2 apart
        torch.testing.assert_close(one, many, rtol=0, atol=conditioned(2, F32, terms=2 * 16))
    again = first_batch(data)
    assert torch.equal(a.inputs["text"], again.inputs["text"])
    other = first_batch(data, epoch=1)
    assert not torch.equal(a.rng_seed, other.rng_seed)


def test_missingness_has_its_probability() -> None:
    data = Emoji(batch_size=512, drop={"text": 0.3})
    batch = first_batch(data, batch_size=512)
    real = batch.present["image"]  # nothing drops it, so only padding lacks it
    # 256 rows: two standard errors
    assert float(batch.present["text"][real].float().mean()) == pytest.approx(0.7, abs=0.06)
    assert torch.equal(batch.present["text"], first_batch(data, batch_size=512).present["text"])
    assert int(batch.count("text")) == int(batch.present["text"].sum())


def test_the_second_view_is_the_same_concept(data: Emoji) -> None:
    batch = first_batch(Emoji(views={"image": 2}), batch_size=64)
    same = (batch.inputs["image"] == batch.inputs["image@2"]).flatten(1).all(1)
    assert 0.1 < float(same.float().mean()) < 0.6  # one of three vendors again


def test_a_concept_that_no_other_vendor_draws_is_its_own_second_view() -> None:
    drawings = Pack.drawings

    def fewer(pack: Pack, vendor: str) -> tuple[torch.Tensor, np.ndarray]:
        """Concepts of odd numbers are noto's alone."""
        images, drawn = drawings(pack, vendor)
        return images, drawn & ((np.arange(len(drawn)) % 2 == 0) | (vendor == "noto"))

    with mock.patch.object(Pack, "drawings", fewer):
        batch = first_batch(Emoji(views={"image": 2}), batch_size=256)
    same = (batch.inputs["image"] == batch.inputs["image@2"]).flatten(1).all(1)
    alone = (batch.index // len(VENDORS)) % 2 == 1
    assert 0 < int(alone.sum()) < len(alone) and bool(same[alone].all())
    assert set((batch.index[alone] % len(VENDORS)).tolist()) == {VENDORS.index("noto")}
    # one of three vendors again
    share, near = float(same[~alone].float().mean()), statistical(2**0.5 / 3, int((~alone).sum()))
    assert share == pytest.approx(1 / 3, abs=near)


def test_captions_vary_and_carry_the_name(data: Emoji) -> None:
    captions = data.captions
    concept = next(i for i, row in enumerate(data.pack.rows) if len(row["keywords"]["en"]) > 3)
    draws = np.arange(50)
    seen = {tuple(row) for row in captions.random(np.full(50, concept), draws)}
    assert len(seen) > 10
    name = tuple(captions.tokenizer.row([captions.tokenizer.ids(data.pack.rows[concept]["names"]["en"])]))
    assert name in seen
    assert tuple(captions.evaluation_caption(concept, keywords=False)) == name


def test_shuffled_captions_are_of_other_concepts_and_change_nothing_else() -> None:
    plain, control = Emoji().training_set(), Emoji(shuffle_captions=True).training_set()
    moved = float((plain.caption_N != control.caption_N).mean())
    assert moved > 0.99
    assert sorted(set(plain.caption_N.tolist())) == sorted(set(control.caption_N.tolist()))
    window = next(iter(Order(len(plain), 16, 0)))
    assert torch.equal(plain[window].inputs["image"], control[window].inputs["image"])
    assert not torch.equal(plain[window].inputs["text"], control[window].inputs["text"])
    bank = Emoji(shuffle_captions=True).bank_set()
    assert isinstance(bank, EmojiSet) and float((bank.caption_N != bank.concept_N).mean()) > 0.99
    for name, own in Emoji(shuffle_captions=True).evaluation_sets("test").items():
        assert isinstance(own, EmojiSet) and np.array_equal(own.caption_N, own.concept_N), name


def test_variants_of_one_concept_are_one_family() -> None:
    data = Emoji(families=True)
    family_N, names = data.label["family"], data.pack.names
    man, woman, apple = (family_N[names.index(name)] for name in ("man cook", "woman cook", "red apple"))
    assert man == woman != apple
    batch = next(iter(Emoji(tiny=True, families=True, batch_size=8).train_dataloader()))
    assert batch.targets["family"].shape == (8,) and "family" not in Emoji().label


def test_token_dropout_pads_its_share_and_changes_no_other_token() -> None:
    plain, dropped = Emoji().training_set(), Emoji(token_dropout=0.25).training_set()
    window = next(iter(Order(len(plain), 256, 0)))
    before, after = plain[window].inputs["text"], dropped[window].inputs["text"]
    gone = before != after
    assert not after[gone].any()
    assert torch.equal(before[:, 0], after[:, 0])
    # 256 texts of at least 8 tokens
    assert float(gone.sum() / (before[:, 1:] != 0).sum()) == pytest.approx(0.25, abs=statistical(0.433, 2000))


def test_the_held_out_language_is_a_set_of_its_own() -> None:
    data = Emoji(languages=["en", "es", "fr"])
    assert list(data.evaluation_sets("test")) == ["vendor", "concept", "both", "apart", "language"]
    rows = data.evaluation_sets("test")["language"]
    assert len(rows) > 1000


def test_foreign_languages_are_sets_of_their_own_and_never_trained() -> None:
    data = Emoji(tiny=True, foreign=["de", "ja"], sketch=True)
    assert data.modalities == ("image", "text", "sketch")
    assert {"de", "ja"} <= set(data.evaluation_sets("test")) and set(data.evaluation_sets("validate")) == {"val"}
    rows = data.evaluation_sets("test")["de"]
    batch = whole(rows)
    names = [data.pack.rows[int(i) // len(VENDORS)]["names"] for i in batch.index]
    assert [data.tokenizer.row([data.tokenizer.ids(n["de"])]) for n in names] == batch.inputs["text"].tolist()
    assert batch.targets["distance"].tolist() == [_edits(n["de"].casefold(), n["en"].casefold()) for n in names]
    assert bool(batch.present["sketch"].all())
    trained = {tuple(row) for row in whole(data.training_set()).inputs["text"].tolist()}
    assert len(trained & {tuple(row) for row in batch.inputs["text"].tolist()}) < 0.1 * len(names)  # spelled alike
    with pytest.raises(ValueError, match="foreign: 'en' is not one of"):
        Emoji(tiny=True, foreign=["en"]).evaluation_sets("test")


@cache
def _edits(a: str, b: str) -> int:
    """By the definition."""
    if not a or not b:
        return len(a) + len(b)
    return min(_edits(a[1:], b) + 1, _edits(a, b[1:]) + 1, _edits(a[1:], b[1:]) + (a[0] != b[0]))


def test_a_sketch_is_the_edges_of_the_image_input() -> None:
    data = Emoji(tiny=True, sketch=True, size=16)
    rows = data.evaluation_sets("test")["vendor"]
    batch = data.on_after_batch_transfer(whole(rows), 0)
    image, sketch = batch.inputs["image"], batch.inputs["sketch"]
    assert sketch.shape == (len(image), 1, 16, 16)
    luma = (image * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1)
    y, x = 7, 9
    weight = torch.tensor([1, 2, 1]) / 4
    across = (luma[:, y - 1 : y + 2, x + 1] - luma[:, y - 1 : y + 2, x - 1]) @ weight
    down = (luma[:, y + 1, x - 1 : x + 2] - luma[:, y - 1, x - 1 : x + 2]) @ weight
    wanted = (across**2 + down**2).sqrt().clamp(max=1) * 2 - 1
    assert torch.allclose(sketch[:, 0, y, x], wanted, rtol=0, atol=ulps(16, F32)) and sketch.std() > 0.1


def test_prompts_and_images(data: Emoji) -> None:
    tokens_CPT, names = data.prompts("group")
    assert tokens_CPT.shape[:2] == (len(names), 3)
    assert data.describe(0) == data.pack.rows[0]["names"]["en"]
    picture = data.picture(1)
    assert picture.shape == (3, 64, 64)
    assert picture.dtype == torch.uint8
    with pytest.raises(ValueError, match="target: 'grup' is not one of group, subgroup"):
        data.prompts("grup")


# bad input -------------------------------------------------------------------------------------------------------


def copy_of_pack(folder: Path) -> Path:
    shutil.copytree(PACK, folder / "pack")
    return folder / "pack"


def test_missing_truncated_and_empty_shards_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no emoji-\\*\\.parquet shard"):
        Pack(tmp_path)
    pack = copy_of_pack(tmp_path)
    shard = pack / "emoji-1.parquet"
    shard.write_bytes(shard.read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"emoji-1\.parquet: not a readable parquet shard"):
        Pack(pack)
    shard.write_bytes(b"")
    with pytest.raises(ValueError, match=r"emoji-1\.parquet: not a readable parquet shard"):
        Pack(pack)


def broken_pack(folder: Path, bad: int) -> Path:
    pack = copy_of_pack(folder)
    shard = pack / "emoji-0.parquet"
    table = pq.read_table(shard)
    column = table["noto"].to_pylist()
    column[:bad] = [b"not a picture"] * bad
    position = table.schema.get_field_index("noto")
    pq.write_table(table.set_column(position, "noto", pa.array(column, pa.binary())), shard)
    return pack


def test_an_undecodable_image_is_counted_in_the_ledger(tmp_path: Path) -> None:
    pack = Pack(broken_pack(tmp_path, 3), Ledger(tmp_path))
    images, good = pack.drawings("noto")
    assert int((~good).sum()) == 3
    assert not images[:3].any()
    lines = [json.loads(line) for line in (tmp_path / "ledger.jsonl").read_text().splitlines()]
    assert len(lines) == 3
    assert lines[0]["file"] == "emoji-0.parquet"
    assert lines[0]["sample"] == f"{pack.rows[0]['hexcode']}.noto"


def test_many_undecodable_images_in_a_row_are_an_error(tmp_path: Path) -> None:
    pack = Pack(broken_pack(tmp_path, 30), Ledger(tmp_path))
    with pytest.raises(ValueError, match=r"emoji-0\.parquet: 20 samples in a row cannot be read"):
        pack.drawings("noto")


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"vendors": ["apple"]}, "vendors: 'apple' is not one of"),
        ({"drop": {"audio": 0.5}}, "drop: no modality 'audio'"),
        ({"drop": {"text": 1.5}}, "drop: text 1.5 is not a probability"),
        ({"drop": {"text": 1.0}}, "drop: text 1: all samples would lack it"),
        ({"batch_size": 1}, "batch_size 1"),
        ({"views": {"text": 2}}, "views: 'text' is not one of image"),
    ],
)
def test_bad_arguments_raise_one_line(options: dict[str, object], line: str) -> None:
    with pytest.raises(ValueError, match=line):
        Emoji(**options)  # type: ignore[arg-type]


def test_an_unknown_language_is_named() -> None:
    with pytest.raises(ValueError, match="languages: 'xx' is not one of"):
        Emoji(languages=["xx"]).training_set()


def test_an_empty_caption_is_refused(data: Emoji) -> None:
    with pytest.raises(ValueError, match="empty caption"):
        data.tokenizer.ids("  ")


def test_drawings_are_decoded_once_in_a_process() -> None:
    first, second = Emoji(tiny=True, groups=["people-body"]), Emoji(tiny=True, groups=["objects"])
    images, _ = first.pack.drawings("noto")
    smaller = first.pack.downsample("noto", 32)
    with mock.patch.object(emoji_pack, "decode_webp") as decode:
        assert second.pack.drawings("noto")[0] is images and second.pack.downsample("noto", 32) is smaller
    assert not decode.called
    other, _ = Emoji(sealed=True, tiny=True).pack.drawings("noto")  # of other concepts
    assert not torch.equal(other, images[: len(other)])


def test_an_empty_drawing_is_noted_beside_one_that_is_not_there() -> None:
    absent, empty = Pack(), Pack()
    for pack, drawing in ((absent, None), (empty, b"")):
        pack.keep(range(20))
        pack.rows[3]["noto"] = drawing
        assert not pack.drawings("noto")[1][3]
    assert (absent.ledger.skipped, empty.ledger.skipped) == (0, 1)
