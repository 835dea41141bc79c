"""The table of user data: its columns, their codes, and the file they are joined from. Letters: N rows of a source."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np

from descant.datamodules.base import DataModule
from descant.datamodules.changes import Corpus
from descant.datamodules.fields.fields import Field, Fields
from descant.datamodules.fields.table_codes import Code, from_state, state_of
from descant.datamodules.fields.tables import Cells, TableField
from descant.datamodules.sources.base import Source
from descant.datamodules.sources.joined import Joined
from descant.datamodules.sources.synthetic import Synthetic
from descant.modules.core.errors import warn


class UserTable(DataModule):
    """Base of :class:`UserData` for modalities that are tables: columns of its sources by the codes of training."""

    given: Fields | None
    table: str | None
    table_key: str | None
    #: Codes of a checkpoint.
    _codes: dict[str, Code] | None = None

    @property
    def sources(self) -> dict[str, Source]:
        raise NotImplementedError

    @property
    def splits(self) -> dict[str, tuple[str, np.ndarray]]:
        raise NotImplementedError

    @property
    def tables(self) -> dict[str, TableField]:
        """Return modality -> its columns."""
        return self.given.tables if self.given is not None else {}

    @property
    def table_columns(self) -> dict[str, list[int]]:
        tables = {} if self.tiny else self.tables
        return {m: [self.codes[name].categories for name in field.columns] for m, field in tables.items()}

    @cached_property
    def codes(self) -> dict[str, Code]:
        """Return table column -> its code: from the checkpoint, if one was loaded, else from the training split."""
        if self._codes is not None and not self.tiny:
            return self._codes
        name, row_N = self.splits["train"]
        codes: dict[str, Code] = {}
        for field in self.tables.values():
            codes |= field.codes(self.sources[name], row_N)
        return codes

    def _warn(self, line: str) -> None:
        if not self._world()[0]:
            warn(line)

    def cells(self, source: Source) -> dict[str, Cells]:
        """Return modality -> the table of a source."""
        return {m: field.cells(source, self.codes, self._warn) for m, field in self.tables.items()}

    def with_table(self, source: Source) -> Source:
        """Add the columns of ``table`` to a source, if ``table`` is given and the source has none."""
        if self.table is None or isinstance(source, Joined):
            return source
        return Joined(source, self.table, self.table_key)

    def table_corpora(self) -> dict[str, Corpus]:
        joined = {name: source for name, source in self.sources.items() if isinstance(source, Joined)}
        return {f"{name} table": source.table_corpus for name, source in joined.items()}

    def codes_state(self) -> dict[str, Any]:
        return {"codes": {name: state_of(code) for name, code in self.codes.items()}} if self.tables else {}

    def load_codes(self, state_dict: Mapping[str, Any]) -> None:
        """Take the codes of a checkpoint, so that other files are read as in its training."""
        if self.tables and "codes" in state_dict:
            self._codes = {name: from_state(code) for name, code in state_dict["codes"].items()}
            for cached in ("codes", "readers"):
                self.__dict__.pop(cached, None)


def synthetic(given: Fields | None, key: str | None) -> Synthetic:
    """Make synthetic data with all requested fields."""
    if given is None:
        return Synthetic(fields={"image": "image", "caption": "text"})
    names = {n: f.synthetic for f in given.of.values() for n in (f.sample_fields if _is_named(f) else [f.kind])}
    names |= {name: "bit" for table in given.tables.values() for name in table.columns}
    names |= {field.field: "label" for field in given.labels.values()} | ({key: "text"} if key else {})
    names |= {field.field: "bit" for field in given.numbers.values()}
    return Synthetic(fields=names)


def _is_named(field: Field) -> bool:
    """Whether a field object names the corpus's fields."""
    return bool(getattr(field, "field", None) or getattr(field, "captions", None))
