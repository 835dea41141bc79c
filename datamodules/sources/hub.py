"""Objects of Hugging Face's `datasets`: rows of a Dataset, and an IterableDataset as a stream; for Python, not YAML.

Letters: N samples.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from datetime import date, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from descant.datamodules.changes import Corpus, Property, corpus_of
from descant.datamodules.sources.arrays import array_bytes
from descant.datamodules.sources.arrow_rows import ArrowRows
from descant.datamodules.sources.base import LIMIT, PARTS, Raw, Source, nearest, parse_split, read_file, too_large
from descant.datamodules.sources.columnar import text_in
from descant.datamodules.sources.features import READ, Feature, names_of, type_of, within
from descant.datamodules.sources.stream import BEGINNING, Sample, Stream

#: A stream is refused if this many samples in a row, from the beginning of a pass, lack fields.
_NONE = 10_000
#: Steps of an IterableDataset whose ``state_dict`` is exact. With other steps (``state_dict`` loses a shuffle buffer,
#: and a batched map of arrow tables may skip a batch), a resumed pass is read from its beginning.
_EXACT = (
    *("Arrow", "Cycling", "ExamplesIterable", "Filtered", "Formatted", "Horizontally", "Mapped", "Rebatched", "Repeat"),
    *("Select", "Skip", "Step", "Take", "Vertically"),
)


def is_hub(value: object) -> bool:
    """Whether an object is one of `datasets`, which is not imported for that."""
    return any(of.__module__.partition(".")[0] == "datasets" for of in type(value).__mro__)


def hub_sources(value: Any) -> dict[str, Source]:
    """Open a Dataset under the key ``""``, or the splits ``train``, ``val`` and ``test`` of a DatasetDict."""
    if not isinstance(value, dict):
        return {"": HubDataset(value)}
    sources: dict[str, Source] = {}
    for name, dataset in value.items():
        split = parse_split(str(name))
        if split in sources:
            raise ValueError(f"the DatasetDict has two splits of {split}, {name!r} the second: give one by source")
        sources |= {split: HubDataset(dataset, str(name))} if split is not None else {}
    if not sources:
        raise ValueError(f"none of the splits ({', '.join(map(str, value))}) is train, val or test: give one by itself")
    return sources


class HubDataset(ArrowRows):
    """A ``datasets.Dataset``, also after ``select``, ``shuffle``, ``filter`` and ``map``; fields as in Arrow.

    Values are read as they are stored: a format (``with_format``) changes nothing, and a ``set_transform`` is refused,
    since its values are decoded.

    Args:
        dataset: the object.
        label: beginning of the names of its samples, ``row/17``.

    >>> from datasets import Dataset
    >>> HubDataset(Dataset.from_dict({"caption": ["a cat", "a dog"]}).select([1])).texts("caption")
    ['a dog']
    """

    on_disk = False

    def __init__(self, dataset: Any, label: str = "row") -> None:
        if type(dataset).__name__ != "Dataset" or not is_hub(dataset):
            stream = type(dataset).__name__ == "IterableDataset"
            hint = "stream=HubStream(dataset, samples=N)" if stream else "a datasets.Dataset is wanted"
            raise ValueError(f"source: an object of {type(dataset).__name__}: {hint}")
        if dataset.format["type"] == "custom":
            raise ValueError("source: the dataset has a transform, and stored values are read: use map, or none")
        self.dataset = dataset
        self._begin(dataset.data.table.schema, dataset.features.to_dict(), outside=True)
        self.paths = [Path(f"datasets ({dataset.split or label})")]  # no file: a name for messages
        self._label = label
        order = dataset._indices
        self._plan([0] * len(self.batches))
        self._index = None if order is None else np.asarray(order.column(0)).astype(np.int64)
        if len(self) != len(dataset):
            raise ValueError(f"source: {len(self):,} rows of {len(dataset):,}: this release of datasets is unknown")

    def _load(self) -> list[pa.RecordBatch]:
        return list(self.dataset.data.table.to_batches())

    def _corpus_files(self) -> list[Path]:
        files = [Path(file["filename"]) for file in self.dataset.cache_files]
        return [file for file in files if file.is_file()]


class HubStream(Stream):
    """A ``datasets.IterableDataset``, read in its own order, as it shuffles, maps and filters itself.

    R readers (ranks times workers) share it as ``split_dataset_by_node`` does: whole shards if R divides their number,
    otherwise every R-th sample. Every epoch, and every pass after the first, is another ``set_epoch`` of it. It resumes
    by its own ``state_dict``. If that is not exact, because there is a shuffle buffer, a resumed pass is read again
    from its beginning, and the samples before the resume point are passed over without being decoded.

    Args:
        dataset: the object. An earlier map over it gets decoded values, unless ``decode(False)`` comes first.
        samples: samples of one epoch, over all ranks.

    >>> from datasets import Dataset
    >>> stream = HubStream(Dataset.from_dict({"caption": ["a cat", "a dog"]}).to_iterable_dataset(), samples=2)
    >>> samples = stream.read(0, 0, 0, 1, wanted=lambda raw: "caption" in raw, skip=print)
    >>> [next(samples).raw["caption"] for _ in range(3)]  # a second pass begins
    ['a cat', 'a dog', 'a cat']
    """

    def __init__(self, dataset: Any, samples: int) -> None:
        if type(dataset).__name__ != "IterableDataset" or not is_hub(dataset):
            raise ValueError(f"stream: an object of {type(dataset).__name__}: a datasets.IterableDataset is wanted")
        if samples < 1:
            raise ValueError(f"samples {samples} of an epoch: 1 is the least")
        self.samples = samples
        self.urls, self.buffer = ["datasets"], 0
        self.dataset = (dataset if dataset.features is None else dataset.decode(False)).with_format(None)
        self.features: Mapping[str, Any] = dataset.features.to_dict() if dataset.features is not None else {}
        known = {name: type_of(feature) for name, feature in self.features.items()}
        read = [name for name, of in known.items() if of is None or of in READ]
        if known and not read:
            name, of = next(iter(known.items()))
            raise ValueError(f"stream: {name} is a feature {of}, which nothing reads{nearest(str(of), READ)}")

    @property
    def place(self) -> str:
        return f"datasets stream ({self.dataset.split or 'no split'})"

    @property
    def reader_settings(self) -> dict[str, int]:
        return {"shards": self.dataset.num_shards}

    @property
    def files(self) -> dict[str, Path]:
        return {}

    def corpus(self) -> Corpus:
        columns = list(self.features)
        return corpus_of(self.place, {"columns": Property(columns, lambda n: columns[n])}, [])

    @property
    def exact(self) -> bool:
        """Whether its state determines all later samples."""
        steps = [getattr(self.dataset, "_ex_iterable", None)]
        for step in steps:
            tables = getattr(getattr(step, "formatting", None), "is_table", False)
            if not type(step).__name__.startswith(_EXACT) or (getattr(step, "batched", False) and tables):
                return False
            inner = getattr(step, "ex_iterable", None)
            steps += [inner] if inner is not None else list(getattr(step, "ex_iterables", ()))
        return True

    def read(
        self,
        seed: int,
        epoch: int,
        reader: int,
        readers: int,
        wanted: Callable[[dict[str, Raw]], bool],
        skip: Callable[[str, str], None],
        mark: tuple[Any, ...] = BEGINNING,
        fault: Callable[[str, str, str], None] | None = None,
    ) -> Iterator[Sample]:
        from datasets.distributed import split_dataset_by_node

        turn, whole, taken, state = mark if mark != BEGINNING else (0, 0, 0, None)
        exact, why = self.exact, ""
        while True:
            part = split_dataset_by_node(self.dataset, *((0, 1) if whole else (reader, readers)))
            part.set_epoch(epoch + 1_000_003 * turn)
            if state is not None and exact:
                part.load_state_dict(state)
            number, found = taken if state is not None and exact else 0, taken > 0
            for batch in part.iter(batch_size=1):
                number += 1
                if number <= taken:
                    continue
                raw, faults = self._fields({name: values[0] for name, values in batch.items()})
                why = "; ".join(faults) or why
                if faults and fault is not None:
                    fault(self.place, str(number), "; ".join(faults))
                if wanted(raw):
                    found = True
                    after = (turn, whole, number, part.state_dict() if exact else None)
                    name = f"{turn}/{reader if not whole else 'all'}/{number}"
                    yield Sample(name, self.place, raw, after)  # type: ignore[arg-type]  # its own kind of mark
                elif not found and number >= _NONE:
                    break
            if not found and (whole or number >= _NONE):
                why = why or f"columns: {', '.join(self.features) or 'unknown'}"
                why = f"none of {number} samples has all fields; {why}" if number else "no samples"
                raise ValueError(f"{self.place}: the stream yields nothing ({why})")
            turn, whole, taken, state = turn + 1, int(not found), 0, None

    def _fields(self, row: Mapping[str, Any]) -> tuple[dict[str, Raw], list[str]]:
        """Return the raw fields of a sample, and why others cannot be read."""
        raws: dict[str, Raw] = {}
        faults = []
        for name, value in row.items():
            try:
                raws |= dict(_parts(value, self.features.get(name), name))
            except (OSError, ValueError) as error:
                faults.append(f"{name}: {error}")
        return raws, faults


_TEXTS = (str, bool, int, float, np.generic, date, time, timedelta, Decimal)


def _parts(value: Any, feature: Feature, name: str) -> Iterator[tuple[str, Raw]]:
    """Yield the raw fields in a value: bytes, texts, arrays, and parts of lists and structs by dotted names."""
    if value is None or (type_of(feature) or READ[0]) not in READ:
        return
    if isinstance(value, bytes):
        if len(value) > LIMIT:
            raise ValueError(too_large(len(value)))
        yield name, value
    elif isinstance(value, dict) and "bytes" in value and set(value) <= {"bytes", "path"}:
        content = value["bytes"] if value["bytes"] is not None else _read_named(value.get("path"))
        if content is not None:
            yield from _parts(content, None, name)
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _parts(inner, within(feature, str(key)), f"{name}.{key}")
    elif isinstance(value, (list, tuple, np.ndarray)):
        arrays = isinstance(value, np.ndarray) or (type_of(feature) or "").startswith("Array") or _floats(value)
        if arrays and len(value):
            yield name, array_bytes(value)
        for k, inner in enumerate([] if arrays else itertools.islice(value, PARTS)):
            yield from _parts(inner, within(feature, None), f"{name}.{k}")
    elif isinstance(value, _TEXTS):
        value = value.item() if isinstance(value, np.generic) else value
        text = text_in(value, names_of(feature))
        if text is not None:
            yield name, text
    else:
        what = "encoded bytes, texts, numbers, and lists of these are read; decode(False) before a map keeps bytes"
        raise ValueError(f"a {type(value).__name__}: {what}")


def _floats(value: Any) -> bool:
    while isinstance(value, (list, tuple)) and value:
        value = value[0]
    return isinstance(value, float)


def _read_named(path: str | None) -> bytes | None:
    """Read the content of a path or address that the dataset itself names."""
    if not path:
        return None
    if "://" not in path:
        return read_file(Path(path))
    import fsspec  # a dependency of datasets

    with fsspec.open(path, "rb") as file:
        return bytes(file.read(LIMIT + 1))
