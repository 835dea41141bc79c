"""Masked table columns as one of several objectives: predict categories and numbers from the rest, and an image.

Letters: B samples, C columns, N hidden categories and M hidden numbers of all samples, K categories of all columns, T
= 1 + C tokens, D width.
"""

from __future__ import annotations

from typing import Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from descant.modules.core.batch import Batch
from descant.modules.core.capabilities import has
from descant.modules.core.dtype import promote
from descant.modules.core.host import derive, host_copy, to_device
from descant.modules.core.objective import Term, means
from descant.modules.core.protocols import HidesCells
from descant.modules.core.sham import Sham
from descant.modules.masking.corruptions import Masks
from descant.modules.masking.decoders import At
from descant.modules.objectives.base import Facts, TaskObjective
from descant.modules.objectives.masked import hidden_tokens, of_present
from descant.modules.objectives.streams import Streams
from descant.modules.transforms.table import random_columns


def cell_losses(
    score_NK: Tensor, code_N: Tensor, row_N: Tensor, y_M: Tensor, x_M: Tensor, row_M: Tensor, rows: int
) -> tuple[Tensor, Tensor]:
    """Compute the loss ``[B]`` of hidden cells, half from categories and half from numbers, and mark samples with any.

        value_b = (mean over n of b: cross_entropy(s_n, code_n) + mean over m of b: (y_m - x_m)^2) / 2

    A half without cells is 0, for a sample as for a batch.

    Args:
        score_NK, code_N: logits of the codes of all columns, and the true code.
        y_M, x_M: predicted and true numbers, standardised.
        row_N, row_M: the sample of each cell.
        rows: B.

    >>> none_N = torch.zeros(0, dtype=torch.long)
    >>> cell_losses(torch.zeros(0, 4), none_N, none_N, torch.tensor([1.0]), torch.tensor([3.0]), torch.tensor([1]), 2)
    (tensor([0., 2.]), tensor([False,  True]))
    """
    category_B, some_B = means(F.cross_entropy(score_NK, code_N, reduction="none"), row_N, rows)
    number_B, more_B = means((y_M - x_M).square(), row_M, rows)
    return (category_B + number_B) / 2, some_B | more_B


class MaskedColumns(TaskObjective):
    """Masked tabular reconstruction (TIP): predicts hidden cells of a table from the others, and a fused modality.

        value_b = :func:`cell_losses` of the hidden cells, from the tokens of their columns

    In each sample exactly ``round(rate C)`` random columns are hidden; columns that the sample lacks are not targets.
    The tower treats a hidden cell as missing: its value changes no bit of any token, and ``TableTower.missing`` decides
    which tokens attend to it.

    Source: Du 2024 (TIP, arXiv 2407.07582) and its release: one layer for the codes of all columns, one for all
    numbers. The release differs in three points. A batch without a hidden category or number has the loss nan. Its
    means are over the cells of a batch; here they are over those of a sample, so that the loss does not depend on how a
    step is divided. And it bounds ``exp(-loss)`` of a category below by 1e-8.

    Args:
        modality: the table.
        given: the modality that it is fused with, such as image; without it, the tower's own tokens predict.
        rate: share of the columns that is hidden.
        codes: codes in the softmax of a category: ``all`` codes of all columns, as in the release, or those of its
            ``column``.
        sham: ``permute`` exchanges the hidden values of a column among the samples.
    """

    first_C: Tensor
    count_C: Tensor
    mask_token_modalities = ()  # the tower has its own token for missing cells

    def __init__(
        self,
        modality: str = "table",
        given: str | None = None,
        rate: float = 0.5,
        codes: Literal["all", "column"] = "all",
        sham: Literal["permute"] | None = None,
    ) -> None:
        super().__init__()
        self.modality, self.given, self.rate, self.codes, self.sham = modality, given, rate, codes, Sham(sham)

    def build(self, facts: Facts) -> Self:
        m, given = self.modality, self.given
        self.reads, self.hidden = (m,) if given is None else (m, given), (m,)
        facts.require(self.reads)
        tower = facts.towers[m]
        if not has(tower, HidesCells):
            raise ValueError(f"tower {m}: {type(tower).__name__} has no columns to hide; a TableTower has")
        columns = tower.columns
        self.hides_of_each = round(self.rate * len(columns))
        if not 0 < self.hides_of_each < len(columns):
            raise ValueError(f"rate {self.rate:g} hides {self.hides_of_each} of {len(columns)} columns; such as 0.5")
        self.hiding, width = ("columns", m, self.rate), tower.width
        if given is not None:
            width, self.fuses = facts.fused_width(m, given), ((m, given),)
        self.categorical_C = torch.tensor(columns) > 0  # on the CPU, where masks are made
        first = [sum(columns[:c]) for c in range(len(columns))]
        self.register_buffer("first_C", torch.tensor(first), persistent=False)
        self.register_buffer("count_C", torch.tensor(columns), persistent=False)
        self.categories, self.numbers = nn.Linear(width, max(sum(columns), 1)), nn.Linear(width, 1)
        return self

    def hides(self, batch: Batch) -> Masks:
        real_BC = derive(of_present, derive(_present, batch.inputs[self.modality]), batch.present[self.modality])
        real_BC, draw_B = host_copy(real_BC), host_copy(batch.rng_seed)
        hidden_BC = random_columns(draw_B, real_BC.shape[1], self.hides_of_each, "columns/hidden")
        target_BC = to_device(real_BC & hidden_BC, batch.device)
        visible_BC = to_device(real_BC & ~hidden_BC, batch.device)
        return Masks(*({self.modality: mask_BC} for mask_BC in (visible_BC, target_BC, target_BC)))

    def cells(self, streams: Streams, batch: Batch) -> tuple[At, Tensor, Tensor, At, Tensor, Tensor]:
        """Return hidden categories (index, logits ``[N, K]``, codes ``[N]``) and numbers (index, ``y_M``, ``x_M``)."""
        assert streams.masks is not None
        hidden_BC = derive(of_present, streams.masks.loss[self.modality], batch.both(*self.reads))
        x_BC, host_BC = self._targets(batch, hidden_BC), host_copy(hidden_BC)
        found: list[tuple[At, Tensor, Tensor]] = []
        for layer, of_C in ((self.categories, self.categorical_C), (self.numbers, ~self.categorical_C)):
            at = At.of(to_device(host_BC & of_C, batch.device))
            token = At(at.row_N, at.place_N + 1, at.count_B)  # the class token comes first
            h_ND = hidden_tokens(streams, self.modality, self.given, token)
            with streams.rows(at.row_N):
                found.append((at, promote(layer(h_ND)), x_BC[at.row_N, at.place_N]))
        (at_N, score_NK, x_N), (at_M, y_M1, x_M) = found
        first_N = self.first_C[at_N.place_N]
        if self.codes == "column":
            score_NK = own_codes(score_NK, first_N, self.count_C[at_N.place_N])
        return at_N, score_NK, first_N + x_N.long(), at_M, y_M1[:, 0], x_M.to(y_M1.dtype)

    def _targets(self, batch: Batch, hidden_BC: Tensor) -> Tensor:
        x_BC = batch.inputs[self.modality]
        each = (self.sham(x_B, batch.rng_seed, hidden_B) for x_B, hidden_B in zip(x_BC.T, hidden_BC.T, strict=True))
        return torch.stack([*each], dim=1)

    def forward(self, streams: Streams, batch: Batch) -> dict[str, Term]:
        at_N, score_NK, code_N, at_M, y_M, x_M = self.cells(streams, batch)
        value_B, has_B = cell_losses(score_NK, code_N, at_N.row_N, y_M, x_M, at_M.row_N, len(batch))
        return {"": Term(value_B, valid=has_B, norm=batch.count(*self.reads).clamp(min=1))}

    def scores(self, streams: Streams, batch: Batch) -> dict[str, Term]:
        """Compute ``loss``, and ``accuracy`` of the hidden categories, for each sample."""
        at_N, score_NK, code_N, at_M, y_M, x_M = self.cells(streams, batch)
        value_B, has_B = cell_losses(score_NK, code_N, at_N.row_N, y_M, x_M, at_M.row_N, len(batch))
        right_B, some_B = means((score_NK.argmax(dim=1) == code_N).to(score_NK.dtype), at_N.row_N, len(batch))
        return {"accuracy": Term(right_B, valid=some_B), "loss": Term(value_B, valid=has_B)}


def own_codes(score_NK: Tensor, first_N: Tensor, count_N: Tensor) -> Tensor:
    """Keep the logits of the codes of each cell's own column, and set the others to minus infinity.

    >>> own_codes(torch.zeros(1, 4), torch.tensor([1]), torch.tensor([2])).tolist()
    [[-inf, 0.0, 0.0, -inf]]
    """
    at_K = torch.arange(score_NK.shape[1], device=score_NK.device)
    own_NK = (at_K >= first_N[:, None]) & (at_K < (first_N + count_N)[:, None])
    return score_NK.masked_fill(~own_NK, -torch.inf)


def _present(x_BC: Tensor) -> Tensor:
    return ~x_BC.isnan()
