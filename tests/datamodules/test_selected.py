"""Training on some ids: the same samples, drawn as in the whole set, exact on ranks and on resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from descant.datamodules.changes import DataPolicy
from descant.datamodules.corpora.emoji import Emoji
from descant.datamodules.mixture import Mixture
from descant.datamodules.tasks.question_pool import QuestionPool
from descant.datamodules.tasks.questions import Questions


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
    from descant.datamodules.resumable_sampler import Slot, Window

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
    mixed = Mixture(parts={"few": part, "all": Emoji(tiny=True, batch_size=8)}, batch_size=8)
    assert len(mixed.training_set()) == 10 + len(ids(Emoji(tiny=True, batch_size=8)))


def test_a_resumed_run_is_told_of_other_ids(tmp_path: Path) -> None:
    whole = ids(Emoji(tiny=True, batch_size=8))
    data = Emoji(tiny=True, batch_size=8, selected=file_of(tmp_path, whole[:20]))
    same = Emoji(tiny=True, batch_size=8, selected=file_of(tmp_path, whole[:20][::-1]))
    from descant.datamodules.changes import require

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
