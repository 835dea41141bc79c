"""Shards in an object store on loopback beside the same shards as local files: one loader, the same workers.

The store runs in its own process: moto's S3 server if it and s3fs are installed (`make stores`), and an HTTP server
with ranges.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks import Row
from benchmarks.data import photographs, write_shards
from benchmarks.timing import ratio
from descant.datamodules.fields.fields import Fields, ImageField, TextField
from descant.datamodules.sources.stream import Stream
from descant.datamodules.user.user_data import UserData
from tests.stores import http_store, no_faults, s3_store, some, without_s3


def serve(scheme: str, paths: list[str], line: Connection) -> None:
    """Serve files until the other end closes; each number received sets the share of answers that fail."""
    with s3_store() if scheme == "s3" else http_store() as store:
        urls = [store.put(Path(path).name, Path(path).read_bytes()) for path in paths]
        line.send((urls, {name: value for name, value in os.environ.items() if name.startswith("AWS_")}))
        while True:
            try:
                share = line.recv()
            except EOFError:
                return
            store.fault = some(share) if share else no_faults
            line.send(len(store.injected))


@contextmanager
def serving(scheme: str, paths: list[str]) -> Iterator[tuple[list[str], Callable[[float], int]]]:
    """Serve files from a store; yield their addresses, and a function that sets the share of faults and counts them."""
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=serve, args=(scheme, paths, there), daemon=True)
    process.start()
    there.close()

    def faults(share: float) -> int:
        here.send(share)
        return int(here.recv())

    urls, environment = here.recv()
    with mock.patch.dict(os.environ, environment):
        yield urls, faults
    here.close()
    process.join(10)


def loader(urls: list[str], samples: int, workers: int, **options: Any) -> Callable[[], list[int]]:
    """Return a function that runs the next epoch at each call and returns the content keys of its samples in order."""
    fields = Fields(image=ImageField(size=224), text=TextField())
    stream = Stream(urls, samples=samples, **options)
    module = UserData(stream=stream, batch_size=64, num_workers=workers, fields=fields)
    batches, epoch = module.train_dataloader(), count()

    def run() -> list[int]:
        batches.sampler.set_epoch(next(epoch))  # type: ignore[attr-defined]
        return [key for batch in batches for key in batch.content_id.tolist()]

    return run


#: Schemes whose servers are installed.
SCHEMES = ("http", "s3") if without_s3 is None else ("http",)


def streams(number: int = 2048, workers: int = 2, pairs: int = 30, schemes: Sequence[str] = SCHEMES) -> Iterator[Row]:
    """Measure samples a second of a loader's epoch: JPEG of 256 px, decoded and cropped to 224, with captions.

    Objects are compared with local files, and each epoch downloads them again; then with 5 % of the answers failing
    (statuses 500 and 503, bodies that end early); then with copies on disk. The samples of every epoch must equal those
    of the local files.
    """
    with tempfile.TemporaryDirectory() as name, mock.patch.dict(os.environ, DESCANT_CACHE=f"{name}/cache"):
        some_of_them = photographs(min(number, 300))
        paths = write_shards(Path(name), [some_of_them[k % len(some_of_them)] for k in range(number)], shards=4)
        for scheme in schemes:
            with serving(scheme, paths) as (urls, faults):
                for what, share, cache in (("", 0.0, 0.0), ("_5%_errors", 0.05, 0.0), ("_kept", 0.0, 10.0)):
                    before = faults(share)
                    ours, local = loader(urls, number, workers, cache_gb=cache), loader(paths, number, workers)
                    for _ in range(2):
                        if ours() != local():
                            raise RuntimeError(f"{scheme}{what}: other samples than those of the local files")
                    result = ratio(ours, local, pairs, warmup=0)
                    if share and faults(0.0) == before:
                        raise RuntimeError(f"{scheme}{what}: no fault was injected")
                    row = f"data/{scheme}{what}_vs_files"
                    if share:
                        yield Row.informs(row, result.value, result.interval)
                    else:
                        yield Row.at_least(row, result.value, 0.8, result.interval)
