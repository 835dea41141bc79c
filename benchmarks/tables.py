"""A large CSV beside images: time until the first batch, and memory."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image
from pyarrow import csv

from benchmarks import Row

#: Code of a user's process, from the first line that names the data; reads its arguments, prints numbers.
_FIRST_BATCH = """
import json, resource, sys, time
from descant.datamodules.fields.fields import Fields, ImageField
from descant.datamodules.fields.tables import TableField
from descant.datamodules.user.user_data import UserData
start = time.perf_counter()
folder, columns = sys.argv[1], json.loads(sys.argv[2])
fields = Fields(image=ImageField(size=32), table=TableField(columns))
data = UserData(path=folder, table=folder + "/data.csv", fields=fields, batch_size=64, num_workers=0)
batch = next(iter(data.train_dataloader()))
assert batch.inputs["table"].shape == (64, len(columns)) and bool(batch.present["table"].any())
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
print(json.dumps([time.perf_counter() - start, peak / 1e9]))
"""


def write(folder: Path, rows: int, numbers: int, categories: int, images: int) -> list[str]:
    """Write ``data.csv`` with a column of file names, and some of the images; a tenth of the other cells is missing."""
    picture = io.BytesIO()
    Image.new("RGB", (64, 64), (200, 40, 40)).save(picture, "JPEG")
    for k in range(images):
        (folder / f"{k:07}.jpg").write_bytes(picture.getvalue())
    rng = np.random.default_rng(0)
    words = np.array([f"value-{k}" for k in range(20)])
    columns = {"file": pa.array([f"{k:07}.jpg" for k in range(rows)])}
    columns |= {f"x{k}": pa.array(rng.normal(size=rows).round(4), mask=rng.random(rows) < 0.1) for k in range(numbers)}
    for k in range(categories):
        columns[f"c{k}"] = pa.array(words[rng.integers(0, 20, rows)], mask=rng.random(rows) < 0.1)
    csv.write_csv(pa.table(columns), folder / "data.csv")
    return [name for name in columns if name != "file"]


def first_batch(rows: int = 1_000_000, numbers: int = 30, categories: int = 19, images: int = 2000) -> Iterator[Row]:
    """Load a CSV of a million rows and fifty columns in a folder of images: seconds until the first batch, and GB.

    Both are of a separate process, from :class:`UserData` on: indexing, reading, joining, statistics and categories of
    the training split, and one batch of 64. The memory is the peak of the process, with all its libraries.
    """
    with tempfile.TemporaryDirectory() as name:
        columns = write(Path(name), rows, numbers, categories, images)
        command = [sys.executable, "-c", _FIRST_BATCH, name, json.dumps(columns)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds, gigabytes = json.loads(done.stdout.splitlines()[-1])
    yield Row.at_most("data/table_first_batch_seconds", seconds, 5.0)
    yield Row.at_most("data/table_gigabytes", gigabytes, 1.5)
