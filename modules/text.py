"""Text to token ids: a byte-pair encoding file, and how pieces of text become one row.

Letters: N texts, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

PAD, BOS, EOS = 0, 1, 2


class Bpe:
    """A ``tokenizer.json`` of the tokenizers library, with ``<pad>`` 0, ``<bos>`` 1, ``<eos>`` 2.

    Args:
        path: the file.
        length: T, tokens of a row; longer texts are cut, and end without ``<eos>``.

    Raises:
        ValueError: if the file is missing, is no tokenizer, or a text is empty.
    """

    def __init__(self, path: Path, length: int = 24) -> None:
        if not path.is_file():
            raise ValueError(f"{path}: no such tokenizer file")
        try:
            self.tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises a bare Exception
            raise ValueError(f"{path}: not a tokenizer file ({error})") from None
        self.length = length
        self.vocabulary: int = self.tokenizer.get_vocab_size()
        self.comma = self.ids(",")

    def ids(self, text: str) -> list[int]:
        if not text.strip():
            raise ValueError("an empty caption has no tokens")
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def row(self, pieces: Sequence[Sequence[int]]) -> list[int]:
        """Token pieces -> ``<bos> a , b , c <eos>`` of exactly ``length`` ids."""
        ids = [BOS]
        for k, piece in enumerate(pieces):
            ids += [*(self.comma if k else ()), *piece]
        ids = [*ids, EOS][: self.length]
        return ids + [PAD] * (self.length - len(ids))

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Int64 ``[N, T]``."""
        return torch.tensor([self.row([self.ids(text)]) for text in texts])
