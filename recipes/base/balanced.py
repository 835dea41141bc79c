"""Classifiers whose modalities can be balanced: a mixin for recipes, and a base for any LightningModule.

Letters: B samples, C classes, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import lightning as L
import torch
from torch import Tensor, nn

from descant.modules.balance.regularizer import FusionContext, Regularizer
from descant.modules.core.batch import Batch, some
from descant.modules.core.dtype import promote
from descant.modules.core.hooks import GradientHooks
from descant.modules.core.loss_reduction import Step
from descant.modules.core.objective import Term
from descant.modules.core.output import FusionInputs, Output
from descant.modules.fusion.classifiers import FusionHead, cross_entropy, only
from descant.recipes.base.fused_space import FUSED, LatentFusion, OwnHeads


class Balanced(LatentFusion):
    """Mixin of a classifier: each modality's share of the logits, regularizers, and masks that callbacks set."""

    training: bool
    regularizers: nn.ModuleList
    #: Maps a training batch to the presence masks that the fusion gets; None keeps the batch's own masks.
    modality_mask: Callable[[Batch], Mapping[str, Tensor]] | None = None

    def build_regularizers(self, parts: list[Regularizer] | None, classes: int) -> nn.ModuleList:
        return nn.ModuleList(part.build(self.fusion.widths, classes) for part in parts or ())

    def shares(self, z: dict[str, Tensor], present: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Split ``logits_BC`` into each modality's Shapley share; the logits without any modality are split equally."""
        z, present = self.fusion.check_latents(z, present)
        nobody_BC = self.fuse(z, only(present)) / len(z)
        return {m: promote(part_BC) + nobody_BC for m, part_BC in self.fusion.parts(z, present).items()}

    def fusion_mask(self, batch: Batch) -> Mapping[str, Tensor]:
        """Return the fusion's presence masks: those of the batch or, in training, those that a callback makes."""
        mask = self.modality_mask if self.training else None
        return batch.present if mask is None else mask(batch)

    def rows(self, batch: Batch) -> Tensor:
        """Count the samples of the whole step that have a modality with a tower (at least 1)."""
        return some(*(batch.step[m] for m in self.fusion.widths)).sum().clamp(min=1)

    def regularize(
        self,
        inputs: FusionInputs,
        fused_present: Mapping[str, Tensor],
        logits_BC: Tensor,
        batch: Batch,
        terms: Mapping[str, Term],
    ) -> dict[str, Term]:
        """Compute the terms of all regularizers. Raise ValueError if two terms have the same name."""
        context = FusionContext(inputs, fused_present, logits_BC, self.fuse, self.fusion, batch, self.rows(batch))
        aux: dict[str, Term] = {}
        for regularizer in self.regularizers:
            more = regularizer(context)
            if twice := more.keys() & {*terms, *aux}:
                raise ValueError(
                    f"two parts have a term {min(twice)!r}: {type(regularizer).__name__} and one before it"
                )
            aux |= more
        return aux


class BalancedClassifier(Balanced, OwnHeads, L.LightningModule):
    """LightningModule whose modalities Descant's callbacks can balance; a subclass adds towers, labels and steps.

        z_m = towers[m](x_m)        logits = fusion({z_m})
        loss = cross_entropy(logits, label) + sum over m: cross_entropy(own_m(z_m), label), where asked for
               + what regularizers and callbacks add

    A subclass fills ``towers`` with one module per modality, ``[B, ...] -> [B, D_m]``. It implements
    ``labels(batch)``, int64 ``[B]``, and its own steps; ``training_step`` returns ``loss(batch)``. Each batch is a
    :class:`Batch`, which names the inputs and marks the samples that have them.

    Args:
        fusion: fusion of the latents, built for their widths, such as
            ``LateFusion().build({"image": 64, "sound": 32}, 3)``.
        unimodal: add a linear head and a loss for each modality alone, as GradientBlending and MMPareto require.
        regularizers: additional terms, computed from the latents and the logits.

    >>> from descant import LateFusion
    >>> class Two(BalancedClassifier):
    ...     def labels(self, batch): return batch.targets["kind"]
    >>> two = Two(LateFusion().build({"image": 4, "sound": 4}, classes=3))
    >>> two.towers.update({"image": nn.Linear(6, 4), "sound": nn.Linear(5, 4)})
    >>> present = dict.fromkeys(("image", "sound"), torch.ones(2, dtype=torch.bool))
    >>> batch = Batch({"image": torch.zeros(2, 6), "sound": torch.zeros(2, 5)}, present, {"kind": torch.tensor([0, 2])})
    >>> list(two(batch).terms), two.shares(two.latents(batch))["image"].shape
    (['fused'], torch.Size([2, 3]))
    """

    def __init__(
        self, fusion: FusionHead, unimodal: bool = False, regularizers: list[Regularizer] | None = None
    ) -> None:
        super().__init__()
        self.towers, self.fusion, self.hooks = nn.ModuleDict(), fusion, GradientHooks()
        self.classes = fusion(
            {m: torch.zeros(1, width, dtype=_dtype(fusion)) for m, width in fusion.widths.items()}
        ).shape[1]
        self.make_own(self.classes, unimodal)
        self.regularizers = self.build_regularizers(regularizers, self.classes)
        self.step = Step()
        self.output: Output | None = None

    @property
    def modalities(self) -> tuple[str, ...]:
        return tuple(self.fusion.widths)

    def labels(self, batch: Batch) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__}: labels(batch) -> int64 [B], below 0 for none")

    def latents(self, batch: Batch) -> dict[str, Tensor]:
        """Compute ``z_BD`` of each modality; rows of absent samples are zero."""
        z = {m: self.towers[m](batch.inputs[m]) for m in self.modalities}
        return {m: torch.where(batch.present[m][:, None], z_BD, torch.zeros_like(z_BD)) for m, z_BD in z.items()}

    def of_modality(self, modality: str) -> Iterator[nn.Parameter]:
        return self.towers[modality].parameters()

    def shared_parameters(self) -> Iterator[nn.Parameter]:
        return (p for p in self.towers.parameters() if p.requires_grad)

    def forward(self, batch: Batch) -> Output:
        label_B, z = self.labels(batch), self.latents(batch)
        fused_present = self.fusion_mask(batch)
        logits_BC, own = self.outputs(z, batch, fused_present)
        terms = {FUSED: self._term(logits_BC, label_B, some(*batch.present.values()), self.rows(batch))}
        for m, own_BC in own.items():
            terms[m] = self._term(own_BC, label_B, batch.present[m], batch.step[m].sum().clamp(min=1))
        inputs = FusionInputs(z, batch.present, label_B)
        aux = self.regularize(inputs, fused_present, logits_BC, batch, terms)
        return Output(terms, z, aux=aux, fusion=inputs)

    def _term(self, logits_BC: Tensor, label_B: Tensor, here_B: Tensor, norm: Tensor) -> Term:
        return Term(cross_entropy(logits_BC, label_B), valid=here_B & (label_B >= 0), norm=norm)

    def setup(self, stage: str) -> None:
        self.step.world, self.step.accumulate = self.trainer.world_size, self.trainer.accumulate_grad_batches

    def loss(self, batch: Batch) -> Tensor:
        """Compute the scalar to return from ``training_step``; callbacks read its parts in ``output`` and ``step``."""
        batch = self.step.with_counts(batch)
        output: Output = self(batch)
        self.output = output
        return self.step(self.hooks.watch(output.all_terms()), batch).total


def _dtype(module: nn.Module) -> torch.dtype:
    return next((p.dtype for p in module.parameters()), torch.get_default_dtype())
