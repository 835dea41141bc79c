"""Test which samples MyData serves, how often, and what determines them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch

from descant.datamodules.base import BatchDataset
from descant.datamodules.sampling.resumable_sampler import Order
from descant.modules.core.batch import Batch
from descant.templates.datamodule.my_data import MyData, read, synthetic


def batches(data: MyData, epoch: int = 0) -> list[Batch]:
    """Return one epoch as training loads it."""
    data.position = (epoch, 0)
    return list(data.train_dataloader())


def texts_of(some: Iterable[Batch]) -> dict[int, tuple[bool, list[int]]]:
    """Map each sample id to whether its text is present, and to the text."""
    texts = {}
    for batch in some:
        for b in batch.present["image"].nonzero().squeeze(1).tolist():  # padding rows have no modality
            texts[int(batch.index[b])] = bool(batch.present["text"][b]), batch.inputs["text"][b].tolist()
    return texts


def ids(rows: BatchDataset) -> set[int]:
    return set(rows.identity(np.arange(len(rows))).tolist())


def test_splits_are_disjoint_and_miss_nothing() -> None:
    data = MyData()
    sets = {"train": data.training_set(), **data.evaluation_sets("validate"), **data.evaluation_sets("test")}
    assert list(sets) == ["train", "val", "test"]
    assert sorted(i for rows in sets.values() for i in ids(rows)) == list(range(2000))
    texts = [{tuple(data.corpus.text[i, 0]) for i in ids(rows)} - {(0, 0, 0)} for rows in sets.values()]
    assert all(texts)
    assert not texts[0] & texts[1] | texts[0] & texts[2] | texts[1] & texts[2]
    assert ids(data.bank_set()) == ids(sets["train"])


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_sample_is_a_function_of_seed_epoch_and_index(ranks: int) -> None:
    data = MyData(batch_size=64, tiny=True)
    wanted, rows = texts_of(batches(data, epoch=3)), data.training_set()
    assert wanted.keys() == ids(rows)
    parts = [Order(len(rows), 64, data.seed, rank=rank, world=ranks, epoch=3) for rank in range(ranks)]
    assert texts_of(rows[window] for part in parts for window in part) == wanted
    assert texts_of(batches(data, epoch=4)) != wanted


def test_a_text_is_there_where_the_corpus_has_one() -> None:
    data = MyData(tiny=True)
    has_text_N = data.corpus.texts_N > 0
    assert 0 < has_text_N.sum() < len(has_text_N)
    assert all(there == has_text_N[i] for i, (there, _) in texts_of(batches(data)).items())
    for batch in batches(data):
        assert int(batch.count("image", "text")) == int(batch.both("image", "text").sum())


def test_missingness_is_a_policy_of_the_correct_size() -> None:
    plain = texts_of(batches(MyData()))
    dropped, again = (texts_of(batches(MyData(drop={"text": 0.3}))) for _ in range(2))
    had = {i for i, (there, _) in plain.items() if there}
    kept = {i for i, (there, _) in dropped.items() if there}
    assert kept < had
    assert len(kept) / len(had) == pytest.approx(0.7, abs=0.06)
    assert dropped == again


def test_training_samples_a_text_and_evaluation_reads_the_first() -> None:
    data = MyData(tiny=True)
    texts = data.corpus.text
    sampled = {
        i: [text == texts[i, k].tolist() for k in range(2)]
        for i, (there, text) in texts_of(batches(data)).items()
        if there
    }
    assert all(any(which) for which in sampled.values())
    assert 0.3 < np.mean([first for first, _ in sampled.values()]) < 0.7
    rows = data.evaluation_sets("validate")["val"]
    (batch,) = data.evaluation_loader(rows)
    assert torch.equal(batch.inputs["text"], torch.from_numpy(texts[batch.index, 0]))


def saved(folder: Path, text: list[list[list[int]]]) -> Path:
    """Save a file of samples with these texts."""
    n, file = len(text), folder / "corpus.npz"
    np.savez(file, image=np.zeros((n, 3, 2, 2), np.uint8), text=np.array(text), label=np.zeros(n))
    return file


def test_a_text_that_is_not_there_is_never_sampled(tmp_path: Path) -> None:
    text = [[[i, 1], [i, 2] if i % 2 else [0, 0], [0, 0]] for i in range(1, 101)]
    texts = texts_of(batches(MyData(file=str(saved(tmp_path, text))))).values()
    assert {t[1] for _, t in texts if t[0] % 2} == {1, 2}
    assert {t[1] for _, t in texts if not t[0] % 2} == {1}


def test_equal_texts_share_a_key_and_missing_ones_do_not(tmp_path: Path) -> None:
    a, b, c, *missing = read(saved(tmp_path, [[[1, 2]], [[3, 0]], [[1, 2]], [[0, 0]], [[0, 0]]])).key_N.tolist()
    assert a == c
    assert len({a, b, *missing}) == 4


def test_pixels_are_uint8_until_they_are_on_the_device() -> None:
    data = MyData(tiny=True)
    batch = batches(data)[0]
    assert batch.inputs["image"].dtype == torch.uint8
    x_B3SS = data.on_after_batch_transfer(batch, 0).inputs["image"]
    assert -1.0 <= float(x_B3SS.min()) < float(x_B3SS.max()) <= 1.0


def test_a_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    corpus, file = synthetic(30), tmp_path / "corpus.npz"
    np.savez(file, **vars(corpus))
    again = MyData(file=str(file)).corpus
    for name in ("image", "text", "label"):
        assert np.array_equal(getattr(again, name), getattr(corpus, name))


def test_wrong_input_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "corpus.npz"
    np.savez(file, image=np.zeros((2, 3, 4, 4)), text=np.zeros((2, 1, 3)))
    with pytest.raises(ValueError, match=r"corpus\.npz: no array 'label', only image, text"):
        read(file)
    np.savez(file, image=np.zeros((2, 3, 4, 4)), text=np.zeros((2, 1, 3)), label=np.zeros(2))
    with pytest.raises(ValueError, match="image: float64, not uint8"):
        read(file)
    np.savez(file, image=np.zeros((2, 3, 4, 4), np.uint8), text=np.zeros((3, 1, 3)), label=np.zeros(2))
    with pytest.raises(ValueError, match=r"text: shape \[3, 1, 3\]: 3 dimensions, as many rows as image has"):
        read(file)
    file.write_bytes(b"not an archive")
    with pytest.raises(ValueError, match=r"corpus\.npz: not a readable \.npz file"):
        read(file)
    with pytest.raises(ValueError, match="drop: no modality 'audio'"):
        MyData(drop={"audio": 0.5})
