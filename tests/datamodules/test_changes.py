"""Data that changed between a stop and a resume: the change is named, and copies are accepted."""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from lightning.pytorch.trainer.states import TrainerFn

from descant.data.make import make
from descant.datamodules.changes import PARTS, DataPolicy, Property
from descant.datamodules.combined.mixture import Mixture
from descant.datamodules.corpora.emoji import Emoji
from descant.datamodules.corpora.emoji_pack import PACK
from descant.datamodules.fields.fields import Fields, ImageField, TextField
from descant.datamodules.sources.stream import Stream
from descant.datamodules.user.user_data import UserData
from descant.modules.io.checkpoints import follow_latest
from tests.files import COLOURS, jpeg, shapes


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DESCANT_CACHE", str(tmp_path / "cache"))


def rows(n: int = 12) -> list[dict[str, Any]]:
    return [{"image": jpeg(list(COLOURS)[i % 4]), "caption": f"number {i:02}"} for i in range(n)]


def parquet(folder: Path) -> str:
    pq.write_table(pa.Table.from_pylist(rows()), folder / "a.parquet", row_group_size=5)
    return str(folder / "a.parquet")


def lines(folder: Path) -> str:
    shapes(folder, 12)
    text = "".join(f'{{"image": "{i:03}.jpg", "caption": "number {i:02}"}}\n' for i in range(12))
    (folder / "captions.csv").unlink()
    (folder / "a.jsonl").write_text(text)
    return str(folder)


def beside(folder: Path) -> str:
    shapes(folder, 12)
    (folder / "captions.csv").unlink()
    for i in range(12):
        (folder / f"{i:03}.txt").write_text(f"number {i:02}")
    return str(folder)


def shards(folder: Path) -> str:
    make(shapes(folder / "from", 12), folder / "s", samples=4, holdout=0.0)
    return str(folder / "s")


MAKE: dict[str, Callable[[Path], str]] = {
    "csv": lambda folder: str(shapes(folder, 12)),
    "jsonl": lines,
    "beside": beside,
    "parquet": parquet,
    "shards": shards,
}


def own(path: str, **options: Any) -> UserData:
    data = UserData(batch_size=4, num_workers=0, path=path, **{"holdout": 0.0, "fields": fields(), **options})
    return placed(data)


def fields() -> Fields:
    return Fields(image=ImageField(size=8), text=TextField())


def placed(data: Any) -> Any:
    fit = SimpleNamespace(fn=TrainerFn.FITTING)
    place = {"global_rank": 0, "world_size": 1, "num_devices": 1, "default_root_dir": "/nowhere"}
    data.trainer = SimpleNamespace(**place, accumulate_grad_batches=1, state=fit)
    return data


def permit(data: Any, allow: bool = False, verify: bool = False) -> Any:
    """The data module, under a policy."""
    data.trainer.data_policy = DataPolicy(allow, verify)
    return data


def saved(data: Any) -> dict[str, Any]:
    """The state as a checkpoint gives it back."""
    data.training_set()
    file = io.BytesIO()
    torch.save(data.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def again(file: Path, change: Callable[[bytes], bytes]) -> None:
    """Other content, as an editor writes it: the time of change is another one."""
    before = file.stat().st_mtime_ns
    file.write_bytes(change(file.read_bytes()))
    os.utime(file, ns=(before + 10**9, before + 10**9))


def swap(a: Path, b: Path) -> None:
    other = a.with_suffix(".swap")
    for one, two in ((a, other), (b, a), (other, b)):
        one.rename(two)


def turned(file: Path, head: int) -> None:
    each = file.read_text().splitlines(keepends=True)
    file.write_text("".join([*each[:head], *reversed(each[head:])]))


CHANGES: list[tuple[str, Callable[[Path], None], str]] = [
    ("csv", lambda d: again(d / "captions.csv", lambda b: b.replace(b"r 7", b"r 8")), "other texts of caption"),
    ("csv", lambda d: turned(d / "captions.csv", 1), "the same samples in another order: 011.jpg, 010.jpg, "),
    ("csv", lambda d: again(d / "003.jpg", lambda b: jpeg("blue", (90, 90))), "other sizes: 003.jpg;"),
    ("csv", lambda d: again(d / "003.jpg", lambda b: b[:-9] + b"x" + b[-8:]), "other modification times: 003.jpg;"),
    ("csv", lambda d: swap(d / "003.jpg", d / "004.jpg"), "modification times|sizes"),
    ("csv", lambda d: (d / "005.jpg").unlink(), "other sizes: 005.jpg"),
    (
        "csv",
        lambda d: again(d / "captions.csv", lambda b: b"\n".join(b.splitlines()[:9]) + b"\n"),
        "12 samples then and 8 now, the first difference at",
    ),
    ("jsonl", lambda d: turned(d / "a.jsonl", 0), "the same samples in another order"),
    ("jsonl", lambda d: again(d / "a.jsonl", lambda b: b.replace(b"r 04", b"r 40")), "texts of caption: 004.jpg;"),
    ("beside", lambda d: again(d / "004.txt", lambda b: b.replace(b"04", b"40")), "other texts of caption: 004.jpg;"),
    (
        "parquet",
        lambda d: pq.write_table(pa.Table.from_pylist(rows()[::-1]), d / "a.parquet", row_group_size=5),
        r"texts of caption.*a\.parquet \(row group 0\)",
    ),
    (
        "parquet",
        lambda d: pq.write_table(
            pa.Table.from_pylist([r | {"caption": r["caption"].replace("06", "60")} for r in rows()]),
            d / "a.parquet",
            row_group_size=5,
        ),
        r"texts of caption: a\.parquet \(row group 1\)",
    ),
    ("shards", lambda d: again(d / "s/train-000001.tar", lambda b: b.replace(b"number", b"zahlen")), "texts: train"),
    ("shards", lambda d: again(d / "s/train-000001.tar", lambda b: b.replace(b"JFIF", b"JFIX")), "contents: train"),
]


@pytest.mark.parametrize(
    ("kind", "change", "why"), CHANGES, ids=[f"{kind}-{n}" for n, (kind, _, _) in enumerate(CHANGES)]
)
def test_a_change_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, change: Callable[[Path], None], why: str
) -> None:
    folder = tmp_path / "d"
    folder.mkdir()
    path = MAKE[kind](folder)
    state = saved(own(path))
    same = own(path)
    same.training_set()
    same.load_state_dict(state)
    change(folder)
    data = own(path)
    data.training_set()
    with pytest.raises(ValueError, match=f"the data has changed since the run was saved: .*{why}") as caught:
        data.load_state_dict(state)
    assert "\n" not in str(caught.value) and str(caught.value).endswith("--changed allow goes on with it")
    capsys.readouterr()
    permit(data, allow=True).load_state_dict(state)
    assert "the data has changed since the run was saved" in capsys.readouterr().err
    permit(data).trainer.state.fn = TrainerFn.TESTING
    data.load_state_dict(state)  # evaluated on whatever it likes


@pytest.mark.parametrize("kind", MAKE)
def test_a_copy_elsewhere_is_the_same_data(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "d"
    folder.mkdir()
    path = MAKE[kind](folder)
    state = saved(own(path))
    shutil.copytree(folder, tmp_path / "e", copy_function=shutil.copyfile)
    for n, file in enumerate(sorted((tmp_path / "e").rglob("*.*"))):
        os.utime(file, ns=(10**18 + n, 10**18 + n))
    moved = own(path.replace(str(folder), str(tmp_path / "e")))
    moved.training_set()
    moved.load_state_dict(state)
    reported = capsys.readouterr().err
    assert ("new modification times, as copies have" in reported) == (kind != "shards"), "a manifest tells the contents"


def test_verify_detects_a_changed_bit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = MAKE["csv"](tmp_path / "d")
    blind = saved(own(path))
    state = saved(permit(own(path), verify=True))
    file = tmp_path / "d" / "003.jpg"
    times = file.stat().st_mtime_ns
    file.write_bytes(file.read_bytes()[:-9] + b"x" + file.read_bytes()[-8:])
    os.utime(file, ns=(times, times))  # as a disk does that loses a bit
    data = permit(own(path), verify=True)
    with pytest.raises(ValueError, match=r"other contents: 003\.jpg;"):
        data.load_state_dict(state)
    data.load_state_dict(blind)
    assert "the run began without --verify" in capsys.readouterr().err
    own(path).load_state_dict(state)  # nobody asked, and nothing shows
    for each in (tmp_path / "d").iterdir():
        os.utime(each, ns=(1, 1))
    with pytest.raises(ValueError, match=r"other contents: 003\.jpg;"):
        own(path).load_state_dict(state)  # all times are new, and the contents known


def test_verify_compares_with_the_manifest(tmp_path: Path) -> None:
    path = Path(MAKE["shards"](tmp_path))
    shard = path / "train-000002.tar"
    data = shard.read_bytes()
    shard.write_bytes(data.replace(b"JFIF", b"JFIX", 1))
    own(str(path)).prepare_data()
    with pytest.raises(ValueError, match=r"train-000002\.tar: its content differs from its manifest \(SHA-256\)"):
        permit(own(str(path)), verify=True).prepare_data()
    urls = [str(file) for file in sorted(path.glob("*.tar"))]
    with pytest.raises(ValueError, match=r"train-000002\.tar: its content"):
        streamed = placed(UserData(stream=Stream(urls, samples=8), batch_size=4, fields=fields()))
        permit(streamed, verify=True).prepare_data()
    shard.write_bytes(data)
    permit(own(str(path)), verify=True).prepare_data()


def test_changed_shards_of_streams_and_mixtures(tmp_path: Path) -> None:
    path = Path(MAKE["shards"](tmp_path))
    urls = [str(file) for file in sorted(path.glob("*.tar"))]

    def stream() -> UserData:
        return placed(UserData(stream=Stream(urls, samples=8), batch_size=4, fields=fields()))

    def mixture() -> Mixture:
        return placed(Mixture({"a": own(str(path)), "b": own(MAKE["csv"](tmp_path / "csv"))}, batch_size=4))

    streamed, mixed = stream().state_dict(), mixture().state_dict()
    assert list(mixed["corpora"]) == ["a.train", "b.train"]
    stream().load_state_dict({**streamed, "cut": stream()._reader_settings(), "marks": {}})
    mixture().load_state_dict(mixed)
    again(path / "train-000001.tar", lambda b: b.replace(b"JFIF", b"JFIX"))
    for data, state in ((stream(), streamed), (mixture(), mixed)):
        with pytest.raises(ValueError, match=r"other contents: train-000001\.tar"):
            data.load_state_dict({**state, "cut": stream()._reader_settings(), "marks": {}})


def test_large_corpora_store_few_numbers_and_still_locate_a_change() -> None:
    names: list[str | None] = [f"{i:06}.jpg" for i in range(100_000)]
    state = Property(names, lambda n: str(names[n])).state()
    assert len(state["crc"]) <= PARTS and state["step"] == 25
    names[60_013] = None
    assert Property(names, str).differing(state) == [60_000]
    assert Property(names[:-1], str).differing(state)[-1] == 99_975
    assert Property([], str).differing(state) == [0] and Property([], str).differing(Property([], str).state()) == []


def test_a_changed_pack_is_reported(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(PACK, tmp_path / "pack"))
    state = saved(placed(Emoji(folder=str(PACK), size=16, batch_size=8)))
    placed(Emoji(folder=str(folder), size=16, batch_size=8)).load_state_dict(state)
    file = sorted(folder.rglob("*.parquet"))[0]
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match=rf"other contents: .*{file.name};"):
        placed(Emoji(folder=str(folder), size=16, batch_size=8)).load_state_dict(state)
    assert placed(Emoji(tiny=True, size=16, batch_size=8)).state_dict() == {}


# the command line ----------------------------------------------------------------------------------------------------


def command(cli: Callable[..., Any], *more: str) -> Any:
    """A fit of a few steps on shards, whose settings are the same every time."""
    model = ("--model.towers.image.widths", "[16]", "--model.towers.image.stem", "2", "--model.towers.text.vocab", "64")
    data: tuple[str, ...] = (
        "--data.path",
        "s",
        "--data.batch_size",
        "8",
        "--data.fields.image.size",
        "16",
        "--data.num_workers",
        "0",
    )
    data += ("--data.fields.text.tokenizer.buckets", "64")
    fit = ("fit", "--config", "contrastive/own", "--config", "on/cpu", "--name", "x", *data, *model)
    return cli(*fit, "--trainer.max_epochs", "2", "--trainer.check_val_every_n_epoch", "9", *more)


@pytest.mark.slow
def test_the_command_line_refuses_other_data_and_damage(cli: Callable[..., Any]) -> None:
    make(shapes(Path("photos"), 24), Path("s"), samples=8, holdout=0.1)
    assert command(cli, "--verify", "true").rc == 0
    assert command(cli, "--resume", "auto").rc == 0, "a run that has ended, of the same data"
    shard = Path("s/train-000001.tar")
    data = shard.read_bytes()
    shard.write_bytes(data.replace(b"number", b"zahlen"))
    result = command(cli, "--resume", "auto")
    line = result.err.splitlines()[-1]
    assert result.rc == 2 and "s/train-000000.tar and " in line and "the data has changed" in line
    assert line.endswith("--changed allow goes on with it")
    assert "differs from its manifest" in command(cli, "--resume", "auto", "--verify", "true").err.splitlines()[-1]
    assert command(cli, "--resume", "auto", "--changed", "allow").rc == 0
    shard.write_bytes(data[:5000])
    refused = command(cli)
    assert refused.rc == 2 and "of 8 samples are lost; damaged: skip reads the rest" in refused.refusal
    skipped = command(cli, "--data.damaged", "skip")
    assert skipped.rc == 0 and "samples are lost" in skipped.err
    assert "train-000001.tar" in follow_latest(Path("runs/x/latest/ledger.jsonl")).read_text()
    Path("o.yaml").write_text("data: {init_args: {outside: true}}\n")
    assert "--trust reads lets a configuration read files outside" in command(cli, "--config", "o.yaml").refusal
