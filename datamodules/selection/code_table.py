"""Codes of a data set's samples as a table, in memory or in a parquet file. Letters: N samples, T codes per sample."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from descant.datamodules.selection.selected import COLUMN
from descant.modules.tokenizers.codes import CodeTokenizer
from descant.modules.tokenizers.unified import CodeFormat

#: Marks a code as padding.
PADDING = -1
_COLUMNS = (COLUMN, "key", "set", "name")


@dataclass(frozen=True)
class CodeTable:
    """Samples with a text and the codes of other modalities.

    Attributes:
        index_N, key_N: int64, stable ids of samples and of their content.
        set_N: the data set of each, such as train. name_N: its text.
        codes: modality -> int64 ``[N, T]``, from 0; -1 for padding.
        formats: modality -> sizes of its codes, and the digest of the tokenizer that made them.
        about: what the codes were made from, such as the options of a data module.
        tokenizers: the tokenizers that made them, in this process.
    """

    index_N: np.ndarray
    key_N: np.ndarray
    set_N: np.ndarray
    name_N: np.ndarray
    codes: dict[str, Tensor]
    formats: dict[str, CodeFormat]
    about: dict[str, Any]
    tokenizers: dict[str, CodeTokenizer] = field(default_factory=dict)

    def rows(self, name: str) -> np.ndarray:
        """Return the rows of a data set. Raise ValueError if it has none."""
        rows_R = np.flatnonzero(self.set_N == name)
        if not len(rows_R):
            raise ValueError(f"codes: no rows of {name}; there are {', '.join(sorted(set(self.set_N.tolist())))}")
        return rows_R

    def write(self, file: Path) -> None:
        """Write a new parquet file, completely or not at all. Raise ValueError if the file exists."""
        import pyarrow as pa  # late: it takes long to import
        import pyarrow.parquet as pq

        if file.exists():
            raise ValueError(f"{file}: it is there already, and nothing is overwritten")
        columns = dict(zip(_COLUMNS, (self.index_N, self.key_N, self.set_N, self.name_N), strict=True))
        for modality, code_NT in self.codes.items():
            flat = pa.array(code_NT.flatten().numpy().astype(np.int32))
            columns[f"codes.{modality}"] = pa.FixedSizeListArray.from_arrays(flat, code_NT.shape[1])
        formats = {modality: asdict(one) for modality, one in self.formats.items()}
        about = {"formats": formats, "about": self.about}
        scratch = file.with_name(f".{file.name}.{os.getpid()}")
        try:
            pq.write_table(pa.table(columns).replace_schema_metadata({"descant": json.dumps(about)}), scratch)
            scratch.replace(file)
        finally:
            scratch.unlink(missing_ok=True)


def read_codes(file: Path) -> CodeTable:
    """Read a table that ``CodeTable.write`` wrote. Raise ValueError for another file."""
    import pyarrow as pa  # late: it takes long to import
    import pyarrow.parquet as pq

    if not file.is_file():
        raise ValueError(f"codes: {file}: no such file; `descant data encode` writes one")
    try:
        table = pq.read_table(file)
        made = json.loads((table.schema.metadata or {})[b"descant"])
        formats = {m: CodeFormat(**{**one, "grid": tuple(one["grid"])}) for m, one in made["formats"].items()}
        flat = {m: table[f"codes.{m}"].combine_chunks().flatten().to_numpy().astype(np.int64) for m in formats}
        codes = {m: torch.from_numpy(x).view(len(table), formats[m].length) for m, x in flat.items()}
        columns = [table[name].to_numpy() for name in _COLUMNS]
    except (OSError, pa.ArrowException, KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        line = str(error).splitlines()[0]
        raise ValueError(f"codes: {file}: no table of codes ({line}); `descant data encode` writes one") from None
    return CodeTable(columns[0], columns[1], columns[2], columns[3], codes, formats, made["about"])


def require_same(table: CodeTable, tokenizers: dict[str, CodeTokenizer], about: dict[str, Any]) -> None:
    """Raise ValueError for codes of another tokenizer, as far as known before it is fitted, or of other options."""
    for modality, tokenizer in tokenizers.items():
        mine, made = CodeFormat.of(tokenizer), table.formats.get(modality, CodeFormat((0,), 0))
        if mine != (made if tokenizer.fitted or not tokenizer.samples else CodeFormat(*made.sizes, mine.digest)):
            raise ValueError(
                f"codes: {modality} of tokenizer {_short(made)}, and {_short(mine)} is given; encode again"
            )
    for option, value in about.items():
        if table.about.get(option, value) != value:
            raise ValueError(f"codes: of {option} {table.about[option]}, and the data have {value}; encode again")


def _short(format: CodeFormat) -> str:
    return f"{format.digest[:8]} ({format.length} codes in {format.layers} layers of {format.codes})"
