"""Resume of streams: the same samples and batches, and no finished shard is opened again."""

from __future__ import annotations

import copy
import io
import os
import signal
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.trainer.states import TrainerFn
from PIL import Image
from torch import nn

from descant.callbacks import Resume
from descant.callbacks.checkpoints.resume import Stopped
from descant.datamodules.fields.fields import Fields, ImageField, TextField
from descant.datamodules.sources.stream import BEGINNING, Mark, Stream
from descant.datamodules.user.user_data import UserData
from descant.modules.core.batch import Batch
from descant.modules.core.objective import Term
from descant.modules.core.output import Output
from descant.recipes.base.recipe import Recipe
from tests.callbacks.checkpoints.test_resume import Act, equal, fit, point, state
from tests.files import write_tar
from tests.ranks import run_ranks
from tests.rotation import by_turns, quick

Position = tuple[int, int]
SHARDS = {"many": (8, 19, 1, 12, 16), "few": (13, 6), "one": (21,)}
#: Shards x (ranks, workers, batches read ahead).
PLACES = [(sizes, *of) for sizes in SHARDS for of in ((1, 0, 0), (1, 0, 1), (1, 2, 0), (2, 0, 0), (2, 2, 1))]


def noise(*seed: int) -> bytes:
    """A picture like no other, of which every crop is like no other."""
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (14, 12, 3), dtype=np.uint8)).save(out, "PNG")
    return out.getvalue()


def shards(folder: Path, sizes: tuple[int, ...]) -> list[str]:
    """Commands that note each opening in ``opened``. One picture is broken, one caption absent, one shard cut off."""
    folder.mkdir(exist_ok=True)
    urls = []
    for k, size in enumerate(sizes):
        members = [(f"{i}.{e}", d) for i in range(size) for e, d in (("png", noise(k, i)), ("txt", b"%d %d" % (k, i)))]
        if k == 1:
            members[6] = ("3.png", b"broken")
            del members[9]
        path = write_tar(folder / f"{k}.tar", members)
        if k == 3:
            path.write_bytes(path.read_bytes()[:-11000])
        urls.append(f"pipe:echo {k} >> {folder}/opened; cat {path}")
    return urls


class Place:
    """As much of a trainer as the loaders ask for."""

    def __init__(self, folder: Path, rank: int, world: int, accumulate: int = 1) -> None:
        self.global_rank, self.world_size, self.num_devices = rank, world, world
        self.accumulate_grad_batches, self.training = accumulate, True
        self.default_root_dir, self.state = str(folder), SimpleNamespace(fn=TrainerFn.FITTING)


def own(urls: list[str], workers: int = 0, samples: int = 48, **options: Any) -> UserData:
    fields = Fields(image=ImageField(field="png", size=6), text=TextField("txt"))
    stream = Stream(urls, samples=samples, buffer=5, allow_pipes=True)
    return UserData(
        **{"batch_size": 8, "num_workers": workers, "stream": stream, "fields": fields, "damaged": "skip", **options}
    )


def on_rank(folder: Path, urls: list[str], rank: int, world: int, workers: int, accumulate: int = 1) -> UserData:
    data = own(urls, workers, drop={"text": 0.3})
    data.trainer = Place(folder / "run", rank, world, accumulate)  # type: ignore[assignment]
    return data


def saved(states: list[dict[str, Any]]) -> dict[str, Any]:
    """What the ranks gather, as a file gives it back."""
    whole = {"cut": states[0]["cut"], "marks": {k: rows for state in states for k, rows in state["marks"].items()}}
    file = io.BytesIO()
    torch.save(whole, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def read(
    data: UserData, start: Position = (0, 0), epochs: int = 2, ahead: int = 0
) -> Iterator[tuple[Position, Batch, dict[str, Any]]]:
    """Position, batch, and what is saved there: before the batch is trained on, and when ``ahead`` more are there."""
    data.position = start
    loader: Any = data.train_dataloader()
    for epoch in range(start[0], epochs):
        loader.sampler.set_epoch(epoch)
        waiting: list[tuple[Position, Batch]] = []
        numbers = range(start[1] if epoch == start[0] else 0, len(loader))
        for number, batch in zip(numbers, loader, strict=True):
            waiting.append(((epoch, number), batch))
            if len(waiting) > ahead:
                yield *waiting.pop(0), copy.deepcopy(data.state_dict())
        for rest in waiting:
            yield *rest, copy.deepcopy(data.state_dict())


def same(a: Batch, b: Batch) -> bool:
    pairs = [(getattr(a, name), getattr(b, name)) for name in ("index", "rng_seed", "content_id")]
    for name in ("inputs", "present", "step"):
        one, two = getattr(a, name), getattr(b, name)
        assert set(one) == set(two) == {"image", "text"}
        pairs += [(one[m], two[m]) for m in one]
    return all(torch.equal(x, y) for x, y in pairs)


def openings(folder: Path) -> list[int]:
    """Which shards were opened since this was last asked."""
    file = folder / "opened"
    found = [int(line) for line in file.read_text().split()] if file.exists() else []
    file.unlink(missing_ok=True)
    return found


def to_open(data: UserData, rows: list[Any], cut: Position, readers: int) -> tuple[int, list[Mark]]:
    """How many shards a rank's readers have to open from a cut on, and where they stand there."""
    stood: dict[tuple[int, int], Mark] = {}
    ended: dict[tuple[int, int], Mark] = {}
    for at, batch, _ in rows:
        reader, epoch, _, *mark = batch.at
        (stood if at < cut else ended)[epoch, reader] = Mark(*mark)
    count, begins = 0, [stood.get(key, BEGINNING) for key in ended]
    for (_, reader), begin, end in zip(ended, begins, ended.values(), strict=True):
        assert data.stream is not None and not end.whole
        share = len(data.stream.share(0, 0, 0, reader, readers))
        count += (end.turn - begin.turn) * share + end.shard + (end.taken > 0) - begin.shard
    return count, begins


CUTS = [(0, 1), (0, 2), (0, 3), (0, 5), (1, 0), (1, 1), (1, 4)]


@pytest.mark.parametrize(("sizes", "world", "workers", "ahead"), quick(PLACES, 3))
def test_resume_at_any_place_equals_an_uninterrupted_stream(
    tmp_path: Path, sizes: str, world: int, workers: int, ahead: int
) -> None:
    urls, readers = shards(tmp_path, SHARDS[sizes]), world * max(workers, 1)
    whole = [list(read(on_rank(tmp_path, urls, r, world, workers), ahead=ahead)) for r in range(world)]
    assert all(len(rows) == 12 for rows in whole)
    places: list[Mark] = []
    # processes take time: with workers each place is tried with one of the sizes, and with none of them with all
    cuts = CUTS[list(SHARDS).index(sizes) :: len(SHARDS)] if workers else CUTS
    for cut in cuts:
        states = saved([next(state for at, _, state in rows if at == cut) for rows in whole])
        openings(tmp_path)
        expected = 0
        for rank, rows in enumerate(whole):
            data = on_rank(tmp_path, urls, rank, world, workers)
            data.load_state_dict(states)
            rest, first = list(read(data, cut)), [row for row in rows if row[0] >= cut]
            assert [at for at, _, _ in rest] == [at for at, _, _ in first]
            assert all(same(a, b) for (_, a, _), (_, b, _) in zip(rest, first, strict=True)), cut
            count, begins = to_open(data, rows, cut, readers)
            expected, places = expected + count, places + begins
        assert len(openings(tmp_path)) == expected, "the shard that a reader stands in, and those that follow"
    assert any(mark.taken for mark in places), "within a shard"
    assert any(mark.shard and not mark.taken for mark in places) or sizes != "many", "between two shards"


@pytest.mark.parametrize("workers", [0, 2])
def test_several_interruptions_before_all_workers_reported(tmp_path: Path, workers: int) -> None:
    urls = shards(tmp_path, SHARDS["many"])

    def ranks() -> list[UserData]:
        return [on_rank(tmp_path, urls, rank, 2, workers, accumulate=2) for rank in (0, 1)]

    whole = [list(read(data)) for data in ranks()]
    assert len(whole[0]) == 24, "micro-batches"
    states = saved([rows[6][2] for rows in whole])
    for here, then in pairwise((6, 7, 8, 15) if workers else (6, 7, 8, 10, 15, 23)):
        rest = []
        for data, rows in zip(ranks(), whole, strict=True):
            data.load_state_dict(states)
            rest.append(list(read(data, rows[here][0])))
            assert all(same(a, b) for (_, a, _), (_, b, _) in zip(rest[-1], rows[here:], strict=True))
        states = saved([rows[then - here][2] for rows in rest])


# what is refused -------------------------------------------------------------------------------------------------


def test_other_ranks_workers_or_shards_raise_one_line(tmp_path: Path) -> None:
    urls = shards(tmp_path, SHARDS["many"])
    data = on_rank(tmp_path, urls, 0, 2, 2)
    next(read(data, ahead=1))
    states = saved([data.state_dict()])
    data.load_state_dict(states)
    other = own(urls, 2)
    other.trainer, other.stream.buffer = data.trainer, 9  # type: ignore[union-attr]
    for wrong, line in [
        (on_rank(tmp_path, urls, 0, 1, 2), "ranks 2, and here it is 1: the samples would differ; set it to 2 again"),
        (on_rank(tmp_path, urls, 0, 4, 2), "ranks 2, and here it is 4"),
        (on_rank(tmp_path, urls, 0, 2, 0), "num_workers 2, and here it is 1"),
        (on_rank(tmp_path, urls, 0, 2, 3), "num_workers 2, and here it is 3"),
        (on_rank(tmp_path, urls, 0, 2, 2, accumulate=2), "accumulate_grad_batches 1, and here it is 2"),
        (on_rank(tmp_path, urls[:4], 0, 2, 2), "shards 5, and here it is 4"),
        (other, "buffer 5, and here it is 9"),
    ]:
        with pytest.raises(ValueError, match=line) as caught:
            wrong.load_state_dict(states)
        assert "\n" not in str(caught.value)
        wrong.trainer.state.fn = TrainerFn.VALIDATING  # type: ignore[union-attr]
        wrong.load_state_dict(states)  # evaluated on other ranks
        wrong.trainer.state.fn = TrainerFn.FITTING  # type: ignore[union-attr]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_missing_resume_mark_raises_one_line(tmp_path: Path, workers: int) -> None:
    data = on_rank(tmp_path, shards(tmp_path, SHARDS["many"]), 0, 1, workers)
    with pytest.raises(ValueError, match=r"the position of reader . after batch . of epoch 0 is unknown") as caught:
        list(read(data, (0, 3)))
    assert "\n" not in str(caught.value)


# real runs -------------------------------------------------------------------------------------------------------


class Net(Recipe):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(optimizer=lambda groups: torch.optim.AdamW(groups, lr=1e-2), **kwargs)
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(108, 4), nn.Tanh(), nn.Dropout(0.3), nn.Linear(4, 1))

    def forward(self, batch: Batch) -> Output:
        image_BD = batch.inputs["image"].float()
        value_B = (self.net(image_BD)[:, 0] - (batch.index % 97) / 97).square()
        return Output({"fit": Term(value_B, valid=batch.present["image"], given=("image",))})


OPTIONS: dict[str, Any] = {"max_epochs": 3, "limit_val_batches": 0}


@pytest.mark.parametrize(
    ("workers", "accumulate", "steps"), quick([(0, 1, (1, 3, 6, 10, 17)), (2, 1, (3, 10)), (2, 2, (1, 6))], 3)
)
def test_a_resumed_run_is_bit_identical(tmp_path: Path, workers: int, accumulate: int, steps: tuple[int, ...]) -> None:
    urls, whole = shards(tmp_path, SHARDS["many"]), Act()
    options: dict[str, Any] = {**OPTIONS, "accumulate_grad_batches": accumulate}
    _, net = fit(tmp_path / "a", Resume(every=1, keep=100), whole, net=Net(), data=own(urls, workers), **options)
    assert len(whole.seen) == 18 * accumulate
    for step in steps:
        rest, at = Act(), point(tmp_path / "a", step)
        _, again = fit(tmp_path / "b", Resume(every=1), rest, net=Net(), data=own(urls, workers), path=at, **options)
        assert equal(state(net), state(again))
        assert rest.seen == whole.seen[step * accumulate :] and rest.losses == whole.losses[step * accumulate :]


def test_a_run_that_is_stopped_twice_is_bit_identical(tmp_path: Path) -> None:
    urls, whole, parts, path = shards(tmp_path, SHARDS["many"]), Act(), [], None
    _, net = fit(tmp_path / "a", Resume(), whole, net=Net(), data=own(urls, 2), **OPTIONS)
    for batches in (4, 3):
        parts.append(Act("on_before_backward", batches, lambda trainer: os.kill(os.getpid(), signal.SIGUSR1)))
        with pytest.raises(Stopped) as stopped:
            fit(tmp_path / "b", Resume(), parts[-1], net=Net(), data=own(urls, 2), path=path, **OPTIONS)
        path = stopped.value.path
    parts.append(Act())
    _, again = fit(tmp_path / "b", Resume(), parts[-1], net=Net(), data=own(urls, 2), path=path, **OPTIONS)
    assert [row for act in parts for row in act.seen] == whole.seen and [len(act.seen) for act in parts] == [4, 3, 11]
    assert equal(state(net), state(again))


def test_a_run_on_other_workers_is_refused(tmp_path: Path) -> None:
    urls = shards(tmp_path, SHARDS["many"])
    fit(tmp_path, Resume(every=4, keep=9), net=Net(), data=own(urls, 2), **OPTIONS)
    for step in (4, 12):
        with pytest.raises(ValueError, match="num_workers 2, and here it is 3"):
            fit(tmp_path, Resume(), net=Net(), data=own(urls, 3), path=point(tmp_path, step), **OPTIONS)


def test_one_worker_reads_the_same_as_none(tmp_path: Path) -> None:
    urls, whole, rest = shards(tmp_path, SHARDS["many"]), Act(), Act()
    fit(tmp_path / "a", Resume(every=4, keep=9), whole, net=Net(), data=own(urls), **OPTIONS)
    fit(tmp_path / "b", Resume(), rest, net=Net(), data=own(urls, 1), path=point(tmp_path / "a", 8), **OPTIONS)
    assert rest.seen == whole.seen[8:] and rest.losses == whole.losses[8:]


def _on_rank(rank: int, folder: Path, urls: list[str], world: int, path: Path | None) -> dict[str, Any]:
    act, net, refused = Act(), Net(), ""
    options: dict[str, Any] = {**OPTIONS, "max_epochs": 2, "strategy": "ddp", "devices": world}
    try:
        fit(folder, Resume(every=1, keep=100), act, net=net, data=own(urls, 2), path=path, **options)
    except ValueError as error:
        refused = str(error)
    return {"seen": act.seen, "losses": act.losses, "state": state(net), "refused": refused}


@by_turns(2, 4)
@pytest.mark.ddp
@pytest.mark.slow
def test_two_ranks_resume_and_one_is_refused(tmp_path: Path) -> None:
    urls = shards(tmp_path, SHARDS["many"])
    whole = run_ranks(2, _on_rank, tmp_path / "a", urls, 2, None)
    rest = run_ranks(2, _on_rank, tmp_path / "b", urls, 2, point(tmp_path / "a", 2))
    # once more, from what the resumed ranks had gathered of each other after one step
    last = run_ranks(2, _on_rank, tmp_path / "c", urls, 2, point(tmp_path / "b", 3))
    for first, second, third in zip(whole, rest, last, strict=True):
        assert second["seen"] == first["seen"][2:] and third["seen"] == first["seen"][3:]
        assert second["losses"] == first["losses"][2:] and equal(second["state"], first["state"])
        assert equal(third["state"], first["state"])
    (alone,) = run_ranks(1, _on_rank, tmp_path / "d", urls, 1, point(tmp_path / "a", 5))
    assert "ranks 2, and here it is 1" in alone["refused"] and alone["seen"] == []


def test_the_command_line_refuses_in_one_line(cli: Any) -> None:
    shards(Path("s"), (30, 30))
    Path("stream.yaml").write_text(
        "# A stream.\ndata:\n  class_path: UserData\n  init_args:\n    batch_size: 8\n    num_workers: 0\n"
        '    stream: {class_path: Stream, init_args: {urls: "s/{0..1}.tar", samples: 40}}\n'
        "    fields:\n      class_path: Fields\n      init_args:\n"
        "        image: {class_path: ImageField, init_args: {field: png, size: 16}}\n"
        "        text: {class_path: TextField, init_args: {captions: txt}}\n"
    )
    fit: tuple[str, ...] = ("fit", "--config", "contrastive/own", "--config", "stream.yaml", "--config", "on/cpu")
    fit += ("--test", "false", "--model.towers.image.widths", "[8]", "--trainer.max_epochs", "-1", "--name", "x")
    assert cli(*fit, "--trainer.max_steps", "1").rc == 0
    more = (*fit, "--trainer.max_steps", "2", "--resume", "auto", "--changed", "allow")
    refused = cli(*more, "--data.num_workers", "2")
    assert refused.rc == 2 and "num_workers 1, and here it is 2: the samples would differ" in refused.err
