"""Images of any size in user data: their shapes, and the order of training by tokens. Letters: N rows of a source."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from descant.datamodules.fields.any_size import AnySizeField
from descant.datamodules.fields.fields import Field, ImageField
from descant.datamodules.sampling.resumable_sampler import BlockShuffle, Order
from descant.datamodules.sampling.token_order import TokenOrder
from descant.datamodules.sources.image_shapes import image_shapes
from descant.datamodules.sources.reading import Reader
from descant.datamodules.user.user_targets import UserTargets
from descant.modules.transforms.image import Augment


class UserSizes(UserTargets):
    """Base of :class:`UserData` for images of any size."""

    batch_tokens: int | None

    @property
    def fields(self) -> dict[str, Field]:
        raise NotImplementedError

    @property
    def readers(self) -> dict[str, Reader]:
        raise NotImplementedError

    @property
    def firsts(self) -> dict[str, int]:
        raise NotImplementedError

    @property
    def of_any_size(self) -> bool:
        """Whether images have several sizes, and each batch another shape."""
        return self.given is not None and isinstance(self.given.image, AnySizeField)

    def needs_shapes(self) -> dict[str, Any]:
        """Map each option that needs the shapes of all images to its value, which is false at its default."""
        image = self.given.image if self.given is not None else None
        if self.batch_tokens is not None and not isinstance(image, AnySizeField):
            raise ValueError(
                "batch_tokens: fields.image is no AnySizeField, and all of its images have as many tokens: batch_size"
            )
        refuses = isinstance(image, AnySizeField) and image.oversize == "error"
        return {"batch_tokens": self.batch_tokens, "fields.image.oversize error": refuses}

    @staticmethod
    def require_augment(augment: Augment, image: ImageField) -> None:
        """Raise ValueError for an augmentation of images of another size, or of images of any size."""
        if isinstance(image, AnySizeField):
            raise ValueError("augment: images of an AnySizeField have no one size; it has scale and flip instead")
        if augment.size != image.size:
            raise ValueError(f"augment.size {augment.size} is not fields.image.size {image.size}")

    def shapes(self, name: str, field: AnySizeField) -> np.ndarray:
        """Return height and width of the images of a source, int64 ``[N, 2]``; 0 x 0 if there is none."""
        known: dict[str, np.ndarray] = self.__dict__.setdefault("_shapes", {})
        if name not in known:
            reader = self.readers[name]
            known[name] = image_shapes(reader.source, reader.columns["image"], field.images)
        return known[name]

    def require_budget(self, name: str, row_N: np.ndarray) -> None:
        """Raise ValueError, naming it, for an image of these rows over the budget, if those are refused."""
        field = self.fields.get("image")
        if isinstance(field, AnySizeField) and field.oversize == "error":
            source = self.sources[name]
            field.require(self.shapes(name, field)[row_N], lambda at: source.name(int(row_N[at])))

    def token_order(self, name: str, row_N: np.ndarray, blocks: tuple[np.ndarray, int] | None, **cut: int) -> Order:
        """Return the training order by a budget of tokens, for these rows of a source."""
        assert self.batch_tokens is not None
        field = self.fields["image"]
        assert isinstance(field, AnySizeField)
        has_N = self.readers[name].present["image"][row_N]
        count_N = np.where(has_N, field.counts(self.shapes(name, field)[row_N]), 1)
        parts = cut.get("world", 1) * cut.get("accumulate", 1)  # the batch size does not matter here
        order = Order(len(row_N), parts, self.seed, True, **cut)
        if blocks is not None:
            order = BlockShuffle(blocks[0][row_N], blocks[1], parts, self.seed, **cut)
        return TokenOrder(order, count_N, self.batch_tokens)

    def to_picture(self, x_CHW: Tensor) -> Tensor:
        """Return an image as uint8 ``[3, H, W]``, without the area beside it; scale a tower's input to its range."""
        if x_CHW.is_floating_point():
            least, most = x_CHW.amin(), x_CHW.amax()
            x_CHW = (x_CHW - least) / (most - least).clamp(min=1e-6)
            return x_CHW.mul(255).round().to(torch.uint8)
        if len(x_CHW) == 3:
            return x_CHW
        high, wide = int((x_CHW[3, :, 0] > 0).sum()), int((x_CHW[3, 0] > 0).sum())
        return x_CHW[:3, :high, :wide]
