"""``descant.load(PATH)``: a run, a checkpoint in one or an export, as the recipe it is; ``descant.Embedder`` to use it.

Letters: N inputs, D width.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from PIL import Image
from torch import Tensor, nn

from descant.cli.errors import Refusal, hint
from descant.cli.trust import enforce, require
from descant.datamodules.fields.fields import AudioField, ImageField
from descant.datamodules.fields.images import Images
from descant.modules.core.batch import Batch
from descant.modules.io import saved
from descant.modules.io.saved import Node, Saved
from descant.modules.tokenizers.text import Tokenizer
from descant.modules.transforms.audio import LogMel
from descant.recipes.base.rebuild import rebuild
from descant.recipes.base.recipe import Recipe

#: Of an export: how raw data becomes what its towers read.
PREPROCESS = "preprocess.yaml"


def load(path: Path | str, checkpoint: str = "best", trust: Sequence[str] = (), into: Recipe | None = None) -> Recipe:
    """The recipe of a run or export with its weights, in eval mode: ``load(path).embed(batch)``.

    Where the run averaged its weights, these are the average, as in its own validation. It computes in float32 unless
    the caller casts or autocasts; a run trained in another precision validated in that one.

    Args:
        path: a run folder (``runs/demo/001``), a checkpoint in one, or a folder that ``descant export`` wrote.
        checkpoint: of a run folder: best (what its ModelCheckpoint monitored; else last), last or a file in it.
        trust: modules that its configuration may name beside Descant's own packages.
        into: a recipe built as the trained one was, which gets the weights: of runs of ``descant.fit``, whose
            ``config.yaml`` names classes only.

    Raises:
        ValueError: if there is no such thing, the configuration names a class outside the allow-list, or the weights
            are not of the model that it describes.
    """
    with trusting(trust):
        found = saved.find(path, checkpoint)
        if into is None and "init_args" not in found.model:
            raise ValueError(f"{path}: trained in Python: load(..., into=recipe), of a recipe built as that one was")
        return rebuild(found, into)


class Embedder:
    """A model and the preprocessing that it was trained with: texts, pictures and sounds in, unit-length ``z_ND`` out.

    ``Embedder("runs/demo/001").texts(["a red apple"])`` embeds as validation did: the same tokens, the same view of
    the pixels, the average of the weights.

    Args:
        path, checkpoint, trust: as for :func:`load`.
        device: to compute on.
        batch_size: rows that pass the model at once.

    Raises:
        ValueError: as :func:`load`; in use, if the model has no such tower or nothing says how to prepare its input.
    """

    def __init__(
        self,
        path: Path | str,
        checkpoint: str = "best",
        trust: Sequence[str] = (),
        device: torch.device | str = "cpu",
        batch_size: int = 256,
    ) -> None:
        with trusting(trust):
            found = saved.find(path, checkpoint)
            self.recipe = rebuild(found).to(device)
            self.preprocess = preprocess(found)
        self.path, self.device, self.batch_size = found.folder, torch.device(device), batch_size

    @property
    def towers(self) -> nn.ModuleDict:
        return self.recipe.towers

    def texts(self, texts: str | Sequence[str]) -> Tensor:
        """Strings -> ``z_ND``; a string by itself is one text, not its letters."""
        (codec,) = self._parts("text")
        return self._embed("text", [texts] if isinstance(texts, str) else texts, codec)

    def images(self, images: Any) -> Tensor:
        """Pictures of any sizes, each a PIL image, a file, or uint8 ``[3 or 4, H, W]`` -> ``z_ND``; or one of them."""
        parts = self._parts("image")
        if isinstance(images, str | Path | Image.Image) or (isinstance(images, Tensor) and images.ndim == 3):
            images = [images]
        return self._embed("image", images, lambda some: torch.cat([_seen(parts, image) for image in some]))

    def sounds(self, files: Path | str | Sequence[Path | str]) -> Tensor:
        """Sound files, or one -> ``z_ND``."""
        (field,) = self._parts("audio")
        files = [files] if isinstance(files, Path | str) else files
        return self._embed("audio", files, lambda some: torch.cat([_heard(field, Path(file)) for file in some]))

    def embed(self, **inputs: Tensor) -> dict[str, Tensor]:
        """What towers read, ready made (``image=x_NCHW, text=x_NT``) -> modality -> ``z_ND``."""
        rows = len(next(iter(inputs.values())))
        present = {m: torch.ones(rows, dtype=torch.bool, device=self.device) for m in inputs}
        with torch.inference_mode():
            z = self.recipe.embed(Batch({m: x.to(self.device) for m, x in inputs.items()}, present))  # type: ignore[operator]
        return cast(dict[str, Tensor], z)

    def _embed(self, modality: str, inputs: Sequence[Any], prepare: Callable[[Sequence[Any]], Tensor]) -> Tensor:
        if len(inputs) == 0:
            raise ValueError(f"nothing to embed: an empty list for {modality}")
        parts = [inputs[k : k + self.batch_size] for k in range(0, len(inputs), self.batch_size)]
        return torch.cat([self.embed(**{modality: prepare(part)})[modality] for part in parts])

    def _parts(self, modality: str) -> list[Any]:
        if modality not in self.towers:
            raise ValueError(f"{self.path}: it has no {modality} tower{hint(modality, self.towers)}")
        if modality not in self.preprocess:
            raise ValueError(f"{self.path}: nothing says how {modality} was prepared; use embed({modality}=...)")
        return self.preprocess[modality]


# how it is built ----------------------------------------------------------------------------------------------------


@contextmanager
def trusting(trust: Sequence[str]) -> Iterator[None]:
    """The allow-list while something is built; after that the rest of a program may do again what it might before."""
    from jsonargparse import _common  # its settings can be set by its API, but not read

    before = dict(_common.parsing_settings)
    try:
        enforce(trust)
        with saved.policy(allowed(trust)):
            yield
    finally:
        _common.parsing_settings.clear()
        _common.parsing_settings.update(before)


def allowed(trust: Sequence[str]) -> Callable[[str], None]:
    """The allow-list for configurations that objects read while they are built, whose ValueErrors are reported."""

    def check(name: str) -> None:
        try:
            require(name, trust)
        except Refusal as refusal:
            raise ValueError(str(refusal)) from None

    return check


# what it reads ------------------------------------------------------------------------------------------------------


def preprocess(found: Saved) -> dict[str, list[Any]]:
    """Modality -> what turns raw input into what its tower reads, in order; what nothing is known of is left out."""
    if found.exported:
        file = found.folder / PREPROCESS
        nodes = saved.read_yaml(file, found.folder) if file.is_file() else {}
        return {m: [saved.build(_KINDS, node, file) for node in steps] for m, steps in nodes.items()}
    data = datamodule(found)
    return parts(data) if data is not None else {}


def datamodule(found: Saved) -> L.LightningDataModule | None:
    """The data module of a run's configuration, or None where it cannot be made here: its files may be elsewhere."""
    node = found.config.get("data")
    if not isinstance(node, Mapping):
        return None
    try:
        return saved.build(L.LightningDataModule, cast(Node, node), found.folder)
    except (ValueError, OSError):
        return None


def parts(data: Any) -> dict[str, list[Any]]:
    """What a data module prepares its modalities with, as evaluation sees them, found by the names that all use.

    ``codec`` of texts; ``pixels`` (an ``nn.Module`` from uint8 to what the tower reads) of pictures; ``features`` and
    ``seconds`` of sound; ``fields`` where it decodes files itself; ``parts`` of a mixture, the first that has each.
    """
    if isinstance(inner := getattr(data, "parts", None), Mapping):
        several = [parts(part) for part in reversed(list(inner.values()))]
        return {modality: steps for found in several for modality, steps in found.items()}
    found: dict[str, list[Any]] = {"text": [_asked(data, "codec")], "image": [_asked(data, "pixels")]}
    features, fields = _asked(data, "features"), _asked(data, "fields")
    if isinstance(features, LogMel):
        found["audio"] = [AudioField(rate=features.rate, seconds=data.seconds, log_mel=features)]
    for field in fields.values() if isinstance(fields, Mapping) else ():
        if isinstance(field, ImageField):
            found["image"] = [field.images, field.pixels]
        elif isinstance(field, AudioField):
            found["audio"] = [field]
    return {modality: steps for modality, steps in found.items() if None not in steps}


def _asked(data: Any, name: str) -> Any:
    """An attribute, or None where there is none or its files are not here: much is read when it is first asked for."""
    try:
        return getattr(data, name, None)
    except (ValueError, OSError):
        return None


#: What an export's preprocessing may be made of.
_KINDS = (Tokenizer, Images, AudioField, nn.Module)


def _seen(parts: Sequence[Any], image: Any) -> Tensor:
    """One picture as its tower reads it, ``[1, 3, S, S]``."""
    *decoder, view = parts
    if decoder:  # the run's pictures were files: their crop and resampling are the decoder's
        x_B3SS, (error,) = decoder[0]([_encoded(image)])
        if error is not None:
            raise ValueError(f"{image if isinstance(image, str | Path) else 'a picture'}: {error}")
    else:
        x_B3SS = _uint8(image)[None]
    return cast(Tensor, view(x_B3SS, torch.zeros(1, dtype=torch.long)))


def _uint8(image: Any) -> Tensor:
    if isinstance(image, str | Path):
        from PIL import Image

        with Image.open(image) as opened:
            return _uint8(opened.convert("RGBA" if opened.has_transparency_data else "RGB"))
    if not isinstance(image, Tensor):
        from torchvision.transforms.v2.functional import pil_to_tensor

        image = pil_to_tensor(image if image.mode in ("RGB", "RGBA") else image.convert("RGB"))
    if image.dtype != torch.uint8 or image.ndim != 3 or len(image) not in (3, 4):
        raise ValueError(f"a picture is uint8 [3 or 4, H, W], not {image.dtype} {list(image.shape)}")
    return cast(Tensor, image)


def _encoded(image: Any) -> bytes:
    """A file's own bytes, else a lossless PNG."""
    if isinstance(image, str | Path):
        return Path(image).read_bytes()
    from torchvision.io import encode_png
    from torchvision.transforms.v2.functional import to_pil_image

    x_CHW = _uint8(image)
    if len(x_CHW) == 3:
        return bytes(encode_png(x_CHW).numpy())
    with io.BytesIO() as file:
        to_pil_image(x_CHW).save(file, "PNG")
        return file.getvalue()


def _heard(field: AudioField, file: Path) -> Tensor:
    x_BS, (error,) = field.decode([file.read_bytes()], None)
    if error is not None:
        raise ValueError(f"{file}: {error}")
    return field.features(x_BS)
