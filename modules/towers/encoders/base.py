"""Interface of other packages' encoders for :class:`PretrainedTower`. Letters: B samples, T tokens, D width."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from torch import Tensor, nn

from descant.modules.io.pretrained import Place, padding_of, tokenizer_of
from descant.modules.towers.base import Tokens
from descant.modules.towers.image import all_real
from descant.modules.towers.transformers import outer_blocks

Part = Literal["image", "text"]
Output = Literal["embedding", "tokens"]


class Encoder(nn.Module):
    """Encoder of another package: ``encode(x, mask)`` returns an embedding ``[B, 1, D]`` or tokens ``[B, T, D]``.

    ``kind``: name of the model, for error messages. ``reads``: image or text. For texts: ``vocabulary``, ``pad`` and
    ``end`` as in towers; ``most``: ids of the longest text; ``exactly``: every text has ``most`` ids, padding included;
    ``closed``: the padding id also ends a text; ``sees_padding``: tokens attend to padding, as they did in training.
    For images: ``multiple``: each side is a multiple of this many pixels.
    """

    kind: str
    width: int
    reads: Part = "image"
    vocabulary: int | None = None
    pad: int = 0
    end: int | None = None
    most: int | None = None
    exactly: bool = False
    closed: bool = False
    sees_padding: bool = False
    multiple: int = 1

    def encode(self, x: Tensor, mask_BT: Tensor | None) -> Tokens:
        raise NotImplementedError

    def blocks(self) -> list[nn.Module]:
        return outer_blocks(self)

    def learn_ids(self, place: Place, pad: int) -> None:
        """Set ``pad`` and ``closed`` from the folder's tokenizer; without its padding id, keep the given ``pad``."""
        self.pad = pad
        if (place.folder / "tokenizer_config.json").is_file():
            tokenizer = tokenizer_of(place)
            known, ids = padding_of(tokenizer), tokenizer("a")["input_ids"]
            self.pad = self.pad if known is None else known
            self.closed = ids[-1:] == [self.pad]


def one_token(z_BD: Tensor) -> Tokens:
    h_B1D = z_BD.flatten(1)[:, None]
    return Tokens(h_B1D, all_real(h_B1D))


def require_part(place: Place, kind: str, part: Part | None) -> None:
    """Raise ValueError unless ``part`` names one of the model's two towers."""
    if part is None:
        raise ValueError(f"{place.label}: part: image or text; {kind} has both")


def weights_of(place: Place, *names: str) -> Path:
    """Return the first of these files that exists; raise ValueError for a folder without any."""
    file = next((place.folder / name for name in names if (place.folder / name).is_file()), None)
    if file is None:
        raise ValueError(f"{place.label}: no weights in it ({' or '.join(names)})")
    return file
