"""Molecules: what is known of three, spellings of one molecule, and parts that share no scaffold."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from descant.datamodules.corpora.molecules import Molecules
from descant.datamodules.prepare import molecules
from descant.datamodules.prepare.molecules import describe, list_file, read_list, require_rdkit

ASPIRIN, ETHANOL = "CC(=O)Oc1ccccc1C(=O)O", "CCO"


def test_numbers_and_scaffolds_are_those_of_the_literature() -> None:
    described = describe([ASPIRIN, ETHANOL, "OC(=O)c1ccccc1OC(C)=O", "OCC", "C(C"], spellings=6, bits=512)
    assert described.smiles == [ASPIRIN, ETHANOL] and described.unread == ["C(C"]  # each once, in the list's order
    assert described.scaffold == ["c1ccccc1", ETHANOL]
    assert described.numbers["tpsa"] == pytest.approx([63.60, 20.23], abs=0.01)  # Ertl 2000
    assert described.numbers["logp"] == pytest.approx([1.310, -0.001], abs=0.001)  # Wildman 1999
    assert described.bits_NW.shape == (2, 512) and set(np.unique(described.bits_NW)) == {0, 1}
    other = describe(described.spellings[0], spellings=0, bits=512)
    assert other.smiles == [ASPIRIN] and np.array_equal(other.bits_NW[0], described.bits_NW[0])
    assert len(set(described.spellings[0])) > 1


def test_the_list_has_4892_molecules() -> None:
    smiles = read_list(list_file())
    described = describe(smiles[:60], spellings=0, bits=64)
    assert len(smiles) == 4999 and len(described.smiles) + len(described.unread) <= 60


def test_no_scaffold_is_in_two_parts() -> None:
    data = Molecules(tiny=True, batch_size=8)
    scaffold = data.descriptions.scaffold
    parts = {name: {scaffold[n] for n in row_N} for name, row_N in data.splits.items()}
    assert min(map(len, parts.values())) > 0 and sum(map(len, parts.values())) == len(set(scaffold))
    assert sum(map(len, data.splits.values())) == len(scaffold)
    y_N = data.descriptions.numbers["logp"][data.splits["train"]].astype(np.float64)
    assert data.number_scale("logp") == (y_N.mean(), y_N.std()) and data.number_scale("age") is None


def test_training_draws_a_spelling_and_evaluation_has_the_canonical_one() -> None:
    data = Molecules(tiny=True, batch_size=8, spellings=1)
    row, draws = np.arange(4), np.arange(4, dtype=np.uint64)
    trained, judged = data.training_set(), data.bank_set()
    tokens = data.tokenizer
    assert tokens is not None
    names = [data.descriptions.smiles[n] for n in judged.identity(row)]
    assert judged.rows(row, draws).inputs["text"].tolist() == tokens(names).tolist()
    assert trained.rows(row, draws).inputs["text"].tolist() == tokens([name[::-1] for name in names]).tolist()
    many = Molecules(tiny=True, batch_size=8, spellings=5)
    many.descriptions.spellings[0][:] = ["C" * n for n in range(1, 6)]
    at = int(np.flatnonzero(many.training_set().identity(np.arange(len(many.training_set()))) == 0)[0])
    lengths = [
        int((many.training_set().rows(np.array([at]), np.array([d], dtype=np.uint64)).inputs["text"] > 0).sum())
        for d in range(200)
    ]
    assert set(lengths) == {3, 4, 5, 6, 7}


def test_what_is_wrong_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="bits 0, spellings 8: at least one bit"):
        Molecules(bits=0)
    with pytest.raises(ValueError, match="cannot be read"):
        read_list(tmp_path / "list.smi")
    monkeypatch.setattr(molecules, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"rdkit is missing; pip install 'descant\[molecules\]'"):
        require_rdkit()
