"""Tokenizers, text to token ids: pretrained, byte-pair encoding (BPE), bytes, words, and hashed character n-grams.

Letters: N texts, T tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import tokenizers
import torch
from torch import Tensor, nn

from descant.modules.core.errors import hint, require_value
from descant.modules.core.rng import salt
from descant.modules.io.pretrained import locate, padding_of, reading, tokenizer_of

PAD, BOS, EOS = 0, 1, 2
#: Number of special ids before those of text: padding, begin, end, mask, and reserved ones.
SPECIAL = 8
#: Marks the image in a dialogue written by a chat template.
PLACE = "\x00"


class Tokenizer:
    """Base of tokenizers, text -> token ids. A subclass sets ``vocabulary`` (number of ids) and ``comma`` (ids between
    two pieces).

    A row begins with ``begin``, ends with ``end`` and is filled with ``pad``. These are ``<bos>`` 1, ``<eos>`` 2 and
    ``<pad>`` 0 here, and the model's own in a pretrained tokenizer.

    Args:
        length: T, tokens of a row; longer texts are truncated, without ``<eos>``.
    """

    vocabulary: int
    comma: list[int]
    pad: int = PAD
    begin: tuple[int, ...] = (BOS,)
    end: tuple[int, ...] = (EOS,)

    def __init__(self, length: int) -> None:
        require_value(length >= 3, f"length {length}: a row holds <bos>, a token and <eos>, so at least 3")
        self.length = length

    def encode(self, text: str) -> list[int]:
        raise NotImplementedError

    def decode(self, ids: Sequence[int]) -> str:
        """Decode ids to text, without begin and end; for lossless tokenizers."""
        raise NotImplementedError

    def ids(self, text: str) -> list[int]:
        """Return the token ids of a text; raise ValueError for one without content."""
        ids = self.encode(text) if text.strip() else []
        if not ids:
            raise ValueError(f"an empty caption has no tokens: {text!r}")
        return ids

    def question(self, text: str, image: int | None, answer: int) -> list[int]:
        """Return the ids of a dialogue up to the answer: ``<bos> image text answer``.

        ``image``, ``answer``: the special ids of an image, if there is one, and of the beginning of an answer.
        """
        return [BOS, *_maybe(image), *self.ids(text), answer]

    def row(self, pieces: Sequence[Sequence[int]]) -> list[int]:
        """Join token pieces to ``<bos> a , b , c <eos>`` of exactly ``length`` ids."""
        return self._pad_ids([*self.begin, *self._join(pieces), *self.end][: self.length])

    def _join(self, pieces: Sequence[Sequence[int]]) -> list[int]:
        ids: list[int] = []
        for k, piece in enumerate(pieces):
            ids += [*(self.comma if k else ()), *piece]
        return ids

    def _pad_ids(self, ids: list[int]) -> list[int]:
        return ids + [self.pad] * (self.length - len(ids))

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Encode texts to int64 ``[N, T]``."""
        return torch.tensor([self.row([self.ids(text)]) for text in texts])


def require_fit(tokenizer: Tokenizer, tower: nn.Module, name: str = "text") -> None:
    """Check that a tokenizer's ids and rows fit a tower.

    >>> require_fit(NgramTokenizer(buckets=99), nn.Embedding(9, 4))  # a module without ``vocabulary`` is not checked
    """
    known = getattr(tower, "vocabulary", None)
    if known is None:
        return
    hint = "; the tokenizer of a pretrained tower is PretrainedTokenizer with the same folder, gguf or package"
    kind = type(tokenizer).__name__
    if tokenizer.vocabulary > known:
        raise ValueError(f"data.text: {kind} has {tokenizer.vocabulary} ids, and tower {name} embeds {known}{hint}")
    length = getattr(tower, "length", None)
    if name == "text" and isinstance(length, int) and length < tokenizer.length:
        rows = f"rows of {kind} have {tokenizer.length} tokens (its length)"
        raise ValueError(f"model.towers.text.length {length}: {rows}; make one of them the other")
    if getattr(tower, "pretrained", False) and isinstance(tokenizer, (BPETokenizer, ByteTokenizer, NgramTokenizer)):
        raise ValueError(f"data.text: tower {name} is pretrained on other ids than those of {kind}{hint}")
    if tokenizer.pad != getattr(tower, "pad", PAD):
        raise ValueError(f"data.text: {kind} pads with {tokenizer.pad}, tower {name} with {tower.pad}{hint}")
    end = getattr(tower, "end", None)
    if end is not None and tokenizer.end[-1:] != (end,):
        ends = f"ends texts with {tokenizer.end[-1]}" if tokenizer.end else "ends texts with no id"
        raise ValueError(f"data.text: {kind} {ends}, and tower {name} embeds a text at id {end}{hint}")


def _maybe(token: int | None) -> list[int]:
    return [] if token is None else [token]


class BPETokenizer(Tokenizer):
    """Byte-pair encoding (or any) tokenizer from a ``tokenizer.json`` with ``<pad>`` 0, ``<bos>`` 1, ``<eos>`` 2.

    Args:
        path: the file.
        length: T, tokens of a row.
        size: number of ids to keep, those of the first merges: texts get more tokens, and a softmax over the ids gets
            cheaper. All if not given.
    """

    def __init__(self, path: Path | str, length: int = 24, size: int | None = None) -> None:
        super().__init__(length)
        path = Path(path)
        if not path.is_file():
            raise ValueError(f"{path}: no such tokenizer file")
        try:
            self.tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises a bare Exception
            raise ValueError(f"{path}: not a tokenizer file ({error})") from None
        if size is not None:
            self.tokenizer = tokenizers.Tokenizer.from_str(_first_merges(path, size))
        self.vocabulary = self.tokenizer.get_vocab_size()
        self.comma = self.encode(",")
        self.ahead = self.tokenizer.decode(self.encode("a")).removesuffix("a")  # a space that decoding puts first

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids)).removeprefix(self.ahead)


def _first_merges(path: Path, size: int) -> str:
    """Cut a tokenizer file to ids below ``size``: a byte-pair encoding with fewer merges, each of which adds one id."""
    file = json.loads(path.read_text(encoding="utf-8"))
    vocab, merges = file["model"].get("vocab"), file["model"].get("merges")
    if file["model"].get("type") != "BPE":
        raise ValueError(f"{path}: size {size}: only a byte-pair encoding can be cut to its first merges")
    if not len(vocab) - len(merges) <= size <= len(vocab):
        raise ValueError(f"{path}: size {size}: from {len(vocab) - len(merges)} (no merge) to {len(vocab)} (all)")
    file["model"]["vocab"] = {token: i for token, i in vocab.items() if i < size}
    file["model"]["merges"] = [pair for pair in merges if vocab["".join(pair)] < size]
    return json.dumps(file)


class PretrainedTokenizer(Tokenizer):
    """Tokenizer of a pretrained Hugging Face model: the ids of its own ``__call__``, padded on the right.

    It equals ``tokenizer([text], padding="max_length", truncation=True, max_length=length)``. A row has the tokenizer's
    own begin and end (``[CLS]`` and ``[SEP]`` of BERT, often none of a language model), also for truncated texts, and
    its own padding. Pieces are joined as in ``a, b``; if a space belongs to the next word (byte-level BPE), they are
    decoded and encoded again.

    Args:
        folder: folder of the tokenizer's files, such as a model's folder.
        gguf: name of a GGUF file in the folder or package, or the path of one.
        package: name of an installed package that carries such a folder or file.
        length: T, tokens of a row.
    """

    def __init__(
        self, folder: Path | None = None, gguf: str | None = None, package: str | None = None, length: int = 32
    ) -> None:
        super().__init__(length)
        place = locate(folder, gguf, package, "tokenizer_config.json")
        with reading(place):
            whole = tokenizer_of(place)
            backend, pad = getattr(whole, "backend_tokenizer", None), padding_of(whole)
        if backend is None or pad is None:
            raise ValueError(f"{place.label}: its tokenizer has no {'padding' if backend else 'tokenizer.json'}")
        self.tokenizer: tokenizers.Tokenizer = backend
        self.whole, self.source, self.template = whole, place.label, getattr(whole, "chat_template", None)
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.pad, self.vocabulary = pad, 1 + max(self.tokenizer.get_vocab().values())
        with reading(place):
            self.begin, self.end = self._ends()
        if len(self.begin) + len(self.end) >= length:
            raise ValueError(f"length {length}: {place.label} adds {len(self.begin) + len(self.end)} ids to a text")
        with reading(place):
            #: whether a piece has the same ids alone and after a comma
            self.joins = self._words("red apple, fruit") == [*self._words("red apple"), ",", *self._words("fruit")]
            self.comma = self.encode(",") if self.joins else []

    def _ends(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Find the ids that the tokenizer adds before and after a text."""
        inner, ids = self.encode("a"), self.tokenizer.encode("a").ids
        start = next(k for k in range(len(ids)) if ids[k : k + len(inner)] == inner)
        return tuple(ids[:start]), tuple(ids[start + len(inner) :])

    def _words(self, text: str) -> list[str]:
        """Split a text into pre-tokenized words, which no token crosses."""
        normalizer, cutter = self.tokenizer.normalizer, self.tokenizer.pre_tokenizer
        text = text if normalizer is None else normalizer.normalize_str(text)
        return [text] if cutter is None else [word for word, _ in cutter.pre_tokenize_str(text)]

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids))

    def question(self, text: str, image: int | None, answer: int) -> list[int]:
        """Encode a user's turn in the tokenizer's chat template, with the image before the text.

        Raise ValueError for a tokenizer without a template, or one whose turns do not end with id 2.
        """
        if not self.template:
            raise ValueError(f"{self.source}: no chat template; use the tokenizer of an instruction-tuned model")
        turn = [{"role": "user", "content": PLACE + text}]
        whole = self.whole.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
        before, after = whole.split(PLACE)
        end = self.whole.eos_token_id
        if end != EOS:
            raise ValueError(f"{self.source}: a turn ends with id {end}, and dialogues end with {EOS}")
        return [*self.encode(before), *_maybe(image), *self.encode(after), answer]

    def row(self, pieces: Sequence[Sequence[int]]) -> list[int]:
        if self.joins or len(pieces) < 2:
            ids = self._join(pieces)
        else:
            ids = self.encode(
                ", ".join(self.tokenizer.decode(list(piece), skip_special_tokens=False) for piece in pieces)
            )
        room = self.length - len(self.begin) - len(self.end)
        return self._pad_ids([*self.begin, *ids[:room], *self.end])


class ByteTokenizer(Tokenizer):
    """Byte tokenizer, one id per UTF-8 byte: any language, lossless, every digit a token.

    Args:
        length: T, tokens of a row.

    >>> tokenizer = ByteTokenizer(length=6)
    >>> tokenizer.row([tokenizer.ids("7+5")]), tokenizer.vocabulary, tokenizer.decode(tokenizer.ids("naïve"))
    ([1, 63, 51, 61, 2, 0], 264, 'naïve')
    """

    def __init__(self, length: int = 64) -> None:
        super().__init__(length)
        self.vocabulary, self.comma = SPECIAL + 256, self.encode(", ")

    def encode(self, text: str) -> list[int]:
        return [SPECIAL + byte for byte in text.encode()]

    def decode(self, ids: Sequence[int]) -> str:
        """Decode bytes; invalid UTF-8 becomes U+FFFD."""
        return bytes(i - SPECIAL for i in ids if SPECIAL <= i < self.vocabulary).decode(errors="replace")


class WordTokenizer(Tokenizer):
    """Word tokenizer with a closed vocabulary, for synthetic data.

    Args:
        words: the vocabulary, in the order of ids.
        length: T, tokens of a row.

    >>> tokenizer = WordTokenizer(["the", "fox", "apple"], length=6)
    >>> tokenizer.row([tokenizer.ids("The fox")]), tokenizer.vocabulary
    ([1, 8, 9, 2, 0, 0], 11)
    """

    def __init__(self, words: Sequence[str], length: int = 16) -> None:
        super().__init__(length)
        self.words = tuple(words)
        self.known = {word: SPECIAL + k for k, word in enumerate(words)}
        if len(self.known) != len(words) or not words:
            twice = [word for word in self.known if self.words.count(word) > 1]
            raise ValueError(f"words: {twice[0]!r} is given twice" if twice else "words: none given")
        self.vocabulary, self.comma = SPECIAL + len(words), []

    def encode(self, text: str) -> list[int]:
        words = re.findall(r"\w+", text.lower())
        unknown = next((word for word in words if word not in self.known), None)
        if unknown is not None:
            near = hint(unknown, self.known, most=0)
            raise ValueError(f"{unknown!r} is not in the tokenizer's {len(self.known)} words{near}")
        return [self.known[word] for word in words]

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(self.words[i - SPECIAL] for i in ids if i >= SPECIAL)


class NgramTokenizer(Tokenizer):
    """Words and their character n-grams, hashed into buckets (fastText; Bojanowski 2017, arXiv 1607.04606).

    ``ids(text)`` holds, once each, a bucket for every word ``w`` and for every n-gram of ``<w>``. So rare words
    (sunglasses, sunflower) share n-grams with known ones. It takes any language and needs no file. Word order is lost,
    so use it with a bag of embeddings.

    Args:
        n: characters of an n-gram.
        buckets: number of ids; hash collisions are not resolved.
        length: T, tokens of a row.

    >>> tokenizer = NgramTokenizer(n=3)
    >>> shared = set(tokenizer.ids("sunglasses")) & set(tokenizer.ids("sun"))
    >>> len(tokenizer.ids("sun")), len(shared)  # the word, <su, sun, un>; of these <su and sun are shared
    (4, 2)
    """

    def __init__(self, n: int = 3, buckets: int = 8192, length: int = 80) -> None:
        super().__init__(length)
        require_value(n >= 2 and buckets > SPECIAL, f"n {n} is at least 2 and buckets {buckets} more than {SPECIAL}")
        self.n, self.vocabulary, self.comma = n, buckets, []

    def _bucket(self, piece: str) -> int:
        return SPECIAL + salt(piece) % (self.vocabulary - SPECIAL)

    def encode(self, text: str) -> list[int]:
        ids: dict[int, None] = {}  # an ordered set
        for word in re.findall(r"\w+|[^\w\s]", text.lower()):
            ids[self._bucket(f"word {word}")] = None
            if len(word) >= self.n:
                ends = f"<{word}>"
                for start in range(len(ends) - self.n + 1):
                    ids[self._bucket(ends[start : start + self.n])] = None
        return list(ids)
