"""Codes of a data set's samples as a table, in memory or beside the data as a parquet file.

Letters: N samples, T codes of one.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from descant import __version__
from descant.datamodules.selected import COLUMN
from descant.modules.tokenizers.codes import CodeTokenizer
from descant.modules.tokenizers.unified import CodeFormat

#: Stands where a code is of padding.
PADDING = -1
_COLUMNS = (COLUMN, "key", "set", "name")


@dataclass(frozen=True)
class CodeTable:
    """Samples with a text and the codes of other modalities.

    Attributes:
        index_N, key_N: int64, stable ids of samples and of their content.
        set_N: the data set of each, such as train. name_N: its text.
        codes: modality -> int64 ``[N, T]``, from 0; -1 for padding.
        formats: modality -> sizes of its codes, and the digest of the tokenizer that has made them.
        about: what the codes are of, such as the options of a data module.
        tokenizers: that have made them, in this process.
    """

    index_N: np.ndarray
    key_N: np.ndarray
    set_N: np.ndarray
    name_N: np.ndarray
    codes: dict[str, Tensor]
    formats: dict[str, CodeFormat]
    about: dict[str, Any]
    tokenizers: dict[str, CodeTokenizer] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.index_N)

    def rows(self, name: str) -> np.ndarray:
        """Rows of a data set. Raises ValueError for one that has none."""
        rows_S = np.flatnonzero(self.set_N == name)
        if not len(rows_S):
            raise ValueError(f"codes: no rows of {name}; there are {', '.join(sorted(set(self.set_N.tolist())))}")
        return rows_S

    def write(self, file: Path) -> None:
        """As a new parquet file, complete or not at all. Raises ValueError where there is one."""
        import pyarrow as pa  # late: it takes long to import
        import pyarrow.parquet as pq

        if file.exists():
            raise ValueError(f"{file}: it is there already, and nothing is overwritten")
        columns = dict(zip(_COLUMNS, (self.index_N, self.key_N, self.set_N, self.name_N), strict=True))
        for modality, code_NT in self.codes.items():
            flat = pa.array(code_NT.flatten().numpy().astype(np.int32))
            columns[f"codes.{modality}"] = pa.FixedSizeListArray.from_arrays(flat, code_NT.shape[1])
        formats = {modality: asdict(one) for modality, one in self.formats.items()}
        about = {"version": __version__, "formats": formats, "about": self.about}
        scratch = file.with_name(f".{file.name}.{os.getpid()}")
        try:
            pq.write_table(pa.table(columns).replace_schema_metadata({"descant": json.dumps(about)}), scratch)
            scratch.replace(file)
        finally:
            scratch.unlink(missing_ok=True)


def read_formats(file: Path) -> tuple[dict[str, CodeFormat], dict[str, Any]]:
    """Formats of a file's codes, and what they are of. Raises ValueError for a file that has none."""
    import pyarrow as pa  # late: it takes long to import
    import pyarrow.parquet as pq

    if not file.is_file():
        raise ValueError(f"codes: {file}: no such file; `descant data encode` writes one")
    try:
        schema = pq.read_schema(file)
        made = json.loads((schema.metadata or {})[b"descant"])
        formats = {m: CodeFormat(**{**one, "grid": tuple(one["grid"])}) for m, one in made["formats"].items()}
        absent = {*_COLUMNS, *(f"codes.{modality}" for modality in formats)} - set(schema.names)
    except (OSError, pa.ArrowInvalid, KeyError, TypeError, ValueError) as error:
        line = str(error).splitlines()[0]
        raise ValueError(f"codes: {file}: no table of codes ({line}); `descant data encode` writes one") from None
    if absent or not formats:
        raise ValueError(f"codes: {file}: no column {min(absent or {'codes'})!r}; `descant data encode` writes it")
    return formats, made["about"]


def read_codes(file: Path) -> CodeTable:
    """A table that ``CodeTable.write`` has written.

    Raises:
        ValueError: for another file, or naming a sample with a code that its layer does not have.
    """
    import pyarrow.parquet as pq

    formats, about = read_formats(file)
    table = pq.read_table(file)
    codes = dict[str, Tensor]()
    for modality, format in formats.items():
        flat = table[f"codes.{modality}"].combine_chunks().flatten().to_numpy().astype(np.int64)
        if len(flat) != len(table) * format.length:
            raise ValueError(f"codes: {file}: {modality}: not {format.length} codes of each sample")
        codes[modality] = torch.from_numpy(flat).view(-1, format.length)
        if (place := format.wrong(without_padding(codes[modality], format))) is not None:
            name, code = table["name"][place[0]].as_py(), int(codes[modality][place])
            raise ValueError(f"codes: {file}: {modality} of {name!r}: code {code} at {place[1]} is outside its layer")
    columns = (table[name].to_numpy(zero_copy_only=False) for name in _COLUMNS)
    return CodeTable(*columns, codes, formats, about)


def without_padding(code_NT: Tensor, format: CodeFormat) -> Tensor:
    """Codes with the first one of its layer in place of padding."""
    return torch.where(code_NT == PADDING, format.first_T, code_NT)


def require_same(formats: dict[str, CodeFormat], tokenizers: dict[str, CodeTokenizer], file: Path) -> None:
    """Raises ValueError for a tokenizer that has not made a file's codes, as far as it is known before it is fitted."""
    for modality, tokenizer in tokenizers.items():
        mine, of_file = CodeFormat.of(tokenizer), formats.get(modality)
        if of_file is None:
            raise ValueError(f"codes: {file}: none of {modality}; it has {', '.join(formats)}")
        if tokenizer.samples and not tokenizer.fitted:
            mine = CodeFormat(mine.grid, mine.codes, mine.layers, of_file.digest)
        if mine != of_file:
            given = f"the one given is {_short(mine)}; encode again"
            raise ValueError(f"codes: {file}: {modality} of tokenizer {_short(of_file)}, and {given}")


def _short(format: CodeFormat) -> str:
    return f"{format.digest[:8]} ({format.length} codes of {format.layers} x {format.codes})"
