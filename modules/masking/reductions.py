"""Reductions that average the token losses of several modalities into one loss. Letters: B samples, M modalities."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from descant.modules.core.batch import Batch, some
from descant.modules.core.host import derive
from descant.modules.evaluation.metrics import wide


class Scale(NamedTuple):
    """Scale of one modality's term, whose value is the mean over a sample's counted tokens.

    ``weight_B``: weight of each sample, None for ones. ``norm``: divisor of the sum over samples.
    """

    weight_B: Tensor | None
    norm: Tensor


class TargetCounts(NamedTuple):
    """Targets of a batch.

    ``tokens``: modality -> number of targets, int64 ``[B]``, n_bm. ``sizes``: modality -> outputs per token, C_m.
    ``parts``: number of micro-batches in an optimizer step, over all ranks.
    """

    tokens: Mapping[str, Tensor]
    sizes: Mapping[str, int]
    batch: Batch
    parts: int = 1

    def samples(self) -> Tensor:
        """Count the samples of the whole optimizer step that have any of the modalities, at least 1."""
        return derive(Tensor.sum, some(*(self.batch.step[m] for m in self.tokens))).clamp(min=1)

    @staticmethod
    def example() -> TargetCounts:
        """Make two samples, the second without b, for the examples below."""
        batch = Batch({}, {"a": torch.tensor([True, True]), "b": torch.tensor([True, False])})
        return TargetCounts({"a": torch.tensor([3, 1]), "b": torch.tensor([1, 0])}, {"a": 2, "b": 100}, batch)


class Reduction(nn.Module):
    """Base of reductions: ``reduction(counts)`` returns modality -> :class:`Scale`."""

    def forward(self, of: TargetCounts) -> dict[str, Scale]:
        raise NotImplementedError


class SumOfModalities(Reduction):
    """Sum over modalities of the mean over samples: ``L = sum_m 1/|samples with m| sum_b mean_t loss_bmt``.

    >>> [float(scale.norm) for scale in SumOfModalities()(TargetCounts.example()).values()]
    [2.0, 1.0]
    """

    def forward(self, of: TargetCounts) -> dict[str, Scale]:
        return {m: Scale(None, of.batch.count(m).clamp(min=1)) for m in of.tokens}


class MeanOfModalities(Reduction):
    """Mean over a sample's modalities that have targets: ``L = mean_b mean_m mean_t loss_bmt``, 4M's default.

    The mean over samples includes those with any modality. Source: arXiv 2312.06647; the mean per sample is our
    reading.

    >>> [scale.weight_B.tolist() for scale in MeanOfModalities()(TargetCounts.example()).values()]
    [[0.5, 1.0], [0.5, 1.0]]
    """

    def forward(self, of: TargetCounts) -> dict[str, Scale]:
        with_targets_B = torch.stack([count_B > 0 for count_B in of.tokens.values()]).sum(dim=0)
        weight_B = 1 / with_targets_B.clamp(min=1).to(wide(with_targets_B.device))
        return {m: Scale(weight_B, of.samples()) for m in of.tokens}


class MeanOfTokens(Reduction):
    """Mean over all targets of a sample, of any modality: ``L = mean_b sum_mt loss_bmt / sum_m n_bm``.

    >>> [scale.weight_B.tolist() for scale in MeanOfTokens()(TargetCounts.example()).values()]
    [[0.75, 1.0], [0.25, 0.0]]
    """

    def forward(self, of: TargetCounts) -> dict[str, Scale]:
        total_B = torch.stack([*of.tokens.values()]).sum(dim=0).clamp(min=1)
        total_B = total_B.to(wide(total_B.device))
        return {m: Scale(count_B / total_B, of.samples()) for m, count_B in of.tokens.items()}


class ReleasedModalities(Reduction):
    """Loss ``mod`` of 4M's release: ``L = 1/M sum_m mean over all targets of m in the micro-batch``.

    M is the number of the model's modalities; one without a target in the micro-batch adds 0. A long sample counts more
    than a short one, and the loss depends on how a step is divided into micro-batches.

    Source: apple/ml-4m, ``FourM.forward_mod_loss``.

    >>> ReleasedModalities()(TargetCounts.example())["a"]
    Scale(weight_B=tensor([3, 1]), norm=tensor(8))
    """

    by_rank = "averages over the targets of a rank's micro-batch, as released"

    def forward(self, of: TargetCounts) -> dict[str, Scale]:
        return {m: Scale(n_B, n_B.sum().clamp(min=1) * len(of.tokens) * of.parts) for m, n_B in of.tokens.items()}


class ReleasedTokens(Reduction):
    """Loss ``token`` of 4M's release: ``L = sum_bmt C_m loss_bmt / sum_bm C_m n_bm`` over a micro-batch.

    It averages over logits, so a modality's weight is its number of tokens times its vocabulary C_m. The loss depends
    on how a step is divided into micro-batches. Source: apple/ml-4m, ``FourM.forward_token_loss``.

    >>> ReleasedTokens()(TargetCounts.example())["b"]
    Scale(weight_B=tensor([100,   0]), norm=tensor(108))
    """

    by_rank = "averages over the targets of a rank's micro-batch, as released"

    def forward(self, of: TargetCounts) -> dict[str, Scale]:
        weight = {m: count_B * of.sizes[m] for m, count_B in of.tokens.items()}
        norm = torch.stack([*weight.values()]).sum().clamp(min=1) * of.parts
        return {m: Scale(weight_B, norm) for m, weight_B in weight.items()}
