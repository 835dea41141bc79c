"""``descant.load(PATH)``: the recipe of a run, checkpoint or export; ``descant.Embedder``: embed raw inputs with it.

Letters: N inputs, D width.
"""

from __future__ import annotations

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
from descant.datamodules.fields.fields import AudioField
from descant.datamodules.fields.images import Images
from descant.datamodules.prepared import parts, prepare_image
from descant.modules.core.batch import Batch
from descant.modules.io import hub, saved
from descant.modules.io.saved import Node, Saved
from descant.modules.tokenizers.text import Tokenizer
from descant.recipes.base.rebuild import rebuild
from descant.recipes.base.recipe import Recipe
from descant.run.runs import model_path

#: File in an export with the preprocessing of its modalities.
PREPROCESS = "preprocess.yaml"


def load(path: Path | str, checkpoint: str = "best", trust: Sequence[str] = (), into: Recipe | None = None) -> Recipe:
    """Load the recipe of a run or export with its weights, in eval mode: ``load(path).embed(batch)``.

    If the run has an EMA average, the weights are this average, as in its own validation. The recipe computes in
    float32 unless the caller casts or autocasts; a run trained in another precision validated in that precision.

    Args:
        path: a run folder (``runs/demo/001``), its name below ``runs`` (``demo/001``), a checkpoint in one, or a folder
            that ``descant export`` wrote.
        checkpoint: of a run folder: best (by its ModelCheckpoint's monitor; otherwise last), last or a file in it.
        trust: modules that its configuration may name beside Descant's own.
        into: a recipe built as the trained one was, which gets the weights. It is for runs of ``descant.fit``, whose
            ``config.yaml`` names only classes.
    """
    with trusting(trust):
        source = saved.find(model_path(Path("runs"), path), checkpoint)
        if into is None and "init_args" not in source.model:
            raise ValueError(f"{path}: trained in Python: load(..., into=recipe), of a recipe built as that one was")
        return rebuild(source, into)


class Embedder:
    """Embeds texts, images and sounds with a trained model and its preprocessing, as unit-length ``z_ND``.

    ``Embedder("runs/demo/001").texts(["a red apple"])`` embeds as validation did: same tokens, same image transform,
    averaged weights.

    Args:
        path, checkpoint, trust: as for :func:`load`.
        device: to compute on.
        batch_size: rows at once.
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
            source = saved.find(model_path(Path("runs"), path), checkpoint)
            self.recipe = rebuild(source).to(device)
            self.preprocess = preprocess(source)
        self.path, self.device, self.batch_size = source.folder, torch.device(device), batch_size

    @property
    def towers(self) -> nn.ModuleDict:
        return self.recipe.towers

    def texts(self, texts: str | Sequence[str]) -> Tensor:
        """Embed strings (or one) as ``z_ND``."""
        (tokenizer,) = self._parts("text")
        return self._embed("text", [texts] if isinstance(texts, str) else texts, tokenizer)

    def images(self, images: Any) -> Tensor:
        """Embed images of any sizes (or one) as ``z_ND``: PIL images, files, or uint8 ``[3 or 4, H, W]``."""
        parts = self._parts("image")
        if isinstance(images, str | Path | Image.Image) or (isinstance(images, Tensor) and images.ndim == 3):
            images = [images]
        return self._embed("image", images, lambda some: torch.cat([prepare_image(parts, image) for image in some]))

    def sounds(self, files: Path | str | Sequence[Path | str]) -> Tensor:
        """Embed sound files (or one) as ``z_ND``."""
        (field,) = self._parts("audio")
        files = [files] if isinstance(files, Path | str) else files
        return self._embed("audio", files, lambda some: torch.cat([_features(field, Path(file)) for file in some]))

    def embed(self, **inputs: Tensor) -> dict[str, Tensor]:
        """Embed preprocessed inputs (``image=x_NCHW, text=x_NT``): modality -> ``z_ND``."""
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
            raise ValueError(f"{self.path}: the preprocessing of {modality} is not known; use embed({modality}=...)")
        return self.preprocess[modality]


@contextmanager
def trusting(trust: Sequence[str]) -> Iterator[None]:
    """Apply the allow-list of classes inside the context; afterwards restore the parser's settings."""
    from descant.modules.core.compat.jsonargparse import restoring_settings

    with restoring_settings():
        enforce(trust)
        with saved.policy(trust_check(trust)), hub.allowing_downloads("hub" in trust):
            yield


def trust_check(trust: Sequence[str]) -> Callable[[str], None]:
    """Return the allow-list check for saved configurations; it raises ValueError."""

    def check(name: str) -> None:
        try:
            require(name, trust)
        except Refusal as refusal:
            raise ValueError(str(refusal)) from None

    return check


def preprocess(source: Saved) -> dict[str, list[Any]]:
    """Return modality -> preprocessing steps up to the tower's input; modalities without known steps are missing."""
    if source.exported:
        file = source.folder / PREPROCESS
        nodes = saved.read_yaml(file, source.folder) if file.is_file() else {}
        return {m: [saved.build(_STEPS, node, file) for node in steps] for m, steps in nodes.items()}
    data = datamodule(source)
    return parts(data) if data is not None else {}


def datamodule(source: Saved) -> L.LightningDataModule | None:
    """Build the data module of a run's configuration; None if that fails, such as for missing files."""
    node = source.config.get("data")
    if not isinstance(node, Mapping):
        return None
    try:
        return saved.build(L.LightningDataModule, cast(Node, node), source.folder)
    except (ValueError, OSError):
        return None


#: Classes of preprocessing steps in an export.
_STEPS = (Tokenizer, Images, AudioField, nn.Module)


def _features(field: AudioField, file: Path) -> Tensor:
    x_BS, (error,) = field.decode([file.read_bytes()], None)
    if error is not None:
        raise ValueError(f"{file}: {error}")
    return field.features(x_BS)
