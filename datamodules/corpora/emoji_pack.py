"""The emoji pack in memory: about 1,600 concepts drawn by four vendors, with names and keywords in 28 languages.

Letters: B samples of a batch, N concepts.
"""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from pyarrow import ArrowInvalid
from torch import Tensor
from torchvision.io import ImageReadMode, decode_webp

from descant.datamodules.sources.ledger import Ledger
from descant.modules.core.rng import uniform_NK
from descant.modules.tokenizers.text import Tokenizer
from descant.modules.transforms.image import reduce_rgba

PACK = Path(__file__).parents[1] / "packs" / "emoji"
VENDORS = ("noto", "twemoji", "openmoji", "fluent")
#: The lock-box beside the shards: concepts and drawings that only claims at their effect stage are tested on.
SEALED, SEALED_VENDOR = "sealed.parquet", "emojione"
#: Flat and without outlines, as the held-out Fluent: the training vendor that is most like it.
DEVELOPMENT_VENDOR = "twemoji"


class Decoded:
    """Decoded drawings of one vendor: uint8 ``[N, 4, 64, 64]``, bool ``[N]`` (which could be), and smaller copies."""

    def __init__(self, images: Tensor, good: np.ndarray) -> None:
        self.images, self.good = images, good
        self.reduced: dict[int, Tensor] = {images.shape[-1]: images}


#: Digest of the encoded drawings of a vendor -> what they decode to, while a pack of the process has it: the data
#: modules of a stream or a mixture share it.
_DECODED: weakref.WeakValueDictionary[bytes, Decoded] = weakref.WeakValueDictionary()


class Pack:
    """The rows of the pack, and their drawings as uint8 ``[4, 64, 64]``, each vendor decoded once in a process.

    Args:
        folder: of the parquet shards. ledger: where undecodable drawings are recorded.
    """

    def __init__(self, folder: Path = PACK, ledger: Ledger | None = None) -> None:
        self.folder, self.ledger = folder, ledger or Ledger(None)
        shards = sorted(folder.glob("emoji-*.parquet"))
        if not shards:
            raise ValueError(f"{folder}: no emoji-*.parquet shard here")
        self.rows: list[dict[str, Any]] = []
        self.file: list[str] = []
        for shard in shards:
            try:
                rows = pq.read_table(shard).to_pylist()
            except (ArrowInvalid, OSError) as error:
                raise ValueError(f"{shard}: not a readable parquet shard ({str(error).splitlines()[0]})") from None
            absent = {"hexcode", "split", "family", "names", "keywords", *VENDORS} - set(rows[0] if rows else ())
            if absent:
                raise ValueError(f"{shard}: {'no rows' if not rows else f'no column {min(absent)!r}'}")
            self.rows += rows
            self.file += [shard.name] * len(rows)
        self._decoded: dict[str, Decoded] = {}

    def __len__(self) -> int:
        return len(self.rows)

    def keep(self, concepts: Sequence[int]) -> None:
        """Drop all other concepts, before their drawings are decoded."""
        self.rows, self.file = [self.rows[c] for c in concepts], [self.file[c] for c in concepts]

    def unseal(self) -> None:
        """Hold out the lock-box in place of the test set: its concepts, and the drawings of its vendor.

        The concepts of the test set are dropped; those of the lock-box take their place, and the sealed vendor that of
        the held-out one, under its name. Concepts that it does not draw have no drawing there.
        """
        self.keep([n for n, row in enumerate(self.rows) if row["split"] != "test"])
        sealed = self.unseal_vendor()
        for row in self.rows:
            row["split"] = "test" if row["hexcode"] in sealed else "train"

    def unseal_vendor(self) -> set[str]:
        """Replace the held-out vendor's drawings by those of the sealed vendor, under its name, or by none.

        Returns the codes of the sealed concepts, whose split stays as it is.
        """
        path = self.folder / SEALED
        try:
            rows = pq.read_table(path).to_pylist()
        except (ArrowInvalid, OSError) as error:
            raise ValueError(f"{path}: not a readable lock-box ({str(error).splitlines()[0]})") from None
        drawing = {row["hexcode"]: row[SEALED_VENDOR] for row in rows}
        for row in self.rows:
            row[VENDORS[-1]] = drawing.get(row["hexcode"])
        return {row["hexcode"] for row in rows if row["sealed"]}

    @cached_property
    def languages(self) -> tuple[str, ...]:
        return tuple(self.rows[0]["names"])

    @cached_property
    def names(self) -> list[str]:
        """The English name of each concept."""
        return [row["names"]["en"] for row in self.rows]

    @cached_property
    def key_N(self) -> np.ndarray:
        """Content keys: concepts of equal English name have one, the number of the first of them."""
        first: dict[str, int] = {}
        return np.array([first.setdefault(name.casefold(), i) for i, name in enumerate(self.names)])

    def drawings(self, vendor: str) -> tuple[Tensor, np.ndarray]:
        """uint8 ``[N, 4, 64, 64]`` of a vendor, and bool ``[N]``: which of them could be decoded."""
        found = self._of(vendor)
        return found.images, found.good

    def reduced(self, vendor: str, size: int) -> Tensor:
        """uint8 ``[N, 4, size, size]`` of a vendor, averaged down once for all visits."""
        found = self._of(vendor)
        size = min(size, found.images.shape[-1])
        if size not in found.reduced:
            found.reduced[size] = reduce_rgba(found.images, size)
        return found.reduced[size]

    def _of(self, vendor: str) -> Decoded:
        if vendor not in self._decoded:
            digest = hashlib.sha256()
            for row in self.rows:
                # none is not an empty one, which cannot be decoded and is noted
                size = -1 if row[vendor] is None else len(row[vendor])
                digest.update(size.to_bytes(8, "little", signed=True) + (row[vendor] or b""))
            skipped = self.ledger.skipped
            decoded = _DECODED.get(digest.digest()) or self._decode(vendor)
            if self.ledger.skipped == skipped:  # else each pack notes its own
                _DECODED[digest.digest()] = decoded
            self._decoded[vendor] = decoded
        return self._decoded[vendor]

    def _decode(self, vendor: str) -> Decoded:
        images = torch.zeros(len(self), 4, 64, 64, dtype=torch.uint8)
        good = np.zeros(len(self), dtype=bool)
        for i, row in enumerate(self.rows):
            if row[vendor] is None:
                continue
            try:
                data = torch.frombuffer(bytearray(row[vendor]), dtype=torch.uint8)
                images[i] = decode_webp(data, mode=ImageReadMode.RGB_ALPHA)
            except (RuntimeError, TypeError, ValueError) as error:
                self.ledger.skip(self.file[i], f"{row['hexcode']}.{vendor}", str(error).splitlines()[0][:120])
                continue
            good[i] = True
            self.ledger.read()
        return Decoded(images, good)


def load_pack(folder: Path, ledger: Ledger, tiny: bool, sealed: bool = False) -> Pack:
    """The pack, or every twelfth concept of it; ``sealed``: with the lock-box for its test set."""
    pack = Pack(folder, ledger)
    if sealed:
        pack.unseal()
    if tiny:
        pack.keep(range(0, len(pack), 12))
    return pack


class Captions:
    """Token rows of concepts: a random caption for training, a fixed one for evaluation.

    Args:
        pack, tokenizer: where texts and ids come from.
        languages: of a sample, one is sampled among those in which the concept has a name.
        name_only: probability of a caption that is the name alone; others add a random part of the keywords.
        nameless: probability that a caption with keywords leaves the name out.
    """

    def __init__(
        self, pack: Pack, tokenizer: Tokenizer, languages: Sequence[str], name_only: float, nameless: float
    ) -> None:
        self.tokenizer, self.languages = tokenizer, tuple(languages)
        self.name_only, self.nameless = name_only, nameless
        self.names: dict[str, list[list[int] | None]] = {}
        self.keywords: dict[str, list[list[list[int]]]] = {}
        for language in self.languages:
            names = [row["names"][language] for row in pack.rows]
            self.names[language] = [tokenizer.ids(name) if name and name.strip() else None for name in names]
            words = [row["keywords"][language] or [] for row in pack.rows]
            self.keywords[language] = [[tokenizer.ids(w) for w in ws if w.strip()] for ws in words]
        self.most = max(len(words) for lists in self.keywords.values() for words in lists)
        purposes = ["language", "form", "count", "nameless", *(f"keyword{k}" for k in range(self.most))]
        self._purposes = [f"caption/{purpose}" for purpose in purposes]

    def has(self, concept: int) -> bool:
        return any(self.names[language][concept] for language in self.languages)

    def fixed(self, concept: int, keywords: bool) -> list[int]:
        """The name, with all its keywords or without, in the first language that names the concept."""
        language = next(lang for lang in self.languages if self.names[lang][concept])
        name = self.names[language][concept]
        assert name is not None
        return self.tokenizer.row([name, *(self.keywords[language][concept] if keywords else ())])

    def random(self, concept_B: np.ndarray, draw_B: np.ndarray) -> list[list[int]]:
        """A caption of each concept; language, form and keywords are sampled from the sample's seed."""
        u_BF, u_BK = uniform_NK(draw_B, self._purposes).split([4, self.most], dim=1)
        each = zip(concept_B.tolist(), u_BF.tolist(), u_BK.numpy(), strict=True)
        return [self._caption(concept, u_F, u_K) for concept, u_F, u_K in each]

    def _caption(self, concept: int, u_F: list[float], u_K: np.ndarray) -> list[int]:
        language, form, count, nameless = u_F
        named = [lang for lang in self.languages if self.names[lang][concept]]
        chosen = named[int(language * len(named))]
        name, words = self.names[chosen][concept], self.keywords[chosen][concept]
        assert name is not None
        if not words or form < self.name_only:
            return self.tokenizer.row([name])
        # a random number of keywords in random order: sets of words, not one list to memorise
        order = u_K[: len(words)].argsort()
        sampled = [words[k] for k in order[: 1 + int(count * len(words))]]
        return self.tokenizer.row([*([] if nameless < self.nameless else [name]), *sampled])
