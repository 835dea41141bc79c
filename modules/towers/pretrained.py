"""Models of other packages as towers, exactly as they were trained. Letters: B samples, T tokens, D width."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from descant.modules.core.errors import no_such, one_line, warn
from descant.modules.core.ranks import rank
from descant.modules.io.owners import (
    CONFIG,
    OPEN_CLIP,
    SENTENCE,
    Colour,
    ImageInput,
    image_input,
    make_image_input,
    owner_of,
)
from descant.modules.io.pretrained import Place, locate, reading
from descant.modules.towers.base import Tokens, Tower
from descant.modules.towers.encoders import Encoder, Output, Part, encoder_of
from descant.modules.towers.transformers import misfit

#: Mean and deviation of pixels in -1..1, as data modules return them by default.
HALF: Colour = (0.5, 0.5, 0.5)


class PretrainedTower(Tower):
    """Model of open_clip, transformers (CLIP, SigLIP, DINO, ...), timm or sentence-transformers: ``x -> h_B1D``.

    The files of the folder show which package owns it. An embedding is what the owner's package computes, including its
    pooling and projection. A recipe with one shared space adds no head, so that training begins with the owner's
    embeddings; its ``width`` has to be D. ``tokens`` ``[B, T, D]`` are the features before pooling (not for open_clip),
    for a trainable pool, fusion or language model.

    Images are float ``[B, 3, S, S]`` in -1..1, as data modules return them by default; the tower applies the owner's
    mean and deviation. Texts are ids ``[B, T]`` of its own tokenizer: ``PretrainedTokenizer`` of the same folder.

    Args:
        folder: a local folder as the owner's package saves it; or ``hub:OWNER/NAME[@REVISION]``, with ``--trust hub``.
        part: image or text, for a model that has both.
        output: embedding, or tokens before pooling.
        weights: false: random weights in the folder's architecture; the folder's weights are not read.
        size: S, pixels per side, if it is not the folder's and the model takes other sizes.
        mean, std: of pixels in 0..1, if the folder has no file with them.

    >>> import tempfile, timm
    >>> sizes = dict(img_size=32, depth=1, embed_dim=16, num_heads=2)
    >>> model = timm.create_model("vit_tiny_patch16_224", **sizes)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     timm.models.save_for_hf(model, folder, safe_serialization=True, model_args=sizes)
    ...     tower = PretrainedTower(folder)
    >>> tower(torch.zeros(2, 3, 32, 32)).h_BTD.shape
    torch.Size([2, 1, 16])
    """

    scale_311: Tensor
    shift_311: Tensor

    def __init__(
        self,
        folder: Path,
        part: Part | None = None,
        output: Output = "embedding",
        weights: bool = True,
        size: int | None = None,
        mean: Colour | None = None,
        std: Colour | None = None,
    ) -> None:
        super().__init__()
        for name, given, names in (("part", part or "image", get_args(Part)), ("output", output, get_args(Output))):
            if given not in names:
                raise ValueError(f"{name} {given!r}: {no_such(str(given), names)}")
        place = locate(folder, None, None, CONFIG, OPEN_CLIP, SENTENCE)
        owner = owner_of(place)
        self.folder, self.owner, self.label = place.folder, owner, place.label
        with reading(place), torch.random.fork_rng(devices=[]):  # initial weights must not shift other draws
            self.encoder = encoder = encoder_of(place, owner, part, output, weights)
            known = image_input(place, owner) if encoder.reads == "image" else None
        if part is not None and part != encoder.reads:
            raise ValueError(f"{place.label}: part {part}: {encoder.kind} reads {encoder.reads} alone")
        self.reads, self.width, self.projected = encoder.reads, encoder.width, output == "embedding"
        self.vocabulary, self.pad, self.end = encoder.vocabulary, encoder.pad, encoder.end
        self.pretrained, self.loaded = encoder.reads == "text", weights
        if self.reads == "text" and (size, mean, std) != (None, None, None):
            raise ValueError(
                f"{place.label}: size, mean, std: of images, and {encoder.kind} reads text here; leave them out"
            )
        #: How the owner prepares images; None for a text tower.
        self.input = None
        if self.reads == "image":
            self.input = _input(place, size, mean, std, known)
            _require_multiple(place, encoder.kind, self.input.size, encoder.multiple)
            own = known.size if known is not None else 0
            if size not in (None, own):
                _require_size(place, encoder, self.input.size, own)
            # (x / 2 + 1/2 - mean) / std of pixels in -1..1
            mean_3, std_3 = torch.tensor(self.input.mean), torch.tensor(self.input.std)
            self.register_buffer("scale_311", (0.5 / std_3).view(3, 1, 1), persistent=False)
            self.register_buffer("shift_311", ((0.5 - mean_3) / std_3).view(3, 1, 1), persistent=False)
        self.train()  # packages return models in eval mode

    def require_data(self, name: str, data: Any, stage: str) -> None:
        super().require_data(name, data, stage)
        if name in ("image", "text") and name != self.reads:
            raise ValueError(f"towers.{name}: {self.label} reads {self.reads}")
        steps = _image_steps(data)
        pixels = next((step for step in steps if hasattr(step, "std")), None)
        if name != "image" or self.input is None or pixels is None:
            return
        own = self.input
        if (tuple(pixels.mean), tuple(pixels.std)) != (HALF, HALF):
            raise ValueError(
                f"data: mean {list(pixels.mean)}, std {list(pixels.std)} of images, and towers.{name} applies its own, "
                f"{_digits(own.mean)} and {_digits(own.std)}; leave out those of the data"
            )
        if pixels.size != own.size:
            raise ValueError(
                f"data: images of {pixels.size} pixels, and towers.{name} reads {own.size}: set the data's size"
            )
        filter = next((step.filter for step in steps if hasattr(step, "filter")), "bilinear")
        fit = "crop" if any(hasattr(step, "filter") for step in steps) else "squash"
        differs = filter != own.filter or (fit != own.fit and fit == "crop")
        if stage == "fit" and rank() == 0 and own.filter and differs:
            warn(
                f"towers.{name} was trained on images resized by {own.filter} ({own.fit}), and the data's are resized "
                f"by {filter} ({fit})"
            )

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tokens:
        if self.input is not None:
            self._require_image(x, mask)
            return self.encoder.encode(x * self.scale_311 + self.shift_311, None)
        encoder = self.encoder
        self._require_ids(x)
        mask = self._real(x) if mask is None else mask
        try:
            # a row of only padding attends to all of it: a softmax over no key is NaN in some kernels
            return encoder.encode(x, mask | ~mask.any(dim=1, keepdim=True))
        except (IndexError, RuntimeError) as error:
            line = misfit(x, encoder.kind, self.vocabulary, encoder.most)
            if line is None:
                raise
            raise ValueError(line) from error

    def _real(self, x_BT: Tensor) -> Tensor:
        """Return which ids are not padding; if a text ends with the padding id, the first one is its end."""
        real_BT = x_BT != self.pad
        return real_BT | ((~real_BT).cumsum(dim=1) == 1) if self.encoder.closed else real_BT

    def _require_image(self, x: Tensor, mask: Tensor | None) -> None:
        assert self.input is not None
        if mask is not None:
            raise ValueError(f"mask: {self.encoder.kind} has no input tokens to mask; use PatchTower")
        if x.ndim != 4 or not x.is_floating_point():
            raise ValueError(f"{self.label}: it reads images, float [B, 3, S, S], not {_shape(x)}")
        side = self.input.size
        if x.shape[1:] != (3, side, side):
            raise ValueError(f"{self.label}: it reads images of {side} pixels, not {_shape(x)}: set the data's size")

    def _require_ids(self, x: Tensor) -> None:
        if x.ndim != 2 or x.is_floating_point():
            raise ValueError(f"{self.label}: it reads ids of texts, int [B, T], not {_shape(x)}")
        T, most = x.shape[1], self.encoder.most
        if most is not None and (most < T or (most > T and self.encoder.exactly)):
            what = (
                f"reads texts of exactly {most} ids, padding included" if self.encoder.exactly else f"reads {most} ids"
            )
            raise ValueError(f"{self.label}: it {what}, not {T}: set the tokenizer's length to {most}")

    def blocks(self) -> list[nn.Module]:
        return self.encoder.blocks()


def _shape(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}"


def _input(
    place: Place, size: int | None, mean: Colour | None, std: Colour | None, known: ImageInput | None
) -> ImageInput:
    """Return the folder's image settings, or make them from the arguments if the folder has none."""
    if known is None:
        if size is None or mean is None or std is None:
            raise ValueError(f"{place.label}: no preprocessor_config.json in it: give size, mean and std of its images")
        return make_image_input(place, (size, size), mean, std, "", "")
    for name, given, own in (("mean", mean, known.mean), ("std", std, known.std)):
        if given is not None and (
            len(given) != 3 or any(abs(a - b) > 1e-4 for a, b in zip(given, own, strict=True))  # allows printed digits
        ):
            raise ValueError(f"{place.label}: {name} {list(given)}, and its folder has {list(own)}; leave it out")
    if not known.size and size is None:
        raise ValueError(f"{place.label}: its images have no one size: give size, pixels of a side")
    return known if size is None else known._replace(size=size)


def _require_multiple(place: Place, kind: str, size: int, multiple: int) -> None:
    if size < 1 or size % multiple:
        near = max(round(size / multiple), 1) * multiple
        raise ValueError(f"{place.label}: size {size}: {kind} reads multiples of {multiple}; the nearest is {near}")


def _require_size(place: Place, encoder: Encoder, size: int, own: int) -> None:
    """Refuse a size at which the model fails, or at which its patches would leave out a margin of the image."""
    try:
        with torch.no_grad():
            encoder.eval().encode(torch.zeros(1, 3, size, size), None)
    except Exception as error:  # models raise any type of error
        why = f"images of {own} pixels; leave size out" if own else f"none of this size ({one_line(error, 200)})"
        raise ValueError(f"{place.label}: size {size}: {encoder.kind} reads {why}") from None
    cuts = (
        part.stride[0] for part in encoder.modules() if isinstance(part, nn.Conv2d) and part.kernel_size == part.stride
    )
    _require_multiple(place, encoder.kind, size, next(cuts, 1))


def _image_steps(data: object) -> tuple[Any, ...]:
    """Return how a data module prepares images for evaluation: its decoder, if it has one, and the normalisation.

    They are its attribute ``pixels``, or those of the image field in ``fields``. For a mixture they are those of the
    first part that has some.
    """
    parts = getattr(data, "parts", None)
    for one in (*(parts.values() if isinstance(parts, Mapping) else ()), data):
        try:
            fields, pixels = getattr(one, "fields", None), getattr(one, "pixels", None)
        except (ValueError, OSError):  # files are missing, which the data module reports itself
            continue
        image = fields.get("image") if isinstance(fields, Mapping) else None
        if image is not None and hasattr(image, "pixels"):
            return (getattr(image, "images", None), image.pixels)
        if pixels is not None:
            return (pixels,)
    return ()


def _digits(colour: Colour) -> str:
    return f"[{', '.join(f'{x:.4g}' for x in colour)}]"
