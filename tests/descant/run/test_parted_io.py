"""Checkpoints of several parts: written by each rank, killed anywhere, read by any number of ranks and as one file."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import pickle
import pickletools
import shutil
import signal
import threading
import time
from collections import Counter, OrderedDict
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate
from torch.distributed.tensor import Shard as Split
from torch.testing._internal.distributed.fake_pg import FakeStore

from descant.callbacks import EMA, Resume
from descant.modules.core.dtensor import local, reshard
from descant.modules.io import manifest, parts, plain_json
from descant.modules.io.manifest import SUFFIX, fault, fault_of_size, last_facts
from descant.modules.io.parts import Parted, Piece
from descant.modules.io.plain import load_plain, load_values, require_sums
from descant.modules.training_setup.compile_and_shard import Shard
from descant.run import parted_io
from descant.run.parted_io import PartedIO
from descant.run.sharded import Sharded
from descant.run.store import AtomicIO
from tests.descant.run.test_store import fit, names
from tests.quiet import quiet_trainer
from tests.ranks import run_ranks
from tests.toys import ToyData, ToyRecipe, ToyTower

STAGES = ("filled", "synced", "noted", "renamed")


def state(value: float, step: int = 1) -> dict[str, Any]:
    entry = {"safe": True, "log_step": step}
    return {"state_dict": {"w": torch.full((6, 5), value)}, "global_step": step, "epoch": 0, "descant": entry}


class Halves(PartedIO):
    """A rank that holds one half of the rows, as a DTensor of two ranks would; no process group is needed."""

    def __init__(self, rank: int, asynchronous: bool = False) -> None:
        super().__init__(asynchronous, patience=20)
        self.rank = rank

    def save(self, value: float, step: int, path: Path, folder: str) -> None:
        rows = slice(0, 2) if self.rank == 0 else slice(2, 6)

        def split(tree: Any, first: bool) -> Any:
            whole = tree["state_dict"]["w"]
            text, _, all_names = parts_split(tree, first)
            return text, {"state_dict.w": Piece(whole[rows], (6, 5), (rows.start, 0))}, all_names

        parts_split = parts.split
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(parts, "split", split)
            self.save_part(state(value, step), path, folder, self.rank, 2)


def save_two(path: Path, value: float, step: int) -> None:
    """Both ranks, one after the other: rank 0 is the last, and finds the other's part there."""
    one, two = Halves(0), Halves(1)
    folder = one.begin(path)
    two.save(value, step, path, folder)
    one.save(value, step, path, folder)


def value_of(path: Path) -> float:
    (value,) = AtomicIO().load_checkpoint(path)["state_dict"]["w"].unique().tolist()
    return float(value)


def part_of(path: Path, rank: int) -> Path:
    return parts.place_of(path, json.loads(path.read_bytes())["files"][rank]["name"])


# values -----------------------------------------------------------------------------------------------------------


def test_plain_values_come_back_as_they_were() -> None:
    values = {
        "floats": [0.1, -0.0, 1e-320, math.inf, -math.inf, 2**80, True, None],
        "tuple": (1, (2,), [3], "x"),
        3: {"a", 4},
        ("k", 1): b"\x00\xff",
        "torch": [torch.float8_e4m3fn, torch.device("cpu", 0), torch.Size([2, 3])],
        "$tensor": {"$dict": 1},
        "ordered": OrderedDict(b=1, a=2),
        "counted": Counter("aab"),
        "number": 1 - 2j,
    }
    text = json.dumps(plain_json.encode(values, lambda tensor, place: place))
    found = plain_json.decode(json.loads(text), str)
    assert found == values and repr(found) == repr(values)
    (nan,) = plain_json.decode(json.loads(json.dumps(plain_json.encode([math.nan], lambda *_: ""))), str)
    assert math.isnan(nan)


@pytest.mark.parametrize("value", [object(), Path("x"), Counter, lambda: 0, {"a": [{1, 2.5j, errno}]}])
def test_other_values_are_refused_when_they_are_saved(tmp_path: Path, value: object) -> None:
    with pytest.raises(ValueError, match=r"extra\.?.* is no tensor, number, text or container of them"):
        PartedIO().save_checkpoint({**state(1.0), "extra": value}, tmp_path / "a.ckpt")
    assert not list(tmp_path.glob("*.ckpt"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e5m2, torch.bool, torch.complex64, torch.uint16])
def test_every_dtype_comes_back_to_the_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    bits = torch.arange(256, dtype=torch.uint8).reshape(4, 64)
    tensor = (bits % 2).bool() if dtype == torch.bool else bits.view(dtype)
    content = {"state_dict": {"w": tensor, "t": tensor.T, "one": tensor[0, 0], "none": tensor[:0]}}
    io = PartedIO(asynchronous=False)
    io.save_checkpoint(content, tmp_path / "a.ckpt")
    found = io.load_checkpoint(tmp_path / "a.ckpt")["state_dict"]
    for name, value in content["state_dict"].items():
        assert found[name].dtype == dtype and found[name].shape == value.shape
        bits_of = [each.contiguous().reshape(-1).view(torch.uint8) for each in (found[name], value)]
        assert torch.equal(*bits_of), name
    theirs = load_file(part_of(tmp_path / "a.ckpt", 0))  # what safetensors itself reads
    assert torch.equal(theirs["state_dict.w"].view(torch.uint8), tensor.view(torch.uint8))


def test_tensors_that_share_memory_are_written_once_and_stay_one(tmp_path: Path) -> None:
    weight = torch.randn(64, 64)
    content = {"state_dict": OrderedDict(a=weight, b=weight.view(64, 64)), "current_model_state": {"a": weight}}
    content["state_dict"]._metadata = {"": {"version": 2}}  # type: ignore[attr-defined]
    PartedIO(asynchronous=False).save_checkpoint(content, tmp_path / "a.ckpt")
    found = load_plain(tmp_path / "a.ckpt")
    assert found["state_dict"]["a"] is found["state_dict"]["b"] is found["current_model_state"]["a"]
    assert found["state_dict"]._metadata == {"": {"version": 2}}  # which loading reads
    assert 64 * 64 * 4 < part_of(tmp_path / "a.ckpt", 0).stat().st_size < 2 * 64 * 64 * 4
    assert load_values(tmp_path / "a.ckpt")["state_dict"]["a"] == "state_dict.a"


def test_a_box_is_put_together_of_several_parts(tmp_path: Path) -> None:
    whole = torch.arange(7 * 5 * 3).reshape(7, 5, 3)
    cuts = [(slice(0, 3), slice(0, 5)), (slice(3, 7), slice(0, 2)), (slice(3, 7), slice(2, 5))]
    for n, cut in enumerate(cuts):
        with (tmp_path / f"{n}").open("wb") as stream:
            parts.write(stream, {"x": Piece(whole[cut], (7, 5, 3), (cut[0].start, cut[1].start, 0))})
    table = parts.PartTable(tmp_path / f"{n}" for n in range(3))
    table.require_whole(["x"])
    assert torch.equal(table.assemble("x"), whole)
    for box in ((0, 7, 1, 4, 0, 3), (2, 5, 0, 5, 1, 2), (4, 4, 0, 5, 0, 3), (3, 7, 2, 5, 0, 3)):
        a, b, c, d, e, f = box
        assert torch.equal(table.box("x", (a, c, e), (b - a, d - c, f - e)), whole[a:b, c:d, e:f]), box
    for files, why in (((0, 1), "x: the parts hold 69 of 105 numbers"), ((0, 1, 2, 2), "hold 141 of 105")):
        with pytest.raises(ValueError, match=why):
            parts.PartTable(tmp_path / f"{n}" for n in files).require_whole(["x"])
    for known_names, why in ((["x", "y"], "y is in no part"), ([], "x is in a part, and not in the index")):
        with pytest.raises(ValueError, match=why):
            table.require_whole(known_names)


def _pieces_of(rank: int, whole: Tensor) -> dict[str, Piece]:
    """What rank ``rank`` of 2 replicas x 2 shards writes of a tensor, and of one that is whole on every rank."""
    if dist.is_initialized():  # of a fit in this process, by a test before
        dist.destroy_process_group()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=4)
    try:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
        half = whole[:4] if rank % 2 == 0 else whole[4:]  # 7 rows over two ranks
        how: dict[str, Any] = {"run_check": False, "shape": whole.shape, "stride": whole.stride()}
        split = DTensor.from_local(half, mesh, [Replicate(), Split(0)], **how)
        _, pieces, names = parts.split({"split": split, "every": torch.ones(3)}, first=rank == 0)
        assert names == {"split", "every"}
        with pytest.raises(ValueError, match=r"sum: placed as P.*: only whole and evenly split tensors"):
            parts.split({"sum": DTensor.from_local(half, mesh, [Partial(), Replicate()], run_check=False)})
        return pieces
    finally:
        dist.destroy_process_group()


def test_of_replicas_one_writes(tmp_path: Path) -> None:
    whole = torch.arange(21.0).reshape(7, 3)
    by_rank = [_pieces_of(rank, whole) for rank in range(4)]
    assert [sorted(pieces) for pieces in by_rank] == [["every", "split"], ["split"], [], []]
    for rank, pieces in enumerate(by_rank):
        with (tmp_path / f"{rank}").open("wb") as stream:
            parts.write(stream, pieces)
    table = parts.PartTable(tmp_path / f"{rank}" for rank in range(4))
    table.require_whole(["split", "every"])
    assert (
        torch.equal(table.assemble("split"), whole)
        and table.box("split", (3, 0), (2, 3)).tolist() == whole[3:5].tolist()
    )


# files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asynchronous", [False, True])
def test_round_trip(tmp_path: Path, asynchronous: bool) -> None:
    io, path = PartedIO(asynchronous), tmp_path / "new" / "step-1.ckpt"
    for value in (3.0, 4.0):
        io.save_checkpoint(state(value, step=7), str(path))
        assert io.load_checkpoint(path)["global_step"] == 7 and value_of(path) == value
    assert {k: last_facts(path)[k] for k in ("step", "epoch", "safe", "log_step")} == {
        "step": 7,
        "epoch": 0,
        "safe": True,
        "log_step": 7,
    }
    (folder,) = path.parent.glob("*.parts-*")
    assert names(path.parent) == {path.name, path.name + SUFFIX, folder.name}
    AtomicIO().save_checkpoint(state(5.0), path)  # one file in the place of several
    assert names(path.parent) == {path.name, path.name + SUFFIX} and value_of(path) == 5.0
    io.save_checkpoint(state(6.0), path)
    io.remove_checkpoint(path)
    io.teardown()
    assert names(path.parent) == set()


def test_training_changes_nothing_of_a_save_in_the_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go = threading.Event()
    monkeypatch.setattr(manifest, "stage", lambda name: go.wait(20))
    io, content = PartedIO(), {**state(1.0), "seen": [1], "best": {"a": (0.5,)}}
    io.save_checkpoint(content, tmp_path / "a.ckpt")
    content["state_dict"]["w"].zero_()
    content["seen"].append(2)
    assert not (tmp_path / "a.ckpt").exists()
    go.set()
    copies = {name: copy.data_ptr() for name, copy in io._copies.items()}
    io.save_checkpoint(content, tmp_path / "b.ckpt")
    io.teardown()
    assert value_of(tmp_path / "a.ckpt") == 1.0 and value_of(tmp_path / "b.ckpt") == 0.0
    assert [load_plain(tmp_path / name)["seen"] for name in ("a.ckpt", "b.ckpt")] == [[1], [1, 2]]
    assert copies == {name: copy.data_ptr() for name, copy in io._copies.items()}  # the same memory


def test_nothing_of_a_checkpoint_is_a_pickle(tmp_path: Path) -> None:
    save_two(tmp_path / "a.ckpt", 1.0, 1)
    for file in tmp_path.rglob("*"):
        if file.is_file():
            with pytest.raises(Exception, match=r".") as error:  # of the parser, whatever it met
                list(pickletools.genops(file.read_bytes()))
            assert error.value.args
            with pytest.raises((pickle.UnpicklingError, ValueError, KeyError, EOFError, IndexError, TypeError)):
                pickle.loads(file.read_bytes())


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("damage", ["missing", "short", "bit", "other"])
def test_a_part_that_is_missing_or_altered_is_named_with_its_rank(tmp_path: Path, damage: str, rank: int) -> None:
    for step in (1, 2):
        save_two(tmp_path / f"step-{step}.ckpt", float(step), step)
    path = tmp_path / "step-2.ckpt"
    part = part_of(path, rank)
    whole = part.read_bytes()
    if damage == "missing":
        part.unlink()
    elif damage == "other":
        shutil.copy(part_of(tmp_path / "step-1.ckpt", rank), part)
    else:
        part.write_bytes(whole[:-8] if damage == "short" else whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:])
    short = f"{len(whole) - 8:,} of {len(whole):,} bytes"
    why = {"missing": "missing", "short": short}.get(damage, "not the bytes that were written")
    line = f"part of rank {rank} of 2, {part.parent.name}/{part.name}: {why}"
    assert fault(path) == line
    assert manifest.newest(tmp_path, "step-*.ckpt") == (tmp_path / "step-1.ckpt", [(path, line)])
    assert (fault_of_size(path) is None) == (damage in ("bit", "other"))
    with pytest.raises(ValueError, match=rf"part of rank {rank} of 2"):
        AtomicIO().load_checkpoint(path)
    shares = {manifest.fault_of_share(path, each, 2) for each in (0, 1)}
    assert shares == ({line} if damage in ("missing", "short") else {None, line})
    Path(f"{path}{SUFFIX}").unlink()  # then the index confirms its parts
    with pytest.raises(ValueError, match=rf"part of rank {rank} of 2"):
        require_sums(path)


def test_parts_of_a_checkpoint_whose_manifest_is_damaged_stay(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    save_two(path, 1.0, 1)
    Path(f"{path}{SUFFIX}").write_text("[")
    manifest.sweep(tmp_path)
    assert load_plain(path)["global_step"] == 1 and len(list(tmp_path.glob("*.parts-*"))) == 1
    path.unlink()  # without it they are of no checkpoint
    manifest.sweep(tmp_path)
    assert names(tmp_path) == set()


def test_an_index_that_is_no_index_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    save_two(path, 1.0, 1)
    whole = json.loads(path.read_bytes())
    leads_out = [{**file, "name": f"../{file['name']}"} for file in whole["files"]]
    for content in (
        {**whole, "descant_parts": 2},
        {**whole, "files": leads_out},
        {**whole, "files": [{"name": 3}]},
        {**whole, "content": {"$load": "os.system"}},
        {**whole, "content": {"$dtype": "load"}},
        {"descant_parts": 1},
    ):
        path.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=r"a\.ckpt: cannot be read as a checkpoint of several parts"):
            load_plain(path)
    path.write_text(json.dumps({**whole, "content": {"w": {"$tensor": "elsewhere"}}}))
    with pytest.raises(ValueError, match=r"a\.ckpt: elsewhere is in no part"):
        load_plain(path)
    path.write_text('{"descant_parts": ' + "[" * 100_000)
    with pytest.raises(ValueError, match=r"a\.ckpt: cannot be read"):
        load_plain(path)


# killed, late, and out of space -----------------------------------------------------------------------------------


def _killed(path: Path, rank: int, stage: str, nth: int) -> None:
    """Two ranks write a checkpoint; SIGKILL meets one when it is for the ``nth`` time in this stage."""
    one, two = Halves(0), Halves(1)
    folder = one.begin(path)
    if rank == 0:
        two.save(2.0, 2, path, folder)
    child = os.fork()
    if child == 0:
        seen = Counter[str]()

        def at(name: str) -> None:
            seen[name] += 1
            if name == stage and seen[name] == nth:
                os.kill(os.getpid(), signal.SIGKILL)

        manifest.stage = at
        (two if rank else one).save(2.0, 2, path, folder)
        os._exit(0)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1]), "no such stage"
    if rank == 1:
        one.patience = 0.02
        with contextlib.suppress(OSError):
            one.save(2.0, 2, path, folder)


#: (rank, stage, time): of its part on rank 1 and on rank 0, between parts and index, and of the index.
KILLS = [
    *((1, stage, 1) for stage in STAGES),
    *((0, stage, 1) for stage in STAGES),
    (0, "parts", 1),
    *((0, stage, 2) for stage in STAGES),
]


@pytest.mark.parametrize("name", ["step-1.ckpt", "step-2.ckpt"], ids=["over the old", "beside the old"])
@pytest.mark.parametrize(("rank", "stage", "nth"), KILLS)
def test_kill_at_every_stage(tmp_path: Path, rank: int, stage: str, nth: int, name: str) -> None:
    save_two(tmp_path / "step-1.ckpt", 1.0, 1)
    _killed(tmp_path / name, rank, stage, nth)
    new = (rank, stage) == (1, "renamed") or (rank, stage, nth) == (0, "renamed", 2)
    found, _ = manifest.newest(tmp_path, "step-*.ckpt")
    assert found is not None and value_of(found) == (2.0 if new else 1.0)
    assert found.name == (name if new else "step-1.ckpt")
    manifest.sweep(tmp_path)
    assert value_of(found) == (2.0 if new else 1.0)
    kept = {"step-1.ckpt", found.name}
    assert {n for n in names(tmp_path) if ".parts-" not in n} == {f for each in kept for f in (each, each + SUFFIX)}
    save_two(tmp_path / name, 3.0, 3)  # and another run goes on there, with parts of what it keeps alone
    assert value_of(tmp_path / name) == 3.0 and len(list(tmp_path.glob("*.parts-*"))) == len({"step-1.ckpt", name})


def test_a_rank_that_cannot_write_is_named_by_rank_0(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.ckpt"
    save_two(path, 1.0, 1)
    one, two = Halves(0), Halves(1)

    def stage(name: str) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    folder = one.begin(path)
    with monkeypatch.context() as patch:
        patch.setattr(manifest, "stage", stage)
        with pytest.raises(OSError, match=r"rank-00001\.safetensors: not written: No space left on device"):
            two.save(2.0, 2, path, folder)
    with pytest.raises(OSError, match=r"a\.ckpt: not written: rank 1 of 2: .*No space left on device"):
        one.save(2.0, 2, path, folder)
    assert value_of(path) == 1.0 and len(list(tmp_path.glob("*.parts-*"))) == 1


def test_a_rank_that_does_not_come_is_named(tmp_path: Path) -> None:
    one = Halves(0)
    one.patience = 0.1
    with pytest.raises(OSError, match=r"not written: part of rank 1 of 2, .*rank-00001\.safetensors does not come"):
        one.save(1.0, 1, tmp_path / "a.ckpt", one.begin(tmp_path / "a.ckpt"))
    assert names(tmp_path) == set()


def test_ranks_that_share_no_folder_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parted_io, "_SEEN", 0.1)
    with pytest.raises(ValueError, match="rank 1 does not see it, and rank 0 made it: ranks share no file system"):
        Halves(1).save(1.0, 1, tmp_path / "a.ckpt", "elsewhere")


def test_a_checkpoint_is_not_there_before_the_last_part(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    one, two = Halves(0, asynchronous=True), Halves(1)
    folder = one.begin(path)
    start = time.monotonic()
    one.save(1.0, 1, path, folder)  # returns while the other rank has not begun
    assert time.monotonic() - start < 10 and not path.exists()
    two.save(1.0, 1, path, folder)
    one.teardown()
    assert value_of(path) == 1.0


# under the trainer ------------------------------------------------------------------------------------------------


def test_a_run_of_one_process_ends_with_the_same_weights(tmp_path: Path) -> None:
    for name, io in (("one", AtomicIO()), ("parts", PartedIO())):
        fit(tmp_path / name, io, callbacks=[Resume(every=4, keep=2), EMA(0.7, warmup=False)])
    files = sorted((tmp_path / "one" / "resume").glob("*.ckpt"))
    assert [file.name for file in files] == ["step-0000008.ckpt", "step-0000012.ckpt"]
    for file in files:
        other = tmp_path / "parts" / "resume" / file.name
        assert fault(other) is None and manifest.last_facts(other)["step"] == manifest.last_facts(file)["step"]
        equal(load_plain(other), load_plain(file))


def equal(a: Any, b: Any, place: str = "") -> None:
    """Every value and every bit."""
    assert type(a) is type(b) or (isinstance(a, dict) and isinstance(b, dict)), place
    if isinstance(a, Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), place
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), place
        for key in a:
            if key not in ("dirpath", "best_model_path", "last_model_path"):
                equal(a[key], b[key], f"{place}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), place
        for n, (one, two) in enumerate(zip(a, b, strict=True)):
            equal(one, two, f"{place}.{n}")
    else:
        assert a == b or (a != a and b != b), place


class Again(L.Callback):
    """Saves what a run begins with, before its first step."""

    def on_train_start(self, trainer: L.Trainer, *_: Any) -> None:
        trainer.save_checkpoint(Path(trainer.default_root_dir) / "again.ckpt")


def _train(rank: int, folder: Path, store: str, begin: Path | None, world: int, epochs: int = 2) -> None:
    """A sharded toy with an average; a point every two steps."""
    torch.manual_seed(0)
    recipe = ToyRecipe(
        ToyTower(depth=2, width=5),  # 5 rows: the parts differ in size, and on 4 ranks one has none
        ToyTower(width=5),
        optimizer=lambda groups: torch.optim.AdamW(groups, lr=0.05),
        shard=Shard(),
    )
    callbacks = [Resume(every=2, keep=9), EMA(0.7, warmup=False), Again()]
    settings: dict[str, Any] = {"strategy": Sharded("gloo"), "devices": world, "max_epochs": epochs}
    settings["plugins"] = [PartedIO() if store == "parts" else AtomicIO()]
    trainer = quiet_trainer(folder, *callbacks, **settings)
    trainer.fit(recipe, datamodule=ToyData(), ckpt_path=begin, weights_only=True)


def point(folder: Path, step: int) -> Path:
    return folder / "resume" / f"step-{step:07d}.ckpt"


def content(path: Path) -> dict[str, Any]:
    """Of a point, without what says how it was saved: number of ranks, rows of each rank's log."""
    found = load_plain(path)
    for key in ("world", "logged", "safe"):
        found["descant"].pop(key, None)
    return found


STATES = ("state_dict", "current_model_state", "averaging_state", "optimizer_states")


def require_same_states(a: dict[str, Any], b: dict[str, Any]) -> None:
    for key in STATES:
        equal(a[key], b[key], key)


def _weights(rank: int, folder: Path, store: str, begin: Path | None, early: bool) -> dict[str, Tensor]:
    """Those of a sharded toy after an epoch; ``early``: with a checkpoint before its first step."""
    torch.manual_seed(0)
    make = partial(torch.optim.AdamW, lr=0.05)
    recipe = ToyRecipe(ToyTower(width=5), ToyTower(width=5), optimizer=make, shard=Shard())
    settings: dict[str, Any] = {"strategy": Sharded("gloo"), "devices": 1, "max_epochs": 1}
    settings["plugins"] = [PartedIO() if store == "parts" else AtomicIO()]
    trainer = quiet_trainer(folder, *([Again()] if early else []), **settings)
    trainer.fit(recipe, datamodule=ToyData(), ckpt_path=begin, weights_only=True)
    reshard(recipe)
    return {name: local(parameter.detach()) for name, parameter in recipe.named_parameters()}


@pytest.mark.ddp
@pytest.mark.parametrize("store", ["parts", "one"])
def test_a_checkpoint_before_the_first_step_changes_nothing(tmp_path: Path, store: str) -> None:
    """torch makes the state of an optimizer that it saves or loads by a step, which would count."""
    [plain] = run_ranks(1, _weights, tmp_path / "plain", store, None, False)
    [saved] = run_ranks(1, _weights, tmp_path / "saved", store, None, True)
    [resumed] = run_ranks(1, _weights, tmp_path / "resumed", store, tmp_path / "saved" / "again.ckpt", False)
    equal(saved, plain)
    equal(resumed, plain)


@pytest.mark.ddp
def test_saved_on_two_ranks_and_read_on_one(tmp_path: Path) -> None:
    run_ranks(2, _train, tmp_path / "two", "parts", None, 2, 1)
    saved = point(tmp_path / "two", 2)
    run_ranks(1, _train, tmp_path / "one", "parts", saved, 1, 1)
    require_same_states(content(tmp_path / "one" / "again.ckpt"), content(saved))
    assert last_facts(point(tmp_path / "one", 4))["step"] == 4


@pytest.mark.ddp
@pytest.mark.slow
def test_saved_on_four_ranks_and_read_on_any(tmp_path: Path) -> None:
    """In parts and as one file: the same; read by other ranks, of which each saves again in either format: the same."""
    for store in ("file", "parts"):
        run_ranks(4, _train, tmp_path / store, store, None, 4)
    for step in (2, 4, 6, 8):
        equal(content(point(tmp_path / "parts", step)), content(point(tmp_path / "file", step)))
    saved = content(point(tmp_path / "parts", 4))
    assert len(Parted(point(tmp_path / "parts", 4)).files) == 4 and saved.keys() >= set(STATES)
    moments = [one["exp_avg"] for one in saved["optimizer_states"][0]["state"].values()]
    assert len(moments) == 6 and all(float(moment.abs().sum()) > 0 for moment in moments)
    for world in (1, 2, 3, 4):
        for store in ("parts", "file") if world == 2 else ("parts",):
            again = tmp_path / f"{store}-{world}"
            run_ranks(world, _train, again, store, point(tmp_path / "parts", 4), world)
            require_same_states(content(again / "again.ckpt"), saved)
        if world == 4:  # on as many ranks the rest of the run is the same too
            equal(content(point(again, 8)), content(point(tmp_path / "parts", 8)))


def _refused(rank: int, folder: Path, begin: Path) -> str:
    with pytest.raises(ValueError) as error:  # its text is the result
        _train(rank, folder, "parts", begin, 2)
    return str(error.value)


@pytest.mark.ddp
@pytest.mark.slow
def test_every_rank_tells_of_the_part_that_is_altered(tmp_path: Path) -> None:
    run_ranks(2, _train, tmp_path / "two", "parts", None, 2, 1)
    path = point(tmp_path / "two", 2)
    part = part_of(path, 1)
    part.write_bytes(part.read_bytes()[:-1] + b"x")
    line = f"{path}: part of rank 1 of 2, {part.parent.name}/{part.name}: not the bytes that were written"
    assert run_ranks(2, _refused, tmp_path / "on", path) == [line, line]
