"""Snippets of code by language, from files that torch, numpy and pyarrow have installed: nothing is downloaded.

Letters: B samples of a batch, N of a set, M of the corpus, T tokens of a row.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Mapping
from functools import cached_property
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from textwrap import dedent
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from descant.datamodules.base import BatchDataset, DataModule, NumberedDataset, Rows
from descant.datamodules.changes import Corpus, Property
from descant.datamodules.corpora.base import name_hash
from descant.datamodules.names import require_known
from descant.modules.core.errors import require_value
from descant.modules.tokenizers.text import ByteTokenizer, Tokenizer

#: Language -> a package that has files in it, their folder in the package, and the endings of their names.
SOURCES = {
    "c++": ("torch", "include/torch", (".h",)),
    "cmake": ("torch", "share/cmake", (".cmake",)),
    "cuda": ("torch", "include/ATen", (".cuh",)),
    "cython": ("pyarrow", "", (".pyx", ".pxi")),
    "fortran": ("numpy", "f2py", (".f", ".f90")),
    "python": ("torch", "distributed", (".py",)),
}
#: Lines that name a language, and those of licenses, are left out.
NAMED = re.compile(r"c\+\+|cpp|cmake|cuda|cython|\.pyx|fortran|f2py|\.f90|python|copyright|licen[cs]e", re.IGNORECASE)
#: Characters that lines of code have, and prose seldom.
CODE = re.compile(r"[][(){};=]")
#: End of each split of a language's files; the most files, and bytes per file, to read; the most snippets per file.
SPLITS, FILES, BYTES, OF_FILE = {"test": 0.1, "sealed": 0.2, "val": 0.3, "train": 1.0}, 120, 1 << 16, 24


class Snippet(NamedTuple):
    """A snippet of code: ``name``, its file and number there."""

    name: str
    split: str
    language: str
    text: str


def snippets_of(code: str, lines: int) -> list[str]:
    r"""Cut code into consecutive pieces of ``lines`` lines, without empty and :data:`NAMED` lines, and without indent.

    Prose is left out: at least half of the lines of a piece have a bracket, a semicolon or an equals sign.

    >>> snippets_of("#!/usr/bin/env python\n  a = 1\n\n    b = 2\nA word\nor two.\n", lines=2)
    ['a = 1\n  b = 2']
    """
    kept = [line.rstrip() for line in code.splitlines() if line.strip() and not NAMED.search(line)]
    pieces = [kept[at : at + lines] for at in range(0, len(kept) - lines + 1, lines)]
    return [dedent("\n".join(piece)) for piece in pieces if 2 * sum(map(bool, map(CODE.search, piece))) >= lines]


def installed_snippets(language: str, lines: int, most: int, files: int = FILES) -> list[Snippet]:
    """Collect snippets of one language: up to ``most`` per split, the same for the same version of the package.

    Files are in the order of a hash of their names; the first tenths of them belong to the evaluation sets.
    """
    package, below, ends = SOURCES[language]
    spec = find_spec(package)
    root = Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else Path(package)
    names = [path.relative_to(root).as_posix() for path in (root / below).rglob("*") if path.suffix in ends]
    names = sorted(names, key=lambda name: (name_hash(f"snippets/{name}"), name))[:files]
    if len(names) < len(SPLITS):
        raise ValueError(f"languages: {language}: {len(names)} files of {package} in {root / below}; leave it out")
    ends_at = [max(round(end * len(names)), k) for k, end in enumerate(SPLITS.values(), 1)]
    found: dict[str, list[Snippet]] = {split: [] for split in SPLITS}
    for k, name in enumerate(names):
        split = list(SPLITS)[bisect_right(ends_at, k)]
        if len(found[split]) >= most:
            continue
        with (root / name).open("rb") as file:
            pieces = snippets_of(file.read(BYTES).decode(errors="replace"), lines)
        some = pieces[:: -(-len(pieces) // OF_FILE) or 1]  # evenly over the file
        found[split] += [Snippet(f"{package}/{name}:{i}", split, language, text) for i, text in enumerate(some)]
    return [snippet for of_split in found.values() for snippet in of_split[:most]]


class SnippetsSet(NumberedDataset):
    """Snippets by their numbers ``id_N`` in the corpus."""

    modalities = ("text",)

    def __init__(self, data: Snippets, id_N: np.ndarray, drop: Mapping[str, float] | None = None) -> None:
        super().__init__(data.seed, drop)
        self.id_N, self.text_MT, self.label_M = id_N, data.text_MT, data.label_M

    def rows(self, index_B: np.ndarray, draw_B: np.ndarray) -> Rows:
        id_B = torch.from_numpy(self.id_N[index_B])
        return Rows({"text": self.text_MT[id_B]}, {"language": self.label_M[id_B]}, id_B)


class Snippets(DataModule):
    """A few lines of code, and their programming language: text classification without a download.

    Modality ``text``; target ``language``. C++, CUDA and CMake are from torch's headers and build files, Python from
    its modules, Cython from pyarrow, Fortran from numpy's tests. Each file is in one split; a text in two files is
    taken once. Lines that name a language or a license are left out; identifiers of a package are not. The same
    versions of the packages give the same corpus; a run cannot be resumed with other versions. Evaluation sets:
    "validate" has ``val``, "test" has ``test``.

    Args:
        languages: some of c++, cmake, cuda, cython, fortran and python; all by default.
        lines: lines per snippet.
        most: the most snippets per language in training; an evaluation set has at most a quarter of it.
        text: the tokenizer; bytes in rows of 128 by default.
        sealed: use the evaluation sets of the lock-box.
        kwargs: arguments of every data module.

    >>> data = Snippets(tiny=True)
    >>> batch = next(iter(data.train_dataloader()))
    >>> batch.inputs["text"].shape[1:], data.classes["language"]
    (torch.Size([128]), ['c++', 'cmake', 'cuda', 'cython', 'fortran', 'python'])
    """

    modalities = ("text",)

    def __init__(
        self,
        languages: list[str] | None = None,
        lines: int = 4,
        most: int = 400,
        text: Tokenizer | None = None,
        sealed: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.languages = sorted(SOURCES if languages is None else set(languages))
        require_known("languages", self.languages, tuple(SOURCES))
        require_value(len(self.languages) >= 2, f"languages {self.languages}: at least two, such as [c++, python]")
        for what, value in (("lines", lines), ("most", most)):
            require_value(value >= 1, f"{what} {value}: 1 is the least")
        self.lines, self.most, self.text, self.sealed = lines, most, text, sealed

    @property
    def classes(self) -> dict[str, list[str]]:
        return {"language": self.languages}

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return self.text or ByteTokenizer(128)

    # the corpus ----------------------------------------------------------------------------------------------------

    @cached_property
    def snippets(self) -> list[Snippet]:
        most, files = (min(self.most, 24), 12) if self.tiny else (self.most, FILES)
        found = [x for name in self.languages for x in installed_snippets(name, self.lines, most, files)]
        return list({snippet.text: snippet for snippet in reversed(found)}.values())[::-1]

    def corpora(self) -> dict[str, Corpus]:
        if self.tiny:
            return {}
        versions = [f"{name} {version(name)}" for name in sorted({SOURCES[name][0] for name in self.languages})]
        names, none_M = self._column("name"), np.array([], dtype=np.int64)
        parts = {
            "versions": Property(versions, versions.__getitem__),
            "samples": Property(names, names.__getitem__),
            "texts": Property(self._column("text"), names.__getitem__),
        }
        return {"snippets": Corpus(", ".join(versions), parts, [], none_M, none_M)}

    def _column(self, name: str) -> list[str]:
        return [getattr(snippet, name) for snippet in self.snippets]

    @cached_property
    def text_MT(self) -> Tensor:
        return self.tokenizer(self._column("text"))

    @cached_property
    def label_M(self) -> Tensor:
        return torch.tensor([self.languages.index(name) for name in self._column("language")])

    def _ids(self, split: str, most: int | None = None) -> np.ndarray:
        """Return the numbers of a split's snippets, up to ``most`` per language."""
        split_M, label_M = np.array(self._column("split")), self.label_M.numpy()
        each = [np.flatnonzero((split_M == split) & (label_M == k))[:most] for k in range(len(self.languages))]
        return np.sort(np.concatenate(each))

    def training_set(self) -> SnippetsSet:
        return SnippetsSet(self, self._ids("train"), self.drop)

    def bank_set(self) -> SnippetsSet:
        return SnippetsSet(self, self._ids("train"))

    def evaluation_sets(self, stage: str) -> dict[str, BatchDataset]:
        name = "val" if stage == "validate" else "test"
        split = "sealed" if self.sealed and stage != "validate" else name
        return {name: SnippetsSet(self, self._ids(split, max(self.most // 4, 1)))}

    # what evaluation reads -----------------------------------------------------------------------------------------

    def sample_name(self, index: int) -> str:
        return self.snippets[index].name

    def describe(self, index: int) -> str:
        snippet = self.snippets[index]
        return f"{snippet.language}: {snippet.text.splitlines()[0]}"
