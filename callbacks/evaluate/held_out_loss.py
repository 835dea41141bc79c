"""The contrastive loss of held-out pairs. Letters: K pairs, D width."""

from __future__ import annotations

import lightning as L
import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from descant.callbacks.evaluate.embeddings import EmbeddingEvaluator, Rows, Values
from descant.callbacks.evaluate.forward import Means
from descant.modules.core.capabilities import has
from descant.modules.core.dtensor import gather_parts
from descant.modules.core.dtype import promote
from descant.modules.core.objective import Term
from descant.modules.core.protocols import ContrastsPairs, Embeds


def matched_rows(rows: Rows, a: str, b: str) -> tuple[Tensor, Tensor]:
    """Match rows of two modalities by content. A content that has both gives one pair, of its first row in each.

    Returns rows of ``a`` and rows of ``b``, int64 ``[K]``.

    >>> present = {"a": torch.tensor([True, True, False]), "b": torch.tensor([False, False, True])}
    >>> rows = Rows({}, present, key=torch.tensor([7, 5, 5]), index=torch.arange(3), targets={})
    >>> matched_rows(rows, "a", "b")
    (tensor([1]), tensor([2]))
    """
    at = {m: rows.present[m].nonzero()[:, 0].cpu().numpy() for m in (a, b)}
    key = {m: rows.key.cpu().numpy()[at[m]] for m in (a, b)}
    (key_a, first_a), (key_b, first_b) = (np.unique(key[m], return_index=True) for m in (a, b))
    _, in_a, in_b = np.intersect1d(key_a, key_b, assume_unique=True, return_indices=True)
    return torch.from_numpy(at[a][first_a[in_a]]), torch.from_numpy(at[b][first_b[in_b]])


class HeldOutLoss(EmbeddingEvaluator):
    """Loss of the pairs of each evaluation set, ``{set}/loss``, as in a training batch of these pairs.

        loss = sum over pairs (a, b) of mix * mean_k pair loss(z_a, z_b)_k      k: contents of the set that have both

    All pairs form one batch, so the loss grows with their number as it does with a batch. It can be compared between
    evaluations of one set, and does not depend on batch size or ranks. If the recipe has several pairs of modalities,
    ``{set}/loss_{pair}`` is the loss of each. The terms of two views and of hard negatives are left out, since
    evaluation has neither.

    Args:
        most: maximum pairs of a set, the first ones by their content; memory grows with its square.
    """

    once = True
    needs = (Embeds, ContrastsPairs)

    def __init__(self, most: int = 2048) -> None:
        super().__init__()
        if most < 2:
            raise ValueError(f"HeldOutLoss: most {most} is no number of pairs; 2 is the least")
        self.most = most

    def evaluate(self, trainer: L.Trainer, pl_module: L.LightningModule, sets: dict[str, Rows]) -> Values:
        assert has(pl_module, ContrastsPairs)
        means, mix = Means(), getattr(getattr(pl_module, "step", None), "mix", {})
        for name, rows in sets.items():
            for pair, loss in pl_module.losses.items():
                a, b = pl_module.pairs[pair]
                if a in rows.z and b in rows.z:
                    row_a, row_b = (row_K[: self.most].to(rows.key.device) for row_K in matched_rows(rows, a, b))
                    if len(row_a) > 1:
                        means.add(f"{name} {pair}", _term(loss, rows, (a, b), (row_a, row_b), trainer))
        found = means.compute()
        values: dict[str, Tensor] = {}
        for name in sets:
            each = {pair: found[f"{name} {pair}"] for pair in pl_module.losses if f"{name} {pair}" in found}
            if each:
                values[f"{name}/loss"] = torch.stack([mix.get(p, 1.0) * value for p, value in each.items()]).sum()
            if len(each) > 1:
                values |= {f"{name}/loss_{pair}": value for pair, value in each.items()}
        return dict(values)


def _term(loss: nn.Module, rows: Rows, pair: tuple[str, str], row: tuple[Tensor, Tensor], trainer: L.Trainer) -> Term:
    """Compute the loss of this rank's part of the pairs; the loss itself gathers those of the others."""
    (a, b), (row_a, row_b), K = pair, row, len(row[0])
    part_K = torch.arange(-(-K // trainer.world_size), device=row_a.device) * trainer.world_size + trainer.global_rank
    valid_K, part_K = part_K < K, part_K.clamp(max=K - 1)
    # embeddings are stored in float32; under sharding a scale has one element, and promotes the side it multiplies
    kind = next((promote(p).dtype for p in loss.parameters()), torch.float32)
    z_a_KD, z_b_KD = (rows.z[m][row_K[part_K]].to(kind) for m, row_K in ((a, row_a), (b, row_b)))
    with torch.no_grad():
        # between steps, sharding holds a part of each parameter on each rank
        parameters = {name: gather_parts(p) for name, p in loss.named_parameters()}
        value_K = functional_call(loss, parameters, (z_a_KD, z_b_KD, rows.key[row_a[part_K]], valid_K))
    return Term(value_K, valid=valid_K)
