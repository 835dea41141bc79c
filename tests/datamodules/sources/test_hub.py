from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict, Features, IterableDataset
from torch import nn

from descant.callbacks import Resume
from descant.datamodules.base import DataModule
from descant.datamodules.fields.fields import Fields, ImageField, TextField
from descant.datamodules.sources import find
from descant.datamodules.sources.base import Raw
from descant.datamodules.sources.hub import HubDataset, HubStream
from descant.datamodules.sources.stream import BEGINNING, Sample
from descant.datamodules.user.user_data import UserData
from descant.modules.core.batch import Batch
from descant.modules.core.objective import Term
from descant.modules.core.output import Output
from descant.recipes.base.recipe import Recipe
from tests.callbacks.checkpoints.test_resume import Act, equal, fit, point, state
from tests.datamodules.test_ranks import steps
from tests.datamodules.test_streams import noise, on_rank, read, same, saved
from tests.rotation import quick

FEATURES = Features({"image": datasets.Image(), "caption": datasets.Value("string"), "n": datasets.Value("int64")})
FIELDS = Fields(image=ImageField(field="image", size=6), text=TextField("caption"))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DESCANT_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()


def dataset(n: int = 34) -> Dataset:
    rows = [{"image": {"bytes": noise(i), "path": None}, "caption": f"c {i}", "n": i} for i in range(n)]
    return Dataset.from_list(rows, features=FEATURES)


def own(path: Any, **options: Any) -> UserData:
    return UserData(**{"path": path, "batch_size": 8, "num_workers": 0, "holdout": 0.0, "fields": FIELDS, **options})


# rows ------------------------------------------------------------------------------------------------------------


def test_rows_are_those_of_the_object(tmp_path: Path) -> None:
    whole = dataset()
    whole.save_to_disk(str(tmp_path / "a"))
    for made in (
        whole,
        whole.shuffle(seed=3).select(range(20)),
        datasets.load_from_disk(str(tmp_path / "a")).filter(lambda row: row["n"] % 3 == 1),
        whole.shard(3, 1).with_format("torch"),
        datasets.concatenate_datasets([whole.select([5, 2]), whole]),
    ):
        source = pickle.loads(pickle.dumps(HubDataset(made)))
        plain = made.with_format(None).cast_column("image", datasets.Image(decode=False))
        assert len(source) == len(made) and source.texts("caption") == plain["caption"][:]
        assert source.values("n").to_pylist() == plain["n"][:]
        for i in range(len(made)):
            found = source.read(i, ["image", "n"])
            assert found == {"image": plain[i]["image"]["bytes"], "n": str(plain[i]["n"])}
        assert source.name(1) == "row/1" and source.has("image").all()


def test_a_change_of_the_order_is_named() -> None:
    a, b = (HubDataset(dataset().shuffle(seed=seed)).corpus() for seed in (0, 1))
    assert a.changes(a.state()) == []
    (line,) = b.changes(a.state())
    assert line.startswith("the same order in another order: row/0, row/1")


def test_a_dict_has_its_splits_and_others_are_refused() -> None:
    parts = DatasetDict({"train": dataset(20), "validation": dataset(9), "other": dataset(2)})
    data = own(parts, holdout=0.05)
    assert {name: len(row_N) for name, (_, row_N) in data.splits.items()} == {"train": 20, "val": 9}
    for wrong, line in [
        (DatasetDict({"a": dataset(2)}), r"none of the splits \(a\) is train, val or test"),
        (DatasetDict({"dev": dataset(2), "val": dataset(2)}), "has two splits of val, 'val' the second"),
        (dataset().to_iterable_dataset(), r"IterableDataset: stream=HubStream\(dataset, samples=N\)"),
        (dataset().with_transform(lambda rows: rows), "the dataset has a transform, and stored values are read"),
    ]:
        with pytest.raises(ValueError, match=line):
            find(wrong)
    with pytest.raises(ValueError, match=r"of dict: a datasets\.Dataset is wanted"):
        HubDataset({})
    with pytest.raises(ValueError, match=r"of Dataset: a datasets\.IterableDataset is wanted"):
        HubStream(dataset(2), samples=1)
    with pytest.raises(ValueError, match="samples 0 of an epoch"):
        HubStream(dataset(2).to_iterable_dataset(), samples=0)
    docs = Dataset.from_dict({"doc": [None]}, features=Features({"doc": datasets.Pdf()}))
    with pytest.raises(ValueError, match="doc is a feature Pdf, which nothing reads"):
        HubStream(docs.to_iterable_dataset(), samples=1)


# order and resume of rows ----------------------------------------------------------------------------------------


def on_disk(folder: Path) -> DataModule:
    if not (folder / "saved").exists():
        dataset().save_to_disk(str(folder / "saved"), num_shards=3)
    return own(str(folder / "saved"))


def in_memory(folder: Path) -> DataModule:
    return own(dataset().shuffle(seed=0))


@pytest.mark.parametrize("make", [on_disk, in_memory])
def test_the_order_of_all_samples_is_one(tmp_path: Path, make: Callable[[Path], DataModule]) -> None:
    whole = steps(make, tmp_path, 1, 0)
    assert len({row[0] for step in whole.values() for row in step} - {-1}) == 34
    for world, workers in [(2, 0), (4, 0), (2, 2) if make is on_disk else (1, 2)]:
        assert steps(make, tmp_path, world, workers) == whole, (world, workers)
    for start in ((0, 1), (0, 4), (1, 3)):
        rest = {at: rows for at, rows in whole.items() if at >= start}
        assert steps(make, tmp_path, 4, 0, start=start) == rest, start


class Net(Recipe):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(optimizer=lambda groups: torch.optim.AdamW(groups, lr=1e-2), **kwargs)
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(108, 4), nn.Tanh(), nn.Dropout(0.3), nn.Linear(4, 1))

    def forward(self, batch: Batch) -> Output:
        image_BD = batch.inputs["image"].float()
        value_B = (self.net(image_BD)[:, 0] - (batch.index % 97) / 97).square()
        return Output({"fit": Term(value_B, valid=batch.present["image"], given=("image",))})


def shuffled() -> IterableDataset:
    return dataset().to_iterable_dataset(num_shards=4).shuffle(seed=1, buffer_size=9)


@pytest.mark.parametrize("kind", quick(["rows", "stream", "shuffled"], 3))
def test_a_run_that_is_resumed_at_any_step_is_bit_identical(tmp_path: Path, kind: str) -> None:
    def data() -> DataModule:
        if kind == "rows":
            return on_disk(tmp_path)
        stream = shuffled() if kind == "shuffled" else dataset().to_iterable_dataset(num_shards=4)
        return own(None, stream=HubStream(stream, samples=40))

    whole = Act()
    options: dict[str, Any] = {"max_epochs": 2, "limit_val_batches": 0}
    _, net = fit(tmp_path / "a", Resume(every=1, keep=100), whole, net=Net(), data=data(), **options)
    assert len(whole.seen) == 10
    for step in range(1, 10):
        rest, at = Act(), point(tmp_path / "a", step)
        _, again = fit(tmp_path / "b", Resume(every=1), rest, net=Net(), data=data(), path=at, **options)
        assert equal(state(net), state(again)), step
        assert rest.seen == whole.seen[step:] and rest.losses == whole.losses[step:]


# streams ---------------------------------------------------------------------------------------------------------


def plain() -> IterableDataset:
    return dataset(24).to_iterable_dataset(num_shards=4)


PIPELINES: dict[str, tuple[Callable[[], IterableDataset], bool]] = {
    "plain": (plain, True),
    "map": (lambda: plain().decode(False).map(lambda row: {"caption": row["caption"] + "!"}), True),
    "batched": (
        lambda: (
            plain()
            .decode(False)
            .map(lambda rows: {"caption": [f"{c}?" for c in rows["caption"]]}, batched=True, batch_size=3)
        ),
        True,
    ),
    "filter": (lambda: plain().decode(False).filter(lambda row: row["n"] % 3 != 1), True),
    "interleaved": (lambda: datasets.interleave_datasets([plain(), plain().skip(3)]), True),
    "after": (lambda: datasets.concatenate_datasets([plain(), plain().take(5)]), True),
    "shuffled": (lambda: plain().shuffle(seed=3, buffer_size=7), False),
    "drawn": (lambda: datasets.interleave_datasets([plain(), plain()], probabilities=[0.4, 0.6], seed=1), False),
}


def complete(raw: dict[str, Raw]) -> bool:
    return "image" in raw and "caption" in raw


def taken(stream: HubStream, n: int, reader: int, readers: int, mark: tuple[Any, ...] = BEGINNING) -> list[Sample]:
    faults: list[Any] = []
    samples = stream.read(0, 1, reader, readers, complete, faults.append, mark, lambda *f: faults.append(f))  # type: ignore[arg-type]
    found = [next(samples) for _ in range(n)]
    assert not faults
    return found


@pytest.mark.parametrize("name", quick(PIPELINES, 4))
def test_a_stream_resumes_after_any_sample(name: str) -> None:
    make, exact = PIPELINES[name]
    assert HubStream(make(), samples=30).exact == exact
    for reader, readers in ((0, 1), (3, 5)):
        whole = taken(HubStream(make(), samples=30), 36, reader, readers)
        assert max(sample.mark[0] for sample in whole) >= (name not in ("interleaved", "drawn") or readers > 1), (
            "more than a pass"
        )
        for k in (0, 6, 10, 23, 34):
            rest = taken(HubStream(make(), samples=30), 35 - k, reader, readers, tuple(whole[k].mark))
            assert [(s.name, s.raw) for s in rest] == [(s.name, s.raw) for s in whole[k + 1 :]], (reader, k)


def test_readers_share_a_pass_and_passes_differ_in_a_shuffled_one() -> None:
    for readers in (1, 2, 3):
        numbers = [int(str(s.raw["n"])) for r in range(readers) for s in taken(HubStream(plain(), 30), 24, r, readers)
                   if s.mark[0] == 0]  # fmt: skip
        assert sorted(numbers) == list(range(24))
    twice = [str(s.raw["n"]) for s in taken(HubStream(PIPELINES["shuffled"][0](), 30), 48, 0, 1)]
    assert sorted(twice[:24]) == sorted(twice[24:]) and twice[:24] != twice[24:]


@pytest.mark.parametrize("workers", quick([0, 2], 2))
def test_batches_of_a_stream_resume_with_workers(tmp_path: Path, workers: int) -> None:
    def data(rank: int) -> UserData:
        module = own(None, stream=HubStream(plain(), samples=48), drop={"text": 0.3}, num_workers=workers)
        module.trainer = on_rank(tmp_path, [f"{tmp_path}/a.tar"], rank, 2, workers).trainer
        return module

    whole = [list(read(data(rank))) for rank in (0, 1)]
    assert all(len(rows) == 12 for rows in whole)
    for cut in ((0, 2), (0, 5), (1, 0), (1, 4)):
        states = saved([next(state for at, _, state in rows if at == cut) for rows in whole])
        for rank, rows in enumerate(whole):
            again = data(rank)
            again.load_state_dict(states)
            rest, first = list(read(again, cut)), [row for row in rows if row[0] >= cut]
            assert [at for at, _, _ in rest] == [at for at, _, _ in first]
            assert all(same(a, b) for (_, a, _), (_, b, _) in zip(rest, first, strict=True)), cut


def test_values_of_a_stream() -> None:
    def rows() -> Any:
        yield {
            "image": {"bytes": b"abc", "path": None},
            "vector": np.arange(3.0),
            "words": ["a", "b"],
            "info": {"by": "me", "n": np.int64(3)},
            "none": None,
            "label": 1,
        }

    (sample,) = taken_all(HubStream(IterableDataset.from_generator(rows), samples=1))
    assert set(sample) == {"image", "vector", "words.0", "words.1", "info.by", "info.n", "label"}
    assert sample["image"] == b"abc" and sample["info.n"] == "3" and sample["words.1"] == "b"
    features = Features({"label": datasets.ClassLabel(names=["x", "y"]), "parts": datasets.List(datasets.Image())})
    named = Dataset.from_list([{"label": 1, "parts": [{"bytes": noise(1), "path": None}]}], features=features)
    (sample,) = taken_all(HubStream(named.to_iterable_dataset(), samples=1))
    assert sample == {"label": "y", "parts.0": noise(1)}


def taken_all(stream: HubStream) -> list[dict[str, Raw]]:
    samples = stream.read(0, 0, 0, 1, lambda raw: True, lambda *_: None)
    return [next(samples).raw]


def test_a_stream_without_the_fields_says_what_it_has() -> None:
    decoded = plain().map(lambda row: row)
    for stream, line in [
        (plain().remove_columns("image"), "none of 24 samples has all fields; columns: caption, n"),
        (decoded, r"none of 24 samples .*image: a PngImageFile: .* decode\(False\) before a map keeps bytes"),
        (plain().decode(False).filter(lambda row: False), "no samples"),
    ]:
        with pytest.raises(ValueError, match=line):
            next(HubStream(stream, samples=8).read(0, 0, 0, 1, complete, lambda *_: None))


def test_another_number_of_shards_is_refused(tmp_path: Path) -> None:
    data = own(None, stream=HubStream(plain(), samples=16))
    data.trainer = on_rank(tmp_path, [f"{tmp_path}/a.tar"], 0, 1, 0).trainer
    next(read(data))
    states = saved([data.state_dict()])
    other = own(None, stream=HubStream(dataset(24).to_iterable_dataset(num_shards=5), samples=16))
    other.trainer = data.trainer
    with pytest.raises(ValueError, match="shards 4, and here it is 5"):
        other.load_state_dict(states)
