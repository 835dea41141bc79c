"""Missing-modality adaptation of a trained recipe: modulation, imputation, LoRA.

Claim: a frozen network with few parameters for each set of available modalities recovers much of what it loses when
modalities are absent, and is unchanged when all are present.

    S_b  = a set of modalities, sampled for sample b among those that it has
    h'   = f_S(h)                  after each layer, with the parameters of S_b (ModulationBank), or imputed features
    loss = the recipe's own, on the batch of which all but S_b was left out

Baselines use the same arguments: another ``fill`` (zeros, means, prompts), or ``adapt: [Lora]`` instead of a bank. With
``frozen: false``, the whole network trains further. With learning rate 0, a bank leaves the network unadapted.

What differs from the paper: rows of several sets share a batch (one set for all: ``available.per: batch``). A loss is
divided by the rows of this batch on all ranks. Only these are known to remain, so gradient accumulation is refused.
Source: Reza 2023 (arXiv 2310.03986). Letters: B samples, D width, N rows of a term, C classes.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from descant.modules.core.batch import Batch
from descant.modules.core.output import Output
from descant.modules.core.ranks import gather, world
from descant.modules.io import saved
from descant.modules.missing_modalities.available_sets import AvailableSets
from descant.modules.missing_modalities.imputation import Imputer
from descant.modules.missing_modalities.modulation import ModulationBank, touch_parameters
from descant.modules.training_setup.sharding import reach_outputs, units
from descant.recipes.base.adapted import (
    AdaptedRecipe,
    build_imputer,
    require_adaptable,
    require_learning,
    require_towers_of,
    unfreeze_inside,
)
from descant.recipes.base.rebuild import rebuild


class MissingModality(AdaptedRecipe):
    """Adapt a trained recipe to missing modalities (modulation, LoRA, imputation).

    This recipe reads the run at ``path`` each time it is built (to resume, validate or load). It has all capabilities
    of the inner recipe (embed, score, fuse ...), with the parameters for each sample's modalities.

    Args:
        path: a run folder, a checkpoint in one, or an export, of any recipe with towers.
        checkpoint: in a run folder: best, last or a file in it.
        bank: parameters for each set of available modalities, or none.
        fill: imputes features of absent modalities, which the recipe then treats as present; without it, the recipe
            applies its own masks.
        available: which modalities training samples keep; by default any set but the empty and the full one, equally
            often.
        frozen: keep the whole recipe unchanged, including running statistics.
    """

    def __init__(
        self,
        path: Path | str,
        checkpoint: str = "best",
        bank: ModulationBank | None = None,
        fill: Imputer | None = None,
        available: AvailableSets | None = None,
        frozen: bool = True,
        **kwargs: Any,
    ) -> None:
        found = saved.find(path, checkpoint)
        inner = rebuild(found)
        require_adaptable(found, inner, bank, kwargs)
        super().__init__(inner, **kwargs)
        self.path, self.frozen = path, frozen
        self.size = sum(p.numel() for p in inner.parameters())
        self.available, self.bank, self.fill = available or AvailableSets(), bank, fill
        sets = self.available.of(self.modalities)
        self._kept: list[nn.Module] = unfreeze_inside(inner) if frozen else []
        if bank is not None:
            bank.attach(inner, self.modalities, sets)
        if fill is not None:
            build_imputer(fill, inner, self.modalities, sets)
        self._learns = False
        self.train()

    def train(self, mode: bool = True) -> MissingModality:
        super().train(mode)
        for module in self._kept:  # but not what adapters add to them
            module.training = False
        return self

    def setup(self, stage: str) -> None:
        super().setup(stage)
        require_towers_of(self, stage)

    def configure_model(self) -> None:
        if self.sharding is not None and not self._configured:
            reach_outputs(units(self.inner))
        super().configure_model()

    def on_fit_start(self) -> None:
        super().on_fit_start()
        if self.bank is not None:  # after adapters and the strategy, which may replace layers
            self.bank.require_hooked(self.inner)

    # what each sample has -----------------------------------------------------------------------------------------

    def drop_modalities(self, batch: Batch) -> Batch:
        """Return the batch in which each sample keeps only a randomly drawn set of its modalities."""
        present = self.available.remaining_modalities(batch.present, batch.rng_seed, self.modalities)
        step = present if world() == 1 else {m: gather(mask_B) for m, mask_B in present.items()}
        return replace(batch, present=present, step=dict(step))

    def forward(self, batch: Batch) -> Output:
        with self.routing(self.drop_modalities(batch)) as routed:
            output = self.inner.forward(routed)
        if not self._learns:
            require_learning(self, output.all_terms())
            self._learns = True
        extra = [p for part in (self.bank, self.fill) if part is not None for p in part.parameters()]
        first, term = next(iter(output.terms.items()))
        return replace(output, terms={**output.terms, first: replace(term, value=touch_parameters(term.value, extra))})
