"""Exact matches of generated modalities. Letters: B samples of a batch, n those that have both modalities."""

from __future__ import annotations

import lightning as L
import torch
from torch import Tensor

from descant.callbacks.evaluate.forward import ForwardEvaluator
from descant.callbacks.evaluate.reconstruction import require_modalities
from descant.modules.core.batch import Batch
from descant.modules.core.capabilities import has
from descant.modules.core.objective import Term
from descant.modules.core.objects import require_objects
from descant.modules.core.protocols import DecodesTokens
from descant.modules.masking.sampler import Sampler

#: Temperature at which only the most probable token is drawn.
GREEDY = 1e-6


class GenerationAccuracy(ForwardEvaluator):
    """Share of samples for which a masked model generates a whole modality exactly, such as the name of a picture.

        exact_{target}_from_{given} = mean_n [generated_n = truth_n in all tokens]

    Args:
        given: modalities to generate from, all at once.
        target: the modality to generate, such as a text.
        sampler: how to sample; by default greedily: the most probable tokens.
        sets, limit, every, validate: see :class:`ForwardEvaluator`.

    >>> GenerationAccuracy(given=[], target="text")
    Traceback (most recent call last):
    ValueError: GenerationAccuracy: given: none; such as given [image] target text
    """

    needs = (DecodesTokens,)
    identity = ("given", "target", "sets")

    def __init__(
        self,
        given: list[str],
        target: str,
        sampler: Sampler | None = None,
        sets: list[str] | None = None,
        limit: int | None = None,
        every: int = 1,
        validate: bool = True,
    ) -> None:
        super().__init__(sets, limit, every, validate)
        require_objects(self, sampler=(sampler, Sampler))
        if not given:
            raise ValueError("GenerationAccuracy: given: none; such as given [image] target text")
        self.given, self.target = given, target
        self.sampler = sampler or Sampler(steps=1, temperature={target: GREEDY})

    def run(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, keep_B: Tensor, name: str) -> None:
        assert has(pl_module, DecodesTokens)
        require_modalities(self, batch, (*self.given, self.target))
        both_B = torch.stack([batch.present[m] for m in (*self.given, self.target)]).all(dim=0) & keep_B
        some = batch.select(both_B.nonzero().squeeze(1))
        exact_n = both_B[:0]  # every rank has the same keys
        if len(some):
            with torch.no_grad(), trainer.precision_plugin.val_step_context():
                made = self.sampler(pl_module, some, self.given, [self.target])[self.target]
            exact_n = (made == some.inputs[self.target]).flatten(1).all(dim=1)
        self._means.add(f"{name}/exact_{self.target}_from_{'+'.join(self.given)}", Term(exact_n.float()))
