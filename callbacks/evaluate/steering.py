"""Whether pictures generated from a palette have its hues. Letters: B rows of a batch, M colours."""

from __future__ import annotations

import lightning as L
import torch
from torch import Tensor

from descant.callbacks.evaluate.forward import ForwardEvaluator, Means
from descant.callbacks.evaluate.reconstruction import Inputs, require_modalities, with_others
from descant.modules.core.batch import Batch
from descant.modules.core.capabilities import has
from descant.modules.core.objective import Term
from descant.modules.core.objects import require_objects
from descant.modules.core.protocols import DecodesTokens
from descant.modules.masking.sampler import Sampler
from descant.modules.transforms.palette import dominant_colours, hue_error


class Steering(ForwardEvaluator):
    """Hue errors of generated pictures for the palette of another sample, with and without that palette given (4M-21).

        hue_error = mean_n hue_error(p_o(n), colours(sample(given_n, p_o(n)))),   _free: colours(sample(given_n))

    Errors are in degrees, see :func:`descant.modules.transforms.palette.hue_error`. o(n) is a row of other content, and
    both samples use the same random draws. ``steering`` is the first over the second: 1 if the model ignores the
    palette. A model without an adapter for the palette cannot receive it, so both are the error of its free samples.
    Palettes without a hue do not count. Results depend on neither batches nor ranks: the inputs of a set are held in
    memory, by id.

    Args:
        given: modalities that pictures are generated from.
        palette: modality of colours, float ``[B, M, 3]`` in -1..1.
        target: modality of pictures.
        sampler: how to sample; by default eight steps, the most probable tokens first.
        batch: samples generated at once.
        sets, limit, every, validate: see :class:`ForwardEvaluator`.

    >>> Steering(given=["text", "image"])
    Traceback (most recent call last):
    ValueError: Steering: given ['text', 'image'], target image, palette dominant: each once, such as given [text]
    """

    needs = (DecodesTokens,)
    identity = ("given", "palette", "target", "sets")

    def __init__(
        self,
        given: list[str],
        palette: str = "dominant",
        target: str = "image",
        sampler: Sampler | None = None,
        sets: list[str] | None = None,
        limit: int | None = None,
        batch: int = 128,
        every: int = 1,
        validate: bool = True,
    ) -> None:
        super().__init__(sets, limit, every, validate)
        require_objects(self, sampler=(sampler, Sampler))
        if not given or len({*given, palette, target}) < len(given) + 2:
            what = f"given {given}, target {target}, palette {palette}"
            raise ValueError(f"Steering: {what}: each once, such as given [text]")
        if batch < 1:
            raise ValueError(f"Steering: batch {batch}; 1 is the least")
        self.given, self.palette, self.target = list(given), palette, target
        self.sampler, self.batch = sampler or Sampler(), batch

    def _forget(self) -> None:
        super()._forget()
        self._sets: dict[str, Inputs] = {}

    def run(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, keep_B: Tensor, name: str) -> None:
        needed = [*self.given, self.palette]
        require_modalities(self, batch, needed)
        inputs = self._sets.setdefault(name, Inputs(needed, pl_module.device))
        inputs.add(batch, keep_B & batch.both(*needed))

    def results(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Tensor]:
        assert has(pl_module, DecodesTokens)
        values: dict[str, Tensor] = {}
        for name, inputs in self._sets.items():
            rows, means = inputs.store.compute(), Means()
            at_N = torch.stack([rows.present[m] for m in (*self.given, self.palette)]).all(0).nonzero().squeeze(1)
            if len(at_N) == 0 or int(rows.key[at_N].unique().numel()) < 2:
                continue
            for real_B, at_B, other_B in with_others(trainer, rows, at_N, self.batch):
                everyone_B = torch.ones_like(real_B)  # the sampler refuses rows that lack a given modality
                batch = inputs.batch(rows, dict.fromkeys(self.given, at_B) | {self.palette: other_B}, everyone_B, at_B)
                asked_BM3 = batch.inputs[self.palette]
                for end, given in (("", [*self.given, self.palette]), ("_free", self.given)):
                    given = [m for m in given if m in pl_module.adapters or m != self.palette]
                    with torch.no_grad(), trainer.precision_plugin.val_step_context():
                        made = self.sampler(pl_module, batch, given, [self.target])[self.target]
                    error_B, has_B = hue_error(asked_BM3.float(), dominant_colours(made, asked_BM3.shape[1]))
                    means.add(f"hue_error{end}", Term(error_B, valid=has_B & real_B))
            found = means.compute()
            if found:
                found["steering"] = found["hue_error"] / found["hue_error_free"]
            values |= {f"{name}/{key}": value for key, value in found.items()}
        return values
