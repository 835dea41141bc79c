"""Rows of the emoji pack as a data set: images, captions, spoken names and float targets of a batch.

Letters: B samples of a batch, N of a set, T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from descant.datamodules.base import NumberedDataset, Rows
from descant.datamodules.corpora.base import drop_tokens
from descant.datamodules.corpora.emoji_pack import VENDORS, Captions
from descant.datamodules.sampling.resumable_sampler import Slot
from descant.modules.core.rng import seeding, uniform_N

if TYPE_CHECKING:
    from descant.datamodules.corpora.emoji import Emoji

#: (concept, vendor, whether its image is present, whether its text is).
Row = tuple[int, str, bool, bool]


class EmojiSet(NumberedDataset):
    """Rows of (concept, vendor). Image or text may be absent: further names of a gallery are rows without an image.

    Args:
        data: module with the pack and the options of all its sets.
        rows: concept, vendor, and which side is present.
        captions: source of the texts; that of ``data`` by default.
        label: label tables of all concepts, besides those of ``data``.
        random: whether this is a training set: captions, views and voices are sampled anew at each visit.
        trained: whether these are training samples; if ``data`` shuffles captions, they have those of other concepts.
        keywords: whether fixed captions hold the keywords; as in ``data`` by default.
    """

    def __init__(
        self,
        data: Emoji,
        rows: Sequence[Row],
        captions: Captions | None = None,
        label: Mapping[str, np.ndarray] | None = None,
        random: bool = False,
        trained: bool = False,
        keywords: bool | None = None,
    ) -> None:
        super().__init__(data.seed, data.drop if random else None)
        good = {vendor: data.pack.drawings(vendor)[1] for vendor in {row[1] for row in rows}}
        if data.paired and not random:
            rows = [(c, v, True, True) for c, v, image, _ in rows if image and good[v][c]]
        concept, vendor, image, text = zip(*rows, strict=True)
        self.data, self.random, self.captions = data, random, captions or data.captions
        self.concept_N, self.vendor_N = np.array(concept), np.array([VENDORS.index(v) for v in vendor])
        self.id_N = self.concept_N * len(VENDORS) + self.vendor_N
        self.image_N = np.array([has and good[v][c] for c, v, has in zip(concept, vendor, image, strict=True)])
        self.text_N = np.array(text)
        self.keywords = data.keywords if keywords is None else keywords
        self.label = data.label | dict(label or {})
        self.facts = data.facts(sorted(set(vendor))) if data.readout and not random else {}
        self.cells = data.cells if data.table else {}
        self.mixed, self.spoken = data.mixed_captions if random else None, data.spoken_names
        self.views = data.views.get("image", 1) if random else 1
        if self.views == 2:
            self.second_V = np.array([VENDORS.index(v) for v in data.vendors])
            self.drawn_VN = np.stack([np.asarray(data.pack.drawings(v)[1]) for v in data.vendors])
        self.caption_N = self.concept_N  # the concept whose caption each row has
        if trained and data.shuffle_captions:
            seen = np.unique(self.concept_N)
            other = dict(zip(seen.tolist(), np.random.default_rng(0).permutation(seen).tolist(), strict=True))
            self.caption_N = np.array([other[c] for c in concept])

    def present(self, index_N: np.ndarray) -> dict[str, Tensor]:
        image_N, text_N = (torch.from_numpy(has_N[index_N]) for has_N in (self.image_N, self.text_N))
        audio = {} if self.spoken is None else {"audio": text_N}
        of_image = [*self.data.derived, *(m for m in ("table", "regions") if m in self.data.modalities)]
        return {"image": image_N, "text": text_N, **dict.fromkeys(of_image, image_N), **audio}

    def visit(self, slots: Sequence[Slot], draw_B: np.ndarray) -> Rows:
        return self.rows(np.array([s.sample for s in slots]), draw_B, np.array([s.epoch for s in slots]))

    def rows(self, index_B: np.ndarray, draw_B: np.ndarray, epoch_B: np.ndarray | None = None) -> Rows:
        concept_B, vendor_B = self.concept_N[index_B], self.vendor_N[index_B]
        inputs = {"image": self._images(concept_B, vendor_B, draw_B, "image")}
        if self.views == 2:
            choice_B = torch.floor(uniform_N(draw_B, "view/vendor") * len(self.data.vendors)).long().numpy()
            second_B = self.second_V[choice_B]
            # if the other vendor does not draw the concept, its own drawing is used again
            second_B = np.where(self.drawn_VN[choice_B, concept_B], second_B, vendor_B)
            inputs["image@2"] = self._images(concept_B, second_B, draw_B, "image@2")
        inputs["text"], key_B = self._texts(index_B, draw_B, epoch_B)
        if self.spoken is not None:
            inputs |= self.spoken.rows(self.caption_N[index_B], draw_B if self.random else None)
        if self.data.table:
            x_BC = torch.stack([self.cells[v][c] for c, v in zip(concept_B, vendor_B, strict=True)])
            key_N = draw_B if self.random else self.id_N[index_B]
            hide = self.data.missing
            inputs["table"] = x_BC if hide is None else hide(x_BC, key_N, self.random)
        targets = {name: torch.from_numpy(label_N[concept_B]) for name, label_N in self.label.items()}
        for name, by_vendor in self.facts.items():
            targets[name] = torch.stack([by_vendor[v][c] for c, v in zip(concept_B, vendor_B, strict=True)])
        return Rows(inputs, targets, key_B)

    def input_of(self, modality: str, slots: Sequence[Slot], draw_B: np.ndarray) -> Tensor:
        if modality != "text":
            return super().input_of(modality, slots, draw_B)
        return self._texts(np.array([s.sample for s in slots]), draw_B, np.array([s.epoch for s in slots]))[0]

    def _texts(self, index_B: np.ndarray, draw_B: np.ndarray, epoch_B: np.ndarray | None) -> tuple[Tensor, Tensor]:
        """Return token ids ``[B, T]`` and content keys ``[B]``."""
        text_BT, key_B = self._captions(index_B, draw_B, epoch_B)
        dropout = self.data.token_dropout if self.random else 0.0
        return drop_tokens(text_BT, dropout, draw_B, self.captions.tokenizer.pad), key_B

    def _captions(self, index_B: np.ndarray, draw_B: np.ndarray, epoch_B: np.ndarray | None) -> tuple[Tensor, Tensor]:
        if self.mixed is not None:
            return self.mixed.draw(index_B, draw_B, np.zeros_like(index_B) if epoch_B is None else epoch_B)
        concept_B = self.caption_N[index_B]
        if self.random:
            captions = self.captions.random(concept_B, draw_B)
        else:
            captions = [self.captions.evaluation_caption(int(c), self.keywords) for c in concept_B]
        # through numpy: torch takes three times as long for a list of lists
        return torch.from_numpy(np.array(captions)), torch.from_numpy(self.data.pack.key_N[concept_B])

    def _images(self, concept_B: np.ndarray, vendor_B: np.ndarray, draw_B: np.ndarray, stream: str) -> Tensor:
        drawings = {v: self.data.pack.downsample(VENDORS[v], self.data.size) for v in np.unique(vendor_B)}
        images = torch.stack([drawings[v][c] for c, v in zip(concept_B, vendor_B, strict=True)])
        if self.data.transform is not None and self.random:
            transformed = []
            for image, draw in zip(images, draw_B, strict=True):
                with seeding(int(draw), stream):
                    transformed.append(self.data.transform(image))
            images = torch.stack(transformed)
        return images
