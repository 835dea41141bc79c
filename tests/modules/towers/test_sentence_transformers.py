"""Folders of sentence-transformers as towers, against the package itself, which `make newest` installs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from descant.modules.tokenizers.text import PretrainedTokenizer
from descant.modules.towers import PretrainedTower
from tests.modules.towers import folders

NEAR = 1e-5
TEXTS = ["a red apple", "green car", "a"]


@pytest.mark.parametrize("pooling", ["mean", "cls", ["max", "mean"]], ids=str)
def test_its_package_gives_the_embeddings_of_the_tower(pooling: Any, tmp_path: Path) -> None:
    package = pytest.importorskip("sentence_transformers", reason="make newest installs sentence-transformers")
    folders.sentence(tmp_path, pooling)
    model = package.SentenceTransformer(str(tmp_path), device="cpu", local_files_only=True)
    theirs_BD = model.encode(TEXTS, convert_to_tensor=True)
    tower = PretrainedTower(tmp_path).eval()
    with torch.no_grad():
        ours_BD = tower(PretrainedTokenizer(tmp_path, length=folders.LENGTH)(TEXTS)).h_BTD[:, 0]
    torch.testing.assert_close(ours_BD, theirs_BD, rtol=0, atol=NEAR)
