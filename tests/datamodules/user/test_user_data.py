from __future__ import annotations

import io
import json
import pickle
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from descant.cli import dump
from descant.datamodules.base import BatchDataset
from descant.datamodules.combined.mixture import Mixture
from descant.datamodules.corpora.emoji_pack import PACK
from descant.datamodules.fields.fields import AudioField, Fields, ImageField, LabelField, TextField
from descant.datamodules.fields.image_cache import ImageCache
from descant.datamodules.fields.images import Reduced
from descant.datamodules.sampling.resumable_sampler import Order
from descant.datamodules.sources import find
from descant.datamodules.sources.base import held_out
from descant.datamodules.sources.folder import Folder
from descant.datamodules.sources.ledger import Ledger
from descant.datamodules.sources.parquet import Parquet
from descant.datamodules.sources.reading import key_of
from descant.datamodules.sources.stream import Stream
from descant.datamodules.sources.synthetic import Taken
from descant.datamodules.user.user_data import UserData
from descant.modules.core.batch import Batch
from descant.modules.tokenizers.text import BPETokenizer, NgramTokenizer
from tests.files import COLOURS, bomb, jpeg, shapes, wav, write_tar
from tests.rotation import quick
from tests.tolerance import statistical


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DESCANT_CACHE", str(tmp_path / "cache"))


def small(**more: Any) -> Fields:
    return Fields(image=ImageField(size=8), text=TextField(), **more)


def batches(data: BatchDataset, size: int, epoch: int = 0, world: int = 1, rank: int = 0, **cut: Any) -> list[Batch]:
    return [data[window] for window in Order(len(data), size, 0, epoch=epoch, world=world, rank=rank, **cut)]


class Place:
    """As much of a trainer as the loaders ask for."""

    def __init__(self, folder: Path, rank: int = 0, world: int = 1) -> None:
        self.global_rank, self.world_size, self.accumulate_grad_batches, self.num_devices = rank, world, 1, world
        self.default_root_dir, self.training = str(folder), True


def own(folder: Path, rank: int = 0, world: int = 1, **options: Any) -> UserData:
    data = UserData(**{"batch_size": 8, "num_workers": 0, **options})
    data.trainer = Place(folder, rank, world)  # type: ignore[assignment]
    return data


def ledger(folder: Path) -> list[dict[str, str]]:
    file = folder / "ledger.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


# every sample once ---------------------------------------------------------------------------------------------


def uneven(folder: Path) -> str:
    """Three shards of 23, 1 and 13 samples."""
    folder.mkdir(exist_ok=True)
    for k, n in enumerate((23, 1, 13)):
        members = [(f"{i}.{e}", d) for i in range(n) for e, d in (("jpg", jpeg()), ("txt", f"{k} {i}".encode()))]
        write_tar(folder / f"d-{k}.tar", members)
    return str(folder / "d-*.tar")


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("workers", quick([0, 2], 2))
def test_every_sample_is_seen_once_an_epoch(tmp_path: Path, world: int, workers: int) -> None:
    path = uneven(tmp_path / "d")
    orders = []
    for epoch in (0, 1):
        steps: list[list[int]] = []
        for rank in range(world):
            data = own(tmp_path, rank, world, path=path, holdout=0.0, fields=small(), num_workers=workers)
            data.position = (epoch, 0)
            found = list(data.train_dataloader())
            assert {len(b) for b in found} == {8 // world}, "every rank's batches have one shape"
            steps.append([len(found)])
            orders.append((epoch, [i for b in found for i in b.index[b.present["image"]].tolist()]))
        assert len({tuple(s) for s in steps}) == 1, "every rank makes as many steps"
        seen = Counter(i for e, ids in orders if e == epoch for i in ids)
        assert seen == Counter(range(37))
    assert orders[0][1] != orders[-1][1]


def test_ranks_agree_on_a_steps_counts_and_cut_one_order(tmp_path: Path) -> None:
    path = uneven(tmp_path / "d")
    whole = batches(own(tmp_path, path=path, holdout=0.0, fields=small()).training_set(), 8)
    parts = [
        batches(own(tmp_path, path=path, holdout=0.0, fields=small()).training_set(), 8, world=2, rank=r)
        for r in (0, 1)
    ]
    for step, (left, right) in enumerate(zip(*parts, strict=True)):
        expected = set(whole[step].index[whole[step].present["text"]].tolist())
        assert {*left.index[left.present["text"]].tolist(), *right.index[right.present["text"]].tolist()} == expected
        assert torch.equal(left.step["text"], right.step["text"]) and int(left.count("text")) == len(expected)


def test_row_groups_larger_than_the_cache_are_decoded_once_an_epoch(tmp_path: Path) -> None:
    columns = {"image": [jpeg(list(COLOURS)[i % 4]) for i in range(60)], "caption": [f"c {i}" for i in range(60)]}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet", row_group_size=5)
    source = Parquet(tmp_path / "a.parquet")
    source.memory = max(source._file(0).metadata.row_group(g).total_byte_size for g in range(12)) * 3
    data = own(tmp_path, source=source, holdout=0.0, fields=Fields(image=ImageField(size=8)))
    made = data.training_set()
    seen: list[list[int]] = []
    real = pq.ParquetFile.read_row_group
    with mock.patch.object(pq.ParquetFile, "read_row_group", autospec=True, side_effect=real) as spy:
        for epoch in (0, 1):
            order = data.order(made, epoch=epoch)
            seen.append([i for window in order for i in made[window].index[[s.real for s in window.slots]].tolist()])
            assert sorted(seen[-1]) == list(range(60))
    assert spy.call_count <= 2 * 2 * 12, "two columns of twelve row groups, twice"
    assert seen[0] != seen[1] and len({i // 5 for i in seen[0][:10]}) == 3, "samples of several row groups meet"
    mixed = Mixture(
        {"a": data, "b": own(tmp_path, path=str(shapes(tmp_path / "b")), fields=Fields(image=ImageField(size=8)))},
        batch_size=8,
    )
    mixed.prepare_data()
    mixed.setup("fit")
    both = mixed.training_set()
    with mock.patch.object(pq.ParquetFile, "read_row_group", autospec=True, side_effect=real) as spy:
        order = mixed.order(both)
        for window in order:
            assert len(both[window]) == 8
    assert spy.call_count <= 12, "and in a mixture"
    assert order.facts["order"] == "MixedOrder, a by blocks", "what a resumed run has to have too"


# what cannot be read -------------------------------------------------------------------------------------------


def broken(folder: Path) -> Path:
    """A folder of 40 images of which 4 cannot be read, with captions for all but every third, speech for a few."""
    shapes(folder, 40)
    (folder / "003.jpg").write_bytes(b"")
    (folder / "010.jpg").write_bytes(bomb())
    (folder / "011.jpg").write_bytes(jpeg()[:80])
    (folder / "020.jpg").unlink()
    lines = ["image,caption,speech"]
    for i in range(40):
        (folder / f"{i:03}.wav").write_bytes(b"" if i == 4 else wav())
        lines.append(f"{i:03}.jpg,{'' if i % 3 == 0 else f'number {i}'},{f'{i:03}.wav' if i % 4 == 0 else ''}")
    (folder / "captions.csv").write_text("\n".join(lines) + "\n")
    return folder


BAD = {3, 10, 11, 20}


def three() -> Fields:
    return small(audio=AudioField(rate=8000, seconds=0.2))


def test_training_replaces_unreadable_samples_by_similar_ones(tmp_path: Path) -> None:
    source = find(broken(tmp_path / "d"))[""]
    data = own(tmp_path / "run", path=str(tmp_path / "d"), holdout=0.0, fields=three())
    made = data.training_set()
    for epoch in (0, 1):
        for batch in batches(made, 8, epoch):
            expected = made.presence(_slots(made, batch, epoch), np.zeros(8))
            for m in ("image", "text", "audio"):
                assert torch.equal(batch.present[m], expected[m]), "counts are those that were known beforehand"
                assert int(batch.count(m)) == int(batch.present[m].sum())
            for row, i in enumerate(batch.index.tolist()):
                assert i not in BAD
                for m, name in (("image", "image"), ("text", "caption"), ("audio", "speech")):
                    assert not batch.present[m][row] or source.has(name)[i], "a stand-in has all that is present"
                if batch.present["image"][row]:
                    mean = batch.inputs["image"][row].float().mean((1, 2))
                    colour = torch.tensor(COLOURS[list(COLOURS)[i % 4]]).float()
                    assert (mean - colour).abs().max() < 12, "pixels, id and key are of one sample"
    notes = ledger(tmp_path / "run")
    assert {n["sample"] for n in notes} == {"003.jpg", "010.jpg", "011.jpg", "020.jpg", "004.jpg"}
    assert len(notes) == 5, "each is noted once, whatever the epochs"
    why = {n["sample"]: n["why"] for n in notes}
    assert "60,000 x 60,000" in why["010.jpg"] and why["020.jpg"] == "image: no such file or directory"
    assert why["004.jpg"] == "audio: an empty file"


def _slots(made: Any, batch: Batch, epoch: int) -> list[Any]:
    """The slots that a batch was asked for, found by its draws."""
    windows = Order(len(made), 8, 0, epoch=epoch)
    return next(w.slots for w in windows if np.array_equal(made.draws(w.slots), batch.rng_seed.numpy()))


def test_replacements_are_the_same_on_any_rank(tmp_path: Path) -> None:
    broken(tmp_path / "d")
    made = [
        own(tmp_path / f"run{k}", path=str(tmp_path / "d"), holdout=0.0, fields=three()).training_set() for k in (0, 1)
    ]
    whole = {
        int(d): (int(i), x)
        for b in batches(made[0], 8)
        for d, i, x in zip(b.rng_seed, b.index, b.inputs["image"], strict=True)
    }
    for rank in (0, 1):
        for batch in batches(made[1], 8, world=2, rank=rank):
            for draw, index, x in zip(
                batch.rng_seed.tolist(), batch.index.tolist(), batch.inputs["image"], strict=True
            ):
                assert whole[draw][0] == index and torch.equal(whole[draw][1], x)


def test_evaluation_leaves_out_unreadable_samples(tmp_path: Path) -> None:
    broken(tmp_path / "d")
    data = own(tmp_path / "run", path=str(tmp_path / "d"), holdout=0.0, fields=three())
    made = data.bank_set()
    seen: dict[int, set[str]] = {}
    for batch in batches(made, 8, shuffle=False):
        for row, i in enumerate(batch.index.tolist()):
            if any(batch.present[m][row] for m in batch.present):
                seen[i] = {m for m in batch.present if batch.present[m][row]}
    assert all("image" in seen[i] for i in range(40) if i not in BAD and i in seen)
    assert seen[10] == seen[11] == {"text"}, "its caption is still there"
    assert seen[20] == {"text", "audio"} and seen[4] == {"image", "text"} and 3 not in seen
    assert {n["sample"] for n in ledger(tmp_path / "run")} == {"003.jpg", "010.jpg", "011.jpg", "020.jpg", "004.jpg"}


def test_too_many_in_a_row_are_an_error_of_one_line(tmp_path: Path) -> None:
    for image in shapes(tmp_path / "d", 40).glob("*.jpg"):
        image.write_bytes(b"nothing")
    for workers in (0, 1):
        data = own(tmp_path / "run", path=str(tmp_path / "d"), fields=small(), num_workers=workers)
        with pytest.raises(ValueError, match="20 samples in a row cannot be read; the last is") as caught:
            list(data.train_dataloader())
        assert "\n" not in str(caught.value)


def test_a_rare_sample_is_replaced_by_one_with_more_modalities(tmp_path: Path) -> None:
    samples: list[dict[str, Any]] = [{"image": b"broken"}, *({"image": jpeg(), "caption": f"c {i}"} for i in range(7))]
    data = own(tmp_path, source=Taken([(str(k), s) for k, s in enumerate(samples)]), holdout=0.0, fields=small())
    (batch,) = batches(data.training_set(), 8)
    assert int(batch.present["image"].sum()) == 8 and int(batch.present["text"].sum()) == 7
    assert len(set(batch.index.tolist())) == 7
    alone = own(
        tmp_path, source=Taken([("0", {"image": b"broken"}), ("1", {"caption": "a b"})]), holdout=0.0, fields=small()
    )
    with pytest.raises(ValueError, match=r"0 cannot be read \(.*\), and no other sample has image"):
        batches(alone.training_set(), 2)


def test_several_processes_note_a_sample_once(tmp_path: Path) -> None:
    first, second = Ledger(tmp_path), Ledger(tmp_path)
    for book in (first, second, first):
        for sample in ("a", "b"):
            book.skip("f.tar", sample, "broken")
    assert [n["sample"] for n in ledger(tmp_path)] == ["a", "b"] and first.skipped == 4
    resumed = Ledger(tmp_path)
    resumed.skip("f.tar", "b", "broken")
    resumed.skip("f.tar", "c", "broken")
    assert [n["sample"] for n in ledger(tmp_path)] == ["a", "b", "c"]


def test_rows_read_merged_and_left_out_are_one_line_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shapes(tmp_path / "d", 12)
    rows = [f"{i:03}.jpg,c {i}" for i in range(12)]
    rows += ["003.jpg,another", "003.jpg,c 3", "gone.jpg,c", "005.jpg,too,many", "006.jpg,"]
    rows[7] = "007.jpg,"
    (tmp_path / "d" / "captions.csv").write_text("\n".join(["image,caption", *rows]))
    (tmp_path / "d" / "001.jpg").write_bytes(b"nothing")
    options: dict[str, Any] = {
        "path": str(tmp_path / "d"),
        "holdout": 0.0,
        "fields": small(),
        "damaged": "skip",
        "num_workers": 0,
    }
    data = own(tmp_path / "run", **options)
    loader = data.train_dataloader()
    # 17 rows: one is damaged, three name a file that another names, and one of the 13 files is not there
    place = tmp_path / "run" / "ledger.jsonl"
    output = capsys.readouterr()
    assert output.out.strip() == (
        "descant: data: 17 rows read; 1 left out; 3 merged with another row of the same file; 1 without text; "
        f"1 files named but missing; samples: train 13; unreadable samples are listed in {place}"
    )
    assert output.err.startswith("descant: warning: ") and "captions.csv: has 3 cells, the header 2" in output.err
    data.train_dataloader()
    assert capsys.readouterr() == ("", ""), "once"
    for _ in zip(range(len(loader)), loader, strict=False):
        pass  # as a trainer does, which asks for no batch beyond the last
    # the file that is not there and the one that is no image are known once an epoch has met them
    (reported,) = capsys.readouterr().err.splitlines()
    assert reported.startswith("descant: warning: data: 2 samples could not be read, the last ")
    assert reported.endswith(f": {place}")
    assert {n["sample"] for n in ledger(tmp_path / "run")} == {"001.jpg", "gone.jpg", "line 17"}
    list(loader)
    assert capsys.readouterr() == ("", ""), "nothing new"
    other = own(tmp_path / "run", 1, 2, **options)
    list(other.train_dataloader())
    assert capsys.readouterr() == ("", ""), "the first rank speaks"


# what is kept --------------------------------------------------------------------------------------------------


def kept(size: int, keep: float | None) -> Fields:
    return Fields(image=ImageField(size=size, keep=keep), text=TextField())


@pytest.mark.parametrize("workers", [0, 2])
def test_cached_images_are_decoded_once_by_all_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    folder = shapes(tmp_path / "d", 24)
    (folder / "005.jpg").write_bytes(b"nothing")
    data = own(tmp_path / "run", path=str(folder), holdout=0.0, fields=kept(8, 1.5), num_workers=workers)
    loader = data.train_dataloader()
    first = list(loader)
    memory = data.readers["train"].caches["image"]
    assert [memory.get(i) is not None for i in range(24)] == [i != 5 for i in range(24)]
    for image in folder.glob("*.jpg"):
        image.unlink()  # nothing is read of them again, which every process knows
    again = list(loader)
    assert len(again) == len(first) and all(bool(b.present["image"].all()) for b in again)
    assert {n["sample"] for n in ledger(tmp_path / "run")} == {"005.jpg"}
    plain = own(tmp_path / "run", path=str(shapes(tmp_path / "e", 24)), holdout=0.0, fields=kept(8, None))
    assert not plain.readers["train"].caches and not plain.warms and data.warms


def test_crops_of_cached_images_match_those_of_the_originals(tmp_path: Path) -> None:
    """A left half red and a right half blue: each crop has the same share of both, to the pixels of the copy."""
    x_HW3 = np.zeros((90, 240, 3), dtype=np.uint8)
    x_HW3[:, :120, 0] = x_HW3[:, 120:, 2] = 255
    out = io.BytesIO()
    Image.fromarray(x_HW3).save(out, "PNG")
    field = ImageField(size=16, scale=(0.2, 0.6), keep=1.5)
    draw_B = np.arange(64)
    whole_B3SS, _ = field.decode([out.getvalue()] * 64, draw_B)
    small_B3SS, errors = field.decode([field.reduce(out.getvalue())] * 64, draw_B)
    assert errors == [None] * 64
    difference_BS = (whole_B3SS.float() - small_B3SS.float()).abs().mean(dim=(1, 2)) / 255
    # an edge moves by at most a pixel of the copy, which the narrowest crop shows 16 * 240 / 24 / 51 = 3.2 columns wide
    assert float(difference_BS.sum(dim=1).max()) <= 3.2
    central = [field.decode([raw], None)[0] for raw in (out.getvalue(), field.reduce(out.getvalue()))]
    assert float((central[0].float() - central[1].float()).abs().mean()) <= 255 * 3 / 16


def test_the_image_cache_has_a_limit_and_no_smaller_images_than_the_crops(tmp_path: Path) -> None:
    memory = ImageCache(100, side=8, most=10 * 3 * 64)
    for row in (9, 10):
        memory.put(row, Reduced(30, 40, np.full((8, 8, 3), row, dtype=np.uint8)))
    assert memory.get(9) is not None and memory.get(10) is None and memory.get(0) is None
    again = pickle.loads(pickle.dumps(memory))
    assert again.N == 10 and again.get(9) is None
    with pytest.raises(ValueError, match=r"keep 0\.9: 1 or more times the size"):
        ImageField(size=8, keep=0.9)


# splits, keys, labels ------------------------------------------------------------------------------------------


def test_without_a_split_samples_are_held_out_by_name(tmp_path: Path) -> None:
    shapes(tmp_path / "d", 200)
    data = own(tmp_path, path=str(tmp_path / "d"), holdout=0.2, fields=small())
    train, val = data.splits["train"][1], data.splits["val"][1]
    assert not set(train) & set(val) and len(train) + len(val) == 200 and 25 < len(val) < 55
    assert {data.sample_name(int(i)) for i in val} == {
        n for n in (f"{i:03}.jpg" for i in range(200)) if held_out(n, 0.2)
    }
    assert list(data.evaluation_sets("validate")) == list(data.evaluation_sets("test")) == ["val"]
    (tmp_path / "e").mkdir()
    shapes(tmp_path / "e", 100)  # half the files: nobody changes sides
    half = own(tmp_path, path=str(tmp_path / "e"), holdout=0.2, fields=small())
    assert {half.sample_name(int(i)) for i in half.splits["val"][1]} == {
        data.sample_name(int(i)) for i in val if i < 100
    }
    few = own(tmp_path, path=str(shapes(tmp_path / "f", 6)), holdout=0.01, fields=small())
    assert len(few.splits["val"][1]) == 2, "something to validate on"


def test_a_split_column(tmp_path: Path) -> None:
    shapes(tmp_path / "d", 9)
    words = ["train", "dev", "TEST", "train", "", "training", "val", "test", "train"]
    lines = [
        "image,caption,split,fold",
        *(f"{i:03}.jpg,c {i},{w},{'test' if i == 0 else 'train'}" for i, w in enumerate(words)),
    ]
    (tmp_path / "d" / "captions.csv").write_text("\n".join(lines))
    data = own(tmp_path, path=str(tmp_path / "d"), fields=small())
    assert {k: rows.tolist() for k, (_, rows) in data.splits.items()} == {
        "train": [0, 3, 4, 5, 8],
        "val": [1, 6],
        "test": [2, 7],
    }
    assert list(data.evaluation_sets("test")) == ["test"]
    other = own(tmp_path, path=str(tmp_path / "d"), fields=small(), split="fold", holdout=0.0)
    assert other.splits["test"][1].tolist() == [0] and "val" not in other.splits
    with pytest.raises(ValueError, match="caption: 'c 0' is no split; it is train, val or test"):
        _ = own(tmp_path, path=str(tmp_path / "d"), fields=small(), split="caption").splits
    with pytest.raises(ValueError, match=r"no column 'slipt'; nearest: split"):
        _ = own(tmp_path, path=str(tmp_path / "d"), fields=small(), split="slipt").splits


def test_files_of_splits_and_sources_elsewhere(tmp_path: Path) -> None:
    for k, (split, n) in enumerate((("train", 6), ("val", 3))):
        write_tar(
            tmp_path / f"{split}-0.tar",
            [(f"{i}.{e}", d) for i in range(n) for e, d in (("jpg", jpeg()), ("txt", b"c%d" % k))],
        )
    data = own(
        tmp_path, path=str(tmp_path), fields=small(), test=Taken([("x", {"jpg": jpeg("blue"), "txt": "a b"})], "there")
    )
    assert {k: len(rows) for k, (_, rows) in data.splits.items()} == {"train": 6, "val": 3, "test": 1}
    ids = [
        made.identity(np.arange(len(made))).tolist()
        for made in (
            data.training_set(),
            *data.evaluation_sets("validate").values(),
            *data.evaluation_sets("test").values(),
        )
    ]
    assert ids == [[0, 1, 2, 3, 4, 5], [6, 7, 8], [9]]
    assert data.sample_name(7) == "val-0/1" and data.describe(7) == "c1" and data.describe(9) == "a b"
    image = data.picture(9)
    assert image is not None and image.shape == (3, 8, 8) and image[2].float().mean() > 200


def test_equal_captions_are_not_each_others_negatives(tmp_path: Path) -> None:
    samples: list[dict[str, Any]] = [{"image": jpeg(), "caption": c} for c in ("A cat", "a  cat", "a dog")]
    samples += [{"image": jpeg()}, {"image": jpeg()}]
    for k, s in enumerate(samples):
        s["group"] = "ab"[k % 2]
    source = Taken([(str(k), s) for k, s in enumerate(samples)])
    (batch,) = batches(own(tmp_path, source=source, holdout=0.0, fields=small()).bank_set(), 5, shuffle=False)
    keys = batch.content_id.tolist()
    assert keys[0] == keys[1] == key_of("a cat") and len(set(keys)) == 4
    (batch,) = batches(
        own(tmp_path, source=source, holdout=0.0, fields=small(), key="group").bank_set(), 5, shuffle=False
    )
    assert (
        len(set(batch.content_id.tolist())) == 2 and batch.content_id[0] == batch.content_id[2] == batch.content_id[4]
    )


def test_labels_are_targets_and_prompts(tmp_path: Path) -> None:
    for place in ("red_things", "blue"):
        (tmp_path / "d" / place).mkdir(parents=True)
        for i in range(4):
            (tmp_path / "d" / place / f"{i}.jpg").write_bytes(jpeg())
            (tmp_path / "d" / place / f"{i}.txt").write_text(f"{place} {i}")
    data = own(tmp_path, path=str(tmp_path / "d"), fields=small(labels={"kind": LabelField("folder")}), holdout=0.0)
    (batch,) = batches(data.bank_set(), 8, shuffle=False)
    assert batch.targets["kind"].tolist() == [0] * 4 + [1] * 4
    ids, names = data.prompts("kind")
    assert names == ["blue", "red_things"] and data.tokenizer is not None
    assert ids.shape == (2, 2, data.tokenizer.length) and torch.equal(
        ids[1], data.tokenizer(["red things", "a photo of a red things"])
    )
    with pytest.raises(ValueError, match="'sort' is not one of kind"):
        data.prompts("sort")


# randomness, pixels and sound ----------------------------------------------------------------------------------


def test_a_sample_is_a_function_of_seed_epoch_and_index(tmp_path: Path) -> None:
    shapes(tmp_path / "d", 24)
    made = own(tmp_path, path=str(tmp_path / "d"), holdout=0.0, fields=small()).training_set()
    a = {
        int(i): (x, d) for b in batches(made, 8) for i, x, d in zip(b.index, b.inputs["image"], b.rng_seed, strict=True)
    }
    b = {
        int(i): (x, d)
        for b in batches(made, 24)
        for i, x, d in zip(b.index, b.inputs["image"], b.rng_seed, strict=True)
    }
    assert all(torch.equal(a[i][0], b[i][0]) and a[i][1] == b[i][1] for i in range(24))
    c = {int(i): d for b in batches(made, 8, epoch=1) for i, d in zip(b.index, b.rng_seed, strict=True)}
    assert all(c[i] != a[i][1] for i in range(24))


def test_modalities_are_dropped_at_the_given_rate(tmp_path: Path) -> None:
    shapes(tmp_path / "d", 100)
    made = own(tmp_path, path=str(tmp_path / "d"), holdout=0.0, fields=small(), drop={"text": 0.5}).training_set()
    kept = [int(b.present["text"].sum()) for e in range(4) for b in batches(made, 50, e)]
    assert sum(kept) == pytest.approx(200, abs=400 * statistical(0.5, 400))
    with pytest.raises(ValueError, match="drop: no modality 'sound'; this data has image, text"):
        own(tmp_path, fields=small(), drop={"sound": 0.5})


def test_pixels_and_sound_are_floats_on_the_device_only(tmp_path: Path) -> None:
    data = own(tmp_path, path=str(broken(tmp_path / "d")), holdout=0.0, fields=three())
    batch = next(iter(data.train_dataloader()))
    assert batch.inputs["image"].dtype == torch.uint8 and batch.inputs["audio"].dtype == torch.int16
    batch = data.on_after_batch_transfer(batch, 0)
    assert batch.inputs["image"].dtype == torch.float32 and float(batch.inputs["image"].abs().max()) <= 1
    heard = batch.inputs["audio"].isfinite().all(1).any(1)
    assert torch.equal(heard, batch.present["audio"]), "a frame of -inf is no sound"


def test_fields_are_found_where_none_are_given(tmp_path: Path) -> None:
    data = own(tmp_path, path=str(broken(tmp_path / "d")))
    assert data.modalities == ("image", "text", "audio")
    write_tar(tmp_path / "a.tar", [(f"{i}.{e}", d) for i in range(4) for e, d in (("wav", wav()), ("txt", b"a b"))])
    assert own(tmp_path, path=str(tmp_path / "a.tar")).modalities == ("text", "audio")


def test_synthetic_data_has_the_shapes_of_the_fields(tmp_path: Path) -> None:
    fields = Fields(
        image=ImageField("jpg;png", size=16),
        text=TextField({"alt": 0.5, "json.title": 0.5}),
        audio=AudioField("flac", rate=8000, seconds=0.5),
        labels={"kind": LabelField("cls")},
    )
    data = own(tmp_path, fields=fields, tiny=True, path="/nowhere", key="group", split="fold")
    batch = next(iter(data.train_dataloader()))
    assert batch.inputs["image"].shape == (8, 3, 16, 16) and batch.inputs["audio"].shape == (8, 4000)
    assert batch.targets["kind"].shape == (8,) and all(int(p.sum()) >= 7 for p in batch.present.values())
    assert len(data.evaluation_sets("validate")["val"]) > 1


def test_the_number_of_workers_follows_the_cores_of_a_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)), raising=False)
    asked: dict[str, Any] = {"fields": small(), "num_workers": None}
    assert own(tmp_path, **asked).workers == 7 and own(tmp_path, world=2, **asked).workers == 3
    assert own(tmp_path, **asked, tiny=True).workers == 0, "synthetic samples are there at once"
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "4")
    assert own(tmp_path, world=2, **asked).workers == 3, "a rank that srun begins has its share already"
    assert own(tmp_path, fields=small(), num_workers=5).workers == 5
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0}, raising=False)
    assert own(tmp_path, **asked).workers == 0


# wrong requests ------------------------------------------------------------------------------------------------


def test_wrong_requests_are_one_line(tmp_path: Path) -> None:
    shapes(tmp_path / "photos", 4)
    for call, line in [
        (lambda: own(tmp_path).training_set(), "data.path is missing"),
        (lambda: own(tmp_path, path="a", source=Taken([])), "path and source: give only one of them"),
        (lambda: own(tmp_path, path="a", holdout=1.0), "holdout 1.0: a share"),
        (
            lambda: own(tmp_path, path=str(tmp_path / "photo")).training_set(),
            "photo: no such file or folder; nearest: photos",
        ),
        (
            lambda: own(
                tmp_path, path=str(tmp_path / "photos"), fields=Fields(text=TextField("captoin"))
            ).training_set(),
            r"captions\.csv: no column 'captoin'; nearest: caption",
        ),
    ]:
        with pytest.raises(ValueError, match=line) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_truncated_captions_are_reported_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from descant.modules.tokenizers.text import NgramTokenizer

    shapes(tmp_path / "d", 40)
    data = own(tmp_path, path=str(tmp_path / "d"), fields=Fields(text=TextField(tokenizer=NgramTokenizer(length=6))))
    data.training_set(), data.training_set()
    assert capsys.readouterr().err.count("descant: warning: 100% of the captions are longer than 6 tokens") == 1


# streams -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("world", "workers"), quick([(1, 0), (1, 2), (2, 0), (2, 2), (4, 2)], 3))
def test_a_stream_gives_every_rank_the_same_number_of_steps(tmp_path: Path, world: int, workers: int) -> None:
    uneven(tmp_path / "d")
    stream = Stream(str(tmp_path / "d" / "d-{0..2}.tar"), samples=36, buffer=4)
    seen: list[int] = []
    for rank in range(world):
        data = own(tmp_path, rank, world, stream=stream, fields=small(), num_workers=workers, drop={"text": 0.3})
        loader = data.train_dataloader()
        found = list(loader)
        assert len(found) == len(loader) == 5 and {len(b) for b in found} == {8 // world}
        again = list(data.train_dataloader())
        assert [b.index.tolist() for b in again] == [b.index.tolist() for b in found], "a function of seed and epoch"
        loader.sampler.set_epoch(1)  # type: ignore[attr-defined]
        later = list(loader)
        assert [b.index.tolist() for b in later] != [b.index.tolist() for b in found]
        for batch in found:
            assert int(batch.count("image")) in (7, 8), "the whole step's, on every rank"
        seen += [i for b in found for i in b.index[b.present["image"]].tolist()]
    assert len(seen) == 36
    assert data.evaluation_sets("validate") == {}
    with pytest.raises(ValueError, match="no bank set: k-NN and probes"):
        data.bank_set()


def test_a_stream_passes_over_unreadable_samples(tmp_path: Path) -> None:
    members = [
        (f"{i}.{e}", d) for i in range(6) for e, d in (("jpg", b"broken" if i == 2 else jpeg()), ("txt", b"c%d" % i))
    ]
    stream = Stream(str(write_tar(tmp_path / "a.tar", members)), samples=16, buffer=1)
    data = own(tmp_path / "run", stream=stream, fields=small())
    found = list(data.train_dataloader())
    assert all(bool(b.present["image"].all()) for b in found)
    assert len({i for b in found for i in b.index.tolist()}) == 5
    assert [n["sample"] for n in ledger(tmp_path / "run")] == ["2"]


# from the command line -----------------------------------------------------------------------------------------


def test_a_folder_trains_without_a_line_of_code_and_learns(cli: Any) -> None:
    shapes(Path("photos"), 60)
    Path("photos/007.jpg").write_bytes(b"")
    model: tuple[str, ...] = (
        "--model.towers.image.widths",
        "[16]",
        "--model.towers.image.stem",
        "2",
        "--model.optimizer.lr",
        "0.01",
    )
    model += ("--model.towers.text.vocab", "1024", "--data.fields.text.tokenizer.buckets", "1024")
    result = cli(
        *("fit", "--config", "contrastive/own", "--config", "on/cpu", "--data.path", "photos", "--name", "x"),
        *("--data.batch_size", "16", "--data.fields.image.size", "16", "--data.num_workers", "0", *model),
        *("--trainer.max_epochs", "8", "--trainer.log_every_n_steps", "1", "--trainer.check_val_every_n_epoch", "8"),
    )
    assert result.rc == 0, result.err
    rows = Path("runs/x/001/metrics.csv").read_text().splitlines()
    column = rows[0].split(",").index("train/loss")
    losses = [float(row.split(",")[column]) for row in rows[1:] if row.split(",")[column]]
    assert np.mean(losses[-4:]) < 0.7 * np.mean(losses[:4]), losses
    metrics = json.loads(Path("runs/x/metrics.json").read_text())
    assert metrics["val/i2t_r10"] > 0
    assert [n["sample"] for n in ledger(Path("runs/x/001"))] == ["007.jpg"]


def test_errors_of_the_command_line_are_one_line(cli: Any, written_content: dict[str, Any]) -> None:
    dump.place().parent.mkdir(parents=True, exist_ok=True)
    dump.place().write_text(json.dumps(written_content))  # else the first mistake in this cache has it made
    shapes(Path("photos"), 12)
    fit = ("fit", "--config", "contrastive/own", "--config", "on/cpu", "--trainer.max_steps", "1")
    result = cli(*fit)
    line = "data.path is missing: a folder of images and captions, shards or parquet files"
    assert line in result.refusal, result.err
    for i in range(12):
        Path(f"photos/{i:03}.jpg").write_bytes(b"broken")
    result = cli(*fit, "--data.path", "photos", "--data.num_workers", "1")
    assert "cannot be read" in result.refusal, "a worker's error is one line too"


def test_samples_marked_test_are_not_trained_on_with_a_validation_source(tmp_path: Path) -> None:
    for part in ("train", "test"):
        for file in shapes(tmp_path / "d" / part, 6).glob("*.jpg"):
            file.with_suffix(".txt").write_text(file.stem)
        (tmp_path / "d" / part / "captions.csv").unlink()
    there = Folder(shapes(tmp_path / "elsewhere", 4))
    data = own(tmp_path, path=str(tmp_path / "d"), fields=small(), validate=there)
    names = [data.sources["train"].name(row) for row in data.splits["train"][1].tolist()]
    assert len(names) == 6 and not any("test" in name for name in names), names
    assert list(data.evaluation_sets("test")) == ["test"] and data.splits["val"][0] == "val"


@pytest.mark.parametrize("tokenizer", [NgramTokenizer(), BPETokenizer(PACK / "tokenizer.json")])
def test_a_lone_surrogate_is_a_fault_of_its_sample(tmp_path: Path, tokenizer: Any) -> None:
    shapes(tmp_path / "d", 12)
    rows = [{"image": f"{i:03}.jpg", "caption": "nice \ud83d" if i == 3 else f"number {i}"} for i in range(12)]
    (tmp_path / "d" / "captions.csv").unlink()
    (tmp_path / "d" / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    fields = Fields(image=ImageField(size=8), text=TextField(tokenizer=tokenizer))
    data = own(tmp_path / "run", path=str(tmp_path / "d"), fields=fields, holdout=0.0)
    assert sum(len(batch) for batch in batches(data.training_set(), 4)) == 12
    assert any("not UTF-8 text" in line["why"] for line in ledger(tmp_path / "run"))


def test_scattered_broken_samples_of_a_stream_are_not_in_a_row(tmp_path: Path) -> None:
    members = []
    for i in range(512):
        image = b"\xff\xd8no image" if i % 10 == 0 else jpeg()
        members += [(f"{i:04}.jpg", image), (f"{i:04}.txt", str(i).encode())]
    write_tar(tmp_path / "s.tar", members)
    data = own(tmp_path / "run", batch_size=256, stream=Stream([str(tmp_path / "s.tar")], samples=512), fields=small())
    assert sum(len(batch) for batch in data.train_dataloader()) == 512


@pytest.mark.parametrize("asked", [{"key": "cls"}, {"split": "part"}, {"labels": {"kind": LabelField("cls")}}])
def test_options_that_a_stream_cannot_have_are_refused(tmp_path: Path, asked: dict[str, Any]) -> None:
    labels = asked.pop("labels", None)
    with pytest.raises(ValueError, match="not available for a stream"):
        UserData(8, stream=Stream(["s.tar"], samples=8), fields=small(labels=labels), **asked)
