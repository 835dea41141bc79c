"""``descant predict``: write embeddings with sample ids to parquet, one file per set.

Letters: B rows of a batch, D width.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from descant import __version__
from descant.callbacks.logs.report import read_json
from descant.cli.errors import fail, hint
from descant.datamodules.base import BatchDataset, DataModule
from descant.modules.core.dtensor import unsharded_class
from descant.run.folder import CLASSES
from descant.run.runs import Run

#: Rows of a parquet row group; small groups are slow to read.
GROUP = 4096
#: Name in ``--sets`` of the training samples, with the transforms of evaluation.
TRAIN = "train"


class Predictions(L.Callback):
    """Callback that writes embeddings to ``embeddings-SET.parquet``, one file per set, complete or not at all.

    Columns: ``index`` (int64, the sample's stable id); ``name`` (a description of the sample, such as its caption);
    ``sample`` (its name in the corpus, to join rows to files: path in a folder, key in a shard, else the id); for each
    modality ``z_MODALITY``, a list of D float32, null if the sample lacks the modality; and each target that is one
    number per sample (int64 or float64), such as ``group``. A classifier adds ``TARGET_class``, the name of the most
    probable class (its number if no name is known), and ``TARGET_probability``, C float32. A regression adds
    ``TARGET_predicted`` (float64, in the unit of the target). These are null if there is no prediction. Padding rows,
    which have no modality, are left out. Several ranks write a folder of that name with one part each, which parquet
    readers open as one table. The schema's metadata has one entry, ``descant``: JSON with run, checkpoint, step, set,
    widths and names of classes.

    Args:
        run: the folder to write to, and the checkpoint that is read.
        sets: names of test or validation sets; ``train`` means the training samples. Default: all test sets.
    """

    def __init__(self, run: Run, sets: Sequence[str] = ()) -> None:
        self.run, self.sets = run, tuple(sets)
        self.step: int | None = None
        self.names: list[str] = []
        self._table: _Table | None = None
        self._finished: list[_Table] = []

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        data = trainer.datamodule  # type: ignore[attr-defined]
        if isinstance(data, DataModule):
            chosen = _choose_sets(data, self.sets)
            self.names = list(chosen)
            # overrides the hook of this one object: the command chooses the sets, not the data module
            data.predict_dataloader = partial(_loaders, data, chosen)  # type: ignore[method-assign]
        elif self.sets:
            fail(f"--sets: {type(data).__name__} has no named sets")

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self.step = int(checkpoint["global_step"])

    def on_predict_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if not isinstance(outputs, Mapping) or not outputs.get("z"):
            raise ValueError(f"{type(pl_module).__name__} gives no embeddings, so there is nothing to write")
        name = self.names[dataloader_idx] if self.names else str(dataloader_idx)
        targets = _numbers(getattr(batch, "targets", {}))
        if self._table is None or self._table.name != name:
            self._finish()
            self._table = self._open(trainer, pl_module, name, outputs, targets)
        self._table.add(outputs, targets)

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._finish()
        for table in self._finished:
            table.publish()
            if trainer.is_global_zero:
                print(f"{table.target}  {table.rows:,} rows", flush=True)
        self._finished = []

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        for table in [*self._finished, *([self._table] if self._table else [])]:
            table.drop()
        self._table, self._finished = None, []

    def _finish(self) -> None:
        if self._table is not None:
            self._table.close()
            self._finished.append(self._table)
            self._table = None

    def _open(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        name: str,
        outputs: Mapping[str, Any],
        targets: Mapping[str, Tensor],
    ) -> _Table:
        data = trainer.datamodule  # type: ignore[attr-defined]
        widths = {modality: int(z_BD.shape[1]) for modality, z_BD in outputs["z"].items()}
        # the first batch may lack a modality: its width is that of the shared space
        common = set(widths.values())
        towers = getattr(pl_module, "towers", {})
        for modality in getattr(data, "modalities", ()):
            if modality in towers and modality not in widths and len(common) == 1:
                widths[modality] = next(iter(common))
        source = self.run.folder.parent if self.run.folder.parent.joinpath("config.yaml").is_file() else None
        about = {
            "version": __version__,
            "recipe": unsharded_class(pl_module).__name__,
            "run": "/".join(source.parts[-2:]) if source else None,
            "checkpoint": Path(self.run.checkpoint).name if self.run.checkpoint else None,
            "step": self.step,
            "set": name,
            "width": widths,
            "classes": {
                target: known_names(source, data, target, logits_BC.shape[1])
                for target, logits_BC in outputs.get("logits", {}).items()
            },
            "predicted": list(outputs.get("numbers", {})),
        }
        rank = trainer.global_rank if trainer.world_size > 1 else None
        return _Table(self.run.folder, name, widths, targets, about, data, rank)


class _Table:
    """Parquet file that is being written under a temporary name, or one rank's part of it."""

    def __init__(
        self,
        folder: Path,
        name: str,
        widths: Mapping[str, int],
        targets: Mapping[str, Tensor],
        about: Mapping[str, Any],
        data: Any,
        rank: int | None,
    ) -> None:
        self.name, self.widths, self.data = name, widths, data
        target = folder / f"embeddings-{name.replace('/', '-')}.parquet"
        self.target = target if rank is None else target / f"part-{rank:05d}.parquet"
        self.scratch = folder / f".{target.name}.{0 if rank is None else rank}"
        columns = {f"z_{m}": pa.list_(pa.float32()) for m in widths}
        fields = {"index": pa.int64(), "name": pa.string(), "sample": pa.string(), **columns}
        self.numbers = {name: _kind(x_B) for name, x_B in targets.items() if name not in fields}
        fields |= self.numbers
        self.classes: dict[str, list[str] | None] = about["classes"]
        for target, names in self.classes.items():
            fields[f"{target}_class"] = pa.int64() if names is None else pa.string()
            fields[f"{target}_probability"] = pa.list_(pa.float32())
        self.predicted: list[str] = about["predicted"]
        fields |= {f"{target}_predicted": pa.float64() for target in self.predicted}
        self.schema = pa.schema(list(fields.items()), metadata={"descant": json.dumps(about)})
        self.writer = pq.ParquetWriter(self.scratch, self.schema, compression="zstd")
        self.batches: list[pa.RecordBatch] = []
        self.rows = 0

    def add(self, outputs: Mapping[str, Any], targets: Mapping[str, Tensor]) -> None:
        present = {m: mask_B.bool().cpu() for m, mask_B in outputs["present"].items()}
        rows = torch.stack(list(present.values())).any(dim=0)
        if not rows.any():
            return
        index = outputs["index"].cpu()[rows].tolist()
        describe = getattr(self.data, "describe", str)
        sample = getattr(self.data, "sample_name", str)
        columns = [pa.array(index, pa.int64()), pa.array([describe(i) for i in index], pa.string())]
        columns.append(pa.array([_utf8(sample(i)) for i in index], pa.string()))
        for modality, width in self.widths.items():
            z_BD = outputs["z"].get(modality)
            if z_BD is None:
                columns.append(pa.nulls(len(index), pa.list_(pa.float32())))
            else:
                columns.append(_vectors(z_BD.detach().float().cpu()[rows], present[modality][rows], width))
        for name, kind in self.numbers.items():
            x_B = targets[name].cpu()[rows]
            columns.append(pa.array((x_B.double() if x_B.is_floating_point() else x_B.long()).numpy(), kind))
        for target, names in self.classes.items():
            probability_BC = outputs["logits"][target].detach().double().softmax(dim=1).float().cpu()[rows]
            known_B = probability_BC.isfinite().all(dim=1)
            best = [k if known else None for k, known in zip(probability_BC.argmax(1).tolist(), known_B, strict=True)]
            named = best if names is None else [None if k is None else names[k] for k in best]
            columns.append(pa.array(named, pa.int64() if names is None else pa.string()))
            columns.append(_vectors(probability_BC, known_B, probability_BC.shape[1]))
        for target in self.predicted:
            y_B = outputs["numbers"][target].detach().double().cpu()[rows].numpy()
            columns.append(pa.array(y_B, pa.float64(), mask=np.isnan(y_B)))
        self.rows += len(index)
        self.batches.append(pa.RecordBatch.from_arrays(columns, schema=self.schema))
        if sum(len(batch) for batch in self.batches) >= GROUP:
            self._write()

    def _write(self) -> None:
        if self.batches:
            self.writer.write_table(pa.Table.from_batches(self.batches).combine_chunks())
            self.batches = []

    def close(self) -> None:
        self._write()
        self.writer.close()

    def publish(self) -> None:
        self.target.parent.mkdir(exist_ok=True)
        os.replace(self.scratch, self.target)

    def drop(self) -> None:
        self.writer.close()
        self.scratch.unlink(missing_ok=True)


def known_names(run: Path | None, data: Any, target: str, count: int) -> list[str] | None:
    """Return the names of a target's classes: those in a run's folder, else the data's; None if not ``count`` names."""
    noted = read_json(run / CLASSES).get(target) if run is not None else None
    known = data.class_names(target) if noted is None and isinstance(data, DataModule) else noted
    good = isinstance(known, list) and len(known) == count and all(isinstance(name, str) for name in known)
    return known if good else None


def _numbers(targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Select the targets that are one number per sample."""
    return {name: x_B for name, x_B in targets.items() if x_B.ndim == 1}


def _kind(x_B: Tensor) -> pa.DataType:
    return pa.float64() if x_B.is_floating_point() else pa.int64()


def _utf8(name: str) -> str:
    """Return a name as valid UTF-8, which parquet needs; other bytes of a file's name are escaped.

    >>> _utf8("a.png"), _utf8("\\udcff.png")
    ('a.png', '\\\\xff.png')
    """
    return name.encode(errors="surrogateescape").decode(errors="backslashreplace")


def _vectors(z_BD: Tensor, present_B: Tensor, width: int) -> pa.Array:
    """Convert vectors to lists of D float32, null if absent.

    Their type has no fixed size, because Arrow 24 and earlier cannot read nulls among lists of a fixed size.
    """
    if z_BD.shape[1] != width:
        raise ValueError(f"embeddings of width {z_BD.shape[1]} after embeddings of width {width} in one set")
    flat = pa.array(z_BD[present_B].contiguous().view(-1).numpy(), pa.float32())
    ends_B = np.concatenate([[0], present_B.numpy().cumsum() * width]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(ends_B), flat, mask=pa.array((~present_B).numpy()))


def _choose_sets(data: DataModule, sets: Sequence[str]) -> dict[str, BatchDataset]:
    """Return name -> requested set; validation sets are built only if one is requested."""
    known = data.evaluation_sets("test")
    if not sets:
        return known
    if any(name not in known and name != TRAIN for name in sets):
        known = {**data.evaluation_sets("validate"), **known}
    for name in sets:
        if name not in known and name != TRAIN:
            fail(f"--sets {name}: no such set{hint(name, [*known, TRAIN])}")
    return {name: data.plain_set() if name == TRAIN and TRAIN not in known else known[name] for name in sets}


def _loaders(data: DataModule, chosen: Mapping[str, BatchDataset]) -> list[DataLoader[Any]]:
    return [data.evaluation_loader(part) for part in chosen.values()]
