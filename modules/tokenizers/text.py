"""Text to token ids: a pretrained model's tokenizer, a byte-pair encoding file, bytes, a list of words, or hashed
character n-grams; and how pieces become one row.

Letters: N texts, T tokens.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import tokenizers
import torch
from torch import Tensor, nn

from descant.modules.core.errors import hint
from descant.modules.core.rng import salt
from descant.modules.io.pretrained import locate, padding_of, tokenizer_of

PAD, BOS, EOS = 0, 1, 2
#: Ids that stand for no text: padding, the two ends, a mask, and room for more.
SPECIAL = 8
#: Where a picture stands in a dialogue that a chat template writes out.
PLACE = "\x00"


class Tokenizer:
    """Text -> token ids. A subclass sets ``vocabulary`` (ids in all) and ``comma`` (ids between two pieces).

    A row begins with ``begin``, ends with ``end`` and is filled up with ``pad``: here ``<bos>`` 1, ``<eos>`` 2 and
    ``<pad>`` 0, in a pretrained model's codec whatever that model learned.

    Args:
        length: T, tokens of a row; longer texts are cut, and end without ``<eos>``.
    """

    vocabulary: int
    comma: list[int]
    pad: int = PAD
    begin: tuple[int, ...] = (BOS,)
    end: tuple[int, ...] = (EOS,)

    def __init__(self, length: int) -> None:
        if length < 3:
            raise ValueError(f"length {length}: a row holds <bos>, a token and <eos>, so at least 3")
        self.length = length

    def encode(self, text: str) -> list[int]:
        raise NotImplementedError

    def decode(self, ids: Sequence[int]) -> str:
        """The text that has these ids, without the ends; for codecs that forget nothing of a text that is told."""
        raise NotImplementedError

    def ids(self, text: str) -> list[int]:
        """Raises ValueError for a text without content."""
        found = self.encode(text) if text.strip() else []
        if not found:
            raise ValueError(f"an empty caption has no tokens: {text!r}")
        return found

    def question(self, text: str, image: int | None, answer: int) -> list[int]:
        """A dialogue up to where an answer begins: the ids of a picture and a question, ``<bos> image text answer``.

        ``image``, ``answer``: the ids that stand for a picture, where there is one, and for the beginning of an answer.
        """
        return [BOS, *_maybe(image), *self.ids(text), answer]

    def row(self, pieces: Sequence[Sequence[int]]) -> list[int]:
        """Token pieces -> ``<bos> a , b , c <eos>`` of exactly ``length`` ids."""
        return self._filled([*self.begin, *self._joined(pieces), *self.end][: self.length])

    def _joined(self, pieces: Sequence[Sequence[int]]) -> list[int]:
        ids: list[int] = []
        for k, piece in enumerate(pieces):
            ids += [*(self.comma if k else ()), *piece]
        return ids

    def _filled(self, ids: list[int]) -> list[int]:
        return ids + [self.pad] * (self.length - len(ids))

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Int64 ``[N, T]``."""
        return torch.tensor([self.row([self.ids(text)]) for text in texts])


def require_fit(codec: Tokenizer, tower: nn.Module, name: str = "text") -> None:
    """Refuse ids that a tower has no embedding for or never learned, and padding that it would read as a word.

    Raises:
        ValueError: if the codec has more ids than the tower or another padding, or the tower is pretrained and the
            codec makes ids of our own.

    >>> require_fit(NgramTokenizer(buckets=99), nn.Embedding(9, 4))  # it does not say how many ids it knows
    """
    known = getattr(tower, "vocabulary", None)
    if known is None:
        return
    own = "; a pretrained tower's own codec is Pretrained, with the same folder, gguf or package"
    if codec.vocabulary > known:
        kind = type(codec).__name__
        raise ValueError(f"data.text: {kind} has {codec.vocabulary} ids, and tower {name} embeds {known}{own}")
    if getattr(tower, "pretrained", False) and isinstance(codec, (BPETokenizer, ByteTokenizer, NgramTokenizer)):
        raise ValueError(
            f"data.text: tower {name} is pretrained and never learned the ids of {type(codec).__name__}{own}"
        )
    if codec.pad != getattr(tower, "pad", PAD):
        raise ValueError(f"data.text: {type(codec).__name__} pads with {codec.pad}, tower {name} with {tower.pad}{own}")


def _maybe(token: int | None) -> list[int]:
    return [] if token is None else [token]


class BPETokenizer(Tokenizer):
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
            self.tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises a bare Exception
            raise ValueError(f"{path}: not a tokenizer file ({error})") from None
        self.vocabulary = self.tokenizer.get_vocab_size()
        self.comma = self.encode(",")
        self.ahead = self.tokenizer.decode(self.encode("a")).removesuffix("a")  # a space that it writes before a text

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids)).removeprefix(self.ahead)


class PretrainedTokenizer(Tokenizer):
    """The tokenizer of a pretrained model: the same ids as its own ``__call__`` gives, padded on the right.

    ``codec([text]) == tokenizer([text], padding="max_length", truncation=True, max_length=length)``: its own ends
    (``[CLS]`` and ``[SEP]`` of BERT, often none of a language model), which a long text keeps, and its own padding.
    Pieces are joined as the tokenizer would read ``a, b``; where a space belongs to the word after it (byte-level
    BPE), that takes writing the pieces out and reading the row once more.

    Args:
        folder: of the tokenizer's files, such as a model's folder.
        gguf: name of a GGUF file in the folder or package, or the path of one.
        package: name of an installed package that carries such a folder or file.
        length: T, tokens of a row.

    Raises:
        ValueError: if not exactly one place is named, nothing is there, or its tokenizer has no padding or no fast
            form.
    """

    def __init__(
        self,
        folder: Path | None = None,
        gguf: str | None = None,
        package: str | None = None,
        length: int = 32,
    ) -> None:
        super().__init__(length)
        place = locate(folder, gguf, package, file="tokenizer_config.json")
        whole = tokenizer_of(place)
        backend, pad = getattr(whole, "backend_tokenizer", None), padding_of(whole)
        if backend is None or pad is None:
            raise ValueError(f"{place.said}: its tokenizer has no {'padding' if backend else 'tokenizer.json'}")
        self.tokenizer: tokenizers.Tokenizer = backend
        self.whole, self.said, self.template = whole, place.said, getattr(whole, "chat_template", None)
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.pad, self.vocabulary = pad, 1 + max(self.tokenizer.get_vocab().values())
        self.begin, self.end = self._ends()
        if len(self.begin) + len(self.end) >= length:
            raise ValueError(f"length {length}: {place.said} puts {len(self.begin) + len(self.end)} ids around a text")
        #: a piece has the same ids alone and behind a comma
        self.joins = self._words("red apple, fruit") == [*self._words("red apple"), ",", *self._words("fruit")]
        self.comma = self.encode(",") if self.joins else []

    def _ends(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """What the tokenizer puts before and after a text."""
        inner, ids = self.encode("a"), self.tokenizer.encode("a").ids
        start = next(k for k in range(len(ids)) if ids[k : k + len(inner)] == inner)
        return tuple(ids[:start]), tuple(ids[start + len(inner) :])

    def _words(self, text: str) -> list[str]:
        """What the tokenizer cuts a text into first; no token crosses a cut."""
        normalizer, cutter = self.tokenizer.normalizer, self.tokenizer.pre_tokenizer
        text = text if normalizer is None else normalizer.normalize_str(text)
        return [text] if cutter is None else [word for word, _ in cutter.pre_tokenize_str(text)]

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids))

    def question(self, text: str, image: int | None, answer: int) -> list[int]:
        """By the chat template of the tokenizer, as its user says it, the picture before the words.

        Raises ValueError for a tokenizer without a template, or one whose turns end with another id than dialogues, 2.
        """
        if not self.template:
            raise ValueError(f"{self.said}: its tokenizer has no chat template; take the one of an instructed model")
        said = [{"role": "user", "content": PLACE + text}]
        whole = self.whole.apply_chat_template(said, add_generation_prompt=True, tokenize=False)
        before, after = whole.split(PLACE)
        end = self.whole.eos_token_id
        if end != EOS:
            raise ValueError(f"{self.said}: a turn ends with id {end}, and dialogues end with {EOS}")
        return [*self.encode(before), *_maybe(image), *self.encode(after), answer]

    def row(self, pieces: Sequence[Sequence[int]]) -> list[int]:
        if self.joins or len(pieces) < 2:
            ids = self._joined(pieces)
        else:
            ids = self.encode(
                ", ".join(self.tokenizer.decode(list(piece), skip_special_tokens=False) for piece in pieces)
            )
        room = self.length - len(self.begin) - len(self.end)
        return self._filled([*self.begin, *ids[:room], *self.end])


class ByteTokenizer(Tokenizer):
    """One id a byte of the text's UTF-8: any language, nothing forgotten, and every digit a token of its own.

    Args:
        length: T, tokens of a row.

    >>> codec = ByteTokenizer(length=6)
    >>> codec.row([codec.ids("7+5")]), codec.vocabulary, codec.decode(codec.ids("naïve"))
    ([1, 63, 51, 61, 2, 0], 264, 'naïve')
    """

    def __init__(self, length: int = 64) -> None:
        super().__init__(length)
        self.vocabulary, self.comma = SPECIAL + 256, self.encode(", ")

    def encode(self, text: str) -> list[int]:
        return [SPECIAL + byte for byte in text.encode()]

    def decode(self, ids: Sequence[int]) -> str:
        """Bytes that are no UTF-8 become U+FFFD."""
        return bytes(i - SPECIAL for i in ids if SPECIAL <= i < self.vocabulary).decode(errors="replace")


class WordTokenizer(Tokenizer):
    """One id a word of a closed list, in the order of the text: for small worlds that are written about in few words.

    Args:
        words: all that there are, in the order of their ids.
        length: T, tokens of a row.

    Raises:
        ValueError: for a word twice, or nothing; in ``ids``, for a word that is not in the list.

    >>> codec = WordTokenizer(["the", "fox", "apple"], length=6)
    >>> codec.row([codec.ids("The fox")]), codec.vocabulary
    ([1, 8, 9, 2, 0, 0], 11)
    """

    def __init__(self, words: Sequence[str], length: int = 16) -> None:
        super().__init__(length)
        self.words = tuple(words)
        self.known = {word: SPECIAL + k for k, word in enumerate(words)}
        if len(self.known) != len(words) or not words:
            twice = [word for word in self.known if self.words.count(word) > 1]
            raise ValueError(f"words: {twice[0]!r} is there twice" if twice else "words: none given")
        self.vocabulary, self.comma = SPECIAL + len(words), []

    def encode(self, text: str) -> list[int]:
        words = re.findall(r"\w+", text.lower())
        unknown = next((word for word in words if word not in self.known), None)
        if unknown is not None:
            near = hint(unknown, self.known, most=0)
            raise ValueError(f"{unknown!r} is none of the {len(self.known)} words of this codec{near}")
        return [self.known[word] for word in words]

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(self.words[i - SPECIAL] for i in ids if i >= SPECIAL)


class NgramTokenizer(Tokenizer):
    """Words and their character n-grams, hashed into buckets (fastText; Bojanowski 2017, arXiv 1607.04606).

    ``ids(text)`` holds, once each, a bucket for every word ``w`` and one for every n-gram of ``<w>``. What rare words
    share (sun, sunglasses, sunflower) has an id of its own, so a bag of them says something of words never read.
    No file, any language; order is lost, so it goes with a bag of embeddings.

    Args:
        n: characters of an n-gram.
        buckets: ids in all; two texts that fall into one bucket are not told apart.
        length: T, tokens of a row.

    >>> codec = NgramTokenizer(n=3)
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
