"""Small molecules: their spelling, their fingerprint, and two numbers to predict (from the list that rdkit ships).

Letters: B samples of a batch, N molecules, K spellings of one, T tokens, W bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from descant.datamodules.base import BatchDataset, DataModule, Rows
from descant.datamodules.changes import Corpus, Property, corpus_of
from descant.datamodules.corpora.base import TensorSet
from descant.datamodules.fields.fields import mean_and_deviation
from descant.datamodules.prepare.molecules import Described, describe, list_file, read_list, require_rdkit
from descant.datamodules.sources.base import rank_of
from descant.modules.core.batch import Batch
from descant.modules.core.rng import uniform_N
from descant.modules.tokenizers.text import ByteTokenizer, Tokenizer


class SpelledSet(TensorSet):
    """Molecules with a spelling sampled from ``spelling_NKT``; the first spelling if ``random`` is False."""

    def __init__(self, spelling_NKT: Tensor, random: bool, *of: Any) -> None:
        super().__init__(*of)
        self.spelling_NKT, self.random, self.modalities = spelling_NKT, random, ("text", *self.inputs)

    def rows(self, index_B: np.ndarray, draw_B: np.ndarray) -> Rows:
        rows = super().rows(index_B, draw_B)
        chosen_B = torch.zeros(len(index_B), dtype=torch.long)
        if self.random:
            chosen_B = (uniform_N(draw_B, "molecules/spelling") * self.spelling_NKT.shape[1]).long()
        return Rows({"text": self.spelling_NKT[rows.key, chosen_B], **rows.inputs}, rows.targets, rows.key)


class Molecules(DataModule):
    """4,892 small molecules, as text and as a vector: modalities ``text`` and ``fingerprint``.

    ``text`` is int64 ``[B, T]``, a SMILES: in training one of K random spellings, otherwise the canonical one.
    ``fingerprint`` is float32 ``[B, W]``, 0 or 1: which surroundings of an atom, up to two bonds away, a molecule has
    (Morgan's). Targets ``logp`` and ``tpsa`` are float32 numbers that rdkit computes from the structure.

    Molecules with the same scaffold (their rings and the links between them) are in the same part. A hash assigns 80 %
    of the scaffolds to training, 10 % to validation and 10 % to the test. So the test asks about rings that no training
    molecule has. Evaluation sets: "validate" has ``val``, "test" has ``test``.

    The list is in the package rdkit (``pip install 'descant[molecules]'``). Its molecules are described in some
    seconds, and kept in memory.

    Args:
        bits: W of the fingerprint.
        spellings: K; 0 trains only on the canonical one.
        tokenizer: tokenizer of the spellings; by default one token per byte, 96 per row.
        kwargs: arguments of every data module.

    >>> data = Molecules(tiny=True, batch_size=8, bits=64)
    >>> batch = data.on_after_batch_transfer(next(iter(data.train_dataloader())), 0)
    >>> batch.inputs["text"].shape, batch.inputs["fingerprint"].shape, batch.targets["logp"].dtype
    (torch.Size([8, 96]), torch.Size([8, 64]), torch.float32)
    """

    modalities = ("text", "fingerprint")

    def __init__(self, bits: int = 2048, spellings: int = 8, tokenizer: Tokenizer | None = None, **kwargs: Any) -> None:
        if bits < 1 or spellings < 0:
            raise ValueError(f"bits {bits}, spellings {spellings}: at least one bit, and no fewer than 0 spellings")
        super().__init__(**kwargs)
        self.bits, self.spellings, self.smiles_tokenizer = bits, spellings, tokenizer or ByteTokenizer(length=96)

    @property
    def tokenizer(self) -> Tokenizer | None:
        return self.smiles_tokenizer

    def prepare_data(self) -> None:
        if not self.tiny:
            require_rdkit()

    @cached_property
    def descriptions(self) -> Described:
        if self.tiny:
            return synthetic(self.bits, self.spellings)
        return describe(read_list(list_file()), self.spellings, self.bits)

    def corpora(self) -> dict[str, Corpus]:
        if self.tiny:
            return {}
        names, file = self.descriptions.smiles, list_file()
        return {"molecules": corpus_of(str(file), {"samples": Property(names, lambda n: names[n])}, [file])}

    @cached_property
    def splits(self) -> dict[str, np.ndarray]:
        part_N = np.array([rank_of(scaffold) for scaffold in self.descriptions.scaffold])
        bounds = {"train": (0.2, 1.0), "val": (0.1, 0.2), "test": (0.0, 0.1)}
        return {name: np.flatnonzero((low <= part_N) & (part_N < high)) for name, (low, high) in bounds.items()}

    @cached_property
    def spelling_NKT(self) -> Tensor:
        """Tokenize the canonical spelling of each molecule, then its random ones."""
        described, T = self.descriptions, self.smiles_tokenizer
        return torch.stack([T([name, *more]) for name, more in zip(described.smiles, described.spellings, strict=True)])

    def number_scale(self, target: str) -> tuple[float, float] | None:
        """Return mean and standard deviation of a number over the training set."""
        y_N = self.descriptions.numbers.get(target)
        return None if y_N is None else mean_and_deviation(y_N[self.splits["train"]], f"Molecules: {target}")

    def _set(self, split: str, random: bool = False, drop: Mapping[str, float] | None = None) -> TensorSet:
        inputs = {"fingerprint": torch.from_numpy(self.descriptions.bits_NW)}
        targets = {name: torch.from_numpy(y_N) for name, y_N in self.descriptions.numbers.items()}
        spelling_NKT = self.spelling_NKT[:, 1:] if random and self.spellings else self.spelling_NKT[:, :1]
        return SpelledSet(spelling_NKT, random, inputs, targets, self.splits[split], self.seed, drop)

    def training_set(self) -> BatchDataset:
        return self._set("train", True, self.drop)

    def bank_set(self) -> BatchDataset:
        return self._set("train")

    def evaluation_sets(self, stage: str) -> dict[str, BatchDataset]:
        name = "val" if stage == "validate" else "test"
        return {name: self._set(name)}

    def sample_name(self, index: int) -> str:
        return self.descriptions.smiles[index]

    def describe(self, index: int) -> str:
        return self.descriptions.smiles[index]

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        batch.inputs["fingerprint"] = batch.inputs["fingerprint"].float()
        return batch


def synthetic(bits: int, spellings: int) -> Described:
    """Make chains of atoms for tests: a bit is a neighbour pair, ``logp`` the share of carbon, a scaffold the end."""
    random = np.random.default_rng(0)
    names = sorted({"".join(random.choice(list("CCNOS"), random.integers(4, 13))) for _ in range(160)})[:128]
    bits_NW = np.zeros((len(names), bits), dtype=np.uint8)
    for row, name in zip(bits_NW, names, strict=True):
        row[[(7 * ord(a) + ord(b)) % bits for a, b in pairwise(name)]] = 1
    logp_N = np.array([name.count("C") / len(name) for name in names], dtype=np.float32)
    return Described(
        smiles=names,
        spellings=[[name[::-1]] * spellings for name in names],
        scaffold=[name[-3:] for name in names],
        bits_NW=bits_NW,
        numbers={"logp": logp_N, "tpsa": 1 - logp_N},
        unread=[],
    )
