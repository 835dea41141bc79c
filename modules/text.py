"""Text to token ids: a byte-pair encoding file, or hashed character n-grams; and how pieces become one row.

Letters: N texts, T tokens.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from descant.modules.random import salt

PAD, BOS, EOS = 0, 1, 2
#: Ids that stand for no text: padding, the two ends, a mask, and room for more.
SPECIAL = 8


class Codec:
    """Text -> token ids, with ``<pad>`` 0, ``<bos>`` 1, ``<eos>`` 2. A subclass sets ``comma`` and ``vocabulary``.

    Args:
        length: T, tokens of a row; longer texts are cut, and end without ``<eos>``.
    """

    vocabulary: int
    comma: list[int]

    def __init__(self, length: int) -> None:
        if length < 3:
            raise ValueError(f"length {length}: a row holds <bos>, a token and <eos>, so at least 3")
        self.length = length

    def encode(self, text: str) -> list[int]:
        raise NotImplementedError

    def ids(self, text: str) -> list[int]:
        """Raises ValueError for a text without content."""
        found = self.encode(text) if text.strip() else []
        if not found:
            raise ValueError(f"an empty caption has no tokens: {text!r}")
        return found

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


class Bpe(Codec):
    """A ``tokenizer.json`` of the tokenizers library, with ``<pad>`` 0, ``<bos>`` 1, ``<eos>`` 2.

    Args:
        path: the file.
        length: T, tokens of a row.

    Raises:
        ValueError: if the file is missing or is no tokenizer.
    """

    def __init__(self, path: Path | str, length: int = 24) -> None:
        super().__init__(length)
        path = Path(path)
        if not path.is_file():
            raise ValueError(f"{path}: no such tokenizer file")
        try:
            self.tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises a bare Exception
            raise ValueError(f"{path}: not a tokenizer file ({error})") from None
        self.vocabulary = self.tokenizer.get_vocab_size()
        self.comma = self.encode(",")

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids


class Ngrams(Codec):
    """Words and their character n-grams, hashed into buckets (fastText; Bojanowski 2017, arXiv 1607.04606).

    ``ids(text)`` holds, once each, a bucket for every word ``w`` and one for every n-gram of ``<w>``. What rare words
    share (sun, sunglasses, sunflower) has an id of its own, so a bag of them says something of words never read.
    No file, any language; order is lost, so it goes with a bag of embeddings.

    Args:
        n: characters of an n-gram.
        buckets: ids in all; two texts that fall into one bucket are not told apart.
        length: T, tokens of a row.

    >>> codec = Ngrams(n=3)
    >>> shared = set(codec.ids("sunglasses")) & set(codec.ids("sun"))
    >>> len(codec.ids("sun")), len(shared)  # the word, <su, sun, un>; of these <su and sun are shared
    (4, 2)
    """

    def __init__(self, n: int = 3, buckets: int = 8192, length: int = 80) -> None:
        super().__init__(length)
        if n < 2 or buckets <= SPECIAL:
            raise ValueError(f"n {n} is at least 2 and buckets {buckets} more than {SPECIAL}")
        self.n, self.vocabulary, self.comma = n, buckets, []

    def _bucket(self, piece: str) -> int:
        return SPECIAL + salt(piece) % (self.vocabulary - SPECIAL)

    def encode(self, text: str) -> list[int]:
        found: dict[int, None] = {}
        for word in re.findall(r"\w+|[^\w\s]", text.lower()):
            found[self._bucket(f"word {word}")] = None
            if len(word) >= self.n:
                ends = f"<{word}>"
                for start in range(len(ends) - self.n + 1):
                    found[self._bucket(ends[start : start + self.n])] = None
        return list(found)
