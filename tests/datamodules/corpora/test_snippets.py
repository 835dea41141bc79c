"""Snippets of code by language: the same each time, files in one split, no label in the text; a part of a mixture."""

from __future__ import annotations

import re
from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch

from descant.datamodules import DataModule, Emoji, Mixture, Snippets
from descant.datamodules.corpora import snippets as module
from descant.datamodules.corpora.snippets import NAMED, SOURCES, SPLITS, installed_snippets
from descant.modules.tokenizers.text import ByteTokenizer


@pytest.fixture(scope="module")
def data() -> Snippets:
    return Snippets(most=40)


def test_all_languages_are_in_all_splits_and_files_in_one(data: Snippets) -> None:
    found = Counter((x.language, x.split) for x in data.snippets)
    assert set(found) == {(language, split) for language in SOURCES for split in SPLITS}
    assert all(30 <= count <= 40 for (_, split), count in found.items() if split == "train"), "less what is twice"
    split_of = {(x.language, x.name.rpartition(":")[0]): x.split for x in data.snippets}
    assert len(split_of) == len({(x.language, x.name.rpartition(":")[0], x.split) for x in data.snippets})
    assert len({x.text for x in data.snippets}) == len(data.snippets)


def test_no_snippet_names_its_language(data: Snippets) -> None:
    names = re.compile("|".join(map(re.escape, SOURCES)), re.IGNORECASE)
    assert not [x.name for x in data.snippets if names.search(x.text) or NAMED.search(x.text)]
    assert all(len(x.text.splitlines()) == data.lines for x in data.snippets)


def test_it_is_the_same_each_time_and_names_the_versions(data: Snippets, monkeypatch: pytest.MonkeyPatch) -> None:
    again, state = Snippets(most=40), data.corpora()["snippets"].state()
    assert again.snippets == data.snippets and torch.equal(again.text_MT, data.text_MT)
    assert f"torch {torch.__version__}" in data.corpora()["snippets"].place
    monkeypatch.setattr(module, "version", lambda name: "0.0")
    assert str(again.corpora()["snippets"].state()) != str(state)


def test_batches_have_the_language_of_each_text(data: Snippets) -> None:
    batch = next(iter(data.train_dataloader()))
    for row_T, label, at in zip(
        batch.inputs["text"], batch.targets["language"].tolist(), batch.index.tolist(), strict=True
    ):
        snippet = data.snippets[at]
        assert data.languages[label] == snippet.language and snippet.split == "train"
        assert snippet.text.startswith(data.tokenizer.decode([i for i in row_T.tolist() if i > 2])[:20])


def test_evaluation_sets_are_of_their_splits_and_of_the_lock_box(
    data: Snippets, monkeypatch: pytest.MonkeyPatch
) -> None:
    for sealed, stage, split in ((False, "validate", "val"), (False, "test", "test"), (True, "test", "sealed")):
        monkeypatch.setattr(data, "sealed", sealed)
        (found,) = data.evaluation_sets(stage).values()
        chosen = [data.snippets[i] for i in found.identity(np.arange(len(found))).tolist()]
        assert {x.split for x in chosen} == {split} and max(Counter(x.language for x in chosen).values()) <= 10


def test_it_is_a_part_of_a_mixture_with_names_of_pictures() -> None:
    parts: dict[str, DataModule] = {
        "names": Emoji(text=ByteTokenizer(128), tiny=True),
        "code": Snippets(languages=["c++", "python"], tiny=True),
    }
    batches = iter(Mixture(parts, batches="homogeneous", batch_size=8, tiny=True).train_dataloader())
    seen = set()
    for batch in islice(batches, 12):
        part = list(parts)[int(batch.source[0])]
        seen.add(part)
        assert batch.inputs["text"].shape == (8, 128)
        assert bool((batch.targets["language"] >= 0).all()) == (part == "code")
        assert bool(batch.present["image"].any()) == (part == "names")
    assert seen == set(parts)


def test_what_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"languages: 'c' is not one of c\+\+, cmake"):
        Snippets(languages=["c", "python"])
    with pytest.raises(ValueError, match=r"languages .*: at least two"):
        Snippets(languages=["python"])
    monkeypatch.setitem(SOURCES, "python", ("no_such_package", "", (".py",)))
    with pytest.raises(ValueError, match=r"languages: python: 0 files of no_such_package in .*; leave it out"):
        installed_snippets("python", 4, 10)
