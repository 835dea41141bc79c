"""Training on some ids: the same samples, drawn as in the whole set, exact on ranks and on resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from descant.datamodules.changes import DataPolicy, require
from descant.datamodules.corpora.emoji import Emoji
from descant.datamodules.corpora.frames import Frames
from descant.datamodules.fields.fields import Fields, ImageField
from descant.datamodules.mixture import Mixture
from descant.datamodules.resumable_sampler import BlockShuffle, Slot, Window
from descant.datamodules.sources.parquet import Parquet
from descant.datamodules.tasks.question_pool import QuestionPool
from descant.datamodules.tasks.questions import Questions
from descant.datamodules.user_data import UserData
from tests.files import jpeg


def file_of(folder: Path, id_N: Any, **columns: Any) -> str:
    pq.write_table(pa.table({"index": id_N, **columns}), folder / "ids.parquet")
    return str(folder / "ids.parquet")


def ids(data: Any) -> np.ndarray:
    whole = data.training_set()
    return whole.identity(np.arange(len(whole)))


@pytest.mark.parametrize("kind", [Emoji, Questions])
def test_each_sample_is_the_one_of_the_whole_set(kind: Any, tmp_path: Path) -> None:
    whole = kind(tiny=True, batch_size=8)
    chosen = np.sort(ids(whole))[::3]
    some = kind(tiny=True, batch_size=8, selected=file_of(tmp_path, chosen[::-1]))
    assert len(some.selected_set()) == len(chosen) and len(some.training_set()) == len(ids(whole))
    by_id = {
        int(b.index[0]): b for b in (whole.training_set()[_one(n, len(ids(whole)))] for n in range(len(ids(whole))))
    }
    seen = []
    for batch in some.train_dataloader():
        for row, number in enumerate(batch.index.tolist()):
            if not batch.present["image"][row]:
                continue
            seen.append(number)
            for name, x in batch.inputs.items():
                assert torch.equal(x[row], by_id[number].inputs[name][0]), (number, name)
            assert batch.rng_seed[row] == by_id[number].rng_seed[0]
    assert sorted(seen) == chosen.tolist()


def _one(number: int, size: int) -> Any:
    slot = Slot(0, number, True)
    return Window([slot], [slot])


def test_two_ranks_see_the_parts_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = file_of(tmp_path, ids(Emoji(tiny=True, batch_size=8))[:20])
    steps = []
    for world in (1, 2):
        seen: list[list[int]] = []
        for rank in range(world):
            data = Emoji(tiny=True, batch_size=8, selected=file)
            monkeypatch.setattr(data, "_world", lambda rank=rank, world=world: (rank, world, 1))
            for step, batch in enumerate(data.train_dataloader()):
                seen += [[]] if step == len(seen) else []
                seen[step] += batch.index[batch.present["image"]].tolist()
        steps.append([sorted(of) for of in seen])
    assert steps[0] == steps[1] and sum(map(len, steps[0])) == 20


def test_pools_and_mixtures_take_the_selected_ones(tmp_path: Path) -> None:
    asked = Questions(tiny=True, batch_size=8)
    chosen = ids(asked)[:40]
    pool = QuestionPool(tiny=True, batch_size=8, items=24, selected=file_of(tmp_path, chosen))
    assert {*pool.fresh(0).key_N.tolist()} | {*pool.fresh(1).key_N.tolist()} <= {*chosen.tolist()}
    part = Emoji(tiny=True, batch_size=8, selected=file_of(tmp_path, ids(Emoji(tiny=True, batch_size=8))[:10]))
    with pytest.raises(ValueError, match=r"selected: ids are of a part's samples: parts.few.selected"):
        Mixture(parts={"few": part}, batch_size=8, selected="ids.parquet")
    mixed = Mixture(parts={"few": part, "all": Emoji(tiny=True, batch_size=8)}, batch_size=8)
    assert len(mixed.training_set()) == 10 + len(ids(Emoji(tiny=True, batch_size=8)))


def test_sources_keep_their_shares_and_row_groups_their_order(tmp_path: Path) -> None:
    given: dict[str, Any] = {"tiny": True, "batch_size": 12, "size": 24, "length": 64, "alpha": 0.0}
    whole = Frames(train={"still": 300, "stack": 48, "clip": 12}, **given)
    half = file_of(tmp_path, ids(whole)[::2])
    data = Frames(train={"still": 300, "stack": 48, "clip": 12}, selected=half, **given)
    taken = data.selected_set()
    slots = [slot for window in data.order(taken) for slot in window.slots if slot.real]
    kinds = whole.training_set().problems.kind_N[::2][[slot.sample for slot in slots]]
    assert np.abs(np.bincount(kinds, minlength=3) - 60).max() <= 2
    still = ids(whole)[whole.training_set().problems.kind_N == whole.every.index("still")]
    alone = Frames(selected=file_of(tmp_path, still), **given)
    with pytest.raises(ValueError, match="stack: no training sample; leave it out of kinds"):
        alone.order(alone.selected_set())

    columns = {"image": [jpeg()] * 60, "caption": [f"c {i}" for i in range(60)]}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet", row_group_size=5)
    source = Parquet(tmp_path / "a.parquet")
    source.memory = max(source._file(0).metadata.row_group(g).total_byte_size for g in range(12)) * 3
    fields = Fields(image=ImageField(size=8))
    own = UserData(source=source, holdout=0.0, fields=fields, batch_size=4, selected=file_of(tmp_path, range(0, 60, 2)))
    own.prepare_data()
    own.setup("fit")
    order = own.order(own.selected_set())
    assert isinstance(order, BlockShuffle) and len(order.block_N) == 30


def test_a_resumed_run_is_told_of_other_ids(tmp_path: Path) -> None:
    whole = ids(Emoji(tiny=True, batch_size=8))
    data = Emoji(tiny=True, batch_size=8, selected=file_of(tmp_path, whole[:20]))
    same = Emoji(tiny=True, batch_size=8, selected=file_of(tmp_path, whole[:20][::-1]))
    state = data.state_dict()["corpora"]
    require(same.known_corpora, state, DataPolicy())
    other = Emoji(tiny=True, batch_size=8, selected=file_of(tmp_path, whole[1:21]))
    with pytest.raises(ValueError, match=r"ids\.parquet.*ids"):
        require(other.known_corpora, state, DataPolicy())


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        (
            {"index": [1 << 40]},
            r"selected: .*ids.parquet: 1 of its 1 ids are of no sample of this training set, such as",
        ),
        ({"index": pa.array([], pa.int64())}, "it has no ids"),
        ({"index": ["a"]}, "no column 'index' of whole numbers"),
        ({"number": [1]}, "no column 'index' of whole numbers"),
        (None, "no such file"),
    ],
)
def test_what_is_wrong_with_a_file_is_named(columns: Any, says: str, tmp_path: Path) -> None:
    if columns is not None:
        pq.write_table(pa.table(columns), tmp_path / "ids.parquet")
    with pytest.raises(ValueError, match=says):
        Emoji(tiny=True, batch_size=8, selected=str(tmp_path / "ids.parquet")).selected_set()
    (tmp_path / "ids.parquet").write_text("no table")
    with pytest.raises(ValueError, match=r"selected: .*ids.parquet: no parquet file"):
        Emoji(tiny=True, batch_size=8, selected=str(tmp_path / "ids.parquet")).selected_set()
