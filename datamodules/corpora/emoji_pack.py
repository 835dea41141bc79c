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
#: The lock-box beside the shards: only claims at their effect stage are tested on its concepts and drawings.
SEALED, SEALED_VENDOR = "sealed.parquet", "emojione"
#: The training vendor most like the held-out Fluent: flat and without outlines.
DEVELOPMENT_VENDOR = "twemoji"


class Decoded:
    """Decoded drawings of one vendor: uint8 ``[N, 4, 64, 64]``, bool ``[N]`` (decoded or not), and smaller copies."""

    def __init__(self, images: Tensor, good: np.ndarray) -> None:
        self.images, self.good = images, good
        self.reduced: dict[int, Tensor] = {images.shape[-1]: images}


#: Digest of a vendor's encoded drawings -> the decoded drawings, while a pack of the process has them. The data modules
#: of a stream or a mixture share them.
_DECODED: weakref.WeakValueDictionary[bytes, Decoded] = weakref.WeakValueDictionary()


class Pack:
    """The rows of the pack, and their drawings as uint8 ``[4, 64, 64]``; each vendor is decoded once per process.

    Args:
        folder: folder of the parquet shards. ledger: records undecodable drawings.
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
        """Hold out the lock-box instead of the test set: its concepts, and the drawings of its vendor.

        The concepts of the test set are dropped, and those of the lock-box take their place. The sealed vendor takes
        the place and the name of the held-out vendor. Concepts that it does not draw have no drawing there.
        """
        self.keep([n for n, row in enumerate(self.rows) if row["split"] != "test"])
        sealed = self.unseal_vendor()
        for row in self.rows:
            row["split"] = "test" if row["hexcode"] in sealed else "train"

    def unseal_vendor(self) -> set[str]:
        """Replace the held-out vendor's drawings, under its name, by those of the sealed vendor, or by none.

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
        """Return the English name of each concept."""
        return [row["names"]["en"] for row in self.rows]

    @cached_property
    def key_N(self) -> np.ndarray:
        """Return content keys: concepts with equal English names share one, the number of the first of them."""
        first: dict[str, int] = {}
        return np.array([first.setdefault(name.casefold(), i) for i, name in enumerate(self.names)])

    def drawings(self, vendor: str) -> tuple[Tensor, np.ndarray]:
        """Return uint8 ``[N, 4, 64, 64]`` of a vendor, and bool ``[N]``: which of them could be decoded."""
        found = self._of(vendor)
        return found.images, found.good

    def downsample(self, vendor: str, size: int) -> Tensor:
        """Return uint8 ``[N, 4, size, size]`` of a vendor, averaged down once for all visits."""
        found = self._of(vendor)
        size = min(size, found.images.shape[-1])
        if size not in found.reduced:
            found.reduced[size] = reduce_rgba(found.images, size)
        return found.reduced[size]

    def _of(self, vendor: str) -> Decoded:
        if vendor not in self._decoded:
            digest = hashlib.sha256()
            for row in self.rows:
                # a missing drawing differs from an empty one, which cannot be decoded and is recorded
                size = -1 if row[vendor] is None else len(row[vendor])
                digest.update(size.to_bytes(8, "little", signed=True) + (row[vendor] or b""))
            skipped = self.ledger.skipped
            decoded = _DECODED.get(digest.digest()) or self._decode(vendor)
            if self.ledger.skipped == skipped:  # otherwise each pack records its own
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
    """Load the pack, or every twelfth concept of it; ``sealed``: with the lock-box as its test set."""
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
        languages: one is sampled for each sample, among those in which the concept has a name.
        name_only: probability of a caption that is only the name; others add a random part of the keywords.
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

    def evaluation_caption(self, concept: int, keywords: bool) -> list[int]:
        """Return the name, with or without all its keywords, in the first language that names the concept."""
        language = next(lang for lang in self.languages if self.names[lang][concept])
        name = self.names[language][concept]
        assert name is not None
        return self.tokenizer.row([name, *(self.keywords[language][concept] if keywords else ())])

    def random(self, concept_B: np.ndarray, draw_B: np.ndarray) -> list[list[int]]:
        """Sample a caption of each concept: language, form and keywords come from the sample's seed."""
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
