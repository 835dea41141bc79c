"""Rows of the emoji pack as a data set: images, captions, spoken names and float targets of a batch.

Letters: B samples of a batch, N of a set, T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from descant.datamodules.base import BatchDataset, Rows
from descant.datamodules.corpora.base import drop_tokens
from descant.datamodules.corpora.captions import MixedCaptions
from descant.datamodules.corpora.emoji_pack import VENDORS, Captions, Pack
from descant.datamodules.corpora.spoken import SpokenNamesSource
from descant.datamodules.resumable_sampler import Slot
from descant.modules.core.rng import seeded, uniform_N


class EmojiSet(BatchDataset):
    """Rows of (concept, vendor); either side may be absent: more names of a gallery are rows without an image.

    Args:
        concept_N, vendor_N: what each row shows. image_N, text_N: bool, which side is present.
        captions: of the text. random: sampled anew at each visit. token_dropout: share of tokens that become padding.
        key_N, label: content keys and label tables of all concepts.
        size: of the images.
        shuffle: captions of other concepts, by a fixed permutation (a control).
        keywords: whether fixed captions hold the keywords.
        views: 2 for a second image, the same concept by a vendor sampled from ``vendors``.
        transform: of each training image, or none.
        mixed: replaces ``captions``: the captions of each row, and their content keys.
        derived: modalities computed from the image on the device, present where it is.
        facts: name -> float targets by vendor number, each ``[concepts, ...]``.
        spoken: the spoken names of all concepts, present where the text is.
    """

    def __init__(
        self,
        pack: Pack,
        captions: Captions,
        concept_N: np.ndarray,
        vendor_N: np.ndarray,
        image_N: np.ndarray,
        text_N: np.ndarray,
        seed: int,
        key_N: np.ndarray,
        label: Mapping[str, np.ndarray],
        size: int,
        shuffle: bool = False,
        random: bool = False,
        token_dropout: float = 0.0,
        keywords: bool = True,
        views: int = 1,
        vendors: Sequence[str] = (),
        transform: nn.Module | None = None,
        drop: Mapping[str, float] | None = None,
        mixed: MixedCaptions | None = None,
        derived: Sequence[str] = (),
        facts: Mapping[str, Mapping[int, Tensor]] | None = None,
        spoken: SpokenNamesSource | None = None,
    ) -> None:
        super().__init__(seed, drop)
        self.mixed, self.derived, self.facts, self.spoken = mixed, derived, facts or {}, spoken
        self.pack, self.captions, self.random, self.keywords = pack, captions, random, keywords
        self.concept_N, self.vendor_N, self.image_N, self.text_N = concept_N, vendor_N, image_N, text_N
        self.key_N, self.label, self.size, self.views = key_N, label, size, views
        self.token_dropout, self.vendors, self.transform = token_dropout, vendors, transform
        self.caption_N = concept_N  # the concept whose caption each row has
        if shuffle:
            seen = np.unique(concept_N)
            other = dict(zip(seen.tolist(), np.random.default_rng(0).permutation(seen).tolist(), strict=True))
            self.caption_N = np.array([other[c] for c in concept_N.tolist()])

    def __len__(self) -> int:
        return len(self.concept_N)

    def identity(self, index_B: np.ndarray) -> np.ndarray:
        return self.concept_N[index_B] * len(VENDORS) + self.vendor_N[index_B]

    def present(self, index_N: np.ndarray) -> dict[str, Tensor]:
        image_N, text_N = (torch.from_numpy(has_N[index_N]) for has_N in (self.image_N, self.text_N))
        audio = {} if self.spoken is None else {"audio": text_N}
        return {"image": image_N, "text": text_N, **dict.fromkeys(self.derived, image_N), **audio}

    def visit(self, slots: Sequence[Slot], draw_B: np.ndarray) -> Rows:
        return self.rows(np.array([s.sample for s in slots]), draw_B, np.array([s.epoch for s in slots]))

    def rows(self, index_B: np.ndarray, draw_B: np.ndarray, epoch_B: np.ndarray | None = None) -> Rows:
        concept_B, vendor_B = self.concept_N[index_B], self.vendor_N[index_B]
        inputs = {"image": self._images(concept_B, vendor_B, draw_B, "image")}
        if self.views == 2:
            choice_B = torch.floor(uniform_N(draw_B, "view/vendor") * len(self.vendors)).long().numpy()
            second_B = np.array([VENDORS.index(v) for v in self.vendors])[choice_B]
            inputs["image@2"] = self._images(concept_B, second_B, draw_B, "image@2")
        text_BT, key_B = self._texts(index_B, draw_B, epoch_B)
        inputs["text"] = drop_tokens(text_BT, self.token_dropout, draw_B, self.captions.tokenizer.pad)
        if self.spoken is not None:
            inputs |= self.spoken.rows(self.caption_N[index_B], draw_B if self.random else None)
        targets = {name: torch.from_numpy(label_N[concept_B]) for name, label_N in self.label.items()}
        for name, by_vendor in self.facts.items():
            targets[name] = torch.stack([by_vendor[v][c] for c, v in zip(concept_B, vendor_B, strict=True)])
        return Rows(inputs, targets, key_B)

    def _texts(self, index_B: np.ndarray, draw_B: np.ndarray, epoch_B: np.ndarray | None) -> tuple[Tensor, Tensor]:
        """Token ids ``[B, T]`` and content keys ``[B]``."""
        if self.mixed is not None:
            return self.mixed.draw(index_B, draw_B, np.zeros_like(index_B) if epoch_B is None else epoch_B)
        concept_B = self.caption_N[index_B]
        if self.random:
            captions = self.captions.random(concept_B, draw_B)
        else:
            captions = [self.captions.fixed(int(c), self.keywords) for c in concept_B]
        # through numpy: torch takes three times as long for a list of lists
        return torch.from_numpy(np.array(captions)), torch.from_numpy(self.key_N[concept_B])

    def _images(self, concept_B: np.ndarray, vendor_B: np.ndarray, draw_B: np.ndarray, stream: str) -> Tensor:
        drawings = {v: self.pack.reduced(VENDORS[v], self.size) for v in np.unique(vendor_B)}
        images = torch.stack([drawings[v][c] for c, v in zip(concept_B, vendor_B, strict=True)])
        if self.transform is not None and self.random:
            transformed = []
            for image, draw in zip(images, draw_B, strict=True):
                with seeded(int(draw), stream):
                    transformed.append(self.transform(image))
            images = torch.stack(transformed)
        return images
