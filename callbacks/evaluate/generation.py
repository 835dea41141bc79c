"""Image grids of generated modalities: a row for each given modality, a column for each generated one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import lightning as L
import torch
from torch import Tensor

from descant.callbacks.evaluate.reconstruction import ReconstructionPictures
from descant.callbacks.plots.generation import Shown, grid
from descant.modules.core.batch import Batch
from descant.modules.core.capabilities import has
from descant.modules.core.objects import require_objects
from descant.modules.core.protocols import DecodesTokens
from descant.modules.masking.sampler import Sampler
from descant.modules.training_setup.trainer import datamodule_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class GenerationPictures(ReconstructionPictures):
    """Grids of a masked model's samples: a row for each given modality, a column for each generated one, and the truth.

    Every target is generated from each given modality alone. Codes of a CodeAdapter are shown decoded, category maps in
    fixed colours, and texts as words if the data has a lossless tokenizer, else as numbers. The grids go to every
    TensorBoard logger as ``pictures/{set}-generation`` and to ``{run folder}/pictures/``. They show the same samples in
    each evaluation; the sanity check draws nothing.

    Args:
        given: modalities to generate from, one at a time.
        targets: modalities to generate.
        sampler: how to sample; by default eight steps, the most probable tokens first.
        count: samples of a set, selected by their ids.
        sets, every, validate: see :class:`ForwardEvaluator`.

    >>> GenerationPictures(given=[], targets=["palette"])
    Traceback (most recent call last):
    ValueError: GenerationPictures: given: none; such as given [image] targets [palette]
    """

    needs = (DecodesTokens,)  # type: ignore[assignment]  # instead of Reconstructs

    def __init__(
        self,
        given: list[str],
        targets: list[str],
        sampler: Sampler | None = None,
        count: int = 4,
        sets: list[str] | None = None,
        every: int = 1,
        validate: bool = True,
    ) -> None:
        super().__init__(every, count, list(dict.fromkeys([*given, *targets])), sets, None, validate, "generation")
        require_objects(self, sampler=(sampler, Sampler))
        for name, modalities in (("given", given), ("targets", targets)):
            if not modalities:
                raise ValueError(f"GenerationPictures: {name}: none; such as given [image] targets [palette]")
        self.given, self.targets, self.sampler = given, targets, sampler or Sampler()

    def draw(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, names: list[str], title: str
    ) -> dict[str, Figure | None]:
        assert has(pl_module, DecodesTokens)
        made = dict[tuple[str, str], list[Shown | None]]()
        for given in self.given:
            rows = batch.present[given].nonzero().squeeze(1)
            targets = [m for m in self.targets if m != given]
            if len(rows) and targets:
                some = batch.select(rows)
                with torch.no_grad(), trainer.precision_plugin.val_step_context():
                    for m in targets:  # each from the given one alone
                        generated = self.sampler(pl_module, some, [given], [m])[m]
                        made[given, m] = self._collect_outputs(trainer, generated, rows, len(batch))
        everyone = torch.arange(len(batch), device=batch.device)
        truth = {
            m: self._collect_outputs(trainer, batch.inputs[m], everyone, len(batch)) for m in self.modalities or []
        }
        if trainer.sanity_checking or not trainer.is_global_zero:
            return {}
        for m, row in truth.items():
            for k, here in enumerate(batch.present[m].tolist()):
                row[k] = row[k] if here else None
        return {"": grid(truth, made, self.given, self.targets, names, title)}

    @staticmethod
    def _collect_outputs(trainer: L.Trainer, x: Tensor, rows: Tensor, samples: int) -> list[Shown | None]:
        """Return one image or text for each sample of the batch, None where nothing was generated."""
        shown = list[Shown | None]([None] * samples)
        tokenizer = getattr(datamodule_of(trainer), "tokenizer", None)
        for row, one in zip(rows.tolist(), x.cpu(), strict=True):
            shown[row] = _words(one.tolist(), tokenizer) if one.ndim == 1 else one
        return shown


def _words(ids: list[int], tokenizer: object) -> str:
    content = [i for i in ids if i != getattr(tokenizer, "pad", None)]
    try:
        return str(tokenizer.decode(content))  # type: ignore[attr-defined]
    except (AttributeError, NotImplementedError):  # no tokenizer, or a lossy one
        return " ".join(map(str, content))
