"""Training on some ids: the same samples, drawn as in the whole set, exact on ranks and on resume."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from descant.datamodules.changes import DataPolicy, require
from descant.datamodules.combined.mixture import Mixture
from descant.datamodules.combined.stages import StageData, StagedData
from descant.datamodules.corpora.emoji import Emoji
from descant.datamodules.corpora.frames import Frames
from descant.datamodules.fields.fields import Fields, ImageField
from descant.datamodules.sampling.resumable_sampler import BlockShuffle, Slot, Window
from descant.datamodules.selection.table_selection import TableSelection, newest_table
from descant.datamodules.sources.parquet import Parquet
from descant.datamodules.tasks.question_pool import QuestionPool
from descant.datamodules.tasks.questions import Questions
from descant.datamodules.user.user_data import UserData
from descant.modules.selection.selectors import RandomShare, ScoreFilter, Selector
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


def scored(folder: Path, data: Any) -> tuple[str, np.ndarray]:
    """A table of a training set with a random score, and its ids, the highest score first."""
    id_N = ids(data)
    score_N = np.random.default_rng(0).random(len(id_N))
    pq.write_table(pa.table({"index": id_N, "score": score_N}), folder / "pool.parquet")
    return str(folder / "pool.parquet"), id_N[np.argsort(-score_N)]


def test_a_run_selects_by_a_table_as_by_a_file_of_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table, ranked = scored(tmp_path, Emoji(tiny=True, batch_size=8))

    def of(seed: int | None = None, selector: Selector | None = None) -> Emoji:
        return Emoji(tiny=True, batch_size=8, selection=TableSelection(table, ["score"], selector, seed=seed))

    half = int(len(ranked) / 2 + 0.5)
    assert set(of().training_ids().tolist()) == set(ranked[:half].tolist())
    quarter = of(selector=ScoreFilter(0.25))
    file = Emoji(tiny=True, batch_size=8, selected=file_of(tmp_path, quarter.training_ids().numpy()))
    for batch, other in zip(quarter.train_dataloader(), file.train_dataloader(), strict=True):
        assert torch.equal(batch.index, other.index) and torch.equal(batch.inputs["text"], other.inputs["text"])
    require(file.known_corpora, quarter.state_dict()["corpora"], DataPolicy())
    with pytest.raises(ValueError, match=r"pool\.parquet.*ids"):  # resumed with another rule
        require(of().known_corpora, quarter.state_dict()["corpora"], DataPolicy())
    # random draws are the seed's: of the run by default, of the selection where it is given
    draws = [set(of(seed, RandomShare(0.5)).training_ids().tolist()) for seed in (1, 1, 2)]
    monkeypatch.setattr("descant.datamodules.selection.table_selection.global_seed", lambda: 2)
    assert draws[0] == draws[1] != draws[2] == set(of(None, RandomShare(0.5)).training_ids().tolist())
    staged = StagedData(stages={"all": StageData(Emoji(tiny=True, batch_size=8)), "some": StageData(quarter)})
    assert [len(stage.data.selected_set()) for stage in staged.stages.values()] == [
        len(ranked),
        len(file.training_ids()),
    ]
    ids_of = staged.state_dict()["parts"]
    assert "ids" in ids_of["some"]["corpora"] and ids_of["all"] == {}
    with pytest.raises(ValueError, match="selected, selection: ids of a file, or by the scores of a table; not both"):
        Emoji(tiny=True, batch_size=8, selected="ids.parquet", selection=TableSelection(table))
    with pytest.raises(ValueError, match=r"selection: ids are of a part's samples: parts.few.selection"):
        Mixture(parts={"few": quarter}, batch_size=8, selection=TableSelection(table))
    with pytest.raises(ValueError, match=r"pool\.parquet: no column 'z_image'; known: index, score"):
        Emoji(tiny=True, batch_size=8, selection=TableSelection(table)).selected_set()


def test_the_newest_table_of_a_run_is_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no embeddings of training samples"):
        newest_table(tmp_path)
    for number in (2, 1):
        folder = tmp_path / f"run/00{number}/predict-001"
        folder.mkdir(parents=True)
        pq.write_table(pa.table({"index": [number]}), folder / "embeddings-train.parquet")
        os.utime(folder / "embeddings-train.parquet", (number, number))
    newest = tmp_path / "run/002/predict-001/embeddings-train.parquet"
    assert newest_table(tmp_path / "run") == newest_table(tmp_path / "run/002") == newest == newest_table(newest)
    parts = tmp_path / "parts.parquet"  # as several ranks write it
    parts.mkdir()
    for rank in range(2):
        pq.write_table(pa.table({"index": [rank], "score": [float(rank)]}), parts / f"part-{rank:05d}.parquet")
    assert TableSelection(str(parts), ["score"]).ids().tolist() == [1]


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
