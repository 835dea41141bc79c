"""A store that stops answering while a run reads from it: saved where that is exact, exit code 75, and gone on from."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from descant.callbacks import Resume
from descant.callbacks.health.heartbeat import MARK
from descant.datamodules.sources.object_store import StoreOutage
from descant.datamodules.sources.stream import Stream
from descant.modules.core.errors import AGAIN
from descant.run.ranks import Ranks
from tests.conftest import Result
from tests.datamodules.test_streams import noise
from tests.files import write_tar
from tests.rotation import quick
from tests.stores import Fault, Store, http_store

TRUST = ("--trust", "tests.datamodules.test_streams", "--trust", "network")
SHARDS, SIZE, STEPS = 3, 8, 9


@pytest.fixture
def store(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with http_store() as store:
        yield store


@pytest.fixture
def urls(store: Store, workplace: Path) -> list[str]:
    """Shards of a store, in the order in which the first epoch reads them."""
    for k in range(SHARDS):
        pictures = [(f"{i}.png", noise(k, i)) for i in range(SIZE)]
        store.put(f"{k}.tar", write_tar(workplace / f"{k}.tar", pictures).read_bytes())
    urls = [store.url(f"{k}.tar") for k in range(SHARDS)]
    return [url for url, *_ in Stream(urls, samples=8).share(0, 0, 0, 0, 1)]


def configured(urls: list[str], **data: Any) -> str:
    stream = {"urls": sorted(urls), "samples": SHARDS * SIZE, "buffer": 4, "attempts": 2, "timeout": 10}
    image = {"class_path": "ImageField", "init_args": {"field": "png", "size": 6}}
    given: dict[str, Any] = {"batch_size": 4, "num_workers": 0, "stream": {"class_path": "Stream", "init_args": stream}}
    given["fields"] = {"class_path": "Fields", "init_args": {"image": image}}
    trainer = {"accelerator": "cpu", "max_steps": STEPS, "limit_val_batches": 0, "logger": False}
    parts = {"model": {"class_path": "tests.datamodules.test_streams.Net"}, "trainer": trainer}
    Path("net.yaml").write_text(yaml.safe_dump(parts | {"data": {"class_path": "UserData", "init_args": given | data}}))
    return "net.yaml"


def weights(name: str) -> dict[str, torch.Tensor]:
    last = Path(f"runs/{name}/001/resume/step-{STEPS:07d}.ckpt")
    state: dict[str, torch.Tensor] = torch.load(last, weights_only=True)["state_dict"]
    return state


def gone(shard: str) -> Callable[[str, str, int, int], Fault]:
    return lambda method, path, at, number: 503 if shard.endswith(path) else None


@pytest.mark.parametrize("workers", quick([0, 1], 2))
def test_a_run_saves_ends_with_75_and_goes_on_to_the_bit(
    workers: int, store: Store, urls: list[str], cli: Callable[..., Result]
) -> None:
    fit = ("fit", "--config", configured(urls, num_workers=workers), *TRUST)
    assert cli(*fit, "--name", "whole").rc == 0
    store.fault = gone(urls[-1])
    result = cli(*fit, "--name", "cut")
    *_, line = result.err.splitlines()
    assert result.rc == AGAIN == 75, result.err
    steps = (SHARDS - 1) * SIZE // 4
    what = rf"descant: {re.escape(urls[-1])}: status 503, 2 attempts in \d s; damaged: skip .*; "
    assert re.fullmatch(rf"{what}--resume auto goes on from step-{steps:07d}\.ckpt", line), result.err
    store.fault = lambda *_: None
    assert cli(*fit, "--name", "cut", "--resume", "auto").rc == 0
    one, other = weights("whole"), weights("cut")
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_a_store_that_is_gone_before_the_first_step_is_waited_for_and_a_wrong_request_is_not(
    store: Store, urls: list[str], cli: Callable[..., Result]
) -> None:
    fit = ("fit", "--config", configured(urls), *TRUST)
    for status, code in ((403, 2), (404, 2), (503, AGAIN)):
        store.fault = lambda *_, status=status: status
        result = cli(*fit)
        assert result.rc == code and f"{sorted(urls)[0]}: status {status}" in result.err.splitlines()[-1], result.err
        assert not list(Path().glob("runs/*/*/resume/*"))


def test_a_stream_says_outage_whatever_is_done_about_shards_that_cannot_be_read(store: Store, urls: list[str]) -> None:
    skipped: list[str] = []

    def refuse(place: str, why: str) -> None:
        raise ValueError(f"{place}: {why}; refused")

    def read(skip: Callable[[str, str], None]) -> int:
        samples = Stream(sorted(urls), samples=8, attempts=1).read(0, 0, 0, 1, bool, skip)
        return sum(1 for _, sample in zip(range(2 * SHARDS * SIZE), samples, strict=False))

    store.fault = gone(urls[1])
    with pytest.raises(StoreOutage, match=rf"^{urls[1]}: status 503, 1 attempt; refused$"):
        read(refuse)
    assert read(lambda place, why: skipped.append(place)) == 2 * SHARDS * SIZE and set(skipped) == {urls[1]}
    store.fault = lambda *_: 503
    with pytest.raises(StoreOutage, match="the stream yields nothing"):
        read(lambda place, why: None)
    store.fault = lambda *_: 404
    with pytest.raises(ValueError, match="the stream yields nothing") as caught:
        read(lambda place, why: None)
    assert not isinstance(caught.value, StoreOutage)


def test_of_several_ranks_one_that_gets_no_data_ends_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(MARK, str(tmp_path / "mark"))
    trainer: Any = SimpleNamespace(world_size=2, global_step=3)
    net: Any = None
    Resume().on_exception(trainer, net, ValueError("no outage"))
    assert not (tmp_path / "mark").exists()
    Resume().on_exception(trainer, net, StoreOutage("status 503"))
    assert (tmp_path / "mark").exists()


@pytest.mark.parametrize(("code", "told"), [(75, 75), (2, 2), (-9, 2)])
def test_the_code_of_a_started_rank_is_that_of_the_command(tmp_path: Path, code: int, told: int) -> None:
    launcher: Any = SimpleNamespace(procs=[])
    (tmp_path / ".rank-7").write_text("url: status 503")
    assert Ranks(launcher, tmp_path)._cause(1, 7, code) == ("url: status 503", told)
